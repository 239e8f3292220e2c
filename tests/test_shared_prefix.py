"""Texts that begin alike: which of them go together, and their log-likelihoods against those of
whole texts.
"""

import itertools
import random

import pytest
import torch
from conftest import build
from test_hybrids import made

from grasp.core.decoder import Decoder
from grasp.evaluation.shared_prefix import log_likelihoods, runs, share_prefixes


def of_the_whole(model, ids, start):
    """The text read at once, token by token."""
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    asked = range(start, len(ids))
    return (
        float(sum(logs[at - 1, ids[at]] for at in asked)),
        all(int(logs[at - 1].argmax()) == ids[at] for at in asked),
    )


@pytest.mark.parametrize("batch_size", [2, 8])
def test_numbers_are_those_of_whole_texts(family, batch_size):
    """Scored from within what is common, from its end, and from later on; windows of 8 tokens are
    shorter than it.
    """
    draw = random.Random(1)
    decoder = Decoder(build(family))
    common = [draw.randrange(256) for _ in range(17)]
    texts = [[*common, *(draw.randrange(256) for _ in range(n))] for n in (2, 9, 5, 3, 2)]
    with torch.no_grad():  # one ends in what the model itself says
        said = decoder.model(input_ids=torch.tensor([texts[3][:-1]])).logits[0, -1].argmax()
    texts[3][-1] = int(said)
    starts = [1, 12, 17, 19, 18]
    found = list(log_likelihoods(decoder, texts, starts, 17, batch_size))
    expected = [
        of_the_whole(decoder.model, ids, start) for ids, start in zip(texts, starts, strict=True)
    ]
    assert [sure for _, sure in found] == [sure for _, sure in expected]
    assert found[3][1]
    assert [value for value, _ in found] == pytest.approx(
        [value for value, _ in expected], rel=2e-5
    )


def test_neighbours_that_begin_alike_go_together():
    one, other, third = ([*range(at, at + 20)] for at in (0, 100, 200))
    texts = [
        [*one, 1, 2],
        [*one, 3, 4, 5],
        [*other, 1, 2],
        [*other, 2, 2],
        [*other[:16], 9, 9],  # shares a little less
        [*other[:3], 9, 9],  # shares much less
        [*third, 5],  # two tokens stay: one to read, one to predict
        [*third, 6],
        [1],
    ]
    found = [(run.begin, run.end, run.length) for run in runs(texts)]
    assert found == [(0, 2, 20), (2, 5, 16), (5, 6, 0), (6, 8, 19), (8, 9, 0)]
    assert [run.saved for run in runs(texts)] == [20, 32, 0, 19, 0]
    assert runs([]) == []


def test_every_text_is_in_one_run_and_keeps_two_tokens():
    draw = random.Random(3)
    for _ in range(200):
        texts = [[draw.randrange(2) for _ in range(draw.randint(1, 9))] for _ in range(9)]
        found = runs(texts)
        assert [n for run in found for n in range(run.begin, run.end)] == [*range(9)]
        for run in found:
            part = texts[run.begin : run.end]
            assert len({tuple(ids[: run.length]) for ids in part}) == 1
            assert run.length == 0 or min(map(len, part)) >= run.length + 2


class Harness:
    """As much of lm-eval's wrapper as is asked for."""

    def __init__(self, decoder):
        self.device, self.max_length, self.batch_size = decoder.model.device, 100, 4
        self.softmax_dtype, self.model, self.read, self.told = None, decoder.model, [], []
        self.cache_hook = self

    def add_partial(self, kind, request, answer):
        assert kind == "loglikelihood"
        self.told.append((request, answer))

    def _loglikelihood_tokens(self, requests, disable_tqdm=False):
        self.read += [request for request, *_ in requests]
        found = [
            of_the_whole(self.model, [*c, *a][-101:], min(len(c), 100)) for _, c, a in requests
        ]
        for (request, *_), answer in zip(requests, found, strict=True):
            self.add_partial("loglikelihood", request, answer)
        return found


def test_what_does_not_pay_or_is_too_long_is_read_as_before():
    decoder = Decoder(build("llama"))
    harness = Harness(decoder)
    share_prefixes(harness, decoder)
    numbers = itertools.count()

    def options(length, *tails):
        context = [next(numbers) % 256 for _ in range(length)]
        return [((length, *tail), context, [*tail]) for tail in tails]

    pays = options(40, (1, 2), (3, 4, 5), (6, 7))
    asked = [*options(10, (1, 2), (3, 4)), *pays, *options(100, (1, 2), (3, 4)), *options(50, (1,))]
    found = harness._loglikelihood_tokens(asked, disable_tqdm=True)
    rest = [one for one in asked if one not in pays]
    assert harness.read == [request for request, *_ in rest]
    assert sorted(request for request, _ in harness.told) == sorted(r for r, *_ in asked)
    assert dict(harness.told) == {r: a for (r, *_), a in zip(asked, found, strict=True)}
    for (_, context, more), (value, _) in zip(pays, found[2:5], strict=True):
        expected, _ = of_the_whole(decoder.model, [*context, *more], len(context))
        assert value == pytest.approx(expected, rel=1e-5)


def test_a_model_that_keeps_a_state_is_left_as_it_is():
    decoder = Decoder(made("qwen3_5"))
    harness = Harness(decoder)
    share_prefixes(harness, decoder)
    assert "_loglikelihood_tokens" not in vars(harness)
