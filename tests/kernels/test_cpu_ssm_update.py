"""The generated C++ step: same codes as the torch reference, bit for bit, over many steps; y to float32 rounding."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from ties import assert_tied
from torch import Tensor

from qmamba_compile import ops, quant, recurrence
from qmamba_compile.cpu_templates import build, launch

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")

Y_TOLERANCE = 1e-5
"""Of the largest y. A sum of dstate float32 products in another order differs by about sqrt(dstate) * 2^-24 of it."""

# Two's complement corners of the key, and a step beyond 32 bits.
RNG = [[2**63 - 5, 3], [-7, 2**40 + 1], [0, 0], [12345, 2**31]]

BASE: dict[str, Any] = {
    "batch": 2,
    "nheads": 4,
    "headdim": 8,
    "dstate": 64,
    "ngroups": 1,
    "bits": 4,
    "dynamic": True,
    "stochastic": False,
    "D": True,
    "dt_bias": True,
    "dt_softplus": True,
    "dtype": torch.float32,
    "strided": False,
}


@pytest.fixture(params=build.available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("QMAMBA_CPU_ISA", request.param)
    launch.kernel.cache_clear()
    yield request.param
    launch.kernel.cache_clear()


class Problem:
    """A packed state, and inputs of any number of steps."""

    def __init__(self, **row: Any) -> None:
        row = BASE | row
        self.row = row
        self.generator = torch.Generator().manual_seed(0)
        batch, nheads, headdim, dstate = row["batch"], row["nheads"], row["headdim"], row["dstate"]
        h = self.randn(batch, nheads, headdim, dstate)
        state_scale = None if row["dynamic"] else quant.store_scale(h.abs().mean(dim=(0, 2)).sqrt())
        self.calibrated = state_scale
        rng = torch.tensor(RNG[:batch])
        packed, channel_scale, state_scale = quant.quantize_state(
            h, row["bits"], state_scale=state_scale, rng=rng if row["stochastic"] else None
        )
        self.state = [packed, channel_scale, state_scale if row["dynamic"] else None, rng]
        self.A = -torch.rand(nheads, generator=self.generator) * 4
        self.D = self.randn(nheads) if row["D"] else None
        self.dt_bias = self.randn(nheads) - 2 if row["dt_bias"] else None

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def inputs(self) -> tuple[Any, ...]:
        """x, dt, A, B, C, D, dt_bias of one step."""
        row = self.row
        batch, nheads, headdim, dstate, ngroups = (
            row[name] for name in ("batch", "nheads", "headdim", "dstate", "ngroups")
        )
        sizes = [nheads * headdim, ngroups * dstate, ngroups * dstate, nheads]
        # As in the model: views of one projection, whose batch stride is not their own size.
        x, B, C, dt = self.randn(batch, sum(sizes)).to(row["dtype"]).split(sizes, dim=-1)
        x, B, C = x.view(batch, nheads, headdim), B.view(batch, ngroups, dstate), C.view(batch, ngroups, dstate)
        if row["strided"]:
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
            B = B.repeat_interleave(2, dim=-1)[..., ::2]
            dt = dt.repeat_interleave(3, dim=-1)[:, ::3]
        else:
            x, B, C = x.contiguous() if batch == 1 else x, B, C
        return x, dt, self.A, B, C, self.D, self.dt_bias

    def step(self, function: Any, state: list[Any], inputs: tuple[Any, ...]) -> Tensor:
        row = self.row
        y = function(*state, *inputs, self.calibrated, row["dt_softplus"], row["bits"], row["stochastic"])
        assert y is not None
        return y

    def check(self, steps: int) -> None:
        """The kernel and the reference, each on its own state: equal after every step."""
        expected_state = [None if tensor is None else tensor.clone() for tensor in self.state]
        for _ in range(steps):
            inputs = self.inputs()
            before = [None if tensor is None else tensor.clone() for tensor in inputs]
            y = self.step(launch.ssm_update, self.state, inputs)
            expected = self.step(ops.ssm_update_reference, expected_state, inputs)
            for name, tensor, wanted in zip(
                ("packed", "channel_scale", "state_scale", "rng"), self.state, expected_state, strict=True
            ):
                assert tensor is None or torch.equal(tensor, wanted), name
            assert all(a is None or torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
            assert y.dtype == expected.dtype == self.row["dtype"] and y.shape == expected.shape
            # A half-precision y is rounded once, from sums that differ in float32's last bits: one unit at most.
            tolerance = max(Y_TOLERANCE, torch.finfo(y.dtype).eps)
            error = (y.float() - expected.float()).abs().max() / expected.float().abs().max()
            assert error <= tolerance, f"y is off by {error}"


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"batch": 1},
        {"batch": 1, "nheads": 1},
        {"ngroups": 2},
        {"ngroups": 4},
        {"headdim": 5, "dstate": 96},
        {"dstate": 6, "headdim": 3},
        {"dstate": 20},
        {"dstate": 33, "bits": 8},
        {"dstate": 12, "bits": 2, "dynamic": False},
        {"D": False},
        {"dt_bias": False},
        {"dt_softplus": False},
        {"D": False, "dt_bias": False, "dt_softplus": False},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
        {"strided": True},
        {"strided": True, "dtype": torch.bfloat16},
        {"stochastic": True, "batch": 4},
        {"headdim": 64, "dstate": 128, "nheads": 24},
    ],
    ids=lambda change: "-".join(f"{name}={value}" for name, value in change.items()) or "base",
)
def test_equals_reference(change: dict[str, Any]) -> None:
    Problem(**change).check(steps=3)


def test_every_instruction_set(isa: str) -> None:
    Problem().check(steps=3)
    Problem(bits=8, dynamic=False, stochastic=True, dstate=33).check(steps=3)


@pytest.mark.parametrize("dynamic", [True, False])
def test_ties_are_those_of_the_exact_product(isa: str, dynamic: bool) -> None:
    """A state at rest, of codes 1 and 2: stored again, 2 becomes 7, and 1 comes to 3.5 or next to it."""
    problem = Problem(dynamic=dynamic, dt_bias=False, dt_softplus=False)
    packed, channel_scale, state_scale, _ = problem.state
    p, n = torch.arange(8)[:, None], torch.arange(64)
    codes = (1 + (p + n) % 2) * torch.where(torch.rand(2, 4, 8, 64) < 0.5, -1, 1)
    packed.copy_(quant.pack(codes.to(torch.int8), 4))
    # 2/7 of it has 8 bits, too. Alike in two rows that follow each other, so that all columns have the same mean.
    pairs = torch.arange(2 * 4 * 4).view(2, 4, 4) + 1
    channel_scale.copy_(pairs.repeat_interleave(2, dim=-1) * 7 / 32)
    if not dynamic:
        problem.calibrated[:, ::2] = 0.5
    state_scale = state_scale.fill_(1) if dynamic else problem.calibrated
    h = quant.dequantize_state(packed, channel_scale, state_scale, 4)
    assert_tied(h, *quant.quantize_state(h, 4, state_scale=problem.calibrated)[1:])
    x, dt, *rest = problem.inputs()
    expected = [None if tensor is None else tensor.clone() for tensor in problem.state]
    for function, state in ((launch.ssm_update, problem.state), (ops.ssm_update_reference, expected)):
        problem.step(function, state, (x, torch.zeros_like(dt), *rest))
    assert all(a is None or torch.equal(a, b) for a, b in zip(problem.state, expected, strict=True))


@pytest.mark.parametrize(
    "bits, dynamic, stochastic", list(itertools.product(quant.STATE_BITS, (True, False), (True, False)))
)
def test_no_code_differs_after_64_steps(bits: int, dynamic: bool, stochastic: bool) -> None:
    Problem(bits=bits, dynamic=dynamic, stochastic=stochastic).check(steps=64)


@pytest.mark.parametrize("dynamic", [True, False])
def test_nan_and_infinity_show_in_the_scales(dynamic: bool) -> None:
    problem = Problem(dynamic=dynamic)
    expected = [None if tensor is None else tensor.clone() for tensor in problem.state]
    x, *rest = problem.inputs()
    x = x.clone()
    x[0, 1, 2], x[1, 0, 0] = torch.nan, torch.inf
    problem.step(launch.ssm_update, problem.state, (x, *rest))
    problem.step(ops.ssm_update_reference, expected, (x, *rest))
    for tensor, wanted in zip(problem.state, expected, strict=True):
        assert tensor is None or torch.equal(tensor.view(torch.uint8), wanted.view(torch.uint8))
    assert problem.state[1][0, 1, 2].isnan()
    assert problem.state[1][0, 0].isfinite().all()


def test_threads_do_not_change_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    one, many = Problem(batch=4), Problem(batch=4)
    inputs = one.inputs()
    y_one = one.step(launch.ssm_update, one.state, inputs)
    monkeypatch.setattr(launch, "PARALLEL_ELEMENTS", 1)
    y_many = many.step(launch.ssm_update, many.state, inputs)
    assert torch.equal(y_one, y_many)
    assert all(torch.equal(a, b) for a, b in zip(one.state, many.state, strict=True))


def test_float_state_is_the_float_step() -> None:
    problem = Problem()
    inputs = problem.inputs()
    state = problem.randn(2, 4, 8, 64)
    wanted_state, wanted = recurrence.step(state.clone(), *inputs, True)
    y = launch.ssm_update_float(state, *inputs, True)
    assert y is not None
    assert torch.equal(state, wanted_state)
    assert (y - wanted).abs().max() <= Y_TOLERANCE * wanted.abs().max()


def test_a_state_that_is_not_contiguous_is_left_to_the_reference() -> None:
    problem = Problem()
    double = problem.state[0].repeat_interleave(2, dim=0)
    problem.state[0] = double[::2]
    arguments = (*problem.state, *problem.inputs(), None, True, 4, False)
    assert launch.ssm_update(*arguments) is None
    before = double[1::2].clone()
    ops.ssm_update(*arguments)
    assert torch.equal(double[1::2], before)


@pytest.mark.parametrize("dynamic", [True, False])
def test_op_is_declared_truthfully(dynamic: bool) -> None:
    problem = Problem(dynamic=dynamic)
    arguments = (*problem.state, *problem.inputs(), problem.calibrated, True, 4, False)
    torch.library.opcheck(torch.ops.qmamba.ssm_update.default, arguments)
