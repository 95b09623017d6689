from __future__ import annotations

import dataclasses

import torch
from torch import fx

from ..errors import SkipReason
from ..fx_utils import (
    CASTS,
    argument,
    in_dtype_of,
    insert_call,
    iter_calls,
    layer_of,
    op_name,
    replace_node,
    shape_of,
    strip,
)
from ..report import Report
from .base import GraphPass, NoMatchError
from .match_conv import activation_of, match_depthwise, only_slice


@dataclasses.dataclass(frozen=True)
class ConvMatch:
    """One step of a causal convolution.

    Attributes:
        x: the new inputs [b, d, 1]; weight: [d, 1, d_conv]; bias: [d] or None.
        y: [b, d, 1], behind silu when ``silu``.
    """

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    silu: bool
    y: fx.Node


class FuseConvUpdate(GraphPass):
    """Make the causal convolution of a decode step one operator that shifts its state in place.

    Left alone, a step joins state and input in memory, copies all but the oldest column back, and convolves a window of
    five columns to throw one of two results away.

    Before:
        window = cat([conv_state, xBC], -1)
        conv_state.copy_(window[:, :, -d_conv:])
        y = silu(conv1d(window, weight, bias, groups=d)[:, :, -1:])
    After:
        y = qmamba.conv_update(conv_state, xBC, weight, bias, silu)

    Refuses: several new tokens, a window or state that is read elsewhere, a convolution that is not depthwise.
    """

    def rewrite(self, graph: fx.Graph, report: Report) -> None:
        for store in iter_calls(graph, "copy_"):
            conv_state = store.args[0]
            # A prefill stores inputs of the whole prompt, an SSM state is no window: other copies are no anchors.
            if op_name(conv_state) != "placeholder" or _window_of(store) is None:
                continue
            layer = layer_of(store)
            try:
                match = match_conv_update(store)
            except NoMatchError as refusal:
                report.skipped(layer, refusal.reason, refusal.detail)
                continue
            operands = (conv_state, match.x, match.weight, match.bias, match.silu)
            y = insert_call(match.y, torch.ops.qmamba.conv_update.default, *operands)
            replace_node(match.y, in_dtype_of(match.y, y))  # other than the operands' under autocast
            graph.erase_node(store)
            report.rewrote(layer, f"{shape_of(match.weight)[-1]} taps")


def match_conv_update(store: fx.Node) -> ConvMatch:
    """Name the parts of the step that stores a window of inputs by ``store``.

    Raises:
        NoMatchError: an operation is missing, one more is there, or a value is read elsewhere.
    """
    conv_state, window = store.args[0], _window_of(store)
    assert window is not None
    joined = strip(window, *CASTS)
    xBC = joined.args[0][1]
    if shape_of(xBC)[-1] != 1:
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"{xBC} has {shape_of(xBC)[-1]} new tokens, expected one")
    if store.users or set(conv_state.users) != {store, joined}:
        raise NoMatchError(SkipReason.SECOND_READER, f"{conv_state} is read elsewhere")
    stored = strip(store.args[1], *CASTS)
    convolutions = [user for user in window.users if user is not stored]
    if len(convolutions) != 1 or len(stored.users) != 1 or (window is not joined and len(joined.users) != 1):
        raise NoMatchError(SkipReason.SECOND_READER, f"{window} has {len(window.users)} readers, expected two")
    conv = match_depthwise(convolutions[0])
    if conv is None or conv.padding:
        found = f"{op_name(convolutions[0])} ({convolutions[0]})"
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"expected a depthwise conv1d without padding, found {found}")
    if shape_of(conv.weight)[0] != shape_of(conv_state)[1] or conv.taps > shape_of(conv_state)[-1] + 1:
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"{conv.weight} has shape {list(shape_of(conv.weight))}")
    y = only_slice(convolutions[0])
    if y.args[1] != (slice(None), slice(None), slice(-1, None, None)):
        raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"{y} does not take the last result")
    activation = activation_of(y)
    return ConvMatch(xBC, conv.weight, conv.bias, activation is not None, y if activation is None else activation)


def _window_of(store: fx.Node) -> fx.Node | None:
    """``cat([conv_state, xBC], -1)``, cast or not, whose last columns ``store`` writes back to ``conv_state``."""
    state, stored = store.args[0], strip(store.args[1], *CASTS)
    if op_name(stored) != "getitem" or len(shape_of(state)) != 3:
        return None
    window, index = stored.args
    joined = strip(window, *CASTS)
    if op_name(joined) != "cat" or len(joined.args[0]) != 2 or joined.args[0][0] is not state:
        return None
    if argument(joined, 1, "dim", 0) not in (-1, 2):
        return None
    latest = (slice(None), slice(None), slice(-shape_of(state)[-1], None, None))
    return window if index == latest else None
