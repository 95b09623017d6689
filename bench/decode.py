"""How long does one decode step take, and how close to the memory roof is it?

Every variant continues the same random prompt; its logits of several steps are compared with eager float32 before
anything is timed. Weights (and at larger batches the state) are larger than the caches, so each step reads them anew.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from . import cli, record
from .measure import Gate, Work
from .shapes import shape_named
from .variants import AGAINST, EAGER, OURS, Models, Runner, choose, linear_ops, random_ids, restore, state_bytes
from .variants import with_options as variants_with

CHECKED_STEPS = 8
PROFILED_STEPS = 20
LEAST_PROFILED = 0.001
"""Share of a step below which an operator is not listed."""

# Two compilations of some 40 s each; their answer at batch 1 does not change with the batch.
_BATCH_1_ONLY = ("inductor-float32-freezing", "inductor-bfloat16", "ours-w8a8h4-flush1-stochastic")


def main(
    shape: cli.ShapeName = "130m",
    batch: cli.Batches = "1,8,32",
    variants: cli.Variants = "",
    option: cli.Options = [],  # noqa: B006  (typer reads it, nobody writes to it)
    repeats: cli.Repeats = 15,
    threads: cli.Threads = 0,
    profile: Annotated[
        bool, typer.Option("--profile", help="List where the time of one variant of ours goes.")
    ] = False,
    json: cli.JsonFile = None,
    plot: cli.PlotFile = None,
) -> None:
    """Seconds of one decode step of a whole model, variants interleaved. Usual set: all at batch 1, fewer beyond."""
    dimensions = shape_named(shape)
    known = variants_with(option)
    batches = cli.parse_numbers(batch, "--batch")
    chosen = choose(variants, known)
    arguments = {"shape": shape, "batch": batches, "variants": chosen, "repeats": repeats}
    torch._dynamo.config.recompile_limit = 64
    with torch.no_grad(), cli.recording("decode", arguments, threads=threads, json=json, plot=plot) as found:
        models = Models(dimensions)
        if profile:
            _profile(found, Runner(known[chosen[-1] if option else OURS], models), batches[0])
            return
        runners = {name: Runner(known[name], models) for name in [EAGER, *chosen]}
        for size in batches:
            names = [n for n in chosen if variants or size == 1 or n not in _BATCH_1_ONLY]
            _measure(found, models, {name: runners[name] for name in dict.fromkeys([EAGER, *names])}, size, repeats)
            torch._dynamo.reset()


def _measure(found: record.Record, models: Models, runners: Mapping[str, Runner], batch: int, repeats: int) -> None:
    checked = random_ids(models.shape, batch, CHECKED_STEPS, seed=2)
    calls: dict[str, Callable[[], Any]] = {}
    gates: dict[str, Gate] = {}
    work: dict[str, Work] = {}
    values: dict[str, dict[str, float]] = {}
    reference: Tensor | None = None
    for name, runner in runners.items():
        with record.console.status(f"compiling and checking {name}, batch {batch}"):
            cache = runner.cache(batch)
            saved = copy.deepcopy(cache)
            with runner.compiling():
                logits = _logits(runner, checked, cache)
            restore(cache, saved)
            reference = logits if reference is None else reference
        gates[name] = Gate.of(logits, reference, runner.variant.tolerance)
        calls[name] = functools.partial(runner.step, checked[:, :1].contiguous(), cache)
        held = state_bytes(cache)
        ops = {f"{runner.variant.arithmetic}_ops": linear_ops(runner.model, batch)}
        work[name] = Work(runner.weight_bytes, held, **ops)
        values[name] = {"weights MB": runner.weight_bytes / 1e6, "state MB": held / 1e6}
    group = {"shape": models.shape.name, "batch": batch}
    # A recompilation inside a timed step would be measured as if it were one.
    with torch.compiler.set_stance("fail_on_recompile"):
        cli.compare(
            found, group, calls, gates, work, repeats=repeats, against=AGAINST, block_seconds=0.1, values=values
        )


def _logits(runner: Runner, ids: Tensor, cache: Any) -> Tensor:
    """[b, steps, vocab] of one step after the other."""
    return torch.stack([runner.step(token.contiguous(), cache).float() for token in ids.split(1, dim=1)], dim=1)


def _profile(found: record.Record, runner: Runner, batch: int) -> None:
    """Operators and generated kernels of a decode step by their own time, the profiler's share included."""
    ids, cache = random_ids(runner.shape, batch, 1, seed=2), runner.cache(batch)
    with torch._inductor.config.patch({"cpp.enable_kernel_profile": True}), record.console.status("compiling"):
        for _ in range(3):
            runner.step(ids, cache)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(PROFILED_STEPS):
            runner.step(ids, cache)
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    group = {"shape": runner.shape.name, "batch": batch, "variant": runner.variant.name}
    rows = [record.Row(group, "whole step", values={"us a step": total / PROFILED_STEPS, "% of the step": 100.0})]
    for event in events:
        own = event.self_cpu_time_total
        if own < total * LEAST_PROFILED:
            break
        values = {
            "us a step": own / PROFILED_STEPS,
            "% of the step": 100 * own / total,
            "calls a step": event.count / PROFILED_STEPS,
            "us a call": own / event.count,
        }
        rows.append(record.Row(group, _shortened(event.key), values=values))
    found.add(rows)
    record.print_rows(rows)


def _shortened(name: str, width: int = 72) -> str:
    """A generated kernel is named after all it fuses, and told from its like by the number at the end."""
    return name if len(name) <= width else f"{name[: width - 15]}...{name[-12:]}"


if __name__ == "__main__":
    cli.run("decode", main)
