"""One row of a comparison, before it is run.

Its key is a hash of everything that makes its numbers, the bytes of local files included: a
finished cell is run again exactly where one of these changed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grasp.errors import RecipeError
from grasp.methods import make
from grasp.recipes.calibration import CalibrationRecipe
from grasp.recipes.part import defaults

VERSION = 1
"""Counts up where the meaning of a cell changes, so that old rows are not taken for new ones."""


@dataclass(frozen=True)
class Cell:
    """One row to be: a method with its fields and its calibration, measured in one way. `method`
    "": the dense model. `recovery`: arguments of the training that follows, if any does.
    """

    label: str
    model: str
    method: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    speed: Mapping[str, Any] | None = None
    recovery: Mapping[str, Any] | None = None
    loading: Mapping[str, Any] = field(default_factory=dict)
    varied: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Hash of all that makes the numbers: the fields, and the bytes of the local files they
        name.
        """
        values = {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in ("label", "varied")
        }
        if self.recovery is None:
            del values["recovery"]
        values["loading"].pop("trust_remote_code", None)  # what may be run, not what is computed
        if self.method:  # what is left to its default and what names it are the same
            values["fields"] = make(self.method, dict(self.fields)).recipe()
            values["calibration"] = {**defaults(CalibrationRecipe), **self.calibration}
        else:
            values["calibration"] = {}
        read = (self.calibration, self.recovery or {})
        texts = [text for one in read for text in str(one.get("data", "")).split(",")]
        texts += self.evaluation.get("ppl", ())
        files = [
            _digest(path, path.stat().st_mtime_ns, path.stat().st_size)
            for text in texts
            if (path := file_of(text)).is_file()
        ]
        return hashlib.sha256(
            json.dumps([VERSION, values, files], sort_keys=True).encode()
        ).hexdigest()[:16]

    @property
    def granted(self) -> list[str]:
        """The flags of the command line that a process of its own must be given again."""
        device = ["--device", str(self.loading["device"])] if "device" in self.loading else []
        return [
            *device,
            *(["--trust-remote-code"] if self.loading.get("trust_remote_code") else []),
        ]


def file_of(text: str) -> Path:
    """The file that DATA would be, $NAMES put in. Raises `RecipeError` for a name that the
    environment lacks.
    """
    place = os.path.expandvars(text.strip().rpartition("=")[2])
    if "$" in place:
        raise RecipeError(
            f"data {text}: the environment has no {place[place.index('$') :].split('/')[0]}; set"
            " it, e.g. DATA=path/to/data grasp compare ..."
        )
    return Path(place).expanduser()


@functools.cache
def _digest(path: Path, _mtime: int, _size: int) -> str:
    """sha256 of a file: read once, however many cells name it, unless it changes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
