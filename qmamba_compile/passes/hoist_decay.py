from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..fx_utils import COPIES, insert_call, iter_calls, layer_of, mutates, op_name, replace_node, shape_of, value_of
from ..report import Report
from .base import GraphPass

AT_ONCE = 32
"""Layers that share a kernel. Inductor writes a branch for each: seconds that triton 3.9 compiles for sm_90, 0.6 of 8
layers, 0.8 of 16, 1.2 of 32, 5.0 of 64."""


class HoistDecay(GraphPass):
    """Compute the decay rates of many layers at once: A depends on no token.

    Left alone, each layer of a decode step starts a kernel for as many numbers as it has heads.

    Before, in each layer:
        A = -exp(A_log.float())
    After, in front of the first layer:
        A_0, A_1, ... = _foreach_neg([exp(A_log_0.float()), exp(A_log_1.float()), ...])

    Refuses: nothing. An A that is something else, in another dtype or of one layer alone, stays where it is.
    """

    def rewrite(self, graph: fx.Graph, report: Report) -> None:
        rates = [node for node in iter_calls(graph, "neg") if _is_decay_rate(node)]
        if len(rates) < 2:
            return
        first = next(node for node in graph.nodes if node.op != "placeholder")
        for start in range(0, len(rates), AT_ONCE):
            together = rates[start : start + AT_ONCE]
            at_once = insert_call(first, torch._foreach_neg, [_computed_at(first, node.args[0]) for node in together])
            for index, node in enumerate(together):
                rate = insert_call(first, operator.getitem, at_once, index)
                rate.meta["qmamba_layer"] = layer_of(node)
                replace_node(node, rate)
                report.rewrote(layer_of(rate), "decay")


def _is_decay_rate(node: fx.Node) -> bool:
    """True for ``-exp(A_log)`` [h] of an input, cast or not, that is not written in place."""
    source: Any = node.args[0]
    # In another dtype autocast might change it, which holds for a part of the graph.
    if op_name(source) != "exp" or len(shape_of(source)) != 1 or value_of(source.args[0]).dtype != torch.float32:
        return False
    while op_name(source) in ("exp", *COPIES):
        source = source.args[0]
    return op_name(source) == "placeholder" and not any(mutates(user) for user in source.users)


def _computed_at(place: fx.Node, node: fx.Node) -> fx.Node:
    """``node``, and what it is computed from, again in front of ``place``."""
    if node.op == "placeholder":
        return node
    with place.graph.inserting_before(place):
        return place.graph.node_copy(node, lambda operand: _computed_at(place, operand))
