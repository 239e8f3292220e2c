"""`grasp demo`: the whole job on the embedded model, small enough for two cores and some minutes.

Calibrates on part of the Python language reference, measures on the rest. The results are read back
and measured in a new process: what is shown is what a user of the checkpoint gets.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from grasp.core.children import run_child
from grasp.core.models import EMBEDDED, embedded_model, load_model
from grasp.core.precision import has_fast_bfloat16
from grasp.core.progress import Progress
from grasp.core.provenance import machine, versions
from grasp.core.results import Result, Results
from grasp.errors import GraspError, Interrupted
from grasp.evaluation.generation import greedy
from grasp.evaluation.speed import decode_speed
from grasp.report.plots import overview
from grasp.terminal.bars import emit, megabytes, plain, progress_bars, say, table
from grasp.verbs import compress as pipeline
from grasp.verbs import evaluate as measurement

NUM_LAYERS, RETAIN_RATIO = 9, 0.1
CALIBRATION: dict[str, Any] = {"data": "pydoc", "num_samples": 8, "seq_len": 512, "seed": 0}
HELD_OUT: dict[str, Any] = {"seq_len": 512, "num_blocks": 6}
PROMPT = "A function in Python is"
NEW_TOKENS = 24


def run(output: Path, as_json: bool, quiet: bool) -> None:
    """Compress twice, measure in a child process, print the table."""
    try:
        _run(output, as_json, quiet)
    except KeyboardInterrupt as stop:
        done = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
        if not done:
            raise
        raise Interrupted(
            f"{output} holds what was finished ({', '.join(done)}); remove it to begin anew"
        ) from stop


def _run(output: Path, as_json: bool, quiet: bool) -> None:
    begin = time.perf_counter()
    dtype = (
        "bfloat16"
        if has_fast_bfloat16("cuda" if torch.cuda.is_available() else "cpu")
        else "float32"
    )
    calibration = {**CALIBRATION, "dtype": dtype}
    say(
        f"{NUM_LAYERS} of its 30 layers replaced by {RETAIN_RATIO:.0%} of their parameters, and the"
        f" default method at that size; calibrated in {dtype}, the faster one here"
    )
    with progress_bars(quiet) as bars:
        bars("unpacking the model", 0, 1)
        embedded_model()
        bars("unpacking the model", 1, 1)
        paper: dict[str, Any] = {
            "method": "grasp",
            "num_layers": NUM_LAYERS,
            "retain_ratio": RETAIN_RATIO,
        }
        made = pipeline.compress(
            EMBEDDED, output / "grasp", progress=_renamed(bars, "grasp: {}"), **paper, **calibration
        )
        layers = tuple(sorted({int(edit["path"].split(".")[2]) for edit in made.manifest["edits"]}))
        ours = pipeline.compress(
            EMBEDDED,
            output / "grasp-fisher",
            ratio=made.ratio,
            progress=_renamed(bars, "grasp-fisher: {}"),
            **calibration,
        )
        pipeline.compress(
            EMBEDDED,
            output / "removed",
            method="shortgpt",
            layers=layers,
            progress=_renamed(bars, "layers removed: {}"),
            **{**calibration, "num_samples": 1},
        )
        bars("drawing what every matrix kept", 0, 2)
        pictures = [
            overview(made.manifest, output / "grasp.png"),
            overview(ours.manifest, output / "grasp-fisher.png"),
        ]
        bars("drawing what every matrix kept", 2, 2)
    del made, ours
    say("loading them again in a new process, to measure what a user of the checkpoints gets")
    results = _measure_in_new_process(output, quiet)
    results.write(output / "results.json")
    _show(results, layers)
    places = ", ".join(plain(output / name) for name in ("grasp", "grasp-fisher"))
    say(f"\ncheckpoints: {places}\npictures:    {', '.join(plain(path) for path in pictures)}")
    say(
        f"a page of all this: grasp report {plain(output)}\ntook"
        f" {time.perf_counter() - begin:.0f} s"
    )
    if as_json:
        emit(
            {
                **results.to_json(),
                "layers": layers,
                "pictures": [str(path) for path in pictures],
                "seconds": time.perf_counter() - begin,
            }
        )


def _show(results: Results, layers: tuple[int, ...]) -> None:
    rows = []
    for row in results.rows:
        text, speed = row.score("perplexity"), row.score("tokens/s")
        assert text is not None and speed is not None
        rows.append(
            (
                row.label,
                f"{row.parameters:,}",
                megabytes(row.num_bytes or 0),
                f"{text.value:.1f}",
                f"{speed.value:.1f}",
            )
        )
    table(
        f"Held-out pydoc text, {HELD_OUT['num_blocks']} × {HELD_OUT['seq_len']} tokens; greedy"
        f" decoding, batch 1; float32; layers {','.join(map(str, layers))}",
        ("model", "parameters", "in memory", "perplexity", "tokens/s"),
        rows,
    )
    say("")
    for row in results.rows:
        one = row.generations[0]
        say(
            f"[bold]{row.label}[/bold]:"
            f" {one.prompt}[dim]{plain(json.dumps(one.text, ensure_ascii=False)[1:-1])}[/dim]"
        )


def _measure_in_new_process(output: Path, quiet: bool) -> Results:
    command = [
        sys.executable,
        "-m",
        "grasp",
        "demo",
        "--measure",
        str(output),
        *(["--quiet"] if quiet else []),
    ]
    done = run_child(command)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        raise GraspError(
            f"measuring {output} in a new process failed with status {done.returncode}; the message"
            " above says why"
        )
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    return Results(
        tuple(Result.from_json(row) for row in rows),
        "grasp demo",
        "grasp demo",
        versions(),
        machine(),
    )


def _renamed(progress: Progress, name: str) -> Progress:
    """The same progress, under a name of our own; "{}" in it stands for the task."""
    return lambda task, done, total: progress(name.format(task), done, total)


def measure(output: Path, quiet: bool) -> None:
    """In the new process: load the three models from disk, measure them, print JSON."""
    places = {
        "dense": EMBEDDED,
        "same layers removed": output / "removed",
        "grasp": output / "grasp",
        "grasp-fisher": output / "grasp-fisher",
    }
    with progress_bars(quiet) as bars:
        models = {}
        for number, (name, place) in enumerate(places.items()):
            bars("loading in a new process", number, len(places))
            models[name] = load_model(str(place), dtype="float32")
        bars("loading in a new process", len(places), len(places))
        rows, speeds = [], decode_speed(models, progress=bars)
        for number, (name, model) in enumerate(models.items()):
            read = measurement.evaluate(
                model, ppl="pydoc", progress=_renamed(bars, f"perplexity, {name}"), **HELD_OUT
            ).result
            bars("greedy text", number, len(models))
            said = (greedy(model, PROMPT, NEW_TOKENS),)
            ratio = 1 - model.num_parameters() / models["dense"].num_parameters()
            rows.append(
                replace(
                    read,
                    label=name,
                    method=read.method or "dense",
                    ratio=ratio,
                    scores=(*read.scores, speeds[name]),
                    generations=said,
                )
            )
        bars("greedy text", len(models), len(models))
    emit({"rows": [row.to_json() for row in rows]})
