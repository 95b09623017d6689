"""What a Mamba2 scan and a Mamba2 step look like in a Dynamo graph: pure functions from an anchor node to named nodes.

Families of transformers share two functions, whatever the file they live in: a scan built from five einsums
(Mamba2's SSD: scores, values, chunk states, carry, read-out) and a step that ends in an in-place copy of the new
state. Both are found by these operations and by shapes, never by names of variables, modules or files.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Any

from torch import fx

from ..errors import SkipReason
from ..fx_utils import ancestors, argument, op_name, shape_of, strip, users

_CASTS = ("to", "float", "type_as", "contiguous")
_SHAPES = ("reshape", "view", "pad", "repeat_interleave", "expand", "permute", "transpose", "unsqueeze")


class NoMatchError(Exception):
    """The operations around an anchor are not the expected ones."""

    def __init__(self, reason: SkipReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def _expect(node: Any, *names: str) -> fx.Node:
    if op_name(node) not in names:
        found = op_name(node) or repr(node)
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"expected {' or '.join(names)}, found {found} ({node})")
    return node


def _operand(node: fx.Node, *names: str) -> tuple[fx.Node, Any]:
    """The operand of a commutative ``node`` that is one of ``names`` below casts and shapes, and the other operand."""
    for this, other in (node.args, reversed(node.args)):
        stripped = strip(this, *_CASTS, *_SHAPES, "getitem")
        if op_name(stripped) in names:
            return stripped, other
    raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"expected {' or '.join(names)} as an operand of {node}")


def _canonical(equation: str) -> str:
    """An einsum equation with its letters renamed by first appearance."""
    names: dict[str, str] = {}
    return "".join(names.setdefault(c, chr(97 + len(names))) if c.isalpha() else c for c in equation.replace(" ", ""))


_SCORES = _canonical("bclhn,bcshn->bclsh")
_VALUES = _canonical("bclsh,bcshp->bclhp")
_CHUNK_STATES = _canonical("bclhn,bclhp->bchpn")
_CARRY = _canonical("bzch,bzhpn->bchpn")
_READ_OUT = _canonical("bclhn,bchpn->bclhp")


def _is_einsum(node: Any, equation: str) -> bool:
    return op_name(node) == "einsum" and isinstance(node.args[0], str) and _canonical(node.args[0]) == equation


def _einsum(node: Any, equation: str) -> tuple[Any, Any]:
    if not _is_einsum(node, equation):
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"expected einsum {equation}, found {op_name(node)} ({node})")
    return node.args[1], node.args[2]


def _is_none_index(node: fx.Node) -> bool:
    """True for ``t[..., None]`` and the like: indexing that only adds dimensions of size one."""
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(item is None or item is Ellipsis or item == slice(None) for item in index)


def _strip_broadcast(node: Any) -> Any:
    """Walk back through casts, expand and added dimensions of size one."""
    while op_name(node) in (*_CASTS, "expand", "unsqueeze") or (op_name(node) == "getitem" and _is_none_index(node)):
        node = node.args[0]
    return node


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


def _match_time_step(node: Any) -> TimeStep:
    minimum, maximum, softplus, dt_bias = 0.0, math.inf, False, None
    node = strip(node, *_CASTS)
    if op_name(node) in ("clamp", "clip"):
        low, high = argument(node, 1, "min"), argument(node, 2, "max")
        minimum, maximum = (-math.inf if low is None else low), (math.inf if high is None else high)
        node = strip(node.args[0], *_CASTS)
    elif op_name(node) != "softplus":
        minimum = -math.inf
    if op_name(node) == "softplus":
        if argument(node, 1, "beta", 1) != 1 or argument(node, 2, "threshold", 20) != 20:
            raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"softplus with beta or threshold of its own ({node})")
        softplus = True
        node = strip(node.args[0], *_CASTS)
        if op_name(node) == "add" and all(isinstance(item, fx.Node) for item in node.args):
            node, dt_bias = node.args[0], _strip_broadcast(node.args[1])
            if len(shape_of(dt_bias)) != 1:
                raise NoMatchError(SkipReason.NOT_PER_HEAD, f"dt_bias has shape {list(shape_of(dt_bias))}")
    return TimeStep(node, dt_bias, softplus, float(minimum), float(maximum))


# --- prefill -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ScanMatch:
    """One chunked scan: inputs, and the two results that the rest of the graph reads.

    Attributes:
        x: [b, l, h, p]; time: dt [b, l, h]; A, D: [h]; B, C: [b, l, g, n]; initial_state: [b, h, p, n] or None.
        y: float32 [b, l, h, p]; final_state: [b, h, p, n], None when nothing reads it.
    """

    x: fx.Node
    time: TimeStep
    A: fx.Node
    B: fx.Node
    C: fx.Node
    D: fx.Node | None
    initial_state: fx.Node | None
    y: fx.Node
    final_state: fx.Node | None


def scan_anchors(graph: fx.Graph) -> list[fx.Node]:
    """The einsum of each scan that carries states from chunk to chunk."""
    return [node for node in graph.nodes if _is_einsum(node, _CARRY)]


def final_state_of(anchor: fx.Node) -> fx.Node | None:
    """``new_states[:, -1]`` of a scan's carry."""
    for user in users(anchor, "getitem"):
        if user.args[1] == (slice(None), -1):
            return user
    return None


def match_scan(anchor: fx.Node) -> ScanMatch:
    """Name the parts of the scan around its carry einsum.

    Raises:
        NoMatchError: an operation is missing, or one more than the algorithm has.
    """
    _, all_states = _einsum(anchor, _CARRY)
    previous, chunk_states = _expect(all_states, "cat").args[0]
    initial_state = None if op_name(previous) == "zeros_like" else _strip_broadcast(previous)
    b_decay, x_chunks = _einsum(chunk_states, _CHUNK_STATES)
    decay, b_chunks = _operand(_expect(b_decay, "mul"), "exp")
    x_scaled = _expect(strip(x_chunks, *_CASTS, "reshape", "pad"), "mul")
    x, dt = strip(x_scaled.args[0], *_CASTS), _strip_broadcast(x_scaled.args[1])

    starts = [user for user in users(anchor, "getitem") if user.args[1] == (slice(None), slice(None, -1, None))]
    read_outs = [user for start in starts for user in start.users if _is_einsum(user, _READ_OUT)]
    if len(read_outs) != 1:
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"{anchor} has {len(read_outs)} read-outs, expected one")
    c_chunks, _ = _einsum(read_outs[0], _READ_OUT)
    y_off = _expect(_only_user(read_outs[0]), "mul")
    total = _expect(_only_user(y_off), "add")
    y_diag = total.args[0] if total.args[1] is y_off else total.args[1]
    scores_masked, _ = _einsum(y_diag, _VALUES)
    scores = next((item for item in _expect(scores_masked, "mul").args if _is_einsum(item, _SCORES)), None)
    if _einsum(scores, _SCORES) != (c_chunks, b_chunks):
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"{scores} does not contract the C and B of {anchor}")

    cumsum = _expect(strip(_expect(decay.args[0], "sub").args[1], *_CASTS), "cumsum")
    dA = _expect(strip(cumsum.args[0], *_CASTS, "permute", "reshape", "pad"), "mul")
    dA_dt = next((item for item in dA.args if strip(item, *_CASTS) is dt), None)
    if dA_dt is None:
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"{dA} does not multiply the dt that scales x")
    A = strip(dA.args[0] if dA.args[1] is dA_dt else dA.args[1], *_CASTS)
    y, D = _match_scan_output(total, x)
    time = _match_time_step(dt)
    match = ScanMatch(
        x=x,
        time=time,
        A=A,
        B=strip(b_chunks, *_CASTS, "reshape", "pad", "repeat_interleave"),
        C=strip(c_chunks, *_CASTS, "reshape", "pad", "repeat_interleave"),
        D=D,
        initial_state=initial_state,
        y=y,
        final_state=final_state_of(anchor),
    )
    _check_scan_shapes(match)
    _check_scan_census(match)
    return match


def _only_user(node: fx.Node) -> fx.Node:
    if len(node.users) != 1:
        raise NoMatchError(SkipReason.SECOND_READER, f"{node} has {len(node.users)} readers, expected one")
    return next(iter(node.users))


def _match_scan_output(total: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """Walk from ``y_diag + y_off`` to the scan's result [b, l, h, p]: back to a sequence, D skip, padding cut off."""
    y, D = total, None
    while op_name(y) != "reshape":
        y = _expect(_only_user(y), *_CASTS, "reshape")
    skips = users(y, "add")
    if len(y.users) == 1 and skips:
        skip = skips[0]
        residual = _expect(skip.args[0] if skip.args[1] is y else skip.args[1], "mul")
        D, padded = _strip_broadcast(residual.args[0]), residual.args[1]
        if strip(padded, *_CASTS, "pad") is not x:
            raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"{residual} does not multiply x by D")
        y = skip
    cuts = users(y, "getitem")
    if len(y.users) == 1 and cuts:
        y = cuts[0]
    if len(shape_of(y)) != 4 or shape_of(y)[1] != shape_of(x)[1]:
        raise NoMatchError(
            SkipReason.UNKNOWN_STRUCTURE, f"{y} has shape {list(shape_of(y))}, expected that of x {list(shape_of(x))}"
        )
    return y, D


def _check_scan_shapes(match: ScanMatch) -> None:
    nheads = shape_of(match.x)[2]
    expected = {"dt": (match.time.dt, 3), "A": (match.A, 1), "B": (match.B, 4), "C": (match.C, 4)}
    if match.D is not None:
        expected["D"] = (match.D, 1)
    for name, (node, rank) in expected.items():
        shape = shape_of(node)
        if len(shape) != rank or (name in ("dt", "A", "D") and shape[-1] != nheads):
            raise NoMatchError(SkipReason.NOT_PER_HEAD, f"{name} has shape {list(shape)} with {nheads} heads")


_ARITHMETIC = frozenset(
    "einsum exp cumsum sub mul add softplus clamp clip masked_fill cat matmul bmm div neg softmax silu pow".split()
)


def _check_scan_census(match: ScanMatch) -> None:
    """Refuse a region that computes anything beside the algorithm: count its arithmetic between inputs and results."""
    inputs = {match.x, match.time.dt, match.A, match.B, match.C, match.D, match.time.dt_bias, match.initial_state}
    stop = {node for node in inputs if node is not None}
    roots = [match.y] + ([match.final_state] if match.final_state is not None else [])
    region = ancestors(roots, stop)
    if any(node.op == "placeholder" and len(shape_of(node)) > 0 for node in region):
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, "the region reads an input that the algorithm does not have")
    found = collections.Counter(op_name(node) for node in region if _is_tensor_arithmetic(node))
    clamps = found.pop("clamp", 0) + found.pop("clip", 0)
    skip = match.D is not None
    expected = {"einsum": 5, "exp": 4, "cumsum": 3, "sub": 1, "mul": 5 + skip, "masked_fill": 4, "cat": 1}
    expected["add"] = 1 + skip + (match.time.dt_bias is not None)
    if match.time.softplus:
        expected["softplus"] = 1
    if found != expected or clamps > 1:
        surplus = {name: (found[name], expected.get(name, 0)) for name in {*found, *expected}}
        wrong = ", ".join(f"{n}: {f} not {e}" for n, (f, e) in sorted(surplus.items()) if f != e)
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"arithmetic differs from the scan's: {wrong}")


def _is_tensor_arithmetic(node: fx.Node) -> bool:
    # Sizes are computed by the same operators; only those that yield tensors count.
    return op_name(node) in _ARITHMETIC and len(shape_of(node)) > 0


# --- decode --------------------------------------------------------------------------------------------------------


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
    """True when ``new_state`` is ``old_state * exp(..) + ..``, whatever surrounds it."""
    total = strip(new_state, *_CASTS)
    if op_name(total) != "add":
        return False
    products = [item for item in total.args if op_name(item) == "mul"]
    return any(strip(factor, *_CASTS) is old_state for product in products for factor in product.args)


def match_step(new_state: Any, old_state: fx.Node) -> StepMatch:
    """Name the parts of the step that makes ``new_state`` from ``old_state``.

    Raises:
        NoMatchError: an operation is missing, or dt, A, D or dt_bias is not one number a head.
    """
    state = _expect(strip(new_state, *_CASTS), "add")
    decayed, dBx = state.args
    if not any(strip(item, *_CASTS) is old_state for item in getattr(decayed, "args", ())):
        decayed, dBx = dBx, decayed
    _expect(decayed, "mul")
    dA = next((item for item in decayed.args if strip(item, *_CASTS) is not old_state), None)
    exponent = _expect(_expect(strip(dA, *_CASTS), "exp").args[0], "mul")
    dt, A = _strip_broadcast(exponent.args[0]), _strip_broadcast(exponent.args[1])

    dB, x = _expect(strip(dBx, *_CASTS), "mul").args
    x = _strip_broadcast(x)
    dB_dt, b_heads = _expect(strip(dB, *_CASTS), "mul").args
    if _strip_broadcast(dB_dt) is not dt:
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"{dB} does not multiply the dt of the decay")

    readers = [user for user in _readers(state) if op_name(user) == "bmm"]
    if len(readers) != 1:
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"{state} is read by {len(readers)} products, expected one")
    C = strip(readers[0].args[1], *_CASTS, *_SHAPES)
    y, D = _match_step_output(readers[0], x)
    match = StepMatch(x, _match_time_step(dt), A, strip(b_heads, *_CASTS, *_SHAPES), C, D, y)
    # Splitting and viewing happen before B and C reach the step; take them where they have their own shape.
    match = dataclasses.replace(match, B=_by_group(b_heads), C=_by_group(readers[0].args[1]))
    return _checked_step(match)


def _readers(node: fx.Node) -> list[fx.Node]:
    """Users of a value behind casts and views."""
    found: list[fx.Node] = []
    for user in node.users:
        found.extend(_readers(user) if op_name(user) in (*_CASTS, "view", "reshape") else [user])
    return found


def _by_group(node: Any) -> fx.Node:
    """B or C [b, g, n]: the tensor that was expanded from groups to heads."""
    node = strip(node, *_CASTS, "reshape", "view", "unsqueeze")
    expanded = _expect(node, "expand")
    grouped = strip(expanded.args[0], *_CASTS)  # [b, g, 1, n]
    source = strip(_expect(grouped, "reshape", "view", "unsqueeze").args[0], *_CASTS)
    if len(shape_of(source)) != 3:
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"{source} has shape {list(shape_of(source))}, not [b, g, n]")
    return source


def _match_step_output(product: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    y = _expect(_only_user(product), "view", "reshape")
    skips = users(y, "add")
    if len(y.users) != 1 or not skips:
        return y, None
    residual = _expect(next(item for item in skips[0].args if item is not y), "mul")
    factor = next((item for item in residual.args if strip(item, *_CASTS) is not x), None)
    D = _strip_broadcast(factor)
    if len(shape_of(D)) != 1:
        raise NoMatchError(SkipReason.NOT_PER_HEAD, f"D has shape {list(shape_of(D))}")
    return skips[0], D


def _checked_step(match: StepMatch) -> StepMatch:
    nheads = shape_of(match.x)[1]
    if len(shape_of(match.A)) != 1 or shape_of(match.A)[0] != nheads:
        raise NoMatchError(SkipReason.NOT_PER_HEAD, f"A has shape {list(shape_of(match.A))}, expected [{nheads}]")
    dt = strip(match.time.dt, *_CASTS, "expand")
    shape = shape_of(dt)
    if len(shape) != 3 or shape[1] != nheads or shape[2] != 1:
        raise NoMatchError(SkipReason.NOT_PER_HEAD, f"dt has shape {list(shape)}, expected [b, {nheads}, 1]")
    if match.time.minimum > 0 or match.time.maximum != math.inf:
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, "the step limits dt; the fused kernel does not")
    return dataclasses.replace(match, time=dataclasses.replace(match.time, dt=dt))
