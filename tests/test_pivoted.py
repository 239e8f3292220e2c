"""Pivoted pairs: the same product in rank² fewer numbers, as numbers, as a module and as a
checkpoint.
"""

import json
import subprocess
import sys

import pytest
import torch
from closeness import close, is_greedy
from conftest import FAMILY_ROWS, build
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoint import NO_GRASP
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

import grasp
from grasp.core.decoder import Decoder
from grasp.core.edits import Factorize
from grasp.core.layers.low_rank_grasp import LowRankLinear
from grasp.core.layers.modeling_grasp import FORMAT_VERSION, GraspConfig
from grasp.core.linalg import balanced, pivoted
from grasp.errors import CheckpointError
from grasp.stages.options import pivoted_parameters


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def put_together(head, rest, places):
    return torch.cat((head, rest @ head)).index_select(0, places)


# --- the numbers


@settings(max_examples=60, deadline=None)
@given(m=st.integers(1, 24), n=st.integers(1, 24), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_the_product_in_fewer_numbers(m, n, share, seed):
    """From rank 0 to full: the product to nine digits, rank (m + n - rank) numbers, and every row
    in its place.
    """
    rank = round(share * min(m, n))
    left, right = numbers(m, rank, seed=seed), numbers(rank, n, seed=seed + 1)
    head, rest, places = pivoted(left, right)
    assert torch.allclose(put_together(head, rest, places), left @ right, atol=1e-9)
    assert head.numel() + rest.numel() == rank * (m + n - rank) and (
        rank == min(m, n) or head.numel() + rest.numel() < m * n
    )
    assert sorted(places.tolist()) == list(range(m)) and places.dtype == torch.int32


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("m", "rank"), [(40, 3), (40, 20), (40, 39), (150, 100)])
def test_no_coefficient_exceeds_two(m, rank, seed):
    """So a narrow dtype does not amplify rounding, though some rows are a thousand times others and
    some nearly alike.
    """
    left = numbers(m, rank, seed=seed) * torch.logspace(-3, 0, m)[:, None]
    left[1] = left[0] + 1e-6 * left[1]
    head, rest, places = pivoted(left, numbers(rank, 30))
    assert float(rest.abs().max()) <= 2
    assert torch.allclose(put_together(head, rest, places), left @ numbers(rank, 30), atol=1e-9)


def test_rows_that_defeat_elimination_are_exchanged():
    """Pivots by LU alone would leave coefficients of about 2^14 here."""
    size = 16
    left = torch.cat(
        (torch.eye(size) - torch.ones(size, size).tril(-1), -torch.ones(1, size))
    ).double()
    right = numbers(size, 20)
    head, rest, places = pivoted(left, right)
    assert float(rest.abs().max()) <= 2
    assert torch.allclose(put_together(head, rest, places), left @ right, atol=1e-9)


@pytest.mark.parametrize("lost", ["a direction", "all", "equal rows"])
def test_factors_of_lower_rank_than_they_claim(lost):
    left = numbers(12, 5)
    left = {
        "a direction": left * torch.tensor([1, 1, 0, 1, 1]),
        "all": 0 * left,
        "equal rows": left[:1].repeat(12, 1),
    }[lost]
    head, rest, places = pivoted(left, numbers(5, 9))
    assert bool(rest.isfinite().all()) and float(rest.abs().max()) <= 2
    assert torch.allclose(put_together(head, rest, places), left @ numbers(5, 9), atol=1e-9)


def test_the_product_alone_counts():
    """Factors scaled against each other by a thousand millions make the same pair."""
    left, right = numbers(12, 4), numbers(4, 9)
    scale = torch.tensor([1e-9, 1.0, 1e3, 1e9], dtype=torch.float64)
    assert torch.allclose(
        put_together(*pivoted(left * scale, right / scale[:, None])), left @ right, atol=1e-9
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_a_narrow_dtype_costs_no_more_than_for_two_thin_matrices(dtype):
    left, right = numbers(60, 20), numbers(20, 50)
    exact = left @ right

    def error(first, second, join):
        return float(
            (join(first.to(dtype).double(), second.to(dtype).double()) - exact).norm()
            / exact.norm()
        )

    head, rest, places = pivoted(left, right)
    weight_in, weight = balanced(left, right)
    thin = error(weight_in, weight, lambda a, b: b @ a)
    assert error(head, rest, lambda a, b: put_together(a, b, places)) < 2 * thin


def test_balanced_shares_the_norms_and_keeps_the_product():
    left, right = numbers(12, 4) * torch.tensor([1e6, 1.0, 1e-6, 0.0]), numbers(4, 9)
    weight_in, weight = balanced(left, right)
    assert torch.allclose(weight @ weight_in, left @ right, rtol=1e-9)
    assert torch.allclose(weight_in.norm(dim=1)[:3], weight.norm(dim=0)[:3])


class Largest(TorchDispatchMode):
    """The size of the largest tensor made inside."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.numel = max(
            [self.numel, *(t.numel() for t in tree_leaves(made) if isinstance(t, torch.Tensor))]
        )
        return made


def test_no_tensor_is_larger_than_the_product():
    left, right = numbers(400, 5), numbers(5, 40)
    with Largest() as largest:
        pivoted(left, right)
    assert largest.numel <= 400 * 40


# --- the module


def module(rank, bias=True, dtype=torch.float32, m=12, n=9):
    """(a pivoted low-rank linear, the matrix it stands for, its bias)."""
    left, right = numbers(m, rank), numbers(rank, n, seed=1)
    made = LowRankLinear(n, m, rank, bias, dtype=dtype, pivoted=True)
    head, rest, places = pivoted(left, right)
    with torch.no_grad():
        made.weight_in.copy_(head)
        made.weight.copy_(rest)
        made.places.copy_(places)
        if bias:
            made.bias.copy_(numbers(m, seed=2))
    return made, (left @ right).to(dtype), made.bias


@pytest.mark.parametrize("rank", [0, 1, 4, 8, 9])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_forward_is_the_dense_linear(rank, bias, dtype):
    made, weight, added = module(rank, bias, dtype)
    assert close(made.product(), weight)
    for shape in [(9,), (5, 9), (2, 3, 9), (0, 9)]:
        x = numbers(*shape, dtype=dtype)
        assert made(x).shape == (*shape[:-1], 12) and made(x).dtype == dtype
        assert close(made(x), linear(x, weight, added))
        assert close(made(x), linear(x, made.product(), added))


def test_its_size_is_what_the_budget_counts():
    made, _, _ = module(4, bias=False)
    assert (
        sum(p.numel() for p in made.parameters())
        == pivoted_parameters((12, 9), 4)
        == 4 * (12 + 9 - 4)
    )


def test_gradients_reach_both_factors_and_the_input():
    made, weight, _ = module(3, dtype=torch.float64)
    made.requires_grad_(True)
    x = numbers(5, 9).requires_grad_(True)
    made(x).square().sum().backward()
    dense = x.detach().clone().requires_grad_(True)
    linear(dense, weight, made.bias).square().sum().backward()
    assert (
        torch.allclose(x.grad, dense.grad)
        and bool(made.weight.grad.any())
        and bool(made.weight_in.grad.any())
    )


def test_casting_leaves_the_places_alone():
    made, _, _ = module(3)
    for cast in (made.half(), made.bfloat16(), made.double(), made.float()):
        assert cast.places.dtype == torch.int32 and sorted(cast.places.tolist()) == list(range(12))


def test_an_edit_that_does_not_fit_is_refused():
    """A plain pair's factors with places, and a pivoted pair's without."""
    path = "model.layers.1.mlp.up_proj"
    head, rest, places = pivoted(
        numbers(48, 4, dtype=torch.float32), numbers(4, 32, dtype=torch.float32)
    )
    for edit in (
        Factorize(path, head, torch.zeros(48, 4), places=places),
        Factorize(path, head, rest),
    ):
        with pytest.raises(grasp.GraspError, match="do not fit"):
            edit.apply(Decoder(build("llama")))


# --- the checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(directory, compressed model, token ids, logits): a tiny Llama with pivoted pairs."""
    ids = torch.randint(0, 256, (4, 20), generator=torch.Generator().manual_seed(2))
    out = tmp_path_factory.mktemp("pivoted") / "out"
    model = grasp.compress(
        build("llama"), out, method="grasp-fisher", ratio=0.2, data=grasp.Calibration(ids, "random")
    ).model
    return out, model, ids, logits(model, ids)


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def pairs(model):
    return [found for found in model.modules() if isinstance(found, LowRankLinear)]


def test_loaded_it_computes_the_same(saved, tmp_path):
    """By transformers and by grasp; and again after it was saved once more."""
    directory, model, ids, expected = saved
    assert any(found.rank > 0 for found in pairs(model)) and all(
        found.pivoted for found in pairs(model)
    )
    for source in (directory, tmp_path / "again"):
        loaded = AutoModelForCausalLM.from_pretrained(source)
        assert close(logits(loaded, ids), expected) and len(pairs(loaded)) == len(pairs(model))
        assert close(logits(grasp.load(source).model, ids), expected)
        loaded.save_pretrained(tmp_path / "again")


def test_its_size_in_memory_is_the_one_promised(saved):
    directory, _, _, _ = saved
    promised = json.loads((directory / "grasp.json").read_text())["parameters"]["after"]
    assert (
        sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(directory).parameters())
        == promised
    )


def test_loaded_in_a_narrow_dtype(saved):
    directory, model, ids, expected = saved
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    for found, original in zip(pairs(loaded), pairs(model), strict=True):
        assert found.places.dtype == torch.int32 and torch.equal(found.places, original.places)
        assert found.weight.dtype == torch.bfloat16
    assert torch.allclose(logits(loaded, ids).float(), expected, atol=0.1)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "opt"])
def test_other_families_too(name, calibration, tmp_path):
    result = grasp.compress(
        build(name), tmp_path, method="grasp-fisher", ratio=0.2, data=calibration
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert close(logits(loaded, calibration.ids), logits(result.model, calibration.ids))
    assert any(found.bias is not None for found in pairs(loaded)) == FAMILY_ROWS[name].biased


WITHOUT = """
import sys, torch
{before}
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
for source in (sys.argv[2], folder + "/again"):
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
    with torch.no_grad():
        equal = torch.allclose(model(input_ids=torch.load(folder + "/ids.pt"), \
use_cache=False).logits, torch.load(folder + "/logits.pt"), atol=1e-5)
    model.save_pretrained(folder + "/again")
    print("RESULT", equal, sum(p.numel() for p in model.parameters()), "grasp" in sys.modules)
"""


@pytest.mark.slow
def test_without_grasp(saved, tmp_path):
    """In a process where grasp cannot be imported, by the file the checkpoint carries; and what
    that saves loads the same way.
    """
    directory, model, ids, expected = saved
    torch.save(ids, tmp_path / "ids.pt")
    torch.save(expected, tmp_path / "logits.pt")
    arguments = [
        sys.executable,
        "-c",
        WITHOUT.format(before=NO_GRASP),
        str(tmp_path),
        str(directory),
    ]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    line = f"RESULT True {sum(p.numel() for p in model.parameters())} False"
    assert done.stdout.splitlines().count(line) == 2, done.stderr[-2000:]


@pytest.mark.parametrize("storage", ["pivoted", "pair"])
def test_the_config_says_how_each_matrix_is_stored(storage, calibration, tmp_path):
    grasp.compress(
        build("llama"),
        tmp_path,
        method="grasp-fisher",
        ratio=0.2,
        parts="ranks",
        storage=storage,
        data=calibration,
    )
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["version"] == FORMAT_VERSION
    assert {one.get("pivoted", False) for one in written["structure"].values()} == {
        storage == "pivoted"
    }


def test_a_format_from_the_future_is_refused(saved, tmp_path):
    directory, _, _, _ = saved
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["version"] = FORMAT_VERSION + 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    future = f"grasp format {FORMAT_VERSION + 1}"
    with pytest.raises(
        ValueError,
        match=rf"{future}.*reads up to {FORMAT_VERSION}.*pip install -U grasp-llm",
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=future):
        grasp.load(tmp_path)
    with pytest.raises(ValueError, match=f"reads up to {FORMAT_VERSION}"):
        GraspConfig({}, version=FORMAT_VERSION + 1)


def test_pivoted_and_plain_pairs_in_one_model(calibration, tmp_path):
    """A second method on top of the first: each pair is loaded as it was stored."""
    first = grasp.compress(
        build("llama"), method="grasp-fisher", layers=(1,), retain_ratio=0.5, data=calibration
    )
    second = grasp.compress(
        first.model, tmp_path, method="grasp", layers=(2,), retain_ratio=0.5, data=calibration
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {found.pivoted for found in pairs(loaded)} == {True, False}
    assert close(logits(loaded, calibration.ids), logits(second.model, calibration.ids))


def test_peft_lora_on_top(saved, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    directory, _, ids, _ = saved
    torch.manual_seed(0)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(directory),
        LoraConfig(r=2, target_modules=["q_proj", "up_proj"]),
    )
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), tmp_path)
    assert torch.allclose(logits(again.eval(), ids), logits(adapted.eval(), ids), atol=1e-5)


def test_generation_with_and_without_a_cache(saved):
    _, model, ids, _ = saved
    prompt = ids[:2, :6]
    texts = [
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=258,
            use_cache=cache,
        )
        for cache in (True, False)
    ]
    for said in texts:
        assert all(is_greedy(model, one[:6], one[6:]) for one in said)
