"""What `grasp recover --train factors` costs over bare PyTorch: tokens a second and peak memory.

    python benchmarks/recovery_cost.py CHECKPOINT [--steps 4] [--rounds 3] [--batch 4] [--length
    256] [--precision float32] [-o results/recovery_cost.json]

CHECKPOINT: smollm2 with nine low-rank layers, for instance. Objective lm.

Speed: in one process, our trainer and a bare loop (forward, cross-entropy of the asked tokens,
backward, clip, AdamW) take turns on the same rows; the ratio is taken between neighbours. Memory:
peak resident set of fresh processes, of which one runs one forward and backward pass of the same
batch with the same parameters marked, without an optimizer, and the other whole steps of the
trainer.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from grasp.compensation.objectives import LanguageModel
from grasp.compensation.recipe import Recipe
from grasp.compensation.trainable import choose
from grasp.compensation.trainer import Compensation
from grasp.compensation.training import arguments
from grasp.core.models import load_model
from grasp.core.provenance import machine, versions
from grasp.data.rows import Collate, Row, Rows, TrainingData


def rows(count: int, length: int, vocab: int) -> Rows:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (count, length), generator=draw).tolist()
    return Rows([Row(one, list(range(length)), [False] + [True] * (length - 1)) for one in ids])


def prepared(a: argparse.Namespace):
    decoder = load_model(a.checkpoint, device="cpu", dtype=a.precision)
    recipe = Recipe(
        batch_size=a.batch,
        micro_batch=a.batch,
        max_steps=a.steps,
        held_out=1,
        eval_every=10**6,
        warmup_steps=0,
    )
    return (
        decoder,
        recipe,
        choose(decoder, recipe, 0),
        rows(a.steps * a.batch, a.length, decoder.config.vocab_size),
    )


def trainer_of(a: argparse.Namespace, folder: str) -> Compensation:
    decoder, recipe, model, data = prepared(a)
    args = arguments(
        recipe, Path(folder), a.steps, device=torch.device("cpu"), fsdp=None, report_to=()
    )
    args.eval_strategy = args.save_strategy = "no"
    args.eval_on_start = False
    told = TrainingData(data, rows(1, a.length, decoder.config.vocab_size), True, {})
    dtype = getattr(torch, a.precision)
    return Compensation(
        model, args, told, LanguageModel(), Collate(True), dtype=dtype, progress=lambda *_: None
    )


def bare(a: argparse.Namespace, model, data: Rows, optimizer) -> None:
    """The loop anyone would write."""
    model.train()
    dtype = getattr(torch, a.precision)
    for first in range(0, len(data), a.batch):
        ids = torch.tensor([data.rows[index].ids for index in range(first, first + a.batch)])
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()


def speed(a: argparse.Namespace) -> list[float]:
    """Seconds of the bare loop over seconds of the trainer, round by round (above 1: the trainer is
    faster).
    """
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(a, folder)
        model, data = trainer.model, trainer.train_dataset
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
        bare(a, model, data, optimizer)  # warm-up
        for _ in range(a.rounds):
            start = time.perf_counter()
            bare(a, model, data, optimizer)
            middle = time.perf_counter()
            trainer.train()
            ratios.append((middle - start) / (time.perf_counter() - middle))
            print(
                f"bare {middle - start:.2f} s, trainer {(middle - start) / ratios[-1]:.2f} s:"
                f" {ratios[-1]:.3f}",
                flush=True,
            )
    return ratios


def peak(a: argparse.Namespace, what: str) -> int:
    words = [
        sys.executable,
        __file__,
        a.checkpoint,
        "--measure",
        what,
        "--steps",
        "2",
        "--batch",
        str(a.batch),
        "--length",
        str(a.length),
        "--precision",
        a.precision,
    ]
    return int(
        subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )


def measure(a: argparse.Namespace) -> None:
    if a.measure == "trainer":
        with tempfile.TemporaryDirectory() as folder:
            trainer_of(a, folder).train()
    else:
        _, _, model, data = prepared(a)
        ids = torch.tensor([row.ids for row in data.rows[: a.batch]])
        with torch.autocast("cpu", getattr(torch, a.precision), enabled=a.precision != "float32"):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    for name, value in (("steps", 4), ("rounds", 3), ("batch", 4), ("length", 256)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--measure", choices=("trainer", "bare"), help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path, default=Path("results/recovery_cost.json"))
    a = parser.parse_args()
    if a.measure:
        measure(a)
        return
    memory = {what: peak(a, what) for what in ("bare", "trainer")}
    print(
        f"peak memory: one forward and backward {memory['bare'] / 1e6:,.0f} MB, trainer"
        f" {memory['trainer'] / 1e6:,.0f} MB: {memory['trainer'] / memory['bare']:.3f}"
    )
    ratios = speed(a)
    found = {
        "command": f"python benchmarks/recovery_cost.py CHECKPOINT --precision {a.precision}",
        "batch": a.batch,
        "length": a.length,
        "precision": a.precision,
        "tokens_per_second_over_bare_loop": {"median": statistics.median(ratios), "rounds": ratios},
        "peak_memory_over_forward_and_backward": memory["trainer"] / memory["bare"],
        "peak_bytes": memory,
        "versions": versions(),
        "machine": machine(),
    }
    known = json.loads(a.output.read_text()) if a.output.is_file() else {}
    a.output.write_text(json.dumps({**known, a.precision: found}, indent=1) + "\n")
    print(f"tokens a second over the bare loop's: {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
