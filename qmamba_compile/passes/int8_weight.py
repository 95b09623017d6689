"""int8 forms of linear weights: torchao tensors, in the model or beside a parameter that stays float."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from torchao.quantization import Int8Tensor
from torchao.quantization.granularity import PerRow
from torchao.quantization.quantize_.workflows.int8.int8_tensor import QuantizeTensorToInt8Kwargs

from .. import quant
from ..artifact import Artifact


class FindBeside:
    """From a float parameter that stays in use to its int8 form, shared by all graphs compiled with this calibration.

    Looked up by the parameter at each call: Dynamo runs this graph for another model of the same sizes, too.
    """

    def __init__(self, layer: str, artifact: Artifact | None) -> None:
        self._key = (layer, None if artifact is None else artifact.digest)
        self._quantize = functools.partial(quantize_for_layer, layer=layer, artifact=artifact)

    def __call__(self, weight: Tensor) -> Int8Tensor:
        forms = _beside.setdefault(weight, {})
        if self._key not in forms:
            forms[self._key] = _WeightBeside(self._quantize)
        return forms[self._key](weight)


class _WeightBeside:
    """int8 form of a float parameter that stays in use; made again when the parameter was written to."""

    def __init__(self, quantize: Callable[[Tensor], Int8Tensor]) -> None:
        self._quantize = quantize
        self._made_from: tuple[int, int] | None = None
        self.int8: Int8Tensor | None = None

    def __call__(self, weight: Tensor) -> Int8Tensor:
        now = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        if self.int8 is None or self._made_from != now:
            with torch.inference_mode(False), torch.no_grad():
                self.int8 = self._quantize(weight.detach())
            self._made_from = now
        return self.int8


_beside: Any = WeakIdKeyDictionary()


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
        weight = torch.cat([weight[: -tuned.shape[0]], tuned.to(weight)])
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
    """Bytes of a model's parameters as they are held, int8 forms beside float parameters included."""
    total = 0
    for parameter in model.parameters():
        forms = [form.int8 for form in _beside.get(parameter, {}).values() if form.int8 is not None]
        for tensor in (parameter, *forms):
            if isinstance(tensor, Int8Tensor):
                total += sum(
                    part.nbytes for part in (tensor.qdata, tensor.scale, tensor.act_pre_scale) if part is not None
                )
            else:
                total += tensor.nbytes
    return total
