"""The model card (`README.md`) of a checkpoint: the facts of its manifest, for people."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grasp.core.edits import read_log
from grasp.core.seal import PICTURE
from grasp.report import svg
from grasp.report.kept import Kept
from grasp.report.kept_words import facts, in_a_line
from grasp.report.picture import picture_of


def command_line(recipe: dict[str, Any], out: str, plugin: str = "") -> str:
    """The `grasp compress` command that repeats a recipe, `plugin` the file of its method."""
    words = ["grasp", "compress", str(recipe["model"]), out]
    words += ["--plugin", plugin] if plugin else []
    for name, value in recipe.items():
        if name == "model" or value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(
                ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            )
    return shlex.join(words)


def _recovered(told: dict[str, Any]) -> list[str]:
    """Table rows about the training that followed."""
    recipe, first, best = told["recipe"], told["curve"][0], told["best"]
    return [
        (
            f"| then trained | {told['trained_parameters']:,} numbers ({recipe['train']}),"
            f" objective {recipe['objective']}, {told['steps']:,} steps of {recipe['batch_size']}"
            " rows |"
        ),
        (
            f"| training text | {', '.join(told['data']['sources'])}: {told['data']['tokens']:,}"
            " tokens |"
        ),
        (
            f"| held-out loss | {first.get('held_out_loss') or float('nan'):.4f} →"
            f" {best['held_out_loss']:.4f} |"
        ),
    ]


def repeat(manifest: Mapping[str, Any], out: str) -> list[str]:
    """The command that compressed, those that trained afterwards, and the one that quantized."""
    told = manifest.get("recovery")
    commands = list[str]()
    name = out
    after = manifest.get("quantization")
    if after:
        name = after["checkpoint"]
    while told:
        commands.insert(0, str(told.get("command", "")))
        name, told = told.get("checkpoint", name), told.get("before")
    plugin = manifest["method"].get("plugin", "")
    first = [command_line(manifest["recipe"], name, plugin)] if "recipe" in manifest else []
    return [*first, *filter(None, commands), *([after["command"]] if after else [])]


def _quantized(told: dict[str, Any]) -> list[str]:
    """Table rows about the bits."""
    grouped = not told["scheme"].startswith("int8")
    groups = f", groups of {told.get('group_size')}" if grouped else ", one scale a row"
    if told.get("activations") == "int8":
        groups += ", activations too with one a token"
    bits = told.get("embeddings", 16)
    ends = (
        f"embeddings and output layer in {bits} bits; not the norms, biases"
        if bits < 16
        else "not the embeddings, output layer, norms, biases"
    )
    return [
        (
            f"| quantized | {told['scheme']}{groups}: {told['matrices']} matrices,"
            f" {100 * told['share']:.1f} % of all numbers; {ends} |"
        ),
        f"| bytes | {told['bytes_before']:,} → {told['bytes_after']:,} |",
    ]


def model_card(manifest: dict[str, Any], out: str) -> str:
    """Markdown with the YAML head that the Hugging Face hub reads."""
    kept = Kept.of(manifest)
    body = [*_head(manifest, out), *_facts(manifest, kept), *_shown(kept), *_bytes(manifest)]
    body += _use(manifest, out)
    body += ["## Repeat", "", "```", *repeat(manifest, out), "```", ""]
    body += [
        "Every edit, score and hash is in `grasp.json`. Versions: "
        + json.dumps(manifest["versions"])[1:-1].replace('"', "")
        + ".",
        "",
    ]
    return "\n".join(body)


def picture_for(manifest: Mapping[str, Any]) -> Callable[[Path], None]:
    """What puts the picture that the card shows into a directory, where there is one to show."""

    def draw(directory: Path) -> None:
        kept = Kept.of(manifest)
        if kept.changed:
            text = svg.file(picture_of(manifest, kept))
            (directory / PICTURE).write_text(text, encoding="utf-8")

    return draw


def _shown(kept: Kept) -> list[str]:
    """The picture, where something changed."""
    if not kept.changed:
        return []
    words = in_a_line(kept).replace("[", "(").replace("]", ")")
    return ["", "## What every layer kept", "", f"![{words}]({PICTURE})"]


def _bytes(manifest: dict[str, Any]) -> list[str]:
    """Where the bytes are, of a checkpoint that was made to a size."""
    if not manifest.get("bytes"):
        return []
    rows = [
        f"| {one['part']} | {one['stored']} | {one['matrices']} | {one['bytes']:,} |"
        for one in manifest["bytes"]
    ]
    head = ["| part | stored in | matrices | bytes |", "|---|---|--:|--:|"]
    return ["", "## Where the bytes are", "", *head, *rows]


def _head(manifest: dict[str, Any], out: str) -> list[str]:
    """What it is, for the hub and in a sentence."""
    model, method = manifest["model"], manifest["method"]
    head = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [grasp, compression]",
    ]
    if "/" in model["source"] and not model["source"].startswith((".", "/", "~")):
        head.append(f"base_model: {model['source']}")
    made = (
        f"compressed by `{method['name']}` ({method['paper']})"
        if manifest.get("calibration")
        else "quantized"
    )
    return [
        *head,
        "---",
        "",
        f"# {out}",
        "",
        f"{model['source']} ({model['family']}, {model['num_layers']} layers), {made} with grasp.",
        "",
    ]


def _facts(manifest: dict[str, Any], kept: Kept) -> list[str]:
    """The table of sizes, calibration, edits and what followed."""
    sizes = manifest["parameters"]
    rows = [
        "| | |",
        "|---|---|",
        (
            f"| parameters | {sizes['before']:,} → {sizes['after']:,} ({100 * sizes['ratio']:.2f} %"
            " removed) |"
        ),
        f"| dtype | {manifest['model']['dtype']} |",
    ]
    data = manifest.get("calibration")
    if data:
        rows += [
            (
                f"| calibration | {data['source']}, {data['num_samples']} blocks ×"
                f" {data['seq_len']} tokens, seed {data['seed']} |"
            ),
            f"| calibration ids (sha256) | `{data['ids_sha256'][:16]}…` |",
        ]
    rows += _edited(manifest, kept)
    if "recovery" in manifest:
        rows += _recovered(manifest["recovery"])
    if "quantization" in manifest:
        rows += _quantized(manifest["quantization"])
    return rows


def _edited(manifest: dict[str, Any], kept: Kept) -> list[str]:
    """Table rows about the edits, what they were thought to cost, and what is to be minded."""
    log = read_log(manifest)
    rows = [f"| {what} | {text} |" for what, text in facts(kept)]
    if any(edit.pivoted for edit in log.summaries()):
        rows.append(
            "| storage | pivoted pairs: rank² fewer numbers than two thin matrices, the same map |"
        )
    if "prediction" in manifest:
        rows += _expected(manifest["prediction"])
    rows += [f"| note | {note} |" for note in manifest.get("notes", ())]
    others = {
        one.what for one in log.summaries() if one.rank is None and not one.axis and not one.gone
    }
    return rows + [f"| {what} | {log.counts()[what]} |" for what in sorted(others)]


def _expected(told: dict[str, float]) -> list[str]:
    """What the method expects of unseen text, and on the calibration text; older checkpoints tell
    the latter alone.
    """
    rise, factor = told["loss_rise"], told["perplexity_ratio"]
    if not told.keys() >= {"low", "high", "seen_rise"}:
        return [
            f"| predicted, on the calibration text itself | loss + {rise:.3f} nats a token,"
            f" perplexity × {factor:.3f}; other text loses more, the more so the fewer the tokens |"
        ]
    low, high, seen = (_factor(told[name]) for name in ("low", "high", "seen_rise"))
    return [
        f"| expected, on unseen text like the calibration text | loss + {rise:.3f} nats a token,"
        f" perplexity × {factor:.3f} (likely {low:.3f} to {high:.3f}) |",
        f"| predicted, on the calibration text itself | loss + {told['seen_rise']:.3f} nats a"
        f" token, perplexity × {seen:.3f} |",
    ]


def _factor(rise: float) -> float:
    """Of the perplexity."""
    return math.exp(rise) if rise < 700 else math.inf


def _use(manifest: dict[str, Any], out: str) -> list[str]:
    """How to load and serve it."""
    log = read_log(manifest)
    needs_grasp = log.carried or "quantization" in manifest
    lines = ["", "## Load", "", "```python"]
    if needs_grasp:
        lines.append(
            "import grasp  # pip install grasp-llm; or leave this out and pass"
            " trust_remote_code=True below"
        )
    beside = ", with `pip install grasp-llm` beside vLLM" if needs_grasp else ""
    served = f"`vllm serve {out}`{beside}"
    if not log.served:
        served = "with transformers; vLLM does not know what stands in the place of its layers"
    return [
        *lines,
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{out}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{out}")',
        "```",
        "",
        f"Serve it: {served}.",
        "",
    ]
