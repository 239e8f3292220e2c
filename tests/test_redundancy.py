"""Block influence and angular distance against plain loops over hidden states."""

import math

import pytest
import torch
from conftest import LAYERS

import grasp
from grasp.core.records import Redundancy
from grasp.core.runner import Resident
from grasp.stages.redundancy import angular_distance, block_influence
from grasp.stages.statistics import AngularDistance, Similarity


def boundaries(model, ids, mask=None):
    """Input of every layer and the output of the last, before any final norm: (layers + 1, seq,
    width), by hooks of our own.
    """
    states = []
    handles = [
        layer.register_forward_pre_hook(lambda _m, args: states.append(args[0]))
        for layer in model.stack
    ]
    handles.append(
        model.stack[-1].register_forward_hook(
            lambda _m, _a, out: states.append(out[0] if isinstance(out, tuple) else out)
        )
    )
    with torch.no_grad():
        model.model(
            input_ids=ids[None],
            attention_mask=None if mask is None else mask[None],
            use_cache=False,
        )
    for handle in handles:
        handle.remove()
    return torch.cat(states)


def test_block_influence_equals_a_plain_loop(family, decoder, calibration):
    model = decoder(family)
    found = block_influence(Resident(model, calibration).sweep([Similarity()])).scores
    cosines = torch.zeros(LAYERS, dtype=torch.float64)
    for ids in calibration.ids:
        states = boundaries(model, ids).double()
        for layer in range(LAYERS):
            for before, after in zip(states[layer], states[layer + 1], strict=True):
                cosines[layer] += before @ after / (before.norm() * after.norm())
    expected = 1 - cosines / calibration.ids.numel()
    assert torch.allclose(
        torch.tensor([found[i] for i in range(LAYERS)], dtype=torch.float64), expected, atol=1e-6
    )


def test_the_last_layer_is_scored_before_the_final_norm(decoder, calibration):
    """The last entry of `output_hidden_states` is after the final norm; scored there, the last
    layer looks different.
    """
    model = decoder("llama")
    found = block_influence(Resident(model, calibration).sweep([Similarity()])).scores[LAYERS - 1]
    with torch.no_grad():
        hidden = model.model(input_ids=calibration.ids, output_hidden_states=True).hidden_states
    after_norm = 1 - float(
        torch.nn.functional.cosine_similarity(hidden[-2], hidden[-1], dim=-1).mean()
    )
    assert abs(found - after_norm) > 1e-3


def test_padding_does_not_count(family, decoder):
    """Padded blocks score like the unpadded sequences they hold."""
    model = decoder(family)
    ids = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(5))
    padded = torch.cat([ids, torch.full((1, 4), 258)], dim=1)
    mask = torch.arange(16)[None] < 12
    collectors = lambda: [Similarity(), AngularDistance()]  # noqa: E731
    whole = Resident(model, grasp.Calibration(ids, "x")).sweep(collectors())
    masked = Resident(model, grasp.Calibration(padded, "x", mask=mask)).sweep(collectors())
    for layer in range(LAYERS):
        assert float(masked["similarity"][layer]) == pytest.approx(
            float(whole["similarity"][layer]), abs=1e-6
        )
    assert torch.allclose(
        masked["angular_distance"]["distance"], whole["angular_distance"]["distance"], atol=1e-5
    )


def test_padding_does_not_count_in_the_loss(family, decoder):
    model = decoder(family)
    ids = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(5))
    padded = torch.cat([ids, torch.full((1, 4), 258)], dim=1)
    with torch.no_grad():
        whole, count = model.loss(ids)
        masked, masked_count = model.loss(padded, torch.arange(16)[None] < 12)
    assert count == masked_count == 11
    assert float(masked) == pytest.approx(float(whole), rel=1e-5)


def test_angular_distance_equals_a_plain_loop(decoder, calibration):
    model = decoder("qwen3")
    found = angular_distance(Resident(model, calibration).sweep([AngularDistance()]))
    expected = torch.zeros(LAYERS + 1, LAYERS + 1, dtype=torch.float64)
    for ids in calibration.ids:
        last = boundaries(model, ids)[:, -1].double()
        for i in range(LAYERS + 1):
            for j in range(LAYERS + 1):
                cosine = float(last[i] @ last[j] / (last[i].norm() * last[j].norm()))
                expected[i, j] += (
                    math.acos(max(-1.0, min(1.0, cosine))) / math.pi / calibration.num_blocks
                )
    off_diagonal = ~torch.eye(LAYERS + 1, dtype=torch.bool)
    assert torch.allclose(found.span_distance[off_diagonal], expected[off_diagonal], atol=1e-6)
    spans = [float(expected[i, i + 2]) for i in range(LAYERS - 1)]
    start = spans.index(min(spans))
    assert found.lowest(2) == (start, start + 1)


def test_lowest_takes_the_lowest_scores_wherever_they_are():
    assert Redundancy("bi", {0: 0.5, 1: 0.1, 2: 0.4, 3: 0.05}).lowest(2) == (1, 3)


def test_statistics_add_up_over_blocks(decoder, calibration):
    """The table of a set is the token-weighted mean of the tables of its parts: sweeps can be
    split.
    """
    model = decoder("llama")
    whole = Resident(model, calibration).sweep([Similarity()])
    parts = [
        Resident(model, grasp.Calibration(ids, "part")).sweep([Similarity()])
        for ids in (calibration.ids[:2], calibration.ids[2:])
    ]
    for layer in range(LAYERS):
        mean = (
            sum(float(part["similarity"][layer]) * part.num_tokens for part in parts)
            / whole.num_tokens
        )
        assert float(whole["similarity"][layer]) == pytest.approx(mean, abs=1e-12)
