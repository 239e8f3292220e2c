"""What a number may owe to calibration or training: the very text that is measured on, or another
part of the same set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grasp.core.records import Text
from grasp.data.text import sources


def trained_on(manifest: Mapping[str, Any]) -> list[str]:
    """The texts that recoveries of the model were trained on."""
    names, told = list[str](), manifest.get("recovery")
    while told:
        names += told["data"]["sources"]
        told = told.get("before")
    return names


def leakage(
    calibration: Mapping[str, Any], trained_on: Sequence[str], texts: Sequence[Text]
) -> tuple[str, ...]:
    """What the numbers may owe to calibration or training: the very text that is measured on, or
    another part of the same set.
    """
    used = sources(str(calibration.get("source", "")))
    notes = []
    for text in texts:
        if any(_path(text.name) == _path(one) and _path(one).exists() for one in trained_on):
            notes.append(
                f"{text.name}: LEAKAGE, the model was trained on this file; the number is not a"
                " held-out one"
            )
        elif text.name in trained_on:
            notes.append(
                f"{text.name}: same source, the model was trained on another split of this set"
            )
        elif text.sha256 == calibration.get("text_sha256"):
            notes.append(
                f"{text.name}: LEAKAGE, the model was calibrated on this very text; the number is"
                " not a held-out one"
            )
        elif text.name in used and not _path(text.name).exists():
            notes.append(
                f"{text.name}: same source, the model was calibrated on another split of this set"
            )
        elif any(_path(text.name) == _path(one) for one in used):
            notes.append(
                f"{text.name}: LEAKAGE, the model was calibrated on this file, among others; the"
                " number is not a held-out one"
            )
    return tuple(notes)


def _path(name: str) -> Path:
    """The file that a text's name (PATH or NAME=PATH) stands for."""
    return Path(name.rpartition("=")[2]).expanduser().absolute()
