"""Inductor's code for a GPU, on a machine without one: what it generates depends on the device's properties alone."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx, config
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from qmamba_compile.fx_utils import hint

HOPPER = SimpleNamespace(major=9, minor=0, multi_processor_count=132, warp_size=32)

CUDA = torch.device("cuda:0")


class _Generated(BaseException):
    """Carries the code past everything that would run it."""


@contextlib.contextmanager
def _pretended() -> Iterator[None]:
    def generate(lowering: GraphLowering) -> None:
        raise _Generated(lowering.codegen()[0].value)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(CudaInterface, "get_device_properties", staticmethod(lambda *_: HOPPER)))
        for name, result in {
            "torch.cuda.get_device_properties": HOPPER,
            "torch.cuda.current_device": 0,
            "torch.cuda.is_available": True,
            "torch.cuda.get_rng_state": torch.zeros(1),
            "torch.cuda._exchange_device": 0,
            "torch.cuda._maybe_exchange_device": 0,
            "torch._inductor.scheduler.has_triton": True,
            "torch.utils._triton.triton_hash_with_backend": "",
        }.items():
            stack.enter_context(mock.patch(name, lambda *_, result=result: result))
        stack.enter_context(mock.patch.object(GraphLowering, "compile_to_module", generate))
        yield


def code_for_gpu(graph: fx.GraphModule, inputs: list[Any]) -> str:
    """The code for a graph that Inductor was given on the CPU."""
    mode = FakeTensorMode()
    for node in graph.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": CUDA}

    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return hint(value)
        extents = ([hint(size) for size in sizes] for sizes in (value.shape, value.stride()))
        return torch.empty_strided(*extents, dtype=value.dtype, device=CUDA)

    with _pretended():
        with mode:
            fakes = [moved(value) for value in inputs]
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*fakes)
        try:
            compile_fx.compile_fx_inner(graph, fakes)
        except _Generated as generated:
            return str(generated)
    raise AssertionError("Inductor generated no code")


@contextlib.contextmanager
def graphs_for_inductor() -> Iterator[list[tuple[fx.GraphModule, list[Any]]]]:
    """Each graph that reaches Inductor, after AOTAutograd, and its inputs."""
    seen: list[tuple[fx.GraphModule, list[Any]]] = []
    inner = compile_fx.compile_fx_inner

    def compile_inner(graph: fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
        seen.append((copy.deepcopy(graph), list(inputs)))
        return inner(graph, inputs, **options)

    outer = compile_fx.compile_fx

    def compile_outer(*arguments: Any, config_patches: Any = None, **options: Any) -> Any:
        with config.patch(config_patches or {}):
            return outer(*arguments, **({"inner_compile": compile_inner} | options))

    # What is found in a cache is not compiled.
    with mock.patch.object(compile_fx, "compile_fx", compile_outer), config.patch(force_disable_caches=True):
        yield seen
