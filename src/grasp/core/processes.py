"""Several processes that work on one model together, as torchrun begins them:

    torchrun --nproc-per-node N -m grasp compress MODEL OUT ...

What each of them needs of the others is said here: who it is, and sums over all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(hours=4)
"""How long a process waits for the others, which may have slower blocks or devices. One that fails
ends the whole job at once: torchrun stops the others.
"""


def world_size() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def processes_here() -> int:
    """How many of them share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this is the one that writes and speaks."""
    return rank() == 0


@contextmanager
def joined() -> Iterator[None]:
    """Inside, sums over all processes can be taken; a process that is alone needs none."""
    if world_size() == 1 or dist.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    yield
    dist.destroy_process_group()  # not where it failed: the others would be waited for


def add_up(sums: dict[str, Tensor], device: torch.device) -> None:
    """Put the sums of all processes, by key, in the place of those of this one. What a process
    lacks counts as 0; `device` is where it keeps what is on no CPU.
    """
    shapes = {
        key: [list(value.shape), str(value.dtype).removeprefix("torch."), value.device.type]
        for key, value in sums.items()
    }
    known = {key: shape for of_one in of_all(shapes) for key, shape in of_one.items()}
    for key in sorted(known):
        if key not in sums:
            shape, dtype, kind = known[key]
            where = "cpu" if kind == "cpu" else device
            sums[key] = torch.zeros(shape, dtype=getattr(torch, dtype), device=where)
        dist.all_reduce(sums[key])


def of_all(value: Any) -> list[Any]:
    """A JSON value of every process, in their order."""
    own = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
    length = torch.tensor([len(own)])
    lengths = [torch.zeros_like(length) for _ in range(world_size())]
    dist.all_gather(lengths, length)
    longest = int(max(lengths))
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(own)] = own
    found = [torch.zeros_like(padded) for _ in lengths]
    dist.all_gather(found, padded)
    return [
        json.loads(bytes(one[: int(count)].tolist()))
        for one, count in zip(found, lengths, strict=True)
    ]


def of_one(tensors: Sequence[Tensor] | None, owner: int) -> list[Tensor]:
    """The tensors that process number `owner` has, on the CPU; the others give None."""
    given = None if tensors is None else [tensor.detach().cpu().contiguous() for tensor in tensors]
    shapes = [[list(one.shape), str(one.dtype).removeprefix("torch.")] for one in given or ()]
    shapes = of_all(shapes)[owner]
    found = []
    for number, (shape, dtype) in enumerate(shapes):
        tensor = torch.empty(shape, dtype=getattr(torch, dtype)) if given is None else given[number]
        dist.broadcast(tensor.view(-1).view(torch.uint8), owner)  # of any dtype
        found.append(tensor)
    return found
