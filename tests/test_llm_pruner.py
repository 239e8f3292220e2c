"""Method llm-pruner: importance by autograd and plain slices, what goes with what, how much."""

import pytest
import torch
from closeness import close
from conftest import LAYERS, WITH_EXPERTS, WITHOUT_EXPERTS, build, quick

import grasp
from grasp.core.decoder import Decoder
from grasp.core.edits.cuts import sizes_of
from grasp.core.runner import Resident
from grasp.errors import RecipeError
from grasp.methods import make
from grasp.stages.coupled import importance, paths

CONTRACT = {
    "recipe": {"ratio": 0.2},
    "sizes": (
        {"ratio": 0.15, "importance": "vectorize", "layers": (1, 2)},
        {"ratio": 0.3, "importance": "param_second", "layers": "all"},
    ),
    "refuses": WITH_EXPERTS,
    "flags": {"--importance": ("vectorize", ("nonsense", "param_mix"))},
}
KINDS = ("param_first", "param_second", "vectorize")
SOME = ("llama", "qwen2", "phi3", "gpt_neox", "gpt2", "opt", "gemma2")
FUSED = {
    "q": {"phi3": (0, 32), "gpt2": (0, 32)},
    "k": {"phi3": (32, 48), "gpt2": (32, 64)},
    "v": {"phi3": (48, 64), "gpt2": (64, 96)},
    "gate": {"phi3": (0, 48)},
    "up": {"phi3": (48, 96)},
}
"""Role -> family -> its rows in the matrix that holds several."""


def run(data, name="llama", model=None, **fields):
    model = build(name) if model is None else model
    return grasp.compress(model, method="llm-pruner", data=data, **{"ratio": 0.2, **fields})


def rows_of(name, role, heads, head, dim=8):
    """The rows of a head (or of a channel) of a role, by hand."""
    if name == "gpt_neox" and role in "qkv":  # head after head, each with its q, k and v
        return range((3 * head + "qkv".index(role)) * dim, (3 * head + "qkv".index(role) + 1) * dim)
    start = FUSED.get(role, {}).get(name, (0, 0))[0]
    return range(start + head * dim, start + (head + 1) * dim)


def groups(name, decoder, layer):
    """axis -> the weights of every unit: [(path inside the layer, rows or None, columns or None)],
    by hand.
    """
    family, kv_heads = decoder.family, sizes_of(decoder, layer).kv_heads
    group, channels = 4 // kv_heads, sizes_of(decoder, layer).channels
    heads = []
    for kv in range(kv_heads):
        queries = range(kv * group, (kv + 1) * group)
        unit = [(family.path("q"), rows_of(name, "q", 4, one), None) for one in queries]
        unit += [(family.path(r), rows_of(name, r, kv_heads, kv), None) for r in "kv"]
        unit += [(family.path("o"), None, range(one * 8, one * 8 + 8)) for one in queries]
        heads.append(unit)
    roles = [role for role in ("gate", "up") if family.holding(role)]
    inner = []
    for one in range(channels):
        unit = [(family.path(r), rows_of(name, r, channels, one, 1), None) for r in roles]
        inner.append([*unit, (family.path("down"), None, range(one, one + 1))])
    return {"kv_groups": heads, "channels": inner}


def steep(name):
    """A model with larger weights."""
    model = build(name)
    with torch.no_grad():
        for layer in Decoder(model).layers():
            for linear in layer.linears.values():
                linear.weight.mul_(4)
    return model


def gradients(name, data, model=None):
    """path -> (W, g of the mean loss over all tokens, g of every sample's mean loss), (out, in)."""
    model = (build(name) if model is None else model).requires_grad_(True)
    decoder = Decoder(model)
    linears = [one for layer in decoder.layers() for one in layer.linears.values()]
    samples = {one.path: [] for one in linears}
    for ids in data.ids:
        model.zero_grad()
        logits = model(input_ids=ids[None]).logits[0, :-1].float()
        torch.nn.functional.cross_entropy(logits, ids[1:]).backward()
        for one in linears:
            samples[one.path].append(one.oriented(one.parameter.grad).double())
    return {
        one.path: (one.weight.double(), sum(samples[one.path]) / len(data.ids), samples[one.path])
        for one in linears
    }


def scored(unit, layer, prefix, found, kind):
    """The importance of a group by loops over its vectors."""
    total = 0.0
    for name, rows, columns in unit:
        weight, mean, samples = found[f"{prefix}.{layer}.{name}"]
        for place in rows if rows is not None else columns:
            at = (place,) if rows is not None else (slice(None), place)
            w, g = weight[at], mean[at]
            if kind == "vectorize":
                total += abs(float(w @ g))
            elif kind == "param_first":
                total += float((w * g).abs().sum())
            else:
                fisher = sum(one[at] ** 2 for one in samples) / len(samples)
                total += float((w * g - 0.5 * w**2 * fisher).abs().sum())
    return total


def kept(result):
    """(layer, axis) -> how many are left."""
    return {(one["layer"], one["axis"]): one["left"] for one in result.manifest["edits"]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", quick(SOME))
def test_the_least_important_go_by_autograd(name, kind, calibration):
    """In every layer and axis, those that stay are the best by a loop over rows and columns."""
    result = run(calibration, name, importance=kind, ratio=0.25)
    found, decoder = gradients(name, calibration), Decoder(build(name))
    seen = set()
    for step in result.log:
        edit = step.edit
        units = groups(name, decoder, edit.layer)[edit.axis]
        scores = [scored(one, edit.layer, decoder.family.layers, found, kind) for one in units]
        stay = set(edit.keep.tolist())
        worst = min(scores[one] for one in stay)
        best = max(score for one, score in enumerate(scores) if one not in stay)
        assert worst >= best * (1 - 1e-4), (edit.layer, edit.axis)
        assert len(stay) == edit.left < edit.of == len(units)
        seen.add(edit.axis)
    assert seen == {"kv_groups", "channels"}


@pytest.mark.parametrize("name", quick(WITHOUT_EXPERTS))
def test_the_narrower_model_is_the_wide_one_with_zeros(name, calibration):
    """Every group that goes, zeroed where it lies in the wide matrices, rows and columns."""
    result, wide = run(calibration, name, ratio=0.25), Decoder(build(name))
    before = wide.num_parameters()
    for step in result.log:
        units = groups(name, wide, step.edit.layer)[step.edit.axis]
        linears = wide.layer(step.edit.layer).linears
        for number in set(range(len(units))) - set(step.edit.keep.tolist()):
            for path, rows, columns in units[number]:
                linear, at = linears[path], list(rows if rows is not None else columns)
                with torch.no_grad():
                    if columns is not None:
                        linear.weight[:, at] = 0
                        continue
                    linear.weight[at] = 0
                    if getattr(linear.module, "bias", None) is not None:
                        linear.module.bias[at] = 0
    with torch.no_grad():
        expected = wide.model(calibration.ids).logits
        assert close(result.model(calibration.ids).logits, expected)
    assert result.parameters_after < before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_importance_to_the_number(name, kind, calibration):
    """In nats a token, of every group; with weights large enough for the second order to count."""
    decoder = Decoder(steep(name))
    chosen = make("llm-pruner", {"ratio": 0.2, "importance": kind})
    stats = Resident(decoder, calibration).sweep(chosen.needs(decoder))
    found, differs = gradients(name, calibration, steep(name)), 0.0
    linears = decoder.layer(1).linears
    for axis, units in groups(name, decoder, 1).items():
        scores = {path: chosen.scores(linears[path], stats, 6) for path in paths(decoder, axis)}
        said = importance(decoder, 1, axis, scores).tolist()
        for number, unit in enumerate(units):
            expected = scored(unit, 1, decoder.family.layers, found, kind)
            other = scored(unit, 1, decoder.family.layers, found, "param_first")
            assert said[number] == pytest.approx(expected, rel=1e-4), (axis, number)
            differs = max(differs, abs(other / expected - 1))
    assert (differs > 1e-3) == (kind != "param_first")


@pytest.mark.parametrize("name", ["llama", "gpt2", "olmo2"])
@pytest.mark.parametrize("ratio", [0.01, 0.05, 0.12, 0.2, 0.3])
def test_the_size_is_met_within_a_channel(name, ratio, calibration):
    decoder = Decoder(build(name))
    mlp = [decoder.family.path(role) for role in ("gate", "up") if decoder.family.holding(role)]
    channel = (len(mlp) + 1) * 32 + (name == "gpt2")  # its bias
    result = run(calibration, name, ratio=ratio)
    spare = result.parameters_before * ratio
    assert 0 <= result.parameters_before - result.parameters_after - spare < channel
    assert make("llm-pruner", {"ratio": ratio}).plan(decoder).parameters == result.parameters_after


def test_layers_lose_the_same(calibration):
    """As many groups each, and channels that differ by one at most."""
    left = kept(run(calibration, ratio=0.25))
    for axis in ("kv_groups", "channels"):
        found = [left[layer, axis] for layer in range(LAYERS)]
        assert max(found) - min(found) <= (axis == "channels")


def deep(count):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=count,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return Decoder(LlamaForCausalLM(config))


@pytest.mark.parametrize(
    ("count", "first", "last"), [(32, 4, 29), (40, 4, 37), (16, 2, 14), (8, 1, 7), (7, 0, 6)]
)
def test_the_first_and_last_layers_stay_whole(count, first, last):
    """Layers 4 to 29 of 32, as in the paper; fewer of shallower models."""
    decoder = deep(count)
    parts = make("llm-pruner", {"ratio": 0.1}).parts(decoder)
    assert {one.layer for one in parts} == set(range(first, last + 1))
    everywhere = make("llm-pruner", {"ratio": 0.1, "layers": "all"}).parts(decoder)
    assert {one.layer for one in everywhere} == set(range(count))


def test_named_layers_and_no_others(calibration):
    result = run(calibration, ratio=0.1, layers="1,3")
    assert {layer for layer, _ in kept(result)} == {1, 3}


def test_where_no_group_can_go_channels_do(calibration, caplog):
    """OLMo 2: its norms of queries and keys run over all heads."""
    result = run(calibration, "olmo2")
    assert {axis for _, axis in kept(result)} == {"channels"}
    assert "no KV group of 4 of 4 layers can go" in caplog.text
    caplog.clear()
    run(calibration)
    assert "no KV group" not in caplog.text


@pytest.mark.parametrize(("kind", "numbers"), [("param_first", 1), ("param_second", 2)])
def test_its_plan_counts_what_it_keeps(kind, numbers, calibration):
    decoder = Decoder(build("llama"))
    plan = make("llm-pruner", {"ratio": 0.2, "importance": kind}).plan(decoder)
    linears = [one for layer in decoder.layers() for one in layer.linears.values()]
    assert plan.statistics_bytes == 4 * numbers * sum(one.weight.numel() for one in linears)
    assert (plan.forward_sweeps, plan.backward_sweeps, plan.num_layers) == (0, 1, LAYERS)
    by_vector = make("llm-pruner", {"ratio": 0.2, "importance": "vectorize"}).plan(decoder)
    assert by_vector.statistics_bytes == 8 * sum(sum(one.shape) for one in linears)


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("--method llm-pruner: say how much .* --ratio", {"ratio": None}),
        ("--ratio 0.95: cannot be reached; the largest reachable is 0.6", {"ratio": 0.95}),
        ("--layers 9: the model has layers 0 to 3", {"layers": "9"}),
        ("--layers x: allowed: all, inner, or indices", {"layers": "x"}),
        ("--layers 1,all: allowed", {"layers": "1,all"}),
        ("--layers 1,1: name at least one layer, and none twice", {"layers": "1,1"}),
        ("--importance sum: unknown; allowed: param_first", {"importance": "sum"}),
    ],
)
def test_mistakes_are_one_line(message, fields, calibration):
    with pytest.raises(RecipeError, match=message):
        run(calibration, **fields)


def test_a_family_read_off_a_model_is_refused(calibration):
    """What its matrices are for is not known."""
    from transformers import StableLmConfig, StableLmForCausalLM

    config = StableLmConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    with pytest.raises(RecipeError, match=r"--ratio 0.2: cannot be reached.*no matrices of"):
        run(calibration, model=StableLmForCausalLM(config))


def test_the_largest_ratio_that_is_named_can_be_had(calibration):
    with pytest.raises(RecipeError, match="largest reachable") as caught:
        run(calibration, ratio=0.95)
    largest = float(str(caught.value).split("reachable is ")[1].split()[0])
    result = run(calibration, ratio=largest)
    assert result.ratio == pytest.approx(largest, abs=2e-3) and result.ratio >= largest


def test_beside_experts_only_kv_groups_go(calibration):
    """As far as the family's attention has heads of one width: DeepSeek's has none to name."""
    result = run(calibration, "mixtral", ratio=0.1)
    assert {step.edit.axis for step in result.log} == {"kv_groups"} and result.ratio >= 0.1
    with pytest.raises(RecipeError, match=r"no matrices of DeepSeek-V3 are known to be dense"):
        run(calibration, "deepseek_v3", ratio=0.1)
