"""A large model in the shape that a small one was compressed to, to time that shape where weights
bound the speed. Its own statistics would cost hours, and of random weights say nothing.

    python benchmarks/random_llama.py dense
    grasp compress smollm2 like --ratio 0.186 --rounds 1 --data wiki.valid.raw --dtype bfloat16
    python benchmarks/shaped.py like dense shaped
    grasp bench shaped --against dense --dtype bfloat16

Every MLP keeps the share of its channels, and every matrix the share of its rank, that the layer
at the same depth of LIKE has. smollm2 is one fifth embeddings, the random Llama one tenth, and more
of its matrices are MLPs: a ratio of 0.186 there removes 21 % here, and with --shape dense one of
0.156.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from grasp.core.decoder import Decoder
from grasp.core.edits import Factorize, Narrow
from grasp.core.edits.cuts import CHANNELS, sizes_of
from grasp.core.layers.low_rank_grasp import LowRankLinear
from grasp.core.models import load_model


def shape(like: Decoder, decoder: Decoder) -> None:
    """Narrow and factorise `decoder` as `like` is; the numbers of pairs are noise."""
    wide = like.config.intermediate_size
    paths = {role: path for roles, path in like.family.matrices for role in roles.split("+")}
    for layer in range(decoder.num_layers):
        there = (2 * layer + 1) * like.num_layers // (2 * decoder.num_layers)
        share = sizes_of(like, there).channels / wide
        if share < 1:
            count = round(share * decoder.config.intermediate_size / 32) * 32
            Narrow(layer, CHANNELS, torch.arange(count)).apply(decoder)
        for path in dict.fromkeys(paths.values()):
            pair = like.layer(there).module.get_submodule(path)
            if isinstance(pair, LowRankLinear):
                linear = decoder.layer(layer).linears[path]
                out, into = linear.shape
                rank = round(pair.rank / min(pair.out_features, pair.in_features) * min(out, into))
                factors = (
                    torch.randn(rank, into) / 50,
                    torch.randn(out - rank, rank) / rank**0.5,
                    torch.randperm(out).int(),
                )
                Factorize(linear.path, *factors).apply(decoder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "like", help="a compressed checkpoint of smollm2, with pivoted pairs or none"
    )
    parser.add_argument("dense", help="the model to shape")
    parser.add_argument("out", type=Path)
    asked = parser.parse_args()
    torch.manual_seed(0)
    like, decoder = load_model(asked.like), load_model(asked.dense)
    before = decoder.num_parameters()
    shape(like, decoder)
    decoder.model.save_pretrained(asked.out)
    decoder.tokenizer.save_pretrained(asked.out)  # type: ignore[union-attr]
    print(f"{before:,} -> {decoder.num_parameters():,} parameters", flush=True)


if __name__ == "__main__":
    main()
