"""Speed and memory of a model, beside the dense one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from transformers import PreTrainedModel

from grasp.core.decoder import Decoder
from grasp.core.fields import IS_PATH, BatchSize, NumTokens, Rounds, checked
from grasp.core.models import open_model
from grasp.core.progress import Progress, silent
from grasp.core.provenance import machine, versions
from grasp.core.results import Results
from grasp.evaluation.bench import bench as time_models
from grasp.evaluation.rows import number_formats, row


@checked
def bench(
    model: Annotated[str | Path | PreTrainedModel | Decoder, IS_PATH],
    *,
    against: Annotated[str | Path | PreTrainedModel | Decoder, IS_PATH] | None = None,
    batch_sizes: Sequence[BatchSize] = (1,),
    prompt_len: NumTokens = 512,
    new_tokens: NumTokens = 128,
    rounds: Rounds = 5,
    compile: bool = False,
    tokenizer: Any = None,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Results:
    """Speed and memory of a model, beside another (the dense one, usually), which is measured in
    turn with it, round by round.

    See `grasp.evaluation.bench` for what each number is. Raises `RecipeError` for sizes that the
    models cannot read.
    """
    decoder = open_model(model, tokenizer, device, dtype, trust_remote_code)
    reference = (
        None if against is None else open_model(against, None, device, dtype, trust_remote_code)
    )
    for one in (decoder, reference):
        if one is not None:
            one.check_finite()
    models = {"dense": reference, "model": decoder} if reference is not None else {"model": decoder}
    found = time_models(
        models,
        batch_sizes=batch_sizes,
        prompt_len=prompt_len,
        new_tokens=new_tokens,
        rounds=rounds,
        compile=compile,
        progress=progress,
    )
    rows = [row(decoder, reference, found["model"], (), number_formats(decoder, reference))]
    if reference is not None:
        rows.insert(0, row(reference, None, found["dense"], ()))
    return Results(
        tuple(rows), f"speed of {decoder.source}", " ".join(sys.argv), versions(), machine()
    )
