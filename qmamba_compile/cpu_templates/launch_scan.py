"""Call the generated kernels that run a whole sequence, as `launch` calls those of the state."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import quant
from ..extents import unfit_sequence
from ..recurrence import StoreRule
from . import build
from .call_site import Field, pack
from .launch import DTYPES, contiguous_float, empty, kernel, threads, vector


def chunk_scan(
    x: Tensor,
    dt: Tensor,
    dtA: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """`ops.chunk_scan` on the CPU: y and the final state. ``dt`` [b, l, h] is final, ``dtA`` its product with A."""
    batch, seqlen, nheads, headdim = x.shape
    dstate = B.shape[-1]
    function = kernel("chunk_scan", headdim, dstate, None, False, False)
    if function is None or unfit_sequence(x, dt, B, C, dA=dtA, D=D, states=(initial_state,)):
        return None
    y, state = empty((batch, seqlen, nheads, headdim)), empty((batch, nheads, headdim, dstate))
    D_float, *floats = [None if tensor is None else contiguous_float(tensor) for tensor in (D, dt, dtA, initial_state)]
    fields: list[Field] = [*_sequences(x, B, C), D_float, 0, 0, 0, *floats, y, state]
    function(pack([*fields, batch, seqlen, nheads, B.shape[2], threads(seqlen * state.numel())]))
    return y, state


def ssm_scan(
    x: Tensor,
    dt: Tensor,
    decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    states: tuple[Tensor | None, Tensor | None],
    rule: StoreRule,
) -> list[Tensor] | None:
    """The faithful scan on the CPU; ``dt`` and ``decay`` [b, l, h] as `scan_ops.step_sizes` gives them.

    Args:
        states: the state before the first token, as decode reads it, and with ``single_step`` its quantized copy.

    Returns:
        y and codes int8 [b, h, p, n], channel_scale [b, h, p], state_scale [b, h, n] (left as they were when dynamic is
        off) after the last store; ``bits=None``: y and the state. No store happens before step ``flush_interval``.
    """
    batch, seqlen, nheads, headdim = x.shape
    dstate = B.shape[-1]
    function, fields = _scan_call("ssm_scan", x, dt, decay, B, C, D, states, rule)
    if function is None:
        return None
    outputs = [empty((batch, seqlen, nheads, headdim))]
    if rule.bits is None:
        outputs.append(empty((batch, nheads, headdim, dstate)))
        results: list[Field] = [*outputs, 0, 0, 0]
    else:
        outputs += [
            empty((batch, nheads, headdim, dstate), torch.int8),
            empty((batch, nheads, headdim), quant.SCALE_DTYPE),
            empty((batch, nheads, dstate), quant.SCALE_DTYPE),
        ]
        results = [outputs[0], 0, *outputs[1:]]
    function(pack([*fields, *results, *[0] * _GRADIENT_FIELDS]))
    return outputs


def ssm_scan_backward(
    grad_y: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    decay: Tensor,
    B: Tensor,
    C: Tensor,
    states: tuple[Tensor | None, Tensor | None],
    rule: StoreRule,
) -> list[Tensor] | None:
    """Gradient of `ssm_scan` without D: of x, dt, decay, B and C for each head [b, l, h, n], and the first state."""
    batch, seqlen, nheads, headdim = x.shape
    dstate = B.shape[-1]
    function, fields = _scan_call("ssm_scan_backward", x, dt, decay, B, C, None, states, rule)
    if function is None:
        return None
    grad_y = contiguous_float(grad_y)
    grad_state = None if grad_state is None else contiguous_float(grad_state)
    tokens = (batch, seqlen, nheads)
    shapes = [
        (*tokens, headdim),
        tokens,
        tokens,
        (*tokens, dstate),
        (*tokens, dstate),
        (batch, nheads, headdim, dstate),
    ]
    outputs = [empty(shape) for shape in shapes]
    function(pack([*fields, *[0] * 5, grad_y, grad_state, *outputs]))
    return outputs


_GRADIENT_FIELDS = 8


def _scan_call(
    name: str,
    x: Tensor,
    dt: Tensor,
    decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    states: tuple[Tensor | None, Tensor | None],
    rule: StoreRule,
) -> tuple[build.Kernel | None, list[Field]]:
    """The kernel, if it can serve these arguments, and the fields that scan and gradient share."""
    batch, seqlen, nheads, headdim = x.shape
    scales = {"state_scale": rule.state_scale, "channel_scale": rule.fixed_scale}
    if unfit_sequence(x, dt, B, C, dA=decay, D=D, states=states, **scales):
        return None, []
    function = kernel(name, headdim, B.shape[-1], rule.bits, rule.dynamic, rule.stochastic)
    floats = [None if tensor is None else contiguous_float(tensor) for tensor in states]
    fields: list[Field] = [*_sequences(x, B, C), *vector(D), dt, decay, *floats]
    fields += [*vector(rule.state_scale), *vector(rule.fixed_scale)]
    team = threads(batch * nheads * headdim * B.shape[-1] * seqlen)
    fields += [batch, seqlen, nheads, B.shape[2], rule.seed, rule.flush_interval, int(rule.single_step), team]
    return function, fields


def _sequences(*tensors: Tensor) -> list[Field]:
    """``Sequence`` structs of tensors [b, l, heads or groups, columns]."""
    fields: list[Field] = []
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            tensor = tensor.float()
        _, _, heads, columns = tensor.shape
        if heads > 1 and tensor.stride(2) != columns * tensor.stride(3):
            tensor = tensor.contiguous()
        # A dimension of one element may have any stride.
        column_stride = tensor.stride(3) if columns > 1 else tensor.stride(2) if heads > 1 else 1
        fields += [tensor, DTYPES[tensor.dtype], tensor.stride(0), tensor.stride(1), column_stride]
    return fields
