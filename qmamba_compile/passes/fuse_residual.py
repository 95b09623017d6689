from __future__ import annotations

from typing import Any

from torch import fx

from ..errors import SkipReason
from ..fx_utils import (
    argument,
    insert_call,
    iter_calls,
    layer_of,
    op_name,
    replace_node,
    same_shape,
    shape_of,
    value_of,
    written_between,
)
from ..quant import FLOATS
from ..report import Report
from .base import GraphPass

_LINEARS = {"qmamba.w8a8_linear": 6, "qmamba.norm_w8a8_linear": 10}
"""Operands of a linear in front of its residual."""


class FuseResidual(GraphPass):
    """Add a block's input to the output of its last linear where that is made.

    Left alone, the sum is a kernel of its own in every block. Of a residual stream in float32 of which 16 bits are read
    Inductor even keeps only those, and adds up the outputs of several blocks anew in each.

    Before:
        y = qmamba.norm_w8a8_linear(x, ..., act_scale)
        h = residual + y
    After:
        h = qmamba.norm_w8a8_linear(x, ..., act_scale, residual)

    Refuses: writes in place between the linear and the sum, where the linear then runs.
    """

    def rewrite(self, graph: fx.Graph, report: Report) -> None:
        for total in iter_calls(graph, "add"):
            linear, residual = _linear_operand(total)
            if linear is None:
                continue
            if written := written_between(linear, total):
                detail = f"{written} writes in place between {linear} and {total}"
                report.skipped(layer_of(linear), SkipReason.SECOND_READER, detail)
                continue
            operands = linear.args[: _LINEARS[op_name(linear)]]
            h = insert_call(total, linear.target, *operands, residual, *linear.args[len(operands) + 1 :])
            h.meta["qmamba_layer"] = layer_of(linear)
            replace_node(total, h)
            report.rewrote(layer_of(linear), "residual")


def _linear_operand(total: fx.Node) -> tuple[fx.Node | None, Any]:
    """The int8 linear that only a sum reads, which adds it to another tensor of its shape, and that tensor."""
    if len(total.args) == 2 and not total.kwargs:
        for linear, other in (total.args, total.args[::-1]):
            if (
                op_name(linear) in _LINEARS
                and other is not linear
                and len(linear.users) == 1
                and argument(linear, _LINEARS[op_name(linear)], "residual") is None
                and _same_kind(linear, other, total)
            ):
                return linear, other
    return None, None


def _same_kind(linear: fx.Node, other: Any, total: fx.Node) -> bool:
    shape = shape_of(linear)
    return (
        isinstance(other, fx.Node)
        and len(shape) > 0
        and all(same_shape(shape_of(node), shape) for node in (other, total))
        and value_of(other).dtype in FLOATS
    )
