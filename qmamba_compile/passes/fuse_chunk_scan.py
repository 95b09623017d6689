from __future__ import annotations

import operator

import torch
from torch import fx

from ..fx_utils import insert_call, layer_of, replace_node, same_size, value_of
from ..report import Report
from .base import GraphPass, NoMatchError
from .match_mamba2 import match_scan, scan_anchors

_READ_BY_ROWS = ("cuda",)
"""Devices whose kernel reads x, B and C with their last dimension contiguous."""


class FuseChunkScan(GraphPass):
    """Replace the scan of a prefill by one operator, before AOTAutograd sees it.

    Left alone, the scan is hundreds of nodes with symbolic sizes that Inductor needs minutes for, it repeats B and C
    for every head, and it holds a [b, c, l, s, h] tensor.

    x, B and C leave the convolution as [b, d, l]; a GPU's kernel wants tokens outermost. Asked for in the graph, that
    is no copy, but the order in which Inductor writes what it computes between the two.

    Before:
        G = einsum("bclhn,bcshn->bclsh", C, B)
        ... four more einsums, padding, two segment sums ...
        y, final_state
    After:
        y, final_state = qmamba.chunk_scan(x, dt, A, B, C, D, dt_bias, initial_state, softplus, dt_min, dt_max)

    Refuses: a region with other arithmetic than the algorithm's, dt, A, D or dt_bias that differ inside a head.
    """

    def rewrite(self, graph: fx.Graph, report: Report) -> None:
        for anchor in scan_anchors(graph):
            layer = layer_of(anchor)
            try:
                scan = match_scan(anchor)
            except NoMatchError as refusal:
                report.skipped(layer, refusal.reason, refusal.detail)
                continue
            time = scan.time
            fused = insert_call(
                scan.y,
                torch.ops.qmamba.chunk_scan.default,
                _by_rows(scan.x),
                time.dt,
                scan.A,
                _by_rows(scan.B),
                _by_rows(scan.C),
                scan.D,
                time.dt_bias,
                scan.initial_state,
                time.softplus,
                time.minimum,
                time.maximum,
            )
            replace_node(scan.y, insert_call(scan.y, operator.getitem, fused, 0))
            if scan.final_state is not None:
                # The state may be read ahead of y, so the operator must stand ahead of both.
                _move_before(fused, scan.final_state)
                replace_node(scan.final_state, insert_call(scan.final_state, operator.getitem, fused, 1))
            report.rewrote(layer, "scan")


def _by_rows(node: fx.Node) -> fx.Node:
    """``node`` in the layout that its device's kernel reads."""
    value = value_of(node)
    if value.device.type not in _READ_BY_ROWS or same_size(value.stride(-1), 1):
        return node
    behind = node.next
    while behind.op == "placeholder":
        behind = behind.next
    return insert_call(behind, torch.Tensor.contiguous, node)


def _move_before(node: fx.Node, reader: fx.Node) -> None:
    """Move ``node`` ahead of ``reader`` when it stands behind it; its inputs stand ahead of both."""
    if reader < node:
        reader.prepend(node)
