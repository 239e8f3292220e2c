"""Method sparsegpt: its update by least squares on the inputs themselves, its masks by an inverse
taken anew for every column, and what it leaves of a model.
"""

import gc
import weakref

import pytest
import torch
from closeness import same_weights
from conftest import LAYERS, WIDTH, build
from hypothesis import given, settings
from hypothesis import strategies as st

import grasp
from grasp.core.decoder import Decoder
from grasp.core.runner import Resident
from grasp.errors import NumericsError, RecipeError
from grasp.methods import make
from grasp.methods.sparse import lowest
from grasp.stages.obs_columns import inverse_factor, replaced

CONTRACT = {
    "recipe": {"sparsity": 0.5},
    "sizes": (
        {"sparsity": "2:4", "layers": (1, 3)},
        {"sparsity": 0.3, "one_shot": True, "block_size": 16},
    ),
    "neutral": {"sparsity": 0.0},
    "flags": {
        "--damping": (0.1, ("-0.5", "1", "nan", "inf", "x")),
        "--block-size": (64, ("0", "-1", "1.5", "nan", "99999999999999999999999", "x")),
        "--one-shot": (True, ()),
    },
}
DAMPING = 0.01


def run(data, name="llama", model=None, **fields):
    model = build(name) if model is None else model
    return grasp.compress(model, method="sparsegpt", data=data, **fields)


# --- one matrix


def problem(out=6, columns=16, tokens=60, seed=0):
    """(W (out, n), inputs (tokens, n) that depend on each other), in float64."""
    numbers = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=numbers, dtype=torch.float64)
    inputs = torch.randn(tokens, columns, generator=numbers, dtype=torch.float64) @ mix
    return torch.randn(out, columns, generator=numbers, dtype=torch.float64), inputs


def changed(new, weight, inputs):
    """By how much the outputs change: sum |E x|^2."""
    return float((inputs @ (new - weight).T).square().sum())


def masked(weight, inputs, gone, block, damping=0.0):
    """W without the weights `gone`, which were chosen beforehand."""
    factor = inverse_factor(inputs.T @ inputs, damping)
    return replaced(
        weight,
        factor,
        lambda j, *_: lambda i, column: column.masked_fill(gone[:, j + i], 0),
        block=block,
    )


def by_least_squares(weight, inputs, gone):
    """The definition, row by row: where a weight goes, the best that those behind it can do for
    the outputs, by least squares on the inputs themselves.
    """
    found = weight.clone()
    for row, out in zip(found, gone, strict=True):
        for j in out.nonzero()[:, 0].tolist():
            lost, row[j] = inputs[:, j] * row[j], 0
            behind = inputs[:, j + 1 :]
            row[j + 1 :] += torch.linalg.lstsq(behind, lost[:, None]).solution[:, 0]
    return found


def test_one_weight_a_row_is_the_exact_solution():
    """Every place: those before it stay, those behind it are the constrained least squares."""
    weight, inputs = problem(out=16)
    gone = torch.eye(16, dtype=torch.bool)
    found, gram = masked(weight, inputs, gone, 4), inputs.T @ inputs
    for j in range(16):
        inverse = torch.linalg.inv(gram[j:, j:])
        change = torch.zeros(16, dtype=torch.float64)
        change[j:] = -weight[j, j] * inverse[0] / inverse[0, 0]
        assert torch.allclose(found[j], weight[j] + change, atol=1e-9)
        rest = [k for k in range(j + 1, 16)]
        slope = gram[rest] @ (found[j] - weight[j])  # of the error, along what may still move
        assert float(slope.abs().max() if rest else 0.0) < 1e-8 * float(gram.abs().max())
        lost = changed(found[j : j + 1], weight[j : j + 1], inputs)
        assert lost == pytest.approx(float(weight[j, j] ** 2 / inverse[0, 0]), rel=1e-8)


@pytest.mark.parametrize("block", [1, 2, 5, 16, 128])
@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_a_mask_given_in_advance(block, damping):
    """The sequence of least-squares solutions, whatever the blocks: the lazy update changes
    nothing. Damping is so many more inputs, one for every column.
    """
    weight, inputs = problem(seed=1)
    gone = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    found = masked(weight, inputs, gone, block, damping)
    more = (damping * inputs.square().sum(0).mean()).sqrt() * torch.eye(16, dtype=torch.float64)
    expected = by_least_squares(weight, torch.cat([inputs, more]), gone)
    assert torch.allclose(found, expected, atol=1e-8) and bool((found[gone] == 0).all())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 24), st.integers(0, 1000), st.sampled_from([0.0, 0.01, 0.3]))
def test_the_factor_is_that_of_the_inverse(columns, seed, damping):
    """Cholesky, inverse, upper Cholesky of that: the published three lines."""
    _, inputs = problem(columns=columns, seed=seed)
    gram = inputs.T @ inputs
    damped = gram + damping * gram.diagonal().mean() * torch.eye(columns, dtype=gram.dtype)
    three = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    found = inverse_factor(gram, damping)
    assert torch.equal(found, found.triu())
    assert float((found - three).norm() / three.norm()) < 1e-6


def test_columns_that_are_never_read_leave_the_others_alone():
    weight, inputs = problem()
    alive = torch.ones(16, dtype=torch.bool).index_fill(0, torch.tensor([0, 5, 6, 15]), False)
    inputs = inputs * 1e-3 * alive  # where H_jj = 1 would be the most of the mean
    gone = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    found = masked(weight, inputs, gone, 4, DAMPING)
    expected = masked(weight[:, alive], inputs[:, alive], gone[:, alive], 4, DAMPING)
    assert torch.allclose(found[:, alive], expected, atol=1e-9)
    dead = torch.where(gone, 0, weight)[:, ~alive]
    assert torch.equal(found[:, ~alive], dead)
    nothing = inverse_factor(torch.zeros(3, 3), DAMPING)
    assert torch.equal(nothing, torch.eye(3, dtype=torch.float64))


def inverse_pivots(gram, first, last):
    """1 / [H^-1]_jj of H without the rows and columns before j, for each j from first to last."""
    return [1 / float(torch.linalg.inv(gram[j:, j:])[0, 0]) for j in range(first, last)]


def check_pruned(found, weight, gram, share, width, by_row):
    """A whole run with an inverse for every column, of the damped H: the mask that was found takes
    the lowest scores of every group (by rows, or of all rows), and gives the numbers found.
    """
    now, gone, columns = weight.double().clone(), found == 0, len(gram)
    for first in range(0, columns, width):
        last = min(first + width, columns)
        pivots = torch.tensor(inverse_pivots(gram, first, last), dtype=torch.float64)
        scores, out = now[:, first:last].square() * pivots, gone[:, first:last]
        scores, chosen = (scores, out) if by_row else (scores.reshape(1, -1), out.reshape(1, -1))
        count = int(scores.shape[1] * share + 1e-9)
        assert bool((chosen.sum(1) == count).all())
        least = scores.sort(1).values[:, :count].sum(1)
        assert torch.allclose((scores * chosen).sum(1), least, rtol=1e-3)
        for j in range(first, last):
            inverse = torch.linalg.inv(gram[j:, j:])
            lost = torch.where(gone[:, j], now[:, j], 0)
            now[:, j:] -= torch.outer(lost, inverse[0] / inverse[0, 0])
            now[gone[:, j], j] = 0
    size = float(weight.double().square().mean().sqrt())
    assert float((found.double() - now).abs().max()) < 1e-3 * size


def pruned(weight, gram, **fields):
    return make("sparsegpt", fields).pruned(weight, inverse_factor(gram, DAMPING).to(weight))


def damped(gram):
    return gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


FORMS = [
    ({"sparsity": 0.5, "block_size": 5}, 0.5, 5, False),
    ({"sparsity": 0.3}, 0.3, 128, False),
    ({"sparsity": "2:4"}, 0.5, 4, True),
    ({"sparsity": "2:4", "block_size": 4}, 0.5, 4, True),
    ({"sparsity": "4:8", "block_size": 8}, 0.5, 8, True),
]


@pytest.mark.parametrize(("fields", "share", "width", "by_row"), FORMS)
def test_masks_are_chosen_as_the_paper_says(fields, share, width, by_row):
    weight, inputs = problem(seed=3)
    gram = inputs.T @ inputs
    found = pruned(weight, gram, **fields)
    check_pruned(found, weight, damped(gram), share, width, by_row)


def test_a_share_is_of_all_rows_of_a_block_together():
    """Rows differ in how much they lose, blocks do not."""
    weight, inputs = problem(out=12, columns=32)
    gone = pruned(weight, inputs.T @ inputs, sparsity=0.5, block_size=8) == 0
    assert (gone.unflatten(1, (4, 8)).sum((0, 2)) == 48).all()
    assert len(set(gone.sum(1).tolist())) > 1


@pytest.mark.parametrize(("pattern", "group"), [("2:4", 4), ("4:8", 8)])
def test_patterns_do_not_depend_on_blocks(pattern, group):
    weight, inputs = problem(columns=32)
    found = [
        pruned(weight, inputs.T @ inputs, sparsity=pattern, block_size=block)
        for block in (8, 16, 32, 128)
    ]
    assert all(torch.allclose(one, found[0], atol=1e-9) for one in found)
    assert ((found[0].unflatten(1, (-1, group)) == 0).sum(-1) == group // 2).all()


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7, "2:4", "4:8"])
@pytest.mark.parametrize("seed", range(6))
def test_the_outputs_change_less_than_by_magnitude_or_wanda(sparsity, seed):
    """By a tenth at least, with as many zeros, on the same inputs; and less than with the same
    zeros and no update. Blocks are much narrower than the matrix, as 128 columns of thousands are.
    """
    weight, inputs = problem(out=24, columns=64, tokens=200, seed=seed)
    gram = inputs.T @ inputs
    found = pruned(weight, gram, sparsity=sparsity, block_size=8)
    wanda = make("wanda", {"sparsity": sparsity})
    kept, sizes = wanda.mask(weight, gram.diagonal().sqrt()), weight.abs()
    sizes = sizes.unflatten(1, (-1, wanda.group)) if wanda.group else sizes.reshape(1, -1)
    magnitude = weight.masked_fill(lowest(sizes, wanda.share).view_as(weight), 0)
    counts = [int((one == 0).sum()) for one in (found, weight * kept, magnitude)]
    assert max(counts) - min(counts) <= len(weight)  # by rows, blocks or all: other roundings
    error = changed(found, weight, inputs)
    for other in (weight * kept, magnitude, torch.where(found == 0, 0, weight)):
        assert 1.1 * error < changed(other, weight, inputs)


def test_groups_lie_in_one_block():
    weight, inputs = problem()
    with pytest.raises(ValueError, match="block 6: not a multiple of width 4"):
        replaced(weight, inverse_factor(inputs.T @ inputs, 0.0), lambda *_: None, 4, 6)


# --- a model


def matrices(model):
    """path -> W (out, in) of every matrix."""
    return {
        linear.path: linear.weight.clone()
        for layer in Decoder(model).layers()
        for linear in layer.linears.values()
    }


def grams(model, layer, data):
    """path -> damped 2/n sum xx' of the matrices of one layer, by plain hooks, in float64."""
    found = {}

    def keep(path):
        def hook(_module, inputs):
            real = inputs[0].flatten(0, -2)
            real = real if data.mask is None else real[data.mask.flatten()]
            found[path] = damped(2 / len(real) * real.double().T @ real.double())

        return hook

    linears = Decoder(model).layer(layer).linears.values()
    handles = [one.module.register_forward_pre_hook(keep(one.path)) for one in linears]
    with torch.no_grad():
        model(input_ids=data.ids, attention_mask=data.mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def check_model(name, found, data, share, width, by_row, one_shot=False):
    """Layer by layer: the inputs of one come from the pruned ones before it and the dense matrices
    of its own; all from the dense model where it is `one_shot`.
    """
    model, dense = build(name), matrices(build(name))
    for layer in range(LAYERS):
        for path, gram in grams(model, layer, data).items():
            assert not bool((gram.diagonal() == 0).any()), path
            check_pruned(found[path], dense[path], gram, share, width, by_row)
        for linear in Decoder(model).layer(layer).linears.values():
            if not one_shot:
                linear.weight.copy_(found[linear.path])


@pytest.mark.parametrize(
    ("fields", "share", "width", "by_row"),
    [({"block_size": 16}, 0.5, 16, False), ({"sparsity": "2:4", "block_size": 16}, 0.5, 4, True)],
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_layers_are_pruned_one_after_another(name, fields, share, width, by_row, calibration):
    found = matrices(run(calibration, name, **fields).model)
    check_model(name, found, calibration, share, width, by_row)


def test_one_shot_reads_the_dense_model_and_padding_is_not_read(calibration):
    mask = torch.arange(20) < torch.tensor([20, 13, 20, 20, 2, 18])[:, None]
    data = grasp.Calibration(calibration.ids, "random", mask=mask)
    found = matrices(run(data, one_shot=True, sparsity=0.3).model)
    check_model("llama", found, data, 0.3, 128, False, one_shot=True)
    differ = matrices(run(data, sparsity=0.3).model)
    differ = [path for path in found if not torch.equal(found[path], differ[path])]
    assert differ and not any(".layers.0." in path for path in differ)


@pytest.mark.parametrize(("one_shot", "sweeps"), [(False, 3), (True, 1)])
def test_it_sweeps_as_often_as_it_says(one_shot, sweeps, calibration, layer_runs):
    """Layer by layer, each but the last two runs twice: for itself and for the next."""
    model = build("llama")
    seen = layer_runs(model)
    plan = make("sparsegpt", {"one_shot": one_shot}).plan(Decoder(model))
    assert (plan.forward_sweeps, plan.backward_sweeps) == (sweeps, 0)
    run(calibration, model=model, one_shot=one_shot)
    runs = LAYERS if one_shot else LAYERS + 2 * LAYERS - 1
    assert len(seen) == runs * calibration.num_blocks
    assert sweeps - 1 < runs / LAYERS <= sweeps


def test_one_layer_is_in_memory_at_a_time_and_one_sum_for_one_input(calibration):
    """When a sweep begins, the sums of the one before are gone; q, k and v share theirs, though k
    and v are wide, and gate and up.
    """
    before, sizes = [], []

    class Watching(Resident):
        def sweep(self, collectors, *args, **kwargs):
            gc.collect()
            assert not [one for one in before if one() is not None]
            stats = super().sweep(collectors, *args, **kwargs)
            sums = [value for one in collectors for value in one.sums.values() if value.dim() == 2]
            before[:] = map(weakref.ref, sums)
            sizes.append(sorted(len(value) for value in sums))
            return stats

    decoder, method = Decoder(build("llama")), make("sparsegpt", {})
    runner = Watching(decoder, calibration)
    for step in method.edits(runner, runner.sweep(method.needs(decoder))):
        step.edit.apply(decoder)
    assert sizes == [[], *[[WIDTH, WIDTH, WIDTH, 48]] * LAYERS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_zeros_in_the_models_dtype(dtype, calibration, tmp_path):
    """A plain checkpoint that transformers loads."""
    out = tmp_path / "out"
    result = run(calibration, model=build("llama", dtype), out=out, sparsity="4:8")
    again = grasp.load(out).model
    assert same_weights(again, result.model) and again.dtype == dtype
    assert "no smaller" in (out / "README.md").read_text()
    for path, weight in matrices(again).items():
        assert weight.dtype == dtype
        assert ((weight.unflatten(1, (-1, 8)) == 0).sum(-1) == 4).all(), path


def test_inputs_that_are_never_read_go(calibration):
    """In down_proj, whose input 5 is always 0; its other columns have no more zeros for it."""
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data[5] = 0
    result = run(calibration, model=model, sparsity=0.1)
    for layer in result.model.model.layers:
        gone = layer.mlp.down_proj.weight == 0
        assert gone[:, 5].all() and int(gone.sum()) == int(32 * 48 * 0.1)


def test_the_scratch_folder_holds_the_sums_and_is_left_empty(calibration, tmp_path):
    found = run(calibration, scratch=str(tmp_path / "sums"), one_shot=True)
    assert list((tmp_path / "sums").iterdir()) == []
    assert same_weights(found.model, run(calibration, one_shot=True).model)
    assert "scratch" not in found.manifest["method"]


def test_its_plan_counts_bytes(calibration):
    decoder = Decoder(build("llama"))
    squares = [linear.shape[1] ** 2 for linear in decoder.linears(0)]
    most = 4 * sum(squares) + 3 * 8 * max(squares)
    assert make("sparsegpt", {}).plan(decoder).statistics_bytes == most
    assert len(squares) == 7 and max(squares) == 48**2


def test_too_little_text_without_damping_is_one_line():
    data = grasp.Calibration(torch.full((2, 20), 7), "sevens")
    with pytest.raises(NumericsError, match=r"q_proj': .* singular; give more --damping than 0\.0"):
        run(data, damping=0)
    assert run(data).parameters_after > 0


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("--sparsity 1: must be at least 0 and below 1, or one of 2:4, 4:8", {"sparsity": 1}),
        (
            "--block-size 12: must be a multiple of 8 with --sparsity 4:8",
            {"block_size": 12, "sparsity": "4:8"},
        ),
        ("--block-size 0: must be a whole number from 1", {"block_size": 0}),
        ("--damping -0.1: must be at least 0 and below 1", {"damping": -0.1}),
        ("--ratio: not a flag of --method sparsegpt", {"ratio": 0.5}),
    ],
)
def test_mistakes_are_one_line(message, fields, calibration):
    with pytest.raises(RecipeError, match=message):
        run(calibration, **fields)
