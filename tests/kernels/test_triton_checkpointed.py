"""The generated Triton step on a checkpointed state, in Triton's interpreter and as compiled code."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_cpu_ssm_update import Problem
from test_triton_ssm_update import SMALL, Y_TOLERANCE, poisoned_launch

from qmamba_compile import ops, recurrence
from qmamba_compile.errors import ConfigError
from qmamba_compile.triton_templates import compiled, launch, tuning
from qmamba_compile.triton_templates.render import Spec, load, render


def check(change: dict[str, Any], flush_interval: int, steps: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """Kernel and reference side by side, each on its own state and ring; sequences store at different steps."""
    problem = Problem(**SMALL | change)
    row = problem.row
    sizes = (row["batch"], row["nheads"], row["headdim"], row["ngroups"], row["dstate"])
    ring = recurrence.new_ring(*sizes, flush_interval, dtype=dtype)
    ring.position.copy_(torch.arange(row["batch"]) % flush_interval)
    state, wanted_state = problem.state, [None if t is None else t.clone() for t in problem.state]
    wanted_ring = recurrence.Ring(*(None if t is None else t.clone() for t in ring))
    options = (problem.calibrated, row["dt_softplus"], row["bits"], row["stochastic"])
    stored = 0
    for _ in range(steps):
        inputs = problem.inputs()
        before = state[0].clone()
        full = ring.position == flush_interval - 1
        y = poisoned_launch(*state, *inputs, *options, ring)
        expected = ops.ssm_update_reference(*wanted_state, *inputs, *options, *wanted_ring)
        stored += int(full.sum())
        assert torch.equal(state[0][~full], before[~full])
        for found, wanted in zip((*state, *ring), (*wanted_state, *wanted_ring), strict=True):
            assert found is None or torch.equal(found, wanted)
        tolerance = max(Y_TOLERANCE, torch.finfo(y.dtype).eps if y.dtype != torch.float32 else 0.0)
        assert (y - expected).abs().max() <= tolerance * expected.abs().max()
    assert stored >= row["batch"]


@pytest.mark.parametrize(
    "change, flush_interval",
    [
        ({}, 4),
        ({"dynamic": False}, 4),
        ({"batch": 3, "dynamic": False}, 2),
        ({"batch": 2, "ngroups": 2, "headdim": 5, "dstate": 24, "dynamic": False}, 3),
        ({"bits": 8}, 4),
        ({"bits": 2, "dynamic": False}, 3),
        ({"stochastic": True, "batch": 2}, 3),
        ({"strided": True, "dtype": torch.bfloat16}, 3),
        ({"D": False, "dt_bias": False, "dynamic": False}, 3),
    ],
    ids=str,
)
def test_equals_reference(interpreted: Callable[..., Any], change: dict[str, Any], flush_interval: int) -> None:
    interpreted(check, change, flush_interval, 2 * flush_interval + 1)


def test_float32_ring(interpreted: Callable[..., Any]) -> None:
    interpreted(check, {"dynamic": False}, 3, 7, torch.float32)


def check_one_step_interval() -> None:
    """Storing at every step is the state without a ring, bit for bit."""
    problem = Problem(**SMALL)
    plain = [None if t is None else t.clone() for t in problem.state]
    ring = recurrence.new_ring(1, 2, 8, 1, 32, 1)
    for _ in range(3):
        inputs = problem.inputs()
        y = poisoned_launch(*problem.state, *inputs, None, True, 4, False, ring)
        assert torch.equal(y, poisoned_launch(*plain, *inputs, None, True, 4, False))
        assert all(torch.equal(a, b) for a, b in zip(problem.state, plain, strict=True))


def test_an_interval_of_one_step_is_no_ring(interpreted: Callable[..., Any]) -> None:
    interpreted(check_one_step_interval)


def check_pool() -> None:
    problem = Problem(**SMALL | {"batch": 3})
    ring = recurrence.new_ring(3, 2, 8, 1, 32, 3)
    ring.position.copy_(torch.tensor([2, 0, 1]))
    before = [t.clone() for t in (*problem.state, *ring[:4])]
    inputs = [t[:2] if i in (0, 1, 3, 4) else t for i, t in enumerate(problem.inputs())]
    options = (None, True, 4, False)
    poisoned_launch(*problem.state, *inputs, *options, ring, slots=torch.tensor([2, -1]))
    wanted = [t[2:].clone() for t in before]
    first = [t[:1] if i in (0, 1, 3, 4) else t for i, t in enumerate(inputs)]
    ops.ssm_update_reference(*wanted[:4], *first, *options, *wanted[4:])
    for tensor, old, new in zip((*problem.state, *ring[:4]), before, wanted, strict=True):
        assert torch.equal(tensor[:2], old[:2]) and torch.equal(tensor[2:], new)


def test_slots_of_a_pool(interpreted: Callable[..., Any]) -> None:
    interpreted(check_pool)


@pytest.mark.parametrize(
    "change, flush_interval",
    [
        ({}, 4),
        ({"dynamic": False}, 4),
        ({"batch": 3, "dynamic": False, "dtype": torch.bfloat16}, 2),
        ({"batch": 2, "ngroups": 2, "nheads": 4, "headdim": 5, "dstate": 24, "dynamic": False}, 3),
        # Rows of a head in several programs, which share the scale of its inputs.
        ({"headdim": 64, "dstate": 16, "nheads": 1, "dynamic": False}, 3),
        ({"bits": 8, "stochastic": True, "strided": True}, 3),
        ({"bits": 2, "D": False, "dt_bias": False}, 3),
    ],
    ids=str,
)
def test_int8_ring(interpreted: Callable[..., Any], change: dict[str, Any], flush_interval: int) -> None:
    interpreted(check, change, flush_interval, 2 * flush_interval + 1, torch.int8)


def check_broken_int8_ring() -> None:
    """NaN and infinity show in the scale of the ring; its codes are 0, as the reference's."""
    problem = Problem(**SMALL)
    ring = recurrence.new_ring(1, 2, 8, 1, 32, 3, dtype=torch.int8)
    wanted_state = [None if t is None else t.clone() for t in problem.state]
    wanted_ring = [None if t is None else t.clone() for t in ring]
    for place, value in ((0, torch.nan), (3, torch.inf)):
        inputs = [None if t is None else t.clone() for t in problem.inputs()]
        inputs[place][0, 0, 1] = value
        poisoned_launch(*problem.state, *inputs, None, True, 4, False, ring)
        ops.ssm_update_reference(*wanted_state, *inputs, None, True, 4, False, *wanted_ring)
        for found, wanted in zip(ring, wanted_ring, strict=True):
            assert torch.equal(found.nan_to_num(7.0), wanted.nan_to_num(7.0))
    assert ring.scale is not None and ring.scale.isnan().any() and ring.scale.isfinite().any()


def test_an_int8_ring_shows_what_is_not_finite(interpreted: Callable[..., Any]) -> None:
    interpreted(check_broken_int8_ring)


def check_ring_without_scale() -> None:
    problem = Problem(**SMALL)
    ring = recurrence.new_ring(1, 2, 8, 1, 32, 3, dtype=torch.int8)._replace(scale=None)
    assert launch.ssm_update(*problem.state, *problem.inputs(), None, True, 4, False, ring) is None


def test_an_int8_ring_without_scale_is_refused(interpreted: Callable[..., Any]) -> None:
    interpreted(check_ring_without_scale)


def loops(assembly: str) -> list[list[str]]:
    """Instruction names of each loop of a SASS listing, by the branches that go back."""
    body: list[str] = []
    labels: dict[str, int] = {}
    found = []
    for line in assembly.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label[1]] = len(body)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", line):
            body.append(instruction[1])
            target = re.search(r"`\((\.L_x_\d+)\)", instruction[2])
            if instruction[1].startswith("BRA") and target and target[1] in labels:
                found.append(body[labels[target[1]] :])
    return found


@pytest.mark.parametrize("ring_bits", [16, 8])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_a_reading_step_takes_half_the_instructions(target: str, ring_bits: int) -> None:
    """Of the loop over a state's tiles; 0.48 of the storing step's on sm_90 when the bound was set."""
    types, constants = compiled.ssm_update_signature()
    kept = "*bf16" if ring_bits == 16 else "*i8"
    types |= {"ring_x": kept, "ring_B": kept, "ring_decay": "*fp32", "ring_position": "*i32", "ring_scale": "*fp32"}
    found = {}
    for interval in (1, 8):
        bits = ring_bits if interval > 1 else 16
        spec = tuning.ssm_update(target, 64 * 80, 64, 128, 4, False, False, flush_interval=interval, ring_bits=bits)
        kernel = compiled.compile_kernel(load(spec), "ssm_update", types, constants, target, spec.warps)
        facts = compiled.facts(kernel)
        assert facts.spills == 0 and facts.local_accesses == 0 and facts.registers <= 168
        # The first loop with 16-byte loads is the read step's, where there is one.
        loop = next(loop for loop in loops(compiled.disassemble(kernel)) if count(loop, "LDG") > 0)
        assert (count(loop, "STG") == 0) == (interval > 1)
        rows = spec.tile * (READ_TILES if interval > 1 else 1)
        found[interval] = len(loop) / (rows * spec.dstate / 32)
    assert found[8] <= 0.55 * found[1], found


def count(loop: list[str], name: str) -> int:
    """16-byte accesses of a kind in a loop."""
    return sum(instruction.startswith(name) and "128" in instruction.split(".") for instruction in loop)


def test_an_int8_ring_compiles_for_amd() -> None:
    types, constants = compiled.ssm_update_signature()
    types |= {"ring_x": "*i8", "ring_B": "*i8", "ring_decay": "*fp32", "ring_position": "*i32", "ring_scale": "*fp32"}
    spec = tuning.ssm_update("gfx942", 64 * 80, 64, 128, 4, False, False, flush_interval=8, ring_bits=8)
    kernel = compiled.compile_kernel(load(spec), "ssm_update", types, constants, "gfx942", spec.warps)
    facts = compiled.facts(kernel)
    assert facts.spills == 0 and facts.local_accesses == 0 and facts.registers <= 256


@pytest.mark.parametrize("change", [{"ring_bits": 4, "flush_interval": 2}, {"ring_bits": 8}])
def test_spec_refuses(change: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="ring_bits"):
        Spec(64, 128, 4, **change)  # type: ignore[arg-type]


def test_a_state_without_a_ring_renders_none() -> None:
    plain = tuning.ssm_update("interpreter", 1, 8, 32, 4, False, False)
    assert "ring" not in render(plain)
    assert "ring" in render(dataclasses.replace(plain, flush_interval=2))
