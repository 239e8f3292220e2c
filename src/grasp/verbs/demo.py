"""`grasp demo`: the whole job on the embedded model, small enough for two cores and some minutes.

Calibrates on part of the Python language reference, measures on the rest. The results are read back
and measured in a new process: what is shown is what a user of the checkpoint gets.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from grasp.core.children import run_child
from grasp.core.models import EMBEDDED, embedded_model, load_model
from grasp.core.precision import has_fast_bfloat16
from grasp.core.progress import Progress
from grasp.core.provenance import machine, versions
from grasp.core.results import Result, Results
from grasp.errors import GraspError
from grasp.evaluation.generation import greedy
from grasp.evaluation.speed import decode_speed
from grasp.report.plots import overview
from grasp.verbs import compress as pipeline
from grasp.verbs import evaluate as measurement

NUM_LAYERS, RETAIN_RATIO = 9, 0.1
CALIBRATION: dict[str, Any] = {"data": "pydoc", "num_samples": 8, "seq_len": 512, "seed": 0}
HELD_OUT: dict[str, Any] = {"seq_len": 512, "num_blocks": 6}
PROMPT = "A function in Python is"
NEW_TOKENS = 24


@dataclass(frozen=True)
class Made:
    """What `make` wrote: pictures of what every matrix kept, and the layers that the paper's method
    edited.
    """

    pictures: tuple[Path, ...]
    layers: tuple[int, ...]


def fast_dtype() -> str:
    """What calibration is computed in: the faster one here."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return "bfloat16" if has_fast_bfloat16(device) else "float32"


def make(output: Path, dtype: str, progress: Progress) -> Made:
    """Compress by the paper's method, by the default one at that size, and by removing the same
    layers; each into a folder of `output`.
    """
    calibration = {**CALIBRATION, "dtype": dtype}
    progress("unpacking the model", 0, 1)
    embedded_model()
    progress("unpacking the model", 1, 1)
    paper: dict[str, Any] = {
        "method": "grasp",
        "num_layers": NUM_LAYERS,
        "retain_ratio": RETAIN_RATIO,
    }
    made = pipeline.compress(
        EMBEDDED, output / "grasp", progress=_renamed(progress, "grasp: {}"), **paper, **calibration
    )
    layers = tuple(sorted(made.log.layers))
    ours = pipeline.compress(
        EMBEDDED,
        output / "grasp-fisher",
        ratio=made.ratio,
        progress=_renamed(progress, "grasp-fisher: {}"),
        **calibration,
    )
    pipeline.compress(
        EMBEDDED,
        output / "removed",
        method="shortgpt",
        layers=layers,
        progress=_renamed(progress, "layers removed: {}"),
        **{**calibration, "num_samples": 1},
    )
    progress("drawing what every matrix kept", 0, 2)
    pictures = (
        overview(made.manifest, output / "grasp.png"),
        overview(ours.manifest, output / "grasp-fisher.png"),
    )
    progress("drawing what every matrix kept", 2, 2)
    return Made(pictures, layers)


def measure_in_new_process(output: Path, quiet: bool) -> Results:
    """What `measure` says in a process of its own. Raises `GraspError` where that fails."""
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


def measure(output: Path, progress: Progress) -> list[Result]:
    """In the new process: load the models from disk and measure them."""
    places = {
        "dense": EMBEDDED,
        "same layers removed": output / "removed",
        "grasp": output / "grasp",
        "grasp-fisher": output / "grasp-fisher",
    }
    models = {}
    for number, (name, place) in enumerate(places.items()):
        progress("loading in a new process", number, len(places))
        models[name] = load_model(str(place), dtype="float32")
    progress("loading in a new process", len(places), len(places))
    rows, speeds = [], decode_speed(models, progress=progress)
    for number, (name, model) in enumerate(models.items()):
        read = measurement.evaluate(
            model, ppl="pydoc", progress=_renamed(progress, f"perplexity, {name}"), **HELD_OUT
        ).result
        progress("greedy text", number, len(models))
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
    progress("greedy text", len(models), len(models))
    return rows
