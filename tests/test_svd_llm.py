"""Method svd-llm: the whitened truncation, by an independent Cholesky version, and what its ratio
means.
"""

import math
import shlex

import pytest
import torch
from conftest import build, quick
from test_curvature import all_paths, brute_force, damped_gram

import grasp
from grasp.cli import cli
from grasp.compensation.recipe import make_recipe
from grasp.core.decoder import Decoder
from grasp.core.layers.low_rank_grasp import LowRankLinear
from grasp.core.linalg import rank_for_ratio
from grasp.core.runner import Resident
from grasp.errors import RecipeError
from grasp.methods import make
from grasp.methods.svd_llm import TRAINING
from grasp.stages.basis import INPUT_DAMPING
from grasp.stages.curvature import Curvatures, InputCurvatures
from grasp.stages.refit import refitted

CONTRACT = {
    "recipe": {"ratio": 0.2},
    "sizes": (
        {"retain_ratio": 0.3, "layers": (1, 3)},
        {"retain_ratio": 0.55, "storage": "pivoted", "rank_multiple": 2},
        {"ratio": 0.1, "projections": "mlp"},
        {"ratio": 0.2, "update": "lstsq", "storage": "pivoted"},
    ),
    "flags": {
        "--update": ("lstsq", ("nonsense", "least-squares")),
        "--update-samples": (4, ("0", "-1", "1.5", "nan", "x")),
    },
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
@pytest.mark.parametrize("name", quick(FAMILIES))
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


@pytest.mark.parametrize("name", quick(FAMILIES))
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


@pytest.mark.parametrize(("name", "update"), [("llama", "lstsq"), ("gemma2", "none")])
def test_under_gqa_keys_and_values_have_ranks_of_their_own(name, update, calibration):
    """By hand, at the paper's 20 %: k and v have half the rows of q here, not half its rank."""
    found = ranks(run(calibration, name, retain_ratio=0.8, update=update))
    by_hand = {"q": 12, "k": 8, "v": 8, "o": 12, "gate": 15, "up": 15, "down": 15}
    assert {path.split(".")[-1].removesuffix("_proj"): rank for path, rank in found.items()} == (
        by_hand
    )
    assert len(found) == 4 * 7 and len({(p.split(".")[-1], r) for p, r in found.items()}) == 7


def test_the_papers_ranks():
    """Llama-7B's matrices at 20 %, and the keys of a model with eight of them for 32 queries."""
    shapes = {(4096, 4096): 1638, (11008, 4096): 2388, (4096, 11008): 2388, (1024, 4096): 655}
    assert {shape: rank_for_ratio(*shape, 0.8) for shape in shapes} == shapes


@pytest.mark.parametrize("name", quick(FAMILIES))
def test_the_error_is_the_sum_of_the_squared_singular_values_that_were_dropped(name, calibration):
    """Those that grasp.json tells, which are means over tokens; measured on the tokens by hand. The
    damping adds its share.
    """
    result = run(calibration, name, retain_ratio=0.4)
    dense = sums(name, calibration)
    for edit in result.manifest["edits"]:
        weight, gram, tokens = dense[edit["path"]]
        kept, sigmas = edit["note"]["kept"], edit["note"]["singular_values"]
        assert kept == list(range(edit["rank"])) and sigmas == sorted(sigmas, reverse=True)
        dropped = sum(sigma**2 for sigma in sigmas[len(kept) :])
        change = weight - product(result, edit["path"])
        found = outputs(change, gram) / tokens
        mean = INPUT_DAMPING * gram.diagonal().mean() / tokens
        damped = found + float(mean * change.square().sum())
        assert damped == pytest.approx(dropped, rel=1e-4), edit["path"]
        assert 0.95 * dropped < found <= dropped, edit["path"]


def test_the_ratio_is_of_all_parameters(calibration):
    """And the shares differ by what rounding leaves over: a rank a matrix at most."""
    result = run(calibration, ratio=0.2)
    shapes = {path: found[0].shape for path, found in sums("llama", calibration).items()}
    share = 1 - 0.2 * result.parameters_before / sum(m * n for m, n in shapes.values())
    for path, (m, n) in shapes.items():
        assert ranks(result)[path] - int(m * n * share / (m + n)) in (0, 1), path
    assert 0 <= result.ratio - 0.2 < (32 + 48) / result.parameters_before


# The update by least squares


def prefixes(name, result, data, blocks=None):
    """For every layer, path -> the tokens (tokens, in) that its dense matrices read where the
    layers before are those of `result`: by plain hooks, one model that is compressed bit by bit.
    """
    model = build(name, result.model.dtype)
    for layer in Decoder(build(name)).layers():
        seen, handles = {}, []
        for linear in layer.linears.values():

            def keep(_module, inputs, path=linear.path, seen=seen):
                seen[path] = inputs[0].detach().double().flatten(0, -2)

            handles.append(model.get_submodule(linear.path).register_forward_pre_hook(keep))
        with torch.no_grad():
            model(input_ids=data.ids[:blocks], use_cache=False)
        for handle in handles:
            handle.remove()
        yield seen
        for path in layer.linears:
            full = f"{Decoder(model).family.layers}.{layer.index}.{path}"
            model.set_submodule(full, result.model.get_submodule(full))


def inner(result, path):
    """A of a pair, or what has the same rows."""
    return result.model.get_submodule(path).weight_in.detach().double()


@pytest.mark.parametrize("storage", ["pair", "pivoted"])
@pytest.mark.parametrize("name", quick(FAMILIES))
def test_the_update_is_least_squares_on_the_compressed_layers_before(name, storage, calibration):
    """Every matrix, by one `lstsq` on all tokens: A is as without the update, B the best there
    is.
    """
    plain = run(calibration, name, retain_ratio=0.4, storage=storage)
    found = run(calibration, name, retain_ratio=0.4, storage=storage, update="lstsq")
    assert ranks(found) == ranks(plain)
    dense = {path: weight for path, (weight, *_) in sums(name, calibration).items()}
    seen = {}
    for layer in prefixes(name, found, calibration):
        for path, x in layer.items():
            weight, right = dense[path], inner(plain, path)
            best = torch.linalg.lstsq(x @ right.T, x @ weight.T).solution.T @ right
            left = (product(found, path) - best).norm() / weight.norm()
            change = (best - product(plain, path)).norm() / weight.norm()
            assert float(left) < 1e-4, path
            # what the first layer reads, its pairs were made for
            assert float(change) < 1e-4 if ".0." in path else float(change) > 0.05, path
        seen |= layer
    assert seen.keys() == dense.keys()


@pytest.mark.parametrize("name", quick(["llama", "phi3", "qwen2", "gemma2", "olmo2", "gpt_neox"]))
def test_the_update_never_leaves_more_of_the_error(name, calibration):
    """On the inputs that it is fitted to; it falls nearly everywhere behind the first layer."""
    plain = run(calibration, name, retain_ratio=0.4)
    found = run(calibration, name, retain_ratio=0.4, update="lstsq")
    dense = {path: weight for path, (weight, *_) in sums(name, calibration).items()}
    gained = []
    for number, layer in enumerate(prefixes(name, found, calibration)):
        for path, x in layer.items():
            gram = x.T @ x
            before, after = (
                outputs(dense[path] - product(one, path), gram) for one in (plain, found)
            )
            assert after <= before * (1 + 1e-6), path
            gained += [before / after] if number else []
    assert sum(gain > 1.01 for gain in gained) > len(gained) / 2


def test_the_update_reads_as_many_blocks_as_it_is_told(calibration):
    asked = {"retain_ratio": 0.3, "update": "lstsq"}
    plain = run(calibration, retain_ratio=0.3)
    few, all_ = (run(calibration, update_samples=number, **asked) for number in (2, 6))
    assert few.manifest["method"]["update_samples"] == 2
    dense = {path: weight for path, (weight, *_) in sums("llama", calibration).items()}
    for layer in prefixes("llama", few, calibration, 2):
        for path, x in layer.items():
            right = inner(plain, path)
            best = torch.linalg.lstsq(x @ right.T, x @ dense[path].T).solution.T @ right
            assert float((product(few, path) - best).norm() / dense[path].norm()) < 1e-3, path
            assert float((product(few, path) - product(all_, path)).norm()) > 0, path
    same = run(calibration, **asked)  # 16 of 6 are all
    for one, other in zip(same.model.parameters(), all_.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("samples", "blocks"), [(None, 16), (3, 3), (99, 18)])
def test_the_update_goes_through_the_layers_once(samples, blocks, calibration, layer_runs):
    """Layers 0 and 1 for the inputs of layer 1, then 1 to 3 as they are by then."""
    data = grasp.Calibration(calibration.ids.repeat(3, 1)[:, :6], "random")
    asked = {"ratio": 0.05, "update": "lstsq", "layers": (3, 1), "update_samples": samples}
    model = build("llama")
    seen = layer_runs(model)
    plan = make("svd-llm", asked).plan(Decoder(model))
    without = {**asked, "update": "none", "update_samples": None}
    more = plan.statistics_bytes - make("svd-llm", without).plan(Decoder(model)).statistics_bytes
    assert (plan.forward_sweeps, plan.forward_blocks) == (1, math.ceil((samples or 16) * 5 / 4))
    assert more == 4 * (6 * 32**2 + 48**2)  # of one layer
    grasp.compress(model, method="svd-llm", data=data, **asked)
    assert len(seen) == 18 * 4 + 5 * blocks


def test_few_tokens_are_said(calibration, caplog):
    data = grasp.Calibration(calibration.ids[:, :4], "random")
    asked = {"retain_ratio": 0.4, "update": "lstsq", "update_samples": 3}
    run(data, **asked)
    assert "--update lstsq: 12 tokens are few to fit ranks up to 7 to" in caplog.text
    caplog.clear()
    run(calibration, **{**asked, "retain_ratio": 0.3})
    assert "--update lstsq" not in caplog.text


def test_in_bfloat16_the_update_is_worth_its_rounding(calibration):
    """The numbers it is stored in have eight bits; what is gained outweighs that."""
    model, asked = build("llama", torch.bfloat16), {"retain_ratio": 0.4, "data": calibration}
    plain = grasp.compress(build("llama", torch.bfloat16), method="svd-llm", **asked)
    found = grasp.compress(model, method="svd-llm", update="lstsq", **asked)
    before = after = 0.0
    layers = Decoder(build("llama", torch.bfloat16)).layers()
    dense = {one.path: one.weight.double() for each in layers for one in each.linears.values()}
    for layer in prefixes("llama", found, calibration):
        for path, x in layer.items():
            gram, weight = x.T @ x, dense[path]
            before += outputs(weight - product(plain, path), gram) / outputs(weight, gram)
            after += outputs(weight - product(found, path), gram) / outputs(weight, gram)
    assert after < 0.95 * before


def test_the_update_leaves_padding_out(calibration):
    """Whatever stands under the mask."""
    mask = torch.arange(20) < torch.tensor([20, 13, 20, 20, 9, 18])[:, None]
    asked = {"retain_ratio": 0.4, "update": "lstsq"}
    first, second = (
        run(grasp.Calibration(calibration.ids.where(mask, fill), "x", mask=mask), **asked)
        for fill in (torch.tensor(0), torch.tensor(77))
    )
    for path in ranks(first):
        assert torch.allclose(product(first, path), product(second, path), atol=1e-5), path


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_a_refit_changes_what_the_inputs_reach_and_nothing_else(shape):
    """Fewer tokens than ranks: the outputs are met, and B changes by the least that does it.
    Nothing is read, or no group is kept: as it was.
    """
    draw = torch.Generator().manual_seed(0)
    weight, left, right, x = (
        torch.randn(*one, generator=draw, dtype=torch.float64)
        for one in (shape, (shape[0], 5), (5, shape[1]), (3, shape[1]))
    )
    found = refitted(weight, left, right, x.T @ x)
    z = x @ right.T
    assert torch.allclose(found @ z.T, weight @ x.T, atol=1e-3)
    size = z.norm(dim=0)  # by which changes are measured
    least = torch.linalg.lstsq(z / size, x @ weight.T - z @ left.T, driver="gelsd").solution.T
    assert torch.allclose((found - left) * size, least, atol=1e-3)
    nothing = torch.zeros(shape[1], shape[1], dtype=torch.float64)
    assert torch.equal(refitted(weight, left, right, nothing), left)
    assert refitted(weight, left[:, :0], right[:0], x.T @ x).shape == (shape[0], 0)


def test_a_refit_does_not_depend_on_how_a_pair_shares_its_norm():
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(9, 7, generator=draw), torch.randn(40, 7, generator=draw)
    left, right = torch.randn(9, 4, generator=draw), torch.randn(4, 7, generator=draw)
    scale = torch.tensor([1e-3, 1.0, 1e3, 1e5])
    found = refitted(weight, left, right, x.T @ x) @ right
    scaled = right * scale[:, None]
    again = refitted(weight, left / scale, scaled, x.T @ x) @ scaled
    assert torch.allclose(found, again, atol=1e-4)


def test_the_commands_that_stand_for_the_lora_update():
    """They are read by `grasp recover` as they stand, and are the published script's."""
    made = []
    for words in TRAINING:
        told = cli.commands["recover"].make_context("recover", shlex.split(words)[2:]).params
        asked = {} if told["lora_on"] is None else {"lora_on": told["lora_on"]}
        made.append(make_recipe(told["preset"], asked))
    assert [one.lora_on for one in made] == ["output-factors", "input-factors"]
    for one in made:
        assert (one.train, one.objective, one.lora_rank, one.lora_alpha) == ("lora", "lm", 8, 16)
        assert (one.learning_rate, one.batch_size, one.epochs) == (1e-4, 64, 3)
        assert (one.max_length, one.warmup_steps, one.schedule) == (256, 100, "linear")


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
        ("--update lsq: unknown; allowed: none, lstsq, lora", {"ratio": 0.2, "update": "lsq"}),
        ("--update lora: is a training.*`grasp recover DIR MID", {"ratio": 0.2, "update": "lora"}),
        ("--update-samples 4: --update none fits to no", {"ratio": 0.2, "update_samples": 4}),
        ("--update-samples 0: must be", {"ratio": 0.2, "update": "lstsq", "update_samples": 0}),
    ],
)
def test_mistakes_are_one_line(message, fields, calibration):
    with pytest.raises(RecipeError, match=message):
        run(calibration, **fields)
