"""The generated scan in Triton's interpreter, against the op in torch; and the way to mamba-ssm's kernels."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qmamba_compile import ops
from qmamba_compile.triton_templates import compiled, launch_scan, tuning
from qmamba_compile.triton_templates.render import load

TOLERANCE = 3e-5
"""Of the largest value: float32 sums in another order, and decays as differences of other partial sums."""

BASE: dict[str, Any] = {
    "batch": 1,
    "seqlen": 100,
    "nheads": 2,
    "headdim": 16,
    "dstate": 16,
    "ngroups": 1,
    "D": True,
    "dt_bias": True,
    "dt_softplus": True,
    "initial": False,
    "limits": (0.0, float("inf")),
    "dtype": torch.float32,
    "dtype_of_C": None,
    "by_channels": False,
    "parts": 1,
}


def arguments(change: dict[str, Any]) -> tuple[Any, ...]:
    row = BASE | change
    generator = torch.Generator().manual_seed(0)
    batch, seqlen, nheads, headdim = row["batch"], row["seqlen"], row["nheads"], row["headdim"]
    groups, dstate = row["ngroups"], row["dstate"]

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    # As in the model: views of one projection, or of a convolution's output [b, d, l].
    sizes = [nheads * headdim, groups * dstate, groups * dstate, nheads]
    projection = randn(batch, seqlen, sum(sizes)).to(row["dtype"])
    if row["by_channels"]:
        projection = projection.transpose(1, 2).contiguous().transpose(1, 2)
    x, B, C, dt = projection.split(sizes, dim=-1)
    C = C.to(row["dtype_of_C"] or C.dtype)
    dt = dt if row["dt_softplus"] else dt.abs() / 4
    return (
        x.unflatten(-1, (nheads, headdim)),
        dt,
        -torch.rand(nheads, generator=generator) * 4,
        B.unflatten(-1, (groups, dstate)),
        C.unflatten(-1, (groups, dstate)),
        randn(nheads) if row["D"] else None,
        randn(nheads) - 2 if row["dt_bias"] else None,
        randn(batch, nheads, headdim, dstate) if row["initial"] else None,
        row["dt_softplus"],
        *row["limits"],
    )


def check(change: dict[str, Any]) -> None:
    inputs = arguments(change)
    empty, parts = torch.empty, tuning.scan_parts
    torch.empty = lambda *a, **k: empty(*a, **k).fill_(torch.nan)
    tuning.scan_parts = lambda *_: (BASE | change)["parts"]
    try:
        found = launch_scan.chunk_scan(*inputs)
    finally:
        torch.empty, tuning.scan_parts = empty, parts
    assert found is not None
    for result, expected in zip(found, ops.chunk_scan(*inputs), strict=True):
        assert result.dtype == expected.dtype and result.shape == expected.shape
        assert (result - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"seqlen": 1},
        {"seqlen": 64},
        {"seqlen": 129, "batch": 2},
        {"ngroups": 2, "nheads": 4},
        {"headdim": 40, "dstate": 24},
        {"headdim": 80, "dstate": 256, "seqlen": 40},
        {"D": False, "dt_bias": False},
        {"dt_softplus": False, "dt_bias": False},
        {"initial": True},
        {"limits": (0.05, 0.2)},
        {"dtype": torch.bfloat16},
        {"by_channels": True},
        {"by_channels": True, "seqlen": 77, "headdim": 40, "dstate": 24, "ngroups": 2, "nheads": 4, "batch": 2},
        {"by_channels": True, "dtype": torch.bfloat16, "initial": True},
        {"dtype": torch.bfloat16, "dtype_of_C": torch.float32},
        {"parts": 2},
        {"parts": 3, "seqlen": 129, "initial": True, "batch": 2, "ngroups": 2, "nheads": 4},
        {"parts": 4, "seqlen": 128, "headdim": 80, "dstate": 24, "initial": True},
        {"parts": 3, "seqlen": 70, "headdim": 40, "dstate": 24, "by_channels": True, "dtype": torch.bfloat16},
    ],
    ids=lambda change: "-".join(f"{name}={value}" for name, value in change.items()) or "base",
)
def test_equals_the_op(interpreted: Callable[..., Any], change: dict[str, Any]) -> None:
    interpreted(check, change)


def test_a_scan_in_two_parts_is_one_scan(interpreted: Callable[..., Any]) -> None:
    inputs = arguments({"seqlen": 90})
    whole, state = interpreted(launch_scan.chunk_scan, *inputs)
    first = [t[:, :50] if i in (0, 1, 3, 4) else t for i, t in enumerate(inputs)]
    second = [t[:, 50:] if i in (0, 1, 3, 4) else t for i, t in enumerate(inputs)]
    y_first, between = interpreted(launch_scan.chunk_scan, *first)
    second[7] = between
    y_second, end = interpreted(launch_scan.chunk_scan, *second)
    assert (torch.cat([y_first, y_second], dim=1) - whole).abs().max() <= TOLERANCE * whole.abs().max()
    assert (end - state).abs().max() <= TOLERANCE * state.abs().max()


# What is None in the only launch of a whole sequence, and in the first and second of one in parts.
LAUNCHES = {
    "whole": ("part_states", "part_decays"),
    "states": ("y", "initial_state", "final_state"),
    "parts": (),
}


@pytest.mark.parametrize("absent", LAUNCHES.values(), ids=LAUNCHES)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles_without_spills(target: str, absent: tuple[str, ...]) -> None:
    spec = tuning.chunk_scan(target, 64, 128)
    states = ("initial_state", "final_state", "part_states")
    types_ = dict.fromkeys(("x", "dt", "B", "C"), "*bf16")
    types_ |= dict.fromkeys(("A", "D", "dt_bias", "y", "part_decays", *states), "*fp32")
    types_ |= dict.fromkeys(("dt_min", "dt_max"), "fp32")
    types_ |= dict.fromkeys(("seqlen", "part_length", "heads_per_group"), "i32")
    module = load(spec)
    types_ |= {name: "i32" for name in module.chunk_scan.arg_names if "stride" in name}
    constants = {"dt_stride_h": 1, "DT_SOFTPLUS": True, "PRECISION": "tf32"} | dict.fromkeys(absent)
    kernel = compiled.compile_kernel(
        module, "chunk_scan", types_, constants, target, spec.warps, stages=launch_scan.SCAN_STAGES
    )
    found = compiled.facts(kernel)
    assert found.spills == 0 and found.local_accesses == 0
    assert found.shared_bytes <= (64 if target == "gfx942" else 99) * 1024
    if target.startswith("sm_"):
        # As many programs at once as `scan_parts` counts on.
        registers = -(-found.registers // 8) * 8 * 32 * spec.warps
        assert tuning.SCAN_PROGRAMS * registers <= tuning.GPUS[target].registers
        assert tuning.SCAN_PROGRAMS * (found.shared_bytes + 1024) <= 164 * 1024


def test_parts_fill_a_gpu_and_no_more() -> None:
    # One sequence of 4096 tokens and 80 heads on 132 units; of 24 heads; a batch that fills it; a short prompt.
    assert tuning.scan_parts("sm_90", 80, 128) == 3
    assert tuning.scan_parts("sm_90", 24, 128) == 11
    assert tuning.scan_parts("sm_90", 640, 128) == 1
    assert tuning.scan_parts("sm_90", 24, 7) == 1


def test_mamba_ssm_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its name stubbed: what is handed over and what comes back."""
    inputs = arguments({"limits": (0.05, 0.2), "dtype": torch.bfloat16})
    seen: dict[str, Any] = {}

    def scan(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seen.update(kwargs, args=args)
        return inputs[0], torch.ones(1, 2, 16, 16, dtype=torch.float64)

    module = types.ModuleType("mamba_ssm.ops.triton.ssd_combined")
    module.mamba_chunk_scan_combined = scan  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(launch_scan.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(launch_scan, "target", lambda *_: "sm_90")
    launch_scan._mamba_ssm_scan.cache_clear()
    found = launch_scan.chunk_scan(*inputs)
    launch_scan._mamba_ssm_scan.cache_clear()
    assert found is not None
    assert found[0].dtype == torch.float32 and found[1].dtype == torch.float32
    assert seen["dt_limit"] == (0.05, 0.2) and seen["return_final_states"] and seen["initial_states"] is None
    assert seen["args"][:5] == inputs[:5] and seen["D"] is inputs[5] and seen["dt_bias"] is inputs[6]
