"""The dense model that a compensation learns from: run beside the model, kept outside the device,
or asked once and remembered.

A cache holds, for every asked position of every row, the teacher's k most likely tokens and their
log-probabilities: 6 k bytes a position. It is found again by a hash of the rows, the teacher's
weights, k and the temperature, in three `.npy` files (nothing is pickled).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from grasp.compensation.hooks import Outputs
from grasp.core.decoder import Decoder
from grasp.core.progress import Progress
from grasp.core.provenance import describe_model
from grasp.core.writing import whole
from grasp.data.rows import IGNORED, Collate, Rows, read_by_model
from grasp.errors import NumericsError, RecipeError


class Teacher:
    """The dense model, never trained."""

    def __init__(self, decoder: Decoder):
        self.decoder, self.description = decoder, describe_model(decoder)
        for parameter in decoder.model.parameters():
            parameter.requires_grad_(False)

    @torch.no_grad()
    def logits(self, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Logits (asked, vocab) for the asked tokens of `labels` (batch, seq)."""
        logits = self.decoder.model(**inputs, use_cache=False).logits[:, :-1]
        return logits[labels[:, 1:] != IGNORED]

    @torch.no_grad()
    def hidden(self, inputs: dict[str, Tensor], layers: Sequence[int]) -> list[Tensor]:
        """Hidden states (batch, seq, hidden) behind the layers."""
        modules: list[nn.Module] = [self.decoder.layer(index).module for index in layers]
        with Outputs(modules) as outputs:
            self.decoder.model.base_model(**inputs, use_cache=False)
        return outputs.found


def offload(teacher: Decoder, device: torch.device, folder: Path) -> None:
    """Keep the weights of `teacher` in main memory (in `folder`, where the device is the processor
    itself) and bring them in layer by layer.
    """
    from accelerate import cpu_offload, disk_offload

    if device.type == "cpu":
        disk_offload(teacher.model, str(folder), execution_device=device)
    else:
        cpu_offload(teacher.model, execution_device=device)


def check_teacher(decoder: Decoder, teacher: Decoder, num_layers: int | None) -> None:
    """Raise `RecipeError` where the teacher does not read and predict the same tokens, or is not
    the model that was compressed.
    """
    if teacher.config.vocab_size != decoder.config.vocab_size or (
        teacher.tokenizer is not None
        and decoder.tokenizer is not None
        and teacher.tokenizer.get_vocab() != decoder.tokenizer.get_vocab()
    ):
        raise RecipeError(
            f"--teacher {teacher.source}: its tokenizer is not that of {decoder.source}; give the"
            " model it was made from"
        )
    if num_layers is not None and teacher.num_layers != num_layers:
        raise RecipeError(
            f"--teacher {teacher.source}: has {teacher.num_layers} layers, but {decoder.source} was"
            f" made from a model with {num_layers}; give that one"
        )


class CachedTeacher:
    """What a teacher said about some rows: its most likely tokens, read from disk as they are asked
    for.
    """

    def __init__(self, folder: Path, temperature: float):
        # positions, k
        self.tokens = numpy.load(folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
        # positions, k
        self.logs = numpy.load(folder / "logs.npy", mmap_mode="r", allow_pickle=False)
        self.starts = numpy.load(folder / "starts.npy", allow_pickle=False)  # rows + 1
        self.temperature = temperature

    def most_likely(self, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities (asked, k) of these rows' asked positions, in order."""
        parts = [slice(int(self.starts[row]), int(self.starts[row + 1])) for row in rows.tolist()]
        tokens = numpy.concatenate([self.tokens[part] for part in parts]).astype("int64")
        logs = numpy.concatenate([self.logs[part] for part in parts]).astype("float32")
        return torch.from_numpy(tokens).to(device), torch.from_numpy(logs).to(device)


def remember(
    teacher: Teacher,
    sets: Sequence[Rows],
    collate: Collate,
    folder: Path,
    *,
    top_k: int,
    temperature: float,
    batch: int,
    progress: Progress,
) -> CachedTeacher:
    """Ask the teacher about every row of the sets, or find what it said before. Raises
    `NumericsError`, and `CheckpointError` on a full disk.
    """
    key = {
        "rows": [rows.sha256 for rows in sets],
        "every": [rows.every for rows in sets],
        "k": top_k,
        "temperature": temperature,
    }
    digest = hashlib.sha256(
        json.dumps({**key, "teacher": teacher.description["weights_fingerprint"]}).encode()
    ).hexdigest()
    place = folder / f"teacher-{digest[:16]}"
    if not place.is_dir():
        with whole(place) as scratch:
            _write(
                teacher,
                sets,
                collate,
                scratch,
                min(top_k, teacher.decoder.config.vocab_size),
                temperature,
                batch,
                progress,
            )
    return CachedTeacher(place, temperature)


def _mapped(path: Path, dtype: str, shape: tuple[int, int]) -> Any:
    """An array in a file that has its room on the disk: one with holes would end the process when
    the disk is full.
    """
    made = numpy.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return made


@torch.no_grad()
def _write(
    teacher: Teacher,
    sets: Sequence[Rows],
    collate: Collate,
    folder: Path,
    k: int,
    temperature: float,
    batch: int,
    progress: Progress,
) -> None:
    items = [rows[index] for rows in sets for index in range(len(rows))]
    counts = [sum(label != IGNORED for label in item["labels"][1:]) for item in items]
    starts = numpy.concatenate(([0], numpy.cumsum(counts)))
    numpy.save(folder / "starts.npy", starts, allow_pickle=False)
    shape = (int(starts[-1]), k)
    tokens = _mapped(folder / "tokens.npy", "int32", shape)
    logs = _mapped(folder / "logs.npy", "float16", shape)
    for first in range(0, len(items), batch):
        progress("asking the teacher", first, len(items))
        found = {
            name: tensor.to(teacher.decoder.device)
            for name, tensor in collate(items[first : first + batch]).items()
        }
        whole_logs = torch.log_softmax(
            teacher.logits(read_by_model(found), found["labels"]).float() / temperature, -1
        )
        if not bool(torch.isfinite(whole_logs).all()):
            raise NumericsError(
                f"--teacher {teacher.decoder.source}: its predictions are not finite; try"
                " --precision float32"
            )
        best = whole_logs.topk(k)
        part = slice(int(starts[first]), int(starts[min(first + batch, len(items))]))
        tokens[part], logs[part] = best.indices.cpu().numpy(), best.values.cpu().numpy()
    tokens.flush()
    logs.flush()
    progress("asking the teacher", len(items), len(items))
