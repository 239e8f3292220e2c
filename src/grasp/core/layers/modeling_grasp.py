"""How Hugging Face transformers loads a checkpoint of ours: the first of the files that it carries.

They import torch and transformers only, because they must work where grasp is not installed
(`AutoModelForCausalLM.from_pretrained(dir, trust_remote_code=True)`). With `import grasp` the same
code is registered from the package, and no flag is needed.

How a checkpoint loads. `config.json` holds `"quantization_config": {"quant_method": "grasp-llm",
"structure": {path: record}}`. transformers hands the model, still without memory (meta device), to
`GraspQuantizer`, which puts the modules that the records describe in their places
(`structure_grasp`); then the weights are read. The dense matrices never exist.

How it fails safely. The output factor is stored under the name of the matrix it replaces
(`...q_proj.weight`, out x rank). A transformers that knows nothing of grasp finds a tensor of the
wrong shape and stops, where a missing tensor would have been filled with random numbers.
"""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .low_rank_grasp import fuse
from .reading_grasp import check_floats, check_shape, record_of, unwatch, watch_keys
from .structure_grasp import Record, check_structure, converted, place

FORMAT_VERSION = 5
"""Highest version of the checkpoint layout that this reads; a higher one is refused. 1: low-rank
pairs. 2: pivoted pairs too. 3: quantized linears too. 4: one record of the structure for all kinds.
5: 3, 5 and 6 bits, 4 without minima, embeddings and heads in few bits.
"""
NAMES = ("grasp-llm", "grasp")
"""`quant_method` of our checkpoints, and of earlier ones. What cannot read it shows it in its
error, so it is the package to install.
"""


class GraspConfig(QuantizationConfigMixin):
    """What transformers needs to rebuild the model: {path: record} (see `structure_grasp`).

    `ranks`, `pivoted` and `quantization` are the tables of formats 1 to 3.
    """

    def __init__(
        self,
        structure: Any = None,
        version: Any = FORMAT_VERSION,
        ranks: Any = None,
        pivoted: Any = None,
        quantization: Any = None,
        **_: Any,
    ):
        if type(version) is not int or version > FORMAT_VERSION:
            raise ValueError(
                f"this checkpoint has grasp format {version}, this grasp reads up to"
                f" {FORMAT_VERSION}: upgrade with `pip install -U grasp-llm`"
            )
        if structure is None:
            structure = converted({} if ranks is None else ranks, pivoted or [], quantization)
        check_structure(structure)
        self.quant_method = NAMES[0]  # a name in transformers' registry
        self.version = FORMAT_VERSION
        self.structure: dict[str, Record] = dict(structure)

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": self.quant_method,
            "version": self.version,
            "structure": self.structure,
        }


class GraspQuantizer(HfQuantizer):
    """Puts the modules of the record into the empty model before its weights are read, and checks
    what was read.
    """

    quantization_config: Any

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        said: Any = self.quantization_config
        places = place(model, said.structure)
        self.quantization_config = GraspConfig(
            {here: said.structure[p] for p, here in places.items()}
        )
        watch_keys(model, list(places))
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


def check_weights(model: nn.Module) -> None:
    """Raise `ValueError` where a weight read from the files does not have the shape and type that
    the config gives it.

    Some releases of transformers load a tensor of any shape and type into a model that comes
    through a quantizer.
    """
    for path, module in model.named_modules():
        if record_of(module) is not None:
            module.check(path)
            continue
        check_floats(path, **dict(module.named_parameters(recurse=False)))
        if isinstance(module, nn.Linear):
            check_shape(path, module.weight, (module.out_features, module.in_features))


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
    marks |= {"is_custom_code": classmethod(lambda cls: False)}
    return type(name, (base,), marks | {"resize_token_embeddings": _resizing(base)})


def _resizing(base: Any) -> Any:
    """What `resize_token_embeddings` of a class of ours is: an embedding in few bits keeps its
    rows.
    """

    def resize_token_embeddings(self: Any, *arguments: Any, **options: Any) -> Any:
        scheme = getattr(self.get_input_embeddings(), "scheme", None)
        if scheme is not None:
            raise ValueError(
                f"the embedding is stored in few bits ({scheme}) and cannot be resized; resize that"
                " of the model it was made from, or load with grasp.load(..., dequantize=True)"
            )
        return base.resize_token_embeddings(self, *arguments, **options)

    return resize_token_embeddings


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
        for file in here.glob("*_grasp.py"):
            shutil.copyfile(file, Path(save_directory) / file.name)

    marks = {
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
        "_auto_class": kind._auto_class or AUTO_CLASSES[0],
    }
    made: Any = type(
        kind.__name__,
        (kind,),
        {
            **marks,
            "carries_grasp": True,
            "save_pretrained": save_pretrained,
            "resize_token_embeddings": _resizing(kind),
        },
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
