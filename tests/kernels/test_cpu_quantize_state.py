"""The generated C++ quantization: the bits of quant.py on every state, finite or not."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from ties import assert_tied, tied_state
from torch import Tensor

from qmamba_compile import ops, quant
from qmamba_compile.cpu_templates import build, launch

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")

BATCH, NHEADS, HEADDIM, DSTATE = 2, 6, 5, 40
RNG = torch.tensor([[2**63 - 5, 3], [-7, 2**40 + 1]])
SCHEMES = list(itertools.product(quant.STATE_BITS, (True, False), (True, False)))


def adversarial_state() -> Tensor:
    """[b, h, p, n]: one trouble a head."""
    h = torch.randn(BATCH, NHEADS, HEADDIM, DSTATE, generator=torch.Generator().manual_seed(0))
    h[0, 0] = 0
    h[0, 1] *= 1e30
    h[0, 2] *= 1e-30
    h[0, 3, 0] *= 1000
    h[0, 3, :, 0] *= 1000
    h[0, 4, 1] = 0
    h[0, 4, :, 1] = 0
    h[0, 5] = 0
    h[0, 5, 2, 3] = 1
    h[1, 0, 1, 7] = torch.nan
    h[1, 1, 2, DSTATE - 1] = torch.inf
    h[1, 2, 0, 0] = -torch.inf
    h[1, 3] *= 1e38
    h[1, 4] = 1e-45
    h[1, 5] = (torch.arange(HEADDIM * DSTATE).view(HEADDIM, DSTATE) % 15 - 7) * 0.5
    return h


def calibrated_scale(nheads: int = NHEADS, dstate: int = DSTATE) -> Tensor:
    """[h, n], with values that a broken artifact could hold."""
    scale = torch.rand(nheads, dstate, generator=torch.Generator().manual_seed(1)) + 0.1
    scale[0, 0] = 0
    scale[nheads // 2, 1] = torch.nan
    return scale.to(quant.SCALE_DTYPE)


def check(h: Tensor, bits: int, dynamic: bool, stochastic: bool, state_scale: Tensor | None) -> None:
    batch = h.shape[0]
    rng = RNG[:batch].clone()
    packed, channel_scale, found = quant.quantize_state(
        h, bits, state_scale=state_scale, rng=rng if stochastic else None
    )
    poisoned = [torch.full_like(packed, 77), torch.full_like(channel_scale, 5), torch.full_like(found, 5)]
    out = poisoned[2] if dynamic else None
    assert launch.quantize_state_(*poisoned[:2], out, rng, h, state_scale, bits, stochastic)
    # As bytes, since NaN scales must be the same NaN.
    assert torch.equal(poisoned[1].view(torch.uint8), channel_scale.view(torch.uint8)), "channel_scale"
    assert out is None or torch.equal(out.view(torch.uint8), found.view(torch.uint8)), "state_scale"
    assert torch.equal(poisoned[0], packed), "codes"
    assert torch.equal(rng[:, 1], RNG[:batch, 1] + 1) and torch.equal(rng[:, 0], RNG[:batch, 0])
    state = launch.dequantize_state(packed, channel_scale, found, bits)
    expected = quant.dequantize_state(packed, channel_scale, found, bits)
    assert state is not None
    torch.testing.assert_close(state, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bits, dynamic, stochastic", SCHEMES)
def test_bits_of_the_reference(bits: int, dynamic: bool, stochastic: bool) -> None:
    check(adversarial_state(), bits, dynamic, stochastic, None if dynamic else calibrated_scale())


@pytest.mark.parametrize("isa", build.available_isas())
@pytest.mark.parametrize("bits, dynamic, stochastic", [(4, True, True), (8, False, False)])
def test_every_instruction_set(
    isa: str, bits: int, dynamic: bool, stochastic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QMAMBA_CPU_ISA", isa)
    launch.kernel.cache_clear()
    check(adversarial_state(), bits, dynamic, stochastic, None if dynamic else calibrated_scale())
    launch.kernel.cache_clear()


@pytest.mark.parametrize("isa", build.available_isas())
@pytest.mark.parametrize("bits, dynamic", list(itertools.product(quant.STATE_BITS, (True, False))))
def test_ties_are_those_of_the_exact_product(
    isa: str, bits: int, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QMAMBA_CPU_ISA", isa)
    launch.kernel.cache_clear()
    scale = None if dynamic else (torch.rand(NHEADS, DSTATE, generator=torch.Generator().manual_seed(1)) + 0.5)
    if scale is not None:
        scale[:, ::2] = 0.5
        scale = scale.to(quant.SCALE_DTYPE)
    h = tied_state((BATCH, NHEADS, 16, DSTATE), bits, scale)
    assert_tied(h, *quant.quantize_state(h, bits, state_scale=scale)[1:])
    check(h, bits, dynamic, False, scale)
    launch.kernel.cache_clear()


@pytest.mark.parametrize("dynamic", [True, False])
def test_halving_in_registers(dynamic: bool) -> None:
    """dstate 128 takes the path without padding."""
    h = torch.randn(2, 3, 9, 128)
    check(h, 4, dynamic, True, None if dynamic else calibrated_scale(3, 128))


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    values=st.lists(st.floats(width=32), min_size=4, max_size=40),
    exponent=st.integers(-120, 120),
    dynamic=st.booleans(),
)
def test_any_floats(values: list[float], exponent: int, dynamic: bool) -> None:
    repeated = torch.tensor(values).repeat(HEADDIM * DSTATE)[: HEADDIM * DSTATE]
    h = torch.stack([repeated, repeated.clamp(-1, 1) * 2.0**exponent]).view(1, 2, HEADDIM, DSTATE)
    check(h.contiguous(), 4, dynamic, False, None if dynamic else calibrated_scale(2))


def test_state_of_any_layout_and_dtype() -> None:
    h = torch.randn(DSTATE, HEADDIM, NHEADS, BATCH, dtype=torch.float64).permute(3, 2, 1, 0)
    results = ops.quantize_state(h, None, 4, False, 3)
    packed, channel_scale, state_scale = quant.quantize_state(h, 4)
    for tensor, wanted in zip(results, (packed, channel_scale, torch.tensor([[3, 1]] * 2), state_scale), strict=True):
        assert torch.equal(tensor, wanted)


@pytest.mark.parametrize("dynamic", [True, False])
def test_ops_are_declared_truthfully(dynamic: bool) -> None:
    h = torch.randn(BATCH, NHEADS, HEADDIM, DSTATE)
    state_scale = None if dynamic else torch.rand(NHEADS, DSTATE).to(quant.SCALE_DTYPE) + 0.5
    packed, channel_scale, rng, *found = ops.quantize_state(h, state_scale, 4, True, 0)
    out = found[0] if dynamic else None
    scale: Any = found[0] if dynamic else state_scale
    torch.library.opcheck(torch.ops.qmamba.quantize_state.default, (h, state_scale, 4, True, 0))
    torch.library.opcheck(
        torch.ops.qmamba.quantize_state_.default, (packed, channel_scale, out, rng, h, state_scale, 4, True)
    )
    torch.library.opcheck(torch.ops.qmamba.dequantize_state.default, (packed, channel_scale, scale, 4))
