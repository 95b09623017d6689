"""The generated Triton convolution step: the state exactly, y to float32 rounding, in Triton's interpreter."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_cpu_conv_update import BASE, problem
from torch import Tensor

from qmamba_compile import layer_ops
from qmamba_compile.errors import ConfigError
from qmamba_compile.triton_templates import compiled, launch_layers, tuning
from qmamba_compile.triton_templates.layer_specs import ConvSpec
from qmamba_compile.triton_templates.render import load, render

GOLDEN = pathlib.Path(__file__).parent / "golden"
Interpreted = Callable[..., Any]


def poisoned(function: Callable[..., Tensor | None], *arguments: Any) -> Tensor:
    """A launcher's result, whose freshly allocated memory was full of NaN (of -1, where it holds integers)."""
    empty = torch.empty
    torch.empty = lambda *a, **k: (t := empty(*a, **k)).fill_(torch.nan if t.is_floating_point() else -1)
    try:
        result = function(*arguments)
    finally:
        torch.empty = empty
    assert result is not None
    return result


def check(silu: bool = True, dtypes: tuple[torch.dtype, ...] | None = None, **change: Any) -> None:
    state, inputs, weight, bias = problem(**change)
    if dtypes is not None:
        # Of state, x, and weight.
        state, weight = state.to(dtypes[0]), weight.to(dtypes[2])
        inputs, bias = [x.to(dtypes[1]) for x in inputs], None if bias is None else bias.to(dtypes[2])
    expected_state = state.clone()
    for x in inputs:
        before = x.clone()
        y = poisoned(launch_layers.conv_update, state, x, weight, bias, silu)
        expected = layer_ops.conv_update_reference(expected_state, x, weight, bias, silu)
        assert y.dtype == expected.dtype and y.shape == expected.shape and torch.equal(x, before)
        assert torch.equal(state, expected_state)
        # A few products in another order; a bfloat16 result is rounded twice, from sums that may differ in a last bit.
        tolerance = 2e-6 if y.dtype == torch.float32 else 2 * torch.finfo(y.dtype).eps
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"batch": 1, "channels": 1792},
        {"channels": 1},
        {"bias": False},
        {"silu": False},
        {"length": 3},
        {"length": 1, "taps": 2},
        {"length": 6, "taps": 4},
        {"length": 4, "taps": 1},
        {"length": 4, "taps": 5},
        {"length": 8, "taps": 3},
        {"dtype": BF16},
        {"dtype": BF16, "length": 3, "silu": False, "bias": False},
        {"dtype": F16},
        {"dtypes": (F32, BF16, BF16)},
        {"dtypes": (BF16, F32, F32)},
        {"dtypes": (F16, BF16, F32), "length": 3},
    ],
    ids=lambda change: "-".join(f"{name}={value}" for name, value in change.items()) or "base",
)
def test_equals_reference(interpreted: Interpreted, change: dict[str, Any]) -> None:
    interpreted(check, **change)


def check_non_finite() -> None:
    state, (x, *_), weight, bias = problem()
    state[0, 1, 2], x[1, 3] = torch.nan, -torch.inf
    expected_state = state.clone()
    y = poisoned(launch_layers.conv_update, state, x, weight, bias, True)
    expected = layer_ops.conv_update_reference(expected_state, x, weight, bias, True)
    torch.testing.assert_close(y, expected, rtol=2e-6, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(state, expected_state, rtol=0, atol=0, equal_nan=True)


def test_nan_and_infinity_stay(interpreted: Interpreted) -> None:
    interpreted(check_non_finite)


def check_refusals() -> None:
    state, (x, *_), weight, bias = problem()
    for refused in (
        (state.transpose(0, 1).contiguous().transpose(0, 1), x, weight),
        (state.double(), x, weight),
        (torch.randn(*state.shape[:2], 17), x, weight),
        (state, x, weight[1:]),
        (state, x, weight.expand(-1, 2, -1)),
    ):
        before = refused[0].clone()
        assert launch_layers.conv_update(*refused, bias, True) is None
        assert torch.equal(refused[0], before)


def test_what_the_kernel_does_not_take_is_left_to_the_reference(interpreted: Interpreted) -> None:
    interpreted(check_refusals)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"length": 17}, "length=17"),
        ({"taps": 6}, "taps=6"),
        ({"block": 48}, "block=48"),
        ({"target": "sm_70"}, "sm_70"),
    ],
)
def test_spec_refuses(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ConvSpec(**{"length": 4, "taps": 4} | change)


def test_golden_text() -> None:
    """After a wanted change: ``QMAMBA_UPDATE_GOLDEN=1 pytest`` on this file, and read the diff."""
    spec = ConvSpec(4, 4)
    golden = GOLDEN / f"{spec.slug()}.py.txt"
    if os.environ.get("QMAMBA_UPDATE_GOLDEN"):
        golden.write_text(render(spec))
    assert render(spec) == golden.read_text()
    for text in (render(spec), render(ConvSpec(3, 4, target="interpreter"))):
        compile(text, "rendered", "exec")
        assert max(len(line) for line in text.splitlines()) <= 120 and "\n\n\n\n" not in text
        assert all(line == line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize("dtype, width", [("bf16", 8), ("fp32", 16)])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_a_thread_reads_and_writes_whole_channels(target: str, dtype: str, width: int) -> None:
    """At 2.7B and batch 64: one access for the four inputs of a channel; so no thread reads what another writes."""
    spec = tuning.conv_update(target, 64 * 5376, BASE["length"], BASE["taps"])
    types = dict.fromkeys(("conv_state", "xBC", "weight", "bias", "y"), f"*{dtype}")
    types |= dict.fromkeys(("channels", "xBC_stride_b"), "i32")
    kernel = compiled.compile_kernel(
        load(spec), "conv_update", types, {"xBC_stride_d": 1, "SILU": True}, target, spec.warps
    )
    found = compiled.facts(kernel)
    assert found.spills == 0 and found.local_accesses == 0
    assert found.accesses[("store", width)] == 1 and found.accesses[("load", width)] == 2, found.accesses
    assert found.instructions <= 150, found.instructions
