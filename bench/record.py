"""What a benchmark found: rows, the machine and the roofs they were measured on; JSON and tables."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import rich.console
import rich.markup
import rich.table

from qmamba_compile.command_line import version_of

from .measure import Gate, Ratio, Roof, Summary, Work

FORMAT = 1
_PACKAGES = ("qmamba-compile", "torch", "transformers", "torchao", "numpy")

# Tables are wider than what rich assumes of a pipe.
console = rich.console.Console(width=None if sys.stdout.isatty() else 180)


@dataclasses.dataclass(frozen=True)
class Row:
    """One variant of one group.

    Attributes:
        group: what was run, such as ``{"shape": "130m", "batch": 8}``.
        time: seconds of one call, or ``None`` when the question is not about time.
        work: what one call must do at the least.
        floor: seconds that ``work`` takes at the measured roofs.
        gate: the numerics check of this variant in this run; ``None`` when the question has no output to check.
        speedups: by the variant compared with, a ratio or the reason why it is refused.
        values: whatever else was measured, unit in the name.
    """

    group: dict[str, Any]
    variant: str
    time: Summary | None = None
    work: Work | None = None
    floor: float | None = None
    gate: Gate | None = None
    speedups: dict[str, Ratio | str] = dataclasses.field(default_factory=dict)
    values: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def roof_fraction(self) -> float | None:
        """Share of the roof: 1 is as fast as memory or arithmetic allows; more where data stays in a cache."""
        return None if self.time is None or self.floor is None else self.floor / self.time.median

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Row:
        def optional(kind: Any, name: str) -> Any:
            return None if data[name] is None else kind(**data[name])

        time = optional(Summary, "time")
        return cls(
            group=data["group"],
            variant=data["variant"],
            time=None if time is None else dataclasses.replace(time, samples=tuple(time.samples)),
            work=optional(Work, "work"),
            floor=data["floor"],
            gate=optional(Gate, "gate"),
            speedups={k: v if isinstance(v, str) else Ratio(**v) for k, v in data["speedups"].items()},
            values=data["values"],
        )


@dataclasses.dataclass
class Record:
    """All rows of one run. Written again after each group, so that an interrupted run leaves what it measured."""

    question: str
    arguments: dict[str, Any]
    machine: dict[str, Any]
    roof: Roof | None
    rows: list[Row] = dataclasses.field(default_factory=list)
    complete: bool = False
    path: Path | None = None

    def add(self, rows: Sequence[Row]) -> None:
        self.rows.extend(rows)
        self.write()

    def write(self) -> None:
        if self.path is None:
            return
        data = dataclasses.asdict(self)
        del data["path"]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: an interrupt in the middle must not damage what an earlier write left.
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps({"format": FORMAT, **data}, indent=1) + "\n")
        partial.replace(self.path)

    @classmethod
    def read(cls, path: Path) -> Record:
        """The record in a file.

        Raises:
            ValueError: the file is no record of this format.
        """
        try:
            data = json.loads(path.read_text())
        except ValueError as problem:
            raise ValueError(f"{path}: no JSON ({problem}); give a record that --json wrote") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"{path}: no benchmark record of format {FORMAT}; write one with --json")
        roof = None if data["roof"] is None else Roof(**data["roof"])
        rows = [Row.from_json(row) for row in data["rows"]]
        return cls(data["question"], data["arguments"], data["machine"], roof, rows, data["complete"], path)

    @property
    def refused(self) -> bool:
        """True when a numerics check failed."""
        return any(row.gate is not None and not row.gate.passed for row in self.rows)


# --- the machine ---------------------------------------------------------------------------------------------------


def machine_record() -> dict[str, Any]:
    """Processor, memory, threads, load and versions of this run."""
    import torch

    from qmamba_compile.cpu_templates import build

    with contextlib.suppress(ImportError):
        import psutil

        memory = psutil.virtual_memory().total
        return _machine(torch, build) | {"memory_bytes": memory}
    return _machine(torch, build)


def _machine(torch: Any, build: Any) -> dict[str, Any]:
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "isa": build.best_isa(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "compiler": _first_line([build.find_compiler() or "none", "--version"]),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: version_of(name) or "not installed" for name in _PACKAGES},
        "commit": _first_line(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _processor() -> str:
    """Model name, with family and model numbers where the kernel tells them: cloud machines share one name."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if "model name" in fields:
            return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"
    return platform.processor() or platform.machine()


def _first_line(command: list[str]) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.splitlines()
        if lines:
            return lines[0]
    return "unknown"


# --- what is printed -----------------------------------------------------------------------------------------------


def print_header(record: Record) -> None:
    machine = record.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    load = f"load {machine['load_average']}"
    console.print(f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, {load}")
    console.print(f"{machine['isa']} (torch {machine['torch_isa']}), {machine['compiler']}, python {machine['python']}")
    console.print(f"{versions}, commit {machine['commit']}")
    if record.roof is not None:
        roof = record.roof
        console.print(
            f"roofs: read {roof.read / 1e9:.1f} GB/s, update in place {roof.update / 1e9:.1f}, copy "
            f"{roof.copy / 1e9:.1f}; int8 {roof.int8 / 1e9:.0f} GOP/s, bfloat16 "
            f"{roof.bfloat16 / 1e9:.0f}, float32 {roof.float32 / 1e9:.0f}"
        )


def print_rows(rows: Sequence[Row]) -> None:
    """One table for each group."""
    for group, members in _by_group(rows):
        table = rich.table.Table(title=group, title_justify="left", title_style="bold", box=None, padding=(0, 1))
        table.add_column("")
        for column in _cells(members):
            table.add_column(rich.markup.escape(column), justify="right")
        for row, *cells in zip(members, *_cells(members).values(), strict=True):
            table.add_row(rich.markup.escape(row.variant), *cells)
        console.print()
        console.print(table)
        for row in members:
            for against, refusal in row.speedups.items():
                if isinstance(refusal, str):
                    console.print(f"  {row.variant} against {against}: {refusal}", style="red", markup=False)


def _by_group(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(", ".join(f"{key} {value}" for key, value in row.group.items()), []).append(row)
    yield from groups.items()


def _cells(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Column title -> one cell a row; columns that no row fills are left out."""
    columns: dict[str, list[str]] = {}

    def add(title: str, cells: list[str]) -> None:
        if any(cells):
            columns[title] = cells

    add("median ms", [_milliseconds(row.time.median) if row.time else "" for row in rows])
    add("quartiles", [_quartiles(row.time) for row in rows])
    add("MB moved", [f"{row.work.bytes_moved / 1e6:.3g}" if row.work else "" for row in rows])
    add("of the roof", ["" if row.roof_fraction is None else f"{row.roof_fraction:.0%}" for row in rows])
    add("error (allowed)", [f"{row.gate.error:.2g} ({row.gate.tolerance:.2g})" if row.gate else "" for row in rows])
    for against in dict.fromkeys(name for row in rows for name in row.speedups):
        add(f"faster than {against}", [_speedup(row.speedups.get(against)) for row in rows])
    for name in dict.fromkeys(name for row in rows for name in row.values):
        add(name, [f"{row.values[name]:,.4g}" if name in row.values else "" for row in rows])
    return columns


def _quartiles(summary: Summary | None) -> str:
    if summary is None or len(summary.samples) < 2:
        return ""
    return f"{_milliseconds(summary.q1)} - {_milliseconds(summary.q3)}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}" if seconds < 10 else f"{seconds * 1e3:,.0f}"


def _speedup(ratio: Ratio | str | None) -> str:
    if ratio is None:
        return ""
    if isinstance(ratio, str):
        return "refused"
    # One round has no interval.
    return f"{ratio.value:.2f}" + (f" ({ratio.low:.2f} - {ratio.high:.2f})" if ratio.low < ratio.high else "")
