"""When two results are the same number: what another processor, thread count or order of summation
may change, and no more.

A sum of n products in another order differs by some n^½ roundings of its largest term. Over a model
of a few layers the roundings of each add up, so results that agree to some hundreds of roundings of
their largest number are equal; a lost bias, a swapped group or a wrong mask moves them by hundreds
of thousands (`tests/test_closeness.py`).
"""

import torch
from torch import Tensor, nn

ROUNDINGS, FEW_ROUNDINGS = 256, 8
"""What a tiny model's logits may differ by, in units in the last place of the largest of them. The
second is for 16 bits, where sums are taken in 32 and rounded once a layer.
"""


def close(found: Tensor, expected: Tensor, roundings: float | None = None) -> bool:
    """Same shape, and equal up to `roundings` of the coarser dtype at the size of the largest
    expected number; None: as many as a tiny model in that dtype makes.
    """
    if found.shape != expected.shape:
        return False
    if not expected.numel():
        return True
    eps = max(torch.finfo(t.dtype).eps for t in (found, expected))
    if roundings is None:
        roundings = ROUNDINGS if eps < 1e-5 else FEW_ROUNDINGS
    largest = float(expected.detach().abs().max())
    return (
        float((found.detach().double() - expected.detach().double()).abs().max())
        <= roundings * eps * largest
    )


def same_weights(model: nn.Module, other: nn.Module) -> bool:
    """The same parameters and buffers by name, bit for bit: nothing is computed between saving and
    loading.
    """
    one, two = model.state_dict(), other.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@torch.no_grad()
def is_greedy(model: nn.Module, prompt: Tensor, text: Tensor, roundings: float = ROUNDINGS) -> bool:
    """Whether `text` (n,) is what greedy decoding says after `prompt` (m,), by one pass over both
    without a cache.

    Each token has the largest logit, or one within roundings of it: where two are as good as equal,
    another order of summation may take the other.
    """
    whole = torch.cat([prompt, text])[None]
    # n, vocabulary
    logits = model(input_ids=whole, use_cache=False).logits[0, len(prompt) - 1 : -1]
    taken = logits.gather(-1, text[:, None])[:, 0]
    slack = roundings * torch.finfo(logits.dtype).eps * float(logits.abs().max())
    return bool((taken >= logits.amax(-1) - slack).all())
