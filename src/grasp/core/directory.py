"""A local MODEL directory: what must be in it, and what it can be instead. Nothing is read but
names and a few bytes.

Weights are read from safetensors only. A pickle (`.bin`, `.pt`) can run whatever its writer put in,
so it is never opened.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from grasp.core.manifest import MANIFEST, read_manifest
from grasp.errors import CheckpointError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
POINTER = b"version https://git-lfs.github.com/spec/"
ADAPTER = "adapter_config.json"
CONVERT = (
    "python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{source}',"
    " weights_only=True).save_pretrained('NEW')\""
)
MERGE = (
    'python -c "from peft import AutoPeftModelForCausalLM as M;'
    " M.from_pretrained('{source}').merge_and_unload().save_pretrained('NEW')\""
)


def check_directory(path: Path) -> None:
    """Raise `CheckpointError` unless the directory holds a config, whole safetensors files, and no
    manifest of a newer format.
    """
    if (path / MANIFEST).is_file():
        read_manifest(path)
    if (path / ADAPTER).is_file():
        raise CheckpointError(is_adapter(str(path), _base_of(path / ADAPTER)))
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: no config.json; not a model directory")
    for file in sorted(path.iterdir()):
        check_pointer(file)
    files = sorted(path.glob("*.safetensors"))
    pickles = sorted(
        file.name
        for file in path.iterdir()
        if file.suffix in PICKLES and "training_args" not in file.name
    )
    if not files and pickles:
        raise CheckpointError(only_pickles(str(path), pickles[0]))
    if not files:
        raise CheckpointError(f"{path}: no *.safetensors file; the copy is incomplete")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as failure:
            raise CheckpointError(
                f"{file}: damaged or cut short ({failure}); copy or make the checkpoint again"
            ) from failure


def check_pointer(file: Path) -> None:
    """Raise `CheckpointError` for what git leaves in the place of a large file that was not
    fetched.
    """
    if not file.is_file() or file.stat().st_size > 1000:
        return
    with file.open("rb") as opened:
        if opened.read(len(POINTER)) == POINTER:
            raise CheckpointError(
                f"{file}: only a git-lfs pointer, the file itself was not fetched; run `git lfs"
                f" pull` in {file.parent}"
            )


def only_pickles(source: str, name: str) -> str:
    """What to say where weights are there, but not as safetensors."""
    return (
        f"{source}: its weights are pickles ({name}), which can run any code and are never opened"
        " here; where you trust them, convert them: " + CONVERT.format(source=source)
    )


def is_adapter(source: str, base: str) -> str:
    """What to say of a LoRA adapter."""
    return (
        f"{source}: holds an adapter (LoRA or the like{base}), not a whole model; merge the two"
        f" first: {MERGE.format(source=source)}"
    )


def _base_of(file: Path) -> str:
    """ " of BASE", as far as an adapter's config says it."""
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError, OSError):
        return ""
    return f", made for {found}" if isinstance(found, str) else ""
