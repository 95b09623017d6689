"""Call the faithful scan's generated kernels on tensors, as `launch` calls the others.

Each function returns ``None`` when it cannot serve its arguments, having written nothing.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import torch
from torch import Tensor

from .. import quant
from ..errors import ConfigError
from . import tuning
from .launch import target
from .render import SsmScanSpec, load

log = logging.getLogger(__name__)


@functools.cache
def _chosen(
    architecture: str,
    headdim: int,
    dstate: int,
    bits: int | None,
    dynamic: bool,
    stochastic: bool,
    whole_heads: bool,
) -> SsmScanSpec | None:
    try:
        return tuning.ssm_scan(architecture, headdim, dstate, bits, dynamic, stochastic, whole_heads=whole_heads)
    except ConfigError as error:
        log.warning("no Triton kernel, the torch reference runs instead: %s", error)
        return None


def ssm_scan(
    x: Tensor,
    dt: Tensor,
    decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    states: tuple[Tensor | None, Tensor | None],
    scales: tuple[Tensor | None, Tensor | None],
    bits: int | None,
    stochastic: bool,
    seed: int,
    flush_interval: int,
    single_step: bool,
) -> list[Tensor] | None:
    """The faithful scan on a GPU; ``dt`` and ``decay`` [b, l, h] as `scan_ops.step_sizes` gives them.

    Args:
        states: the state before the first token, as decode reads it, and with ``single_step`` its quantized copy.
        scales: calibrated state_scale [h, n] and channel_scale [h, p].

    Returns:
        y and codes int8 [b, h, p, n], channel_scale [b, h, p], state_scale [b, h, n] (not written unless dynamic) after
        the last store; ``bits=None``: y and the state. No store happens before step ``flush_interval``.
    """
    spec = _spec(x, B, scales, bits, stochastic)
    if spec is None:
        return None
    batch, _, nheads, headdim = x.shape
    dstate = B.shape[-1]
    outputs = [torch.empty(x.shape, dtype=torch.float32, device=x.device)]
    if bits is None:
        outputs.append(torch.empty((batch, nheads, headdim, dstate), dtype=torch.float32, device=x.device))
    else:
        outputs += [
            torch.empty((batch, nheads, headdim, dstate), dtype=torch.int8, device=x.device),
            torch.empty((batch, nheads, headdim), dtype=quant.SCALE_DTYPE, device=x.device),
            torch.empty((batch, nheads, dstate), dtype=quant.SCALE_DTYPE, device=x.device),
        ]
    arguments = _arguments(spec, x, dt, decay, B, C, states, scales, seed, flush_interval, single_step)
    D = None if D is None else D.contiguous()
    load(spec).ssm_scan[spec.row_blocks, nheads, batch](
        *arguments, D, *outputs, num_warps=spec.warps, enable_fp_fusion=False
    )
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
    scales: tuple[Tensor | None, Tensor | None],
    bits: int | None,
    stochastic: bool,
    seed: int,
    flush_interval: int,
    single_step: bool,
) -> list[Tensor] | None:
    """Gradient of `ssm_scan` without D: of x, dt, decay, B and C for each head [b, l, h, n], and the first state.

    Takes memory for 2 * sqrt(seqlen) states, twice as many for single steps.
    """
    spec = _spec(x, B, scales, bits, stochastic, whole_heads=True)
    if spec is None:
        return None
    batch, seqlen, nheads, headdim = x.shape
    dstate = B.shape[-1]

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    chunk = math.isqrt(seqlen)
    kinds = 1 + (single_step and bits is not None)
    kept = empty(kinds * batch * nheads * -(-seqlen // chunk) * spec.rows * spec.columns)
    inside = empty(kinds * batch * nheads * chunk * spec.rows * spec.columns)
    tokens = (batch, seqlen, nheads)
    shapes = ((*tokens, headdim), tokens, tokens, (*tokens, dstate), (*tokens, dstate))
    outputs = [empty(*shape) for shape in (*shapes, (batch, nheads, headdim, dstate))]
    load(spec).ssm_scan_backward[1, nheads, batch](
        *_arguments(spec, x, dt, decay, B, C, states, scales, seed, flush_interval, single_step),
        chunk,
        grad_y.float().contiguous(),
        None if grad_state is None else grad_state.float().contiguous(),
        kept,
        inside,
        *outputs,
        num_warps=spec.warps,
        enable_fp_fusion=False,
    )
    return outputs


def _spec(
    x: Tensor,
    B: Tensor,
    scales: tuple[Tensor | None, Tensor | None],
    bits: int | None,
    stochastic: bool,
    whole_heads: bool = False,
) -> SsmScanSpec | None:
    architecture = target(x.device.type, x.device.index)
    if architecture is None or x.numel() == 0:
        return None
    quantized = bits is not None
    dynamic = quantized and scales[0] is None
    return _chosen(architecture, x.shape[-1], B.shape[-1], bits, dynamic, quantized and stochastic, whole_heads)


def _arguments(
    spec: SsmScanSpec,
    x: Tensor,
    dt: Tensor,
    decay: Tensor,
    B: Tensor,
    C: Tensor,
    states: tuple[Tensor | None, Tensor | None],
    scales: tuple[Tensor | None, Tensor | None],
    seed: int,
    flush_interval: int,
    single_step: bool,
) -> tuple[Any, ...]:
    """What the scan and its gradient begin with."""
    carried, quantized = (None if state is None else state.float().contiguous() for state in states)
    if spec.bits is None or not single_step:
        quantized = None
    found: tuple[Any, ...] = (x, dt.contiguous(), decay.contiguous(), B, C, carried, quantized)
    if spec.bits is not None:
        found += tuple(None if scale is None else scale.contiguous() for scale in scales)
        # Not a number: Triton would make another kernel of each that fits in 32 bits or is 1.
        found += (torch.full((1,), seed, dtype=torch.int64, device=x.device) if spec.stochastic else None,)
    heads_per_group = x.shape[2] // B.shape[2]
    return (*found, x.shape[1], flush_interval, heads_per_group, *x.stride(), *B.stride(), *C.stride())
