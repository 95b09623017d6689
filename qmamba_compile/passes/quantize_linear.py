from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torchao.quantization import Int8Tensor

from ..errors import SkipReason
from ..fx_utils import (
    InputSource,
    add_input,
    argument,
    fake_like,
    guarded_tensors,
    insert_call,
    iter_calls,
    layer_of,
    mark_static,
    narrow_guards,
    nbytes_of,
    op_name,
    parameter_path,
    replace_node,
    retarget_guards,
    source_name,
    users,
)
from ..report import Report
from .base import GraphPass
from .int8_weight import has_row_scales, quantize_for_layer
from .parameter_forms import FindBeside

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_ROUTING_DISTANCE = 6
"""Operations between a router's linear and its ``topk``: casts, bias, softmax or sigmoid, masking, grouping."""

_INNER = ("qdata", "scale", "act_pre_scale")


class QuantizeLinear(GraphPass):
    """Make every linear int8 W8A8: torchao weights, activations quantized per token.

    The float parameter of the module is replaced by a torchao ``Int8Tensor`` while the graph is compiled, before
    Dynamo builds its guards: the float weight is freed, later graphs find the int8 one, and the model keeps working
    without the backend, by torchao's own int8 linear. Another object in its place compiles the graph again. A
    parameter that is also used otherwise (an embedding tied to ``lm_head``) stays as it is and is quantized beside it.

    Before:
        y = linear(x, weight, bias)
    After:
        y = qmamba.w8a8_linear(x, qdata, scale, bias, act_pre_scale, act_scale)

    Refuses: layers named in ``skip_layers``, weights that are no parameters, routers of a mixture of experts.
    """

    def rewrite(self, graph: fx.Graph, report: Report) -> None:
        if self.config.weights is None:
            return
        self._guards = guarded_tensors()
        unpacked: dict[fx.Node, tuple[fx.Node | None, ...]] = {}
        for node in iter_calls(graph, "linear"):
            layer, weight = layer_of(node), argument(node, 1, "weight")
            refusal = self._refusal(node, weight, layer)
            if refusal is not None:
                report.skipped(layer, *refusal)
                continue
            bytes_before = bytes_after = 0
            if weight not in unpacked:
                bytes_before = nbytes_of(weight)
                unpacked[weight] = self._unpack(graph, weight, layer)
                bytes_after = sum(nbytes_of(part) for part in unpacked[weight] if part is not None)
            qdata, scale, act_pre_scale = unpacked[weight]
            y = insert_call(
                node,
                torch.ops.qmamba.w8a8_linear.default,
                argument(node, 0, "input"),
                qdata,
                scale,
                argument(node, 2, "bias"),
                act_pre_scale,
                self._act_scale(graph, layer),
            )
            replace_node(node, y)
            report.rewrote(layer, "int8", bytes_before=bytes_before, bytes_after=bytes_after)
        unread = [weight for weight in unpacked if not weight.users]
        self._narrow_guards(unread)
        for weight in unread:
            graph.erase_node(weight)

    def _refusal(self, node: fx.Node, weight: Any, layer: str) -> tuple[SkipReason, str] | None:
        if self.config.excludes(layer):
            return SkipReason.EXCLUDED, "named by skip_layers"
        if op_name(weight) != "placeholder" or not parameter_path(weight):
            return SkipReason.NOT_A_PARAMETER, f"the weight is {op_name(weight) or weight!r} ({weight})"
        value = self.context.example_inputs[weight.meta["qmamba_input"].index]
        plain = type(value) in (Tensor, nn.Parameter) and value.dtype in _FLOATS
        if not plain and not has_row_scales(value):
            return SkipReason.DTYPE, f"the weight is a {type(value).__name__} of {value.dtype}; allowed: {_FLOATS}"
        if value.shape[1] < 2:
            return SkipReason.SHAPE, "in_features=1: torch's int8 product on the CPU is wrong there"
        if _routes(node):
            return SkipReason.ROUTER, f"its output reaches topk within {_ROUTING_DISTANCE} operations"
        return None

    def _unpack(self, graph: fx.Graph, weight: fx.Node, layer: str) -> tuple[fx.Node | None, ...]:
        """Inputs for the int8 form of ``weight``: qdata, scale, act_pre_scale (None where absent)."""
        index = weight.meta["qmamba_input"].index
        value = self.context.example_inputs[index]
        find: FindBeside | None = None
        if not isinstance(value, Int8Tensor):
            slots = self._module_slots(weight)
            if slots:
                with torch.inference_mode(False), torch.no_grad():
                    quantized = nn.Parameter(
                        quantize_for_layer(value, layer, self.context.artifact), requires_grad=False
                    )
                for module, name in slots:
                    module._parameters[name] = quantized
                retarget_guards(self._guards, value, quantized)
                value = quantized
                self.context.example_inputs[index] = value
            else:
                artifact = self.context.artifact
                key = (layer, None if artifact is None else artifact.digest)
                find = FindBeside(key, functools.partial(quantize_for_layer, layer=layer, artifact=artifact))
                value = find(value)
        inputs: list[fx.Node | None] = []
        last = weight
        for name in _INNER:
            tensor = getattr(value, name)
            if tensor is None:
                inputs.append(None)
                continue
            source = InputSource(index, _getter(name, find))
            last = add_input(graph, last, f"{weight.name}_{name}", source, fake_like(graph, tensor))
            mark_static(last)
            inputs.append(last)
        return tuple(inputs)

    def _narrow_guards(self, weights: list[fx.Node]) -> None:
        """Weights of which only the inner tensors are read have to stay the same objects: nothing more is asked."""
        values = {weight: self.context.example_inputs[weight.meta["qmamba_input"].index] for weight in weights}
        narrow_guards({source_name(weight): None for weight, value in values.items() if isinstance(value, Int8Tensor)})

    def _act_scale(self, graph: fx.Graph, layer: str) -> fx.Node | None:
        """The layer's static activation scale, an input of its own: torchao's eager linear stays dynamic."""
        scale = None if self.context.artifact is None else self.context.artifact.act_scale(layer)
        if scale is None:
            return None
        name = f"{layer.replace('.', '_')}_act_scale"
        return add_input(graph, None, name, InputSource(None, constant=scale), fake_like(graph, scale))

    def _module_slots(self, weight: fx.Node) -> list[tuple[nn.Module, str]]:
        """Every (module, name) that holds the parameter; empty when it must stay in floating point.

        Dynamo gives one placeholder to a parameter that several modules share, so all users are asked for their layer.
        A holder that is no such layer has another use for it, in another graph: an embedding tied to ``lm_head`` when
        this graph starts from ``inputs_embeds``.
        """
        if any(op_name(user) != "linear" for user in weight.users):
            return []
        root_name, _, _ = re.split(r"(\._modules|\._parameters)", source_name(weight), maxsplit=1)
        try:
            root = eval(root_name, dict(self.context.scope))
        except (NameError, KeyError, AttributeError):
            return []
        value = self.context.example_inputs[weight.meta["qmamba_input"].index]
        paths = {layer_of(user) for user in weight.users} | {parameter_path(weight).rpartition(".")[0]}
        layers = {id(root.get_submodule(path)) for path in paths}
        slots: list[tuple[nn.Module, str]] = []
        for module in root.modules():
            names = [name for name, parameter in module._parameters.items() if parameter is value]
            if names and id(module) not in layers and not isinstance(module, nn.Linear):
                return []
            slots.extend((module, name) for name in names)
        return slots


def _getter(name: str, find: FindBeside | None) -> Callable[[Any], Tensor]:
    attribute = operator.attrgetter(name)
    return attribute if find is None else lambda weight: attribute(find(weight))


def _routes(node: fx.Node) -> bool:
    """True when the result of a linear is what a ``topk`` chooses by."""
    frontier = [node]
    for _ in range(_ROUTING_DISTANCE):
        frontier = [user for item in frontier for user in users(item) if op_name(user) not in ("linear", "einsum")]
        if any(op_name(user) == "topk" for user in frontier):
            return True
    return False
