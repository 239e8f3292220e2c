"""Where each architecture keeps its decoder layers, their linears and norms, and its embeddings and
head: one row a family. A new family is a new row.

A row names matrices by role. The roles of a gated Llama-like layer are q, k, v, o, gate, up, down;
a matrix that holds several roles (Phi-3's `qkv_proj`) is one matrix here, named by all its roles,
and is decomposed as a whole. What the rows and columns of each role count is in
`grasp.core.axes`; `Family.rows` and `Family.columns` say which of a matrix they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from grasp.core.axes import AXES, INTERLEAVED, STACKED, Sizes, fused_places
from grasp.errors import ModelError, did_you_mean

Matrices = tuple[tuple[str, str], ...]
"""((roles, path inside the layer), ...): `roles` is one role, or several joined by "+" for a fused
matrix.
"""


@dataclass(frozen=True)
class Norms:
    """The norms of a layer, by path inside it. Empty where there is none.

    `attention` and `mlp` stand before these, and what the matrices read has their scale; `after`
    stand behind them, before the residual sum; `heads` are those of queries and keys.
    """

    attention: str = ""
    mlp: str = ""
    after: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        """Every norm of a layer."""
        return (*filter(None, (self.attention, self.mlp)), *self.after, *self.heads)


@dataclass(frozen=True)
class Ends:
    """What stands before and behind the layers, by path in the model. Empty where there is none.

    `head` is the embedding's own matrix where the configuration's `tie_word_embeddings` says so.
    `positions`: learnt embeddings of positions; `between`: matrices that stand between embedding or
    head and layers where those are of another width.
    """

    embedding: str
    norm: str
    head: str
    positions: str = ""
    between: tuple[str, ...] = ()


@dataclass(frozen=True)
class Experts:
    """Where a layer keeps its experts, all of them in one tensor a matrix, and the router, which
    sends each token to some of them: paths inside the layer. Layers may lack them.
    """

    path: str = "mlp.experts"
    router: str = "mlp.gate"


@dataclass(frozen=True)
class Family:
    """One row: the module path of the list of decoder layers, the linears of a layer in their order
    of use, its norms, and the model's ends. A layer may lack some of them.

    `mlp_steps`: where the MLP is no module of its own, what the layer calls one after another.
    `ends_as_begun`: whether the model's code gives its outputs the width of its embeddings.
    `fused`: how a matrix of several roles shares its rows. `heads_by_width`: whether the attention
    code takes the number of heads from the width of the projections, so that a KV group is taken
    out with plain smaller matrices (MLP channels are, in every family). `experts`: where the layers
    keep them, if there are some.
    """

    name: str
    model_types: tuple[str, ...]
    layers: str
    attention: Matrices
    mlp: Matrices
    notes: str = ""
    norms: Norms = Norms()
    ends: Ends | None = None
    fused: str = STACKED
    heads_by_width: bool = False
    mlp_steps: tuple[str, ...] = ()
    ends_as_begun: bool = False
    experts: Experts | None = None

    @property
    def matrices(self) -> Matrices:
        return self.attention + self.mlp

    def path(self, role: str) -> str:
        """The matrix that holds a role, as a path inside the layer. Raises `ModelError` where none
        does, as of a family read off a model.
        """
        for roles, path in self.matrices:
            if role in roles.split("+"):
                return path
        raise ModelError(
            f"{self.name} has no matrix of the role '{role}'; it has"
            f" {', '.join(roles for roles, _ in self.matrices)}"
        )

    def holding(self, role: str) -> tuple[str, ...]:
        """The paths inside the layer of matrices that hold a role: one, or none."""
        return tuple(path for roles, path in self.matrices if role in roles.split("+"))

    def rows(self, role: str, sizes: Sizes, units: Sequence[int] | None = None) -> Tensor:
        """Which rows (out) of the matrix at `path(role)` are the role's: int64, in the order of the
        role's own axis. `units`: of these heads or channels only.
        """
        own = sizes.places(AXES[role][0], units)
        path = self.path(role)
        roles = next(roles for roles, place in self.matrices if place == path).split("+")
        return own if len(roles) == 1 else fused_places(roles, role, self.fused, sizes)[own]

    def columns(self, role: str, sizes: Sizes, units: Sequence[int] | None = None) -> Tensor:
        """Which columns (in) of that matrix the role reads by: int64. A fused matrix's roles all
        read the same.
        """
        return sizes.places(AXES[role][1], units)


_QKVO: Matrices = tuple((r, f"self_attn.{r}_proj") for r in "qkvo")
_GATED: Matrices = tuple((r, f"mlp.{r}_proj") for r in ("gate", "up", "down"))
_BEFORE = Norms("input_layernorm", "post_attention_layernorm")
_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
_BOTH = Norms("input_layernorm", "pre_feedforward_layernorm", _AFTER)
_QK = ("self_attn.q_norm", "self_attn.k_norm")
_ENDS = Ends("model.embed_tokens", "model.norm", "lm_head")


def _llama_like(
    name: str,
    *model_types: str,
    notes: str = "",
    norms: Norms = _BEFORE,
    heads_by_width: bool = True,
) -> Family:
    return Family(
        name,
        model_types,
        "model.layers",
        _QKVO,
        _GATED,
        notes,
        norms,
        _ENDS,
        heads_by_width=heads_by_width,
    )


def _unnamed(*paths: str) -> Matrices:
    """Matrices without a role: MLPs beside experts have widths of their own, and no common axis."""
    return tuple((path, path) for path in paths)


def _gated_at(*places: str) -> Matrices:
    """The three matrices of the gated MLPs at these paths, without roles."""
    return _unnamed(*(f"{place}.{r}_proj" for place in places for r in ("gate", "up", "down")))


def _with_experts(
    name: str,
    model_type: str,
    mlp: Matrices = (),
    notes: str = "experts",
    norms: Norms = _BEFORE,
    heads_by_width: bool = True,
    attention: Matrices = _QKVO,
    experts: Experts = Experts(),
) -> Family:
    """Llama-like layers with experts in the place of the MLP, or of some layers' MLPs."""
    return Family(
        name,
        (model_type,),
        "model.layers",
        attention,
        mlp,
        notes,
        norms,
        _ENDS,
        heads_by_width=heads_by_width,
        experts=experts,
    )


FAMILIES: tuple[Family, ...] = (
    _llama_like("Llama", "llama"),
    _llama_like("Mistral", "mistral", notes="sliding window"),
    _llama_like("Qwen2", "qwen2", notes="q/k/v biases, max_window_layers"),
    _llama_like("Qwen3", "qwen3", notes="q/k norms", norms=replace(_BEFORE, heads=_QK)),
    _llama_like("Gemma", "gemma", notes="scaled embedding, norms scale by 1 + weight"),
    _llama_like(
        "Gemma 2", "gemma2", notes="post-norms, alternating window, soft-capped logits", norms=_BOTH
    ),
    _llama_like(
        "Gemma 3",
        "gemma3_text",
        notes="post-norms, q/k norms, alternating window",
        norms=replace(_BOTH, heads=_QK),
    ),
    Family(
        "Phi-3",
        ("phi3",),
        "model.layers",
        (("q+k+v", "self_attn.qkv_proj"), ("o", "self_attn.o_proj")),
        (("gate+up", "mlp.gate_up_proj"), ("down", "mlp.down_proj")),
        "fused qkv and gate_up",
        _BEFORE,
        _ENDS,
    ),
    # its q/k norms are taken over all heads at once: with fewer heads the others' scale changes
    _llama_like(
        "OLMo2",
        "olmo2",
        notes="post-norms, q/k norms",
        norms=Norms(after=_AFTER, heads=_QK),
        heads_by_width=False,
    ),
    _llama_like("Granite", "granite", notes="residual, attention and logit multipliers"),
    Family(
        "GPT-NeoX",
        ("gpt_neox",),
        "gpt_neox.layers",
        (("q+k+v", "attention.query_key_value"), ("o", "attention.dense")),
        (("up", "mlp.dense_h_to_4h"), ("down", "mlp.dense_4h_to_h")),
        "fused qkv, biases, parallel residual",
        _BEFORE,
        Ends("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out"),
        fused=INTERLEAVED,
        heads_by_width=True,
    ),
    Family(
        "GPT-2",
        ("gpt2",),
        "transformer.h",
        (("q+k+v", "attn.c_attn"), ("o", "attn.c_proj")),
        (("up", "mlp.c_fc"), ("down", "mlp.c_proj")),
        "Conv1D (weights stored in x out), biases",
        Norms("ln_1", "ln_2"),
        Ends("transformer.wte", "transformer.ln_f", "lm_head", "transformer.wpe"),
        ends_as_begun=True,
    ),
    # counts heads by the config, and mixes tokens without an error where the width is another;
    # where do_layer_norm_before is false (350m), the norms stand behind the residual sums
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
        Norms("self_attn_layer_norm", "final_layer_norm"),
        Ends(
            "model.decoder.embed_tokens",
            "model.decoder.final_layer_norm",
            "lm_head",
            "model.decoder.embed_positions",
            ("model.decoder.project_in", "model.decoder.project_out"),
        ),
        mlp_steps=("fc1", "activation_fn", "fc2"),
    ),
    _with_experts("Mixtral", "mixtral"),
    _with_experts(
        "Qwen2-MoE",
        "qwen2_moe",
        _gated_at("mlp", "mlp.shared_expert"),
        "experts, a shared one beside them, dense MLPs in some layers, q/k/v biases",
    ),
    _with_experts(
        "Qwen3-MoE",
        "qwen3_moe",
        _gated_at("mlp"),
        "experts, dense MLPs in some layers, q/k norms",
        replace(_BEFORE, heads=_QK),
    ),
    # its q/k norms are taken over all heads at once, as OLMo2's
    _with_experts(
        "OLMoE",
        "olmoe",
        notes="experts, q/k norms",
        norms=replace(_BEFORE, heads=_QK),
        heads_by_width=False,
    ),
    # its attention has a number beside the scores of every head, so their count must stay
    _with_experts(
        "gpt-oss",
        "gpt_oss",
        notes="experts with biases, attention sinks, alternating window",
        heads_by_width=False,
        experts=Experts(router="mlp.router"),
    ),
    # heads of queries, keys and values have widths of their own, and keys and values meet in one
    # narrow matrix: there are no axes to name
    _with_experts(
        "DeepSeek-V3",
        "deepseek_v3",
        _gated_at("mlp", "mlp.shared_experts"),
        "experts in groups, shared ones beside them, dense first layers, latent attention",
        heads_by_width=False,
        attention=_unnamed(
            *(
                f"self_attn.{one}"
                for one in (
                    "q_proj",
                    "q_a_proj",
                    "q_b_proj",
                    "kv_a_proj_with_mqa",
                    "kv_b_proj",
                    "o_proj",
                )
            )
        ),
    ),
)

ROLES = tuple(AXES)
EXPERTS = "experts"
"""The word for the matrices of experts, which no row names one by one."""
GROUPS = {"all": ROLES, "attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}


def select(
    family: Family, projections: tuple[str, ...], flag: str = "--projections"
) -> tuple[str, ...]:
    """Paths inside a layer of the matrices whose roles are all among `projections` (roles, matrix
    names, or all/attention/mlp, which hold those without a role too).
    """
    paths = [path for _, path in family.matrices]
    names: dict[str, list[str]] = {}
    for path in paths:
        names.setdefault(path.rsplit(".", 1)[-1], []).append(path)
    groups = {"all": family.matrices, "attention": family.attention, "mlp": family.mlp}
    wanted: set[str] = set()
    named: set[str] = set()
    for word in projections:
        if word in names or word in paths:
            named.update(names.get(word, [word]))
        elif word == EXPERTS and family.experts is not None:
            continue
        elif word in GROUPS or word in ROLES:
            wanted.update(GROUPS.get(word, (word,)))
            named.update(path for roles, path in groups.get(word, ()) if roles == path)
        else:
            known = [*GROUPS, *ROLES, *names]
            raise ModelError(
                f"{flag}: '{word}' is no matrix of {family.name}; allowed:"
                f" {', '.join(known)}{did_you_mean(word, known)}"
            )
    chosen = []
    for roles, path in family.matrices:
        parts = set(roles.split("+"))
        if path in named or parts <= wanted:
            chosen.append(path)
        elif parts & wanted:
            raise ModelError(
                f"{flag}: {family.name} keeps {roles} in one matrix, {path.rsplit('.', 1)[-1]};"
                f" name all of {roles} or none"
            )
    if not chosen and not (EXPERTS in projections and family.experts is not None):
        raise ModelError(
            f"{flag}: {', '.join(projections)} selects no matrix of {family.name}; allowed:"
            f" {', '.join(names)}"
        )
    return tuple(chosen)
