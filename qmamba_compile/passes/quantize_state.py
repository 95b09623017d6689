from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

from .. import quant
from ..config import layer_seed
from ..errors import SkipReason, StateError
from ..fx_utils import (
    InputSource,
    add_input,
    fake_like,
    hint,
    insert_call,
    iter_calls,
    layer_of,
    mutates,
    narrow_guards,
    nbytes_of,
    op_name,
    output_node,
    placeholders,
    shape_of,
    source_name,
    strip,
    value_of,
)
from ..recurrence import RING_DTYPES
from ..report import Report
from ..state import RING_TENSORS, DSQState, require_packable
from .base import GraphPass, RingLayout, StateOutput
from .match_scan import is_final_state
from .match_step import is_step


class QuantizeState(GraphPass):
    """Hand the SSM state over packed, and keep it packed where it is updated.

    The state leaves a prefill as a fresh float tensor that the model's cache stores, and enters a decode step as
    whatever the cache holds. So it is enough to return a `DSQState` once: the cache carries it from then on.

    Before (prefill):                        After:
        state = zeros_like(final_state)          packed, ... = qmamba.quantize_state(final_state, ...)
        state.copy_(final_state)                 return packed, ...      (the call wrapper makes a DSQState of them)
        return state

    Before (decode, ``state`` a DSQState):   After:
        new = state * dA + dBx                   h = qmamba.dequantize_state(packed, channel_scale, state_scale)
        state.copy_(new)                         new = h * dA + dBx
                                                 qmamba.quantize_state_(packed, channel_scale, ..., new)

    Refuses: a float state that the caller put into the cache, a prefill state that is read again in the same graph.
    Raises: `StateError` when dstate does not pack, `ArtifactError` when a layer has no calibrated scale.
    """

    def rewrite(self, graph: fx.Graph, report: Report) -> None:
        states = {node: value_of(node) for node in placeholders(graph) if isinstance(value_of(node), DSQState)}
        narrow_guards(dict.fromkeys(map(source_name, states), "form"))
        for node in states:
            self._unpack_input(graph, node, report)
        if self.config.state_bits is None:
            return
        for copy in iter_calls(graph, "copy_"):
            target, value = copy.args[:2]
            is_final = is_final_state(strip(value, "to"))
            if is_final and op_name(target) == "zeros_like":
                self._quantize_output(graph, copy, report)
            elif op_name(target) == "placeholder" and (is_final or is_step(value, target)):
                self._skip_float_state(copy, report)

    # --- decode ----------------------------------------------------------------------------------------------------

    def _unpack_input(self, graph: fx.Graph, node: fx.Node, report: Report) -> None:
        """Replace a `DSQState` argument by its inner tensors."""
        state, source = value_of(node), node.meta["qmamba_input"]
        inner: dict[str, fx.Node] = {}
        last = node
        for name in state.__tensor_flatten__()[0]:
            getter = operator.attrgetter(name)
            inner[name] = last = add_input(
                graph, last, f"{node.name}_{name}", InputSource(source.index, getter), getattr(state, name)
            )
        layer = next((layer_of(user) for user in node.users if user.op != "output"), node.name)
        self.context.state_inputs[source.index] = layer
        stores = 0
        for user in sorted(node.users):
            if user.op == "output":
                raise StateError(
                    f"{layer}: this function returns the packed state that it got ({node.name}); "
                    "read it from the cache instead, or compile the model itself"
                )
            if op_name(user) == "copy_" and user.args[0] is node:
                self._store(user, inner, state)
                stores += 1
            elif mutates(user) and user.args[0] is node:
                raise StateError(
                    f"{layer}: {op_name(user)} writes to a packed state inside the compiled function, and the write "
                    "would be lost; allowed: copy_. Call it outside, or set state_bits=None"
                )
            else:
                user.replace_input_with(node, _read(user, inner, state.bits))
        graph.erase_node(node)
        report.rewrote(
            layer,
            f"{state.bits}-bit state, {stores} store(s)",
            bytes_before=_float_nbytes(state),
            bytes_after=sum(nbytes_of(inner[name]) for name in state.own),
        )

    def _store(self, copy: fx.Node, inner: dict[str, fx.Node], state: DSQState) -> None:
        for reader in list(copy.users):
            # ``copy_`` returns its target, so a reader of its result reads the new state.
            reader.replace_input_with(copy, _read(reader, inner, state.bits))
        scale = inner["state_scale"]
        insert_call(
            copy,
            torch.ops.qmamba.quantize_state_.default,
            inner["packed"],
            inner["channel_scale"],
            scale if state.dynamic else None,
            inner["rng"],
            copy.args[1],
            None if state.dynamic else scale,
            state.bits,
            state.stochastic,
            inner.get("ring_position"),
        )
        copy.graph.erase_node(copy)

    def _skip_float_state(self, copy: fx.Node, report: Report) -> None:
        layer, excluded = layer_of(copy), self.config.excludes(layer_of(copy))
        reason = SkipReason.EXCLUDED if excluded else SkipReason.FLOAT_STATE
        elsewhere = "the cache was filled outside this backend; run the prompt through the compiled model"
        detail = "named by skip_layers" if excluded else elsewhere
        report.skipped(layer, reason, detail, bytes_before=nbytes_of(copy.args[0]))

    # --- prefill ---------------------------------------------------------------------------------------------------

    def _quantize_output(self, graph: fx.Graph, copy: fx.Node, report: Report) -> None:
        fresh, final = copy.args
        layer, bits = layer_of(copy), self.config.state_bits
        assert bits is not None
        stochastic = self.config.rounding == "stochastic"
        output = output_node(graph)
        returned: list[Any] = list(output.args[0])
        readers = [user for user in fresh.users if user not in (copy, output)]
        if not readers and not copy.users and fresh not in returned:
            return  # of a cache that is dropped: no state leaves this graph
        if readers or copy.users or returned.count(fresh) != 1:
            report.skipped(layer, SkipReason.SECOND_READER, f"{fresh} is also read by {readers or list(copy.users)}")
            return
        if self.config.excludes(layer):
            report.skipped(layer, SkipReason.EXCLUDED, "named by skip_layers", bytes_before=nbytes_of(final))
            return
        require_packable(shape_of(final)[-1], bits, layer)
        scale, scale_node = self._calibrated_scale(layer, final)
        fused = insert_call(
            copy,
            torch.ops.qmamba.quantize_state.default,
            final,
            scale_node,
            bits,
            stochastic,
            layer_seed(self.config.seed, layer),
        )
        width = 3 if scale_node is not None else 4
        parts = [insert_call(copy, operator.getitem, fused, index) for index in range(width)]
        position = returned.index(fresh)
        # Positions in the flattened outputs; earlier states have already widened theirs.
        dynamo_position = position - sum(s.width - 1 for s in self.context.state_outputs if s.position < position)
        output.args = (tuple(returned[:position] + parts + returned[position + 1 :]),)
        ring = self._ring_layout(final)
        self.context.state_outputs.append(StateOutput(dynamo_position, layer, bits, stochastic, scale, ring))
        bytes_before, bytes_after = nbytes_of(final), sum(nbytes_of(part) for part in parts)
        stored = f"stored every {ring.flush_interval} steps" if ring is not None else "stored at every step"
        if ring is None and self.config.flush_interval > 1:
            stored += ": the scan, which names B, was not fused"
        if ring is not None:
            bytes_after += ring.nbytes(*(hint(size) for size in shape_of(final)))
        graph.erase_node(copy)
        graph.erase_node(fresh)
        report.rewrote(layer, f"{bits}-bit state, {stored}", bytes_before=bytes_before, bytes_after=bytes_after)

    def _ring_layout(self, final: fx.Node) -> RingLayout | None:
        """The ring of a state that is not stored at every step; its ngroups are those of the scan's B."""
        scan = strip(final, "getitem")
        if self.config.flush_interval == 1 or op_name(scan) != "qmamba.chunk_scan":
            return None
        interval = self.config.flush_interval
        start = len(self.context.state_outputs) % interval
        return RingLayout(interval, RING_DTYPES[self.config.ring_bits], shape_of(scan.args[3])[2], start)

    def _calibrated_scale(self, layer: str, final: fx.Node) -> tuple[Tensor | None, fx.Node | None]:
        if self.config.state_scales == "dynamic":
            return None, None
        assert self.context.artifact is not None
        _, nheads, _, dstate = shape_of(final)
        scale = self.context.artifact.require_state_scale(layer, (nheads, dstate))
        scale = quant.store_scale(scale).to(value_of(final).device)
        name = f"{layer.replace('.', '_')}_state_scale"
        source = InputSource(None, constant=scale)
        return scale, add_input(final.graph, None, name, source, fake_like(final.graph, scale))


def _float_nbytes(state: DSQState) -> int:
    """Bytes of the float32 state that a `DSQState` stands for, at the traced sizes."""
    return 4 * math.prod(hint(size) for size in state.shape)


def _read(reader: fx.Node, inner: dict[str, fx.Node], bits: int) -> fx.Node:
    scales = (inner["channel_scale"], inner["state_scale"])
    ring = [inner.get(name) for name in RING_TENSORS] if "ring_x" in inner else []
    return insert_call(reader, torch.ops.qmamba.dequantize_state.default, inner["packed"], *scales, bits, *ring)
