"""What a run is asked to do is declared once: flags, keyword arguments, TOML keys and docs are read
off the same fields, those of a user's own method too.
"""

import inspect
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import click
import pytest
from click.testing import CliRunner
from msgspec import Meta
from test_cli import command

import grasp
from grasp import methods
from grasp.cli import cli
from grasp.core.fields import Name, Share, check_fields, declared, flag
from grasp.errors import RecipeError
from grasp.methods.shortgpt import ShortGPT
from grasp.recipes.calibration import CalibrationRecipe, InspectionRecipe
from grasp.recipes.evaluation import EvaluationRecipe
from grasp.recipes.experiment import COMMAND_LINE, TABLES, TOP
from grasp.recipes.keywords import keywords
from grasp.recipes.memory import MemoryRecipe
from grasp.recipes.method import MethodChoice
from grasp.recipes.model import ModelSource
from grasp.recipes.part import Part, defaults, keys, made
from grasp.recipes.quantization import QuantizationRecipe
from grasp.recipes.speed import SpeedRecipe
from grasp.terminal.flags import flags, given
from grasp.verbs.bench import bench
from grasp.verbs.compress import predict

VERBS = {
    "compress": (grasp.compress, (ModelSource, MethodChoice, CalibrationRecipe, MemoryRecipe)),
    "inspect": (grasp.inspect, (ModelSource, InspectionRecipe)),
    "eval": (grasp.evaluate, (ModelSource, EvaluationRecipe)),
    "bench": (bench, (ModelSource, SpeedRecipe)),
    "quantize": (grasp.quantize, (ModelSource, QuantizationRecipe)),
}


@pytest.mark.parametrize("verb", VERBS)
def test_flags_and_keywords_are_the_fields_with_their_defaults(verb):
    function, parts = VERBS[verb]
    parameters = inspect.signature(function).parameters
    command_ = cli.commands[verb]
    options = {one.name: one for one in command_.get_params(click.Context(command_))}
    for part in parts:
        for name, one in declared(part).items():
            default = parameters[name].default
            assert (default is inspect.Parameter.empty) or default == one.default
            assert parameters[name].annotation == one.kind
            assert (name in options) != one.python
            assert one.help in function.__doc__
            if one.flag.startswith("--") and not one.python:
                assert one.help in options[name].help and options[name].default is None


def test_predict_takes_what_compress_takes():
    mine, theirs = (set(inspect.signature(one).parameters) for one in (predict, grasp.compress))
    assert mine ^ theirs == {"ratios", "out", "resume"}


def test_keys_of_an_experiment_are_the_fields_that_a_file_may_say():
    for table, part in (
        ("calibration", CalibrationRecipe),
        ("evaluation", EvaluationRecipe),
        ("speed", SpeedRecipe),
    ):
        assert set(TABLES[table]) - {"against"} == set(declared(part))
    assert set(TOP) == {"title", "dense", "model", "dtype"}
    assert COMMAND_LINE == {"device": "--device", "trust_remote_code": "--trust-remote-code"}


@dataclass(frozen=True, kw_only=True)
class Strength(Part):
    """A part of the tests."""

    title: ClassVar[str] = "Strength"

    strength: Share = flag(0.5, "How strong.")
    words: tuple[str, ...] = flag((), "Names.")
    sizes: tuple[Annotated[int, Meta(ge=1, le=9)], ...] = (1,)
    thing: Name = flag("text", "A thing.")
    secret: bool = flag(False, "Trust.", recipe=False)


@keywords
def _measure(asked: Strength, *, times: int = 1) -> Strength:
    """Measure."""
    return asked


@click.command()
@flags(Strength)
def _command(**options):
    click.echo(_measure(**given(options)))


def test_a_field_declared_once_is_a_flag_a_keyword_and_a_key():
    asked = Strength(strength=0.25, words=("a", "b"), sizes=(2, 3))
    assert _measure(strength=0.25, words="a, b", sizes="2,3") == asked
    assert _measure(strength=0.25, words=["a", "b"], sizes=[2, 3]) == asked
    said = CliRunner().invoke(_command, ["--strength=0.25", "--words=a,b", "--sizes=2,3"])
    assert said.output.strip() == str(asked)
    assert list(inspect.signature(_measure).parameters) == [*declared(Strength), "times"]
    assert set(keys(Strength)) == {"strength", "words", "sizes", "thing"}
    assert made(Strength, {"strength": 0.25, "words": ["a", "b"], "sizes": [2, 3]}) == asked
    assert defaults(Strength)["strength"] == 0.5 and _measure() == Strength()
    assert "strength: How strong." in _measure.__doc__


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"strength": 2}, "--strength 2: must be at least 0 and below 1"),
        ({"sizes": "0"}, "--sizes 0: must be a whole number from 1 to 9"),
        ({"sizes": "x"}, "--sizes x: not a list of whole numbers"),
        ({"words": "a,,b"}, "--words a,,b: an empty place in the list"),
        ({"thing": 3}, "--thing 3: must be text"),
    ],
)
def test_the_same_error_wherever_a_value_comes_from(values, said):
    with pytest.raises(RecipeError, match=said):
        _measure(**values)
    with pytest.raises(RecipeError, match=said):
        made(Strength, values)


def test_a_thing_itself_goes_where_its_name_goes():
    thing = object()
    assert _measure(thing=thing).thing is thing


def test_an_unknown_keyword_is_one_line_that_knows_what_was_meant():
    with pytest.raises(RecipeError, match=r"--pppl: grasp.evaluate has no such arg.*mean 'ppl'"):
        grasp.evaluate("nowhere", pppl="pydoc")
    with pytest.raises(RecipeError, match=r"not a flag of .*did you mean 'num_samples'"):
        grasp.compress("nowhere", ratio=0.1, num_sample=3)
    with pytest.raises(TypeError, match="missing a required argument: 'model'"):
        grasp.compress(ratio=0.1)


# --- a user's own method


@dataclass(frozen=True, kw_only=True)
class Mine(ShortGPT):
    """Delete layers, strongly.

    And more about it.
    """

    name: ClassVar[str] = "mine"
    paper: ClassVar[str] = "https://example.org"

    strength: float = 0.5
    kind: Literal["soft", "hard"] = "soft"
    places: tuple[int, ...] = ()


@pytest.fixture
def mine(monkeypatch):
    """A method with plain fields, among the others."""
    found = {**methods.available(), "mine": Mine}
    for module in ("grasp.methods", "grasp.recipes.experiment"):
        monkeypatch.setattr(f"{module}.available", lambda: found)


def test_a_plain_field_is_a_flag_a_keyword_and_a_row(mine, model_directory, text_file, tmp_path):
    shown = command("compress", "--method", "mine", "--help").out
    assert "--strength FLOAT" in shown and "[default: 0.5]" in shown
    assert "--kind soft|hard" in shown and "--places INT,..." in shown
    assert command("methods", "--json").json["mine"]["fields"]["strength"] == ""
    small = ("--data", text_file, "--num-samples", "2", "--seq-len", "16", "--num-layers", "1")
    said = ("--method", "mine", "--strength", "0.7", "--kind", "hard", "--places", "1,2")
    done = command("compress", model_directory, tmp_path / "out", *small, *said, "--json").json
    assert done["recipe"]["strength"] == 0.7 and done["recipe"]["places"] == [1, 2]
    again = grasp.load(tmp_path / "out").manifest["method"]
    assert again["kind"] == "hard"
    assert Mine(num_layers=1).recipe() == {"num_layers": 1}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"strength": "a lot"}, "--strength a lot: must be a number"),
        ({"kind": "sof"}, "--kind sof: .*soft, hard"),
        ({"places": ("x",)}, "--places x: not a list of whole numbers"),
    ],
)
def test_a_plain_field_is_checked(mine, values, said):
    with pytest.raises(RecipeError, match=said):
        methods.make("mine", {"num_layers": 1, **values})


def test_words_of_numbers_are_said_as_numbers():
    with pytest.raises(RecipeError, match="--bits 7: must be one of 8, 6, 5, 4, 3"):
        made(QuantizationRecipe, {"bits": 7})


def test_a_record_without_flag_is_checked_by_itself():
    @dataclass
    class Plain:
        share: Share = 0.5

        def __post_init__(self):
            check_fields(self)

    assert declared(Plain)["share"].help == "" and declared(Plain)["share"].recipe
    with pytest.raises(RecipeError, match="--share 2"):
        Plain(share=2)
