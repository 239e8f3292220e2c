"""Method asvd: the scaled problem by independent means, and the search against losses and cuts that
are computed anew.
"""

import pytest
import torch
from conftest import build, quick
from test_svd_llm import FAMILIES, product, ranks
from weighted import alternated, dense_weights, nudged, truncated, weighted_error

import grasp
from grasp.core import journal as journals
from grasp.core.decoder import Decoder
from grasp.core.edits import Drop
from grasp.core.journal import Journal
from grasp.core.layers.low_rank_grasp import LowRankLinear
from grasp.core.runner import Resident
from grasp.errors import NumericsError, RecipeError
from grasp.methods import make
from grasp.stages.input_norms import InputMeans
from grasp.stages.options import options, parameters, pivoted_parameters
from grasp.stages.truncation import KEPT, cut, to_try, truncatable
from grasp.verbs.run_time import work

CONTRACT = {
    "recipe": {"ratio": 0.2},
    "sizes": (
        {"retain_ratio": 0.3, "layers": (1, 3)},
        {"ratio": 0.1, "allocation": "strs", "search_samples": 1, "projections": "mlp"},
        {"retain_ratio": 0.6, "allocation": "strs", "search_samples": 1, "layers": (1,)},
    ),
    "flags": {
        "--alpha": (0.25, ("-0.5", "1.5", "nan", "inf", "1e400", "x")),
        "--search-samples": (2, ("0", "-1", "1.5", "nan", "9" * 23, "x")),
    },
}
STRS = {"allocation": "strs", "search_samples": 2}


def run(data, name="llama", model=None, **fields):
    model = build(name) if model is None else model
    return grasp.compress(model, method="asvd", data=data, **fields)


def means(model, data):
    """path -> mean |x| (in,): by plain hooks, all tokens at once."""
    found = {}

    def keep(path):
        def hook(_module, inputs):
            real = inputs[0].flatten(0, -2)
            real = real if data.mask is None else real[data.mask.flatten()]
            found[path] = real.double().abs().mean(0)

        return hook

    for layer in Decoder(model).layers():
        for one in layer.linears.values():
            one.module.register_forward_pre_hook(keep(one.path))
    with torch.no_grad():
        model(input_ids=data.ids, attention_mask=data.mask, use_cache=False)
    return found


def loss(model, ids):
    """Mean cross-entropy of the next token, by a loop over the blocks."""
    total = 0.0
    for block in ids:
        with torch.no_grad():
            chances = model(input_ids=block[None], use_cache=False).logits[0].log_softmax(-1)
        total -= float(chances[:-1].gather(1, block[1:, None]).double().sum())
    return total / (len(ids) * (ids.shape[1] - 1))


# --- the scaled problem


@pytest.mark.parametrize("storage", ["pair", "pivoted"])
@pytest.mark.parametrize("name", quick(FAMILIES))
def test_no_matrix_of_that_rank_is_better_in_its_norm(name, storage, calibration):
    """What the dropped singular values of W diag(s) leave; alternating least squares and small
    nudges find nothing better, and plain truncation is worse.
    """
    result = run(calibration, name, retain_ratio=0.4, storage=storage)
    weights, inputs = dense_weights(build(name)), means(build(name), calibration)
    assert ranks(result).keys() == weights.keys()
    worse = 0
    for number, (path, rank) in enumerate(ranks(result).items()):
        weight, scale, kept = weights[path], inputs[path] ** 0.5 + 1e-6, product(result, path)
        least = float(torch.linalg.svdvals(weight * scale)[rank:].square().sum())
        error = weighted_error(weight - kept, scale)
        assert error == pytest.approx(least, rel=1e-4), path
        same = truncated(weight * scale, rank) / scale
        assert float((kept - same).norm() / weight.norm()) < 1e-4, path
        if number < 5:
            best = alternated(weight, scale, rank)
            assert least * (1 - 1e-3) <= best < 1.05 * least, path
            assert nudged(weight, scale, kept, rank) >= error * (1 - 1e-6), path
        worse += weighted_error(weight - truncated(weight, rank), scale) > 1.0005 * least
    assert worse == len(weights)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_alpha_is_the_power(alpha, calibration):
    path = "model.layers.1.mlp.gate_proj"
    result = run(calibration, retain_ratio=0.4, alpha=alpha)
    weight, rank = dense_weights(build("llama"))[path], ranks(result)[path]
    scale = means(build("llama"), calibration)[path] ** alpha + 1e-6
    same = truncated(weight * scale, rank) / scale
    assert float((product(result, path) - same).norm() / weight.norm()) < 1e-4
    if alpha == 0:
        plain = grasp.compress(
            build("llama"), method="magnitude-svd", data=calibration, retain_ratio=0.4
        )
        assert float((product(result, path) - product(plain, path)).norm()) < 1e-4


def test_padding_is_not_read(calibration):
    mask = torch.arange(20) < torch.tensor([20, 13, 20, 20, 2, 18])[:, None]
    data = grasp.Calibration(calibration.ids, "random", mask=mask)
    expected = means(build("llama"), data)
    found = Resident(Decoder(build("llama")), data).sweep([InputMeans(expected)])["input_means"]
    for path, values in expected.items():
        assert torch.allclose(found[path], values, rtol=1e-4), path


def test_an_input_that_is_never_there(calibration):
    """Mean 0: the 1e-6 keeps the factors finite."""
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = 0
    result = run(calibration, model=model, retain_ratio=0.4)
    assert bool(product(result, "model.layers.1.mlp.up_proj").isfinite().all())
    with torch.no_grad():
        assert bool(result.model(input_ids=calibration.ids).logits.isfinite().all())


# --- what a runner tries


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_runner_tries_edits_and_leaves_no_trace(name, calibration):
    """The loss of the model with each edit alone, on the first blocks only."""
    model = Decoder(build(name))
    runner, seen = Resident(model, calibration), []
    model.progress = lambda *one: seen.append(one)
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    found = runner.tried({"1": lambda: Drop(1), "2": lambda: Drop(2)}, 2, "drops")
    for layer in (1, 2):
        other = Decoder(build(name))
        Drop(layer).apply(other)
        expected = loss(other.model, calibration.ids[:2])
        assert found[str(layer)] == pytest.approx(expected, rel=1e-6)
    assert found["1"] != found["2"] and list(found) == ["1", "2"]
    assert model.kept == [0, 1, 2, 3] and runner.tried({}, 2) == {}
    after = model.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert all(p.requires_grad for p in model.model.parameters())
    assert seen[:3] == [("drops", done, 2) for done in range(3)]
    every = runner.tried({"1": lambda: Drop(1)}, 99)
    other = Decoder(build(name))
    Drop(1).apply(other)
    assert every["1"] == pytest.approx(loss(other.model, calibration.ids), rel=1e-6)


def test_a_loss_that_is_not_finite_ends_the_run_and_is_undone(calibration):
    model = Decoder(build("mistral"))
    [token, *_] = [one for one in calibration.ids[1].tolist() if one not in calibration.ids[0]]
    with torch.no_grad():
        model.model.model.embed_tokens.weight[token] = torch.inf
    with pytest.raises(NumericsError, match="calibration block 1: the loss is nan; layer 0"):
        Resident(model, calibration).tried({"1": lambda: Drop(1)}, 2)
    assert model.kept == [0, 1, 2, 3]


# --- the search


def of_shapes(shapes, cost=parameters, multiple=1):
    return {
        path: truncatable(options(shape, torch.zeros(min(shape) + 1), cost, multiple=multiple))
        for path, shape in shapes.items()
    }


def test_what_is_tried():
    """int(m n share / (m + n)) of every share, each rank once."""
    offers = of_shapes({"a": (32, 48), "b": (4, 4)})
    assert to_try(offers) == [
        *(("a", int(32 * 48 * share / 80 + 1e-9)) for share in KEPT),
        ("b", 1),
        ("b", 0),
    ]
    assert KEPT == (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
    assert [int(offers[path].sizes[0]) for path in "ab"] == [7, 0]


def by_hand(shapes, losses, budget):
    """The cut by walking down the list, one after the other."""
    ranks = {path: None for path in shapes}

    def size(path, rank):
        m, n = shapes[path]
        return m * n if rank is None else rank * (m + n)

    def total():
        return sum(size(path, rank) for path, rank in ranks.items())

    for (path, rank), _ in sorted(losses.items(), key=lambda one: one[1]):
        if total() <= budget:
            break
        before = ranks[path]
        if before is None or rank < before:
            ranks[path] = rank
            if total() <= budget:  # the last one: as little as will do
                while total() <= budget:
                    ranks[path] += 1
                ranks[path] -= 1
                break
    return ranks


@pytest.mark.parametrize("seed", range(6))
def test_the_cut_is_that_of_walking_down_the_list(seed):
    """Also where losses do not rise with what is cut, and at sizes from everything to the least."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (32, 48), "b": (48, 32), "c": (16, 16), "d": (24, 40)}
    offers = of_shapes(shapes)
    wanted = to_try(offers)
    losses = dict(zip(wanted, torch.rand(len(wanted), generator=generator).tolist(), strict=True))
    dense = sum(m * n for m, n in shapes.values())
    least = sum(float(offer.costs[0]) for offer in offers.values())
    for share in (0.0, 1e-6, 0.1, 0.25, 0.5, 0.9, 1.0):
        budget = dense - share * (dense - least)
        found = cut(offers, losses, budget).sizes
        assert found == by_hand(shapes, losses, budget), share
        spent = sum(
            m * n if found[path] is None else found[path] * (m + n)
            for path, (m, n) in shapes.items()
        )
        assert spent <= budget * (1 + 1e-9)
        assert budget - spent < 80 or share == 1e-6


def test_equal_losses_go_in_the_models_order():
    offers = of_shapes({"a": (32, 48), "b": (32, 48)})
    losses = dict.fromkeys(to_try(offers), 1.0)
    found = cut(offers, losses, 2 * 32 * 48 - 300).sizes
    assert found["b"] is None and found["a"] == (32 * 48 - 300) // 80


@pytest.mark.parametrize(("name", "storage"), [("llama", "pair"), ("gpt2", "pivoted")])
def test_the_search_is_that_of_losses_measured_anew(name, storage, calibration):
    """Every matrix alone in a model of its own, on the blocks that were asked for; then the cut."""
    chosen = {"layers": (0, 2), "projections": "mlp"}
    matrices = [one for layer in (0, 2) for one in Decoder(build(name)).linears(layer, ("mlp",))]
    inputs, dense = means(build(name), calibration), dense_weights(build(name))
    losses, shapes = {}, {}
    numbers = pivoted_parameters if storage == "pivoted" else parameters
    for one in matrices:
        weight, scale = dense[one.path], inputs[one.path] ** 0.5 + 1e-6
        m, n = shapes[one.path] = one.shape
        for share in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4):
            rank = max(r for r in range(min(m, n)) if numbers((m, n), r) <= share * m * n)
            model = build(name)
            linear = next(
                other
                for layer in Decoder(model).layers()
                for other in layer.linears.values()
                if other.path == one.path
            )
            linear.weight.copy_(truncated(weight * scale, rank) / scale)
            losses[one.path, rank] = loss(model, calibration.ids[:2])
    total = build(name).num_parameters()
    result = run(calibration, name, ratio=0.1, storage=storage, **STRS, **chosen)
    offers = {
        path: truncatable(options(shape, torch.zeros(min(shape) + 1), numbers))
        for path, shape in shapes.items()
    }
    budget = sum(m * n for m, n in shapes.values()) - 0.1 * total
    expected = cut(offers, losses, budget).sizes
    if storage == "pair":
        assert expected == by_hand(shapes, losses, budget)
    assert ranks(result) == {path: rank for path, rank in expected.items() if rank is not None}
    assert 0 < len(ranks(result)) < len(matrices) or len(set(ranks(result).values())) > 1
    assert 0 <= result.ratio * total - 0.1 * total < max(sum(shape) for shape in shapes.values())


def test_what_is_never_taken_stays_dense(calibration):
    result = run(calibration, ratio=0.03, allocation="strs", search_samples=1)
    weights, dense = result.model.state_dict(), build("llama").state_dict()
    pairs = [one for one in result.model.modules() if isinstance(one, LowRankLinear)]
    assert 0 < len(pairs) == len(ranks(result)) < 28
    untouched = [name for name in dense if name.removesuffix(".weight") not in ranks(result)]
    assert all(torch.equal(weights[name], dense[name]) for name in untouched)
    for path, rank in ranks(result).items():
        m, n = build("llama").get_submodule(path).weight.shape
        assert int(0.4 * m * n / (m + n) + 1e-9) <= rank < m * n / (m + n), path


def test_the_blocks_searched_and_what_the_plan_says_of_them(calibration):
    model, seen = build("llama"), []
    chosen = make("asvd", {"ratio": 0.05, **STRS, "projections": "down"})
    plan = chosen.plan(Decoder(model))
    model.base_model.register_forward_hook(lambda *_: seen.append(1))
    grasp.compress(model, method=chosen, data=calibration)
    assert plan.forward_blocks == 6 * 4 * 2
    assert len(seen) == calibration.num_blocks + plan.forward_blocks
    default = make("asvd", {"ratio": 0.1, "allocation": "strs"}).plan(Decoder(build("llama")))
    assert default.forward_blocks == 6 * 28 * 4
    for fields in ({"ratio": 0.1}, {"ratio": 0.0, "allocation": "strs"}):
        assert make("asvd", fields).plan(Decoder(build("llama"))).forward_blocks == 0
    costs = [
        work(Decoder(build("llama")), one, 6, 20)["pass"]
        for one in (plan, make("asvd", {"ratio": 0.05, "projections": "down"}).plan(Decoder(model)))
    ]
    assert costs[0] > 2 * costs[1]


def test_nothing_to_remove_is_not_searched(calibration):
    model, seen = build("llama"), []
    model.base_model.register_forward_hook(lambda *_: seen.append(1))
    assert run(calibration, model=model, ratio=0.0, **STRS).manifest["edits"] == []
    assert len(seen) == calibration.num_blocks


def test_a_search_goes_on_from_its_journal(calibration, tmp_path, monkeypatch):
    """What was tried is not tried again, and the losses are the same to the bit."""
    monkeypatch.setattr(journals, "WAIT", 0.0)
    monkeypatch.setattr(journals, "SHARE", float("inf"))
    drops = {str(layer): lambda layer=layer: Drop(layer) for layer in range(4)}
    whole = Resident(Decoder(build("llama")), calibration).tried(drops, 2)

    def journal(resume):
        found = Journal(tmp_path / "out.journal")
        found.claim(resume)
        found.accept({"run": "one"})
        return found

    class Stopped(Exception):
        pass

    def stop():
        raise Stopped

    with pytest.raises(Stopped):
        first = journal(False)
        Resident(Decoder(build("llama")), calibration, first).tried({**drops, "2": stop}, 2)
    first.close()
    again = journal(True)
    runner = Resident(Decoder(build("llama")), calibration, again)
    assert runner.tried({**drops, "0": stop, "1": stop}, 2) == whole
    again.remove()
    again.close()


@pytest.mark.parametrize(
    ("dtype", "budget"), [(torch.float32, "bytes"), (torch.bfloat16, "params")]
)
def test_other_numbers(dtype, budget, calibration):
    fields = {"budget": budget, "projections": "gate,up", **STRS}
    result = run(calibration, model=build("llama", dtype), ratio=0.1, **fields)
    assert 0.1 <= result.ratio < 0.1 + 80 / result.parameters_before


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("--method asvd: say how much .*--ratio, --retain-ratio, --speedup; none", {}),
        ("--ratio 0.99: cannot be reached", {"ratio": 0.99}),
        (
            r"--ratio 0.7: cannot be reached; .*--allocation strs keeps 0.4 .*, uniform goes",
            {"ratio": 0.7, "allocation": "strs"},
        ),
        (
            "--retain-ratio 0.3: --allocation strs keeps at least 0.4",
            {"retain_ratio": 0.3, "allocation": "strs"},
        ),
        (
            "--speedup 1.5: --allocation strs tries shares",
            {"speedup": 1.5, "allocation": "strs"},
        ),
        (
            "--budget latency: --allocation strs tries shares",
            {"ratio": 0.1, "budget": "latency", "allocation": "strs"},
        ),
        (
            "--search-samples 2: only --allocation strs searches",
            {"ratio": 0.1, "search_samples": 2},
        ),
        ("--allocation global: unknown; allowed: uniform, strs", {"allocation": "global"}),
        ("--alpha 1.5: must be", {"ratio": 0.1, "alpha": 1.5}),
        ("--search-samples 0: must be", {"ratio": 0.1, "search_samples": 0}),
    ],
)
def test_mistakes_are_one_line(message, fields, calibration):
    with pytest.raises(RecipeError, match=message):
        run(calibration, **fields)


def test_the_largest_ratio_that_is_named_can_be_had(calibration):
    with pytest.raises(RecipeError, match="cannot be reached") as caught:
        run(calibration, ratio=0.7, **STRS)
    largest = float(str(caught.value).split("reachable is ")[1].split(" ")[0])
    result = run(calibration, ratio=largest, allocation="strs", search_samples=1)
    assert result.ratio >= largest and len(ranks(result)) == 28
