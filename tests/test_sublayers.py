"""What a sublayer or a layer is worth, against plain hooks and autograd: 1/2 E[(d' out)²]."""

import pytest
import torch
from conftest import LAYERS, build

import grasp
from grasp.core.decoder import Decoder
from grasp.core.runner import Resident
from grasp.errors import NumericsError
from grasp.stages.sublayers import LayerLosses

ADDED = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "granite": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "opt": ("self_attn.out_proj", "fc2"),
}
"""The module whose output is added to the residual stream: behind a norm that stands after."""


def sweep(model, data):
    decoder = Decoder(model)
    return Resident(decoder, data).sweep([LayerLosses(decoder.family)])["layer_losses"]


def by_hand(model, blocks, modules):
    """Name -> 1/2 E[(d' out)²] over all tokens of `blocks`, by retained gradients."""
    stack, seen, sums, tokens = Decoder(model).stack, {}, {}, 0

    def output(name):
        def keep(_module, _inputs, found):
            found.retain_grad()
            seen[name] = (found, found.detach())

        return keep

    def layer(name):
        def keep(_module, args, kwargs, found):
            found = found[0] if isinstance(found, tuple) else found
            before = args[0] if args else kwargs["hidden_states"]
            found.retain_grad()
            seen[name] = (found, (found - before).detach())

        return keep

    handles = []
    for index, one in enumerate(stack):
        handles.append(one.register_forward_hook(layer(str(index)), with_kwargs=True))
        for name, path in zip(("attention", "mlp"), modules, strict=True):
            hook = output(f"{index} {name}")
            handles.append(one.get_submodule(path).register_forward_hook(hook))
    for ids in blocks:
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits.float(), ids[1:], reduction="sum").backward()
        tokens += len(ids)
        for name, (found, added) in seen.items():
            product = (found.grad.double() * added.double()).sum(-1)
            sums[name] = sums.get(name, 0.0) + float(product.square().sum())
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return {name: total / tokens / 2 for name, total in sums.items()}


@pytest.mark.parametrize("name", ADDED)
def test_losses_equal_plain_hooks(name, calibration):
    """Post-norms, a multiplied residual, a parallel one, Conv1D, outputs that are tuples."""
    found = sweep(build(name), calibration)
    expected = by_hand(build(name), calibration.ids, ADDED[name])
    assert found.keys() == expected.keys() and len(found) == 3 * LAYERS
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-3), key
    assert min(found.values()) > 0


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_the_sublayers_of_a_layer_add_up_where_they_stand_side_by_side(name, calibration):
    """What the layer adds is the sum of what they add, for both; only in a parallel layer do both
    see one gradient, so the layer costs at most twice the sum of theirs: (a + b)² <= 2 a² + 2 b².
    """
    found = sweep(build(name), calibration)
    both = [found[f"{layer} attention"] + found[f"{layer} mlp"] for layer in range(LAYERS)]
    bounded = [found[str(layer)] <= 2 * sum_ for layer, sum_ in enumerate(both)]
    assert name != "gpt_neox" or all(bounded)


def test_padding_is_left_out(calibration):
    mask = torch.arange(20) < torch.tensor([20, 13, 7])[:, None]
    padded = calibration.ids[:3].where(mask, torch.tensor(9))
    found = sweep(build("llama", torch.float64), grasp.Calibration(padded, "padded", mask=mask))
    blocks = [ids[:length] for ids, length in zip(calibration.ids, (20, 13, 7), strict=False)]
    expected = by_hand(build("llama", torch.float64), blocks, ADDED["llama"])
    assert found == pytest.approx(expected, rel=1e-3)


def test_a_layer_that_adds_nothing_is_worth_nothing(calibration):
    model = build("llama")
    layer = model.model.layers[2]
    with torch.no_grad():
        for path in ADDED["llama"]:
            layer.get_submodule(path).weight.zero_()
    found = sweep(model, calibration)
    assert [found[f"2{what}"] for what in ("", " attention", " mlp")] == [0, 0, 0]
    assert found["1"] > 0 and found["3"] > 0


def test_the_model_comes_back_as_it_was(calibration):
    model = build("gemma2")
    sweep(model, calibration)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_sums_that_are_missing_or_not_finite():
    collector = LayerLosses(Decoder(build("llama")).family)
    broken = {"1": torch.tensor(float("nan")), "tokens 1": torch.tensor(4)}
    for sums in ({}, broken):
        with pytest.raises(NumericsError, match="missing or not finite"):
            collector.result(sums)
