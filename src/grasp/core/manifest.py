"""`grasp.json`, the manifest beside the weights of a checkpoint: how the model was made, and in which format it is stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grasp.errors import CheckpointError

MANIFEST = "grasp.json"
FORMAT_VERSION = 3
"""As in `modeling_grasp` (a test compares them), which is not imported: reading a manifest needs no torch."""


def read_manifest(directory: Path) -> dict[str, Any]:
    """The contents of `grasp.json`. Raises `CheckpointError` where it is missing, damaged or of a newer format."""
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = int(manifest["format_version"])
    except (OSError, ValueError, KeyError, TypeError) as failure:
        raise CheckpointError(f"{path}: cannot be read ({failure}); the checkpoint is damaged") from failure
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format {version} was written by a newer grasp, this one reads up to {FORMAT_VERSION}; run `pip install -U grasp-llm`"
        )
    return manifest
