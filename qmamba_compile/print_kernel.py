"""What ``qmamba render`` prints: the source that is generated for a kernel, or what a GPU's compiler made of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import rich.console
import rich.table

from .errors import ConfigError

GPU_KERNELS = (
    "ssm_update",
    "quantize_state",
    "dequantize_state",
    "chunk_scan",
    "w8a8_linear",
    "quantize_rows",
    "norm_quantize_rows",
    "causal_conv",
    "conv_update",
    "ssm_scan",
    "ssm_scan_backward",
)

GPU_ONLY = ("quantize_rows", "norm_quantize_rows")
"""On the CPU the linear's kernel does that itself."""

CPU_KERNELS = tuple(kernel for kernel in GPU_KERNELS if kernel not in GPU_ONLY)

_out = rich.console.Console(markup=False)


def print_cpu_kernel(
    kernel: str, target: str, scheme: tuple[int, int, int, bool, bool], checkpoint: tuple[int, int]
) -> None:
    """The C++ of a kernel for ``target``, ``cpu`` (this machine's) or an instruction set.

    Args:
        scheme: headdim, dstate, bits, dynamic, stochastic. checkpoint: flush_interval, ring_bits.
    """
    from .cpu_templates import build
    from .cpu_templates.render import render
    from .cpu_templates.specs import KERNELS, LAYER_KERNELS, LayerSpec, Spec

    assert {*KERNELS, *LAYER_KERNELS} == {*CPU_KERNELS}
    if kernel not in CPU_KERNELS:
        raise ConfigError(f"kernel={kernel!r} is not printed for CPUs; use one of {', '.join(CPU_KERNELS)}")
    isa = build.best_isa() if target == "cpu" else target
    headdim, dstate, *_ = scheme
    flush_interval, ring_bits = checkpoint
    if kernel in LAYER_KERNELS:
        sys.stdout.write(render(build.for_this_machine(LayerSpec(kernel, isa))))
        return
    if kernel == "chunk_scan":  # of a float state
        spec = Spec(kernel, headdim, dstate, None, False, False, isa)
    elif kernel == "ssm_update" and flush_interval > 1:
        spec = Spec(kernel, *scheme, isa, flush_interval, {16: "bfloat16", 8: "int8"}[ring_bits])
    else:
        spec = Spec(kernel, *scheme, isa)
    sys.stdout.write(render(build.for_this_machine(spec)))


def print_gpu_kernel(
    kernel: str,
    target: str,
    heads: int,
    scheme: tuple[int, int, int, bool, bool],
    checkpoint: tuple[int, int],
    linear: tuple[int, int, int],
    stats: bool,
) -> None:
    """The Triton source of a kernel for an architecture; with ``stats`` what its compiler made of it.

    Args:
        heads: batch * nheads. linear: rows, outputs, k. scheme, checkpoint: as for `print_cpu_kernel`.
    """
    from .triton_templates import compiled, tuning
    from .triton_templates.render import render
    from .triton_templates.specs import Spec, lanes_of, target_of
    from .triton_templates.state_specs import StateSpec

    target = target_of(target)
    headdim, dstate, bits, *_ = scheme
    choices: dict[str, Callable[[], Spec]] = {
        "ssm_update": lambda: tuning.ssm_update(
            target, heads, *scheme, flush_interval=checkpoint[0], ring_bits=checkpoint[1]
        ),
        "quantize_state": lambda: tuning.quantize_state(target, heads, *scheme),
        "dequantize_state": lambda: tuning.dequantize_state(target, heads, headdim, dstate, bits),
        "chunk_scan": lambda: tuning.chunk_scan(target, headdim, dstate),
        "w8a8_linear": lambda: tuning.w8a8_linear(target, *linear),
        "quantize_rows": lambda: tuning.quantize_rows(target, linear[2], None),
        "norm_quantize_rows": lambda: tuning.quantize_rows(target, linear[2], linear[2]),
        "causal_conv": lambda: tuning.causal_conv(target, 1, heads * headdim, 1024, 4, 2),
        "conv_update": lambda: tuning.conv_update(target, heads * headdim, 4, 4),
        "ssm_scan": lambda: tuning.ssm_scan(target, *scheme),
        "ssm_scan_backward": lambda: tuning.ssm_scan_backward(target, headdim, dstate),
    }
    assert tuple(choices) == GPU_KERNELS
    if kernel not in choices:
        raise ConfigError(f"kernel={kernel!r} is not printed for GPUs; use one of {', '.join(choices)}")
    spec = choices[kernel]()
    if not stats:
        sys.stdout.write(render(spec))
        return
    if not isinstance(spec, StateSpec):
        raise ConfigError(f"--stats counts instructions an element of a state; {kernel} has none")
    elements = spec.rows * spec.dstate / lanes_of(target)  # of a lane, were there one warp
    if kernel != "ssm_update" or spec.flush_interval == 1:
        found = compiled.ssm_update_facts(spec) if kernel == "ssm_update" else compiled.state_facts(spec)
        _print_facts(spec.slug(), found, elements / spec.warps, bits)
        return
    for stores, step in ((False, "only reads"), (True, "stores")):
        found = compiled.ssm_update_facts(spec, stores)
        _print_facts(f"{spec.slug()}, a step that {step}", found, elements / spec.warps_of(stores), bits)


def _print_facts(title: str, found: Any, elements: float, bits: int) -> None:
    """Args: found: `Facts` of a Triton kernel, each lane of which has so many ``elements`` of the state."""
    table = rich.table.Table(box=None, show_header=False)
    table.add_row("registers of a thread", str(found.registers))
    table.add_row("spilled bytes", str(found.spills))
    table.add_row("shared memory of a program", str(found.shared_bytes))
    table.add_row("instructions of a warp", str(found.instructions))
    table.add_row("instructions an element", f"{found.instructions / elements:.2f}")
    table.add_row("instructions a byte of the packed state", f"{found.instructions / elements * 8 / bits:.2f}")
    for (kind, width), count in sorted(found.accesses.items()):
        table.add_row(f"{width}-byte {kind}s of a warp", str(count))
    mix = [f"{name} {count}" for name, count in found.mix.items() if count >= elements / 16]
    table.add_row("most frequent", ", ".join(mix))
    _out.print(title, style="bold", soft_wrap=True)
    _out.print(table)
