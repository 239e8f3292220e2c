"""Which parameters are trained, and how they come back into a checkpoint.

    factors   what edits put there: the two factors of every low-rank pair, and narrowed matrices
    layers    every parameter of the layers that an edit touched; of a model with layers removed
              and nothing else, of all that are left
    lora      a peft adapter on every dense matrix of the decoder layers, narrowed ones too; pairs,
              which are thin already, are trained as they are, so that everything merges exactly
              and no rank changes. With `keep_adapter` pairs get an adapter too, and nothing is
              merged. With `lora_on` "output-factors" or "input-factors" the adapters are on that
              factor B or A of every pair, `B + scale b a`, and all else is frozen

What is trained is kept in float32, whatever the rest is in.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grasp.compensation.recipe import Recipe
from grasp.core.decoder import Decoder
from grasp.core.edits import EditLog
from grasp.core.edits.slicing import check_unsliced
from grasp.core.layer import is_dense, is_low_rank
from grasp.core.layers.low_rank_grasp import fuse
from grasp.errors import NumericsError, RecipeError


def choose(decoder: Decoder, recipe: Recipe, log: EditLog) -> nn.Module:
    """Mark what is trained (`requires_grad`) and return the model to train: the same one, or peft's
    wrapper around it.

    `log`: the edits that made it.
    """
    model = decoder.model
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    check_trainable(decoder, recipe, log)
    # each factor gets memory of its own below; products are shared only where no gradient is
    fuse(model, together=False)
    if recipe.lora_on != "matrices":
        for path in _factors(decoder, recipe):  # or small changes would be lost in rounding
            parameter = model.get_parameter(path)
            parameter.data = parameter.detach().float()
    adapted = _targets(decoder, recipe) if recipe.train == "lora" else []
    trained = wrap(decoder, recipe) if recipe.train == "lora" else model
    if not recipe.keep_adapter and recipe.lora_on == "matrices":
        for path in names_in(decoder, recipe, log):
            if path.rpartition(".")[0] not in adapted:
                model.get_parameter(path).requires_grad_(True)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.detach().float().clone()
    return trained


def names_in(decoder: Decoder, recipe: Recipe, log: EditLog) -> list[str]:
    """Paths of the parameters that are trained as they are; of `lora`, those that could be."""
    if recipe.train != "layers":
        return list(log.trainable(decoder.family))
    return [
        f"{decoder.family.layers}.{place}.{name}"
        for place in log.places or range(len(decoder.stack))
        for name, _ in decoder.stack[place].named_parameters()
    ]


def check_trainable(decoder: Decoder, recipe: Recipe, log: EditLog) -> None:
    """Raise `RecipeError` where there is nothing that `recipe` could train."""
    if recipe.objective in ("layer", "block"):
        check_unsliced(decoder, "no layer's output is like the teacher's; take another --objective")
    if recipe.lora_on != "matrices" and not _factors(decoder, recipe):
        raise RecipeError(
            f"--lora-on {recipe.lora_on}: {decoder.source} has no low-rank matrix; use --lora-on"
            " matrices"
        )
    if recipe.lora_on != "matrices":
        return
    if log.trainable(decoder.family):
        if recipe.train == "lora" and not _targets(decoder, recipe):
            raise RecipeError(
                f"--train lora: every matrix of {decoder.source} is a low-rank pair already, so"
                " none is left to put an adapter on; use --train factors, which trains them, or"
                " --keep-adapter"
            )
        return
    if not log.layers:
        raise RecipeError(
            f"DIR {decoder.source}: has neither low-rank matrices nor removed layers, so there is"
            " nothing to recover; give a compressed checkpoint"
        )
    if recipe.train == "factors":
        raise RecipeError(
            f"--train factors: {decoder.source} has no low-rank matrix; use --train lora, or layers"
            " for those that were changed, or all that are left where layers were removed"
        )


def settled(decoder: Decoder, recipe: Recipe, log: EditLog) -> Recipe:
    """The recipe with a learning rate, where it leaves that to the model.

    smollm2, `distill`: factors of 9 layers (3 % of all numbers) learn well at 1e-3, factors of
    every matrix (76 %) are undone by it and learn well at 1e-4 (docs/log.md).
    """
    if recipe.learning_rate is not None:
        return recipe
    trained = (
        decoder.num_parameters()
        if recipe.train == "layers"
        else sum(
            decoder.model.get_parameter(path).numel() for path in log.trainable(decoder.family)
        )
    )
    few = recipe.train == "lora" or trained < decoder.num_parameters() / 10
    return replace(recipe, learning_rate=1e-3 if few else 1e-4)


def wrap(decoder: Decoder, recipe: Recipe) -> nn.Module:
    """`decoder.model` with fresh LoRA adapters."""
    from peft import LoraConfig, get_peft_model

    targets = _targets(decoder, recipe)
    factors = _factors(decoder, recipe)
    transposed = bool(targets) and not isinstance(
        decoder.model.get_submodule(targets[0]), nn.Linear
    )
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=targets,
        target_parameters=factors or None,
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(recipe.seed)
    with warnings.catch_warnings():
        # of GPT-2's Conv1D some may be linears now, and peft finds out by itself
        warnings.filterwarnings("ignore", "fan_in_fan_out is set")
        wrapped = get_peft_model(decoder.model, config)
    torch.random.set_rng_state(state)
    return wrapped


def _factors(decoder: Decoder, recipe: Recipe) -> list[str]:
    """Paths of the factors that get an adapter: one of every pair, as far as it holds numbers."""
    name = {"output-factors": "weight", "input-factors": "weight_in"}.get(recipe.lora_on)
    if name is None:
        return []
    return [
        f"{decoder.family.layers}.{index}.{path}.{name}"
        for index, layer in enumerate(decoder.stack)
        for path, module in layer.named_modules()
        if is_low_rank(module) and module.get_parameter(name).numel()
    ]


def _targets(decoder: Decoder, recipe: Recipe) -> list[str]:
    """Paths of the matrices that get an adapter: the dense ones, and with an adapter that is kept
    the pairs too.
    """
    if recipe.lora_on != "matrices":
        return []
    names = {name for _, name in decoder.family.matrices}
    return [
        f"{decoder.family.layers}.{index}.{name}"
        for index, layer in enumerate(decoder.stack)
        for name, module in layer.named_modules()
        if name in names and (recipe.keep_adapter or is_dense(module))
    ]


def bring_back(decoder: Decoder, recipe: Recipe, state: Mapping[str, Tensor]) -> None:
    """Put the trained `state` into the checkpoint it was trained from, as that was stored; adapters
    are merged.

    Raises `NumericsError` where a weight is not finite in the checkpoint's own precision.
    """
    fuse(decoder.model, together=False)
    if recipe.train == "lora":
        wrapped: Any = wrap(decoder, recipe)
        _fill(wrapped, state)
        decoder.model = wrapped.merge_and_unload(safe_merge=True)
    elif decoder.offload is None:
        _fill(decoder.model, state)
    else:
        for place, layer in enumerate(decoder.stack):
            begin = f"{decoder.family.layers}.{place}."
            with decoder.changing(layer):
                _fill(decoder.model, {n: state[n] for n in state if n.startswith(begin)})
    for parameter in decoder.model.parameters():
        parameter.requires_grad_(False)
    fuse(decoder.model)


def write_adapter(
    decoder: Decoder,
    recipe: Recipe,
    state: Mapping[str, Tensor],
    folder: Path,
    base: str,
) -> None:
    """The trained `state` as a peft adapter for the checkpoint `base`. The decoder is wrapped in it
    afterwards.
    """
    wrapped: Any = wrap(decoder, recipe)
    _fill(wrapped, state)
    wrapped.peft_config["default"].base_model_name_or_path = base
    wrapped.save_pretrained(folder, save_embedding_layers=False)


@torch.no_grad()
def _fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    known = dict(model.named_parameters())
    for name, value in state.items():
        known[name].copy_(value)
        if not bool(torch.isfinite(known[name]).all()):
            raise NumericsError(
                f"'{name}': the trained weight is not finite in {known[name].dtype}"
            )


def numbers(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
