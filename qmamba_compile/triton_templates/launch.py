"""Call the generated kernels on tensors.

Each function returns ``None`` when it cannot serve its arguments, having written nothing, and the caller runs the torch
reference: no GPU that the kernels are written for, no Triton, an extent or a layout that the kernels do not take. On a
GPU each such reason is logged once.

A call reads nothing back from the device, and allocates its result and scratch as torch does: it can be captured in a
CUDA graph.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor

from .. import extents, quant
from ..errors import ConfigError
from ..recurrence import Ring
from . import tuning
from .render import load
from .specs import target_of
from .state_specs import StateSpec

log = logging.getLogger(__name__)


@functools.cache
def refuse(operator: str, reason: object) -> None:
    """Log, once, that ``operator`` runs as torch reference where kernels are expected, and why."""
    log.warning("%s: no Triton kernel, the torch reference runs instead: %s", operator, reason)


@functools.cache
def target(device_type: str, index: int | None) -> str | None:
    """What kernels are rendered for on a device: an architecture, Triton's interpreter on the CPU, or ``None``."""
    if importlib.util.find_spec("triton") is None:
        log.warning("no Triton: the torch references run instead; install triton")
        return None
    if device_type == "cpu":
        return "interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else None
    if device_type != "cuda":
        return None
    if torch.version.hip:
        name = torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    else:
        major, minor = torch.cuda.get_device_capability(index)
        name = f"sm_{major}{minor}"
    try:
        return target_of(name)
    except ConfigError as error:
        log.warning("no Triton kernels, the torch references run instead: %s", error)
        return None


@functools.cache
def _chosen(
    architecture: str,
    programs: int,
    headdim: int,
    dstate: int,
    bits: int | None,
    dynamic: bool,
    stochastic: bool,
    state_dtype: str = "float32",
    flush_interval: int = 1,
    ring_bits: int = 16,
) -> StateSpec | None:
    try:
        return tuning.ssm_update(
            architecture,
            programs,
            headdim,
            dstate,
            bits,
            dynamic,
            stochastic,
            state_dtype=state_dtype,
            flush_interval=flush_interval,
            ring_bits=ring_bits,
        )
    except ConfigError as error:
        return refuse("ssm_update", str(error))


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
    *,
    z: Tensor | None = None,
    slots: Tensor | None = None,
    dt_min: float = -float("inf"),
    dt_max: float = float("inf"),
) -> Tensor | None:
    """`ops.ssm_update` on a GPU: y [b, h, p].

    Args:
        z: [b, h, p]; y is multiplied by silu(z).
        slots: [b] integers; the state of batch entry i is entry slots[i] of the packed tensors, which then are a pool
            of any number of states. Negative: padding, nothing is written but zeros to y. No slot may occur twice.
        ring: of a checkpointed state; sequences whose ring is full store their state, the others append to it.
        dt_min, dt_max: limits of dt after softplus.
    """
    architecture = target(x.device.type, x.device.index)
    if architecture is None:
        return None
    batch = packed.shape[0] if slots is None else x.shape[0]
    nheads, headdim, width = packed.shape[1:]
    dstate = quant.unpacked_width(width, bits)
    pool = (packed.shape[0], nheads, headdim, dstate)
    if wrong := (
        unfit_layout(packed, channel_scale, state_scale_out, rng, ring)
        or extents.unfit_state(packed, channel_scale, state_scale_out, state_scale, bits, rng)
        or extents.unfit_step((batch, *pool[1:]), x, dt, A, B, C, D, dt_bias, z)
        or extents.unfit(slots=(slots, (batch,)))
        or (ring is not None and extents.unfit_ring(ring, pool, B.shape[1]))
    ):
        return refuse("ssm_update", wrong)
    dynamic = state_scale_out is not None
    interval = 1 if ring is None else ring.x.shape[1] + 1
    ring_bits = 8 if ring is not None and ring.scale is not None and interval > 1 else 16
    scheme = (bits, dynamic, stochastic, "float32", interval, ring_bits)
    spec = _chosen(architecture, batch * nheads, headdim, dstate, *scheme)
    scale = state_scale_out if state_scale_out is not None else state_scale
    if spec is None:
        return None
    if scale is None:
        return refuse("ssm_update", "neither state_scale nor state_scale_out is there")
    # One that is written was found contiguous above; one that is only read may be copied.
    scale = scale.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    state: tuple[Tensor, ...] = (packed.view(torch.int32), channel_scale, scale, rng)
    if ring is not None and interval > 1:
        state += tuple(part for part in ring if part is not None)
    _launch(spec, state, slots, x, dt, A, B, C, D, dt_bias, z, y, dt_softplus, dt_min, dt_max)
    if stochastic and interval == 1:
        advance(rng, slots)
    return y


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
    *,
    z: Tensor | None = None,
    slots: Tensor | None = None,
    dt_min: float = -float("inf"),
    dt_max: float = float("inf"),
) -> Tensor | None:
    """The same step on a contiguous float32 or bfloat16 state [b, h, p, n], in place: the packed one's yardstick."""
    architecture = target(x.device.type, x.device.index)
    dtype = {torch.float32: "float32", torch.bfloat16: "bfloat16"}.get(state.dtype)
    if architecture is None or dtype is None or not state.is_contiguous():
        return None
    batch = state.shape[0] if slots is None else x.shape[0]
    nheads, headdim, dstate = state.shape[1:]
    if wrong := (
        extents.unfit_step((batch, nheads, headdim, dstate), x, dt, A, B, C, D, dt_bias, z)
        or extents.unfit(slots=(slots, (batch,)))
    ):
        return refuse("ssm_update", wrong)
    spec = _chosen(architecture, batch * nheads, headdim, dstate, None, False, False, dtype)
    if spec is None:
        return None
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(spec, (state,), slots, x, dt, A, B, C, D, dt_bias, z, y, dt_softplus, dt_min, dt_max)
    return y


def _launch(
    spec: StateSpec,
    state: tuple[Tensor, ...],
    slots: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    z: Tensor | None,
    y: Tensor,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> None:
    batch, nheads, _ = x.shape
    # Vectors of the model's parameters: contiguous, so that these are no copies.
    A, D, dt_bias = (None if vector is None else vector.contiguous() for vector in (A, D, dt_bias))  # type: ignore[assignment]
    ngroups = B.shape[1]
    grid = (spec.row_blocks * (nheads // ngroups), ngroups, batch)
    arguments = (
        *state,
        slots,
        x,
        dt,
        A,
        B,
        C,
        D,
        dt_bias,
        z,
        y,
        dt_min,
        dt_max,
        *x.stride(),
        *dt.stride(),
        *B.stride(),
        *C.stride(),
        *(z.stride() if z is not None else (0, 0, 0)),
    )
    module = load(spec)
    if spec.flush_interval == 1:
        module.ssm_update[grid](*arguments, dt_softplus, num_warps=spec.warps, enable_fp_fusion=False)
        return
    launches = tuning.launches(spec, grid[0] * grid[1], batch)
    shared = None
    if None not in launches:
        shared = torch.empty((batch, ngroups, spec.shared_values), dtype=torch.float32, device=x.device)
    for stores, programs in launches.items():
        options = {"num_warps": spec.warps_of(stores), "enable_fp_fusion": False}
        module.ssm_update[*grid[:2], programs](*arguments, batch, shared, dt_softplus, stores, **options)


def advance(rng: Tensor, slots: Tensor | None) -> None:
    """Add 1 to the step of each sequence. A kernel cannot: its programs read the step in no order."""
    if slots is None:
        rng[:, 1] += 1
    else:
        rng[:, 1].index_add_(0, slots.clamp(min=0).long(), (slots >= 0).to(rng.dtype))


def unfit_layout(
    packed: Tensor, channel_scale: Tensor, state_scale_out: Tensor | None, rng: Tensor, ring: Ring | None
) -> str | None:
    """Why the kernels, which write these in place and so cannot copy them into another layout, do not take them."""
    written = (packed, channel_scale, state_scale_out, rng, *(() if ring is None else ring))
    if not all(t is None or t.is_contiguous() for t in written):
        return "a tensor of the packed state is not contiguous"
    if ring is not None and ring.x.dtype not in (torch.bfloat16, torch.float32, torch.int8):
        return f"the ring's x is {ring.x.dtype}; bfloat16, float32 and int8 are allowed"
    if ring is not None and (ring.x.dtype is torch.int8) != (ring.scale is not None):
        return "a ring of int8 comes with its scale, and no other does"
    if any(t is not None and t.dtype is not quant.SCALE_DTYPE for t in (channel_scale, state_scale_out)):
        return f"scales must be {quant.SCALE_DTYPE}"
    return unfit_words(packed)


def unfit_words(packed: Tensor) -> str | None:
    """Why ``packed`` cannot be read in words of 32 bits."""
    if packed.shape[-1] % 4:
        return f"{packed.shape[-1]} bytes of a packed row do not fill words of 32 bits; use other state_bits"
    return "the packed state does not begin at a word of 32 bits" if packed.storage_offset() % 4 else None
