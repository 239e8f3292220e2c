"""The seal: what every file of a checkpoint was when it was written, kept in `grasp.json`, so that
a later change is seen.

    "seal": {"manifest": sha256, "files": {"config.json": {"bytes": 812, "sha256": "...", "values":
    {...}}, "model.safetensors": {...}, ...}}

`values` are those of the settings files, so that a change can be named: `config.json: rope_theta is
5000, was 10000`. The manifest cannot hold its own hash: "manifest" is that of everything else in
it. It guards against accidents, not against somebody who makes a new seal.

At every load the small files are compared and the weights by their size; `grasp verify` reads the
weights too.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from grasp.core.manifest import MANIFEST, read_manifest
from grasp.errors import CheckpointError

logger = logging.getLogger(__name__)

SEAL = "seal"
SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json")
"""Files of named values, small enough to be kept in the manifest."""
SOUGHT = (
    *SETTINGS,
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "adapter_config.json",
    "model.safetensors.index.json",
)
"""Files that transformers looks for by name, so that one which appears later changes what is
loaded.
"""
PICTURE = "kept.svg"
"""What every layer kept, drawn; the model card shows it."""
FOR_PEOPLE = ("README.md", PICTURE)
"""Nothing reads them but people, and they edit them."""
WEIGHTS = ".safetensors"
CHUNK = 1 << 22
Count = Callable[[int], None]
"""Told how many more bytes were read."""


class Sealed(msgspec.Struct):
    """One file as it was written."""

    bytes: int
    sha256: str
    values: dict[str, Any] | None = None


class Seal(msgspec.Struct):
    """All files, by their path in the directory, and the digest of the manifest."""

    manifest: str
    files: dict[str, Sealed]


@dataclass(frozen=True)
class Difference:
    """`kind` is "changed", "missing" or "surplus"; `what` names the fields that changed, where they
    can be named.
    """

    file: str
    kind: str
    what: str = ""

    def __str__(self) -> str:
        if self.kind == "changed" and self.file in FOR_PEOPLE:
            return f"{self.file}: edited, which only people read"
        said = {
            "changed": "is not as it was written",
            "missing": "is gone",
            "surplus": "was not there when it was written",
        }
        return f"{self.file}: {self.what or said[self.kind]}"


def sealed(directory: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with the seal of all files in `directory`; an earlier seal is replaced."""
    # as it will be read
    bare = json.loads(json.dumps({key: value for key, value in manifest.items() if key != SEAL}))
    files = {name: _seal(path, name) for name, path in _files(directory) if name != MANIFEST}
    return {**bare, SEAL: msgspec.to_builtins(Seal(_digest(bare), files))}


def _seal(path: Path, name: str) -> Sealed:
    return Sealed(path.stat().st_size, sha256(path), _values(path) if name in SETTINGS else None)


def sha256(path: Path, count: Count | None = None) -> str:
    """The digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            if count is not None:
                count(len(chunk))
    return digest.hexdigest()


def read_seal(directory: Path) -> tuple[Seal | None, dict[str, Any]]:
    """(the seal, or None where the checkpoint was written before there was one; the manifest).
    Raises `CheckpointError`.
    """
    manifest = read_manifest(directory)
    if SEAL not in manifest:
        return None, manifest
    try:
        return msgspec.convert(manifest[SEAL], Seal), manifest
    except msgspec.ValidationError as failure:
        raise CheckpointError(
            f"{directory / MANIFEST}: {SEAL}: {failure}; the checkpoint is damaged"
        ) from failure


def differences(
    directory: Path, seal: Seal, manifest: dict[str, Any], count: Count | None = None
) -> list[Difference]:
    """What is not as it was written. With `count` every byte is read; without, weights are compared
    by their size only.
    """
    here, found = dict(_files(directory)), []
    if _digest({key: value for key, value in manifest.items() if key != SEAL}) != seal.manifest:
        found.append(Difference(MANIFEST, "changed"))
    for name, was in sorted(seal.files.items()):
        path = here.get(name)
        if path is None:
            found.append(Difference(name, "missing"))
        elif name.endswith(WEIGHTS) and (size := path.stat().st_size) != was.bytes:
            found.append(Difference(name, "changed", f"has {size:,} bytes, had {was.bytes:,}"))
        elif (count is not None or not name.endswith(WEIGHTS)) and sha256(
            path, count
        ) != was.sha256:
            found.append(
                Difference(name, "changed", ", ".join(_changes(was.values, _values(path))))
            )
    return found + [
        Difference(name, "surplus")
        for name in sorted(here)
        if name not in seal.files and name != MANIFEST
    ]


def warn_of_changes(directory: Path) -> None:
    """One warning where the small files of a checkpoint are not as grasp wrote them: people do edit
    a config, and forget that they did.
    """
    if not (directory / MANIFEST).is_file():
        return
    seal, manifest = read_seal(directory)
    found = [] if seal is None else differences(directory, seal, manifest)
    told = [
        d
        for d in found
        if d.file not in FOR_PEOPLE
        and (d.kind != "surplus" or d.file in SOUGHT or d.file.endswith(WEIGHTS))
    ]
    if told:
        logger.warning(
            "%s: changed after it was written: %s; it is loaded as it is now (`grasp verify`"
            " compares the weights too)",
            directory,
            "; ".join(map(str, told)),
        )


def _files(directory: Path) -> Iterator[tuple[str, Path]]:
    """(path in the directory, file), hidden ones left out: they are a version control's or a
    download's.
    """
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        if path.is_file() and not any(
            part.startswith(".") or part == "__pycache__" for part in name.parts
        ):
            yield name.as_posix(), path


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _values(path: Path) -> dict[str, Any] | None:
    """The contents of a settings file; None where it is no JSON object, or holds a NaN or an
    infinity, which are no JSON.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_json)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _no_json(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _changes(was: dict[str, Any] | None, now: dict[str, Any] | None, most: int = 5) -> list[str]:
    """The fields whose values differ, at most so many of them."""
    if was is None or now is None:
        return []
    before, after = dict(_flat(was)), dict(_flat(now))
    keys = [key for key in sorted({*before, *after}) if _word(before, key) != _word(after, key)]
    said = [f"{key} is {_word(after, key)}, was {_word(before, key)}" for key in keys]
    return [*said[:most], *([f"and {len(said) - most} more fields"] if len(said) > most else [])]


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _word(values: dict[str, Any], key: str) -> str:
    if key not in values:
        return "not there"
    text = json.dumps(values[key], ensure_ascii=False)
    return (
        text
        if len(text) <= 60
        else f"{text[:40]}… ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
    )
