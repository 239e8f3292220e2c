"""Method svd-llm: the whitened truncation, by an independent Cholesky version, and what its ratio
means.
"""

import pytest
import torch
from conftest import build
from test_curvature import all_paths, brute_force, damped_gram

import grasp
from grasp.core.decoder import Decoder
from grasp.core.layers.low_rank_grasp import LowRankLinear
from grasp.core.runner import Resident
from grasp.errors import RecipeError
from grasp.methods import make
from grasp.stages.basis import INPUT_DAMPING
from grasp.stages.curvature import Curvatures, InputCurvatures

CONTRACT = {
    "recipe": {"ratio": 0.2},
    "sizes": (
        {"retain_ratio": 0.3, "layers": (1, 3)},
        {"retain_ratio": 0.55, "storage": "pivoted", "rank_multiple": 2},
        {"ratio": 0.1, "projections": "mlp"},
    ),
}
FAMILIES = ["llama", "gpt2", "phi3", "opt"]


def run(data, name="llama", **fields):
    return grasp.compress(build(name), method="svd-llm", data=data, **fields)


def product(result, path):
    return result.model.get_submodule(path).product().detach().double()


def ranks(result):
    return {edit["path"]: edit["rank"] for edit in result.manifest["edits"]}


def whitened(weight, gram, rank):
    """The paper's five lines: (the truncated product, the singular values of W S). A little is
    added to X X', which has fewer tokens than columns in some families.
    """
    jitter = 1e-9 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    whitening = torch.linalg.cholesky(gram + jitter)
    u, s, vh = torch.linalg.svd(weight @ whitening, full_matrices=False)
    left, right = u[:, :rank] * s[:rank].sqrt(), s[:rank, None].sqrt() * vh[:rank]
    right = torch.linalg.solve_triangular(whitening, right, upper=False, left=False)
    return left @ right, s


def outputs(change, gram):
    """sum |change x|^2 over the inputs x."""
    return float((change @ gram @ change.T).trace())


def sums(name, data):
    """path -> (W (out, in), sum xx', tokens) of the dense model, by plain hooks, in float64."""
    model = build(name)
    paths = all_paths(Decoder(model))
    weights = {
        linear.path: linear.weight.double()
        for layer in Decoder(build(name)).layers()
        for linear in layer.linears.values()
    }
    found = brute_force(model, data.ids, paths)
    return {path: (weights[path], found[path][1], found[path][3]) for path in paths}


@pytest.mark.parametrize("storage", ["pair", "pivoted"])
@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_the_cholesky_version(name, storage, calibration):
    """Every matrix, tall or wide, in the dense model's metric; without our damping the outputs are
    nearly the same.
    """
    result = run(calibration, name, retain_ratio=0.4, storage=storage)
    dense = sums(name, calibration)
    assert ranks(result).keys() == dense.keys()
    for path, rank in ranks(result).items():
        weight, gram, tokens = dense[path]
        found, size = product(result, path), weight.norm()
        same, _ = whitened(weight, damped_gram(gram / tokens, INPUT_DAMPING), rank)
        assert float((found - same).norm() / size) < 1e-4, path
        undamped, _ = whitened(weight, gram, rank)
        assert outputs(found - undamped, gram) < 1e-3 * outputs(weight, gram), path


@pytest.mark.parametrize("name", FAMILIES)
def test_no_matrix_of_that_rank_changes_the_outputs_less(name, calibration):
    """Eckart and Young in the metric of the inputs that were read: the error is what the dropped
    singular values leave, and the plain truncated matrix is worse.
    """
    result = run(calibration, name, retain_ratio=0.4)
    for path, (weight, gram, _) in sums(name, calibration).items():
        rank = ranks(result)[path]
        least = float(whitened(weight, gram, rank)[1][rank:].square().sum())
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        found = outputs(weight - product(result, path), gram)
        assert least * (1 - 1e-4) <= found <= least * 1.001, path
        plain = (u[:, :rank] * s[:rank]) @ vh[:rank]
        assert outputs(weight - plain, gram) > 1.01 * least, path


@pytest.mark.parametrize("retain", [0.0, 0.2, 0.5, 0.8, 0.96])
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_every_matrix_keeps_the_same_share(name, retain, calibration):
    result = run(calibration, name, retain_ratio=retain)
    shapes = {path: found[0].shape for path, found in sums(name, calibration).items()}
    assert ranks(result) == {
        path: int(m * n * retain / (m + n) + 1e-9) for path, (m, n) in shapes.items()
    }
    pairs = [found for found in result.model.modules() if isinstance(found, LowRankLinear)]
    assert len(pairs) == len(shapes) and not any(pair.pivoted for pair in pairs)


def test_the_ratio_is_of_all_parameters(calibration):
    """And the shares differ by what rounding leaves over: a rank a matrix at most."""
    result = run(calibration, ratio=0.2)
    shapes = {path: found[0].shape for path, found in sums("llama", calibration).items()}
    share = 1 - 0.2 * result.parameters_before / sum(m * n for m, n in shapes.values())
    for path, (m, n) in shapes.items():
        assert ranks(result)[path] - int(m * n * share / (m + n)) in (0, 1), path
    assert 0 <= result.ratio - 0.2 < (32 + 48) / result.parameters_before


def test_the_loss_is_never_asked_for(calibration):
    """Forward passes are enough, and show what the Fisher sums have of the inputs."""
    decoder = Decoder(build("llama"))
    stats = Resident(decoder, calibration).sweep([InputCurvatures(all_paths(decoder))])
    assert stats.loss is None
    both = Resident(decoder, calibration).sweep(
        [InputCurvatures(all_paths(decoder)), Curvatures(all_paths(decoder))]
    )
    for path, found in stats["input_curvature"].items():
        full, again = both["curvature"][path], both["input_curvature"][path]
        side = "near" if decoder.model.get_submodule(path).weight.shape[0] >= 48 else "far"
        if getattr(found, side).dim():
            assert torch.equal(getattr(found, side), getattr(full, side)), path
        assert [found.near.dim(), found.far.dim()].count(0) == 1 and found.gradient_tokens == 0
        assert torch.equal(found.near, again.near) and torch.equal(found.far, again.far)


def test_its_plan_counts_bytes_and_passes(calibration):
    decoder = Decoder(build("llama"))
    plan = make("svd-llm", {"ratio": 0.2}).plan(decoder)
    squares = sum(
        min(linear.shape) ** 2 for layer in decoder.layers() for linear in layer.linears.values()
    )
    assert (plan.forward_sweeps, plan.backward_sweeps) == (1, 0)
    assert plan.statistics_bytes == 3 * 4 * squares
    assert plan.decompositions == plan.num_edits == len(all_paths(decoder))


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("--method svd-llm: say how much .*--ratio, --retain-ratio, --speedup; none", {}),
        ("--ratio 0.99: cannot be reached", {"ratio": 0.99}),
        ("--allocation: not a flag of --method svd-llm", {"ratio": 0.2, "allocation": "global"}),
    ],
)
def test_mistakes_are_one_line(message, fields, calibration):
    with pytest.raises(RecipeError, match=message):
        run(calibration, **fields)
