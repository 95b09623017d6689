"""How fast is one SSM step on a packed state, against Inductor and against an equally fused float32 loop of our own?

One call runs through as many states as the model has layers, so that each is as cold as in a model. The float
variants run the function of transformers that the model's own decode step runs; the packed ones call our operator from
one graph compiled by Inductor, as a model does. Timed is Inductor's code for that graph, called without Dynamo
(`compile_graph`), for all variants alike. libc is left as it is: that it maps a large tensor anew for each of
Inductor's temporaries is what Inductor's code costs its user. The layers of ``flush8`` variants are at different
positions of their rings, as in a model, so that one call stores an eighth of all states.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from qmamba_compile import DSQState, ops
from qmamba_compile.cpu_templates.call_site import inductor_options
from qmamba_compile.cpu_templates.launch import ssm_update_float
from qmamba_compile.recurrence import RING_DTYPES, new_ring

from . import cli
from .compiled import compile_graph
from .measure import Gate, Work
from .record import Record, console
from .shapes import Shape, shape_named

EAGER = "eager-float32"
INDUCTOR = "inductor-float32"
FUSED = "fused-float32"
OURS_REFERENCE = "ours-h4-torch-reference"
VARIANTS = (
    EAGER,
    INDUCTOR,
    FUSED,
    "ours-h8",
    "ours-h4",
    "ours-h4-stochastic",
    "ours-h4-calibrated",
    "ours-h8-calibrated",
    "ours-h4-flush8",
    "ours-h4-calibrated-flush8",
    "ours-h4-calibrated-flush8-ring8",
    OURS_REFERENCE,
)

_FLUSH_INTERVAL = 8
CHECKED_STEPS = 4
# Requantizing a random normal state CHECKED_STEPS times leaves 1 % of noise at 8 bits, 11 % at 4 and 17 % at 4 when
# rounded stochastically.
_EXACT, _H8, _H4 = 1e-5, 0.02, 0.3


def main(
    shape: cli.ShapeName = "130m",
    batch: cli.Batches = "1,8,32",
    variants: cli.Variants = "",
    layers: Annotated[
        int, typer.Option(min=0, help="Layers; 0 is all of the shape. Float states of 2.7b, batch 32, take 84 MB each.")
    ] = 0,
    repeats: cli.Repeats = 15,
    threads: cli.Threads = 0,
    json: cli.JsonFile = None,
    plot: cli.PlotFile = None,
) -> None:
    """Seconds of one SSM step of all layers, from conv output and dt to y."""
    dimensions = shape_named(shape)
    if layers:
        dimensions = dataclasses.replace(dimensions, n_layers=layers)
    batches = cli.parse_numbers(batch, "--batch")
    chosen = list(dict.fromkeys([EAGER, *cli.choose(variants, VARIANTS)]))
    arguments = {"shape": shape, "batch": batches, "variants": chosen, "repeats": repeats}
    torch._dynamo.config.recompile_limit = 64
    with torch.no_grad(), cli.recording("ssm", arguments, threads=threads, json=json, plot=plot) as found:
        for size in batches:
            _measure(found, dimensions, size, chosen, repeats)
            torch._dynamo.reset()


class Inputs:
    """What a mixer hands to its SSM step, of random values; one set for all layers."""

    def __init__(self, shape: Shape, batch: int) -> None:
        generator = torch.Generator().manual_seed(0)
        normal = functools.partial(torch.randn, generator=generator)
        self.shape, self.batch = shape, batch
        self.x = normal(batch, shape.nheads, shape.headdim)
        self.dt = normal(batch, shape.nheads)
        self.A = -torch.arange(1.0, shape.nheads + 1)
        self.B = normal(batch, shape.ngroups, shape.dstate)
        self.C = normal(batch, shape.ngroups, shape.dstate)
        self.D = torch.ones(shape.nheads)
        self.dt_bias = normal(shape.nheads) - 4
        state = normal(batch, shape.nheads, shape.headdim, shape.dstate)
        self.states = [state.roll(layer, dims=1).contiguous() for layer in range(shape.n_layers)]


Step = Callable[[], list[Tensor]]


def _measure(found: Record, shape: Shape, batch: int, chosen: Sequence[str], repeats: int) -> None:
    inputs = Inputs(shape, batch)
    calls: dict[str, Step] = {}
    gates: dict[str, Gate] = {}
    work: dict[str, Work] = {}
    reference: Tensor | None = None
    for name in chosen:
        with console.status(f"compiling and checking {name}, batch {batch}"):
            calls[name], held, tolerance = variant(name, inputs)
            y = torch.stack([torch.stack(calls[name]()) for _ in range(CHECKED_STEPS)])
        reference = y if reference is None else reference
        gates[name] = Gate.of(y, reference, tolerance)
        work[name] = _work(name, held)
    group = {"shape": shape.name, "layers": shape.n_layers, "batch": batch}
    cli.compare(found, group, calls, gates, work, repeats=repeats, against=(INDUCTOR, FUSED), block_seconds=0.05)


def _work(name: str, held: int) -> Work:
    """A step that stores everything rewrites it; one of `_FLUSH_INTERVAL` does so, the others only read."""
    stored = held // _FLUSH_INTERVAL if "flush8" in name else held
    return Work(read=held - stored, updated=stored)


def variant(name: str, inputs: Inputs) -> tuple[Step, int, float]:
    """One step of all layers on states of its own, the bytes of these states, and the tolerance of its output."""
    states = [state.clone() for state in inputs.states]
    held = sum(state.nbytes for state in states)
    i = inputs
    if name == EAGER:
        return lambda: _transformers_step(inputs, states), held, _EXACT
    if name == INDUCTOR:
        return _without_dynamo(functools.partial(_transformers_step, inputs), states), held, _EXACT
    if name == FUSED:
        arguments = (i.x, i.dt, i.A, i.B, i.C, i.D, i.dt_bias, True)
        return lambda: [_written(ssm_update_float(state, *arguments)) for state in states], held, _EXACT
    bits = 8 if name.startswith("ours-h8") else 4  # "flush8" has an h8 in it as well
    packed = _packed_states(
        inputs,
        bits,
        calibrated="calibrated" in name,
        stochastic=name.endswith("stochastic"),
        flush_interval=_FLUSH_INTERVAL if "flush8" in name else 1,
        ring_bits=8 if name.endswith("ring8") else 16,
    )
    held = sum(state.packed_nbytes for state in packed)
    if name == OURS_REFERENCE:
        layers = _layer_arguments(packed, inputs)
        return lambda: _all_layers(ops.ssm_update_reference, layers), held, _H4
    return _compiled_step(packed, inputs), held, _H8 if bits == 8 else _H4


def packed_step(inputs: Inputs, bits: int, *, flush_interval: int) -> Step:
    """One step of all layers on dynamically scaled states of their own."""
    return _compiled_step(_packed_states(inputs, bits, flush_interval=flush_interval), inputs)


def _compiled_step(states: list[DSQState], inputs: Inputs) -> Step:
    """The operator for each layer, called as a compiled model calls it: from the code of one graph of Inductor's."""
    step = functools.partial(_all_layers, torch.ops.qmamba.ssm_update.default)
    return _without_dynamo(step, _layer_arguments(states, inputs), **inductor_options())


def _without_dynamo(step: Callable[[Any], list[Tensor]], layers: list[Any], **options: Any) -> Step:
    run, inputs = compile_graph(step, layers, **options)
    return lambda: run(*inputs)


def _packed_states(
    inputs: Inputs,
    bits: int,
    *,
    calibrated: bool = False,
    stochastic: bool = False,
    flush_interval: int = 1,
    ring_bits: int = 16,
) -> list[DSQState]:
    shape, packed = inputs.shape, []
    for layer, state in enumerate(inputs.states):
        scale = state.abs().amax(dim=(0, 2)) if calibrated else None
        ring = None
        if flush_interval > 1:
            extents = (inputs.batch, shape.nheads, shape.headdim, shape.ngroups, shape.dstate, flush_interval)
            ring = new_ring(*extents, dtype=RING_DTYPES[ring_bits], start=layer % flush_interval)
        packed.append(DSQState.from_float(state, bits, state_scale=scale, stochastic=stochastic, ring=ring))
    return packed


def _transformers_step(inputs: Inputs, states: list[Tensor]) -> list[Tensor]:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_selective_state_update

    i, shape = inputs, inputs.shape
    # Expanded as the mixer expands them.
    dt = i.dt[..., None].expand(-1, -1, shape.headdim)
    A = i.A[:, None, None].expand(-1, shape.headdim, shape.dstate)
    D = i.D[:, None].expand(-1, shape.headdim)
    dt_bias = i.dt_bias[:, None].expand(-1, shape.headdim)
    return [
        mamba2_selective_state_update(state, i.x, dt, A, i.B, i.C, D, dt_bias=dt_bias, dt_softplus=True)
        for state in states
    ]


def _all_layers(op: Callable[..., Tensor], layers: list[tuple[Any, ...]]) -> list[Tensor]:
    return [op(*arguments) for arguments in layers]


def _layer_arguments(states: list[DSQState], inputs: Inputs) -> list[tuple[Any, ...]]:
    """Arguments of the operator for each layer: tensors only, none of `DSQState`, as in a compiled model's graph."""
    i = inputs
    return [
        (
            s.packed,
            s.channel_scale,
            s.state_scale if s.dynamic else None,
            s.rng,
            i.x,
            i.dt,
            i.A,
            i.B,
            i.C,
            i.D,
            i.dt_bias,
            None if s.dynamic else s.state_scale,
            True,
            s.bits,
            s.stochastic,
            *(s.ring or ()),
        )
        for s in states
    ]


def _written(y: Tensor | None) -> Tensor:
    if y is None:
        raise RuntimeError("no C++ compiler: the fused float32 loop cannot be built; leave fused-float32 out")
    return y


if __name__ == "__main__":
    cli.run("ssm", main)
