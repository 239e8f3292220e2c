"""Dense: an ordinary checkpoint of the original architecture. Every pair is multiplied out, so it
loads anywhere and is no smaller.
"""

from __future__ import annotations

from pathlib import Path

from grasp.core.checkpoint import MAX_SHARD_SIZE
from grasp.core.decoder import Decoder
from grasp.core.edits.ordinary import multiply_out
from grasp.core.layer import is_low_rank

NO_SMALLER = (
    "the low-rank matrices are multiplied out, so they are as large as in the model before"
    " compression (layers that were removed stay removed)"
)


def dense_parameters(decoder: Decoder) -> int:
    """Numbers the model will store once its pairs are multiplied out."""
    pairs = [module for module in decoder.model.modules() if is_low_rank(module)]
    return decoder.num_parameters() + sum(
        m.in_features * m.out_features - m.weight.numel() - m.weight_in.numel() for m in pairs
    )


def write(decoder: Decoder, folder: Path) -> None:
    """Write config and safetensors to `folder`. The model in memory is then dense too."""
    multiply_out(decoder)
    decoder.model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)


HOW_TO_RUN = """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{out}")
tokenizer = AutoTokenizer.from_pretrained("{out}")
```

Nothing of grasp is needed to load it.
"""
"""For the README beside the model: `str.format` with `out`."""
