"""The checkpoint: an ordinary Hugging Face directory, plus `grasp.json` (the manifest) and a model card.

Written beside its destination and renamed when whole, so a crash or a full disk leaves nothing that loads. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grasp.core.decoder import Decoder
from grasp.core.fields import PathLike, checked
from grasp.core.manifest import MANIFEST, read_manifest
from grasp.core.models import load_model
from grasp.errors import CheckpointError

MAX_SHARD_SIZE = "5GB"
SPARE = 1.02
"""Room asked for on the disk, over the bytes of the weights."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: the model, its tokenizer, and the manifest (empty for a model that grasp did not write)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    manifest: dict[str, Any]


def check_destination(out: Path, num_bytes: int) -> None:
    """Raise `CheckpointError` where `out` cannot take a checkpoint of `num_bytes`: asked before any work is done."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"OUT {out}: exists and is not an empty directory; choose another path or remove it")
    parent = _existing_parent(out)
    if not os.access(parent, os.W_OK):
        raise CheckpointError(f"OUT {out}: {parent} is not writable")
    free = shutil.disk_usage(parent).free
    if free < num_bytes * SPARE:
        raise CheckpointError(
            f"OUT {out}: needs {num_bytes * SPARE / 1e6:,.0f} MB, {parent} has {free / 1e6:,.0f} MB free; free some or choose another disk"
        )


def _existing_parent(path: Path) -> Path:
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A scratch directory beside `out` that becomes `out` if the block ends well, and vanishes if not."""
    scratch = None
    parent = out.absolute().parent
    new = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.absolute().parent))
        yield scratch
        for file in scratch.rglob("*"):
            _to_disk(file)
        scratch.chmod(0o777 & ~_umask())
        os.replace(scratch, out)
        _to_disk(out.absolute().parent)
    except (OSError, SafetensorError) as failure:
        raise CheckpointError(f"OUT {out}: cannot be written: {failure}; nothing was left behind") from failure
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        for folder in new if not out.exists() else ():
            with suppress(OSError):
                folder.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(decoder: Decoder, out: Path, manifest: dict[str, Any], card: str, beside: Callable[[Path], None] | None = None) -> None:
    """Write the model as it is now to `out`, with its manifest and model card; `beside` adds to the directory once the model is in it.

    Raises `CheckpointError`; `out` is then untouched.
    """
    check_destination(out, decoder.num_bytes())
    with whole(out) as scratch:
        decoder.model.save_pretrained(scratch, max_shard_size=MAX_SHARD_SIZE)
        if decoder.tokenizer is not None:
            decoder.tokenizer.save_pretrained(scratch)
        version = getattr(getattr(decoder.model.config, "quantization_config", None), "version", 1)
        (scratch / MANIFEST).write_text(json.dumps({"format_version": version, **manifest}) + "\n", encoding="utf-8")
        (scratch / "README.md").write_text(card, encoding="utf-8")
        if beside is not None:
            beside(scratch)


@checked
def load(source: PathLike, **options: Any) -> Checkpoint:
    """Load a checkpoint, or any other MODEL; options as for `load_model`.

    The dense matrices are never built: peak memory is that of the small model. Raises `CheckpointError` for a damaged or
    incomplete directory and for one written by a newer grasp.
    """
    manifest = read_manifest(Path(source)) if (Path(source) / MANIFEST).is_file() else {}
    decoder = load_model(os.fspath(source), **options)
    return Checkpoint(decoder.model, decoder.tokenizer, manifest)


def bytes_on_disk(directory: Path) -> int:
    """Bytes of the weight files."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))
