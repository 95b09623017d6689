"""The faithful scan, ``qmamba::ssm_scan_quantized``: a whole sequence with the state requantized as decode does it.

Perplexity by a parallel scan never touches the state cache and says nothing about its precision. This operator runs
the recurrence that decode runs, with the same codes at every step, at about the cost of a prefill; `scan_gradient`
has its gradient. It is for evaluation and calibration; no pass plants it.

Shapes as in `ops`, with seqlen l: x [b, l, h, p], dt [b, l, h], B and C [b, l, g, n].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import quant, recurrence
from .cpu_templates import launch_scan as cpu_kernels
from .op_library import define, fake, implement
from .recurrence import StoreRule
from .triton_templates import launch_scan as gpu_kernels

define(
    "ssm_scan_quantized(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, "
    "Tensor? initial_state, Tensor? state_scale, bool dt_softplus, float dt_min, float dt_max, int? bits, "
    "bool stochastic, int seed, int flush_interval, bool single_step=False, Tensor? channel_scale=None) -> Tensor[]",
)


class StraightThrough(torch.autograd.Function):
    """``requantize(h)`` forward; backward the identity, or `StateStore.pass_through`."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, requantize: Callable[[Tensor], Tensor]) -> Tensor:
        read = requantize(h)
        ctx.store = requantize if isinstance(requantize, StateStore) else None
        if ctx.store is not None:
            ctx.save_for_backward(h, read)
        return read

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad if ctx.store is None else ctx.store.pass_through(grad, *ctx.saved_tensors)), None


class StateStore:
    """Requantizes a state again and again, as a cache of ``rule.bits`` bits would, and remembers what it last held.

    Calling it with h [b, h, p, n] gives what decode would read back, float32.

    Attributes:
        codes: int8 [b, h, p, n]; channel_scale: [b, h, p]; state_scale: [b, h, n], or [h, n] when calibrated.
        rng: [b, 2], key and number of stores; it advances whether or not the rounding is stochastic.
    """

    def __init__(self, rule: StoreRule, rng: Tensor) -> None:
        assert rule.bits is not None
        self.rule, self.bits, self.rng = rule, rule.bits, rng
        self.calibrated, self.fixed = rule.state_scale, rule.fixed_scale

    def __call__(self, h: Tensor) -> Tensor:
        h = h.detach().float()
        state_scale = quant.dynamic_state_scale(h) if self.calibrated is None else self.calibrated
        if self.fixed is None:
            channel_scale = quant.channel_scale_of(h, state_scale, self.bits)
        else:
            # Codes clamp. What is not finite must show all the same, and a code cannot hold it.
            channel_scale = torch.where(h.isfinite().all(dim=-1), self.fixed, math.nan)
        noise = quant.uniform_noise(self.rng, h.shape[1:]) if self.rule.stochastic else None
        self.codes = quant.quantize_codes(h, channel_scale, state_scale, self.bits, noise=noise)
        self.channel_scale, self.state_scale = channel_scale, state_scale
        self.rng[:, 1] += 1
        return self.codes.float() * state_scale.float()[..., None, :] * channel_scale.float()[..., None]

    def pass_through(self, grad: Tensor, h: Tensor, read: Tensor) -> Tensor:
        """Gradient of h [b, h, p, n] from that of ``read``, what a store of it gives.

        Straight through the rounding alone. A code that clamps, as with fixed scales, does not change with h: there is
        no gradient, but in single steps, where a clamped state would hear of it in no other way. A measured
        channel_scale follows the row's largest ``|h / state_scale|``: read = channel_scale * state_scale * code changes
        with it by (read - h) / channel_scale. A measured state_scale is taken for constant, and all of it passes
        straight through.
        """
        if self.calibrated is None or (self.fixed is not None and self.rule.single_step):
            return grad
        largest_code = quant.max_code(self.bits)
        if self.fixed is not None:
            limit = largest_code * self.calibrated.float()[:, None, :] * self.fixed.float()[..., None]
            return torch.where(h.abs() > limit, 0.0, grad)
        largest, at = self.largest_of_rows(h)
        through_scale = (grad * (read - h)).sum(dim=-1, keepdim=True) / h.gather(-1, at)
        return grad.scatter_add(-1, at, torch.where(largest >= largest_code * quant.TINY_SCALE, through_scale, 0.0))

    def largest_of_rows(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's largest ``|h / state_scale|``, what channel_scale follows, and its place: [b, h, p, 1].

        Only for calibrated scales.
        """
        assert self.calibrated is not None
        scaled = h.abs() * self.calibrated.float().reciprocal()[:, None, :]
        at = scaled.argmax(dim=-1, keepdim=True)
        return scaled.gather(-1, at), at

    def outputs(self) -> list[Tensor]:
        """packed, channel_scale, rng, and state_scale when dynamic."""
        packed = self.codes if self.bits == 3 else quant.pack(self.codes, self.bits)
        return [packed, self.channel_scale, self.rng] + ([self.state_scale] if self.calibrated is None else [])


def step_sizes(
    dt: Tensor, A: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float
) -> tuple[Tensor, Tensor]:
    """dt after bias, softplus and limits, and exp(dt * A): float32 [b, l, h], the bits that decode computes."""
    dt, _ = recurrence.step_sizes(dt, A, dt_bias, dt_softplus)
    dt = dt.clamp(dt_min, dt_max).contiguous()
    return dt, recurrence.exp(dt * A.float())


def scan_reference(
    x: Tensor,
    dt: Tensor,
    dA: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    requantize: Callable[[Tensor], Tensor] | None,
    flush_interval: int = 1,
    single_step: bool = False,
) -> tuple[Tensor, Tensor]:
    """The recurrence with any quantizer, one token at a time, in plain torch; differentiable, straight through it.

    ``h_t = dA_t * state_{t-1} + (dt_t * B_t) x_t`` and ``y_t = C_t . h_t``. With ``single_step`` the state is h_t of
    the float recurrence and only y sees a quantized one: ``hbar_t = dA_t * Q(state_{t-1}) + (dt_t * B_t) x_t``.

    Args:
        dt, dA: [b, l, h], see `step_sizes`.
        state: [b, h, p, n], as decode reads it before the first token (``single_step``: before it is quantized).
        requantize: h [b, h, p, n] -> what is read back after a store; ``None`` keeps the float state.
        flush_interval: requantize after every so many steps.

    Returns:
        y [b, l, h, p] without the D skip, and the last state.
    """
    repeats = x.shape[2] // B.shape[2]
    x, outputs = x.to(dt.dtype), []

    def stored(h: Tensor) -> Tensor:
        return h if requantize is None else StraightThrough.apply(h, requantize)

    for t in range(x.shape[1]):
        decay = dA[:, t, :, None, None]
        dB = dt[:, t, :, None] * B[:, t].to(dt.dtype).repeat_interleave(repeats, dim=1)
        dBx = dB[:, :, None, :] * x[:, t, :, :, None]
        h = recurrence.multiply_add(stored(state) if single_step else state, decay, dBx)
        outputs.append(torch.einsum("bhpn,bhn->bhp", h, C[:, t].to(dt.dtype).repeat_interleave(repeats, dim=1)))
        if single_step:
            state = recurrence.multiply_add(state, decay, dBx)
        elif (t + 1) % flush_interval == 0:
            state = stored(h)
        else:
            state = h
    return torch.stack(outputs, dim=1), state


def ssm_scan_quantized_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    state_scale: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    bits: int | None,
    stochastic: bool,
    seed: int,
    flush_interval: int,
    single_step: bool = False,
    channel_scale: Tensor | None = None,
) -> list[Tensor]:
    """`ssm_scan_quantized` in plain torch."""
    rule = StoreRule(bits, stochastic, seed, flush_interval, single_step, state_scale, channel_scale)
    batch, _, nheads, headdim = x.shape
    dt, dA = step_sizes(dt, A, dt_bias, dt_softplus, dt_min, dt_max)
    state = x.new_zeros((batch, nheads, headdim, B.shape[-1]), dtype=torch.float32)
    if initial_state is not None:
        state = initial_state.float()
    store = None
    if bits is not None:
        store = StateStore(rule, quant.new_rng(batch, seed, x.device))
        if not single_step:
            state = StraightThrough.apply(state, store)
    y, state = scan_reference(x, dt, dA, B, C, state, store, flush_interval, single_step)
    if D is not None:
        y = y + x.float() * D.float()[:, None]
    if store is None:
        return [y, state]
    if single_step:
        store(state)
    return [y, *store.outputs()]


@implement("ssm_scan_quantized")
def ssm_scan_quantized(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    state_scale: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    bits: int | None,
    stochastic: bool,
    seed: int,
    flush_interval: int,
    single_step: bool = False,
    channel_scale: Tensor | None = None,
) -> list[Tensor]:
    """Run a whole sequence with the state requantized as decode requantizes it.

    Equal, bit for bit, to `ops.quantize_state` of ``initial_state`` followed by one `ops.ssm_update` a token (at
    ``flush_interval`` 1): the same codes, scales and noise. Its gradient goes straight through the rounding
    (`StateStore.pass_through`), along the quantized trajectory.

    Args:
        initial_state: [b, h, p, n], quantized first, as prefill hands it over; ``None`` is zeros.
        state_scale, bits, stochastic, seed, flush_interval, single_step, channel_scale: see `StoreRule`.

    Returns:
        y [b, l, h, p] float32 and the state as decode holds it after the last store: packed (3 bits: int8 codes
        [b, h, p, n]), channel_scale [b, h, p], rng [b, 2], and state_scale [b, h, n] when dynamic.
        ``bits=None``: y and the state, float32.

    Raises:
        ValueError: arguments that contradict each other.
    """
    rule = StoreRule(bits, stochastic, seed, flush_interval, single_step, state_scale, channel_scale)
    if x.shape[1] > 0:
        step_dt, decay = step_sizes(dt, A, dt_bias, dt_softplus, dt_min, dt_max)
        states, store = first_states(initial_state, B, rule, x.shape)
        kernels = cpu_kernels if x.is_cpu else gpu_kernels
        found = kernels.ssm_scan(x, step_dt, decay, B, C, D, states, rule)
        if found is not None:
            if store is None:
                return found
            stores = x.shape[1] // flush_interval
            store.rng[:, 1] = 1 + stores
            if stores:
                store.codes, store.channel_scale, store.state_scale = found[1:]
            return [found[0], *store.outputs()]
    return ssm_scan_quantized_reference(
        x,
        dt,
        A,
        B,
        C,
        D,
        dt_bias,
        initial_state,
        state_scale,
        dt_softplus,
        dt_min,
        dt_max,
        bits,
        stochastic,
        seed,
        flush_interval,
        single_step,
        channel_scale,
    )


def first_states(
    initial_state: Tensor | None, B: Tensor, rule: StoreRule, shape: torch.Size
) -> tuple[tuple[Tensor | None, Tensor | None], StateStore | None]:
    """The state that the first token begins at (and its quantized copy, for a single step), and where it is stored."""
    if rule.bits is None:
        return (initial_state, None), None
    batch, _, nheads, headdim = shape
    store = StateStore(rule, quant.new_rng(batch, rule.seed, B.device))
    state = initial_state
    if state is None:
        state = B.new_zeros((batch, nheads, headdim, B.shape[-1]), dtype=torch.float32)
    read = store(state)
    return ((state, read) if rule.single_step else (read, None)), store


@fake("ssm_scan_quantized")
def _(x, dt, A, B, C, D, dt_bias, initial_state, state_scale, dt_softplus, dt_min, dt_max, bits, *args) -> list[Tensor]:  # type: ignore[no-untyped-def]
    batch, _, nheads, headdim = x.shape
    dstate = B.shape[-1]
    y = x.new_empty(x.shape, dtype=torch.float32)
    if bits is None:
        return [y, x.new_empty((batch, nheads, headdim, dstate), dtype=torch.float32)]
    width = dstate if bits == 3 else quant.packed_width(dstate, bits)
    outputs = [
        y,
        x.new_empty((batch, nheads, headdim, width), dtype=torch.uint8 if bits in (4, 2) else torch.int8),
        x.new_empty((batch, nheads, headdim), dtype=quant.SCALE_DTYPE),
        x.new_empty((batch, 2), dtype=torch.int64),
    ]
    return outputs + ([x.new_empty((batch, nheads, dstate), dtype=quant.SCALE_DTYPE)] if state_scale is None else [])
