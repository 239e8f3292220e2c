"""The proof that a checkpoint is the model it was made from: asked before the work (can it be
written at all?) and after the writing.

`prove` loads what was written, as a user will, and compares it with the model in memory:

1. the settings of the decoder layers' modules, such as the window of an attention: they are built
   from the config, and one that follows from the layer's index alone changes when a layer before it
   is dropped;
2. every weight and buffer, in the coarser dtype where it was rounded;
3. the logits of a few tokens that span the vocabulary, and the greedy token that follows.

Same process, same device, same kernels: the logits are equal, but for the order of sums, which may
depend on where a tensor lies in memory or on the attention kernel of the model in memory. So two
thirds of the digits of the weights' dtype must agree, relative to the largest logit: 2e-5 of it in
float32, 1 % in float16, 4 % in bfloat16. Cost: one load and two short passes; memory for one more
model as small as the one that is saved, or where its layers are on the disk, for what is not in
layers.
"""

from __future__ import annotations

import errno
import importlib.util
import logging
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from grasp.core.building import layers_differ
from grasp.core.decoder import Decoder
from grasp.core.layers.packing_grasp import DYNAMIC
from grasp.core.models import load_model
from grasp.errors import CheckpointError, GraspError, ModelError

logger = logging.getLogger(__name__)

ROWS, TOKENS = 2, 16
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
ROOM = 1.2
"""Memory that a second model on a GPU may need, over the bytes of its weights; where there is less,
it is looked at on the CPU.
"""


def check_savable(decoder: Decoder) -> None:
    """Write config, generation config and tokenizer to a temporary folder and read the config
    again: what can be wrong there can be found before any work is done. Raises `ModelError`, naming
    the part.
    """
    trust, name = _runs_own_code(decoder), decoder.source or type(decoder.model).__name__
    generation, tokenizer = decoder.model.generation_config, decoder.tokenizer
    part, way_out = "the config", "change model.config"
    try:
        with tempfile.TemporaryDirectory(prefix="grasp-") as folder:
            decoder.model.config.save_pretrained(folder)
            AutoConfig.from_pretrained(folder, trust_remote_code=trust)
            if generation is not None:
                part = "the generation config"
                way_out = "change model.generation_config, or generation_config.json"
                generation.save_pretrained(folder)
            if tokenizer is not None:
                part, way_out = "the tokenizer", "give another one"
                tokenizer.save_pretrained(folder)
    except Exception as failure:  # anything a class of the user's may raise
        # this folder's fault, not the model's, in the words of Python or of a library in Rust
        no_room = isinstance(failure, OSError) and failure.errno in NO_ROOM
        if no_room or "(os error " in str(failure):
            return
        reason = textwrap.shorten(" ".join(str(failure).split()), 300, placeholder="…")
        raise ModelError(
            f"MODEL {name}: {part} could not be saved: {reason}; {way_out}"
        ) from failure


def _runs_own_code(decoder: Decoder) -> bool:
    """Whether Python code of the model's repository runs here already, so that reading it again
    asks for no more trust than was given.
    """
    return any(
        type(part).__module__.startswith("transformers_modules.")
        for part in (decoder.model, decoder.config, decoder.tokenizer)
    )


def question(decoder: Decoder) -> Tensor:
    """A few tokens (rows, tokens) that span the vocabulary."""
    longest = getattr(decoder.config, "max_position_embeddings", None) or TOKENS
    length = max(1, min(TOKENS, longest))
    return (
        torch.linspace(0, decoder.config.vocab_size - 1, ROWS * length).long().reshape(ROWS, length)
    )


@torch.no_grad()
def answer(decoder: Decoder) -> Tensor:
    """The logits (rows, tokens, vocabulary) of those tokens."""
    logits: Tensor = decoder.model(
        input_ids=question(decoder).to(decoder.device), use_cache=False
    ).logits
    return logits.float().cpu()


def prove(decoder: Decoder, said: Tensor, written: Path, out: Path) -> None:
    """Raise `CheckpointError` where the checkpoint in the folder `written`, meant for `out`, is not
    the model of `decoder`.

    `said`: what `answer` gave before it was written.
    """
    again = loaded_again(decoder, written, out)
    differs = next(_differences(decoder, again), None)
    if differs is not None:
        raise _not_the_model(out, differs)
    compare(said, answer(again), _digits(again), out)


def loaded_again(decoder: Decoder, written: Path, out: Path) -> Decoder:
    """The checkpoint in the folder `written`, meant for `out`. Raises `CheckpointError`."""
    try:
        with _quiet():
            return load_model(
                str(written),
                device=_device(decoder),
                trust_remote_code=_runs_own_code(decoder),
                offload=None if decoder.offload is None else decoder.offload.beside(),
            )
    except GraspError as failure:
        reason = str(failure).replace(str(written), out.name)
        raise CheckpointError(
            f"OUT {out}: the model was written, but does not load again ({reason}); nothing was"
            " left behind"
        ) from failure


@contextmanager
def _quiet() -> Iterator[None]:
    """What loading warns of was said when the model was first read."""
    words = logging.getLogger("grasp.core")
    level = words.level
    words.setLevel(logging.ERROR)
    try:
        yield
    finally:
        words.setLevel(level)


def _device(decoder: Decoder) -> str:
    device = decoder.device
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < ROOM * decoder.num_bytes():
        return "cpu"
    return str(device)


def _differences(decoder: Decoder, again: Decoder) -> Iterator[str]:
    """What differs between two models that should be one: layers, settings of their modules,
    weights.
    """
    mine, theirs = _layers(decoder), _layers(again)
    if len(mine) != len(theirs):
        yield f"it has {len(theirs)} layers, the model {len(mine)}"
        return
    for what in layers_differ(mine, theirs):
        yield (
            f"{what} (settings are built from the config and the layer's index, which a dropped"
            " layer shifts)"
        )
    stored = _tensors(again.model)
    for name, tensor in _tensors(decoder.model).items():
        if name in stored and not tensor.is_meta:
            with decoder.holding(tensor), again.holding(stored[name]):
                is_same = _same(tensor, stored[name])
            if not is_same:
                yield f"the weight '{name}' is another one"


def _layers(decoder: Decoder) -> nn.ModuleList:
    """The decoder layers; none of a model that is only run, whose layers are not understood."""
    try:
        return decoder.stack
    except ModelError:
        return nn.ModuleList()


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _same(here: Tensor, there: Tensor) -> bool:
    """Whether two tensors are equal in the coarser of their dtypes: saving rounds to the model's,
    and a cast model rounds its buffers.
    """
    if here.shape != there.shape:
        return False
    if here.dtype != there.dtype and here.is_floating_point() and there.is_floating_point():
        coarse = max(here.dtype, there.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        here, there = here.to(coarse), there.to(coarse)
    return torch.equal(here.to(there.device), there)


ROUNDED = 0.2
"""The part of the largest logit that an export may be off whose runtime rounds to 8 bits, matrices
or activations: it is not the model, but close to it.
"""


def can_try(format: str, package: str) -> bool:
    """Whether the package that runs an export is installed; if not, a warning says so."""
    if importlib.util.find_spec(package) is not None:
        return True
    logger.warning(
        "--format %s: not tried, since %s is not installed; `pip install %s` lets the export be"
        " tried",
        *(format, package, package.replace("_", "-")),
    )
    return False


def can_read_gguf(decoder: Decoder) -> bool:
    """Whether transformers reads GGUF files of the model's architecture; if not, a warning says
    so.
    """
    if decoder.config.model_type in GGUF_SUPPORTED_ARCHITECTURES:
        return True
    logger.warning(
        "--format gguf: not tried, since transformers reads no GGUF files of %s",
        decoder.config.model_type,
    )
    return False


def digits_of(dtype: torch.dtype) -> float:
    """The part of the largest logit that may be lost to the order of sums: a third of the digits of
    the weights' dtype.
    """
    return float(torch.finfo(dtype).eps ** (2 / 3))


def _digits(decoder: Decoder) -> float:
    """As `digits_of` the model's dtype; where activations are rounded to 8 bits, no more than
    theirs.
    """
    coarse = any(getattr(module, "scheme", "") == DYNAMIC for module in decoder.model.modules())
    return max(digits_of(decoder.model.dtype), digits_of(torch.bfloat16) if coarse else 0.0)


def compare(said: Tensor, heard: Tensor, digits: float, out: Path) -> None:
    """Raise `CheckpointError` where two sets of logits (rows, tokens, vocabulary) differ by more
    than `digits` of the largest one.
    """
    if said.shape != heard.shape:
        raise _not_the_model(
            out, f"it gives logits {tuple(heard.shape)}, the model {tuple(said.shape)}"
        )
    if torch.equal(said.nan_to_num(), heard.nan_to_num()) and torch.equal(
        said.isnan(), heard.isnan()
    ):
        return
    most, allowed = float((said - heard).abs().max()), digits * float(said.abs().max())
    # what the model thinks of its next tokens
    lost = said.amax(-1) - said.gather(-1, heard.argmax(-1, keepdim=True))[..., 0]
    if not most <= allowed:
        raise _not_the_model(
            out, f"its logits differ by {most:.3g}, where rounding explains {allowed:.3g}"
        )
    if not float(lost.max()) <= allowed:
        raise _not_the_model(
            out,
            f"the tokens it would choose are less likely in the model by {float(lost.max()):.3g} in"
            " the logit",
        )


def _not_the_model(out: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"OUT {out}: the checkpoint, as it loads again, is not the model: {what}; nothing was left"
        " behind"
    )
