"""Registers grasp checkpoints with transformers the moment transformers' quantizers are imported,
and not before.

`import grasp` must stay light, yet after it `AutoModelForCausalLM.from_pretrained` must know
low-rank checkpoints, whichever of the two was imported first. So a finder waits on `sys.meta_path`
for one module of transformers and steps aside.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

TRIGGER = "transformers.quantizers.auto"
"""The module whose registry a checkpoint's `quant_method` is looked up in; imported before any
model is loaded.
"""


def register_when_transformers_loads() -> None:
    """Register now if transformers' quantizers are already imported, else when they are."""
    if TRIGGER in sys.modules:
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _register() -> None:
    register = getattr(
        importlib.import_module("grasp.core.layers.modeling_grasp"), "register", None
    )
    # None while that module is itself being imported: it registers at its end
    if register is not None:
        register()


class _Waiting(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register()
