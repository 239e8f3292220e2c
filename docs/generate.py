"""Writes docs/reference.md from the code: every command's --help, the methods, the families, the texts. `--check` only compares."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import click

from grasp.cli import cli
from grasp.core.families import FAMILIES
from grasp.methods import available
from grasp.stages.calibration import FILE_TYPES, NAMED

OUTPUT = Path(__file__).with_name("reference.md")


def reference() -> str:
    parts = [
        "<!-- Written by docs/generate.py from the code; do not edit. `make docs` writes it anew. -->",
        "",
        "# Reference",
        "",
        "## Commands",
    ]
    root = click.Context(cli, info_name="grasp", terminal_width=100)
    parts += ["", "```", cli.get_help(root), "```"]
    for name in cli.list_commands(root):
        command = cli.commands[name]
        context = click.Context(command, info_name=name, parent=root, terminal_width=100)
        parts += ["", f"### grasp {name}", "", "```", command.get_help(context), "```"]
    parts += ["", "## Methods", ""]
    for name, method in available().items():
        parts += [
            f"### {name}",
            "",
            (method.__doc__ or "").strip(),
            "",
            f"Paper: <{method.paper}>",
            "",
            "| flag | default | |",
            "|---|---|---|",
        ]
        parts += [f"| `--{f.name.replace('_', '-')}` | {f.default} | {f.metadata['help']} |" for f in dataclasses.fields(method)] + [""]
    parts += ["## Families", "", "| family | model type | layers | attention | mlp | notes |", "|---|---|---|---|---|---|"]
    for row in FAMILIES:
        names = [" ".join(f"`{path.rsplit('.', 1)[-1]}`" for _, path in part) for part in (row.attention, row.mlp)]
        parts.append(f"| {row.name} | {', '.join(row.model_types)} | `{row.layers}` | {names[0]} | {names[1]} | {row.notes} |")
    parts += ["", "## Texts (`--data`, `--ppl`)", "", "| DATA | what | from |", "|---|---|---|"]
    for name, known in NAMED.items():
        parts.append(f"| `{name}` | {known.about} | {'hub: ' + '/'.join(known.hub) if known.hub else 'no network needed'} |")
    parts += [f"| a path | {', '.join(FILE_TYPES)} | no network needed |", ""]
    return "\n".join(line.rstrip() for line in "\n".join(parts).splitlines()) + "\n"


def main() -> int:
    text = reference()
    if "--check" in sys.argv:
        same = OUTPUT.is_file() and OUTPUT.read_text(encoding="utf-8") == text
        print("docs/reference.md is " + ("up to date" if same else "stale: run `make docs`"))
        return 0 if same else 1
    OUTPUT.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
