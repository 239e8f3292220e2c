"""Where a result comes from: versions of the software, a fingerprint of the model, and how long
each step took.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from grasp.core.decoder import Decoder

WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers of so many bytes."""
ROW, PART = 1 << 12, 1 << 22
"""Numbers that are summed up to one, and that are looked at together."""


def versions() -> dict[str, str]:
    """Versions of what computes."""
    found = {"python": platform.python_version()}
    for package in ("grasp-llm", "torch", "transformers", "safetensors"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """What a speed was measured on: processor, cores, threads that torch uses, memory, and the GPU
    if there is one.
    """
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def describe_model(decoder: Decoder) -> dict[str, Any]:
    """Name, class, dtype, sizes, and hashes of the config and of the layout of the weights of the
    model as it is now.
    """
    config = json.dumps(decoder.model.config.to_dict(), sort_keys=True, default=str)
    digest = hashlib.sha256()
    for name, parameter in decoder.model.named_parameters():
        # the ends and the sum of a tensor tell two trainings apart at the price of one pass
        with decoder.holding(parameter):
            numbers = parameter.detach().flatten()
            # a sum in float64 makes a copy in float64
            sums = [float(part.sum(dtype=torch.float64)) for part in numbers.split(PART)]
            sample = [math.fsum(sums), *numbers[:4].tolist()]
            del numbers
        digest.update(json.dumps([name, list(parameter.shape), sample]).encode())
    return {
        "source": decoder.source,
        "class": type(decoder.model).__name__,
        "family": decoder.family.name,
        "num_layers": decoder.num_layers,
        "dtype": str(decoder.model.dtype).removeprefix("torch."),
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "weights_fingerprint": digest.hexdigest(),
    }


def code_of(kind: type) -> str:
    """sha256 of the file that a class is written in; "" where there is none."""
    try:
        return hashlib.sha256(Path(inspect.getfile(kind)).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return ""


def contents(decoder: Decoder) -> dict[str, str]:
    """Hashes that tell whether a model is the same one, wherever it lies and whatever computes: of
    its settings, and of its weights.

    The weights' is of the sums of their bits as whole numbers, 4,096 at a time, so that one
    number that changed shows, and neither threads nor devices do.
    """
    settings = decoder.model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        settings.pop(name, None)
    said = json.dumps(settings, sort_keys=True, default=str)
    digest = hashlib.sha256()
    for name, weight in decoder.model.state_dict(keep_vars=True).items():
        digest.update(json.dumps([name, str(weight.dtype), list(weight.shape)]).encode())
        with decoder.holding(weight):
            bits = weight.detach().reshape(-1).view(WHOLE[weight.element_size()])
            for part in bits.split(PART):  # a sum in int64 makes a copy in int64
                rows = part[: len(part) // ROW * ROW].view(-1, ROW).sum(1, dtype=torch.int64)
                digest.update(str([*rows.tolist(), *part[len(rows) * ROW :].tolist()]).encode())
            del bits
    return {
        "model settings": hashlib.sha256(said.encode()).hexdigest(),
        "model weights": digest.hexdigest(),
    }


class Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.began = self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        """The time since the last lap was spent on `name`."""
        now = time.perf_counter()
        self.laps[name], self.last = round(now - self.last, 3), now
