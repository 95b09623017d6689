from __future__ import annotations

import operator

import torch
from torch import fx

from ..errors import SkipReason
from ..fx_utils import insert_call, iter_calls, layer_of, op_name, replace_node, shape_of, strip
from ..report import Report
from .base import GraphPass, NoMatchError
from .match_scan import is_final_state
from .match_step import match_step


class FuseSsmUpdate(GraphPass):
    """Run one decode step on the packed state without unpacking it to memory.

    Left alone, each step writes the state three times: unpacked, updated, packed again. The fused kernel keeps the
    unpacked values in registers.

    Before:
        h = qmamba.dequantize_state(packed, channel_scale, state_scale)
        new = h * exp(dt * A) + (dt * B) * x
        qmamba.quantize_state_(packed, channel_scale, state_scale, rng, new)
        y = bmm(new, C) + D * x
    After:
        y = qmamba.ssm_update(packed, channel_scale, state_scale, rng, x, dt, A, B, C, D, dt_bias)

    Refuses: dt, A, D or dt_bias that differ inside a head, a new state that is read by anything but one product.
    """

    def rewrite(self, graph: fx.Graph, report: Report) -> None:
        for store in iter_calls(graph, "qmamba.quantize_state_"):
            packed, channel_scale, state_scale_out, rng, new_state, state_scale, bits, stochastic, *_ = store.args
            if is_final_state(strip(new_state, "to")):
                # A prompt that continues a packed state ends in one, too, and `fuse_chunk_scan` has dealt with it.
                continue
            layer = layer_of(store)
            old_states = [user for user in packed.users if op_name(user) == "qmamba.dequantize_state"]
            total = strip(new_state, "to", "float")
            try:
                if len(old_states) != 1:
                    raise NoMatchError(SkipReason.SECOND_READER, f"the state is read {len(old_states)} times")
                step = match_step(total, old_states[0])
            except NoMatchError as refusal:
                report.skipped(layer, refusal.reason, refusal.detail)
                continue
            dt = insert_call(step.y, operator.getitem, step.time.dt, (Ellipsis, 0))  # [b, h]
            y = insert_call(
                step.y,
                torch.ops.qmamba.ssm_update.default,
                packed,
                channel_scale,
                state_scale_out,
                rng,
                step.x,
                dt,
                step.A,
                step.B,
                step.C,
                step.D,
                step.time.dt_bias,
                state_scale,
                step.time.softplus,
                bits,
                stochastic,
                # The ring of a checkpointed state, if it has one.
                *old_states[0].args[4:],
            )
            replace_node(step.y, y)
            graph.erase_node(store)
            interval = (
                "" if len(old_states[0].args) == 4 else f", stored every {shape_of(old_states[0].args[4])[1] + 1}"
            )
            report.rewrote(layer, f"{bits}-bit step{interval}")
