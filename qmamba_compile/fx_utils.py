"""Everything the passes need to know about Dynamo's graphs: metadata, layer paths, values, inputs, replacement."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.source import AttrSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils.weak import TensorWeakRef

Getter = Callable[[Any], Tensor]


@dataclasses.dataclass(frozen=True)
class InputSource:
    """Where the value of a placeholder comes from when Dynamo calls the compiled graph with its own arguments.

    Attributes:
        index: position in Dynamo's argument list; None for a tensor that belongs to the compiled graph.
        getter: applied to that argument, such as "the packed codes of this state".
        constant: the tensor when index is None.
    """

    index: int | None
    getter: Getter | None = None
    constant: Tensor | None = None


# --- reading -------------------------------------------------------------------------------------------------------


def value_of(node: Any) -> Any:
    """The fake value that Dynamo recorded for a node; anything else is returned as it is."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


def shape_of(node: Any) -> tuple[Any, ...]:
    """Shape from metadata, () when the node is no tensor."""
    value = value_of(node)
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def hint(size: Any) -> int:
    """The size that a possibly symbolic extent had when the graph was traced."""
    return size if isinstance(size, int) else size.node.hint


def same_size(a: Any, b: Any) -> bool:
    """True when two possibly symbolic sizes are known to be equal, without a guard."""
    return statically_known_true(a == b)


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """`same_size` of each extent."""
    return len(a) == len(b) and all(map(same_size, a, b))


def nbytes_of(node: Any) -> int:
    """Bytes of a node's tensor at the traced sizes."""
    count = 1
    for size in shape_of(node):
        count *= hint(size)
    return count * value_of(node).element_size()


def op_name(node: Any) -> str:
    """``"mul"`` for ``operator.mul``, ``torch.mul`` and ``Tensor.mul`` alike; the qualified name for our own ops.

    Under `torch.set_default_device` Dynamo writes operators as methods, ``~`` as ``__invert__``.
    """
    if not isinstance(node, fx.Node):
        return ""
    if node.op == "call_method":
        return re.sub(r"^__(\w+)__$", r"\1", str(node.target))
    if node.op == "call_function":
        if isinstance(node.target, torch._ops.OpOverload):
            return node.target._schema.name.replace("::", ".")
        return getattr(node.target, "__name__", str(node.target))
    return node.op


def split_path(expression: str) -> tuple[str, str]:
    """Dynamo's expression for a module or its parameter: the model, and the path by which it registers it.

    ``L['self'].bots[0]._modules['backbone']._modules['norm']`` -> ``("L['self'].bots[0]", "backbone.norm")``. Whatever
    holds the model without registering it, an object or a list, has no part in the path.
    """
    start = len(re.sub(r"(\._modules\['[^']+'\])*(\.(_parameters|_buffers)\['[^']+'\])?$", "", expression))
    return expression[:start], ".".join(re.findall(r"\['([^']+)'\]", expression[start:]))


def layer_of(node: fx.Node) -> str:
    """Module path that a node was traced in, such as ``backbone.layers.3.mixer``; "" at the top."""
    return node.meta.get("qmamba_layer", "")


def _name_layers(graph: fx.Graph) -> None:
    """Write down for `layer_of` where each node was traced: the path in its model, as `parameter_path` names it.

    Dynamo's stack of modules has paths with dots alone, which do not tell who registers whom; its expressions for
    parameters do.
    """
    names = {split_path(name)[0] for name in map(source_name, placeholders(graph)) if _is_parameter(name)}
    models = sorted((_dotted(name) for name in names), key=len, reverse=True)
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            path = _dotted(list(stack.values())[-1][0])
            model = next((model for model in models if f"{path}.".startswith(f"{model}.")), None)
            inside = re.sub(r"^[LG](\['[^']*'\]|\[\d+\])*", "", path) if model is None else path[len(model) :]
            node.meta["qmamba_layer"] = inside.removeprefix(".")


def _dotted(path: str) -> str:
    return re.sub(r"\._modules\['([^']+)'\]", r".\1", path)


def _is_parameter(name: str) -> bool:
    return "._parameters[" in name or "._buffers[" in name


def source_name(placeholder: fx.Node) -> str:
    """Dynamo's expression for a placeholder's value, "" when it has none."""
    argument = placeholder.meta.get("grapharg")
    name = getattr(getattr(argument, "source", None), "name", "")
    # A method up to torch 2.11, an attribute since.
    return name() if callable(name) else name


def parameter_path(placeholder: fx.Node) -> str:
    """Path of the parameter that a placeholder stands for, "" when it is none."""
    name = source_name(placeholder)
    return split_path(name)[1] if _is_parameter(name) else ""


CASTS = ("to", "float", "type_as")
"""Operations of another dtype and the same values, up to rounding."""

COPIES = (*CASTS, "contiguous")
"""These, and a copy in another layout."""


def strip(node: Any, *names: str) -> Any:
    """Walk back along first arguments while the operation is one of ``names`` and keeps floating point."""
    while op_name(node) in names and value_of(node).is_floating_point():
        node = node.args[0]
    return node


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by keyword."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def users(node: fx.Node, *names: str) -> list[fx.Node]:
    """Users of a node, those of the given operations only."""
    return [user for user in node.users if not names or op_name(user) in names]


def ancestors(roots: list[fx.Node], stop: set[fx.Node]) -> list[fx.Node]:
    """All nodes that ``roots`` are computed from, not walking past ``stop``."""
    seen: dict[fx.Node, None] = {}
    pending = list(roots)
    while pending:
        node = pending.pop()
        if node in seen or node in stop:
            continue
        seen[node] = None
        pending.extend(node.all_input_nodes)
    return list(seen)


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def output_node(graph: fx.Graph) -> fx.Node:
    return next(node for node in reversed(graph.nodes) if node.op == "output")


# --- writing -------------------------------------------------------------------------------------------------------


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy to rewrite; Dynamo still needs its own graph untouched after the backend returns.

    Each placeholder of the copy carries an `InputSource` under ``meta["qmamba_input"]``, each node its `layer_of`.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    returned = graph.graph_copy(gm.graph, mapping)
    graph.output(returned)
    output = output_node(graph)
    output.meta = dict(output_node(gm.graph).meta)
    # Lazy, as Dynamo's own: its code is printed once, after the passes.
    copied = _LazyGraphModule(gm, graph)
    copied.meta = dict(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        copied._param_name_to_source = gm._param_name_to_source
    for index, original in enumerate(placeholders(gm.graph)):
        node = mapping[original]
        node._dynamo_source = getattr(original, "_dynamo_source", None)
        node.meta["qmamba_input"] = InputSource(index)
    _name_layers(graph)
    return copied


def add_input(graph: fx.Graph, after: fx.Node | None, name: str, source: InputSource, fake: Tensor) -> fx.Node:
    """A new placeholder behind ``after`` (or behind the last one)."""
    last = after if after is not None else placeholders(graph)[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    node._dynamo_source = None
    node.meta.update(example_value=fake, qmamba_input=source)
    if source.index is None:
        # Keeps AOTAutograd from guarding on, or cloning, a tensor that no one else sees.
        mark_static(node)
    return node


def mark_static(node: fx.Node) -> None:
    """Say that a placeholder's tensor keeps its address: a CUDA graph then uses it in place instead of copying it."""
    node.meta["tensor_dict"] = {**node.meta.get("tensor_dict", {}), "_dynamo_static_input_type": "unguarded"}


def mark_written_static(graph: fx.Graph) -> None:
    """Mark what the graph writes in place, the states of a cache: CUDA graphs refuse to write to a copy of an input.

    A cache at other addresses has its CUDA graph recorded anew; `StaticStates` keeps that rare.
    """
    for node in placeholders(graph):
        if any(mutates(user) for user in node.users):
            mark_static(node)


def written_outputs(graph: fx.Graph) -> list[int]:
    """Positions in the outputs of tensors that the graph makes and writes in place: the states of a new cache."""
    return [
        position
        for position, node in enumerate(output_node(graph).args[0])
        if isinstance(node, fx.Node) and node.op != "placeholder" and any(mutates(user) for user in node.users)
    ]


def insert_call(before: fx.Node, target: Any, *args: Any) -> fx.Node:
    """Insert ``target(*args)`` with its fake value, in the layer of ``before``."""
    graph = before.graph
    with graph.inserting_before(before):
        node = graph.call_function(target, args)
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack", "qmamba_layer"):
        if key in before.meta:
            node.meta[key] = before.meta[key]
    fake_args = fx.map_arg(args, value_of)
    with _fake_mode(fake_args), torch.no_grad():
        node.meta["example_value"] = target(*fake_args)
    return node


def in_dtype_of(like: fx.Node, y: fx.Node) -> fx.Node:
    """``y``, just inserted, in the dtype of ``like``."""
    dtype = value_of(like).dtype
    if value_of(y).dtype == dtype:
        return y
    return insert_call(y.next, torch.ops.prims.convert_element_type.default, y, dtype)


def replace_node(old: fx.Node, new: fx.Node) -> None:
    """Give every use of ``old`` to ``new`` and erase ``old``; what only ``old`` read dies at the end of the pass."""
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    old.graph.erase_node(old)


def guarded_tensors() -> dict[int, list[dict[str, Any]]]:
    """By ``id`` of a tensor, the keywords that guards of the graph being compiled expect it in."""
    found: dict[int, list[dict[str, Any]]] = {}
    for guard in torch._guards.TracingContext.get().guards_context.dynamo_guards:
        keywords = getattr(guard.create_fn, "keywords", {})
        expected = keywords.get("value")
        if isinstance(expected, TensorWeakRef):
            found.setdefault(id(expected()), []).append(keywords)
    return found


def retarget_guards(guards: dict[int, list[dict[str, Any]]], old: Tensor, new: Tensor) -> None:
    """Let ``guards``, found by `guarded_tensors` while ``old`` lived, expect ``new`` where they expect ``old``.

    Dynamo builds them after the backend returns, and takes their values from weak references: with ``old`` replaced
    in its module but alive elsewhere (in an optimizer, in the caller's list), they would fail on the spot.
    """
    for keywords in guards.pop(id(old), ()):
        keywords["value"] = TensorWeakRef(new)


def narrow_guards(asked: Mapping[str, str | None]) -> None:
    """Let one comparison be all that guards of the graph being compiled ask of the inside of tensor subclasses.

    Dynamo compares everything that ``__tensor_flatten__`` returns, which it calls twice at each step, in Python, and
    each inner tensor as if it were an argument of its own; and it looks into every module whose parameters it guards
    that closely, where else it would see by one number that nothing in the module was replaced. Type, dtype, sizes and
    strides of the subclass itself remain guarded.

    Args:
        asked: by Dynamo's expression for a tensor, `source_name`: the name of an attribute that has to stay equal to
            its value of now, or None for a tensor that has to stay the same object.
    """
    guards = torch._guards.TracingContext.get().guards_context.dynamo_guards
    kept, sources = [], {}
    for guard in guards:
        if guard.name in asked:
            sources[guard.name] = guard.originating_source
            if guard.create_fn_name() == "TENSOR_SUBCLASS_METADATA_MATCH":
                continue
        elif guard.name.rpartition(".")[0] in asked:
            continue
        kept.append(guard)
    for name, source in sources.items():
        attribute = asked[name]
        if attribute is None:
            kept.append(source.make_guard(_same_object))
        else:
            kept.append(AttrSource(source, attribute).make_guard(GuardBuilder.CONSTANT_MATCH))
    guards.inner = type(guards.inner)(kept)


def _same_object(builder: GuardBuilder, guard: torch._guards.Guard) -> None:
    """`GuardBuilder.ID_MATCH`, which up to torch 2.11 prints the object: seconds for the weights of a model."""
    identity, words = builder.id_ref(builder.get(guard), guard.name), [f"{guard.name} is the same object"]
    builder.get_guard_manager(guard).add_id_match_guard(identity, words, guard.user_stack)


def _fake_mode(values: Any) -> FakeTensorMode:
    """The mode of the first fake tensor among ``values``.

    Not `detect_fake_mode`, which prefers the mode that AOTAutograd is going to use to the one of the graph's values.
    """
    for value in torch.utils._pytree.tree_leaves(values):
        if isinstance(value, FakeTensor):
            return value.fake_mode
    raise AssertionError("the graph carries no fake values")


def fake_like(graph: fx.Graph, tensor: Tensor) -> Tensor:
    """A fake of ``tensor`` in the mode of the graph's values, with static shape."""
    values = (value_of(node) for node in graph.nodes if node.op == "placeholder")
    first = next(value for value in values if isinstance(value, FakeTensor))
    return first.fake_mode.from_tensor(tensor, static_shapes=True)


_OPERATORS = set(dir(operator))
_IN_PLACE_OPERATORS = {name for name in _OPERATORS if name[0] == "i" and {name[1:], f"{name[1:]}_"} & _OPERATORS}
_IN_PLACE_OPERATORS |= {"setitem", "delitem"}


def mutates(node: fx.Node) -> bool:
    """True for in-place methods, in-place operators and whatever a schema says writes to its arguments."""
    name = op_name(node)
    if node.op == "call_method":
        return name.endswith("_") and not name.endswith("__")
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    return name in _IN_PLACE_OPERATORS or name.endswith("_") or "out" in node.kwargs or bool(node.kwargs.get("inplace"))


def written_between(first: fx.Node, last: fx.Node) -> fx.Node | None:
    """The first call between two nodes that writes in place, to whatever: views hide whose memory it is."""
    node = first.next
    while node is not last:
        if mutates(node):
            return node
        node = node.next
    return None


def removable(node: fx.Node) -> bool:
    """False for what acts by itself: placeholders, the output, and calls that write.

    `fx.Graph.eliminate_dead_code` is not used: it deletes a ``copy_`` whose result no one reads.
    """
    return node.op not in ("placeholder", "output") and not mutates(node) and not node.is_impure()


def iter_calls(graph: fx.Graph, *names: str) -> Iterator[fx.Node]:
    """Calls of the given operations, in order; safe against erasure while iterating."""
    yield from [node for node in graph.nodes if op_name(node) in names]
