"""The generated C++ convolution of a sequence: torch's own to float32 rounding, on every instruction set."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from qmamba_compile import layer_ops
from qmamba_compile.cpu_templates import build
from qmamba_compile.cpu_templates import launch_layers as launch
from qmamba_compile.cpu_templates.render import render
from qmamba_compile.cpu_templates.specs import LayerSpec

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")

GOLDEN = pathlib.Path(__file__).parent / "golden"

BASE: dict[str, Any] = {
    "batch": 2, "seqlen": 19, "channels": 37, "taps": 4, "dtype": torch.float32, "bias": True
}  # fmt: skip


@pytest.fixture(params=build.available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("QMAMBA_CPU_ISA", request.param)
    launch.layer_kernel.cache_clear()
    yield request.param
    launch.layer_kernel.cache_clear()


def problem(**change: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inputs [b, d, l], weight and bias."""
    row = BASE | change
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(row["dtype"])

    # As in the model: the middle of a projection's rows, transposed.
    channels = row["channels"]
    projection = randn(row["batch"], row["seqlen"], 3 * channels)
    x = projection[..., channels : 2 * channels].transpose(1, 2)
    return x, randn(channels, 1, row["taps"]), randn(channels) if row["bias"] else None


def check(silu: bool = True, **change: Any) -> None:
    x, weight, bias = problem(**change)
    before = x.clone()
    y, expected = launch.causal_conv(x, weight, bias, silu), layer_ops.causal_conv_reference(x, weight, bias, silu)
    assert y is not None and torch.equal(x, before)
    assert (y.dtype, y.shape, y.stride()) == (expected.dtype, expected.shape, expected.stride())
    # A few products in another order; a bfloat16 result is rounded twice, from sums that may differ in a last bit.
    tolerance = 2e-6 if y.dtype == torch.float32 else 2 * torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"batch": 1, "seqlen": 70, "channels": 1792},
        {"batch": 5, "seqlen": 1},
        {"seqlen": 3},
        {"seqlen": 4},
        {"channels": 1},
        {"channels": 64},
        {"bias": False},
        {"silu": False},
        {"taps": 1},
        {"taps": 2},
        {"taps": 3},
        {"taps": 5},
        {"taps": 8},
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "batch": 1, "channels": 1792},
        {"dtype": torch.bfloat16, "taps": 3, "silu": False, "bias": False},
    ],
    ids=lambda change: "-".join(f"{name}={value}" for name, value in change.items()) or "base",
)
def test_equals_torch(isa: str, change: dict[str, Any]) -> None:
    check(**change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_result_is_written_and_nothing_else(isa: str, dtype: torch.dtype, monkeypatch: Any) -> None:
    """The output in the middle of memory that must stay as it is."""
    whole = torch.full((2, 11, 3 * 37), torch.nan, dtype=dtype)
    x, weight, bias = problem(seqlen=11, dtype=dtype)
    space = whole.flatten()[400 : 400 + x.numel()]
    monkeypatch.setattr(launch, "empty", lambda shape, dtype: space.view(shape))
    y = launch.causal_conv(x, weight, bias, True)
    assert y is not None and y.data_ptr() == space.data_ptr()
    assert y.isfinite().all() and whole.isnan().sum() == whole.numel() - y.numel()


def test_inputs_with_tokens_next_to_each_other(isa: str) -> None:
    x, weight, bias = problem()
    expected = launch.causal_conv(x, weight, bias, True)
    assert expected is not None and torch.equal(launch.causal_conv(x.contiguous(), weight, bias, True), expected)


def test_the_past_of_a_token_is_all_it_depends_on(isa: str) -> None:
    """A sequence cut anywhere has the results of the whole one, so blocks do not show; NaN runs forward only."""
    x, weight, bias = problem()
    whole = launch.causal_conv(x, weight, bias, True)
    for seqlen in range(1, x.shape[-1]):
        assert torch.equal(launch.causal_conv(x[..., :seqlen], weight, bias, True), whole[..., :seqlen])
    x[0, 5, 9] = torch.nan
    changed = launch.causal_conv(x, weight, bias, True)
    assert changed[0, 5, 9:13].isnan().all() and changed.isnan().sum() == 4
    kept = ~changed.isnan()
    assert torch.equal(changed[kept], whole[kept])


def test_silu_of_huge_values(isa: str) -> None:
    """Where e^-x leaves float32: zero, and NaN for -inf, so that an overflow stays to be seen."""
    x = torch.tensor([-88.5, -89.0, -1e5, -1e35, -3e38, -torch.inf, torch.nan, 88.5, 1e5, 3e38, torch.inf])
    for dtype in (torch.float32, torch.bfloat16):
        arguments = x.to(dtype).view(1, -1, 1), torch.ones(len(x), 1, 1, dtype=dtype), None, True
        y, expected = launch.causal_conv(*arguments), layer_ops.causal_conv_reference(*arguments)
        torch.testing.assert_close(y, expected, rtol=0.0, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("weight, bias", [((10, 1, 4), None), ((37, 2, 4), None), ((37, 1, 4), 3)])
def test_weights_of_other_channels_are_refused(weight: tuple[int, ...], bias: int | None) -> None:
    """By torch's own message, not by reading what lies behind them."""
    x, _, _ = problem()
    values = None if bias is None else torch.randn(bias)
    with pytest.raises(RuntimeError, match=r"channels|bias"):
        torch.ops.qmamba.causal_conv(x, torch.randn(weight), values, True)


def test_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "threads", lambda elements: 2)
    for dtype in (torch.float32, torch.bfloat16):
        check(batch=3, channels=80, dtype=dtype)


def test_steps_go_on_where_the_sequence_ended() -> None:
    """`conv_update` on the last inputs gives what the longer sequence would have had."""
    x, weight, bias = problem(seqlen=12)
    expected = launch.causal_conv(x, weight, bias, True)
    state = x[..., 4:8].contiguous()
    steps = [launch.conv_update(state, x[..., t : t + 1], weight, bias, True) for t in range(8, 12)]
    torch.testing.assert_close(torch.cat(steps, dim=-1), expected[..., 8:], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x, w: (x.half(), w.half()), id="float16"),
        pytest.param(lambda x, w: (x.double(), w.double()), id="float64"),
        pytest.param(lambda x, w: (x, torch.cat([w, w, w], dim=-1)), id="twelve taps"),
    ],
)
def test_what_the_kernel_does_not_read_is_left_to_the_reference(change: Any) -> None:
    x, weight, _ = problem()
    x, weight = change(x, weight)
    assert launch.causal_conv(x, weight, None, True) is None
    y = torch.ops.qmamba.causal_conv(x, weight, None, True)
    assert torch.equal(y, layer_ops.causal_conv_reference(x, weight, None, True))


@pytest.mark.parametrize("bias", [True, False])
def test_op_is_declared_truthfully(bias: bool) -> None:
    x, weight, values = problem(bias=bias)
    torch.library.opcheck(torch.ops.qmamba.causal_conv.default, (x, weight, values, True))


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_rendered_text_is_readable(isa: str) -> None:
    text = render(LayerSpec("causal_conv", isa))
    assert max(len(line) for line in text.splitlines()) <= 120
    assert all(line == line.rstrip() for line in text.splitlines())
    assert "\n\n\n" not in text and "{%" not in text and "{{" not in text


def test_golden_text() -> None:
    """After a wanted change: ``QMAMBA_UPDATE_GOLDEN=1 pytest`` on this file, and read the diff."""
    spec = LayerSpec("causal_conv", "avx2")
    golden = GOLDEN / f"{spec.slug()}.cpp"
    if os.environ.get("QMAMBA_UPDATE_GOLDEN"):
        golden.write_text(render(spec))
    assert render(spec) == golden.read_text()
