"""How vLLM makes, loads and runs a linear of a grasp checkpoint: the factors of `parts`, each
multiplied by vLLM's own kernels, or as it is stored in few bits (`at_width`).

vLLM stacks q, k, v and gate, up into one linear each. Any of them may be a pair, a pivoted pair or
dense, at any rank; families that store them as one matrix (Phi-3, GPT-2) have one pair for all.
An MLP may have fewer channels than the config says (`narrowing`). A linear with nothing of ours is
left to vLLM.
"""

from __future__ import annotations

from functools import cached_property, partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.platforms import current_platform

from grasp.core.layers.modeling_grasp import NAMES, GraspConfig
from grasp.core.layers.quantized_grasp import slow_in_bfloat16
from grasp.serving import narrowing
from grasp.serving.at_width import AtWidth, has_kernel
from grasp.serving.parts import Multiply, Part, Stack, global_order, padded, spans
from grasp.serving.stored import Matrix, Stored, joined, kind, with_rows

SETTING = "grasp_stored_width"
"""In vLLM's `additional_config`: whether weights in few bits are multiplied as they are stored. By
default where that is faster.
"""
logger: Any = init_logger("vllm.grasp")  # vLLM shows what begins so

TENSORS = (
    "weight",
    "weight_in",
    "places",
    "weight_qdata",
    "weight_zero",
    "weight_in_qdata",
    "weight_in_zero",
)


class LowRankConfig(QuantizationConfig):
    """The `quantization_config` of a grasp checkpoint. Raises `ValueError` for a newer format, and
    for a structure that vLLM cannot run.
    """

    def __init__(self, structure: dict[str, Any]):
        super().__init__()
        self.transposed = False
        narrowing.check(structure)
        self.structure = dict(structure)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LowRankConfig:
        # checks all of it
        said = GraspConfig(**{key: value for key, value in config.items() if key != "quant_method"})
        return cls(said.structure)

    def of(self, path: str, kind: str) -> narrowing.Record:
        """The record of this kind of the matrix at `path`: how it is a pair, narrow or quantized;
        {} where it is not.
        """
        return narrowing.kinds(self.structure.get(path)).get(kind, {})

    @cached_property
    def at_width(self) -> set[tuple[str, int]]:
        """(scheme, group size) of the linears that are multiplied as they are stored; asked for
        when the first is made. The log names them, and what is dequantised.
        """
        few = [record for record in self.structure.values() if record["kind"] == "quantized"]
        linears = {(r["scheme"], r["group_size"]) for r in few if "part" not in r}
        kept = {how for how in linears if _at_width() and has_kernel(*how)}
        dense = {f"linears in {scheme}" for scheme, _ in linears - kept}
        dense |= {f"{r['part']} in {r['scheme']}" for r in few if "part" in r}
        if few:
            logger.info_once(
                "grasp: multiplied as stored: %s; dequantised: %s",
                ", ".join(sorted({f"linears in {scheme}" for scheme, _ in kept})) or "nothing",
                ", ".join(sorted(dense)) or "nothing",
            )
        return kept

    @classmethod
    def get_name(cls) -> str:
        return NAMES[0]

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        # vLLM transposes its weights, for they used to be Conv1D
        self.transposed = getattr(hf_config, "model_type", "") == "gpt2"
        if hf_config is not None:
            text = hf_config.get_text_config(decoder=True)
            narrowing.check_axes(self.structure, text.model_type)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.structure = hf_to_vllm_mapper.apply_dict(self.structure)

    def get_quant_method(self, layer: Any, prefix: str) -> LinearMethodBase | None:
        if not isinstance(layer, LinearBase):
            return None
        parent, _, leaf = prefix.rpartition(".")
        paths = [f"{parent}.{name}" for name in self.packed_modules_mapping.get(leaf, [leaf])]
        if prefix in self.structure:
            paths = [prefix]
        if self.structure.keys().isdisjoint(paths):
            return UnquantizedLinearMethod()
        return LowRankMethod(paths, self)


class LowRankMethod(LinearMethodBase):
    """One linear of vLLM, made of the matrices at `paths` (one, or one for each stacked matrix), at
    least one of them low-rank, narrow or in few bits.
    """

    def __init__(self, paths: list[str], config: LowRankConfig):
        self.paths, self.config, self.kernel = paths, config, UnquantizedLinearMethod()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Register placeholders for `weight`, `weight_in` and `places` that hand every tensor of
        the checkpoint to its part.
        """
        whole, index = _split(layer, output_partition_sizes)
        narrow = [self.config.of(path, "narrow") for path in self.paths]
        if any(narrow):
            whole = narrowing.outputs(self.paths, narrow, whole)
            input_size = narrow[0].get("columns", input_size)
            input_size_per_partition, output_partition_sizes = self._shares(
                layer, whole, input_size
            )
        start = (
            layer.tp_rank * input_size_per_partition if isinstance(layer, RowParallelLinear) else 0
        )
        inputs = range(start, start + input_size_per_partition)
        outputs = spans(whole, output_partition_sizes, index, stored_as_one=len(self.paths) == 1)
        sizes = whole if len(self.paths) == len(whole) else [sum(whole)]
        layer.parts = [
            self._part(path, size, input_size, here, inputs)
            for path, size, here in zip(self.paths, sizes, outputs, strict=True)
        ]
        layer.outputs_here, layer.factor_dtype = sum(output_partition_sizes), params_dtype
        for name in TENSORS:
            kind = {"places": torch.int32, "qdata": torch.uint8}.get(
                name.rpartition("_")[2], params_dtype
            )
            place: Any = nn.Parameter(torch.empty(0, dtype=kind), requires_grad=False)
            place.weight_loader = partial(self._load, layer, name)
            layer.register_parameter(name, place)

    def _shares(self, layer: Any, whole: list[int], inputs: int) -> tuple[int, list[int]]:
        """What is left of the inputs and of each stacked matrix's outputs on one device; the layer
        is told, for its bias and its name. Raises `ValueError` where it does not divide.
        """
        columns = layer.tp_size if isinstance(layer, ColumnParallelLinear) else 1
        rows = layer.tp_size if isinstance(layer, RowParallelLinear) else 1
        local = [narrowing.share(self.paths[0], size, columns) for size in whole]
        layer.input_size, layer.output_size = inputs, sum(whole)
        layer.input_size_per_partition = narrowing.share(self.paths[0], inputs, rows)
        layer.output_size_per_partition, layer.output_partition_sizes = sum(local), local
        if hasattr(layer, "output_sizes"):
            layer.output_sizes = list(whole)
        return layer.input_size_per_partition, local

    def _part(
        self, path: str, out_features: int, in_features: int, outputs: list[range], inputs: range
    ) -> Part:
        pair, bits = self.config.of(path, "low-rank"), self.config.of(path, "quantized")
        scheme, group_size = bits.get("scheme"), bits.get("group_size", 1)
        return Part(
            path,
            out_features,
            in_features,
            outputs,
            inputs,
            pair.get("rank"),
            pair.get("pivoted", False),
            scheme,
            group_size,
            scheme is not None and (scheme, group_size) in self.config.at_width,
        )

    def _load(
        self, layer: Any, name: str, place: nn.Parameter, tensor: Tensor, shard: Any = None
    ) -> None:
        """What vLLM calls with each tensor. `shard`: which of the stacked matrices it is, "q", "k",
        "v" or a number.
        """
        if layer.parts is None:
            raise ValueError(
                f"{self.paths[0]}: its weights are in place; to serve others, start vLLM anew"
            )
        number = "qkv".index(shard) if isinstance(shard, str) else shard or 0
        part = layer.parts[number]
        if self.config.transposed and name == "weight":
            tensor = tensor.t()
        part.load(name, tensor, place.device, layer.factor_dtype)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Lay first factors of a kind one below the other, and give every product to a kernel.
        Raises `ValueError` where tensors are missing.
        """
        parts: list[Part] = layer.parts
        for part in parts:
            if part.missing():
                raise ValueError(
                    f"{part.path}: the checkpoint lacks {' and '.join(part.missing())}; it is"
                    " incomplete, copy or make it again"
                )
            if part.keep and not isinstance(part.first(), Stored):
                logger.info_once(
                    "grasp: dequantised too: linears whose inputs the devices share amid a group of"
                    " %d",
                    part.group_size,
                )
        order, multiple = global_order(parts), _columns(layer)
        rows = [with_rows(part.first(), 1 if part.rank is None else multiple) for part in parts]
        second: list[Multiply | None] = []
        for number, part in enumerate(parts):
            factor = part.second()
            if factor is None or (part.pivoted and not factor.shape[0]):
                second.append(None)
            else:
                second.append(self._product(layer, f"second_{number}", factor))
        widths = [part.first().shape[0] for part in parts]
        stack = Stack(
            [r.shape[0] for r in rows],
            widths,
            second,
            [part.pivoted for part in parts],
            order,
            layer.outputs_here,
        )
        layer.parts = None  # frees the slices; `_product` keeps what is used
        layer.first_product = self._first(layer, rows) if any(stack.sizes) else None
        layer.stack = stack

    def _first(self, layer: Any, rows: list[Matrix]) -> Multiply:
        """x (..., k) -> (..., n), all first products: one for each run of matrices of a kind."""
        runs = [joined(list(run)) for _, run in groupby(rows, key=kind)]
        rows.clear()
        products = [self._product(layer, f"first_{i}", run) for i, run in enumerate(runs)]
        if len(products) == 1:
            return products[0]
        return lambda x: torch.cat([product(x) for product in products], dim=-1)

    def _product(self, layer: Any, name: str, factor: Matrix) -> Multiply:
        """x (..., k) -> (..., n) for a factor (n, k): as it is stored, or by the kernel that vLLM
        uses for dense matrices here.
        """
        n, k = factor.shape
        if 0 in (n, k):
            return lambda x: x.new_zeros(*x.shape[:-1], n)
        if isinstance(factor, Stored):
            stored = AtWidth(factor, layer.factor_dtype)
            layer.add_module(name, stored)
            return stored
        holder: Any = nn.Module()
        holder.weight = nn.Parameter(
            padded(factor, min(16, _columns(layer)), _columns(layer)), requires_grad=False
        )
        rows, columns = holder.weight.shape
        layer.add_module(name, holder)
        if _plain(layer):
            return lambda x: linear(x, holder.weight)
        self.kernel.process_weights_after_loading(holder)

        def product(x: Tensor) -> Tensor:
            wide = x if x.shape[-1] == columns else pad(x, (0, columns - k))
            output = self.kernel.apply(holder, wide)
            return output if rows == n else output[..., :n]

        return product

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., in) -> y (..., out), of this device."""
        output = layer.stack(x, layer.first_product)
        return output if bias is None else output + bias


def _at_width() -> bool:
    """Whether to multiply weights in few bits as they are stored: on CPU, where asked or faster."""
    vllm = get_current_vllm_config()
    said = vllm.additional_config
    asked = said.get(SETTING) if isinstance(said, dict) else None
    faster = vllm.model_config.dtype == torch.bfloat16 and slow_in_bfloat16()
    return current_platform.is_cpu() and (faster if asked is None else bool(asked))


def _plain(layer: Any) -> bool:
    """Whether torch's own product serves better: vLLM's for float32 on CPU keeps one more copy of
    an odd-sized matrix for every number of tokens.
    """
    return layer.weight.device.type == "cpu" and layer.factor_dtype == torch.float32


def _columns(layer: Any) -> int:
    """Ranks are filled up with zeros to a multiple of this: vLLM's 16-bit kernels on CPU read whole
    blocks, and crash on others.
    """
    return 32 if layer.weight.device.type == "cpu" and layer.factor_dtype != torch.float32 else 1


def _split(layer: Any, local: list[int]) -> tuple[list[int], list[int]]:
    """(outputs of each whole matrix, which block of it lives here) of a linear that vLLM splits
    over its devices.
    """
    if isinstance(layer, QKVParallelLinear):
        heads = (layer.total_num_heads, layer.total_num_kv_heads, layer.total_num_kv_heads)
        widths = (layer.head_size, layer.head_size, getattr(layer, "v_head_size", layer.head_size))
        # with fewer k, v heads than devices, several hold the same
        shared = layer.tp_rank // layer.num_kv_head_replicas
        return [number * width for number, width in zip(heads, widths, strict=True)], [
            layer.tp_rank,
            shared,
            shared,
        ]
    if isinstance(layer, ColumnParallelLinear):
        return [size * layer.tp_size for size in local], [layer.tp_rank] * len(local)
    return list(local), [0] * len(local)
