"""The contract of every collector: its sums add up over blocks and over processes, and it does not
matter whether the blocks or the layers come first. And that of a sweep: it leaves no trace.
"""

import dataclasses
import importlib
import pkgutil

import pytest
import torch
from conftest import LAYERS, WIDTH, build, quick

import grasp
import grasp.stages
from grasp.core.collector import Collector, add
from grasp.core.decoder import Decoder
from grasp.core.edits.cuts import sizes_of
from grasp.core.edits.slicing import MLP, norm_module, norm_of, places
from grasp.core.linalg import svd
from grasp.core.runner import Resident
from grasp.core.scratch import Scratch
from grasp.errors import NumericsError
from grasp.stages.closeness import Closeness, LastHidden
from grasp.stages.curvature import Curvatures, InputCurvatures
from grasp.stages.input_norms import InputMeans, InputNorms
from grasp.stages.modular import HeadMoments
from grasp.stages.routing import ExpertLosses, ExpertUse
from grasp.stages.sensitivity import Sensitivities
from grasp.stages.signals import Signals
from grasp.stages.statistics import (
    AngularDistance,
    FeatureFisher,
    GroupGrad,
    Similarity,
    SquaredGrad,
    VectorGrad,
    WeightGrad,
)
from grasp.stages.sublayers import LayerLosses
from grasp.stages.windows import WindowSimilarity, WindowStates

FAMILIES = ["llama", "gpt2", "opt", "phi3"]
MASKS = {
    "whole": None,
    "padded": (torch.arange(20) < torch.tensor([20, 13, 20, 20, 2, 18])[:, None])
    & (torch.arange(20) >= torch.tensor([0, 0, 11, 18, 0, 1])[:, None]),
}
"""On the right, on the left, and on both sides."""


def linears(decoder):
    return [linear for layer in decoder.layers() for linear in layer.linears.values()]


def paths(decoder):
    return [linear.path for linear in linears(decoder)]


def states(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


COLLECTORS = {
    Similarity: lambda decoder: Similarity(),
    AngularDistance: lambda decoder: AngularDistance(),
    WeightGrad: lambda decoder: WeightGrad(paths(decoder)),
    SquaredGrad: lambda decoder: SquaredGrad(paths(decoder)),
    VectorGrad: lambda decoder: VectorGrad(paths(decoder)),
    GroupGrad: lambda decoder: GroupGrad(
        {linear.path: svd(linear.weight) for linear in linears(decoder)}
    ),
    FeatureFisher: lambda decoder: FeatureFisher(paths(decoder)),
    Curvatures: lambda decoder: Curvatures(paths(decoder)),
    Sensitivities: lambda decoder: Sensitivities(paths(decoder)),
    InputCurvatures: lambda decoder: InputCurvatures(paths(decoder)),
    InputMeans: lambda decoder: InputMeans(paths(decoder)),
    InputNorms: lambda decoder: InputNorms(paths(decoder)),
    LayerLosses: lambda decoder: LayerLosses(decoder.family),
    HeadMoments: lambda decoder: HeadMoments(
        decoder.family,
        {layer: sizes_of(decoder, layer) for layer in (1, 2)},
        {1: "v", 2: "qkv"},
    ),
    LastHidden: lambda decoder: LastHidden(),
    Closeness: lambda decoder: Closeness(
        {block: states(1, 20, WIDTH, seed=block) for block in range(6)}
    ),
    Signals: lambda decoder: Signals(
        {
            place: (
                norm_of(norm_module(decoder, place)),
                decoder.family.norms.mlp if place.block == MLP else decoder.family.norms.attention,
            )
            for place in places(decoder)
        }
    ),
    ExpertUse: lambda decoder: ExpertUse(decoder.family),
    ExpertLosses: lambda decoder: ExpertLosses(decoder.family),
    WindowSimilarity: lambda decoder: WindowSimilarity(decoder.kept, 2),
    WindowStates: lambda decoder: WindowStates(1, 2, Scratch()),
}
"""Class -> how to make one for a model."""
ON = {ExpertUse: "mixtral", ExpertLosses: "mixtral"}
"""Of collectors that other families have nothing for: the one they are tried on."""
of_every_collector = pytest.mark.parametrize("kind", COLLECTORS, ids=lambda kind: kind.name)
of_those_with_hooks = pytest.mark.parametrize(
    "kind",
    [one for one in COLLECTORS if one not in (LastHidden, Closeness)],  # in one order everywhere
    ids=lambda kind: kind.name,
)
of_every_mask = pytest.mark.parametrize(
    "padding", ["padded", pytest.param("whole", marks=pytest.mark.slow)]
)


def test_all_collectors_are_here():
    for module in pkgutil.iter_modules(grasp.stages.__path__):
        importlib.import_module(f"grasp.stages.{module.name}")
    kinds, found = [Collector], set()
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        found |= {kind} if hasattr(kind, "name") and kind.__module__.startswith("grasp.") else set()
    assert found == set(COLLECTORS)


@pytest.fixture
def data(calibration):
    """`data(padding)`: six blocks of 20 tokens, some of them padding."""

    def make(padding):
        return grasp.Calibration(calibration.ids, "random", mask=MASKS[padding])

    return make


def flat(table):
    """A collector's table as name -> tensor in float64."""
    found = {}
    for key, value in table.items():
        parts = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else {"": value}
        found |= {
            f"{key} {name}": torch.as_tensor(part, dtype=torch.float64)
            for name, part in parts.items()
            if part is not None
        }
    return found


def check_equal(found, expected, tolerance=1e-5):
    found, expected = flat(found), flat(expected)
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        atol = tolerance * float(value.abs().max())
        assert torch.allclose(found[name], value, rtol=0, atol=atol), name


def halves(kind, model, data, parts=((0, 1, 2), (3, 4, 5))):
    """(a fresh collector, the sums of each part of the blocks): every part in a process of its own,
    as it were.
    """
    sums = []
    for blocks in parts:
        collector = COLLECTORS[kind](model)
        Resident(model, data).show([collector], blocks)
        sums.append(collector.sums)
    return COLLECTORS[kind](model), sums


@of_every_mask
@of_every_collector
@pytest.mark.parametrize("name", quick(FAMILIES))
def test_the_sums_of_two_halves_are_those_of_the_whole(name, kind, padding, decoder, data):
    model, text = decoder(ON.get(kind, name)), data(padding)
    whole = Resident(model, text).sweep([COLLECTORS[kind](model)])[kind.name]
    fresh, (one, other) = halves(kind, model, text)
    before = {key: value.clone() for key, value in one.items()}
    check_equal(fresh.result(add(one, other)), whole)
    check_equal(fresh.result(add(other, one)), whole)
    assert one.keys() == before.keys() and all(torch.equal(one[key], before[key]) for key in one)


def layer_first(decoder, data, collector):
    """All blocks of one layer before the next, last layer first: the hidden states before it and
    the gradients behind it are kept, nothing else of the model is needed.
    """
    decoder.model.requires_grad_(False)
    calls = {layer.index: [] for layer in decoder.layers()}
    gradients, ends = [], []

    def keep(index):
        return lambda _module, args, kwargs: calls[index].append((args, kwargs))

    def begin(_module, _args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        gradients.append(hidden.requires_grad_(True))
        hidden.retain_grad()

    masks = [None if data.mask is None else data.mask[b : b + 1] for b in range(data.num_blocks)]
    handles = [
        layer.module.register_forward_pre_hook(keep(layer.index), with_kwargs=True)
        for layer in decoder.layers()
    ]
    handles.append(decoder.stack[-1].register_forward_hook(begin))
    handles.append(
        decoder.body.register_forward_hook(
            lambda _module, _args, output: ends.append(output[0].detach())
        )
    )
    for block, mask in enumerate(masks):
        decoder.loss(data.ids[block : block + 1], mask)[0].backward()
    for handle in handles:
        handle.remove()
    gradients = [hidden.grad for hidden in gradients]
    for layer in reversed(list(decoder.layers())):
        collector.attach(layer)
        for block, (args, kwargs) in enumerate(calls[layer.index]):
            collector.begin(block, masks[block])
            hidden = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_(True)
            if args:
                output = layer.module(hidden, *args[1:], **kwargs)
            else:
                output = layer.module(**{**kwargs, "hidden_states": hidden})
            output = output[0] if isinstance(output, tuple) else output
            output.backward(gradients[block])
            gradients[block] = hidden.grad
        collector.detach(layer)
    for block, (mask, hidden) in enumerate(zip(masks, ends, strict=True)):
        collector.begin(block, mask)
        collector.end(hidden)
    return collector.result(collector.sums)


@of_every_mask
@of_every_collector
@pytest.mark.parametrize("name", quick(FAMILIES))
def test_layers_first_gives_what_blocks_first_gives(name, kind, padding, decoder, data):
    model, text = decoder(ON.get(kind, name)), data(padding)
    expected = Resident(model, text).sweep([COLLECTORS[kind](model)])[kind.name]
    check_equal(layer_first(model, text, COLLECTORS[kind](model)), expected)


@of_every_collector
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_wide_and_the_collectors_own(kind, dtype, decoder, data):
    """float32 or wider, or counts; nothing that belongs to the model."""
    model = decoder(ON.get(kind, "llama"), dtype=dtype)
    collector = COLLECTORS[kind](model)
    Resident(model, data("whole")).sweep([collector])
    of_model = {p.data_ptr() for p in model.model.parameters()}
    assert collector.sums
    for key, value in collector.sums.items():
        assert value.dtype in (torch.float32, torch.float64, torch.int64), key
        assert value.data_ptr() not in of_model and not value.requires_grad, key
    stores = [value.data_ptr() for value in collector.sums.values()]
    assert len(set(stores)) == len(stores)


def test_several_collectors_see_what_each_alone_sees(decoder, data):
    """Two of them want the gradient of the same weights."""
    model, text = decoder("llama"), data("padded")
    makers = {kind: make for kind, make in COLLECTORS.items() if kind not in ON}
    together = Resident(model, text).sweep([make(model) for make in makers.values()])
    for kind, make in makers.items():
        alone = Resident(model, text).sweep([make(model)])
        check_equal(together[kind.name], alone[kind.name], 1e-6)


@pytest.mark.parametrize("count", [1, 3, 99])
def test_a_part_of_the_set_is_its_first_blocks(count, decoder, data):
    text = data("whole")
    part = grasp.Calibration(text.ids[:count], "part")
    model = decoder("llama")
    found = Resident(model, text).sweep([InputNorms(paths(model))], blocks=count)
    expected = Resident(model, part).sweep([InputNorms(paths(model))])
    assert found.num_tokens == part.num_tokens
    check_equal(found["input_norms"], expected["input_norms"], 0)


def test_no_gradient_outlives_its_block(decoder, data):
    """The sums are all that grows into memory."""
    model, seen = decoder("llama"), []
    model.progress = lambda *_: seen.extend(p.grad for p in model.model.parameters())
    Resident(model, data("whole")).sweep([WeightGrad(paths(model))])
    assert seen and all(grad is None for grad in seen)


# --- what is missing


def test_missing_sums_are_named(decoder):
    model = decoder("llama")
    of_matrices = (WeightGrad, FeatureFisher, SquaredGrad, VectorGrad, GroupGrad)
    for kind in (*of_matrices, Curvatures, InputCurvatures, InputMeans, InputNorms):
        with pytest.raises(NumericsError, match=r"model.layers.0.self_attn.q_proj.* missing"):
            COLLECTORS[kind](model).result({})
    with pytest.raises(NumericsError, match="layer 1: the outputs of v are missing"):
        COLLECTORS[HeadMoments](model).result({})
    with pytest.raises(NumericsError, match="no decoder layer ran"):
        AngularDistance().result({})
    with pytest.raises(NumericsError, match="no last hidden state"):
        LastHidden().result({})


@pytest.mark.parametrize("kind", [WeightGrad, GroupGrad, Curvatures], ids=lambda kind: kind.name)
def test_sums_that_are_not_finite_are_named(kind, decoder, data):
    model = decoder("llama")
    fresh, (one, other) = halves(kind, model, data("whole"))
    key = next(key for key in one if "layers.2.mlp.down_proj" in key and one[key].dim() == 2)
    one[key][0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"model.layers.2.mlp.down_proj.* not finite"):
        fresh.result(add(one, other))


# --- the input that several matrices share


def test_a_shared_input_is_added_once_over_processes(decoder, data):
    """gate and up: one X, under the name of gate."""
    _, parts = halves(Curvatures, decoder("llama"), data("whole"), [(0, 1), (2, 3), (4, 5)])
    for sums in parts:
        for layer in range(LAYERS):
            mlp = f"model.layers.{layer}.mlp"
            assert f"near.{mlp}.gate_proj" in sums and f"near.{mlp}.up_proj" not in sums
            assert int(sums[f"shared.near.{mlp}.up_proj=near.{mlp}.gate_proj"]) == 2 * 20


def apart(model, index, blocks):
    """From here on, up_proj of a layer reads a copy of its input in these blocks (by number)."""
    seen = iter(range(100))

    def hook(_module, args):
        return (args[0].clone(),) if next(seen) in blocks else None

    model.stack[index].mlp.up_proj.register_forward_pre_hook(hook)


def test_an_input_shared_in_some_blocks_only_is_an_error(decoder, data):
    model, text = decoder("llama"), data("whole")
    apart(model, 1, {3})
    with pytest.raises(NumericsError, match=r"'model.layers.1.mlp.up_proj' reads the same input"):
        Resident(model, text).sweep([Curvatures(paths(model))])


def test_an_input_shared_in_one_process_only_is_an_error(decoder, data):
    model, text = decoder("llama"), data("whole")
    apart(model, 1, {3, 4, 5})
    fresh, (one, other) = halves(Curvatures, model, text)
    fresh.result(one), fresh.result(other)
    with pytest.raises(NumericsError, match=r"'model.layers.1.mlp.up_proj' reads the same input"):
        fresh.result(add(one, other))


def test_an_input_that_the_first_read_oftener_is_an_error(decoder, data):
    """Its X holds tokens that the other has not seen."""
    fresh, (one, other) = halves(Curvatures, decoder("llama"), data("whole"))
    one["input_tokens.model.layers.1.mlp.gate_proj"] += 20
    with pytest.raises(NumericsError, match=r"'model.layers.1.mlp.up_proj' reads the same input"):
        fresh.result(add(one, other))


def test_an_input_first_its_own_and_then_shared_is_summed_right(decoder, data):
    model, text = decoder("llama"), data("whole")
    expected = Resident(model, text).sweep([Curvatures(paths(model))])["curvature"]
    apart(model, 1, {0})
    check_equal(Resident(model, text).sweep([Curvatures(paths(model))])["curvature"], expected)


# --- no trace


def traces(model):
    """All that a sweep may leave on a model: hooks, and what is asked of its weights."""
    hooks = [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]
    weights = [
        (name, p.requires_grad, p.grad, len(p._backward_hooks or ()))
        for name, p in model.named_parameters()
    ]
    after = [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
    return hooks, weights, after


@pytest.fixture
def used(request):
    """A model that somebody trains: some weights frozen, some with gradients."""
    asked = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    model = build(ON.get(asked.get("kind"), "llama"))
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 != 0)
        parameter.grad = torch.ones_like(parameter) if number % 2 else None
    return Decoder(model)


@of_those_with_hooks
def test_detach_takes_off_what_attach_put_on(kind, used):
    before = traces(used.model)
    collector, layer = COLLECTORS[kind](used), used.layer(2)
    collector.attach(layer)
    assert traces(used.model) != before
    collector.detach(layer)
    assert traces(used.model) == before


class Failing(Similarity):
    """Fails where it is told to."""

    name = "failing"

    def __init__(self, at):
        super().__init__()
        self.at = at

    def _hook(self, layer, undo):
        super()._hook(layer, undo)

        def fail(*_):
            if self.at == "forward" and self.block == 2:
                raise RuntimeError("forward")

        undo.callback(layer.module.register_forward_hook(fail).remove)
        if self.at == "attach" and layer.index == 2:
            raise RuntimeError("attach")

    def begin(self, block, mask):
        super().begin(block, mask)
        if self.at == "begin" and block == 1:
            raise RuntimeError("begin")

    def result(self, sums):
        raise RuntimeError("result")


@pytest.mark.parametrize("at", ["attach", "begin", "forward", "result"])
def test_a_sweep_that_fails_leaves_no_trace(at, used, data):
    before = traces(used.model)
    collectors = [make(used) for make in COLLECTORS.values()]
    with pytest.raises(RuntimeError, match=at):
        Resident(used, data("padded")).sweep([*collectors[:3], Failing(at), *collectors[3:]])
    assert traces(used.model) == before
    assert torch.is_grad_enabled()


def test_a_resident_model_is_held_already(used, data):
    runner = Resident(used, data("whole"))
    with runner.holding(0), runner.holding(3):
        assert runner.once("key", lambda: 7) == 7
