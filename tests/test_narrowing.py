"""Channels, value dimensions and KV groups of every family: the narrower model computes what the
wide one does with a matrix refitted by hand, and costs what the quadratic says.
"""

import copy

import pytest
import torch
from closeness import close
from conftest import DIFFERENT, FAMILY_ROWS, WITHOUT_EXPERTS, build, quick
from test_curvature import brute_force, damped_gram

from grasp.core.decoder import Decoder
from grasp.core.edits import Drop, Factorize
from grasp.core.runner import Resident
from grasp.methods.costs import Storage
from grasp.stages.basis import GRADIENT_DAMPING
from grasp.stages.curvature import Curvatures
from grasp.stages.forecast import Halves, halves
from grasp.stages.narrowing import AXES, Turn, cost_at, narrowed, narrowing, place
from grasp.stages.surgeon import INPUT_DAMPING, Metric

LAYER = 1
SIZES = {"channels": 21, "values": 5, "groups": 1}
"""How much is left: no round number, and not of whole heads."""
LACKING = {
    "olmo2": ("groups",),
    "olmoe": ("groups", "channels"),
    "deepseek_v3": AXES,
    **{name: ("channels",) for name in ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")},
}
"""What a layer cannot lose: a family's code does not allow it, or its MLP is experts."""
EVERY = [(name, part) for name in FAMILY_ROWS for part in AXES if part not in LACKING.get(name, ())]
every = pytest.mark.parametrize(
    ("name", "part"),
    [
        pytest.param(name, part, marks=() if name in DIFFERENT else pytest.mark.slow)
        for name, part in EVERY
    ],
)


class Case:
    """One part of one layer of a tiny model, with the statistics of its reader."""

    def __init__(self, name, part, data, dtype=torch.float32):
        self.decoder = Decoder(build(name, dtype))
        self.data, self.part = data, part
        paths = {one.path for one in self.decoder.linears(LAYER)}
        self.where = place(self.decoder, LAYER, part, paths)
        assert self.where is not None
        self.path = self.where.reader.path
        collectors = [Curvatures([self.path], None, [self.path], half) for half in (0, 1)]
        self.stats = halves(Resident(self.decoder, data).sweep(collectors), self.path)
        self.found = narrowing(self.decoder, self.where, self.stats)

    def step(self, size):
        return narrowed(self.decoder, self.found, self.stats, size)

    def logits(self, model=None):
        with torch.no_grad():
            return (model or self.decoder.model)(self.data.ids).logits

    def damped(self):
        """(W, H, D) of the reader by plain hooks, damped as where it chooses."""
        weight, inputs, gradients, tokens = brute_force(
            copy.deepcopy(self.decoder.model), self.data.ids, [self.path]
        )[self.path]
        return (
            weight,
            damped_gram(inputs / tokens, INPUT_DAMPING),
            damped_gram(gradients / tokens, GRADIENT_DAMPING),
        )

    def judges(self):
        """(W, H, D) as they are, as where they judge."""
        weight, inputs, gradients, tokens = brute_force(
            copy.deepcopy(self.decoder.model), self.data.ids, [self.path]
        )[self.path]
        return weight, inputs / tokens, gradients / tokens

    def turn(self):
        """The coordinates in which value dimensions go."""
        weight, seen = self.where.reader.weight, self.stats.whole
        chooser = Metric.of(weight, seen).damped(weight, seen)
        return Turn.of(self.where, chooser, self.where.units(self.decoder))

    def kept(self, step):
        """C (units left x columns a unit, in): what the reader reads of its inputs h, as C h."""
        units = self.where.units(self.decoder)
        columns = units[step.edit.keep].flatten()
        whole = torch.eye(self.where.reader.shape[1], dtype=torch.float64)
        if self.part == "values":
            whole = self.turn().turn
        return whole[columns]

    def wide(self, step):
        """The reader, of full width, that reads C h only: W' = argmin tr((W - W' C) H (...)'), by
        least squares on a square root of H.
        """
        weight, inputs, _ = self.damped()
        root, kept = torch.linalg.cholesky(inputs), self.kept(step)  # H = root root'
        found = torch.linalg.lstsq((kept @ root).mT, (weight @ root).mT).solution.mT
        return found @ kept


def put(decoder, path, weight):
    """Give the matrix at `path` other numbers (out, in)."""
    module = decoder.model.get_submodule(path)
    with torch.no_grad():
        module.weight.copy_(weight if isinstance(module, torch.nn.Linear) else weight.mT)


# --- every part of every family


@every
def test_a_narrower_model_is_the_wide_one_with_the_refitted_matrix(name, part, calibration):
    """GQA, biases, fused matrices, post-norms, Conv1D: logits equal those of the dense model with
    `W' C` in place of the reader, by hand.
    """
    case = Case(name, part, calibration)
    before = case.logits()
    step = case.step(SIZES[part])
    assert len(step.edit.keep) == SIZES[part] and step.edit.axis == AXES[part]
    assert torch.equal(case.logits(), before)  # nothing is changed until it is carried out
    wide = Decoder(build(name))
    put(wide, case.path, case.wide(step))
    expected = case.logits(wide.model)
    step.edit.apply(case.decoder)
    found = case.logits()
    assert not close(found, before, roundings=1e4)
    scale = float(before.abs().max())
    assert torch.allclose(found, expected, rtol=0, atol=1e-4 * scale)


@every
def test_the_price_is_the_quadratic(name, part, calibration):
    """1/2 tr(D M H M') of what the edit takes from the reader, with H and D by plain hooks; where a
    larger size would lose more, as much as that.
    """
    case = Case(name, part, calibration)
    weight, inputs, gradients = case.judges()
    for size in (SIZES[part], case.where.count - 1):
        step = case.step(size)
        change = weight - case.wide(step)
        lost = float((gradients @ change @ inputs @ change.mT).trace()) / 2
        larger = float(case.found.seen[size + 1])
        assert float(case.found.seen[size]) == pytest.approx(max(lost, larger), rel=1e-3), size
        assert step.note.seen_loss == float(case.found.seen[size])
        price, seen = float(case.found.losses[size]), float(case.found.seen[size])
        assert step.note.predicted_loss == pytest.approx(seen + 1.4 * (price - seen))  # 0.7 of it
    whole = float((gradients @ weight @ inputs @ weight.mT).trace()) / 2
    assert float(case.found.seen[0]) == pytest.approx(whole, rel=1e-3)
    assert float(case.found.losses[-1]) == float(case.found.seen[-1]) == 0
    assert bool((case.found.losses.diff() <= 0).all() and (case.found.seen.diff() <= 0).all())


@pytest.mark.parametrize("name", quick(WITHOUT_EXPERTS))  # whose products take no float64
def test_turned_values_leave_the_model_as_it_was(name, calibration):
    """All value dimensions kept, in the axes of the metric: v and o are others, the logits not."""
    case = Case(name, "values", calibration, torch.float64)
    before = case.logits()
    values = next(one for one in case.where.linears if one is not case.where.reader)
    old, bias = values.weight.clone(), getattr(values.module, "bias", None)
    bias = None if bias is None else bias.detach().clone()
    turn = case.turn()
    eye = torch.eye(len(turn.turn), dtype=torch.float64)
    assert torch.allclose(turn.turn @ turn.back, eye, atol=1e-8)
    step = case.step(case.where.count)
    assert torch.equal(values.weight, old)  # the numbers of the edit are its own
    assert bias is None or torch.equal(values.module.bias, bias)
    step.edit.apply(case.decoder)
    assert torch.allclose(case.logits(), before, rtol=0, atol=1e-8 * float(before.abs().max()))
    now = Decoder(case.decoder.model).layer(LAYER).module.get_submodule(values.name)
    assert not torch.allclose(now.weight, values.weight, atol=1e-3)


@every
def test_cost_is_what_is_stored(name, part, calibration):
    """The numbers of all matrices that change, before and after, less the biases that go; q and k
    keep theirs where only values go.
    """
    case = Case(name, part, calibration)
    size, costs = SIZES[part], Storage.of_model(case.decoder, in_bytes=False, pivoted=True)
    said = cost_at(case.decoder, case.where, size, costs)
    offer = case.found.options(case.decoder, costs, 1)
    place_ = offer.sizes.tolist().index(size)
    assert float(offer.costs[place_]) == said
    assert offer.dense == sum(one.weight.numel() for one in case.where.linears)
    assert offer.sizes.tolist() == list(range(1, case.where.count))
    assert torch.equal(offer.losses, case.found.losses[1:-1])
    assert torch.equal(offer.seen, case.found.seen[1:-1])
    names = [one.name for one in case.where.linears]

    def numbers(kind):
        layer = case.decoder.layer(LAYER).module
        found = (getattr(layer.get_submodule(name), kind, None) for name in names)
        return sum(one.numel() for one in found if one is not None)

    biases = numbers("bias")
    case.step(size).edit.apply(case.decoder)
    assert numbers("weight") + numbers("bias") - biases == said


@pytest.mark.parametrize("multiple", [1, 5, 8, 47, 48, 100])
def test_sizes_are_multiples(multiple, calibration):
    case = Case("llama", "channels", calibration)
    costs = Storage.of_model(case.decoder, in_bytes=False, pivoted=True)
    offer = case.found.options(case.decoder, costs, multiple)
    assert offer.sizes.tolist() == [n for n in range(1, 48) if n % multiple == 0]


def test_the_units_of_a_part():
    """The columns of o that go with each value dimension and each KV group: with two query heads a
    group of width 8.
    """
    decoder = Decoder(build("llama"))
    paths = {one.path for one in decoder.linears(LAYER)}
    found = {part: place(decoder, LAYER, part, paths) for part in AXES}
    assert found["channels"].units(decoder).tolist() == [[n] for n in range(48)]
    assert found["groups"].units(decoder).tolist() == [list(range(16)), list(range(16, 32))]
    values = found["values"].units(decoder).tolist()
    assert values[:2] == [[0, 8], [1, 9]] and values[8:10] == [[16, 24], [17, 25]]
    assert [found[part].count for part in AXES] == [48, 16, 2]
    assert [found[part].name for part in AXES] == ["1 channels", "1 values", "1 groups"]


@pytest.mark.parametrize("part", AXES)
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_a_second_part_of_the_same_layer(name, part, calibration):
    """Channels first, then values or groups, or the other way round: prices were taken before, and
    each edit stands by itself.
    """
    other = "channels" if part != "channels" else "values"
    case, second = Case(name, part, calibration), Case(name, other, calibration)
    wide = Decoder(build(name))
    steps = [(one, one.step(SIZES[one.part])) for one in (case, second)]
    for one, step in steps:
        put(wide, one.path, one.wide(step))
    later = narrowing(case.decoder, second.where, second.stats)
    for _, step in steps:
        step.edit.apply(case.decoder)
        assert later.order.tolist() == second.found.order.tolist()
    expected = case.logits(wide.model)
    scale = float(expected.abs().max())
    assert torch.allclose(case.logits(), expected, rtol=0, atol=1e-4 * scale)


def test_a_bfloat16_model_stays_one(calibration):
    case = Case("qwen2", "values", calibration, torch.bfloat16)
    case.step(5).edit.apply(case.decoder)
    assert {one.dtype for one in case.decoder.model.parameters()} == {torch.bfloat16}
    assert bool(case.logits().isfinite().all())


# --- what cannot be narrower


def all_of(decoder, layer=LAYER):
    return {one.path for one in decoder.linears(layer)}


def test_what_a_familys_code_cannot_do_is_not_offered(family):
    """OLMo2's norms of queries and keys run over all heads; everything else goes everywhere."""
    decoder = Decoder(build(family))
    offered = {part for part in AXES if place(decoder, LAYER, part, all_of(decoder))}
    assert offered == set(AXES) - set(LACKING.get(family, ()))


@pytest.mark.parametrize(
    ("gone", "left"),
    [
        ("mlp.down_proj", {"values", "groups"}),
        ("mlp.gate_proj", {"values", "groups"}),
        ("self_attn.q_proj", {"channels", "values"}),
        ("self_attn.k_proj", {"channels", "values"}),
        ("self_attn.v_proj", {"channels"}),
        ("self_attn.o_proj", {"channels"}),
    ],
)
@pytest.mark.parametrize("how", ["not chosen", "low rank"])
def test_all_matrices_of_a_part_are_needed(gone, left, how):
    """Left out by the user, or low-rank already."""
    decoder = Decoder(build("llama"))
    chosen, path = all_of(decoder), f"model.layers.{LAYER}.{gone}"
    if how == "low rank":
        rows, columns = decoder.layer(LAYER).linears[gone].shape
        Factorize(path, torch.zeros(3, columns), torch.zeros(rows, 3)).apply(decoder)
    else:
        chosen.remove(path)
    assert {part for part in AXES if place(decoder, LAYER, part, chosen)} == left


def test_a_narrower_part_is_offered_again_where_it_is_dense(calibration):
    """Channels are plain smaller matrices, which may become smaller still; value dimensions leave
    matrices with gaps, which stay as they are.
    """
    decoder = Decoder(build("llama"))
    for part in ("channels", "values"):
        case = Case("llama", part, calibration)
        case.step(SIZES[part]).edit.apply(decoder)
    assert {part for part in AXES if place(decoder, LAYER, part, all_of(decoder))} == {"channels"}
    assert place(decoder, LAYER, "channels", all_of(decoder)).count == SIZES["channels"]


def test_fewer_groups_are_counted(calibration):
    """Where attention goes by the width of the matrices, a layer with one group left is one of one
    group.
    """
    decoder = Decoder(build("llama"))
    Case("llama", "groups", calibration).step(1).edit.apply(decoder)
    where = place(decoder, LAYER, "values", all_of(decoder))
    assert (where.count, where.sizes.kv_heads, where.sizes.heads) == (8, 1, 2)
    assert where.units(decoder).tolist() == [[n, n + 8] for n in range(8)]


def test_layers_keep_their_numbers(calibration):
    """Of a model whose first layer went before."""
    decoder = Decoder(build("llama"))
    Drop(0).apply(decoder)
    where = place(decoder, LAYER, "channels", all_of(decoder))
    assert where.reader.path == "model.layers.1.mlp.down_proj" and where.layer == LAYER


def test_a_family_read_off_a_model_has_no_parts(caplog):
    """What its matrices are for is not known: ranks only."""
    from transformers import StableLmConfig, StableLmForCausalLM

    config = StableLmConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    decoder = Decoder(StableLmForCausalLM(config))
    assert "by inspection" in decoder.family.name
    assert not any(place(decoder, 0, part, all_of(decoder, 0)) for part in AXES)


def test_no_halves_are_needed(calibration):
    case = Case("llama", "values", calibration)
    found = narrowing(case.decoder, case.where, Halves(case.stats.whole))
    assert torch.equal(found.losses, found.seen) and torch.equal(found.seen, case.found.seen)
    assert torch.equal(found.order, case.found.order)
