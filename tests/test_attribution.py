"""The score of a singular group, three ways: formula = autograd through explicit u, sigma, v =
finite differences.
"""

import pytest
import torch
from conftest import BIASED, quick
from torch.func import functional_call

from grasp.core.linalg import svd
from grasp.core.runner import Resident
from grasp.stages.attribution import SCORES, attribute, group_gradient
from grasp.stages.statistics import GroupGrad, WeightGrad

FAMILIES = sorted({*BIASED, "llama", "phi3", "gemma2"})


@pytest.fixture
def float64_throughout(monkeypatch):
    """transformers computes norms and softmax in float32 whatever the model's dtype; differences
    need all of float64.
    """
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def weight_grads(model, calibration, linears):
    return Resident(model, calibration).sweep([WeightGrad(linear.path for linear in linears)])[
        "weight_grad"
    ]


def total_loss(model, calibration, overrides):
    """The summed loss with some weights replaced, by a plain call of the model."""
    logits = functional_call(
        model.model, overrides, kwargs={"input_ids": calibration.ids, "use_cache": False}
    ).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), calibration.ids[:, 1:].flatten(), reduction="sum"
    )


@pytest.mark.parametrize("name", quick(FAMILIES))
def test_formula_equals_autograd_through_explicit_factors(
    name, decoder, calibration, float64_throughout
):
    """I(Phi_k) = sigma dL/dsigma + sum u dL/du + sum v dL/dv, with u, sigma and v as separate
    leaves of the graph.
    """
    model = decoder(name, dtype=torch.float64)
    linears = model.linears(1) + model.linears(3)
    grads = weight_grads(model, calibration, linears)
    for linear in linears:
        u, s, vh = (t.clone().requires_grad_(True) for t in svd(linear.weight))
        weight = u @ torch.diag(s) @ vh
        parameter = next(n for n, p in model.model.named_parameters() if p is linear.parameter)
        total_loss(model, calibration, {parameter: linear.oriented(weight)}).backward()
        sigma_part, u_part, v_part = s * s.grad, (u * u.grad).sum(0), (vh * vh.grad).sum(1)
        expected = (sigma_part + u_part + v_part).detach()
        found = attribute(
            linear.path,
            "taylor-signed",
            u.detach(),
            s.detach(),
            vh.detach(),
            grad=grads[linear.path],
        ).scores
        scale = expected.abs().max()
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-9 * float(scale)), linear.path
        for part in (sigma_part, u_part, v_part):  # W is linear in each: the three sums are equal
            assert torch.allclose(3 * part, expected, rtol=1e-4, atol=1e-9 * float(scale)), (
                linear.path
            )


@pytest.mark.parametrize("name", quick(FAMILIES))
def test_formula_equals_finite_differences(name, decoder, calibration, float64_throughout):
    """sigma_k dL/dsigma_k is the slope of the loss along the group."""
    model = decoder(name, dtype=torch.float64)
    linears = model.linears(2)
    grads = weight_grads(model, calibration, linears)
    for linear in linears:
        u, s, vh = svd(linear.weight)
        formula = s * group_gradient(u, vh, grads[linear.path])
        parameter = next(n for n, p in model.model.named_parameters() if p is linear.parameter)
        for k in (0, len(s) // 2, len(s) - 1):
            group = linear.oriented(s[k] * torch.outer(u[:, k], vh[k]))
            slopes = []
            # a long step may cross the kink of a ReLU, a short one drown in rounding
            for step in (1e-4, 1e-5, 1e-6):
                with torch.no_grad():
                    up = total_loss(
                        model, calibration, {parameter: linear.parameter + step * group}
                    )
                    down = total_loss(
                        model, calibration, {parameter: linear.parameter - step * group}
                    )
                slopes.append(float(up - down) / (2 * step))
            close = [
                slope
                == pytest.approx(float(formula[k]), rel=1e-4, abs=1e-6 * float(formula.abs().max()))
                for slope in slopes
            ]
            assert any(close), (linear.path, k, float(formula[k]), slopes)


def test_one_sweep_gives_the_gradient_of_the_summed_loss(family, decoder, calibration):
    """G of every matrix comes from one pass and equals autograd on the whole set at once."""
    model = decoder(family)
    linears = [linear for layer in range(4) for linear in model.linears(layer)]
    passes = []
    handle = model.model.register_forward_hook(lambda *_: passes.append(1))
    found = weight_grads(model, calibration, linears)
    handle.remove()
    assert len(passes) == calibration.num_blocks
    for linear in linears:
        linear.parameter.requires_grad_(True)
    total_loss(model, calibration, {}).backward()
    for linear in linears:
        expected = linear.oriented(linear.parameter.grad)
        assert torch.allclose(
            found[linear.path], expected, atol=1e-4 * float(expected.abs().max())
        ), linear.path


def test_per_sample_scores_equal_a_plain_loop(decoder, calibration):
    model = decoder("qwen2")
    linear = model.linears(1)[4]
    groups = {linear.path: svd(linear.weight)}
    u, s, vh = groups[linear.path]
    moments = Resident(model, calibration).sweep([GroupGrad(groups)])["group_grad"][linear.path]
    signed = []
    for number in range(calibration.num_blocks):
        model.model.zero_grad()
        linear.parameter.requires_grad_(True)
        model.loss(calibration.ids[number : number + 1])[0].backward()
        signed.append(
            torch.stack([s[k] * (u[:, k] @ linear.parameter.grad @ vh[k]) for k in range(len(s))])
        )
    signed = torch.stack(signed).double()
    assert torch.allclose(moments[0], signed.sum(0), atol=1e-4)
    assert torch.allclose(moments[1], signed.abs().sum(0), atol=1e-4)
    assert torch.allclose(moments[2], signed.square().sum(0), atol=1e-4)
    squared = attribute(linear.path, "taylor-per-sample-squared", u, s, vh, moments=moments).scores
    assert torch.equal(squared, moments[2])


def test_scores_by_their_definitions():
    generator = torch.Generator().manual_seed(0)
    weight, grad = torch.randn(5, 4, generator=generator), torch.randn(5, 4, generator=generator)
    u, s, vh = svd(weight)
    base = torch.stack([u[:, k] @ grad @ vh[k] for k in range(4)])
    moments = torch.rand(3, 4, generator=generator)
    expected = {
        "taylor": (s * base).abs(),
        "taylor-signed": 3 * s * base,
        "gradient": base.abs(),
        "taylor-per-sample": moments[1],
        "taylor-per-sample-squared": moments[2],
        "magnitude": s,
    }
    for name in SCORES:
        found = attribute(
            "m",
            name,
            u,
            s,
            vh,
            grad=grad,
            moments=moments,
            generator=torch.Generator().manual_seed(3),
        ).scores
        if name in expected:
            assert torch.allclose(found, expected[name], atol=1e-5), name
    again = attribute("m", "random", u, s, vh, generator=torch.Generator().manual_seed(3)).scores
    assert torch.equal(found, again) and name == "random"


def test_narrow_models_accumulate_in_float32(decoder, calibration):
    """A bfloat16 model's G is a float32 sum of its per-block gradients, not a bfloat16 one."""
    model = decoder("llama", dtype=torch.bfloat16)
    linear = model.linears(0)[0]
    found = weight_grads(model, calibration, [linear])[linear.path]
    assert found.dtype == torch.float32
    expected = torch.zeros_like(found)
    for number in range(calibration.num_blocks):
        linear.parameter.grad = None
        linear.parameter.requires_grad_(True)
        model.loss(calibration.ids[number : number + 1])[0].backward()
        expected += linear.parameter.grad.float()
    assert torch.equal(found, expected)


def test_a_sweep_leaves_the_model_as_it_was(decoder, calibration):
    model = decoder("llama")
    own = next(model.model.parameters())
    own.grad = torch.ones_like(own)
    model.linears(0)[0].parameter.requires_grad_(False)
    before = {name: (p.requires_grad, p.grad) for name, p in model.model.named_parameters()}
    weight_grads(model, calibration, model.linears(0))
    after = {name: (p.requires_grad, p.grad) for name, p in model.model.named_parameters()}
    assert before == after
    assert not any(module._forward_hooks for module in model.model.modules())
