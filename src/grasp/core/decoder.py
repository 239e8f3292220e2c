"""`Decoder`: a typed view of a Hugging Face causal language model.

Paths and layer indices are always those of the model as it was loaded: dropping layer 3 does not
rename layer 4.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grasp.core.bos import block_bos, told_in
from grasp.core.families import Family, select
from grasp.core.inspecting import find_family
from grasp.core.layer import Layer, Linear, is_dense, is_low_rank, is_quantized, matrix_in
from grasp.core.layers.modeling_grasp import auto_classes
from grasp.core.layers.reading_grasp import text_decoder
from grasp.core.linalg import count_non_finite, wide
from grasp.core.progress import Progress, silent
from grasp.core.scratch import Scratch
from grasp.errors import ModelError, NumericsError, RecipeError

if TYPE_CHECKING:
    from grasp.core.offload import Offload

logger = logging.getLogger(__name__)


class Decoder:
    """A causal language model seen as a stack of layers of linears; of a multimodal one, its text
    decoder.

    `kept` are the indices of the layers still there. Only `grasp.core.edits` changes the model.
    Where its layers and matrices are is found out when it is first asked: a model that is only run
    may be of any kind. `beside`: files that a saved copy takes along. `offload`: where the weights
    of its layers are, if not in memory. `workers`: at how many matrices memory allows to work at
    once; None: at one a core.

    Raises `ModelError` for a model that does not give the logits of a text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        source: str = "",
    ):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.source = source or getattr(model.config, "_name_or_path", "")
        self.progress: Progress = silent
        self.beside: tuple[Path, ...] = ()
        self.offload: Offload | None = None
        self.workers: int | None = None
        check_reads_text(model)

    @cached_property
    def family(self) -> Family:
        """The row of the family table. Raises `ModelError` for a model that is not understood."""
        return find_family(self.model, self.config.model_type)

    @cached_property
    def kept(self) -> list[int]:
        """Indices of the layers still there."""
        return list(range(self.num_layers))

    @cached_property
    def num_layers(self) -> int:
        """Layers of the model as it was loaded."""
        return len(self.stack)

    @property
    def config(self) -> Any:
        """The text model's configuration."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def stack(self) -> nn.ModuleList:
        """The module list of decoder layers, as it is now."""
        return self.model.get_submodule(self.family.layers)

    @property
    def body(self) -> nn.Module:
        """The module that the layers stand in: it gives the last hidden state."""
        return self.model.get_submodule(self.family.layers.rpartition(".")[0])

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, as the model tells it."""
        return self.model.dtype

    @cached_property
    def block_bos(self) -> int | None:
        """The token every block of text must begin with, for models that need one; else None. Found
        out once, before any edit.
        """
        return block_bos(self.model, self.tokenizer, self.config, told_in(self.source))

    def layer(self, index: int) -> Layer:
        """Layer `index` of the model as loaded, with the matrices it has. Raises `RecipeError`
        where there is none (left).
        """
        if index not in self.kept:
            raise RecipeError(
                f"layer {index} is not in the model; it has layers 0 to {self.num_layers - 1}"
            )
        module = self.stack[self.kept.index(index)]
        linears = {}
        for _, name in self.family.matrices:
            child = matrix_in(module, name)
            if child is not None and is_dense(child):
                linears[name] = Linear(f"{self.family.layers}.{index}.{name}", index, name, child)
        return Layer(index, module, linears)

    def layers(self) -> Iterator[Layer]:
        """The layers still there, first to last."""
        return (self.layer(index) for index in list(self.kept))

    def linears(self, index: int, projections: Sequence[str] = ("all",)) -> list[Linear]:
        """The dense matrices of one layer that `projections` selects, in their order of use."""
        wanted = select(self.family, tuple(projections))
        return [linear for name, linear in self.layer(index).linears.items() if name in wanted]

    def replaced(self, index: int, projections: Sequence[str] = ("all",)) -> list[str]:
        """Names of those it selects that are low-rank pairs or quantized already."""
        module = self.layer(index).module
        found = [
            (name, matrix_in(module, name)) for name in select(self.family, tuple(projections))
        ]
        return [
            name
            for name, child in found
            if child is not None and (is_low_rank(child) or is_quantized(child))
        ]

    def locate(self, path: str) -> tuple[int, str]:
        """(layer index, path inside the layer) of a matrix path. Raises `RecipeError` where it
        names none.
        """
        index, _, name = path.removeprefix(self.family.layers + ".").partition(".")
        if not path.startswith(self.family.layers + ".") or not index.isdigit() or not name:
            raise RecipeError(
                f"'{path}' names no matrix of a decoder layer; an example is"
                f" '{self.family.layers}.0.{self.family.matrices[0][1]}'"
            )
        return int(index), name

    def num_parameters(self) -> int:
        """Numbers the model stores, however few bits each takes; a tied weight counts once."""
        quantized: list[Any] = [module for module in self.model.modules() if is_quantized(module)]
        stored = {p for module in quantized for p in module.parameters(recurse=False)}
        numbers = {module.weight: module.num_parameters() for module in quantized}
        whole = sum(p.numel() for p in self.model.parameters() if p not in stored)
        return whole + sum(numbers.values())

    def num_tensors(self) -> int:
        """How many parameters the model has; a tied one counts once."""
        return len(list(self.model.parameters()))

    def module(self, path: str) -> Any:
        """The module at a path of the model."""
        return self.model.get_submodule(path)

    def num_bytes(self) -> int:
        """Bytes of those numbers, as they are stored."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def holding(self, *weights: Tensor) -> AbstractContextManager[None]:
        """Inside, these weights are in memory, if they are not always."""
        return nullcontext() if self.offload is None else self.offload.holding(weights)

    def changing(self, layer: nn.Module) -> AbstractContextManager[None]:
        """Inside, the weights of a layer are in memory and may be changed."""
        return nullcontext() if self.offload is None else self.offload.changing(layer)

    def scratch(self, num_bytes: int, folder: str | Path | None = None) -> Scratch:
        """A place for sums of so many bytes: in `folder` if one is named, else where they fit."""
        if self.offload is not None:
            return self.offload.scratch(folder)
        return Scratch.for_bytes(num_bytes, self.device, folder)

    def check_finite(self) -> None:
        """Raise `NumericsError` naming the first parameter that holds a NaN or an infinity."""
        for name, parameter in self.model.named_parameters():
            with self.holding(parameter):
                bad = 0 if parameter.is_meta else count_non_finite(parameter.detach())
                if bad:
                    raise NumericsError(
                        f"the model's weight '{name}' holds {bad} non-finite numbers; it cannot be"
                        " compressed as it is"
                    )

    def loss(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, int]:
        """Cross-entropy summed over the predicted tokens of `ids` (batch, seq), in nats, and their
        number.
        """
        # batch, seq - 1, vocab
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        labels = ids[:, 1:]
        if mask is not None:
            labels = labels.masked_fill(~(mask[:, 1:].bool() & mask[:, :-1].bool()), -100)
        loss = cross_entropy(
            wide(logits.flatten(0, 1)), labels.flatten(), reduction="sum", ignore_index=-100
        )
        return loss, int((labels != -100).sum())

    @torch.no_grad()
    def first_non_finite(self, ids: Tensor, mask: Tensor | None) -> str:
        """Where a forward pass first leaves the finite numbers."""
        found: list[int] = []

        def look(index: int) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                hidden = output[0] if isinstance(output, tuple) else output
                if not bool(torch.isfinite(hidden).all()):
                    found.append(index)

            return hook

        try:
            layers = list(self.layers())
        except ModelError:
            layers = []  # of a kind that is only run
        handles = [layer.module.register_forward_hook(look(layer.index)) for layer in layers]
        try:
            self.model(input_ids=ids, attention_mask=mask, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        where = (
            "the layers' outputs are finite, the logits are not"
            if layers
            else "the logits are not finite"
        )
        where = f"layer {found[0]} is the first with a non-finite output" if found else where
        return f"{where} (dtype {self.model.dtype}; try --dtype float32)"


def check_reads_text(model: Any) -> None:
    """Raise `ModelError` for a model that cannot give the logits of a text from its ids alone."""
    name = type(model).__name__
    inner = auto_classes(type(model.config.get_text_config(decoder=True))).get(
        "AutoModelForCausalLM", type(text_decoder(model)[1])
    )
    needed = [
        word
        for word, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    if needed := [word for word in needed if word != "input_ids"]:
        raise ModelError(
            f"{name} does not read text alone (it needs {', '.join(needed)}): load its text model,"
            f" with {inner} inside, by itself"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} is an encoder with a decoder; grasp reads decoders alone, loaded by"
            " AutoModelForCausalLM"
        )
    if model.get_output_embeddings() is None and not model.can_generate():
        raise ModelError(
            f"{name} has no language-model head, so no loss to go by: load the model by"
            " AutoModelForCausalLM"
        )
