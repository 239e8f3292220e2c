"""Timing and memory: the loop decodes what generate() decodes, turns alternate, every number has
its setting, bad input is one line.
"""

import json
import logging
import statistics
from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILY_ROWS, build
from test_fused import low_rank

import grasp
from grasp.core.cache import cache_bytes, new_cache
from grasp.core.decoder import Decoder
from grasp.core.layers.low_rank_grasp import fuse
from grasp.core.models import load_model
from grasp.core.results import Result, Results
from grasp.core.stepping import Stepper
from grasp.errors import RecipeError
from grasp.evaluation import bench as benching
from grasp.evaluation import hardware, peak, speed
from grasp.evaluation.bench import bench, ratios, roofline, speeds
from grasp.evaluation.hardware import kernels, low_rank_products, read_bandwidth, step_bytes
from grasp.evaluation.speed import TURN, Timing, decode_speed, take_turns


@pytest.fixture
def quick(monkeypatch):
    """A small buffer for the bandwidth, and no new processes."""
    monkeypatch.setattr(hardware, "BUFFER", {"cpu": 1 << 16})
    monkeypatch.setattr(
        benching, "peak_memory", lambda *_: {"peak": 7_000, "before_loading": 5_000}
    )


SETTING = {"batch_size": 2, "prompt_len": 10, "new_tokens": 4, "rounds": 3}


# --- the loop


@pytest.mark.parametrize("fixed", [False, True])
def test_it_decodes_what_generate_decodes(family, fixed, monkeypatch):
    """Greedy tokens of a batch of two, with the growing cache and with the fixed one of --compile;
    a second round starts afresh.
    """
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
    model = Decoder(build(family))
    with torch.no_grad():
        runner = Stepper(model, 2, 6, 5, compile=fixed)
        expected = model.model.generate(
            runner.ids,
            attention_mask=torch.ones_like(runner.ids),
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
        )[:, 6:]
        for _ in range(2):
            runner.prefill()
            found = [runner.token]
            for _ in range(5):
                assert len(runner.decode(1)) == 1
                found.append(runner.token)
            # generate() bans the end of text, the loop does not
            allowed = torch.cat(found, 1) == expected
            assert bool(allowed[:, 0].all()) and (
                bool(allowed.all()) or bool((torch.cat(found, 1) == 257).any())
            )


@pytest.mark.slow
def test_it_runs_compiled():
    """Two graphs, made in the round of warm-up and never again."""
    model = low_rank("llama")
    fuse(model.model)
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        found = take_turns({"a": model}, prompt_len=6, new_tokens=9, rounds=2, compile=True)["a"]
    assert len(found.prefill) == 2 and len(found.steps) == 18
    assert statistics.median(found.steps) < 1


def test_models_take_turns(monkeypatch):
    """A B A B: prefills, then decode steps in turns; the first round is warm-up and not kept."""
    calls = []

    class Counting:
        def __init__(self, name, *_):
            self.name, self.cache = name, new_cache(models["a"])

        def prefill(self):
            calls.append((self.name, "prefill"))
            return float(len(calls))

        def decode(self, steps):
            calls.append((self.name, steps))
            return [1.0] * steps

    models = {name: Decoder(build("llama"), source=name) for name in "ab"}
    monkeypatch.setattr(speed, "Stepper", lambda model, *_: Counting(model.source))
    seen = []
    timings = take_turns(
        models,
        prompt_len=4,
        new_tokens=TURN + 3,
        rounds=2,
        progress=lambda *step: seen.append(step),
    )
    one = [("a", "prefill"), ("b", "prefill"), ("a", TURN), ("b", TURN), ("a", 3), ("b", 3)]
    assert calls == 3 * one
    assert [len(turn) for turn in timings["b"].turns] == [TURN, 3, TURN, 3] and len(
        timings["b"].steps
    ) == 2 * (TURN + 3)
    assert timings["a"].prefill == [7.0, 13.0]
    assert seen[0][1:] == (0, 3) and seen[-1][1:] == (3, 3)


def test_decode_speed_is_the_median_of_turns(monkeypatch):
    timing = Timing([1.0], [[0.5, 0.5], [0.1, 0.3], [0.125, 0.125]])
    monkeypatch.setattr(speed, "take_turns", lambda models, **_: dict.fromkeys(models, timing))
    [score] = decode_speed({"a": Decoder(build("llama"))}).values()
    assert score.value == pytest.approx(5) and (score.name, score.unit) == ("decode", "tokens/s")


# --- the numbers


def test_speeds_and_their_spread():
    timing = Timing([0.5, 1.0, 2.0], [[0.1, 0.1], [0.2, 0.2], [0.4, 0.4]])
    found = {score.name: score for score in speeds(timing, SETTING)}
    assert (
        found["prefill"].value,
        found["prefill"].protocol["low"],
        found["prefill"].protocol["high"],
    ) == (20, 10, 40)
    assert found["decode"].value == pytest.approx(10) and found["decode"].protocol[
        "high"
    ] == pytest.approx(20)
    assert found["time to first token"].value == 1.0
    assert (found["token latency"].value, found["token latency"].protocol["p95"]) == (
        pytest.approx(0.2),
        0.4,
    )


def test_ratios_are_of_neighbours_in_time():
    """A machine that slows down tenfold half-way changes no ratio."""
    mine, theirs = Timing([1.0, 10.0], [[1.0], [10.0]]), Timing([2.0, 20.0], [[3.0], [30.0]])
    prefill, decode = ratios(mine, theirs, "dense", SETTING)
    assert (prefill.name, prefill.value, prefill.protocol["low"], prefill.protocol["high"]) == (
        "prefill vs dense",
        2,
        2,
        2,
    )
    assert (decode.name, decode.value, decode.protocol["pairs"]) == ("decode vs dense", 3, 2)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_bytes_of_a_step(name):
    """Every weight once; a separate input embedding gives one row a sequence; the cache by hand."""
    model = Decoder(build(name))
    table = model.model.get_input_embeddings().weight
    kept = model.num_bytes() - (0 if FAMILY_ROWS[name].tied else table.nbytes - 3 * table[0].nbytes)
    assert step_bytes(model, 3, 100.0) == kept + 100
    cache = new_cache(model)
    with torch.no_grad():
        model.model(
            input_ids=torch.zeros(3, 6, dtype=torch.long), past_key_values=cache, use_cache=True
        )
    # keys and values, layers, batch, heads, head size, tokens, bytes
    assert cache_bytes(cache) == 2 * 4 * 3 * 2 * 8 * 6 * 4


def test_roofline_share():
    model = Decoder(build("llama"))
    timing = Timing([1.0], [[0.5]], cache_bytes=1000.0)
    score = roofline(model, timing, 4.0 * (model.num_bytes() + 1000), {**SETTING, "batch_size": 1})
    assert (
        score.value == pytest.approx(0.5)
        and score.unit == "share"
        and score.protocol["step_bytes"] == model.num_bytes() + 1000
    )


def test_bandwidth_is_that_of_memory():
    found = read_bandwidth(torch.device("cpu"), rounds=2)
    assert 1e8 < found < 1e13


def test_what_runs_is_said():
    model = low_rank("llama")
    assert low_rank_products(Decoder(build("llama"))) == "none"
    assert low_rank_products(model) == "separate products"
    fuse(model.model)
    said = kernels(model)
    assert said == {
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "attention": "sdpa",
        "low_rank": "fused first products",
    }
    assert low_rank_products(model, compile=True) == "separate products"
    model.model.set_attn_implementation("eager")
    assert kernels(model)["attention"] == "eager"


# --- the whole


def test_bench(quick, tmp_path):
    """Two models, two batch sizes: every score, its setting, the ratio to the first; it goes into a
    results file and back.
    """
    dense, small = Decoder(build("llama"), source="dense"), low_rank("llama")
    fuse(small.model)
    seen = []
    found = bench(
        {"dense": dense, "model": small},
        batch_sizes=(1, 2),
        prompt_len=6,
        new_tokens=3,
        rounds=2,
        progress=lambda *s: seen.append(s),
    )
    timed = ["prefill", "decode", "time to first token", "token latency"]
    assert [score.name for score in found["dense"]] == 2 * [*timed, "roofline share"] + [
        "parameter bytes",
        "peak memory",
    ]
    assert [score.name for score in found["model"]] == 2 * [
        *timed,
        "prefill vs dense",
        "decode vs dense",
        "roofline share",
    ] + ["parameter bytes", "peak memory"]
    assert all(score.value > 0 for scores in found.values() for score in scores)
    score = found["model"][1]
    expected = {
        "batch_size": 1,
        "prompt_len": 6,
        "new_tokens": 3,
        "rounds": 2,
        "compile": False,
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "attention": "sdpa",
        "low_rank": "fused first products",
        "cache": "growing",
    }
    assert (
        expected.items() <= score.protocol.items()
        and score.protocol["low"] <= score.value <= score.protocol["high"]
    )
    assert found["model"][8].protocol["batch_size"] == 2
    assert {task for task, *_ in seen} == {
        "timing, batch size 1",
        "timing, batch size 2",
        "memory, in new processes",
    }
    Results((Result("model", "x", scores=found["model"]),)).write(tmp_path / "r.json")
    assert Results.read(tmp_path / "r.json").rows[0].scores == found["model"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_sizes": (1, 0)}, "--batch-sizes 0: must be at least 1"),
        ({"batch_sizes": ()}, "--batch-sizes: is empty"),
        ({"prompt_len": 0}, "--prompt-len 0: must be at least 1"),
        ({"new_tokens": 0}, "--new-tokens 0: must be at least 1"),
        ({"rounds": 0}, "--rounds 0: must be at least 1"),
        (
            {"prompt_len": 120, "new_tokens": 9},
            "--prompt-len 120: with --new-tokens 9 .* 128 positions .* at most 119",
        ),
        (
            {"prompt_len": 1, "new_tokens": 128},
            "--prompt-len 1: with --new-tokens 128 .* lower --new-tokens too",
        ),
    ],
)
def test_bad_sizes_are_one_line(options, message, quick):
    with pytest.raises(RecipeError, match=message) as error:
        bench({"a": Decoder(build("llama"))}, **{"prompt_len": 4, "new_tokens": 2, **options})
    assert "\n" not in str(error.value)


# --- memory


@pytest.mark.slow
def test_peak_memory_of_a_fresh_process(model_directory, calibration, tmp_path):
    """That of the checkpoint at its source, beside its bytes there."""
    grasp.compress(
        model_directory,
        tmp_path / "out",
        data=calibration,
        num_layers=1,
        retain_ratio=0.2,
        method="grasp",
    )
    saved = load_model(str(tmp_path / "out"))
    scores = {score.name: score for score in benching.memory(saved, 1, 6, 2)}
    assert scores["bytes on disk"].value == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert scores["parameter bytes"].value == saved.num_bytes()
    assert (
        scores["peak memory"].value > scores["peak memory"].protocol["before_loading"] > 10_000_000
    )
    assert scores["peak memory"].protocol["of"] == "resident set of a fresh process"


@pytest.mark.parametrize(
    ("answer", "complaint", "reason"),
    [
        ('{"peak": 9, "before_loading": 5, "parameters": 3}', "", "not the one at its source"),
        ("", "Traceback\nModelError: MODEL x: no such directory\n", "no such directory"),
        ("", "", "the process died"),
    ],
)
def test_where_the_source_is_not_this_model(answer, complaint, reason, monkeypatch, caplog):
    """Changed in memory, gone, or too large: no number, and a warning says why."""
    monkeypatch.setattr(
        peak, "run_child", lambda *_, **__: SimpleNamespace(stdout=answer, stderr=complaint)
    )
    with caplog.at_level(logging.WARNING):
        assert [
            score.name for score in benching.memory(Decoder(build("llama"), source="x"), 1, 4, 2)
        ] == ["parameter bytes"]
    assert reason in caplog.text


def test_the_child_answers_json(model_directory):
    asked = {
        "source": model_directory,
        "device": "cpu",
        "dtype": "float32",
        "shape": [2, 5, 2],
        "threads": 1,
    }
    found = json.loads(json.dumps(peak.main(asked)))
    assert (
        found["peak"] >= found["before_loading"] > 0
        and found["parameters"] == Decoder(build("llama")).num_parameters()
    )
