"""Speed and memory of a model, beside the dense one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from transformers import PreTrainedModel

from grasp.core.decoder import Decoder
from grasp.core.fields import IS_PATH
from grasp.core.models import open_model
from grasp.core.progress import Progress, silent
from grasp.core.provenance import machine, versions
from grasp.core.results import Results
from grasp.evaluation.bench import bench as time_models
from grasp.evaluation.rows import number_formats, row
from grasp.recipes.keywords import keywords
from grasp.recipes.model import ModelSource
from grasp.recipes.speed import SpeedRecipe


@keywords
def bench(
    source: ModelSource,
    *,
    recipe: SpeedRecipe,
    against: Annotated[str | Path | PreTrainedModel | Decoder, IS_PATH] | None = None,
    progress: Progress = silent,
) -> Results:
    """Speed and memory of a model, beside another (the dense one, usually), which is measured in
    turn with it, round by round.

    See `grasp.evaluation.bench` for what each number is. Raises `RecipeError` for sizes that the
    models cannot read.
    """
    decoder = open_model(**vars(source))
    beside = {**vars(source), "model": against, "tokenizer": None}
    reference = None if against is None else open_model(**beside)
    for one in (decoder, reference):
        if one is not None:
            one.check_finite()
    models = {"dense": reference, "model": decoder} if reference is not None else {"model": decoder}
    found = time_models(models, **vars(recipe), progress=progress)
    rows = [row(decoder, reference, found["model"], (), number_formats(decoder, reference))]
    if reference is not None:
        rows.insert(0, row(reference, None, found["dense"], ()))
    return Results(
        tuple(rows), f"speed of {decoder.source}", " ".join(sys.argv), versions(), machine()
    )
