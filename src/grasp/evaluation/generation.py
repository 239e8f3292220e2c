"""What a model writes: greedy continuations of fixed prompts, and how much they repeat themselves.

A compressed model can keep a good perplexity, which is measured on human text, and yet loop on its
own: one look at its text shows it. Repetition is the share of a continuation's 4-grams of tokens
that it has said before (seq-rep-4; Welleck et al. 2020, arXiv 1908.04319).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grasp.core.decoder import Decoder
from grasp.core.progress import Progress, silent
from grasp.core.results import Generation
from grasp.core.score import Score
from grasp.data.stream import encode
from grasp.errors import RecipeError

PROMPTS = (
    "The capital of France is",
    "A function in Python is",
    "Once upon a time, in a small village by the sea,",
    "The main causes of the First World War were",
    "To make bread at home, first",
    "Question: If a train travels 60 miles in 1.5 hours, what is its average speed?\nAnswer:",
    "The difference between a virus and a bacterium is",
    "def fibonacci(n):\n",
)


@torch.no_grad()
def greedy(decoder: Decoder, prompt: str, new_tokens: int) -> Generation:
    """The greedy continuation of a prompt: the most likely token each time, until the model ends or
    `new_tokens` are written.
    """
    if decoder.tokenizer is None:
        raise RecipeError("--generate: needs the model's tokenizer")
    ids = torch.tensor([encode(decoder, prompt)], device=decoder.device)
    ends = decoder.tokenizer.eos_token_id
    output = decoder.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=1,
        max_new_tokens=new_tokens,
        pad_token_id=0 if ends is None else ends,
    )
    written: list[int] = output[0, ids.shape[1] :].tolist()
    return Generation(
        prompt,
        str(decoder.tokenizer.decode(written, skip_special_tokens=True)),
        len(written),
        repetition(written),
        len(written) < new_tokens,
    )


def continuations(
    decoder: Decoder,
    prompts: Sequence[str] = PROMPTS,
    new_tokens: int = 64,
    progress: Progress = silent,
) -> tuple[tuple[Generation, ...], tuple[Score, ...]]:
    """Greedy continuations of all prompts; their mean repetition and mean length in tokens."""
    check_room(decoder, new_tokens, prompts)
    found = []
    for number, prompt in enumerate(prompts):
        progress("greedy text", number, len(prompts))
        found.append(greedy(decoder, prompt, new_tokens))
    progress("greedy text", len(prompts), len(prompts))
    protocol = {"num_prompts": len(prompts), "new_tokens": new_tokens}
    scores = (
        Score(
            "generation", sum(one.repetition for one in found) / len(found), "repetition", protocol
        ),
        Score("generation", sum(one.num_tokens for one in found) / len(found), "tokens", protocol),
    )
    return tuple(found), scores


def check_room(decoder: Decoder, new_tokens: int, prompts: Sequence[str] = PROMPTS) -> None:
    """Raise `RecipeError` where a continuation would be longer than the model reads."""
    if decoder.tokenizer is None:
        raise RecipeError("--generate: needs the model's tokenizer")
    limit = getattr(decoder.config, "max_position_embeddings", None)
    room = (
        None
        if limit is None
        else limit - max(len(decoder.tokenizer(prompt)["input_ids"]) for prompt in prompts)
    )
    if new_tokens < 1 or (room is not None and new_tokens > room):
        reads = (
            "" if room is None else f", since the model reads {limit} tokens, a prompt among them"
        )
        raise RecipeError(
            f"--new-tokens {new_tokens}: must be from 1 to"
            f" {'what fits' if room is None else room}{reads}"
        )


def agreement(mine: Sequence[Generation], dense: Sequence[Generation]) -> Score:
    """Share of the dense model's continuation, in characters, that the model's own begins with;
    mean over prompts.
    """
    shares = [
        _common(a.text, b.text) / max(len(b.text), 1) for a, b in zip(mine, dense, strict=True)
    ]
    return Score(
        "generation", sum(shares) / len(shares), "same beginning", {"num_prompts": len(shares)}
    )


def repetition(tokens: Sequence[int], length: int = 4) -> float:
    """Share of n-grams of `length` tokens that occurred before, 0 (none) to 1."""
    grams = [tuple(tokens[place : place + length]) for place in range(len(tokens) - length + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _common(one: str, other: str) -> int:
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
