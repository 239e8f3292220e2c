"""Models larger than memory: the weights of the decoder layers lie in files, and are in memory only
while their layer is used.

transformers' device map with accelerate's disk offload says where in the model's own files every
weight is; nothing is copied. accelerate would then put new parameters in place whenever a module
runs. Here they stay the same ones, and only what they hold comes and goes, a layer at a time: hooks
and edits see the parameters that they would see in memory. What is not in memory is one NaN,
stretched to the shape, so that whoever looks at a weight that is not there is found out.

New weights, which edits put into a layer, are written to files of our own at once.

Several processes may share the weights (`grasp.core.shards`): while they show the model one block
each, in step, what a layer holds comes from all of them, and from the files at all other times.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from grasp.core.lending import idles
from grasp.core.partial import partial
from grasp.core.scratch import Scratch
from grasp.core.shards import Rows, Shards
from grasp.core.tensor_file import NAMES, write_tensors
from grasp.errors import ModelError, RecipeError

SHARDS = 8
"""Parts of the memory allowed, of which a shard of the checkpoint takes one while it is written."""

OVERLAID = ("forward", "hf_device_map", "to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "neuron")
"""What accelerate puts over a module's own."""


class Place(NamedTuple):
    """Where a weight lies: a safetensors file, and its name there."""

    file: Path
    name: str


class Offload:
    """The files of one model's layers. `folder`: where a folder for new ones is made, gone with
    this object or the process. `most`: bytes of memory that may be used. `shares`: whether all
    processes share the weights.
    """

    def __init__(self, folder: Path, most: int, shares: bool = False):
        self.most = most
        self.shards = Shards() if shares else None
        self.is_in_step = False
        self.places: dict[nn.Parameter, Place] = {}
        self._held: Counter[nn.Parameter] = Counter()
        self._lock = threading.RLock()
        self._watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._scratches: list[weakref.ref[Scratch]] = []
        self._numbers = itertools.count()
        stack = ExitStack()
        self.folder = stack.enter_context(partial(folder, "offload", directory=True))
        weakref.finalize(self, stack.close)

    @classmethod
    def at(cls, folder: Path, most: int, shares: bool = False) -> Offload:
        """In a folder that is made where it is missing. Raises `RecipeError` where it cannot be."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as failure:
            raise RecipeError(
                f"--offload {folder}: cannot be made ({failure.strerror}); name a folder that"
                " can be written"
            ) from failure
        return cls(folder, most, shares)

    # --- loading

    def options(self, skeleton: nn.Module, layers: str, device: torch.device) -> dict[str, Any]:
        """For `from_pretrained`: everything on the device but what is at the path `layers`, which
        stays on the disk. `skeleton`: the model without weights.
        """
        places: dict[str, Any] = {}
        module, path = skeleton, ""
        for name in layers.split("."):
            own = [*module._parameters, *module._buffers, *module._modules]
            places |= {path + one: str(device) for one in own if one != name}
            module, path = module.get_submodule(name), f"{path}{name}."
        places |= {path + name: "disk" for name in module._modules}
        return {"device_map": places, "offload_folder": str(self.folder)}

    def take(self, model: nn.Module, layers: str, device: torch.device) -> None:
        """Take over a model that was loaded with those options. Raises `ModelError` where a weight
        is nowhere.
        """
        from accelerate.hooks import remove_hook_from_submodules

        stack = model.get_submodule(layers)
        index: dict[str, dict[str, str]] = {}
        for module in stack.modules():
            found = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
            index = getattr(getattr(found, "dataset", None), "index", None) or index
        remove_hook_from_submodules(model)
        for module in model.modules():
            for name in OVERLAID:
                vars(module).pop(name, None)
        known: dict[nn.Parameter, nn.Parameter] = {}
        for path, module in stack.named_modules(prefix=layers):
            for name, old in module._parameters.items():
                if old is None or not old.is_meta:
                    continue
                if old not in known:
                    at = index.get(f"{path}.{name}")
                    if at is None:
                        raise ModelError(
                            f"'{path}.{name}' cannot be left on the disk: do without --offload and"
                            " --max-memory"
                        )
                    known[old] = nn.Parameter(_away(old, device), requires_grad=old.requires_grad)
                    self.places[known[old]] = Place(Path(at["safetensors_file"]), at["weight_name"])
                module._parameters[name] = known[old]
            for name, buffer in module._buffers.items():
                at = index.get(f"{path}.{name}")
                if buffer is not None and at is not None:
                    # it came through the dtype of the model, and may be kept in a finer one
                    with safe_open(at["safetensors_file"], "pt") as found:
                        buffer.copy_(found.get_tensor(at["weight_name"]))
        self._watch(stack.children())
        for layer in stack.children():
            self._settle(layer)

    def _settle(self, layer: nn.Module) -> None:
        """Take into memory what stays there, and write the weights of a layer anew that are stored
        in another dtype than is wanted.
        """
        ours = [one for one in layer.parameters() if one in self.places]
        other = [one for one in ours if not _is_large(one) or self._differs(one)]
        with self._lock:
            for one in self._hold(other):
                del self.places[one], self._held[one]
                one.data = one.data.clone()  # not the file's pages
        self.spool([layer])

    def _differs(self, weight: nn.Parameter) -> bool:
        with safe_open(self.places[weight].file, "pt") as found:
            stored: str = found.get_slice(self.places[weight].name).get_dtype()
        return stored != NAMES[weight.dtype]

    def beside(self) -> Offload:
        """Files for another model, in the same folder."""
        return Offload(self.folder, self.most)

    # --- what is in memory

    @contextmanager
    def holding(self, weights: Iterable[Tensor]) -> Iterator[None]:
        """Inside, these weights are in memory; those that always are may be among them. Threads may
        hold the same ones.
        """
        held = self._hold(weights)
        try:
            yield
        finally:
            self._release(held)

    def _hold(self, weights: Iterable[Tensor]) -> list[nn.Parameter]:
        ones: list[nn.Parameter] = [one for one in dict.fromkeys(weights) if one in self.places]  # type: ignore[misc]
        with self._lock:
            missing = [one for one in ones if not self._held[one]]
            self._held.update(ones)
            if self.is_in_step and missing:
                self._gather(missing)
                return ones
            for file in dict.fromkeys(self.places[one].file for one in missing):
                # closed at once: the pages leave memory with the last tensor in them
                with safe_open(file, "pt") as found:
                    for one in missing:
                        if self.places[one].file == file:
                            value = found.get_tensor(self.places[one].name)
                            one.data = value.to(one.device, one.dtype)
        return ones

    def _gather(self, weights: Sequence[nn.Parameter]) -> None:
        """Put the weights of all processes together."""
        assert self.shards is not None
        sources = [(self.places[one], _rows_at(self.places[one])) for one in weights]
        for one, value in zip(weights, self.shards.whole(weights, sources), strict=True):
            one.data = value

    @contextmanager
    def in_step(self, layers: Iterable[nn.Module]) -> Iterator[None]:
        """Inside, all processes hold the weights of `layers`, all there are, at the same time and
        in the same order.
        """
        assert self.shards is not None
        self.shards.keep(one for layer in layers for one in layer.parameters())
        self.is_in_step = True
        try:
            yield
        finally:
            self.is_in_step = False

    def _release(self, ones: Iterable[nn.Parameter]) -> None:
        with self._lock:
            self._held.subtract(ones)
            for one in ones:
                if not self._held[one]:
                    del self._held[one]
                    one.data = _away(one, one.device)
        for scratch in self._scratches:
            if (found := scratch()) is not None:
                found.release()

    @contextmanager
    def changing(self, layer: nn.Module) -> Iterator[None]:
        """Inside, the weights of a layer are in memory and may be changed; they are written anew
        then.
        """
        held = self._hold(layer.parameters())
        try:
            yield
        except BaseException:
            self._release(held)
            raise
        with self._lock:
            for one in held:
                del self.places[one], self._held[one]
        self.spool([layer])

    def _watch(self, layers: Iterable[nn.Module]) -> None:
        """Hold the weights of each of these layers while it runs, and does not idle."""
        for layer in layers:
            if layer in self._watched:
                continue
            self._watched.add(layer)
            running: list[list[nn.Parameter]] = []

            def begin(module: nn.Module, _args: Any, running: Any = running) -> None:
                running.append([] if idles(module) else self._hold(module.parameters()))

            def end(module: nn.Module, _args: Any, _output: Any, running: Any = running) -> None:
                with suppress(IndexError):  # it never began
                    self._release(running.pop())
                for one in module.modules():
                    vars(one).get("packed", {}).clear()  # a rounded linear's own copy for kernels

            layer.register_forward_pre_hook(begin, prepend=True)
            layer.register_forward_hook(end, always_call=True)

    # --- what is new

    def spool(self, layers: Iterable[nn.Module]) -> None:
        """Write the weights of these layers that lie in no file yet, which then need no memory."""
        layers = list(layers)
        self._watch(layers)
        found = {one: None for layer in layers for one in layer.parameters()}
        new = [one for one in found if one not in self.places and _is_large(one)]
        if not new:
            return
        file = self.folder / f"{next(self._numbers)}.safetensors"
        write_tensors(file, {str(number): one for number, one in enumerate(new)}, wait=False)
        with self._lock:
            for number, one in enumerate(new):
                self.places[one] = Place(file, str(number))
                one.data = _away(one, one.device)

    def scratch(self, folder: str | Path | None = None) -> Scratch:
        """A place for statistics: in files, whose pages leave memory after every layer."""
        made = Scratch(folder or self.folder)
        self._scratches = [one for one in self._scratches if one() is not None]
        self._scratches.append(weakref.ref(made))
        return made

    # --- saving

    @property
    def shard_bytes(self) -> int:
        """Of the largest shard of a checkpoint, which is in memory as a whole while it is
        written.
        """
        return max(self.most // SHARDS, 1 << 20)

    def parts(self, model: nn.Module, layers: str) -> list[list[str]]:
        """The names in the state dict of `model`, in groups of at most `shard_bytes`: what is not
        at the path `layers`, then whole layers, of which one may be larger.
        """
        weights = model.state_dict(keep_vars=True)
        whole: dict[str, list[str]] = {"": []}
        for name in weights:
            inside = name.startswith(f"{layers}.")
            index = name.removeprefix(f"{layers}.").partition(".")[0] if inside else ""
            whole.setdefault(index, []).append(name)
        found, room = [whole.pop("")], 0
        for names in whole.values():
            size = sum(weights[name].numel() * weights[name].element_size() for name in names)
            if size > room:
                found, room = [*found, []], self.shard_bytes
            found[-1] += names
            room -= size
        return found

    def state(self, model: nn.Module, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The state dict of `model`, or these entries of it; a weight in a file is read when it is
        looked at, and is in memory while somebody holds it.
        """
        weights = model.state_dict(keep_vars=True)
        return {
            name: self._mapped(weights[name])
            if weights[name] in self.places
            else weights[name].detach()
            for name in (weights if names is None else names)
        }

    def _mapped(self, weight: nn.Parameter) -> Tensor:
        """Its numbers as the file has them, whose pages come into memory when they are looked
        at.
        """
        with safe_open(self.places[weight].file, "pt") as found:
            value: Tensor = found.get_tensor(self.places[weight].name)
        return value


def _rows_at(place: Place) -> Rows:
    """What reads some rows of a weight."""

    def read(begin: int, end: int) -> Tensor:
        with safe_open(place.file, "pt") as found:
            rows: Tensor = found.get_slice(place.name)[begin:end]
        return rows

    return read


def _is_large(weight: Tensor) -> bool:
    """Whether a weight goes to a file: a matrix. Norms and biases stay in memory."""
    return weight.dim() > 1 and weight.numel() > 0


def _away(weight: Tensor, device: torch.device) -> Tensor:
    """What stands for a weight that is not in memory; where it is of whole numbers, their scales
    are not there either.
    """
    nothing = torch.nan if weight.is_floating_point() else 0
    return torch.full((), nothing, dtype=weight.dtype, device=device).expand(weight.shape)
