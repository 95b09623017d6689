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
from .render import Spec

log = logging.getLogger(__name__)

PARALLEL_ELEMENTS = 2**16
"""State elements below which one thread does the work: 8 heads of 64 x 128, about 10 microseconds. Between one thread
and all of them there is nothing: libgomp ends the surplus threads of a smaller team and has to start them again."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ABSENT: tuple[int, ...] = (0, 0, 0, 0)
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
        scale = readable(state_scale, contiguous=True)
        scale_fields = (scale.data_ptr(), DTYPES[scale.dtype], 0, 0)
    ring_fields = () if ring is None else tuple(0 if part is None else part.data_ptr() for part in ring)
    inputs, copies = _inputs(x, B, C, D)
    steps = _steps(dt, A, dt_bias, dt_softplus, copies)
    y = torch.empty(x.shape, dtype=x.dtype if x.dtype in DTYPES else torch.float32)
    # A step that only reads its codes has a quarter of the work.
    team = threads(batch * nheads * headdim * dstate // (1 if ring is None else 4))
    pointers = (packed.data_ptr(), channel_scale.data_ptr(), *scale_fields, rng.data_ptr(), *ring_fields)
    function(pack((*pointers, *inputs, *steps, y.data_ptr(), batch, nheads, B.shape[1], team)))
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
    y = torch.empty(x.shape, dtype=x.dtype if x.dtype in DTYPES else torch.float32)
    extents = (batch, nheads, B.shape[1], threads(state.numel()))
    function(pack((state.data_ptr(), *inputs, *steps, y.data_ptr(), *extents)))
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
    state = contiguous_float(state)
    if state_scale_out is not None:
        scale_fields: tuple[int, ...] = (state_scale_out.data_ptr(),)
    else:
        assert state_scale is not None
        state_scale = readable(state_scale, contiguous=True)
        scale_fields = (state_scale.data_ptr(), DTYPES[state_scale.dtype], 0, 0)
    fields = (state.data_ptr(), packed.data_ptr(), channel_scale.data_ptr(), *scale_fields, rng.data_ptr())
    function(pack((*fields, batch, nheads, threads(state.numel()))))
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
    state_scale = readable(state_scale, contiguous=True)
    state = torch.empty((batch, nheads, headdim, dstate))
    batch_stride = nheads * dstate if state_scale.dim() == 3 else 0
    scale_fields = (state_scale.data_ptr(), DTYPES[state_scale.dtype], batch_stride, 0)
    fields = (packed.data_ptr(), channel_scale.data_ptr(), *scale_fields, state.data_ptr())
    function(pack((*fields, batch, nheads, threads(state.numel()))))
    return state


def pack(fields: tuple[int, ...]) -> bytes:
    return _layout(len(fields)).pack(*fields)


@functools.cache
def _layout(count: int) -> struct.Struct:
    """A C struct of 8-byte fields: pointers and int64 alike."""
    return struct.Struct(f"{count}q")


def threads(elements: int) -> int:
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


def readable(tensor: Tensor, contiguous: bool = False) -> Tensor:
    """``tensor`` itself, or a copy in a dtype and with an inner stride that the kernels read."""
    if tensor.dtype not in DTYPES:
        return contiguous_float(tensor)
    if contiguous:
        return tensor.contiguous()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def contiguous_float(tensor: Tensor) -> Tensor:
    # Two calls of torch take a microsecond, as long as two heads of a step that only reads.
    if tensor.dtype is torch.float32 and tensor.is_contiguous():
        return tensor
    return tensor.to(torch.float32).contiguous()


def _steps(dt: Tensor, A: Tensor, dt_bias: Tensor | None, dt_softplus: bool, copies: list[Tensor]) -> tuple[int, ...]:
    """The ``Steps`` struct of ssm_update; what it points into, if it is not the caller's, goes to ``copies``."""
    if dt.dtype not in DTYPES:
        dt = dt.float()
    A = contiguous_float(A)
    copies += (dt, A)
    bias = 0
    if dt_bias is not None:
        dt_bias = contiguous_float(dt_bias)
        copies.append(dt_bias)
        bias = dt_bias.data_ptr()
    return (dt.data_ptr(), DTYPES[dt.dtype], *dt.stride(), bias, A.data_ptr(), dt_softplus)


def _inputs(x: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> tuple[list[int], list[Tensor]]:
    """The ``Input`` structs of ssm_update, and the tensors that they point into (to be kept until the call)."""
    fields: list[int] = []
    copies: list[Tensor] = []
    for tensor in (x, B, C):
        tensor = readable(tensor)
        copies.append(tensor)
        fields += (tensor.data_ptr(), DTYPES[tensor.dtype], *tensor.stride()[:2])
    if D is None:
        fields += ABSENT
    else:
        D = readable(D)
        copies.append(D)
        fields += vector(D)
    return fields, copies


def addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def vector(tensor: Tensor) -> tuple[int, ...]:
    """The ``Input`` struct of a contiguous vector."""
    return (tensor.data_ptr(), DTYPES[tensor.dtype], 0, 0)
