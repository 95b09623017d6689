from __future__ import annotations

import operator

import torch
from torch import fx

from ..fx_utils import insert_call, layer_of, replace_node
from ..report import Report
from .base import GraphPass, NoMatchError
from .match_scan import match_scan, scan_anchors


class FuseChunkScan(GraphPass):
    """Replace the scan of a prefill by one operator, before AOTAutograd sees it.

    Left alone, the scan is hundreds of nodes with symbolic sizes that Inductor needs minutes for, it repeats B and C
    for every head, and it holds a [b, c, l, s, h] tensor.

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
                scan.x,
                time.dt,
                scan.A,
                scan.B,
                scan.C,
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


def _move_before(node: fx.Node, reader: fx.Node) -> None:
    """Move ``node`` ahead of ``reader`` when it stands behind it; its inputs stand ahead of both."""
    if reader < node:
        reader.prepend(node)
