"""Axes of every family: they multiply out to the matrices, name the right rows and columns (proven
by what the model computes), and a KV group or MLP channels go out with plain smaller matrices.
"""

import copy
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import _IDS, FAMILY_ROWS, WIDTH, WITHOUT_EXPERTS, build, quick
from torch import nn

import grasp
from grasp.core.axes import AXES, CHANNELS, HEADS, HIDDEN, INTERLEAVED, KV_HEADS, Sizes
from grasp.core.decoder import Decoder
from grasp.core.families import FAMILIES

LAYER = 1
IDS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(3))
BY_WIDTH = {row.model_types[0] for row in FAMILIES if row.heads_by_width}
GROUPED = {name for name, row in FAMILY_ROWS.items() if "num_key_value_heads" in row.arguments}


class Narrower:
    """A family's tiny model with one layer that rows and columns are taken out of or changed in."""

    def __init__(self, name: str):
        self.decoder = Decoder(build(name))
        self.family, self.config = self.decoder.family, self.decoder.config
        self.sizes = Sizes.of(self.config)
        self.layer = self.decoder.layer(LAYER)

    def tensors(self, role: str):
        """Weight (out, in) and bias, where there is one, that can be written to."""
        linear = self.layer.linears[self.family.path(role)]
        bias = linear.module.bias
        return linear.weight, None if bias is None else bias.detach()

    def scale_rows(self, role: str, rows, factor: float = -1.0) -> None:
        weight, bias = self.tensors(role)
        weight[rows] *= factor
        if bias is not None:
            bias[rows] *= factor

    @torch.no_grad()
    def read_by(self, role: str):
        """What the matrix of a role reads (tokens, in)."""
        seen = []
        module = self.layer.module.get_submodule(self.family.path(role))
        hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        self.decoder.model(input_ids=IDS, use_cache=False)
        hook.remove()
        return seen[0].flatten(0, -2)

    def changed(self, role: str, before) -> set[int]:
        """Columns of a role's input that are no more as they were."""
        difference = (self.read_by(role) - before).abs().amax(dim=0)
        return set(torch.nonzero(difference > 1e-7).flatten().tolist())

    def cut(self, path: str, rows=None, columns=None) -> None:
        """A plain smaller linear in place of the matrix at `path`, with these rows or columns."""
        old = self.layer.linears[path]
        weight, bias = old.weight, old.module.bias
        weight = weight if rows is None else weight[rows]
        weight = weight if columns is None else weight[:, columns]
        new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        new.weight.data.copy_(weight)
        if bias is not None:
            new.bias.data.copy_(bias if rows is None else bias[rows])
        self.layer.module.set_submodule(path, new)

    def cut_out(self, roles_out, role_in: str, gone: dict[str, list[int]]) -> None:
        """Take units out of the rows of some roles, fused or not, and of the columns of another.
        `gone`: units by axis.
        """
        for path in dict.fromkeys(map(self.family.path, roles_out)):
            keep = torch.ones(self.layer.linears[path].shape[0], dtype=torch.bool)
            for role in roles_out:
                if self.family.path(role) == path:
                    keep[self.family.rows(role, self.sizes, gone[AXES[role][0]])] = False
            self.cut(path, rows=keep)
        keep = torch.ones(self.sizes.length(AXES[role_in][1]), dtype=torch.bool)
        keep[self.family.columns(role_in, self.sizes, gone[AXES[role_in][1]])] = False
        self.cut(self.family.path(role_in), columns=keep)

    def group(self, head: int) -> dict[str, list[int]]:
        return {KV_HEADS: [head], HEADS: self.sizes.queries([head])}

    def mlp_roles(self) -> list[str]:
        names = {role for roles, _ in self.family.mlp for role in roles.split("+")}
        return [role for role in ("gate", "up") if role in names]


@pytest.fixture(params=quick(WITHOUT_EXPERTS))
def family(request) -> str:
    """The families of which all matrices have roles, and so axes."""
    return request.param


@pytest.fixture
def narrower(family) -> Narrower:
    return Narrower(family)


@torch.no_grad()
def logits(model, cached: bool = False):
    """Logits (batch, seq, vocab) of the ids, at once or token by token through a KV cache."""
    if not cached:
        return model(input_ids=IDS, use_cache=False).logits
    found = [model(input_ids=IDS[:, :9], use_cache=True)]
    for place in range(9, IDS.shape[1]):
        found.append(
            model(
                input_ids=IDS[:, place : place + 1],
                past_key_values=found[-1].past_key_values,
                use_cache=True,
            )
        )
    return torch.cat([step.logits for step in found], dim=1)


# --- sizes and shapes


def test_axes_multiply_out_to_the_shapes_of_the_matrices(narrower, family):
    sizes = narrower.sizes
    assert sizes.units(HIDDEN) == (WIDTH, 1) and sizes.units(HEADS) == (4, 8)
    assert sizes.units(KV_HEADS) == ((2 if family in GROUPED else 4), 8)
    for roles, path in narrower.family.matrices:
        linear = narrower.layer.linears[path]
        out = sum(sizes.length(AXES[role][0]) for role in roles.split("+"))
        assert linear.shape == (out, sizes.length(AXES[roles.split("+")[0]][1])), path
    assert sizes.group * sizes.kv_heads == sizes.heads


def test_the_roles_of_a_matrix_share_its_rows_without_rest(narrower):
    for roles, path in narrower.family.matrices:
        rows = torch.cat([narrower.family.rows(r, narrower.sizes) for r in roles.split("+")])
        assert sorted(rows.tolist()) == list(range(narrower.layer.linears[path].shape[0])), path


def test_rows_of_some_units_are_those_of_all_in_their_order(narrower):
    family, sizes = narrower.family, narrower.sizes
    some = family.rows("v", sizes, [1, 0])
    assert torch.equal(some, family.rows("v", sizes).view(-1, 8)[[1, 0]].flatten())
    assert torch.equal(family.columns("o", sizes, [3]), torch.arange(24, 32))


def test_a_narrower_layer_has_its_own_sizes():
    sizes = Sizes(hidden=32, heads=4, kv_heads=2, head_dim=8, channels=48)
    left = replace(sizes, heads=2, kv_heads=1)
    assert left.group == sizes.group == 2 and left.length(HEADS) == 16
    assert sizes.queries([1]) == [2, 3]


def test_a_fused_matrix_of_grouped_queries_splits_by_the_config():
    """Phi-3's tiny row has groups; the interleaved rows (GPT-NeoX) have none by their class."""
    family = Decoder(build("phi3")).family
    sizes = Sizes(hidden=32, heads=4, kv_heads=2, head_dim=8, channels=48)
    assert family.rows("k", sizes)[0] == 32 and family.rows("v", sizes)[0] == 48
    assert family.rows("up", sizes)[0] == 48


def test_a_role_that_a_family_does_not_have():
    decoder = Decoder(build("opt"))
    with pytest.raises(grasp.GraspError, match="OPT has no matrix of the role 'gate'"):
        decoder.family.rows("gate", Sizes.of(decoder.config))


# --- rows and columns, by what is computed


def test_v_rows_reach_o_through_their_own_head_only(narrower):
    """Number by number: row d of head j comes out at column d of the query heads that read j."""
    sizes, family = narrower.sizes, narrower.family
    before = narrower.read_by("o")
    row = family.rows("v", sizes, [1])[3:4]
    narrower.scale_rows("v", row)
    columns = {head * sizes.head_dim + 3 for head in sizes.queries([1])}
    assert narrower.changed("o", before) == columns
    after = narrower.read_by("o")
    assert torch.allclose(after[..., sorted(columns)], -before[..., sorted(columns)], atol=1e-6)


def test_q_and_k_rows_reach_o_through_their_own_heads_only(narrower):
    sizes, family = narrower.sizes, narrower.family
    before = narrower.read_by("o")
    narrower.scale_rows("q", family.rows("q", sizes, [2]))
    assert narrower.changed("o", before) == set(family.columns("o", sizes, [2]).tolist())
    narrower.scale_rows("q", family.rows("q", sizes, [2]))
    narrower.scale_rows("k", family.rows("k", sizes, [0]))
    assert narrower.changed("o", before) == set(
        family.columns("o", sizes, sizes.queries([0])).tolist()
    )


def test_q_and_k_rows_stand_in_the_same_order(narrower):
    """Turning the same dimensions of queries and keys changes no score; of one of them, it does.
    Dimensions 3 and 7 of 8 are a pair that rotary positions turn together.
    """
    sizes, family = narrower.sizes, narrower.family
    before = narrower.read_by("o")
    for head in sizes.queries([1]):
        narrower.scale_rows("q", family.rows("q", sizes, [head])[[3, 7]])
    assert narrower.changed("o", before)
    narrower.scale_rows("k", family.rows("k", sizes, [1])[[3, 7]])
    assert torch.allclose(narrower.read_by("o"), before, atol=1e-6)


def test_channels_of_gate_and_up_reach_their_own_column_of_down(narrower):
    sizes, family = narrower.sizes, narrower.family
    for role in narrower.mlp_roles():
        before = narrower.read_by("down")
        narrower.scale_rows(role, family.rows(role, sizes, [5]))
        columns = family.columns("down", sizes, [5]).tolist()
        assert narrower.changed("down", before) == set(columns), role


# --- narrower layers


@torch.no_grad()
def test_mlp_channels_go_out_with_plain_smaller_matrices(narrower):
    gone = [0, 5, narrower.sizes.channels - 1]
    masked = copy.deepcopy(narrower.decoder.model)
    twin = Decoder(masked).layer(LAYER).linears[narrower.family.path("down")]
    twin.weight[:, narrower.family.columns("down", narrower.sizes, gone)] = 0
    narrower.cut_out(narrower.mlp_roles(), "down", {CHANNELS: gone})
    for cached in (False, True):
        found = logits(narrower.decoder.model, cached)
        assert torch.allclose(found, logits(masked, cached), atol=1e-5)


@torch.no_grad()
def cut_group(name: str, head: int = 0):
    """A model without one KV group in one layer, and its twin whose o reads nothing of it."""
    narrower = Narrower(name)
    masked = copy.deepcopy(narrower.decoder.model)
    group = narrower.group(head)
    twin = Decoder(masked).layer(LAYER).linears[narrower.family.path("o")]
    twin.weight[:, narrower.family.columns("o", narrower.sizes, group[HEADS])] = 0
    narrower.cut_out(("q", "k", "v"), "o", group)
    return narrower, masked


@pytest.mark.parametrize("name", sorted(BY_WIDTH))
def test_a_kv_group_goes_out_with_plain_smaller_matrices(name):
    narrower, masked = cut_group(name)
    dense = build(name)
    for cached in (False, True):
        found = logits(narrower.decoder.model, cached)
        assert torch.allclose(found, logits(masked, cached), atol=1e-5)
        assert not torch.allclose(found, logits(dense, cached), atol=1e-4)


@pytest.mark.parametrize(
    "name", quick(sorted(set(FAMILY_ROWS) - BY_WIDTH - {"opt", "deepseek_v3"}))
)
def test_elsewhere_the_code_does_not_take_a_narrower_group(name):
    """Phi-3 and GPT-2 count heads by the config; OLMo2's norms are as wide as all heads."""
    narrower, _ = cut_group(name)
    with pytest.raises(RuntimeError):
        logits(narrower.decoder.model)


def test_opt_mixes_tokens_where_a_head_is_gone():
    """It counts heads by the config too, and reshapes what is narrower without an error."""
    narrower, masked = cut_group("opt")
    found = logits(narrower.decoder.model)
    assert (found - logits(masked)).abs().max() > 0.01


def test_olmo2_heads_share_one_norm():
    """With its norms cut too it runs, and computes something else: the other heads' scale."""
    narrower, masked = cut_group("olmo2")
    attention, family = narrower.layer.module.self_attn, narrower.family
    for role, norm in (("q", attention.q_norm), ("k", attention.k_norm)):
        units = narrower.group(0)[AXES[role][0]]
        keep = torch.ones(len(norm.weight), dtype=torch.bool)
        keep[family.rows(role, narrower.sizes, units)] = False
        norm.weight = nn.Parameter(norm.weight.detach()[keep])
    found = logits(narrower.decoder.model)
    assert not torch.allclose(found, logits(masked), atol=1e-3)


# --- norms and ends


def test_every_parameter_of_the_model_has_its_place(family):
    """Matrices, norms and ends are all there is, with their biases."""
    decoder = Decoder(build(family))
    row, model = decoder.family, decoder.model
    inside = [path for _, path in row.matrices] + list(row.norms.all)
    places = [f"{row.layers}.{index}.{path}" for index in range(4) for path in inside]
    ends = row.ends
    places += filter(None, (ends.embedding, ends.norm, ends.head, ends.positions))
    modules = dict(model.named_modules())
    accounted = {f"{place}.{kind}" for place in places for kind in ("weight", "bias")}
    assert {name for name, _ in model.named_parameters()} <= accounted
    assert not set(places) - set(modules)
    assert modules[ends.embedding] is model.get_input_embeddings()
    assert modules[ends.head] is model.get_output_embeddings()
    tied = modules[ends.embedding].weight is modules[ends.head].weight
    assert tied == decoder.config.tie_word_embeddings == FAMILY_ROWS[family].tied


@torch.no_grad()
def test_norms_stand_where_the_row_says(family):
    """What a matrix reads is its norm's output, and the head reads the final norm's."""
    decoder = Decoder(build(family))
    row, layer, seen = decoder.family, decoder.layer(LAYER).module, {}

    def keep(name):
        return lambda _, args, output: seen.update({name: (args[0].clone(), output)})

    modules = dict(decoder.model.named_modules())
    for path in (row.path("q"), row.path("up"), *row.norms.all):
        layer.get_submodule(path).register_forward_hook(keep(path))
    for path in (row.ends.norm, row.ends.head):
        modules[path].register_forward_hook(keep(path))
    decoder.model(input_ids=IDS, use_cache=False)
    for norm, role in ((row.norms.attention, "q"), (row.norms.mlp, "up")):
        assert not norm or torch.equal(
            seen[norm][1].flatten(), seen[row.path(role)][0].flatten()
        ), norm
    assert torch.equal(seen[row.ends.norm][1], seen[row.ends.head][0])
    assert set(row.norms.all) <= set(seen)  # all of them run


def test_an_opt_of_two_widths():
    """OPT-350m's embeddings are narrower than its layers, and it has no final norm."""
    config = transformers.OPTConfig(
        **_IDS,
        **{**FAMILY_ROWS["opt"].arguments, "word_embed_proj_dim": 16},
        do_layer_norm_before=False,
    )
    decoder = Decoder(transformers.OPTForCausalLM(config))
    modules, ends = dict(decoder.model.named_modules()), decoder.family.ends
    assert ends.norm not in modules
    assert [modules[path].weight.shape for path in ends.between] == [(32, 16), (16, 32)]


def test_ends_of_a_text_decoder_further_in():
    """A multimodal model keeps the same row at another place."""
    text = {**FAMILY_ROWS["gemma3_text"].arguments, **_IDS}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(text_config=text, vision_config=vision)
    decoder = Decoder(transformers.Gemma3ForConditionalGeneration(config))
    ends, modules = decoder.family.ends, dict(decoder.model.named_modules())
    assert ends.embedding == "model.language_model.embed_tokens"
    assert {ends.embedding, ends.norm, ends.head} <= set(modules)


def test_only_gpt_neox_is_interleaved():
    assert [row.name for row in FAMILIES if row.fused == INTERLEAVED] == ["GPT-NeoX"]
