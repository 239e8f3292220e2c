"""Whether a model needs its beginning-of-sequence token in front of every block of text.

Some models never saw a text without that token and lose most of what they know where it is missing:
Gemma's perplexity rises from 21 to 650. Others read a block from the middle of a text as well
without it, and the published numbers of those (GPTQ's protocol) have it at the very start of the
stream at most. So the token is put in by need, not by what the tokenizer does:

1. models trained so, by their type, whatever the tokenizer's files say;
2. a checkpoint of ours: as the dense model was found to be when it was compressed, so that both are
   measured alike;
3. any other: tried. The same tokens are read with and without the token in front; a loss that rises
   by more than `NEEDED` without it is need.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from grasp.core.documents import MANIFEST, read_json
from grasp.core.linalg import wide

logger = logging.getLogger(__name__)

TRAINED_WITH = ("gemma",)
"""Model types with such a word in their name always read the token: gemma, gemma2, gemma3_text,
gemma3n, recurrent_gemma, ...
"""
NEEDED = 0.5
"""Nats a token: a perplexity 1.65 times as high. Gemma loses more than 3; models that do not need
the token, hundredths.
"""
LENGTH, SKIPPED = 128, 16
"""Tokens that are read, and how many of the first are not counted: every model is lost there."""
EVERY_BLOCK, AS_TOKENISED = "every block", "as tokenised"

PASSAGE = """
of the river, where the old mill had stood since before anyone could remember. The miller, a quiet
man with flour on his sleeves, opened the gate every morning at six and let the water in. People
from three villages brought their grain to him: wheat in the late summer, rye and barley when the
days grew short. They waited on the bench by the door and talked about the weather, the price of
bread and the new railway that was to pass through the valley. Some of them said that it would bring
work and visitors; others feared the noise and the smoke. In the end the line was built on the other
side of the hill, and for another forty years nothing changed. The wheel turned, the stones were cut
anew each winter, and the children learned to swim in the pond below the weir, as their parents had
done before them. Only when the large steam mills in the town began to sell their flour for half of
what it cost him did the miller stop the wheel for good.
"""
"""Plain English from the middle of a text."""


def block_bos(model: Any, tokenizer: Any, config: Any, told: str | None = None) -> int | None:
    """The id of the token that every block must begin with, or None.

    `config` is the text decoder's; `told` what a manifest says: `EVERY_BLOCK` or `AS_TOKENISED`.
    """
    if tokenizer is None:
        return None
    bos = tokenizer.bos_token_id
    if bos is None:
        bos = (
            config.bos_token_id[0]
            if isinstance(config.bos_token_id, list) and config.bos_token_id
            else config.bos_token_id
        )
    if not isinstance(bos, int) or bos >= num_rows(model):
        return None
    if any(word in config.model_type for word in TRAINED_WITH) or told == EVERY_BLOCK:
        return bos
    return None if told == AS_TOKENISED or not _tried(model, tokenizer, config, bos) else bos


def told_in(source: str) -> str | None:
    """What the manifest of the checkpoint at `source` says; None where there is none."""
    path = Path(source) / MANIFEST
    if not source or not path.is_file():
        return None
    found = read_json(path, hint="the checkpoint is damaged")
    told = found.get("calibration") if isinstance(found, dict) else None
    return told.get("bos") if isinstance(told, dict) else None


def num_rows(model: Any) -> int:
    """Rows of the input embeddings: the token ids that the model can read are those below."""
    embeddings = model.get_input_embeddings()
    rows = getattr(embeddings, "num_embeddings", None)
    return int(embeddings.weight.shape[0] if rows is None else rows)


@torch.no_grad()
def _tried(model: Any, tokenizer: Any, config: Any, bos: int) -> bool:
    """Whether the loss of the passage says that the token is needed. Never for a model without
    weights or with losses that are not finite.
    """
    most = min(LENGTH, (getattr(config, "max_position_embeddings", None) or LENGTH) - 1)
    ids = torch.tensor(
        tokenizer(" ".join(PASSAGE.split()), add_special_tokens=False, verbose=False).input_ids[
            :most
        ]
    )
    if len(ids) < 2 * SKIPPED or int(ids.max()) >= num_rows(model) or model.device.type == "meta":
        return False
    counted = len(ids) - SKIPPED
    risen = _loss(model, ids, counted) - _loss(
        model, torch.cat([torch.tensor([bos]), ids]), counted
    )
    if risen > NEEDED:
        logger.info(
            "the model reads %.2f nats a token worse without its beginning-of-sequence token: every"
            " block begins with it",
            risen,
        )
    return risen > NEEDED


def _loss(model: Any, ids: Tensor, counted: int) -> float:
    """Mean cross-entropy in nats of the last `counted` tokens of `ids` (seq,)."""
    logits = model(input_ids=ids[None, :-1].to(model.device), use_cache=False).logits[0, -counted:]
    return float(cross_entropy(wide(logits), ids[-counted:].to(logits.device)))
