"""What a compression will need, told before it is run: memory and disk from shapes, time from short
measurements of this machine (`grasp.verbs.run_time`); and whether the model's layers have to stay
on the disk for it.

Memory is the largest of three moments, over what Python and its libraries take:

    a sweep         the weights, the sums, activations, and logits where gradients are taken
    decompositions  the weights, all statistics, and what one matrix a thread needs
    the proof       the model that was made, once more as it loads, a table of it twice, and what
                    the log holds of it

With the layers on the disk, statistics lie there too, and of weights and sums one layer counts.
Processes that share the layers (`--fsdp`) hold their part of all beside that.
Checked by benchmarks/offload.py.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from grasp.core.decoder import Decoder
from grasp.core.destination import existing, size
from grasp.core.freed import LARGE
from grasp.core.models import DTYPES, device_of, load_model
from grasp.core.offload import Offload
from grasp.core.processes import processes_here, world_size
from grasp.core.records import Calibration
from grasp.core.scratch import available_memory
from grasp.errors import RecipeError
from grasp.methods.base import Method, Plan
from grasp.recipes.calibration import CalibrationRecipe
from grasp.recipes.memory import MemoryRecipe
from grasp.recipes.model import ModelSource
from grasp.verbs.machine_speed import Speed
from grasp.verbs.run_time import seconds

logger = logging.getLogger(__name__)

ACTIVATIONS = 1.5
"""Of the inputs and outputs of a layer's matrices, what its graph keeps for the backward pass."""
PACKED = 2
"""Copies of the head that its products make in float32 on a processor with AVX-512, one forward and
one backward.
"""
PIECES = 2
"""What decompositions in memory take, over what they hold at once, where their squares are smaller
than `LARGE`: the C library keeps as much again of what is free. With the layers on the disk it
gives that back (`grasp.core.freed`).
"""
SQUARES_HELD = 20
"""Of the largest of its squares in float32, what a decomposition holds at once."""
SURELY = 4
"""Where so many times the weights are free, nothing more is asked before a run."""


@dataclass(frozen=True)
class Estimate:
    """`memory` in bytes over what Python and its libraries take, `disk` in bytes, OUT among
    them.
    """

    memory: int
    disk: int


@dataclass(frozen=True)
class _Sizes:
    """Bytes of a model: what is outside layers, the largest table there, all layers, the largest
    of them, the edited part as it will be, and what is made.
    """

    outside: float
    table: float
    layers: float
    layer: float
    edited: float
    after: float


def estimate(
    decoder: Decoder,
    plan: Plan,
    num_samples: int,
    seq_len: int,
    dtype: torch.dtype,
    offloaded: bool = False,
    sharing: int = 0,
    workers: int | None = None,
    device: str = "cpu",
) -> Estimate:
    """From the model's shapes (it may be empty, in the dtype of its files) and what the method
    plans; `dtype`: as it will be in memory, `offloaded`: with the layers on the disk, `sharing`: so
    many processes that share them, `workers`: at so many matrices at once (None: one a core).
    """
    width = dtype.itemsize
    sizes = _sizes(decoder, plan, width)
    config, backward = decoder.config, plan.backward_sweeps > 0
    layers = len(decoder.kept)
    touched = [sum(map(sum, shapes)) for shapes in _shapes(decoder)]
    of_layer = ACTIVATIONS * seq_len * max(touched, default=0) * width
    states = seq_len * layers * config.hidden_size * width
    logits = seq_len * config.vocab_size * (2 * width + (12 if width == 4 else 16)) * backward
    logits += PACKED * sizes.table * (backward and device == "cpu" and _packs(dtype))
    held = (plan.held_sets * num_samples + plan.held_blocks) * seq_len * config.hidden_size * 4
    at_once = min(plan.at_once, workers or max(torch.get_num_threads(), 1))
    collected, workspace = plan.statistics_bytes + held, at_once * plan.workspace_bytes
    sums = plan.statistics_bytes - plan.made_bytes
    journal = sums * max(plan.backward_sweeps, 1) + sizes.edited * 4 / width
    if offloaded:
        one = plan.statistics_bytes / max(plan.num_layers, 1)
        own = sizes.layers / sharing if sharing else 0.0
        arriving = 2 * sizes.layer if sharing else sizes.layer  # as it comes, and in its place
        memory = (
            own
            + sizes.outside
            + max(
                arriving + one + of_layer + max(states * backward, 0) + logits,
                at_once * sizes.layer + one + workspace,
                sizes.outside + sizes.table + sizes.layer,
            )
        )
        converted = 0.0 if dtype == decoder.model.dtype else sizes.layers
        written = max(collected + sums, journal + sizes.edited + sizes.after)
        disk = converted + written
    else:
        weights = sizes.outside + sizes.layers
        pieces = PIECES if plan.workspace_bytes < SQUARES_HELD * LARGE else 1
        kept = sizes.edited * 4 / width * (width < 4)  # else they are the model's own numbers
        memory = max(
            weights + collected + (of_layer * layers if backward else of_layer) + logits,
            weights + collected + pieces * workspace + kept,
            2 * sizes.after + sizes.table + kept + collected,
        )
        disk = sizes.after + journal
    return Estimate(int(memory), int(disk))


def _packs(dtype: torch.dtype) -> bool:
    """Whether products on this processor make a copy of a table in an order of their own."""
    able: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return dtype == torch.float32 and bool(able.get("avx512_f"))


def _shapes(decoder: Decoder) -> list[list[tuple[int, int]]]:
    """Of every layer, the shapes of its matrices."""
    return [[one.shape for one in layer.linears.values()] for layer in decoder.layers()]


def _sizes(decoder: Decoder, plan: Plan, width: int) -> _Sizes:
    each = [sum(p.numel() for p in layer.module.parameters()) for layer in decoder.layers()]
    before, largest = decoder.num_parameters(), max(each, default=0)
    after = before if plan.parameters is None else plan.parameters
    edited = max(after - before + min(plan.num_layers * largest, sum(each)), 0)
    table = max(p.numel() for p in decoder.model.parameters())
    outside = before - sum(each)
    of_each = (width * one for one in (outside, table, sum(each), largest, edited, after))
    return _Sizes(*of_each)


# --- where the layers will be


@dataclass(frozen=True)
class Preflight:
    """What is known of a run before it begins. `decoder` is empty: shapes without weights; `free`
    the bytes that may be used.
    """

    decoder: Decoder
    plan: Plan
    calibration: CalibrationRecipe
    memory: MemoryRecipe
    dtype: torch.dtype
    free: int | None
    device: torch.device

    @classmethod
    def of(
        cls,
        method: Method,
        source: ModelSource,
        memory: MemoryRecipe,
        calibration: CalibrationRecipe,
        decoder: Decoder,
    ) -> Preflight:
        """Of a run with the model whose shapes `decoder` has. Raises `RecipeError` for weights that
        one process would share with nobody.
        """
        if memory.fsdp and world_size() == 1:
            raise RecipeError(
                "--fsdp: there is one process, which has nobody to share with; start several with"
                " torchrun, or take --offload FOLDER"
            )
        dtype = DTYPES[source.dtype] if source.dtype else decoder.model.dtype
        free = memory.most if memory.most is not None else free_memory(source.device)
        device = device_of(source.device)
        return cls(decoder, method.plan(decoder), calibration, memory, dtype, free, device)

    @property
    def width(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize

    @property
    def shown(self) -> tuple[int, int]:
        """The blocks of the calibration set, and the tokens of one."""
        asked: Any = self.calibration
        if isinstance(asked.data, Calibration):
            blocks, length = asked.data.ids.shape
            return blocks, length
        return asked.num_samples, asked.seq_len

    def estimate(self, offloaded: bool) -> Estimate:
        """What the run needs, with the layers in memory or on the disk."""
        return self._at(offloaded, self.workers(offloaded))

    def _at(self, offloaded: bool, workers: int) -> Estimate:
        sharing = world_size() if self.memory.fsdp else 0

        def of(plan: Plan) -> Estimate:
            shown = self.decoder, plan, *self.shown, self.dtype
            return estimate(*shown, offloaded, sharing, workers, self.device.type)

        found, on_gpu = of(self.plan), self.device.type == "cuda" and self.free is not None
        if on_gpu and not offloaded and self.plan.statistics_bytes >= (self.free or 0) / 2:
            elsewhere = replace(self.plan, statistics_bytes=0, made_bytes=0)  # `Scratch.for_bytes`
            found = replace(found, memory=of(elsewhere).memory)
        return found

    def workers(self, offloaded: bool) -> int:
        """At how many matrices the run can work at once: as many as fit into what is free, one a
        core at most, and one at least.
        """
        most = min(max(torch.get_num_threads(), 1), self.plan.at_once)
        if self.free is None:
            return most
        fit = (n for n in range(most, 1, -1) if self._at(offloaded, n).memory <= self.free)
        return next(fit, 1)

    def seconds(self) -> float:
        """How long the run takes on this machine, whose speed is measured for it."""
        speed = Speed.measured(self.decoder, self.dtype, self.device, self.shown[1])
        return seconds(
            self.decoder, self.plan, *self.shown, self.width, speed, offloaded=self.offloaded
        )

    @property
    def offloaded(self) -> bool:
        """Whether the layers have to stay on the disk, or are asked to."""
        if self.memory.offload is not None or self.memory.fsdp:
            return True
        return self.free is not None and self.estimate(False).memory > self.free

    def check(self, folder: Path) -> Estimate:
        """What the run needs as it will be done, `folder` being where it writes on the way. Raises
        `RecipeError` where it does not fit, with the way out.
        """
        if not self.offloaded:
            return self.estimate(False)
        cost = self.estimate(True)
        if self.free is not None and cost.memory > self.free:
            asked = self.memory.max_memory
            said = f"--max-memory {asked}" if asked else f"{size(self.free)} of memory are free"
            raise RecipeError(
                f"{said}: about {size(cost.memory)} are needed with the layers on the disk; give"
                f" --max-memory {_rounded(cost.memory)} or more, or a --seq-len below"
                f" {self.calibration.seq_len}"
            )
        free = shutil.disk_usage(existing(folder)).free
        if cost.disk > free:
            raise RecipeError(
                f"--offload {folder}: about {size(cost.disk)} are needed on the way,"
                f" {size(free)} are free; name a folder on another disk, or give more --max-memory"
            )
        return cost


def _rounded(num_bytes: int) -> str:
    """A size that can be given for `num_bytes`, a little more than them."""
    unit, scale = (
        ("GB", 1e9) if num_bytes >= 1e9 else ("MB", 1e6) if num_bytes >= 1e6 else ("kB", 1e3)
    )
    return f"{math.ceil(num_bytes * 10.2 / scale) / 10:g}{unit}"


def free_memory(device: str | None) -> int | None:
    """Bytes that can be had where the model will be, by each of the processes on this machine; None
    where nobody says it.
    """
    on_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    if on_gpu:
        return torch.cuda.mem_get_info(device)[0]
    free = available_memory()
    return None if free is None else free // processes_here()


def folder_of(memory: MemoryRecipe, out: Path | None) -> Path:
    """Where a run writes what is needed on the way: the folder asked for, or that of OUT."""
    if memory.offload is not None:
        return Path(memory.offload)
    return Path(tempfile.gettempdir()) if out is None else existing(out.parent)


def workers_for(
    method: Method,
    decoder: Decoder,
    source: ModelSource,
    memory: MemoryRecipe,
    calibration: CalibrationRecipe,
) -> int:
    """At how many matrices of a model that is open memory allows to work at once."""
    found = Preflight.of(method, source, memory, calibration, decoder)
    if memory.most is None and found.free is not None and decoder.offload is None:
        found = replace(found, free=found.free + decoder.num_bytes())  # it is there already
    return found.workers(decoder.offload is not None)


def offload_for(
    method: Method,
    source: ModelSource,
    memory: MemoryRecipe,
    calibration: CalibrationRecipe,
    out: Path | None,
) -> Offload | None:
    """Where the layers of the model go, or None where it is to be in memory. Raises `RecipeError`
    where the run does not fit, before any work is done.
    """
    asked = next(
        (f"--{name.replace('_', '-')}" for name, value in vars(memory).items() if value), ""
    )
    name: Any = source.model
    if not isinstance(name, (str, Path)):
        if asked:
            raise RecipeError(f"{asked}: the model is in memory already; give its name or path")
        return None
    if str(name).endswith(".gguf") and not asked:
        return None
    told = vars(source)
    told = {one: told[one] for one in ("device", "dtype", "trust_remote_code")}
    decoder = load_model(str(name), empty=True, **told)
    free = free_memory(source.device)
    if not asked and (free is None or SURELY * decoder.num_bytes() < free):
        return None
    method.check(decoder)
    found = Preflight.of(method, source, memory, calibration, decoder)
    folder = folder_of(memory, out)
    cost = found.check(folder)
    if not found.offloaded:
        return None
    if not asked:
        logger.warning(
            "%s would need about %s of memory, %s are free: its layers stay on the disk, and about"
            " %s are used (see --max-memory and --offload)",
            name,
            size(found.estimate(False).memory),
            size(found.free or 0),
            size(cost.memory),
        )
    return Offload.at(folder, cost.memory, memory.fsdp)
