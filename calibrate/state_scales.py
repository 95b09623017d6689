"""state_scale [h, n] of every Mamba2 layer, from states and from what the loss feels of their errors.

Rounding adds to h[p, n] an error of variance proportional to ``step[p, n]^2``, with ``step = channel_scale[p] *
state_scale[n]`` and ``channel_scale[p] = max_n |h[p, n]| / state_scale[n]`` at every store. To second order the loss
feels the sum of ``E[(dL/dh[p, n])^2] * step[p, n]^2``. `fitted_scale` minimizes exactly that over sampled rows. Beside
it stand root mean squares over channels to some power. Which is taken, perplexity decides.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import qmamba_compile.ops  # noqa: F401  (registers the operators)
from qmamba_compile import quant

from . import distributed
from .capture import Statistics, shape_of
from .recurrence import Recurrence, Scan, mixers, replaced

EXPONENTS = (0.3, 0.5, 0.7, 1.0)

LOOK = 16
"""Tokens between two looks at the adjoint state."""

_FIT_STEPS, _FIT_RATE = 200, 0.02


def power_scale(statistics: Statistics, layer: str, exponent: float) -> Tensor:
    """Root mean square over channels to a power, [h, n]."""
    rms = statistics.state_rms(layer).square().mean(dim=1).sqrt()
    return _normalized(rms**exponent)


def fitted_scale(rows: Tensor, channels: Tensor, sensitivity: Tensor) -> Tensor:
    """The scales [h, n] with the least felt error over sampled rows of states.

    Args:
        rows: [h, k, n]; channels: [k] int64, the channel p that each is of.
        sensitivity: E[(dL/dh)^2], [h, p, n].
    """
    square = rows.float().square()
    # Heads differ by orders of magnitude, and a logarithm of their sum would make them compete: each has its own.
    weight = sensitivity.float() / sensitivity.float().mean(dim=(1, 2), keepdim=True).clamp(min=1e-30)
    felt = weight[:, channels]  # [h, k, n]
    typical = square.mean(dim=1).clamp(min=1e-24)
    start = typical.log() / 4 - weight.mean(dim=1).clamp(min=1e-12).log() / 8
    log_scale = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([log_scale], lr=_FIT_RATE)
    with torch.enable_grad():
        for _ in range(_FIT_STEPS):
            optimizer.zero_grad()
            s2 = (2 * log_scale).exp()[:, None]
            error = (square / s2).amax(dim=-1) * (felt * s2).sum(dim=-1)  # [h, k]
            error.mean(dim=1).clamp(min=1e-30).log().sum().backward()
            optimizer.step()
    return _normalized(log_scale.detach().exp())


def _normalized(scale: Tensor) -> Tensor:
    """The same grid with a geometric mean of 1 in each head, and no state more than 2^30 finer than the coarsest."""
    log = scale.double().clamp(min=quant.TINY_SCALE).log()
    log = log.clamp(min=log.amax(dim=-1, keepdim=True) - 30 * math.log(2))
    return (log - log.mean(dim=-1, keepdim=True)).exp().float()


def sensitivities(
    model: Any, batches: Iterable[Tensor], advance: Callable[[int], None] = lambda tokens: None
) -> dict[str, Tensor]:
    """Sums of (dL/dh[p, n])^2 of every Mamba2 layer, [h, p, n]: L the code length of a sample by the float model.

    The adjoint of the state runs the same recurrence backwards in time, with dL/dy for x and C for B, so its mean
    square costs a scan. Processes share ``batches`` [b, l].
    """
    # Filled even where no batch of this process reaches it, so that all processes reduce the same tensors.
    sums = {
        path: torch.zeros(shape_of(m), dtype=torch.float64, device=m.A_log.device) for path, m in mixers(model).items()
    }

    def run(scan: Scan) -> tuple[Tensor, Tensor | None]:
        y, _ = Recurrence(None)(scan)
        if not y.requires_grad:
            y.requires_grad_()
        # Without the graph that the arguments hang on: the hook outlives the forward.
        kept = dataclasses.replace(scan, dt=scan.dt.detach(), C=scan.C.detach())
        y.register_hook(lambda gradient: _add_adjoint(sums, kept, gradient))
        return y, None

    with replaced(model, run), torch.enable_grad():
        for ids in distributed.share(batches):
            logits = model(ids, use_cache=False).logits.float()
            F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
            advance(ids.numel())
    distributed.sum_(sums.values())
    return sums


def _add_adjoint(sums: dict[str, Tensor], scan: Scan, gradient: Tensor) -> None:
    """Add to ``sums`` the squares of dL/dh at some tokens, from dL/dy [b, l, h, p]."""
    dt = scan.dt.float() if scan.dt_bias is None else scan.dt.float() + scan.dt_bias.float()
    if scan.dt_softplus:
        dt = F.softplus(dt)
    dt = dt.clamp(scan.dt_min, scan.dt_max)
    # Adjoint of h_t: C_t g_t + exp(dt_{t+1} A) * that of h_{t+1}. The scan multiplies its input by dt: divide before.
    after = torch.cat([dt[:, 1:], torch.ones_like(dt[:, :1])], dim=1)
    x, after, C = ((gradient.float() / after[..., None]).flip(1), after.flip(1), scan.C.flip(1))
    state: Tensor | None = None
    for start in range(0, gradient.shape[1], LOOK):
        piece = slice(start, start + LOOK)
        inputs = (tensor[:, piece].contiguous() for tensor in (x, after))
        Cs = C[:, piece].contiguous()
        _, state = torch.ops.qmamba.chunk_scan(*inputs, scan.A, Cs, Cs, None, None, state, False, 0.0, math.inf)
        assert state is not None
        sums[scan.layer] += state.double().square().sum(dim=0)
