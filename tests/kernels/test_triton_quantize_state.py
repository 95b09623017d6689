"""The generated Triton kernels that pack and unpack a state: the bits of quant.py, in Triton's interpreter."""

from __future__ import annotations

import itertools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_cpu_quantize_state import DSTATE, HEADDIM, NHEADS, RNG, adversarial_state, calibrated_scale
from torch import Tensor

from qmamba_compile import ops, quant, recurrence
from qmamba_compile.errors import ConfigError
from qmamba_compile.triton_templates import compiled, launch_state, tuning
from qmamba_compile.triton_templates.render import render
from qmamba_compile.triton_templates.specs import lanes_of
from qmamba_compile.triton_templates.state_specs import DequantizeSpec, QuantizeSpec

GOLDEN = pathlib.Path(__file__).parent / "golden"
Interpreted = Callable[..., Any]


def check(h: Tensor, bits: int, dynamic: bool, stochastic: bool, state_scale: Tensor | None) -> None:
    batch = h.shape[0]
    rng = RNG[:batch].clone()
    packed, channel_scale, found = quant.quantize_state(
        h, bits, state_scale=state_scale, rng=rng if stochastic else None
    )
    packed = packed.contiguous()
    results = ((packed, 77), (channel_scale, 5), (found, 5))
    poisoned = [torch.full_like(t, value, memory_format=torch.contiguous_format) for t, value in results]
    out = poisoned[2] if dynamic else None
    before = h.clone()
    assert launch_state.quantize_state_(*poisoned[:2], out, rng, h, state_scale, bits, stochastic)
    # NaN scales may be any NaN.
    assert torch.equal(poisoned[1].nan_to_num(7.0), channel_scale.nan_to_num(7.0)), "channel_scale"
    assert out is None or torch.equal(out.nan_to_num(7.0), found.nan_to_num(7.0)), "state_scale"
    assert torch.equal(poisoned[0], packed), "codes"
    assert torch.equal(rng[:, 1], RNG[:batch, 1] + 1) and torch.equal(rng[:, 0], RNG[:batch, 0])
    torch.testing.assert_close(h, before, rtol=0, atol=0, equal_nan=True)
    empty = torch.empty
    torch.empty = lambda *a, **k: empty(*a, **k).fill_(torch.nan)
    try:
        state = launch_state.dequantize_state(packed, channel_scale, found, bits)
    finally:
        torch.empty = empty
    assert state is not None
    expected = quant.dequantize_state(packed, channel_scale, found, bits)
    torch.testing.assert_close(state, expected, rtol=0, atol=0, equal_nan=True)


def check_adversarial(bits: int, dynamic: bool, stochastic: bool, dstate: int) -> None:
    h = adversarial_state()[..., :dstate]
    check(h, bits, dynamic, stochastic, None if dynamic else calibrated_scale(NHEADS, dstate))


@pytest.mark.parametrize(
    "bits, dynamic, stochastic", list(itertools.product(quant.STATE_BITS, (True, False), (True, False)))
)
def test_bits_of_the_reference(interpreted: Interpreted, bits: int, dynamic: bool, stochastic: bool) -> None:
    """States with every trouble: zeros, huge and tiny rows and columns, NaN, infinity, ties; words that are padded."""
    interpreted(check_adversarial, bits, dynamic, stochastic, 32 if bits == 2 else 40)


def check_shape(change: dict[str, Any]) -> None:
    row: dict[str, Any] = {"bits": 4, "dynamic": False, "shape": (2, 3, 8, 64), "dtype": torch.float32} | change
    _, nheads, _, dstate = row["shape"]
    h = torch.randn(row["shape"], generator=torch.Generator().manual_seed(0)).to(row["dtype"])
    if row.get("strided"):
        h = torch.cat([h, h], dim=-1).transpose(1, 2)[..., :dstate].contiguous().transpose(1, 2)
    if row.get("last"):
        h = h.transpose(-1, -2).contiguous().transpose(-1, -2)
    scale = None if row["dynamic"] else calibrated_scale(nheads, dstate).abs().nan_to_num(0.5).clamp(0.1)
    scale = scale if scale is None else scale.to(row.get("scale_dtype", quant.SCALE_DTYPE))
    check(h, row["bits"], row["dynamic"], row.get("stochastic", False), scale)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"shape": (1, 2, 64, 128)},
        {"shape": (1, 2, 64, 128), "dynamic": True},
        {"shape": (1, 1, 3, 24), "dynamic": True},
        {"shape": (1, 2, 40, 8)},
        {"shape": (1, 1, 64, 256), "bits": 2},
        {"shape": (2, 2, 5, 20), "bits": 8, "stochastic": True},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16, "dynamic": True},
        {"dtype": torch.float64},
        {"strided": True},
        {"last": True},
        {"scale_dtype": torch.float32},
    ],
    ids=lambda change: "-".join(f"{name}={value}" for name, value in change.items()) or "base",
)
def test_shapes_and_dtypes(interpreted: Interpreted, change: dict[str, Any]) -> None:
    interpreted(check_shape, change)


def check_refusals() -> None:
    h = torch.randn(1, 2, 4, 20)
    packed, channel_scale, found = quant.quantize_state(h, 4)
    rng, before = RNG[:1].clone(), packed.clone()
    assert not launch_state.quantize_state_(packed, channel_scale, found, rng, h + 1, None, 4, False)
    assert torch.equal(packed, before) and torch.equal(rng, RNG[:1])
    assert launch_state.dequantize_state(packed, channel_scale, found, 4) is None


def test_what_the_kernels_do_not_take_is_left_to_the_reference(interpreted: Interpreted) -> None:
    interpreted(check_refusals)


def test_the_operators_run_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CUDA device: with stand-ins for launchers, and no CPU kernels."""
    calls = []

    def pack(packed: Tensor, channel_scale: Tensor, out: Tensor | None, rng: Tensor, h: Tensor, *rest: Any) -> bool:
        calls.append("quantize")
        ops.quantize_state_reference_(packed, channel_scale, out, rng, h, *rest)
        return True

    def unpack(*arguments: Any) -> Tensor:
        calls.append("dequantize")
        return quant.dequantize_state(*arguments)

    monkeypatch.setattr(ops.cpu_kernels, "quantize_state_", pack)
    monkeypatch.setattr(ops.cpu_kernels, "dequantize_state", unpack)
    h = torch.randn(2, NHEADS, HEADDIM, DSTATE)
    packed, channel_scale, rng, state_scale = ops.quantize_state(h, None, 4, True, 3)
    expected = quant.quantize_state(h, 4, rng=quant.new_rng(2, 3))
    for tensor, wanted in zip((packed, channel_scale, state_scale), expected, strict=True):
        assert torch.equal(tensor, wanted)
    ring = recurrence.new_ring(2, NHEADS, HEADDIM, 1, DSTATE, 3, start=1)
    ops.quantize_state_(packed, channel_scale, state_scale, rng, 2 * h, None, 4, True, ring.position)
    assert rng[:, 1].tolist() == [2, 2] and ring.position.tolist() == [0, 0]
    state = ops.dequantize_state(packed, channel_scale, state_scale, 4, *ring)
    assert torch.equal(state, quant.dequantize_state(packed, channel_scale, state_scale, 4))
    assert calls == ["quantize", "quantize", "dequantize"]


# --- text and compiled code ----------------------------------------------------------------------------------------

GOLDEN_SPECS = [QuantizeSpec(64, 128, 4), DequantizeSpec(5, 24, 8, rows=8, target="gfx942")]


@pytest.mark.parametrize("spec", GOLDEN_SPECS, ids=lambda spec: spec.slug())
def test_golden_text(spec: QuantizeSpec | DequantizeSpec) -> None:
    """After a wanted change: ``QMAMBA_UPDATE_GOLDEN=1 pytest`` on this file, and read the diff."""
    golden = GOLDEN / f"{spec.slug()}.py.txt"
    if os.environ.get("QMAMBA_UPDATE_GOLDEN"):
        golden.write_text(render(spec))
    text = render(spec)
    compile(text, "rendered", "exec")
    assert text == golden.read_text()
    assert max(len(line) for line in text.splitlines()) <= 120 and "\n\n\n\n" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize(
    "kind, change, named",
    [
        (QuantizeSpec, {"bits": None}, "bits=None"),
        (QuantizeSpec, {"flush_interval": 4}, "flush_interval=4"),
        (DequantizeSpec, {"dynamic": True, "rows": 64}, "dynamic=True"),
        (DequantizeSpec, {"dstate": 20}, "dstate=20"),
    ],
)
def test_spec_refuses(kind: Any, change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        kind(**{"headdim": 64, "dstate": 128, "bits": 4} | change)


# Instructions an element, as compiled by Triton 3.6 and 3.9 when the bound was set: the larger one plus 2 to 5 percent.
# Of nearest rounding: by 3.9 alone.
BOUNDS = {
    ("quantize", "calibrated"): {"sm_80": 9.7, "sm_90": 9.5, "sm_100": 9.0, "gfx942": 16.5},
    ("quantize", "dynamic"): {"sm_80": 11.7, "sm_90": 11.6, "sm_100": 10.2, "gfx942": 22.6},
    ("quantize", "stochastic"): {"sm_90": 33.7},
    ("dequantize", "calibrated"): {"sm_80": 7.6, "sm_90": 7.6, "sm_100": 6.6, "gfx942": 7.0},
}


@pytest.mark.parametrize(
    "kind, scales, target", [(*key, target) for key, bounds in BOUNDS.items() for target in bounds]
)
def test_compiled_code(kind: str, scales: str, target: str) -> None:
    """The state of 2.7B at batch 64: no spills, 16-byte accesses to float and packed state."""
    shape = (target, 64 * 80, 64, 128, 4)
    spec: QuantizeSpec | DequantizeSpec = tuning.dequantize_state(*shape)
    if kind == "quantize":
        spec = tuning.quantize_state(*shape, scales == "dynamic", scales == "stochastic")
    found = compiled.state_facts(spec)
    assert found.spills == 0 and found.local_accesses == 0, found
    lanes = lanes_of(target) * spec.warps
    for way, row_bytes in (("load", 512), ("store", 64)) if kind == "quantize" else (("load", 64), ("store", 512)):
        assert found.accesses.get((way, 16), 0) == spec.rows * row_bytes // (16 * lanes), found.accesses
    per_element = found.instructions * lanes / (spec.rows * spec.dstate)
    bound = BOUNDS[kind, scales][target]
    assert 0.75 * bound < per_element <= bound, per_element
