"""Weights in 8 to 3 bits, on top of low rank or alone.

quantize()  model -> the same model with every linear of its decoder layers rounded, saved
    1. check, load; find the dense matrices and the low-rank pairs; embedding and head where asked
    2. round each of their matrices (grasp.core.rounding), put them in place
    3. save, with what was done in the manifest
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.core.checkpoint import save
from grasp.core.classes import settle_class
from grasp.core.compressed_tensors import BITS, COMPRESSED_TENSORS, GROUPS, divisors
from grasp.core.decoder import Decoder
from grasp.core.destination import check_destination, name_of
from grasp.core.edits import Quantize
from grasp.core.edits.placing import vocabulary
from grasp.core.fields import PathLike
from grasp.core.layer import is_quantized, matrix_in
from grasp.core.layers.modeling_grasp import NAMES
from grasp.core.layers.packing_grasp import DYNAMIC, SYMMETRIC
from grasp.core.layers.quantized_grasp import SLICE
from grasp.core.manifest import MANIFEST, read_manifest
from grasp.core.models import open_model
from grasp.core.progress import Progress, silent
from grasp.core.proof import check_savable
from grasp.core.provenance import Clock, describe_model, versions
from grasp.core.rounding import matrices_of, rounded
from grasp.core.sayable import check_sayable
from grasp.core.seal import SEAL
from grasp.errors import RecipeError
from grasp.recipes.keywords import keywords
from grasp.recipes.model import ModelSource
from grasp.recipes.quantization import QuantizationRecipe
from grasp.report.card import model_card, picture_for

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Quantization:
    """What `quantize` did. `manifest` is what `grasp.json` holds, its part "quantization" about
    this; `path` None if nothing was written.
    """

    decoder: Decoder = field(repr=False)
    manifest: dict[str, Any] = field(repr=False)
    path: Path | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The quantized model, an ordinary Hugging Face one."""
        return self.decoder.model


@keywords
def quantize(
    source: ModelSource,
    out: PathLike | None = None,
    *,
    recipe: QuantizationRecipe,
    progress: Progress = silent,
) -> Quantization:
    """Round the linears of the decoder layers, dense ones and the factors of low-rank pairs, to 8
    bits or fewer; with `embeddings` below 16 the embedding and the head too.

    Args:
        out: directory to write; must not exist or be empty. None: nothing is written.

    Raises:
        GraspError: one line that names the argument, its value, what is allowed and the way out.
    """
    kind = _kind(recipe)
    clock = Clock()
    if out is not None:
        check_destination(Path(out), 0, source.model)
    decoder = open_model(**vars(source))
    settle_class(decoder)
    _check_model(decoder, recipe)
    decoder.check_finite()
    if out is not None:
        check_savable(decoder)
    manifest, before = _manifest(decoder), decoder.num_bytes()
    command = _command(decoder, out, recipe, source.dtype)
    clock.lap("load")
    errors = dict(_round_all(decoder, kind, recipe, progress))
    clock.lap("rounding")
    numbers = sum(count for count, _ in errors.values())
    found = sorted(error for _, error in errors.values())
    manifest["quantization"] = {
        "scheme": kind,
        "bits": recipe.bits,
        "activations": recipe.activations,
        "group_size": recipe.group_size if min(recipe.bits, recipe.embeddings) < 8 else None,
        "embeddings": recipe.embeddings,
        "matrices": len(errors),
        "share": numbers / decoder.num_parameters(),
        "error_median": found[len(found) // 2],
        "error_largest": found[-1],
        "bytes_before": before,
        "bytes_after": decoder.num_bytes(),
        "checkpoint": Path(decoder.source).name,
        "command": command,
        "versions": versions(),
        "seconds": clock.laps,
    }
    if out is not None:
        card = model_card(manifest, name_of(Path(out)))
        save(decoder, Path(out), manifest, card, picture_for(manifest))
    return Quantization(decoder, manifest, None if out is None else Path(out))


def _kind(recipe: QuantizationRecipe) -> str:
    """The name of what is asked for. Raises `RecipeError` for a combination that there is not."""
    if recipe.layout == COMPRESSED_TENSORS:
        _check_layout(recipe)
    if recipe.activations == "float":
        symmetric = recipe.layout == COMPRESSED_TENSORS and recipe.bits == 4
        return SYMMETRIC if symmetric else f"int{recipe.bits}"
    if recipe.bits != 8:
        raise RecipeError(
            f"--activations {recipe.activations}: needs --bits 8, not --bits {recipe.bits}; give"
            " that, or leave --activations out"
        )
    return DYNAMIC


def _check_layout(recipe: QuantizationRecipe) -> None:
    """Raise `RecipeError` for what --layout compressed-tensors has no words for."""
    flag = f"--layout {recipe.layout}"
    if recipe.bits not in BITS:
        raise RecipeError(f"{flag} --bits {recipe.bits}: it has 8 and 4 bits; take one of these")
    if recipe.bits < 8 and recipe.group_size not in GROUPS:
        allowed = ", ".join(map(str, GROUPS))
        raise RecipeError(f"{flag} --group-size {recipe.group_size}: it has groups of {allowed}")
    if recipe.embeddings < 16:
        raise RecipeError(
            f"{flag} --embeddings {recipe.embeddings}: servers keep these in 16 bits; leave"
            " --embeddings out"
        )


def _check_groups(decoder: Decoder, recipe: QuantizationRecipe) -> None:
    """Raise `RecipeError` for a matrix that --layout compressed-tensors cannot cut into whole
    groups.
    """
    for layer in decoder.layers():
        for linear in layer.linears.values():
            columns = linear.shape[1]
            if columns % recipe.group_size:
                fit = ", ".join(map(str, divisors(columns)))
                raise RecipeError(
                    f"--layout {recipe.layout} --group-size {recipe.group_size}: '{linear.path}'"
                    f" has {columns} columns, which is no multiple;"
                    f" {f'take one of {fit}' if fit else 'take --bits 8'}"
                )


def _check_model(decoder: Decoder, recipe: QuantizationRecipe) -> None:
    """Raise `RecipeError` for a model that cannot be rounded so, and warn where it loses much."""
    written = getattr(decoder.config, "quantization_config", None) or getattr(
        decoder.model.config, "quantization_config", None
    )
    foreign = written is not None and getattr(written, "quant_method", "") not in NAMES
    if foreign or any(is_quantized(module) for module in decoder.model.modules()):
        raise RecipeError(
            f"MODEL {decoder.source}: is quantized already; give the model it was made from"
        )
    if recipe.layout == COMPRESSED_TENSORS:
        check_sayable(decoder, f"--layout {recipe.layout}", "leave --layout out")
        if recipe.bits < 8:
            _check_groups(decoder, recipe)
    pivoted = sum(bool(getattr(module, "pivoted", False)) for module in decoder.model.modules())
    if pivoted and recipe.bits < 8:
        raise RecipeError(
            f"--bits {recipe.bits}: {pivoted} pairs of {decoder.source or 'the model'} are"
            " pivoted, and rounding them so coarsely leaves noise; use --bits 8, or `grasp compress"
            " --storage pair` first"
        )
    if pivoted and recipe.activations == "int8":
        logger.warning(
            "%d pairs are pivoted and lose far more by rounded activations than plain pairs do;"
            " better leave --activations out, or `grasp compress --storage pair` first",
            pivoted,
        )


def _command(
    decoder: Decoder, out: PathLike | None, recipe: QuantizationRecipe, dtype: str | None
) -> str:
    """The command line that does this again."""
    words = ["grasp", "quantize", Path(decoder.source).name, name_of(Path(out or "OUT"))]
    words += ["--bits", str(recipe.bits)]
    rounds_both = recipe.activations != "float"
    words += ["--activations", recipe.activations] if rounds_both else []
    grouped = min(recipe.bits, recipe.embeddings) < 8
    words += ["--group-size", str(recipe.group_size)] if grouped else []
    words += ["--embeddings", str(recipe.embeddings)] if recipe.embeddings < 16 else []
    words += ["--layout", recipe.layout] if recipe.layout == COMPRESSED_TENSORS else []
    return shlex.join([*words, *(["--dtype", dtype] if dtype else [])])


def _manifest(decoder: Decoder) -> dict[str, Any]:
    """The manifest of the checkpoint that is quantized, or the beginnings of one for a model that
    grasp did not write.
    """
    place = Path(decoder.source)
    if decoder.source and (place / MANIFEST).is_file():
        return {
            key: value
            for key, value in read_manifest(place).items()
            if key not in ("format_version", SEAL)
        }
    size = decoder.num_parameters()
    return {
        "model": describe_model(decoder),
        "method": {"name": "dense", "paper": ""},
        "edits": [],
        "parameters": {"before": size, "after": size, "ratio": 0.0},
        "versions": versions(),
    }


def _round_all(
    decoder: Decoder, kind: str, recipe: QuantizationRecipe, progress: Progress
) -> Iterator[tuple[str, tuple[int, float]]]:
    """Round every linear and pair of the decoder layers, and what is asked for outside them. Yields
    (path of a matrix, (its numbers, relative error of the rounding)).
    """
    schemes = {
        f"{decoder.family.layers}.{index}.{name}": kind
        for index, layer in enumerate(decoder.stack)
        for _, name in decoder.family.matrices
        if matrix_in(layer, name) is not None
    }
    if recipe.embeddings < 16:
        schemes |= dict.fromkeys(vocabulary(decoder), f"int{recipe.embeddings}")
    for done, (path, scheme) in enumerate(schemes.items()):
        progress("rounding", done, len(schemes))
        module: Any = decoder.model.get_submodule(path)
        matrices = matrices_of(module)
        if not matrices:
            continue
        tensors: dict[str, Tensor] = {}
        for name, matrix in matrices.items():
            tensors |= rounded(name, matrix, scheme, recipe.group_size, module.weight.dtype)
        Quantize(path, scheme, recipe.group_size, tensors).apply(decoder)
        new: Any = decoder.model.get_submodule(path)
        for name, matrix in matrices.items():
            yield f"{path}.{name}", (matrix.numel(), _error(new, name, matrix))
    progress("rounding", len(schemes), len(schemes))


def _error(module: Any, name: str, matrix: Tensor) -> float:
    """Norm of what rounding changed, over that of the matrix; in slices of rows."""
    change = whole = 0.0
    step = max(1, SLICE // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), step):
        rows = slice(start, start + step)
        here = matrix[rows].float()
        change += float((module.dequantized(name, rows).float() - here).square().sum())
        whole += float(here.square().sum())
    return (change / max(whole, torch.finfo(torch.float32).tiny)) ** 0.5
