"""The contract of every method on every family: size, neutrality, reload, determinism, generation,
repeatability.

Every method is saved, loaded and generated from on every family; sizes and neutrality of a peer are
tried on Llama and three others; determinism and 16 bits on Llama alone. `make test` takes our own
methods on the families that differ most. Each peer is loaded again there on Llama and one other,
and its size met on that one. The rest is marked slow.
"""

import json
import math

import pytest
import torch
from closeness import close, is_greedy, same_weights
from conftest import DIFFERENT, FAMILY_ROWS, LAYERS, WITH_EXPERTS, build
from contracts import contracts

import grasp
from grasp.core.decoder import Decoder
from grasp.core.edits import Drop
from grasp.core.experts import mixtures
from grasp.core.fields import declared
from grasp.methods import available, class_of, make
from grasp.methods.base import layer_sizes
from grasp.methods.low_rank import LowRank
from grasp.methods.widths import Widths

METHODS = sorted(available())
RECIPES = {
    "grasp": {"num_layers": 2, "retain_ratio": 0.3},
    "grasp-fisher": {"ratio": 0.2},
    "shortgpt": {"num_layers": 2},
}
SIZES = {
    "grasp": ({"ratio": 0.2}, {"layers": (1, 3)}),
    "grasp-fisher": (
        {"retain_ratio": 0.3, "layers": (1, 3)},
        {"ratio": 0.1, "layers": "bi", "num_layers": 2},
    ),
    "shortgpt": ({"ratio": 0.2}, {"layers": (1, 3)}),
}
"""More ways to say how much, for every method."""
NEUTRAL = {}
"""Fields that change nothing, where that is not ratio 0."""
REFUSES = {}
"""Families that a method does not suit; its own tests say how it refuses them."""
UNTIES: set[str] = set()
"""Methods that leave embedding and head apart."""

for name, told in contracts().items():
    RECIPES[name], SIZES[name] = told["recipe"], told["sizes"]
    NEUTRAL[name] = told.get("neutral", {"ratio": 0.0})
    REFUSES[name] = told.get("refuses", ())
    if told.get("unties"):
        UNTIES.add(name)


OWN = ("grasp", "grasp-fisher")
OTHERS = [name for name in FAMILY_ROWS if name != "llama"]


def turn(family, method):
    """Where a family is in the row of those that a method suits, which begins elsewhere for each
    method.
    """
    suits = [name for name in OTHERS if name not in REFUSES.get(method, ())]
    return (suits.index(family) - 7 * METHODS.index(method)) % len(suits)


def is_quick(family, method):
    if method in OWN or family == "llama":
        return family in DIFFERENT
    return turn(family, method) == 0


def is_quick_alone(family, method):
    """Where less than the whole is tried."""
    return is_quick(family, method) and (method in OWN or family != "llama")


def is_thorough(family, method):
    """Sizes and neutrality of a peer are tried on Llama and on three others."""
    return method in OWN or family == "llama" or turn(family, method) < 3


def matrix(methods, families, quick=is_quick):
    """Every method of these on every family of these that it suits."""
    return [
        pytest.param(family, method, marks=() if quick(family, method) else pytest.mark.slow)
        for method in methods
        for family in families
        if family not in REFUSES.get(method, ())
    ]


def over(pairs):
    return pytest.mark.parametrize(("family", "method"), pairs)


everywhere = over(matrix(METHODS, FAMILY_ROWS))
on_some_for_peers = over(
    [pair for pair in matrix(METHODS, FAMILY_ROWS, is_quick_alone) if is_thorough(*pair.values)]
)
on_one_for_peers = over(
    [
        *matrix(OWN, DIFFERENT),
        *matrix([name for name in METHODS if name not in OWN], ["llama"], is_quick_alone),
        *matrix([name for name in METHODS if "llama" in REFUSES.get(name, ())], ["mixtral"]),
    ]
)
"""For what does not depend on the family's matrices."""


def test_most_families_are_quick_for_some_method():
    peers = [name for name in METHODS if name not in OWN]
    tried = {pair.values[0] for pair in matrix(METHODS, FAMILY_ROWS) if not pair.marks}
    assert len(tried) >= 0.8 * len(FAMILY_ROWS)
    for method in peers:
        suits = set(FAMILY_ROWS) - set(REFUSES.get(method, ()))
        assert any(is_quick(family, method) for family in suits), method
        assert sum(is_thorough(family, method) for family in suits) >= 3, method


def compressed(name, method, calibration, **fields):
    return grasp.compress(
        build(name), method=method, data=calibration, **(fields or RECIPES[method])
    )


def reachable(family, method, sizes):
    """Those of some ways to say how much that this family can reach: beside experts, which stay,
    there may be too little to take away.
    """
    told = []
    for fields in sizes:
        try:
            make(method, fields).check(Decoder(build(family)))
        except grasp.GraspError:
            assert family in WITH_EXPERTS
            continue
        told.append(fields)
    assert told
    return told


def logits(model, ids, **more):
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_recipe_here(method):
    assert method in RECIPES and method in SIZES, (
        "add CONTRACT to the new method's test so that the contract covers it"
    )


def sizes(family, method):
    """Ways to say how much: all on Llama, elsewhere a little and a lot."""
    shares = [{"ratio": 0.05}, {"ratio": 0.3}] if "ratio" in declared(class_of(method)) else []
    told = [*shares, *((RECIPES[method], *SIZES[method]) if family == "llama" else ())]
    told = told or [RECIPES[method]]
    return reachable(family, method, [one for n, one in enumerate(told) if one not in told[:n]])


@on_some_for_peers
def test_size_is_met_and_planned(family, method, calibration):
    """`--ratio` is the true share of all parameters, and the plan tells the result: see below how
    near.
    """
    for fields in sizes(family, method):
        result = compressed(family, method, calibration, **fields)
        assert result.parameters_after == sum(p.numel() for p in result.model.parameters())
        if fields.keys() == {"ratio"}:
            check_ratio(family, fields["ratio"], result)
        check_plan(family, method, fields, result)


def check_ratio(family, ratio, result):
    """Met to within one rank (one layer, where layers go, or a step of their width)."""
    model = build(family)
    total = model.num_parameters()
    widest = max(sum(linear.shape) for linear in Decoder(model).linears(0))
    layer = sum(p.numel() for p in next(Decoder(model).layers()).module.parameters())
    mlp = [one for one in Decoder(model).linears(0) if one.name.startswith(("mlp", "fc"))]
    channels = mlp[-1].shape[1] if mlp else 1
    step = 32 * sum(one.weight.numel() for one in mlp) // channels  # of --width-multiple
    hidden = 8 * (2 * total // 32 + 4 * 32 * LAYERS)  # eight hidden dimensions, with shortcuts
    of_each = sum(one.groups * one.numbers for one in mixtures(Decoder(model)))
    kinds = {edit["edit"] for edit in result.manifest["edits"]}
    whole = kinds & {"drop", "replace", "replace-mlp"}
    most = layer if whole else step if "narrow" in kinds else widest
    most = hidden if "slice" in kinds else of_each if "drop-experts" in kinds else most
    assert -1e-6 <= result.ratio * total - ratio * total < most, (ratio, result.ratio)


def check_plan(family, method, fields, result):
    """To the number; where ranks or widths follow from scores not yet known, what is planned is the
    most, missed by less than one rank, or by what a pair must save to be one, or by one channel.
    """
    chosen, model = make(method, fields), Decoder(build(family))
    one_step = 1.0
    if issubclass(class_of(method), LowRank):
        shapes = [linear.shape for linear in model.linears(0)]
        one_step = max(
            *(float(sum(shape)) for shape in shapes),
            *(chosen.least_saving * math.prod(shape) for shape in shapes),
        )
    if issubclass(class_of(method), Widths):
        each = {one.axis: float(one.each) for one in chosen.parts(model)}
        one_step = each.get("channels", max(each.values()))
    # which layers are edited was not known either, and they need not be alike
    whole = layer_sizes(model).values()
    inside = [sum(one.weight.numel() for one in layer.linears.values()) for layer in model.layers()]
    uneven = max(max(whole) - min(whole), max(inside) - min(inside))
    if chosen.over_experts:  # nor how many tokens an expert sees: with few it stays as it is
        uneven += sum(one.count * one.numbers for one in mixtures(model))
    missed = chosen.plan(model).parameters - result.parameters_after
    assert -uneven <= missed < one_step + uneven, fields


@on_some_for_peers
def test_ratio_zero_changes_nothing(family, method, calibration):
    before = logits(build(family), calibration.ids)
    result = compressed(family, method, calibration, **NEUTRAL.get(method, {"ratio": 0.0}))
    assert result.manifest["edits"] == []
    assert close(logits(result.model, calibration.ids), before)


@everywhere
def test_saved_loaded_and_generated_from(family, method, calibration, tmp_path):
    """Biases and tied embeddings survive, so does saving once more; it writes text; and what
    grasp.json says about the method makes the same method again.
    """
    check_generation(saved_and_loaded(family, method, calibration, tmp_path), calibration)
    told = json.loads((tmp_path / "out" / "grasp.json").read_text())
    fields = {
        name: value for name, value in told["method"].items() if name not in ("name", "paper")
    }
    assert make(told["method"]["name"], fields).recipe() == make(method, RECIPES[method]).recipe()
    assert told["calibration"]["ids_sha256"] == calibration.ids_hash


@on_one_for_peers
def test_bfloat16_survives(family, method, calibration, tmp_path):
    saved_and_loaded(family, method, calibration, tmp_path, torch.bfloat16)


def saved_and_loaded(family, method, calibration, tmp_path, dtype=torch.float32):
    """The compressed model, after its checks."""
    model = build(family, dtype)
    result = grasp.compress(
        model, tmp_path / "out", method=method, data=calibration, **RECIPES[method]
    )
    again = grasp.load(tmp_path / "out")
    assert again.manifest["edits"] == result.manifest["edits"]
    assert again.model.dtype == dtype
    assert type(again.model).__name__ == type(model).__name__
    expected = logits(result.model, calibration.ids)
    assert same_weights(again.model, result.model)
    assert close(logits(again.model, calibration.ids), expected)
    again.model.save_pretrained(tmp_path / "resaved")
    resaved = grasp.load(tmp_path / "resaved").model
    assert same_weights(resaved, result.model)
    assert close(logits(resaved, calibration.ids), expected)
    if FAMILY_ROWS[family].tied and method not in UNTIES:
        assert (
            again.model.get_input_embeddings().weight is again.model.get_output_embeddings().weight
        )
    biases = {name for name, _ in result.model.named_parameters() if name.endswith("bias")}
    assert {name for name, _ in again.model.named_parameters() if name.endswith("bias")} == biases
    assert bool(biases) == FAMILY_ROWS[family].biased
    return again.model


@on_one_for_peers
def test_same_seed_same_edits(family, method, calibration):
    first, second = (compressed(family, method, calibration) for _ in range(2))
    assert first.manifest["edits"] == second.manifest["edits"]
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True)
    )


def check_generation(model, calibration):
    """Greedy text with the key-value cache equals greedy text without, alone and in a left-padded
    batch.
    """
    prompts = [calibration.ids[0, :9], calibration.ids[1, :5]]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 258, "eos_token_id": None}
    alone = []
    for prompt in prompts:
        cached = model.generate(
            prompt[None], attention_mask=torch.ones_like(prompt[None]), use_cache=True, **options
        )
        plain = model.generate(
            prompt[None], attention_mask=torch.ones_like(prompt[None]), use_cache=False, **options
        )
        for text in (cached, plain):
            assert is_greedy(model, prompt, text[0, len(prompt) :])
        alone.append(cached[0, len(prompt) :])
    padded = torch.full((2, 9), 258)
    mask = torch.zeros(2, 9, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        padded[row, 9 - len(prompt) :] = prompt
        mask[row, 9 - len(prompt) :] = 1
    batch = model.generate(padded, attention_mask=mask, use_cache=True, **options)[:, 9:]
    for prompt, text in zip(prompts, batch, strict=True):
        assert text.shape == alone[0].shape and is_greedy(model, prompt, text)


@pytest.mark.parametrize("layer", (1, LAYERS - 1))
def test_dropping_a_layer_is_skipping_it(family, layer, calibration, tmp_path):
    """The model without a layer computes what the dense one does when that layer hands its input
    on; config and cache follow.
    """
    dense, model = build(family), Decoder(build(family))
    Drop(layer).apply(model)

    def skip(_module, args, kwargs, output):
        before = args[0] if args else kwargs["hidden_states"]
        return (before, *output[1:]) if isinstance(output, tuple) else before

    handle = next(
        m for i, m in enumerate(Decoder(dense).stack) if i == layer
    ).register_forward_hook(skip, with_kwargs=True)
    expected = logits(dense, calibration.ids, use_cache=False)
    handle.remove()
    assert torch.allclose(logits(model.model, calibration.ids), expected, atol=1e-5)
    assert model.config.num_hidden_layers == LAYERS - 1
    for key, value in model.config.to_dict().items():
        assert (
            not (isinstance(value, list) and key.endswith("layer_types"))
            or len(value) == LAYERS - 1
        ), key
    model.model.save_pretrained(tmp_path)
    assert torch.allclose(logits(grasp.load(tmp_path).model, calibration.ids), expected, atol=1e-5)
    assert [found.index for found in model.layers()] == [i for i in range(LAYERS) if i != layer]


def test_qwen2_keeps_its_window_boundary():
    """Layers from max_window_layers on slide; dropping one below the boundary moves it, above it
    does not.
    """
    below, above = Decoder(build("qwen2")), Decoder(build("qwen2"))
    Drop(0).apply(below)
    Drop(3).apply(above)
    assert (below.config.max_window_layers, above.config.max_window_layers) == (1, 2)
    assert below.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert above.config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
