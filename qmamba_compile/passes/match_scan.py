"""What a Mamba2 scan looks like in a Dynamo graph: from its anchor to named nodes.

It is built from five einsums (Mamba2's SSD): scores, values, chunk states, carry, read-out.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

from torch import fx

from ..errors import SkipReason
from ..fx_utils import COPIES, ancestors, argument, iter_calls, layer_of, op_name, same_shape, shape_of, strip, users
from .base import NoMatchError
from .match_recurrence import (
    TimeStep,
    broadcast_path,
    broadcast_source,
    expect,
    full_index,
    match_time_step,
    only_user,
)

_SHAPES = ("reshape", "view", "pad", "repeat_interleave", "expand", "permute", "transpose", "unsqueeze")


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
        found = f"{op_name(node)} ({node})" if isinstance(node, fx.Node) else "none"
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"expected einsum {equation}, found {found}")
    return node.args[1], node.args[2]


def scan_anchors(graph: fx.Graph) -> list[fx.Node]:
    """The einsum of each scan that carries states from chunk to chunk."""
    return [node for node in graph.nodes if _is_einsum(node, _CARRY)]


def scan_layers(graph: fx.Graph) -> set[str]:
    """Module paths of the layers whose scan, fused or not, this graph holds."""
    return {layer_of(node) for node in (*scan_anchors(graph), *iter_calls(graph, "qmamba.chunk_scan"))}


def final_state_of(anchor: fx.Node) -> fx.Node | None:
    """``new_states[:, -1]`` of a scan's carry."""
    for user in users(anchor, "getitem") if _is_einsum(anchor, _CARRY) else ():
        if user.args[1] == (slice(None), -1):
            return user
    return None


def is_final_state(node: Any) -> bool:
    """True for the final state of a scan, fused or not."""
    if op_name(node) != "getitem" or not isinstance(node.args[0], fx.Node):
        return False
    source, index = node.args
    return (op_name(source), index) == ("qmamba.chunk_scan", 1) or final_state_of(source) is node


def match_scan(anchor: fx.Node) -> ScanMatch:
    """Name the parts of the scan around its carry einsum.

    Raises:
        NoMatchError: an operation is missing, or one more than the algorithm has.
    """
    _, all_states = _einsum(anchor, _CARRY)
    joined = expect(all_states, "cat").args[0]
    if len(joined) != 2:
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"{all_states} joins {len(joined)} tensors, expected two")
    previous, chunk_states = joined[0], joined[1]
    initial_state = None if op_name(previous) == "zeros_like" else _initial_state(previous)
    b_decay, x_chunks = _einsum(chunk_states, _CHUNK_STATES)
    decay, b_chunks = _operand(expect(b_decay, "mul"), "exp")
    x_scaled = expect(strip(x_chunks, *COPIES, "reshape", "pad"), "mul")
    x, dt = strip(x_scaled.args[0], *COPIES), broadcast_source(x_scaled.args[1], "dt", (4, 3, 2))

    starts = [user for user in users(anchor, "getitem") if user.args[1] == (slice(None), slice(None, -1, None))]
    read_outs = [user for start in starts for user in start.users if _is_einsum(user, _READ_OUT)]
    if len(read_outs) != 1:
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"{anchor} has {len(read_outs)} read-outs, expected one")
    c_chunks, _ = _einsum(read_outs[0], _READ_OUT)
    y_off = expect(only_user(read_outs[0]), "mul")
    total = expect(only_user(y_off), "add")
    y_diag = total.args[0] if total.args[1] is y_off else total.args[1]
    scores_masked, _ = _einsum(y_diag, _VALUES)
    scores = next((item for item in expect(scores_masked, "mul").args if _is_einsum(item, _SCORES)), None)
    if _einsum(scores, _SCORES) != (c_chunks, b_chunks):
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"{scores} does not contract the C and B of {anchor}")

    cumsum = expect(strip(expect(decay.args[0], "sub").args[1], *COPIES), "cumsum")
    dA = expect(strip(cumsum.args[0], *COPIES, "permute", "reshape", "pad"), "mul")
    dA_dt = next((item for item in dA.args if strip(item, *COPIES) is dt), None)
    if dA_dt is None:
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"{dA} does not multiply the dt that scales x")
    A = strip(dA.args[0] if dA.args[1] is dA_dt else dA.args[1], *COPIES)
    y, D = _match_output(total, x)
    time = match_time_step(dt, head_axis=1)
    match = ScanMatch(
        x=x,
        time=time,
        A=A,
        B=strip(b_chunks, *COPIES, "reshape", "pad", "repeat_interleave"),
        C=strip(c_chunks, *COPIES, "reshape", "pad", "repeat_interleave"),
        D=D,
        initial_state=initial_state,
        y=y,
        final_state=final_state_of(anchor),
    )
    _check_shapes(match)
    _check_census(match)
    return match


def _operand(node: fx.Node, *names: str) -> tuple[fx.Node, Any]:
    """The operand of a commutative ``node`` that is one of ``names`` below casts and shapes, and the other operand."""
    for this, other in (node.args, reversed(node.args)):
        stripped = strip(this, *COPIES, *_SHAPES, "getitem")
        if op_name(stripped) in names:
            return stripped, other
    raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"expected {' or '.join(names)} as an operand of {node}")


def _initial_state(previous: fx.Node) -> fx.Node:
    """The state [b, h, p, n] behind the first of the carried states [b, 1, h, p, n]."""
    state, _ = broadcast_path(previous)
    shape, carried = shape_of(state), shape_of(previous)
    if len(shape) != 4 or not same_shape(shape, (carried[0], *carried[2:])):
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"the initial state has shape {list(shape)}, not [b, h, p, n]")
    return state


def _match_output(total: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """Walk from ``y_diag + y_off`` to the scan's result [b, l, h, p]: back to a sequence, D skip, padding cut off."""
    y, D = total, None
    while op_name(y) != "reshape":
        y = expect(only_user(y), *COPIES, "reshape")
    skips = users(y, "add")
    if len(y.users) == 1 and skips:
        skip = skips[0]
        residual = expect(skip.args[0] if skip.args[1] is y else skip.args[1], "mul")
        D, padded = broadcast_source(residual.args[0], "D", (2,)), residual.args[1]
        if strip(padded, *COPIES, "pad") is not x:
            raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"{residual} does not multiply x by D")
        y = skip
    cuts = users(y, "getitem")
    if len(y.users) == 1 and cuts:
        y = cuts[0]
        cut = full_index(y.args[1], 4)
        if cut[0] != slice(None) or cut[1].start not in (None, 0) or cut[2:] != [slice(None)] * 2:
            raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"{y} does not cut the padding off the end")
    if len(shape_of(y)) != 4 or shape_of(y)[1] != shape_of(x)[1]:
        raise NoMatchError(
            SkipReason.UNKNOWN_STRUCTURE, f"{y} has shape {list(shape_of(y))}, expected that of x {list(shape_of(x))}"
        )
    return y, D


def _check_shapes(match: ScanMatch) -> None:
    nheads = shape_of(match.x)[2]
    expected = {"dt": (match.time.dt, 3), "A": (match.A, 1), "B": (match.B, 4), "C": (match.C, 4)}
    if match.D is not None:
        expected["D"] = (match.D, 1)
    if match.time.dt_bias is not None:
        expected["dt_bias"] = (match.time.dt_bias, 1)
    for name, (node, rank) in expected.items():
        shape = shape_of(node)
        if len(shape) != rank or (name not in ("B", "C") and shape[-1] != nheads):
            raise NoMatchError(SkipReason.NOT_PER_HEAD, f"{name} has shape {list(shape)} with {nheads} heads")


_LAYOUT = {*COPIES, *_SHAPES, "getitem", "ones", "zeros_like", "tril", "invert"}
"""Operations of the scan that compute nothing, and those that make its triangular masks."""


def _check_census(match: ScanMatch) -> None:
    """Refuse a region that computes anything beside the algorithm: count its arithmetic between inputs and results."""
    inputs = {match.x, match.time.dt, match.A, match.B, match.C, match.D, match.time.dt_bias, match.initial_state}
    stop = {node for node in inputs if node is not None}
    roots = [match.y] + ([match.final_state] if match.final_state is not None else [])
    region = ancestors(roots, stop)
    if any(node.op == "placeholder" and len(shape_of(node)) > 0 for node in region):
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, "the region reads an input that the algorithm does not have")
    # Sizes are computed by the same operators; only those that yield tensors count.
    tensors = [node for node in region if len(shape_of(node)) > 0]
    found = collections.Counter(_spelled(node) for node in tensors if op_name(node) not in _LAYOUT - {"tril"})
    clamps = found.pop("clamp", 0) + found.pop("clip", 0)
    skip = match.D is not None
    expected = {"einsum": 5, "exp": 4, "cumsum": 3, "sub": 1, "mul": 5 + skip, "cat": 1}
    expected |= {"tril(-1)": 2, "tril(0)": 2, "masked_fill(0)": 2, "masked_fill(-inf)": 2}
    expected["add"] = 1 + skip + (match.time.dt_bias is not None)
    if match.time.softplus:
        expected["softplus"] = 1
    if found != expected or clamps > 1:
        surplus = {name: (found[name], expected.get(name, 0)) for name in {*found, *expected}}
        wrong = ", ".join(f"{n}: {f} not {e}" for n, (f, e) in sorted(surplus.items()) if f != e)
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"arithmetic differs from the scan's: {wrong}")


def _spelled(node: fx.Node) -> str:
    """An operation's name, with the constant that decides what it means."""
    name = op_name(node)
    if name == "tril":
        return f"tril({argument(node, 1, 'diagonal', 0)})"
    if name == "masked_fill":
        return f"masked_fill({argument(node, 2, 'value')})"
    return f"{name}(alpha)" if "alpha" in node.kwargs else name
