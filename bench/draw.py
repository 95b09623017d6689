"""Draw a benchmark record: one panel a question's group, or one line a variant for `cost`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qmamba_compile import ConfigError

from .record import Record, Row

_COLUMNS = 3


def require_matplotlib(path: Path) -> Any:
    """``matplotlib.pyplot``, drawing to files.

    Raises:
        ConfigError: matplotlib is not installed, or ``path`` is no .png.
    """
    if path.suffix != ".png":
        raise ConfigError(f"--plot {path} is not allowed; give the name of a .png file")
    try:
        importlib.import_module("matplotlib").use("Agg")
    except ImportError:
        raise ConfigError("--plot needs matplotlib; pip install 'qmamba-compile[bench]', or leave --plot out") from None
    return importlib.import_module("matplotlib.pyplot")


def draw(records: Sequence[Record], path: Path) -> None:
    """Write one image for all rows of ``records``."""
    pyplot = require_matplotlib(path)
    rows = [row for record in records for row in record.rows]
    panels = _lines(rows) if records[0].question == "cost" else _bars(rows)
    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    tallest = max(len(panel["rows"]) for panel in panels)
    height = 1.2 + (3 if "x" in panels[0] else 0.32 * tallest)
    figure, axes = pyplot.subplots(lines, columns, figsize=(6.4 * columns, height * lines), squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        (_draw_lines if "x" in panel else _draw_bars)(axis, panel)
        axis.set_title(panel["title"])
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    machine = records[0].machine
    figure.suptitle(
        f"{records[0].question}: {machine['processor']}, {machine['threads']} threads, "
        f"torch {machine['versions']['torch']}",
        fontsize=9,
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _bars(rows: Sequence[Row]) -> list[dict[str, Any]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(", ".join(f"{key} {value}" for key, value in row.group.items()), []).append(row)
    return [{"title": title, "rows": members} for title, members in groups.items()]


def _draw_bars(axis: Any, panel: dict[str, Any]) -> None:
    """Horizontal bars: time with quartiles and the roof, or the first other value."""
    rows = panel["rows"][::-1]
    names = [row.variant for row in rows]
    colors = ["tab:orange" if name.startswith("ours") else "tab:gray" for name in names]
    if all(row.time is not None for row in rows):
        medians = [row.time.median * 1e3 for row in rows]
        spread = [
            [(row.time.median - row.time.q1) * 1e3 for row in rows],
            [(row.time.q3 - row.time.median) * 1e3 for row in rows],
        ]
        axis.barh(names, medians, xerr=spread, color=colors)
        if all(row.floor is not None for row in rows):
            floors = [row.floor * 1e3 for row in rows]
            axis.plot(floors, range(len(rows)), "k|", markersize=14, label="measured roof")
            axis.legend(fontsize=8)
        axis.set_xlabel("median milliseconds (whiskers: quartiles)")
        return
    title = next(iter(rows[0].values))
    axis.barh(names, [row.values.get(title, 0.0) for row in rows], color=colors)
    axis.set_xlabel(title)


def _lines(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One panel for each ``against`` of `cost`: time over tokens, batch or length."""
    panels: dict[str, dict[str, Any]] = {}
    for row in rows:
        against = row.group["against"]
        panel = panels.setdefault(against, {"title": f"against {against}", "x": against, "rows": []})
        panel["rows"].append(row)
    return list(panels.values())


def _draw_lines(axis: Any, panel: dict[str, Any]) -> None:
    variants: dict[str, list[Row]] = {}
    for row in panel["rows"]:
        variants.setdefault(row.variant, []).append(row)
    for name, members in variants.items():
        x = [row.values["at"] for row in members]
        times = [row.time for row in members if row.time is not None]
        axis.plot(x, [time.median * 1e3 for time in times], marker="o", label=name)
        axis.fill_between(x, [time.q1 * 1e3 for time in times], [time.q3 * 1e3 for time in times], alpha=0.2)
    axis.set_xlabel(panel["x"])
    axis.set_ylabel(f"milliseconds a {panel['rows'][0].group['unit']} (median, quartiles)")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
