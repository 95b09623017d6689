"""The generated C++ convolution step: the state exactly, y to float32 rounding, on every instruction set."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qmamba_compile import layer_ops
from qmamba_compile.cpu_templates import build
from qmamba_compile.cpu_templates import launch_layers as launch
from qmamba_compile.cpu_templates.render import render
from qmamba_compile.cpu_templates.specs import LayerSpec

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")

GOLDEN = pathlib.Path(__file__).parent / "golden"

BASE: dict[str, Any] = {"batch": 2, "channels": 37, "length": 4, "taps": 4, "dtype": torch.float32, "bias": True}


@pytest.fixture(params=build.available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("QMAMBA_CPU_ISA", request.param)
    launch.layer_kernel.cache_clear()
    yield request.param
    launch.layer_kernel.cache_clear()


def problem(**change: Any) -> tuple[Tensor, list[Tensor], Tensor, Tensor | None]:
    """State, the inputs of several steps, weight and bias."""
    row = BASE | change
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(row["dtype"])

    batch, channels = row["batch"], row["channels"]
    # As in the model: the middle of a projection's row, transposed.
    projections = [randn(batch, 1, 3 * channels) for _ in range(2 * row["length"] + 1)]
    inputs = [projection[..., channels : 2 * channels].transpose(1, 2) for projection in projections]
    weight = randn(channels, 1, row["taps"])
    return randn(batch, channels, row["length"]), inputs, weight, randn(channels) if row["bias"] else None


def check(silu: bool = True, **change: Any) -> None:
    state, inputs, weight, bias = problem(**change)
    expected_state = state.clone()
    for x in inputs:
        y = launch.conv_update(state, x, weight, bias, silu)
        expected = layer_ops.conv_update_reference(expected_state, x, weight, bias, silu)
        assert y is not None and y.dtype == expected.dtype and y.shape == expected.shape
        assert torch.equal(state, expected_state)
        # A few products in another order; a bfloat16 result is rounded twice, from sums that may differ in a last bit.
        tolerance = 2e-6 if y.dtype == torch.float32 else 2 * torch.finfo(torch.bfloat16).eps
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"batch": 1, "channels": 1792},
        {"channels": 1},
        {"channels": 3},
        {"channels": 64},
        {"bias": False},
        {"silu": False},
        {"length": 3},
        {"length": 1, "taps": 2},
        {"length": 6, "taps": 4},
        {"length": 4, "taps": 1},
        {"length": 4, "taps": 5},
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "batch": 1, "channels": 1792},
        {"dtype": torch.bfloat16, "length": 3, "silu": False, "bias": False},
    ],
    ids=lambda change: "-".join(f"{name}={value}" for name, value in change.items()) or "base",
)
def test_equals_reference(isa: str, change: dict[str, Any]) -> None:
    check(**change)


def test_inputs_that_lie_apart(isa: str) -> None:
    state, inputs, weight, bias = problem(channels=64)
    expected_state = state.clone()
    for x in inputs:
        apart = torch.stack([x, x + 1], dim=2)[:, :, 0]
        assert apart.stride(1) == 2
        y = launch.conv_update(state, apart, weight, bias, True)
        expected = layer_ops.conv_update_reference(expected_state, x, weight, bias, True)
        torch.testing.assert_close(y, expected, rtol=2e-6, atol=2e-6)
        assert torch.equal(state, expected_state)


def test_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "threads", lambda elements: 2)
    for dtype in (torch.float32, torch.bfloat16):
        check(batch=5, channels=80, dtype=dtype)


def test_steps_are_the_convolution_of_the_sequence(isa: str) -> None:
    """What the reference is there for: one step after the other gives the columns of a causal convolution."""
    state, inputs, weight, bias = problem()
    sequence = torch.cat([state, *inputs], dim=-1)
    expected = F.silu(F.conv1d(sequence, weight, bias, groups=len(weight)))[..., -len(inputs) :]
    y = torch.cat([torch.ops.qmamba.conv_update(state, x, weight, bias, True) for x in inputs], dim=-1)
    torch.testing.assert_close(y, expected, rtol=2e-6, atol=2e-6)
    assert torch.equal(state, sequence[..., -4:])


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda s, x, w: (s.half(), x.half(), w.half()), id="float16"),
        pytest.param(lambda s, x, w: (s.bfloat16(), x, w), id="a state of another dtype"),
        pytest.param(lambda s, x, w: (s.transpose(0, 1).contiguous().transpose(0, 1), x, w), id="a strided state"),
    ],
)
def test_what_the_kernel_does_not_read_is_left_to_the_reference(change: Any) -> None:
    state, (x, *_), weight, _ = problem()
    state, x, weight = change(state, x, weight)
    expected_state = state.clone()
    assert launch.conv_update(state, x, weight, None, True) is None
    assert torch.equal(state, expected_state)
    y = torch.ops.qmamba.conv_update(state, x, weight, None, True)
    assert torch.equal(y, layer_ops.conv_update_reference(expected_state, x, weight, None, True))
    assert torch.equal(state, expected_state)


@pytest.mark.parametrize("bias", [True, False])
def test_op_is_declared_truthfully(bias: bool) -> None:
    state, (x, *_), weight, values = problem(bias=bias)
    torch.library.opcheck(torch.ops.qmamba.conv_update.default, (state, x.contiguous(), weight, values, True))


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_rendered_text_is_readable(isa: str) -> None:
    text = render(LayerSpec("conv_update", isa))
    assert max(len(line) for line in text.splitlines()) <= 120
    assert all(line == line.rstrip() for line in text.splitlines())
    assert "\n\n\n" not in text and "{%" not in text and "{{" not in text.replace("{{}", "")


def test_golden_text() -> None:
    """After a wanted change: ``QMAMBA_UPDATE_GOLDEN=1 pytest`` on this file, and read the diff."""
    spec = LayerSpec("conv_update", "avx2")
    golden = GOLDEN / f"{spec.slug()}.cpp"
    if os.environ.get("QMAMBA_UPDATE_GOLDEN"):
        golden.write_text(render(spec))
    text = render(spec)
    assert text == golden.read_text()
    assert max(len(line) for line in text.splitlines()) <= 120 and "\n\n\n" not in text
