from __future__ import annotations

import operator

import torch
from torch import fx

from ..errors import SkipReason
from ..fx_utils import insert_call, iter_calls, layer_of, op_name, replace_node, value_of
from ..report import Report
from .base import GraphPass, NoMatchError
from .match_norm import NormMatch, match_norm

_NORM_DISTANCE = 8
"""Operations between an ``rsqrt`` and the linear behind it: product, view, casts, weight, gate, slice."""


class FuseNormLinear(GraphPass):
    """Norm a token where it is quantized: the RMSNorm before an int8 linear becomes the linear's prologue.

    Left alone, the normed activations go to memory and back, and a decode step has two more loops a layer. A gate that
    multiplies what is normed (``x * silu(gate)``, before ``out_proj``) comes along. A norm that several linears read is
    repeated in each, which costs as much as a few rows of their weights.

    Before:
        normed = norm_weight * (x * rsqrt(x.pow(2).mean(-1) + epsilon))
        y = qmamba.w8a8_linear(normed, qdata, scale, bias, act_pre_scale, act_scale)
    After:
        y = qmamba.norm_w8a8_linear(x, gate, norm_weight, epsilon, group_size, qdata, scale, bias, ...)

    Where x was cast to the norm's dtype, the linear casts it.

    Refuses: a norm that something else than int8 linears reads, and other arithmetic: a gate behind the norm, a mean
    that is subtracted, a factor, precision lost on the way.
    """

    def rewrite(self, graph: fx.Graph, report: Report) -> None:
        for node in iter_calls(graph, "qmamba.w8a8_linear"):
            # Linears inside attention and MLP blocks have no norm in front and are no anchors.
            if not _follows_norm(node.args[0]):
                continue
            try:
                norm = match_norm(node.args[0])
                _require_same_type(norm, node.args[4])
            except NoMatchError as refusal:
                report.skipped(layer_of(node), refusal.reason, refusal.detail)
                continue
            x, gate = norm.x, norm.gate
            for index in norm.indices:
                x = insert_call(node, operator.getitem, x, index)
                gate = None if gate is None else insert_call(node, operator.getitem, gate, index)
            operands = (x, gate, norm.weight, norm.epsilon, norm.group_size, *node.args[1:6], None, norm.x_dtype)
            y = insert_call(node, torch.ops.qmamba.norm_w8a8_linear.default, *operands, value_of(node).dtype)
            replace_node(node, y)
            report.rewrote(layer_of(y), "norm" if gate is None else "gated norm")


def _follows_norm(node: fx.Node) -> bool:
    """True when a linear's input comes from an ``rsqrt``, with no product in between."""
    frontier = [node]
    for _ in range(_NORM_DISTANCE):
        frontier = [
            source
            for item in frontier
            if op_name(item) not in ("linear", "embedding") and not op_name(item).startswith("qmamba.")
            for source in item.all_input_nodes
        ]
        if any(op_name(item) == "rsqrt" for item in frontier):
            return True
    return False


def _require_same_type(norm: NormMatch, act_pre_scale: fx.Node | None) -> None:
    """SmoothQuant factors multiply the normed x in the type that both have."""
    normed = torch.promote_types(norm.x_dtype or value_of(norm.x).dtype, value_of(norm.weight).dtype)
    same = act_pre_scale is None or value_of(act_pre_scale).dtype == normed
    if not same:
        raise NoMatchError(SkipReason.DTYPE, f"what is normed is {normed}, and {act_pre_scale} is not")
