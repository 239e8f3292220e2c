"""Examples -> the rows a model is trained on: packed several to a row, or one a row with padding;
and batches of them.

Packed examples do not see one another: their positions start anew, from which transformers builds a
mask with one block an example. Families that cannot do that are padded, with a notice.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from grasp.core.decoder import Decoder
from grasp.data.examples import Example, Examples
from grasp.data.stream import shares
from grasp.errors import DataError

logger = logging.getLogger(__name__)

IGNORED = -100
"""The label of a token that is not asked for, as everywhere in torch and transformers."""


@dataclass(frozen=True)
class Row:
    """One row: ids and, for each token, its position in its example and whether it is asked for."""

    ids: list[int]
    positions: list[int]
    asked: list[bool]


class Rows(Dataset[dict[str, Any]]):
    """Rows as a data set, numbered from `first`. `every`: labels are all tokens of an example but
    its first, not only those asked for.
    """

    def __init__(self, rows: Sequence[Row], every: bool = False, first: int = 0):
        self.rows, self.every, self.first = list(rows), every, first

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        answers = [
            token if asked else IGNORED for token, asked in zip(row.ids, row.asked, strict=True)
        ]
        every = [
            token if position else IGNORED
            for token, position in zip(row.ids, row.positions, strict=True)
        ]
        return {
            "ids": row.ids,
            "positions": row.positions,
            "labels": every if self.every else answers,
            "answers": answers,
            "row": self.first + index,
        }

    @property
    def num_tokens(self) -> int:
        return sum(len(row.ids) for row in self.rows)

    @property
    def num_asked(self) -> int:
        return sum(sum(row.asked) for row in self.rows)

    @property
    def sha256(self) -> str:
        """Hash of all ids, positions and labels, in order."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(
                torch.tensor([row.ids, row.positions, row.asked]).numpy().astype("<i8").tobytes()
            )
        return digest.hexdigest()


@dataclass(frozen=True)
class Collate:
    """Rows -> one batch: tensors (rows, longest). `packed`: positions tell the examples apart; else
    a mask marks the padding.
    """

    packed: bool
    pad_id: int = 0

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(row["ids"]) for row in rows)

        def stack(name: str, filler: int) -> Tensor:
            return torch.tensor([row[name] + [filler] * (longest - len(row[name])) for row in rows])

        batch = {
            "input_ids": stack("ids", self.pad_id),
            "labels": stack("labels", IGNORED),
            "answers": stack("answers", IGNORED),
            "row": torch.tensor([row["row"] for row in rows]),
            "length": torch.tensor([len(row["ids"]) for row in rows]),
        }
        if self.packed:
            return {**batch, "position_ids": stack("positions", 0)}
        return {
            **batch,
            "attention_mask": (torch.arange(longest) < batch["length"][:, None]).long(),
        }


READ = ("input_ids", "position_ids", "attention_mask")
"""What of a batch the model itself reads."""


def read_by_model(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a batch that the model reads."""
    return {name: batch[name] for name in READ if name in batch}


@dataclass(frozen=True)
class TrainingData:
    """What is trained on and what is held out."""

    train: Rows
    held_out: Rows
    packed: bool
    sources: dict[str, int]


def prepare(
    sources: Sequence[Examples],
    *,
    max_length: int,
    held_out: int,
    packed: bool,
    batch: int,
    needed: int | None,
    every: bool,
    seed: int,
) -> TrainingData:
    """Hold some examples out, pack the rest, and take as many rows as are `needed` (None: all), of
    each source an equal share.

    Whole batches only: what is left over is not trained on. Raises `DataError` where there is too
    little to fill one, or to hold any out.
    """
    random_order = random.Random(seed)
    train, kept_out = [], []
    for source, share in zip(sources, shares(held_out, sources), strict=True):
        if len(source.examples) < share + 1:
            raise DataError(
                f"--held-out {held_out}: {source.name} has {len(source.examples):,} examples, and"
                f" {share} of them would be held out; give more text or hold out fewer"
            )
        examples = random_order.sample(source.examples, len(source.examples))
        kept_out += _rows(examples[:share], max_length, packed)
        rows = _rows(examples[share:], max_length, packed)
        train.append(random_order.sample(rows, len(rows)))
    available = sum(len(rows) for rows in train)
    if available < batch:
        raise DataError(
            f"--batch-size {batch}: the text gives {available} rows of at most {max_length} tokens;"
            " give more text or a smaller batch"
        )
    counts = _row_counts(
        [len(rows) for rows in train], min(needed or available, available) // batch * batch
    )
    chosen = [row for rows, count in zip(train, counts, strict=True) for row in rows[:count]]
    names = {source.name: count for source, count in zip(sources, counts, strict=True)}
    return TrainingData(Rows(chosen, every), Rows(kept_out, every, len(chosen)), packed, names)


def _row_counts(available: Sequence[int], needed: int) -> list[int]:
    """How many rows of each source: equal parts of `needed`, where a short source leaves its rest
    to the others.
    """
    counts, left = [0] * len(available), needed
    for done, place in enumerate(sorted(range(len(available)), key=lambda i: available[i])):
        counts[place] = min(available[place], left // (len(available) - done))
        left -= counts[place]
    return counts


def _rows(examples: Sequence[Example], max_length: int, packed: bool) -> list[Row]:
    """One row an example, or best-fit decreasing: each example, longest first, goes where it leaves
    the least room.
    """
    if not packed:
        return [
            Row(example.ids, list(range(len(example.ids))), example.asked) for example in examples
        ]
    # rooms[n]: rows with room for n more tokens
    rooms: list[list[list[Example]]] = [[] for _ in range(max_length + 1)]
    for example in sorted(examples, key=lambda example: -len(example.ids)):
        size = len(example.ids)
        room = next((room for room in range(size, max_length) if rooms[room]), None)
        row = rooms[room].pop() if room is not None else []
        row.append(example)
        rooms[(max_length if room is None else room) - size].append(row)
    return [_joined(row) for same in rooms for row in same]


def _joined(examples: Sequence[Example]) -> Row:
    ids = [token for example in examples for token in example.ids]
    positions = [place for example in examples for place in range(len(example.ids))]
    return Row(
        ids, positions, [asked for example in examples for asked in [False, *example.asked[1:]]]
    )


@torch.no_grad()
def can_pack(decoder: Decoder) -> bool:
    """Whether two examples in one row give the logits they give alone: tried on the model."""
    if "position_ids" not in inspect.signature(decoder.model.forward).parameters:
        return False
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, decoder.config.vocab_size, (1, 24), generator=generator).to(
        decoder.device
    )
    positions = torch.cat((torch.arange(12), torch.arange(12)))[None].to(decoder.device)
    try:
        together = (
            decoder.model(input_ids=ids, position_ids=positions, use_cache=False)
            .logits[:, 12:]
            .float()
        )
        alone = decoder.model(input_ids=ids[:, 12:], use_cache=False).logits.float()
    except (RuntimeError, ValueError, TypeError):
        return False
    allowed = 1e-3 if decoder.model.dtype == torch.float32 else 5e-2
    return bool((together - alone).norm() <= allowed * alone.norm())


def pack_or_pad(decoder: Decoder, pad: bool) -> bool:
    """Whether to pack; says so where the model cannot."""
    packed = not pad and can_pack(decoder)
    if not packed and not pad:
        logger.warning(
            "this model does not keep packed examples apart: one example a row, padded (--pad)"
        )
    return packed
