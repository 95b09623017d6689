"""The recurrence in plain float32 torch: step sizes, one step, the ring of a checkpointed state, a scan's stores.

THE reference, as `quant` is for the codes. A code depends on every bit of the state before it, so what decides the
state is defined here to the last bit: `exp` and `softplus` are sums and products in a fixed order, none fused, which
C++ and Triton repeat. (Every library's own exp differs from another's in the last bit, and after 64 steps one code in
30,000 with it.) What multiplies the state is fused with what is added to it (`multiply_add`).

A checkpointed state is a packed state that is rewritten once in L steps, and a ring of the inputs since. The
recurrence is linear, so with S the sum of dt*A since the checkpoint

    h_t = exp(S_t) h_checkpoint + sum_s exp(S_t - S_s) (dt_s x_s) B_s

Shapes: batch b, nheads h, headdim p, ngroups g, dstate n, slots R = L - 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import quant

RING_DTYPES = {16: torch.bfloat16, 8: torch.int8}
"""What a ring keeps its inputs in, by ``ring_bits``."""

EXP_CONSTANTS: dict[str, float | tuple[float, ...]] = {
    "log2_e": 1.44269504088896341,
    # Their sum is ln 2, and products of whole numbers with the first are exact.
    "ln2_high": 0.693359375,
    "ln2_low": -2.12194440e-4,
    # (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2, highest power first: the coefficients of Cephes.
    "series": (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1),
    "lowest": -87.0,
    "highest": 88.0,
    # atanh(s) / s in powers of s^2, highest first.
    "atanh": tuple(1 / term for term in (15, 13, 11, 9, 7, 5, 3, 1)),
}
"""Every number in `exp` and `softplus`; the templates of the kernels take them from here."""

_MAGIC = 1.5 * 2**23  # adding it leaves a float32 rounded to an integer, half to even


# --- functions defined to the last bit -----------------------------------------------------------------------------


def exp(x: Tensor) -> Tensor:
    """e^x, float32, within 1.4 * 2^-24; 0 below -87 and infinity above 88, where float32 ends."""
    c: Any = EXP_CONSTANTS
    whole = ((x * c["log2_e"] + _MAGIC) - _MAGIC).detach()
    rest = x - whole * c["ln2_high"]
    rest = rest - whole * c["ln2_low"]
    series = torch.full_like(rest, c["series"][0])
    for coefficient in c["series"][1:]:
        series = series * rest + coefficient
    series = series * (rest * rest) + rest + 1.0
    power = ((whole.clamp(-126, 127).nan_to_num(0.0).to(torch.int32) + 127) << 23).view(torch.float32)
    y = torch.where(x > c["highest"], torch.inf, series * power)
    return torch.where(x < c["lowest"], 0.0, y)


def softplus(x: Tensor) -> Tensor:
    """ln(1 + e^x), float32, within 5 * 2^-24: max(x, 0) + 2 atanh(z / (2 + z)) with z = e^-|x|."""
    coefficients: Any = EXP_CONSTANTS["atanh"]
    z = exp(-x.abs())
    s = z / (z + 2.0)
    square = s * s
    series = torch.full_like(square, coefficients[0])
    for coefficient in coefficients[1:]:
        series = series * square + coefficient
    return x.clamp(min=0.0) + series * (s + s)


def multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of float32, rounded once: what processors do in one operation.

    The product is exact in float64; that the sum is rounded there before it is rounded to float32 shows in one of 2^29.
    """
    return (a.double() * b.double() + c.double()).to(c.dtype)


def step_sizes(dt: Tensor, A: Tensor, dt_bias: Tensor | None, dt_softplus: bool) -> tuple[Tensor, Tensor]:
    """dt after bias and softplus, and dt * A: float32 [..., h] of dt [..., h], A and dt_bias [h]."""
    dt = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    if dt_softplus:
        dt = softplus(dt)
    return dt, dt * A.float()


# --- one step ------------------------------------------------------------------------------------------------------


def step(
    h: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """``h = exp(dt*A) h + (dt*B) x``, ``y = C.h + D x``: new state [b, h, p, n] and y [b, h, p] (Q-Mamba, Eq. 5)."""
    dt, dA = step_sizes(dt, A, dt_bias, dt_softplus)
    dB, x_rows = input_factors(x, dt, B)
    h = multiply_add(h, exp(dA)[..., None, None], dB * x_rows)
    return h, read(h, x, C, D)


def input_factors(x: Tensor, dt: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """dt * B as [b, h, 1, n] and x as [b, h, p, 1], float32: a step adds their product to the state."""
    dB = dt[..., None] * _by_head(B, x.shape[1])
    return dB[:, :, None, :], x.float()[..., None]


def read(h: Tensor, x: Tensor, C: Tensor, D: Tensor | None) -> Tensor:
    """y [b, h, p] in x's dtype: C.h + D x."""
    y = torch.einsum("bhpn,bhn->bhp", h, _by_head(C, x.shape[1]))
    if D is not None:
        y = y + x.float() * D.float()[:, None]
    return y.to(x.dtype)


def _by_head(grouped: Tensor, nheads: int) -> Tensor:
    """float32 [b, h, n] of B or C [b, g, n]."""
    return grouped.float().repeat_interleave(nheads // grouped.shape[1], dim=1)


# --- the ring of a checkpointed state ------------------------------------------------------------------------------


class Ring(NamedTuple):
    """Inputs of the steps since the last checkpoint; slots from ``position`` on hold nothing.

    Attributes:
        x: dt * x, [b, R, h, p], bfloat16, float32 or int8.
        B: [b, R, g, n], of x's dtype.
        decay: float32 [b, R, h], S after the step: the sum of dt * A since the checkpoint.
        position: int32 [b], steps since the checkpoint. The step that finds all slots full stores the state.
        scale: float32 [b, R, h], what the product of an int8 x and an int8 B is worth; None in floating point.
    """

    x: Tensor
    B: Tensor
    decay: Tensor
    position: Tensor
    scale: Tensor | None = None


def ring_of(tensors: tuple[Tensor | None, ...]) -> Ring | None:
    """The ring whose tensors an operator was given, in the order of `Ring`; None when it was given none."""
    return Ring(*tensors) if tensors and tensors[0] is not None else None  # type: ignore[arg-type]


def new_ring(
    batch: int,
    nheads: int,
    headdim: int,
    ngroups: int,
    dstate: int,
    flush_interval: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    start: int = 0,
    device: torch.device | str = "cpu",
) -> Ring:
    """A ring of ``flush_interval - 1`` slots whose first ``start`` steps had no input.

    A model's layers start at different positions, so that each step stores an equal share of the state.
    """
    slots = flush_interval - 1
    return Ring(
        torch.zeros(batch, slots, nheads, headdim, dtype=dtype, device=device),
        torch.zeros(batch, slots, ngroups, dstate, dtype=dtype, device=device),
        torch.zeros(batch, slots, nheads, dtype=torch.float32, device=device),
        torch.full((batch,), start, dtype=torch.int32, device=device),
        None if dtype.is_floating_point else torch.zeros(batch, slots, nheads, dtype=torch.float32, device=device),
    )


def elapsed(ring: Ring) -> Tensor:
    """S [b, h] now: the sum of dt * A since the checkpoint."""
    slots = ring.decay.shape[1]
    if slots == 0:
        return ring.decay.sum(dim=1)
    last = (ring.position.long() - 1).clamp(min=0).view(-1, 1, 1).expand(-1, 1, ring.decay.shape[2])
    return torch.where(ring.position[:, None] > 0, ring.decay.gather(1, last)[:, 0], 0.0)


def materialize(
    checkpoint: Tensor,
    ring: Ring,
    total: Tensor | None = None,
    latest: tuple[Tensor, Tensor] | None = None,
    *,
    to_store: bool = False,
) -> Tensor:
    """The float state [b, h, p, n] at S = ``total`` [b, h] (now, if None) from the one at the checkpoint.

    Args:
        latest: `input_factors` of the step that ends at ``total`` and is not in the ring.
        to_store: each slot's weighted x is rounded to bfloat16, as the ring has rounded x already. Times a B of 8 bits
            its product is exact in float32 (where that is normal), so that fused multiply-adds and the processors'
            products of bfloat16 give the same state. `ring.x` of float32 is not rounded.
    """
    total = elapsed(ring) if total is None else total
    added = torch.zeros_like(checkpoint)
    nheads = checkpoint.shape[1]
    for slot in range(ring.x.shape[1]):
        weight = exp(total - ring.decay[:, slot])
        if ring.scale is not None:
            weight = weight * ring.scale[:, slot]
        x = weight[..., None] * ring.x[:, slot].float()
        if to_store and ring.x.dtype != torch.float32:
            x = x.to(torch.bfloat16).float()
        product = x[..., None] * _by_head(ring.B[:, slot], nheads)[:, :, None, :]
        added = torch.where((slot < ring.position)[:, None, None, None], added + product, added)
    if latest is not None:
        added = multiply_add(*latest, added)
    return multiply_add(checkpoint, exp(total)[..., None, None], added)


def append_(ring: Ring, x: Tensor, dt: Tensor, B: Tensor, total: Tensor) -> None:
    """Put one step's inputs into the slot at ``position`` and advance; a full ring starts anew instead."""
    slots = ring.x.shape[1]
    dtx = dt[..., None] * x.float()  # [b, h, p]
    scale = None
    if ring.scale is not None:
        dtx, x_scale = quant.quantize_rows(dtx)
        B, B_scale = quant.quantize_rows(B)
        scale = x_scale[..., 0] * _by_head(B_scale, x.shape[1])[..., 0]
    for slot in range(slots):
        here = ring.position == slot
        for stored, value in ((ring.x, dtx), (ring.B, B), (ring.decay, total), (ring.scale, scale)):
            if stored is not None and value is not None:
                mask = here.view(-1, *[1] * (value.dim() - 1))
                stored[:, slot] = torch.where(mask, value.to(stored.dtype), stored[:, slot])
    ring.position.copy_(torch.where(ring.position == slots, 0, ring.position + 1))


# --- the stores of a sequence --------------------------------------------------------------------------------------

SCAN_BITS = (8, 4, 3, 2)
"""Bits of a code in a faithful scan. 3 is for evaluation: its codes stay one per byte, since no row of them fills whole
bytes evenly."""


@dataclasses.dataclass(frozen=True, eq=False)
class StoreRule:
    """How a faithful scan (`scan_ops`) stores its state.

    Attributes:
        bits: one of `SCAN_BITS`, or ``None`` for a float state, which is neither rounded nor simulated.
        stochastic: rounding; nearest otherwise.
        seed: key of the noise of stochastic rounding.
        flush_interval: the state is requantized after every so many steps, and float32 in between.
        single_step: ESR's simulation in the paper: the state stays float, and each y is read from a step that
            began at its quantized copy.
        state_scale: calibrated, [h, n]; ``None`` measures it at each store.
        channel_scale: calibrated, [h, p], for scales of which none is measured; codes clamp. Needs ``state_scale``.

    Raises:
        ValueError: settings that contradict each other.
    """

    bits: int | None
    stochastic: bool = False
    seed: int = 0
    flush_interval: int = 1
    single_step: bool = False
    state_scale: Tensor | None = None
    channel_scale: Tensor | None = None

    def __post_init__(self) -> None:
        if self.bits is not None and self.bits not in SCAN_BITS:
            raise ValueError(f"bits={self.bits} is not allowed; use one of {SCAN_BITS} or None")
        if self.flush_interval < 1:
            raise ValueError(f"flush_interval={self.flush_interval} is not allowed; use 1 or more steps")
        if self.single_step and self.flush_interval != 1:
            raise ValueError(
                f"flush_interval={self.flush_interval}: a single step always begins at a quantized state; use 1"
            )
        if self.channel_scale is not None and self.state_scale is None:
            raise ValueError("a calibrated channel_scale needs a calibrated state_scale")
        if self.bits is None:
            object.__setattr__(self, "stochastic", False)
            object.__setattr__(self, "single_step", False)

    @property
    def dynamic(self) -> bool:
        """state_scale is measured."""
        return self.bits is not None and self.state_scale is None

    @property
    def fixed_scale(self) -> Tensor | None:
        """The calibrated channel_scale in the 16 bits of a store."""
        return None if self.bits is None or self.channel_scale is None else quant.store_scale(self.channel_scale)

    def stores_after(self, t: int) -> bool:
        """The state that step ``t`` leaves is requantized."""
        return self.bits is not None and not self.single_step and (t + 1) % self.flush_interval == 0
