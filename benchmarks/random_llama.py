"""A Llama of 1.07 billion random parameters (the shape of Llama 3.2 1B, smollm2's tokenizer), to
measure speed where weights bound it.

    python benchmarks/random_llama.py dense [--layers 16] grasp compress dense removed --method
    shortgpt --layers 8,9,10,11 --num-samples 1 --seq-len 64 --dtype bfloat16 grasp compress dense
    grasp --method grasp --layers 8,9,10,11 --num-samples 1 --seq-len 64 --dtype bfloat16
    VLLM_CPU_NUM_OF_RESERVED_CPU=1 python benchmarks/serving.py dense=dense removed=removed
    grasp=grasp --of 'random 1.07 B' --dtype bfloat16 \\
        --eager --batch-sizes 1

    python benchmarks/random_llama.py large --layers 48         3.02 billion parameters, 6.04 GB
    python benchmarks/random_llama.py small --layers 4 --width 768

What it says is noise; a decode step reads the same bytes as a trained model's. One layer is made
and written at a time, a file for each, so that it needs no more memory than that.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from grasp.core.models import embedded_model


def parts(model: nn.Module, layers: int) -> Iterator[dict[str, Tensor]]:
    """The weights that Llama begins a training with: of all that is outside layers, then of one
    layer after the other.
    """
    shapes = {name: one.shape for name, one in model.named_parameters()}
    for prefix in ("", *(f"model.layers.{index}." for index in range(layers))):
        names = [
            name for name in shapes if name.startswith(prefix or ("model.embed", "model.norm"))
        ]
        yield {name: numbers(shapes[name]) for name in names}


def numbers(shape: torch.Size) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)


def config_of(layers: int, width: int, vocabulary: int) -> LlamaConfig:
    """The shape, four times as wide inside its MLPs."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 256,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048, help="a multiple of 256")
    asked = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    config = config_of(asked.layers, asked.width, len(tokenizer))
    torch.manual_seed(0)
    asked.out.mkdir(parents=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    places: dict[str, str] = {}
    for number, weights in enumerate(parts(model, asked.layers), 1):
        file = f"model-{number:05d}-of-{asked.layers + 1:05d}.safetensors"
        save_file(weights, asked.out / file, metadata={"format": "pt"})
        places |= dict.fromkeys(weights, file)
    index = {"metadata": {"total_size": 2 * model.num_parameters()}, "weight_map": places}
    (asked.out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    config.save_pretrained(asked.out)
    tokenizer.save_pretrained(asked.out)


if __name__ == "__main__":
    main()
