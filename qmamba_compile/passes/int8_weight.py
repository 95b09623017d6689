"""int8 forms of linear weights: torchao tensors, in the model or beside a parameter that stays float."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization import Int8Tensor
from torchao.quantization.granularity import PerRow
from torchao.quantization.quantize_.workflows.int8.int8_tensor import QuantizeTensorToInt8Kwargs

from .. import quant
from ..artifact import Artifact, with_last_rows
from .parameter_forms import forms_of


def quantize_for_layer(weight: Tensor, layer: str, artifact: Artifact | None) -> Int8Tensor:
    """`quantize_weight` with what the artifact says of the layer."""
    if artifact is None:
        return quantize_weight(weight)
    return quantize_weight(weight, smooth=artifact.smooth(layer), tuned=artifact.weight_bcdt(layer))


def quantize_weight(weight: Tensor, *, smooth: Tensor | None = None, tuned: Tensor | None = None) -> Int8Tensor:
    """torchao ``Int8Tensor`` of a weight [o, k]: symmetric, one scale per output channel.

    Args:
        smooth: SmoothQuant factors [k] that multiply the activations; the weight is divided by them.
        tuned: rows [r, k] that replace the last r of the weight (B, C and dt of a Mamba2 ``in_proj``, by ESR).
    """
    if tuned is not None:
        weight = with_last_rows(weight, tuned)
    if smooth is not None:
        weight = weight / smooth.to(weight)
    codes, scale = quant.quantize_rows(weight)
    return Int8Tensor(
        codes,
        scale,
        [1, weight.shape[1]],
        weight.dtype,
        zero_point=torch.zeros_like(scale, dtype=torch.int8),
        act_pre_scale=None if smooth is None else smooth.to(weight),
        act_quant_kwargs=QuantizeTensorToInt8Kwargs(granularity=PerRow()),
    )


def has_row_scales(value: Any) -> bool:
    """True for a torchao int8 weight with one symmetric scale a row and dynamically quantized activations."""
    return (
        isinstance(value, Int8Tensor)
        and value.act_quant_kwargs is not None
        and value.act_quant_scale is None
        and value.scale.numel() == value.shape[0]
        and (value.zero_point is None or not bool(value.zero_point.any()))
    )


def held_nbytes(model: nn.Module) -> int:
    """Bytes of a model's parameters as they are held, forms beside them included."""
    total = 0
    for parameter in model.parameters():
        for tensor in (parameter, *forms_of(parameter)):
            if isinstance(tensor, Int8Tensor):
                total += sum(
                    part.nbytes for part in (tensor.qdata, tensor.scale, tensor.act_pre_scale) if part is not None
                )
            else:
                total += tensor.nbytes
    return total
