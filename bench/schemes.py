"""Ways to quantize a state that the packed state does not know, in plain torch: what DSQ is compared with.

A scheme gives the step size of every element of h [b, h, p, n] from h itself; the largest magnitude that a scale serves
lands on the largest code, as everywhere. Scales are bfloat16, as in the packed state.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from calibrate.recurrence import Recurrence, Scan
from qmamba_compile import quant
from qmamba_compile.config import layer_seed
from qmamba_compile.scan_ops import scan_reference, step_sizes

GROUP = 32
GROUPS = f"groups of {GROUP}"


def per_head(h: Tensor, bits: int) -> Tensor:
    """One scale a head."""
    return quant.store_scale(h.abs().amax(dim=(-1, -2), keepdim=True) / quant.max_code(bits)).float()


def per_state(h: Tensor, bits: int) -> Tensor:
    """One scale for each state n of a head."""
    return quant.store_scale(h.abs().amax(dim=-2, keepdim=True) / quant.max_code(bits)).float()


def groups(h: Tensor, bits: int) -> Tensor:
    """One scale for `GROUP` states of a row."""
    grouped = h.abs().unflatten(-1, (-1, min(GROUP, h.shape[-1])))
    scale = quant.store_scale(grouped.amax(dim=-1, keepdim=True) / quant.max_code(bits)).float()
    return scale.expand(grouped.shape).flatten(-2)


def paper(h: Tensor, bits: int) -> Tensor:
    """Q-Mamba's Eq. 7 as printed: the root of the mean serves channels, the maximum states."""
    channel = quant.store_scale(h.abs().mean(dim=-1, keepdim=True).sqrt()).float()
    state = (h.abs() / channel).amax(dim=-2, keepdim=True) / quant.max_code(bits)
    return channel * quant.store_scale(state).float()


SCHEMES: dict[str, tuple[Callable[[Tensor, int], Tensor], Callable[[int, int], float]]] = {
    "per head": (per_head, lambda p, n: 16 / (p * n)),
    "per state": (per_state, lambda p, n: 16 / p),
    GROUPS: (groups, lambda p, n: 16 / min(GROUP, n)),
    "DSQ as printed": (paper, lambda p, n: 16 / p + 16 / n),
}
"""Name -> step sizes, and bits that the scales add to an element of a [p, n] state."""


@dataclasses.dataclass(frozen=True)
class SchemeRecurrence:
    """A recurrence with one of `SCHEMES`, requantized at every step."""

    scheme: str
    bits: int
    stochastic: bool = False
    seed: int = 0

    def __call__(self, scan: Scan) -> tuple[Tensor, Tensor | None]:
        return (self.grouped if self.by_kernel else self.plain)(scan)

    @property
    def by_kernel(self) -> bool:
        """True where the kernel of the packed state runs it: as much faster as plain torch is slow."""
        return self.scheme == GROUPS

    def grouped(self, scan: Scan) -> tuple[Tensor, Tensor | None]:
        """Groups of a row are states of their own with one scale a row each; y is the sum of theirs."""
        y = torch.zeros(())
        for start in range(0, scan.B.shape[-1], GROUP):
            B, C = (tensor[..., start : start + GROUP].contiguous() for tensor in (scan.B, scan.C))
            ones = torch.ones(scan.x.shape[2], B.shape[-1], device=B.device)
            run = Recurrence(self.bits, self.stochastic, self.seed + start, state_scale={scan.layer: ones})
            y = y + run(dataclasses.replace(scan, B=B, C=C, D=None))[0]
        return (y if scan.D is None else y + scan.x.float() * scan.D.float()[:, None]), None

    def plain(self, scan: Scan) -> tuple[Tensor, Tensor | None]:
        """One token at a time in torch."""
        step_of, _ = SCHEMES[self.scheme]
        rng = quant.new_rng(scan.x.shape[0], layer_seed(self.seed, scan.layer), scan.x.device)

        def requantize(h: Tensor) -> Tensor:
            step = step_of(h, self.bits)
            codes = h / step
            if self.stochastic:
                codes = (codes + quant.uniform_noise(rng, h.shape[1:])).floor()
                rng[:, 1] += 1
            largest = quant.max_code(self.bits)
            return codes.round().clamp(-largest, largest) * step

        dt, dA = step_sizes(scan.dt, scan.A, scan.dt_bias, scan.dt_softplus, 0.0, math.inf)
        state = torch.zeros(scan.x.shape[0], *scan.x.shape[2:], scan.B.shape[-1], device=scan.x.device)
        y, _ = scan_reference(scan.x, dt, dA, scan.B, scan.C, state, requantize)
        return (y if scan.D is None else y + scan.x.float() * scan.D.float()[:, None]), None
