"""The checkpoint: an ordinary Hugging Face directory, plus `grasp.json` (the manifest) and a model
card.

Written whole or not at all (`grasp.core.writing`), so a crash or a full disk leaves nothing that
loads. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grasp.core.decoder import Decoder
from grasp.core.destination import check_destination
from grasp.core.fields import PathLike, checked
from grasp.core.manifest import FORMAT_VERSION, MANIFEST, read_manifest
from grasp.core.models import load_model
from grasp.core.offload import Offload
from grasp.core.proof import answer, prove
from grasp.core.seal import sealed
from grasp.core.writing import whole

MAX_SHARD_SIZE = "5GB"
WHOLE = "model.safetensors"
"""What transformers calls a checkpoint's only file of weights."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: the model, its tokenizer, and the manifest (empty for a model that grasp
    did not write).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    manifest: dict[str, Any]


def save(
    decoder: Decoder,
    out: Path,
    manifest: dict[str, Any],
    card: str,
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write the model as it is now to `out`, with its manifest and model card; `beside` adds to the
    directory once the model is in it.

    Raises `CheckpointError`, also where what was written does not load again as this model; `out`
    is then untouched.
    """
    check_destination(out, decoder.num_bytes())
    said = answer(decoder)
    with whole(out) as scratch:
        _save_model(decoder, scratch)
        if decoder.tokenizer is not None:
            decoder.tokenizer.save_pretrained(scratch)
        for file in decoder.beside:
            shutil.copyfile(file, scratch / file.name)
        (scratch / "README.md").write_text(card, encoding="utf-8")
        prove(decoder, said, scratch, out)
        if beside is not None:
            beside(scratch)
        manifest = sealed(scratch, {"format_version": FORMAT_VERSION, **manifest})
        (scratch / MANIFEST).write_text(json.dumps(manifest) + "\n", encoding="utf-8")


def _save_model(decoder: Decoder, folder: Path) -> None:
    """Weights and config; where the layers are on the disk, one shard is in memory at a time."""
    model, offload = decoder.model, decoder.offload
    if offload is None:
        model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
        return
    # it would ask the model for its weights, and not take those that it is given
    quantizer = vars(model).pop("hf_quantizer", None)
    try:
        _save_in_parts(model, offload, decoder.family.layers, folder)
    finally:
        if quantizer is not None:
            vars(model)["hf_quantizer"] = quantizer


def _save_in_parts(model: PreTrainedModel, offload: Offload, layers: str, folder: Path) -> None:
    """A checkpoint of several files, each saved by itself: transformers holds on to all weights
    that it is given at once.
    """
    places: dict[str, str] = {}
    parts = offload.parts(model, layers)
    for number, names in enumerate(parts, 1):
        one = folder / "part"
        model.save_pretrained(one, max_shard_size="1000TB", state_dict=offload.state(model, names))
        file = WHOLE if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        os.replace(one / WHOLE, folder / file)
        with safe_open(folder / file, "pt") as found:
            places |= dict.fromkeys(found.keys(), file)
        for other in one.iterdir():
            os.replace(other, folder / other.name)
        one.rmdir()
    if len(parts) > 1:
        size = {"total_parameters": model.num_parameters(), "total_size": bytes_on_disk(folder)}
        index = {"metadata": size, "weight_map": places}
        (folder / f"{WHOLE}.index.json").write_text(json.dumps(index, indent=2) + "\n")


@checked
def load(source: PathLike, **options: Any) -> Checkpoint:
    """Load a checkpoint, or any other MODEL; options as for `load_model`.

    The dense matrices are never built: peak memory is that of the small model. Raises
    `CheckpointError` for a damaged or incomplete directory and for one written by a newer grasp.
    """
    manifest = read_manifest(Path(source)) if (Path(source) / MANIFEST).is_file() else {}
    decoder = load_model(os.fspath(source), **options)
    return Checkpoint(decoder.model, decoder.tokenizer, manifest)


def bytes_on_disk(directory: Path) -> int:
    """Bytes of the weight files."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))
