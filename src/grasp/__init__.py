"""grasp: make a Hugging Face language model smaller by keeping the singular groups its loss depends
on.

    import grasp
    result = grasp.compress("smollm2", "small", ratio=0.2)
    grasp.evaluate("small", ppl="pydoc")
    model = grasp.load("small").model

Importing grasp imports neither torch nor transformers; it only arranges that transformers, once
loaded, knows grasp checkpoints.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from grasp._register import register_when_transformers_loads

if TYPE_CHECKING:
    from grasp.core.checkpoint import Checkpoint as Checkpoint
    from grasp.core.checkpoint import load as load
    from grasp.core.decoder import Decoder as Decoder
    from grasp.core.records import Calibration as Calibration
    from grasp.core.score import Score as Score
    from grasp.errors import GraspError as GraspError
    from grasp.methods.base import Method as Method
    from grasp.verbs.compress import Compression as Compression
    from grasp.verbs.compress import compress as compress
    from grasp.verbs.evaluate import Evaluation as Evaluation
    from grasp.verbs.evaluate import evaluate as evaluate
    from grasp.verbs.export import Export as Export
    from grasp.verbs.export import export as export
    from grasp.verbs.inspect import inspect as inspect
    from grasp.verbs.quantize import Quantization as Quantization
    from grasp.verbs.quantize import quantize as quantize
    from grasp.verbs.recover import Recovery as Recovery
    from grasp.verbs.recover import recover as recover
    from grasp.verbs.verify import Verification as Verification
    from grasp.verbs.verify import verify as verify

__version__ = "0.1.0"

_HOME = {
    "Calibration": "core.records",
    "Checkpoint": "core.checkpoint",
    "Compression": "verbs.compress",
    "Decoder": "core.decoder",
    "Evaluation": "verbs.evaluate",
    "Export": "verbs.export",
    "GraspError": "errors",
    "Method": "methods.base",
    "Quantization": "verbs.quantize",
    "Recovery": "verbs.recover",
    "Score": "core.score",
    "Verification": "verbs.verify",
    "compress": "verbs.compress",
    "evaluate": "verbs.evaluate",
    "export": "verbs.export",
    "inspect": "verbs.inspect",
    "load": "core.checkpoint",
    "quantize": "verbs.quantize",
    "recover": "verbs.recover",
    "verify": "verbs.verify",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'grasp' has no attribute '{name}'")
    return getattr(importlib.import_module(f"grasp.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__


register_when_transformers_loads()
