"""GRASP against a few lines of plain PyTorch, one-shot and iterative, and the properties of its
dials.
"""

import copy

import pytest
import torch
from conftest import LAYERS, build

import grasp
from grasp.core.decoder import Decoder

MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ATTENTION = tuple(f"self_attn.{r}_proj" for r in "qkvo")


def plain_step(model, ids, paths, ratio):
    """Replace the weights at `paths` by their best groups, scored by |sigma u'Gv| on the model as
    it is. Dense weights stay dense modules.
    """
    model.requires_grad_(False)
    weights = [model.get_submodule(path).weight for path in paths]
    for weight in weights:
        weight.requires_grad_(True)
        weight.grad = None
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
    ).backward()
    for weight in weights:
        u, s, vh = torch.linalg.svd(weight.detach(), full_matrices=False)
        score = (s * ((u.T @ weight.grad) * vh).sum(1)).abs()
        m, n = weight.shape
        kept = score.topk(int(m * n * ratio / (m + n))).indices
        weight.data = u[:, kept] @ torch.diag(s[kept]) @ vh[kept]


@pytest.mark.parametrize("iterative", [False, True])
def test_equals_the_plain_version(iterative, calibration):
    """One-shot: all scores from one pass. Iterative: last layer first, MLP before attention, each
    scored on the model so far.
    """
    expected = build("llama")
    steps = [
        [f"model.layers.{layer}.{name}" for name in part]
        for layer in (3, 1)
        for part in (MLP, ATTENTION)
    ]
    for paths in steps if iterative else [[path for step in steps for path in step]]:
        plain_step(expected, calibration.ids, paths, 0.3)
    found = grasp.compress(
        build("llama"),
        layers=(1, 3),
        retain_ratio=0.3,
        iterative=iterative,
        data=calibration,
        method="grasp",
    ).model
    with torch.no_grad():
        assert torch.allclose(
            found(input_ids=calibration.ids).logits,
            expected(input_ids=calibration.ids).logits,
            atol=1e-4,
        )
    for path in steps[0]:
        pair = found.get_submodule(path)
        assert torch.allclose(
            pair.weight @ pair.weight_in, expected.get_submodule(path).weight, atol=1e-5
        ), path


def test_iterative_differs_from_one_shot(calibration):
    kept = []
    for iterative in (False, True):
        result = grasp.compress(
            build("llama"),
            layers=(1, 2, 3),
            retain_ratio=0.3,
            iterative=iterative,
            data=calibration,
            method="grasp",
        )
        assert [edit["path"].split(".")[2] for edit in result.manifest["edits"]] == ["3"] * 7 + [
            "2"
        ] * 7 + ["1"] * 7
        kept.append([edit["note"]["kept"] for edit in result.manifest["edits"]])
    assert kept[0] != kept[1]


@pytest.mark.parametrize(
    ("fields", "passes"),
    [
        ({"num_layers": 2}, 2),
        ({"layers": (1, 2)}, 1),
        ({"num_layers": 2, "score": "magnitude"}, 1),
        ({"num_layers": 2, "iterative": True}, 5),
    ],
)
def test_how_often_the_set_is_read(fields, passes, calibration):
    """Named layers: block influence and gradients come from one pass. Iterative: two sweeps a
    layer.
    """
    model = build("llama")
    seen = []
    model.base_model.register_forward_hook(lambda *_: seen.append(1))
    grasp.compress(model, data=calibration, **fields, method="grasp")
    assert len(seen) == passes * calibration.num_blocks


def test_angular_takes_one_contiguous_span(calibration):
    result = grasp.compress(
        build("llama"), num_layers=2, angular=True, data=calibration, method="grasp"
    )
    layers = sorted({int(edit["path"].split(".")[2]) for edit in result.manifest["edits"]})
    assert layers[1] == layers[0] + 1
    assert result.manifest["redundancy"].keys() == {"bi", "angular"}
    by_ratio = grasp.compress(
        build("llama"), ratio=0.3, angular=True, data=calibration, method="grasp"
    )
    spanned = sorted({int(edit["path"].split(".")[2]) for edit in by_ratio.manifest["edits"]})
    assert spanned == list(range(spanned[0], spanned[-1] + 1)) and by_ratio.ratio >= 0.3
    dropped = grasp.compress(
        build("llama"), method="shortgpt", num_layers=2, angular=True, data=calibration
    )
    assert sorted(edit["layer"] for edit in dropped.manifest["edits"]) == layers


def test_threshold_keeps_the_smallest_set_that_holds_the_share(calibration):
    result = grasp.compress(
        build("llama"), layers=(1,), threshold_ratio=0.5, data=calibration, method="grasp"
    )
    assert result.manifest["edits"]
    for edit in result.manifest["edits"]:
        scores = sorted(edit["note"]["scores"], reverse=True)
        held = sum(edit["note"]["scores"][k] for k in edit["note"]["kept"])
        assert held >= 0.4999 * sum(scores)
        assert sum(scores[: edit["rank"] - 1]) < 0.5001 * sum(scores)


def test_rank_multiple(calibration):
    result = grasp.compress(
        build("llama"),
        layers=(1, 2),
        retain_ratio=0.7,
        rank_multiple=4,
        data=calibration,
        method="grasp",
    )
    assert {edit["rank"] % 4 for edit in result.manifest["edits"]} == {0}
    exact = grasp.compress(
        build("llama"), ratio=0.2, rank_multiple=4, data=calibration, method="grasp"
    )
    assert {edit["rank"] % 4 for edit in exact.manifest["edits"]} == {0} and exact.ratio >= 0.2


def test_the_random_control_is_seeded(calibration):
    def kept(seed):
        data = grasp.Calibration(calibration.ids, "random", seed)
        return [
            edit["note"]["kept"]
            for edit in grasp.compress(
                build("llama"), layers=(1,), score="random", data=data, method="grasp"
            ).manifest["edits"]
        ]

    assert kept(0) == kept(0) != kept(1)
    assert len({tuple(k) for k in kept(0)}) > 1


@pytest.mark.parametrize(
    "score",
    [
        "taylor",
        "taylor-signed",
        "gradient",
        "taylor-per-sample",
        "taylor-per-sample-squared",
        "magnitude",
        "random",
    ],
)
def test_every_score_compresses_to_the_same_size(score, calibration):
    result = grasp.compress(
        build("qwen2"),
        num_layers=2,
        retain_ratio=0.3,
        score=score,
        data=calibration,
        method="grasp",
    )
    assert {edit["note"]["score"] for edit in result.manifest["edits"]} == {score}
    for edit in result.manifest["edits"]:
        scores, kept = edit["note"]["scores"], edit["note"]["kept"]
        best = sorted(scores, reverse=True)[: edit["rank"]]
        assert min(scores[k] for k in kept) == pytest.approx(min(best), rel=1e-4)


def test_a_second_run_goes_on_where_the_first_stopped(calibration):
    """Compressing a compressed model: other layers can follow, and the size adds up."""
    first = grasp.compress(build("llama"), layers=(1,), data=calibration, method="grasp")
    second = grasp.compress(
        copy.deepcopy(first.model), layers=(2,), data=calibration, method="grasp"
    )
    both = grasp.compress(build("llama"), layers=(1, 2), data=calibration, method="grasp")
    assert second.parameters_after == both.parameters_after
    assert len(Decoder(second.model).layer(1).linears) == 0 and LAYERS == 4
