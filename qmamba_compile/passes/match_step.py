"""What a Mamba2 step looks like in a Dynamo graph: from the new state that it stores in place to named nodes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import fx

from ..errors import SkipReason
from ..fx_utils import COPIES, op_name, same_size, shape_of, strip, users
from .base import NoMatchError
from .match_recurrence import TimeStep, broadcast_source, expect, match_time_step, only_user


@dataclasses.dataclass(frozen=True)
class StepMatch:
    """One recurrent step.

    Attributes:
        x: [b, h, p]; time: dt [b, h] or [b, h, 1]; A, D: [h]; B, C: [b, g, n].
        y: [b, h, p], the D skip included.
    """

    x: fx.Node
    time: TimeStep
    A: fx.Node
    B: fx.Node
    C: fx.Node
    D: fx.Node | None
    y: fx.Node


def is_step(new_state: Any, old_state: fx.Node) -> bool:
    """True when ``new_state`` is ``old_state * exp(..) + ..`` of [b, h, p, n], whatever surrounds it.

    Mamba1's is of [b, d, n]: no layer of such a model is rewritten.
    """
    if len(shape_of(old_state)) != 4:
        return False
    total = strip(new_state, *COPIES)
    if op_name(total) != "add":
        return False
    products = [item for item in total.args if op_name(item) == "mul"]
    return any(strip(factor, *COPIES) is old_state for product in products for factor in product.args)


def match_step(new_state: Any, old_state: fx.Node) -> StepMatch:
    """Name the parts of the step that makes ``new_state`` from ``old_state``.

    Raises:
        NoMatchError: an operation is missing, or dt, A, D or dt_bias is not one number a head.
    """
    state = expect(strip(new_state, *COPIES), "add")
    decayed, dBx = state.args
    if not any(strip(item, *COPIES) is old_state for item in getattr(decayed, "args", ())):
        decayed, dBx = dBx, decayed
    expect(decayed, "mul")
    dA = next((item for item in decayed.args if strip(item, *COPIES) is not old_state), None)
    exponent = expect(expect(strip(dA, *COPIES), "exp").args[0], "mul")
    dt = broadcast_source(exponent.args[0], "dt", (4, 3, 2))
    A = broadcast_source(exponent.args[1], "A", (3,))

    dB, x = expect(strip(dBx, *COPIES), "mul").args
    x = broadcast_source(x, "x", (4, 3, 2))
    dB_dt, b_heads = expect(strip(dB, *COPIES), "mul").args
    if broadcast_source(dB_dt, "dt", (4, 3, 2)) is not dt:
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"{dB} does not multiply the dt of the decay")

    readers = [user for user in _readers(state) if op_name(user) not in _STORES]
    if len(readers) != 1:
        raise NoMatchError(SkipReason.SECOND_READER, f"the new state is read by {readers}, expected one product")
    expect(readers[0], "bmm")
    C = _by_group(readers[0].args[1])
    y, D = _match_output(readers[0], x)
    return _checked(StepMatch(x, match_time_step(dt, head_axis=2), A, _by_group(b_heads), C, D, y))


_STORES = ("copy_", "qmamba.quantize_state_")


def _readers(node: fx.Node) -> list[fx.Node]:
    """Users of a value behind casts and views."""
    found: list[fx.Node] = []
    for user in node.users:
        found.extend(_readers(user) if op_name(user) in (*COPIES, "view", "reshape") else [user])
    return found


def _by_group(node: Any) -> fx.Node:
    """B or C [b, g, n]: the tensor that was expanded from groups to heads."""
    node = strip(node, *COPIES, "reshape", "view", "unsqueeze")
    expanded = expect(node, "expand")
    grouped = strip(expanded.args[0], *COPIES)  # [b, g, 1, n]
    source = strip(expect(grouped, "reshape", "view", "unsqueeze").args[0], *COPIES)
    if len(shape_of(source)) != 3 or len(shape_of(grouped)) != 4 or shape_of(grouped)[2] != 1:
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"{source} has shape {list(shape_of(source))}, not [b, g, n]")
    return source


def _match_output(product: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    y = expect(only_user(product), "view", "reshape")
    skips = users(y, "add")
    if len(y.users) != 1 or not skips:
        return y, None
    residual = expect(next(item for item in skips[0].args if item is not y), "mul")
    factors = [item for item in residual.args if strip(item, *COPIES) is not x]
    if len(factors) != 1:
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"{residual} does not multiply x by D")
    return skips[0], broadcast_source(factors[0], "D", (2,))


def _checked(match: StepMatch) -> StepMatch:
    batch, nheads = shape_of(match.x)[:2]
    for name, node in {"A": match.A, "D": match.D, "dt_bias": match.time.dt_bias}.items():
        if node is not None and shape_of(node) != (nheads,):
            raise NoMatchError(SkipReason.NOT_PER_HEAD, f"{name} has shape {list(shape_of(node))}, expected [{nheads}]")
    dt = strip(match.time.dt, *COPIES, "expand")
    shape = shape_of(dt)
    if len(shape) != 3 or shape[1:] != (nheads, 1) or not same_size(shape[0], batch):
        raise NoMatchError(SkipReason.NOT_PER_HEAD, f"dt has shape {list(shape)}, expected [b, {nheads}, 1]")
    # What softplus gives is positive, so a lower limit of zero does nothing then.
    no_limit = (0, -math.inf) if match.time.softplus else (-math.inf,)
    if match.time.minimum not in no_limit or match.time.maximum != math.inf:
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, "the step limits dt; the fused kernel does not")
    return dataclasses.replace(match, time=dataclasses.replace(match.time, dt=dt))
