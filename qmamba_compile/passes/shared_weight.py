"""Weights that modules share, such as that of ``lm_head`` and the embedding: who holds one, so that an int8 one takes
its place everywhere, and who may read its codes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torchao.quantization import Int8Tensor

from ..artifact import changes_weight
from ..config import QMambaConfig
from ..errors import SkipReason
from ..fx_utils import (
    argument,
    in_dtype_of,
    insert_call,
    layer_of,
    op_name,
    parameter_path,
    replace_node,
    retarget_guards,
    source_name,
    split_path,
    users,
)
from .base import NoMatchError, PassContext
from .int8_weight import has_row_scales, note_recipe, quantize_for_layer

_aten = torch.ops.aten


def put_int8(weight: fx.Node, layer: str, context: PassContext, guards: dict[int, list[dict[str, Any]]]) -> Int8Tensor:
    """Put the int8 form of the parameter of linear ``layer`` wherever a module holds it, and into Dynamo's arguments.

    Args:
        guards: of the graph, by `guarded_tensors`; those of the float parameter are made to look at the int8 one.

    Raises:
        NoMatchError: something needs the float parameter, or it is no parameter.
    """
    index = weight.meta["qmamba_input"].index
    value, slots = context.example_inputs[index], _slots_of(weight, layer, context)
    with torch.inference_mode(False), torch.no_grad():
        quantized = quantize_for_layer(value, layer, context.artifact, context.pages)
        quantized = nn.Parameter(quantized, requires_grad=False)
    note_recipe(quantized, layer, context.artifact)
    for module, name in slots:
        module._parameters[name] = quantized
    retarget_guards(guards, value, quantized)
    context.example_inputs[index] = quantized
    return quantized


def _slots_of(weight: fx.Node, layer: str, context: PassContext) -> list[tuple[nn.Module, str]]:
    """Every (module, name) that holds the parameter of the linear ``layer``.

    Dynamo gives one placeholder to a parameter that several modules share, so all users are asked for their layer. A
    holder that is no such layer uses it in another graph: an embedding when this graph starts from ``inputs_embeds``.
    """
    for user in weight.users:
        _require_reader(user, context.config)
    root_name, _ = split_path(source_name(weight))
    value = context.example_inputs[weight.meta["qmamba_input"].index]
    paths = {layer_of(user) for user in weight.users} | {parameter_path(weight).rpartition(".")[0]}
    try:
        root = eval(root_name, dict(context.scope))
        layers = {id(root.get_submodule(path)) for path in paths}
    except (NameError, LookupError, AttributeError) as problem:
        # A tensor in a closure, or a weight that two models share.
        raise NoMatchError(SkipReason.NOT_A_PARAMETER, f"{root_name} does not lead to it: {problem}") from None
    slots: list[tuple[nn.Module, str]] = []
    for path, module in root.named_modules():
        names = [name for name, parameter in module._parameters.items() if parameter is value]
        if names and id(module) not in layers:
            _require_holder(module, path, context.config)
        slots.extend((module, name) for name in names)
    if not slots:
        raise NoMatchError(SkipReason.NOT_A_PARAMETER, f"no module has {source_name(weight)} as a parameter")
    tied = users(weight, "embedding") or any(isinstance(module, nn.Embedding) for module, _ in slots)
    if tied and changes_weight(context.artifact, layer):
        raise NoMatchError(SkipReason.OTHER_WEIGHT, f"the calibration artifact has another weight for {layer}")
    return slots


def require_table(node: fx.Node, value: Int8Tensor, config: QMambaConfig) -> None:
    """Refuse an embedding that does more than to look up, and int8 weights of other forms than ours.

    Raises:
        NoMatchError: its rows are more than codes times a scale.
    """
    _require_reader(node, config)
    if not has_row_scales(value) or value.act_pre_scale is not None:
        raise NoMatchError(SkipReason.DTYPE, "the table is no torchao int8 weight with one symmetric scale a row")


def look_up(node: fx.Node, qdata: fx.Node, scale: fx.Node) -> None:
    """Replace an embedding [..., k] by rows of codes [o, k] times scales [o, 1]; Inductor makes one loop of them."""
    ids = argument(node, 0, "input")
    codes, scales = (insert_call(node, _aten.embedding.default, part, ids) for part in (qdata, scale))
    y = insert_call(node, _aten.mul.Tensor, codes, scales)
    replace_node(node, in_dtype_of(node, y))


def _require_reader(user: fx.Node, config: QMambaConfig) -> None:
    """``padding_idx``, ``scale_grad_by_freq`` and ``sparse`` shape gradients, of which there are none here."""
    if op_name(user) not in ("linear", "embedding"):
        raise NoMatchError(SkipReason.SECOND_READER, f"{op_name(user)} ({user}) reads the weight, too")
    if op_name(user) == "embedding":
        _require_plain(layer_of(user), argument(user, 3, "max_norm"), config)


def _require_holder(module: nn.Module, path: str, config: QMambaConfig) -> None:
    if isinstance(module, nn.Embedding):
        _require_plain(path, module.max_norm, config)
    elif not isinstance(module, nn.Linear):
        raise NoMatchError(SkipReason.SECOND_READER, f"{path}, a {type(module).__name__}, holds the weight, too")


def _require_plain(path: str, max_norm: Any, config: QMambaConfig) -> None:
    if config.excludes(path):
        raise NoMatchError(SkipReason.EXCLUDED, "named by skip_layers")
    if max_norm is not None:
        raise NoMatchError(SkipReason.SECOND_READER, f"{path} has max_norm={max_norm}: it writes to the rows it reads")
