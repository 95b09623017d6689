"""A launch of a CPU kernel, and its replay from compiled code.

A launcher turns an operator's arguments into a `Launch`: checks, layouts, output. In a compiled graph all of that is
the same at every step, and only addresses change. Inductor's code therefore calls a `CallSite` where it would call the
operator: it launches what the first call found with the addresses of now, and goes neither through the dispatcher nor
through the launcher.
"""

from __future__ import annotations

import array
import functools
import itertools
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._dynamo.guards import _empty_strided_cpu  # type: ignore[attr-defined]

from .build import Kernel

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


class CallSite:
    """One call of ``qmamba::name`` in compiled code; its tensors have the same dtypes, sizes and strides every time."""

    def __init__(self, name: str) -> None:
        self._operator = getattr(torch.ops.qmamba, name).default
        self._prepare = LAUNCHERS[name]
        self._threads = 0
        self._replay: _Replay | None = None

    def __call__(self, *arguments: Any) -> Tensor:
        if self._threads != torch.get_num_threads():
            launch = self._prepare(*arguments)
            self._replay = None if launch is None else _replay(launch, arguments)
            self._threads = torch.get_num_threads()
        if self._replay is None:
            return self._operator(*arguments)
        kernel, constants, inputs, output_position, allocation = self._replay
        fields = constants[:]
        for position, index in inputs:
            fields[position] = arguments[index].data_ptr()
        output = _empty_strided_cpu(*allocation)
        fields[output_position] = output.data_ptr()
        kernel(fields.tobytes())
        return output


class _Replay(NamedTuple):
    """A launch without its tensors: where the addresses of arguments and output go, and how to allocate the output."""

    kernel: Kernel
    constants: array.array[int]  # not a list of integers, which are cold when a step comes back to them
    inputs: list[tuple[int, int]]
    output_position: int
    allocation: tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


def _replay(launch: Launch, arguments: tuple[Any, ...]) -> _Replay | None:
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
            inputs.append((position, index))
    if output.dtype is not launch.dtype:
        return None
    constants = array.array("q", [0 if isinstance(field, Tensor) else _number(field) for field in launch.fields])
    allocation = (tuple(output.shape), output.stride(), output.dtype)
    return _Replay(launch.kernel, constants, inputs, output_position, allocation)


# --- Inductor ------------------------------------------------------------------------------------------------------


@functools.cache
def call_from_inductor() -> None:
    """Let the code that Inductor generates from now on call CPU kernels by a `CallSite`."""
    try:
        from torch._inductor.codegen.custom_extern_kernel_codegen import CUSTOM_EXTERN_KERNEL_CODEGEN, CustomCodegen
    except ImportError:  # torch 2.11
        return
    for name in LAUNCHERS:
        CUSTOM_EXTERN_KERNEL_CODEGEN[f"torch.ops.qmamba.{name}.default"] = CustomCodegen(
            functools.partial(_generate_call, name)
        )


def _generate_call(name: str, node: Any, writeline: Callable[[Any], None]) -> None:
    """Write Inductor's own line for an extern kernel, with a call site of its own where the operator stood."""
    from torch._inductor import config
    from torch._inductor.codegen.wrapper import ExternKernelAllocLine
    from torch._inductor.virtualized import V

    wrapper = V.graph.wrapper_code
    # Inductor measures its kernels under the profiler, which sees ours by their operators.
    if not config.cpp.enable_kernel_profile and all(map(_is_fixed_on_cpu, node.inputs)):
        node.python_kernel_name = f"qmamba_{name}_{node.get_name()}"
        wrapper.add_import_once("from qmamba_compile.cpu_templates.call_site import CallSite")
        wrapper.header.writeline(f"{node.python_kernel_name} = CallSite({name!r})")
    writeline(ExternKernelAllocLine(wrapper, node))


def _is_fixed_on_cpu(buffer: Any) -> bool:
    layout = buffer.get_layout()
    fixed = all(getattr(extent, "is_number", True) for extent in itertools.chain(layout.size, layout.stride))
    return fixed and layout.device.type == "cpu"
