"""The report: one page that needs nothing else, shows what was measured and how, and runs no text
of a user's as code.
"""

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import altair
import pytest
import torch
from altair.utils.schemapi import SchemaValidationError
from conftest import build
from hypothesis import given, settings
from hypothesis import strategies as st

import grasp
from grasp.core import writing
from grasp.core.results import Generation, Result, Results
from grasp.core.score import Score
from grasp.errors import CheckpointError, RecipeError
from grasp.report import anatomy, charts, figures, html, look, vega, wording
from grasp.report.html import said_again, write_report
from grasp.report.reading import Checkpoint, gather
from grasp.report.rows import Row, best, columns_of, odd_ones
from grasp.report.sweeps import sweeps_of

EVIL = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"


def perplexity(value, name="text", **protocol):
    return Score(name, value, "perplexity", {"seq_len": 512, "num_blocks": 24, **protocol})


def speed(value, batch):
    return Score(
        "decode",
        value,
        "tokens/s",
        {"batch_size": batch, "prompt_len": 64},
        interval=(0.9 * value, 1.1 * value),
    )


def task(value, name="arc_easy", unit="acc_norm"):
    return Score(name, value, unit, {"harness": "lm-eval 0.4.13", "num_fewshot": 0}, stderr=0.01)


ROWS = (
    Result(
        "dense",
        "tiny",
        "dense",
        {},
        40_000,
        160_000,
        0.0,
        (perplexity(30.0), speed(10.0, 1), speed(30.0, 4), task(0.5)),
        (Generation("Say", " one two three", 3),),
    ),
    Result(
        "a",
        "made/a",
        "grasp",
        {"retain_ratio": 0.1},
        32_000,
        128_000,
        0.2,
        (
            perplexity(90.0),
            speed(12.5, 1),
            speed(45.0, 4),
            task(0.4),
            Score("text", 0.5, "nats/token", {}, interval=(0.4, 0.6)),
        ),
        (Generation("Say", "x y z w x y z w x y z w", 12, 0.7),),
        {"load": 1.0, "sweep": 65.0},
        10**9,
        ("text: LEAKAGE, calibrated on it",),
    ),
    Result(
        "b",
        "made/b",
        "grasp",
        {"retain_ratio": 0.2},
        34_000,
        136_000,
        0.15,
        (perplexity(80.0), task(0.41)),
        (),
        {"sweep": 66.0},
    ),
    Result(
        "c",
        "made/c",
        "other",
        {},
        33_000,
        132_000,
        0.17,
        (perplexity(450.0, seq_len=64), task(0.45)),
    ),
    Result("broken", "x", "grasp", {}, error="out of memory: 27 GB"),
    Result(
        EVIL,
        EVIL,
        EVIL,
        {EVIL: EVIL},
        1_000,
        scores=(Score(EVIL, 3.0, "perplexity", {EVIL: EVIL}), task(0.1, EVIL, EVIL)),
        generations=(Generation(EVIL, EVIL + " a b c d a b c d"),),
        notes=(EVIL,),
    ),
)


class Quiet(vega.Runtime):
    """Makes no script: what most tests need."""

    def __init__(self, cache=None):
        self.child = None

    def text(self):
        return "window.vegaEmbed = null;"


class Page(HTMLParser):
    """A page as a browser reads it: tags with attributes, texts of scripts, words that show."""

    def __init__(self, path):
        super().__init__()
        self.path = path
        self.source = path.read_text(encoding="utf-8")
        self.tags = []
        self.scripts = []
        self.words = []
        self.inside = []
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "path", "rect", "line", "br"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        while tag in self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        (self.scripts if self.inside[-1:] == ["script"] else self.words).append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def outside_scripts(self):
        """(style sheet, what follows it up to the first script)"""
        style, body = self.source.split("<style>")[1].split("</style>", 1)
        return style, body.split("<script")[0]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder as a demo leaves it: a results file and the checkpoints of a real run of two
    methods.
    """
    folder = tmp_path_factory.mktemp("demo")
    data = grasp.Calibration(torch.randint(0, 256, (4, 16)), "random")
    grasp.compress(build("llama"), folder / "made-a", data=data, method="grasp", num_layers=2)
    grasp.compress(build("llama"), folder / "made-b", data=data, ratio=0.2)
    manifest = json.loads((folder / "made-a" / "grasp.json").read_text())
    manifest["recovery"] = {
        "recipe": {"train": "factors", "objective": "lm", "batch_size": 4},
        "data": {"sources": {"text": 20}, "tokens": 100},
        "steps": 20,
        "trained_parameters": 9,
        "best": {"step": 10, "held_out_loss": 5.0},
        "seconds": {"training": 1.0},
        "curve": [
            {"step": 0, "loss": 5.0, "held_out_loss": 5.5},
            {"step": 10, "loss": 4.0, "held_out_loss": None},
            {"step": 20, "loss": float("nan")},
        ],
    }
    manifest["edits"].append({"edit": "drop", "layer": 3})
    manifest["recipe"]["model"] = "tiny"
    (folder / "made-a" / "grasp.json").write_text(json.dumps(manifest))
    Results(
        ROWS,
        "A title",
        "grasp demo -o out",
        {"torch": "2.13"},
        {"processor": "a chip"},
        {"seed": 0},
    ).write(folder / "results.json")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def page(material, tmp_path_factory):
    """The report of that folder, with the real script, read."""
    return Page(write_report([material], tmp_path_factory.mktemp("page") / "deep" / "report.html"))


@pytest.fixture
def write(tmp_path, monkeypatch):
    """`write(rows)`: the page of a results file with these rows."""
    monkeypatch.setattr(html, "Runtime", Quiet)

    def made(*rows):
        Results(tuple(rows)).write(tmp_path / "r.json")
        return Page(write_report([tmp_path / "r.json"], tmp_path / "report.html"))

    return made


def test_every_section_is_there(page):
    assert [a["id"] for a in page.all("section")] == [
        "models",
        "size",
        "speed",
        "sweeps",
        "text",
        "checkpoints",
        "origin",
    ]
    for words in (
        "A title",
        "grasp demo -o out",
        "torch 2.13",
        "a chip",
        "failed: out of memory: 27 GB",
        "LEAKAGE",
        "retain ratio 0.1",
        "seq len 512",
        "0.400 – 0.600",
        "± 1.0",
        "66 s",
        "70 % repeated",
        "grasp compress tiny made-a",
        "source random",
        "Perplexity on text",
        "12.5 (1.25×)",
    ):
        assert words in page.text, words


def test_it_loads_nothing_and_runs_two_scripts_only(page):
    """Every address is a link to read or a place on the page, and the policy forbids the rest."""
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "img", "base", "form"), tag
        for name, value in attributes.items():
            if name in ("src", "srcset", "href", "xlink:href", "action", "data", "poster"):
                assert value.startswith("#") or (
                    tag == "a" and value.startswith("https://arxiv.org/")
                ), (tag, name, value)
            assert not name.startswith("on"), (tag, name)
    style, body = page.outside_scripts()
    assert "@import" not in style and "url(" not in style and not re.search(r"url\((?!#)", body)
    [policy] = [
        a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    run = [
        text
        for attributes, text in zip(page.all("script"), page.scripts, strict=True)
        if attributes.get("type") != "application/json"
    ]
    assert len(run) == 2
    for text in run:
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy


def test_the_text_of_users_is_only_read(page):
    """A script tag in a label, field, prompt, text, note, task or setting stays text; the page
    shows it as it was.
    """
    assert page.source.count("<script") == 3
    assert "<img" not in page.outside_scripts()[1]
    assert page.text.count("alert('x')") > 8


def test_charts_are_drawn_in_words_and_colours_of_the_page(page):
    """Each chart is an inline drawing with a title, without scripts; its colours are variables with
    a light and a dark value.
    """
    pictures = [a for a in page.all("svg") if a["aria-labelledby"].startswith("kept-")]
    drawn = [a for a in page.all("svg") if a not in pictures]
    assert len(pictures) == 2
    specs = json.loads(page.scripts[0])["charts"]
    assert (
        len(drawn) == len(specs) == len([a for a in page.all("figure") if "data-chart" in a]) > 10
    )
    ids = Counter(a["id"] for _, a in page.tags if "id" in a)
    assert ids.most_common(1)[0][1] == 1
    assert {a["aria-labelledby"] for a in drawn} <= set(ids)
    style, body = page.outside_scripts()
    assert not [pair for pair in look.COLOURS.values() if f'"{pair[0]}"' in body]
    for name in set(re.findall(r"var\(--([\w-]+)\)", style + body)):
        assert style.count(f"--{name}: #") == 2, name


def test_the_page_is_small_and_whole(page):
    """With Vega in it: below 5 MB, nothing beside it, and no script ends its own element."""
    assert page.path.stat().st_size < 5e6
    assert page.source.count("</script>") == 3
    assert [path.name for path in page.path.parent.iterdir()] == ["report.html"]


def test_charts_fit_the_schema(material, monkeypatch):
    """Altair checks every chart: the page itself is made without that."""
    seen = []
    monkeypatch.setattr(charts, "spec_of", lambda chart: seen.append(chart.to_dict()) or {})
    rows = [Row(row, row.label, None) for row in ROWS]
    columns = columns_of(rows)
    found = [Checkpoint.read(material / name) for name in ("made-a", "made-b")]
    colours = look.colours_of([row.method for row in rows] + [one.method for one in found])
    figures.over_size(rows, columns, colours)
    figures.speeds(rows, columns, colours)
    for sweep in sweeps_of(rows):
        figures.sweep_figures(sweep, rows, columns, colours)
    for one in found:
        figures.checkpoint_figures(one, colours, 3)
    assert len(seen) > 10


def test_a_chart_that_does_not_fit_is_found():
    with pytest.raises(SchemaValidationError):
        altair.Chart(altair.InlineData(values=[])).mark_bar(height="tall").to_dict()


def test_manifest_records(material):
    """What the charts of a checkpoint draw: BI with states, predicted losses, the loss curve."""
    a, b = (Checkpoint.read(material / name) for name in ("made-a", "made-b"))
    assert {record["state"] for record in anatomy.block_influence(a)} >= {"edited", "removed"}
    assert anatomy.layer_losses(a) == []
    assert sum(record["loss"] for record in anatomy.layer_losses(b)) == pytest.approx(
        b.prediction["loss_rise"], rel=1e-3
    )
    assert [(record["step"], record["kind"]) for record in anatomy.recovery(a)] == [
        (0, "training"),
        (0, "held out"),
        (10, "training"),
    ]
    matrix = anatomy.shown_matrices(a, 3)[0]
    assert (
        sum(record["state"] == "kept" for record in anatomy.groups(matrix))
        == len(matrix.kept)
        == matrix.rank
    )
    assert len(anatomy.shown_matrices(a, 3)) == 3


def test_long_lists_of_a_manifest_are_shortened():
    assert anatomy.shortened({"kept": list(range(100)), "few": [1, 2]}) == {
        "kept": [*range(8), "… 92 more"],
        "few": [1, 2],
    }


def test_best_odd_and_settings_columns():
    """Best: of compressed models under the same protocol; those that the uncertainty does not tell
    from it share the mark.
    """
    rows = [Row(row, row.label, None) for row in ROWS[:4]]
    columns = {column.head: column for column in columns_of(rows)}
    assert set(columns) == {
        ("text", ""),
        ("decode", "tokens/s, batch size 1"),
        ("decode", "tokens/s, batch size 4"),
        ("arc_easy", "acc_norm"),
        ("text", "KL"),
    }
    assert odd_ones(columns["text", ""], rows) == {"c"}
    assert best(columns["text", ""], rows) == {"b"}
    assert best(columns["arc_easy", "acc_norm"], rows) == {"c"}
    near = [*rows, Row(Result("d", "d", "grasp", {}, scores=(task(0.435),)), "d", None)]
    assert best(columns["arc_easy", "acc_norm"], near) == {"c", "d"}
    assert best(columns["text", "KL"], rows) == set()
    assert columns["decode", "tokens/s, batch size 4"].value(rows[0]) == 30.0


def rows_with(*fields, method="grasp"):
    return [
        Row(
            Result(f"{method}{n}", "m", method, one, scores=(perplexity(30.0 + n),)),
            f"{method}{n}",
            None,
        )
        for n, one in enumerate(fields)
    ]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (rows_with({"r": 0.1}, {"r": 0.2}, {"r": 0.3}), [("r", True, {"grasp"})]),
        (
            rows_with(*({"r": r, "twice": t} for r in (1, 2, 3) for t in (False, True))),
            [("r", True, {"twice no", "twice yes"})],
        ),
        (rows_with({"data": "a/b/x.txt"}, {"data": "a/b/y.txt"}), [("data", False, {"grasp"})]),
        (
            rows_with({"r": 0.1, "layers": 3}, {"r": 0.2, "layers": 4}),
            [("layers", True, {"grasp"})],
        ),
        (rows_with({"r": 1, "seed": 0}, {"r": 1, "seed": 1}), []),
        (
            rows_with({"r": 1, "seed": 0}, {"r": 1, "seed": 1}, {"r": 2, "seed": 2}),
            [("r", True, {"grasp"})],
        ),
        (rows_with({"once": True}, {}), [("once", False, {"grasp"})]),
        (rows_with({"ratio": 0.1}, {"ratio": 0.2}), []),
        (
            rows_with({"r": 1}, {"r": 2}) + rows_with({"r": 1}, {"r": 2}, method="ours"),
            [("r", True, {"grasp", "ours"})],
        ),
    ],
)
def test_sweeps(rows, expected):
    """Fields that vary alone, or together; a seed only repeats; sizes have their own charts."""
    assert [
        (sweep.field, sweep.is_numeric, {place.line for place in sweep.places})
        for sweep in sweeps_of(rows)
    ] == expected


def test_paths(material, tmp_path):
    """Directories are searched one level deep; each thing is shown once, whatever its path; other
    JSON is left alone.
    """
    found = gather(
        [
            material,
            material / "results.json",
            material / "made-a",
            material / "made-b" / "grasp.json",
        ]
    )
    assert [path.name for path, _ in found.results] == ["results.json"]
    assert [one.name for one in found.checkpoints] == ["made-a", "made-b"]
    assert gather([material / "made-a"]).results == ()


def test_checkpoints_of_one_name_are_told_apart(material, tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder / "small").mkdir(parents=True)
        shutil.copy(material / "made-b" / "grasp.json", tmp_path / folder / "small")
    assert gather([tmp_path / "x", tmp_path / "y", material / "made-a"]).names == [
        "x/small",
        "y/small",
        "made-a",
    ]


def test_a_page_that_cannot_be_finished_leaves_nothing(tmp_path, monkeypatch, material):
    """A disk that fills up while it is written: the old page stays, nothing lies beside it."""
    monkeypatch.setattr(html, "Runtime", Quiet)
    out = tmp_path / "report.html"
    out.write_text("old")
    monkeypatch.setattr(
        writing.os,
        "replace",
        lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.raises(CheckpointError, match="No space left"):
        write_report([material / "results.json"], out)
    assert [path.name for path in tmp_path.iterdir()] == [
        "report.html"
    ] and out.read_text() == "old"


def test_a_checkpoint_alone_has_a_table(material, tmp_path, monkeypatch):
    monkeypatch.setattr(html, "Runtime", Quiet)
    page = Page(write_report([material / "made-b"], tmp_path / "report.html"))
    assert "made-b" in page.text and "% removed" in page.text
    assert [a["id"] for a in page.all("section")] == ["models", "checkpoints"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing", None, "no such file"),
        ("empty/", None, "holds nothing to report; give a checkpoint"),
        ("a/grasp.json", "{", "the checkpoint is damaged"),
        ("a/grasp.json", '{"format_version": 2}', "missing required field `model`"),
        ("a/grasp.json", '{"format_version": 99}', "newer grasp"),
        ("a/results.json", "{", "cannot be read"),
        ("b.json", '{"rows": []}', "is no results file"),
        (
            "b.json",
            '{"kind": "grasp-results", "format_version": 1, "rows": [{"label": "a"}]}',
            "rows[0]: Object missing required field `model`",
        ),
    ],
)
def test_what_cannot_be_shown_is_one_line_with_the_path(tmp_path, name, content, message):
    path = tmp_path / name
    (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
    if content is not None:
        path.write_text(content)
    place = tmp_path / name.split("/")[0]
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        write_report([place], tmp_path / "report.html")
    assert name.split("/")[0] in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_damage_inside_a_manifest_is_named(material, tmp_path):
    sound = json.loads((material / "made-b" / "grasp.json").read_text())
    sound["edits"].sort(key=lambda edit: "path" not in edit)  # a matrix first
    for change in (
        lambda m: m["edits"][0]["note"].update(kept=[10**6]),
        lambda m: m["edits"][0]["note"].update(scores=[1.0]),
        lambda m: m["edits"][0].update(path="no_layer"),
        lambda m: m["parameters"].update(before=0),
        lambda m: m["redundancy"]["bi"].update({"0": math.nan}),
        lambda m: m.update(model=None),
    ):
        manifest = json.loads(json.dumps(sound))
        change(manifest)
        (tmp_path / "grasp.json").write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError, match=r"grasp\.json: .*damaged"):
            Checkpoint.read(tmp_path)


@pytest.mark.parametrize("name", ["results.json", "report.html/", "file/report.html"])
def test_a_place_that_cannot_be_written_is_refused(tmp_path, name, monkeypatch):
    monkeypatch.setattr(html, "Runtime", Quiet)
    source = tmp_path / "results.json"
    Results(ROWS[:1]).write(source)
    before = source.read_text()
    (tmp_path / "report.html").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match=r"-o .*(report\.html|results\.json)"):
        write_report([source], tmp_path / name)
    assert source.read_text() == before


def test_pages_of_odd_results(write):
    """No rows, only failures, numbers that are not finite, a model far off the scale: a page all
    the same.
    """
    assert "One row a model" in write().text
    assert "failed: why" in write(Result("a", "a", error="why")).text
    odd = Result(
        "odd",
        "o",
        "m",
        {"r": math.nan},
        10,
        scores=(perplexity(math.inf), Score("decode", math.nan, "tokens/s")),
        ratio=0.5,
    )
    assert (
        "inf"
        in write(ROWS[0], odd, Result("far", "f", "m", {}, 20, scores=(perplexity(1e8),))).text
    )
    assert (
        "1 above 10,000 not drawn"
        in write(ROWS[0], ROWS[1], Result("far", "f", "m", {}, 20, scores=(perplexity(1e8),))).text
    )


@settings(deadline=None)
@given(st.text(alphabet="ab \n", max_size=60))
def test_pieces_are_the_text(text):
    assert "".join(piece for piece, _ in said_again(text)) == text


def test_what_is_said_again_is_marked():
    assert said_again("a b c d, then a b c d, end") == [
        ("a b c d, then ", False),
        ("a b c d,", True),
        (" end", False),
    ]
    assert not any(again for _, again in said_again("every word of this is another one"))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (32.635, "32.63"),
        (1234.5, "1,234"),
        (0.20512, "0.2051"),
        (1e8, "1e+08"),
        (0.0, "0.0000"),
        (math.inf, "inf"),
    ],
)
def test_numbers(value, shown):
    assert wording.number(value) == shown


def test_the_script_is_kept_and_made_again(tmp_path, monkeypatch):
    """Made by a child the first time, read the second; a child that fails, or a cache that cannot
    be written, changes nothing.
    """
    monkeypatch.setattr(vega.vl_convert, "javascript_bundle", lambda snippet: "made here")
    kept = tmp_path / "cache"
    first = vega.Runtime(kept)
    assert first.child is not None
    monkeypatch.setattr(sys, "executable", "/bin/false")
    script = first.text()
    assert "vegaEmbed" in script and len(script) > 5e5
    assert vega.Runtime(kept).child is None and vega.Runtime(kept).text() == script
    (tmp_path / "file").touch()
    assert vega.Runtime(tmp_path / "file").text() == "made here"
    stopped = vega.Runtime(tmp_path / "other")
    stopped.stop()
    assert stopped.child is None


def browse(path, *flags):
    """The page after its scripts ran, as Chromium has it, and what it wrote to its console."""
    browser = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if browser is None:
        pytest.skip("no chromium here: apt-get install chromium")
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--virtual-time-budget=20000",
        "--window-size=1200,2000",
        f"--user-data-dir={path.parent / 'profile'}",
        *flags,
        "--dump-dom",
        path.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
def test_a_browser_draws_every_chart_and_complains_of_nothing(page):
    """In Chromium, light and dark: each chart is replaced by an interactive one of marks, with a
    menu to save it; the console stays empty.
    """
    for scheme, background in ((1, "rgb(254, 254, 254)"), (0, "rgb(23, 26, 31)")):
        there, complaints = browse(page.path, f"--blink-settings=preferredColorScheme={scheme}")
        assert complaints == []
        count = there.count("<figure ")
        assert there.count('<div class="live vega-embed') == count == len(page.all("svg")) - 2 > 10
        assert there.count(f"background-color: {background}") == count
        assert there.count(">Save as PNG</a>") == there.count(">Save as SVG</a>") == count
        assert all(f"mark-{kind} " in there for kind in ("symbol", "rect", "line"))
        assert there.count("<button type") == len(re.findall(r'<th scope="col"', there)) > 5


def test_nothing_here_is_the_users_path():
    """No address of a machine in what is shipped."""
    for path in Path(html.__file__).parent.iterdir():
        if path.is_file():
            assert not re.search(r"/(home|root|tmp|work)/", path.read_text(encoding="utf-8")), (
                path.name
            )
