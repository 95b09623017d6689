"""Call the kernels that pack and unpack a state, as `launch` calls those of a step and under the same promises."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import extents, quant
from ..errors import ConfigError
from . import launch, tuning
from .render import load
from .state_specs import DequantizeSpec, QuantizeSpec


@functools.cache
def _spec_to_pack(*choice: Any) -> QuantizeSpec | None:
    try:
        return tuning.quantize_state(*choice)
    except ConfigError as error:
        return launch.refuse("quantize_state", str(error))


@functools.cache
def _spec_to_unpack(*choice: Any) -> DequantizeSpec | None:
    try:
        return tuning.dequantize_state(*choice)
    except ConfigError as error:
        return launch.refuse("dequantize_state", str(error))


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
    if architecture is None:
        return False
    batch, nheads, headdim, dstate = state.shape
    if wrong := (
        launch.unfit_layout(packed, channel_scale, state_scale_out, rng, None)
        or extents.unfit(packed=(packed, (batch, nheads, headdim, quant.packed_width(dstate, bits))))
        or extents.unfit_state(packed, channel_scale, state_scale_out, state_scale, bits, rng)
    ):
        launch.refuse("quantize_state", wrong)
        return False
    dynamic = state_scale_out is not None
    spec = _spec_to_pack(architecture, batch * nheads, headdim, dstate, bits, dynamic, stochastic)
    scale = state_scale_out if state_scale_out is not None else state_scale
    if spec is None:
        return False
    if scale is None:
        launch.refuse("quantize_state", "neither state_scale nor state_scale_out is there")
        return False
    if state.dtype not in quant.FLOATS:
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
    if architecture is None:
        return None
    if packed.dim() != 4:
        return launch.refuse("dequantize_state", f"packed has {packed.dim()} dimensions, expected [b, h, p, bytes]")
    if not packed.is_contiguous() or packed.storage_offset() % 4:
        packed = packed.clone(memory_format=torch.contiguous_format)
    dynamic = state_scale.dim() == 3
    scales = (state_scale if dynamic else None, None if dynamic else state_scale)
    if wrong := launch.unfit_words(packed) or extents.unfit_state(packed, channel_scale, *scales, bits):
        return launch.refuse("dequantize_state", wrong)
    batch, nheads, headdim, width = packed.shape
    dstate = quant.unpacked_width(width, bits)
    spec = _spec_to_unpack(architecture, batch * nheads, headdim, dstate, bits)
    if spec is None:
        return None
    state = torch.empty((batch, nheads, headdim, dstate), dtype=torch.float32, device=packed.device)
    load(spec).dequantize_state[spec.row_blocks, nheads, batch](
        packed.view(torch.int32),
        channel_scale.contiguous(),
        state_scale.contiguous(),
        state,
        nheads * dstate if dynamic else 0,
        num_warps=spec.warps,
        enable_fp_fusion=False,
    )
    return state
