"""The only code that changes a model. One file a kind of edit; read base.py first."""

from __future__ import annotations

from grasp.core.edits.base import Edit, Summary, Undo, layer_of, place_of, trial
from grasp.core.edits.drop import Drop
from grasp.core.edits.drop_experts import DropExperts
from grasp.core.edits.factorize import Factorize
from grasp.core.edits.kinds import KINDS, from_spec
from grasp.core.edits.log import EditLog, Entry, Note, Step, noted, read_log
from grasp.core.edits.narrow import Narrow
from grasp.core.edits.quantize import Quantize
from grasp.core.edits.replace import Replace
from grasp.core.edits.replace_mlp import ReplaceMLP
from grasp.core.edits.rewrite import Rewrite
from grasp.core.edits.slice import Slice
from grasp.core.edits.split_experts import SplitExperts

__all__ = [
    "KINDS",
    "Drop",
    "DropExperts",
    "Edit",
    "EditLog",
    "Entry",
    "Factorize",
    "Narrow",
    "Note",
    "Quantize",
    "Replace",
    "ReplaceMLP",
    "Rewrite",
    "Slice",
    "SplitExperts",
    "Step",
    "Summary",
    "Undo",
    "from_spec",
    "layer_of",
    "noted",
    "place_of",
    "read_log",
    "trial",
]
