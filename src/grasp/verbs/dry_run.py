"""What a compression would do and cost, from the model's shapes: nothing is run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grasp.core.decoder import Decoder
from grasp.core.fields import PathLike
from grasp.core.models import load_model
from grasp.data.stream import check_lengths
from grasp.methods import make
from grasp.methods.base import Method, Plan
from grasp.recipes.calibration import CalibrationRecipe
from grasp.recipes.keywords import keywords
from grasp.recipes.memory import MemoryRecipe
from grasp.recipes.method import MethodChoice
from grasp.recipes.model import ModelSource
from grasp.verbs.compress import KEYWORDS, stays
from grasp.verbs.preflight import Estimate, Preflight, folder_of


@dataclass(frozen=True)
class DryRun:
    """What `compress` would do. `needs`: what is known of memory, disk and time; `cost`: what it
    would need, done as it would be; `seconds`: how long it would take.
    """

    method: Method
    needs: Preflight
    cost: Estimate
    seconds: float

    @property
    def decoder(self) -> Decoder:
        """The model, empty: shapes without weights."""
        return self.needs.decoder

    @property
    def plan(self) -> Plan:
        """What the method plans."""
        return self.needs.plan

    @property
    def num_bytes(self) -> int:
        """Of the result on disk, or of the whole model where the size follows from the scores."""
        if self.method.asked_bytes is not None:
            return self.method.asked_bytes
        after = self.plan.parameters
        return (self.decoder.num_parameters() if after is None else after) * self.needs.width

    @property
    def ratio(self) -> float | None:
        """Share of all parameters that would go, where it is known."""
        after = self.plan.parameters
        return None if after is None else 1 - after / self.decoder.num_parameters()

    @property
    def stays(self) -> list[str]:
        """What the method leaves as it is, where that needs saying."""
        return stays(self.method, self.decoder)


@keywords
def dry_run(
    source: ModelSource,
    out: PathLike | None = None,
    *,
    choice: MethodChoice,
    calibration: CalibrationRecipe,
    memory: MemoryRecipe,
    **fields: Any,
) -> DryRun:
    """What `compress` would do with these arguments, from the model's shapes alone: no weights and
    no text are read. Raises `RecipeError` where it would not fit into memory or onto the disk.
    """
    chosen = make(choice.method, fields, KEYWORDS, choice.plugin)
    decoder = load_model(
        str(source.model),
        empty=True,
        device=source.device,
        dtype=source.dtype,
        trust_remote_code=source.trust_remote_code,
    )
    check_lengths(decoder, calibration.num_samples, calibration.seq_len)
    chosen.check(decoder)
    needs = Preflight.of(chosen, source, memory, calibration, decoder)
    folder = folder_of(memory, None if out is None else Path(out))
    return DryRun(chosen, needs, needs.check(folder), needs.seconds())
