"""Method laco: the paper's formula, its walk from the top down, what it compares, its search."""

import math

import pytest
import torch
from closeness import close, same_weights
from conftest import LAYERS, WITH_EXPERTS, build, quick
from transformers import AutoModelForCausalLM

import grasp
from grasp.core.decoder import Decoder
from grasp.core.edits import Drop, Factorize, trial
from grasp.core.runner import Resident
from grasp.errors import GraspError, RecipeError
from grasp.methods import make
from grasp.stages.closeness import Closeness, LastHidden, cosine
from grasp.stages.merging import Candidates, merging

CONTRACT = {
    "recipe": {"num_layers": 2},
    "sizes": ({"ratio": 0.2}, {"num_layers": 2, "merge": 3, "compare_samples": 2}),
    "refuses": WITH_EXPERTS,
    "flags": {
        "--threshold": (0.5, ("-1.5", "1.1", "nan", "x")),
        "--merge": (3, ("1", "1.5", "x")),
        "--interval": (2, ("0", "1.5", "x")),
        "--lowest-layer": (1, ("-1", "x")),
        "--highest-layer": (2, ("-1", "x")),
        "--compare-samples": (2, ("0", "1.5", "x")),
    },
}
DEEP = 6


def run(data, name="llama", model=None, **fields):
    model = build(name) if model is None else model
    return grasp.compress(model, method="laco", data=data, **fields)


def deep():
    """A tiny model of more layers, whose numbers are small, so that merging is mild."""
    config = build("llama").config
    config.num_hidden_layers = DEEP
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config).eval()


def layers_of(model):
    """Of every layer, name -> numbers."""
    stack = Decoder(model).stack
    return [{name: p.detach().clone() for name, p in one.named_parameters()} for one in stack]


def gone(result):
    return [edit["layer"] for edit in result.manifest["edits"] if edit["edit"] == "drop"]


def is_norm(name):
    return "norm" in name or "ln_" in name


@pytest.mark.parametrize(
    "name", quick(["llama", "qwen2", "phi3", "gpt2", "opt", "gemma2", "olmo2"])
)
def test_a_merged_layer_is_the_papers_sum(name, calibration):
    """`theta_l + (theta_{l+1} - theta_l) + (theta_{l+2} - theta_l)` for matrices and their biases,
    as the model stores them; not the last layer's numbers, to which differences of neighbours
    telescope. Norms are those of l.
    """
    before = layers_of(build(name))
    result = run(calibration, name, threshold=-1, merge=3, interval=LAYERS)
    after = layers_of(result.model)
    assert gone(result) == [3, 2] and len(after) == 2
    for key, value in before[0].items():
        assert torch.equal(after[0][key], value)
    for key, value in before[1].items():
        if is_norm(key):
            assert torch.equal(after[1][key], value)
            continue
        expected = value + (before[2][key] - value) + (before[3][key] - value)
        assert torch.allclose(after[1][key], expected, atol=1e-6), key
        assert not torch.allclose(after[1][key], before[3][key], atol=1e-3), key


def walk(depth, width, interval, threshold, similarity):
    """Algorithm 1 on a list of names: a merged layer is the tuple of what it holds."""
    layers, place = [(n,) for n in range(depth)], depth - 1 - width
    while place >= 0:
        tried = [
            *layers[:place],
            sum(layers[place : place + width + 1], ()),
            *layers[place + width + 1 :],
        ]
        if similarity(tried) > threshold:
            layers = tried
            place = min(place - interval, len(layers) - 1 - width)
        else:
            place -= 1
    return layers


@pytest.mark.parametrize(("merge", "interval"), [(2, 1), (2, 3), (4, 1), (4, 2), (3, 2)])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.7])
def test_the_walk_is_algorithm_1(merge, interval, threshold):
    """Which candidates are looked at and kept, with a made-up similarity."""

    def similarity(layers):
        return (
            math.sin(7 * sum((n + 1) * sum(one) ** 2 for n, one in enumerate(layers))) * 0.5 + 0.5
        )

    def of_merges(merges):
        layers = [[n] for n in range(12)]
        for into, *others in merges:
            places = [next(p for p, one in enumerate(layers) if one[0] == n) for n in others]
            target = next(one for one in layers if one[0] == into)
            for place in places:
                target += layers[place]
            layers = [one for place, one in enumerate(layers) if place not in places]
        return similarity([tuple(one) for one in layers])

    class Fake:
        kept = tuple(range(12))

    method = make("laco", {"threshold": threshold, "merge": merge, "interval": interval})
    found = method._walk(Fake, merge - 1, threshold, of_merges)
    expected = walk(12, merge - 1, interval, threshold, similarity)
    assert {layer for one in found for layer in one[1:]} == {
        layer for one in expected for layer in one[1:]
    }


@pytest.mark.parametrize("name", quick(["llama", "gpt2", "opt", "gemma2"]))
def test_what_is_compared_is_the_last_hidden_state(name, calibration):
    """Behind the final norm, padding left out, a block as one vector: by `output_hidden_states`."""
    mask = torch.arange(20) < torch.tensor([20, 13, 20, 20, 2, 18])[:, None]
    data = grasp.Calibration(calibration.ids, "random", mask=mask)
    decoder = Decoder(build(name))

    def states():
        with torch.no_grad():
            return [
                decoder.model(
                    input_ids=data.ids[b : b + 1],
                    attention_mask=mask[b : b + 1],
                    output_hidden_states=True,
                ).hidden_states[-1][0][mask[b]]
                for b in range(4)
            ]

    before, runner = states(), Resident(decoder, data)
    candidates = Candidates(runner, 4)
    found = candidates.similarity([(1, 2, 3)])
    for edit in merging(runner, (1, 2, 3)):
        edit.apply(decoder)
    cosines = [
        float(torch.cosine_similarity(one.flatten(), other.flatten(), dim=0))
        for one, other in zip(before, states(), strict=True)
    ]
    assert found == pytest.approx(sum(cosines) / 4, abs=1e-5)
    assert min(cosines) < found < max(cosines) < 0.9999


def test_only_the_first_blocks_are_compared(calibration):
    model, seen = build("llama"), []
    model.base_model.register_forward_hook(lambda *_: seen.append(1))
    run(calibration, model=model, threshold=1.0, merge=2, compare_samples=2)
    candidates = LAYERS - 1
    assert len(seen) == calibration.num_blocks + 2 * (1 + candidates)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_threshold_of_one_changes_nothing(name, calibration):
    model = build(name)
    result = run(calibration, name, model, threshold=1.0, merge=2)
    assert result.manifest["edits"] == [] and same_weights(result.model, build(name))


def test_every_kept_merge_was_above_the_threshold(calibration):
    """And a lower threshold takes more layers away."""
    counts = []
    for threshold in (0.95, -1):
        result = run(calibration, model=deep(), threshold=threshold, merge=2)
        counts.append(len(gone(result)))
        decoder, data = Decoder(deep()), calibration
        runner = Resident(decoder, data)
        reference = runner.sweep([LastHidden()], blocks=5)["last_hidden"]
        now = Resident(result.decoder, data).sweep([Closeness(reference)], blocks=5)
        assert counts[-1] == 0 or now["closeness"]["cosine"] > threshold
    assert counts[0] > 0 and counts[-1] == DEEP - 1 and counts[0] < counts[1]


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_search_takes_as_many_layers_as_it_should(count, calibration):
    """It is nearer to the original than merging at every place from the top, and no threshold of a
    grid gets nearer by much.
    """
    result = run(calibration, model=deep(), num_layers=count)
    assert len(gone(result)) == count and result.model.config.num_hidden_layers == DEEP - count
    runner = Resident(Decoder(deep()), calibration)
    candidates = Candidates(runner, 5)
    reference = runner.sweep([LastHidden()], blocks=5)["last_hidden"]
    now = Resident(result.decoder, calibration).sweep([Closeness(reference)], blocks=5)
    reached = now["closeness"]["cosine"]
    others = []
    for merge in (2, 3, 4):
        if count % (merge - 1):
            continue
        for step in range(-2, 10):
            method = make("laco", {"num_layers": count, "merge": merge})
            walked = method._walk(
                runner.decoder, merge - 1, step / 10, candidates.similarity, count
            )
            if len(walked) * (merge - 1) == count:
                others.append(candidates.similarity(walked))
    assert others and reached >= max(others) - 0.02


def test_no_candidate_is_compared_twice(calibration):
    model, tried = deep(), []
    decoder = Decoder(model)
    decoder.progress = lambda task, *_: tried.append(task) if "candidate" in task else None
    method = make("laco", {"num_layers": 2})
    list(method.edits(Resident(decoder, calibration), None))
    candidates = len(set(tried))
    assert 0 < candidates <= 8 * 2 * DEEP
    again = Candidates(Resident(Decoder(deep()), calibration), 1)
    assert again.similarity([(2, 3)]) == again.similarity([(2, 3)]) and len(again.known) == 2


def test_layers_beyond_the_range_stay(calibration):
    before = layers_of(deep())
    result = run(calibration, model=deep(), threshold=-1, merge=2, lowest_layer=1, highest_layer=3)
    after = layers_of(result.model)
    assert sorted(gone(result)) == [2, 3]
    for old, new in [(0, 0), (4, 2), (5, 3)]:
        assert all(torch.equal(before[old][key], after[new][key]) for key in before[old])


def test_a_candidate_leaves_no_trace(calibration):
    decoder = Decoder(build("llama"))
    candidates = Candidates(Resident(decoder, calibration), 2)
    candidates.similarity([(2, 3), (0, 1, 2)])
    assert same_weights(decoder.model, build("llama")) and decoder.kept == list(range(LAYERS))

    class Failing(Resident):
        def sweep(self, collectors, *rest, **more):
            if isinstance(collectors[0], Closeness):
                raise GraspError("stopped")
            return super().sweep(collectors, *rest, **more)

    with pytest.raises(GraspError, match="stopped"):
        Candidates(Failing(decoder, calibration), 2).similarity([(1, 2)])
    assert same_weights(decoder.model, build("llama")) and decoder.kept == list(range(LAYERS))


def test_numbers_too_large_are_no_candidate(calibration):
    """Two layers' sum that leaves bfloat16 is turned down, and the run goes on."""
    model = build("llama", torch.bfloat16)
    with torch.no_grad():
        for layer in Decoder(model).stack[1:]:
            layer.post_attention_layernorm.weight[0] = 0  # so that nothing is multiplied by it
            layer.mlp.up_proj.weight[0, 0] = 2e38
    candidates = Candidates(Resident(Decoder(model), calibration), 1)
    assert candidates.similarity([(0, 1, 2, 3)]) == -1.0


def test_it_loads_again_and_generates(calibration, tmp_path):
    result = grasp.compress(deep(), tmp_path / "out", method="laco", num_layers=3, data=calibration)
    again = grasp.load(tmp_path / "out").model
    assert same_weights(again, result.model)
    with torch.no_grad():
        whole = again(calibration.ids).logits
        assert close(whole, result.model(calibration.ids).logits)
    assert not (tmp_path / "out" / "modeling_grasp.py").exists()  # an ordinary model


def test_cosine():
    one, other = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert float(cosine(one, other)) == pytest.approx(0.5)
    assert float(cosine(one, 3 * one)) <= 1.0 and float(cosine(one, torch.zeros(2, 2))) == 0.0


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("one of --ratio, --num-layers, --threshold; none was given", {"merge": 2}),
        ("got --ratio and --threshold", {"ratio": 0.1, "threshold": 0.5}),
        ("--num-layers 4: so many cannot go by merging; at most 3 can", {"num_layers": 4}),
        (
            "--num-layers 3: so many cannot go by merging, 2 at a time; at most 2 can",
            {"num_layers": 3, "merge": 3},
        ),
        ("--ratio 0.9: cannot be reached; the largest reachable is 0", {"ratio": 0.9}),
        ("--merge 5: only 4 layers may be merged, 0 to 3", {"threshold": 0.1, "merge": 5}),
        ("--highest-layer 4: the model has layers 0 to 3", {"num_layers": 1, "highest_layer": 4}),
        ("--lowest-layer 3: the model has layers 0 to 3", {"num_layers": 1, "lowest_layer": 3}),
    ],
)
def test_mistakes_are_one_line(message, fields, calibration):
    with pytest.raises(RecipeError, match=message):
        run(calibration, **fields)


def test_layers_that_are_not_alike_are_refused(calibration):
    decoder = Decoder(build("llama"))
    path = decoder.layer(2).linears["mlp.up_proj"].path
    with trial(decoder, Factorize(path, torch.zeros(2, 32), torch.zeros(48, 2))):
        method = make("laco", {"num_layers": 1})
        with pytest.raises(RecipeError, match=r"layer 2 has 'mlp.up_proj.weight.*--lowest-layer"):
            method.check(decoder)
        make("laco", {"num_layers": 1, "highest_layer": 1}).check(decoder)
    method.check(decoder)
    stack = Decoder(model := build("llama")).stack
    stack[1].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(40, 32))
    with pytest.raises(RecipeError, match=r"'mlp.up_proj.weight' of layer 1 is of another shape"):
        make("laco", {"num_layers": 1}).check(Decoder(model))


def test_a_model_whose_layers_cannot_go_is_refused(calibration):
    model = build("gpt2")
    model.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(GraspError, match="scales attention by the layer's index"):
        run(calibration, model=model, threshold=0.5)


def test_a_dropped_layer_is_no_more_merged(calibration):
    decoder = Decoder(deep())
    Drop(5).apply(decoder)
    method = make("laco", {"num_layers": 1, "merge": 2})
    found = list(method.edits(Resident(decoder, calibration), None))
    assert {layer for step in found for layer in step.edit.layers} <= set(range(5))


def test_layers_with_experts_are_not_merged(calibration):
    """Which expert of one layer is like which of another is not known."""
    with pytest.raises(
        RecipeError, match=r"layer 0 has 'mlp.experts.down_proj', which is no dense"
    ):
        grasp.compress(build("mixtral"), method="laco", num_layers=2, data=calibration)
