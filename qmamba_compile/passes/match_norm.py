"""What the norm before a linear looks like in a Dynamo graph: from the linear's input to named nodes."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import SkipReason
from ..fx_utils import COPIES, argument, mutates, op_name, same_shape, same_size, shape_of, value_of, written_between
from .base import NoMatchError

_VIEWS = ("view", "reshape", "flatten", "unflatten")


@dataclasses.dataclass(frozen=True)
class NormMatch:
    """The norm whose result a linear reads.

    Attributes:
        x, gate: [..., k], as they are before any cast; gate is None without one.
        x_dtype: what x is cast to for good before it is normed; None where it keeps its dtype.
        weight: [k].
        indices: what selects tokens of the normed x, to be applied to x, in order.
    """

    x: fx.Node
    x_dtype: torch.dtype | None
    gate: fx.Node | None
    weight: fx.Node
    epsilon: float
    group_size: int
    indices: tuple[Any, ...]


def match_norm(node: fx.Node) -> NormMatch:
    """Name the parts of the norm that ends in ``node``.

    Raises:
        NoMatchError: an operation is missing, one more is there, or the normed value is read elsewhere.
    """
    indices: list[Any] = []
    weighted = _before_cast(node, value_of(node).dtype)
    while op_name(weighted) == "getitem" and _selects_tokens(weighted):
        indices.insert(0, weighted.args[1])
        weighted = _before_cast(weighted.args[0], value_of(node).dtype)
    weight, normed = _split(weighted, lambda operand: len(shape_of(operand)) == 1, "mul", "a weight [k]")
    weight = _strip_exact(weight)
    k = shape_of(weight)[0]
    scaled, passed = normed, {torch.float32}
    while op_name(scaled) in (*COPIES, *_VIEWS):
        passed.add(value_of(scaled).dtype)
        scaled = scaled.args[0]
    root, grouped = _split(scaled, lambda operand: op_name(operand) == "rsqrt", "mul", "rsqrt")
    epsilon, mean = _split(root.args[0], lambda operand: not isinstance(value_of(operand), Tensor), "add", "epsilon")
    square = mean.args[0] if op_name(mean) == "mean" else None
    last = argument(mean, 1, "dim") if square is not None else None
    if last not in (-1, (-1,), [-1]) or op_name(square) != "pow" or tuple(square.args) != (grouped, 2):
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"{root} is not of the mean of squares of {grouped}")
    h = grouped
    while op_name(h) in (*COPIES, *_VIEWS) and value_of(h).dtype == torch.float32:
        h = h.args[0]
    gate = None
    # Any other product is what it is: a tensor to norm.
    if op_name(h) == "mul" and any(op_name(operand) == "silu" for operand in h.args):
        activated, h = _split(h, lambda operand: op_name(operand) == "silu", "mul", "silu")
        gate = _strip_exact(activated.args[0])
        _require(value_of(activated).dtype == torch.float32, SkipReason.DTYPE, f"{activated} is not in float32")
    x = _strip_exact(h)
    # NemotronH keeps what is normed in float32 until it is weighted, others have it in x's dtype again.
    dtype, in_dtype = value_of(x).dtype, value_of(normed).dtype
    _require(
        value_of(scaled).dtype == value_of(grouped).dtype == torch.float32
        and in_dtype in (dtype, torch.float32)
        and passed <= {torch.float32, in_dtype}
        and torch.promote_types(value_of(weighted).dtype, value_of(node).dtype) == value_of(weighted).dtype,
        SkipReason.DTYPE,
        f"{weighted} is not normed in float32 and weighted in {dtype} or float32",
    )
    whole = shape_of(x)
    group_size = shape_of(grouped)[-1]
    in_groups = (*whole[:-1], k // group_size, group_size)
    _require(
        same_shape(shape_of(weighted), whole)
        and same_size(whole[-1], k)
        and (gate is None or same_shape(shape_of(gate), whole))
        and (same_shape(shape_of(grouped), whole) or same_shape(shape_of(grouped), in_groups)),
        SkipReason.UNKNOWN_STRUCTURE,
        f"{grouped} of shape {list(shape_of(grouped))} is not {x} of shape {list(whole)} in groups of features",
    )
    _require_readers(weighted)
    # Such as a residual stream in float32 in front of a norm in 16 bits.
    x_dtype = None if in_dtype == dtype else in_dtype
    if x_dtype is None and op_name(x) in COPIES and _is_rounded(x) and written_between(x, node) is None:
        x, x_dtype = x.args[0], dtype
    for source in (x, gate, weight):
        written = source is not None and any(mutates(user) for user in source.users)
        _require(not written, SkipReason.SECOND_READER, f"{source} is written in place")
    return NormMatch(x, x_dtype, gate, weight, float(value_of(epsilon)), int(group_size), tuple(indices))


def _require(condition: bool, reason: SkipReason, detail: str) -> None:
    if not condition:
        raise NoMatchError(reason, detail)


def _strip_exact(node: Any) -> Any:
    """Walk back through casts that lose nothing."""
    while op_name(node) in COPIES:
        before, after = value_of(node.args[0]), value_of(node)
        if before.device != after.device or torch.promote_types(before.dtype, after.dtype) != after.dtype:
            break
        node = node.args[0]
    return node


def _before_cast(node: Any, dtype: torch.dtype) -> Any:
    """Walk back through casts, to ``dtype`` even if it has fewer bits.

    What is cast for the linear is quantized as it was before, as Inductor's own fusions have it.
    """
    node = _strip_exact(node)
    if op_name(node) != "to" or value_of(node).dtype != dtype or value_of(node.args[0]).device != value_of(node).device:
        return node
    return _strip_exact(node.args[0])


def _is_rounded(cast: fx.Node) -> bool:
    before, after = value_of(cast.args[0]), value_of(cast)
    return bool(before.dtype == torch.float32 != after.dtype and before.device == after.device)


def _split(node: Any, wanted: Any, name: str, what: str) -> tuple[Any, Any]:
    """The operand of the sum or product ``node`` that is ``wanted``, and the other one."""
    operands = node.args if op_name(node) == name and not node.kwargs else ()
    for this, other in (operands, operands[::-1]) if len(operands) == 2 else ():
        if wanted(this) and isinstance(other, fx.Node):
            return this, other
    found = f"{op_name(node)} ({node})" if isinstance(node, fx.Node) else repr(node)
    raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"expected {name} with {what} as an operand, found {found}")


def _selects_tokens(node: fx.Node) -> bool:
    """True for an index by slices that keeps all features."""
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    rank = len(shape_of(node.args[0]))
    whole = len(index) < rank or index[-1] == slice(None)
    return rank > 1 and whole and all(isinstance(item, slice) for item in index)


def _require_readers(weighted: fx.Node) -> None:
    """Casts and slices of a normed value must all end in int8 linears."""
    pending = list(weighted.users)
    while pending:
        user = pending.pop()
        if op_name(user) in (*COPIES, "getitem"):
            pending.extend(user.users)
        elif op_name(user) != "qmamba.w8a8_linear":
            raise NoMatchError(SkipReason.SECOND_READER, f"{weighted} is read by {op_name(user)} ({user})")
