"""States whose values lie halfway between two codes, exactly or as nearly as float32 has them."""

from __future__ import annotations

import torch
from torch import Tensor

from qmamba_compile import quant


def tied_state(shape: tuple[int, int, int, int], bits: int, state_scale: Tensor | None) -> Tensor:
    """[b, h, p, n], each value but a row's largest at a tie; channel_scale of even rows is a power of two."""
    h = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for _ in range(3):  # until a measured scale stays what it was
        scale = (quant.dynamic_state_scale(h) if state_scale is None else state_scale).float()[..., None, :]
        channel_scale = quant.channel_scale_of(h, scale[..., 0, :], bits).float()
        channel_scale[..., ::2] = channel_scale[..., ::2].log2().round().exp2()
        step = channel_scale[..., None] * scale
        codes = (h / step).floor().clamp(-quant.max_code(bits), quant.max_code(bits) - 1) + 0.5
        largest = (h / scale).abs().argmax(dim=-1, keepdim=True)
        h = codes.scatter(-1, largest, float(quant.max_code(bits))) * step
    return h


def assert_tied(h: Tensor, channel_scale: Tensor, state_scale: Tensor) -> None:
    """Fails unless ``h`` has many ties under its scales, and many products that only float32 takes for ties."""
    scaled = h * state_scale.float().reciprocal()[..., None, :]
    product = scaled.double() * channel_scale.float().reciprocal()[..., None].double()
    exact = product.frac().abs() == 0.5
    nearly = (product.float().frac().abs() == 0.5) & ~exact
    assert exact.sum() > h.numel() // 100 and nearly.sum() > h.numel() // 100
    assert product.round().ne(product.float().round()).sum() > h.numel() // 200
