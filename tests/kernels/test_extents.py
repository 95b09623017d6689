"""Launchers of C++ and Triton kernels leave arguments that do not fit together to the plain reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qmamba_compile import layer_ops, quant, recurrence
from qmamba_compile.cpu_templates import build
from qmamba_compile.cpu_templates import launch as cpu_steps
from qmamba_compile.cpu_templates import launch_layers as cpu_layers
from qmamba_compile.cpu_templates import launch_scan as cpu_scans
from qmamba_compile.triton_templates import launch as gpu_steps
from qmamba_compile.triton_templates import launch_layers as gpu_layers
from qmamba_compile.triton_templates import launch_scan as gpu_scans
from qmamba_compile.triton_templates import launch_state as gpu_states

needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")

BATCH, NHEADS, HEADDIM, DSTATE, NGROUPS, SEQLEN, K, OUT = 2, 4, 8, 64, 2, 3, 32, 16

FREE = {
    "causal_conv": {(0, 0), (0, 2), (1, 2)},  # batch and tokens of xBC, taps
    "conv_update": {(0, 2), (2, 2)},  # inputs that the state holds, taps
}
"""Dimensions (argument, dimension) that an operator takes in any size."""

CPU = {
    "w8a8_linear": cpu_layers.w8a8_linear,
    "norm_w8a8_linear": cpu_layers.norm_w8a8_linear,
    "causal_conv": cpu_layers.causal_conv,
    "conv_update": cpu_layers.conv_update,
    "ssm_update": cpu_steps.ssm_update,
    "ssm_update_calibrated": cpu_steps.ssm_update,
    "ssm_update_ring": cpu_steps.ssm_update,
    "ssm_update_float": cpu_steps.ssm_update_float,
    "quantize_state": cpu_steps.quantize_state_,
    "quantize_state_calibrated": cpu_steps.quantize_state_,
    "dequantize_state": cpu_steps.dequantize_state,
    "dequantize_state_calibrated": cpu_steps.dequantize_state,
    "chunk_scan": cpu_scans.chunk_scan,
    "ssm_scan": cpu_scans.ssm_scan,
}


def with_ring(*arguments: Any) -> Tensor | None:
    return gpu_steps.ssm_update(*arguments[:15], recurrence.Ring(*arguments[15:]))


def in_a_pool(*arguments: Any) -> Tensor | None:
    return gpu_steps.ssm_update(*arguments[:-2], slots=arguments[-2], z=arguments[-1])


GPU = {
    "w8a8_linear": gpu_layers.w8a8_linear,
    "norm_w8a8_linear": gpu_layers.norm_w8a8_linear,
    "causal_conv": gpu_layers.causal_conv,
    "conv_update": gpu_layers.conv_update,
    "ssm_update": gpu_steps.ssm_update,
    "ssm_update_calibrated": gpu_steps.ssm_update,
    "ssm_update_ring": with_ring,
    "ssm_update_float": gpu_steps.ssm_update_float,
    "ssm_update_pool": in_a_pool,
    "quantize_state": gpu_states.quantize_state_,
    "quantize_state_calibrated": gpu_states.quantize_state_,
    "dequantize_state": gpu_states.dequantize_state,
    "dequantize_state_calibrated": gpu_states.dequantize_state,
    "chunk_scan_steps": gpu_scans.chunk_scan,
    "ssm_scan": gpu_scans.ssm_scan,
}


def arguments_of(name: str) -> list[Any]:
    """Arguments that fit together."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    qdata, scale = quant.quantize_rows(randn(OUT, K))
    linear = [qdata, scale, randn(OUT), randn(K).abs() + 0.1, torch.tensor([0.03])]
    if name == "w8a8_linear":
        return [randn(3, K), *linear, randn(3, OUT)]
    if name == "norm_w8a8_linear":
        return [randn(3, K), randn(3, K), randn(K), 1e-5, 8, *linear, randn(3, OUT)]
    if name == "causal_conv":
        return [randn(BATCH, 24, SEQLEN), randn(24, 1, 4), randn(24), True]
    if name == "conv_update":
        return [randn(BATCH, 24, 4), randn(BATCH, 24, 1), randn(24, 1, 4), randn(24), True]

    h = randn(BATCH, NHEADS, HEADDIM, DSTATE)
    rng = quant.new_rng(BATCH, 1)
    calibrated = quant.store_scale(torch.ones(NHEADS, DSTATE)) if name.endswith("calibrated") else None
    packed, channel_scale, state_scale = quant.quantize_state(h, 4, state_scale=calibrated)
    if name.startswith("dequantize_state"):
        return [packed, channel_scale, state_scale, 4]
    state = [packed, channel_scale, None if calibrated is not None else state_scale, rng]
    if name.startswith("quantize_state"):
        return [*state, h, calibrated, 4, False]

    def inputs(*lead: int) -> list[Tensor]:
        """x, dt, A or dA, B, C and D."""
        decay = (*lead, NHEADS) if name in ("chunk_scan", "ssm_scan") else (NHEADS,)
        grouped = (*lead, NGROUPS, DSTATE)
        return [
            randn(*lead, NHEADS, HEADDIM),
            randn(*lead, NHEADS).abs(),
            -randn(*decay).abs(),
            randn(*grouped),
            randn(*grouped),
            randn(NHEADS),
        ]

    if name == "ssm_update_float":
        return [h, *inputs(BATCH), randn(NHEADS), True]
    if name.startswith("ssm_update"):
        batch = 1 if name == "ssm_update_pool" else BATCH
        step = [*state, *inputs(batch), randn(NHEADS), calibrated, True, 4, False]
        if name == "ssm_update_ring":
            step += recurrence.new_ring(BATCH, NHEADS, HEADDIM, NGROUPS, DSTATE, 4, dtype=torch.int8)
        if name == "ssm_update_pool":
            step += [torch.tensor([1]), randn(1, NHEADS, HEADDIM)]
        return step
    if name == "ssm_scan":
        scales = {"state_scale": torch.ones(NHEADS, DSTATE), "channel_scale": torch.ones(NHEADS, HEADDIM)}
        return [*inputs(BATCH, SEQLEN), (h, None), recurrence.StoreRule(4, **scales)]
    if name == "chunk_scan_steps":
        return [*inputs(BATCH, SEQLEN), randn(NHEADS), h, True, 0.0, torch.inf]
    return [*inputs(BATCH, SEQLEN), h]


def refuses(launcher: Callable[..., Any], name: str) -> None:
    """Each tensor is one smaller along each of its dimensions in turn, and nothing is written."""
    assert launcher(*arguments_of(name)), name
    cut_short = 0
    for position, argument in enumerate(arguments_of(name)):
        if not isinstance(argument, Tensor):
            continue
        for dim in range(argument.dim()):
            if (position, dim) in FREE.get(name, ()):
                continue
            # Words of 32 bits remain, so that nothing but the extent is amiss.
            cut = 4 if argument.shape[dim] > 4 else 1
            changed = arguments_of(name)
            changed[position] = argument.narrow(dim, 0, argument.shape[dim] - cut).contiguous()
            before = [value.clone() if isinstance(value, Tensor) else value for value in changed]
            assert not launcher(*changed), f"{name}: argument {position}, dimension {dim}"
            assert all(
                torch.equal(value, wanted)
                for value, wanted in zip(changed, before, strict=True)
                if isinstance(value, Tensor)
            )
            cut_short += 1
    assert cut_short >= 4


def served_by(launcher: Callable[..., Any]) -> Callable[..., bool]:
    """Whether a launcher served its arguments."""

    def served(*arguments: Any) -> bool:
        result = launcher(*arguments)
        return result is not None and result is not False

    return served


@needs_compiler
@pytest.mark.parametrize("name", CPU)
def test_cpu_launchers_refuse(name: str) -> None:
    refuses(served_by(CPU[name]), name)


def check_gpu(name: str) -> None:
    refuses(served_by(GPU[name]), name)


@pytest.mark.parametrize("name", GPU)
def test_gpu_launchers_refuse(interpreted: Callable[..., Any], name: str) -> None:
    interpreted(check_gpu, name)


def check_others(kernels: Any, steps: Any) -> None:
    x, gate, weight, epsilon, _, *linear = arguments_of("norm_w8a8_linear")
    for group_size in (0, 5, 2 * K):
        assert kernels.norm_w8a8_linear(x, gate, weight, epsilon, group_size, *linear) is None
    step = arguments_of("ssm_update")
    for groups in (3, 8):  # of 4 heads
        step[7] = step[8] = torch.ones(BATCH, groups, DSTATE)
        assert steps.ssm_update(*step) is None


@needs_compiler
def test_groups_that_do_not_divide_what_is_grouped() -> None:
    check_others(cpu_layers, cpu_steps)


def check_gpu_groups() -> None:
    check_others(gpu_layers, gpu_steps)


def test_groups_that_do_not_divide_what_is_grouped_on_a_gpu(interpreted: Callable[..., Any]) -> None:
    interpreted(check_gpu_groups)


@needs_compiler
def test_the_scales_of_a_scan_belong_to_its_heads() -> None:
    *inputs, rule = arguments_of("ssm_scan")
    wrong = recurrence.StoreRule(4, state_scale=rule.state_scale[:1], channel_scale=rule.channel_scale)
    assert cpu_scans.ssm_scan(*inputs, wrong) is None
    inputs[-1] = (inputs[-1][0][:1], None)
    assert cpu_scans.ssm_scan(*inputs, rule) is None


@needs_compiler
@pytest.mark.parametrize("part, dtype", [("x", torch.float16), ("B", torch.bfloat16), ("position", torch.int64)])
def test_a_ring_that_the_kernel_cannot_read(part: str, dtype: torch.dtype) -> None:
    step = arguments_of("ssm_update")
    ring = recurrence.new_ring(BATCH, NHEADS, HEADDIM, NGROUPS, DSTATE, 4, dtype=torch.float32)
    assert cpu_steps.ssm_update(*step, *ring) is not None
    ring = ring._replace(**{part: getattr(ring, part).to(dtype)})
    assert cpu_steps.ssm_update(*step, *ring) is None


OTHER_DTYPES = [
    ("w8a8_linear", 1, torch.int16),
    ("ssm_update", 0, torch.int64),
    ("ssm_update", 3, torch.int32),
    ("quantize_state", 0, torch.int64),
    ("quantize_state", 3, torch.int32),
    ("dequantize_state", 0, torch.int64),
]
"""Operator, argument that a kernel reads or writes as it is, and what would make it reach too far."""


@needs_compiler
@pytest.mark.parametrize("name, position, dtype", OTHER_DTYPES)
def test_cpu_launchers_refuse_another_dtype(name: str, position: int, dtype: torch.dtype) -> None:
    refuses_dtype(CPU[name], name, position, dtype)


@pytest.mark.parametrize("name, position, dtype", OTHER_DTYPES)
def test_gpu_launchers_refuse_another_dtype(
    interpreted: Callable[..., Any], name: str, position: int, dtype: torch.dtype
) -> None:
    interpreted(refuses_dtype, GPU[name], name, position, dtype)


def refuses_dtype(launcher: Callable[..., Any], name: str, position: int, dtype: torch.dtype) -> None:
    arguments = arguments_of(name)
    arguments[position] = arguments[position].to(dtype)
    assert not served_by(launcher)(*arguments)


# --- what the operators then do ------------------------------------------------------------------------------------


def test_operators_say_what_is_wrong() -> None:
    x, qdata, scale = torch.randn(2, 10), torch.ones(4, 5, dtype=torch.int8), torch.ones(4, 1)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        torch.ops.qmamba.w8a8_linear(x, qdata, scale, None, None, None)
    with pytest.raises(RuntimeError, match="size"):
        torch.ops.qmamba.conv_update(torch.randn(4, 6, 4), torch.randn(1, 6, 1), torch.randn(6, 1, 4), None, True)


def test_what_is_refused_has_not_moved_the_state() -> None:
    conv = arguments_of("conv_update")
    conv[3] = torch.ones(5)
    step = arguments_of("ssm_update_ring")
    step[9] = torch.ones(NHEADS, HEADDIM)  # D
    for operator, arguments in ((torch.ops.qmamba.conv_update, conv), (torch.ops.qmamba.ssm_update, step)):
        before = [value.clone() if isinstance(value, Tensor) else value for value in arguments]
        with pytest.raises(RuntimeError):
            operator(*arguments)
        pairs = zip(arguments, before, strict=True)
        assert all(torch.equal(value, wanted) for value, wanted in pairs if isinstance(value, Tensor))


@pytest.mark.parametrize("changed", ["grad_y", "grad_state"])
def test_gradients_of_another_shape(changed: str) -> None:
    x, dt, A, B, C, D = arguments_of("ssm_scan")[:6]
    grads = {"grad_y": torch.ones_like(x), "grad_state": torch.ones(BATCH, NHEADS, HEADDIM, DSTATE)}
    grads[changed] = grads[changed][:1]
    scan = (x, dt, A[0, 0], B, C, D, None, None, None, True, 0.0, torch.inf, None, False, 0, 1, False, None)
    with pytest.raises(ValueError, match=rf"{changed} has shape \[1, "):
        torch.ops.qmamba.ssm_scan_quantized_backward(*grads.values(), *scan)


def test_a_bias_of_one_number_is_broadcast() -> None:
    x, qdata, scale, _, *rest = arguments_of("w8a8_linear")[:6]
    bias = torch.tensor([3.0])
    y = torch.ops.qmamba.w8a8_linear(x, qdata, scale, bias, *rest)
    assert torch.equal(y, layer_ops.w8a8_linear_reference(x, qdata, scale, bias, *rest))
    assert torch.equal(y, layer_ops.w8a8_linear_reference(x, qdata, scale, bias.expand(OUT), *rest))
