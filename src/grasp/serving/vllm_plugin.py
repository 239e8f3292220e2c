"""vLLM serves grasp checkpoints: `pip install grasp-llm` beside vLLM, then `vllm serve OUT` or
`LLM(OUT)`.

vLLM calls `register` in every process it starts (entry point `vllm.general_plugins`). A grasp
checkpoint announces itself in config.json as `"quantization_config": {"quant_method": "grasp-llm",
"ranks": {path: rank}, ...}`; vLLM then asks the class registered here how to make and run every
linear of the model, whatever its architecture. Nothing of vLLM is imported before that.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

from grasp.core.layers.modeling_grasp import NAMES


def register() -> None:
    """Tell vLLM about grasp checkpoints. Where this vLLM lacks what is needed, one of ours stops
    with a line that says so; others serve.
    """
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        register_quantization_config,
    )

    try:
        from grasp.serving.vllm_embeddings import install
        from grasp.serving.vllm_linear import LowRankConfig

        install()
        config: type = LowRankConfig
    except ImportError as lack:
        config = _refusing_config(str(lack))
    for name in NAMES:
        if name not in QUANTIZATION_METHODS:
            register_quantization_config(name)(config)


def _refusing_config(reason: str) -> type:
    """A configuration class that stops with an explanation as soon as one of our checkpoints is
    read.
    """
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    version = importlib.metadata.version("grasp-llm")

    class Refusing(QuantizationConfig):
        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Any:
            raise ValueError(
                f"grasp-llm {version} cannot serve with this vLLM ({reason}); it was tested with"
                " vLLM 0.32: upgrade either"
            )

    return Refusing
