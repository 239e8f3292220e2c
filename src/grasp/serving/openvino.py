"""OpenVINO: a model that keeps its own key-value cache, with its tokenizer, for openvino-genai. The
low-rank products stay low-rank.

The graph comes from transformers' own exporter, the tokenizer from openvino-tokenizers;
`weights="int8"` is nncf's weight-only compression (8 bits a number, a scale a row, embeddings too).
Inputs: `input_ids`, `attention_mask`, `position_ids` (where the model has them), `beam_idx`;
output: `logits`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino
import openvino_tokenizers
import torch
from torch import Tensor
from transformers.exporters import (
    NNCFOpenVINOQuantizer,
    NNCFWeightCompressionConfig,
    OpenVINOConfig,
    OpenVINOExporter,
)

from grasp.core.decoder import Decoder
from grasp.core.proof import question
from grasp.serving.tracing import compare_graph, exporting, notes, prefill, sample_inputs

__all__ = ["how_to_run", "notes", "prove", "write"]

FILE = "openvino_model.xml"


def write(decoder: Decoder, folder: Path, kind: str) -> None:
    """Write `openvino_model.xml` and `.bin`, and the tokenizer and detokenizer as OpenVINO models,
    to `folder`.

    A float32 model is traced; `kind` "float16" or "int8" is how its matrices are stored.
    """
    quantizer = NNCFOpenVINOQuantizer(NNCFWeightCompressionConfig()) if kind == "int8" else None
    with exporting(decoder, "OpenVINO"):
        inputs, free = sample_inputs(decoder)
        config = OpenVINOConfig(
            dynamic_shapes=free,
            prefer_deferred_runtime_asserts_over_guards=True,
            quantizer=quantizer,
            compress_to_fp16=kind == "float16",
        )
        exported = OpenVINOExporter().export(decoder.model, inputs, config)
        OpenVINOExporter.save_program(exported.program, folder / FILE)
        if decoder.tokenizer is not None:
            models = openvino_tokenizers.convert_tokenizer(decoder.tokenizer, with_detokenizer=True)
            for name, model in zip(("tokenizer", "detokenizer"), models, strict=True):
                openvino.save_model(model, folder / f"openvino_{name}.xml")


def prove(decoder: Decoder, said: Tensor, folder: Path, out: Path, kind: str) -> None:
    """Raise `CheckpointError` where the graph, run by OpenVINO, is not the model."""
    compare_graph(said, answer(folder, question(decoder)), kind, out)


def answer(folder: Path, ids: Tensor) -> Tensor:
    """The logits (rows, tokens, vocabulary) that OpenVINO computes for `ids`, in float32: where a
    processor can, it takes bfloat16.
    """
    compiled = openvino.Core().compile_model(
        folder / FILE, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    feed = {**prefill(ids), "beam_idx": np.arange(len(ids), dtype=np.int32)}
    known = {name for port in compiled.inputs for name in port.names}
    found = compiled.create_infer_request().infer(
        {name: value for name, value in feed.items() if name in known}
    )
    return torch.tensor(found["logits"]).float()


def how_to_run(kind: str) -> str:
    """For the README beside the model: `str.format` with `out`."""
    option = ', DYNAMIC_QUANTIZATION_GROUP_SIZE="0"' if kind == "int8" else ""
    why = (
        "By that option only the weights are rounded, not the activations as well.\n\n"
        if option
        else ""
    )
    return f"""
```python
import openvino_genai

pipeline = openvino_genai.LLMPipeline("{{out}}", "CPU"{option})
print(pipeline.generate("The capital of France is", max_new_tokens=16, apply_chat_template=False))
```

{why}`pip install openvino-genai`.
"""
