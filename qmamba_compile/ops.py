"""The operators ``qmamba::*`` of the state: its quantization, one decode step, the scan of a prompt.

Each has a schema, a shape function and an implementation (a device kernel, or the plain reference). Importing this
module registers the others, too: `layer_ops`, `scan_ops` and its gradient.

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

from . import layer_ops, quant, recurrence, scan_gradient  # noqa: F401  registers their operators
from .cpu_templates import launch as cpu_kernels
from .cpu_templates import launch_scan as cpu_scans
from .huge_pages import HugePages
from .op_library import define, fake, implement
from .triton_templates import launch as gpu_kernels
from .triton_templates import launch_scan as gpu_scans
from .triton_templates import launch_state as gpu_states

_SCAN_CHUNK = 64
"""Tokens that `chunk_scan` handles by one set of matrix products: the quadratic part grows with it, the number of small
products shrinks. 1024 tokens, 24 heads, dstate 128, 2 threads: 26.9 ms at 16, 19.4 at 32, 21.2 at 64, 34.8 at 128."""

define("quantize_state(Tensor state, Tensor? state_scale, int bits, bool stochastic, int seed) -> Tensor[]")
define(
    "quantize_state_(Tensor(a!) packed, Tensor(b!) channel_scale, Tensor(c!)? state_scale_out, Tensor(d!) rng, "
    "Tensor state, Tensor? state_scale, int bits, bool stochastic, Tensor(e!)? ring_position=None) -> ()"
)
define(
    "dequantize_state(Tensor packed, Tensor channel_scale, Tensor state_scale, int bits, Tensor? ring_x=None, "
    "Tensor? ring_B=None, Tensor? ring_decay=None, Tensor? ring_position=None, Tensor? ring_scale=None) -> Tensor"
)
define(
    "ssm_update(Tensor(a!) packed, Tensor(b!) channel_scale, Tensor(c!)? state_scale_out, Tensor(d!) rng, Tensor x, "
    "Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor? state_scale, bool dt_softplus, "
    "int bits, bool stochastic, Tensor(e!)? ring_x=None, Tensor(f!)? ring_B=None, Tensor(g!)? ring_decay=None, "
    "Tensor(h!)? ring_position=None, Tensor(i!)? ring_scale=None) -> Tensor"
)
define(
    "chunk_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, "
    "Tensor? initial_state, bool dt_softplus, float dt_min, float dt_max) -> (Tensor, Tensor)"
)


# --- state ---------------------------------------------------------------------------------------------------------

_state_pages = HugePages(2**24)
"""Where the codes lie that a prompt leaves; the chunk in use, 16 MB, outlives them."""


@implement("quantize_state")
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


@fake("quantize_state")
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


@implement("quantize_state_")
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


@fake("quantize_state_")
def _(packed, channel_scale, state_scale_out, rng, state, state_scale, bits, stochastic, *ring) -> None:  # type: ignore[no-untyped-def]
    return None


@implement("dequantize_state")
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


@fake("dequantize_state")
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
    y = recurrence.read(h, x, C, D)  # first: what does not fit together must not have moved the state
    quantize_state_reference_(packed, channel_scale, state_scale_out, rng, h, state_scale, bits, stochastic, full)
    recurrence.append_(ring, x, dt, B, total)
    return y


@implement("ssm_update")
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


@fake("ssm_update")
def _(packed, channel_scale, state_scale_out, rng, x, *args) -> Tensor:  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


# --- prefill -------------------------------------------------------------------------------------------------------


@implement("chunk_scan")
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


@fake("chunk_scan")
def _(x, dt, A, B, *args) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    batch, _, nheads, headdim = x.shape
    y = x.new_empty(x.shape, dtype=torch.float32)
    return y, x.new_empty((batch, nheads, headdim, B.shape[-1]), dtype=torch.float32)
