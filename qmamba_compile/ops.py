"""The ``qmamba::*`` operators: schema, shape function, and implementation (a device kernel, or the plain reference).

Shapes: batch b, nheads h, headdim p, ngroups g, dstate n, seqlen l. ``x`` [b, h, p], ``dt`` [b, h] before bias and
softplus, ``A`` [h] (negative decay rates), ``B`` and ``C`` [b, g, n], ``D`` and ``dt_bias`` [h].

A checkpointed state comes with the tensors of its `recurrence.Ring`, one without gives None for each.

A state scale comes in one of two arguments, so that each schema tells the truth about what it writes:
``state_scale`` [h, n] is calibrated and only read, ``state_scale_out`` [b, h, n] is dynamic, read and rewritten.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import quant, recurrence, scan_gradient  # noqa: F401  defines the faithful scan and its gradient
from .cpu_templates import launch as cpu_kernels
from .cpu_templates import launch_layers as cpu_layers
from .cpu_templates import launch_scan as cpu_scans
from .huge_pages import HugePages
from .triton_templates import launch as gpu_kernels
from .triton_templates import launch_layers as gpu_layers
from .triton_templates import launch_scan as gpu_scans
from .triton_templates import launch_state as gpu_states

_library = torch.library.Library("qmamba", "DEF")

_SCAN_CHUNK = 64
"""Tokens that `chunk_scan` handles by one set of matrix products: the quadratic part grows with it, the number of small
products shrinks. 1024 tokens, 24 heads, dstate 128, 2 threads: 26.9 ms at 16, 19.4 at 32, 21.2 at 64, 34.8 at 128."""


def _define(schema: str) -> None:
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))


_define("quantize_state(Tensor state, Tensor? state_scale, int bits, bool stochastic, int seed) -> Tensor[]")
_define(
    "quantize_state_(Tensor(a!) packed, Tensor(b!) channel_scale, Tensor(c!)? state_scale_out, Tensor(d!) rng, "
    "Tensor state, Tensor? state_scale, int bits, bool stochastic, Tensor(e!)? ring_position=None) -> ()"
)
_define(
    "dequantize_state(Tensor packed, Tensor channel_scale, Tensor state_scale, int bits, Tensor? ring_x=None, "
    "Tensor? ring_B=None, Tensor? ring_decay=None, Tensor? ring_position=None, Tensor? ring_scale=None) -> Tensor"
)
_define(
    "ssm_update(Tensor(a!) packed, Tensor(b!) channel_scale, Tensor(c!)? state_scale_out, Tensor(d!) rng, Tensor x, "
    "Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor? state_scale, bool dt_softplus, "
    "int bits, bool stochastic, Tensor(e!)? ring_x=None, Tensor(f!)? ring_B=None, Tensor(g!)? ring_decay=None, "
    "Tensor(h!)? ring_position=None, Tensor(i!)? ring_scale=None) -> Tensor"
)
_define(
    "chunk_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, "
    "Tensor? initial_state, bool dt_softplus, float dt_min, float dt_max) -> (Tensor, Tensor)"
)
_define(
    "w8a8_linear(Tensor x, Tensor qdata, Tensor scale, Tensor? bias, Tensor? act_pre_scale, Tensor? act_scale, "
    "Tensor? residual=None) -> Tensor"
)
_define(
    "norm_w8a8_linear(Tensor x, Tensor? gate, Tensor norm_weight, float epsilon, int group_size, Tensor qdata, "
    "Tensor scale, Tensor? bias, Tensor? act_pre_scale, Tensor? act_scale, Tensor? residual=None, "
    "ScalarType? x_dtype=None, ScalarType? dtype=None) -> Tensor"
)
_define("causal_conv(Tensor xBC, Tensor weight, Tensor? bias, bool silu) -> Tensor")
_define("conv_update(Tensor(a!) conv_state, Tensor xBC, Tensor weight, Tensor? bias, bool silu) -> Tensor")


def _implement(name: str):  # type: ignore[no-untyped-def]
    return torch.library.impl(_library, name, "CompositeExplicitAutograd")


def _fake(name: str):  # type: ignore[no-untyped-def]
    return torch.library.register_fake(f"qmamba::{name}", lib=_library)


# --- state ---------------------------------------------------------------------------------------------------------

_state_pages = HugePages(2**24)
"""Where the codes lie that a prompt leaves; the chunk in use, 16 MB, outlives them."""


@_implement("quantize_state")
def quantize_state(state: Tensor, state_scale: Tensor | None, bits: int, stochastic: bool, seed: int) -> list[Tensor]:
    """Pack a fresh state [b, h, p, n]: packed, channel_scale, rng, and state_scale when dynamic."""
    rng = quant.new_rng(state.shape[0], seed, state.device)
    if state.is_cpu or state.is_cuda:
        batch, nheads, headdim, dstate = state.shape
        width = quant.packed_width(dstate, bits)
        dtype = torch.int8 if bits == 8 else torch.uint8
        packed = _state_pages.empty((batch, nheads, headdim, width), dtype=dtype, device=state.device)
        channel_scale = state.new_empty((batch, nheads, headdim), dtype=quant.SCALE_DTYPE)
        outputs = [packed, channel_scale, rng]
        state_scale_out = None
        if state_scale is None:
            state_scale_out = state.new_empty((batch, nheads, dstate), dtype=quant.SCALE_DTYPE)
            outputs.append(state_scale_out)
        kernels = cpu_kernels if state.is_cpu else gpu_states
        if kernels.quantize_state_(packed, channel_scale, state_scale_out, rng, state, state_scale, bits, stochastic):
            return outputs
    packed, channel_scale, found_scale = quant.quantize_state(
        state, bits, state_scale=state_scale, rng=rng if stochastic else None
    )
    rng[:, 1] += 1
    return [packed, channel_scale, rng] + ([found_scale] if state_scale is None else [])


@_fake("quantize_state")
def _(state: Tensor, state_scale: Tensor | None, bits: int, stochastic: bool, seed: int) -> list[Tensor]:
    batch, nheads, headdim, dstate = state.shape
    width = quant.packed_width(dstate, bits)
    outputs = [
        state.new_empty((batch, nheads, headdim, width), dtype=torch.int8 if bits == 8 else torch.uint8),
        state.new_empty((batch, nheads, headdim), dtype=quant.SCALE_DTYPE),
        state.new_empty((batch, 2), dtype=torch.int64),
    ]
    if state_scale is None:
        outputs.append(state.new_empty((batch, nheads, dstate), dtype=quant.SCALE_DTYPE))
    return outputs


@_implement("quantize_state_")
def quantize_state_(
    packed: Tensor,
    channel_scale: Tensor,
    state_scale_out: Tensor | None,
    rng: Tensor,
    state: Tensor,
    state_scale: Tensor | None,
    bits: int,
    stochastic: bool,
    ring_position: Tensor | None = None,
) -> None:
    """Requantize ``state`` [b, h, p, n] into the tensors of an existing packed state; its ring starts anew."""
    arguments = (packed, channel_scale, state_scale_out, rng, state, state_scale, bits, stochastic)
    kernels = cpu_kernels if packed.is_cpu else gpu_states
    if not (packed.is_cpu or packed.is_cuda) or not kernels.quantize_state_(*arguments):
        quantize_state_reference_(*arguments)
    if ring_position is not None:
        ring_position.zero_()


def quantize_state_reference_(
    packed: Tensor,
    channel_scale: Tensor,
    state_scale_out: Tensor | None,
    rng: Tensor,
    state: Tensor,
    state_scale: Tensor | None,
    bits: int,
    stochastic: bool,
    chosen: Tensor | None = None,
) -> None:
    """`quantize_state_` in plain torch, of the sequences that ``chosen`` [b] selects."""
    new_packed, new_channel_scale, new_state_scale = quant.quantize_state(
        state, bits, state_scale=state_scale, rng=rng if stochastic else None
    )
    stores = [(packed, new_packed), (channel_scale, new_channel_scale)]
    if state_scale_out is not None:
        stores.append((state_scale_out, new_state_scale))
    for target, value in stores:
        if chosen is not None:
            value = torch.where(chosen.view(-1, *[1] * (value.dim() - 1)), value, target)
        target.copy_(value)
    rng[:, 1] += 1 if chosen is None else chosen


@_fake("quantize_state_")
def _(packed, channel_scale, state_scale_out, rng, state, state_scale, bits, stochastic, *ring) -> None:  # type: ignore[no-untyped-def]
    return None


@_implement("dequantize_state")
def dequantize_state(
    packed: Tensor, channel_scale: Tensor, state_scale: Tensor, bits: int, *ring_tensors: Tensor | None
) -> Tensor:
    """float32 snapshot [b, h, p, n] of the state now."""
    state = None
    if packed.is_cpu or packed.is_cuda:
        kernels = cpu_kernels if packed.is_cpu else gpu_states
        state = kernels.dequantize_state(packed, channel_scale, state_scale, bits)
    if state is None:
        state = quant.dequantize_state(packed, channel_scale, state_scale, bits)
    ring = recurrence.ring_of(ring_tensors)
    return state if ring is None else recurrence.materialize(state, ring)


@_fake("dequantize_state")
def _(packed: Tensor, channel_scale: Tensor, state_scale: Tensor, bits: int, *ring: Tensor | None) -> Tensor:
    dstate = quant.unpacked_width(packed.shape[-1], bits)
    return packed.new_empty((*packed.shape[:-1], dstate), dtype=torch.float32)


# --- one decode step -----------------------------------------------------------------------------------------------


def ssm_update_reference(
    packed: Tensor,
    channel_scale: Tensor,
    state_scale_out: Tensor | None,
    rng: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    state_scale: Tensor | None,
    dt_softplus: bool,
    bits: int,
    stochastic: bool,
    *ring_tensors: Tensor | None,
) -> Tensor:
    """One step of the recurrence on a packed state, in plain torch: y [b, h, p].

    ``h = exp(dt*A) * h + (dt*B) x``, ``y = C.h + D x``; y is taken from h before h is requantized (Q-Mamba, Eq. 5-7).
    With a ring, only sequences whose ring is full requantize h; the others keep their codes and append their inputs.
    """
    ring = recurrence.ring_of(ring_tensors)
    scale = state_scale if state_scale_out is None else state_scale_out
    assert scale is not None
    checkpoint = quant.dequantize_state(packed, channel_scale, scale, bits)
    if ring is None:
        h, y = recurrence.step(checkpoint, x, dt, A, B, C, D, dt_bias, dt_softplus)
        quantize_state_reference_(packed, channel_scale, state_scale_out, rng, h, state_scale, bits, stochastic)
        return y
    dt, dA = recurrence.step_sizes(dt, A, dt_bias, dt_softplus)
    total = recurrence.elapsed(ring) + dA
    latest = recurrence.input_factors(x, dt, B)
    full = ring.position == ring.x.shape[1]
    h = torch.where(
        full.view(-1, 1, 1, 1),
        recurrence.materialize(checkpoint, ring, total, latest, to_store=True),
        recurrence.materialize(checkpoint, ring, total, latest),
    )
    quantize_state_reference_(packed, channel_scale, state_scale_out, rng, h, state_scale, bits, stochastic, full)
    recurrence.append_(ring, x, dt, B, total)
    return recurrence.read(h, x, C, D)


@_implement("ssm_update")
def ssm_update(packed: Tensor, *arguments: Any) -> Tensor:
    """`ssm_update_reference` by the fastest kernel that this device has."""
    y = None
    if packed.is_cpu:
        y = cpu_kernels.ssm_update(packed, *arguments)
    elif packed.is_cuda:
        ring = recurrence.ring_of(arguments[14:])
        y = gpu_kernels.ssm_update(packed, *arguments[:14], ring=ring)  # type: ignore[misc]
    if y is not None:
        return y
    return ssm_update_reference(packed, *arguments)


@_fake("ssm_update")
def _(packed, channel_scale, state_scale_out, rng, x, *args) -> Tensor:  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


# --- prefill -------------------------------------------------------------------------------------------------------


@_implement("chunk_scan")
def chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> tuple[Tensor, Tensor]:
    """The recurrence over a sequence (Mamba2's SSD): y [b, l, h, p] float32 and the final state [b, h, p, n].

    Group-wise, one chunk at a time: memory does not grow with seqlen beyond inputs and output. Any length.

    Args:
        x: [b, l, h, p]; dt: [b, l, h]; B, C: [b, l, g, n]; initial_state: [b, h, p, n].
    """
    if x.is_cuda:
        found = gpu_scans.chunk_scan(x, dt, A, B, C, D, dt_bias, initial_state, dt_softplus, dt_min, dt_max)
        if found is not None:
            return found
    dt = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    if dt_softplus:
        dt = F.softplus(dt)
    dt = dt.clamp(dt_min, dt_max)
    dtA = dt * A.float()
    if x.is_cpu:
        found = cpu_scans.chunk_scan(x, dt, dtA, B, C, D, initial_state)
        if found is not None:
            return found
    return chunk_scan_reference(x, dt, dtA, B, C, D, initial_state)


def chunk_scan_reference(
    x: Tensor, dt: Tensor, dtA: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`chunk_scan` in plain torch, from the final dt [b, l, h] and its product with A."""
    batch, seqlen, nheads, headdim = x.shape
    ngroups, dstate = B.shape[2:]
    repeats = nheads // ngroups
    dA = dtA.view(batch, seqlen, ngroups, repeats)
    x_heads = x.float().reshape(batch, seqlen, ngroups, repeats, headdim)
    dtx = x_heads * dt.view(batch, seqlen, ngroups, repeats, 1)
    B, C = B.float(), C.float()
    y = x.new_empty((batch, seqlen, ngroups, repeats, headdim), dtype=torch.float32)
    if initial_state is None:
        state = x.new_zeros((batch, ngroups, repeats, headdim, dstate), dtype=torch.float32)
    else:
        state = initial_state.float().reshape(batch, ngroups, repeats, headdim, dstate)
    for start in range(0, seqlen, _SCAN_CHUNK):
        chunk = slice(start, min(start + _SCAN_CHUNK, seqlen))
        length = chunk.stop - chunk.start
        decay = dA[:, chunk].cumsum(dim=1).permute(0, 2, 3, 1)  # [b, g, r, l]
        Bc, Cc = B[:, chunk].transpose(1, 2), C[:, chunk].transpose(1, 2)  # [b, g, l, n]
        xc = dtx[:, chunk].permute(0, 2, 3, 1, 4)  # [b, g, r, l, p]
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        between = (decay[..., :, None] - decay[..., None, :]).masked_fill(~causal, -torch.inf)
        scores = (Cc @ Bc.transpose(-1, -2))[:, :, None] * between.exp()  # [b, g, r, l, s]
        inside = scores @ xc
        carried = (Cc[:, :, None] @ state.transpose(-1, -2)) * decay.exp()[..., None]
        y[:, chunk] = (inside + carried).permute(0, 3, 1, 2, 4)
        to_end = (decay[..., -1:] - decay).exp()[..., None]
        state = state * decay[..., -1, None, None].exp() + (xc * to_end).transpose(-1, -2) @ Bc[:, :, None]
    if D is not None:
        y = y + x_heads * D.float().view(ngroups, repeats, 1)
    return y.view(batch, seqlen, nheads, headdim), state.reshape(batch, nheads, headdim, dstate).contiguous()


@_fake("chunk_scan")
def _(x, dt, A, B, *args) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    batch, _, nheads, headdim = x.shape
    y = x.new_empty(x.shape, dtype=torch.float32)
    return y, x.new_empty((batch, nheads, headdim, B.shape[-1]), dtype=torch.float32)


# --- linears -------------------------------------------------------------------------------------------------------


@_implement("w8a8_linear")
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
        kernels = cpu_layers if x.is_cpu else gpu_layers
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


@_fake("w8a8_linear")
def _(x: Tensor, qdata: Tensor, *args) -> Tensor:  # type: ignore[no-untyped-def]
    return _empty_linear(x, qdata, x.dtype, *args[4:])


def _empty_linear(x: Tensor, qdata: Tensor, dtype: torch.dtype, residual: Tensor | None = None) -> Tensor:
    if residual is not None:
        dtype = torch.promote_types(dtype, residual.dtype)
    return x.new_empty((*x.shape[:-1], qdata.shape[0]), dtype=dtype)


@_implement("norm_w8a8_linear")
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
    if x.is_cpu or x.is_cuda:
        kernels = cpu_layers if x.is_cpu else gpu_layers
        y = kernels.norm_w8a8_linear(x, *norm, *linear, residual, x_dtype, dtype)
        if y is not None:
            return y
    if dtype is not None or residual is not None:
        y = norm_w8a8_linear(x, *norm, *linear, None, x_dtype)
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


@_fake("norm_w8a8_linear")
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


@_implement("causal_conv")
def causal_conv(xBC: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """`causal_conv_reference` by the fastest kernel that this device has."""
    if xBC.is_cpu or xBC.is_cuda:
        kernels = cpu_layers if xBC.is_cpu else gpu_layers
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


@_fake("causal_conv")
def _(xBC: Tensor, weight: Tensor, *args) -> Tensor:  # type: ignore[no-untyped-def]
    batch, channels, seqlen = xBC.shape
    return xBC.new_empty((batch, seqlen, channels), dtype=weight.dtype).transpose(1, 2)


@_implement("conv_update")
def conv_update(conv_state: Tensor, xBC: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """`conv_update_reference` by the fastest kernel that this device has."""
    if xBC.is_cpu or xBC.is_cuda:
        kernels = cpu_layers if xBC.is_cpu else gpu_layers
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
    conv_state.copy_(window[..., 1:])
    y = F.conv1d(window[..., -weight.shape[-1] :], weight, bias, groups=weight.shape[0])
    return F.silu(y) if silu else y


@_fake("conv_update")
def _(conv_state: Tensor, xBC: Tensor, weight: Tensor, *args) -> Tensor:  # type: ignore[no-untyped-def]
    return xBC.new_empty(xBC.shape, dtype=weight.dtype)
