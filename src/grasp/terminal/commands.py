"""What each verb shows: calls the pipeline, then prints a table or JSON."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from pathlib import Path
from typing import Any

import transformers

from grasp.core.checkpoint import bytes_on_disk
from grasp.core.destination import check_destination
from grasp.core.families import FAMILIES
from grasp.core.manifest import MANIFEST
from grasp.core.models import DTYPES
from grasp.data.files import FILE_TYPES
from grasp.data.text import NAMED
from grasp.errors import Interrupted
from grasp.methods import available
from grasp.recipes import experiment
from grasp.report.plots import check_picture, spectra
from grasp.stages.enough import only_pydoc
from grasp.terminal.bars import emit, megabytes, plain, progress_bars, say, table
from grasp.terminal.results import check_output, finish, show_results
from grasp.verbs import bench as benchmark
from grasp.verbs import compare as comparison
from grasp.verbs import compress as pipeline
from grasp.verbs import dry_run as estimate
from grasp.verbs import evaluate as measurement
from grasp.verbs import export as exporting
from grasp.verbs import inspect as inspection
from grasp.verbs import quantize as quantization


def only_our_own_words() -> None:
    """Let grasp report what it does, and keep transformers' bars and notices out of ours."""
    logging.getLogger("grasp").setLevel(logging.INFO)
    logging.getLogger("huggingface_hub").propagate = False  # it prints for itself
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def compress(model: str, out: Path, options: dict[str, Any], as_json: bool, quiet: bool) -> None:
    """Run `pipeline.compress` and sum up what it did."""
    with progress_bars(quiet) as bars:
        result = pipeline.compress(model, out, progress=bars, **options)
    sizes, edits = result.manifest["parameters"], result.manifest["edits"]
    low_rank = sum(edit["edit"] == "factorize" for edit in edits)
    rows = [
        ("parameters", f"{sizes['before']:,} → {sizes['after']:,}"),
        ("removed", f"{100 * sizes['ratio']:.2f} %"),
        ("edits", f"{low_rank} low-rank matrices, {len(edits) - low_rank} layers dropped"),
        ("bytes on disk", megabytes(bytes_on_disk(out))),
        (
            "seconds",
            ", ".join(
                f"{name} {seconds:.1f}" for name, seconds in result.manifest["seconds"].items()
            ),
        ),
        ("checkpoint", str(out)),
    ]
    table("", ("", ""), rows, left=2)
    if as_json:
        emit(
            {
                "path": str(out),
                "manifest": str(out / MANIFEST),
                "bytes": bytes_on_disk(out),
                **{k: result.manifest[k] for k in ("parameters", "recipe", "seconds", "notes")},
            }
        )


def recover(
    checkpoint: Path, out: Path, options: dict[str, Any], as_json: bool, quiet: bool
) -> None:
    """Run `recovery.recover` and sum up what it did. Of several processes the first speaks."""
    from grasp.compensation.training import way_on

    # the trainer takes a second to import, and needs accelerate
    from grasp.verbs import recover as recovery

    first = os.environ.get("RANK", "0") == "0"
    if not first:
        logging.getLogger("grasp").setLevel(logging.ERROR)
    with progress_bars(quiet or not first) as bars, way_on(out):
        done = recovery.recover(checkpoint, out, progress=bars, **options)
    if not first:
        return
    told, best = done.manifest["recovery"], done.best
    before = done.curve[0]
    rows = [
        (
            "trained",
            (
                f"{told['trained_parameters']:,} numbers ({told['recipe']['train']}), objective"
                f" {told['recipe']['objective']}"
            ),
        ),
        (
            "text",
            (
                f"{told['data']['rows']:,} rows, {told['data']['tokens']:,} tokens;"
                f" {told['data']['held_out_rows']} rows held out"
            ),
        ),
        ("steps", f"{told['steps']:,}, {told['tokens_seen']:,} tokens seen"),
        (
            "held-out loss",
            f"{before['held_out_loss']:.4f} → {best['held_out_loss']:.4f} at step {best['step']}",
        ),
        (
            "held-out cross-entropy",
            f"{before['held_out_lm_loss']:.4f} → {best['held_out_lm_loss']:.4f}",
        ),
        (
            "seconds",
            ", ".join(f"{name} {seconds:.1f}" for name, seconds in told["seconds"].items()),
        ),
        ("checkpoint", str(out)),
    ]
    table("", ("", ""), rows, left=2)
    if as_json:
        emit(
            {
                "path": str(out),
                "manifest": str(out / MANIFEST),
                "bytes": bytes_on_disk(out),
                "recovery": told,
            }
        )


def export(checkpoint: str, out: Path, options: dict[str, Any], as_json: bool) -> None:
    """Run `serving.export` and say what came of it."""
    done = exporting.export(checkpoint, out, **options)
    for note in done.notes:
        say(f"note: {plain(note)}")
    rows = [
        (
            "format",
            f"{done.format}, {done.dtype}{f', matrices {done.weights}' if done.weights else ''}",
        ),
        (
            "low-rank matrices",
            f"{done.pairs}{', multiplied out' if done.pairs and done.format == 'dense' else ''}",
        ),
        (
            "parameters",
            (
                f"{done.parameters_before:,} → {done.parameters_after:,}"
                if done.parameters_before != done.parameters_after
                else f"{done.parameters_before:,}"
            ),
        ),
        ("bytes of the model", megabytes(done.bytes)),
        ("export", str(out)),
    ]
    table("", ("", ""), rows, left=2)
    if as_json:
        emit({**dataclasses.asdict(done), "path": str(done.path)})


def quantize(model: str, out: Path, options: dict[str, Any], as_json: bool, quiet: bool) -> None:
    """Run `quantization.quantize` and sum up what it did."""
    with progress_bars(quiet) as bars:
        done = quantization.quantize(model, out, progress=bars, **options)
    told = done.manifest["quantization"]
    rows = [
        (
            "quantized",
            (
                f"{told['matrices']} matrices to {told['scheme']}, {100 * told['share']:.1f} % of"
                " all numbers"
            ),
        ),
        ("not quantized", "embeddings, output layer, norms, biases"),
        (
            "rounding error",
            (
                f"{100 * told['error_median']:.2f} % of a matrix's norm (median),"
                f" {100 * told['error_largest']:.2f} % at most"
            ),
        ),
        ("bytes", f"{megabytes(told['bytes_before'])} → {megabytes(told['bytes_after'])}"),
        (
            "seconds",
            ", ".join(f"{name} {seconds:.1f}" for name, seconds in told["seconds"].items()),
        ),
        ("checkpoint", str(out)),
    ]
    table("", ("", ""), rows, left=2)
    if as_json:
        emit(
            {
                "path": str(out),
                "manifest": str(out / MANIFEST),
                "bytes": bytes_on_disk(out),
                "quantization": told,
            }
        )


LADDER = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
"""Ratios that a dry run shows beside the one asked for."""


def dry_run(model: str, out: Path, options: dict[str, Any], as_json: bool, quiet: bool) -> None:
    """Say what `compress` would do, what it would cost, and, where the method can tell, what
    perplexity to expect.
    """
    everything = dict(options)
    for name in ("data", "text_field"):
        options.pop(name, None)
    dtype, num_samples, seq_len = options.get("dtype"), options["num_samples"], options["seq_len"]
    check_destination(out, 0, model)
    decoder, method, plan = estimate.dry_run(model, **options)
    width = (DTYPES[dtype] if dtype else decoder.model.dtype).itemsize
    check_destination(
        out,
        (decoder.num_parameters() if plan.parameters is None else plan.parameters) * width,
        model,
    )
    cost = estimate.estimate(decoder, plan, num_samples, seq_len, width)
    before, after = decoder.num_parameters(), plan.parameters
    rows = [
        (
            "model",
            f"{model}: {decoder.family.name}, {decoder.num_layers} layers, {before:,} parameters",
        ),
        ("method", f"{method.name} {method.recipe()}"),
        ("would edit", f"{plan.num_edits} places in {plan.num_layers} layers"),
        (
            "parameters",
            (
                "follows from the scores"
                if after is None
                else f"{after:,} ({100 * (1 - after / before):.2f} % removed)"
            ),
        ),
        (
            "on disk",
            "follows from the scores" if after is None else f"about {megabytes(after * width)}",
        ),
        (
            "passes",
            (
                f"{plan.forward_sweeps} forward, {plan.backward_sweeps} forward and backward over"
                f" {num_samples} × {seq_len} tokens"
            ),
        ),
        ("memory", f"about {megabytes(cost.memory)}"),
        ("time", f"about {cost.seconds:.0f} s on this machine, within a factor of two"),
        ("writes", f"{out}: nothing in a dry run"),
    ]
    asked = options.get("ratio") or (None if after is None else round(1 - after / before, 4))
    expected = _expect(model, everything, asked, quiet) if method.predicts else None
    table("dry run", ("", ""), rows, left=2)
    if expected is not None:
        lines = [("dense", "", f"{math.exp(expected.loss):.2f}", "")]
        lines += [
            (
                f"{ratio:.4g}",
                f"{rise:.3f}",
                f"{expected.perplexity(ratio):.2f}",
                "← asked for" if ratio == asked else "",
            )
            for ratio, rise in expected.rises.items()
        ]
        share = "ratio" if options.get("budget") != "latency" else "ratio (of time)"
        table(
            "expected on the calibration text itself; other text loses more, the more so the fewer"
            " the tokens",
            (share, "loss rise (nats/token)", "perplexity", ""),
            lines,
            left=0,
        )
    notes = (
        tuple(filter(None, [only_pydoc(everything["data"])]))
        if expected is None
        else expected.notes
    )
    for note in notes:
        say(f"[yellow]note[/yellow] {plain(note)}")
    if as_json:
        emit(
            {
                "parameters_before": before,
                "parameters_after": after,
                "seconds": cost.seconds,
                "memory_bytes": cost.memory,
                **dataclasses.asdict(plan),
                "notes": notes,
                **({} if expected is None else {"loss": expected.loss}),
                **(
                    {}
                    if expected is None
                    else {
                        "expected_perplexity": {
                            ratio: expected.perplexity(ratio) for ratio in expected.rises
                        }
                    }
                ),
            }
        )


def _expect(
    model: str, options: dict[str, Any], asked: float | None, quiet: bool
) -> pipeline.Prediction:
    """Read the model and sweep the calibration set once: the loss to expect at the ratio asked for
    and at a few others.
    """
    with progress_bars(quiet) as bars:
        return pipeline.predict(
            model, sorted({*LADDER, *([] if asked is None else [asked])}), progress=bars, **options
        )


def inspect(model: str, output: Path, options: dict[str, Any], as_json: bool, quiet: bool) -> None:
    """Table and picture of layer redundancy and singular spectra."""
    check_picture(output)
    with progress_bars(quiet) as bars:
        seen = inspection.inspect(model, progress=bars, **options)
    scores = seen.redundancy.scores
    order = sorted(scores, key=lambda layer: scores[layer])
    place = {layer: number for number, layer in enumerate(order, start=1)}
    highest = max(scores.values()) or 1.0
    rows = [
        (layer, f"{score:.5f}", place[layer], "█" * max(1, round(30 * score / highest)))
        for layer, score in scores.items()
    ]
    title = (
        "block influence (low = redundant)"
        if seen.redundancy.kind == "bi"
        else "angular distance / π (low = redundant)"
    )
    table(title, ("layer", "score", "most redundant", ""), rows, left=0)
    spectra(
        dict(scores),
        seen.redundancy.kind,
        {path: values.tolist() for path, values in seen.singular_values.items()},
        output,
    )
    say(f"most redundant first: {','.join(map(str, order))}")
    say(f"picture: {plain(output)}")
    if as_json:
        emit(
            {
                "kind": seen.redundancy.kind,
                "scores": scores,
                "most_redundant_first": order,
                "picture": str(output),
                "calibration": seen.calibration.to_json(),
            }
        )


def evaluate(
    model: str, output: Path | None, options: dict[str, Any], as_json: bool, quiet: bool
) -> None:
    """Every number with its protocol; beside the dense model where there is one."""
    check_output(output)
    with progress_bars(quiet) as bars:
        found = measurement.evaluate(model, progress=bars, **options)
    results = found.results()
    show_results(results)
    finish(results, output, as_json)


def bench(
    model: str, output: Path | None, options: dict[str, Any], as_json: bool, quiet: bool
) -> None:
    """Speeds of one model, or of two in turn."""
    check_output(output)
    with progress_bars(quiet) as bars:
        results = benchmark.bench(model, progress=bars, **options)
    show_results(results)
    finish(results, output, as_json)


def compare(
    path: Path,
    output: Path | None,
    dry: bool,
    cell: str | None,
    options: dict[str, Any],
    as_json: bool,
    quiet: bool,
) -> None:
    """Run an experiment, list its cells, or (in a child process) run one. `options`: device and
    trust.
    """
    asked = experiment.read_experiment(path, **options)
    if cell is not None:
        with progress_bars(quiet) as bars:
            emit(comparison.run_cell(comparison.cell_of(asked, cell), bars).to_json())
        return
    place = output or Path("results") / f"{path.stem}.json"
    check_output(place, new_folder=output is None)
    done = comparison.finished(place)
    if dry:
        rows = [
            (one.label, one.method or "dense", "finished" if one.key in done else "to run")
            for one in asked.cells
        ]
        table(asked.title, ("cell", "method", ""), rows, left=3)
        return

    def announce(number: int, of: int, label: str, what: str) -> None:
        say(f"[bold]{number}/{of}[/bold] {plain(label)}: {plain(what)}")

    try:
        results = comparison.compare(asked, place, announce, quiet)
    except KeyboardInterrupt as stop:
        finished = len({one.key for one in asked.cells} & set(comparison.finished(place)))
        kept = (
            f"{finished} of {len(asked.cells)} cells are finished in {place}; the same command goes"
            " on from there"
        )
        raise Interrupted(kept if finished else "no cell is finished") from stop
    show_results(results)
    finish(results, None, as_json)
    say(f"results: {plain(place)}; a page of them: grasp report {plain(place)}")


def methods(as_json: bool) -> None:
    """Every method with its fields."""
    found = available()
    for name, method in found.items():
        say(f"[bold]{name}[/bold]  {method.about()}  {method.paper}")
        table(
            "",
            ("", ""),
            [
                (f"  --{f.name.replace('_', '-')}", f.metadata["help"])
                for f in dataclasses.fields(method)
            ],
            left=2,
        )
    if as_json:
        emit(
            {
                name: {
                    "paper": m.paper,
                    "fields": {f.name: f.metadata["help"] for f in dataclasses.fields(m)},
                }
                for name, m in found.items()
            }
        )


def families(as_json: bool) -> None:
    """Every row of the family table."""
    rows = [
        (
            f.name,
            ", ".join(f.model_types),
            " ".join(roles for roles, _ in f.matrices),
            "yes" if f.heads_by_width else "no",
            f.notes,
        )
        for f in FAMILIES
    ]
    table("", ("family", "model_type", "matrices by role", "KV groups", "notes"), rows, left=5)
    say(
        "KV groups: whether whole ones go out of a layer with plain smaller matrices. An unknown"
        " model whose layers are plain linears works by inspection, with a notice. --json gives the"
        " paths of matrices, norms, embeddings and head."
    )
    if as_json:
        emit({f.name: dataclasses.asdict(f) for f in FAMILIES})


def data(as_json: bool) -> None:
    """Every named text, and the file types."""
    rows = [
        (name, known.about, "hub: " + "/".join(known.hub) if known.hub else "no network needed")
        for name, known in NAMED.items()
    ]
    rows.append(
        (
            "a path",
            ", ".join(FILE_TYPES) + "; rows of chat messages go through the chat template",
            "no network needed",
        )
    )
    table("", ("DATA", "what", "from"), rows, left=3)
    if as_json:
        emit(
            {
                "named": {name: known.about for name, known in NAMED.items()},
                "file_types": list(FILE_TYPES),
            }
        )
