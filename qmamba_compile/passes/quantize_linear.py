from __future__ import annotations

import functools
import logging
import operator
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
    source_name,
    users,
    value_of,
)
from ..quant import FLOATS
from ..report import Report
from .base import GraphPass, NoMatchError
from .int8_weight import has_row_scales, quantize_for_layer, require_recipe, was_made_here
from .parameter_forms import FindBeside
from .shared_weight import look_up, put_int8, require_table

logger = logging.getLogger(__name__)

_ROUTING_DISTANCE = 6
"""Operations between a router's linear and its ``topk``: casts, bias, softmax or sigmoid, masking, grouping."""

_INNER = ("qdata", "scale", "act_pre_scale")


class QuantizeLinear(GraphPass):
    """Make every linear int8 W8A8: torchao weights, activations quantized per token.

    The float parameter of the module is replaced by a torchao ``Int8Tensor`` while the graph is compiled, before
    Dynamo builds its guards: the float weight is freed, later graphs find the int8 one, and the model keeps working
    without the backend, by torchao's own int8 linear. Another object in its place compiles the graph again. An
    embedding tied to a linear (``lm_head``) reads the same codes. A parameter that is also used otherwise stays as it
    is and is quantized beside it.

    Before:
        y = linear(x, weight, bias)
        h = embedding(ids, weight)
    After:
        y = qmamba.w8a8_linear(x, qdata, scale, bias, act_pre_scale, act_scale)
        h = (aten.embedding(qdata, ids) * aten.embedding(scale, ids)).to(dtype)

    Refuses: layers named in ``skip_layers``, weights that are no parameters, routers of a mixture of experts; of
    embeddings those named in ``skip_layers``, with ``max_norm``, or tied to a linear that an artifact changes.
    """

    def rewrite(self, graph: fx.Graph, report: Report) -> None:
        if self.config.weights is None:
            self._warn_of_int8(graph)
            return
        self._guards = guarded_tensors()
        self._unpacked: dict[fx.Node, tuple[fx.Node | None, ...]] = {}
        self._kept: dict[fx.Node, tuple[SkipReason, str]] = {}
        for node in iter_calls(graph, "linear"):
            layer, weight = layer_of(node), argument(node, 1, "weight")
            refusal = self._refusal(node, weight, layer)
            if refusal is not None:
                report.skipped(layer, *refusal)
                continue
            (qdata, scale, act_pre_scale), counted = self._unpack(graph, weight, layer)
            y = insert_call(
                node,
                torch.ops.qmamba.w8a8_linear.default,
                argument(node, 0, "input"),
                qdata,
                scale,
                argument(node, 2, "bias"),
                act_pre_scale,
                self._act_scale(node, layer),
            )
            replace_node(node, y)
            report.rewrote(layer, "int8", **counted)
        for node in iter_calls(graph, "embedding"):
            weight = argument(node, 1, "weight")
            # Any other embedding is no anchor: it stays in floating point.
            if weight in self._kept or isinstance(self._value(weight), Int8Tensor):
                self._rewrite_embedding(graph, node, weight, report)
        unread = [weight for weight in self._unpacked if not weight.users]
        self._narrow_guards(unread)
        for weight in unread:
            graph.erase_node(weight)

    def _warn_of_int8(self, graph: fx.Graph) -> None:
        linears = iter_calls(graph, "linear")
        layers = [layer_of(node) for node in linears if was_made_here(self._value(argument(node, 1, "weight")))]
        if layers:
            logger.warning(
                "qmamba: weights=None, but %d linears (%s, ...) became int8 in an earlier compilation of this model, "
                "and stay so; load the model anew for float ones",
                len(layers),
                layers[0],
            )

    def _value(self, weight: fx.Node) -> Any:
        """What a placeholder stands for; None for other nodes."""
        source = weight.meta.get("qmamba_input")
        return None if source is None else self.context.example_inputs[source.index]

    def _rewrite_embedding(self, graph: fx.Graph, node: fx.Node, weight: fx.Node, report: Report) -> None:
        layer = layer_of(node)
        if weight in self._kept:
            report.skipped(layer, *self._kept[weight])
            return
        try:
            require_table(node, self._value(weight), self.config)
        except NoMatchError as refusal:
            report.skipped(layer, refusal.reason, refusal.detail)
            return
        (qdata, scale, _), counted = self._unpack(graph, weight, layer)
        look_up(node, qdata, scale)
        report.rewrote(layer, "int8", **counted)

    def _refusal(self, node: fx.Node, weight: Any, layer: str) -> tuple[SkipReason, str] | None:
        if self.config.excludes(layer):
            return SkipReason.EXCLUDED, "named by skip_layers"
        if op_name(weight) != "placeholder" or not parameter_path(weight):
            return SkipReason.NOT_A_PARAMETER, f"the weight is {op_name(weight) or weight!r} ({weight})"
        value = self._value(weight)
        plain = type(value) in (Tensor, nn.Parameter) and value.dtype in FLOATS
        if not plain and not has_row_scales(value):
            return SkipReason.DTYPE, f"the weight is a {type(value).__name__} of {value.dtype}; allowed: {FLOATS}"
        if value.shape[1] < 2:
            return SkipReason.SHAPE, "in_features=1: torch's int8 product on the CPU is wrong there"
        if _routes(node):
            return SkipReason.ROUTER, f"its output reaches topk within {_ROUTING_DISTANCE} operations"
        return None

    def _unpack(
        self, graph: fx.Graph, weight: fx.Node, layer: str
    ) -> tuple[tuple[fx.Node | None, ...], dict[str, int]]:
        """Inputs for the int8 form of ``weight``: qdata, scale, act_pre_scale (None where absent).

        Returns:
            them, and the bytes to report: all of them for the first layer that reads the weight.
        """
        if weight in self._unpacked:
            return self._unpacked[weight], {}
        value, find = self._value(weight), None
        if isinstance(value, Int8Tensor):
            require_recipe(value, layer, self.context.artifact)
        else:
            try:
                value = put_int8(weight, layer, self.context, self._guards)
            except NoMatchError as refusal:
                self._kept[weight] = refusal.reason, refusal.detail
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
            source = InputSource(weight.meta["qmamba_input"].index, _getter(name, find))
            last = add_input(graph, last, f"{weight.name}_{name}", source, fake_like(graph, tensor))
            mark_static(last)
            inputs.append(last)
        self._unpacked[weight] = tuple(inputs)
        whole = nbytes_of(weight)
        held = sum(nbytes_of(part) for part in inputs if part is not None) + (0 if find is None else whole)
        return tuple(inputs), {"bytes_before": whole, "bytes_after": held}

    def _narrow_guards(self, weights: list[fx.Node]) -> None:
        """Weights of which only the inner tensors are read have to stay the same objects: nothing more is asked."""
        narrow_guards({source_name(weight): None for weight in weights if isinstance(self._value(weight), Int8Tensor)})

    def _act_scale(self, linear: fx.Node, layer: str) -> fx.Node | None:
        """The layer's static activation scale, an input of its own: torchao's eager linear stays dynamic."""
        scale = None if self.context.artifact is None else self.context.artifact.act_scale(layer)
        if scale is None:
            return None
        scale = scale.to(value_of(linear).device)
        name = f"{layer.replace('.', '_')}_act_scale"
        source = InputSource(None, constant=scale)
        return add_input(linear.graph, None, name, source, fake_like(linear.graph, scale))


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
