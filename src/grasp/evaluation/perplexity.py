"""Token perplexity: `exp` of the mean cross-entropy of the next token, over fixed blocks of a text.

Protocol (GPTQ's, in steps of `stride`): the text is tokenised once and cut into blocks of `seq_len` tokens, the rest is dropped.
In the first block every token but the first is predicted; with a stride below `seq_len`, blocks overlap and each later one counts
its last `stride` tokens only. A block whose loss is not finite stops the evaluation: skipping it would flatter the model.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from grasp.core.decoder import Decoder
from grasp.core.linalg import wide
from grasp.core.records import Score
from grasp.core.sweep import Progress, silent
from grasp.errors import DataError, NumericsError, RecipeError


@torch.no_grad()
def perplexity(
    model: Decoder,
    tokens: Tensor,
    *,
    name: str,
    seq_len: int,
    stride: int | None = None,
    num_blocks: int | None = None,
    bos: int | None = None,
    progress: Progress = silent,
) -> Score:
    """Perplexity of `tokens` (num_tokens,). `bos`: a token to put in front of every block; `num_blocks`: only the first so many.

    Raises `DataError` where the text is shorter than a block, `NumericsError` on a non-finite loss.
    """
    body = seq_len - (bos is not None)
    step = body if stride is None else stride
    if not 1 <= step <= body:
        raise RecipeError(f"--stride {stride}: must be from 1 to --seq-len ({body})")
    if num_blocks is not None and num_blocks < 1:
        raise RecipeError(f"--num-blocks {num_blocks}: must be 1 or more")
    available = (len(tokens) - body) // step + 1 if len(tokens) >= body else 0
    if available < 1:
        raise DataError(
            f"{name}: {len(tokens):,} tokens are too few for one block of --seq-len {seq_len}; give more text or a smaller --seq-len"
        )
    count = min(available, num_blocks or available)
    total, predicted = 0.0, 0
    task = f"perplexity on {name}"
    progress(task, 0, count)
    for block in range(count):
        ids = tokens[block * step : block * step + body]
        if bos is not None:
            ids = torch.cat([torch.tensor([bos]), ids])
        logits = model.model(input_ids=ids[None].to(model.device), use_cache=False).logits[0, :-1]  # seq - 1, vocab
        fresh = len(logits) if block == 0 else min(step, len(logits))
        labels = ids[1:].to(logits.device)
        loss = float(cross_entropy(wide(logits[-fresh:]), labels[-fresh:], reduction="sum"))
        if not math.isfinite(loss):
            raise NumericsError(
                f"{name}: the loss of block {block} is {loss} (dtype {model.model.dtype}); non-finite blocks are never skipped; try --dtype float32"
            )
        total, predicted = total + loss, predicted + fresh
        progress(task, block + 1, count)
    protocol: dict[str, Any] = {
        "seq_len": seq_len,
        "stride": step,
        "bos": "every block" if bos is not None else "as tokenised",
        "num_blocks": count,
        "num_tokens": predicted,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "loss": total / predicted,
    }
    return Score(name, math.exp(total / predicted), "perplexity", protocol)
