"""The command line: verbs and flags, no logic. Nothing heavy is imported until a command runs.

Flags that are also keyword arguments and TOML keys are read off the records in `grasp.recipes`;
here are the others. What a verb shows is in `grasp.terminal.shows`, under its name.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from pathlib import Path
from typing import Any

import click

from grasp import __version__
from grasp.core.children import end_with_parent
from grasp.recipes.calibration import CalibrationRecipe, InspectionRecipe
from grasp.recipes.evaluation import EvaluationRecipe
from grasp.recipes.memory import MemoryRecipe
from grasp.recipes.method import MethodChoice
from grasp.recipes.model import ModelSource
from grasp.recipes.quantization import QuantizationRecipe
from grasp.recipes.speed import SpeedRecipe
from grasp.terminal.config import read_config
from grasp.terminal.ending import run
from grasp.terminal.flags import Flag, Grouped, Place, Words, argument, everywhere, flags, given
from grasp.terminal.method_flags import TRAINING, MethodCommand, TrainingCommand

OUTPUT = click.option(
    "-o", "--output", type=Place(), help="Write the results to this .json file, for grasp report."
)
DRY_RUN = "Print what would be done, its size, memory, time and expected perplexity; write nothing."


def _show(verb: str) -> Any:
    """What a verb shows: the function of its file; imported when it runs, since it brings torch."""
    from grasp.terminal.bars import waiting

    with waiting("loading PyTorch", quiet="--quiet" in sys.argv):
        shown = importlib.import_module(f"grasp.terminal.shows.{verb}")
        from grasp.terminal.quieting import only_our_own_words

    only_our_own_words()
    return shown.show


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="grasp")
def cli() -> None:
    """Make a Hugging Face language model smaller, and prove what it cost.

    \b
    grasp demo                             the whole job on an embedded model, in minutes
    grasp compress MODEL OUT --ratio 0.2   remove 20 % of all parameters
    grasp eval OUT --ppl pydoc             perplexity of the result
    """
    # before a verb reads its flags, which may load torch: other libraries' bars stay off, since
    # ours show the same, and torchao does not tell of every kernel that this machine cannot run
    os.environ.setdefault("TQDM_DISABLE", "1")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


@cli.command(cls=MethodCommand, short_help="Compress MODEL and save it in OUT.")
@argument(ModelSource, "model")
@click.argument("out", type=Place())
@flags(MethodChoice)
@flags(CalibrationRecipe)
@flags(ModelSource)
@flags(MemoryRecipe)
@click.option(
    "--config",
    type=Place(),
    is_eager=True,
    callback=read_config,
    expose_value=False,
    help=(
        "Recipe: a .toml file of these flags, or the grasp.json of a checkpoint. Flags given here"
        " win."
    ),
)
@click.option("--dry-run", is_flag=True, help=DRY_RUN)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on from the journal of an interrupted run with the same flags.",
)
@everywhere
def compress(
    model: str, out: Path, dry_run: bool, resume: bool, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Compress MODEL and save the result in OUT, a new or empty directory.

    MODEL: hub id, directory, .gguf file, or smollm2 (embedded). Say how much with --ratio; --method
    grasp is the paper's method.
    """
    chosen = given(options) | ({} if dry_run else {"resume": resume})
    _show("dry_run" if dry_run else "compress")(model, out, chosen, as_json, quiet)


@cli.command(cls=Grouped, short_help="Show layer redundancy and singular spectra.")
@argument(ModelSource, "model")
@flags(InspectionRecipe)
@flags(ModelSource)
@click.option(
    "-o",
    "--output",
    type=Place(),
    default=Path("grasp-inspect.png"),
    show_default=True,
    help="Picture to write.",
)
@everywhere
def inspect(model: str, output: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Layer redundancy and singular spectra of MODEL, as a table and a picture. Nothing is
    changed.
    """
    _show("inspect")(model, output, given(options), as_json, quiet)


@cli.command(
    cls=TrainingCommand, short_help="Train a compressed checkpoint DIR briefly; save it in OUT."
)
@click.argument("checkpoint", metavar="DIR", type=Place())
@click.argument("out", type=Place())
@click.option(
    "--data",
    cls=Flag,
    group=TRAINING,
    required=True,
    help=(
        "Training text: Alpaca columns or chat messages (.json, .jsonl), plain text, a named set"
        " (see `grasp data`); several, separated by commas, are mixed."
    ),
)
@click.option(
    "--preset",
    cls=Flag,
    group=TRAINING,
    help=(
        "paper (the default: the paper's hyperparameters), quick (distillation in small steps) or"
        " sequential (small adapters on the output factors; then once more with --lora-on"
        " input-factors); other flags change it."
    ),
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on from the last state of an interrupted run with the same flags.",
)
@click.option(
    "--fsdp",
    is_flag=True,
    help=(
        "Under torchrun: share the weights among the processes (FSDP2) instead of copying them"
        " (DDP)."
    ),
)
@click.option(
    "--report-to",
    type=Words(str),
    help="Trackers of the Hugging Face trainer: tensorboard, wandb, ...",
)
@flags(ModelSource, "device", "trust_remote_code")
@flags(CalibrationRecipe, "text_field", group=TRAINING)
@everywhere
def recover(checkpoint: Path, out: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Train the compressed checkpoint DIR briefly on --data and save the result in OUT (GRASP* in
    the paper).

    What is trained, towards what, and how long: the flags below. With several processes: torchrun
    --nproc-per-node N -m grasp recover ...
    """
    _show("recover")(checkpoint, out, given(options), as_json, quiet)


@cli.command(cls=Grouped, short_help="Write checkpoint DIR in the format of another runtime.")
@click.argument("checkpoint", metavar="DIR")
@click.argument("out", type=Place())
@click.option(
    "--format",
    required=True,
    metavar="dense|onnx|openvino|compressed-tensors|gguf",
    help=(
        "dense: ordinary checkpoint, low-rank matrices multiplied out, no smaller; onnx: for"
        " onnxruntime; openvino: for openvino-genai; compressed-tensors: a model rounded with"
        " --layout compressed-tensors, for servers' own kernels; gguf: for llama.cpp,"
        " few bits kept."
    ),
)
@click.option(
    "--dtype",
    help=(
        "Of the export. dense, gguf: float32, bfloat16, float16; default: as stored. Graphs:"
        " float32 (default) or float16."
    ),
)
@click.option("--weights", metavar="int8", help="openvino: store the matrices in 8 bits.")
@click.option(
    "--converter",
    metavar="FILE",
    help="gguf: llama.cpp's convert_hf_to_gguf.py. Default: the one on the PATH.",
)
@flags(ModelSource, "trust_remote_code")
@everywhere
def export(checkpoint: str, out: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Write DIR, a checkpoint that grasp made or any other MODEL, to OUT in a format that loads
    without grasp.

    onnx and openvino keep the low-rank matrices low-rank.
    """
    _show("export")(checkpoint, out, given(options), as_json, quiet)


@cli.command(cls=Grouped, short_help="Put MODEL in 8 bits or fewer; save it in OUT.")
@argument(ModelSource, "model")
@click.argument("out", type=Place())
@flags(QuantizationRecipe)
@flags(ModelSource)
@everywhere
def quantize(model: str, out: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Round the weights of MODEL, a compressed checkpoint or any other, to 8, 6, 5, 4 or 3
    bits and save the result in OUT.

    Not rounded: norms and biases; embeddings and output layer only with --embeddings. OUT loads
    like any other checkpoint.
    """
    _show("quantize")(model, out, given(options), as_json, quiet)


@cli.command(
    "eval",
    cls=Grouped,
    short_help="Measure perplexity, fidelity to the dense model, tasks and text.",
)
@argument(ModelSource, "model")
@click.option(
    "--against",
    cls=Flag,
    group=EvaluationRecipe.title,
    metavar="DENSE",
    help="The dense model: measured too, with KL divergence, top-1 agreement and shares of it.",
)
@flags(EvaluationRecipe)
@flags(ModelSource)
@OUTPUT
@everywhere
def evaluate(model: str, output: Path | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Measure MODEL: perplexity with the protocol that makes the number, tasks through lm-eval,
    greedy text; with --against DENSE, all of it beside the dense model.
    """
    _show("evaluate")(model, output, given(options), as_json, quiet)


@cli.command(cls=Grouped, short_help="Measure speed and memory, beside the dense model.")
@argument(ModelSource, "model")
@click.option(
    "--against",
    cls=Flag,
    group=SpeedRecipe.title,
    metavar="DENSE",
    help="Another model, usually the dense one: measured in turn with MODEL, round by round.",
)
@flags(SpeedRecipe)
@flags(ModelSource)
@OUTPUT
@everywhere
def bench(model: str, output: Path | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Prefill and decode speed, latencies, memory and the share of the machine's memory bandwidth
    that decoding reaches. With --against both models take turns, so that what else the machine does
    hits both alike.
    """
    _show("bench")(model, output, given(options), as_json, quiet)


@cli.command(cls=Grouped, short_help="Compare methods as an EXPERIMENT.toml says.")
@click.argument("experiment", type=Place())
@click.option(
    "-o",
    "--output",
    type=Place(),
    help="Results file; default: results/NAME.json. Finished cells in it are not run again.",
)
@click.option("--dry-run", is_flag=True, help="List the cells, and which of them are finished.")
@click.option("--cell", hidden=True)
@flags(ModelSource, "device", "trust_remote_code")
@everywhere
def compare(
    experiment: Path,
    output: Path | None,
    dry_run: bool,
    cell: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Many methods, one calibration, one accounting, one evaluation: one table. Interrupted, it
    goes on where it stopped; a failed cell is a row that says why.
    """
    if cell is not None:
        end_with_parent()
    _show("compare")(experiment, output, dry_run, cell, given(options), as_json, quiet)


@cli.command(short_help="Make one HTML page of results and checkpoints.")
@click.argument("paths", nargs=-1, required=True, type=Place(), metavar="PATH...")
@click.option(
    "-o",
    "--output",
    type=Place(),
    default=Path("report.html"),
    show_default=True,
    help="Page to write.",
)
@everywhere
def report(paths: tuple[Path, ...], output: Path, as_json: bool, quiet: bool) -> None:
    """One HTML page that opens offline: tables, plots, text side by side. PATH: a checkpoint, a
    results file, or a folder of them.
    """
    from grasp.verbs import report as reporting

    reporting.report(paths, output, as_json)


@cli.command(short_help="Say whether checkpoint DIR is what grasp wrote.")
@click.argument("checkpoint", metavar="DIR", type=Place())
@everywhere
def verify(checkpoint: Path, as_json: bool, quiet: bool) -> None:
    """Compare every file of DIR, weights too, with what grasp wrote. Exit status 0: nothing
    differs; 1: files changed, are gone or were added, each named; 2: DIR is not a checkpoint that
    grasp wrote, or one from before it kept hashes.
    """
    from grasp.verbs import verify as verification

    if not verification.show(checkpoint, as_json, quiet):
        sys.exit(1)


@cli.command(short_help="The whole job on the embedded model, in minutes.")
@click.option(
    "-o",
    "--output",
    type=Place(),
    default=Path("demo-output"),
    show_default=True,
    help="Directory for the results.",
)
@click.option("--measure", type=Place(), hidden=True)
@everywhere
def demo(output: Path, measure: Path | None, as_json: bool, quiet: bool) -> None:
    """Compress SmolLM2-135M-Instruct by the paper's method, save, reload in a new process, and
    measure it beside the dense model and the model with the same layers removed.
    """
    from grasp.core.destination import check_destination
    from grasp.terminal.bars import say

    if measure is not None:
        end_with_parent()
    else:
        check_destination(output, 2_000_000_000)
    if measure is None and not quiet:
        say("SmolLM2-135M-Instruct, compressed three ways, saved, loaded again and measured")
    _show("demo")(output, measure, as_json, quiet)


@cli.command("methods", short_help="List the compression methods.")
@flags(MethodChoice, "plugin")
@everywhere
def list_methods(plugin: Path | None, as_json: bool, quiet: bool) -> None:
    """The compression methods, their papers and flags."""
    _show("methods")(plugin, as_json)


@cli.command("families", short_help="List the supported architectures.")
@everywhere
def list_families(as_json: bool, quiet: bool) -> None:
    """The architectures in the table, and where each keeps its matrices. Others are inspected."""
    _show("families")(as_json)


@cli.command("data", short_help="List the named texts and file types.")
@everywhere
def list_data(as_json: bool, quiet: bool) -> None:
    """What --data and --ppl take."""
    _show("data")(as_json)


def main() -> None:
    """Entry point."""
    run(cli)
