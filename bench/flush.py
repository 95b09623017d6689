"""Which ``flush_interval``? What storing the state once in L steps does to accuracy, to its size, and to a step's time.

Accuracy is the perplexity of the recurrence on the held-out windows, float weights, dynamic scales and those of an
artifact, as an increase over the float state on the same windows; the standard error is that of paired differences. The
faithful scan behind it keeps the inputs between two stores in float32, where a ring keeps them in 16 bits. Size counts
all slots of the ring.
Time is one SSM step of all layers, averaged over a whole cycle; there is no kernel for 3 bits, which do not pack.
"""

from __future__ import annotations

import dataclasses
import itertools
import json as json_format
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from calibrate.data import cut_windows, read_tokens, spread
from calibrate.evaluate import score
from calibrate.models import load_model
from calibrate.quantized_model import fit_artifact
from calibrate.recurrence import Recurrence, float_scan, mixers
from qmamba_compile import ConfigError, DSQState
from qmamba_compile.artifact import read_artifact
from qmamba_compile.recurrence import new_ring

from . import cli
from .draw import require_matplotlib
from .measure import Summary, interleave, speedup
from .outliers import Outliers
from .record import console, machine_record
from .shapes import shape_named
from .ssm import Inputs, packed_step, variant

ROOT = Path(__file__).resolve().parents[1]
INTERVALS = (1, 2, 4, 8, 16)
BITS = (8, 4, 3, 2)


def main(
    model: Annotated[Path, typer.Option(help="A saved model.")] = ROOT / "demo" / "tiny-mamba2",
    text: Annotated[Path, typer.Option(help="Held-out text.")] = ROOT / "demo" / "heldout.txt",
    calibration: Annotated[Path | None, typer.Option(help="Artifact whose scales are tried as well.")] = (
        ROOT / "demo" / "tiny-mamba2" / "calibration.safetensors"
    ),
    windows: Annotated[int, typer.Option(min=2, help="Held-out windows, spread over the text.")] = 64,
    length: Annotated[int, typer.Option(min=64)] = 1024,
    bits: Annotated[str, typer.Option(help="Which of 8, 4, 3, 2, for accuracy.")] = ",".join(map(str, BITS)),
    intervals: Annotated[str, typer.Option(help="Values of L, for accuracy.")] = ",".join(map(str, INTERVALS)),
    parts: Annotated[str, typer.Option(help="accuracy, time, or both; --json keeps the other part.")] = "accuracy,time",
    shape: cli.ShapeName = "130m",
    batch: cli.Batch = 8,
    repeats: cli.Repeats = 24,
    threads: cli.Threads = 1,
    json: cli.JsonFile = None,
    plot: cli.PlotFile = None,
) -> None:
    """Perplexity, bits an element and time for every L and every number of bits.

    Accuracy of 64 windows takes 6 minutes on one core, and does not care who else uses the machine; time does.
    """
    if plot is not None:
        require_matplotlib(plot)
    cli.require_place(json)
    widths, lengths = cli.parse_bits(bits), cli.parse_numbers(intervals, "--intervals")
    wanted = parts.split(",")
    if set(wanted) - {"accuracy", "time"}:
        raise ConfigError(f"--parts {parts} is not allowed; use accuracy, time, or both")
    torch.set_num_threads(threads or torch.get_num_threads())
    results: dict[str, Any] = json_format.loads(json.read_text()) if json is not None and json.exists() else {}
    with torch.no_grad():
        if "accuracy" in wanted:
            rows = _accuracy(model, text, calibration, windows, length, widths, lengths)
            results["accuracy"] = {"machine": machine_record(), "windows": windows, "length": length, "rows": rows}
        if "time" in wanted:
            rows = _time(shape, batch, repeats)
            results["time"] = {"machine": machine_record(), "shape": shape, "batch": batch, "rows": rows}
    if json is not None:
        json.write_text(json_format.dumps(results, indent=1) + "\n")
    if plot is not None:
        draw(results, plot)


def _accuracy(
    path: Path, text: Path, calibration: Path | None, windows: int, length: int, widths: list[int], intervals: list[int]
) -> list[dict[str, Any]]:
    model = load_model(str(path))
    ids = spread(cut_windows(read_tokens(str(text), str(path), model), length), windows)
    reference = score(model, ids, float_scan)
    outliers = Outliers.random(model)
    mixer = next(iter(mixers(model).values()))
    headdim, ngroups, dstate = int(mixer.head_dim), int(mixer.n_groups), int(mixer.ssm_state_size)
    extents = (1, mixer.A_log.numel(), headdim)
    rows: list[dict[str, Any]] = []
    tried: dict[str, Any] = {"dynamic": (None, None)}
    if calibration is not None:
        artifact = fit_artifact(read_artifact(calibration), model, needs_state_scale=True)
        scales = {layer: artifact.tensors[f"{layer}.state_scale"] for layer in mixers(model)}
        # A calibration of the rescaled model finds the columns: tests/calibrate/test_bench_accuracy.py.
        tried["calibrated"] = (scales, {layer: outliers.on_state_scale(layer, scales[layer]) for layer in scales})
    for name, (scales, larger) in tried.items():
        for bits, interval in itertools.product(widths, intervals):
            run = Recurrence(bits, flush_interval=interval, state_scale=scales)
            natural, error = score(model, ids, run).increase_over(reference)
            run = dataclasses.replace(run, state_scale=larger)
            injected, injected_error = score(model, ids, outliers.around(run)).increase_over(reference)
            rows.append(
                {
                    "scales": name,
                    "bits": bits,
                    "flush_interval": interval,
                    "increase": natural,
                    "error": error,
                    "increase_outliers": injected,
                    "error_outliers": injected_error,
                    "bits_per_element": bits_per_element(
                        bits, interval, extents, ngroups, dstate, calibrated=name == "calibrated"
                    ),
                }
            )
            console.print(
                f"{name:10} {bits} bits, L={interval:2}: {natural:+.3%} +- {error:.3%}, with outliers {injected:+.3%} "
                f"+- {injected_error:.3%}, {rows[-1]['bits_per_element']:.2f} bits an element"
            )
    return rows


def bits_per_element(
    bits: int, interval: int, extents: tuple[int, int, int], ngroups: int, dstate: int, *, calibrated: bool = False
) -> float:
    """Of a state with its ring. 3-bit codes, which fill no bytes, count as if they did."""
    batch, nheads, headdim = extents
    ring = new_ring(batch, nheads, headdim, ngroups, dstate, interval) if interval > 1 else None
    packed_as = 4 if bits == 3 else bits
    scale = torch.ones(nheads, dstate) if calibrated else None
    state = DSQState.from_float(torch.zeros(batch, nheads, headdim, dstate), packed_as, state_scale=scale, ring=ring)
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
    """Accuracy against size for both kinds of scales, and time against L: what there is of them."""
    pyplot = require_matplotlib(path)
    panels: list[tuple[str, list[dict[str, Any]], Any]] = []
    if "accuracy" in results:
        rows = results["accuracy"]["rows"]
        for scales in dict.fromkeys(row["scales"] for row in rows):
            panels.append((f"{scales} scales", [row for row in rows if row["scales"] == scales], _draw_accuracy))
    if "time" in results:
        machine = results["time"]["machine"]
        title = f"one step, {machine['processor']}, {machine['threads']} threads"
        panels.append((title, results["time"]["rows"], _draw_time))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 5), squeeze=False)
    for axis, (title, rows, draw_rows) in zip(axes[0], panels, strict=True):
        for index, bits in enumerate(BITS):
            chosen = [row for row in rows if row["bits"] == bits]
            if chosen:
                draw_rows(axis, chosen, f"C{index}", f"{bits} bits")
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


_LEAST, _MOST = 0.01, 200
"""Percent, the ends of the logarithmic axis: smaller and negative increases are drawn at its foot."""


def _draw_accuracy(axis: Any, rows: list[dict[str, Any]], color: str, label: str) -> None:
    sizes = [row["bits_per_element"] for row in rows]
    costs = [max(100 * row["increase"], _LEAST) for row in rows]
    axis.plot(sizes, costs, marker="o", color=color, label=label)
    outliers = [max(100 * row["increase_outliers"], _LEAST) for row in rows]
    axis.plot(sizes, outliers, marker="x", linestyle=":", color=color)
    for row, size, cost in zip(rows, sizes, costs, strict=True):
        place = {"xytext": (-4, -11), "textcoords": "offset points", "fontsize": 7, "ha": "right"}
        axis.annotate(f"L={row['flush_interval']}", (size, cost), **place)
    axis.set(
        yscale="log",
        ylim=(0.7 * _LEAST, _MOST),
        xlim=(1.5, 14),
        xlabel="bits a state element, scales and ring included",
        ylabel="perplexity increase, % (dotted: outliers injected)",
    )


def _draw_time(axis: Any, rows: list[dict[str, Any]], color: str, label: str) -> None:
    lengths, times = [row["flush_interval"] for row in rows], [row["speedup"][0] for row in rows]
    axis.plot(lengths, times, marker="o", color=color, label=label)
    axis.set(xscale="log", xlabel="flush_interval L", ylabel="times faster than a fused float32 loop")
    axis.set_xticks(INTERVALS, [str(interval) for interval in INTERVALS])


if __name__ == "__main__":
    cli.run("flush", main)
