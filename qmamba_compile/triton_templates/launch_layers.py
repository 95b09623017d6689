"""Call the kernels around the recurrence, as `launch` calls those of a step and under the same promises.

A linear is two or three launches: `quantize_rows`, with the norm where there is one in front; the int8 product with its
scales, bias and residual; their sum over the parts of k, where it is split. From Hopper on, the product starts while
rows are quantized. Few rows without a norm need no launch of their own to be quantized.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from ..extents import unfit, unfit_conv, unfit_linear, unfit_norm
from ..quant import FLOATS
from . import launch, tuning
from .layer_specs import COMBINE_BLOCK, ConvSpec, LinearSpec, RowsSpec
from .render import load, triton_dtype


class Norm(NamedTuple):
    """An RMSNorm in front of a linear: gate [m, k] or None, its weight [k], epsilon, features of a group, and the dtype
    that what is normed is cast to, if any."""

    gate: Tensor | None
    weight: Tensor
    epsilon: float
    group_size: int
    x_dtype: torch.dtype | None = None


@functools.cache
def _rows_spec(architecture: str, k: int, group_size: int | None) -> RowsSpec | None:
    try:
        return tuning.quantize_rows(architecture, k, group_size)
    except ConfigError as error:
        return launch.refuse("quantize_rows", str(error))


def quantize_rows(
    x: Tensor,
    act_pre_scale: Tensor | None,
    act_scale: Tensor | None,
    norm: Norm | None = None,
) -> tuple[Tensor, Tensor] | None:
    """int8 codes [m, k] and float32 scale [m] of x [m, k], as `layer_ops.w8a8_linear_reference` quantizes it.

    Args:
        norm: the RMSNorm in front.
    """
    architecture = launch.target(x.device.type, x.device.index)
    gate, norm_weight, epsilon, group_size, x_dtype = norm or (None, None, 0.0, None, None)
    floats = [t for t in (x, gate, norm_weight, act_pre_scale) if t is not None]
    if architecture is None:
        return None
    if wrong := _unfit_dtype(*floats):
        return launch.refuse("quantize_rows", wrong)
    spec = _rows_spec(architecture, x.shape[1], group_size)
    if spec is None:
        return None
    x = x if x.stride(1) == 1 else x.contiguous()
    gate = gate if gate is None or gate.stride(1) == 1 else gate.contiguous()
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    row_scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    vectors = [None if t is None else t.contiguous() for t in (norm_weight, act_pre_scale)]
    arguments: tuple[object, ...] = (vectors[1], act_scale, codes, row_scale)
    if norm is None:
        arguments = (x, *arguments, x.stride(0))
    else:
        gate_stride = 0 if gate is None else gate.stride(0)
        arguments = (
            x,
            gate,
            vectors[0],
            *arguments,
            epsilon,
            x.stride(0),
            gate_stride,
            triton_dtype(x_dtype or x.dtype),
        )
    load(spec).quantize_rows[x.shape[0],](*arguments, num_warps=spec.warps, enable_fp_fusion=False)
    return codes, row_scale


def w8a8_linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    act_pre_scale: Tensor | None,
    act_scale: Tensor | None,
    residual: Tensor | None = None,
) -> Tensor | None:
    """`layer_ops.w8a8_linear` on a GPU: one kernel for a small x, which quantizes on the way."""
    if wrong := unfit_linear(x, qdata, scale, bias, act_pre_scale, act_scale, residual) or _unfit_dtype(residual):
        return launch.refuse("w8a8_linear", wrong)
    y = _quantize_on_the_way(x, qdata, scale, bias, act_pre_scale, act_scale, residual)
    if y is not None or x.numel() == 0:
        return y
    return _quantize_and_multiply(x, x.dtype, qdata, scale, bias, act_pre_scale, act_scale, residual, None)


def norm_w8a8_linear(
    x: Tensor,
    gate: Tensor | None,
    norm_weight: Tensor,
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
) -> Tensor | None:
    """`layer_ops.norm_w8a8_linear` on a GPU."""
    if x.numel() == 0:
        return None
    if wrong := (
        unfit_linear(x, qdata, scale, bias, act_pre_scale, act_scale, residual)
        or unfit_norm(x, gate, norm_weight, group_size)
        or _unfit_dtype(residual)
    ):
        return launch.refuse("norm_w8a8_linear", wrong)
    k = qdata.shape[1]
    norm = Norm(None if gate is None else gate.reshape(-1, k), norm_weight, epsilon, group_size, x_dtype)
    dtype = dtype or torch.promote_types(x_dtype or x.dtype, norm_weight.dtype)
    for wanted in (dtype, x_dtype):
        if wanted is not None and wanted not in FLOATS:
            return launch.refuse("norm_w8a8_linear", f"{wanted}; float32, bfloat16 and float16 are allowed")
    return _quantize_and_multiply(x, dtype, qdata, scale, bias, act_pre_scale, act_scale, residual, norm)


def _quantize_on_the_way(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    act_pre_scale: Tensor | None,
    act_scale: Tensor | None,
    residual: Tensor | None = None,
) -> Tensor | None:
    """`layer_ops.w8a8_linear` of an x small enough that each program quantizes it anew; ``None`` for others."""
    architecture = launch.target(x.device.type, x.device.index)
    outputs, k = qdata.shape
    rows = x.numel() // k
    if architecture is None or rows == 0:
        return None
    spec = tuning.w8a8_linear(architecture, rows, outputs, k)
    if spec.prequantized or x.dtype not in FLOATS:
        return None
    scale = scale.contiguous()
    bias, act_pre_scale = (None if vector is None else vector.contiguous() for vector in (bias, act_pre_scale))
    flat = x.reshape(rows, k)
    if flat.stride(1) != 1 or not qdata.is_contiguous():
        return None
    y, residual = _output(x, outputs, x.dtype, residual)
    partial = _partial(spec, rows, y)
    row_scale = None if partial is None else torch.empty(rows, dtype=torch.float32, device=x.device)
    arguments = (flat, act_pre_scale, act_scale, qdata, scale, bias, residual, y, partial, row_scale, rows)
    linear_dtype = triton_dtype(x.dtype)
    load(spec).w8a8_linear[_linear_grid(spec, rows, outputs)](
        *arguments, flat.stride(0), outputs, k, linear_dtype, num_warps=spec.warps, enable_fp_fusion=False
    )
    if partial is not None:
        _combine(spec, partial, row_scale, scale, bias, residual, y, linear_dtype)
    return y


def _quantize_and_multiply(
    x: Tensor,
    dtype: torch.dtype,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    act_pre_scale: Tensor | None,
    act_scale: Tensor | None,
    residual: Tensor | None,
    norm: Norm | None,
) -> Tensor | None:
    """y [..., o] of ``dtype``, in which it is added to the residual, if there is one."""
    outputs, k = qdata.shape
    # Copies come before `quantize_rows`: scale, bias and residual are read before the product waits for it.
    qdata, scale, bias = qdata.contiguous(), scale.contiguous(), None if bias is None else bias.contiguous()
    y, residual = _output(x, outputs, dtype, residual)
    quantized = quantize_rows(x.reshape(-1, k), act_pre_scale, act_scale, norm)
    if quantized is None:
        return None
    codes, row_scale = quantized
    rows = codes.shape[0]
    architecture = launch.target(x.device.type, x.device.index)
    assert architecture is not None
    spec = tuning.w8a8_linear(architecture, rows, outputs, k, prequantized=True)
    partial, linear_dtype = _partial(spec, rows, y), triton_dtype(dtype)
    load(spec).w8a8_linear[_linear_grid(spec, rows, outputs)](
        codes,
        qdata,
        scale,
        bias,
        residual,
        y,
        partial,
        row_scale,
        rows,
        outputs,
        k,
        linear_dtype,
        num_warps=spec.warps,
        enable_fp_fusion=False,
        **({"launch_pdl": True} if spec.overlaps else {}),
    )
    if partial is not None:
        _combine(spec, partial, row_scale, scale, bias, residual, y, linear_dtype)
    return y


def _output(x: Tensor, outputs: int, dtype: torch.dtype, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Where a linear of ``dtype`` and its residual go, and the residual as kernels read it."""
    if residual is not None:
        dtype, residual = torch.promote_types(dtype, residual.dtype), residual.contiguous()
    return torch.empty((*x.shape[:-1], outputs), dtype=dtype, device=x.device), residual


def _linear_grid(spec: LinearSpec, rows: int, outputs: int) -> tuple[int, int, int]:
    return -(-outputs // spec.block_o), spec.splits, -(-rows // spec.block_m)


def _partial(spec: LinearSpec, rows: int, y: Tensor) -> Tensor | None:
    """Where the sums over each part of k go, [splits, rows, o]; ``None`` where it is not split."""
    if spec.splits == 1:
        return None
    return torch.empty((spec.splits, rows, y.shape[-1]), dtype=torch.int32, device=y.device)


def _combine(
    spec: LinearSpec,
    partial: Tensor,
    row_scale: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    linear_dtype: Any,
) -> None:
    _, rows, outputs = partial.shape
    load(spec).combine[rows, -(-outputs // COMBINE_BLOCK)](
        *(partial, row_scale, scale, bias, residual, y, rows, outputs, linear_dtype),
        num_warps=spec.warps,
        enable_fp_fusion=False,
    )


def causal_conv(xBC: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor | None:
    """`layer_ops.causal_conv` on a GPU: y [b, d, l], tokens outermost in memory."""
    architecture = launch.target(xBC.device.type, xBC.device.index)
    if architecture is None:
        return None
    batch, channels, seqlen = xBC.shape
    taps = weight.shape[-1]
    if wrong := _unfit_dtype(xBC, weight, bias) or unfit_conv(channels, weight, bias):
        return launch.refuse("causal_conv", wrong)
    if any(t.dtype != weight.dtype for t in (xBC, bias) if t is not None):
        return launch.refuse("causal_conv", "xBC, weight and bias differ in dtype")
    if batch > _MOST_BATCH:
        return launch.refuse("causal_conv", f"a batch above {_MOST_BATCH}")
    try:
        spec = tuning.causal_conv(architecture, batch, channels, seqlen, taps, weight.itemsize)
    except ConfigError as error:
        return launch.refuse("causal_conv", str(error))
    y = torch.empty((batch, seqlen, channels), dtype=weight.dtype, device=xBC.device)
    if y.numel() == 0:
        return y.transpose(1, 2)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    stride_b, stride_d, stride_l = xBC.stride()
    unit = math.gcd(16 // weight.itemsize, channels, stride_b, stride_l)
    load(spec).causal_conv[-(-channels // spec.block) * -(-seqlen // spec.tokens), batch](
        xBC,
        weight,
        bias,
        y,
        channels // unit,
        seqlen,
        stride_b // unit,
        stride_l // unit,
        stride_d,
        unit,
        silu,
        num_warps=spec.warps,
        enable_fp_fusion=False,
    )
    return y.transpose(1, 2)


def conv_update(conv_state: Tensor, xBC: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor | None:
    """`layer_ops.conv_update` on a GPU: y [b, d, 1], the state shifted in place."""
    architecture = launch.target(xBC.device.type, xBC.device.index)
    if architecture is None:
        return None
    if not conv_state.is_contiguous():
        return launch.refuse("conv_update", "conv_state is not contiguous")
    batch, channels, length = conv_state.shape
    if wrong := (
        _unfit_dtype(conv_state, xBC, weight, bias)
        or unfit_conv(channels, weight, bias)
        or unfit(xBC=(xBC, (batch, channels, 1)))
    ):
        return launch.refuse("conv_update", wrong)
    if batch > _MOST_BATCH:
        return launch.refuse("conv_update", f"a batch above {_MOST_BATCH}")
    spec = _conv_spec(architecture, batch * channels, length, weight.shape[-1])
    if spec is None:
        return None
    y = torch.empty((batch, channels, 1), dtype=weight.dtype, device=xBC.device)
    if y.numel() == 0:
        return y
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    load(spec).conv_update[-(-channels // spec.block), batch](
        conv_state,
        xBC,
        weight,
        bias,
        y,
        channels,
        *xBC.stride()[:2],
        silu,
        num_warps=spec.warps,
        enable_fp_fusion=False,
    )
    return y


def _unfit_dtype(*tensors: Tensor | None) -> str | None:
    """Why the kernels do not take one of ``tensors``."""
    wrong = [str(t.dtype) for t in tensors if t is not None and t.dtype not in FLOATS]
    return f"{wrong[0]}; float32, bfloat16 and float16 are allowed" if wrong else None


_MOST_BATCH = 65535
"""CUDA's limit of a grid's second extent."""


@functools.cache
def _conv_spec(architecture: str, channels: int, length: int, taps: int) -> ConvSpec | None:
    try:
        return tuning.conv_update(architecture, channels, length, taps)
    except ConfigError as error:
        return launch.refuse("conv_update", str(error))
