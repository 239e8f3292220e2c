"""What a sweep shows to those who measure: the collector interface, and progress.

A collector hooks itself to one resident layer at a time. A sweep that holds the whole model
attaches all layers at once; one that streams layers from disk attaches each as it arrives. Results
are sums over blocks, so they add up over processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from grasp.core.layer import Layer

Progress = Callable[[str, int, int], None]
"""`progress(task, done, total)`: called at the start of a task with done = 0, and after every step.
"""


def silent(task: str, done: int, total: int) -> None:
    """The progress callback that shows nothing."""


class Collector(ABC):
    """Measures one statistic during a sweep.

    `name` is its table in `Statistics`; `backward` asks for gradients of the loss. Order of calls:
    `attach` for every layer, then for every block `begin_block`, the model's passes, `end_block`;
    then `result`.
    """

    name: ClassVar[str]
    backward: ClassVar[bool] = False

    @abstractmethod
    def attach(self, layer: Layer) -> list[RemovableHandle]:
        """Hook onto one layer (and ask for its gradients). Returns the handles to remove
        afterwards.
        """

    def begin_block(self, mask: Tensor | None) -> None:
        """A block is about to be shown; `mask` (batch, seq) is True on real tokens, None if all
        are.
        """
        self.mask = mask

    def end_block(self) -> None:
        """The block's passes are over."""

    @abstractmethod
    def result(self) -> Mapping[Any, Any]:
        """The finished table."""
