"""The generated C++ scan of a prefill against the torch reference; test_ops.py holds it to a float64 loop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from qmamba_compile import ops
from qmamba_compile.cpu_templates import build, launch, launch_scan

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")

TOLERANCE = 2e-5
"""Of the largest value: float32 sums of up to 128 products in another order, exponentials of sums up to about 100."""

BASE: dict[str, Any] = {
    "batch": 2,
    "seqlen": 150,
    "nheads": 4,
    "headdim": 16,
    "dstate": 32,
    "ngroups": 1,
    "D": True,
    "start": True,
    "dtype": torch.float32,
    "strided": False,
}


@pytest.fixture(params=build.available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("QMAMBA_CPU_ISA", request.param)
    launch.kernel.cache_clear()
    yield request.param
    launch.kernel.cache_clear()


def problem(**row: Any) -> list[Tensor | None]:
    """x, dt, dtA, B, C, D, initial_state."""
    assert not set(row) - set(BASE)
    row = BASE | row
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    batch, seqlen, nheads, headdim = (row[name] for name in ("batch", "seqlen", "nheads", "headdim"))
    ngroups, dstate = row["ngroups"], row["dstate"]
    sizes = [nheads * headdim, ngroups * dstate, ngroups * dstate]
    xBC = randn(batch, seqlen, sum(sizes)).to(row["dtype"])
    if row["strided"]:  # as a convolution over time leaves it
        xBC = xBC.transpose(1, 2).contiguous().transpose(1, 2)
    x, B, C = xBC.split(sizes, dim=-1)
    dt = torch.nn.functional.softplus(randn(batch, seqlen, nheads) - 2)
    return [
        x.view(batch, seqlen, nheads, headdim),
        dt,
        dt * -torch.rand(nheads, generator=generator) * 16,
        B.view(batch, seqlen, ngroups, dstate),
        C.view(batch, seqlen, ngroups, dstate),
        randn(nheads) if row["D"] else None,
        randn(batch, nheads, headdim, dstate) if row["start"] else None,
    ]


def run(arguments: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    found = launch_scan.chunk_scan(*arguments)  # type: ignore[arg-type]
    assert found is not None
    return found


def assert_near(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], tolerance: float = TOLERANCE) -> None:
    for name, tensor, expected in zip(("y", "state"), found, wanted, strict=True):
        assert tensor.shape == expected.shape and tensor.dtype == torch.float32 and tensor.is_contiguous()
        error = (tensor - expected).abs().max() / expected.abs().max()
        assert error <= tolerance, f"{name} is off by {error}"


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"batch": 1, "nheads": 1, "seqlen": 1},
        {"seqlen": 3},
        {"seqlen": 64},
        {"seqlen": 65},
        {"ngroups": 2},
        {"nheads": 6, "ngroups": 3},
        {"headdim": 5, "dstate": 6},
        {"headdim": 1, "dstate": 1},
        {"headdim": 80, "dstate": 33},
        {"headdim": 128, "dstate": 20, "nheads": 2},
        {"D": False},
        {"start": False},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
        {"strided": True},
        {"strided": True, "dtype": torch.bfloat16, "batch": 1},
        {"headdim": 64, "dstate": 128, "nheads": 3, "seqlen": 256},
    ],
    ids=lambda change: "-".join(f"{name}={value}" for name, value in change.items()) or "base",
)
def test_equals_reference(change: dict[str, Any]) -> None:
    arguments = problem(**change)
    before = [None if tensor is None else tensor.clone() for tensor in arguments]
    assert_near(run(arguments), ops.chunk_scan_reference(*arguments))  # type: ignore[arg-type]
    assert all(a is None or torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


def test_every_instruction_set(isa: str) -> None:
    for change in ({}, {"headdim": 5, "dstate": 6}, {"headdim": 24, "dstate": 33, "seqlen": 70}):
        arguments = problem(**change)
        assert_near(run(arguments), ops.chunk_scan_reference(*arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize("cut", [1, 64, 100])
def test_two_parts_make_the_whole(cut: int) -> None:
    x, dt, dtA, B, C, D, initial = problem()
    whole = run([x, dt, dtA, B, C, D, initial])
    first_y, state = run([*(tensor[:, :cut] for tensor in (x, dt, dtA, B, C)), D, initial])  # type: ignore[index]
    rest_y, final = run([*(tensor[:, cut:] for tensor in (x, dt, dtA, B, C)), D, state])  # type: ignore[index]
    assert_near((torch.cat([first_y, rest_y], dim=1), final), whole)


def test_a_long_sequence_is_its_parts() -> None:
    """Beyond 16k tokens, where the sum of dt * A over the whole would be of no use in float32."""
    x, dt, dtA, B, C, D, initial = problem(batch=1, seqlen=20_001, nheads=2, headdim=4, dstate=8)
    whole = run([x, dt, dtA, B, C, D, initial])
    parts, state = [], initial
    for begin in range(0, 20_001, 2500):
        part = [tensor[:, begin : begin + 2500] for tensor in (x, dt, dtA, B, C)]  # type: ignore[index]
        y, state = ops.chunk_scan_reference(*part, D, state)
        parts.append(y)
    assert state is not None
    assert_near(whole, (torch.cat(parts, dim=1), state))


def test_strong_decay_forgets_and_no_decay_keeps() -> None:
    """exp of running sums from 0 to -64000: nothing overflows, and nothing comes back."""
    x, dt, dtA, B, C, D, initial = problem(seqlen=70)
    for rate in (0.0, -1e-30, -80.0, -1000.0):
        decay = torch.full_like(dtA, rate)  # type: ignore[arg-type]
        found = run([x, dt, decay, B, C, D, initial])
        assert_near(found, ops.chunk_scan_reference(x, dt, decay, B, C, D, initial))  # type: ignore[arg-type]


def test_what_is_not_finite_shows() -> None:
    arguments = problem(seqlen=70)
    x = arguments[0].clone()  # type: ignore[union-attr]
    clean_y, clean_state = run(arguments)
    x[0, 30, 1, 2] = torch.nan
    y, state = run([x, *arguments[1:]])
    assert y[0, 30:, 1, 2].isnan().all() and state[0, 1, 2].isnan().all()
    untouched = torch.ones(y.shape, dtype=torch.bool)
    untouched[0, :, 1, 2] = False
    assert torch.equal(y[untouched], clean_y[untouched])
    assert torch.equal(state[1], clean_state[1])


def test_threads_do_not_change_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = problem()
    monkeypatch.setattr(launch, "PARALLEL_ELEMENTS", 2**40)
    one = run(arguments)
    monkeypatch.setattr(launch, "PARALLEL_ELEMENTS", 1)
    many = run(arguments)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_the_operator_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, _, B, C, D, initial = problem()
    assert x is not None
    dt, A = torch.randn(x.shape[:3]), -torch.rand(x.shape[2])
    arguments = (x, dt, A, B, C, D, None, initial, True, 0.0, math.inf)
    fast = torch.ops.qmamba.chunk_scan(*arguments)
    calls = []
    monkeypatch.setattr(launch_scan, "chunk_scan", lambda *args: calls.append(1))
    assert_near(fast, torch.ops.qmamba.chunk_scan(*arguments))
    assert calls == [1]
