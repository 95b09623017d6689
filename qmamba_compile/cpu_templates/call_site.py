"""A launch of a CPU kernel, and its replay from compiled code.

A launcher turns an operator's arguments into a `Launch`: checks, layouts, output. In a compiled graph all of that is
the same at every step, and only addresses change. Inductor's code therefore calls a `CallSite` where it would call the
operator: it launches what the first call found with the addresses of now, and goes neither through the dispatcher nor
through the launcher, nor, past the first call, through Python (`replay.cpp`).
"""

from __future__ import annotations

import copy
import ctypes
import functools
import hashlib
import itertools
import pathlib
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._dynamo.guards import _empty_strided_cpu, _reinterpret_tensor  # type: ignore[attr-defined]

from .build import Kernel, load_extension

Field = Tensor | int | None
"""One 8-byte field of an `Arguments` struct: a tensor stands for its address, None for a null pointer."""


class Launch(NamedTuple):
    """A kernel, the fields of its `Arguments`, the output among them, and the dtype that the operator returns."""

    kernel: Kernel
    fields: list[Field]
    output: Tensor
    dtype: torch.dtype

    def run(self) -> Tensor:
        self.kernel(pack(self.fields))
        return self.output if self.output.dtype is self.dtype else self.output.to(self.dtype)


LAUNCHERS: dict[str, Callable[..., Launch | None]] = {}
"""What prepares the launch of an operator, by its name; called with the operator's arguments."""


def launched(prepare: Callable[..., Launch | None]) -> Callable[..., Tensor | None]:
    """Make of a function that prepares a launch one that launches; None stays None."""
    LAUNCHERS[prepare.__name__] = prepare

    @functools.wraps(prepare)
    def launch(*arguments: Any) -> Tensor | None:
        found = prepare(*arguments)
        return None if found is None else found.run()

    return launch


def pack(fields: list[Field]) -> bytes:
    """The `Arguments` struct; the caller keeps ``fields``, and with it what they point to, until the kernel returns."""
    return _layout(len(fields)).pack(*[_number(field) for field in fields])


def _number(field: Field) -> int:
    return field.data_ptr() if isinstance(field, Tensor) else field or 0


@functools.cache
def _layout(count: int) -> struct.Struct:
    """A C struct of 8-byte fields: pointers and int64 alike."""
    return struct.Struct(f"{count}q")


View = tuple[tuple[int, ...], tuple[int, ...], int]
"""Sizes, strides and offset in elements of an argument in the tensor that compiled code passes for it."""


class Replay(NamedTuple):
    """A launch without its tensors, as `replay.cpp` reads it: where addresses go, and how to allocate the output."""

    kernel: int
    threads: int
    constants: list[int]
    inputs: list[tuple[int, int, int]]
    """Of each address: position among the fields, argument, distance in bytes from the argument's own."""
    output_position: int
    allocation: tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


def CallSite(name: str, views: Mapping[int, View] | None = None) -> Callable[..., Tensor]:  # noqa: N802  (a type's name)
    """One call of ``qmamba::name`` in compiled code; its tensors have the same dtypes, sizes and strides every time.

    Args:
        views: arguments of the operator that are views of what the call is given in their place.
    """
    views = views or {}
    extension = load_extension("replay")
    if extension is None:  # no compiler
        operator = getattr(torch.ops.qmamba, name).default
        return lambda *arguments: operator(*_viewed(arguments, views))
    extension.set_data_ptr(torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr)  # type: ignore[attr-defined]
    return extension.CallSite(functools.partial(_first, name, views), torch.get_num_threads, _empty_strided_cpu)


def _viewed(given: tuple[Any, ...], views: Mapping[int, View]) -> list[Any]:
    """The operator's arguments."""
    return [_reinterpret_tensor(value, *views[i]) if i in views else value for i, value in enumerate(given)]


def _first(name: str, views: Mapping[int, View], *given: Any) -> tuple[Tensor, Replay | None]:
    """Output of a call, and what later ones repeat as long as the number of threads stays."""
    arguments = _viewed(given, views)
    launch = LAUNCHERS[name](*arguments)
    if launch is None:
        return getattr(torch.ops.qmamba, name).default(*arguments), None
    return launch.run(), _replay(launch, arguments, given)


def _replay(launch: Launch, arguments: Sequence[Any], given: Sequence[Any]) -> Replay | None:
    """None if the launch needs a converted copy of an argument, or its output needs conversion."""
    output = launch.output
    inputs, output_position = [], -1
    for position, field in enumerate(launch.fields):
        if field is output:
            output_position = position
        elif isinstance(field, Tensor):
            index = next((index for index, argument in enumerate(arguments) if argument is field), None)
            if index is None:
                return None
            inputs.append((position, index, field.data_ptr() - given[index].data_ptr()))
    if output.dtype is not launch.dtype:
        return None
    kernel = ctypes.cast(launch.kernel, ctypes.c_void_p).value  # type: ignore[arg-type]
    assert kernel is not None
    constants = [0 if isinstance(field, Tensor) else _number(field) for field in launch.fields]
    allocation = (tuple(output.shape), output.stride(), output.dtype)
    return Replay(kernel, torch.get_num_threads(), constants, inputs, output_position, allocation)


# --- Inductor ------------------------------------------------------------------------------------------------------


def inductor_options() -> dict[str, Any]:
    """Let the code that Inductor generates from now on call CPU kernels by a `CallSite`.

    Returns:
        options of Inductor for a graph that calls our operators: its code does not compare sizes and strides, as
        Dynamo's guards have when it runs (13.3 ms instead of 13.8 for a step of the 130M shape), and what it cached of
        such code does not outlive this version of the package.
    """
    _generate_call_sites()
    marked = torch._inductor.config.unsafe_marked_cacheable_functions
    version = _version(pathlib.Path(__file__).parents[1])
    return {"size_asserts": False, "unsafe_marked_cacheable_functions": {**marked, "qmamba_compile": version}}


@functools.cache
def _generate_call_sites() -> None:
    try:
        from torch._inductor.codegen.custom_extern_kernel_codegen import CUSTOM_EXTERN_KERNEL_CODEGEN, CustomCodegen
    except ImportError:  # torch 2.11
        return
    for name in LAUNCHERS:
        CUSTOM_EXTERN_KERNEL_CODEGEN[f"torch.ops.qmamba.{name}.default"] = CustomCodegen(
            functools.partial(_generate_call, name)
        )


@functools.cache
def _version(folder: pathlib.Path) -> str:
    """A digest of a package's modules: cached code holds the shapes and strides that its operators promised."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _generate_call(name: str, node: Any, writeline: Callable[[Any], None]) -> None:
    """Write Inductor's own line for an extern kernel, with a call site of its own where the operator stood.

    To make a view takes a microsecond: the line passes its base, and the call site knows the way from there.
    """
    from torch._inductor import config
    from torch._inductor.codegen.wrapper import ExternKernelAllocLine
    from torch._inductor.virtualized import V

    wrapper = V.graph.wrapper_code
    # Inductor measures its kernels under the profiler, which sees ours by their operators.
    if not config.cpp.enable_kernel_profile and all(map(_is_fixed_on_cpu, node.inputs)):
        arguments = node.codegen_args()
        views = {i: match for i, text in enumerate(arguments) if (match := _VIEW.fullmatch(text))}
        node = copy.copy(node)
        node.codegen_args = lambda: [views[i][1] if i in views else text for i, text in enumerate(arguments)]
        node.python_kernel_name = f"qmamba_{name}_{node.get_name()}"
        wrapper.add_import_once("from qmamba_compile.cpu_templates.call_site import CallSite")
        known = ", ".join(f"{i}: ({match[2]})" for i, match in views.items())
        wrapper.header.writeline(f"{node.python_kernel_name} = CallSite({name!r}, {{{known}}})")
    writeline(ExternKernelAllocLine(wrapper, node))


_VIEW = re.compile(r"reinterpret_tensor\((\w+), (\(.*\), \(.*\), \d+)\)")


def _is_fixed_on_cpu(buffer: Any) -> bool:
    layout = buffer.get_layout()
    fixed = all(getattr(extent, "is_number", True) for extent in itertools.chain(layout.size, layout.stride))
    return fixed and layout.device.type == "cpu"
