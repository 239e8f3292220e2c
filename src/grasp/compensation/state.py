"""The state of a training on disk: safetensors and JSON, never pickle; whole tensors, whatever the
processes share among them.

A state folder holds `trained.safetensors` (what is trained), `optimizer.safetensors` and
`optimizer.json` (AdamW's moments, the schedule), `rng_<process>.safetensors` (random numbers) and
the trainer's own `trainer_state.json`, written last: a folder without it is incomplete.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

TRAINED, OPTIMIZER, LAST = "trained.safetensors", "optimizer", "trainer_state.json"
_GATHER = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
_SCATTER = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Every trained parameter, whole, by its name; on the first process only. Every process must
    call it.
    """
    # a tied one once
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found: Any = get_model_state_dict(model, options=_GATHER)
    return {name: value.contiguous().clone() for name, value in found.items() if name in trained}


def load_trained(model: nn.Module, folder: Path) -> None:
    """Put a saved state back into the model that is being trained."""
    saved: dict[str, Any] = dict(load_file(folder / TRAINED))
    set_model_state_dict(model, saved, options=_SCATTER)


def save_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Mapping[str, Any],
    folder: Path,
    writes: bool,
) -> None:
    """AdamW's moments and the schedule. Every process must call it; one `writes`."""
    full: Any = get_optimizer_state_dict(model, optimizer, options=_GATHER)
    if writes:
        moments = {
            f"{key}/{name}": value
            for key, values in full["state"].items()
            for name, value in values.items()
        }
        save_file(moments, folder / f"{OPTIMIZER}.safetensors")
        record = {"param_groups": full["param_groups"], "schedule": dict(schedule)}
        (folder / f"{OPTIMIZER}.json").write_text(json.dumps(record), encoding="utf-8")


def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path
) -> dict[str, Any]:
    """Put AdamW's moments back. Returns the state of the schedule."""
    record = json.loads((folder / f"{OPTIMIZER}.json").read_text(encoding="utf-8"))
    state: dict[str, Any] = {}
    for key, value in load_file(folder / f"{OPTIMIZER}.safetensors").items():
        parameter, _, name = key.rpartition("/")
        state.setdefault(parameter, {})[name] = value
    set_optimizer_state_dict(
        model, optimizer, {"state": state, "param_groups": record["param_groups"]}, options=_SCATTER
    )
    return record["schedule"]


def save_random(folder: Path, process: int) -> None:
    """The random numbers of Python, numpy and torch."""
    folder.mkdir(parents=True, exist_ok=True)
    version, numbers, gauss = random.getstate()
    name, keys, *rest = numpy.random.get_state()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(numpy.asarray(keys).astype("int64")),
        "python": torch.tensor(numbers),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    said = {"python": json.dumps([version, gauss]), "numpy": json.dumps([name, *rest])}
    save_file(tensors, folder / f"rng_{process}.safetensors", metadata=said)


def load_random(folder: Path, process: int) -> None:
    """Put them back, where this process saved any."""
    from safetensors import safe_open

    path = folder / f"rng_{process}.safetensors"
    if not path.is_file():
        return
    with safe_open(path, framework="pt") as file:
        said, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    version, gauss = json.loads(said["python"])
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    name, *rest = json.loads(said["numpy"])
    numpy.random.set_state((name, tensors["numpy"].numpy().astype("uint32"), *rest))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"])


def last_state(folder: Path) -> Path | None:
    """The latest whole state in the folder of a run: of a step, or of a layer that is done."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{LAST}")]
    whole += [path for path in folder.glob("layer-*") if path.is_dir()]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def named(state: Path) -> str:
    """A state in words: "step 30", or "layer 4" where that is the last one done."""
    kind, _, number = state.name.rpartition("-")
    return f"{'step' if kind == 'checkpoint' else kind} {number}"
