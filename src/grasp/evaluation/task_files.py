"""Task data from a folder in place of the hub: `FOLDER/<task>/<split>.jsonl`, or, of a task that
needs no second split, `FOLDER/<task>.jsonl`. Prompts and metrics stay lm-eval's own. A task may
read the folder of another with the same rows (`data_of` in its metadata).

A file is `.jsonl`, `.jsonl.gz`, `.json` or `.parquet`, named after its split: `train`, `validation`
(or `valid`, `val`, `dev`), `test`; a prefix (`c3-m-test.json`) and the hub's shard numbers
(`test-00000-of-00002.parquet`) are understood, and such files are joined. A row has the columns of
the hub's data set. Rows are checked here, all of them: a column that is missing in one row would
otherwise reach the model as the word "None".

Without this check and this file a task reads the hub. This file knows tables and columns;
`tasks.py` knows lm-eval.
"""

from __future__ import annotations

import ast
import gzip
import importlib
import inspect
import json
import logging
import re
import textwrap
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes

from grasp.errors import DataError, did_you_mean

logger = logging.getLogger(__name__)

FILE_TYPES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
SPLIT_NAMES = (("train", "training"), ("validation", "valid", "val", "dev"), ("test",))
"""A split and the other names its file may have."""

Row = dict[str, Any]


def with_local_data(
    config: Mapping[str, Any], name: str, folder: Path, num_fewshot: int
) -> tuple[dict[str, Any], list[Path]]:
    """lm-eval's configuration of a task with its data read from `folder / name`, and the files that
    hold the questions.

    `num_fewshot`: worked examples that the prompt will hold; where it is 0 the split they come from
    is not needed. Raises `DataError`: a file or a column is missing, or a file cannot be read.
    """
    strict, likely = columns_read(config)
    questions = config.get("test_split") or config.get("validation_split") or "test"
    files = _files_of_questions(config, name, folder, questions, strict + likely)
    rows = {questions: _joined(files, name, strict, likely)}
    home = files[0].parent
    fewshot = dict(config.get("fewshot_config") or {})
    named = fewshot.get("split") or config.get("fewshot_split")
    examples = named or config.get("training_split") or config.get("validation_split") or questions
    if num_fewshot > 0 and examples not in rows and (named or "samples" not in fewshot):
        found = _find(home, examples)
        if not found:
            raise DataError(
                f"--task-data {folder}: {name} shows {num_fewshot} worked examples from the split"
                f" '{examples}' (--num-fewshot {num_fewshot}), and there is no"
                f" {folder / name / examples}.jsonl; add that file or use --num-fewshot 0"
            )
        rows[examples] = _joined(found, name, strict, likely)
    local = dict(config)
    for field in ("training_split", "validation_split", "test_split", "fewshot_split"):
        local[field] = config.get(field) if config.get(field) in rows else None
    if local["test_split"] is None and local["validation_split"] is None:
        local["test_split"] = questions
    if fewshot.get("split") is not None:
        local["fewshot_config"] = {
            **fewshot,
            "split": fewshot["split"] if fewshot["split"] in rows else None,
        }
    tables = {split: _table(part, folder / name) for split, part in rows.items()}
    local.update(
        dataset_path="json",
        dataset_name=None,
        dataset_kwargs=None,
        custom_dataset=lambda **_: tables,
    )
    return local, files


def _files_of_questions(
    config: Mapping[str, Any], name: str, folder: Path, split: str, columns: Sequence[str]
) -> list[Path]:
    """The files of the split that lm-eval asks its questions from; failing that, of the other
    held-out split, with a warning.
    """
    home = folder / name
    for place in _homes(config, name, folder):
        for instead in (split, "validation", "test"):
            files = _find(place, instead)
            if files:
                if instead != split:
                    logger.warning(
                        "%s: the task asks the split '%s'; %s is taken in its place",
                        name,
                        split,
                        ", ".join(map(str, files)),
                    )
                return files
        for kind in FILE_TYPES:
            whole = place.with_name(place.name + kind)
            if whole.is_file():
                return [whole]
    if home.is_dir():
        there = "; it holds " + (
            ", ".join(sorted(path.name for path in home.iterdir())) or "nothing"
        )
    elif folder.is_dir():
        close = did_you_mean(name, (path.name for path in folder.iterdir()))
        there = f"; there is no {home}{close}"
    else:
        there = f"; there is no folder {folder}"
    source = "/".join(
        str(config[key]) for key in ("dataset_path", "dataset_name") if config.get(key)
    )
    raise DataError(
        f"--task-data {folder}: {name} needs {home / split}.jsonl (or {', '.join(FILE_TYPES[1:])}),"
        f" one row a question with the columns {', '.join(columns) or 'of its data set'}, as in"
        f" {source} on the Hugging Face hub{there}"
    )


def _homes(config: Mapping[str, Any], name: str, folder: Path) -> list[Path]:
    """Where a task's data may lie, the place of its own name first."""
    metadata = config.get("metadata")
    others = metadata.get("data_of", ()) if isinstance(metadata, Mapping) else ()
    return [folder / one for one in (name, *others)]


def _find(home: Path, split: str) -> list[Path]:
    """Files of one split: those under its own name, else under another name for it; several are
    parts of one table, in this order.
    """
    if not home.is_dir():
        return []
    for name in next((names for names in SPLIT_NAMES if split == names[0]), (split,)):
        exact = [
            home / f"{name}{kind}" for kind in FILE_TYPES if (home / f"{name}{kind}").is_file()
        ]
        if exact:
            return exact[:1]
        parts = re.compile(rf"(.*[-_.])?{re.escape(name)}(-\d+-of-\d+)?")
        found = sorted(
            path
            for path in home.iterdir()
            if path.is_file() and _kind(path) and parts.fullmatch(path.name[: -len(_kind(path))])
        )
        if found:
            return found
    return []


def _kind(path: Path) -> str:
    """The file type by name, "" for a file that holds no rows."""
    return next((kind for kind in FILE_TYPES if path.name.endswith(kind)), "")


def _joined(
    files: Sequence[Path], name: str, strict: Sequence[str], likely: Sequence[str]
) -> list[Row]:
    """The rows of all files, checked."""
    rows = []
    for path in files:
        part = read_rows(path)
        check_columns(part, path, name, strict, likely)
        rows += part
    return rows


def read_rows(path: Path) -> list[Row]:
    """All rows of a file; the original file of C3 (passages with their questions) becomes one row a
    question. Raises `DataError`.
    """
    try:
        rows = list(_parsed(path))
    except (OSError, ValueError, EOFError, zlib.error) as failure:
        raise DataError(
            f"{path}: cannot be read: {' '.join(str(failure).split())[:200]}"
        ) from failure
    if rows and all(isinstance(row, list) for row in rows):
        rows = [question for passage in rows for question in _questions(passage, path)]
    if not rows:
        raise DataError(f"{path}: holds no rows")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, row {number}: not a JSON object with columns but {type(row).__name__}"
            )
    return rows


def _parsed(path: Path) -> Iterator[Any]:
    if _kind(path) == ".parquet":
        # comes with `datasets`, which lm-eval needs
        parquet = importlib.import_module("pyarrow.parquet")
        yield from parquet.read_table(path).to_pylist()
        return
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    if path.suffix == ".json" and text.lstrip().startswith("["):
        yield from json.loads(text)
        return
    # not splitlines(): a JSON text may hold other line separators
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as failure:
                raise ValueError(f"line {number} is not JSON ({failure})") from failure


def _questions(passage: list[Any], path: Path) -> list[Row]:
    """C3 as published: `[lines of the passage, [{"question", "choice", "answer"}, ...], id]`, as
    the hub's rows.
    """
    try:
        lines, questions, _ = passage
        return [{"context": list(lines), **question} for question in questions]
    except (TypeError, ValueError) as failure:
        raise DataError(
            f"{path}: neither rows with columns nor passages with questions in the form of C3"
        ) from failure


def check_columns(
    rows: Sequence[Row], path: Path, name: str, strict: Sequence[str], likely: Sequence[str] = ()
) -> None:
    """Raise `DataError` naming the first row without a column that the prompt reads.

    `strict` columns must be in every row; a `likely` one (found in the code of a function, which
    may have a use for rows without it) must be in all rows or in none. A dot leads into a column
    that is a table of its own.
    """
    wanted = [*strict, *(column for column in likely if any(column in row for row in rows))]
    for number, row in enumerate(rows, 1):
        for column in wanted:
            here: Any = row
            for part in column.split("."):
                if not isinstance(here, dict) or here.get(part) is None:
                    there = (
                        ", ".join(map(str, here)) if isinstance(here, dict) else type(here).__name__
                    )
                    close = did_you_mean(part, map(str, here)) if isinstance(here, dict) else ""
                    raise DataError(
                        f"{path}, row {number}: no column '{column}', only"
                        f" {there or 'nothing'}{close}; {name} reads the columns"
                        f" {', '.join(wanted)}"
                    )
                here = here[part]


def columns_read(config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The columns that a task's prompt, options and answer read: (sure, from templates; likely,
    from the code of functions).

    Where a function may make new columns first (`process_docs`), templates may read those, so
    nothing is sure.
    """
    sure: dict[str, None] = {}
    likely: dict[str, None] = {}
    new: set[str] = set()
    for field in ("process_docs", "doc_to_text", "doc_to_choice", "doc_to_target"):
        value = config.get(field)
        if callable(value):
            read, made = _columns_in_code(value)
            likely.update(dict.fromkeys(read))
            new |= made if field == "process_docs" else set()
        elif isinstance(value, str):
            sure.update(dict.fromkeys(_columns_in_template(value)))
    if callable(config.get("process_docs")):
        return [], list(likely) + [
            column for column in sure if column not in likely and column not in new
        ]
    return list(sure), list(likely)


def _columns_in_template(template: str) -> list[str]:
    """`"{{choices.text}}"` -> ["choices.text"]; a bare word is the name of a column."""
    if "{{" not in template and "{%" not in template:
        return [template] if template.isidentifier() else []
    tree = jinja2.Environment().parse(template)
    free = meta.find_undeclared_variables(tree)
    called = {id(call.node) for call in tree.find_all(nodes.Call)}
    inner = [
        f"{place.node.name}.{place.attr}"
        for place in tree.find_all(nodes.Getattr)
        if isinstance(place.node, nodes.Name)
        and place.node.name in free
        and id(place) not in called
    ]
    outer = [place.name for place in tree.find_all(nodes.Name) if place.name in free]
    return list(
        dict.fromkeys(
            [name for name in outer if not any(path.startswith(name + ".") for path in inner)]
            + inner
        )
    )


def _columns_in_code(function: Any) -> tuple[list[str], set[str]]:
    """Columns that a function takes from a row by `row["name"]`, and names that it makes itself;
    nothing where its code cannot be read.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(function, "func", function))))
    except (OSError, TypeError, SyntaxError):
        return [], set()
    arguments = {argument.arg for argument in ast.walk(tree) if isinstance(argument, ast.arg)}
    read: dict[str, None] = {}
    made = set()
    for place in sorted(
        ast.walk(tree),
        key=lambda node: (getattr(node, "lineno", 0), getattr(node, "col_offset", 0)),
    ):
        match place:
            case ast.Subscript(
                value=ast.Name(id=row), slice=ast.Constant(value=str(column)), ctx=ast.Load()
            ) if row in arguments:
                read[column] = None
            case ast.Subscript(slice=ast.Constant(value=str(column)), ctx=ast.Store()):
                made.add(column)
            case ast.Dict(keys=keys):
                made |= {
                    key.value
                    for key in keys
                    if isinstance(key, ast.Constant) and isinstance(key.value, str)
                }
    return [name for name in read], made


def _table(rows: Sequence[Row], place: Path) -> Any:
    """Rows as lm-eval wants them, a `datasets.Dataset` in memory."""
    try:
        return importlib.import_module("datasets").Dataset.from_list(list(rows))
    except (TypeError, ValueError, OverflowError) as failure:  # pyarrow's errors are kinds of these
        raise DataError(
            f"{place}: a column holds values of several types"
            f" ({' '.join(str(failure).split())[:160]})"
        ) from failure


@contextmanager
def no_bars() -> Iterator[None]:
    """`datasets` without its progress bars."""
    datasets = importlib.import_module("datasets")
    hidden = not datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()
