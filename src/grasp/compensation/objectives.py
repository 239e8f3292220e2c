"""What a compensation minimises. Each objective is a sum over the asked positions of a batch, in
its own unit; the trainer divides by their number.

lm        cross-entropy of the next token, nats (the paper)
distill   T^2 KL(teacher || model) of the next token's distribution at temperature T, nats;
          optionally mixed with lm
layer     squared error of the hidden state behind every edited layer, over the squared length of
          the teacher's
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from grasp.compensation.hooks import Outputs
from grasp.compensation.teacher import CachedTeacher, Teacher
from grasp.data.rows import IGNORED

Inputs = dict[str, Tensor]
"""What the model reads: ids, and positions or a mask."""


class Objective(ABC):
    """Called with the model as the trainer wraps it, a batch's inputs, its labels (batch, seq) and
    the numbers of its rows (batch,).
    """

    @abstractmethod
    def __call__(self, model: nn.Module, inputs: Inputs, labels: Tensor, rows: Tensor) -> Tensor:
        """The sum over positions whose next token's label is not `IGNORED`."""


def asked_logits(model: nn.Module, inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (asked, vocab) that predict the asked tokens, and those tokens (asked,)."""
    asked = labels[:, 1:] != IGNORED  # batch, seq - 1
    logits = model(**inputs, use_cache=False).logits[:, :-1]  # batch, seq - 1, vocab
    return logits[asked], labels[:, 1:][asked]


class LanguageModel(Objective):
    """Cross-entropy of the answers."""

    def __call__(self, model: nn.Module, inputs: Inputs, labels: Tensor, rows: Tensor) -> Tensor:
        logits, tokens = asked_logits(model, inputs, labels)
        return cross_entropy(logits.float(), tokens, reduction="sum")


class Distill(Objective):
    """KL from the teacher's predictions, mixed with `lm_weight` of the cross-entropy of the same
    tokens.
    """

    def __init__(
        self, teacher: Teacher | CachedTeacher, temperature: float = 1.0, lm_weight: float = 0.0
    ):
        self.teacher, self.temperature, self.lm_weight = teacher, temperature, lm_weight

    def __call__(self, model: nn.Module, inputs: Inputs, labels: Tensor, rows: Tensor) -> Tensor:
        logits, tokens = asked_logits(model, inputs, labels)
        if isinstance(self.teacher, CachedTeacher):
            known = self.teacher.most_likely(rows, logits.device)
            loss = divergence_of_most_likely(logits, *known, self.temperature)
        else:
            loss = divergence(logits, self.teacher.logits(inputs, labels), self.temperature)
        if self.lm_weight:
            loss = (1 - self.lm_weight) * loss + self.lm_weight * cross_entropy(
                logits.float(), tokens, reduction="sum"
            )
        return loss


def divergence(logits: Tensor, reference: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 sum KL(p || q): `reference` gives p, `logits` q, both (n, vocab), softened by T. The
    gradient has the size it has at T = 1.
    """
    mine = log_softmax(logits.float() / temperature, -1)
    theirs = log_softmax(reference.float() / temperature, -1)
    return temperature**2 * kl_div(mine, theirs, reduction="sum", log_target=True)


def divergence_of_most_likely(
    logits: Tensor, tokens: Tensor, logs: Tensor, temperature: float = 1.0
) -> Tensor:
    """The same where only p's most likely `tokens` (n, k) and their `logs` (n, k) are known; all
    others count as one outcome.

    Never more than the whole divergence (log-sum inequality).
    """
    mine = log_softmax(logits.float() / temperature, -1).gather(-1, tokens)  # n, k
    known = (logs.exp() * (logs - mine)).sum()
    rest, rest_mine = _remainder(logs), _remainder(mine)
    return temperature**2 * (known + (rest * (rest.log() - rest_mine.log())).sum())


def _remainder(logs: Tensor) -> Tensor:
    """1 - sum of probabilities, kept above zero so that its logarithm is finite."""
    return (1 - logs.exp().sum(-1)).clamp_min(1e-6)


class MatchLayers(Objective):
    """Hidden states behind the edited layers: `places` are (module of the model, index of the
    teacher's layer).
    """

    def __init__(self, teacher: Teacher, places: Sequence[tuple[nn.Module, int]]):
        self.teacher, self.places = teacher, list(places)

    def __call__(self, model: nn.Module, inputs: Inputs, labels: Tensor, rows: Tensor) -> Tensor:
        asked = labels[:, 1:] != IGNORED
        with Outputs([module for module, _ in self.places]) as outputs:
            model(**inputs, use_cache=False)
        wanted = self.teacher.hidden(inputs, [index for _, index in self.places])
        total = torch.zeros((), device=labels.device)
        for mine, theirs in zip(outputs.found, wanted, strict=True):
            reference = theirs[:, :-1][asked].float()  # asked, hidden
            error = (mine[:, :-1][asked].float() - reference).square().sum(-1)
            total = total + (error / reference.square().sum(-1).clamp_min(1e-12)).sum()
        return total / len(self.places)
