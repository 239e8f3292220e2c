"""SliceGPT: rotating changes nothing, the directions that are kept are the best ones, the sliced
model is the dense one with its states projected, the size is the true one.
"""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from closeness import close
from conftest import FAMILY_ROWS, WITH_EXPERTS, build, quick

import grasp
from grasp.compensation.recipe import Recipe
from grasp.compensation.trainable import check_trainable
from grasp.core.decoder import Decoder
from grasp.core.edits import Drop, EditLog, rebasing
from grasp.core.edits.slicing import Place, places
from grasp.core.layers.sliced_grasp import RootNorm
from grasp.core.layers.structure_grasp import check_structure
from grasp.errors import GraspError, ModelError, RecipeError
from grasp.methods import make
from grasp.serving import narrowing
from grasp.stages.signals import principal

NORMS_BEHIND = ("gemma2", "gemma3_text", "olmo2")
REFUSED = (*NORMS_BEHIND, *WITH_EXPERTS)
SUITED = [name for name in FAMILY_ROWS if name not in REFUSED]
CONTRACT = {
    "recipe": {"slicing": 0.25},
    "sizes": (
        {"ratio": 0.2},
        {"slicing": 0.3, "width_multiple": 1, "one_shot": True},
        {"slicing": 0.25, "slice_head": True},
    ),
    "refuses": REFUSED,
    "unties": True,
    "flags": {
        "--slicing": (0.25, ("-0.5", "1", "nan", "inf", "1e400", "x")),
        "--slice-head": (True, ()),
    },
}


def run(calibration, name="llama", out=None, model=None, **fields):
    return grasp.compress(
        model or build(name),
        out,
        method="slicegpt",
        data=calibration,
        **(fields or {"slicing": 0.25}),
    )


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("slice_head", [False, True])
@pytest.mark.parametrize("name", quick(SUITED))
def test_rotating_changes_nothing(name, slice_head, calibration):
    """All directions are kept: the model computes the same, with its shortcuts on top."""
    dense = build(name)
    before, said = dense.num_parameters(), logits(dense, calibration.ids)
    result = run(calibration, model=dense, slicing=0.0, slice_head=slice_head)
    assert torch.allclose(logits(result.model, calibration.ids), said, atol=3e-6 * said.abs().max())
    assert result.parameters_after > before


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox"])
def test_rotating_is_exact(name, calibration):
    """In float64, where the norms of the family compute in it too."""
    dense = build(name, torch.float64)
    said = logits(dense, calibration.ids)
    result = run(calibration, model=dense, slicing=0.0)
    assert torch.allclose(logits(result.model, calibration.ids), said, atol=1e-12, rtol=1e-10)


def test_tables_are_turned_a_few_rows_at_a_time(calibration, monkeypatch):
    """And so are the same as turned at once."""
    made = [run(calibration, "opt").model.state_dict()]
    monkeypatch.setattr(rebasing, "SLICE", 70)
    made.append(run(calibration, "opt").model.state_dict())
    assert all(close(made[0][name], made[1][name]) for name in made[0])


def test_the_published_size_of_opt_125m(caplog):
    """Its shape at 0.2: the shortcuts, a second embedding and a bias of the head make it grow."""
    with torch.device("meta"):
        decoder = Decoder(transformers.OPTForCausalLM(transformers.OPTConfig()))
    assert decoder.num_parameters() == 125_239_296
    method = make("slicegpt", {"slicing": 0.2})
    method.check(decoder)
    assert (method.width(decoder), method.plan(decoder).parameters) == (608, 147_250_880)
    assert "grow, from 125,239,296 to 147,250,880 parameters" in caplog.text


@pytest.mark.parametrize("name", quick(SUITED))
def test_the_size_is_the_true_one(name, calibration):
    """By a formula of its own: rows and columns, shortcuts, head."""
    dense, width, hidden, vocab = build(name), 24, 32, 260
    layers = [layer.linears.values() for layer in Decoder(dense).layers()]
    tables = [
        p
        for n, p in dense.named_parameters()
        if p.dim() == 2
        and "layers" not in n
        and ".h." not in n
        and "head" not in n
        and "embed_out" not in n
    ]
    expected = sum(len(table) * width for table in tables)
    parallel = name == "gpt_neox"
    for index, linears in enumerate(layers):
        last = hidden if index == len(layers) - 1 else width
        middle = last if parallel else width
        expected += width * middle + (0 if parallel else width * last)
        for linear in linears:
            rows, columns = linear.shape
            biased = linear.module.bias is not None
            path = linear.name.rpartition(".")[2]
            if path in ("o_proj", "out_proj", "dense") or linear.name == "attn.c_proj":
                expected += middle * (columns + biased)
            elif path in ("down_proj", "fc2", "dense_4h_to_h", "c_proj"):
                expected += last * (columns + biased)
            else:
                expected += rows * (width + biased)
        expected += sum(  # the norms of heads stay
            p.numel()
            for n, p in Decoder(dense).layer(index).module.named_parameters()
            if "q_norm" in n or "k_norm" in n
        )
    expected += vocab * (hidden + (name in ("gpt2", "opt", "gpt_neox")))
    result = run(calibration, model=dense)
    assert result.parameters_after == expected == result.model.num_parameters()


class Seen:
    """What the norms without their weights make of the states at a place, token by token."""

    def __init__(self, decoder: Decoder, place: Place):
        norms = decoder.family.norms
        path = norms.attention if place.block == "attention" else norms.mlp
        self.norm = decoder.layer(place.layer).module.get_submodule(path)
        self.tokens = []
        self.handle = self.norm.register_forward_hook(self.look)

    def look(self, norm, inputs, _output):
        states = inputs[0].detach().double()
        if isinstance(norm, torch.nn.LayerNorm):
            states = states - states.mean(-1, keepdim=True)
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        states = states / (states.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        self.tokens.append(states.reshape(-1, states.shape[-1]))


def seen(decoder, place, data):
    """The signal (tokens, hidden) at a place, without padding."""
    look = Seen(decoder, place)
    mask = torch.ones_like(data.ids, dtype=torch.bool) if data.mask is None else data.mask
    with torch.no_grad():
        decoder.model(input_ids=data.ids, attention_mask=mask)
    look.handle.remove()
    return torch.cat(look.tokens)[mask.flatten()]


@pytest.mark.parametrize("name", ["llama", "opt", "gpt_neox"])
def test_what_is_kept_are_the_best_directions(name, calibration):
    """At every block: no basis of that width reconstructs the signal of the model, sliced as far as
    it is then, any better than the one taken; padding does not count.
    """
    mask = torch.ones_like(calibration.ids, dtype=torch.bool)
    mask[0, 13:] = mask[3, 5:] = False
    data = grasp.Calibration(calibration.ids, "random", mask=mask)
    steps = run(data, name, slicing=0.5).log
    decoder, worse = Decoder(build(name)), 0
    for entry in steps[:-1]:
        edit = entry.edit
        signal = seen(decoder, Place(edit.layer, edit.block), data)
        basis = edit.basis.double()
        lost = (signal - signal @ basis @ basis.T).square().sum()
        best = torch.linalg.svdvals(signal)[edit.width :].square().sum()
        assert torch.isclose(lost, best, rtol=1e-4)
        with_padding = seen(decoder, Place(edit.layer, edit.block), calibration)
        other = torch.linalg.svd(with_padding)[2][: edit.width]
        worse += bool((signal - signal @ other.T @ other).square().sum() > 1.001 * best)
        edit.apply(decoder)
    assert worse  # the masked tokens would have been seen


def test_one_shot_takes_all_from_the_dense_model(calibration):
    model, sweeps = build("llama"), []
    method = make("slicegpt", {"slicing": 0.5, "one_shot": True})
    assert method.plan(Decoder(model)).forward_sweeps == 1
    assert make("slicegpt", {"slicing": 0.5}).plan(Decoder(model)).forward_sweeps == 5
    model.base_model.register_forward_hook(lambda *_: sweeps.append(1))
    log = run(calibration, model=model, slicing=0.5, one_shot=True).log
    assert len(sweeps) < 2 * calibration.num_blocks
    edit = log[5].edit
    signal = seen(Decoder(build("llama")), Place(edit.layer, edit.block), calibration)
    basis = edit.basis.double()
    lost = (signal - signal @ basis @ basis.T).square().sum()
    assert torch.isclose(lost, torch.linalg.svdvals(signal)[16:].square().sum(), rtol=1e-4)


@pytest.mark.parametrize(
    "name", quick(["llama", "qwen2", "phi3", "granite", "opt", "gpt2", "gpt_neox"])
)
def test_the_sliced_model_is_the_dense_one_with_projected_states(name, calibration):
    """Hooks on the dense model put its states through D D' at every block, and nothing else."""
    log, dense = run(calibration, name, slicing=0.5), build(name)
    said, decoder = logits(log.model, calibration.ids), Decoder(dense)
    centred = torch.eye(32) - (1 / 32 if name in ("opt", "gpt2", "gpt_neox") else 0)
    onto = {
        (one.edit.layer, one.edit.block): one.edit.basis @ one.edit.basis.T @ centred
        for one in log.log
    }
    factor = getattr(dense.config, "residual_multiplier", 1.0)
    states = {}
    for layer in decoder.layers():

        def project(_module, args, kwargs, layer=layer.index):
            states[layer] = (args[0] if args else kwargs["hidden_states"]) @ onto[
                layer, "attention"
            ].T
            return (states[layer], *args[1:]), kwargs

        layer.module.register_forward_pre_hook(project, with_kwargs=True)
        if (layer.index, "mlp") in onto:

            def turn(_module, _args, output, layer=layer.index):
                whole = states[layer] + factor * output.view_as(states[layer])
                return ((whole @ onto[layer, "mlp"].T - states[layer]) / factor).view_as(output)

            path = decoder.family.path("o")
            layer.module.get_submodule(path).register_forward_hook(turn)
    assert torch.allclose(logits(dense, calibration.ids), said, atol=2e-5 * said.abs().max())
    assert (logits(build(name), calibration.ids) - said).abs().max() > 0.05 * said.abs().max()


def test_a_shortcut_leads_from_basis_to_basis(calibration):
    result = run(calibration, slicing=0.25)
    bases = [entry.edit.basis for entry in result.log]
    assert [basis.shape[1] for basis in bases] == [24] * 8 + [32]
    layers = [layer.module for layer in Decoder(result.model).layers()]
    found = [getattr(layer, f"shortcut_{block}") for layer in layers for block in (0, 1)]
    for shortcut, here, there in zip(found, bases, bases[1:], strict=False):
        assert torch.allclose(shortcut, here.T @ there, atol=1e-6)


def test_the_norm_divides_by_the_size_that_there_was():
    """What was cut off counts as 0."""
    states = torch.randn(3, 24)
    wide = torch.cat([states, torch.zeros(3, 8)], dim=1)
    expected = torch.nn.RMSNorm(32, eps=1e-3, elementwise_affine=False)(wide)[:, :24]
    assert torch.allclose(RootNorm(32, 1e-3)(states), expected, atol=1e-6)
    assert RootNorm(32, 1e-3)(states.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("slice_head", [False, True])
def test_a_ratio_is_met_by_the_widest_that_meets_it(slice_head, calibration):
    fields = {"ratio": 0.22, "width_multiple": 1, "slice_head": slice_head}
    for name in ("llama", "gpt2"):
        result = run(calibration, name, **fields)
        width = result.log[0].edit.width
        assert result.ratio >= 0.22
        wider = make("slicegpt", {**fields, "ratio": None, "slicing": 1 - (width + 1) / 32})
        decoder = Decoder(build(name))
        assert wider.width(decoder) == width + 1
        assert wider.plan(decoder).parameters > 0.78 * decoder.num_parameters()


def test_principal_directions_of_a_gram_that_is_nothing():
    basis = principal(torch.zeros(4, 4), 2)
    assert torch.allclose(basis.T @ basis, torch.eye(2, dtype=torch.float64))


WITHOUT = """
import sys
sys.modules["grasp"] = None
import torch
from transformers import AutoModel, AutoModelForCausalLM
ids = torch.tensor([[5, 17, 60, 2]])
for path in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    torch.save(model(ids).logits.detach(), path + "/logits.pt")
    one, two = (model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False,
                               pad_token_id=0, use_cache=cache) for cache in (True, False))
    assert torch.equal(one, two)
    body = AutoModel.from_pretrained(path, trust_remote_code=True)
    assert body(ids).last_hidden_state.shape == (1, 4, 32)
"""


@pytest.mark.slow
def test_it_loads_where_grasp_is_not_installed(calibration, tmp_path):
    """Tied before, two matrices now; the body alone loads too."""
    results = {name: run(calibration, name, tmp_path / name) for name in ("llama", "gpt2")}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *(str(tmp_path / name) for name in results)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, result in results.items():
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["tie_word_embeddings"] is False
        said = logits(result.model, torch.tensor([[5, 17, 60, 2]]))
        assert close(torch.load(tmp_path / name / "logits.pt"), said)
        again = grasp.load(tmp_path / name).model
        assert again.num_parameters() == result.parameters_after
        assert again.get_input_embeddings().weight.shape == (260, 24)
    again = grasp.load(tmp_path / "llama").model
    hidden = again(calibration.ids[:1], output_hidden_states=True).hidden_states
    # the last one is after the final norm
    assert [one.shape[-1] for one in hidden] == [24, 24, 24, 24, 32]


@pytest.mark.parametrize("name", NORMS_BEHIND)
def test_norms_behind_a_block_are_refused(name, calibration):
    with pytest.raises(ModelError, match=r"cannot be sliced: its norms stand behind .*rotation$"):
        run(calibration, name)


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_experts_are_refused(name, calibration):
    with pytest.raises(ModelError, match=r"cannot be sliced: 'mlp.experts' holds its experts in"):
        run(calibration, name)


def opt_350m():
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=260,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            do_layer_norm_before=False,
        )
    )


def projected():
    config = transformers.OPTConfig(
        vocab_size=260,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=16,
    )
    return transformers.OPTForCausalLM(config)


@pytest.mark.parametrize(
    ("make_model", "message"),
    [
        (opt_350m, "do_layer_norm_before is false"),
        (projected, "matrices stand between its embedding and its layers"),
    ],
)
def test_models_that_the_maths_does_not_hold_for(make_model, message, calibration):
    with pytest.raises(ModelError, match=message):
        run(calibration, model=make_model())


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("with one of --slicing, --ratio; none was given", {"width_multiple": 8}),
        (
            "with one of --slicing, --ratio; got --slicing and --ratio",
            {"slicing": 0.2, "ratio": 0.2},
        ),
        ("--slicing 1: must be at least 0 and below 1", {"slicing": 1}),
        ("--slicing 0.9: leaves nothing .* in multiples of 8; at most 0.75", {"slicing": 0.9}),
        (
            "--width-multiple 64: the model's hidden size is 32",
            {"slicing": 0.2, "width_multiple": 64},
        ),
        (
            "--width-multiple 0: must be a whole number from 1",
            {"slicing": 0.2, "width_multiple": 0},
        ),
        (
            r"--ratio 0.9: cannot be reached; the largest reachable is 0\.\d+ \(8 of 32",
            {"ratio": 0.9},
        ),
    ],
)
def test_mistakes_are_one_line(message, fields, calibration):
    with pytest.raises(RecipeError, match=message) as caught:
        run(calibration, **fields)
    assert "\n" not in str(caught.value)


def test_what_comes_after_says_what_it_cannot(calibration, tmp_path):
    """One line each, and nothing is written."""
    run(calibration, out=tmp_path / "out")
    sliced = str(tmp_path / "out")
    with pytest.raises(GraspError, match="sliced"):
        grasp.export(sliced, tmp_path / "dense", format="dense")
    for method, fields in (
        ("slicegpt", {"slicing": 0.25}),
        ("shortgpt", {"num_layers": 1}),
        ("svd-llm", {"ratio": 0.1}),
        ("wanda", {}),
    ):
        with pytest.raises(GraspError, match="sliced"):
            grasp.compress(sliced, tmp_path / "again", method=method, data=calibration, **fields)
    with pytest.raises(GraspError, match="sliced"):
        Drop(1).apply(Decoder(grasp.load(sliced).model))
    with pytest.raises(GraspError, match="sliced, so what its layers read"):
        grasp.inspect(sliced, data=calibration)
    decoder = Decoder(grasp.load(sliced).model)
    with pytest.raises(GraspError, match="no layer's output is like the teacher's"):
        check_trainable(decoder, Recipe(objective="layer", teacher="x"), EditLog())
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    with pytest.raises(ValueError, match="'sliced', which the plug-in for vLLM does not know"):
        narrowing.check(said["structure"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_trial_of_all_places_leaves_no_trace(decoder, calibration):
    found = decoder("gpt2")
    said = logits(found.model, calibration.ids)
    undo = [entry.edit.apply(found) for entry in run(calibration, "gpt2", slicing=0.25).log]
    assert not close(logits(found.model, calibration.ids), said)
    for one in reversed(undo):
        one()
    assert torch.equal(logits(found.model, calibration.ids), said)
    assert found.model.get_input_embeddings().weight is found.model.get_output_embeddings().weight
    assert found.config.tie_word_embeddings and len(places(found)) == 9


LAYER = {"kind": "sliced", "part": "layer", "hidden": 32, "widths": [24, None], "blocks": [[]]}
BRANCH = {
    "norm": "input_layernorm",
    "run": ["self_attn"],
    "reads": [],
    "writes": "self_attn.o_proj",
}


@pytest.mark.parametrize(
    ("message", "record"),
    [
        ("the part of 'x' is None", {"kind": "sliced"}),
        ("the width of 'x' is 0", {"kind": "sliced", "part": "table", "width": 0}),
        ("padded to less", {"kind": "sliced", "part": "table", "width": 9, "padded": 8}),
        ("the hidden of 'x' is '32'", {"kind": "sliced", "part": "norm", "hidden": "32"}),
        ("the width 0 of 'x' is 0", {**LAYER, "widths": [0, None]}),
        ("a width before and behind each block", {**LAYER, "widths": [24]}),
        ("what its blocks are made of", {**LAYER, "blocks": [[{**BRANCH, "run": []}]]}),
        ("what its blocks are made of", {**LAYER, "blocks": None}),
    ],
)
def test_a_record_that_makes_no_sense(message, record):
    with pytest.raises(ValueError, match=message):
        check_structure({"x": record})


def test_a_config_that_does_not_fit_the_files(calibration, tmp_path):
    """Another width, another layer, a missing head: each is an error, never other numbers."""
    run(calibration, out=tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    said = json.loads(file.read_text())
    structure = said["quantization_config"]["structure"]
    layer, table = structure["model.layers.1"], structure["model.embed_tokens"]
    for record, key, value, message in (
        (layer, "widths", [24, 16, 24], "5 weights are of another shape"),
        (table, "width", 16, "1 weights are of another shape"),
        (layer["blocks"][0][0], "run", ["no_such"], "is another layer than it says"),
    ):
        right, record[key] = record[key], value
        file.write_text(json.dumps(said))
        with pytest.raises(GraspError, match=message):
            grasp.load(tmp_path / "out")
        record[key] = right
    file.write_text(json.dumps(said))
    grasp.load(tmp_path / "out")
    with pytest.raises(ValueError, match="'lm_head', which LlamaForSequenceClassification lacks"):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
