"""What the tests call the same number lets other roundings pass and nothing else."""

import pytest
import torch
from closeness import close, is_greedy, same_weights
from conftest import WITHOUT_EXPERTS, build, quick

IDS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("name", quick(WITHOUT_EXPERTS))  # grouped products are none in float64
def test_another_order_of_summation_is_the_same_number(name):
    """The same model in float64, rounded at the end: what float32 in any order of summation is near
    to.
    """
    assert close(logits(build(name)), logits(build(name).double()).float())
    narrow = build(name).bfloat16()
    assert close(logits(narrow), logits(narrow.float()).bfloat16())


def lost_bias(model):
    bias = [
        value
        for name, value in model.named_parameters()
        if name.endswith("bias") and "norm" not in name.lower()
    ][-1]
    bias.zero_()


def smallest_group_lost(model):
    """One of the 32 singular groups of one matrix, the one that does least."""
    matrix = next(
        value
        for name, value in reversed(list(model.named_parameters()))
        if value.dim() == 2 and "layers" in name
    )
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    matrix -= s[-2] * torch.outer(u[:, -2], vh[-2])


def swapped_rows(model):
    matrix = model.get_submodule("model.layers.1.mlp.up_proj").weight
    matrix[[3, 4]] = matrix[[4, 3]]


HARMS = [("opt", lost_bias), ("qwen2", lost_bias), ("llama", swapped_rows)]


@pytest.mark.parametrize(
    ("name", "harm", "dtype"),
    [
        *((name, harm, dtype) for name, harm in HARMS for dtype in (torch.float32, torch.bfloat16)),
        ("llama", smallest_group_lost, torch.float32),  # less than a rounding of 16 bits
    ],
)
def test_a_wrong_result_is_not(name, harm, dtype):
    model = build(name).to(dtype)
    before = logits(model)
    with torch.no_grad():
        wide = build(name).to(dtype).float()
        harm(wide)
        model.load_state_dict(wide.state_dict())
    assert not close(logits(model), before)


def test_shape_and_emptiness():
    assert close(torch.zeros(0, 3), torch.zeros(0, 3)) and not close(
        torch.zeros(2), torch.zeros(1, 2)
    )
    assert not close(torch.tensor([float("nan")]), torch.ones(1)) and not close(
        torch.ones(1), torch.zeros(1)
    )


def test_greedy_text_and_another():
    model = build("llama")
    prompt = IDS[0]
    said = model.generate(
        prompt[None], max_new_tokens=6, do_sample=False, pad_token_id=258, eos_token_id=None
    )[0, len(prompt) :]
    assert is_greedy(model, prompt, said)
    other = said.clone()
    other[3] = (other[3] + 1) % 256
    assert not is_greedy(model, prompt, other)


def test_one_number_of_one_weight():
    model, other = build("llama"), build("llama")
    assert same_weights(model, other)
    with torch.no_grad():
        other.model.norm.weight[0] += 1e-6
    assert not same_weights(model, other)
