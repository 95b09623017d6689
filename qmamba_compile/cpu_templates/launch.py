"""Call the generated kernels on tensors.

Each function returns ``None`` (or False) when it cannot serve its arguments, having written nothing, and the caller
runs the torch reference: no compiler, a dtype or a layout that the kernels do not read.
"""

from __future__ import annotations

import functools
import logging
import struct

import torch
from torch import Tensor

from .. import quant
from ..errors import ConfigError
from ..recurrence import Ring
from . import build
from .render import LayerSpec, Spec

log = logging.getLogger(__name__)

PARALLEL_ELEMENTS = 2**16
"""State elements below which one thread does the work: 8 heads of 64 x 128, about 10 microseconds. Between one thread
and all of them there is nothing: libgomp ends the surplus threads of a smaller team and has to start them again."""

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_ABSENT: tuple[int, ...] = (0, 0, 0, 0)
_RINGS = {torch.bfloat16: "bfloat16", torch.int8: "int8", torch.float32: "float32"}


@functools.cache
def kernel(
    name: str,
    headdim: int,
    dstate: int,
    bits: int | None,
    dynamic: bool,
    stochastic: bool,
    flush_interval: int = 1,
    ring: str | None = None,
) -> build.Kernel | None:
    """The loaded kernel for this machine, ``None`` when there is no compiler or no kernel for these extents."""
    isa = build.best_isa()
    vnni = ring is not None and isa == "avx512" and build.has_vnni()
    try:
        spec = Spec(name, headdim, dstate, bits, dynamic, stochastic, isa, flush_interval, ring, vnni)
    except ConfigError as error:
        log.warning("no C++ kernel, the slower torch reference runs instead: %s", error)
        return None
    return build.load(spec)


def ssm_update(
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
    ring: Ring | None = None,
) -> Tensor | None:
    """`ops.ssm_update` on the CPU: y [b, h, p]."""
    batch, nheads, headdim, width = packed.shape
    dynamic = state_scale_out is not None
    dstate = width * 8 // bits
    interval, kept_as = (1, None) if ring is None else (ring.x.shape[1] + 1, _RINGS[ring.x.dtype])
    function = kernel("ssm_update", headdim, dstate, bits, dynamic, stochastic, interval, kept_as)
    if function is None or not _writable(packed, channel_scale, state_scale_out, rng, ring):
        return None
    if state_scale_out is not None:
        scale = state_scale_out
        scale_fields: tuple[int, ...] = (scale.data_ptr(),)
    else:
        assert state_scale is not None
        scale = _readable(state_scale, contiguous=True)
        scale_fields = (scale.data_ptr(), _DTYPES[scale.dtype], 0, 0)
    ring_fields = () if ring is None else tuple(0 if part is None else part.data_ptr() for part in ring)
    inputs, copies = _inputs(x, B, C, D)
    steps = _steps(dt, A, dt_bias, dt_softplus, copies)
    y = torch.empty(x.shape, dtype=x.dtype if x.dtype in _DTYPES else torch.float32)
    # A step that only reads its codes has a quarter of the work.
    threads = _threads(batch * nheads * headdim * dstate // (1 if ring is None else 4))
    pointers = (packed.data_ptr(), channel_scale.data_ptr(), *scale_fields, rng.data_ptr(), *ring_fields)
    function(_pack((*pointers, *inputs, *steps, y.data_ptr(), batch, nheads, B.shape[1], threads)))
    return y if y.dtype is x.dtype else y.to(x.dtype)


def ssm_update_float(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor | None:
    """The same step on a contiguous float32 state [b, h, p, n], rewritten in place: the yardstick of the packed one."""
    batch, nheads, headdim, dstate = state.shape
    function = kernel("ssm_update", headdim, dstate, None, False, False)
    if function is None or state.dtype != torch.float32 or not state.is_contiguous():
        return None
    inputs, copies = _inputs(x, B, C, D)
    steps = _steps(dt, A, dt_bias, dt_softplus, copies)
    y = torch.empty(x.shape, dtype=x.dtype if x.dtype in _DTYPES else torch.float32)
    extents = (batch, nheads, B.shape[1], _threads(state.numel()))
    function(_pack((state.data_ptr(), *inputs, *steps, y.data_ptr(), *extents)))
    return y if y.dtype is x.dtype else y.to(x.dtype)


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
    """`ops.quantize_state_` on the CPU."""
    batch, nheads, headdim, dstate = state.shape
    function = kernel("quantize_state", headdim, dstate, bits, state_scale_out is not None, stochastic)
    if function is None or not _writable(packed, channel_scale, state_scale_out, rng):
        return False
    state = _contiguous_float(state)
    if state_scale_out is not None:
        scale_fields: tuple[int, ...] = (state_scale_out.data_ptr(),)
    else:
        assert state_scale is not None
        state_scale = _readable(state_scale, contiguous=True)
        scale_fields = (state_scale.data_ptr(), _DTYPES[state_scale.dtype], 0, 0)
    fields = (state.data_ptr(), packed.data_ptr(), channel_scale.data_ptr(), *scale_fields, rng.data_ptr())
    function(_pack((*fields, batch, nheads, _threads(state.numel()))))
    return True


def dequantize_state(packed: Tensor, channel_scale: Tensor, state_scale: Tensor, bits: int) -> Tensor | None:
    """`ops.dequantize_state` on the CPU."""
    if packed.dim() != 4 or channel_scale.dtype != quant.SCALE_DTYPE:
        return None
    batch, nheads, headdim, width = packed.shape
    dstate = width * 8 // bits
    function = kernel("dequantize_state", headdim, dstate, bits, True, False)
    if function is None:
        return None
    packed, channel_scale = packed.contiguous(), channel_scale.contiguous()
    state_scale = _readable(state_scale, contiguous=True)
    state = torch.empty((batch, nheads, headdim, dstate))
    batch_stride = nheads * dstate if state_scale.dim() == 3 else 0
    scale_fields = (state_scale.data_ptr(), _DTYPES[state_scale.dtype], batch_stride, 0)
    fields = (packed.data_ptr(), channel_scale.data_ptr(), *scale_fields, state.data_ptr())
    function(_pack((*fields, batch, nheads, _threads(state.numel()))))
    return state


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
    if function is None:
        return None
    fields, kept = _sequences(x, B, C)
    floats = [None if tensor is None else _contiguous_float(tensor) for tensor in (D, dt, dtA, initial_state)]
    kept += [tensor for tensor in floats if tensor is not None]
    y, state = torch.empty((batch, seqlen, nheads, headdim)), torch.empty((batch, nheads, headdim, dstate))
    D_address, *addresses = _addresses(*floats, y, state)
    fields += (D_address, 0, 0, 0, *addresses)
    function(_pack((*fields, batch, seqlen, nheads, B.shape[2], _threads(seqlen * state.numel()))))
    return y, state


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
    """The faithful scan on the CPU; ``dt`` and ``decay`` [b, l, h] as `scan_ops.step_sizes` gives them.

    Args:
        states: the state before the first token, as decode reads it, and with ``single_step`` its quantized copy.
        scales: calibrated state_scale [h, n] and channel_scale [h, p].

    Returns:
        y and codes int8 [b, h, p, n], channel_scale [b, h, p], state_scale [b, h, n] (left as they were when dynamic is
        off) after the last store; ``bits=None``: y and the state. No store happens before step ``flush_interval``.
    """
    batch, seqlen, nheads, headdim = x.shape
    dstate = B.shape[-1]
    function, fields, kept = _scan_call(
        "ssm_scan", x, dt, decay, B, C, D, states, scales, bits, stochastic, seed, flush_interval, single_step
    )
    if function is None:
        return None
    outputs = [torch.empty((batch, seqlen, nheads, headdim))]
    if bits is None:
        outputs.append(torch.empty((batch, nheads, headdim, dstate)))
        addresses: tuple[int, ...] = (outputs[0].data_ptr(), outputs[1].data_ptr(), 0, 0, 0)
    else:
        outputs += [
            torch.empty((batch, nheads, headdim, dstate), dtype=torch.int8),
            torch.empty((batch, nheads, headdim), dtype=quant.SCALE_DTYPE),
            torch.empty((batch, nheads, dstate), dtype=quant.SCALE_DTYPE),
        ]
        addresses = (outputs[0].data_ptr(), 0, *(output.data_ptr() for output in outputs[1:]))
    function(_pack((*fields, *addresses, *[0] * _GRADIENT_FIELDS)))
    del kept
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
    """Gradient of `ssm_scan` without D: of x, dt, decay, B and C for each head [b, l, h, n], and the first state."""
    batch, seqlen, nheads, headdim = x.shape
    dstate = B.shape[-1]
    function, fields, kept = _scan_call(
        "ssm_scan_backward",
        x,
        dt,
        decay,
        B,
        C,
        None,
        states,
        scales,
        bits,
        stochastic,
        seed,
        flush_interval,
        single_step,
    )
    if function is None:
        return None
    grad_y = _contiguous_float(grad_y)
    grad_state = None if grad_state is None else _contiguous_float(grad_state)
    tokens = (batch, seqlen, nheads)
    shapes = [
        (*tokens, headdim),
        tokens,
        tokens,
        (*tokens, dstate),
        (*tokens, dstate),
        (batch, nheads, headdim, dstate),
    ]
    outputs = [torch.empty(shape) for shape in shapes]
    function(_pack((*fields, *[0] * 5, *_addresses(grad_y, grad_state, *outputs))))
    del kept
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
    scales: tuple[Tensor | None, Tensor | None],
    bits: int | None,
    stochastic: bool,
    seed: int,
    flush_interval: int,
    single_step: bool,
) -> tuple[build.Kernel | None, list[int], list[Tensor]]:
    """The kernel, the fields that scan and gradient share, and the tensors that they point into."""
    batch, seqlen, nheads, headdim = x.shape
    function = kernel(name, headdim, B.shape[-1], bits, bits is not None and scales[0] is None, stochastic)
    fields, kept = _sequences(x, B, C)
    kept += (dt, decay)
    readable = [None if tensor is None else _readable(tensor, contiguous=True) for tensor in (D, *scales)]
    inputs = [_ABSENT if tensor is None else (tensor.data_ptr(), _DTYPES[tensor.dtype], 0, 0) for tensor in readable]
    floats = [None if tensor is None else _contiguous_float(tensor) for tensor in states]
    kept += [tensor for tensor in (*readable, *floats) if tensor is not None]
    fields += (*inputs[0], *_addresses(dt, decay, *floats), *inputs[1], *inputs[2])
    threads = _threads(batch * nheads * headdim * B.shape[-1] * seqlen)
    fields += (batch, seqlen, nheads, B.shape[2], seed, flush_interval, int(single_step and bits is not None), threads)
    return function, fields, kept


def _sequences(*tensors: Tensor) -> tuple[list[int], list[Tensor]]:
    """``Sequence`` structs of tensors [b, l, heads or groups, columns], and what they point into."""
    fields: list[int] = []
    kept: list[Tensor] = []
    for tensor in tensors:
        if tensor.dtype not in _DTYPES:
            tensor = tensor.float()
        _, _, heads, columns = tensor.shape
        if heads > 1 and tensor.stride(2) != columns * tensor.stride(3):
            tensor = tensor.contiguous()
        # A dimension of one element may have any stride.
        column_stride = tensor.stride(3) if columns > 1 else tensor.stride(2) if heads > 1 else 1
        kept.append(tensor)
        fields += (tensor.data_ptr(), _DTYPES[tensor.dtype], tensor.stride(0), tensor.stride(1), column_stride)
    return fields, kept


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


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
    if act_pre_scale is not None and (act_pre_scale.dtype is not dtype or dtype not in _DTYPES):
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
    gate_fields, norm_fields = _ABSENT, _ABSENT
    if norm_weight is not None:
        if x.dtype not in _DTYPES or norm_weight.dtype not in _DTYPES:
            return None
        dtype = torch.promote_types(dtype, norm_weight.dtype)
        norm_weight = norm_weight.contiguous()
        norm_fields = _vector(norm_weight)
        if gate is not None:
            gate, gate_fields = _rows(gate, k)
    smooth_fields = bias_fields = _ABSENT
    if act_pre_scale is not None:
        if act_pre_scale.dtype is not dtype:
            return None
        act_pre_scale = act_pre_scale.contiguous()
        smooth_fields = _vector(act_pre_scale)
    if bias is not None:
        bias = _readable(bias, contiguous=True)
        bias_fields = _vector(bias)
    if act_scale is not None:
        act_scale = _contiguous_float(act_scale)
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
        _DTYPES[dtype],
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


def _vector(tensor: Tensor) -> tuple[int, ...]:
    """The ``Input`` struct of a contiguous vector."""
    return (tensor.data_ptr(), _DTYPES[tensor.dtype], 0, 0)


def conv_update(conv_state: Tensor, xBC: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor | None:
    """`ops.conv_update` on the CPU: y [b, d, 1]."""
    function = layer_kernel("conv_update")
    dtype = weight.dtype
    batch, channels, length = conv_state.shape
    taps = weight.shape[-1]
    if (
        function is None
        or dtype not in _DTYPES
        or conv_state.dtype is not dtype
        or xBC.dtype is not dtype
        or not conv_state.is_contiguous()
        or not 1 <= taps <= length + 1
    ):
        return None
    weight = weight.contiguous()
    fields: list[int] = [conv_state.data_ptr(), xBC.data_ptr(), _DTYPES[dtype], xBC.stride(0), xBC.stride(1)]
    fields += _vector(weight)
    if bias is None:
        fields += _ABSENT
    else:
        bias = _readable(bias, contiguous=True)
        fields += _vector(bias)
    y = torch.empty((batch, channels, 1), dtype=dtype)
    function(_pack((*fields, y.data_ptr(), batch, channels, length, taps, silu)))
    return y


def _rows(x: Tensor, k: int) -> tuple[Tensor, tuple[int, ...]]:
    """x [..., k] as rows of one stride, and its ``Input`` struct."""
    if x.dtype not in _DTYPES:
        x = _contiguous_float(x)
    if x.is_contiguous():
        return x, (x.data_ptr(), _DTYPES[x.dtype], k, 0)
    rows = x.reshape(-1, k)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    return rows, (rows.data_ptr(), _DTYPES[x.dtype], rows.stride(0), 0)


def _pack(fields: tuple[int, ...]) -> bytes:
    return _layout(len(fields)).pack(*fields)


@functools.cache
def _layout(count: int) -> struct.Struct:
    """A C struct of 8-byte fields: pointers and int64 alike."""
    return struct.Struct(f"{count}q")


def _threads(elements: int) -> int:
    return torch.get_num_threads() if elements >= PARALLEL_ELEMENTS else 1


def _writable(
    packed: Tensor, channel_scale: Tensor, state_scale_out: Tensor | None, rng: Tensor, ring: Ring | None = None
) -> bool:
    """The kernels write in place, so these cannot be copied into a layout that suits them."""
    if ring is not None and not all(part is None or part.is_contiguous() for part in ring):
        return False
    return (
        packed.is_contiguous()
        and channel_scale.is_contiguous()
        and channel_scale.dtype is quant.SCALE_DTYPE
        and rng.is_contiguous()
        and (
            state_scale_out is None or (state_scale_out.is_contiguous() and state_scale_out.dtype is quant.SCALE_DTYPE)
        )
    )


def _readable(tensor: Tensor, contiguous: bool = False) -> Tensor:
    """``tensor`` itself, or a copy in a dtype and with an inner stride that the kernels read."""
    if tensor.dtype not in _DTYPES:
        return _contiguous_float(tensor)
    if contiguous:
        return tensor.contiguous()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _contiguous_float(tensor: Tensor) -> Tensor:
    # Two calls of torch take a microsecond, as long as two heads of a step that only reads.
    if tensor.dtype is torch.float32 and tensor.is_contiguous():
        return tensor
    return tensor.to(torch.float32).contiguous()


def _steps(dt: Tensor, A: Tensor, dt_bias: Tensor | None, dt_softplus: bool, copies: list[Tensor]) -> tuple[int, ...]:
    """The ``Steps`` struct of ssm_update; what it points into, if it is not the caller's, goes to ``copies``."""
    if dt.dtype not in _DTYPES:
        dt = dt.float()
    A = _contiguous_float(A)
    copies += (dt, A)
    bias = 0
    if dt_bias is not None:
        dt_bias = _contiguous_float(dt_bias)
        copies.append(dt_bias)
        bias = dt_bias.data_ptr()
    return (dt.data_ptr(), _DTYPES[dt.dtype], *dt.stride(), bias, A.data_ptr(), dt_softplus)


def _inputs(x: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> tuple[list[int], list[Tensor]]:
    """The ``Input`` structs of ssm_update, and the tensors that they point into (to be kept until the call)."""
    fields: list[int] = []
    copies: list[Tensor] = []
    for tensor in (x, B, C):
        tensor = _readable(tensor)
        copies.append(tensor)
        fields += (tensor.data_ptr(), _DTYPES[tensor.dtype], *tensor.stride()[:2])
    if D is None:
        fields += _ABSENT
    else:
        D = _readable(D)
        copies.append(D)
        fields += _vector(D)
    return fields, copies
