"""Ranks from budgets: the paper's table, brute force, guards."""

import itertools
import logging

import pytest
import torch
from conftest import build
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

import grasp
from grasp.core.decoder import Decoder
from grasp.core.linalg import break_even_rank
from grasp.core.records import Attribution
from grasp.methods.grasp import Grasp
from grasp.stages.allocation import for_budget, guarded, keep, saved, threshold, uniform


def empty_decoder(**config):
    with torch.device("meta"):
        return Decoder(AutoModelForCausalLM.from_config(LlamaConfig(**config)))


@pytest.fixture(scope="module")
def llama_2_7b():
    return empty_decoder(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32000,
    )


@pytest.mark.parametrize(
    ("retain_ratio", "removed"),
    [(0.0, 24.0), (0.05, 22.8), (0.10, 21.6), (0.15, 20.4), (0.20, 19.2)],
)
def test_table_6_of_the_paper(llama_2_7b, retain_ratio, removed):
    """Llama-2-7B, 8 layers: the compression ratios of Table 6."""
    plan = Grasp(num_layers=8, retain_ratio=retain_ratio).plan(llama_2_7b)
    assert round(100 * (1 - plan.parameters / llama_2_7b.num_parameters()), 1) == removed


def test_smollm2_sizes():
    """9 layers at r = 10 % leave 105,776,640 of 134,515,008 parameters."""
    model = empty_decoder(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    assert model.num_parameters() == 134_515_008
    assert Grasp(num_layers=9, retain_ratio=0.1).plan(model).parameters == 105_776_640
    ranks = uniform({linear.name: linear.shape for linear in model.linears(0)}, 0.1).sizes
    assert (ranks["self_attn.q_proj"], ranks["self_attn.k_proj"], ranks["mlp.up_proj"]) == (
        28,
        14,
        41,
    )


def test_a_pair_that_is_not_smaller_stays_dense(caplog, calibration):
    """Break-even of 12 x 12 is rank 6: 5 is smaller, 6 is not. At r = 0.99 tiny matrices reach it,
    and the log says so, once.
    """
    assert break_even_rank(12, 12) == 6
    assert guarded((12, 12), 5) == 5
    assert guarded((12, 12), 6) is None
    with caplog.at_level(logging.WARNING):
        result = grasp.compress(
            build("llama"), layers=(1,), threshold_ratio=0.95, data=calibration, method="grasp"
        )
    dense = [record for record in caplog.records if "stays dense" in record.getMessage()]
    assert len(dense) == 7 - len(result.manifest["edits"]) > 0
    assert "model.layers.1." in dense[0].getMessage() and "break-even" in dense[0].getMessage()


@pytest.mark.parametrize(("rank", "expected"), [(0, 0), (3, 8), (8, 8), (15, 8), (16, 16)])
def test_rank_multiple_rounds_down_but_not_to_nothing(rank, expected):
    assert guarded((100, 100), rank, multiple=8) == expected


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(3, 40), st.integers(3, 40)), min_size=1, max_size=4),
    num_layers=st.integers(1, 4),
    share=st.floats(0, 1),
    retain=st.sampled_from([0.0, 0.1, 0.4]),
    multiple=st.sampled_from([1, 1, 4]),
)
def test_a_budget_is_met_to_within_one_rank(sizes, num_layers, share, retain, multiple):
    shapes = {
        layer: {f"{layer}.{n}": size for n, size in enumerate(sizes)} for layer in range(num_layers)
    }
    full = sum(
        saved(shape, uniform(shapes[layer], retain, multiple).sizes[path])
        for layer in shapes
        for path, shape in shapes[layer].items()
    )
    target = int(full * share)
    found = for_budget(list(shapes), shapes, target, retain, multiple)
    assert found.reached
    removed = sum(
        saved(shapes[layer][path], rank)
        for layer in shapes
        for path, rank in found.allocation.sizes.items()
        if path in shapes[layer]
    )
    assert removed == found.removed >= target
    slack = [
        min(sum(shape) * multiple, saved(shape, found.allocation.sizes[path]))
        for shape, path in (
            (shape, path)
            for layer in shapes
            for path, shape in shapes[layer].items()
            if found.allocation.sizes.get(path) is not None
        )
        if saved(shape, found.allocation.sizes[path])
    ]
    assert removed == target or removed - target < max(slack)
    assert not for_budget(list(shapes), shapes, full + 1, retain, multiple).reached


@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(st.floats(1e-3, 10) | st.just(0.0), min_size=1, max_size=9),
    share=st.floats(0.01, 1),
)
def test_threshold_is_the_smallest_set_by_brute_force(scores, share):
    values = torch.tensor(scores, dtype=torch.float64)
    rank = threshold((1000, 1000), Attribution("m", "taylor", values, values), share)
    total = sum(scores)
    enough = (
        n
        for n in range(len(scores) + 1)
        for chosen in itertools.combinations(scores, n)
        if sum(chosen) >= share * total * (1 - 1e-9)
    )
    assert rank == next(enough)


def test_keep_takes_the_best_scores_in_order_of_sigma():
    scores = torch.tensor([0.1, 5.0, 0.2, 9.0, 3.0])
    assert keep(Attribution("m", "taylor", scores, scores), 3).tolist() == [1, 3, 4]
