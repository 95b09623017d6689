"""What a Mamba2 scan and a Mamba2 step have in common in a Dynamo graph: values broadcast over heads, and dt.

Families of transformers share one function for each, whatever the file they live in. `match_scan` and `match_step` find
them by their operations and by shapes, never by names of variables, modules or files.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import Tensor, fx

from ..errors import SkipReason
from ..fx_utils import COPIES, argument, op_name, shape_of, strip, value_of
from .base import NoMatchError


def expect(node: Any, *names: str) -> fx.Node:
    """``node``, which has to be one of these operations."""
    if op_name(node) not in names:
        found = op_name(node) or repr(node)
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"expected {' or '.join(names)}, found {found} ({node})")
    if "alpha" in node.kwargs:
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"{node} scales what it adds by alpha")
    return node


def only_user(node: fx.Node) -> fx.Node:
    """The one user of ``node``, which has to have no more."""
    if len(node.users) != 1:
        raise NoMatchError(SkipReason.SECOND_READER, f"{node} has {len(node.users)} readers, expected one")
    return next(iter(node.users))


def _is_none_index(node: fx.Node) -> bool:
    """True for ``t[..., None]`` and the like: indexing that only adds dimensions of size one."""
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(item is None or item is Ellipsis or item == slice(None) for item in index)


def broadcast_path(node: Any) -> tuple[Any, list[fx.Node]]:
    """Walk back through casts, expand and added dimensions of size one: where that ends, and the way, first to last."""
    path: list[fx.Node] = []
    while _broadcasts(node):
        path.insert(0, node)
        node = node.args[0]
    return node, path


def _broadcasts(node: Any) -> bool:
    if op_name(node) in (*COPIES, "expand", "unsqueeze"):
        return value_of(node).is_floating_point()
    return op_name(node) == "getitem" and _is_none_index(node)


def broadcast_source(node: Any, name: str, axes: tuple[int, ...]) -> fx.Node:
    """What ``node`` was broadcast from, when its dimensions lie along ``axes`` of the result, counted from the right.

    Shapes alone do not tell a value per head from one per channel when there are as many channels as heads.
    """
    source, path = broadcast_path(node)
    if not isinstance(source, fx.Node):
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"expected {name}, found {source!r}")
    rank = len(shape_of(source))
    places = list(range(rank))  # of the source's dimensions, from the left
    for step in path:
        if op_name(step) == "expand":
            places = [place + len(shape_of(step)) - rank for place in places]
        elif op_name(step) == "unsqueeze":
            added = argument(step, 1, "dim") % (rank + 1)
            places = [place + (place >= added) for place in places]
        elif op_name(step) == "getitem":
            kept = [place for place, item in enumerate(full_index(step.args[1], rank)) if item is not None]
            places = [kept[place] for place in places]
        rank = len(shape_of(step))
    if tuple(rank - place for place in places) != axes:
        raise NoMatchError(SkipReason.NOT_PER_HEAD, f"{name} has shape {list(shape_of(source))}, broadcast by {node}")
    return source


def full_index(index: Any, rank: int) -> list[Any]:
    """An index of slices, None and at most one Ellipsis, with a slice for each dimension of the indexed tensor."""
    items = list(index) if isinstance(index, tuple) else [index]
    missing = rank - sum(isinstance(item, slice) for item in items)
    at = items.index(Ellipsis) if Ellipsis in items else len(items)
    return items[:at] + [slice(None)] * missing + items[at + 1 :]


@dataclasses.dataclass(frozen=True)
class TimeStep:
    """``dt`` before bias and softplus, and what the model does to it.

    Attributes:
        dt: raw node; dt_bias: node or None.
    """

    dt: fx.Node
    dt_bias: fx.Node | None
    softplus: bool
    minimum: float
    maximum: float


def match_time_step(node: Any, head_axis: int) -> TimeStep:
    """Walk back from the dt that the recurrence uses; heads lie along ``head_axis``, counted from the right."""
    minimum, maximum, softplus, dt_bias = 0.0, math.inf, False, None
    node = strip(node, *COPIES)
    if op_name(node) in ("clamp", "clip"):
        low, high = argument(node, 1, "min"), argument(node, 2, "max")
        minimum, maximum = _number(low, -math.inf), _number(high, math.inf)
        node = strip(node.args[0], *COPIES)
    elif op_name(node) != "softplus":
        minimum = -math.inf
    if op_name(node) == "softplus":
        if argument(node, 1, "beta", 1) != 1 or argument(node, 2, "threshold", 20) != 20:
            raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"softplus with beta or threshold of its own ({node})")
        softplus = True
        node = strip(node.args[0], *COPIES)
        if op_name(node) == "add" and all(isinstance(item, fx.Node) for item in node.args) and not node.kwargs:
            node, dt_bias = node.args[0], broadcast_source(node.args[1], "dt_bias", (head_axis,))
    return TimeStep(node, dt_bias, softplus, minimum, maximum)


def _number(limit: Any, default: float) -> float:
    value = value_of(limit)
    if isinstance(value, Tensor):
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"dt is limited by a tensor ({limit})")
    # With dynamic=True a Python float of the model is a symbol; float() fixes its value and guards on it.
    return default if value is None else float(value)
