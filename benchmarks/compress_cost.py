"""What a compression costs over the least it could: wall time and peak memory against a bare floor,
in one run.

    python benchmarks/compress_cost.py [--blocks 8] [--rounds 3] [--model smollm2] [--dtype float32]
    [-o results/compress_cost.json]

The floor is what one-shot GRASP cannot do without, written in plain PyTorch: one forward pass of
the calibration blocks (block influence), one forward and backward pass with gradients of the chosen
layers' matrices, and one SVD with its scores for each of them. The method is `grasp.compress` on a
model in memory, without loading and saving. Both run in fresh child processes, in turn (A B A B
...), so that noise of the machine hits both; compare the ratio, not the seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

LAYERS, RETAIN_RATIO, SEQ_LEN = 9, 0.1, 512


def peak() -> int:
    """Largest resident set of this process so far, in bytes."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


def floor(decoder, blocks) -> None:
    """The bare arithmetic, with hooks that keep one number a layer."""
    import torch
    from torch.nn.functional import cosine_similarity, cross_entropy

    model = decoder.model
    cosines = [0.0] * decoder.num_layers

    def hook(index):
        def look(_module, args, output):
            cosines[index] += float(cosine_similarity(args[0], output, dim=-1).mean())

        return look

    model.requires_grad_(False)
    handles = [
        layer.register_forward_hook(hook(index)) for index, layer in enumerate(decoder.stack)
    ]
    with torch.no_grad():
        for block in blocks:
            model.base_model(input_ids=block[None], use_cache=False)
    for handle in handles:
        handle.remove()
    chosen = sorted(range(len(cosines)), key=lambda i: -cosines[i])[:LAYERS]
    linears = [linear for index in chosen for linear in decoder.linears(index)]
    for linear in linears:
        linear.parameter.requires_grad_(True)
    for block in blocks:
        logits = model(input_ids=block[None], use_cache=False).logits[0, :-1]
        cross_entropy(logits, block[1:], reduction="sum").backward()
    for linear in linears:
        u, s, vh = torch.linalg.svd(linear.weight, full_matrices=False)
        score = (s * ((u.T @ linear.parameter.grad) * vh).sum(1)).abs()
        m, n = linear.shape
        kept = score.topk(int(m * n * RETAIN_RATIO / (m + n))).indices
        (vh[kept], u[:, kept] * s[kept])
        linear.parameter.grad = None


def child(kind: str, model: str, dtype: str, num_blocks: int) -> None:
    import torch

    import grasp
    from grasp.core.models import load_model
    from grasp.data.calibration import calibrate

    decoder = load_model(model, dtype=dtype)
    calibration = calibrate(decoder, "pydoc", num_samples=num_blocks, seq_len=SEQ_LEN)
    torch.linalg.svd(torch.randn(64, 64))  # loads the library
    import grasp.verbs.compress

    loaded = peak()
    begin = time.perf_counter()
    if kind == "floor":
        floor(decoder, calibration.ids)
    else:
        grasp.compress(
            decoder, method="grasp", num_layers=LAYERS, retain_ratio=RETAIN_RATIO, data=calibration
        )
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - begin,
                "peak": peak(),
                "loaded": loaded,
                "threads": torch.get_num_threads(),
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.model, arguments.dtype, arguments.blocks)
        return
    runs: dict[str, list[dict]] = {"floor": [], "grasp": []}
    for number in range(arguments.rounds):
        for kind, found in runs.items():
            command = [
                sys.executable,
                __file__,
                "--child",
                kind,
                "--model",
                arguments.model,
                "--dtype",
                arguments.dtype,
                "--blocks",
                str(arguments.blocks),
            ]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(
                f"round {number + 1}  {kind:6s} {found[-1]['seconds']:7.1f} s   peak"
                f" {found[-1]['peak'] / 1e6:7.0f} MB",
                flush=True,
            )
    times = [g["seconds"] / f["seconds"] for f, g in zip(runs["floor"], runs["grasp"], strict=True)]
    peaks = [g["peak"] / f["peak"] for f, g in zip(runs["floor"], runs["grasp"], strict=True)]
    result = {
        "time_ratio": {"median": statistics.median(times), "all": times},
        "peak_ratio": {"median": statistics.median(peaks), "all": peaks},
        "runs": runs,
        "setting": {
            "model": arguments.model,
            "dtype": arguments.dtype,
            "blocks": arguments.blocks,
            "seq_len": SEQ_LEN,
            "layers": LAYERS,
        },
    }
    print(
        f"time over floor  median {statistics.median(times):.3f}  (min {min(times):.3f}, max"
        f" {max(times):.3f});  to reach: 1.25"
    )
    print(
        f"peak over floor  median {statistics.median(peaks):.3f}  (min {min(peaks):.3f}, max"
        f" {max(peaks):.3f});  to reach: 1.15"
    )
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
