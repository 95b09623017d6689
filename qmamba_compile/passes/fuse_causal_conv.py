from __future__ import annotations

import torch
from torch import fx

from ..errors import SkipReason
from ..fx_utils import insert_call, iter_calls, layer_of, replace_node, same_size, shape_of, value_of
from ..report import Report
from .base import GraphPass, NoMatchError
from .match_conv import activation_of, match_depthwise, only_reader


class FuseCausalConv(GraphPass):
    """Make the causal convolution of a prompt one operator that leaves the channels of a token together.

    Left alone, a linear's rows are turned over for the convolution and turned back for the scan, the convolution of
    the padded prompt computes d_conv - 1 results for nobody, and silu passes over all of it once more.

    Before:
        y = silu(conv1d(xBC, weight, bias, padding=d_conv - 1, groups=d)[:, :, :seqlen])
    After:
        y = qmamba.causal_conv(xBC, weight, bias, silu)

    Refuses: a convolution whose later results are read.
    """

    def rewrite(self, graph: fx.Graph, report: Report) -> None:
        for conv in iter_calls(graph, "conv1d"):
            found = match_depthwise(conv)
            # A step has its past in front instead of zeros, and is another pass's anchor.
            if found is None or found.padding == 0 or found.padding != found.taps - 1:
                continue
            try:
                y = only_reader(conv, "getitem")
                if not _is_until(y.args[1], shape_of(found.x)[-1]):
                    raise NoMatchError(SkipReason.UNKNOWN_STRUCTURE, f"{y} does not take the first results")
            except NoMatchError as refusal:
                report.skipped(layer_of(conv), refusal.reason, refusal.detail)
                continue
            activation = activation_of(y)
            end = y if activation is None else activation
            operands = (found.x, found.weight, found.bias, activation is not None)
            replace_node(end, insert_call(end, torch.ops.qmamba.causal_conv.default, *operands))
            report.rewrote(layer_of(conv), f"{found.taps} taps")


def _is_until(index: object, seqlen: object) -> bool:
    """``[:, :, :seqlen]`` or ``[..., :seqlen]``."""
    if not isinstance(index, tuple) or not isinstance(index[-1], slice):
        return False
    first = index[:-1] in ((slice(None), slice(None)), (Ellipsis,))
    last = index[-1]
    return first and last.start is None and last.step is None and same_size(value_of(last.stop), seqlen)
