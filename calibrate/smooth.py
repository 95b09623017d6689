"""SmoothQuant factors and static activation scales (Xiao et al., ICML 2023), from the largest inputs of each linear."""

from __future__ import annotations

from torch import Tensor, nn

from qmamba_compile import quant

from .capture import Statistics
from .quantized_model import linears

STRENGTHS = (0.5, 0.75)
"""What is tried of the paper's alpha: how much of an activation's outlier the weight takes over."""


def smooth_factors(model: nn.Module, statistics: Statistics, strength: float) -> dict[str, Tensor]:
    """Linear -> factors [in_features] that multiply its input, and by which its weight is divided.

    None for a head whose weight is an embedding's, too: the embedding could not read what is divided by them, and the
    table would be there twice.

    ``max|W_j|^(1 - strength) / max|X_j|^strength``, scaled to a geometric mean of 1. A feature that is always zero, or
    that no weight reads, keeps 1.
    """
    factors = {}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for path, linear in linears(model).items():
        if id(linear.weight) in tables:
            continue
        largest_input = statistics.input_max[path].to(linear.weight.device)
        largest_weight = linear.weight.detach().double().abs().amax(dim=0)
        used = (largest_input > 0) & (largest_weight > 0)
        log = (1 - strength) * largest_weight.where(used, 1.0).log() - strength * largest_input.where(used, 1.0).log()
        log = (log - log[used].mean()).where(used, 0.0) if used.any() else log * 0
        factors[path] = log.exp().float()
    return factors


def activation_scales(statistics: Statistics, factors: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Linear -> static scale [] that maps its largest smoothed input to the largest code."""
    scales = {}
    for path, largest in statistics.input_max.items():
        smoothed = largest * factors[path].to(largest) if factors and path in factors else largest
        scales[path] = (smoothed.max() / quant.max_code(8)).clamp(min=quant.TINY_SCALE).float()
    return scales
