"""The checkpointed step in C++: codes, scales and ring of the torch reference, bit for bit; y to the rounding of C."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from qmamba_compile import ops, quant, recurrence
from qmamba_compile.cpu_templates import build, launch
from qmamba_compile.cpu_templates.specs import CORES
from qmamba_compile.recurrence import Ring

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")

Y_TOLERANCE = 2e-4
"""Of the largest y. A step that only reads rounds C * state_scale to 16 bits: 2^-16 of the largest product, which a
sum of dstate codes up to 8 multiplies by about 8 sqrt(dstate)."""

BASE: dict[str, Any] = {
    "batch": 3,
    "nheads": 4,
    "headdim": 8,
    "dstate": 64,
    "ngroups": 2,
    "bits": 4,
    "dynamic": True,
    "stochastic": False,
    "flush_interval": 8,
    "ring": torch.bfloat16,
    "dtype": torch.float32,
    "plain": False,
}


@pytest.fixture(params=build.available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("QMAMBA_CPU_ISA", request.param)
    launch.kernel.cache_clear()
    yield request.param
    launch.kernel.cache_clear()


class Problem:
    """A packed state whose sequences are at different positions of their rings, and inputs of any number of steps."""

    def __init__(self, **change: Any) -> None:
        row = self.row = BASE | change
        self.generator = torch.Generator().manual_seed(0)
        batch, nheads = row["batch"], row["nheads"]
        h = self.randn(batch, nheads, row["headdim"], row["dstate"])
        self.calibrated = None if row["dynamic"] else quant.store_scale(h.abs().mean(dim=(0, 2)).sqrt())
        rng = torch.tensor([[2**63 - 5, 3], [-7, 2**40 + 1], [0, 0]])[:batch]
        noise = rng if row["stochastic"] else None
        packed, channel_scale, scale = quant.quantize_state(h, row["bits"], state_scale=self.calibrated, rng=noise)
        self.state = [packed, channel_scale, scale if row["dynamic"] else None, rng]
        interval = row["flush_interval"]
        self.ring = recurrence.new_ring(
            batch, nheads, row["headdim"], row["ngroups"], row["dstate"], interval, dtype=row["ring"]
        )
        self.ring.position.copy_(torch.arange(batch) % interval)
        self.A = -torch.rand(nheads, generator=self.generator) * 2
        self.D = None if row["plain"] else self.randn(nheads)
        self.dt_bias = None if row["plain"] else self.randn(nheads) - 2

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def inputs(self) -> tuple[Any, ...]:
        row = self.row
        batch, nheads, headdim, ngroups, dstate = (
            row[name] for name in ("batch", "nheads", "headdim", "ngroups", "dstate")
        )
        sizes = [nheads * headdim, ngroups * dstate, ngroups * dstate, nheads]
        x, B, C, dt = self.randn(batch, sum(sizes)).to(row["dtype"]).split(sizes, dim=-1)
        dt = dt.abs() if row["plain"] else dt
        shapes = (batch, nheads, headdim), (batch, ngroups, dstate)
        return x.view(shapes[0]), dt, self.A, B.view(shapes[1]), C.view(shapes[1]), self.D, self.dt_bias

    def step(self, function: Any, state: list[Any], ring: Ring, inputs: tuple[Any, ...]) -> Tensor:
        row = self.row
        constants = (self.calibrated, not row["plain"], row["bits"], row["stochastic"])
        return function(*state, *inputs, *constants, *ring)

    def check(self, steps: int) -> None:
        state, ring = clones(self.state), Ring(*clones(self.ring))
        for _ in range(steps):
            inputs = self.inputs()
            y = self.step(launch.ssm_update, self.state, self.ring, inputs)
            assert y is not None
            expected = self.step(ops.ssm_update_reference, state, ring, inputs)
            assert_same(self.state, state)
            assert_same(self.ring, ring)
            tolerance = max(Y_TOLERANCE, torch.finfo(y.dtype).eps)
            assert (y - expected).abs().max() <= tolerance * expected.abs().max()


def clones(tensors: Any) -> list[Any]:
    return [None if tensor is None else tensor.clone() for tensor in tensors]


def assert_same(found: Any, wanted: Any) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"batch": 1},
        {"ngroups": 1},
        {"ngroups": 4},
        {"headdim": 5, "dstate": 20},
        {"headdim": 20, "dstate": 256},
        {"dstate": 33, "bits": 8},
        {"dstate": 256, "bits": 8, "dynamic": False},
        {"dstate": 12, "bits": 2},
        {"flush_interval": 2},
        {"flush_interval": 16, "ring": torch.int8},
        {"ring": torch.float32, "plain": True},
        {"dtype": torch.bfloat16},
        {"headdim": 64, "dstate": 128, "nheads": 24, "ngroups": 1},
    ],
    ids=lambda change: "-".join(f"{name}={value}" for name, value in change.items()) or "base",
)
def test_equals_reference(change: dict[str, Any]) -> None:
    Problem(**change).check(steps=18)


def test_every_instruction_set(isa: str) -> None:
    Problem().check(steps=12)
    Problem(bits=8, dynamic=False, stochastic=True, dstate=33, ring=torch.int8).check(steps=12)


@pytest.mark.parametrize("core", CORES)
def test_tuned_for_every_core(monkeypatch: pytest.MonkeyPatch, core: str) -> None:
    monkeypatch.setattr(build, "core", lambda: core)
    launch.kernel.cache_clear()
    try:
        Problem().check(steps=12)
    finally:
        launch.kernel.cache_clear()


def test_without_vpdpbusd(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "vnni_flags", lambda isa: ())
    check_every_width()


@pytest.mark.parametrize("isa", [isa for isa in build.available_isas() if build.vnni_flags(isa)], indirect=True)
def test_with_vpdpbusd(isa: str) -> None:
    check_every_width()


def check_every_width() -> None:
    launch.kernel.cache_clear()
    Problem().check(steps=12)
    Problem(bits=2, dstate=12).check(steps=12)
    Problem(bits=8, dstate=256, dynamic=False).check(steps=12)


@pytest.mark.parametrize(
    "bits, dynamic, ring", list(itertools.product(quant.STATE_BITS, (True, False), (torch.bfloat16, torch.int8)))
)
def test_no_code_differs_after_64_steps(bits: int, dynamic: bool, ring: torch.dtype) -> None:
    Problem(bits=bits, dynamic=dynamic, stochastic=True, ring=ring, flush_interval=4).check(steps=64)


def test_the_slots_after_the_position_are_not_read() -> None:
    clean, poisoned = Problem(), Problem()
    for tensor in (poisoned.ring.x, poisoned.ring.B, poisoned.ring.decay):
        for b, position in enumerate(poisoned.ring.position.tolist()):
            tensor[b, position:] = torch.nan
    for _ in range(9):
        inputs = clean.inputs()
        y = clean.step(launch.ssm_update, clean.state, clean.ring, inputs)
        assert torch.equal(y, clean.step(launch.ssm_update, poisoned.state, poisoned.ring, inputs))
    assert_same(clean.state, poisoned.state)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("ring", [torch.bfloat16, torch.int8])
def test_what_is_not_finite_shows_at_once_and_stays(bad: float, ring: torch.dtype) -> None:
    problem = Problem(batch=1, flush_interval=4, ring=ring)
    x, *rest = problem.inputs()
    x = x.clone()
    x[0, 1, 2] = bad
    inputs: tuple[Any, ...] = (x, *rest)
    for _ in range(9):
        y = problem.step(launch.ssm_update, problem.state, problem.ring, inputs)
        assert not y[0, 1, 2].isfinite() and y[0, 0].isfinite().all()
        inputs = problem.inputs()


def test_threads_do_not_change_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    one, many = Problem(), Problem()
    for _ in range(9):
        inputs = one.inputs()
        monkeypatch.setattr(launch, "PARALLEL_ELEMENTS", 2**40)
        y = one.step(launch.ssm_update, one.state, one.ring, inputs)
        monkeypatch.setattr(launch, "PARALLEL_ELEMENTS", 1)
        assert torch.equal(y, many.step(launch.ssm_update, many.state, many.ring, inputs))
    assert_same(one.state, many.state)
    assert_same(one.ring, many.ring)


def test_op_is_declared_truthfully() -> None:
    problem = Problem(batch=2, ring=torch.int8)
    arguments = (*problem.state, *problem.inputs(), problem.calibrated, True, 4, False, *problem.ring)
    torch.library.opcheck(torch.ops.qmamba.ssm_update.default, arguments)
