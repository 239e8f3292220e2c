"""The command line: verbs and flags, no logic. Nothing heavy is imported until a command runs."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
import typing
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from grasp import __version__
from grasp.core.children import end_with_parent
from grasp.errors import GraspError, Interrupted, in_words
from grasp.terminal.flags import (
    MethodCommand,
    Place,
    RecipeArgument,
    RecipeCommand,
    RecipeOption,
    Words,
    read_config,
    shared,
)
from grasp.terminal.interruption import as_interrupts


def _commands() -> Any:
    """What the verbs show; imported when one runs, since it brings torch."""
    from grasp.terminal.bars import waiting

    with waiting("loading PyTorch", quiet="--quiet" in sys.argv):
        from grasp.terminal import commands

    commands.only_our_own_words()
    return commands


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
@click.argument("model", cls=RecipeArgument)
@click.argument("out", type=Place())
@click.option(
    "--method",
    cls=RecipeOption,
    default="grasp-fisher",
    show_default=True,
    help="Compression method (see `grasp methods`).",
)
@click.option(
    "--num-samples",
    cls=RecipeOption,
    type=int,
    default=64,
    show_default=True,
    help="Number of calibration blocks.",
)
@click.option(
    "--seq-len",
    cls=RecipeOption,
    type=int,
    default=512,
    show_default=True,
    help="Tokens in a block.",
)
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
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print what would be done, its size, memory, time and expected perplexity; write nothing.",
)
@shared("data", "text_field", "seed", "device", "dtype", "trust")
def compress(
    model: str, out: Path, dry_run: bool, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Compress MODEL and save the result in OUT, a new or empty directory.

    MODEL: hub id, directory, .gguf file, or smollm2 (embedded). Say how much with --ratio; --method
    grasp is the paper's method.
    """
    commands = _commands()
    given = {name: value for name, value in options.items() if value is not None}
    if dry_run:
        commands.dry_run(model, out, given, as_json, quiet)
    else:
        commands.compress(model, out, given, as_json, quiet)


@cli.command(short_help="Show layer redundancy and singular spectra.")
@click.argument("model")
@click.option(
    "-o",
    "--output",
    type=Place(),
    default=Path("grasp-inspect.png"),
    show_default=True,
    help="Picture to write.",
)
@click.option(
    "--num-samples", type=int, default=32, show_default=True, help="Number of calibration blocks."
)
@click.option("--seq-len", type=int, default=512, show_default=True, help="Tokens in a block.")
@click.option(
    "--angular", is_flag=True, help="Angular distance at the last token instead of block influence."
)
@shared("data", "text_field", "seed", "device", "dtype", "trust")
def inspect(model: str, output: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Layer redundancy and singular spectra of MODEL, as a table and a picture. Nothing is
    changed.
    """
    _commands().inspect(model, output, options, as_json, quiet)


@cli.command(
    cls=RecipeCommand, short_help="Train a compressed checkpoint DIR briefly; save it in OUT."
)
@click.argument("checkpoint", metavar="DIR", type=Place())
@click.argument("out", type=Place())
@click.option(
    "--data",
    required=True,
    help=(
        "Training text: Alpaca columns or chat messages (.json, .jsonl), plain text, a named set"
        " (see `grasp data`); several, separated by commas, are mixed."
    ),
)
@click.option(
    "--preset",
    help=(
        "paper (the default: the paper's hyperparameters) or quick (distillation in small steps);"
        " other flags change it."
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
    default="",
    help="Trackers of the Hugging Face trainer: tensorboard, wandb, ...",
)
@shared("text_field", "device", "trust")
def recover(checkpoint: Path, out: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Train the compressed checkpoint DIR briefly on --data and save the result in OUT (GRASP* in
    the paper).

    What is trained, towards what, and how long: the flags below. With several processes: torchrun
    --nproc-per-node N -m grasp recover ...
    """
    commands = _commands()
    given = {name: value for name, value in options.items() if value is not None}
    commands.recover(checkpoint, out, given, as_json, quiet)


@cli.command(short_help="Write checkpoint DIR in the format of another runtime.")
@click.argument("checkpoint", metavar="DIR")
@click.argument("out", type=Place())
@click.option(
    "--format",
    required=True,
    metavar="dense|onnx|openvino",
    help=(
        "dense: ordinary checkpoint, low-rank matrices multiplied out, no smaller; onnx: for"
        " onnxruntime; openvino: for openvino-genai."
    ),
)
@click.option(
    "--dtype",
    help=(
        "Of the export. dense: float32, bfloat16, float16; default: as stored. Others: float32"
        " (default) or float16."
    ),
)
@click.option("--weights", metavar="int8", help="openvino: store the matrices in 8 bits.")
@shared("trust")
def export(checkpoint: str, out: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Write DIR, a checkpoint that grasp made or any other MODEL, to OUT in a format that loads
    without grasp.

    onnx and openvino keep the low-rank matrices low-rank.
    """
    _commands().export(checkpoint, out, options, as_json)


@cli.command(short_help="Put MODEL in 8 or 4 bits; save it in OUT.")
@click.argument("model", metavar="DIR")
@click.argument("out", type=Place())
@click.option(
    "--bits",
    type=int,
    required=True,
    help="8 or 4, for every linear of the decoder layers, dense or low-rank. 4: not pivoted pairs.",
)
@click.option(
    "--scheme",
    default="weight-only",
    show_default=True,
    help="weight-only, or dynamic: activations in 8 bits too (--bits 8).",
)
@click.option(
    "--group-size",
    type=int,
    default=32,
    show_default=True,
    help="Numbers that share a scale (--bits 4): 32, 64, 128, 256.",
)
@shared("device", "dtype", "trust")
def quantize(model: str, out: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Round the weights of DIR, a compressed checkpoint or any other MODEL, to 8 or 4 bits
    (torchao) and save the result in OUT.

    Not rounded: embeddings, output layer, norms, biases. OUT loads like any other checkpoint.
    """
    _commands().quantize(model, out, options, as_json, quiet)


@cli.command("eval", short_help="Measure perplexity, fidelity to the dense model, tasks and text.")
@click.argument("model")
@click.option(
    "--against",
    metavar="DENSE",
    help="The dense model: measured too, with KL divergence, top-1 agreement and shares of it.",
)
@click.option(
    "--ppl",
    metavar="DATA,...",
    help=(
        "Texts, separated by commas: named sets (their test split), files, or NAME=PATH for a local"
        " copy of a named set. Default, alone: pydoc."
    ),
)
@click.option(
    "--tasks",
    metavar="TASK,...",
    help="Tasks that lm-eval knows, or commonsense (the paper's seven).",
)
@click.option(
    "--task-data", type=Place(), help="Local data for the tasks: FOLDER/<task>/<split>.jsonl[.gz]."
)
@click.option("--limit", type=int, help="Only the first so many examples of a task.")
@click.option(
    "--num-fewshot", type=int, help="Examples shown before each question; default: the task's own."
)
@click.option(
    "--batch-size", type=int, default=8, show_default=True, help="Requests of tasks run at once."
)
@click.option(
    "--generate",
    is_flag=True,
    help="Greedy continuations of fixed prompts, with how much they repeat themselves.",
)
@click.option(
    "--new-tokens", type=int, default=64, show_default=True, help="Tokens of each continuation."
)
@click.option(
    "--seq-len", type=int, help="Tokens in a block; default: 2048, or the longest the model reads."
)
@click.option("--stride", type=int, help="Step between blocks; default: --seq-len, no overlap.")
@click.option("--num-blocks", type=int, help="Only the first so many blocks; default: all.")
@click.option(
    "--rolling",
    is_flag=True,
    help="Every token of every document counts, as in lm-eval's wikitext.",
)
@click.option(
    "-o", "--output", type=Place(), help="Write the results to this .json file, for grasp report."
)
@shared("text_field", "device", "dtype", "trust")
def evaluate(model: str, output: Path | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Measure MODEL: perplexity with the protocol that makes the number, tasks through lm-eval,
    greedy text; with --against DENSE, all of it beside the dense model.
    """
    commands = _commands()
    given = {name: value for name, value in options.items() if value is not None}
    commands.evaluate(model, output, given, as_json, quiet)


@cli.command(short_help="Measure speed and memory, beside the dense model.")
@click.argument("model")
@click.option(
    "--against",
    metavar="DENSE",
    help="Another model, usually the dense one: measured in turn with MODEL, round by round.",
)
@click.option(
    "--batch-sizes",
    type=Words(int),
    default="1",
    show_default=True,
    help="Sequences at once, e.g. 1,4,16.",
)
@click.option(
    "--prompt-len", type=int, default=512, show_default=True, help="Tokens of the prompt."
)
@click.option(
    "--new-tokens", type=int, default=128, show_default=True, help="Tokens decoded after it."
)
@click.option(
    "--rounds",
    type=int,
    default=5,
    show_default=True,
    help="Measured rounds, after one of warm-up.",
)
@click.option("--compile", is_flag=True, help="Measure the models under torch.compile.")
@click.option(
    "-o", "--output", type=Place(), help="Write the results to this .json file, for grasp report."
)
@shared("device", "dtype", "trust")
def bench(model: str, output: Path | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Prefill and decode speed, latencies, memory and the share of the machine's memory bandwidth
    that decoding reaches. With --against both models take turns, so that what else the machine does
    hits both alike.
    """
    _commands().bench(model, output, options, as_json, quiet)


@cli.command(short_help="Compare methods as an EXPERIMENT.toml says.")
@click.argument("experiment", type=Place())
@click.option(
    "-o",
    "--output",
    type=Place(),
    help="Results file; default: results/NAME.json. Finished cells in it are not run again.",
)
@click.option("--dry-run", is_flag=True, help="List the cells, and which of them are finished.")
@click.option("--cell", hidden=True)
@shared("device", "trust")
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
    _commands().compare(experiment, output, dry_run, cell, options, as_json, quiet)


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
@shared()
def report(paths: tuple[Path, ...], output: Path, as_json: bool, quiet: bool) -> None:
    """One HTML page that opens offline: tables, plots, text side by side. PATH: a checkpoint, a
    results file, or a folder of them.
    """
    from grasp.verbs import report as reporting

    reporting.report(paths, output, as_json)


@cli.command(short_help="Say whether checkpoint DIR is what grasp wrote.")
@click.argument("checkpoint", metavar="DIR", type=Place())
@shared()
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
@shared()
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
    _commands()
    from grasp.verbs import demo as script

    if measure is not None:
        script.measure(measure, quiet)
    else:
        script.run(output, as_json, quiet)


@cli.command("methods", short_help="List the compression methods.")
@shared()
def list_methods(as_json: bool, quiet: bool) -> None:
    """The compression methods, their papers and flags."""
    _commands().methods(as_json)


@cli.command("families", short_help="List the supported architectures.")
@shared()
def list_families(as_json: bool, quiet: bool) -> None:
    """The architectures in the table, and where each keeps its matrices. Others work by inspection
    where they can.
    """
    _commands().families(as_json)


@cli.command("data", short_help="List the named texts and file types.")
@shared()
def list_data(as_json: bool, quiet: bool) -> None:
    """What --data and --ppl take."""
    _commands().data(as_json)


class _ToStderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to `sys.stderr` as it is now: progress bars replace it while they are drawn, so that
    lines appear above them. A warning is said once, however often a run reads the same model.
    """

    stream = property(lambda _: sys.stderr, lambda _, __: None)

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.levelno != logging.WARNING or message not in self.said:
            super().emit(record)
        self.said.add(message)


def main() -> None:
    """Entry point: runs a command; what a user can get wrong ends in one line and status 2,
    `--debug` shows the traceback.
    """
    debug = "--debug" in sys.argv
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING,
        format="%(levelname)s: %(message)s",
        handlers=[_ToStderr()],
        force=True,
    )
    with as_interrupts() as received:
        _run(debug, received)


def _run(debug: bool, received: list[int]) -> None:
    try:
        cli.main(standalone_mode=False)
    except GraspError as error:
        _fail(str(error), 2, debug)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code, debug)
    except (KeyboardInterrupt, click.Abort) as stop:
        cause = stop.__cause__ if isinstance(stop, click.Abort) else stop
        if isinstance(cause, EOFError):  # click takes it for an interrupt
            _unexpected(cause, debug)
        how = f"ended by {signal.Signals(received[0]).name}" if received else "interrupted"
        left = cause if isinstance(cause, Interrupted) else "nothing was left behind"
        _fail(f"{how}; {left}", 128 + (received[0] if received else signal.SIGINT), debug)
    except BrokenPipeError:
        sys.exit(1)
    except BaseException as error:  # a panic of a library in Rust is no Exception
        if isinstance(error, (SystemExit, GeneratorExit)):
            raise
        if received:  # a terminal that is closed cannot be written to
            sys.exit(128 + received[0])
        _unexpected(error, debug)


def _unexpected(error: BaseException, debug: bool) -> typing.NoReturn:
    """A defect of ours, or something no one has met yet."""
    said, status = in_words(error)
    _fail(f"{said}{' (--debug shows where)' if status == 1 else ''}", status, debug)


def _fail(message: str, status: int, debug: bool) -> typing.NoReturn:
    if debug:
        traceback.print_exc()
    with suppress(OSError):  # a closed terminal
        click.echo(f"grasp: error: {message}", err=True)
    sys.exit(status)
