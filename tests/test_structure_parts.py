"""Parts of a model under one budget: ranks, channels, value dimensions, KV groups and layers, alone
and together, in one round and in two.
"""

import pytest
import torch
from closeness import close, same_weights
from conftest import FAMILY_ROWS, LAYERS, build

import grasp
from grasp.core.decoder import Decoder
from grasp.core.edits.cuts import sizes_of
from grasp.core.layers.low_rank_grasp import LowRankLinear
from grasp.core.layers.structure_grasp import structure_of
from grasp.errors import RecipeError
from grasp.methods import make
from grasp.methods.structure import LEAST_SAVING
from grasp.verbs.compress import predict

FAMILIES = ["llama", "phi3", "gpt2", "gemma2"]
FEW = ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES[1:])]
ALONE = ["ranks", "channels", "values", "groups", "layers"]
TOGETHER = ["ranks,channels", "ranks,values", "ranks,layers", "channels,layers", ",".join(ALONE)]
MULTIPLE = 8


@pytest.fixture
def data(calibration):
    """Two blocks: a half each."""
    return grasp.Calibration(calibration.ids[:2], "random")


def run(data, name="llama", out=None, model=None, **fields):
    model = build(name) if model is None else model
    options = {"width_multiple": MULTIPLE} | fields
    return grasp.compress(model, out, method="grasp-fisher", data=data, **options)


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def step(name, parts):
    """The most numbers that one step of these parts takes, biases among them."""
    decoder = Decoder(build(name))
    layer, sizes = decoder.layer(0), sizes_of(decoder, 0)
    shapes = {path: linear.shape for path, linear in layer.linears.items()}
    mlp = sum(sum(shapes[path]) for _, path in decoder.family.mlp)
    attention = sum(
        rows * columns for rows, columns in (shapes[p] for _, p in decoder.family.attention)
    )
    found = {
        "ranks": max(map(sum, shapes.values())),
        "channels": MULTIPLE * mlp,
        "values": (1 + sizes.group) * sizes.hidden,
        "groups": attention // sizes.kv_heads,
        "layers": sum(one.numel() for one in layer.module.parameters()),
    }
    biases = sum(
        one.numel() for key, one in decoder.stack.named_parameters() if key.endswith("bias")
    )
    return max(found[part] for part in parts.split(",")) + biases


# --- the budget


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        *[
            pytest.param(name, parts, marks=() if name == "llama" else pytest.mark.slow)
            for name in FAMILIES
            for parts in ALONE[1:]
        ],
        *[("llama", parts) for parts in TOGETHER],
        ("gpt2", TOGETHER[-1]),
    ],
)
def test_the_budget_is_met(name, parts, data):
    """Each part alone, and together in two rounds: never more than asked for, and no more than one
    step less.
    """
    result = run(data, name, ratio=0.1, parts=parts)
    total = result.parameters_before
    spare = (result.ratio - 0.1) * total
    assert -1e-6 <= spare <= step(name, parts)
    assert result.parameters_after == sum(p.numel() for p in result.model.parameters())
    assert bool(logits(result.model, data.ids).isfinite().all())
    told = result.manifest["prediction"]
    assert 0 <= told["seen_rise"] <= told["loss_rise"] * (1 + 1e-9)
    kinds = {"narrow": {"channels", "values", "groups"}, "factorize": {"ranks", "layers"}}
    asked = set(parts.split(","))
    for edit in result.manifest["edits"]:
        assert asked & kinds.get(edit["edit"], {"layers"}), edit


@pytest.mark.parametrize(
    ("name", "parts", "size"),
    [
        ("llama", "ranks,values", {"ratio": 0.3}),
        ("gpt2", "ranks,groups", {"ratio": 0.3}),
        ("llama", ",".join(ALONE), {"retain_ratio": 0.6}),
    ],
    ids=str,
)
def test_two_rounds_take_no_more_than_one(name, parts, size, data):
    """What was narrowed in the first round counts in the second, also where it has no ranks."""
    results = [run(data, name, parts=parts, rounds=rounds, **size) for rounds in (1, 2)]
    if "ratio" in size:
        most = 0.7 * results[0].parameters_before
    else:
        decoder = Decoder(build(name))
        sizes = [one.weight.numel() for layer in decoder.layers() for one in layer.linears.values()]
        most = results[0].parameters_before - 0.4 * sum(sizes)
        if "layers" in parts:  # what a layer has beside its matrices is shared out too
            norms = sum(one.numel() for one in decoder.stack.parameters()) - sum(sizes)
            most -= 0.4 * norms - 1
    for result in results:
        assert result.parameters_after <= most + 1e-6
        assert most - result.parameters_after <= step(name, parts)


@pytest.mark.parametrize("parts", ["ranks,channels", "ranks,values"])
def test_a_budget_of_bytes(parts, data):
    """All that is stored: the places of pivoted pairs, and of matrices with gaps."""
    model = build("llama")
    before = sum(p.nbytes for p in model.parameters())
    result = run(data, model=model, ratio=0.3, budget="bytes", parts=parts)
    places = [b.nbytes for name, b in result.model.named_buffers() if "places" in name]
    after = sum(p.nbytes for p in result.model.parameters()) + sum(places)
    assert places and 0 <= 0.7 * before - after <= 4 * step("llama", parts)


def test_the_largest_ratio_that_is_named_can_be_had(data):
    for parts in ("channels", "values", "groups", "layers"):
        with pytest.raises(RecipeError, match="largest reachable is") as caught:
            run(data, ratio=0.95, parts=parts)
        largest = float(str(caught.value).split("largest reachable is ")[1].split()[0])
        result = run(data, ratio=largest, parts=parts)
        assert result.ratio >= largest > 0.1


# --- widths


@pytest.mark.parametrize("multiple", [4, 16, 32])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_widths_are_multiples(name, multiple, data):
    result = run(data, name, ratio=0.1, parts="channels", width_multiple=multiple)
    whole = sizes_of(Decoder(build(name)), 0).channels
    widths = {sizes_of(result.decoder, layer).channels for layer in range(LAYERS)}
    assert all(width == whole or width % multiple == 0 for width in widths) and widths != {whole}


@pytest.mark.parametrize(
    ("fields", "stays"),
    [({}, True), ({"parts": "channels"}, True), ({"parts": "channels", "uniform": True}, False)],
    ids=["default", "channels", "uniform"],
)
def test_the_last_mlp_keeps_its_width(fields, stays, data):
    """What narrowing it costs is several times its price; where one width is asked for, it must."""
    result = run(data, ratio=0.15, width_multiple=8, **fields)
    last, others = (
        {sizes_of(result.decoder, layer).channels for layer in layers}
        for layers in ([LAYERS - 1], range(LAYERS - 1))
    )
    assert (last == {48}) is stays and others != {48}


@pytest.mark.parametrize("allocation", ["per-layer", "uniform"])
@pytest.mark.parametrize("parts", ["channels", "ranks,channels"])
def test_equal_shares(allocation, parts, data):
    """Of every layer, or of every matrix and MLP, within a step of an MLP; the budget is met."""
    result = run(data, ratio=0.2, parts=parts, allocation=allocation, rounds=1)
    assert 0 <= (result.ratio - 0.2) * result.parameters_before <= step("llama", parts)
    stored = [
        sum(p.numel() for p in layer.module.parameters()) for layer in result.decoder.layers()
    ]
    assert max(stored) - min(stored) <= 2 * step("llama", "channels")


def test_dense_shapes_by_either_name(data):
    """`--parts channels` is the same in any shape, since it is dense anyhow."""
    one, two = (run(data, ratio=0.15, parts="channels", shape=shape) for shape in ("any", "dense"))
    assert one.manifest["edits"] == two.manifest["edits"]
    assert same_weights(one.model, two.model)
    assert not any("rank" in record for record in structure_of(one.model).values())


def test_a_part_that_was_not_asked_for_stays(data):
    """Values only: q, k and the MLPs are the very numbers they were."""
    result, dense = run(data, ratio=0.05, parts="values"), build("llama").state_dict()
    for name, value in result.model.state_dict().items():
        if not any(role in name for role in ("v_proj", "o_proj")):
            assert torch.equal(value, dense[name]), name


# --- what is told


@pytest.mark.parametrize("parts", ["channels", "ranks,channels", ",".join(ALONE)])
def test_what_is_predicted_is_what_the_manifest_says(parts, data):
    """In one round: the same problem, solved for the same size."""
    found = predict(
        build("llama"), [0.1, 0.25], data=data, ratio=0.1, parts=parts, width_multiple=MULTIPLE
    )
    assert 0 < found.rises[0.1] < found.rises[0.25]
    for ratio in (0.1, 0.25):
        told = run(data, ratio=ratio, parts=parts, rounds=1).manifest["prediction"]
        assert told["loss_rise"] == pytest.approx(found.rises[ratio], rel=1e-3)
        assert told["seen_rise"] == pytest.approx(found.seen[ratio], rel=1e-3)
        assert told["low"] <= told["loss_rise"] <= told["high"]


def test_more_parts_never_lose_more(data):
    """In one round, where the budget has more to choose from."""
    rises = [
        run(data, ratio=0.25, parts=parts, rounds=1).manifest["prediction"]["loss_rise"]
        for parts in ("channels", "ranks,channels", ",".join(ALONE))
    ]
    assert rises[0] * 1.001 >= rises[1] and rises[1] * 1.05 >= rises[2]


def test_each_round_reads_the_text_once(data):
    seen = {}
    for rounds in (1, 2):
        model, count = build("llama"), []
        model.base_model.register_forward_hook(lambda *_, count=count: count.append(1))
        run(data, model=model, ratio=0.3, parts="ranks,channels", rounds=rounds)
        seen[rounds] = len(count)
    assert seen == {1: data.num_blocks, 2: 2 * data.num_blocks}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parts": "ranks,chanels"}, "--parts chanels: .*did you mean 'channels'"),
        ({"parts": "ranks,channels,ranks"}, "--parts ranks,channels,ranks: .*none twice"),
        ({"parts": ()}, "--parts : name at least one of ranks, channels, values, groups, layers"),
        ({"parts": "ranks,channels", "basis": "plain"}, "--parts ranks,channels: .*nats"),
        ({"parts": "values", "score": "random"}, "--parts values: .*--parts ranks"),
        ({"rounds": 3}, "--rounds 3"),
        ({"width_multiple": 0}, "--width-multiple 0"),
        ({"width_multiple": 48}, "--width-multiple 48: the widest MLP has 48 .*--parts"),
    ],
)
def test_mistakes_are_one_line(fields, message, data):
    with pytest.raises(RecipeError, match=message) as caught:
        run(data, ratio=0.2, **fields)
    assert "\n" not in str(caught.value)


def test_mlps_too_narrow_for_the_default_multiple_stay(data, caplog, monkeypatch):
    monkeypatch.setitem(FAMILY_ROWS["llama"].arguments, "intermediate_size", 32)
    result = run(data, ratio=0.1, width_multiple=32)
    assert {edit["edit"] for edit in result.manifest["edits"]} == {"factorize"}
    assert "--width-multiple 32: the widest MLP has 32 channels" in caplog.text


# --- layers


@pytest.mark.parametrize("name", FEW)
def test_layers_gone_load_again(name, data, tmp_path):
    result = run(data, name, tmp_path / "out", ratio=0.3, parts="layers")
    gone = [edit["layer"] for edit in result.manifest["edits"] if edit["edit"] == "drop"]
    assert gone and len(result.decoder.kept) == LAYERS - len(gone)
    again = grasp.load(tmp_path / "out")
    assert close(logits(again.model, data.ids), logits(result.model, data.ids))


def test_the_layers_that_lose_least_go(data):
    """By their own losses, as the notes of the edits say."""
    result = run(data, ratio=0.3, parts="layers")
    dropped = {e["layer"]: e["note"]["predicted_loss"] for e in result.manifest["edits"]}
    more = run(data, ratio=0.5, parts="layers")
    worse = {e["layer"]: e["note"]["predicted_loss"] for e in more.manifest["edits"]}
    assert len(dropped) < len(worse) and dropped.items() <= worse.items()
    assert max(dropped.values()) <= min(set(worse.values()) - set(dropped.values()))


def test_layers_that_cannot_go_are_not_offered(data):
    """GPT-2 that scales attention by the layer's number would load as another model."""
    model = build("gpt2")
    model.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(RecipeError, match="cannot be reached"):
        run(data, model=model, ratio=0.3, parts="layers")
    result = run(data, model=model, ratio=0.2, parts="ranks,layers")
    assert len(result.decoder.kept) == LAYERS


def test_only_layers_all_of_whose_matrices_may_change(data):
    result = run(data, ratio=0.3, parts="layers", layers=(1, 2, 3))
    assert {edit["layer"] for edit in result.manifest["edits"]} < {1, 2, 3}
    with pytest.raises(RecipeError, match="cannot be reached"):
        run(data, ratio=0.3, parts="layers", exclude="k")


@pytest.mark.parametrize("parts", [*ALONE, ",".join(ALONE)])
def test_nothing_left_to_choose(parts, data):
    for scope in ({"exclude": ("all",)}, {"layers": "bi", "num_layers": 0}):
        assert run(data, retain_ratio=0.5, parts=parts, **scope).manifest["edits"] == []


# --- the result


@pytest.mark.parametrize("parts", ["values", "groups", ",".join(ALONE)])
@pytest.mark.parametrize("name", FEW)
def test_saved_and_loaded_it_is_the_same(name, parts, data, tmp_path):
    result = run(data, name, tmp_path / "out", ratio=0.12, parts=parts)
    again = grasp.load(tmp_path / "out")
    assert same_weights(again.model, result.model)
    assert close(logits(again.model, data.ids), logits(result.model, data.ids))
    assert structure_of(again.model).keys() == structure_of(result.model).keys()
    assert again.model.generate(data.ids[:1, :4], max_new_tokens=3).shape == (1, 7)


@pytest.mark.parametrize("parts", ["channels", "ranks,values"])
def test_a_narrower_model_becomes_narrower_still(parts, data):
    """Compressed twice: the second run starts from what is left."""
    first = run(data, ratio=0.1, parts=parts)
    second = run(data, model=first.model, ratio=0.1, parts=parts)
    assert second.parameters_before == first.parameters_after
    assert 0 <= second.ratio - 0.1 <= step("llama", parts) / second.parameters_before
    assert bool(logits(second.model, data.ids).isfinite().all())


def test_a_plan_counts_both_rounds():
    """Two sweeps and two decompositions of every matrix where ranks wait for the second round; no
    decomposition where there are no pairs.
    """
    decoder = Decoder(build("llama"))
    plans = {
        name: make("grasp-fisher", {"ratio": 0.2, **fields}).plan(decoder)
        for name, fields in {
            "two": {},
            "one": {"rounds": 1},
            "ranks": {"parts": ("ranks",)},
            "dense": {"shape": "dense"},
        }.items()
    }
    matrices = len([linear for layer in decoder.layers() for linear in layer.linears])
    assert {name: plan.backward_sweeps for name, plan in plans.items()} == {
        "two": 2,
        "one": 1,
        "ranks": 1,
        "dense": 1,
    }
    assert {name: plan.decompositions // matrices for name, plan in plans.items()} == {
        "two": 2,
        "one": 1,
        "ranks": 1,
        "dense": 0,
    }


@pytest.mark.parametrize("fields", [{}, {"parts": ("ranks",)}])
def test_a_pair_is_worth_its_second_product(data, fields):
    """Where ranks compete with other parts for one budget, no pair saves less than a tenth of its
    matrix; else any may.
    """
    result = run(data, ratio=0.08, rounds=1, **fields)
    saved = [
        1 - (pair.weight.numel() + pair.weight_in.numel()) / (pair.out_features * pair.in_features)
        for pair in result.model.modules()
        if isinstance(pair, LowRankLinear)
    ]
    assert saved
    assert (min(saved) >= LEAST_SAVING) == (not fields), saved
