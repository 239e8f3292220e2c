"""Where each architecture keeps its decoder layers and their linears: one row a family. A new
family is a new row.

A row names matrices by role. The roles of a gated Llama-like layer are q, k, v, o, gate, up, down;
a matrix that holds several roles stacked (Phi-3's `qkv_proj`) is one matrix here, named by all its
roles, and is decomposed as a whole.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, replace

from torch import nn

from grasp.core.layers.reading_grasp import text_decoder
from grasp.errors import ModelError, did_you_mean

logger = logging.getLogger(__name__)

Matrices = tuple[tuple[str, str], ...]
"""((roles, path inside the layer), ...): `roles` is one role, or several joined by "+" for a fused
matrix.
"""


@dataclass(frozen=True)
class Family:
    """One row: the module path of the list of decoder layers, and the linears of a layer in their
    order of use.
    """

    name: str
    model_types: tuple[str, ...]
    layers: str
    attention: Matrices
    mlp: Matrices
    notes: str = ""

    @property
    def matrices(self) -> Matrices:
        return self.attention + self.mlp


_QKVO: Matrices = tuple((r, f"self_attn.{r}_proj") for r in "qkvo")
_GATED: Matrices = tuple((r, f"mlp.{r}_proj") for r in ("gate", "up", "down"))


def _llama_like(name: str, *model_types: str, notes: str = "") -> Family:
    return Family(name, model_types, "model.layers", _QKVO, _GATED, notes)


FAMILIES: tuple[Family, ...] = (
    _llama_like("Llama", "llama"),
    _llama_like("Mistral", "mistral", notes="sliding window"),
    _llama_like("Qwen2", "qwen2", notes="q/k/v biases, max_window_layers"),
    _llama_like("Qwen3", "qwen3", notes="q/k norms"),
    _llama_like("Gemma 2", "gemma2", notes="post-norms, alternating window, soft-capped logits"),
    _llama_like("Gemma 3", "gemma3_text", notes="post-norms, q/k norms, alternating window"),
    Family(
        "Phi-3",
        ("phi3",),
        "model.layers",
        (("q+k+v", "self_attn.qkv_proj"), ("o", "self_attn.o_proj")),
        (("gate+up", "mlp.gate_up_proj"), ("down", "mlp.down_proj")),
        "fused qkv and gate_up",
    ),
    _llama_like("OLMo2", "olmo2", notes="post-norms, q/k norms"),
    _llama_like("Granite", "granite", notes="residual, attention and logit multipliers"),
    Family(
        "GPT-NeoX",
        ("gpt_neox",),
        "gpt_neox.layers",
        (("q+k+v", "attention.query_key_value"), ("o", "attention.dense")),
        (("up", "mlp.dense_h_to_4h"), ("down", "mlp.dense_4h_to_h")),
        "fused qkv, biases, parallel residual",
    ),
    Family(
        "GPT-2",
        ("gpt2",),
        "transformer.h",
        (("q+k+v", "attn.c_attn"), ("o", "attn.c_proj")),
        (("up", "mlp.c_fc"), ("down", "mlp.c_proj")),
        "Conv1D (weights stored in x out), biases",
    ),
    Family(
        "OPT",
        ("opt",),
        "model.decoder.layers",
        tuple(
            (r, f"self_attn.{n}_proj")
            for r, n in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out"))
        ),
        (("up", "fc1"), ("down", "fc2")),
        "LayerNorm, biases",
    ),
)

ROLES = ("q", "k", "v", "o", "gate", "up", "down")
GROUPS = {"all": ROLES, "attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}

_ADD_A_ROW = "to support it, add a row to src/grasp/core/families.py (see CONTRIBUTING.md)"
_MOSTLY = 0.9
"""Share of a layer's parameters that plain linears must hold for a layer to be understood by
inspection.
"""


def find_family(model: nn.Module, model_type: str) -> Family:
    """The row for `model_type`; failing that, a row read off the model itself, with a notice.
    Raises `ModelError`.

    Its `layers` is the path in this model: a multimodal one has its text decoder further in.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            here = replace(family, layers=_layers_path(model, family))
            _check(model, here)
            return here
    family = _inspect(model, model_type)
    logger.warning(
        "no family row for model type '%s': found %d layers at '%s' with the linears %s by"
        " inspection",
        model_type,
        len(model.get_submodule(family.layers)),  # type: ignore[arg-type]
        family.layers,
        ", ".join(path for _, path in family.matrices),
    )
    return family


def select(
    family: Family, projections: tuple[str, ...], flag: str = "--projections"
) -> tuple[str, ...]:
    """Paths inside a layer of the matrices whose roles are all among `projections` (roles, matrix
    names, or all/attention/mlp).
    """
    paths = [path for _, path in family.matrices]
    names = {path.rsplit(".", 1)[-1]: path for path in paths}
    wanted: set[str] = set()
    named: set[str] = set()
    for word in projections:
        if word in names or word in paths:
            named.add(names.get(word, word))
        elif word in GROUPS or word in ROLES:
            wanted.update(GROUPS.get(word, (word,)))
        else:
            known = [*GROUPS, *ROLES, *names]
            raise ModelError(
                f"{flag}: '{word}' is no matrix of {family.name}; allowed:"
                f" {', '.join(known)}{did_you_mean(word, known)}"
            )
    chosen = []
    for roles, path in family.matrices:
        parts = set(roles.split("+"))
        if path in named or parts <= wanted or (not parts & set(ROLES) and wanted >= set(ROLES)):
            chosen.append(path)
        elif parts & wanted:
            raise ModelError(
                f"{flag}: {family.name} keeps {roles} in one matrix, {path.rsplit('.', 1)[-1]};"
                f" name all of {roles} or none"
            )
    if not chosen:
        raise ModelError(
            f"{flag}: {', '.join(projections)} selects no matrix of {family.name}; allowed:"
            f" {', '.join(names)}"
        )
    return tuple(chosen)


def _layers_path(model: nn.Module, family: Family) -> str:
    """Where this model keeps the layers of a family: the end of the row's path, below the text
    decoder.
    """
    parts, begin = family.layers.split("."), text_decoder(model)[0]
    for start in range(len(parts)):
        path = ".".join(([begin] if begin else []) + parts[start:])
        try:
            if isinstance(model.get_submodule(path), nn.ModuleList):
                return path
        except AttributeError:
            continue
    return family.layers


def _check(model: nn.Module, family: Family) -> None:
    try:
        for layer in model.get_submodule(family.layers):  # type: ignore[attr-defined]
            for _, path in family.matrices:
                layer.get_submodule(path)
    except AttributeError as missing:
        raise ModelError(
            f"the model is not laid out as {family.name}: {missing}; {_ADD_A_ROW}"
        ) from None


def _inspect(model: nn.Module, model_type: str) -> Family:
    """Read a row off the model: the largest list of modules in its text decoder, and the plain
    linears all of them share.
    """
    begin, decoder = text_decoder(model)
    lists = [
        (name, module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    ]
    if not lists:
        raise ModelError(f"model type '{model_type}' has no list of decoder layers; {_ADD_A_ROW}")
    name, layers = max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
    linears = [
        {path for path, module in layer.named_modules() if isinstance(module, nn.Linear)}
        for layer in layers
    ]
    counts = Counter(path for found in linears for path in found)
    shared = [
        path
        for path, module in layers[0].named_modules()
        if counts[path] == len(layers) and isinstance(module, nn.Linear)
    ]
    for layer in layers:
        size = sum(p.numel() for p in layer.parameters())
        held = sum(p.numel() for path in shared for p in layer.get_submodule(path).parameters())
        if not shared or held < _MOSTLY * size:
            raise ModelError(
                f"model type '{model_type}' is unknown, and"
                f" {_what_is_odd(layers, linears, held / max(size, 1))}; {_ADD_A_ROW}"
            )
    attention = tuple((path, path) for path in shared if "attn" in path or "attention" in path)
    mlp = tuple((path, path) for path in shared if (path, path) not in attention)
    return Family(
        f"{model_type} (by inspection)",
        (model_type,),
        ".".join(filter(None, (begin, name))),
        attention,
        mlp,
    )


def _what_is_odd(layers: nn.ModuleList, linears: list[set[str]], share: float) -> str:
    """Why a layer cannot be understood by inspection: it differs from the first in kind, or holds
    its numbers in something else.
    """
    for index, found in enumerate(linears):
        only, lacks = sorted(found - linears[0]), sorted(linears[0] - found)
        if only or lacks:
            one, other = type(layers[0]).__name__, type(layers[index]).__name__
            kinds = f" ({one} and {other})" if one != other else ""
            has = [
                f"layer {place} has '{paths[0]}'"
                for place, paths in ((0, lacks), (index, only))
                if paths
            ]
            return f"its layers differ in kind{kinds}: only {' and only '.join(has)}"
    sizes = Counter[str]()
    for module in layers[0].modules():
        if not isinstance(module, nn.Linear):
            sizes[type(module).__name__] += sum(p.numel() for p in module.parameters(recurse=False))
    return (
        f"plain linears hold only {share:.0%} of a layer: {sizes.most_common(1)[0][0]} holds most"
        " of the rest"
    )
