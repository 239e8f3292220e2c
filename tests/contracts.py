"""What the tests of single methods tell those that go over all methods: `CONTRACT` in
tests/test_NAME.py.

    recipe    fields of an ordinary run
    sizes     more fields that say how much
    neutral   fields that change nothing; default: ratio 0
    refuses   families that it does not suit; its own tests have what is said then
    unties    True where embedding and head become two matrices
    flags     its own flags, each with a value that it takes and those that it refuses
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from grasp.methods import available


def contracts() -> dict[str, dict[str, Any]]:
    """Method -> its contract, of those whose tests have one."""
    places = {name: f"test_{name.replace('-', '_')}" for name in available()}
    found = {
        name: getattr(importlib.import_module(place), "CONTRACT", None)
        for name, place in places.items()
        if importlib.util.find_spec(place)
    }
    return {name: told for name, told in found.items() if told}
