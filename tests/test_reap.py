"""Whole experts: the statistics against a loop that routes tokens by hand, the model of fewer
experts against the whole one whose router must not send to the others, and which of them go.
"""

import copy
import json

import pytest
import torch
import transformers
from closeness import close
from conftest import FAMILY_ROWS, WITH_EXPERTS, WITHOUT_EXPERTS, build, quick
from torch import nn

import grasp
from grasp.core.decoder import Decoder
from grasp.core.edits import DropExperts, from_spec
from grasp.core.experts import mixture, mixtures
from grasp.core.layers.structure_grasp import structure_of
from grasp.core.runner import Resident
from grasp.errors import RecipeError
from grasp.methods.reap import kept
from grasp.stages.routing import ExpertUse

CONTRACT = {
    "recipe": {"ratio": 0.05},
    "sizes": ({"ratio": 0.1}, {"num_experts": 4}, {"ratio": 0.05, "score": "frequency"}),
    "refuses": WITHOUT_EXPERTS,
    "flags": {"--num-experts": (4, ("0", "-1", "1.5", "x"))},
}


def run(calibration, name="mixtral", out=None, **fields):
    return grasp.compress(build(name), out, method="reap", data=calibration, **fields)


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def made_by(experts: nn.Module, number: int, x: torch.Tensor) -> torch.Tensor:
    """What one expert makes of one token (width,), from its numbers."""
    up, down = experts.gate_up_proj[number], experts.down_proj[number]
    if hasattr(experts, "gate_up_proj_bias"):  # gpt-oss: (in, out), gate and up in turns
        both = x @ up + experts.gate_up_proj_bias[number]
        gate, linear = both[::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
        inner = (linear + 1) * gate * torch.sigmoid(1.702 * gate)
        return inner @ down + experts.down_proj_bias[number]
    gate, linear = (up @ x).chunk(2)
    return down @ (gate * torch.sigmoid(gate) * linear)


@torch.no_grad()
def by_hand(model, layer: int, ids, mask=None):
    """Tokens of each expert, and the sum of weight x norm, token by token."""
    found = mixture(Decoder(model), layer)
    tokens, weighted = torch.zeros(found.count, dtype=torch.long), torch.zeros(found.count).double()
    seen = []
    hook = found.router.register_forward_hook(lambda _, args, output: seen.append((args, output)))
    for block in range(len(ids)):
        only = None if mask is None else mask[block : block + 1]
        model(input_ids=ids[block : block + 1], attention_mask=only)
        (hidden,), (_, weights, chosen) = seen.pop()
        for place, x in enumerate(hidden.flatten(0, -2)):
            if only is not None and not only[0, place]:
                continue
            for weight, number in zip(weights[place], chosen[place].tolist(), strict=True):
                tokens[number] += 1
                weighted[number] += float(weight * made_by(found.experts, number, x).norm())
    hook.remove()
    return tokens, weighted


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", quick(WITH_EXPERTS))
def test_the_use_of_experts_is_that_of_a_loop(name, masked, calibration):
    mask = torch.ones_like(calibration.ids, dtype=torch.bool)
    mask[1, 15:] = mask[4, 7:] = False
    data = grasp.Calibration(calibration.ids, "random", mask=mask if masked else None)
    decoder = Decoder(build(name))
    found = Resident(decoder, data).sweep([ExpertUse(decoder.family)])[ExpertUse.name]
    assert list(found) == [one.layer for one in mixtures(decoder)]
    for layer, use in found.items():
        tokens, weighted = by_hand(decoder.model, layer, data.ids, data.mask)
        assert torch.equal(use.tokens, tokens)
        assert torch.allclose(use.weighted, weighted, rtol=1e-4)
        assert torch.allclose(use.saliency, weighted / tokens.clamp(min=1), rtol=1e-4)
        assert tokens.sum() == 2 * (mask.sum() if masked else mask.numel())


def never_sent_to(decoder: Decoder, keep) -> None:
    """Make the routers give the experts that are not kept no chance."""
    for one in mixtures(decoder):
        gone = [number for number in range(one.count) if number not in keep[one.layer]]
        own = one.router.forward
        if hasattr(one.router, "e_score_correction_bias"):  # chosen by it, weighted without it
            one.router.e_score_correction_bias[gone] = -1e9
            continue

        def forward(x, own=own, gone=gone):
            with pytest.MonkeyPatch.context() as patch:
                linear = nn.functional.linear

                def masked(*args):
                    return linear(*args).index_fill(-1, torch.tensor(gone), -torch.inf)

                patch.setattr(nn.functional, "linear", masked)
                return own(x)

        one.router.forward = forward


def half(decoder: Decoder) -> dict[int, tuple[int, ...]]:
    """Half of the experts of each layer, others in each, and of each group of DeepSeek's two."""
    places = [(0, 2), (1, 3), (0, 3), (1, 2)]
    found = {one.layer: places[one.layer] for one in mixtures(decoder)}
    if decoder.config.model_type == "deepseek_v3":
        found = {layer: (*two, *(4 + place for place in two)) for layer, two in found.items()}
    return found


@pytest.mark.parametrize("name", quick(WITH_EXPERTS))
def test_fewer_experts_are_a_router_that_never_sends_to_the_others(name, tmp_path):
    """And an ordinary model of fewer experts: saved, it loads with nothing of ours."""
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(5))
    decoder, whole = Decoder(build(name)), Decoder(build(name))
    keep, count = half(decoder), FAMILY_ROWS[name].experts
    before, dense = decoder.num_parameters(), logits(decoder.model, ids)
    each = sum(one.numbers for one in mixtures(decoder))
    never_sent_to(whole, keep)
    edit = DropExperts(keep, count)
    undo = edit.apply(decoder)
    said = logits(decoder.model, ids)
    again = Decoder(build(name))
    from_spec(json.loads(json.dumps(edit.spec()))).apply(again)
    assert torch.equal(logits(again.model, ids), said)
    assert close(said, logits(whole.model, ids)) and not close(said, dense)
    assert before - decoder.num_parameters() == each * count // 2
    assert not structure_of(decoder.model)

    decoder.model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert not config.keys() & {"auto_map", "quantization_config"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [one.count for one in mixtures(Decoder(loaded))] == [count // 2] * len(keep)
    assert close(logits(loaded, ids), said)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 258}
    assert torch.equal(
        loaded.generate(ids[:1], **options), decoder.model.generate(ids[:1], **options)
    )
    undo()
    assert torch.equal(logits(decoder.model, ids), dense)
    assert decoder.model.config.to_dict() == build(name).config.to_dict()


def test_training_with_the_routers_loss_still_works():
    """It counts experts by the model's own entry."""
    decoder = Decoder(build("mixtral"))
    DropExperts(half(decoder), 4).apply(decoder)
    ids = torch.randint(0, 256, (1, 8))
    loss = decoder.model(input_ids=ids, labels=ids, output_router_logits=True).loss
    assert torch.isfinite(loss) and decoder.model.num_experts == 2


@pytest.mark.parametrize("score", ["reap", "frequency"])
@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3"])
def test_the_least_used_go(name, score, calibration):
    """One of every layer, or of every group of a layer."""
    decoder = Decoder(build(name))
    groups = 2 if name == "deepseek_v3" else 1
    result = run(calibration, name, ratio=0.02, score=score)
    [edit] = result.manifest["edits"]
    assert edit["keep"].keys() == {str(one.layer) for one in mixtures(decoder)}
    for layer, keep in edit["keep"].items():
        tokens, weighted = by_hand(decoder.model, int(layer), calibration.ids)
        scores = weighted / tokens.clamp(min=1) if score == "reap" else tokens
        size = len(scores) // groups
        worst = [group * size + int(part.argmin()) for group, part in enumerate(scores.split(size))]
        assert set(range(len(scores))) - set(keep) == set(worst), layer


def test_of_every_group_equally_many():
    """Though all of the second group are better than all of the first."""
    one = mixture(Decoder(build("deepseek_v3")), 2)
    scores = torch.tensor([0.1, 0.4, 0.3, 0.2, 5.0, 8.0, 7.0, 6.0])
    assert kept(one, scores, 4) == (1, 2, 5, 6)


def test_sizes_and_notes(calibration):
    """The fewest experts that reach the ratio; the manifest says how many, and nothing of experts
    that stay as they are.
    """
    whole = build("mixtral")
    each = 4 * (3 * 8 * 32 + 32)  # one of every layer: three matrices and a row of the router
    share = each / whole.num_parameters()
    for ratio, gone in ((0.0, 0), (share / 2, 1), (share, 1), (1.01 * share, 2)):
        result = run(calibration, ratio=ratio)
        assert result.parameters_before - result.parameters_after == gone * each
    assert not any("experts" in note for note in result.manifest["notes"])
    assert result.decoder.config.num_local_experts == 2
    assert result.log.summaries()[0].text == "2 of 4 experts left in 4 layers"


def test_dropped_twice(calibration):
    """What lost experts can lose more, and layers beside them."""
    first = run(calibration, "qwen3_moe", num_experts=3)
    second = grasp.compress(first.model, method="reap", num_experts=2, data=calibration)
    assert second.log.summaries()[0].of == 3
    third = grasp.compress(second.model, method="shortgpt", num_layers=1, data=calibration)
    assert [one.count for one in mixtures(third.decoder)] == [2, 2, 2]


@pytest.mark.parametrize(
    ("name", "message", "fields"),
    [
        ("llama", "--method reap: Llama has no experts to remove", {"ratio": 0.1}),
        ("mixtral", "say how much .*--ratio, --num-experts; none was given", {}),
        ("mixtral", "got --ratio and --num-experts", {"ratio": 0.1, "num_experts": 2}),
        ("mixtral", "--num-experts 1: .* have 4 experts and need 2; allowed", {"num_experts": 1}),
        ("mixtral", "--num-experts 5: .* allowed: 2 to 4", {"num_experts": 5}),
        ("deepseek_v3", "allowed: 4 to 8, in multiples of its 2 groups", {"num_experts": 5}),
        ("mixtral", r"largest reachable is 0\.\d+ \(2 of 4 experts left", {"ratio": 0.5}),
        (
            "mixtral",
            "--score taylor: unknown; allowed: reap, freq",
            {"ratio": 0.1, "score": "taylor"},
        ),
    ],
)
def test_mistakes_are_one_line(name, message, fields, calibration):
    with pytest.raises(RecipeError, match=message) as caught:
        run(calibration, name, **fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda keep: keep.pop(2), "must be all layers that have some: 1, 2, 3"),
        (lambda keep: keep.update({2: (0, 2, 4)}), "layer 2: what is kept of its 8 experts"),
        (lambda keep: keep.update({2: (2, 0, 4, 6)}), "layer 2: .* rising"),
        (lambda keep: keep.update({2: (0, 1, 2, 4)}), "layer 2: its 2 groups .* equally many"),
        (lambda keep: keep.update({1: (0, 4), 2: (0, 4), 3: (0, 4)}), "2 experts are too few, at"),
    ],
)
def test_edits_that_cannot_be(change, message):
    decoder = Decoder(build("deepseek_v3"))
    keep = half(decoder)
    change(keep)
    before = copy.deepcopy(decoder.model.config.to_dict())
    with pytest.raises(RecipeError, match=message):
        DropExperts(keep, 8).apply(decoder)
    assert (
        decoder.model.config.to_dict() == before
        and decoder.num_parameters() == Decoder(build("deepseek_v3")).num_parameters()
    )
