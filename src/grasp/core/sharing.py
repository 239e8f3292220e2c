"""Work that is shared out: over the cores of a machine, and over several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from grasp.core.processes import of_all, of_one, rank, world_size

Item = TypeVar("Item")
Result = TypeVar("Result")
Tensors = tuple[Tensor, ...]


def over_cores(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None
) -> Iterator[Result]:
    """`work` on every item, in order, at one a core at once: decompositions of this size gain
    little from more threads each. With fewer `workers` each has several cores. It begins at once.
    """
    threads = max(torch.get_num_threads(), 1)
    workers = min(workers or threads, threads)

    def alone(item: Item) -> Result:
        torch.set_num_threads(threads // workers)
        return work(item)

    pool = ThreadPoolExecutor(workers)
    return _ended(pool.map(alone, items), pool, threads)


def _ended(results: Iterator[Result], pool: ThreadPoolExecutor, threads: int) -> Iterator[Result]:
    """The results; afterwards the pool is gone and torch has its threads again."""
    try:
        yield from results
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def over_processes(
    work: Callable[[Item], Tensors],
    items: Sequence[Item],
    keep: Callable[[Tensor], Tensor] | None = None,
    workers: int | None = None,
) -> Iterator[Tensors]:
    """`work` on every item, in order, each done by one process for all. What the others made comes
    to this one's CPU, and `keep` says where it stays.
    """
    world, own = world_size(), rank()
    mine = over_cores(work, items[own::world], workers)
    for number in range(len(items)):
        owner = number % world
        made = next(mine) if owner == own else None
        others = of_one(made, owner)
        yield tuple(map(keep, others) if keep else others) if made is None else made


def by_turns(work: Callable[[int], Sequence[float]], count: int) -> list[Sequence[float]]:
    """What `work` gives for the numbers from 0 on, `count` of them: the processes take one after
    the other, and all get all.
    """
    world = world_size()
    own = [list(work(number)) for number in range(rank(), count, world)]
    found = [own] if world == 1 else of_all(own)
    return [found[number % world][number // world] for number in range(count)]
