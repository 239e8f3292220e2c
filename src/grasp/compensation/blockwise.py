"""`--objective block`: every edited layer is trained alone, first to last. On the compressed
model's own input it is to give what the dense model's layer gives on its own.

    minimise over the layer's trained weights  mean |f(x) - t|^2 / |t|^2     over tokens

with x what the compressed model shows the layer, those before it trained already, and t what the
dense model has behind it. So errors of the layers before are corrected, not passed on (AA-SVD calls
it block refinement). Of removed layers the one in front of the gap learns what they gave.

Memory: one layer of each model, with optimizer and activations, and the states of the rows in front
of it. Both models may lie on the disk.

A layer keeps the weights of the epoch whose error on held-out rows was lowest; those it had are one
of the choices. What was trained is written down layer by layer, so a run goes on behind the last.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from grasp.compensation.recipe import Recipe
from grasp.compensation.state import TRAINED
from grasp.compensation.training import Look, Trained, schedule_of
from grasp.compensation.walk import Walk
from grasp.core.decoder import Decoder
from grasp.core.progress import Progress
from grasp.core.writing import whole
from grasp.data.rows import IGNORED, Collate, Rows, TrainingData
from grasp.errors import NumericsError

logger = logging.getLogger(__name__)

LOOK = "look.json"
"""What is known of a layer that is done."""


class Layers(Mapping[str, Tensor]):
    """What was trained, by name, read from the folder of a run when it is looked at."""

    def __init__(self, folder: Path):
        self.files: dict[str, Path] = {}
        for file in folder.glob(f"layer-*/{TRAINED}"):
            with safe_open(file, "pt") as found:
                self.files |= dict.fromkeys(found.keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.files[name], "pt") as found:
            tensor: Tensor = found.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


@dataclass
class Blockwise:
    """A training of one layer after the other. `places`: place in the stack -> the dense model's
    layer whose output is wanted there; `names`: of the parameters that are trained. `keep`: where
    states stay.
    """

    decoder: Decoder
    teacher: Decoder
    places: Mapping[int, int]
    names: Sequence[str]
    recipe: Recipe
    data: TrainingData
    collate: Collate
    dtype: torch.dtype
    keep: Callable[[Tensor], Tensor]
    progress: Progress
    curve: list[Look] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Numbers that are trained."""
        return sum(self.decoder.model.get_parameter(name).numel() for name in self.names)

    def train(self, folder: Path) -> Trained:
        """Train; `folder` keeps what is done. Raises `NumericsError` for a loss that is not
        finite, naming the layer.
        """
        begin, steps, errors = time.perf_counter(), 0, list[float]()
        train, held_out = self._batches(self.data.train), self._batches(self.data.held_out)
        mine = self._walk(self.decoder, [*train, *held_out])
        theirs = self._walk(self.teacher, [*train, *held_out])
        before = self._walk(self.decoder, held_out)
        for place in range(len(self.decoder.stack)):
            self.progress("training, layer by layer", place, len(self.decoder.stack))
            wanted = self.places.get(place)
            own = [name for name in self.names if self._is_of(name, place)]
            before.step()
            if wanted is not None and own:
                while theirs.place <= wanted:
                    theirs.step()
                errors.append(_distance(before, theirs, len(train)))
                steps += self._layer(place, own, mine, theirs, len(train), folder)
            mine.step()
        self.progress("training, layer by layer", mine.place, mine.place)
        untrained, trained = (
            self._lm_loss(walk, range(first, first + len(held_out)))
            for walk, first in ((before, 0), (mine, len(train)))
        )
        after = sum(look["held_out_loss"] for look in self.curve) / len(errors)
        first = {"step": 0, "held_out_loss": sum(errors) / len(errors)}
        last = {"step": mine.place, "held_out_loss": after, "held_out_lm_loss": trained}
        first["held_out_lm_loss"] = untrained
        self.curve = [first, *self.curve, last]
        if trained > untrained:
            logger.warning(
                "each layer is nearer to the dense one, but the held-out text is dearer than"
                " before: %.4f nats a token, %.4f before; try another --data, or --objective"
                " distill",
                trained,
                untrained,
            )
        best = last if after < first["held_out_loss"] else first
        state = Layers(folder) if best["step"] else {}
        seen = steps * self.recipe.batch_size * self.recipe.max_length
        return Trained(state, self.curve, best, steps, seen, time.perf_counter() - begin)

    def _layer(
        self, place: int, own: Sequence[str], mine: Walk, theirs: Walk, count: int, folder: Path
    ) -> int:
        """Train the layer at `place` on the first `count` batches, or take what an earlier run
        made of it. Returns the steps that this run took.
        """
        done, steps = folder / f"layer-{place}", 0
        with self.decoder.changing(mine.layer):
            weights = {name: self.decoder.model.get_parameter(name) for name in own}
            if not done.is_dir():
                look, steps = self._fit(weights, _Errors(mine, theirs, count), place)
                with whole(done) as scratch:
                    state = {name: one.detach().float().cpu() for name, one in weights.items()}
                    save_file(state, scratch / TRAINED)
                    (scratch / LOOK).write_text(json.dumps(look), encoding="utf-8")
            for name, tensor in load_file(done / TRAINED).items():
                weights[name].data = tensor.to(weights[name])
            self.curve.append(json.loads((done / LOOK).read_text(encoding="utf-8")))
        return steps

    def _fit(self, weights: Mapping[str, Tensor], errors: _Errors, place: int) -> tuple[Look, int]:
        """AdamW on the error of one layer; the weights become those of the best epoch. Returns what
        is known of it, and the steps taken.
        """
        recipe, stored = self.recipe, {name: weight.dtype for name, weight in weights.items()}
        for weight in weights.values():
            weight.data = weight.data.float().clone()
            weight.requires_grad_(True)
        each = max(recipe.batch_size // recipe.micro_batch, 1)
        epochs = max(math.ceil(recipe.epochs), 1)
        total = epochs * math.ceil(errors.count / each)
        optimizer = torch.optim.AdamW(
            list(weights.values()),
            lr=recipe.learning_rate or 3e-4,
            weight_decay=recipe.weight_decay,
        )
        schedule = schedule_of(recipe, optimizer, total)
        best = errors.held_out()
        kept = {name: weight.detach().clone() for name, weight in weights.items()}
        begin, last, generator = best, best, torch.Generator().manual_seed(recipe.seed + place)
        for _ in range(epochs):
            order = torch.randperm(errors.count, generator=generator).tolist()
            for first in range(0, len(order), each):
                last = errors.backward(order[first : first + each])
                if not math.isfinite(last):
                    raise NumericsError(
                        f"layer {place}: the loss is {last}; try a smaller --learning-rate or"
                        " --precision float32"
                    )
                if recipe.max_grad_norm:
                    torch.nn.utils.clip_grad_norm_(list(weights.values()), recipe.max_grad_norm)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
            now = errors.held_out()
            if now < best:
                best = now
                kept = {name: weight.detach().clone() for name, weight in weights.items()}
        for name, weight in weights.items():
            weight.requires_grad_(False)
            weight.data = kept[name].to(stored[name])
        logger.info("layer %d: held-out error %.4f -> %.4f", place, begin, best)
        return {"step": place + 1, "loss": last, "held_out_loss": best}, total

    def _is_of(self, name: str, place: int) -> bool:
        return name.startswith(f"{self.decoder.family.layers}.{place}.")

    def _batches(self, rows: Rows) -> list[Mapping[str, Tensor]]:
        size = self.recipe.micro_batch
        return [
            self.collate([rows[one] for one in range(first, min(first + size, len(rows)))])
            for first in range(0, len(rows), size)
        ]

    def _walk(self, decoder: Decoder, batches: Sequence[Mapping[str, Tensor]]) -> Walk:
        return Walk(decoder, batches, self.keep, self._computing)

    def _computing(self) -> AbstractContextManager[Any]:
        """Products in the run's precision."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.decoder.device.type, self.dtype)

    @staticmethod
    def _lm_loss(walk: Walk, numbers: Sequence[int]) -> float:
        """Mean cross-entropy of the answers, nats."""
        total, count = 0.0, 0
        for number in numbers:
            labels = walk.batches[number]["answers"][:, 1:]
            asked = labels != IGNORED
            logits = walk.logits(number)[:, :-1][asked].float()
            total += float(cross_entropy(logits, labels[asked], reduction="sum"))
            count += int(asked.sum())
        return total / max(count, 1)


@torch.no_grad()
def _distance(mine: Walk, theirs: Walk, first: int) -> float:
    """The error of where `mine` stands, on its batches, which are those of `theirs` from `first`
    on: as `_Errors` has it.
    """
    total, tokens = 0.0, 0
    for number, state in enumerate(mine.states):
        wanted, real = theirs.states[first + number], mine.real(number)
        assert state is not None and wanted is not None
        total += float(_relative(state.to(real.device), wanted, real))
        tokens += int(real.sum())
    return total / tokens


def _relative(found: Tensor, wanted: Tensor, real: Tensor) -> Tensor:
    """Squared errors over squared lengths of (rows, seq, hidden), summed over real positions."""
    reference = wanted.to(found.device)[real].float()  # tokens, hidden
    error = (found[real].float() - reference).square().sum(-1)
    return (error / reference.square().sum(-1).clamp_min(1e-12)).sum()


class _Errors:
    """How far the next layer of `mine` is from where `theirs` stands: the mean over real positions
    of the squared error over the squared length of what is wanted. The first `count` batches are
    trained on.
    """

    def __init__(self, mine: Walk, theirs: Walk, count: int):
        self.mine, self.theirs, self.count = mine, theirs, count

    def __call__(self, number: int) -> tuple[Tensor, int]:
        """Summed over a batch's positions, and their number."""
        real, wanted = self.mine.real(number), self.theirs.states[number]
        assert wanted is not None
        return _relative(self.mine.output(number), wanted, real), int(real.sum())

    def backward(self, numbers: Sequence[int]) -> float:
        """Gradients of the mean over some batches. Returns that mean."""
        tokens, total = sum(int(self.mine.real(number).sum()) for number in numbers), 0.0
        for number in numbers:
            error, _ = self(number)
            (error / tokens).backward()
            total += float(error.detach())
        return total / tokens

    @torch.no_grad()
    def held_out(self) -> float:
        """The mean over the batches that are not trained on."""
        found = [self(number) for number in range(self.count, len(self.mine.batches))]
        return float(sum(error for error, _ in found)) / sum(tokens for _, tokens in found)
