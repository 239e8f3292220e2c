"""ONNX: one graph with a key-value cache, for onnxruntime and what is built on it. The low-rank
products stay products of thin matrices.

The graph comes from transformers' own exporter. Inputs and outputs bear the names that optimum,
onnxruntime-genai and transformers.js use: `input_ids`, `attention_mask`, `position_ids` (where the
model has them) and `past_key_values.N.key/value` in, `logits` and `present.N.key/value` out.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.exporters import OnnxConfig, OnnxExporter

from grasp.core.decoder import Decoder
from grasp.core.proof import can_try, question
from grasp.serving.tracing import compare_graph, exporting, notes, prefill, sample_inputs

__all__ = ["how_to_run", "notes", "prove", "write"]

FILE = "model.onnx"
CACHE = re.compile(r"(input|output)\.past_key_values\.layers\.(\d+)\.(key|value)s")


def write(decoder: Decoder, folder: Path, _kind: str) -> None:
    """Write `model.onnx` and its weights `model.onnx.data` to `folder`, in the model's dtype."""
    with exporting(decoder, "ONNX"):
        inputs, free = sample_inputs(decoder)
        config = OnnxConfig(dynamic_shapes=free, prefer_deferred_runtime_asserts_over_guards=True)
        exported = OnnxExporter().export(decoder.model, inputs, config)
        rename(exported.program.graph)
        OnnxExporter.save_program(exported.program, folder / FILE)


def prove(decoder: Decoder, said: Tensor, folder: Path, out: Path, kind: str) -> None:
    """Raise `CheckpointError` where the graph, run where onnxruntime is installed, is not the
    model.
    """
    if can_try("onnx", "onnxruntime"):
        compare_graph(said, answer(folder, question(decoder)), kind, out)


def answer(folder: Path, ids: Tensor) -> Tensor:
    """The logits (rows, tokens, vocabulary) that onnxruntime computes for `ids`."""
    onnxruntime: Any = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        str(folder / FILE), options, providers=["CPUExecutionProvider"]
    )
    kinds, feed = {"tensor(float16)": np.float16, "tensor(float)": np.float32}, prefill(ids)
    for port in session.get_inputs():
        if port.name.startswith("past_key_values."):
            feed[port.name] = np.zeros(
                (len(ids), port.shape[1], 0, port.shape[3]), kinds[port.type]
            )
    known = {port.name for port in session.get_inputs()}
    [logits] = session.run(
        ["logits"], {name: value for name, value in feed.items() if name in known}
    )
    return torch.from_numpy(logits).float()


def rename(graph: Any) -> None:
    """Give the cache's ports their usual names."""
    for port in (*graph.inputs, *graph.outputs):
        found = CACHE.fullmatch(port.name)
        if found is not None:
            way, layer, kind = found.groups()
            port.name = f"{'past_key_values' if way == 'input' else 'present'}.{layer}.{kind}"


def how_to_run(_kind: str) -> str:
    """For the README beside the model: `str.format` with `out`."""
    return """
```python
import numpy as np
import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{out}")
session = onnxruntime.InferenceSession("{out}/model.onnx", providers=["CPUExecutionProvider"])
ids = tokenizer("The capital of France is", return_tensors="np").input_ids.astype(np.int64)
taken = {{port.name: port for port in session.get_inputs()}}
kind = np.float16 if "float16" in taken["past_key_values.0.key"].type else np.float32
past = {{n: np.zeros((1, p.shape[1], 0, p.shape[3]), kind) \
for n, p in taken.items() if n.startswith("past_")}}
new, position = ids, 0
for _ in range(16):
    feed = {{"input_ids": new, "attention_mask": np.ones_like(ids), \
"position_ids": np.arange(position, ids.shape[1])[None], **past}}
    logits, *present = session.run(None, \
{{name: value for name, value in feed.items() if name in taken}})
    past, position = dict(zip(past, present, strict=True)), ids.shape[1]
    new = logits[:, -1:].argmax(-1)
    ids = np.concatenate((ids, new), 1)
print(tokenizer.decode(ids[0]))
```

`pip install onnxruntime transformers`. The first call reads the whole prompt with an empty cache, \
the later ones one token each.
"""
