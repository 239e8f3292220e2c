"""How modules are put in place, and the config kept equal to the model. Every edit goes through
here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from grasp.core.axes import WIDTHS
from grasp.core.building import INDEX
from grasp.core.decoder import Decoder
from grasp.core.edits.base import Undo
from grasp.core.edits.widths import settle
from grasp.core.layer import is_dense
from grasp.core.layers.embedding_grasp import EMBEDDING, HEAD, tie
from grasp.core.layers.low_rank_grasp import fuse
from grasp.core.layers.modeling_grasp import GraspConfig, carry_code, plain_class
from grasp.core.layers.reading_grasp import record_of
from grasp.core.layers.structure_grasp import structure_of


def put(decoder: Decoder, modules: Mapping[str, nn.Module]) -> Undo:
    """Put `modules` at the paths of embedding, head or matrices of decoder layers, {(path of the
    model as loaded): module}.
    """
    homes = {path: home(decoder, path) for path in modules}
    owners = {path: owner for path, (owner, _) in homes.items()}
    names = {path: name for path, (_, name) in homes.items()}
    before = {path: owners[path].get_submodule(names[path]) for path in modules}
    restore = remember(decoder)

    def place(found: Mapping[str, nn.Module]) -> None:
        for path, module in found.items():
            owners[path].set_submodule(names[path], module)
        for owner in {id(owner): owner for owner in owners.values()}.values():
            fuse(owner)  # as loading does, so that the model computes the same before it is saved
        tie(decoder.model)

    place(modules)
    sync(decoder)

    def undo() -> None:
        place(before)
        restore()

    return undo


def home(decoder: Decoder, path: str) -> tuple[nn.Module, str]:
    """(module, path inside it) of a path of the model as loaded: the model itself for embedding and
    head, else a decoder layer. Raises `RecipeError` where it names none.
    """
    in_layers = path.startswith(f"{decoder.family.layers}.")
    if not in_layers and path in vocabulary_paths(decoder).values():
        return decoder.model, path
    index, name = decoder.locate(path)
    return decoder.layer(index).module, name


def vocabulary_paths(decoder: Decoder) -> dict[str, str]:
    """{"embedding": its path, "head": its path}, of a model that has one."""
    model: Any = decoder.model
    ends = {EMBEDDING: model.get_input_embeddings(), HEAD: model.get_output_embeddings()}
    paths = {id(module): path for path, module in model.named_modules()}
    return {what: paths[id(end)] for what, end in ends.items() if id(end) in paths}


def vocabulary(decoder: Decoder) -> list[str]:
    """Paths of the embedding, and of the head where it has numbers of its own."""
    weights: dict[int, str] = {}
    for path in vocabulary_paths(decoder).values():
        weights.setdefault(id(decoder.module(path).weight), path)
    return list(weights.values())


def remember(decoder: Decoder) -> Undo:
    """What brings back the model's class, its config, the list of layers and what became narrow in
    them (`widths.settle` puts others there) as they are now.
    """
    model, layers, kept = decoder.model, list(decoder.stack), list(decoder.kept)
    kind = type(model)
    configs = [model.config, *([] if decoder.config is model.config else [decoder.config])]
    values = [dict(vars(config)) for config in configs]
    indices = [
        (module, name, value)
        for layer in layers
        for module in layer.modules()
        for name in (*INDEX, *WIDTHS)
        if isinstance(value := vars(module).get(name), int)
    ]
    narrow = [
        (layer, path, module)
        for layer in layers
        for path, module in layer.named_modules()
        if record_of(module) is not None and is_dense(module)
    ]

    def restore() -> None:
        model.__class__ = kind
        for config, value in zip(configs, values, strict=True):
            vars(config).clear()
            vars(config).update(value)
        stack = decoder.stack
        if list(stack) != layers:
            del stack[:]
            stack.extend(layers)
        decoder.kept[:] = kept
        for layer, path, module in narrow:
            layer.set_submodule(path, module)
        for module, name, index in indices:
            setattr(module, name, index)

    return restore


def renumber(decoder: Decoder) -> None:
    """Give every layer its place in the list as its index: key-value caches keep entries by it."""
    for index, layer in enumerate(decoder.stack):
        for module in layer.modules():
            for name in INDEX:
                if isinstance(vars(module).get(name), int):
                    setattr(module, name, index)


def sync(decoder: Decoder) -> None:
    """Keep what the config says of the structure equal to the model: it is what a loader rebuilds
    the model from. What can be said without a record of ours is (`widths.settle`).
    """
    settle(decoder)
    model = decoder.model
    tie(model)
    structure = structure_of(model)
    if structure:
        model.config.quantization_config = GraspConfig(structure)
        carry_code(model)
    elif plain_class(type(model)) is not type(model):  # it has become an ordinary one again
        model.__class__ = plain_class(type(model))
        for mark in ("auto_map", "quantization_config"):
            vars(model.config).pop(mark, None)


def stored(module: Any, matrix: Any) -> Any:
    """A matrix (out, in) in the orientation in which `module` stores it: GPT-2's is (in, out)."""
    return matrix if isinstance(module, nn.Linear) else matrix.T.contiguous()
