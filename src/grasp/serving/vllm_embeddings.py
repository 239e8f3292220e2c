"""Embeddings and heads in few bits, served by vLLM: dequantised while it reads the checkpoint.

vLLM asks a plug-in about linears. Most of its models do not ask about their embedding, so its
numbers are put together in the stream of weights: the model sees `PATH.weight`, dense, and splits,
pads and ties it as that of any other checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from grasp.core.layers.embedding_grasp import EMBEDDING, HEAD
from grasp.core.layers.modeling_grasp import NAMES, GraspConfig
from grasp.serving.gathering import Gathering

MARK = "dequantises_embeddings_of_grasp"


def install() -> None:
    """Have vLLM's loader give embeddings of our checkpoints dense; others it reads as before."""
    read: Any = DefaultModelLoader.get_all_weights
    if hasattr(read, MARK):
        return

    def get_all_weights(self: Any, model_config: Any, model: Any) -> Iterator[tuple[str, Tensor]]:
        found = read(self, model_config, model)
        written = getattr(model_config.hf_config, "quantization_config", None)
        if not isinstance(written, dict) or written.get("quant_method") not in NAMES:
            return found
        text = model_config.hf_config.get_text_config(decoder=True)
        width = getattr(text, "word_embed_proj_dim", None) or text.hidden_size
        return dense(found, written, width)

    vars(get_all_weights)[MARK] = True
    loader: Any = DefaultModelLoader
    loader.get_all_weights = get_all_weights


def dense(
    weights: Iterable[tuple[str, Tensor]], written: Mapping[str, Any], width: int
) -> Iterator[tuple[str, Tensor]]:
    """The weights of a checkpoint whose `quantization_config` is `written`, with embedding and
    head, (tokens, `width`), dense. Raises `ValueError` for stored numbers that do not fit it.
    """
    told = {key: value for key, value in written.items() if key != "quant_method"}
    records = {
        path: record
        for path, record in GraspConfig(**told).structure.items()
        if record["kind"] == "quantized" and record.get("part") in (EMBEDDING, HEAD)
    }
    waiting: dict[str, Gathering] = {}
    for name, tensor in weights:
        path, _, last = name.rpartition(".")
        if path not in records or last == "bias":
            yield name, tensor
            continue
        if path not in waiting:
            how = (records[path]["scheme"], records[path]["group_size"])
            waiting[path] = Gathering(path, "weight", (len(tensor), width), *how)
        whole = waiting[path].take(last, tensor)
        if whole is not None:
            yield f"{path}.weight", whole.dequantized()
