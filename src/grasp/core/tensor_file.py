"""Named tensors in a safetensors file, written one after the other: the library's own writer holds
all of their bytes in memory at once, which sums kept in files (`grasp.core.scratch`) may not fit
in.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that the tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], wait: bool = True) -> str:
    """Write a new file; unless `wait` is False, it is on the disk when this returns. Returns its
    sha256.
    """
    # the widest first, or a reader would find numbers across the borders of their size
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    header, end = {}, 0
    for name in order:
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {
            "dtype": NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for part in (len(head).to_bytes(8, "little"), head):
            digest.update(part)
            file.write(part)
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            data: Any = flat.view(torch.uint8).numpy()
            digest.update(data)
            file.write(data)
        file.flush()
        if wait:
            os.fsync(file.fileno())
    return digest.hexdigest()


def read_tensors(path: Path, sha256: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file, one after the other, each a tensor of its own in memory. Raises
    `ValueError`, before the first, where the file is not what was written.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while part := file.read(1 << 22):
                digest.update(part)
        if digest.hexdigest() != sha256:
            raise ValueError("its contents have changed")
        with safe_open(path, "pt") as found:
            for name in found.keys():  # noqa: SIM118, not a mapping
                yield name, found.get_tensor(name).clone()
    except (OSError, SafetensorError) as failure:
        raise ValueError(str(failure)) from failure
