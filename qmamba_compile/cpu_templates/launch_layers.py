"""Call the generated kernels of the layers around the state, as `launch` calls those of the state."""

from __future__ import annotations

import functools
import struct

import torch
from torch import Tensor

from ..extents import unfit, unfit_conv, unfit_linear, unfit_norm
from . import build
from .call_site import Field, Launch, launched
from .launch import ABSENT, DTYPES, contiguous_float, empty, threads, vector
from .specs import MOST_TAPS, LayerSpec

PARALLEL_WEIGHTS = 2**18
"""Weights (times tokens over 16) below which one thread does a linear: 13 microseconds of reading at 20 GB/s."""


@functools.cache
def layer_kernel(name: str) -> build.Kernel | None:
    """The loaded `LayerSpec` kernel for this machine, ``None`` when there is no compiler."""
    return build.load(build.for_this_machine(LayerSpec(name, build.best_isa())))


@launched
def w8a8_linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    act_pre_scale: Tensor | None,
    act_scale: Tensor | None,
    residual: Tensor | None = None,
) -> Launch | None:
    """`layer_ops.w8a8_linear` on the CPU: [..., o]."""
    dtype = x.dtype
    if dtype not in DTYPES or (act_pre_scale is not None and act_pre_scale.dtype is not dtype):
        if residual is not None:
            return None  # what is computed in another dtype than the operator's is rounded first
        if act_pre_scale is not None:
            x, act_pre_scale = x * act_pre_scale, None
    launch = _linear(x, None, None, 0.0, 1, qdata, scale, bias, act_pre_scale, act_scale, residual)
    return launch if launch is None or residual is not None else launch._replace(dtype=dtype)


@launched
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
    residual: Tensor | None = None,
    x_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
) -> Launch | None:
    """`layer_ops.norm_w8a8_linear` on the CPU: [..., o]."""
    operands = (x, gate, norm_weight, epsilon, group_size, qdata, scale, bias, act_pre_scale, act_scale)
    return _linear(*operands, residual, x_dtype, dtype)


def _linear(
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
    residual: Tensor | None = None,
    x_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
) -> Launch | None:
    """Both linears: without ``norm_weight`` there is no norm."""
    function = layer_kernel("w8a8_linear")
    o, k = qdata.shape
    if function is None or not qdata.is_contiguous() or scale.dtype is not torch.float32 or not scale.is_contiguous():
        return None
    if unfit_linear(x, qdata, scale, bias, act_pre_scale, act_scale, residual):
        return None
    rows = _rows(x, k)
    x_dtype = x_dtype or (x.dtype if x.dtype in DTYPES else torch.float32)
    normed = x_dtype
    if norm_weight is None:
        gate = None
    elif unfit_norm(x, gate, norm_weight, group_size) or any(
        dtype not in DTYPES for dtype in (x.dtype, x_dtype, norm_weight.dtype)
    ):
        return None
    else:
        normed = torch.promote_types(x_dtype, norm_weight.dtype)
    if act_pre_scale is not None and act_pre_scale.dtype is not normed:
        return None
    dtype, shape = dtype or normed, (*x.shape[:-1], o)
    if dtype not in DTYPES:
        return None
    y_dtype = dtype
    if residual is not None:
        if residual.dtype not in DTYPES:
            return None
        y_dtype = torch.promote_types(dtype, residual.dtype)
    y = empty(shape, y_dtype)
    tokens = x.numel() // k
    fields: list[Field] = [*rows, *(ABSENT if gate is None else _rows(gate, k))]
    fields += [*vector(norm_weight), *vector(act_pre_scale), *vector(bias)]
    fields += ABSENT if residual is None else _rows(residual, o)
    fields += [None if act_scale is None else contiguous_float(act_scale), qdata, scale, y]
    fields += [DTYPES[each] for each in (x_dtype, normed, dtype, y_dtype)]
    fields += [tokens, k, o, group_size, _bits_of(epsilon)]
    fields.append(torch.get_num_threads() if k * o * (1 + tokens // 16) >= PARALLEL_WEIGHTS else 1)
    return Launch(function, fields, y, y_dtype)


def _bits_of(number: float) -> int:
    """The integer whose 8 bytes are those of a C double."""
    return int(struct.unpack("q", struct.pack("d", number))[0])


@launched
def causal_conv(xBC: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Launch | None:
    """`layer_ops.causal_conv` on the CPU: y [b, d, l], tokens outermost in memory."""
    function = layer_kernel("causal_conv")
    dtype = weight.dtype
    batch, channels, seqlen = xBC.shape
    taps = weight.shape[-1]
    if function is None or dtype not in DTYPES or xBC.dtype is not dtype or taps > MOST_TAPS:
        return None
    if unfit_conv(channels, weight, bias):
        return None
    if xBC.stride(1) != 1:
        xBC = xBC.transpose(1, 2).contiguous().transpose(1, 2)
    y = empty((batch, seqlen, channels), dtype).transpose(1, 2)
    fields: list[Field] = [xBC, DTYPES[dtype], xBC.stride(0), xBC.stride(2), *vector(weight), *vector(bias)]
    fields += [y, batch, seqlen, channels, taps, silu, threads(y.numel())]
    return Launch(function, fields, y, dtype)


@launched
def conv_update(conv_state: Tensor, xBC: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Launch | None:
    """`layer_ops.conv_update` on the CPU: y [b, d, 1]."""
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
        or unfit_conv(channels, weight, bias)
        or unfit(xBC=(xBC, (batch, channels, 1)))
    ):
        return None
    y = empty((batch, channels, 1), dtype)
    fields: list[Field] = [conv_state, xBC, DTYPES[dtype], xBC.stride(0), xBC.stride(1)]
    fields += [*vector(weight), *vector(bias), y, batch, channels, length, taps, silu]
    # 2^16 elements take 26 us of one thread, 18 of two (Zen 4).
    fields.append(threads(conv_state.numel()) if batch > 1 else 1)
    return Launch(function, fields, y, dtype)


def _rows(x: Tensor, k: int) -> list[Field]:
    """The ``Input`` struct of x [..., k] as rows of one stride."""
    if x.dtype not in DTYPES:
        x = contiguous_float(x)
    if x.is_contiguous():
        return [x, DTYPES[x.dtype], k, 0]
    rows = x.reshape(-1, k)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    # A view begins where x does, and the address of x itself can be replayed.
    return [x if rows.data_ptr() == x.data_ptr() else rows, DTYPES[x.dtype], rows.stride(0), 0]
