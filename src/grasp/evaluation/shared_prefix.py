"""Log-likelihoods of texts that begin alike, their beginning read once.

The options of a question follow the same words, and in perplexity mode all but the answer is the
same; lm-eval's wrapper of a model reads it again for each. Here the common beginning goes through
the model once, and what follows it in a batch, on the keys and values that are left. The numbers
are those of whole texts but for rounding. (Servers do so for requests: SGLang's RadixAttention,
arXiv 2312.07104.)

lm-eval's objects come as arguments: nothing here imports lm-eval.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from grasp.core.cache import holds_tokens_alone, new_cache
from grasp.core.decoder import Decoder

CALL = {"cpu": 64}
"""How many tokens one more call of the model must save to pay, by device: a processor is busy with
few, others with `OTHER_CALL`.
"""
OTHER_CALL = 512
NEIGHBOURS = 0.75
"""A text joins those before it where it shares at least so much of what its neighbours share."""


@dataclass(frozen=True)
class Run:
    """The texts `begin` to `end` - 1, whose first `length` tokens are the same."""

    begin: int
    end: int
    length: int

    @property
    def saved(self) -> int:
        """Tokens that need not be read again."""
        return (self.end - self.begin - 1) * self.length


def runs(texts: Sequence[list[int]]) -> list[Run]:
    """Neighbours that begin alike, together; each text is in one run. Of every text at least two
    tokens are left: one to read, and one to predict from it.
    """
    alike = [0, *(_common(one, other) for one, other in pairwise(texts)), 0]  # with the one before
    found: list[Run] = []
    for number in range(len(texts)):
        shared, most = alike[number], max(alike[max(number - 1, 0)], alike[number + 1])
        if shared and shared >= NEIGHBOURS * most:
            last = found.pop()
            length = shared if last.end - last.begin == 1 else min(last.length, shared)
            found.append(Run(last.begin, number + 1, length))
        else:
            found.append(Run(number, number + 1, 0))
    return found


def _common(one: list[int], other: list[int]) -> int:
    most = min(len(one), len(other)) - 2
    for number in range(most):
        if one[number] != other[number]:
            return number
    return max(most, 0)


@torch.no_grad()
def log_likelihoods(
    decoder: Decoder,
    texts: Sequence[list[int]],
    starts: Sequence[int],
    length: int,
    batch_size: int,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[float, bool]]:
    """For each text the log-likelihood of its tokens from `starts` on, each given all before it,
    and whether each of them is the likeliest one.

    Args:
        texts: token ids; their first `length` are the same, and each has two more at least.
        starts: where what is scored begins, at least 1.
        dtype: of the logarithms; None is the model's own.
    """
    device = decoder.model.device
    prefix = torch.tensor(texts[0][:length], device=device)
    cache = new_cache(decoder)
    read = decoder.model(input_ids=prefix[None], past_key_values=cache, use_cache=True).logits[0]
    asked = min(length, *starts)  # nobody asks for what is before
    common = _each(read[asked - 1 : -1], prefix[asked:], dtype)
    for first in range(0, len(texts), batch_size):
        part = [
            torch.tensor(ids[length:], device=device) for ids in texts[first : first + batch_size]
        ]
        rows = copy.deepcopy(cache)
        rows.batch_select_indices(torch.zeros(len(part), dtype=torch.long, device=device))
        tails = pad_sequence([ids[:-1] for ids in part], batch_first=True)
        after = decoder.model(input_ids=tails, past_key_values=rows, use_cache=True).logits
        for ids, start, logits in zip(part, starts[first : first + batch_size], after, strict=True):
            own = _each(torch.cat((read[-1:], logits[: len(ids) - 1])), ids, dtype)
            logs, likeliest = (
                torch.cat((shared[start - asked :], mine[max(start - length, 0) :]))
                for shared, mine in zip(common, own, strict=True)
            )
            yield float(logs.sum()), bool(likeliest.all())


def _each(
    logits: Float[Tensor, "tokens vocab"], ids: Int[Tensor, " tokens"], dtype: torch.dtype | None
) -> tuple[Float[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
    """The logarithm of each token's probability, and whether it is the likeliest."""
    logs = logits.log_softmax(-1, dtype=dtype)
    return logs.gather(-1, ids[:, None])[:, 0], logs.argmax(-1) == ids


def share_prefixes(harness: Any, decoder: Decoder) -> None:
    """Let lm-eval's wrapper of the model read common beginnings once where that pays. The rest it
    reads as before: also what is too long, and all texts where the model keeps more than keys and
    values of what it read (linear attention, Mamba).
    """
    if not holds_tokens_alone(new_cache(decoder)):
        return
    stock, pays = harness._loglikelihood_tokens, CALL.get(harness.device.type, OTHER_CALL)

    def answers(requests: Sequence[Any], *others: Any, **more: Any) -> list[tuple[float, bool]]:
        """lm-eval's requests: (context, continuation) or None, and the tokens of each."""
        texts = [[*context, *asked] for _, context, asked in requests]
        found: dict[int, tuple[float, bool]] = {}
        for run in runs(texts):
            of_run = slice(run.begin, run.end)
            if run.saved < pays or max(map(len, texts[of_run])) > harness.max_length + 1:
                continue
            starts = [len(context) for _, context, _ in requests[of_run]]
            told = log_likelihoods(
                decoder,
                texts[of_run],
                starts,
                run.length,
                harness.batch_size,
                harness.softmax_dtype,
            )
            for number, answer in enumerate(told, run.begin):
                found[number] = answer
                if requests[number][0] is not None:
                    harness.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
        rest = [number for number in range(len(requests)) if number not in found]
        theirs = stock([requests[number] for number in rest], *others, **more)
        found.update(zip(rest, theirs, strict=True))
        return [found[number] for number in range(len(requests))]

    harness._loglikelihood_tokens = answers
