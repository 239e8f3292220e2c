"""Method streamline: the window is that of a direct computation, the network learns what held-out
text shows, nothing else of the model changes, and what is saved loads again.
"""

import dataclasses

import pytest
import torch
from closeness import close, same_weights
from conftest import LAYERS, build, quick

import grasp
from grasp.core import journal
from grasp.core.decoder import Decoder
from grasp.core.edits import Drop, Replace, trial
from grasp.core.runner import Resident
from grasp.errors import GraspError, NumericsError, RecipeError
from grasp.methods import make
from grasp.stages.light_network import Training, learn, split

CONTRACT = {
    "recipe": {"num_layers": 2, "net": "none"},
    "sizes": (
        {"num_layers": 3, "epochs": 1},
        {"ratio": 0.2, "net": "layer", "loss": "lm", "epochs": 1},
        {"num_layers": 2, "net": "ffn", "net_width": 8, "epochs": 1},
    ),
    "flags": {
        "--net": ("none", ("nonsense",)),
        "--net-width": (8, ("0", "1.5", "x")),
        "--loss": ("lm", ("nonsense",)),
        "--learning-rate": (1e-3, ("0", "2", "nan", "x")),
        "--weight-decay": (0.0, ("-0.5", "2", "nan", "x")),
        "--epochs": (2, ("0", "1.5", "x")),
    },
}
SOME = ["llama", "gpt2", "opt", "gemma2", "phi3"]
"""Rows that call their layers otherwise: by place or name, with rotary angles, by-layer windows."""


def run(data, name="llama", model=None, out=None, **fields):
    model = build(name) if model is None else model
    return grasp.compress(model, out, method="streamline", data=data, **fields)


@pytest.fixture
def text():
    """Sixteen blocks of few tokens in simple patterns, and four others that are never shown."""
    order = torch.randperm(24, generator=torch.Generator().manual_seed(5))
    starts, strides = order[:, None] // 3, 1 + order[:, None] % 3
    ids = (starts + strides * torch.arange(24)) % 32
    return grasp.Calibration(ids[:16], "patterns"), ids[16:20]


def hidden_states(model, ids, mask=None):
    """Input of every layer, and the output of the last: by hooks, not `output_hidden_states`, whose
    last entry is behind the final norm.
    """
    found, stack = [], Decoder(model).stack

    def before(_module, args, kwargs):
        found.append(args[0] if args else kwargs["hidden_states"])

    def after(_module, _args, output):
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [one.register_forward_pre_hook(before, with_kwargs=True) for one in stack]
    handles.append(stack[-1].register_forward_hook(after))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def gone(result):
    return sorted(edit["layer"] for edit in result.manifest["edits"] if edit["edit"] == "drop")


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", SOME)
def test_the_window_is_the_most_similar(name, count, calibration):
    """The arg-max over windows of the mean cosine over real tokens."""
    mask = torch.arange(20) < torch.tensor([20, 13, 20, 20, 2, 18])[:, None]
    data = grasp.Calibration(calibration.ids, "random", mask=mask)
    states = hidden_states(build(name), data.ids, mask)
    direct = [
        float(torch.cosine_similarity(states[j], states[j + count], dim=-1)[mask].mean())
        for j in range(LAYERS - count + 1)
    ]
    decoder = Decoder(build(name))
    method = make("streamline", {"num_layers": count, "net": "none"})
    stats = Resident(decoder, data).sweep(method.needs(decoder))
    assert list(stats["window_similarity"].values()) == pytest.approx(direct, abs=1e-5)
    begin = max(range(len(direct)), key=direct.__getitem__)
    assert gone(run(data, name, num_layers=count, net="none")) == list(range(begin, begin + count))


def test_the_last_window_ends_before_the_final_norm(calibration):
    """A final norm that turns everything round changes nothing."""
    model = build("llama")
    with torch.no_grad():
        model.model.norm.weight.neg_()
    turned = run(calibration, model=model, num_layers=2, net="none")
    assert gone(turned) == gone(run(calibration, num_layers=2, net="none"))


@pytest.mark.parametrize("name", quick([*SOME, "olmo2", "qwen2"]))
def test_a_trained_layer_does_what_the_window_did(name, text):
    """On text that was never shown: nearer to the window's output than the window's first layer,
    which it began as. Nothing else of the model changes.
    """
    data, unseen = text
    result = run(data, name, num_layers=3, learning_rate=2e-3, epochs=8)
    left = sorted(set(range(LAYERS)) - set(gone(result)))
    first = min(edit["layer"] for edit in result.manifest["edits"] if "layer" in edit) - 1
    wanted = hidden_states(build(name), unseen)[first + 3]
    plain = run(data, name, num_layers=3, learning_rate=1e-12, epochs=1)
    place = left.index(first) + 1

    def distance(found):
        return float((hidden_states(found.model, unseen)[place] - wanted).square().mean())

    assert distance(result) < 0.8 * distance(plain)
    trained, dense = result.model.state_dict(), build(name).state_dict()
    stack = Decoder(result.model).family.layers
    for key, value in trained.items():
        if key.startswith(f"{stack}.{left.index(first)}."):
            continue
        if key.startswith(f"{stack}."):
            number, rest = key.removeprefix(f"{stack}.").split(".", 1)
            assert torch.equal(value, dense[f"{stack}.{left[int(number)]}.{rest}"]), key
        else:
            assert torch.equal(value, dense[key]), key
    own = dict(Decoder(result.model).stack[left.index(first)].named_parameters())
    before = dict(Decoder(build(name)).stack[first].named_parameters())
    norms = [key for key in own if "norm" in key or "ln_" in key]
    assert all(torch.equal(own[key], before[key]) for key in norms)
    matrices = own.keys() - norms
    assert matrices and not any(torch.equal(own[key], before[key]) for key in matrices)


@pytest.mark.parametrize("name", quick(["gpt2", "opt", "gemma2", "phi3"]))
def test_a_trained_mlp_is_nearer_than_nothing(name, text):
    """On text that was never shown: to the window's output than its input is, from which it began.
    Nothing else of the model changes.
    """
    data, unseen = text
    result = run(data, name, num_layers=2, net="ffn", learning_rate=1e-2, epochs=8)
    [edit] = result.manifest["edits"]
    first = int(edit["path"].rpartition(".")[2])
    states = hidden_states(build(name), unseen)
    wanted, began = states[first + 2], states[first]
    found = hidden_states(result.model, unseen)[first + 1]
    assert edit["last"] == first + 1
    assert (found - wanted).square().mean() < 0.9 * (began - wanted).square().mean()
    dense, stack = Decoder(build(name)), Decoder(result.model).stack
    left = [index for index in range(LAYERS) if index != first + 1]
    for place, index in enumerate(left):
        if index != first:
            before, after = dense.stack[index].state_dict(), stack[place].state_dict()
            assert all(torch.equal(before[key], after[key]) for key in before)
    inner = dense.layer(0).linears[dense.family.path("down")].shape[1]
    assert stack[first].up.shape == (inner, dense.config.hidden_size)


def test_an_mlp_begins_as_nothing(calibration):
    """Untrained it computes what the model without the window does."""
    fields = {"num_layers": 2, "net": "ffn", "learning_rate": 1e-30, "epochs": 1}
    with torch.no_grad():
        one = run(calibration, **fields).model(calibration.ids).logits
        other = run(calibration, num_layers=2, net="none").model(calibration.ids).logits
    assert close(one, other)


def test_another_seed_is_another_mlp(text):
    data, _ = text
    fields = {"num_layers": 2, "net": "ffn", "net_width": 8, "epochs": 1}
    seeds = [grasp.Calibration(data.ids, "x", seed=seed) for seed in (0, 0, 1)]
    one, same, other = (run(seed, **fields).model for seed in seeds)
    assert same_weights(one, same) and not same_weights(one, other)


@pytest.mark.parametrize("net", ["layer", "ffn"])
@pytest.mark.parametrize("name", quick(["llama", "gpt2", "opt"]))
def test_by_the_models_loss(name, net, text):
    """The loss of the whole model falls, on text that was never shown too."""
    data, unseen = text
    losses = [
        float(Decoder(result.model).loss(unseen)[0].detach())
        for result in (
            run(data, name, num_layers=3, net=net, loss="lm", learning_rate=3e-3, epochs=6),
            run(data, name, num_layers=3, net=net, loss="lm", learning_rate=1e-12, epochs=1),
        )
    ]
    assert losses[0] < 0.95 * losses[1]


def test_the_loss_in_place_is_that_of_the_compressed_model(text):
    """What is held out is judged by the very model that comes out of it."""
    data, _ = text
    said = []
    decoder = Decoder(build("llama"))
    method = make("streamline", {"num_layers": 2, "loss": "lm", "learning_rate": 1e-3, "epochs": 2})
    stats = Resident(decoder, data).sweep(method.needs(decoder))

    import grasp.methods.streamline as module

    real = module.learn

    def spied(*arguments):
        said.append(real(*arguments))
        return said[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "learn", spied)
        for step in method.edits(Resident(decoder, data), stats):
            step.edit.apply(decoder)
    _, held = split(data.num_blocks)
    with torch.no_grad():
        now = [decoder.loss(data.ids[block : block + 1]) for block in held]
    assert said[0][1] == pytest.approx(sum(float(one / n) for one, n in now) / len(now), rel=1e-5)
    assert said[0][1] < said[0][0]


def test_padding_is_not_learnt_from(text):
    """Other tokens in its place, the same numbers."""
    data, _ = text
    mask = torch.ones_like(data.ids, dtype=torch.bool)
    mask[::2, 15:] = False
    found = []
    for filling in (7, 90):
        ids = torch.where(mask, data.ids, filling)
        for loss in ("mse", "lm"):
            found.append(
                run(grasp.Calibration(ids, "x", mask=mask), num_layers=2, loss=loss, epochs=1).model
            )
    for one, other in zip(found[:2], found[2:], strict=True):
        assert all(close(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_the_best_state_is_kept_and_not_the_last():
    """A rate that only makes it worse leaves what there was; the best epoch comes back, a copy."""
    net = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        net.weight.fill_(1.0)
    told = Training(learning_rate=1.0, weight_decay=0.0, epochs=3, seed=0)

    def rising(block):  # what is taught is not what is judged
        sign = 1 if block == 7 else -1
        return sign * net.weight.sum()

    assert learn(net, rising, 8, told, lambda *_: None) == (1.0, 1.0)
    assert float(net.weight.detach()) == 1.0
    seen = []

    def bowl(block):
        if block == 7:
            seen.append(float(net.weight.detach()))
        return (net.weight.sum() - 0.5).square()

    before, after = learn(net, bowl, 8, told, lambda *_: None)
    assert before == 0.25 and len(seen) == 4
    assert after == pytest.approx(min((one - 0.5) ** 2 for one in seen), rel=1e-5)
    assert (float(net.weight.detach()) - 0.5) ** 2 == pytest.approx(after)


def test_a_loss_that_is_not_finite_stops_it():
    net = torch.nn.Linear(1, 1)
    told = Training(0.1, 0.0, 1, 0)
    with pytest.raises(NumericsError, match="the loss in training is nan; lower --learning-rate"):
        learn(
            net, lambda block: net.weight.sum() * (torch.nan if block == 1 else 1), 4, told, print
        )


@pytest.mark.parametrize("loss", ["mse", "lm"])
def test_a_run_that_fails_leaves_the_model_as_it_was(loss, text, monkeypatch):
    data, _ = text
    decoder, before = Decoder(build("llama")), build("llama")
    asked = [p.requires_grad for p in decoder.model.parameters()]
    method = make("streamline", {"num_layers": 3, "loss": loss, "epochs": 1})
    stats = Resident(decoder, data).sweep(method.needs(decoder))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(method.edits(Resident(decoder, data), stats))
    assert same_weights(decoder.model, before) and decoder.kept == list(range(LAYERS))
    assert [p.requires_grad for p in decoder.model.parameters()] == asked
    assert not any("forward" in vars(module) for module in decoder.model.modules())
    assert close(decoder.model(data.ids).logits, before(data.ids).logits)


@pytest.mark.parametrize("fields", [{"loss": "lm"}, {"net": "ffn"}, {"net": "none"}])
@pytest.mark.parametrize("name", quick(["llama", "gpt2", "qwen2"]))
def test_it_loads_again_with_and_without_a_cache(name, fields, text, tmp_path):
    data, unseen = text
    result = run(
        data,
        name,
        out=tmp_path / "out",
        num_layers=2,
        **fields,
        **({"epochs": 1}),
    )
    again = grasp.load(tmp_path / "out").model
    assert same_weights(again, result.model)
    with torch.no_grad():
        whole = result.model(unseen, use_cache=False).logits
        assert close(again(unseen, use_cache=False).logits, whole)
        begun = again(unseen[:, :10], use_cache=True)
        rest = again(unseen[:, 10:], past_key_values=begun.past_key_values, use_cache=True).logits
    assert close(torch.cat([begun.logits, rest], dim=1), whole)


@pytest.mark.parametrize("loss", ["mse", "lm"])
def test_a_run_that_was_stopped_goes_on_to_the_same(loss, text, tmp_path, monkeypatch):
    """Two matrices had been rewritten: the rest is learnt from the original all the same."""
    monkeypatch.setattr(journal, "WAIT", 0.0)
    fields = {"num_layers": 2, "loss": loss, "epochs": 1}
    whole = run(text[0], **fields)
    record = journal.Journal.record

    def stop(self, number, *rest):
        record(self, number, *rest)
        if number == 1:
            raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "record", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            run(text[0], out=tmp_path / "out", **fields)
    again = run(text[0], out=tmp_path / "out", resume=True, **fields)
    assert same_weights(again.model, whole.model)
    assert again.manifest["edits"] == whole.manifest["edits"]


@pytest.mark.parametrize("net", ["layer", "ffn", "none"])
def test_the_ratio_is_of_all_parameters(net, text):
    data, _ = text
    total = build("qwen3").num_parameters()
    layer = sum(p.numel() for p in Decoder(build("qwen3")).stack[0].parameters())
    for ratio in (0.1, 0.3):
        result = run(data, "qwen3", ratio=ratio, net=net, epochs=1)
        removed = total - sum(p.numel() for p in result.model.parameters())
        assert ratio * total <= removed < ratio * total + layer
        assert removed == result.parameters_before - result.parameters_after


def test_a_model_in_bfloat16_is_trained_in_float32(text):
    """Steps far below its roundings add up."""
    data, unseen = text
    losses = []
    for rate in (1e-12, 2e-3):
        model = build("llama", torch.bfloat16)
        result = run(data, model=model, num_layers=3, loss="lm", learning_rate=rate, epochs=6)
        assert result.model.dtype == torch.bfloat16
        losses.append(float(Decoder(result.model).loss(unseen)[0].detach()))
    assert losses[1] < losses[0]


def test_states_in_files(text, tmp_path):
    data, _ = text
    here, there = (run(data, num_layers=2, epochs=1, scratch=one) for one in (None, tmp_path))
    assert same_weights(here.model, there.model) and list(tmp_path.iterdir()) == []


def test_a_layer_that_was_stood_in_for_comes_back(calibration):
    decoder = Decoder(build("llama"))
    runner = Resident(decoder, calibration)

    def loss():
        return float(runner.loss(2)[0].detach())

    before = loss()
    with runner.standing_in(1, lambda hidden, **_: hidden):
        skipped = loss()
        assert not any(p.requires_grad for p in decoder.model.parameters())
    assert loss() == before != skipped
    with trial(decoder, Drop(1)):
        assert loss() == pytest.approx(skipped, rel=1e-6)


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("one of --ratio, --num-layers; none was given", {}),
        ("got --ratio and --num-layers", {"ratio": 0.1, "num_layers": 2}),
        ("--num-layers 1: --net layer stands in for at least 2 layers", {"num_layers": 1}),
        ("--net-width 8: only --net ffn has a width", {"num_layers": 2, "net_width": 8}),
        (
            "--net-width 999: the network would be no smaller than a window of 2 layers",
            {"num_layers": 2, "net": "ffn", "net_width": 999},
        ),
        ("--num-layers 5: the model has 4 layers; at most 4 .*--net layer", {"num_layers": 5}),
        ("--num-layers 4: .*at most 3 .*--net none", {"num_layers": 4, "net": "none"}),
        ("--ratio 0.9: cannot be reached; the largest reachable is 0", {"ratio": 0.9}),
        ("--loss kl: unknown; allowed: mse, lm", {"num_layers": 2, "loss": "kl"}),
    ],
)
def test_mistakes_are_one_line(message, fields, calibration):
    with pytest.raises(RecipeError, match=message):
        run(calibration, **fields)


def test_one_block_is_too_few_to_train(calibration):
    one = grasp.Calibration(calibration.ids[:1], "random")
    with pytest.raises(RecipeError, match="--num-samples 1: one block is held out"):
        run(one, num_layers=2)
    assert run(one, num_layers=2, net="none").ratio > 0


def test_a_model_that_does_not_say_how_wide_its_mlps_are():
    decoder = Decoder(build("llama"))
    decoder.family = dataclasses.replace(decoder.family, mlp=(("?", "mlp.down_proj"),))
    with pytest.raises(RecipeError, match="MLPs is not known; give --net-width"):
        make("streamline", {"num_layers": 2, "net": "ffn"}).check(decoder)
    make("streamline", {"num_layers": 2, "net": "ffn", "net_width": 8}).check(decoder)


def test_a_layer_without_matrices_cannot_be_trained():
    decoder = Decoder(build("llama"))
    Replace("model.layers.1", 1, torch.zeros(32, 32), torch.zeros(32)).apply(decoder)
    with pytest.raises(RecipeError, match="--net layer: layer 1 has no dense matrix"):
        make("streamline", {"num_layers": 2}).check(decoder)


def test_a_model_whose_layers_cannot_go_is_refused(calibration):
    model = build("gpt2")
    model.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(GraspError, match="scales attention by the layer's index"):
        run(calibration, model=model, num_layers=2)
