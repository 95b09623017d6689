"""What ``qmamba explain`` prints: a table of passes for each graph, what was left alone and why, bytes."""

from __future__ import annotations

from typing import Any

import rich.console
import rich.table

from .report import Report

# Without markup: a shape in the text of a skip has brackets.
_out = rich.console.Console(markup=False)


def print_reports(reports: list[Report], held: dict[str, tuple[int, ...]]) -> None:
    """Args: held: bytes before and after, by what holds them."""
    for report in reports:
        table = rich.table.Table(title=report.phase, title_justify="left", box=None, title_style="bold")
        for column in ("pass", "found", "rewritten", "skipped"):
            table.add_column(column, justify="left" if column == "pass" else "right")
        for name, counts in report.to_json()["passes"].items():
            skipped = len(counts["skipped"])
            table.add_row(name, str(counts["found"]), str(counts["rewritten"]), str(skipped) if skipped else "-")
        _out.print(table)
        if report.phase == "other":
            _out.print("  no Mamba2 layer in this graph: plain Inductor", style="yellow")
        for entry in report.skips():
            assert entry.reason is not None
            _out.print(
                f"  {entry.rewrite} left {entry.layer} alone: {entry.reason.value}: {entry.detail}",
                style="yellow",
                soft_wrap=True,
            )
    for label, (before, after) in held.items():
        share = f", {after / before:.2f} of it" if before else ""
        _out.print(f"{label}: {before:,} bytes before, {after:,} after{share}")


def reports_as_json(model: str, reports: list[Report], held: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """What `print_reports` prints, for programs."""
    names = {"weights": "weights", "state of one sequence": "state_per_sequence"}
    return {
        "model": model,
        "graphs": [report.to_json() for report in reports],
        "bytes": {names[label]: dict(zip(("before", "after"), held[label], strict=True)) for label in names},
    }
