"""`grasp report`: what was measured and how a model was made, as one HTML page that opens anywhere,
offline.

The page holds everything: the drawings (SVG, readable without scripts), the same charts as
Vega-Lite, and the script that makes them interactive. A content security policy in it lets it load
nothing and run only its own two scripts, named by their hashes, so that no text from a results file
can do more than be read.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from grasp.core.destination import check_file
from grasp.core.results import Generation
from grasp.core.writing import whole_file
from grasp.errors import RecipeError
from grasp.report import anatomy, look, wording
from grasp.report.card import repeat
from grasp.report.charts import unchecked
from grasp.report.figures import (
    Colours,
    Figure,
    checkpoint_figures,
    over_size,
    speeds,
    summary,
    sweep_figures,
)
from grasp.report.highlights import highlights
from grasp.report.kept_words import facts
from grasp.report.picture import picture_of
from grasp.report.reading import Checkpoint, Material, gather
from grasp.report.rows import Row, columns_of, rows_of
from grasp.report.svg import inline
from grasp.report.sweeps import sweeps_of
from grasp.report.table import table_of
from grasp.report.vega import Runtime, draw

HERE = Path(__file__).parent
MOST_DRAWN, MOST_MATRICES = 8, 6
"""Checkpoints whose charts are drawn, and matrices of each: more would make the page slow and
large.
"""


def write_report(paths: Sequence[Path], out: Path) -> Path:
    """Write the report of everything that `paths` hold to the file `out`; returns `out`.

    A path is a checkpoint, a results file, or a directory that holds some, itself or one level
    below. Raises `CheckpointError` where one holds nothing or is damaged, `RecipeError` where `out`
    cannot be written. The file is written whole or not at all.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise RecipeError(f"-o {out}: a report is an HTML page; give a name that ends in .html")
    check_file(out, "-o", new_folder=True)
    material = gather(paths)
    runtime = Runtime()
    try:
        with unchecked():
            page = render(material, runtime)
    finally:
        runtime.stop()
    with whole_file(out) as scratch:
        scratch.write_text(page, encoding="utf-8")
    return out


def render(material: Material, runtime: Runtime) -> str:
    """The page."""
    rows = rows_of(material)
    columns = columns_of(rows)
    colours = look.colours_of(
        [row.method for row in rows] + [checkpoint.method for checkpoint in material.checkpoints]
    )
    drawn = Drawn()
    sizes = drawn.all(over_size(rows, columns, colours))
    fast = drawn.all(speeds(rows, columns, colours))
    varied = [
        (sweep, drawn.all(sweep_figures(sweep, rows, columns, colours)))
        for sweep in sweeps_of(rows)
    ]
    checkpoints = [
        _checkpoint(one, number, material, colours, drawn)
        for number, one in enumerate(material.checkpoints)
    ]
    scripts = [runtime.text(), (HERE / "page.js").read_text(encoding="utf-8")]
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        show.__name__: show
        for show in (wording.plain, wording.settings, wording.duration, wording.percent)
    }
    return environment.get_template("page.html").render(
        title=_title(material),
        policy=_policy(scripts),
        style=Markup(_style()),
        scripts=[Markup(script) for script in scripts],
        data=Markup(
            _safe_json(
                {
                    "config": look.config(),
                    "dark": dict(look.COLOURS.values()),
                    "charts": drawn.specs,
                }
            )
        ),
        table=table_of(rows, columns),
        highlights=highlights(rows, columns),
        notes=_notes(rows),
        sizes=sizes,
        speeds=fast,
        sweeps=[(sweep.field.replace("_", " "), figures) for sweep, figures in varied if figures],
        checkpoints=checkpoints,
        prompts=_prompts(rows),
        sources=material.results,
        colours={row.label: colours[row.method] for row in rows},
        variables={pair[0]: name for name, pair in look.COLOURS.items()},
        most_drawn=MOST_DRAWN,
    )


class Drawn:
    """Figures with their drawings, in the order of the page. `specs`: name -> Vega-Lite."""

    def __init__(self) -> None:
        self.specs: dict[str, dict[str, Any]] = {}
        self.config = look.config()

    def all(self, figures: Sequence[Figure]) -> list[dict[str, Any]]:
        """What the page needs of each figure: name, drawing, width."""
        found = []
        for figure in figures:
            name = f"chart-{len(self.specs)}"
            self.specs[name] = {**figure.spec, "description": figure.described}
            svg = draw(figure.spec, self.config, name, figure.described)
            found.append(
                {
                    "name": name,
                    "svg": Markup(svg),
                    "wide": figure.wide,
                    "described": figure.described,
                }
            )
        return found


def _checkpoint(
    checkpoint: Checkpoint, number: int, material: Material, colours: Colours, drawn: Drawn
) -> dict[str, Any]:
    """What the page shows of one checkpoint."""
    matrices = MOST_MATRICES if len(material.checkpoints) == 1 else MOST_MATRICES // 2
    figures = checkpoint_figures(checkpoint, colours, matrices) if number < MOST_DRAWN else {}
    raw = checkpoint.raw
    recipe = raw.get("recipe") or {}
    by_rank = any(matrix.keeps_the_first for matrix in checkpoint.matrices)
    return {
        "anchor": f"checkpoint-{number}",
        "one": checkpoint,
        "name": material.names[number],
        "colour": colours[checkpoint.method],
        "summary": summary(checkpoint),
        "picture": _picture(checkpoint, number),
        "kept": facts(checkpoint.kept),
        "figures": {what: drawn.all(some) for what, some in figures.items()},
        "by_rank": by_rank,
        "command": "\n".join(repeat(raw, checkpoint.name)) if recipe.get("model") else "",
        "calibration": raw.get("calibration") or {},
        "versions": raw.get("versions") or {},
        "manifest": json.dumps(anatomy.shortened(raw), indent=1, ensure_ascii=False),
    }


def _picture(checkpoint: Checkpoint, number: int) -> Markup | None:
    """What every layer kept, where there is something to see."""
    kept = checkpoint.kept
    if number >= MOST_DRAWN or not (kept.changed and kept.strips):
        return None
    return Markup(inline(picture_of(checkpoint.raw, kept), f"kept-{number}"))


def _title(material: Material) -> str:
    titles = list(dict.fromkeys(results.title for _, results in material.results if results.title))
    if titles:
        text = " · ".join(titles[:3])
        return text[:1].upper() + text[1:]
    if len(material.checkpoints) == 1 and not material.results:
        return f"How {material.names[0]} was made"
    return "Compressed models"


def _notes(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """Every warning with the models it belongs to."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for note in row.result.notes:
            found.setdefault(note, []).append(row.label)
    return list(found.items())


def _prompts(
    rows: Sequence[Row],
) -> list[tuple[str, list[tuple[Row, Generation, list[tuple[str, bool]]]]]]:
    """For every prompt, what each model wrote, cut into pieces that are said again or not."""
    found: dict[str, list[tuple[Row, Generation, list[tuple[str, bool]]]]] = {}
    for row in rows:
        for one in row.result.generations:
            text = one.text.lstrip("\n")
            found.setdefault(one.prompt, []).append(
                (row, one, said_again(text[1:] if re.match(r" \S", text) else text))
            )
    return list(found.items())


def said_again(text: str, length: int = 4) -> list[tuple[str, bool]]:
    """The text in pieces; True for words in a run of `length` words that has come before."""
    found = list(re.finditer(r"\S+", text))
    words = [one.group() for one in found]
    seen: set[tuple[str, ...]] = set()
    again = [False] * len(words)
    for start in range(len(words) - length + 1):
        run = tuple(words[start : start + length])
        if run in seen:
            again[start : start + length] = [True] * length
        seen.add(run)
    pieces: list[tuple[str, bool]] = []
    begin = 0
    for number, one in enumerate(found):
        if number and again[number] != again[number - 1]:
            # the space between is not part of what is said again
            end = found[number - 1].end() if again[number - 1] else one.start()
            pieces.append((text[begin:end], again[number - 1]))
            begin = end
    return [*pieces, (text[begin:], bool(again) and again[-1])] if text else []


def _style() -> str:
    dark = f"@media (prefers-color-scheme: dark) {{ :root {{ {look.variables(1)} }} }}"
    return (
        f":root {{ {look.variables(0)}"
        f" }}\n{dark}\n{(HERE / 'page.css').read_text(encoding='utf-8')}"
    )


def _policy(scripts: Sequence[str]) -> str:
    """Load nothing; run these scripts and no others. Charts style themselves, and export pictures
    as data.
    """
    hashes = (
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts
    )
    allowed = " ".join(f"'sha256-{one}'" for one in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:;"
        " base-uri 'none'; form-action 'none'"
    )


def _safe_json(value: Mapping[str, Any]) -> str:
    """JSON that cannot end the script element it stands in."""
    return (
        json.dumps(value, separators=(",", ":"), allow_nan=False)
        .replace("<", "\\u003c")
        .replace("&", "\\u0026")
    )
