"""docs/methods.md, from the methods themselves: what each says of itself in its module, and what it
edits and measures, which is seen by running it on a tiny model.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from grasp.core.collector import Collector
from grasp.core.decoder import Decoder
from grasp.core.fields import declared
from grasp.core.records import Calibration, Statistics
from grasp.core.runner import Resident
from grasp.methods import available, make

HEAD = """<!-- Written by docs/generate.py; do not edit. `make docs` writes it anew. -->

# Methods

One file in `src/grasp/methods/` is one method is one paper. Their flags are in
[reference.md](reference.md#methods); how they compare on one model, in [costs.md](costs.md) and
[experiments.md](experiments.md). A method of your own: [CONTRIBUTING.md](../CONTRIBUTING.md).

| `--method` | paper | edits | statistics, in the order of its sweeps |
|---|---|---|---|"""


class Watching(Resident):
    """Notes what is collected."""

    def __init__(self, decoder: Decoder, data: Calibration):
        super().__init__(decoder, data)
        self.seen: dict[str, None] = {}

    def sweep(self, collectors: Sequence[Collector], *args: Any, **kwargs: Any) -> Statistics:
        self.seen |= dict.fromkeys(type(one).__name__ for one in collectors)
        return super().sweep(collectors, *args, **kwargs)


def methods_page() -> str:
    """The whole page."""
    logging.getLogger("grasp").setLevel(logging.ERROR)
    rows, parts = [], []
    for name, method in available().items():
        kinds, statistics = _seen(name)
        link = method.paper.rpartition("/")[2]
        rows.append(f"| [`{name}`](#{name}) | [{link}]({method.paper}) | {kinds} | {statistics} |")
        told = inspect.cleandoc(importlib.import_module(method.__module__).__doc__ or "")
        parts += ["", f"## {name}", "", told]
    return "\n".join([HEAD, *rows, *parts, ""])


def _seen(name: str) -> tuple[str, str]:
    """What a method edits, and which statistics it asks for, on a tiny random Llama; on a Mixtral
    where it is about experts.
    """
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model: PreTrainedModel = (
        MixtralForCausalLM(MixtralConfig(**sizes, **heads))
        if available()[name].changes_experts
        else LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    )
    decoder = Decoder(model)
    method = make(name, {"ratio": 0.3} if "ratio" in declared(available()[name]) else {})
    runner = Watching(decoder, Calibration(torch.arange(128).view(4, 32) % 64, "numbers"))
    kinds: dict[str, None] = {}
    for step in method.edits(runner, runner.sweep(method.needs(decoder))):
        step.edit.apply(decoder)
        kinds |= {type(step.edit).__name__: None}
    return ", ".join(kinds), ", ".join(runner.seen)
