"""``python -m bench.roofline``: the generated GPU kernels against the published peaks of GPUs, on paper.

Bytes are counted from the tensors of a step, instructions from compiled code; neither needs a GPU. The time of a roof
is a lower bound: the largest of the roofs is what the kernel would take if nothing else stood in its way. No figure
here was measured.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import rich.console
import rich.table
import typer

from bench import cli
from bench.shapes import STEP_SHAPES, Shape
from qmamba_compile.errors import ConfigError
from qmamba_compile.triton_templates import compiled, tuning
from qmamba_compile.triton_templates.specs import lanes_of
from qmamba_compile.triton_templates.state_specs import StateSpec

_out = rich.console.Console(width=140)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A kind of state; with ``flush_interval`` > 1 a checkpointed one, whose ring holds inputs of ``ring_bits``."""

    name: str
    bits: int | None
    dynamic: bool = False
    stochastic: bool = False
    state_dtype: str = "float32"
    flush_interval: int = 1
    ring_bits: int = 16

    @property
    def bits_per_element(self) -> int:
        return self.bits or {"float32": 32, "bfloat16": 16}[self.state_dtype]


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("float32", None),
        Variant("bfloat16", None, state_dtype="bfloat16"),
        Variant("int8 calibrated", 8),
        Variant("int4 calibrated", 4),
        Variant("int4 dynamic", 4, dynamic=True),
        Variant("int4 stochastic", 4, stochastic=True),
        Variant("int4 every 8", 4, flush_interval=8),
        Variant("int4 dynamic every 8", 4, dynamic=True, flush_interval=8),
    )
}

TENSOR_RATES = {
    "sm_80": (312e12, 624e12),
    "sm_86": (111e12, 222e12),
    "sm_89": (362e12, 733e12),
    "sm_90": (989e12, 1979e12),
    "sm_100": (2250e12, 4500e12),
    "sm_120": (210e12, 838e12),
    "gfx942": (1307e12, 2615e12),
    "gfx950": (2517e12, 5033e12),
}
"""Dense bf16 and int8 matrix operations a second, from the vendors' datasheets of the GPUs in `tuning.GPUS`."""

HALF_RATE = ("LOP3", "LEA", "IADD3", "SHF", "FMNMX", "FMNMX3", "SEL", "FSEL", "ISETP", "FSETP", "PRMT", "MOV", "VIADD")
"""Of NVIDIA's instructions those of the integer pipe, 16 lanes of each of a unit's four quarters."""

WIDE_INTEGERS = ("sm_120",)
"""Architectures whose integer pipe has all 32 lanes of a quarter (NVIDIA's whitepaper of RTX Blackwell)."""

EIGHTH_RATE = ("MUFU", "F2F", "I2F", "F2I", "FRND")
"""And those of the special-function pipe, 4 lanes of each quarter."""

FLOAT_KINDS = ("FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2", "v_pk_", "v_fma", "v_mul_f", "v_add_f")
"""How names of float32 sums and products begin."""


def step_bytes(model: Shape, variant: Variant, batch: int, position: int | None = None, input_bytes: int = 2) -> float:
    """Bytes that one layer's step must move: state and scales read and written, inputs read, y written.

    A checkpointed state is written by the step that finds ``position`` = flush_interval - 1 inputs in the ring. Each
    step reads those that are there, and each but that one appends its own. ``position=None``: the mean over a cycle.
    """
    interval = variant.flush_interval
    if position is None:
        return sum(step_bytes(model, variant, batch, at, input_bytes) for at in range(interval)) / interval
    heads, elements = batch * model.nheads, batch * model.nheads * model.headdim * model.dstate
    stores = position == interval - 1
    moved = (1 + stores) * elements * variant.bits_per_element // 8
    if variant.bits is not None:
        moved += (1 + stores) * 2 * heads * model.headdim
        moved += (1 + stores) * 2 * heads * model.dstate if variant.dynamic else 2 * model.nheads * model.dstate
    if interval > 1:
        # dt * x, B and the sum of dt * A of a step; int8 has a scale a head besides.
        slot = (heads * model.headdim + batch * model.ngroups * model.dstate) * variant.ring_bits // 8
        slot += 4 * heads * (1 + (variant.ring_bits == 8))
        moved += (position + (not stores)) * slot
        # Position and number of stores of each sequence: read by the step, and counted on after it.
        moved += batch * (4 + 2 * (4 + 8))
    return moved + input_bytes * (2 * heads * model.headdim + heads + 2 * batch * model.ngroups * model.dstate)


def cycle_share(model: Shape, bits: int, flush_interval: int, ring_bits: int, batch: int) -> float:
    """Bytes of a calibrated state's step, averaged over a cycle of ``flush_interval`` steps, over those of L = 1."""
    cycle = Variant("", bits, flush_interval=flush_interval, ring_bits=ring_bits)
    return step_bytes(model, cycle, batch) / step_bytes(model, Variant("", bits), batch)


def spec_of(target: str, model: Shape, variant: Variant, batch: int) -> StateSpec:
    """The kernel of one layer's step."""
    return tuning.ssm_update(
        target,
        batch * model.nheads,
        model.headdim,
        model.dstate,
        variant.bits,
        variant.dynamic,
        variant.stochastic,
        state_dtype=variant.state_dtype,
        flush_interval=variant.flush_interval,
    )


def step_roofs(target: str, model: Shape, variant: Variant, batch: int) -> dict[str, Any]:
    """Roofs of one layer's step in seconds, with the counts behind them; means over a cycle of a checkpointed state."""
    spec = spec_of(target, model, variant, batch)
    interval = variant.flush_interval
    lanes = lanes_of(target)
    elements = spec.rows * spec.dstate / lanes
    seconds: dict[str, float] = {}
    bound = instructions = floats = 0.0
    for position in range(interval):
        stores = None if interval == 1 else position == interval - 1
        facts = compiled.ssm_update_facts(spec, stores)
        # Of one program.
        warps = spec.warps_of(stores)
        programs = batch * model.nheads * spec.row_blocks
        roofs = _roofs(target, facts, programs * warps, step_bytes(model, variant, batch, position))
        for name, roof in roofs.items():
            seconds[name] = seconds.get(name, 0.0) + roof / interval
        # Each layer's step is a launch of its own, at its own position of the ring.
        bound += max(roofs.values()) / interval
        instructions += warps * facts.instructions / interval
        floats += warps * sum(count for name, count in facts.mix.items() if name.startswith(FLOAT_KINDS)) / interval
    return {
        "kernel": spec.slug(),
        "bytes": step_bytes(model, variant, batch),
        "instructions_per_element": instructions / elements,
        "float_instructions_per_element": floats / elements,
        "other_instructions_per_element": (instructions - floats) / elements,
        "seconds": seconds,
        "bound": max(seconds, key=lambda name: seconds[name]),
        "lower_bound_seconds": bound,
    }


def _roofs(target: str, facts: compiled.Facts, warps: float, moved: float) -> dict[str, float]:
    gpu = tuning.GPUS[target]
    cycle = 1 / (gpu.units * gpu.issue * gpu.clock)
    roofs = {"memory": moved / gpu.memory, "issue": warps * facts.instructions * cycle}
    if target.startswith("sm_"):
        half = sum(count for name, count in facts.mix.items() if name in HALF_RATE)
        eighth = sum(count for name, count in facts.mix.items() if name in EIGHTH_RATE)
        roofs |= {"special functions": 8 * warps * eighth * cycle}
        if target not in WIDE_INTEGERS:
            roofs |= {"integer pipe": 2 * warps * half * cycle}
    return roofs


CYCLES = (2, 4, 8, 16)
"""Values of flush_interval whose bytes are compared."""


def linear_seconds(target: str, model: Shape, batch: int, int8: bool) -> float:
    """Lower bound of all linears of one decode step: weights read once, products at the datasheet's rate."""
    memory, rates = tuning.GPUS[target].memory, TENSOR_RATES[target]
    total = 0.0
    for linear in model.linears:
        weights = linear.out_features * linear.in_features
        total += linear.count * max(weights * (1 if int8 else 2) / memory, 2 * batch * weights / rates[int8])
    return total


def table(target: str, model_name: str, batch: int) -> dict[str, Any]:
    """All variants of one architecture, model and batch.

    Raises:
        ConfigError: an architecture, model or batch that is not known.
    """
    if target not in tuning.GPUS:
        raise ConfigError(f"target={target!r} has no published figures here; use one of {tuple(tuning.GPUS)}")
    if model_name not in STEP_SHAPES:
        raise ConfigError(f"model={model_name!r} is not known; use one of {tuple(STEP_SHAPES)}")
    if batch < 1:
        raise ConfigError(f"batch={batch} is not allowed; use 1 or more")
    model = STEP_SHAPES[model_name]
    rows = {name: step_roofs(target, model, variant, batch) for name, variant in VARIANTS.items()}
    step = {name: linear_seconds(target, model, batch, name.startswith("int")) for name in rows}
    return {
        "gpu": tuning.GPUS[target].name,
        "target": target,
        "model": model_name,
        "batch": batch,
        "step": rows,
        "cycle_share_of_bytes": {
            f"L={interval}, {ring_bits}-bit ring": cycle_share(model, 4, interval, ring_bits, batch)
            for interval in CYCLES
            for ring_bits in (16, 8)
        },
        "decode_lower_bound_seconds": {
            name: step[name] + model.n_layers * row["lower_bound_seconds"] for name, row in rows.items()
        },
    }


def _print(result: dict[str, Any]) -> None:
    title = f"{result['gpu']} ({result['target']}), {result['model']}, batch {result['batch']}: one layer's ssm_update"
    view = rich.table.Table(title=title, title_justify="left", box=None, title_style="bold")
    columns = ("state", "MB", "instr/elem", "of them float", "memory us", "issue us", "bound by", "over bf16", "decode")
    for column in columns:
        view.add_column(column, justify="left" if column in ("state", "bound by") else "right")
    rows = result["step"]
    base, base_decode = rows["bfloat16"]["lower_bound_seconds"], result["decode_lower_bound_seconds"]["bfloat16"]
    for name, row in rows.items():
        view.add_row(
            name,
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['instructions_per_element']:.1f}",
            f"{row['float_instructions_per_element']:.1f}",
            f"{row['seconds']['memory'] * 1e6:.2f}",
            f"{row['seconds']['issue'] * 1e6:.2f}",
            row["bound"],
            f"{base / row['lower_bound_seconds']:.2f}x",
            f"{base_decode / result['decode_lower_bound_seconds'][name]:.2f}x",
        )
    _out.print(view)
    shares = ", ".join(f"{name} {share:.3f}" for name, share in result["cycle_share_of_bytes"].items())
    _out.print(f"int4 calibrated, bytes a step over those of L=1: {shares}\n")


def main(
    target: Annotated[list[str] | None, typer.Option(help="Architecture; may be repeated. Default: all.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Model; may be repeated. Default: 2.7b.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Batch; may be repeated. Default: 1, 64.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures there.")] = None,
) -> None:
    """Lower bounds from bytes, compiled instructions and published peaks. "decode" adds the linears, int8 or bf16."""
    cli.require_place(json_path)
    results = [
        table(one_target, one_model, one_batch)
        for one_target in target or list(tuning.GPUS)
        for one_model in model or ["2.7b"]
        for one_batch in batch or [1, 64]
    ]
    for result in results:
        _print(result)
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=1))
    _out.print("On paper: published peaks, compiled instructions, no latency, no launch. Nothing was measured.")


if __name__ == "__main__":
    cli.run("roofline", main)
