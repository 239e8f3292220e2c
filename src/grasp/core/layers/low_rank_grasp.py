"""A linear map of low rank as two thin matrices, and the first products of several of them as one.

A file that a checkpoint carries: it needs torch and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .reading_grasp import check_floats, check_places, check_shape, features, record_of


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
    of: dict[str, Any] | None = None  # record of the module that this one replaced

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

    def record(self) -> dict[str, Any]:
        """How to place it, unfilled, before weights are read (`structure_grasp`)."""
        found: dict[str, Any] = {"kind": "low-rank", "rank": self.rank}
        return (
            found
            | ({"pivoted": True} if self.pivoted else {})
            | ({"of": self.of} if self.of else {})
        )

    def check(self, path: str) -> None:
        """Raise `ValueError` where a weight that was read is of another shape or type."""
        check_floats(path, weight=self.weight, weight_in=self.weight_in, bias=self.bias)
        if self.pivoted:
            check_places(path, self.places)
        rows = self.out_features - self.rank if self.pivoted else self.out_features
        check_shape(path, self.weight, (rows, self.rank))
        check_shape(path, self.weight_in, (self.rank, self.in_features))

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


def low_rank_like(
    old: nn.Module, rank: int, device: Any = None, pivoted: bool = False
) -> LowRankLinear:
    """An unfilled `LowRankLinear` with the features, bias and dtype of `old`."""
    fan_in, fan_out = features(old)
    new = LowRankLinear(
        fan_in, fan_out, rank, old.bias is not None, device, old.weight.dtype, pivoted
    )
    new.of = record_of(old)
    return new


def check_record(path: str, record: dict[str, Any]) -> None:
    """Raise `ValueError` for a record that makes no sense."""
    rank = record.get("rank")
    if type(rank) is not int or rank < 0:
        raise ValueError(
            f"config.json: the rank of '{path}' is {rank!r}; it must be a whole number, 0 or more"
        )
    if type(record.get("pivoted", False)) is not bool:
        raise ValueError(f"config.json: 'pivoted' of '{path}' must be true or false")


def place(path: str, old: nn.Module, record: dict[str, Any]) -> LowRankLinear:
    """The pair that a record describes, without memory. Raises `ValueError`."""
    rank, pivoted = record["rank"], record.get("pivoted", False)
    if pivoted and rank > features(old)[1]:
        raise ValueError(
            f"config.json gives '{path}' the rank {rank}, but it has only {features(old)[1]}"
            " outputs"
        )
    return low_rank_like(old, rank, "meta", pivoted)
