"""Matrices of experts: their statistics against experts that are taken apart and routed to by hand,
the loss they forecast, and what a checkpoint with pairs in them computes.
"""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
import transformers
from closeness import close, same_weights
from conftest import OF_EXPERTS, WITH_EXPERTS, build, quick
from torch import nn

import grasp
from grasp.core.decoder import Decoder
from grasp.core.edits import Factorize, SplitExperts, from_spec, trial
from grasp.core.experts import expert_linears, mixture, mixtures
from grasp.core.layers.structure_grasp import structure_of
from grasp.core.runner import Resident
from grasp.core.scratch import Scratch
from grasp.errors import GraspError, RecipeError
from grasp.serving import narrowing
from grasp.stages.basis import groups
from grasp.stages.curvature import Curvatures, InputCurvatures
from grasp.stages.routing import ExpertLosses
from grasp.stages.sensitivity import Sensitivities, input_losses

IDS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(5))


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def matrices(decoder):
    return [one for found in mixtures(decoder) for one in expert_linears(found)]


def masked(calibration):
    mask = torch.ones_like(calibration.ids, dtype=torch.bool)
    mask[1, 15:] = mask[4, 7:] = False
    return grasp.Calibration(calibration.ids, "random", mask=mask)


# --- statistics


class Apart:
    """Every expert a module of its own, called on the tokens that the router sends to it: what
    each linear of it reads, the router's weights of these tokens, and the gradients at its output.
    """

    def __init__(self, name, data):
        decoder = Decoder(build(name))
        for one in mixtures(decoder):
            SplitExperts(one.layer).apply(decoder)
        self.read, self.weights, self.asked = {}, {}, {}
        modules = dict(decoder.model.named_modules())
        for one in mixtures(decoder):
            one.experts.register_forward_pre_hook(self.route(one, data))
            for number, expert in enumerate(one.experts.split):
                for part, linear in expert.named_children():
                    path = f"{one.path}.split.{number}.{part}"
                    assert modules[path] is linear
                    self.read[path], self.asked[path], self.weights[path] = [], [], []
                    linear.register_forward_hook(self.look(path))
        for block in range(data.num_blocks):
            self.mask = None if data.mask is None else data.mask[block : block + 1]
            decoder.loss(data.ids[block : block + 1], self.mask)[0].backward()

    def route(self, one, data):
        def hook(_module, args):
            _, chosen, weights = (one.detach() for one in args)
            self.real = torch.ones(len(chosen)).bool() if self.mask is None else self.mask[0]
            self.shares = {
                number: [
                    (float(weights[token, place]), bool(self.real[token]))
                    for token in range(len(chosen))
                    for place in range(chosen.shape[1])
                    if chosen[token, place] == number
                ]
                for number in range(one.count)
            }

        return hook

    def look(self, path):
        number = int(path.split(".")[-2])

        def hook(_module, args, output):
            shares = self.shares[number]
            keep = torch.tensor([real for _, real in shares], dtype=torch.bool)
            self.read[path].append(args[0].detach()[keep])
            self.weights[path] += [share for share, real in shares if real]
            output.register_hook(lambda grad: self.asked[path].append(grad.detach()[keep]))

        return hook

    def rows(self, path, shape):
        """(inputs, weights, gradients) of all its tokens (of none, if none reached it)."""
        inputs = torch.cat([torch.zeros(0, shape[1]), *self.read[path]])
        gradients = torch.cat([torch.zeros(0, shape[0]), *self.asked[path]])
        return inputs, torch.tensor(self.weights[path]), gradients


def gram(rows):
    return rows.double().T @ rows.double()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", quick(WITH_EXPERTS))
def test_the_curvature_of_an_expert_is_that_of_routing_by_hand(name, padded, calibration):
    """X over its own tokens; D over all tokens, since no other asks anything of it."""
    data = masked(calibration) if padded else calibration
    decoder = Decoder(build(name))
    linears = {one.path: one for one in matrices(decoder)}
    found = Resident(decoder, data).sweep([Curvatures(linears)])[Curvatures.name]
    apart, tokens = Apart(name, data), int(data.mask.sum()) if padded else data.ids.numel()
    assert found.keys() == linears.keys() == apart.read.keys()
    for path, linear in linears.items():
        curvature, weight = found[path], linear.weight.double()
        inputs, _, gradients = apart.rows(path, linear.shape)
        assert (curvature.input_tokens, curvature.gradient_tokens) == (len(inputs), tokens)
        near, far = gram(inputs), weight.T @ gram(gradients) @ weight
        if weight.shape[0] < weight.shape[1]:
            near, far = gram(gradients), weight @ gram(inputs) @ weight.T
        assert close(curvature.near, near.float(), 4096) and close(curvature.far, far.float(), 4096)
        assert curvature.input_square == pytest.approx(float(inputs.square().sum()), rel=1e-4)
        assert curvature.gradient_square == pytest.approx(float(gradients.square().sum()), rel=1e-4)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", quick(WITH_EXPERTS))
def test_the_sensitivity_of_an_expert_is_that_of_routing_by_hand(name, padded, calibration):
    """Sums over its own tokens, a mean over all; where those are fewer than its columns, the mean
    over the experts of its layer.
    """
    data = masked(calibration) if padded else calibration
    decoder = Decoder(build(name))
    linears = {one.path: one for one in matrices(decoder)}
    found = Resident(decoder, data).sweep([Sensitivities(linears, None, True)])[Sensitivities.name]
    apart, tokens = Apart(name, data), int(data.mask.sum()) if padded else data.ids.numel()

    def by_hand(path):
        x, _, d = apart.rows(path, linears[path].shape)
        weighted = x * d.square().sum(1, keepdim=True).sqrt()
        lost = input_losses(x, d @ linears[path].weight).sum() if len(x) else torch.zeros(())
        return x.square().sum(1) @ d.square(), weighted.T @ weighted, lost

    few = 0
    for path, linear in linears.items():
        inside, own = path.partition(".split.")[0], path.rpartition(".")[2]
        alike = [one for one in linears if one.startswith(inside) and one.endswith(f".{own}")]
        reached = len(apart.rows(path, linear.shape)[0])
        is_seldom = reached < linear.shape[1]
        few += is_seldom
        each = [by_hand(one) for one in (alike if is_seldom else [path])]
        rows, inputs, lost = (torch.stack(some).mean(0) for some in zip(*each, strict=True))
        assert (found[path].reached, found[path].tokens) == (reached, tokens)
        assert close(found[path].rows.float(), rows.float(), 4096)
        assert close(found[path].inputs, inputs, 4096)
        assert found[path].activations == pytest.approx(float(lost), rel=1e-3)
    assert few < len(linears) and (few or not padded)


@pytest.mark.parametrize("name", quick(WITH_EXPERTS))
def test_inputs_alone_count_as_the_router_weights_them(name, calibration):
    decoder, data = Decoder(build(name)), masked(calibration)
    linears = {one.path: one for one in matrices(decoder)}
    found = Resident(decoder, data).sweep([InputCurvatures(linears)])[InputCurvatures.name]
    apart = Apart(name, data)
    for path, linear in linears.items():
        inputs, shares, _ = apart.rows(path, linear.shape)
        rows, weight = inputs * shares[:, None], linear.weight.double()
        tall = weight.shape[0] >= weight.shape[1]
        expected = gram(rows) if tall else weight @ gram(rows) @ weight.T
        assert close(found[path].near if tall else found[path].far, expected.float(), 4096)


def test_halves_add_up(calibration):
    decoder = Decoder(build("mixtral"))
    paths = [one.path for one in matrices(decoder)]
    runner = Resident(decoder, calibration)
    kinds = [Curvatures(paths, half=half) for half in (0, 1)]
    parts, whole = runner.sweep(kinds), runner.sweep([Curvatures(paths)])[Curvatures.name]
    for path in paths:
        both = parts["curvature.0"][path] + parts["curvature.1"][path]
        assert close(both.near, whole[path].near, 4096)
        assert both.gradient_tokens == whole[path].gradient_tokens == 120


@pytest.mark.parametrize("name", OF_EXPERTS)
def test_the_price_of_a_group_is_that_of_a_share_of_the_text(name, calibration):
    """What dropping all of an expert's matrix costs is its tokens' mean price times their share."""
    decoder = Decoder(build(name))
    linear = next(one for one in matrices(decoder) if one.name.endswith("0.gate_up"))
    found = Resident(decoder, calibration).sweep([Curvatures([linear.path])])[Curvatures.name]
    inputs, _, gradients = Apart(name, calibration).rows(linear.path, linear.shape)
    price = float(groups(linear.weight, found[linear.path], "fisher", Scratch()).squares.sum()) / 2
    weight, count = linear.weight.double(), len(inputs)
    own = 0.5 * (gram(gradients) / count @ weight @ (gram(inputs) / count) @ weight.T).trace()
    assert price == pytest.approx(float(own) * count / 120, rel=0.05)  # damping adds a little


# --- taken apart


@pytest.mark.parametrize("name", quick(WITH_EXPERTS))
def test_experts_apart_compute_the_same(name, tmp_path):
    """And are saved, loaded, repeated and undone; low-rank pairs in them too."""
    decoder = Decoder(build(name))
    dense, linear = logits(decoder.model), matrices(decoder)[3]
    edit = SplitExperts(linear.layer)
    with trial(decoder, edit):
        assert close(logits(decoder.model), dense)
        assert decoder.num_parameters() == Decoder(build(name)).num_parameters()
    assert torch.equal(logits(decoder.model), dense) and not structure_of(decoder.model)

    rows, columns = linear.shape
    pair = Factorize(linear.path, torch.randn(3, columns) * 0.1, torch.randn(rows, 3) * 0.1)
    with pytest.raises((GraspError, AttributeError)):
        pair.apply(decoder)
    edit.apply(decoder)
    pair.apply(decoder)
    said = logits(decoder.model)
    assert not close(said, dense)
    decoder.model.save_pretrained(tmp_path)
    loaded = grasp.load(tmp_path).model
    assert same_weights(loaded, decoder.model) and close(logits(loaded), said)
    again = Decoder(build(name))
    for one in (edit, pair):
        from_spec(json.loads(json.dumps(one.spec())), one.tensors()).apply(again)
    assert torch.equal(logits(again.model), said)
    with pytest.raises(ValueError, match="of the kind 'experts', which the plug-in for vLLM"):
        narrowing.check(structure_of(loaded))


def test_an_expert_without_its_neighbours_is_its_formula():
    """The whole layer, expert by expert, from the numbers of the fused tensors."""
    decoder = Decoder(build("mixtral"))
    found = mixture(decoder, 1)
    x, chosen = torch.randn(5, 32), torch.tensor([[0, 3], [1, 0], [2, 3], [3, 1], [0, 2]])
    weights = torch.rand(5, 2)
    expected = torch.zeros(5, 32)
    for token in range(5):
        for place in range(2):
            number = chosen[token, place]
            gate, up = (found.experts.gate_up_proj[number] @ x[token]).chunk(2)
            made = found.experts.down_proj[number] @ (nn.functional.silu(gate) * up)
            expected[token] += weights[token, place] * made
    SplitExperts(1).apply(decoder)
    assert torch.allclose(mixture(decoder, 1).experts(x, chosen, weights), expected, atol=1e-6)


# --- methods


@pytest.mark.parametrize("method", ["grasp-fisher", "svd-llm", "obd-llm"])
@pytest.mark.parametrize("name", OF_EXPERTS)
def test_experts_and_the_rest_share_one_budget(name, method, calibration, tmp_path):
    out = tmp_path / "out"
    result = grasp.compress(build(name), out, method=method, data=calibration, ratio=0.3)
    edits = result.manifest["edits"]
    paths = [edit["path"] for edit in edits if edit["edit"] == "factorize"]
    inside = [path for path in paths if ".split." in path]
    assert inside and len(inside) < len(paths)
    apart = [edit["layer"] for edit in edits if edit["edit"] == "split-experts"]
    assert sorted(set(apart)) == sorted(apart) == sorted({int(p.split(".")[2]) for p in inside})
    assert not any("stay as they are" in note for note in result.manifest["notes"])
    loaded = grasp.load(out).model
    assert close(logits(loaded), logits(result.model))
    text = loaded.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=258)
    assert text.shape[1] == IDS.shape[1] + 4


@pytest.mark.parametrize(
    "fields",
    [{"exclude": "experts"}, {"projections": "attention"}, {"parts": ("ranks", "layers")}],
)
def test_experts_may_be_left_out(fields, calibration):
    result = grasp.compress(
        build("mixtral"), method="grasp-fisher", data=calibration, ratio=0.1, **fields
    )
    assert not any(".split." in edit.get("path", "") for edit in result.manifest["edits"])
    assert any("stay as they are" in note for note in result.manifest["notes"])


def test_experts_alone(calibration):
    result = grasp.compress(
        build("mixtral"),
        method="svd-llm",
        data=calibration,
        ratio=0.1,
        projections="experts",
    )
    kinds = {edit["edit"] for edit in result.manifest["edits"]}
    assert kinds == {"split-experts", "factorize"}
    assert all(".split." in edit.get("path", ".split.") for edit in result.manifest["edits"])


def test_experts_that_saw_few_tokens_stay(calibration, caplog):
    """Fewer than their statistics are wide, and the run says which."""
    data = grasp.Calibration(calibration.ids[:2], "few")
    with caplog.at_level(logging.WARNING):
        result = grasp.compress(build("deepseek_v3"), method="svd-llm", data=data, ratio=0.2)
    [said] = [one for one in caplog.messages if "saw fewer tokens" in one]
    apart = Apart("deepseek_v3", data)
    decoder = Decoder(build("deepseek_v3"))
    seldom = {
        one.path
        for one in matrices(decoder)
        if len(apart.rows(one.path, one.shape)[0]) < min(one.shape)
    }
    assert seldom and said.startswith(f"{len(seldom)} matrices of experts saw fewer tokens")
    paths = {edit.get("path") for edit in result.manifest["edits"]}
    assert not seldom & paths


def test_compressed_experts_are_recovered(tokenizer, text_file, tmp_path):
    """Their factors are trained like others; what is saved is what was measured."""
    build("mixtral").save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    blocks = {"data": text_file, "num_samples": 8, "seq_len": 32}
    small = tmp_path / "small"
    result = grasp.compress(
        str(tmp_path / "dense"), small, method="grasp-fisher", ratio=0.3, **blocks
    )
    inside = [path for path in result.log.trainable(result.decoder.family) if ".split." in path]
    assert inside
    few = {"max_steps": 12, "held_out": 8, "max_length": 64, "batch_size": 4, "eval_every": 3}
    done = grasp.recover(
        small, tmp_path / "out", data=text_file, objective="lm", learning_rate=1e-3, **few
    )
    assert done.best["held_out_loss"] < done.curve[0]["held_out_loss"]
    trained = grasp.load(tmp_path / "out").model
    assert not all(
        torch.equal(trained.get_parameter(path), result.model.get_parameter(path))
        for path in inside
    )


WITHOUT = """
import sys
sys.modules["grasp"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
torch.save(model(torch.tensor([[5, 17, 60, 2]])).logits.detach(), sys.argv[1] + "/logits.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_loaded_where_grasp_is_not_installed(name, calibration, tmp_path):
    out = tmp_path / "out"
    result = grasp.compress(build(name), out, method="svd-llm", data=calibration, ratio=0.2)
    assert (out / "experts_grasp.py").is_file()
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(out)],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = logits(result.model, torch.tensor([[5, 17, 60, 2]]))
    assert close(torch.load(out / "logits.pt"), said)


def test_whole_experts_cannot_go_once_they_are_apart(calibration):
    result = grasp.compress(
        build("mixtral"), method="svd-llm", data=calibration, ratio=0.1, projections="experts"
    )
    with pytest.raises(RecipeError, match="its experts are kept one by one, so none can go"):
        grasp.compress(result.model, method="reap", num_experts=2, data=calibration)


@pytest.mark.parametrize("name", quick(WITH_EXPERTS))
def test_exported_dense_they_are_in_one_tensor_again(name, calibration, tmp_path):
    """An ordinary model, as large as before, with the numbers that the pairs stand for."""
    result = grasp.compress(
        build(name), tmp_path / "out", method="svd-llm", data=calibration, ratio=0.2
    )
    assert any(record["kind"] == "experts" for record in structure_of(result.model).values())
    exported = grasp.export(tmp_path / "out", tmp_path / "dense", format="dense")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not structure_of(loaded) and type(loaded) is type(build(name))
    assert exported.parameters_after == loaded.num_parameters() == build(name).num_parameters()
    assert close(logits(loaded), logits(result.model))


# --- whole experts beside ranks


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", quick(WITH_EXPERTS))
def test_the_loss_without_an_expert_is_that_of_routing_by_hand(name, padded, calibration):
    """1/2 E[(d'f)^2], f what its last matrix gives and d the gradient there."""
    data = masked(calibration) if padded else calibration
    decoder, apart = Decoder(build(name)), Apart(name, data)
    tokens = int(data.mask.sum()) if padded else data.ids.numel()
    found = Resident(decoder, data).sweep([ExpertLosses(decoder.family)])[ExpertLosses.name]
    downs = [one for one in matrices(decoder) if one.name.endswith(".down")]
    assert len(found) == len(downs)
    for linear in downs:
        inputs, _, gradients = apart.rows(linear.path, linear.shape)
        gone = (gradients * (inputs @ linear.weight.T)).sum(1).double().square().sum() / 2 / tokens
        name_ = f"{linear.layer} {linear.name.removesuffix('.down')}"
        assert found[name_] == pytest.approx(float(gone), rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("name", OF_EXPERTS)
def test_whole_experts_compete_with_ranks(name, calibration, tmp_path):
    """An expert that gives next to nothing is cheaper to leave out than to keep at a low rank; its
    price is in the notes, and what it gave is 0.
    """
    model = build(name)
    with torch.no_grad():
        mixture(Decoder(model), 2).experts.down_proj[1] *= 1e-3
    out = tmp_path / "out"
    result = grasp.compress(
        model,
        out,
        method="grasp-fisher",
        data=calibration,
        ratio=0.3,
        parts=("ranks", "channels", "experts"),
    )
    ranks = {e["path"]: e["rank"] for e in result.manifest["edits"] if e["edit"] == "factorize"}
    gone = {path for path, rank in ranks.items() if rank == 0 and ".split." in path}
    both = {path.rpartition(".")[0] for path in gone}
    assert "model.layers.2.mlp.experts.split.1" in both
    loaded = grasp.load(out).model
    assert close(logits(loaded), logits(result.model))
    assert result.manifest["prediction"]["loss_rise"] > 0


@pytest.mark.parametrize("parts", [("experts",), ("ranks", "layers", "experts")])
def test_whole_experts_need_ranks(parts, calibration):
    with pytest.raises(RecipeError, match="a whole expert goes as matrices of rank 0"):
        grasp.compress(
            build("mixtral"), method="grasp-fisher", data=calibration, ratio=0.1, parts=parts
        )
