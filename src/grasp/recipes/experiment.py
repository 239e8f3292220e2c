"""`EXPERIMENT.toml`: a model, one calibration, one evaluation, and the methods to compare, as a
list of cells to run.

    title = "How much of a replaced matrix to keep"
    model = "smollm2"
    dtype = "bfloat16"

    [calibration]
    data = "$DATA/wiki.valid.raw"       # $NAME: a variable of the environment
    num_samples = 32

    # arguments of grasp.evaluate; against = true: fidelity to the dense model
    [evaluation]
    ppl = ["wikitext2=$DATA/wiki.test.raw"]
    seq_len = 512

    [speed]                             # optional: arguments of grasp.bench
    rounds = 3

    # optional: train what was compressed; arguments of grasp.recover. A method with recover = false
    # stays as it is
    [recovery]
    data = "$DATA/alpaca.json"
    train = "lora"

    [[methods]]
    method = "grasp"
    num_layers = 9
    # optional: one cell for every combination; fields of the method or of the calibration
    [methods.sweep]
    retain_ratio = [0.05, 0.1, 0.2]

Sizes and what may be set are checked before anything runs. Trust (--trust-remote-code), the device
and folders to write are the command line's alone: an experiment may be somebody else's.

What a cell is: grasp.recipes.cell.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grasp.compensation.recipe import Recipe, make_recipe
from grasp.core.documents import read_toml
from grasp.core.fields import check, declared
from grasp.errors import GraspError, RecipeError, did_you_mean
from grasp.methods import available, make
from grasp.recipes.calibration import CalibrationRecipe
from grasp.recipes.cell import Cell, file_of
from grasp.recipes.evaluation import EvaluationRecipe
from grasp.recipes.model import ModelSource
from grasp.recipes.part import keys, only_command_line
from grasp.recipes.speed import SpeedRecipe

TOP: dict[str, Any] = {"title": str, **keys(ModelSource), "dense": bool}
TABLES: dict[str, dict[str, Any]] = {
    "calibration": keys(CalibrationRecipe),
    "evaluation": {"against": bool, **keys(EvaluationRecipe)},
    "speed": keys(SpeedRecipe),
    "recovery": {
        "data": str,
        "preset": str,
        "text_field": str,
        **{name: one.kind for name, one in declared(Recipe).items() if one.recipe},
    },
}
COMMAND_LINE = only_command_line(ModelSource)
MOST_CELLS = 1_000


@dataclass(frozen=True)
class Experiment:
    """What the file asks for."""

    path: Path
    title: str
    cells: tuple[Cell, ...]
    about: Mapping[str, Any]


def read_experiment(
    path: Path, device: str | None = None, trust_remote_code: bool = False
) -> Experiment:
    """Read and check the file before anything is run. Raises `RecipeError`: file, key, value, what
    is allowed.

    `device`, `trust_remote_code`: as the command line says; the file may not.
    """
    values = read_toml(path, hint="give a .toml file (see docs/evaluation.md)")
    for key in COMMAND_LINE.keys() & values.keys():
        raise RecipeError(
            f"{path}: '{key}': only the command line may say {COMMAND_LINE[key]}, not an"
            " experiment; take the line out"
        )
    _check(path, "", values, {**TOP, **dict.fromkeys(TABLES, dict), "methods": list})
    tables = {
        name: _check(path, name, values[name], TABLES[name]) for name in TABLES & values.keys()
    }
    if not values.get("model"):
        raise RecipeError(
            f'{path}: names no model; write model = "smollm2", a hub id or a directory'
        )
    methods = values.get("methods", [])
    if not methods or not all(isinstance(entry, dict) for entry in methods):
        raise RecipeError(f"{path}: names no method; write one [[methods]] table for each")
    shared: dict[str, Any] = {
        "model": values["model"],
        "evaluation": tables.get("evaluation", {}),
        "speed": tables.get("speed"),
        "recovery": _recovery(path, tables.get("recovery")),
        "loading": {
            **({"dtype": values["dtype"]} if "dtype" in values else {}),
            **({"device": device} if device is not None else {}),
            **({"trust_remote_code": True} if trust_remote_code else {}),
        },
    }
    _check_count(path, methods)
    dense = Cell("dense", **{**shared, "recovery": None})
    cells = [dense] if values.get("dense", True) else []
    for number, entry in enumerate(methods, start=1):
        cells += _cells(path, number, dict(entry), tables.get("calibration", {}), shared)
    first: dict[str, Cell] = {}
    for cell in cells:
        same = first.setdefault(cell.key, cell)
        if same is not cell:
            raise RecipeError(
                f"{path}: '{same.label}' and '{cell.label}' are the same cell; take one out"
            )
    about = {
        "calibration": tables.get("calibration", {}),
        "evaluation": shared["evaluation"],
        "speed": shared["speed"] or {},
        **({"recovery": shared["recovery"]} if shared["recovery"] else {}),
    }
    return Experiment(
        path,
        str(values.get("title", path.stem)),
        tuple(cells),
        {**about, **shared["loading"], "model": shared["model"]},
    )


def _recovery(path: Path, table: dict[str, Any] | None) -> dict[str, Any] | None:
    """How every method's model is trained, checked. Raises `RecipeError`."""
    if table is None:
        return None
    if not table.get("data"):
        raise RecipeError(f"{path}: [recovery]: names no text; write data = ...")
    for text in table["data"].split(","):
        file_of(text)
    told = {key: value for key, value in table.items() if key not in ("data", "text_field")}
    try:
        make_recipe(told.pop("preset", None), told)
    except GraspError as problem:
        raise RecipeError(f"{path}: [recovery]: {problem}") from None
    return table


def _check_count(path: Path, methods: list[dict[str, Any]]) -> None:
    """Count the cells before any is made: a sweep multiplies."""
    total = 0
    for number, entry in enumerate(methods, start=1):
        sweep = entry.get("sweep", {})
        if not isinstance(sweep, dict):
            raise RecipeError(
                f"{path}: methods table {number}: sweep = {sweep!r}: must be a table,"
                " [methods.sweep]"
            )
        for key, options in sweep.items():
            if not isinstance(options, list) or not options:
                raise RecipeError(
                    f"{path}: methods table {number}: sweep of {key}: give a list of values, such"
                    " as [0.1, 0.2]"
                )
        total += math.prod(map(len, sweep.values()))
        if total > MOST_CELLS:
            raise RecipeError(
                f"{path}: methods table {number}: its sweep brings the cells to {total:,}; at most"
                f" {MOST_CELLS:,} are allowed, sweep fewer values"
            )


def _cells(
    path: Path,
    number: int,
    entry: dict[str, Any],
    calibration: Mapping[str, Any],
    shared: Mapping[str, Any],
) -> Iterator[Cell]:
    """The cells of one [[methods]] table: one, or one for every combination of its sweep."""
    where = f"{path}: methods table {number}"
    name, label, sweep = entry.pop("method", None), entry.pop("label", None), entry.pop("sweep", {})
    recovered = check("recover", entry.pop("recover", True), bool, f"{where}: recover =")
    if not recovered:
        shared = {**shared, "recovery": None}
    if not isinstance(name, str) or name not in available():
        raise RecipeError(
            f"{where}: method {name!r} is unknown; allowed:"
            f" {', '.join(available())}{did_you_mean(str(name), available())}"
        )
    if label is not None and not isinstance(label, str):
        raise RecipeError(f"{where}: label = {label!r}: must be text")
    for one in declared(available()[name]).values():
        if not one.recipe and one.name in {*entry, *sweep}:
            raise RecipeError(
                f"{where}: '{one.name}': only the command line may say {one.flag}, not an"
                " experiment; take the line out"
            )
    for combination in itertools.product(*sweep.values()):
        varied = dict(zip(sweep, combination, strict=True))
        asked = {**entry, **varied}
        own = {key: value for key, value in asked.items() if key in TABLES["calibration"]}
        own = _check(path, f"methods table {number}", own, TABLES["calibration"])
        drawn = {**calibration, **own}
        fields = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in asked.items()
            if key not in drawn
        }
        for text in str(drawn.get("data", "")).split(","):
            file_of(text)
        try:
            make(name, fields)
        except GraspError as problem:
            raise RecipeError(f"{where}: {problem}") from None
        said = ", ".join(f"{key} {_name(value)}" for key, value in varied.items())
        star = "*" if shared["recovery"] else ""  # as the paper marks them
        yield Cell(
            " ".join(filter(None, (f"{label or name}{star}", said))),
            method=name,
            fields=fields,
            calibration=drawn,
            varied=varied,
            **shared,
        )


def _name(value: Any) -> str:
    return Path(value).name if isinstance(value, str) else str(value)


def _check(
    path: Path, table: str, values: Mapping[str, Any], known: Mapping[str, Any]
) -> dict[str, Any]:
    """The values as their declarations have them, lists as JSON has them. Raises `RecipeError`."""
    where, found = f"{path}: [{table}]" if table else str(path), {}
    for key, value in values.items():
        if key not in known:
            raise RecipeError(
                f"{where}: '{key}' is unknown; allowed:"
                f" {', '.join(known)}{did_you_mean(key, known)}"
            )
        one = check(key, value, known[key], f"{where}: {key} =")
        found[key] = list(one) if isinstance(one, tuple) else one
    return found
