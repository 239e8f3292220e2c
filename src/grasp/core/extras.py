"""The packages that only some of what grasp does needs: the extras of `pip install
'grasp-llm[extra]'`.
"""

from __future__ import annotations

import importlib.util

from grasp.errors import RecipeError


def need(what: str, extra: str, *packages: str) -> None:
    """Raise `RecipeError`, one line, unless all `packages` that `extra` brings are installed.

    Asked before any work is done; `what` is the flag, value or verb that needs them.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        said = f"package{'s' if len(missing) > 1 else ''} {' and '.join(missing)}"
        raise RecipeError(f"{what}: needs the {said}; run `pip install 'grasp-llm[{extra}]'`")
