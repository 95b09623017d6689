"""Call the generated kernels on tensors.

Each function returns ``None`` (or False) when it cannot serve its arguments, having written nothing, and the caller
runs the torch reference: no compiler, a dtype or a layout that the kernels do not read, extents that
do not fit together.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import quant
from ..errors import ConfigError
from ..extents import unfit, unfit_ring, unfit_state, unfit_step
from ..recurrence import Ring, ring_of
from . import build
from .call_site import Field, Launch, launched, pack
from .specs import Spec

log = logging.getLogger(__name__)

PARALLEL_ELEMENTS = 2**16
"""State elements below which one thread does the work: 8 heads of 64 x 128, about 10 microseconds. Between one thread
and all of them there is nothing: libgomp ends the surplus threads of a smaller team and has to start them again."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ABSENT: tuple[Field, ...] = (0, 0, 0, 0)
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
    try:
        spec = Spec(name, headdim, dstate, bits, dynamic, stochastic, isa, flush_interval, ring)
    except ConfigError as error:
        log.warning("no C++ kernel, the slower torch reference runs instead: %s", error)
        return None
    return build.load(build.for_this_machine(spec))


@launched
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
    *ring_tensors: Tensor | None,
) -> Launch | None:
    """`ops.ssm_update` on the CPU: y [b, h, p]."""
    ring = ring_of(ring_tensors)
    batch, nheads, headdim, width = packed.shape
    dynamic = state_scale_out is not None
    dstate = quant.unpacked_width(width, bits)
    extents = (batch, nheads, headdim, dstate)
    if (
        not _writable(packed, channel_scale, state_scale_out, rng, ring)
        or unfit_state(packed, channel_scale, state_scale_out, state_scale, bits, rng)
        or unfit_step(extents, x, dt, A, B, C, D, dt_bias)
        or (ring is not None and unfit_ring(ring, extents, B.shape[1]))
    ):
        return None
    interval, kept_as = (1, None) if ring is None else (ring.x.shape[1] + 1, _RINGS[ring.x.dtype])
    function = kernel("ssm_update", headdim, dstate, bits, dynamic, stochastic, interval, kept_as)
    if function is None:
        return None
    y = empty(x.shape, x.dtype if x.dtype in DTYPES else torch.float32)
    # A step that only reads its codes has a quarter of the work.
    team = threads(batch * nheads * headdim * dstate // (1 if ring is None else 4))
    fields: list[Field] = [packed, channel_scale, *_scale(state_scale_out, state_scale), rng, *(ring or ())]
    fields += [*_inputs(x, B, C, D), *_steps(dt, A, dt_bias, dt_softplus), y, batch, nheads, B.shape[1], team]
    return Launch(function, fields, y, x.dtype)


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
    if unfit_step((batch, nheads, headdim, dstate), x, dt, A, B, C, D, dt_bias):
        return None
    y = empty(x.shape, x.dtype if x.dtype in DTYPES else torch.float32)
    fields: list[Field] = [state, *_inputs(x, B, C, D), *_steps(dt, A, dt_bias, dt_softplus)]
    fields += [y, batch, nheads, B.shape[1], threads(state.numel())]
    return Launch(function, fields, y, x.dtype).run()


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
    packed_shape = (batch, nheads, headdim, quant.packed_width(dstate, bits))
    if unfit(packed=(packed, packed_shape)) or unfit_state(
        packed, channel_scale, state_scale_out, state_scale, bits, rng
    ):
        return False
    fields: list[Field] = [contiguous_float(state), packed, channel_scale, *_scale(state_scale_out, state_scale), rng]
    fields += [batch, nheads, threads(state.numel())]
    function(pack(fields))
    return True


def dequantize_state(packed: Tensor, channel_scale: Tensor, state_scale: Tensor, bits: int) -> Tensor | None:
    """`ops.dequantize_state` on the CPU."""
    if packed.dim() != 4 or channel_scale.dtype != quant.SCALE_DTYPE:
        return None
    dynamic = state_scale.dim() == 3
    if unfit_state(packed, channel_scale, state_scale if dynamic else None, None if dynamic else state_scale, bits):
        return None
    batch, nheads, headdim, width = packed.shape
    dstate = quant.unpacked_width(width, bits)
    function = kernel("dequantize_state", headdim, dstate, bits, True, False)
    if function is None:
        return None
    state_scale = readable(state_scale, contiguous=True)
    state = empty((batch, nheads, headdim, dstate))
    batch_stride = nheads * dstate if dynamic else 0
    fields: list[Field] = [packed.contiguous(), channel_scale.contiguous()]
    fields += [state_scale, DTYPES[state_scale.dtype], batch_stride, 0]
    fields += [state, batch, nheads, threads(state.numel())]
    function(pack(fields))
    return state


def empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """What a kernel writes to: never in the dtype or on the device that ``torch.set_default_dtype`` and
    ``torch.set_default_device`` give to tensors without one of their own."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def threads(elements: int) -> int:
    return torch.get_num_threads() if elements >= PARALLEL_ELEMENTS else 1


def _writable(
    packed: Tensor, channel_scale: Tensor, state_scale_out: Tensor | None, rng: Tensor, ring: Ring | None = None
) -> bool:
    """The kernels write in place, so these cannot be copied into a layout that suits them."""
    if ring is not None and not (
        all(part is None or part.is_contiguous() for part in ring)
        and ring.x.dtype in _RINGS
        and ring.B.dtype is ring.x.dtype
        and (ring.x.dtype is torch.int8) is (ring.scale is not None)
        and ring.position.dtype is torch.int32
        and ring.decay.dtype is torch.float32
        and (ring.scale is None or ring.scale.dtype is torch.float32)
    ):
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


def _scale(state_scale_out: Tensor | None, state_scale: Tensor | None) -> list[Field]:
    """A dynamic state scale's address, or the ``Input`` struct of a calibrated one."""
    if state_scale_out is not None:
        return [state_scale_out]
    assert state_scale is not None
    return vector(state_scale)


def _steps(dt: Tensor, A: Tensor, dt_bias: Tensor | None, dt_softplus: bool) -> list[Field]:
    """The ``Steps`` struct of ssm_update."""
    if dt.dtype not in DTYPES:
        dt = dt.float()
    return [dt, DTYPES[dt.dtype], *dt.stride(), *vector(dt_bias), contiguous_float(A), dt_softplus]


def _inputs(x: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> list[Field]:
    """The ``Input`` structs of ssm_update."""
    fields: list[Field] = []
    for tensor in map(readable, (x, B, C)):
        fields += [tensor, DTYPES[tensor.dtype], *tensor.stride()[:2]]
    return fields + vector(D)


def vector(tensor: Tensor | None) -> list[Field]:
    """The ``Input`` struct of a vector, made contiguous."""
    if tensor is None:
        return [*ABSENT]
    tensor = readable(tensor, contiguous=True)
    return [tensor, DTYPES[tensor.dtype], 0, 0]
