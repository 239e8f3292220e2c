"""Can a checkpoint of a model in memory be loaded again? A class of one's own may not be there when
it is. Asked before any work is done.
"""

from __future__ import annotations

import sys
from typing import Any

from grasp.core.decoder import Decoder
from grasp.core.layers.modeling_grasp import plain_class
from grasp.errors import ModelError

NOTHING = {
    "__module__",
    "__doc__",
    "__qualname__",
    "__firstlineno__",
    "__static_attributes__",
    "__annotations__",
    "config_class",
}
"""What a class body holds where it adds nothing to its base."""


def settle_class(decoder: Decoder) -> None:
    """Make sure that what is saved of the model can be loaded.

    A class of transformers is; so is one whose file transformers saves beside the weights (from a
    directory with `trust_remote_code`, or by `register_for_auto_class`). A subclass that adds
    nothing is saved as its base, which the model becomes here. Raises `ModelError` for others.
    """
    kind: Any = plain_class(type(decoder.model))
    # PreTrainedModel at the latest
    base: Any = next(base for base in kind.__mro__ if base.__module__.startswith("transformers."))
    if kind is base:
        return
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if (
        kind._auto_class is not None
        and kind.__module__ != "__main__"
        and "<locals>" not in kind.__qualname__
        and file
    ):
        return
    own = [
        name
        for one in kind.__mro__[: kind.__mro__.index(base)]
        for name in vars(one)
        if name not in NOTHING
    ]
    if not own and getattr(kind, "config_class", None) is getattr(base, "config_class", None):
        decoder.model.__class__ = base
        return
    what = (
        f"adds {', '.join(sorted(set(own))[:3])} to {base.__name__}"
        if own
        else f"has a configuration of its own, unlike {base.__name__}"
    )
    raise ModelError(
        f"MODEL: the class {kind.__qualname__} (of {kind.__module__}) {what}, and a checkpoint"
        " would not hold its code, so it could not be loaded again; put it into a file of its own"
        f" and call {kind.__name__}.register_for_auto_class('AutoModelForCausalLM')"
    )
