"""What modules give, noted while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


class Outputs:
    """Within the block, notes what each of the modules gives: `found[n]` is the hidden state
    (batch, seq, hidden) behind module n.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        self.modules, self.found = modules, [torch.empty(0)] * len(modules)

    def __enter__(self) -> Outputs:
        self.handles = [
            module.register_forward_hook(self._note(number))
            for number, module in enumerate(self.modules)
        ]
        return self

    def _note(self, number: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            self.found[number] = output[0] if isinstance(output, tuple) else output

        return hook

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
