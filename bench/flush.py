"""Which ``flush_interval``? What storing the state once in L steps does to accuracy, to its size, and to a step's time.

Accuracy is the perplexity of the recurrence on the held-out windows, float weights and dynamic scales, as an increase
over the float state on the same windows; the standard error is that of paired differences. The faithful scan behind it
keeps the inputs between two stores in float32, where a ring keeps them in 16 bits. Size counts all slots of the ring.
Time is one SSM step of all layers, averaged over a whole cycle; there is no kernel for 3 bits, which do not pack.
"""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from calibrate.cli import load_model
from calibrate.data import cut_windows, read_tokens
from calibrate.evaluate import score
from calibrate.recurrence import Recurrence, float_scan
from qmamba_compile import DSQState
from qmamba_compile.recurrence import new_ring

from . import cli
from .measure import Summary, interleave, speedup
from .outliers import Outliers
from .plot import require_matplotlib
from .record import console, machine_record
from .shapes import shape_named
from .ssm import Inputs, packed_step, variant

ROOT = Path(__file__).resolve().parents[1]
INTERVALS = (1, 2, 4, 8, 16)
BITS = (8, 4, 3, 2)


def main(
    model: Annotated[Path, typer.Option(help="A saved model.")] = ROOT / "demo" / "tiny-mamba2",
    text: Annotated[Path, typer.Option(help="Held-out text.")] = ROOT / "demo" / "heldout.txt",
    windows: Annotated[int, typer.Option(min=2)] = 96,
    length: Annotated[int, typer.Option(min=64)] = 1024,
    shape: cli.ShapeName = "130m",
    batch: cli.Batch = 8,
    repeats: cli.Repeats = 24,
    threads: cli.Threads = 1,
    json: cli.JsonFile = None,
    plot: cli.PlotFile = None,
) -> None:
    """Perplexity, bits an element and time for every L and every number of bits."""
    if plot is not None:
        require_matplotlib(plot)
    torch.set_num_threads(threads or torch.get_num_threads())
    results: dict[str, Any] = {"machine": machine_record(), "windows": windows, "length": length}
    with torch.no_grad():
        results["accuracy"] = _accuracy(model, text, windows, length)
        results["time"] = _time(shape, batch, repeats)
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(json_format.dumps(results, indent=1) + "\n")
    if plot is not None:
        draw(results, plot)


def _accuracy(path: Path, text: Path, windows: int, length: int) -> list[dict[str, Any]]:
    model = load_model(str(path))
    ids = cut_windows(read_tokens(str(text), str(path), model), length)[:windows]
    reference = score(model, ids, float_scan)
    outliers = Outliers.random(model)
    mixer = model.backbone.layers[0].mixer
    extents = (1, mixer.num_heads, mixer.head_dim)
    rows = []
    for bits in BITS:
        for interval in INTERVALS:
            run = Recurrence(bits, flush_interval=interval)
            natural, error = score(model, ids, run).increase_over(reference)
            injected, injected_error = score(model, ids, outliers.around(run)).increase_over(reference)
            rows.append(
                {
                    "bits": bits,
                    "flush_interval": interval,
                    "increase": natural,
                    "error": error,
                    "increase_outliers": injected,
                    "error_outliers": injected_error,
                    "bits_per_element": bits_per_element(bits, interval, extents, mixer.n_groups, mixer.ssm_state_size),
                }
            )
            console.print(
                f"{bits} bits, L={interval:2}: {natural:+.3%} +- {error:.3%}, with outliers {injected:+.3%} "
                f"+- {injected_error:.3%}, {rows[-1]['bits_per_element']:.2f} bits an element"
            )
    return rows


def bits_per_element(bits: int, interval: int, extents: tuple[int, int, int], ngroups: int, dstate: int) -> float:
    """Of a dynamic state with its ring. 3-bit codes, which fill no bytes, count as if they did."""
    batch, nheads, headdim = extents
    ring = new_ring(batch, nheads, headdim, ngroups, dstate, interval) if interval > 1 else None
    packed_as = 4 if bits == 3 else bits
    state = DSQState.from_float(torch.zeros(batch, nheads, headdim, dstate), packed_as, ring=ring)
    return state.bits_per_element - packed_as + bits


def _time(shape: str, batch: int, repeats: int) -> list[dict[str, Any]]:
    inputs = Inputs(shape_named(shape), batch)
    fused, _, _ = variant("fused-float32", inputs)
    calls, rows = {"fused-float32": fused}, []
    for bits in (8, 4, 2):
        for interval in INTERVALS:
            calls[f"{bits}-{interval}"] = packed_step(inputs, bits, flush_interval=interval)
    samples = interleave(calls, rounds=repeats, block_seconds=0.02)
    for bits in (8, 4, 2):
        for interval in INTERVALS:
            own = samples[f"{bits}-{interval}"]
            ratio = speedup(samples["fused-float32"], own)
            microseconds = Summary.of(own).median / inputs.shape.n_layers * 1e6
            rows.append(
                {
                    "bits": bits,
                    "flush_interval": interval,
                    "shape": shape,
                    "batch": batch,
                    "microseconds_per_layer": microseconds,
                    "speedup": [ratio.value, ratio.low, ratio.high],
                }
            )
            console.print(
                f"{bits} bits, L={interval:2}: {microseconds:7.1f} us a layer, {ratio.value:.2f} "
                f"({ratio.low:.2f} - {ratio.high:.2f}) times a fused float32 loop"
            )
    return rows


def draw(results: dict[str, Any], path: Path) -> None:
    """Accuracy against size, and time against L."""
    pyplot = require_matplotlib(path)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.6))
    for bits in BITS:
        rows = [row for row in results["accuracy"] if row["bits"] == bits]
        sizes = [row["bits_per_element"] for row in rows]
        costs = [max(100 * row["increase"], 0.01) for row in rows]
        (line,) = left.plot(sizes, costs, marker="o", label=f"{bits} bits")
        with_outliers = [max(100 * row["increase_outliers"], 0.01) for row in rows]
        left.plot(sizes, with_outliers, marker="x", linestyle=":", color=line.get_color())
        for row, size, cost in zip(rows, sizes, costs, strict=True):
            left.annotate(f"L={row['flush_interval']}", (size, cost), fontsize=7)
        timed = [row for row in results["time"] if row["bits"] == bits]
        if timed:
            right.plot(
                [row["flush_interval"] for row in timed],
                [row["speedup"][0] for row in timed],
                marker="o",
                color=line.get_color(),
                label=f"{bits} bits",
            )
    left.set(yscale="log", xlabel="bits an element, ring included", ylabel="perplexity increase, % (dotted: outliers)")
    right.set(xscale="log", xlabel="flush_interval L", ylabel="times faster than a fused float32 loop")
    right.set_xticks(INTERVALS, [str(interval) for interval in INTERVALS])
    for axis in (left, right):
        axis.legend()
        axis.grid(alpha=0.3)
    machine = results["machine"]
    figure.suptitle(f"{machine['processor']}, {machine['threads']} threads", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    cli.run("flush", main)
