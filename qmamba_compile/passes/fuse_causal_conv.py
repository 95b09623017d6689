from __future__ import annotations

import torch
from torch import fx

from ..errors import SkipReason
from ..fx_utils import (
    in_dtype_of,
    insert_call,
    iter_calls,
    layer_of,
    op_name,
    replace_node,
    same_size,
    shape_of,
    value_of,
)
from ..report import Report
from .base import GraphPass, NoMatchError
from .match_conv import activation_of, match_depthwise, only_slice
from .match_scan import scan_layers


class FuseCausalConv(GraphPass):
    """Make the causal convolution of a prompt one operator that leaves the channels of a token together.

    Left alone, a linear's rows are turned over for the convolution and turned back for the scan, the convolution of
    the padded prompt computes d_conv - 1 results for nobody, and silu passes over all of it once more.

    Before:
        y = silu(conv1d(xBC, weight, bias, padding=d_conv - 1, groups=d)[:, :, :seqlen])
        ... y.transpose(1, 2)
    After:
        y = qmamba.causal_conv(xBC, weight, bias, silu)
        ... y.transpose(1, 2)

    Refuses: a convolution that is not depthwise, of one dtype and padded like this, other results than the first
    ``seqlen``, and a y that is read before it is turned back: it lies in memory as that reader does not expect.
    Convolutions outside of Mamba2 layers are no anchors.
    """

    def rewrite(self, graph: fx.Graph, report: Report) -> None:
        layers = scan_layers(graph)
        for conv in iter_calls(graph, "conv1d"):
            layer, found = layer_of(conv), match_depthwise(conv)
            if not any(layer == scan or layer.startswith(f"{scan}.") for scan in layers):
                continue
            if found is not None and found.padding == 0:
                # A step's, with its past in front instead of zeros: another pass's anchor.
                continue
            try:
                if found is None or found.padding != found.taps - 1:
                    raise NoMatchError(
                        SkipReason.UNKNOWN_STRUCTURE,
                        f"expected a depthwise conv1d of one dtype, padded by d_conv - 1, found {conv} with "
                        f"arguments {conv.args[3:]} and {dict(conv.kwargs)}",
                    )
                y = only_slice(conv)
                if not _is_until(y.args[1], shape_of(found.x)[-1]):
                    raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"{y} does not take the first results")
                activation = activation_of(y)
                end = y if activation is None else activation
                _require_turned(end)
            except NoMatchError as refusal:
                report.skipped(layer, refusal.reason, refusal.detail)
                continue
            # Where the convolution stood: what it reads may be written to before its result is used.
            operands = (found.x, found.weight, found.bias, activation is not None)
            fused = insert_call(conv, torch.ops.qmamba.causal_conv.default, *operands)
            replace_node(end, in_dtype_of(end, fused))  # other than the operands' under autocast
            report.rewrote(layer, f"{found.taps} taps")


def _is_until(index: object, seqlen: object) -> bool:
    """``[:, :, :seqlen]`` or ``[..., :seqlen]``."""
    if not isinstance(index, tuple) or not isinstance(index[-1], slice):
        return False
    first = index[:-1] in ((slice(None), slice(None)), (Ellipsis,))
    last = index[-1]
    return first and last.start is None and last.step is None and same_size(value_of(last.stop), seqlen)


def _require_turned(y: fx.Node) -> None:
    """Raise `NoMatchError` unless all that reads ``y``, converted or cut or not, is ``transpose(1, 2)``."""
    for user in y.users:
        if op_name(user) in ("to", "getitem"):
            _require_turned(user)
        elif op_name(user) != "transpose" or user.args[1:] != (1, 2):
            raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"{user} reads {y}, expected transpose(1, 2)")
