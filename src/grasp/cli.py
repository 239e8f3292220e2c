"""The command line: verbs and flags, no logic. Nothing heavy is imported until a command runs."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import traceback
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from grasp import __version__
from grasp.errors import GraspError, RecipeError, did_you_mean


def _commands() -> Any:
    """What the verbs show; imported when one runs, since it brings torch. Other libraries' bars stay off: ours show the same."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    from grasp import commands

    commands.only_our_own_words()
    return commands


class Words(click.ParamType):  # type: ignore[type-arg]
    """A comma-separated list, also accepted as a TOML or JSON list."""

    def __init__(self, of: type):
        self.of, self.name = of, f"{of.__name__},..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Any, ...]:
        parts = value if isinstance(value, (list, tuple)) else [word.strip() for word in str(value).split(",") if word.strip()]
        try:
            return tuple(self.of(part) for part in parts)
        except ValueError:
            self.fail(f"'{value}' is not a list of {self.of.__name__}; write it like 21,22,25")


class MethodCommand(click.Command):
    """`grasp compress`: its own flags, then one flag for each field of every method, read off the methods when it runs."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        own = super().get_params(ctx)
        taken = {param.name for param in own}
        return [*own, *(option for option in _method_options() if option.name not in taken)]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Two lists: the flags of the methods, then those of the command."""
        method_flags = {option.name for option in _method_options()}
        lists: dict[str, list[tuple[str, str]]] = {"Method flags (each names the methods it belongs to)": [], "Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                lists["Options" if param.name not in method_flags else next(iter(lists))].append(record)
        for title, records in lists.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _method_options() -> list[click.Option]:
    from grasp.methods import available

    helps: dict[str, dict[str, list[str]]] = {}
    kinds: dict[str, Any] = {}
    for name, method in available().items():
        hints = typing.get_type_hints(method)
        for field in dataclasses.fields(method):
            helps.setdefault(field.name, {}).setdefault(field.metadata["help"], []).append(name)
            kind = kinds.setdefault(field.name, hints[field.name])
            if kind != hints[field.name] and "tuple" in str(kind):
                kinds[field.name] = tuple[str, ...]  # the method chosen says what the words may be
    options = []
    for name, kind in kinds.items():
        text = " ".join(f"[{', '.join(owners)}] {text}" for text, owners in helps[name].items())
        flag = f"--{name.replace('_', '-')}"
        if kind is bool:
            options.append(click.Option([flag], is_flag=True, default=None, help=text))
        else:
            options.append(click.Option([flag], type=_click_type(kind), default=None, help=text))
    return options


def _click_type(kind: Any) -> Any:
    plain = next((k for k in typing.get_args(kind) if k is not type(None)), kind) if type(None) in typing.get_args(kind) else kind
    if typing.get_origin(plain) is tuple:
        return Words(typing.get_args(plain)[0])
    return plain


def _read_config(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """`--config`: values of a recipe become defaults; flags given on the command line win."""
    if path is None:
        return None
    try:
        if path.suffix == ".json":
            values = json.loads(path.read_text(encoding="utf-8"))
            values = values.get("recipe", values) if isinstance(values, dict) else values
        else:
            if sys.version_info >= (3, 11):
                import tomllib
            else:
                import tomli as tomllib
            values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as failure:
        raise RecipeError(f"--config {path}: cannot be read: {failure}; give a .toml recipe or a grasp.json") from None
    if not isinstance(values, dict):
        raise RecipeError(f"--config {path}: holds no table of flags; give a .toml recipe or a grasp.json")
    known = {p.opts[0].lstrip("-").replace("-", "_"): p.name or "" for p in ctx.command.get_params(ctx) if p.name not in ("config", "help")}
    ctx.default_map = {}
    for key, value in values.items():
        flag = key.replace("-", "_")
        if flag not in known:
            raise RecipeError(f"--config {path}: '{key}' is no flag of grasp {ctx.info_name}{did_you_mean(flag, known)}")
        ctx.default_map[known[flag]] = value
    return path


_OPTIONS: dict[str, Callable[..., Any]] = {
    "data": click.option("--data", default="pydoc", show_default=True, help="Calibration text: a named set (see `grasp data`), a file, self or pydoc; several, separated by commas, are mixed."),
    "text_field": click.option("--text-field", help="Column of the text in .jsonl, .json, .csv or .parquet files."),
    "seed": click.option("--seed", type=int, default=0, show_default=True, help="Draws the calibration blocks."),
    "device": click.option("--device", help="cpu, cuda, cuda:1, mps; default: cuda if there is one."),
    "dtype": click.option("--dtype", help="float32, bfloat16 or float16; default: as stored."),
    "trust": click.option("--trust-remote-code", is_flag=True, help="Run Python code that the model repository brings."),
    "json": click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line of stdout."),
    "quiet": click.option("--quiet", is_flag=True, help="No progress bars."),
    "debug": click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error."),
}  # fmt: skip


def shared(*names: str) -> Callable[[Any], Any]:
    """Add options that several commands share, by name, in this order."""

    def decorate(function: Any) -> Any:
        for name in reversed((*names, "json", "quiet", "debug")):
            function = _OPTIONS[name](function)
        return function

    return decorate


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="grasp")
def cli() -> None:
    """Make a Hugging Face language model smaller, and prove what it cost.

    \b
    grasp demo                             the whole job on an embedded model, in minutes
    grasp compress MODEL OUT --ratio 0.2   remove 20 % of all parameters
    grasp eval OUT --ppl pydoc             perplexity of the result
    """


@cli.command(cls=MethodCommand, short_help="Compress MODEL and save it in OUT.")
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--method", default="grasp-fisher", show_default=True, help="Compression method (see `grasp methods`).")
@click.option("--num-samples", type=int, default=64, show_default=True, help="Number of calibration blocks.")
@click.option("--seq-len", type=int, default=512, show_default=True, help="Tokens in a block.")
@click.option(
    "--config", type=click.Path(path_type=Path), is_eager=True, callback=_read_config, expose_value=False,
    help="Recipe: a .toml file of these flags, or the grasp.json of a checkpoint. Flags given here win.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print what would be done, its size, memory, time and expected perplexity; write nothing.")
@shared("data", "text_field", "seed", "device", "dtype", "trust")
def compress(model: str, out: Path, dry_run: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    """Compress MODEL and save the result in OUT, a new or empty directory.

    MODEL: hub id, directory, .gguf file, or smollm2 (embedded). Say how much with --ratio; --method grasp is the paper's method.
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
    type=click.Path(path_type=Path),
    default=Path("grasp-inspect.png"),
    show_default=True,
    help="Picture to write.",
)
@click.option("--num-samples", type=int, default=32, show_default=True, help="Number of calibration blocks.")
@click.option("--seq-len", type=int, default=512, show_default=True, help="Tokens in a block.")
@click.option("--angular", is_flag=True, help="Angular distance at the last token instead of block influence.")
@shared("data", "text_field", "seed", "device", "dtype", "trust")
def inspect(model: str, output: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Layer redundancy and singular spectra of MODEL, as a table and a picture. Nothing is changed."""
    commands = _commands()
    commands.inspect(model, output, options, as_json, quiet)


@cli.command("eval", short_help="Measure perplexity.")
@click.argument("model")
@click.option(
    "--ppl",
    default="pydoc",
    show_default=True,
    help="Texts to measure on, separated by commas: named sets (their test split) or files.",
)
@click.option("--seq-len", type=int, help="Tokens in a block; default: 2048, or the longest the model reads.")
@click.option("--stride", type=int, help="Step between blocks; default: --seq-len, no overlap.")
@click.option("--num-blocks", type=int, help="Only the first so many blocks; default: all.")
@shared("text_field", "device", "dtype", "trust")
def evaluate(model: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Token perplexity of MODEL, with the protocol that makes the number. A block without a finite loss is an error."""
    commands = _commands()
    commands.evaluate(model, options, as_json, quiet)


@cli.command(short_help="The whole job on the embedded model, in minutes.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("demo-output"),
    show_default=True,
    help="Directory for the results.",
)
@click.option("--measure", type=click.Path(path_type=Path), hidden=True)
@shared()
def demo(output: Path, measure: Path | None, as_json: bool, quiet: bool) -> None:
    """Compress SmolLM2-135M-Instruct by the paper's method, save, reload in a new process, and measure it beside the dense model
    and the model with the same layers removed."""
    _commands()
    from grasp import demo as script

    if measure is not None:
        script.measure(measure, quiet)
    else:
        script.run(output, as_json, quiet)


@cli.command("methods", short_help="List the compression methods.")
@shared()
def list_methods(as_json: bool, quiet: bool) -> None:
    """The compression methods, their papers and flags."""
    commands = _commands()
    commands.methods(as_json)


@cli.command("families", short_help="List the supported architectures.")
@shared()
def list_families(as_json: bool, quiet: bool) -> None:
    """The architectures in the table, and where each keeps its matrices. Others work by inspection where they can."""
    commands = _commands()
    commands.families(as_json)


@cli.command("data", short_help="List the named texts and file types.")
@shared()
def list_data(as_json: bool, quiet: bool) -> None:
    """What --data and --ppl take."""
    commands = _commands()
    commands.data(as_json)


def main() -> None:
    """Entry point: runs a command; what a user can get wrong ends in one line and status 2, `--debug` shows the traceback."""
    debug = "--debug" in sys.argv
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(levelname)s: %(message)s", force=True)
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
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted; nothing was left behind", 130, debug)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:  # a defect of ours, or something no one has met yet
        _fail(f"unexpected {type(error).__name__}: {' '.join(str(error).split())[:300]} (--debug shows where)", 1, debug)


def _fail(message: str, status: int, debug: bool) -> typing.NoReturn:
    if debug:
        traceback.print_exc()
    click.echo(f"grasp: error: {message}", err=True)
    sys.exit(status)
