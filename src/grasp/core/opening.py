"""Whatever a damaged or foreign file makes a library raise while a model is opened is one line that
names the file.

transformers, tokenizers and safetensors raise what they happen to: TypeError, AttributeError, a
bare Exception, or a panic of Rust, which is no `Exception` at all. What is declared of these files
is theirs, so it is checked by them, and put in words here.
"""

from __future__ import annotations

import functools
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from grasp.core.decoder import Decoder
from grasp.errors import CheckpointError, GraspError

P = ParamSpec("P")
D = TypeVar("D", bound=Decoder)

READERS = {
    "configuration_auto.py": "config.json",
    "configuration_utils.py": "config.json or generation_config.json",
    "tokenization_auto.py": "the tokenizer's files (tokenizer.json, tokenizer_config.json)",
}
"""Files of transformers, and what they read."""


def opening(load: Callable[Concatenate[str, P], D]) -> Callable[Concatenate[str, P], D]:
    """A loader of models that raises nothing but `GraspError` for what the files hold, and tries
    the tokenizer once.
    """

    @functools.wraps(load)
    def begin(source: str, /, *args: P.args, **options: P.kwargs) -> D:
        try:
            decoder = load(source, *args, **options)
            if decoder.tokenizer is not None:
                decoder.tokenizer("a")
            return decoder
        except BaseException as failure:
            if not of_a_library(failure):
                raise
            reason = " ".join(str(failure).split()) or type(failure).__name__
            raise CheckpointError(
                f"{source}: cannot be loaded{_where(source, failure)}:"
                f" {textwrap.shorten(reason, 300, placeholder='…')}"
            ) from failure

    return begin


def of_a_library(failure: BaseException) -> bool:
    """Whether an exception says that a file is not what it should be: any that is not ours, an
    interruption or a lack of memory.
    """
    if type(failure).__name__ == "PanicException":
        return True
    return isinstance(failure, Exception) and not isinstance(failure, (GraspError, MemoryError))


def _where(source: str, failure: BaseException) -> str:
    """The file that was being read, where that can be told."""
    names = [Path(frame.filename).name for frame in traceback.extract_tb(failure.__traceback__)]
    found = next(
        (what for name in names if (what := READERS.get(name))),
        "the tokenizer's files" if "tokenization_utils_base.py" in names else "",
    )
    return f" from {found}" if found and Path(source).expanduser().is_dir() else ""
