"""int8 forms of linear weights: torchao tensors, in the model or beside a parameter that stays float."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from torchao.quantization import Int8Tensor
from torchao.quantization.granularity import PerRow
from torchao.quantization.quantize_.workflows.int8.int8_tensor import QuantizeTensorToInt8Kwargs

from .. import quant
from ..artifact import Artifact, with_last_rows
from ..errors import ArtifactError
from ..huge_pages import HugePages
from .parameter_forms import forms_of

BLOCK_WEIGHTS = 2**16
"""Weights quantized at once. lm_head [50288, 768]: 0.19 s with intermediate results in the cache, 0.52 s as a whole."""


def quantize_for_layer(
    weight: Tensor, layer: str, artifact: Artifact | None, pages: HugePages | None = None
) -> Int8Tensor:
    """`quantize_weight` with what the artifact says of the layer."""
    if artifact is None:
        return quantize_weight(weight, pages=pages)
    return quantize_weight(weight, smooth=artifact.smooth(layer), tuned=artifact.weight_bcdt(layer), pages=pages)


def quantize_weight(
    weight: Tensor, *, smooth: Tensor | None = None, tuned: Tensor | None = None, pages: HugePages | None = None
) -> Int8Tensor:
    """torchao ``Int8Tensor`` of a weight [o, k]: symmetric, one scale per output channel.

    Args:
        smooth: SmoothQuant factors [k] that multiply the activations; the weight is divided by them.
        tuned: rows [r, k] that replace the last r of the weight (B, C and dt of a Mamba2 ``in_proj``, by ESR).
        pages: where the codes go; without, into a plain tensor.
    """
    if tuned is not None:
        weight = with_last_rows(weight, tuned)
    factors = None if smooth is None else smooth.to(weight)
    empty = torch.empty if pages is None else pages.empty
    codes = empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty((weight.shape[0], 1), dtype=torch.float32, device=weight.device)
    step = max(1, BLOCK_WEIGHTS // weight.shape[1])
    for block in (slice(row, row + step) for row in range(0, weight.shape[0], step)):
        rows = weight[block] if factors is None else weight[block] / factors
        codes[block], scale[block] = quant.quantize_rows(rows)
    return Int8Tensor(
        codes,
        scale,
        [1, weight.shape[1]],
        weight.dtype,
        zero_point=torch.zeros_like(scale, dtype=torch.int8),
        act_pre_scale=factors,
        act_quant_kwargs=QuantizeTensorToInt8Kwargs(granularity=PerRow()),
    )


def require_recipe(weight: Tensor, layer: str, artifact: Artifact | None) -> None:
    """Refuse an int8 weight that an earlier compilation made as another artifact says: its float weight is gone.

    Of weights that were copied, loaded or made elsewhere nothing is known, and they are taken as they are.

    Raises:
        ArtifactError: factors or tuned rows of this layer are not those that the weight was made with.
    """
    if weight in _recipes and not all(map(_same, _recipes[weight], _recipe(layer, artifact))):
        asked = "these options name no calibration" if artifact is None else f"{artifact.source} asks for another"
        raise ArtifactError(
            f"{layer}: its weight became int8 in an earlier compilation, with the SmoothQuant factors and tuned rows "
            f"of that one, and {asked}; load the model anew to compile it another way"
        )


def note_recipe(weight: Tensor, layer: str, artifact: Artifact | None) -> None:
    """Remember what an int8 weight was made with, for `require_recipe`."""
    _recipes[weight] = _recipe(layer, artifact)


def was_made_here(weight: Any) -> bool:
    """True for an int8 weight that a compilation put into the model in place of a float one."""
    return isinstance(weight, Int8Tensor) and weight in _recipes


_recipes: Any = WeakIdKeyDictionary()


def _recipe(layer: str, artifact: Artifact | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if artifact is None else (artifact.smooth(layer), artifact.weight_bcdt(layer))


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


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


@Int8Tensor.implements(torch.ops.aten.embedding.default)
def _look_up_in_eager(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """torchao's own dequantizes all of the table: 0.44 s of [50288, 768] for 16 rows, here 0.07 ms; the same values."""
    weight, ids = args[:2]
    if tuple(weight.scale.shape) != (weight.shape[0], 1):
        return func(weight.dequantize(), ids)
    codes = func(weight.qdata, ids).to(weight.scale.dtype)
    if weight.zero_point is not None:
        codes = codes - func(weight.zero_point, ids)
    return (codes * func(weight.scale, ids)).to(weight.dtype)
