"""How does time grow with work? Decode with the tokens generated and with the batch, prefill with the length."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
import typer

from . import cli
from .measure import Gate, Summary, interleave
from .record import Record, Row, console, print_rows
from .shapes import shape_named
from .variants import EAGER, OURS, Models, Runner, choose, random_ids, with_options

TOKENS, BATCH, LENGTH = "tokens generated", "batch", "prompt length"

_WINDOW = 100
"""Steps around a mark whose times make one point of the curve over tokens generated."""


def main(
    shape: cli.ShapeName = "130m",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate, one after the other.")] = 20_000,
    batch: cli.Batches = "1,2,4,8,16,32",
    length: Annotated[str, typer.Option(help="Prompt lengths, separated by commas.")] = "128,512,2048,8192",
    variants: cli.Variants = OURS,
    option: cli.Options = [],  # noqa: B006  (typer reads it, nobody writes to it)
    repeats: cli.Repeats = 7,
    threads: cli.Threads = 0,
    json: cli.JsonFile = None,
    plot: cli.PlotFile = None,
) -> None:
    """Seconds of decode against tokens generated and batch, and of prefill against length."""
    dimensions = shape_named(shape)
    known = with_options(option)
    batches, lengths = cli.parse_numbers(batch, "--batch"), cli.parse_numbers(length, "--length")
    chosen = choose(variants, known)
    arguments = {
        "shape": shape,
        "tokens": tokens,
        "batch": batches,
        "length": lengths,
        "variants": chosen,
        "repeats": repeats,
    }
    torch._dynamo.config.recompile_limit = 64
    with torch.no_grad(), cli.recording("cost", arguments, threads=threads, json=json, plot=plot, roof=False) as found:
        models = Models(dimensions)
        reference = Runner(known[EAGER], models)
        for name in chosen:
            _tokens(found, Runner(known[name], models), reference, tokens)
            torch._dynamo.reset()
        # One graph for all batches and one for all lengths, as in a service.
        for name in chosen:
            _batches(found, Runner(known[name], models, dynamic=None), reference, batches, repeats)
            torch._dynamo.reset()
            _lengths(found, Runner(known[name], models, dynamic=None), reference, lengths, repeats)
            torch._dynamo.reset()


def _tokens(found: Record, runner: Runner, reference: Runner, tokens: int) -> None:
    """Every step is timed; a point is the median of the steps around it."""
    cache, ids = runner.cache(1), random_ids(runner.shape, 1, 1, seed=2)
    with console.status(f"compiling {runner.variant.name}"), runner.compiling():
        logits = runner.step(ids, cache)
    gate = Gate.of(logits.float(), reference.step(ids, reference.cache(1)), runner.variant.tolerance)
    seconds: list[float] = []
    try:
        with console.status(f"{runner.variant.name} generates {tokens} tokens"):
            for _ in range(tokens):
                began = time.perf_counter()
                logits = runner.step(ids, cache)
                seconds.append(time.perf_counter() - began)
                ids = logits.argmax(dim=-1, keepdim=True)
    finally:
        points = {at: seconds[max(0, at - _WINDOW) : at] for at in _marks(len(seconds))}
        _add(found, runner, TOKENS, "token", points, gate)


def _marks(tokens: int) -> list[int]:
    """Where the curve over ``tokens`` has its points: ten, evenly spread, the first after one window."""
    first = min(_WINDOW, tokens)
    return sorted({int(at) for at in np.linspace(first, tokens, 10)}) if tokens else []


def _batches(found: Record, runner: Runner, reference: Runner, batches: Sequence[int], repeats: int) -> None:
    calls: dict[int, Callable[[], Any]] = {}
    gates: list[Gate] = []
    for batch in batches:
        cache, ids = runner.cache(batch), random_ids(runner.shape, batch, 1, seed=2)
        with console.status(f"compiling {runner.variant.name}, batch {batch}"), runner.compiling():
            logits = runner.step(ids, cache).float()
        gates.append(Gate.of(logits, reference.step(ids, reference.cache(batch)), runner.variant.tolerance))
        calls[batch] = functools.partial(runner.step, ids, cache)
    _time(found, runner, BATCH, "step", calls, gates, repeats)


def _lengths(found: Record, runner: Runner, reference: Runner, lengths: Sequence[int], repeats: int) -> None:
    calls: dict[int, Callable[[], Any]] = {}
    gates: list[Gate] = []
    for length in lengths:
        ids = random_ids(runner.shape, 1, length, seed=3)
        with console.status(f"compiling {runner.variant.name}, {length} tokens"), runner.compiling():
            logits = runner.prefill(ids)[0].float()
        # Twice: the second length compiles a graph for all lengths, which the first one may then run.
        with runner.compiling():
            runner.prefill(ids)
        gates.append(Gate.of(logits, reference.prefill(ids)[0], runner.variant.tolerance))
        calls[length] = functools.partial(runner.prefill, ids)
    _time(found, runner, LENGTH, "prompt", calls, gates, repeats)


def _time(
    found: Record,
    runner: Runner,
    against: str,
    unit: str,
    calls: Mapping[int, Callable[[], Any]],
    gates: Sequence[Gate],
    repeats: int,
) -> None:
    samples: dict[str, list[float]] = {}
    try:
        with console.status(f"timing {runner.variant.name} against {against}"):
            named = {str(at): call for at, call in calls.items()}
            interleave(named, rounds=repeats, block_seconds=0.05, samples=samples)
    finally:
        worst = max(gates, key=lambda gate: gate.error)
        _add(found, runner, against, unit, {int(at): taken for at, taken in samples.items()}, worst)


def _add(
    found: Record, runner: Runner, against: str, unit: str, points: Mapping[int, Sequence[float]], gate: Gate
) -> None:
    """One row a point, and what its time is a token."""
    rows = []
    for at, samples in sorted(points.items()):
        group = {"shape": runner.shape.name, "against": against, "unit": unit}
        summary = Summary.of(samples)
        share = 1 if against == TOKENS else at
        values = {"at": at, "ms a token": summary.median * 1e3 / share}
        rows.append(Row(group, runner.variant.name, summary, gate=gate, values=values))
    found.add(rows)
    print_rows(rows)
    if len(rows) > 1:
        ends = [Summary.of(points[at]).median for at in (min(points), max(points))]
        console.print(f"{against} {min(points)} to {max(points)}: time x {ends[1] / ends[0]:.3f}")


if __name__ == "__main__":
    cli.run("cost", main)
