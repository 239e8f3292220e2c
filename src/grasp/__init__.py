"""grasp: make a Hugging Face language model smaller by keeping the singular groups its loss depends on.

    import grasp
    result = grasp.compress("smollm2", "small", ratio=0.2)
    grasp.evaluate("small", ppl="pydoc")
    model = grasp.load("small").model

Importing grasp imports neither torch nor transformers; it only arranges that transformers, once loaded, knows grasp checkpoints.
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
    from grasp.inspection import inspect as inspect
    from grasp.measurement import Evaluation as Evaluation
    from grasp.measurement import evaluate as evaluate
    from grasp.methods.base import Method as Method
    from grasp.pipeline import Compression as Compression
    from grasp.pipeline import compress as compress
    from grasp.quantization import Quantization as Quantization
    from grasp.quantization import quantize as quantize
    from grasp.recovery import Recovery as Recovery
    from grasp.recovery import recover as recover
    from grasp.serving.export import Export as Export
    from grasp.serving.export import export as export
    from grasp.verification import Verification as Verification
    from grasp.verification import verify as verify

__version__ = "0.1.0"

_HOME = {
    "Calibration": "core.records",
    "Checkpoint": "core.checkpoint",
    "Compression": "pipeline",
    "Decoder": "core.decoder",
    "Evaluation": "measurement",
    "Export": "serving.export",
    "GraspError": "errors",
    "Method": "methods.base",
    "Quantization": "quantization",
    "Recovery": "recovery",
    "Score": "core.score",
    "Verification": "verification",
    "compress": "pipeline",
    "evaluate": "measurement",
    "export": "serving.export",
    "inspect": "inspection",
    "load": "core.checkpoint",
    "quantize": "quantization",
    "recover": "recovery",
    "verify": "verification",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'grasp' has no attribute '{name}'")
    return getattr(importlib.import_module(f"grasp.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__


register_when_transformers_loads()
