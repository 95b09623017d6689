"""The generated Triton step in Triton's interpreter: codes of the torch reference, y to float32 rounding."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_cpu_ssm_update import Problem
from torch import Tensor

from qmamba_compile import ops, quant, recurrence
from qmamba_compile.triton_templates import launch

Interpreted = Callable[..., Any]

Y_TOLERANCE = 5e-6
"""Of the largest y: a sum of dstate float32 products in another order, and exp of another library."""

CODES_OFF = 1e-5
"""Share of codes that may differ by one with calibrated scales: the kernel's g = h / state_scale differs from the
reference's in its last bits, which moves a code or, more seldom, a scale."""

SMALL: dict[str, Any] = {"batch": 1, "nheads": 2, "dstate": 32}


def poisoned_launch(*args: Any, **kwargs: Any) -> Tensor:
    """`launch.ssm_update` whose freshly allocated memory is full of NaN."""
    empty = torch.empty
    torch.empty = lambda *a, **k: empty(*a, **k).fill_(torch.nan)
    try:
        y = launch.ssm_update(*args, **kwargs)
    finally:
        torch.empty = empty
    assert y is not None
    return y


def check(steps: int, row: dict[str, Any], codes_off: float) -> None:
    """The kernel and the reference side by side, each on its own state."""
    problem = Problem(**row)
    expected_state = [None if tensor is None else tensor.clone() for tensor in problem.state]
    bits = problem.row["bits"]
    different = seen = 0
    for _ in range(steps):
        inputs = problem.inputs()
        before = [None if tensor is None else tensor.clone() for tensor in inputs]
        y = problem.step(poisoned_launch, problem.state, inputs)
        expected = problem.step(ops.ssm_update_reference, expected_state, inputs)
        assert all(a is None or torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
        assert y.dtype == expected.dtype == problem.row["dtype"] and y.shape == expected.shape
        distance = (quant.unpack(problem.state[0], bits).int() - quant.unpack(expected_state[0], bits).int()).abs()
        assert distance.max() <= 1
        different += int(distance.count_nonzero())
        seen += distance.numel()
        # A scale that differs by its last of 8 bits shows in y until it is made anew.
        if all(a is None or torch.equal(a, b) for a, b in zip(problem.state, expected_state, strict=True)):
            # Triton's interpreter truncates y where a GPU rounds it: one unit of a half precision.
            tolerance = max(Y_TOLERANCE, torch.finfo(y.dtype).eps if y.dtype != torch.float32 else 0.0)
            error = (y.float() - expected.float()).abs().max() / expected.float().abs().max()
            assert error <= tolerance, f"y is off by {error}"
    assert torch.equal(problem.state[3], expected_state[3])
    assert different <= codes_off * seen, f"{different} of {seen} codes differ"


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"batch": 2, "dstate": 64, "nheads": 4},
        {"ngroups": 2},
        {"headdim": 5},
        {"headdim": 40, "nheads": 1},
        {"dstate": 24},
        {"dstate": 8, "bits": 8, "dynamic": False},
        {"dstate": 48, "bits": 2},
        {"headdim": 3, "dstate": 96, "stochastic": True},
        {"headdim": 128, "dstate": 16, "nheads": 1, "dynamic": False},
        {"headdim": 64, "dstate": 256, "nheads": 1, "dynamic": False},
        {"D": False},
        {"dt_bias": False},
        {"dt_softplus": False},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
        {"strided": True},
        {"strided": True, "dtype": torch.bfloat16, "batch": 2},
        {"stochastic": True, "batch": 4},
    ],
    ids=lambda change: "-".join(f"{name}={value}" for name, value in change.items()) or "base",
)
def test_equals_reference(interpreted: Interpreted, change: dict[str, Any]) -> None:
    interpreted(check, 2, SMALL | change, codes_off=0.0)


@pytest.mark.parametrize(
    "bits, dynamic, stochastic",
    [
        # The interpreter takes longest for these four.
        pytest.param(*row, marks=[pytest.mark.slow] * (row[2] and row[0] != 4))
        for row in itertools.product(quant.STATE_BITS, (True, False), (True, False))
    ],
)
def test_64_steps(interpreted: Interpreted, bits: int, dynamic: bool, stochastic: bool) -> None:
    # The interpreter's time goes with the number of operations, so few rows, which dynamic scales add up by halving.
    row = SMALL | {"nheads": 1, "headdim": 4, "dstate": 128}
    row |= {"bits": bits, "dynamic": dynamic, "stochastic": stochastic}
    interpreted(check, 64, row, 0.0 if dynamic else CODES_OFF)


def check_same_h(row: dict[str, Any]) -> None:
    """A step that leaves h as it is (dt = 0) on codes that do not use the whole grid: requantization alone."""
    problem = Problem(**row)
    largest = quant.max_code(problem.row["bits"])
    generator = torch.Generator().manual_seed(1)
    packed = problem.state[0]
    headdim, dstate = problem.row["headdim"], problem.row["dstate"]
    codes = torch.randint(-largest, largest + 1, (*packed.shape[:2], headdim, dstate), generator=generator)
    # Rows of every height: each maps its own largest magnitude to the largest code.
    height = torch.arange(headdim)[:, None] % largest + 1
    packed.copy_(quant.pack(codes.clamp(-height, height).to(torch.int8), problem.row["bits"]))
    expected = [None if tensor is None else tensor.clone() for tensor in problem.state]
    x, dt, A, B, C, D, _ = problem.inputs()
    inputs = (x, torch.zeros_like(dt), A, B, C, D, None)
    problem.row["dt_softplus"] = False
    problem.step(poisoned_launch, problem.state, inputs)
    problem.step(ops.ssm_update_reference, expected, inputs)
    assert not torch.equal(expected[0], packed.new_zeros(packed.shape))
    for tensor, wanted in zip(problem.state, expected, strict=True):
        assert tensor is None or torch.equal(tensor, wanted)


@pytest.mark.parametrize("bits, dynamic", list(itertools.product(quant.STATE_BITS, (True, False))))
@pytest.mark.parametrize("stochastic", [True, False])
def test_same_h_gives_the_same_bits(interpreted: Interpreted, bits: int, dynamic: bool, stochastic: bool) -> None:
    row = SMALL | {"headdim": 16, "bits": bits, "dynamic": dynamic, "stochastic": stochastic}
    interpreted(check_same_h, row)


def check_non_finite(dynamic: bool) -> None:
    problem = Problem(batch=2, nheads=2, headdim=16, dstate=32, dynamic=dynamic)
    expected = [None if tensor is None else tensor.clone() for tensor in problem.state]
    x, *rest = problem.inputs()
    x = x.clone()
    x[0, 1, 2], x[1, 0, 0] = torch.nan, torch.inf
    problem.step(poisoned_launch, problem.state, (x, *rest))
    problem.step(ops.ssm_update_reference, expected, (x, *rest))
    for tensor, wanted in zip(problem.state, expected, strict=True):
        assert tensor is None or torch.equal(tensor.nan_to_num(7.0), wanted.nan_to_num(7.0))
    assert problem.state[1][0, 1, 2].isnan() and problem.state[1][1, 0, 0].isnan()
    assert problem.state[1][0, 0].isfinite().all()


@pytest.mark.parametrize("dynamic", [True, False])
def test_nan_and_infinity_show_in_the_scales(interpreted: Interpreted, dynamic: bool) -> None:
    interpreted(check_non_finite, dynamic)


def check_nan_dt() -> None:
    problem = Problem(**SMALL, dynamic=False)
    x, dt, *rest = problem.inputs()
    dt = dt.clone()
    dt[0, 0] = torch.nan
    y = problem.step(poisoned_launch, problem.state, (x, dt, *rest))
    assert y[0, 0].isnan().all() and problem.state[1][0, 0].isnan().all()
    assert y[0, 1].isfinite().all() and problem.state[1][0, 1].isfinite().all()


def test_nan_dt_is_not_hidden_by_its_limits(interpreted: Interpreted) -> None:
    interpreted(check_nan_dt)


def check_slots(stochastic: bool) -> None:
    """A pool of five states, three of them in a batch of four whose third entry is padding."""
    problem = Problem(**SMALL | {"batch": 4, "stochastic": stochastic})
    pool = [torch.cat([tensor, tensor[:1]]) for tensor in problem.state]
    slots = torch.tensor([4, 1, -1, 2], dtype=torch.int32)
    inputs = problem.inputs()
    before = [tensor.clone() for tensor in pool]
    arguments = (*inputs, None, True, 4, stochastic)
    y = poisoned_launch(*pool, *arguments, slots=slots)
    batch = [tensor[slots.clamp(min=0).long()] for tensor in before]
    expected = ops.ssm_update_reference(*batch, *arguments)
    active = slots >= 0
    assert (y[active] - expected[active]).abs().max() <= Y_TOLERANCE * expected.abs().max()
    assert (y[~active] == 0).all()
    for tensor, old, new in zip(pool, before, batch, strict=True):
        assert torch.equal(tensor[slots[active].long()], new[active])
        assert torch.equal(tensor[[0, 3]], old[[0, 3]])


@pytest.mark.parametrize("stochastic", [False, True])
def test_slots_of_a_pool(interpreted: Interpreted, stochastic: bool) -> None:
    interpreted(check_slots, stochastic)


def check_extremes() -> None:
    """Rows of zeros, decays that leave nothing, rows without input, and inputs far beyond or below the state."""
    problem = Problem(**SMALL | {"nheads": 6, "batch": 2}, dynamic=False, dt_softplus=False, dt_bias=False)
    packed, channel_scale, *_ = problem.state
    packed[0, :, 0] = quant.zero_byte(4)
    channel_scale[0, :, 0] = quant.TINY_SCALE
    channel_scale[0, :, 1] = quant.TINY_SCALE
    expected_state = [None if tensor is None else tensor.clone() for tensor in problem.state]
    for _ in range(3):
        x, dt, _, B, C, D, _ = problem.inputs()
        x = x.clone()
        x[0, :, 2], x[1, :, 0] = 0, 0
        x[0, :, 3], x[0, :, 4] = x[0, :, 3] * 1e30, x[0, :, 4] * 1e-30
        B = B.clone()
        B[0, :, :3] = 0
        A = torch.tensor([-200.0, -88.0, -80.0, -30.0, -1.0, 0.0])
        inputs = (x, torch.ones_like(dt), A, B, C, D, None)
        y = problem.step(poisoned_launch, problem.state, inputs)
        expected = problem.step(ops.ssm_update_reference, expected_state, inputs)
        for tensor, wanted in zip(problem.state, expected_state, strict=True):
            assert tensor is None or torch.equal(tensor, wanted)
        assert y.isfinite().all()
        assert ((y - expected).abs() <= 1e-5 * expected.abs().amax(dim=-1, keepdim=True)).all()


def test_rows_of_zeros_and_decays_that_leave_nothing(interpreted: Interpreted) -> None:
    interpreted(check_extremes)


def check_gate_and_limits() -> None:
    problem = Problem(**SMALL | {"nheads": 8}, dt_bias=False, dt_softplus=False)
    x, dt, *rest = problem.inputs()
    z = problem.randn(*x.shape, 2)[..., 0]
    expected_state = [tensor.clone() for tensor in problem.state]
    arguments = (None, False, 4, False)
    y = poisoned_launch(*problem.state, x, dt, *rest, *arguments, z=z, dt_min=-0.5, dt_max=0.5)
    expected = ops.ssm_update_reference(*expected_state, x, dt.clamp(-0.5, 0.5), *rest, *arguments)
    expected *= torch.nn.functional.silu(z)
    assert (y - expected).abs().max() <= Y_TOLERANCE * expected.abs().max()
    assert all(torch.equal(a, b) for a, b in zip(problem.state, expected_state, strict=True))
    assert (dt.clamp(-0.5, 0.5) != dt).any() and (dt.clamp(-0.5, 0.5) == dt).any()


def test_gate_and_limits_of_dt(interpreted: Interpreted) -> None:
    interpreted(check_gate_and_limits)


def check_float_state(dtype: torch.dtype, change: dict[str, Any]) -> None:
    problem = Problem(**SMALL | change)
    row = problem.row
    state = problem.randn(row["batch"], row["nheads"], row["headdim"], row["dstate"]).to(dtype)
    for _ in range(3):
        inputs = problem.inputs()
        wanted_state, wanted = recurrence.step(state.float(), *inputs, True)
        y = launch.ssm_update_float(state, *inputs, True)
        assert y is not None
        assert (y - wanted).abs().max() <= Y_TOLERANCE * wanted.abs().max()
        # The interpreter truncates a bfloat16 where a GPU rounds it.
        allowed = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7}[dtype]
        assert (state.float() - wanted_state).abs().max() <= allowed * wanted_state.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [{}, {"headdim": 5, "dstate": 20}], ids=["base", "odd"])
def test_float_state(interpreted: Interpreted, dtype: torch.dtype, change: dict[str, Any]) -> None:
    interpreted(check_float_state, dtype, change)


def check_refusals() -> None:
    problem = Problem(**SMALL)
    inputs = problem.inputs()
    double = problem.state[0].repeat_interleave(2, dim=1)
    state = [double[:, ::2], *problem.state[1:]]
    assert launch.ssm_update(*state, *inputs, None, True, 4, False) is None
    narrow = Problem(**SMALL | {"dstate": 20})
    before = [tensor.clone() for tensor in narrow.state]
    assert launch.ssm_update(*narrow.state, *narrow.inputs(), None, True, 4, False) is None
    assert all(torch.equal(a, b) for a, b in zip(narrow.state, before, strict=True))


def test_what_the_kernels_do_not_take_is_left_to_the_reference(interpreted: Interpreted) -> None:
    interpreted(check_refusals)


def test_without_a_gpu_there_is_no_target() -> None:
    problem = Problem(**SMALL)
    assert launch.ssm_update(*problem.state, *problem.inputs(), None, True, 4, False) is None


def check_scale_ties() -> None:
    """2 bits: a row's scale is its largest magnitude, rounded to bfloat16, here from exactly half way."""
    problem = Problem(**SMALL | {"bits": 2}, dynamic=False, D=False, dt_bias=False, dt_softplus=False)
    problem.state[0].fill_(quant.zero_byte(2))
    problem.calibrated = torch.ones_like(problem.calibrated)
    x, dt, A, B, C, *_ = problem.inputs()
    x = 1 + (2 * torch.arange(x.numel()).view(x.shape) + 1) * 2.0**-8
    problem.step(poisoned_launch, problem.state, (x, torch.ones_like(dt), A, torch.ones_like(B), C, None, None))
    assert torch.equal(problem.state[1], x.to(torch.bfloat16))
    assert len(set((problem.state[1].float() > x).flatten().tolist())) == 2


def test_scales_round_half_to_even(interpreted: Interpreted) -> None:
    interpreted(check_scale_ties)
