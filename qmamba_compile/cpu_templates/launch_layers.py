"""Call the generated kernels of the layers around the state, as `launch` calls those of the state."""

from __future__ import annotations

import functools
import struct

import torch
from torch import Tensor

from . import build
from .launch import ABSENT, DTYPES, contiguous_float, pack, readable, vector
from .render import LayerSpec

PARALLEL_WEIGHTS = 2**18
"""Weights (times tokens over 16) below which one thread does a linear: 13 microseconds of reading at 20 GB/s."""


@functools.cache
def layer_kernel(name: str) -> build.Kernel | None:
    """The loaded `LayerSpec` kernel for this machine, ``None`` when there is no compiler."""
    isa = build.best_isa()
    vnni = name == "w8a8_linear" and isa == "avx512" and build.has_vnni()
    return build.load(LayerSpec(name, isa, vnni))


def w8a8_linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    act_pre_scale: Tensor | None,
    act_scale: Tensor | None,
) -> Tensor | None:
    """`ops.w8a8_linear` on the CPU: [..., o]."""
    dtype = x.dtype
    if act_pre_scale is not None and (act_pre_scale.dtype is not dtype or dtype not in DTYPES):
        x, act_pre_scale = x * act_pre_scale, None
    y = norm_w8a8_linear(x, None, None, 0.0, 1, qdata, scale, bias, act_pre_scale, act_scale)
    return y if y is None or y.dtype is dtype else y.to(dtype)


def norm_w8a8_linear(
    x: Tensor,
    gate: Tensor | None,
    norm_weight: Tensor | None,
    epsilon: float,
    group_size: int,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    act_pre_scale: Tensor | None,
    act_scale: Tensor | None,
) -> Tensor | None:
    """`ops.norm_w8a8_linear` on the CPU: [..., o]; without ``norm_weight`` there is no norm."""
    function = layer_kernel("w8a8_linear")
    o, k = qdata.shape
    if function is None or not qdata.is_contiguous() or scale.dtype is not torch.float32 or not scale.is_contiguous():
        return None
    rows, x_fields = _rows(x, k)
    dtype = rows.dtype
    gate_fields, norm_fields = ABSENT, ABSENT
    if norm_weight is not None:
        if x.dtype not in DTYPES or norm_weight.dtype not in DTYPES:
            return None
        dtype = torch.promote_types(dtype, norm_weight.dtype)
        norm_weight = norm_weight.contiguous()
        norm_fields = vector(norm_weight)
        if gate is not None:
            gate, gate_fields = _rows(gate, k)
    smooth_fields = bias_fields = ABSENT
    if act_pre_scale is not None:
        if act_pre_scale.dtype is not dtype:
            return None
        act_pre_scale = act_pre_scale.contiguous()
        smooth_fields = vector(act_pre_scale)
    if bias is not None:
        bias = readable(bias, contiguous=True)
        bias_fields = vector(bias)
    if act_scale is not None:
        act_scale = contiguous_float(act_scale)
    y = torch.empty((*x.shape[:-1], o), dtype=dtype)
    tokens = x.numel() // k
    fields = (
        *x_fields,
        *gate_fields,
        *norm_fields,
        *smooth_fields,
        *bias_fields,
        0 if act_scale is None else act_scale.data_ptr(),
        qdata.data_ptr(),
        scale.data_ptr(),
        y.data_ptr(),
        DTYPES[dtype],
        tokens,
        k,
        o,
        group_size,
        epsilon,
        torch.get_num_threads() if k * o * (1 + tokens // 16) >= PARALLEL_WEIGHTS else 1,
    )
    function(_LINEAR_ARGUMENTS.pack(*fields))
    return y


_LINEAR_ARGUMENTS = struct.Struct("29qdq")


def conv_update(conv_state: Tensor, xBC: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor | None:
    """`ops.conv_update` on the CPU: y [b, d, 1]."""
    function = layer_kernel("conv_update")
    dtype = weight.dtype
    batch, channels, length = conv_state.shape
    taps = weight.shape[-1]
    if (
        function is None
        or dtype not in DTYPES
        or conv_state.dtype is not dtype
        or xBC.dtype is not dtype
        or not conv_state.is_contiguous()
        or not 1 <= taps <= length + 1
    ):
        return None
    weight = weight.contiguous()
    fields: list[int] = [conv_state.data_ptr(), xBC.data_ptr(), DTYPES[dtype], xBC.stride(0), xBC.stride(1)]
    fields += vector(weight)
    if bias is None:
        fields += ABSENT
    else:
        bias = readable(bias, contiguous=True)
        fields += vector(bias)
    y = torch.empty((batch, channels, 1), dtype=dtype)
    function(pack((*fields, y.data_ptr(), batch, channels, length, taps, silu)))
    return y


def _rows(x: Tensor, k: int) -> tuple[Tensor, tuple[int, ...]]:
    """x [..., k] as rows of one stride, and its ``Input`` struct."""
    if x.dtype not in DTYPES:
        x = contiguous_float(x)
    if x.is_contiguous():
        return x, (x.data_ptr(), DTYPES[x.dtype], k, 0)
    rows = x.reshape(-1, k)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    return rows, (rows.data_ptr(), DTYPES[x.dtype], rows.stride(0), 0)
