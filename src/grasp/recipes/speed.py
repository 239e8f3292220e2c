"""How speed is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from grasp.core.fields import BatchSize, NumTokens, Rounds, flag
from grasp.recipes.part import Part


@dataclass(frozen=True, kw_only=True)
class SpeedRecipe(Part):
    """Arguments of `grasp.evaluation.bench.bench`, under the same names."""

    title: ClassVar[str] = "Measurement"

    batch_sizes: tuple[BatchSize, ...] = flag((1,), "Sequences at once, e.g. 1,4,16.")
    prompt_len: NumTokens = flag(512, "Tokens of the prompt.")
    new_tokens: NumTokens = flag(128, "Tokens decoded after it.")
    rounds: Rounds = flag(5, "Measured rounds, after one of warm-up.")
    compile: bool = flag(False, "Measure the models under torch.compile.")
