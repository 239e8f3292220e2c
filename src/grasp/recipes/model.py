"""Which model, and how it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from grasp.core.fields import REQUIRED, NamedPath, flag
from grasp.recipes.part import Part


@dataclass(frozen=True, kw_only=True)
class ModelSource(Part):
    """Arguments of `grasp.core.models.open_model`, under the same names. In Python `model` may be a
    loaded one, which is then changed in place.
    """

    title: ClassVar[str] = "Model"

    model: NamedPath = flag(
        REQUIRED,
        "Hub id, directory, .gguf file, or smollm2 (embedded).",
    )
    tokenizer: Any = flag(None, "Of a loaded model that brings none.", python=True)
    device: str | None = flag(
        None, "cpu, cuda, cuda:1, mps; default: cuda if there is one.", recipe=False
    )
    dtype: str | None = flag(None, "float32, bfloat16 or float16; default: as stored.")
    trust_remote_code: bool = flag(
        False, "Run Python code that the model repository brings.", recipe=False
    )
