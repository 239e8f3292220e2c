"""What the graph exporters share: inputs to trace a decoder with, how near a graph must come, and
the silence of what they print.

One graph serves prefill and decoding: it reads new tokens after a cache of earlier ones, and both
lengths, the batch and the cache's, are free. With an empty cache it is a prefill. (Two graphs, as
older exporters make, would store the weights twice or need a merge.)
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from grasp.core.cache import full_cache
from grasp.core.decoder import Decoder
from grasp.core.layer import is_low_rank
from grasp.core.proof import ROUNDED, compare, digits_of
from grasp.errors import GraspError, ModelError

BATCH, PAST, NEW = 2, 3, 4
"""Sizes of the inputs that are traced. None may be 0 or 1, which tracing takes for constants, and
no two may be equal.
"""


@torch.no_grad()
def sample_inputs(decoder: Decoder) -> tuple[dict[str, Any], dict[str, Any]]:
    """Forward arguments for a trace, and which of their axes are free.

    `NEW` tokens of `BATCH` sequences after a cache of `PAST` tokens: `input_ids` (batch, new),
    `attention_mask` (batch, past + new) with padding in it (without, models leave the mask out),
    `position_ids` (batch, new) where the model takes them, `past_key_values`.
    """
    model, device = decoder.model, decoder.device
    ids = (
        torch.arange(BATCH * (PAST + NEW), device=device).reshape(BATCH, PAST + NEW)
        % decoder.config.vocab_size
    )
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    past = full_cache()
    model(
        input_ids=ids[:, :PAST], attention_mask=mask[:, :PAST], past_key_values=past, use_cache=True
    )
    # named, so that every layer's cache shares them: tracing is faster
    batch = Dim("batch")
    earlier = Dim("past")
    new = Dim("new")
    inputs: dict[str, Any] = {"input_ids": ids[:, PAST:], "attention_mask": mask}
    free: dict[str, Any] = {
        "input_ids": {0: batch, 1: new},
        "attention_mask": {0: batch, 1: Dim.AUTO},
    }
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"], free["position_ids"] = positions[:, PAST:], {0: batch, 1: new}
    # keys and values (batch, heads, past, head size), layer by layer
    inputs["past_key_values"] = past
    free["past_key_values"] = [{0: batch, 2: earlier} for _ in range(2 * len(past.layers))]
    return inputs, free


def notes(decoder: Decoder) -> tuple[str, ...]:
    """What becomes of the pairs, for people."""
    if any(is_low_rank(module) for module in decoder.model.modules()):
        return ()
    return ("the model has no low-rank matrix: the export is as large as the model",)


def compare_graph(said: Tensor, heard: Tensor, kind: str, out: Path) -> None:
    """`compare` what a graph says, whose numbers are of this `kind` ("int8", or a dtype)."""
    digits = ROUNDED if kind == "int8" else 10 * digits_of(getattr(torch, kind))
    compare(said, heard, digits, out)


def prefill(ids: Tensor) -> dict[str, Any]:
    """What a graph is fed, beside an empty cache, to read `ids` (batch, new); not every graph takes
    all of it.
    """
    mask = torch.ones_like(ids)
    named = {"input_ids": ids, "attention_mask": mask, "position_ids": mask.cumsum(-1) - 1}
    return {name: tensor.numpy() for name, tensor in named.items()}


@contextlib.contextmanager
def exporting(decoder: Decoder, name: str) -> Iterator[None]:
    """Keep the exporters' progress off stdout, which is for `--json`, and their notes about
    versions and skipped operators off stderr.

    What they raise becomes a `ModelError`: they are made for what transformers' own models do, and
    a model can do something else.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (GraspError, OSError):
        raise
    except Exception as failure:
        reason = textwrap.shorten(
            " ".join(str(failure.__cause__ or failure).split()), 200, placeholder="…"
        )
        raise ModelError(
            f"{decoder.source}: transformers' exporter cannot make an {name} graph of a"
            f" '{decoder.config.model_type}' model: {reason}; --format dense works for every model"
        ) from failure
    finally:
        logging.disable(before)
