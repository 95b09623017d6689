"""Call the kernels that pack and unpack a state, as `launch` calls those of a step and under the same promises."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from .. import quant
from ..errors import ConfigError
from . import launch, tuning
from .render import load
from .specs import DequantizeSpec, QuantizeSpec

log = logging.getLogger(__name__)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _spec_to_pack(*choice: Any) -> QuantizeSpec | None:
    try:
        return tuning.quantize_state(*choice)
    except ConfigError as error:
        log.warning("no Triton kernel, the torch reference runs instead: %s", error)
        return None


@functools.cache
def _spec_to_unpack(*choice: Any) -> DequantizeSpec | None:
    try:
        return tuning.dequantize_state(*choice)
    except ConfigError as error:
        log.warning("no Triton kernel, the torch reference runs instead: %s", error)
        return None


def quantize_state_(
    packed: Tensor,
    channel_scale: Tensor,
    state_scale_out: Tensor | None,
    rng: Tensor,
    state: Tensor,
    state_scale: Tensor | None,
    bits: int,
    stochastic: bool,
) -> bool:
    """`ops.quantize_state_` on a GPU; False where it cannot serve. The ring, if any, is the caller's to empty."""
    architecture = launch.target(state.device.type, state.device.index)
    if architecture is None or not launch.states_fit(packed, channel_scale, state_scale_out, rng, None):
        return False
    batch, nheads, headdim, dstate = state.shape
    dynamic = state_scale_out is not None
    spec = _spec_to_pack(architecture, batch * nheads, headdim, dstate, bits, dynamic, stochastic)
    scale = state_scale_out if state_scale_out is not None else state_scale
    if spec is None or scale is None:
        return False
    if state.dtype not in _FLOATS:
        state = state.float()
    if state.stride(-1) != 1:
        state = state.contiguous()
    load(spec).quantize_state[spec.row_blocks, nheads, batch](
        packed.view(torch.int32),
        channel_scale,
        scale.contiguous(),
        rng,
        state,
        *state.stride()[:3],
        num_warps=spec.warps,
        enable_fp_fusion=False,
    )
    if stochastic:
        launch.advance(rng, None)
    return True


def dequantize_state(packed: Tensor, channel_scale: Tensor, state_scale: Tensor, bits: int) -> Tensor | None:
    """`ops.dequantize_state` on a GPU, without the ring."""
    architecture = launch.target(packed.device.type, packed.device.index)
    if architecture is None or packed.dim() != 4 or packed.shape[-1] % 4:
        return None
    batch, nheads, headdim, width = packed.shape
    dstate = quant.unpacked_width(width, bits)
    spec = _spec_to_unpack(architecture, batch * nheads, headdim, dstate, bits)
    if spec is None:
        return None
    packed = packed.contiguous()
    if packed.storage_offset() % 4:
        packed = packed.clone()
    state = torch.empty((batch, nheads, headdim, dstate), dtype=torch.float32, device=packed.device)
    load(spec).dequantize_state[spec.row_blocks, nheads, batch](
        packed.view(torch.int32),
        channel_scale.contiguous(),
        state_scale.contiguous(),
        state,
        nheads * dstate if state_scale.dim() == 3 else 0,
        num_warps=spec.warps,
        enable_fp_fusion=False,
    )
    return state
