"""Another forward for a module, for a while; its hooks stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_IDLES = "grasp_idles"


@contextmanager
def lent(
    module: nn.Module, forward: Callable[..., Any], idles: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Inside, `forward` is what the module does. `idles`: whether it would now look at no weight of
    the module.
    """
    own = vars(module)
    before = {name: own[name] for name in ("forward", _IDLES) if name in own}
    try:
        own["forward"] = forward  # what a module has itself comes before what its class has
        own[_IDLES] = idles
        yield
    finally:
        del own["forward"], own[_IDLES]
        own.update(before)


def idles(module: nn.Module) -> bool:
    """Whether what was lent to the module would now look at none of its weights."""
    found = vars(module).get(_IDLES)
    return found is not None and found()
