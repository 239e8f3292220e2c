"""READ FIRST: the whole tool in the paper's order.

    compress()   model + calibration text -> fewer parameters, saved as a checkpoint
        1. load the model, or leave its layers on the disk where it does not fit in memory;
           draw the calibration set                                        (paper, section 4.1)
        2. one sweep: how redundant is every layer, and what else the method needs   (3.1)
        3. the method yields edits; each is applied before the next is asked for     (3.2, 3.3)
        4. save: weights, manifest, model card
    predict()    the loss to expect at several ratios, before anything is changed

What came of it is measured in `grasp.verbs.evaluate`. Progress, parameter counts, the edit log and
timings live here, once for all methods.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from grasp import __version__
from grasp.core.bos import AS_TOKENISED, EVERY_BLOCK
from grasp.core.checkpoint import save
from grasp.core.classes import settle_class
from grasp.core.collector import Collector
from grasp.core.decoder import Decoder
from grasp.core.destination import check_destination, name_of
from grasp.core.edits import EditLog, Entry, Step
from grasp.core.edits.slicing import check_unsliced
from grasp.core.experts import experts_stay, mixture
from grasp.core.fields import PathLike, declared
from grasp.core.inspecting import beside_text
from grasp.core.inventory import inventory
from grasp.core.journal import Journal, journal_of
from grasp.core.models import open_model
from grasp.core.precision import to_16_bits
from grasp.core.processes import is_first, joined, world_size
from grasp.core.progress import Progress, silent
from grasp.core.proof import check_savable
from grasp.core.provenance import Clock, code_of, contents, describe_model, versions
from grasp.core.records import Calibration
from grasp.core.runner import Runner
from grasp.core.several import check_same, runner_for
from grasp.core.shapes import Shapes
from grasp.data.calibration import calibrate
from grasp.data.stream import check_lengths
from grasp.errors import RecipeError
from grasp.methods import make
from grasp.methods.base import Method
from grasp.recipes.calibration import CalibrationRecipe
from grasp.recipes.keywords import keywords
from grasp.recipes.memory import MemoryRecipe
from grasp.recipes.method import MethodChoice
from grasp.recipes.model import ModelSource
from grasp.report.card import model_card, picture_for
from grasp.stages.enough import calibration_notes, with_few_tokens
from grasp.stages.forecast import expectation, interval
from grasp.stages.redundancy import describe_redundancy
from grasp.verbs.preflight import offload_for, workers_for

logger = logging.getLogger(__name__)

KEYWORDS = tuple(
    name
    for part in (ModelSource, MethodChoice, CalibrationRecipe, MemoryRecipe)
    for name in declared(part)
)
"""What `compress` takes beside the method's own fields."""


EXPERTS_IN_16_BITS = "experts are not rounded: their matrices keep 16 bits"


@dataclass(frozen=True)
class Compression:
    """What `compress` did. `manifest` is what `grasp.json` holds; `path` the checkpoint, None if
    none was asked for.
    """

    decoder: Decoder = field(repr=False)
    log: EditLog = field(repr=False)
    manifest: dict[str, Any] = field(repr=False)
    parameters_before: int
    parameters_after: int
    path: Path | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The compressed model, an ordinary Hugging Face one."""
        return self.decoder.model

    @property
    def ratio(self) -> float:
        """Share of all parameters that is gone, tied weights counted once."""
        return 1 - self.parameters_after / self.parameters_before


@keywords
def compress(
    source: ModelSource,
    out: PathLike | None = None,
    *,
    choice: MethodChoice,
    calibration: CalibrationRecipe,
    memory: MemoryRecipe,
    resume: bool = False,
    progress: Progress = silent,
    **fields: Any,
) -> Compression:
    """Compress a model and save it.

    Args:
        out: directory to write; must not exist or be empty. None: nothing is written. A run of more
            than half a minute keeps its journal in `out` + ".journal", gone when it is done.
        resume: go on from the journal of a run that was interrupted, with the same arguments.
        progress: called as `progress(task, done, total)`.
        fields: of the method, where `method` is a name.

    Raises:
        GraspError: one line that names the argument, its value, what is allowed and the way out.
    """
    chosen, clock = make(choice.method, fields, KEYWORDS, choice.plugin), Clock()
    place = None if out is None else Path(out)
    if place is not None:
        check_destination(place, 0, source.model)
    elif resume:
        raise RecipeError("--resume: needs OUT, beside which the journal is; name it")
    with joined(), journal_of(place, resume, clock.began) as journal:
        offload = offload_for(chosen, source, memory, calibration, place)
        decoder = open_model(**vars(source), dequantize=True, offload=offload)
        decoder.progress = progress
        _check(chosen, decoder, place, calibration)
        decoder.workers = workers_for(chosen, decoder, source, memory, calibration)
        return _compress(chosen, decoder, source, calibration, place, journal, clock, choice.plugin)


def _compress(
    chosen: Method,
    decoder: Decoder,
    source: ModelSource,
    calibration: CalibrationRecipe,
    out: Path | None,
    journal: Journal,
    clock: Clock,
    plugin: str | Path | None,
) -> Compression:
    """`compress` with its arguments checked, its model open and its journal at hand."""
    before, original = decoder.num_parameters(), describe_model(decoder)
    shapes = Shapes.of(decoder)
    clock.lap("load")

    data = draw(decoder, calibration)
    if out is not None:
        journal.accept(identity(chosen, decoder, data))
    clock.lap("calibration")

    needs = chosen.needs(decoder)
    notes = _notes(chosen, decoder, data, needs)
    runner = runner_for(decoder, data, journal)
    stats = runner.sweep(needs, "statistics")
    redundancy, loss = describe_redundancy(stats), stats.loss
    clock.lap("statistics")

    expected, steps = chosen.plan(decoder).num_edits, chosen.edits(runner, stats)
    del stats, needs  # a method lets go of them where it measures anew
    log = _carry_out(steps, runner, expected)
    if chosen.in_16_bits:
        to_16_bits(decoder)
    after, rises = decoder.num_parameters(), log.rises()
    if rises is not None:
        notes = with_few_tokens(notes, data, *rises)
    clock.lap("attribution and replacement")

    brought = {} if plugin is None else {"plugin": os.path.abspath(plugin)}
    manifest = {
        "model": original,
        "method": {"name": chosen.name, "paper": chosen.paper, **chosen.recipe(), **brought},
        "recipe": _recipe(chosen, decoder, source, data, calibration),
        "calibration": {
            **data.to_json(),
            "bos": AS_TOKENISED if decoder.block_bos is None else EVERY_BLOCK,
            "loss_before": loss,
        },
        "redundancy": redundancy,
        "edits": log.to_json(),
        "layers": shapes.beside(Shapes.of(decoder)),
        "prediction": None if loss is None or rises is None else expectation(*rises, loss),
        "parameters": {"before": before, "after": after, "ratio": 1 - after / before},
        "bytes": [vars(row) for row in inventory(decoder)] if chosen.in_16_bits else None,
        "versions": versions(),
        "seconds": clock.laps,
        "notes": list(notes),
    }
    manifest = {name: value for name, value in manifest.items() if value is not None}
    if out is not None and is_first():
        save(decoder, out, manifest, model_card(manifest, name_of(out)), picture_for(manifest))
    for note in notes:
        logger.warning(note)
    return Compression(decoder, log, manifest, before, after, out)


def _recipe(
    method: Method,
    decoder: Decoder,
    source: ModelSource,
    data: Calibration,
    calibration: CalibrationRecipe,
) -> dict[str, Any]:
    """The flags that make the same checkpoint again."""
    recipe = {
        "model": decoder.source,
        "method": method.name,
        **method.recipe(),
        **data.recipe(),
        "text_field": calibration.text_field,
        "dtype": source.dtype,
    }
    return {name: value for name, value in recipe.items() if value is not None}


def identity(method: Method, decoder: Decoder, data: Calibration) -> dict[str, Any]:
    """What makes the numbers of a run, by the names that a user knows: a journal of one run serves
    no other.
    """
    return {
        "grasp": __version__,
        "--method": method.name,
        **{
            one.flag: getattr(method, one.name)
            for one in declared(type(method)).values()
            if one.recipe
        },
        "method's file": code_of(type(method)),
        "--dtype": str(decoder.dtype).removeprefix("torch."),
        **({"processes": world_size()} if world_size() > 1 else {}),
        **contents(decoder),
        "calibration tokens": data.ids_hash,
        "--seed": data.seed,
    }


def draw(decoder: Decoder, calibration: CalibrationRecipe) -> Calibration:
    """The calibration set that a recipe describes; a ready one is taken as it is."""
    if isinstance(calibration.data, Calibration):
        return calibration.data
    return calibrate(decoder, **vars(calibration), progress=decoder.progress)


def _check(
    method: Method, decoder: Decoder, out: str | Path | None, calibration: CalibrationRecipe
) -> None:
    """Find what is wrong before any work is done: the recipe, the destination, the weights."""
    if isinstance(calibration.data, str):
        check_lengths(decoder, calibration.num_samples, calibration.seq_len)
    settle_class(decoder)
    check_unsliced(decoder, "it can be recovered and quantized, but not compressed further")
    method.check(decoder)
    if method.measures_time and world_size() > 1:
        raise RecipeError(
            f"--method {method.name}: measures times, which several processes cannot do at once;"
            " run it without torchrun"
        )
    if out is not None:
        before, after = decoder.num_parameters(), method.plan(decoder).parameters
        check_destination(
            Path(out),
            decoder.num_bytes() * (before if after is None else after) // before,
            decoder.source,
        )
        check_savable(decoder)
    decoder.check_finite()


def _notes(
    method: Method, decoder: Decoder, data: Calibration, needs: Sequence[Collector]
) -> tuple[str, ...]:
    """What a user should know about the result, before there is one."""
    return (*calibration_notes(decoder, data, needs), *method.notes(), *stays(method, decoder))


def stays(method: Method, decoder: Decoder) -> list[str]:
    """What the method leaves as it is, where that needs saying."""
    changes = method.changes_experts or method.over_experts
    has_experts = any(mixture(decoder, layer) is not None for layer in decoder.kept)
    in_16_bits = has_experts and method.rounds_weights and not method.over_experts
    found = (
        beside_text(decoder.model),
        "" if changes else experts_stay(decoder),
        EXPERTS_IN_16_BITS if in_16_bits else "",
    )
    return [said for said in found if said]


def _carry_out(steps: Iterable[Step], runner: Runner, expected: int) -> EditLog:
    """Apply each edit, of about so many, before the next is asked for. Returns the log: every edit,
    and the parameter count after it.
    """
    decoder = runner.decoder
    log = EditLog(num_layers=decoder.num_layers)
    before = decoder.num_parameters()
    for made in steps:
        step = runner.journal.repeated(len(log), made)
        log.append(Entry(runner.apply(step.edit), step.note, decoder.num_parameters()))
        runner.journal.record(len(log) - 1, step, log[-1].parameters)
        decoder.progress("replacing", len(log), max(expected, len(log)))
    decoder.progress("replacing", len(log), len(log))
    check_same("edits", [entry.edit.spec() for entry in log])
    after = decoder.num_parameters()
    logger.info(
        "%s parameters -> %s (%.2f %% removed)",
        f"{before:,}",
        f"{after:,}",
        100 * (1 - after / before),
    )
    return log


@dataclass(frozen=True)
class Prediction:
    """What a method expects, in nats a token: the loss now, on the calibration text, and at each
    ratio its rise on text of the same kind that was not seen. `seen`: the rise on the calibration
    text itself. `notes` say where the tokens are too few.
    """

    loss: float
    rises: dict[float, float]
    seen: dict[float, float]
    notes: tuple[str, ...] = ()

    def perplexity(self, ratio: float) -> float:
        """exp(loss + rise) at one of the ratios in `rises`."""
        return math.exp(self.loss + self.rises[ratio])

    def interval(self, ratio: float) -> tuple[float, float]:
        """(least, most) that the perplexity is expected to be at that ratio."""
        low, high = interval(self.rises[ratio], self.seen[ratio])
        return math.exp(self.loss + low), math.exp(self.loss + high)


@keywords
def predict(
    source: ModelSource,
    ratios: Sequence[float],
    *,
    choice: MethodChoice,
    calibration: CalibrationRecipe,
    memory: MemoryRecipe,
    progress: Progress = silent,
    **fields: Any,
) -> Prediction:
    """The expected loss after `compress` at several ratios, from one sweep; nothing is changed or
    written.

    Arguments as for `compress`, a size among them.

    Raises `RecipeError` for a method whose scores are not losses.
    """
    chosen = make(choice.method, fields, KEYWORDS, choice.plugin)
    if not chosen.predicts:
        raise RecipeError(
            f"--method {chosen.name}: predicts no loss with these fields; only scores in nats do"
        )
    offload = offload_for(chosen, source, memory, calibration, None)
    decoder = open_model(**vars(source), dequantize=True, offload=offload)
    decoder.progress = progress
    _check(chosen, decoder, None, calibration)
    decoder.workers = workers_for(chosen, decoder, source, memory, calibration)
    data = draw(decoder, calibration)
    needs = chosen.needs(decoder)
    notes = _notes(chosen, decoder, data, needs)
    with joined():
        runner = runner_for(decoder, data)
        stats = runner.sweep(needs, "statistics")
        found = chosen.predict(runner, stats, ratios)
    assert stats.loss is not None
    rises = {ratio: expected for ratio, (expected, _) in found.items()}
    seen = {ratio: on_calibration for ratio, (_, on_calibration) in found.items()}
    asked = getattr(chosen, "share", None)
    if asked in found:
        notes = with_few_tokens(notes, data, *found[asked])
    return Prediction(stats.loss, rises, seen, notes)
