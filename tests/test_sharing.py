"""Work that is shared out: by the cores in order, by processes each once, and all get all of it."""

import json
import multiprocessing
import os
import socket
import threading

import pytest
import torch

from grasp.core.processes import joined
from grasp.core.sharing import over_cores, over_processes

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool)
SHAPES = ((), (3,), (2, 4), (0, 5))


def test_over_cores_keeps_the_order_and_the_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert list(over_cores(lambda item: (item, torch.get_num_threads()), range(5))) == [
            (item, 1) for item in range(5)
        ]
        shared = over_cores(lambda item: (item, torch.get_num_threads()), range(5), workers=1)
        assert list(shared) == [(item, 2) for item in range(5)]
        with pytest.raises(ZeroDivisionError):
            list(over_cores(lambda item: 1 // item, [1, 0]))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_the_cores_begin_before_somebody_asks():
    begun = threading.Event()
    found = over_cores(lambda _: begun.set(), [1])
    assert begun.wait(20)
    assert list(found) == [None]


def made(item):
    """Some tensors of every shape and kind, which depend on the item alone."""
    generator = torch.Generator().manual_seed(item)
    shapes = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape, dtype in shapes)


def one_of(rank, world, items, port, out):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    done, kept = [], []

    def work(item):
        done.append(item)
        return made(item)

    def keep(tensor):
        kept.append(1)
        return tensor

    with joined():
        found = list(over_processes(work, range(items), keep))
    same = all(
        one.dtype == other.dtype and torch.equal(one, other)
        for item, tensors in enumerate(found)
        for one, other in zip(tensors, made(item), strict=True)
    )
    out.write_text(json.dumps({"done": done, "same": same, "kept": len(kept)}))


@pytest.mark.parametrize(("world", "items"), [(2, 5), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_each_item_is_done_once_and_comes_to_all(world, items, tmp_path):
    """Also where there are fewer items than processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=one_of, args=(rank, world, items, port, tmp_path / str(rank)))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    told = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(world)]
    assert all(one["same"] for one in told)
    assert sorted(item for one in told for item in one["done"]) == list(range(items))
    each = len(SHAPES) * len(DTYPES)
    assert [one["kept"] for one in told] == [(items - len(one["done"])) * each for one in told]
