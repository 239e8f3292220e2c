"""Why a model could not be loaded: one line for what transformers says in many."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, try_to_load_from_cache

from grasp.core.directory import ADAPTER, is_adapter, only_pickles
from grasp.errors import CheckpointError, ModelError


def explained(
    source: str, path: Path, failure: Exception, options: dict[str, Any], embedded: str
) -> ModelError | CheckpointError:
    """The error to raise where loading MODEL `source`, found at `path`, ended in `failure`;
    `embedded`: the name of a model that is always there.
    """
    reason = " ".join(str(failure).split())
    if "trust_remote_code=True" in reason:
        return ModelError(
            f"MODEL {source}: needs the code that lies beside it; read that, and if you trust it,"
            " give --trust-remote-code"
        )
    if path.is_dir():
        return CheckpointError(
            f"{source}: cannot be loaded: {textwrap.shorten(reason, 300, placeholder='…')}"
        )
    if not path.exists() and _in_hub(source, ADAPTER, options):
        return ModelError(f"MODEL {is_adapter(source, '')}")
    if (
        not path.exists()
        and "safetensors" in reason
        and (found := _in_hub(source, "pytorch_model.bin", options))
    ):
        return ModelError(f"MODEL {only_pickles(source, found.name)}")
    return ModelError(
        f"MODEL {source}: not a local directory, and the Hugging Face hub did not give it"
        f" ({textwrap.shorten(reason, 120, placeholder='…')}); check the name and the network, or"
        f" use a local directory, a .gguf file or '{embedded}'"
    )


def _in_hub(source: str, file: str, options: dict[str, Any]) -> Path | None:
    """Whether a hub repository has a file; only asked once loading failed, to say why. Nothing
    large is fetched.
    """
    try:
        if options.get("local_files_only"):
            found = try_to_load_from_cache(source, file)
            return Path(found) if isinstance(found, str) else None
        return Path(file) if HfApi().file_exists(source, file) else None
    except (OSError, ValueError):  # HFValidationError is a ValueError
        return None
