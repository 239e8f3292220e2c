"""Low-rank linears and how Hugging Face transformers loads them: the file every factorised
checkpoint carries.

It, and `quantized_grasp` and `reading_grasp` beside it, import torch and transformers only, because
they must work where grasp is not installed (`AutoModelForCausalLM.from_pretrained(dir,
trust_remote_code=True)`). With `import grasp` the same code is registered from the package, and no
flag is needed.

How a checkpoint loads. `config.json` holds `"quantization_config": {"quant_method": "grasp-llm",
"ranks": {path: rank}}`. transformers hands the model, still without memory (meta device), to
`GraspQuantizer`, which puts a `LowRankLinear` in the place of every linear named in `ranks`; then
the weights are read. The dense matrices never exist. A `"quantization"` beside the ranks names the
linears and pairs in 8 or 4 bits.

How it fails safely. The output factor is stored under the name of the matrix it replaces
(`...q_proj.weight`, out x rank). A transformers that knows nothing of grasp finds a tensor of the
wrong shape and stops, where a missing tensor would have been filled with random numbers.
"""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .quantized_grasp import QuantizedLinear, features, place_quantized
from .reading_grasp import check_floats, check_places, check_table, own_path, unwatch, watch_keys

FORMAT_VERSION = 3
"""Highest version of the checkpoint layout that this reads; a higher one is refused. 1: pairs. 2:
pivoted pairs too. 3: quantized linears too.
"""
NAMES = ("grasp-llm", "grasp")
"""`quant_method` of our checkpoints, and of earlier ones. What cannot read it shows it in its
error, so it is the package to install.
"""


class LowRankLinear(nn.Linear):
    """`y = B(Ax) + b`: a linear map of rank `rank`, stored as two thin matrices (paper, section
    3.3).

    It is an `nn.Linear` so that tools which look for linears (peft, for one) find it, with the in
    and out features of the matrix it replaces. Parameters: `weight` = B (out_features, rank),
    `weight_in` = A (rank, in_features), `bias` (out_features) or None. Rank 0 gives `y = b`.

    A pivoted pair is the same map in `rank^2` fewer numbers (Pivoting Factorization, arXiv
    2501.19090): `weight_in` gives `rank` of the outputs themselves, `weight` (out_features - rank,
    rank) the others as combinations of them, and the buffer `places` (out_features) says where in
    that list each output is. It is smaller than the matrix at every rank below full.
    """

    places: Any  # int32 (out_features), or None
    joint: Joint | None = None
    place: int = 0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        device: Any = None,
        dtype: Any = None,
        pivoted: bool = False,
    ):
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.pivoted = pivoted
        rows = out_features - rank if pivoted else out_features
        self.weight = nn.Parameter(
            torch.empty(rows, rank, device=device, dtype=dtype), requires_grad=False
        )
        self.weight_in = nn.Parameter(
            torch.empty(rank, in_features, device=device, dtype=dtype), requires_grad=False
        )
        vector = (
            nn.Parameter(torch.empty(out_features, device=device, dtype=dtype), requires_grad=False)
            if bias
            else None
        )
        self.register_parameter("bias", vector)
        self.register_buffer(
            "places",
            torch.empty(out_features, device=device, dtype=torch.int32) if pivoted else None,
        )

    def forward(self, input: Tensor) -> Tensor:
        """x (..., in_features) -> y (..., out_features)."""
        factor, inner = self.weight_in, None
        if (
            self.joint is not None
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        ):
            inner = self.joint.first_product(self.place, factor, input)
        elif self.rank == 0 and not (torch.is_grad_enabled() and factor.requires_grad):
            output = self.weight.new_zeros(*input.shape[:-1], self.out_features)
            return output if self.bias is None else output + self.bias
        if inner is None:
            inner = linear(input, factor)  # ..., rank
        return self._placed(inner) if self.pivoted else linear(inner, self.weight, self.bias)

    def _placed(self, inner: Tensor) -> Tensor:
        """The output of a pivoted pair. Put in order is whichever is smaller: the factor (out,
        rank) or the output (tokens, out).
        """
        # An exported graph serves every number of tokens, and would store the factor put in order:
        # rank^2 numbers more.
        tokens = 1 if torch.compiler.is_exporting() else inner.numel() // max(self.rank, 1)
        places = self.places
        if tokens > self.rank:
            unit = torch.eye(self.rank, dtype=inner.dtype, device=inner.device)
            return linear(inner, torch.cat((unit, self.weight)).index_select(0, places), self.bias)
        # gather is index_select, but faster for many rows
        output = torch.cat((inner, linear(inner, self.weight)), dim=-1)
        output = (
            output.index_select(-1, places)
            if tokens == 1
            else output.gather(-1, places.long().expand(output.shape))
        )
        return output if self.bias is None else output + self.bias

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self.joint is not None:
            self.joint.settle()  # a cast or a move gives each parameter memory of its own
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.joint is not None:
            self.joint.settle()  # so does copying

    def product(self) -> Tensor:
        """The matrix (out_features, in_features) that the pair stands for."""
        if self.places is None:
            return self.weight @ self.weight_in
        return torch.cat((self.weight_in, self.weight @ self.weight_in)).index_select(
            0, self.places
        )

    def reset_parameters(self) -> None:
        """There is nothing sensible to initialise: the factors always come from a decomposition or
        a checkpoint.
        """

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank},"
            f" bias={self.bias is not None}, pivoted={self.pivoted}"
        )


SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears of one parent that read the same tensor, in the order of their calls. Families that store
them as one matrix need no entry.
"""


class Joint:
    """Pairs that read the same input: their first products run as one, (..., in) -> (..., sum of
    ranks).

    1. `settle` lays the members' `weight_in` one below the other in memory. Each stays a parameter
       of its own, now a view of its part of `rows` (sum of ranks, in): nothing is stored twice, and
       an optimizer that writes to a parameter writes to `rows`.
    2. The first member multiplies its input by `rows` and leaves the parts on the input tensor
       itself. The others find theirs only if called with that very tensor, and use it only if
       neither it nor their own factor was written to or moved since. The last one clears the place.
       So no product is stale or outlives the pass, and threads do not meet: their tensors are their
       own.

    Where that is not certain, a member runs its own product: while gradients are recorded, under
    torch.compile (whose graphs have no cost per call to save), with tensors that do not count
    writes (inference mode) or are of a subclass, where a factor was moved elsewhere, and for good
    where the members turn out to read different tensors (`PATIENCE` products that nobody took).
    """

    PATIENCE, MARK = 64, "_grasp_first_products"

    def __init__(self, members: tuple[LowRankLinear, ...]):
        self.members, self.ranks, self.unclaimed = members, [member.rank for member in members], 0
        for place, member in enumerate(members):
            member.joint, member.place = self, place
        self.settle()

    def settle(self) -> None:
        """Lay the factors side by side, where they are not and can be. Called when pairs are
        grouped, cast, moved or copied.
        """
        # while a copy is being made, it and its members are still without attributes
        members = getattr(self, "members", None)
        if members is None or not all("_parameters" in vars(member) for member in members):
            return
        factors, first = [member.weight_in for member in members], members[0].weight_in
        self.rows: Tensor | None = None
        kinds = {(type(f), f.dtype, f.device, f.is_meta, f.is_inference()) for f in factors}
        if kinds == {(nn.Parameter, first.dtype, first.device, False, False)}:
            with torch.inference_mode(False), torch.no_grad():
                if not side_by_side(factors):
                    for factor, part in zip(
                        factors,
                        torch.cat([f.detach() for f in factors]).split(self.ranks),
                        strict=True,
                    ):
                        factor.data = part
                self.rows = first.detach().as_strided(
                    (sum(self.ranks), first.shape[1]), (first.shape[1], 1)
                )
        self._note()

    def _note(self) -> bool:
        """Note where each factor is and how often it was written to. False where they are not (any
        more) in `rows`.
        """
        factors = [member.weight_in for member in self.members]
        settled = (
            self.rows is not None
            and self.rows.data_ptr() == factors[0].data_ptr()
            and side_by_side(factors)
        )
        self.notes = (
            [(f.data_ptr(), f._version) for f in factors] if settled else [(0, 0)] * len(factors)
        )
        return settled

    def first_product(self, place: int, factor: Tensor, input: Tensor) -> Tensor | None:
        """A x (..., rank) for the factor A of the member at `place`, or None where it has to
        compute that for itself.
        """
        if type(input) is not Tensor or type(factor) is not nn.Parameter or input.is_inference():
            return None
        now, kept = (factor.data_ptr(), factor._version), vars(input)
        if place == 0:
            if (
                self.rows is None
                or self.unclaimed > self.PATIENCE
                or (now != self.notes[0] and not self._note())
                or torch._C._is_tracing()
            ):
                return None
            self.unclaimed += 1
            parts = linear(input, self.rows).split(self.ranks, dim=-1)
            kept[self.MARK] = (self, input._version, self.notes, parts)
            return parts[0]
        owner, version, notes, parts = kept.get(self.MARK, (None, 0, (), ()))
        if owner is not self:
            return None
        if place == len(parts) - 1:
            self.unclaimed = 0
            del kept[self.MARK]
        if notes[place] != now:
            self.notes = [(0, 0)] * len(parts)  # to be noted anew before the next joint product
        return parts[place] if version == input._version and notes[place] == now else None


def side_by_side(factors: list[nn.Parameter]) -> bool:
    """True where the tensors are parts of one storage, each right behind the one before."""
    ends = [factor.data_ptr() + factor.nbytes for factor in factors]
    return len({f.untyped_storage().data_ptr() for f in factors}) == 1 and ends[:-1] == [
        f.data_ptr() for f in factors[1:]
    ]


def fuse(model: nn.Module, together: bool = True) -> None:
    """Group the pairs of `model` that read the same input (see `Joint`), as loading does; with
    `together` False, ungroup them.
    """
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            module.joint = None
    for parent in model.modules() if together else ():
        for names in SAME_INPUT:
            found = [getattr(parent, name, None) for name in names]
            pairs = tuple(pair for pair in found if isinstance(pair, LowRankLinear) and pair.rank)
            if len(pairs) > 1:
                Joint(pairs)


class GraspConfig(QuantizationConfigMixin):
    """What transformers needs to rebuild the model: the rank of every factorised linear, by module
    path, which pairs are pivoted, and what is quantized: {"scheme", "group_size", "modules": [path,
    ...]} (see `quantized_grasp`).
    """

    def __init__(
        self,
        ranks: Any = None,
        version: Any = 1,
        pivoted: Any = None,
        quantization: Any = None,
        **_: Any,
    ):
        if type(version) is not int or version > FORMAT_VERSION:
            raise ValueError(
                f"this checkpoint has grasp format {version}, this grasp reads up to"
                f" {FORMAT_VERSION}: upgrade with `pip install -U grasp-llm`"
            )
        check_table(ranks or {}, pivoted or [], quantization or None)
        self.quant_method = NAMES[0]  # a name in transformers' registry
        self.ranks, self.pivoted = dict(ranks or {}), sorted(pivoted or [])
        self.quantization = quantization
        self.version = max(version, 3 if quantization else 2 if self.pivoted else 1)

    def to_dict(self) -> dict[str, Any]:
        more = {"quantization": self.quantization} if self.quantization else {}
        return {
            "quant_method": self.quant_method,
            "version": self.version,
            "ranks": self.ranks,
            "pivoted": self.pivoted,
            **more,
        }

    def paths(self) -> list[str]:
        """Every linear that is named."""
        return sorted({*self.ranks, *(self.quantization or {}).get("modules", ())})

    def moved(self, to: dict[str, str]) -> GraspConfig:
        """The same for a model that has the linear `path` at `to[path]`."""
        quantization = self.quantization and {
            **self.quantization,
            "modules": [to[path] for path in self.quantization["modules"]],
        }
        ranks = {to[path]: rank for path, rank in self.ranks.items()}
        return GraspConfig(ranks, self.version, [to[path] for path in self.pivoted], quantization)


class GraspQuantizer(HfQuantizer):
    """Puts `LowRankLinear` modules into the empty model before its weights are read, and checks
    what was read.
    """

    quantization_config: Any

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        stored: Any = self.quantization_config
        paths = stored.paths()
        self.quantization_config = said = stored.moved(
            {path: own_path(model, path) for path in paths}
        )
        place_low_rank(model, said.ranks, said.pivoted)
        place_quantized(model, said.quantization)
        watch_keys(model, paths)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        unwatch(model)
        check_weights(model)
        fuse(model)
        # every tensor is an ordinary one: casting, and training what is float, are allowed
        model.is_quantized = False
        carry_code(model)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    is_trainable = is_qat_trainable = is_compileable = True


def low_rank_like(
    old: nn.Module, rank: int, device: Any = None, pivoted: bool = False
) -> LowRankLinear:
    """An unfilled `LowRankLinear` with the features, bias and dtype of `old`."""
    fan_in, fan_out = features(old)
    return LowRankLinear(
        fan_in, fan_out, rank, old.bias is not None, device, old.weight.dtype, pivoted
    )


def place_low_rank(model: nn.Module, ranks: dict[str, int], pivoted: list[str]) -> None:
    """Put unfilled low-rank modules without memory (meta device) in the place of the linears that
    `ranks` names. Raises `ValueError`.
    """
    for path, rank in ranks.items():
        place = own_path(model, path)
        old = model.get_submodule(place)
        if path in pivoted and rank > features(old)[1]:
            raise ValueError(
                f"config.json gives '{path}' the rank {rank}, but it has only {features(old)[1]}"
                " outputs"
            )
        model.set_submodule(place, low_rank_like(old, rank, device="meta", pivoted=path in pivoted))


def check_weights(model: nn.Module) -> None:
    """Raise `ValueError` where a weight read from the files does not have the shape and type that
    the config gives it.

    Some releases of transformers load a tensor of any shape and type into a model that comes
    through a quantizer.
    """
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            module.check(path)
        else:
            check_floats(path, **dict(module.named_parameters(recurse=False)))
        if getattr(module, "pivoted", False):
            check_places(path, module.places)
        if isinstance(module, QuantizedLinear) or not isinstance(module, nn.Linear):
            continue
        expected = [(module.weight, (module.out_features, module.in_features))]
        if isinstance(module, LowRankLinear):
            rows = module.out_features - module.rank if module.pivoted else module.out_features
            expected = [
                (module.weight, (rows, module.rank)),
                (module.weight_in, (module.rank, module.in_features)),
            ]
        if any(tuple(tensor.shape) != shape for tensor, shape in expected):
            raise ValueError(
                f"the weight of '{path}' is {tuple(module.weight.shape)}, which does not fit the"
                " ranks in config.json"
            )


AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModel",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
)
"""By which a checkpoint may be loaded, if transformers has such a class for its configuration."""


def auto_classes(config_class: type) -> dict[str, type]:
    """{auto class: the class of transformers that it makes of a configuration}."""
    found = {}
    for name in AUTO_CLASSES:
        known = getattr(getattr(transformers, name, None), "_model_mapping", {})
        kind = known.get(config_class, None)
        if (
            isinstance(kind, type)
            and kind.__module__.startswith("transformers.")
            and getattr(kind, "config_class", None) is config_class
        ):
            found[name] = kind
    return found


def plain_class(kind: type) -> type:
    """The class of a model before `carry_code`."""
    return next(
        base
        for base in kind.__mro__
        if "carries_grasp" not in vars(base) and not base.__module__.endswith("modeling_grasp")
    )


def carry_code(model: Any) -> None:
    """Make `model.save_pretrained` copy this file beside the weights and name it in
    `config.auto_map`.
    """
    kind = plain_class(type(model))
    if not kind.__module__.startswith("transformers."):
        model.__class__ = with_its_own_code(kind)
        return
    model.__class__ = __getattr__(kind.__name__)
    named = {
        auto: f"modeling_grasp.{found.__name__}"
        for auto, found in auto_classes(type(model.config)).items()
    }
    model.config.auto_map = {**(getattr(model.config, "auto_map", None) or {}), **named}


@cache
def __getattr__(name: str) -> type:
    """`modeling_grasp.LlamaForCausalLM` and the like: the class of that name in transformers,
    marked as carrying this file.
    """
    base: Any = None if name.startswith("__") else getattr(transformers, name, None)
    if not (isinstance(base, type) and issubclass(base, transformers.PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    kind: Any = base
    known = auto_classes(kind.config_class) if isinstance(kind.config_class, type) else {}
    auto = next((auto for auto, found in known.items() if found is base), AUTO_CLASSES[0])
    marks: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": base.__doc__,
        "_auto_class": auto,
        "carries_grasp": True,
    }
    # so its weights are renamed as transformers' are
    return type(name, (base,), {**marks, "is_custom_code": classmethod(lambda cls: False)})


CARRY = (
    "from .modeling_grasp import register  # lets transformers read the low-rank linears of this"
    " checkpoint"
)


@cache
def with_its_own_code(kind: Any) -> type:
    """A class whose code is not transformers' own, but a file beside the weights: saving adds our
    files, and a line that imports them.
    """

    def save_pretrained(self: Any, save_directory: Any, *arguments: Any, **options: Any) -> None:
        super(made, self).save_pretrained(save_directory, *arguments, **options)
        code = Path(save_directory) / f"{kind.__module__.rpartition('.')[2]}.py"
        here = Path(__file__).parent
        if code.is_file() and CARRY not in code.read_text(encoding="utf-8"):
            code.write_text(
                code.read_text(encoding="utf-8").rstrip("\n") + f"\n\n{CARRY}\n", encoding="utf-8"
            )
        for name in ("modeling_grasp.py", "quantized_grasp.py", "reading_grasp.py"):
            shutil.copyfile(here / name, Path(save_directory) / name)

    marks = {
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
        "_auto_class": kind._auto_class or AUTO_CLASSES[0],
    }
    made: Any = type(
        kind.__name__, (kind,), {**marks, "carries_grasp": True, "save_pretrained": save_pretrained}
    )
    return made


def register() -> None:
    """Tell transformers about grasp checkpoints. The installed package wins over a checkpoint's
    copy.
    """
    for name in NAMES:
        known = AUTO_QUANTIZER_MAPPING.get(name)
        if known is None or not known.__module__.startswith("grasp."):
            AUTO_QUANTIZER_MAPPING[name] = GraspQuantizer
            AUTO_QUANTIZATION_CONFIG_MAPPING[name] = GraspConfig


register()
