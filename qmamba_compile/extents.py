"""Whether an operator's arguments fit together: kernels take that for granted, and read what their pointers lead to.

Beside extents, the dtypes of codes and counters, which no kernel converts. Each function says what is wrong, or returns
``None``. Launchers leave what does not fit to the plain reference, whose operations broadcast it or raise. Shapes as in
`ops` and `layer_ops`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import quant
from .recurrence import Ring


def unfit(**operands: tuple[Tensor | None, tuple[int, ...]]) -> str | None:
    """The first of ``operands`` that is there and has not the shape beside it."""
    for name, (tensor, shape) in operands.items():
        if tensor is not None and tensor.shape != shape:
            return f"{name} has shape {list(tensor.shape)}, expected {list(shape)}"
    return None


# --- layers --------------------------------------------------------------------------------------------------------


def unfit_linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    act_pre_scale: Tensor | None,
    act_scale: Tensor | None,
    residual: Tensor | None,
) -> str | None:
    o, k = qdata.shape
    if qdata.dtype is not torch.int8:
        return f"qdata is {qdata.dtype}, expected int8"
    if scale.numel() != o:
        return f"scale has shape {list(scale.shape)}, expected [{o}, 1]"
    if act_scale is not None and act_scale.numel() != 1:
        return f"act_scale has shape {list(act_scale.shape)}, expected one number"
    return unfit(
        x=(x, (*x.shape[:-1], k)),
        bias=(bias, (o,)),
        act_pre_scale=(act_pre_scale, (k,)),
        residual=(residual, (*x.shape[:-1], o)),
    )


def unfit_norm(x: Tensor, gate: Tensor | None, norm_weight: Tensor, group_size: int) -> str | None:
    k = x.shape[-1]
    if group_size < 1 or k % group_size:
        return f"group_size={group_size} does not divide {k} features"
    return unfit(gate=(gate, x.shape), norm_weight=(norm_weight, (k,)))


def unfit_conv(channels: int, weight: Tensor, bias: Tensor | None) -> str | None:
    """Of a depthwise convolution."""
    return unfit(weight=(weight, (channels, 1, weight.shape[-1])), bias=(bias, (channels,)))


# --- states --------------------------------------------------------------------------------------------------------


def unfit_state(
    packed: Tensor,
    channel_scale: Tensor,
    state_scale_out: Tensor | None,
    state_scale: Tensor | None,
    bits: int,
    rng: Tensor | None = None,
) -> str | None:
    batch, nheads, headdim, width = packed.shape
    if packed.element_size() != 1:
        return f"packed is {packed.dtype}, expected bytes"
    if rng is not None and rng.dtype is not torch.int64:
        return f"rng is {rng.dtype}, expected int64"
    dstate = quant.unpacked_width(width, bits)
    return unfit(
        channel_scale=(channel_scale, (batch, nheads, headdim)),
        state_scale_out=(state_scale_out, (batch, nheads, dstate)),
        state_scale=(state_scale, (nheads, dstate)),
        rng=(rng, (batch, 2)),
    )


def unfit_ring(ring: Ring, state: tuple[int, int, int, int], ngroups: int) -> str | None:
    """Of a checkpointed state of the extents ``state``, [b, h, p, n]."""
    batch, nheads, headdim, dstate = state
    slots = ring.x.shape[1]
    return unfit(
        ring_x=(ring.x, (batch, slots, nheads, headdim)),
        ring_B=(ring.B, (batch, slots, ngroups, dstate)),
        ring_decay=(ring.decay, (batch, slots, nheads)),
        ring_position=(ring.position, (batch,)),
        ring_scale=(ring.scale, (batch, slots, nheads)),
    )


def unfit_step(
    state: tuple[int, int, int, int],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    z: Tensor | None = None,
) -> str | None:
    """Of a step of ``state`` [b, h, p, n]."""
    batch, nheads, headdim, dstate = state
    ngroups = B.shape[1]
    return _unfit_groups(nheads, ngroups) or unfit(
        x=(x, (batch, nheads, headdim)),
        dt=(dt, (batch, nheads)),
        A=(A, (nheads,)),
        B=(B, (batch, ngroups, dstate)),
        C=(C, (batch, ngroups, dstate)),
        D=(D, (nheads,)),
        dt_bias=(dt_bias, (nheads,)),
        z=(z, (batch, nheads, headdim)),
    )


def unfit_sequence(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    dA: Tensor | None = None,
    A: Tensor | None = None,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    states: tuple[Tensor | None, ...] = (),
    state_scale: Tensor | None = None,
    channel_scale: Tensor | None = None,
) -> str | None:
    """Of a scan; ``dA`` is either dt * A or its exponential, ``states`` those before the first token."""
    batch, seqlen, nheads, headdim = x.shape
    ngroups, dstate = B.shape[2:]
    return _unfit_groups(nheads, ngroups) or unfit(
        dt=(dt, (batch, seqlen, nheads)),
        dA=(dA, (batch, seqlen, nheads)),
        A=(A, (nheads,)),
        B=(B, (batch, seqlen, ngroups, dstate)),
        C=(C, (batch, seqlen, ngroups, dstate)),
        D=(D, (nheads,)),
        dt_bias=(dt_bias, (nheads,)),
        **{f"state_{index}": (state, (batch, nheads, headdim, dstate)) for index, state in enumerate(states)},
        state_scale=(state_scale, (nheads, dstate)),
        channel_scale=(channel_scale, (nheads, headdim)),
    )


def _unfit_groups(nheads: int, ngroups: int) -> str | None:
    return f"{ngroups} groups do not divide {nheads} heads" if ngroups == 0 or nheads % ngroups else None
