"""Dense: an ordinary checkpoint of the original architecture, which loads anywhere. Every pair is
multiplied out; MLPs of fewer channels are filled up to the widest that is left, so it is smaller
where all of them lost some.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from grasp.core.axes import Sizes
from grasp.core.checkpoint import MAX_SHARD_SIZE
from grasp.core.decoder import Decoder
from grasp.core.edits.ordinary import multiply_out
from grasp.core.edits.widening import is_narrowed, widest, widths
from grasp.core.layer import is_low_rank
from grasp.core.layers.structure_grasp import structure_of
from grasp.core.proof import prove as prove_checkpoint

NO_PAIR = "the model has no low-rank matrix: the dense export is a copy"
NO_SMALLER = (
    "the low-rank matrices are multiplied out, so they are as large as in the model before"
    " compression (layers that were removed stay removed)"
)


def notes(decoder: Decoder) -> tuple[str, ...]:
    """What becomes of the pairs and of narrowed layers, for people."""
    pairs = any(is_low_rank(module) for module in decoder.model.modules())
    found, layers = ([NO_SMALLER] if pairs else []), widths(decoder)
    if not layers:
        return tuple(found) or (NO_PAIR,)
    there, own = widest(decoder, layers), Sizes.of(decoder.config)
    channels = {sizes.channels for sizes in layers.values()}
    if len(channels) > 1:
        found.append(
            f"the MLPs have {min(channels)} to {max(channels)} channels, and the architecture has"
            f" one number for all: they are filled up with zeros to {max(channels)}"
        )
    if decoder.family.holding("down"):
        found.append(_of_channels(there.channels, own.channels))
    if _lost_heads(decoder):
        found.append("KV groups and value dimensions that went are zeros again")
    return tuple(found)


def _of_channels(left: int, own: int) -> str:
    if left == own:
        return f"an MLP kept all {own} channels, so the MLPs are as large as before compression"
    return f"the MLPs are smaller than before compression: {left} channels of {own}"


def _lost_heads(decoder: Decoder) -> bool:
    """Whether a matrix outside the MLPs is narrow."""
    mlp = {path for _, path in decoder.family.mlp}
    return any(
        is_narrowed(record) and decoder.locate(path)[1] not in mlp
        for path, record in structure_of(decoder.model).items()
    )


def write(decoder: Decoder, folder: Path, _kind: str) -> None:
    """Write config and safetensors to `folder`, in the model's dtype. The model in memory is then
    dense too.
    """
    multiply_out(decoder)
    decoder.model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)


def prove(decoder: Decoder, said: Tensor, folder: Path, out: Path, _kind: str) -> None:
    """Raise `CheckpointError` where what was written is not the model."""
    prove_checkpoint(decoder, said, folder, out)


def how_to_run(_kind: str) -> str:
    """For the README beside the model: `str.format` with `out`."""
    return """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{out}")
tokenizer = AutoTokenizer.from_pretrained("{out}")
```

Nothing of grasp is needed to load it.
"""
