"""How long does compilation take, and does a second process find everything in the cache?

Each variant compiles a prefill and a decode step in a fresh process with an empty cache directory, then again in
another process with the directory that the first one filled.
"""

from __future__ import annotations

import tempfile
from typing import Annotated

import torch
import typer

from . import cli
from .measure import Gate, Summary, checked_speedup
from .record import Record, Row, console, print_rows
from .shapes import shape_named
from .variants import EAGER, INDUCTOR, OURS, choose, with_options
from .worker import ask


def main(
    shape: cli.ShapeName = "130m",
    batch: cli.Batch = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 2048,
    variants: cli.Variants = f"{INDUCTOR},{OURS}",
    option: cli.Options = [],  # noqa: B006  (typer reads it, nobody writes to it)
    repeats: Annotated[int, typer.Option(min=1, help="Cold and warm compilations of each variant.")] = 1,
    threads: cli.Threads = 0,
    json: cli.JsonFile = None,
    plot: cli.PlotFile = None,
) -> None:
    """Seconds to compile prefill and decode, cold and from a warm cache, in fresh processes."""
    shape_named(shape)
    known = with_options(option)
    chosen = [name for name in choose(variants, known) if name != EAGER]
    arguments = {"shape": shape, "batch": batch, "length": length, "variants": chosen, "repeats": repeats}
    with cli.recording("compile", arguments, threads=threads, json=json, plot=plot, roof=False) as found:
        task = {"shape": shape, "batch": batch, "length": length, "threads": torch.get_num_threads(), "option": option}
        answers: dict[tuple[str, str], list[dict]] = {}
        try:
            for _ in range(repeats):
                for name in chosen:
                    with tempfile.TemporaryDirectory(prefix="bench-inductor-") as folder:
                        for cache in ("cold", "warm"):
                            with console.status(f"{name}, {cache} cache"):
                                answer = ask("compile_times", {**task, "variant": name}, folder)
                            answers.setdefault((cache, name), []).append(answer)
        finally:
            _report(found, {"shape": shape, "batch": batch, "length": length}, answers)


def _report(found: Record, group: dict[str, object], answers: dict[tuple[str, str], list[dict]]) -> None:
    totals = {key: [sum(answer["seconds"].values()) for answer in given] for key, given in answers.items()}
    gates = {
        key: Gate(max(max(answer["errors"].values()) for answer in given), given[0]["tolerance"])
        for key, given in answers.items()
    }
    rows = []
    for (cache, name), given in sorted(answers.items(), key=lambda item: item[0][0]):
        base, key = (cache, INDUCTOR), (cache, name)
        speedups = {}
        if name != INDUCTOR and base in totals:
            paired = min(len(totals[base]), len(totals[key]))  # an interrupted round lacks one of them
            speedups[INDUCTOR] = checked_speedup(totals[base][:paired], gates[base], totals[key][:paired], gates[key])
        last = given[-1]
        values = {f"{phase} s": seconds for phase, seconds in last["seconds"].items()}
        values |= {f"cache {kind}": last[kind] for kind in ("hits", "misses", "bypassed")}
        time = Summary.of(totals[key])
        rows.append(Row({**group, "cache": cache}, name, time, gate=gates[key], speedups=speedups, values=values))
    found.add(rows)
    print_rows(rows)


if __name__ == "__main__":
    cli.run("compile", main)
