"""A row for a model of no known family, read off the model itself.

Every linear that a decoder layer calls is understood: it may become smaller, whatever it is for.
Layers may differ in which they have: a hybrid model has layers of two kinds, and `Decoder.layer`
gives of each what is there. What such a matrix is for is not known, so the row has no roles and no
axes. Experts are understood where they are kept as transformers keeps them. All else stays as it
is, and is named.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from torch import nn

from grasp.core.families import Experts, Family
from grasp.core.layer import module_in
from grasp.core.layers.experts_grasp import MATRICES, SPLIT
from grasp.core.layers.reading_grasp import text_decoder
from grasp.errors import ModelError

ADD_A_ROW = "to support it, add a row to src/grasp/core/families.py (see CONTRIBUTING.md)"
_WORTH_NAMING = 0.01
"""Share of the layers' numbers from which on it is said that a part stays as it is."""
_TAKEN = re.compile(r"self\.(\w+)\.weight\b")
"""How a module's code reads the weight of a linear of its own, instead of calling it."""


def read_off(model: nn.Module, model_type: str) -> Family:
    """The largest list of modules in the text decoder, and the linears that its layers call, all
    or some of them. Raises `ModelError` where there are none, or where text alone does not run
    some of them.
    """
    begin, decoder = text_decoder(model)
    lists = [
        (name, module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    ]
    if not lists:
        raise ModelError(f"model type '{model_type}' has no list of decoder layers; {ADD_A_ROW}")
    name, layers = max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
    experts = next(filter(None, map(_experts_in, layers)), None)
    linears = [list(_called(layer)) for layer in layers]
    paths = list(dict.fromkeys(path for found in linears for path in found))
    if not paths:
        raise ModelError(
            f"model type '{model_type}' is unknown, and its layers call no plain linear:"
            f" {_holder(layers[0])} holds most of the first; {ADD_A_ROW}"
        )
    for path in paths:
        having = [index for index, found in enumerate(linears) if path in found]
        if "cross" in path and len(having) < len(layers):
            raise ModelError(
                f"model type '{model_type}' is unknown, and its layers differ in kind: layer"
                f" {having[0]} has '{path}', which text alone does not run; {ADD_A_ROW}"
            )
    attention = tuple((path, path) for path in paths if "attn" in path or "attention" in path)
    mlp = tuple((path, path) for path in paths if (path, path) not in attention)
    return Family(
        f"{model_type} (by inspection)",
        (model_type,),
        ".".join(filter(None, (begin, name))),
        attention,
        mlp,
        experts=experts,
    )


def left_alone(layers: Iterable[nn.Module], family: Family) -> str:
    """What of the layers no matrix of this row holds, with its share of their numbers: a part of a
    sentence, empty where it is hardly anything. Linears by path, others by class; not norms.
    """
    known = {path for _, path in family.matrices}
    sizes, total = Counter[str](), 0
    for layer in layers:
        for path, module in layer.named_modules():
            own = list(module.parameters(recurse=False))
            size = sum(p.numel() for p in own)
            total += size
            experts = family.experts is not None and f"{path}.".startswith(
                f"{family.experts.path}."
            )
            if path not in known and not experts and any(p.dim() > 1 for p in own):
                sizes[path if isinstance(module, nn.Linear) else type(module).__name__] += size
    named = [
        f"{name} ({size / total:.0%} of the layers' numbers)"
        for name, size in sizes.most_common()
        if size > _WORTH_NAMING * total
    ]
    return f"; left as it is: {', '.join(named)}" if named else ""


def _called(layer: nn.Module) -> Iterator[str]:
    """Paths of the linears that the code of a layer calls. Not those of which it takes the weight
    for itself, as fused kernels of state-space layers do: a pair has no such weight. Nothing of
    experts and routers.
    """
    mixtures = {
        path: int(module.num_experts)
        for path, module in layer.named_modules()
        if isinstance(getattr(module, "num_experts", None), int) and _is_of_experts(module)
    }
    routed = {(path.rpartition(".")[0], count) for path, count in mixtures.items()}
    for place, module in layer.named_modules():
        if any(f"{place}.".startswith(f"{path}.") for path in mixtures):
            continue
        taken = _taken(type(module))  # type: ignore[arg-type]
        for name, child in module.named_children():
            path = f"{place}.{name}" if place else name
            if not isinstance(child, nn.Linear) or name in taken or "router" in path:
                continue
            if (place, child.out_features) not in routed:
                yield path


@cache
def _taken(owner: type[nn.Module]) -> set[str]:
    """Names of the children whose weight the code of a class reads; none where there is no code to
    look at.
    """
    try:
        return set(_TAKEN.findall(inspect.getsource(owner)))
    except (OSError, TypeError):
        return set()


def _is_of_experts(module: nn.Module) -> bool:
    """Whether a module keeps experts: in one tensor a matrix, or one by one (`SplitExperts`)."""
    own = module.parameters(recurse=False)
    return SPLIT in module._modules or any(parameter.dim() == 3 for parameter in own)


def _experts_in(layer: nn.Module) -> Experts | None:
    """Where a layer keeps gated experts as transformers does, and the router beside them."""
    for path, module in layer.named_modules():
        own: Any = module
        fused = [own._parameters.get(name) for name in MATRICES.values()]
        if SPLIT not in own._modules and any(one is None or one.dim() != 3 for one in fused):
            continue
        if not getattr(own, "has_gate", False) or getattr(own, "has_post_expert_norm", False):
            continue
        beside = path.rpartition(".")[0]
        block = module_in(layer, beside) if beside else layer
        for name, child in () if block is None else block.named_children():
            router: Any = child
            if getattr(router, "num_experts", None) == own.num_experts and hasattr(router, "top_k"):
                return Experts(path, f"{beside}.{name}" if beside else name)
    return None


def _holder(layer: nn.Module) -> str:
    """The class that holds most of a layer's numbers beside its plain linears."""
    sizes = Counter[str]()
    for module in layer.modules():
        if not isinstance(module, nn.Linear):
            sizes[type(module).__name__] += sum(p.numel() for p in module.parameters(recurse=False))
    return sizes.most_common(1)[0][0]
