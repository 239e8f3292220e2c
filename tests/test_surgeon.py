"""Optimal Brain Surgeon against brute force: every subset of the inputs of a small matrix, refitted
by least squares in the metric; and what the closed forms say against direct computation.
"""

import itertools

import pytest
import torch

from grasp.core.records import Curvature
from grasp.errors import NumericsError
from grasp.stages import surgeon
from grasp.stages.basis import GRADIENT_DAMPING
from grasp.stages.surgeon import INPUT_DAMPING, Metric, prices, refit, removal

CHANNELS, OUT, TOKENS = 10, 6, 80


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(count=CHANNELS, tokens=TOKENS, seed=0):
    """Inputs (tokens, count) of unlike sizes, each partly what others say."""
    mixed = random(tokens, count, seed=seed) @ random(count, count, seed=seed + 1)
    return mixed * torch.linspace(0.2, 2, count).double()


def case(count=CHANNELS, out=OUT, tokens=TOKENS, seed=0):
    """(W (out, count), H, D) of a matrix that reads `inputs`."""
    h, d = inputs(count, tokens, seed), inputs(out, tokens, seed + 2) / 7
    return random(out, count, seed=seed + 4), h.mT @ h / tokens, d.mT @ d / tokens


def metric(weight, h, d):
    return Metric(h, weight.mT @ d @ weight)


def one_each(count):
    return torch.arange(count)[:, None]


def loss(weight, other, h, d):
    """1/2 tr(D (W - W') H (W - W')')."""
    change = weight - other
    return float((d @ change @ h @ change.mT).trace()) / 2


def widened(part, kept, count):
    """A matrix that reads the inputs `kept` only, as one of full width."""
    whole = torch.zeros(len(part), count, dtype=part.dtype)
    whole[:, kept] = part
    return whole


def fitted(weight, h, kept):
    """What reads the inputs `kept` and comes nearest to W, by least squares on the rows of a square
    root of H: none of the formulas of the code.
    """
    values, vectors = torch.linalg.eigh(h)
    rows = values.clamp_min(0).sqrt()[:, None] * vectors.mT  # rows' rows = H
    found = torch.linalg.lstsq(rows[:, kept], rows @ weight.mT, driver="gelsd").solution
    return found.mT


def best_loss(weight, h, d, kept):
    """The least that any matrix loses that reads the inputs `kept` only."""
    kept = torch.as_tensor(kept, dtype=torch.long)
    part = fitted(weight, h, kept) if len(kept) else torch.zeros(len(weight), 0).double()
    return loss(weight, widened(part, kept, weight.shape[1]), h, d)


def curvature(weight, h, d, tokens, wants_inputs=True):
    """The record that a sweep would give, of sums over tokens in float32."""
    tall = weight.shape[0] >= weight.shape[1]
    h, d = h * tokens, d * tokens
    near, far = (h, weight.mT @ d @ weight) if tall else (d, torch.zeros(()))
    asked = None if tall or not wants_inputs else h.float()
    squares = float(h.trace()), float(d.trace())
    return Curvature(near.float(), far.float(), *squares, tokens, tokens, asked)


# --- brute force


@pytest.fixture(scope="module", params=[0, 10])
def mlp(request):
    """(W, H, D) of `down` in a real MLP of ten channels, a gated one: the inputs are products."""
    seed = request.param
    x = random(200, 8, seed=seed)
    gate, up = random(CHANNELS, 8, seed=seed + 1), random(CHANNELS, 8, seed=seed + 2)
    h = torch.nn.functional.silu(x @ gate.mT) * (x @ up.mT)
    d = random(200, OUT, seed=seed + 3) @ random(OUT, OUT, seed=seed + 5) / 9
    return random(OUT, CHANNELS, seed=seed + 4), h.mT @ h / 200, d.mT @ d / 200


@pytest.fixture(scope="module")
def subsets(mlp):
    """Channels kept -> the least that is lost, of all 1024 subsets."""
    return {
        kept: best_loss(*mlp, kept)
        for size in range(CHANNELS + 1)
        for kept in itertools.combinations(range(CHANNELS), size)
    }


def test_the_price_of_every_subset(mlp, subsets):
    """Against the least squares in the metric, whatever the order."""
    found = metric(*mlp)
    for kept, expected in subsets.items():
        rest = [place for place in range(CHANNELS) if place not in kept]
        (priced,) = prices(found, torch.tensor([*kept, *rest]), (found,))
        assert float(priced[len(kept)]) == pytest.approx(expected, rel=1e-7, abs=1e-10), kept


def test_a_single_removal_is_exact(mlp):
    """½ (w'Dw) / (H^-1)_jj, and the first to go is the one that costs least."""
    weight, h, d = mlp
    others = [[i for i in range(CHANNELS) if i != gone] for gone in range(CHANNELS)]
    exact = torch.tensor([best_loss(weight, h, d, kept) for kept in others])
    inverse, gram = torch.linalg.inv(h), weight.mT @ d @ weight
    formula = gram.diagonal() / inverse.diagonal() / 2
    assert torch.allclose(formula, exact.double(), rtol=1e-7)
    order = removal(metric(weight, h, d), one_each(CHANNELS), together=1)
    assert int(order[0]) == int(exact.argmin())


def test_every_step_takes_the_cheapest_of_what_is_left(mlp):
    """Greedy by brute force: the channel whose loss, refitted, leaves the least total loss."""
    weight, h, d = mlp
    order = removal(metric(weight, h, d), one_each(CHANNELS), together=1).tolist()
    left = list(range(CHANNELS))
    for gone in order[:-1]:
        without = {one: best_loss(weight, h, d, [i for i in left if i != one]) for one in left}
        assert without[gone] == pytest.approx(min(without.values()), rel=1e-9)
        left.remove(gone)
    assert sorted(order) == list(range(CHANNELS))


def test_the_order_is_near_the_best_subset_at_every_size(mlp, subsets):
    """Never better than the best, at most a third worse, and far better than the average."""
    found = metric(*mlp)
    order = removal(found, one_each(CHANNELS), together=1).flip(0)
    (priced,) = prices(found, order, (found,))
    for size in range(1, CHANNELS):
        losses = [lost for kept, lost in subsets.items() if len(kept) == size]
        best, mean = min(losses), sum(losses) / len(losses)
        assert best * (1 - 1e-9) <= float(priced[size]) <= best * 4 / 3
        assert float(priced[size]) <= (best + mean) / 2


def test_several_at_a_time_lose_little(mlp):
    """Three at once: their prices were taken one by one, yet each size is exact afterwards."""
    weight, h, d = mlp
    found = metric(weight, h, d)
    one = removal(found, one_each(CHANNELS), together=1).flip(0)
    three = removal(found, one_each(CHANNELS), together=3).flip(0)
    assert sorted(three.tolist()) == list(range(CHANNELS))
    (best,), (other,) = (prices(found, one_of, (found,)) for one_of in (one, three))
    for size in range(CHANNELS + 1):
        expected = best_loss(weight, h, d, three[:size])
        assert float(other[size]) == pytest.approx(expected, rel=1e-7, abs=1e-10)
    assert float(other.sum()) <= 1.25 * float(best.sum())


# --- finite differences


def test_the_refitted_matrix_is_a_minimum_of_the_quadratic(mlp):
    """The slope along every direction is 0, by differences; every step away costs more."""
    weight, h, d = mlp
    kept = torch.tensor([0, 2, 3, 7])
    new = refit(weight, h, kept)
    at = loss(weight, widened(new, kept, CHANNELS), h, d)
    step = 1e-4
    for row, column in itertools.product(range(OUT), range(len(kept))):
        moved = []
        for sign in (1, -1):
            other = new.clone()
            other[row, column] += sign * step
            moved.append(loss(weight, widened(other, kept, CHANNELS), h, d))
        curve = (moved[0] - 2 * at + moved[1]) / step**2
        assert curve == pytest.approx(float(d[row, row] * h[kept, kept][column]), rel=1e-3)
        assert abs(moved[0] - moved[1]) / (2 * step) <= 1e-6 * curve
        assert min(moved) > at


def test_the_price_is_the_change_of_a_real_loss_to_second_order():
    """A loss that is a quadratic of the outputs: L = 1/2 sum (c'(y - y0))², its gradients the
    rows that D is made of. Scaled down, a removal costs its price times the square of the scale.
    """
    weight, h, _ = case()
    rows = random(300, OUT, seed=9)
    d = rows.mT @ rows / 300
    found = metric(weight, h, d)
    (priced,) = prices(found, torch.arange(CHANNELS), (found,))
    kept = torch.arange(4)
    change = weight - widened(refit(weight, h, kept), kept, CHANNELS)
    for scale in (1.0, 0.1):
        # E over independent x and c of 1/2 (c' M x)^2
        root = torch.linalg.cholesky(h)
        said = float((rows @ (scale * change) @ root).square().sum()) / 300 / 2
        assert said == pytest.approx(scale**2 * float(priced[4]), rel=1e-9)


# --- refit


def test_refit_is_least_squares_on_the_tokens():
    """Whatever D: each row by itself, against torch.linalg.lstsq on the inputs as they came."""
    h, weight = inputs(), random(OUT, CHANNELS, seed=4)
    kept = torch.tensor([1, 4, 5, 9])
    expected = torch.linalg.lstsq(h[:, kept], h @ weight.mT).solution.mT
    found = refit(weight, h.mT @ h / len(h), kept)
    assert found.shape == (OUT, 4) and found.is_contiguous()
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-10)


def test_refit_of_all_is_the_matrix_itself():
    weight, h, _ = case()
    assert torch.allclose(refit(weight, h, torch.arange(CHANNELS)), weight)


def test_inputs_that_say_nothing_of_each_other_need_no_refit():
    weight = random(OUT, CHANNELS)
    h = torch.rand(CHANNELS, generator=torch.Generator().manual_seed(1)).double().diag()
    kept = torch.tensor([2, 3, 8])
    assert torch.allclose(refit(weight, h, kept), weight[:, kept])


def test_a_channel_that_others_say_stands_for_costs_nothing():
    """h_9 = 2 h_0 - h_1: the refit takes it over, and without it the outputs are the same."""
    h = inputs()
    h[:, 9] = 2 * h[:, 0] - h[:, 1]
    weight, kept = random(OUT, CHANNELS, seed=4), torch.arange(9)
    new = refit(weight, h.mT @ h, kept)
    assert torch.allclose(h[:, :9] @ new.mT, h @ weight.mT)
    expected = weight[:, :9].clone()
    expected[:, 0] += 2 * weight[:, 9]
    expected[:, 1] -= weight[:, 9]
    assert torch.allclose(new, expected)


# --- judges


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("judge_tokens", [80, 4])
def test_prices_for_other_judges(size, judge_tokens):
    """1/2 tr(D_B M H_B M'), M what the chooser's refit takes from W, at every number of units."""
    weight, h, d = case()
    _, judge_h, judge_d = case(tokens=judge_tokens, seed=30)
    chooser, judge = metric(weight, h, d), metric(weight, judge_h, judge_d)
    units = torch.randperm(CHANNELS, generator=torch.Generator().manual_seed(1)).view(-1, size)
    order = removal(chooser, units).flip(0)
    columns = units[order].flatten()
    own, other = prices(chooser, columns, (chooser, judge))
    assert own.shape == other.shape == (CHANNELS + 1,)
    for count in range(len(units) + 1):
        kept = columns[: count * size]
        change = weight - widened(refit(weight, h, kept), kept, CHANNELS)
        expected = [
            float((one_d @ change @ one_h @ change.mT).trace()) / 2
            for one_h, one_d in ((h, d), (judge_h, judge_d))
        ]
        assert float(own[count * size]) == pytest.approx(expected[0], rel=1e-8, abs=1e-11)
        assert float(other[count * size]) == pytest.approx(expected[1], rel=1e-8, abs=1e-11)


def test_own_prices_fall_and_end_at_nothing():
    weight, h, d = case()
    chooser = metric(weight, h, d)
    (own,) = prices(chooser, removal(chooser, one_each(CHANNELS)).flip(0), (chooser,))
    assert bool((own.diff() <= 0).all()) and float(own[-1]) == 0
    assert float(own[0]) == pytest.approx(loss(weight, 0 * weight, h, d))


# --- units of several columns


UNITS = {"far apart": torch.arange(10).view(2, 5).mT, "side by side": torch.arange(10).view(2, 5)}


@pytest.mark.parametrize("name", UNITS)
def test_units_go_as_a_whole(name):
    """Value dimensions (one column in every query head) and KV groups (columns side by side): each
    step against brute force.
    """
    weight, h, d = case()
    units = UNITS[name]
    order = removal(metric(weight, h, d), units, together=1).tolist()
    left = list(range(len(units)))
    for gone in order[:-1]:
        without = {
            one: best_loss(weight, h, d, units[[i for i in left if i != one]].flatten())
            for one in left
        }
        assert without[gone] == pytest.approx(min(without.values()), rel=1e-9)
        left.remove(gone)
    assert sorted(order) == list(range(len(units)))


def test_a_unit_of_one_column_is_a_channel():
    """The formula for one and the one for several say the same."""
    weight, h, d = case()
    found = metric(weight, h, d)
    split = torch.block_diag(h, torch.eye(CHANNELS).double())
    gram = torch.block_diag(found.gram, torch.zeros(CHANNELS, CHANNELS).double())
    doubled = Metric(split, gram)  # each with a partner that is of no consequence
    pairs = torch.stack([torch.arange(CHANNELS), torch.arange(CHANNELS) + CHANNELS], dim=1)
    assert torch.equal(
        removal(doubled, pairs, together=1), removal(found, one_each(CHANNELS), together=1)
    )


# --- what is missing, or plain


def test_plain_metrics_give_the_plain_order():
    """D = H = I: by the norm of the columns, which stay as they are, and are the price."""
    weight = random(OUT, CHANNELS) * torch.rand(CHANNELS)
    eye = torch.eye(CHANNELS).double()
    plain = Metric(eye, weight.mT @ weight)
    squares = weight.square().sum(0)
    order = removal(plain, one_each(CHANNELS))
    assert torch.equal(order, squares.argsort())
    (priced,) = prices(plain, order.flip(0), (plain,))
    gone = torch.cat([torch.zeros(1).double(), squares.sort().values.cumsum(0)])
    assert torch.allclose(priced, gone.flip(0) / 2)
    kept = order[-4:]
    assert torch.allclose(refit(weight, eye, kept), weight[:, kept])


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)], ids=["tall", "wide"])
@pytest.mark.parametrize("tokens", [60, 5])
def test_a_metric_of_sums(shape, tokens):
    """H and W'DW are means, damped by shares of the means of the diagonals of H and D; undamped
    where they judge.
    """
    weight, h, d = case(shape[1], shape[0], tokens)
    seen = curvature(weight, h, d, tokens)
    for damped in (False, True):
        found = Metric.of(weight.float(), seen)
        found = found.damped(weight.float(), seen) if damped else found
        shares = (INPUT_DAMPING, GRADIENT_DAMPING) if damped else (0, 0)
        expected_h = h + shares[0] * h.diagonal().mean() * torch.eye(len(h)).double()
        expected_d = d + shares[1] * d.diagonal().mean() * torch.eye(len(d)).double()
        assert found.inputs.dtype == found.gram.dtype == torch.float32
        assert torch.allclose(found.inputs.double(), expected_h, rtol=1e-5, atol=1e-6)
        assert torch.allclose(
            found.gram.double(), weight.mT @ expected_d @ weight, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("tokens", [1, 4])
def test_fewer_tokens_than_channels(tokens):
    """H is singular: the damping decides, the prices are finite, fall, and are never below 0; with
    as many channels as tokens the outputs are nearly all there.
    """
    weight, h, d = case(tokens=tokens)
    counted = curvature(weight, h, d, tokens)
    chooser = Metric.of(weight, counted).damped(weight, counted)
    order = removal(chooser, one_each(CHANNELS), together=1)
    assert sorted(order.tolist()) == list(range(CHANNELS))
    seen = Metric.of(weight, counted)
    own, judged = prices(chooser, order.flip(0), (chooser, seen))
    for priced in (own, judged):
        assert bool(priced.isfinite().all()) and float(priced.min()) >= -1e-6 * float(priced[0])
    assert bool((own.diff() <= 0).all())
    assert float(judged[tokens]) < 0.02 * float(judged[0])
    assert bool(refit(weight, chooser.inputs, order[-2:]).isfinite().all())


def test_inputs_that_were_always_zero():
    """H = 0 counts as the identity: an order by the loss's say on the columns, nothing is lost."""
    weight, h, d = case()
    counted = curvature(weight, 0 * h, d, TOKENS)
    chooser = Metric.of(weight, counted).damped(weight, counted)
    assert torch.equal(chooser.inputs, torch.eye(CHANNELS))
    seen = Metric.of(weight, counted)
    order = removal(chooser, one_each(CHANNELS)).flip(0)
    (judged,) = prices(chooser, order, (seen,))
    assert not bool(judged.any())
    kept = order[:3]
    assert torch.allclose(refit(weight, chooser.inputs, kept), weight[:, kept])


def test_gradients_that_were_always_zero():
    """A part that the loss does not depend on costs nothing, and the refit still holds."""
    weight, h, d = case()
    counted = curvature(weight, h, 0 * d, TOKENS)
    chooser = Metric.of(weight, counted).damped(weight, counted)
    order = removal(chooser, one_each(CHANNELS))
    (own,) = prices(chooser, order.flip(0), (chooser,))
    assert sorted(order.tolist()) == list(range(CHANNELS)) and not bool(own.any())


@pytest.mark.parametrize("kind", ["never on", "never read"])
def test_dead_channels_go_first_and_cost_nothing(kind, monkeypatch):
    """As far as the damping lets them: one that is never on may be on in other text."""
    monkeypatch.setattr(surgeon, "INPUT_DAMPING", 1e-3)
    weight, h, d = case()
    dead = [2, 5, 6]
    if kind == "never on":
        h[dead], h[:, dead] = 0, 0
    else:
        weight[:, dead] = 0
    seen = curvature(weight, h, d, TOKENS)
    chooser = Metric.of(weight, seen).damped(weight, seen)
    order = removal(chooser, one_each(CHANNELS), together=1)
    assert sorted(order[:3].tolist()) == dead
    own, judged = prices(chooser, order.flip(0), (chooser, Metric.of(weight, seen)))
    assert float(judged[-4]) <= 1e-9 * float(judged[0])
    assert float(own[-4]) <= 1e-2 * float(own[0])


def test_twins_do_not_go_together_one_by_one():
    """Of two equal channels the first to go is free, and the other then takes its place."""
    h = inputs()
    h[:, 4] = h[:, 7]
    weight, d = random(OUT, CHANNELS, seed=4), torch.eye(OUT).double()
    gram = h.mT @ h / TOKENS
    chooser = Metric(gram + 1e-9 * torch.eye(CHANNELS).double(), weight.mT @ d @ weight)
    order = removal(chooser, one_each(CHANNELS), together=1).tolist()
    assert order[0] in (4, 7) and order[1] not in (4, 7)


def test_an_indefinite_covariance_is_an_error_of_one_line():
    broken = Metric(-torch.eye(3).double(), torch.eye(3).double())
    for ask in (
        lambda: removal(broken, one_each(3)),
        lambda: prices(broken, torch.arange(3), (broken,)),
    ):
        with pytest.raises(NumericsError, match="not positive definite") as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_other_coordinates():
    """Turned by any basis: the metric of the turned inputs and the matrix that reads them."""
    weight, h, d = case()
    turn = random(CHANNELS, CHANNELS, seed=8)
    back = torch.linalg.inv(turn)
    found = metric(weight, h, d).turned(turn, back)
    expected = metric(weight @ back, turn @ h @ turn.mT, d)
    assert torch.allclose(found.inputs, expected.inputs)
    assert torch.allclose(found.gram, expected.gram)
