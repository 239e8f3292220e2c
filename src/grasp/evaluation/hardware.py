"""The machine as it bounds decoding: how fast it reads memory, and which kernels a model runs.

At small batches a decode step reads every weight once and computes little, so no step can be faster
than `bytes read / memory bandwidth` (the memory roof of the roofline model, Williams et al. 2009,
doi 10.1145/1498765.1498785).
"""

from __future__ import annotations

import time
from typing import Any

import torch

from grasp.core.decoder import Decoder
from grasp.core.layer import is_low_rank

BUFFER = {"cpu": 1 << 28, "cuda": 1 << 30}
"""Bytes read to measure the bandwidth: more than the caches hold."""


def read_bandwidth(device: torch.device, rounds: int = 7) -> float:
    """Bytes a second that this process reads from memory, with torch's threads: the best of
    `rounds` sums over a large buffer.
    """
    buffer = torch.ones(BUFFER.get(device.type, 1 << 28) // 4, device=device)
    best = float("inf")
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        float(buffer.sum())
        best = min(best, time.perf_counter() - begin)
    return buffer.nbytes / best


def step_bytes(decoder: Decoder, batch_size: int, cache: float) -> float:
    """Bytes that one decode step reads: every weight once (of an input embedding that is not also
    the output, one row a sequence) and the cache. For a mixture of experts it counts all experts,
    which is the upper end.
    """
    total = decoder.num_bytes() + cache
    table = decoder.model.get_input_embeddings()
    output = decoder.model.get_output_embeddings()
    if output is None or output.weight is not table.weight:
        # several tensors where it is in few bits
        row = sum(p[0].nbytes for p in table.parameters(recurse=False))
        total += (batch_size - len(table.weight)) * row
    return total


def kernels(decoder: Decoder) -> dict[str, Any]:
    """What runs: device, dtype, threads, attention kernel, and how the low-rank factors are
    multiplied.
    """
    device = decoder.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(decoder.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "attention": str(getattr(decoder.config, "_attn_implementation", None) or "eager"),
        "low_rank": low_rank_products(decoder),
    }


def low_rank_products(decoder: Decoder, compile: bool = False) -> str:
    """How first products run: "none" of a dense model, "fused first products" where pairs that read
    the same input share one, else separate.
    """
    pairs = [module for module in decoder.model.modules() if is_low_rank(module)]
    if not pairs:
        return "none"
    fused = not compile and any(getattr(pair, "joint", None) is not None for pair in pairs)
    return "fused first products" if fused else "separate products"
