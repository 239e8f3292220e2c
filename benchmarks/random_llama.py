"""A Llama of 1.07 billion random parameters (the shape of Llama 3.2 1B, smollm2's tokenizer), to
measure speed where weights bound it.

    python benchmarks/random_llama.py dense [--layers 16] grasp compress dense removed --method
    shortgpt --layers 8,9,10,11 --num-samples 1 --seq-len 64 --dtype bfloat16 grasp compress dense
    grasp --method grasp --layers 8,9,10,11 --num-samples 1 --seq-len 64 --dtype bfloat16
    VLLM_CPU_NUM_OF_RESERVED_CPU=1 python benchmarks/serving.py dense=dense removed=removed
    grasp=grasp --of 'random 1.07 B' --dtype bfloat16 \\
        --eager --batch-sizes 1

What it says is noise; a decode step reads the same bytes as a trained model's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from grasp.core.models import embedded_model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    asked = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=asked.layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(asked.out)
    tokenizer.save_pretrained(asked.out)


if __name__ == "__main__":
    main()
