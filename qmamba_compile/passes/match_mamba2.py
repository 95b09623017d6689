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

from torch import Tensor, fx

from ..errors import SkipReason
from ..fx_utils import ancestors, argument, iter_calls, layer_of, op_name, same_size, shape_of, strip, users, value_of
from .base import NoMatchError

_CASTS = ("to", "float", "type_as", "contiguous")
_SHAPES = ("reshape", "view", "pad", "repeat_interleave", "expand", "permute", "transpose", "unsqueeze")


def _expect(node: Any, *names: str) -> fx.Node:
    if op_name(node) not in names:
        found = op_name(node) or repr(node)
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"expected {' or '.join(names)}, found {found} ({node})")
    if "alpha" in node.kwargs:
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"{node} scales what it adds by alpha")
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
        found = f"{op_name(node)} ({node})" if isinstance(node, fx.Node) else "none"
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"expected einsum {equation}, found {found}")
    return node.args[1], node.args[2]


def _is_none_index(node: fx.Node) -> bool:
    """True for ``t[..., None]`` and the like: indexing that only adds dimensions of size one."""
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(item is None or item is Ellipsis or item == slice(None) for item in index)


def _broadcast_path(node: Any) -> tuple[Any, list[fx.Node]]:
    """Walk back through casts, expand and added dimensions of size one: where that ends, and the way, first to last."""
    path: list[fx.Node] = []
    while _broadcasts(node):
        path.insert(0, node)
        node = node.args[0]
    return node, path


def _broadcasts(node: Any) -> bool:
    if op_name(node) in (*_CASTS, "expand", "unsqueeze"):
        return value_of(node).is_floating_point()
    return op_name(node) == "getitem" and _is_none_index(node)


def _broadcast_source(node: Any, name: str, axes: tuple[int, ...]) -> fx.Node:
    """What ``node`` was broadcast from, when its dimensions lie along ``axes`` of the result, counted from the right.

    Shapes alone do not tell a value per head from one per channel when there are as many channels as heads.
    """
    source, path = _broadcast_path(node)
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
            kept = [place for place, item in enumerate(_full_index(step.args[1], rank)) if item is not None]
            places = [kept[place] for place in places]
        rank = len(shape_of(step))
    if tuple(rank - place for place in places) != axes:
        raise NoMatchError(SkipReason.NOT_PER_HEAD, f"{name} has shape {list(shape_of(source))}, broadcast by {node}")
    return source


def _full_index(index: Any, rank: int) -> list[Any]:
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


def _match_time_step(node: Any, head_axis: int) -> TimeStep:
    """Walk back from the dt that the recurrence uses; heads lie along ``head_axis``, counted from the right."""
    minimum, maximum, softplus, dt_bias = 0.0, math.inf, False, None
    node = strip(node, *_CASTS)
    if op_name(node) in ("clamp", "clip"):
        low, high = argument(node, 1, "min"), argument(node, 2, "max")
        minimum, maximum = _number(low, -math.inf), _number(high, math.inf)
        node = strip(node.args[0], *_CASTS)
    elif op_name(node) != "softplus":
        minimum = -math.inf
    if op_name(node) == "softplus":
        if argument(node, 1, "beta", 1) != 1 or argument(node, 2, "threshold", 20) != 20:
            raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"softplus with beta or threshold of its own ({node})")
        softplus = True
        node = strip(node.args[0], *_CASTS)
        if op_name(node) == "add" and all(isinstance(item, fx.Node) for item in node.args) and not node.kwargs:
            node, dt_bias = node.args[0], _broadcast_source(node.args[1], "dt_bias", (head_axis,))
    return TimeStep(node, dt_bias, softplus, minimum, maximum)


def _number(limit: Any, default: float) -> float:
    value = value_of(limit)
    if isinstance(value, Tensor):
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"dt is limited by a tensor ({limit})")
    # With dynamic=True a Python float of the model is a symbol; float() fixes its value and guards on it.
    return default if value is None else float(value)


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
    joined = _expect(all_states, "cat").args[0]
    if len(joined) != 2:
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"{all_states} joins {len(joined)} tensors, expected two")
    previous, chunk_states = joined[0], joined[1]
    initial_state = None if op_name(previous) == "zeros_like" else _initial_state(previous)
    b_decay, x_chunks = _einsum(chunk_states, _CHUNK_STATES)
    decay, b_chunks = _operand(_expect(b_decay, "mul"), "exp")
    x_scaled = _expect(strip(x_chunks, *_CASTS, "reshape", "pad"), "mul")
    x, dt = strip(x_scaled.args[0], *_CASTS), _broadcast_source(x_scaled.args[1], "dt", (4, 3, 2))

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
    time = _match_time_step(dt, head_axis=1)
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


def _initial_state(previous: fx.Node) -> fx.Node:
    """The state [b, h, p, n] behind the first of the carried states [b, 1, h, p, n]."""
    state, _ = _broadcast_path(previous)
    shape, carried = shape_of(state), shape_of(previous)
    if len(shape) != 4 or not all(map(same_size, shape, (carried[0], *carried[2:]))):
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"the initial state has shape {list(shape)}, not [b, h, p, n]")
    return state


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
        D, padded = _broadcast_source(residual.args[0], "D", (2,)), residual.args[1]
        if strip(padded, *_CASTS, "pad") is not x:
            raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"{residual} does not multiply x by D")
        y = skip
    cuts = users(y, "getitem")
    if len(y.users) == 1 and cuts:
        y = cuts[0]
        cut = _full_index(y.args[1], 4)
        if cut[0] != slice(None) or cut[1].start not in (None, 0) or cut[2:] != [slice(None)] * 2:
            raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"{y} does not cut the padding off the end")
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
    if match.time.dt_bias is not None:
        expected["dt_bias"] = (match.time.dt_bias, 1)
    for name, (node, rank) in expected.items():
        shape = shape_of(node)
        if len(shape) != rank or (name not in ("B", "C") and shape[-1] != nheads):
            raise NoMatchError(SkipReason.NOT_PER_HEAD, f"{name} has shape {list(shape)} with {nheads} heads")


_LAYOUT = {*_CASTS, *_SHAPES, "getitem", "ones", "zeros_like", "tril", "invert"}
"""Operations of the scan that compute nothing, and those that make its triangular masks."""


def _check_scan_census(match: ScanMatch) -> None:
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
    dt = _broadcast_source(exponent.args[0], "dt", (4, 3, 2))
    A = _broadcast_source(exponent.args[1], "A", (3,))

    dB, x = _expect(strip(dBx, *_CASTS), "mul").args
    x = _broadcast_source(x, "x", (4, 3, 2))
    dB_dt, b_heads = _expect(strip(dB, *_CASTS), "mul").args
    if _broadcast_source(dB_dt, "dt", (4, 3, 2)) is not dt:
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"{dB} does not multiply the dt of the decay")

    readers = [user for user in _readers(state) if op_name(user) not in _STORES]
    if len(readers) != 1:
        raise NoMatchError(SkipReason.SECOND_READER, f"the new state is read by {readers}, expected one product")
    _expect(readers[0], "bmm")
    C = _by_group(readers[0].args[1])
    y, D = _match_step_output(readers[0], x)
    return _checked_step(StepMatch(x, _match_time_step(dt, head_axis=2), A, _by_group(b_heads), C, D, y))


_STORES = ("copy_", "qmamba.quantize_state_")


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
    if len(shape_of(source)) != 3 or len(shape_of(grouped)) != 4 or shape_of(grouped)[2] != 1:
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"{source} has shape {list(shape_of(source))}, not [b, g, n]")
    return source


def _match_step_output(product: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    y = _expect(_only_user(product), "view", "reshape")
    skips = users(y, "add")
    if len(y.users) != 1 or not skips:
        return y, None
    residual = _expect(next(item for item in skips[0].args if item is not y), "mul")
    factors = [item for item in residual.args if strip(item, *_CASTS) is not x]
    if len(factors) != 1:
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"{residual} does not multiply x by D")
    return skips[0], _broadcast_source(factors[0], "D", (2,))


def _checked_step(match: StepMatch) -> StepMatch:
    batch, nheads = shape_of(match.x)[:2]
    for name, node in {"A": match.A, "D": match.D, "dt_bias": match.time.dt_bias}.items():
        if node is not None and shape_of(node) != (nheads,):
            raise NoMatchError(SkipReason.NOT_PER_HEAD, f"{name} has shape {list(shape_of(node))}, expected [{nheads}]")
    dt = strip(match.time.dt, *_CASTS, "expand")
    shape = shape_of(dt)
    if len(shape) != 3 or shape[1:] != (nheads, 1) or not same_size(shape[0], batch):
        raise NoMatchError(SkipReason.NOT_PER_HEAD, f"dt has shape {list(shape)}, expected [b, {nheads}, 1]")
    # What softplus gives is positive, so a lower limit of zero does nothing then.
    no_limit = (0, -math.inf) if match.time.softplus else (-math.inf,)
    if match.time.minimum not in no_limit or match.time.maximum != math.inf:
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, "the step limits dt; the fused kernel does not")
    return dataclasses.replace(match, time=dataclasses.replace(match.time, dt=dt))
