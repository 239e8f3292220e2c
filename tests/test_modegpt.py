"""Method modegpt: each of its three decompositions by plain hooks and another way to its optimum,
how much each layer loses, what it leaves.
"""

import math

import pytest
import torch
from closeness import close
from conftest import LAYERS, WITH_EXPERTS, build, quick
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import grasp
from grasp.core.decoder import Decoder
from grasp.core.edits.cuts import rotary, sizes_of
from grasp.core.layers.structure_grasp import structure_of
from grasp.core.runner import Resident
from grasp.errors import RecipeError
from grasp.methods import make
from grasp.stages.modular import (
    RIDGE,
    HeadMoments,
    best_dims,
    fewer_channels,
    fewer_keys,
    fewer_values,
    leverages,
)
from grasp.stages.shares import Part, spread, widths

CONTRACT = {
    "recipe": {"ratio": 0.2},
    "sizes": (
        {"ratio": 0.15, "allocation": "uniform", "layers": (1, 2)},
        {"ratio": 0.3, "smoothing": 0.5},
    ),
    "refuses": WITH_EXPERTS,
    "flags": {"--smoothing": (0.2, ("0", "-0.5", "nan", "inf", "1e400", "x"))},
}
SOME = ("llama", "qwen2", "phi3", "gpt_neox", "gpt2", "opt", "gemma2")
NORMED = ("qwen3", "gemma3_text", "olmo2")
LAYER = 1


def run(data, name="llama", model=None, **fields):
    model = build(name) if model is None else model
    return grasp.compress(model, method="modegpt", data=data, **{"ratio": 0.2, **fields})


def seen(name, role, data, at="output", dtype=torch.float32):
    """(tokens, width) of what goes into, or comes out of, a role's matrix in one layer, float64."""
    decoder, found = Decoder(build(name, dtype)), []
    module = decoder.layer(LAYER).linears[decoder.family.path(role)].module

    def hook(_module, inputs, output):
        found.append((inputs[0] if at == "input" else output).flatten(0, -2).double())

    handle = module.register_forward_hook(hook)
    with torch.no_grad():
        for ids in data.ids:
            decoder.model(input_ids=ids[None])
    handle.remove()
    return torch.cat(found)


def heads(name, role, data):
    """(heads, tokens, head_dim) of q, k or v, by hand."""
    given, count = (
        seen(name, role, data),
        4 if role == "q" or name in ("gpt_neox", "gpt2", "opt") else 2,
    )
    if name == "gpt_neox":
        return given.view(-1, 4, 3, 8)[:, :, "qkv".index(role)].transpose(0, 1)
    if name in ("gpt2", "phi3"):
        start = {"q": 0, "k": 32, "v": 64 if name == "gpt2" else 48}[role]
        given = given[:, start : start + 8 * count]
    return given.view(len(given), count, 8).transpose(0, 1)


def moments(name, data, model=None):
    decoder = Decoder(build(name) if model is None else model)
    collector = HeadMoments(decoder.family, {LAYER: sizes_of(decoder, LAYER)}, {LAYER: "qkv"})
    return Resident(decoder, data).sweep([collector])["head_moments"]


def ridged(gram):
    return gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


# --- Type I


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt"])
def test_down_is_the_least_squares_on_the_channels_that_stay(name, calibration):
    """argmin |W H - W' H_S|^2 over the tokens, with the ridge's rows below them."""
    decoder, inputs = Decoder(build(name)), seen(name, "down", calibration, "input")
    gram = inputs.T @ inputs / len(inputs)
    edit = fewer_channels(decoder, LAYER, gram, 20)
    path = decoder.family.path("down")
    weight = decoder.layer(LAYER).linears[path].weight.double()
    ridge = math.sqrt(RIDGE * float(gram.diagonal().mean()) * len(inputs))
    rows = torch.cat([inputs, ridge * torch.eye(inputs.shape[1], dtype=torch.float64)])
    best = torch.linalg.lstsq(rows[:, edit.keep], rows @ weight.T).solution.T
    assert torch.allclose(edit.numbers[path].double(), best, rtol=0, atol=1e-4)
    loss = (inputs @ weight.T - inputs[:, edit.keep] @ edit.numbers[path].double().T).square().sum()
    plain = (inputs @ weight.T - inputs[:, edit.keep] @ weight[:, edit.keep].T).square().sum()
    assert loss < plain


def test_leverages_are_those_of_the_formula(calibration):
    inputs = seen("llama", "down", calibration, "input")
    gram = inputs.T @ inputs
    scores = (gram @ torch.linalg.inv(ridged(gram))).diagonal()
    assert torch.allclose(leverages(gram, RIDGE), scores, atol=1e-10)
    edit = fewer_channels(Decoder(build("llama")), LAYER, gram, 20)
    assert edit.keep.tolist() == sorted(scores.argsort(descending=True)[:20].tolist())
    assert torch.equal(leverages(torch.zeros(3, 3), RIDGE), torch.ones(3).double())


# --- Type II


def squares(name, data):
    """(what |q_i|^2 |k_i|^2 are made of), by hand: mean squares of q summed over a group, of k."""
    queries, keys = (heads(name, role, data).square().mean(1) for role in "qk")
    return queries.view(len(keys), -1, 8).sum(1), keys


@pytest.mark.parametrize("name", quick(SOME))
def test_the_dimensions_of_the_largest_norms_stay(name, calibration):
    """Single ones, or rotary pairs (i, i + 4) of a head of 8 by the product of their norms."""
    edit = fewer_keys(Decoder(build(name)), LAYER, moments(name, calibration), 4)
    queries, keys = squares(name, calibration)
    for head, (q, k) in enumerate(zip(queries, keys, strict=True)):
        stay = sorted(place % 8 for place in edit.keep.tolist() if place // 8 == head)
        assert len(stay) == 4
        if name in ("gpt2", "opt"):
            assert stay == sorted((q * k).argsort(descending=True)[:4].tolist())
        elif name == "gpt_neox":  # (0, 1) turn, the others do not
            assert (0 in stay) == (1 in stay)
        else:
            pairs = (q[:4] + q[4:]) * (k[:4] + k[4:])
            best = pairs.argsort(descending=True)[:2].tolist()
            assert stay == sorted([*best, *(one + 4 for one in best)])


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "qwen2", "granite"])
def test_rotation_does_not_change_the_norms_of_a_pair(name, calibration):
    """What attention itself gets has the norms that pairs are scored by; of single dimensions it
    has others.
    """
    decoder, got = Decoder(build(name)), []

    def attention(_module, query, key, value, *_args, **_options):
        got.append((query, key))
        return torch.zeros_like(query).transpose(1, 2), None

    data = grasp.Calibration(calibration.ids[:1], "one block")
    sizes = {0: sizes_of(decoder, 0)}  # which reads the same, whatever attention gives
    table = Resident(decoder, data).sweep([HeadMoments(decoder.family, sizes, {0: "qk"})])
    ALL_ATTENTION_FUNCTIONS["of-a-test"] = attention
    try:
        decoder.model.config._attn_implementation = "of-a-test"
        with torch.no_grad():
            decoder.model(input_ids=data.ids)
    finally:
        del ALL_ATTENTION_FUNCTIONS["of-a-test"]
    for role, turned in zip("qk", got[0], strict=True):
        before = table["head_moments"][f"{role}.0"]
        after = turned[0].double().square().mean(1)  # heads, head_dim
        pairs = [one[:, :4] + one[:, 4:] for one in (before, after)]
        assert torch.allclose(*pairs, rtol=1e-4)
        assert not torch.allclose(before, after, rtol=1e-2)


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize("seed", range(5))
def test_partly_rotary_heads_keep_just_as_many(count, seed):
    """Pairs and single dimensions together; no pair is torn, and none that stays is worth less than
    what could take its place.
    """
    drawn = torch.rand(2, 3, 8, generator=torch.Generator().manual_seed(seed))
    kept = best_dims(drawn[0], drawn[1], 4, count).view(3, -1)
    assert kept.shape == (3, count)
    for head, row in enumerate(kept % 8):
        stay = set(row.tolist())
        assert all((i in stay) == (i + 2 in stay) for i in (0, 1))
        q, k = drawn[0, head], drawn[1, head]
        singles = {i: float(q[i] * k[i]) for i in range(4, 8)}
        left = [value for i, value in singles.items() if i in stay]
        gone = [value for i, value in singles.items() if i not in stay]
        assert not left or not gone or min(left) >= max(gone)


# --- Type III


@pytest.mark.parametrize("name", quick([*SOME, "olmo2", "qwen3"]))
def test_values_of_full_width_leave_the_model_as_it_was(name, calibration):
    """In the axes of the decomposition: v and o are others, the logits not."""
    decoder = Decoder(build(name, torch.float64))
    with torch.no_grad():
        before = decoder.model(calibration.ids).logits
    table = moments(name, calibration, build(name, torch.float64))
    edit = fewer_values(decoder, LAYER, table, 8)
    with torch.no_grad():
        assert torch.equal(decoder.model(calibration.ids).logits, before)
    old = decoder.layer(LAYER).linears[decoder.family.path("v")].weight
    assert not torch.allclose(edit.numbers[decoder.family.path("v")], old, atol=1e-3)
    edit.apply(decoder)
    with torch.no_grad():
        found = decoder.model(calibration.ids).logits
    assert torch.allclose(found, before, rtol=0, atol=1e-8 * float(before.abs().max()))


@pytest.mark.parametrize("name", quick(SOME))
def test_values_of_less_width_are_the_best_of_that_rank(name, calibration):
    """Eckart and Young, by a singular value decomposition of the product of the stacked outputs and
    the root of what the value head gives: no rank-r product is nearer.
    """
    decoder, count = Decoder(build(name)), 5
    edit = fewer_values(decoder, LAYER, moments(name, calibration), count)
    given = heads(name, "v", calibration)
    outputs = decoder.layer(LAYER).linears[decoder.family.path("o")].weight.double()
    group = 4 // len(given)
    edit.apply(decoder)
    module = decoder.layer(LAYER).module
    values, reader = (module.get_submodule(decoder.family.path(role)) for role in "vo")
    inputs = seen(name, "v", calibration, "input")
    with torch.no_grad():
        narrow = values.double()(inputs)  # tokens, wide outputs with zeros
    for head, tokens in enumerate(given):
        stacked = torch.cat(
            [outputs[:, 8 * (head * group + j) :][:, :8] for j in range(group)]
        )  # of the query heads
        gram = ridged(tokens.T @ tokens / len(tokens))
        root = torch.linalg.cholesky(gram)
        least = torch.linalg.svdvals(stacked @ root)[count:].square().sum()
        # what is left, as one matrix: o' v' = stacked P, found from the tokens
        own = {"gpt_neox": 24 * head + 16, "gpt2": 64 + 8 * head, "phi3": 48 + 8 * head}
        start = own.get(name, 8 * head)
        kept = narrow[:, start : start + 8]
        matrix = torch.linalg.lstsq(tokens, kept).solution.T  # v' = P v
        wide = torch.zeros(32, reader.in_features, dtype=torch.float64)
        wide[:, reader.in_places.long()] = reader.weight.double()
        now = torch.cat([wide[:, 8 * (head * group + j) :][:, :8] for j in range(group)])
        error = ((stacked - now @ matrix) @ root).square().sum()
        assert float(error) == pytest.approx(float(least), rel=1e-3)
        plain = torch.linalg.svd(stacked)
        cut = plain.U[:, :count] * plain.S[:count] @ plain.Vh[:count]
        assert float(((stacked - cut) @ root).square().sum()) > 1.001 * float(least)


# --- the three together


def test_all_three_are_in_the_log(calibration):
    result = run(calibration, ratio=0.3, allocation="uniform")
    found = {(one["layer"], one["axis"]) for one in result.manifest["edits"]}
    axes = ("channels", "value_dims", "key_dims")
    assert found == {(layer, axis) for layer in range(LAYERS) for axis in axes}


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.27])
def test_the_size_is_met_within_a_channel(name, allocation, ratio, calibration):
    result = run(calibration, name, ratio=ratio, allocation=allocation)
    spare = result.parameters_before - result.parameters_after - ratio * result.parameters_before
    assert 0 <= spare < (96 if name == "llama" else 65)
    plan = make("modegpt", {"ratio": ratio, "allocation": allocation}).plan(Decoder(build(name)))
    assert 0 <= plan.parameters - result.parameters_after < 96
    if allocation == "uniform":
        assert plan.parameters == result.parameters_after


def lost(result, name="llama"):
    """Share of its numbers that each layer lost."""
    return {
        layer: 1 - after / before
        for layer, (before, after) in enumerate(
            zip(_sizes(Decoder(build(name))), _sizes(result.decoder), strict=True)
        )
    }


def _sizes(decoder):
    return [sum(p.numel() for p in layer.module.parameters()) for layer in decoder.layers()]


def test_layers_lose_by_the_softmax_of_their_influence(calibration):
    result = run(calibration, ratio=0.1, smoothing=0.3)
    scores = result.manifest["redundancy"]["bi"]
    weights = [math.exp(-scores[str(layer)] / 0.3) for layer in range(LAYERS)]
    found = lost(result)
    for layer, weight in enumerate(weights):
        share = sum(found.values()) * weight / sum(weights)
        assert found[layer] == pytest.approx(share, abs=0.02), layer
    assert max(found.values()) > min(found.values()) + 0.01
    even = lost(run(calibration, ratio=0.1, allocation="uniform"))
    assert max(even.values()) < min(even.values()) + 0.02


def test_a_layer_that_cannot_give_its_share_leaves_it_to_others():
    parts = [Part(layer, "channels", 10, 5) for layer in range(3)]
    gives = spread(parts, 90, {0: 1000.0, 1: 1.0, 2: 1.0})
    assert gives[0] == 45 and gives[1] == pytest.approx(22.5) == gives[2]
    left = widths(parts, gives, 90)
    assert sum((10 - n) * 5 for n in left.values()) == 90 and left[parts[0]] == 1


def test_heads_round_and_channels_make_up():
    parts = [Part(0, "kv_groups", 3, 100), Part(0, "channels", 50, 10)]
    assert list(widths(parts, spread(parts, 200), 200).values()) == [2, 40]
    assert list(widths(parts, spread(parts, 690), 690).values()) == [1, 1]
    assert list(widths(parts, spread(parts, 0), 0).values()) == [3, 50]
    assert list(widths(parts[:1], {0: 120}, 120).values()) == [1]  # no channels to make it up


@pytest.mark.parametrize("name", NORMED)
def test_norms_keep_queries_and_keys_dense(name, calibration, caplog):
    result = run(calibration, name)
    assert {one["axis"] for one in result.manifest["edits"]} == {"channels", "value_dims"}
    assert "q and k of 4 of 4 layers stay dense" in caplog.text
    before, now = Decoder(build(name)).layer(LAYER), result.decoder.layer(LAYER)
    for role in "qk":
        path = result.decoder.family.path(role)
        assert torch.equal(before.linears[path].weight, now.linears[path].weight)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox"])
def test_it_loads_again(name, calibration, tmp_path):
    grasp.compress(build(name), tmp_path / "a", method="modegpt", data=calibration, ratio=0.3)
    again = grasp.load(tmp_path / "a").model
    result = run(calibration, name, ratio=0.3)
    with torch.no_grad():
        assert close(again(calibration.ids).logits, result.model(calibration.ids).logits)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_exported_dense_it_has_zeros_for_what_is_gone(name, calibration, tmp_path):
    """An ordinary checkpoint, also where q, k and v of one matrix lost rows of their own."""
    result = grasp.compress(
        build(name), tmp_path / "a", method="modegpt", data=calibration, ratio=0.3
    )
    grasp.export(tmp_path / "a", tmp_path / "b", format="dense")
    plain = grasp.load(tmp_path / "b").model
    assert not structure_of(plain)
    with torch.no_grad():
        expected = result.model(calibration.ids).logits
        assert close(plain(calibration.ids).logits, expected)


def test_statistics_in_files_are_the_same(calibration, tmp_path):
    one, other = run(calibration), run(calibration, scratch=str(tmp_path))
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_its_plan_counts_bytes_and_passes():
    plan = make("modegpt", {"ratio": 0.2}).plan(Decoder(build("llama")))
    assert (plan.forward_sweeps, plan.backward_sweeps) == (1, 0)
    assert plan.statistics_bytes == 4 * LAYERS * 48**2
    assert (plan.num_layers, plan.num_edits) == (LAYERS, 3 * LAYERS)


def test_rotary_pairs_stay_whole(calibration):
    decoder = Decoder(build("llama"))
    assert rotary(decoder) == 8
    for step in run(calibration, ratio=0.3).log:
        if step.edit.axis == "key_dims":
            stay = set(step.edit.keep.tolist())
            assert all((i in stay) == (i + 4 in stay) for i in range(16) if i % 8 < 4)


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("--method modegpt: say how much .* --ratio", {"ratio": None}),
        ("--ratio 0.95: cannot be reached; the largest reachable is 0.", {"ratio": 0.95}),
        ("--allocation per-layer: unknown; allowed: uniform, global", {"allocation": "per-layer"}),
        (
            "--smoothing 0.3: --allocation uniform does not read it",
            {"allocation": "uniform", "smoothing": 0.3},
        ),
        ("--smoothing 0: must be above 0", {"smoothing": 0}),
        ("--layers bi: allowed: all, inner", {"layers": "bi"}),
    ],
)
def test_mistakes_are_one_line(message, fields, calibration):
    with pytest.raises(RecipeError, match=message):
        run(calibration, **fields)


def test_beside_experts_only_heads_become_narrower(calibration):
    """As far as the family's attention has heads of one width: DeepSeek's has none to name."""
    result = run(calibration, "mixtral", ratio=0.1)
    assert {step.edit.axis for step in result.log} == {"key_dims", "value_dims"}
    assert result.ratio >= 0.1
    with pytest.raises(RecipeError, match=r"no matrices of DeepSeek-V3 are known to be dense"):
        run(calibration, "deepseek_v3", ratio=0.1)
