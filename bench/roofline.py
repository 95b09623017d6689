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

from qmamba_compile.errors import ConfigError
from qmamba_compile.triton_templates import compiled, tuning

_out = rich.console.Console(width=140)


@dataclasses.dataclass(frozen=True)
class Model:
    """The sizes of a Mamba2 model that its decode step depends on."""

    layers: int
    d_model: int
    nheads: int
    headdim: int
    dstate: int
    ngroups: int
    vocabulary: int

    @property
    def linears(self) -> list[tuple[int, int, int]]:
        """(outputs, inputs, how many) of the linears of one step."""
        d_inner = self.nheads * self.headdim
        in_proj = 2 * d_inner + 2 * self.ngroups * self.dstate + self.nheads
        return [
            (in_proj, self.d_model, self.layers),
            (self.d_model, d_inner, self.layers),
            (self.vocabulary, self.d_model, 1),
        ]


MODELS = {
    "130M": Model(24, 768, 24, 64, 128, 1, 50288),
    "2.7B": Model(64, 2560, 80, 64, 128, 1, 50288),
    "Codestral-7B": Model(64, 4096, 128, 64, 128, 8, 32768),
    # The Mamba2 layers of Nemotron-H-8B; its attention and MLP layers are not counted.
    "Nemotron-H-8B": Model(24, 4096, 128, 64, 128, 8, 131072),
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A kind of state."""

    name: str
    bits: int | None
    dynamic: bool = False
    stochastic: bool = False
    state_dtype: str = "float32"

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
    )
}

TENSOR_RATES = {
    "sm_80": (312e12, 624e12),
    "sm_86": (111e12, 222e12),
    "sm_89": (362e12, 733e12),
    "sm_90": (989e12, 1979e12),
    "sm_100": (2250e12, 4500e12),
    "gfx942": (1307e12, 2615e12),
}
"""Dense bf16 and int8 matrix operations a second, from the vendors' datasheets of the GPUs in `tuning.GPUS`."""

HALF_RATE = ("LOP3", "LEA", "IADD3", "SHF", "FMNMX", "FMNMX3", "SEL", "FSEL", "ISETP", "FSETP", "PRMT", "MOV", "VIADD")
"""Of NVIDIA's instructions those of the integer pipe, 16 lanes of each of a unit's four quarters."""

EIGHTH_RATE = ("MUFU", "F2F", "I2F", "F2I", "FRND")
"""And those of the special-function pipe, 4 lanes of each quarter."""


def step_bytes(model: Model, variant: Variant, batch: int, input_bytes: int = 2) -> int:
    """Bytes that one layer's step must move: state and scales read and written, inputs read, y written."""
    heads, elements = batch * model.nheads, batch * model.nheads * model.headdim * model.dstate
    moved = 2 * elements * variant.bits_per_element // 8
    if variant.bits is not None:
        moved += 2 * 2 * heads * model.headdim
        moved += 2 * 2 * heads * model.dstate if variant.dynamic else 2 * model.nheads * model.dstate
    moved += input_bytes * (2 * heads * model.headdim + heads + 2 * batch * model.ngroups * model.dstate)
    return moved


def step_roofs(target: str, model: Model, variant: Variant, batch: int) -> dict[str, Any]:
    """Roofs of one layer's step in seconds, with the counts behind them."""
    gpu = tuning.GPUS[target]
    heads = batch * model.nheads
    spec = tuning.ssm_update(
        target,
        heads,
        model.headdim,
        model.dstate,
        variant.bits,
        variant.dynamic,
        variant.stochastic,
        state_dtype=variant.state_dtype,
    )
    facts = compiled.ssm_update_facts(spec)
    warps = heads * spec.row_blocks * spec.warps
    cycle = 1 / (gpu.units * gpu.issue * gpu.clock)
    moved = step_bytes(model, variant, batch)
    roofs = {"memory": moved / gpu.memory, "issue": warps * facts.instructions * cycle}
    if target.startswith("sm_"):
        half = sum(count for name, count in facts.mix.items() if name in HALF_RATE)
        eighth = sum(count for name, count in facts.mix.items() if name in EIGHTH_RATE)
        roofs |= {"integer pipe": 2 * warps * half * cycle, "special functions": 8 * warps * eighth * cycle}
    bound = max(roofs, key=lambda name: roofs[name])
    lanes = tuning.LANES.get(target, 32)
    float_kinds = ("FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2", "v_pk_", "v_fma", "v_mul_f", "v_add_f")
    floats = sum(count for name, count in facts.mix.items() if name.startswith(float_kinds))
    elements = spec.rows * spec.dstate / (lanes * spec.warps)
    return {
        "kernel": spec.slug(),
        "bytes": moved,
        "instructions_per_element": facts.instructions / elements,
        "float_instructions_per_element": floats / elements,
        "other_instructions_per_element": (facts.instructions - floats) / elements,
        "seconds": roofs,
        "bound": bound,
        "lower_bound_seconds": roofs[bound],
    }


def linear_seconds(target: str, model: Model, batch: int, int8: bool) -> float:
    """Lower bound of all linears of one decode step: weights read once, products at the datasheet's rate."""
    memory, rates = tuning.GPUS[target].memory, TENSOR_RATES[target]
    total = 0.0
    for outputs, inputs, count in model.linears:
        seconds_of_bytes = outputs * inputs * (1 if int8 else 2) / memory
        total += count * max(seconds_of_bytes, 2 * batch * outputs * inputs / rates[int8])
    return total


def table(target: str, model_name: str, batch: int) -> dict[str, Any]:
    """All variants of one architecture, model and batch.

    Raises:
        ConfigError: an architecture, model or batch that is not known.
    """
    if target not in tuning.GPUS:
        raise ConfigError(f"target={target!r} has no published figures here; use one of {tuple(tuning.GPUS)}")
    if model_name not in MODELS:
        raise ConfigError(f"model={model_name!r} is not known; use one of {tuple(MODELS)}")
    if batch < 1:
        raise ConfigError(f"batch={batch} is not allowed; use 1 or more")
    model = MODELS[model_name]
    rows = {name: step_roofs(target, model, variant, batch) for name, variant in VARIANTS.items()}
    step = {name: linear_seconds(target, model, batch, name.startswith("int")) for name in rows}
    return {
        "gpu": tuning.GPUS[target].name,
        "target": target,
        "model": model_name,
        "batch": batch,
        "step": rows,
        "decode_lower_bound_seconds": {
            name: step[name] + model.layers * row["lower_bound_seconds"] for name, row in rows.items()
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


def main(
    target: Annotated[list[str] | None, typer.Option(help="Architecture; may be repeated. Default: all.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Model; may be repeated. Default: 2.7B.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Batch; may be repeated. Default: 1, 64.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures there.")] = None,
) -> None:
    """Lower bounds from bytes, compiled instructions and published peaks. "decode" adds the linears, int8 or bf16."""
    try:
        results = [
            table(one_target, one_model, one_batch)
            for one_target in target or list(tuning.GPUS)
            for one_model in model or ["2.7B"]
            for one_batch in batch or [1, 64]
        ]
    except ConfigError as problem:
        raise typer.BadParameter(str(problem)) from None
    for result in results:
        _print(result)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(results, indent=1))
    _out.print("On paper: published peaks, compiled instructions, no latency, no launch. Nothing was measured.")


if __name__ == "__main__":
    typer.run(main)
