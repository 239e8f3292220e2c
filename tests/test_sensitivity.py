"""How much the loss depends on single numbers: against gradients taken token by token."""

import pytest
import torch
from closeness import close
from conftest import build
from torch import Tensor

from grasp.core.decoder import Decoder
from grasp.core.records import Calibration
from grasp.core.runner import Resident
from grasp.stages.sensitivity import Sensitivities, Sensitivity, input_losses

PATHS = ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.v_proj")


def seen(decoder: Decoder, path: str, data: Calibration) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs (tokens, in), gradients of the summed loss at the outputs (tokens, out))."""
    kept: dict[str, torch.Tensor] = {}
    module = decoder.model.get_submodule(path)

    def forward(_module, inputs, output):
        kept["x"] = inputs[0].detach()
        output.retain_grad()
        kept["y"] = output

    xs, ds = [], []
    handle = module.register_forward_hook(forward)
    for block in range(data.num_blocks):
        mask = None if data.mask is None else data.mask[block : block + 1]
        embedded = decoder.model.get_input_embeddings()(data.ids[block : block + 1])
        embedded = embedded.detach().requires_grad_(True)
        logits = decoder.model(inputs_embeds=embedded, attention_mask=mask).logits[0, :-1]
        labels = data.ids[block, 1:]
        if mask is not None:
            labels = labels.masked_fill(~(mask[0, 1:] & mask[0, :-1]), -100)
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        real = slice(None) if mask is None else mask[0]
        xs.append(kept["x"][0][real])
        ds.append(kept["y"].grad[0][real])
    handle.remove()
    return torch.cat(xs), torch.cat(ds)


@pytest.mark.parametrize("masked", [False, True])
def test_the_sums_are_those_of_single_tokens(masked):
    decoder = Decoder(build("llama"))
    ids = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 7:] = False
    data = Calibration(ids, "random", mask=mask if masked else None)
    found = Resident(decoder, data).sweep([Sensitivities(PATHS)])[Sensitivities.name]
    for path in PATHS:
        x, d = seen(decoder, path, data)
        tokens, size = len(x), d.square().sum(1)
        rows = (x.square().sum(1)[:, None] * d.square()).sum(0)
        inputs = (x * size[:, None]).mT @ x
        assert found[path].tokens == tokens
        assert close(found[path].rows.float(), rows)
        assert close(found[path].inputs, inputs)
        assert found[path].whole == pytest.approx(float(rows.sum()), rel=1e-4)


def at_inputs(decoder: Decoder, path: str, data: Calibration) -> list[tuple[Tensor, Tensor]]:
    """(x, gradient at what this matrix alone reads) of every token."""
    module, found = decoder.model.get_submodule(path), []
    kept: dict[str, Tensor] = {}

    def before(_module, inputs):
        kept["x"] = inputs[0].detach()
        kept["added"] = torch.zeros_like(kept["x"], requires_grad=True)
        return (inputs[0] + kept["added"],)

    handle = module.register_forward_pre_hook(before)
    for block in data.ids:
        logits = decoder.model(input_ids=block[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, block[1:], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, kept["added"])
        found += zip(kept["x"][0], gradient[0], strict=True)
    handle.remove()
    return found


def to_8_bits(x: Tensor) -> Tensor:
    """A token in 8 bits: its largest number is 127."""
    step = x.abs().max() / 127
    return (x / step).round() * step


def test_the_price_of_activations_is_that_of_single_tokens():
    decoder = Decoder(build("llama"))
    ids = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(1))
    data = Calibration(ids, "random")
    with_them, without = (
        Resident(decoder, data).sweep([Sensitivities(PATHS, activations=asked)])["sensitivity"]
        for asked in (True, False)
    )
    for path in PATHS:
        losses = [
            (gradient.double() * (to_8_bits(x) - x).double()).square().sum() / 2
            for x, gradient in at_inputs(decoder, path, data)
        ]
        expected = float(torch.stack(losses).mean())
        assert with_them[path].loss_of_activations == pytest.approx(expected, rel=1e-3)
        assert without[path].loss_of_activations == 0.0
        assert torch.equal(with_them[path].inputs, without[path].inputs)


def own_text(model, num_blocks: int, length: int) -> Tensor:
    """What the model itself says: no change of it can lower the loss to expect there."""
    torch.manual_seed(0)
    ids = torch.randint(0, 256, (num_blocks, 1))
    for _ in range(length - 1):
        last = model(input_ids=ids).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(last, 1)], dim=1)
    return ids


def rounding(_module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
    """A hook: each token of the input in 8 bits."""
    tokens = [to_8_bits(token) for token in inputs[0].flatten(0, 1)]
    return (torch.stack(tokens).view_as(inputs[0]),)


@torch.no_grad()
def test_the_price_of_activations_is_what_the_loss_rises_by():
    """Within a fifth, on text of the model's own, over all that could have followed each token."""
    model = build("llama").double()
    ids = own_text(model, 128, 12)
    with torch.enable_grad():
        runner = Resident(Decoder(model), Calibration(ids, "its own"))
        found = runner.sweep([Sensitivities(PATHS, activations=True)])[Sensitivities.name]
    before = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    for path in PATHS:
        handle = model.get_submodule(path).register_forward_pre_hook(rounding)
        after = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        handle.remove()
        rise = float((before.exp() * (before - after)).sum()) / ids.numel()
        assert found[path].loss_of_activations == pytest.approx(rise, rel=0.2)


def test_a_number_that_dwarfs_its_token_costs_no_more_than_the_others_are():
    """The uniform noise of such a token's scale would be a hundred times as much."""
    x = torch.full((1, 50), 0.01)
    x[0, 0] = 100.0
    gradient = torch.ones(1, 50)
    assert float(input_losses(x, gradient)) == pytest.approx(49 * 0.01**2, rel=1e-3)
    assert 49 * 0.01**2 < 50 * (100 / 127) ** 2 / 12 / 100


def one_token() -> tuple[torch.Tensor, torch.Tensor, Sensitivity]:
    """(x, d, the sensitivity of that one token)."""
    generator = torch.Generator().manual_seed(3)
    x, d = (torch.randn(size, generator=generator).double() for size in (5, 4))
    squares = d.square() * x.square().sum()
    inputs = d.square().sum() * torch.outer(x, x)
    return x, d, Sensitivity(squares, inputs, float(squares.sum()), 1)


def test_of_one_token_the_diagonal_is_exact():
    """Then F_ij = d_i^2 x_j^2 has rank one: the mean of `1/2 (d'Ex)^2` over all signs of E."""
    x, d, found = one_token()
    change = torch.zeros(4, 5).double()
    change[:3, :4] = torch.randn(3, 4, generator=torch.Generator().manual_seed(4)).double()
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 12).view(-1, 3, 4)
    outputs = torch.einsum("i,nij,j->n", d[:3], signs * change[:3, :4], x[:4])
    assert found.loss(change) == pytest.approx(0.5 * float(outputs.square().mean()))


def test_along_the_inputs_it_is_what_the_outputs_change():
    x, d, found = one_token()
    change = torch.randn(4, 5, generator=torch.Generator().manual_seed(5)).double()
    exact = 0.5 * float((d.square() * (change @ x).square()).sum())
    assert found.loss_along(change) == pytest.approx(exact)
    hidden = change - torch.outer(change @ x, x) / x.square().sum()  # what no output shows
    assert found.loss_along(hidden) == pytest.approx(0.0, abs=1e-12)
    assert found.loss(hidden) > 0


def test_nothing_is_lost_where_no_gradient_comes():
    nothing = Sensitivity(torch.zeros(4).double(), torch.zeros(5, 5), 0.0, 1)
    assert nothing.loss(torch.ones(4, 5)) == nothing.loss_along(torch.ones(4, 5)) == 0.0
