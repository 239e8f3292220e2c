"""The sums of one sweep against plain hooks, and the groups they give against the singular value
decomposition of D^½ W X^½.
"""

import errno
import os

import pytest
import torch
from conftest import LAYERS, VOCAB, build, quick
from hypothesis import given, settings
from hypothesis import strategies as st

import grasp
from grasp.core import scratch
from grasp.core.collector import add
from grasp.core.decoder import Decoder
from grasp.core.linalg import metric_groups, roots, symmetric_roots
from grasp.core.records import Curvature
from grasp.core.runner import Resident
from grasp.core.scratch import Scratch
from grasp.stages.basis import BASES, GRADIENT_DAMPING, INPUT_DAMPING, groups
from grasp.stages.curvature import Curvatures, InputCurvatures

FAMILIES = ["llama", "gpt2", "gpt_neox", "qwen2", "phi3", "opt"]


# --- one sweep


def all_paths(decoder):
    return [linear.path for layer in decoder.layers() for linear in layer.linears.values()]


def sweep(model, data, place=None):
    decoder = Decoder(model)
    return Resident(decoder, data).sweep([Curvatures(all_paths(decoder), place)])["curvature"]


def brute_force(model, blocks, paths):
    """path -> (W, sum xx', sum dd', tokens) in float64, by hooks and autograd on whole blocks of
    real tokens.
    """
    seen, sums = {}, {}

    def hook(path):
        def keep(_module, inputs, output):
            output.retain_grad()
            seen[path] = (inputs[0], output)

        return keep

    handles = [model.get_submodule(path).register_forward_hook(hook(path)) for path in paths]
    for ids in blocks:
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits.float(), ids[1:], reduction="sum").backward()
        for path, (before, after) in seen.items():
            x, d = (t.detach().double().reshape(-1, t.shape[-1]) for t in (before, after.grad))
            inputs, gradients, tokens = sums.get(path, (0, 0, 0))
            sums[path] = (inputs + x.T @ x, gradients + d.T @ d, tokens + len(x))
    for handle in handles:
        handle.remove()
    model.zero_grad()
    found = {}
    for path in paths:
        module = model.get_submodule(path)
        weight = module.weight.detach().double()
        found[path] = (weight if isinstance(module, torch.nn.Linear) else weight.T, *sums[path])
    return found


def close(found, expected, tolerance):
    return torch.allclose(
        found.double(), expected, rtol=0, atol=tolerance * float(expected.abs().max())
    )


def check_sums(table, expected, tolerance=1e-4, far_tolerance=1e-4):
    assert table.keys() == expected.keys()
    for path, (weight, inputs, gradients, tokens) in expected.items():
        found = table[path]
        tall = weight.shape[0] >= weight.shape[1]
        near, far = (
            (inputs, weight.T @ gradients @ weight)
            if tall
            else (gradients, weight @ inputs @ weight.T)
        )
        assert found.near.shape == found.far.shape == (min(weight.shape),) * 2
        assert found.near.dtype == found.far.dtype == torch.float32
        assert close(found.near, near, tolerance) and close(found.far, far, far_tolerance), path
        assert found.input_square == pytest.approx(float(inputs.trace()), rel=tolerance)
        assert found.gradient_square == pytest.approx(float(gradients.trace()), rel=tolerance)
        assert found.input_tokens == found.gradient_tokens == tokens


@pytest.mark.parametrize("name", quick(FAMILIES))
def test_sums_equal_plain_hooks(name, calibration):
    model = build(name)
    check_sums(
        sweep(model, calibration), brute_force(model, calibration.ids, all_paths(Decoder(model)))
    )


@pytest.mark.parametrize("kind", [InputCurvatures, Curvatures])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "opt"])
def test_x_of_every_matrix_is_there_and_kept_once(name, kind, calibration):
    """Of wide ones where it is asked for. Matrices that read one input share it, tall or wide."""
    decoder = Decoder(build(name))
    linears = [linear for layer in decoder.layers() for linear in layer.linears.values()]
    paths = [linear.path for linear in linears]
    collectors = [kind(paths, inputs=paths) for _ in range(2)]  # each on its half of the blocks
    for one, blocks in zip(collectors, ((0, 1, 2), (3, 4, 5)), strict=True):
        Resident(decoder, calibration).show([one], blocks)
    table = collectors[0].result(add(collectors[0].sums, collectors[1].sums))
    expected = brute_force(build(name), calibration.ids, all_paths(decoder))
    shared = {}
    for linear in linears:
        found, (_, inputs, gradients, tokens) = table[linear.path], expected[linear.path]
        x = found.near if linear.is_tall else found.inputs
        assert close(x, inputs, 1e-4) and found.input_tokens == tokens, linear.path
        assert found.input_square == pytest.approx(float(inputs.trace()), rel=1e-4)
        if kind is Curvatures and not linear.is_tall:
            assert close(found.near, gradients, 1e-4), linear.path
        shared.setdefault(id(x), []).append(linear.name.rpartition(".")[2])
    if name == "llama":  # k and v are wide
        by_input = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"]]
        assert list(shared.values()) == [*by_input, ["down_proj"]] * LAYERS


@pytest.mark.parametrize("name", quick(FAMILIES))
def test_padding_is_left_out(name, calibration):
    """Blocks of unequal length, padded with rubbish on the right, give the sums of the blocks
    alone.

    In float64: in float32 a unit before a ReLU (OPT) can lie within a rounding of zero, where the
    gradient jumps.
    """
    model = build(name, torch.float64)
    lengths = [20, 13, 7]
    mask = torch.arange(20) < torch.tensor(lengths)[:, None]
    padded = calibration.ids[:3].where(mask, torch.tensor(VOCAB - 1))
    blocks = [ids[:length] for ids, length in zip(calibration.ids, lengths, strict=False)]
    table = sweep(model, grasp.Calibration(padded, "padded", mask=mask))
    check_sums(table, brute_force(model, blocks, all_paths(Decoder(model))))


def test_rubbish_under_the_mask_is_not_seen(calibration):
    """Padding on the left: whatever stands there, the sums are the same."""
    mask = torch.arange(20) >= torch.tensor([0, 4, 11])[:, None]
    tables = [
        sweep(
            build("llama"),
            grasp.Calibration(
                calibration.ids[:3].where(mask, torch.tensor(pad)), "padded", mask=mask
            ),
        )
        for pad in (0, 77)
    ]
    for path, one in tables[0].items():
        assert one.input_tokens == one.gradient_tokens == 20 + 16 + 9
        assert close(tables[1][path].near, one.near.double(), 1e-5) and close(
            tables[1][path].far, one.far.double(), 1e-5
        ), path


def test_a_bfloat16_model_is_summed_in_float32(calibration):
    model = build("llama", torch.bfloat16)
    expected = brute_force(model, calibration.ids, all_paths(Decoder(model)))
    check_sums(sweep(model, calibration), expected, 1e-4, far_tolerance=2e-2)


def test_only_the_matrices_asked_for(calibration):
    path = "model.layers.2.mlp.up_proj"
    runner = Resident(Decoder(build("llama")), calibration)
    table = runner.sweep([Curvatures([path])])["curvature"]
    expected = brute_force(build("llama"), calibration.ids, [path])
    check_sums(table, expected)


def test_one_input_is_summed_once(calibration):
    """Tall matrices that read the same hidden states share one sum."""
    for name, readers in (
        ("llama", ["mlp.gate_proj", "mlp.up_proj"]),
        ("opt", ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"]),
    ):
        model = Decoder(build(name))
        table = sweep(model.model, calibration)
        for layer in range(LAYERS):
            stores = {
                table[f"{model.family.layers}.{layer}.{reader}"].near.data_ptr()
                for reader in readers
            }
            assert len(stores) == 1, name


def test_the_model_comes_back_as_it_was(calibration):
    model = build("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sweep(model, calibration)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# --- where the sums live


def test_scratch_files_give_equal_sums_and_vanish(calibration, tmp_path):
    folder = tmp_path / "new" / "scratch"
    in_memory = sweep(build("llama"), calibration)
    on_disk = sweep(build("llama"), calibration, Scratch(folder))
    for path, one in in_memory.items():
        assert torch.equal(on_disk[path].near, one.near) and torch.equal(
            on_disk[path].far, one.far
        ), path
    assert folder.is_dir() and not list(folder.iterdir())


def test_scratch_tensors_do_not_overlap(tmp_path):
    one = Scratch(tmp_path).zeros(2, 3)
    other = Scratch(tmp_path).hold(torch.full((2, 3), 2.0, dtype=torch.float64))
    assert (
        not bool(one.any()) and one.shape == (2, 3) and torch.equal(other, torch.full((2, 3), 2.0))
    )


@pytest.mark.parametrize(("free", "on_disk"), [(None, False), (10**6, False), (100, True)])
def test_sums_that_do_not_fit_in_memory_go_to_files(free, on_disk, monkeypatch, caplog):
    monkeypatch.setattr(scratch, "available_memory", lambda: free)
    chosen = Scratch.for_bytes(1000, torch.device("cpu"))
    assert (chosen.folder is not None) == on_disk == ("--scratch" in caplog.text)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(grasp.GraspError) as caught:
        Scratch(tmp_path).zeros(3, 4)
    message = str(caught.value)
    assert (
        "\n" not in message
        and "--scratch" in message
        and str(tmp_path) in message
        and "No space left" in message
    )
    assert not list(tmp_path.iterdir())


def test_a_scratch_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(grasp.GraspError, match="--scratch"):
        Scratch(tmp_path / "file").zeros(2)


# --- groups in a metric


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def root(gram):
    """The symmetric square root."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0).sqrt()
    return (vectors * values) @ vectors.T


def record(weight, xs, ds) -> Curvature:
    """The record that a sweep over inputs xs (tokens, in) and gradients ds (tokens, out) would
    leave, in float64.
    """
    inputs, gradients = xs.T @ xs, ds.T @ ds
    tall = weight.shape[0] >= weight.shape[1]
    near, far = (
        (inputs, weight.T @ gradients @ weight) if tall else (gradients, weight @ inputs @ weight.T)
    )
    return Curvature(near, far, float(inputs.trace()), float(gradients.trace()), len(xs), len(ds))


def damped_gram(gram, damping):
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def metric(xs, ds, basis):
    """(D^½, X^½) of a basis, from the vectors themselves."""
    inputs = (
        damped_gram(xs.T @ xs / len(xs), INPUT_DAMPING)
        if basis != "plain"
        else torch.eye(xs.shape[1], dtype=xs.dtype)
    )
    gradients = (
        damped_gram(ds.T @ ds / len(ds), GRADIENT_DAMPING)
        if basis == "fisher"
        else torch.eye(ds.shape[1], dtype=ds.dtype)
    )
    return root(gradients), root(inputs)


def decomposed(weight, xs, ds, basis="fisher"):
    return groups(weight, record(weight, xs, ds), basis, Scratch())


def best(weight, found, rank):
    left, right = found.pair(weight, torch.arange(rank))
    return (left @ right).double()


SHAPES = [(7, 5), (5, 7), (6, 6)]
shaped = pytest.mark.parametrize("shape", SHAPES, ids=["tall", "wide", "square"])


def example(shape, tokens=40):
    out, inn = shape
    return (
        numbers(out, inn, seed=1),
        numbers(tokens, inn, seed=2) * torch.arange(1, inn + 1),
        numbers(tokens, out, seed=3) / 100,
    )


@settings(max_examples=25, deadline=None)
@given(short=st.integers(1, 8), more=st.integers(0, 5), seed=st.integers(0, 99))
def test_metric_groups_are_the_svd_of_the_whitened_matrix(short, more, seed):
    tall = short + more
    weight = numbers(tall, short, seed=seed)
    xs = numbers(30, short, seed=seed + 1)
    ds = numbers(30, tall, seed=seed + 2)
    near, middle = xs.T @ xs, ds.T @ ds
    expand, squares, contract = metric_groups(near, weight.T @ middle @ weight)
    u, s, vh = torch.linalg.svd(root(middle) @ weight @ root(near), full_matrices=False)
    assert torch.allclose(squares, s.square(), rtol=1e-8, atol=1e-9 * float(s[0] ** 2))
    assert torch.allclose((weight @ expand) @ contract, weight, atol=1e-9)
    one = weight @ expand[:, :1] @ contract[:1]
    expected = (
        torch.linalg.solve(root(middle), u[:, :1] * s[0])
        @ torch.linalg.solve(root(near), vh[:1].T).T
    )
    assert s[0] - s[1:2].sum() < 1e-3 * s[0] or torch.allclose(one, expected, atol=1e-6)


@shaped
@pytest.mark.parametrize("basis", BASES)
def test_every_basis_is_the_svd_in_its_metric(shape, basis):
    weight, xs, ds = example(shape)
    found = decomposed(weight, xs, ds, basis)
    d_root, x_root = metric(xs, ds, basis)
    u, s, vh = torch.linalg.svd(d_root @ weight @ x_root, full_matrices=False)
    assert torch.allclose(found.squares.double(), s.square(), rtol=1e-4)
    for rank in range(len(s) + 1):
        expected = torch.linalg.solve(
            d_root, (u[:, :rank] * s[:rank]) @ vh[:rank]
        ) @ torch.linalg.inv(x_root)
        assert torch.allclose(best(weight, found, rank), expected, atol=1e-4), rank


@shaped
def test_with_unit_metrics_it_is_the_plain_svd(shape):
    """X and D the identity: the groups are those of W, the squares its squared singular values."""
    weight = numbers(*shape)
    xs, ds = (size**0.5 * torch.eye(size, dtype=torch.float64) for size in (shape[1], shape[0]))
    found = decomposed(weight, xs, ds)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    assert torch.allclose(
        found.squares.double(), s.square() * (1 + INPUT_DAMPING) * (1 + GRADIENT_DAMPING), rtol=1e-5
    )
    for rank in range(len(s) + 1):
        assert torch.allclose(
            best(weight, found, rank), (u[:, :rank] * s[:rank]) @ vh[:rank], atol=1e-5
        )


@shaped
@pytest.mark.parametrize("basis", BASES)
def test_turning_inputs_and_outputs_turns_the_groups(shape, basis):
    """W -> P W Q', x -> Q x, d -> P d with orthogonal P and Q: equal squares, and the product turns
    along.
    """
    weight, xs, ds = example(shape)
    p = torch.linalg.qr(numbers(shape[0], shape[0]))[0]
    q = torch.linalg.qr(numbers(shape[1], shape[1]))[0]
    turned = p @ weight @ q.T
    before = decomposed(weight, xs, ds, basis)
    after = decomposed(turned, xs @ q.T, ds @ p.T, basis)
    assert torch.allclose(before.squares, after.squares, rtol=1e-4)
    assert torch.allclose(p @ best(weight, before, 3) @ q.T, best(turned, after, 3), atol=1e-4)


@shaped
def test_the_unit_is_the_loss(shape):
    """Twice the gradient is four times the loss, and the same groups; the number of tokens does not
    matter.
    """
    weight, xs, ds = example(shape)
    one = decomposed(weight, xs, ds)
    other = decomposed(weight, xs.repeat(3, 1), 2 * ds.repeat(3, 1))
    assert torch.allclose(4 * one.squares, other.squares, rtol=1e-5)
    assert torch.allclose(best(weight, one, 2), best(weight, other, 2), atol=1e-5)


@shaped
@pytest.mark.parametrize("rank", [0, 1, 3, 4])
def test_the_error_is_the_sum_of_the_dropped_squares_and_least(shape, rank):
    """||D^½ (W - B A) X^½||² equals what was dropped; no other matrix of that rank, near or far,
    has less.
    """
    weight, xs, ds = example(shape)
    found = decomposed(weight, xs, ds)
    d_root, x_root = metric(xs, ds, "fisher")

    def error(product):
        return float((d_root @ (weight - product) @ x_root).square().sum())

    least = error(best(weight, found, rank))
    assert least == pytest.approx(float(found.squares[rank:].sum()), rel=1e-4)
    left, right = (t.double() for t in found.pair(weight, torch.arange(rank)))
    for seed in range(40):
        a, b = numbers(*left.shape, seed=seed), numbers(*right.shape, seed=seed + 1)
        assert error(a @ b) >= least * (1 - 1e-6)
        for step in (1e-1, 1e-3):
            assert error((left + step * a) @ (right + step * b)) >= least * (1 - 1e-6)


SINGULAR = {
    "fewer tokens than features": lambda xs, ds: (xs[:3], ds[:2]),
    "dead features": lambda xs, ds: (
        xs * (torch.arange(xs.shape[1]) > 1),
        ds * (torch.arange(ds.shape[1]) > 2),
    ),
    "one token": lambda xs, ds: (xs[:1], ds[:1]),
    "no gradient": lambda xs, ds: (xs, 0 * ds),
    "no input": lambda xs, ds: (0 * xs, ds),
    "tiny gradients": lambda xs, ds: (xs, 1e-18 * ds),
}


@shaped
@pytest.mark.parametrize("case", SINGULAR)
def test_singular_statistics(shape, case):
    """Finite factors that hold all of W at full rank, where a Cholesky factor may not exist."""
    weight, xs, ds = example(shape)
    found = decomposed(weight, *SINGULAR[case](xs, ds))
    left, right = found.pair(weight, torch.arange(min(shape)))
    assert bool(
        left.isfinite().all()
        and right.isfinite().all()
        and found.squares.isfinite().all()
        and (found.squares >= 0).all()
    )
    assert torch.allclose((left @ right).double(), weight, atol=1e-3)


@pytest.mark.parametrize("case", ["no gradient", "no input"])
@shaped
def test_what_the_loss_does_not_see_costs_nothing(shape, case):
    """All inputs or all gradients zero: every group can go for free."""
    weight, xs, ds = example(shape)
    assert float(decomposed(weight, *SINGULAR[case](xs, ds)).squares.max()) == pytest.approx(
        0, abs=1e-12
    )


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_symmetric_roots(rank):
    """R R = gram, singular or not, and R R^-1 is the identity."""
    gram = numbers(6, rank) @ numbers(6, rank).T
    found, inverse = symmetric_roots(gram)
    assert torch.allclose(found @ found, gram, atol=1e-6 * float(gram.max())) and torch.allclose(
        found, found.T
    )
    assert torch.allclose(found @ inverse, torch.eye(6, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("smallest", [1.0, 1e-4, 1e-14, 0.0])
def test_roots_of_every_condition(smallest):
    """R R' = gram and R^-1 its inverse, triangular where the gram is well conditioned; else what
    `symmetric_roots` says.
    """
    turned = torch.linalg.qr(numbers(5, 5)).Q
    gram = (turned * torch.tensor([3.0, 2.0, 1.0, 1.0, smallest]).double()) @ turned.mT
    root, inverse = roots(gram)
    assert torch.allclose(root @ root.mT, gram, atol=1e-12)
    assert torch.allclose(root @ inverse, torch.eye(5, dtype=torch.float64), atol=1e-6)
    assert torch.equal(root, root.tril()) == (smallest >= 1e-4)
    if smallest < 1e-4:
        assert torch.equal(root, symmetric_roots(gram)[0])


def test_roots_where_cholesky_fails():
    """Slightly indefinite by rounding, or all zero."""
    gram = torch.diag(torch.tensor([1.0, 1e-3, -1e-17], dtype=torch.float64))
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(gram)
    found, inverse = symmetric_roots(gram)
    assert torch.allclose(found @ found, gram, atol=1e-13) and bool(inverse.isfinite().all())
    assert all(
        torch.equal(side, torch.eye(3, dtype=torch.float64))
        for side in symmetric_roots(torch.zeros(3, 3))
    )


def test_groups_of_a_narrow_matrix_are_float32():
    """A bfloat16 weight is decomposed as the numbers it holds."""
    weight, xs, ds = example((7, 5))
    narrow = weight.bfloat16()
    sums = record(narrow.double(), xs, ds)
    found, same = (groups(w, sums, "fisher", Scratch()) for w in (narrow.double(), narrow))
    left, right = same.pair(narrow, torch.arange(5))
    assert left.dtype == right.dtype == torch.float32
    assert torch.allclose((left @ right).double(), best(narrow.double(), found, 5), atol=1e-5)
