"""What `grasp report` does. Apart from the other commands, since it needs neither torch nor
transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from grasp.errors import RecipeError
from grasp.terminal.bars import emit, megabytes, plain, say


def report(paths: Sequence[Path], output: Path, as_json: bool) -> None:
    """Write the page."""
    try:
        from grasp.report.html import write_report
    except ModuleNotFoundError as missing:
        raise RecipeError(
            f"grasp report: needs the package {missing.name}; run `pip install 'grasp-llm[report]'`"
        ) from None
    written = write_report(paths, output)
    say(f"report: {plain(written)} ({megabytes(written.stat().st_size)})")
    if as_json:
        emit({"path": str(written), "bytes": written.stat().st_size})
