"""The plots of `python -m bench accuracy`: states, error against position, and what its other parts have found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.accuracy_table import Bench
from bench.draw import require_matplotlib
from bench.record import console
from calibrate.data import cut_windows, spread
from calibrate.evaluate import token_nats
from calibrate.recurrence import Recurrence, Run, float_scan, replaced

_LONG, _TEXTS = 8, 12
_BIN = 512
"""Positions averaged for a point of the plot."""


def plots(bench: Bench, out: Path, results: dict[str, Any]) -> None:
    """The state of one head, error against position; and of what is known: table, ESR by layer, learning rates."""
    pyplot = require_matplotlib(out / "state_magnitude.png")
    layer = max(bench.felt, key=lambda name: bench.statistics.state_rms(name).max().item())
    head = int(bench.statistics.state_rms(layer).amax(dim=(1, 2)).argmax())
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for axis, statistics, title in zip(
        axes, (bench.statistics, bench.outliers.statistics(bench.statistics)), ("as trained", "outliers"), strict=True
    ):
        image = axis.imshow(statistics.state_rms(layer)[head].log10(), aspect="auto")
        axis.set(title=f"{layer}, head {head}, {title}", xlabel="state n", ylabel="channel p")
        axis.title.set_fontsize(9)
        figure.colorbar(image, label="log10 of the root mean square")
    _save(figure, out / "state_magnitude.png")
    _save(_draw_positions(bench, pyplot), out / "error_by_position.png")
    if "table" in results:
        _save(_draw_table(pyplot, results["table"]["results"]), out / "schemes.png")
    if "esr" in results:
        _save(_draw_layers(pyplot, results["esr"]["results"]), out / "esr_loss.png")
    if "rates" in results:
        _save(_draw_rates(pyplot, results["rates"]), out / "esr_rates.png")


def _draw_positions(bench: Bench, pyplot: Any) -> Any:
    """On long windows, `_LONG` times as long as those of the table."""
    windows = spread(cut_windows(bench.held_out_text, _LONG * bench.sizes.length), _TEXTS)
    figure, axis = pyplot.subplots(figsize=(7, 4))
    reference = _by_position(bench, windows, float_scan)
    for name, run in {
        "dynamic, nearest": Recurrence(4),
        "dynamic, stochastic": Recurrence(4, True),
        "calibrated, nearest": bench.calibrated(4, False),
        "dynamic, nearest, stored once in 8 steps": Recurrence(4, flush_interval=8),
    }.items():
        error = (_by_position(bench, windows, run) - reference).unflatten(0, (-1, _BIN)).mean(dim=1)
        axis.plot(torch.arange(len(error)) * _BIN + _BIN / 2, error, label=name)
    axis.axhline(0, color="black", linewidth=0.5)
    axis.set(
        xlabel=f"position in the text (means of {_BIN} bytes, {len(windows)} texts)",
        ylabel="nats over the float state",
        title="H4, error against position",
    )
    axis.legend(fontsize=8)
    return figure


@torch.no_grad()
def _by_position(bench: Bench, windows: Tensor, run: Run) -> Tensor:
    """Mean code length at each position, as many as fill whole bins."""
    with replaced(bench.model, run):
        nats = [
            token_nats(bench.model(ids, use_cache=False).logits[:, :-1], ids[:, 1:]).double().sum(dim=0)
            for ids in windows.split(bench.batch)
        ]
    total = torch.stack(nats).sum(dim=0) / len(windows)
    return total[: len(total) // _BIN * _BIN]


def _draw_table(pyplot: Any, rows: list[dict[str, Any]]) -> Any:
    """Increase against bits an element, natural states; one color a scheme, filled markers are stochastic."""
    figure, axis = pyplot.subplots(figsize=(9, 5.5))
    natural = [row for row in rows if not row["outliers"] and row["weights"] == "none" and row["scheme"] != "with ESR"]
    for index, scheme in enumerate(dict.fromkeys(row["scheme"] for row in natural)):
        for rounding, fill in (("nearest", "none"), ("stochastic", "full")):
            chosen = [row for row in natural if row["scheme"] == scheme and row["rounding"] == rounding]
            axis.plot(
                [row["bits_per_element"] for row in chosen],
                [max(100 * row["increase"], 0.005) for row in chosen],
                marker="o",
                fillstyle=fill,
                linestyle="-" if fill == "full" else ":",
                linewidth=0.8,
                color=f"C{index}",
                label=scheme if fill == "full" else None,
            )
    axis.set(
        yscale="log",
        xlabel="bits a state element, scales included (open, dotted: nearest; filled: stochastic)",
        ylabel="perplexity increase over a float state, %",
        title="requantized at every token",
    )
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return figure


def _draw_layers(pyplot: Any, results: dict[str, Any]) -> Any:
    """Loss of the first and of the last epoch by block, of the recipes that go block by block."""
    figure, axis = pyplot.subplots(figsize=(8, 4.5))
    index = 0
    for setting, recipes in results.items():
        for recipe, runs in recipes.items():
            layers = runs[0]["layers"]
            if len(layers) < 2:
                continue
            for when, style in (("loss_first", ":"), ("loss_last", "-")):
                label = f"{setting}, {recipe}" if when == "loss_last" else None
                values = [result[when] for result in layers]
                axis.plot(range(len(layers)), values, style, marker="o", color=f"C{index}", label=label)
            index += 1
    axis.set(
        xlabel="block",
        ylabel="square error relative to the target's",
        title="ESR loss by block: first epoch dotted, last epoch solid",
        yscale="log",
    )
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
    return figure


def _draw_rates(pyplot: Any, part: dict[str, Any]) -> Any:
    """Perplexity by learning rate, beside that without ESR and that of the float model."""
    figure, axis = pyplot.subplots(figsize=(6, 4))
    found = dict(part["results"])
    without = found.pop("without ESR")
    rates = sorted(found, key=float)
    axis.plot([float(rate) for rate in rates], [found[rate] for rate in rates], marker="o", label="the paper's recipe")
    axis.axhline(without, color="black", linestyle=":", label="without ESR")
    axis.axhline(part["float_perplexity"], color="gray", linestyle="--", label="float state")
    axis.set(xscale="log", xlabel="learning rate", ylabel="perplexity", title="H4 fully static")
    axis.legend()
    axis.grid(alpha=0.3)
    return figure


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    console.print(f"written to {path}", style="dim")
