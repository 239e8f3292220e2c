"""Pairs that read the same input share their first product: the same numbers, fewer products,
nothing stale, nothing kept.
"""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from closeness import close, is_greedy
from conftest import build
from torch import nn
from torch.nn.functional import linear
from torch.profiler import ProfilerActivity, profile

import grasp
from grasp.core.decoder import Decoder
from grasp.core.edits import Factorize
from grasp.core.layers.low_rank_grasp import Joint, LowRankLinear, fuse, side_by_side
from grasp.core.linalg import pivoted

SHARED = {
    "llama": 2,
    "mistral": 2,
    "qwen2": 2,
    "qwen3": 2,
    "gemma": 2,
    "gemma2": 2,
    "gemma3_text": 2,
    "phi3": 0,
    "olmo2": 2,
    "granite": 2,
    "gpt_neox": 0,
    "gpt2": 0,
    "opt": 1,
    **dict.fromkeys(("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3"), 1),
    "qwen2_moe": 2,
}
"""Groups in a layer: q/k/v, and gate/up where there is a gate. 0: the family keeps them in one
matrix. With experts: what stands beside them, of DeepSeek the shared ones alone.
"""


def low_rank(
    name: str, as_pivoted: bool = False, layers=(1, 2), ranks=(3, 2, 4, 5, 6), dtype=torch.float32
) -> Decoder:
    """A tiny model whose matrices in `layers` are pairs of random factors, of different ranks."""
    decoder = Decoder(build(name, dtype))
    generator = torch.Generator().manual_seed(7)
    for layer in layers:
        for number, found in enumerate(decoder.linears(layer)):
            m, n = found.shape
            rank = ranks[number % len(ranks)]
            left = torch.randn(m, rank, generator=generator) * 0.3
            right = torch.randn(rank, n, generator=generator) * 0.3
            if as_pivoted:
                head, rest, places = pivoted(left, right)
                Factorize(found.path, head.to(dtype), rest.to(dtype), places=places).apply(decoder)
            else:
                Factorize(found.path, right.to(dtype), left.to(dtype)).apply(decoder)
    fuse(decoder.model, together=False)  # edits group them
    return decoder


def joints(model: nn.Module) -> set[Joint]:
    return {
        module.joint
        for module in model.modules()
        if isinstance(module, LowRankLinear) and module.joint is not None
    }


def settled(model: nn.Module) -> bool:
    """All groups share their product."""
    return bool(joints(model)) and all(joint._note() for joint in joints(model))


def products(call) -> int:
    """Matrix products that run inside."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call()
    return sum(
        event.name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::mv", "aten::addmv")
        for event in seen.events()
    )


IDS = torch.randint(0, 256, (3, 9), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def text(model):
    return model.generate(
        IDS[:2],
        attention_mask=torch.ones_like(IDS[:2]),
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=258,
    )


# --- the same numbers from fewer products, in every family


@pytest.mark.parametrize("as_pivoted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_equal_logits_and_text_from_fewer_products(family, as_pivoted):
    """A group of n pairs saves n - 1 products, in the prompt and in each step of batch 1."""
    model = low_rank(family, as_pivoted).model
    apart = logits(model)
    one = IDS[:1, :1]
    before = [products(lambda ids=ids: logits(model, ids)) for ids in (IDS, one)]
    fuse(model)
    assert len(joints(model)) == 2 * SHARED[family]
    assert close(logits(model), apart)
    assert all(is_greedy(model, said[: IDS.shape[1]], said[IDS.shape[1] :]) for said in text(model))
    saved = 2 * (1 if family == "deepseek_v3" else {0: 0, 1: 2, 2: 3}[SHARED[family]])
    assert [products(lambda ids=ids: logits(model, ids)) for ids in (IDS, one)] == [
        number - saved for number in before
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype):
    model = low_rank("llama", dtype=dtype).model
    apart = logits(model)
    fuse(model)
    assert settled(model) and torch.allclose(logits(model).float(), apart.float(), atol=0.05)


def test_no_copies_of_activations():
    """Parts are views of the joint product, and second products take them as they are."""
    model = low_rank("llama").model
    mlp = model.model.layers[1].mlp
    x = torch.randn(1, 1, 32)
    fuse(model)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as seen:
        mlp.gate_proj(x), mlp.up_proj(x)
    names = [event.name for event in seen.events()]
    assert names.count("aten::mm") == 3
    assert not set(names) & {"aten::copy_", "aten::contiguous", "aten::clone", "aten::cat"}


def test_loading_fuses(tmp_path):
    """grasp and transformers alike; and what a fused model saves is what an unfused one saves."""
    decoder = low_rank("llama")
    decoder.model.save_pretrained(tmp_path / "apart")
    apart = logits(decoder.model)
    again = grasp.load(tmp_path / "apart").model
    assert settled(again) and torch.allclose(logits(again), apart, atol=1e-5)
    again.save_pretrained(tmp_path / "fused")
    assert (tmp_path / "fused" / "model.safetensors").read_bytes() == (
        tmp_path / "apart" / "model.safetensors"
    ).read_bytes()
    third = grasp.load(tmp_path / "fused").model
    assert close(logits(third), logits(again))


# --- rank 0


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_rank_zero_runs_no_product(name):
    """q without rank gives its bias or zeros, k and v still share; a layer without any rank runs no
    product of its matrices.
    """
    model = low_rank(name, ranks=(0, 2, 4)).model
    apart = logits(model)
    fuse(model)
    attention = model.model.layers[1].self_attn
    assert (
        attention.q_proj.joint is None
        and attention.k_proj.joint is attention.v_proj.joint is not None
    )
    assert torch.allclose(logits(model), apart, atol=1e-5)
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        assert products(lambda: attention.q_proj(x)) == 0
        expected = (
            torch.zeros(2, 3, 32)
            if attention.q_proj.bias is None
            else attention.q_proj.bias.expand(2, 3, -1)
        )
        assert torch.equal(attention.q_proj(x), expected)
        attention.q_proj(x).add_(1)  # the caller's own memory
        assert torch.equal(attention.q_proj(x), expected)
    empty, full = (low_rank(name, ranks=(rank,)).model for rank in (0, 3))
    assert products(lambda: logits(full)) - products(lambda: logits(empty)) == 2 * 2 * 7


def test_rank_zero_still_trains():
    """Its empty factors get gradients, or tools that wait for every parameter's would wait for
    ever.
    """
    pair = low_rank("qwen2", ranks=(0,)).model.model.layers[1].self_attn.q_proj.requires_grad_(True)
    pair(torch.randn(2, 32)).sum().backward()
    assert pair.weight.grad.shape == pair.weight.shape and bool(pair.bias.grad.eq(2).all())


# --- pivoted pairs


@pytest.mark.parametrize("tokens", [1, 2, 5, 6, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_every_way_of_placing_is_the_same(tokens, bias):
    """One token, fewer tokens than ranks (6), more."""
    generator = torch.Generator().manual_seed(0)
    left, right, added = (
        torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((20, 6), (6, 9), (20,))
    )
    head, rest, places = pivoted(left, right)
    pair = LowRankLinear(9, 20, 6, bias, dtype=torch.float64, pivoted=True)
    pair.load_state_dict(
        {"weight_in": head, "weight": rest, "places": places, **({"bias": added} if bias else {})}
    )
    x = torch.randn(tokens, 9, generator=generator, dtype=torch.float64)
    expected = linear(x, left @ right, added if bias else None)
    assert torch.allclose(pair(x), expected) and torch.allclose(pair(x[None]), expected[None])
    pair.requires_grad_(True)
    y = x.clone().requires_grad_(True)
    pair(y).square().sum().backward()
    assert torch.allclose(y.grad, 2 * expected @ left @ right) and bool(pair.weight.grad.any())


# --- never stale


class Two(nn.Module):
    """Two pairs that read the same input, or not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj, self.up_proj = LowRankLinear(6, 5, 2, False), LowRankLinear(6, 4, 3, True)
        for parameter in self.parameters():
            nn.init.normal_(parameter)
        fuse(self)

    def expected(self, x, y=None):
        up = self.up_proj
        return linear(x, self.gate_proj.product()), linear(
            x if y is None else y, up.product(), up.bias
        )

    def holds(self, x, y=None) -> bool:
        found = self.gate_proj(x), self.up_proj(x if y is None else y)
        return all(
            torch.allclose(a, b, atol=1e-5) for a, b in zip(found, self.expected(x, y), strict=True)
        )


@pytest.fixture
def two():
    with torch.no_grad():
        yield Two()


def shares(two, x) -> bool:
    """The second pair runs one product of its own, since it finds the first one done."""
    two.gate_proj(x)
    return products(lambda: two.up_proj(x)) == 1


def test_the_group_shares(two):
    x = torch.randn(4, 6)
    assert shares(two, x) and two.holds(x)
    fuse(two, together=False)
    assert not shares(two, x) and two.holds(x)


def test_an_input_written_to_in_between(two):
    x = torch.randn(4, 6)
    two.gate_proj(x)
    x.mul_(2)
    assert torch.allclose(two.up_proj(x), two.expected(x)[1], atol=1e-5)
    assert two.holds(x)


def test_a_factor_written_to_in_between(two):
    x = torch.randn(4, 6)
    two.gate_proj(x)
    two.up_proj.weight_in.mul_(3)
    assert torch.allclose(two.up_proj(x), two.expected(x)[1], atol=1e-5)
    assert two.holds(x) and shares(two, x)


def test_another_tensor_of_equal_values(two):
    x = torch.randn(4, 6)
    two.gate_proj(x)
    y = x.clone()
    assert products(lambda: two.up_proj(y)) == 2 and two.holds(x, y)


def test_members_called_in_any_order_and_number(two):
    x, y = torch.randn(4, 6), torch.randn(2, 6)
    for order in ("up", "gate", "gate", "up", "up", "gate"):
        for z in (x, y):
            pair = getattr(two, f"{order}_proj")
            assert torch.allclose(pair(z), linear(z, pair.product(), pair.bias), atol=1e-5)


def test_members_that_never_share_stop_trying(two):
    """After so many products that nobody took, the first pair runs its own alone."""
    for _ in range(Joint.PATIENCE + 2):
        assert two.holds(torch.randn(1, 6), torch.randn(1, 6))
    x = torch.randn(1, 6)
    assert not shares(two, x) and two.holds(x)


@pytest.mark.parametrize("change", ["data", "assign", "parameter", "functional"])
def test_a_factor_replaced_behind_its_back(two, change):
    x, other = torch.randn(4, 6), torch.randn(3, 6)
    if change == "data":
        two.up_proj.weight_in.data = other
    elif change == "assign":
        two.load_state_dict({**two.state_dict(), "up_proj.weight_in": other}, assign=True)
    elif change == "parameter":
        two.up_proj.weight_in = nn.Parameter(other)
    else:
        two.gate_proj(x)
        found = torch.func.functional_call(two.up_proj, {"weight_in": other}, (x,))
        assert torch.allclose(
            found, linear(linear(x, other), two.up_proj.weight, two.up_proj.bias), atol=1e-5
        )
        return
    assert not shares(two, x) and two.holds(x)
    fuse(two)
    assert shares(two, x) and two.holds(x)


def test_batches_of_models_and_of_inputs(two):
    """vmap over inputs and over parameters: no data pointers there to compare."""
    x = torch.randn(5, 4, 6)
    gates, ups = torch.vmap(lambda z: (two.gate_proj(z), two.up_proj(z)))(x)
    for i, z in enumerate(x):
        assert all(
            torch.allclose(a, b, atol=1e-5)
            for a, b in zip((gates[i], ups[i]), two.expected(z), strict=True)
        )
    stacked = {
        name: torch.stack([value, 2 * value]) for name, value in two.up_proj.named_parameters()
    }
    many = torch.vmap(lambda values: torch.func.functional_call(two.up_proj, values, (x[0],)))(
        stacked
    )
    assert torch.allclose(many[0], two.expected(x[0])[1], atol=1e-4)


def test_inference_mode_runs_apart(two):
    """Its tensors do not count writes, so nothing could be checked."""
    with torch.inference_mode():
        x = torch.randn(4, 6)
        assert not shares(two, x) and two.holds(x)
        two.gate_proj(x)
        x.mul_(2)
        assert torch.allclose(two.up_proj(x), two.expected(x)[1], atol=1e-5)
        loaded = Two()
        assert loaded.gate_proj.joint.rows is None and loaded.holds(x)


def test_nothing_is_kept(two):
    """The product dies with the pass: after the last member, or with the input where that was never
    called.
    """
    x = torch.randn(4, 6)
    two.gate_proj(x)
    held = weakref.ref(vars(x)[Joint.MARK][3][0])
    two.up_proj(x)
    assert Joint.MARK not in vars(x) and held() is None
    two.gate_proj(x)
    held = weakref.ref(vars(x)[Joint.MARK][3][0])
    del x
    gc.collect()
    assert held() is None


def test_threads_do_not_meet():
    model = low_rank("llama").model
    fuse(model)
    inputs = [
        torch.randint(0, 256, (2, 7), generator=torch.Generator().manual_seed(seed))
        for seed in range(4)
    ]
    expected = [logits(model, ids) for ids in inputs]
    wrong = []

    def work(number):
        for _ in range(10):
            if not close(logits(model, inputs[number]), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- what is put on top


def test_parameters_and_state_are_as_before():
    model = low_rank("llama").model
    names = {name: value.clone() for name, value in model.state_dict().items()}
    kept = {name: id(parameter) for name, parameter in model.named_parameters()}
    size = sum(p.nbytes for p in model.parameters())
    fuse(model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == kept
    state = model.state_dict()
    assert list(state) == list(names) and all(
        torch.equal(state[name], value) for name, value in names.items()
    )
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()
    }
    assert sum(storages.values()) == size
    fuse(model)
    # fusing twice moves nothing
    assert {p.untyped_storage().data_ptr() for p in model.parameters()} == set(storages)


def test_safetensors_and_torch_save(tmp_path):
    """Of the plain state dict too: parts of one storage do not overlap."""
    from safetensors.torch import load_file, save_file

    model = low_rank("mistral").model
    fuse(model)
    save_file(model.state_dict(), tmp_path / "all.safetensors")
    torch.save(model.state_dict(), tmp_path / "all.pt")
    for state in (
        load_file(tmp_path / "all.safetensors"),
        torch.load(tmp_path / "all.pt", weights_only=True),
    ):
        other = low_rank("mistral").model
        fuse(other)
        for parameter in other.parameters():
            parameter.data.zero_()
        other.load_state_dict(state)
        assert settled(other) and close(logits(other), logits(model))


def test_casts_moves_and_copies_stay_fused():
    model = low_rank("llama").model
    fuse(model)
    expected = logits(model)
    for cast in (torch.float64, torch.bfloat16, torch.float32):
        model.to(cast)
        assert settled(model) and {joint.rows.dtype for joint in joints(model)} == {cast}
    model = low_rank("llama").model
    fuse(model)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model.model.layers[1].mlp)),
        model.to("meta").to_empty(device="cpu"),
    ):
        assert settled(other)
        addresses = {p.data_ptr() for p in other.parameters()}
        assert not addresses & {p.data_ptr() for p in model.parameters()} or other is model
    copied = copy.deepcopy(low_rank("llama").model)
    fuse(copied)
    assert close(logits(copy.deepcopy(copied)), expected)


def test_a_copy_is_its_own_model():
    model = low_rank("llama").model
    fuse(model)
    before = logits(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert close(logits(model), before) and not logits(other).any()


def test_shared_memory_stays_shared():
    """Processes that train one model together write to the same factors."""
    model = low_rank("llama").model
    fuse(model)
    expected = logits(model)
    model.share_memory()
    assert (
        settled(model)
        and all(p.is_shared() for p in model.parameters())
        and close(logits(model), expected)
    )
    factors = [member.weight_in for member in next(iter(joints(model))).members]
    assert side_by_side(factors)


def test_training_reaches_every_factor_and_shows_at_once():
    """Gradients with and without fusing are equal; a step of an optimizer is seen by the next fused
    pass.
    """
    apart, model = low_rank("llama").model, low_rank("llama").model
    fuse(model)
    grads = []
    for one in (apart, model):
        one.requires_grad_(True)
        one(input_ids=IDS, labels=IDS).loss.backward()
        grads.append({name: parameter.grad for name, parameter in one.named_parameters()})
    assert all(torch.equal(grads[0][name], grad) for name, grad in grads[1].items())
    for one in (apart, model):
        torch.optim.AdamW(one.parameters(), lr=0.05).step()
    assert settled(model) and torch.allclose(logits(model), logits(apart), atol=1e-5)


def test_gradient_checkpointing():
    """Its first pass records no gradients and its second does."""
    model = low_rank("llama").model
    fuse(model)
    model.requires_grad_(True).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_lora_trains_on_fused_pairs():
    from peft import LoraConfig, get_peft_model

    base = low_rank("llama").model
    fuse(base)
    expected = logits(base)
    adapted = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"])
    ).eval()
    assert settled(adapted) and torch.allclose(logits(adapted), expected, atol=1e-5)
    before = products(lambda: logits(adapted))
    fuse(adapted, together=False)
    assert products(lambda: logits(adapted)) == before + 2 * 3


@pytest.mark.parametrize("as_pivoted", [False, True])
def test_torch_compile(as_pivoted):
    """One graph, equal outputs; and cast afterwards, it follows."""
    mlp = low_rank("llama", as_pivoted).model.model.layers[1].mlp
    fuse(mlp)
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 9, 32)
    with torch.no_grad():
        assert torch.allclose(compiled(x), mlp(x), atol=1e-5)
        mlp.double()
        assert settled(mlp) and torch.allclose(compiled(x.double()), mlp(x.double()), atol=1e-9)


def test_tracing_bakes_no_factors_in(two):
    """A traced graph must hold the parameters, not the joint matrix as a constant."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.two = two

        def forward(self, x):
            return self.two.gate_proj(x).sum() + self.two.up_proj(x).sum()

    x = torch.randn(4, 6)
    traced = torch.jit.trace(Both(), (x,))
    two.gate_proj.weight_in.mul_(2)
    assert torch.allclose(traced(x), Both()(x), atol=1e-4)
