"""The operators ``qmamba::*`` of a layer around its state: int8 linears with their norms, causal convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import quant
from .cpu_templates import launch_layers as cpu_kernels
from .op_library import define, fake, implement
from .triton_templates import launch_layers as gpu_kernels

define(
    "w8a8_linear(Tensor x, Tensor qdata, Tensor scale, Tensor? bias, Tensor? act_pre_scale, Tensor? act_scale, "
    "Tensor? residual=None) -> Tensor"
)
define(
    "norm_w8a8_linear(Tensor x, Tensor? gate, Tensor norm_weight, float epsilon, int group_size, Tensor qdata, "
    "Tensor scale, Tensor? bias, Tensor? act_pre_scale, Tensor? act_scale, Tensor? residual=None, "
    "ScalarType? x_dtype=None, ScalarType? dtype=None) -> Tensor"
)
define("causal_conv(Tensor xBC, Tensor weight, Tensor? bias, bool silu) -> Tensor")
define("conv_update(Tensor(a!) conv_state, Tensor xBC, Tensor weight, Tensor? bias, bool silu) -> Tensor")

# --- linears -------------------------------------------------------------------------------------------------------


@implement("w8a8_linear")
def w8a8_linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    act_pre_scale: Tensor | None,
    act_scale: Tensor | None,
    residual: Tensor | None = None,
) -> Tensor:
    """`w8a8_linear_reference`, plus a residual [..., o] if there is one, by the fastest kernel that this device has."""
    operands = (x, qdata, scale, bias, act_pre_scale, act_scale)
    if x.is_cpu or x.is_cuda:
        kernels = cpu_kernels if x.is_cpu else gpu_kernels
        y = kernels.w8a8_linear(*operands, residual)
        if y is not None:
            return y
    if residual is not None:
        return _with_residual(w8a8_linear(*operands), residual)
    return w8a8_linear_reference(*operands)


def _with_residual(y: Tensor, residual: Tensor) -> Tensor:
    """Their sum, laid out like y."""
    if residual.shape != y.shape:
        raise ValueError(f"residual has shape {list(residual.shape)}, expected {list(y.shape)}, that of the linear")
    return (y + residual).contiguous()


def w8a8_linear_reference(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    act_pre_scale: Tensor | None,
    act_scale: Tensor | None,
) -> Tensor:
    """int8 x int8 linear [..., k] -> [..., o] with int32 accumulation.

    Args:
        qdata: int8 [o, k]; scale: float32 [o, 1], as a torchao ``Int8Tensor`` holds them.
        act_pre_scale: SmoothQuant factors [k] that multiply x, or ``None``.
        act_scale: static activation scale (one number); ``None`` quantizes each token by its own largest magnitude.
    """
    rows = x.reshape(-1, x.shape[-1])
    if act_pre_scale is not None:
        rows = rows * act_pre_scale
    if act_scale is None:
        codes, row_scale = quant.quantize_rows(rows)
    else:
        scaled = rows.float() * act_scale.reshape(1, 1).float().reciprocal()
        # int8 has no NaN: a row that is not finite gets a scale that makes it NaN again.
        finite = scaled.isfinite().all(dim=-1, keepdim=True)
        row_scale = torch.where(finite, act_scale.float(), torch.nan)
        codes = torch.where(finite, scaled, 0.0).round().clamp(-127, 127).to(torch.int8)
    y = quant.integer_product(codes, qdata).float() * row_scale * scale.view(1, -1)
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], qdata.shape[0])


@fake("w8a8_linear")
def _(x: Tensor, qdata: Tensor, *args) -> Tensor:  # type: ignore[no-untyped-def]
    return _empty_linear(x, qdata, x.dtype, *args[4:])


def _empty_linear(x: Tensor, qdata: Tensor, dtype: torch.dtype, residual: Tensor | None = None) -> Tensor:
    if residual is not None:
        dtype = torch.promote_types(dtype, residual.dtype)
    return x.new_empty((*x.shape[:-1], qdata.shape[0]), dtype=dtype)


@implement("norm_w8a8_linear")
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
) -> Tensor:
    """`w8a8_linear` of `rms_norm_reference`, by the fastest kernel that this device has: [..., k] -> [..., o].

    Args:
        x_dtype: what x is cast to first; None leaves it as it is.
        dtype: what y is rounded to before it is added to a residual; None is that of the normed x.
    """
    norm, linear = (gate, norm_weight, epsilon, group_size), (qdata, scale, bias, act_pre_scale, act_scale)
    operands = (*norm, *linear)
    if x.is_cpu or x.is_cuda:
        kernels = cpu_kernels if x.is_cpu else gpu_kernels
        y = kernels.norm_w8a8_linear(x, *operands, residual, x_dtype, dtype)
        if y is not None:
            return y
    if dtype is not None or residual is not None:
        y = norm_w8a8_linear(x, *operands, None, x_dtype)
        y = y if dtype is None else y.to(dtype)
        return y if residual is None else _with_residual(y, residual)
    x = x if x_dtype is None else x.to(x_dtype)
    return w8a8_linear(rms_norm_reference(x, *norm), *linear)


def rms_norm_reference(x: Tensor, gate: Tensor | None, norm_weight: Tensor, epsilon: float, group_size: int) -> Tensor:
    """RMSNorm of x [..., k], or of ``x * silu(gate)``, over groups of ``group_size`` features, in plain torch.

    In float32 up to the root mean square, then in x's dtype times ``norm_weight`` [k], as transformers has it.
    """
    h = x.float()
    if gate is not None:
        h = h * F.silu(gate.float())
    groups = h.unflatten(-1, (-1, group_size))
    groups = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + epsilon)
    return norm_weight * groups.flatten(-2).to(x.dtype)


@fake("norm_w8a8_linear")
def _(  # type: ignore[no-untyped-def]
    x,
    gate,
    norm_weight,
    epsilon,
    group_size,
    qdata,
    scale,
    bias,
    pre_scale,
    act_scale,
    residual=None,
    x_dtype=None,
    dtype=None,
) -> Tensor:
    normed = torch.promote_types(x_dtype or x.dtype, norm_weight.dtype)
    return _empty_linear(x, qdata, dtype or normed, residual)


# --- causal convolution: of a sequence, of a decode step -----------------------------------------------------------


@implement("causal_conv")
def causal_conv(xBC: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """`causal_conv_reference` by the fastest kernel that this device has."""
    if xBC.is_cpu or xBC.is_cuda:
        kernels = cpu_kernels if xBC.is_cpu else gpu_kernels
        y = kernels.causal_conv(xBC, weight, bias, silu)
        if y is not None:
            return y
    return causal_conv_reference(xBC, weight, bias, silu)


def causal_conv_reference(xBC: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """The depthwise causal convolution of a sequence, in plain torch: y [b, d, l], tokens outermost in memory.

    Args:
        xBC: the inputs [b, d, l]; those before the first are zero.
        weight: [d, 1, d_conv]; its dtype is xBC's and y's.
        silu: whether y goes through it.
    """
    batch, channels, seqlen = xBC.shape
    y = F.conv1d(xBC, weight, bias, padding=weight.shape[-1] - 1, groups=weight.shape[0])[..., :seqlen]
    # What follows reads the channels of a token together.
    return y.new_empty((batch, seqlen, channels)).transpose(1, 2).copy_(F.silu(y) if silu else y)


@fake("causal_conv")
def _(xBC: Tensor, weight: Tensor, *args) -> Tensor:  # type: ignore[no-untyped-def]
    batch, channels, seqlen = xBC.shape
    return xBC.new_empty((batch, seqlen, channels), dtype=weight.dtype).transpose(1, 2)


@implement("conv_update")
def conv_update(conv_state: Tensor, xBC: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """`conv_update_reference` by the fastest kernel that this device has."""
    if xBC.is_cpu or xBC.is_cuda:
        kernels = cpu_kernels if xBC.is_cpu else gpu_kernels
        y = kernels.conv_update(conv_state, xBC, weight, bias, silu)
        if y is not None:
            return y
    return conv_update_reference(conv_state, xBC, weight, bias, silu)


def conv_update_reference(conv_state: Tensor, xBC: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """One step of the depthwise causal convolution, in plain torch: y [b, d, 1].

    Args:
        conv_state: [b, d, s], the latest inputs of each of d channels; shifted in place by the new one.
        xBC: the new inputs [b, d, 1].
        weight: [d, 1, d_conv], ``d_conv <= s + 1``; its dtype is that of y.
        silu: whether y goes through it.
    """
    window = torch.cat([conv_state, xBC], dim=-1).to(weight.dtype)
    y = F.conv1d(window[..., -weight.shape[-1] :], weight, bias, groups=weight.shape[0])
    conv_state.copy_(window[..., 1:])
    return F.silu(y) if silu else y


@fake("conv_update")
def _(conv_state: Tensor, xBC: Tensor, weight: Tensor, *args) -> Tensor:  # type: ignore[no-untyped-def]
    return xBC.new_empty(xBC.shape, dtype=weight.dtype)
