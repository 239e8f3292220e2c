"""What a model is calibrated on: blocks of tokens of a text, drawn by a seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from grasp.core.fields import Name, NumSamples, Seed, SeqLen, flag
from grasp.recipes.part import Part

COLUMN = "Column of the text in .jsonl, .json, .csv or .parquet files."


@dataclass(frozen=True, kw_only=True)
class CalibrationRecipe(Part):
    """Arguments of `grasp.data.calibration.calibrate`, under the same names. In Python `data` may
    be a ready `Calibration`.
    """

    title: ClassVar[str] = "Calibration"

    data: Name = flag(
        "pydoc",
        "Calibration text: a named set (see `grasp data`), a file, self or pydoc; several,"
        " separated by commas, are mixed.",
    )
    num_samples: NumSamples = flag(64, "Number of calibration blocks.")
    seq_len: SeqLen = flag(512, "Tokens in a block.")
    seed: Seed = flag(0, "Draws the calibration blocks.")
    text_field: str | None = flag(None, COLUMN)


@dataclass(frozen=True, kw_only=True)
class InspectionRecipe(CalibrationRecipe):
    """The same for `grasp inspect`, whose scores settle sooner."""

    title: ClassVar[str] = "Inspection"

    num_samples: NumSamples = flag(32, "Number of calibration blocks.")
    angular: bool = flag(False, "Angular distance at the last token instead of block influence.")
