"""What every question's command line shares: options, errors, the record, interruption."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from qmamba_compile import ConfigError
from qmamba_compile.command_line import INTERRUPTED, REFUSED, print_error, readable_errors

from .draw import draw, require_matplotlib
from .measure import Gate, Summary, Work, checked_speedup, interleave, measure_roof
from .record import Record, Row, console, machine_record, print_header, print_rows
from .shapes import SHAPES

ShapeName = Annotated[str, typer.Option(help=f"Model shape: {', '.join(SHAPES)}.")]
Batches = Annotated[str, typer.Option(help="Batch sizes, separated by commas.")]
Batch = Annotated[int, typer.Option(min=1, help="Batch size.")]
Threads = Annotated[int, typer.Option(min=0, help="Threads; 0 is what torch chooses.")]
Repeats = Annotated[int, typer.Option(min=2, help="Rounds: samples of each variant.")]
Variants = Annotated[str, typer.Option(help="Names separated by commas, or 'all'. Default: the usual set.")]
Options = Annotated[list[str], typer.Option("--option", help="name=value of QMambaConfig: one more variant with it.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the record here, again after each group.")]
PlotFile = Annotated[Path | None, typer.Option("--plot", help="Draw the record to this .png.")]


def run(question: str, main: Callable[..., Any]) -> None:
    """Entry point of a question: ``main`` as a command line, its errors as one line."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=main.__doc__)(main)
    with readable_errors():
        app(prog_name=f"python -m bench {question}")


@contextlib.contextmanager
def recording(
    question: str,
    arguments: Mapping[str, Any],
    *,
    threads: int,
    json: Path | None,
    plot: Path | None,
    roof: bool = True,
) -> Iterator[Record]:
    """A record that is written, printed and drawn, whole or as far as it got before Ctrl-C."""
    import torch

    if plot is not None:
        require_matplotlib(plot)
    require_place(json)
    if threads:
        torch.set_num_threads(threads)
    machine = machine_record()
    with console.status("measuring the roofs"):
        record = Record(question, dict(arguments), machine, measure_roof() if roof else None, path=json)
    print_header(record)
    interrupted = False
    try:
        yield record
        record.complete = True
    except KeyboardInterrupt:
        interrupted = True
    finally:
        record.write()
    where = f"{len(record.rows)} rows" + (f" in {json}" if json else "")
    if plot is not None and record.rows:
        draw([record], plot)
        where += f", drawn to {plot}"
    console.print(f"\n{'interrupted: ' if interrupted else ''}{where}", style="dim", highlight=False)
    if interrupted:
        sys.exit(INTERRUPTED)
    if record.refused:
        print_error("a numerics check failed: no ratio is shown for it")
        sys.exit(REFUSED)


def compare(
    record: Record,
    group: Mapping[str, Any],
    calls: Mapping[str, Callable[[], Any]],
    gates: Mapping[str, Gate],
    work: Mapping[str, Work],
    *,
    repeats: int,
    against: Iterable[str],
    block_seconds: float = 0.0,
    values: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Row]:
    """Time ``calls`` interleaved, add their rows to the record and print them.

    Args:
        against: variants that the others are compared with, where they were measured.
        block_seconds: least duration of one sample.
    """
    samples: dict[str, list[float]] = {}
    rows: list[Row] = []
    try:
        with console.status(f"timing {len(calls)} variants, {', '.join(f'{k} {v}' for k, v in group.items())}"):
            interleave(calls, rounds=repeats, block_seconds=block_seconds, samples=samples)
    finally:
        for name in calls if samples else ():
            taken = samples[name]
            speedups = {
                base: checked_speedup(samples[base], gates[base], taken, gates[name])
                for base in against
                if base in samples and base != name
            }
            rows.append(
                Row(
                    dict(group),
                    name,
                    Summary.of(taken),
                    work[name],
                    None if record.roof is None else record.roof.seconds(work[name]),
                    gates[name],
                    speedups,
                    dict((values or {}).get(name, {})),
                )
            )
        record.add(rows)
        print_rows(rows)
    return rows


def require_place(json: Path | None) -> None:
    """Make the folder of the file that ``--json`` names, before anything is measured.

    Raises:
        ConfigError: no file can be written there.
    """
    if json is None:
        return
    require_folder(json.parent, f"--json {json}")
    if json.is_dir():
        raise ConfigError(f"--json {json} is a folder; give the name of a file")


def require_folder(folder: Path, option: str) -> None:
    """Make the folder of results that ``option`` asks for, before anything is measured.

    Raises:
        ConfigError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise ConfigError(f"{option}: the folder cannot be made ({problem.strerror}); give another") from None
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{option}: nothing can be written to {folder}; give another folder")


# --- parsing -------------------------------------------------------------------------------------------------------


def parse_numbers(text: str, flag: str, least: int = 1) -> list[int]:
    """Integers from ``least`` on, separated by commas.

    Raises:
        ConfigError: anything else.
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < least:
        raise ConfigError(
            f"{flag} {text!r} is not allowed; use integers from {least} on, separated by commas, such as 1,8,32"
        )
    return numbers


def parse_bits(text: str) -> list[int]:
    """Bits of a state element that the recurrence has codes for, separated by commas.

    Raises:
        ConfigError: anything else.
    """
    bits = parse_numbers(text, "--bits")
    if set(bits) - {8, 4, 3, 2}:
        raise ConfigError(f"--bits {text!r} is not allowed; use some of 8, 4, 3, 2, separated by commas")
    return bits


def choose(text: str, known: Iterable[str], unusual: Iterable[str] = ()) -> list[str]:
    """The variants that ``--variants`` names; by default all but the ``unusual`` ones.

    Raises:
        ConfigError: one of them is unknown.
    """
    if text in ("", "all"):
        return [name for name in known if text == "all" or name not in unusual]
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in known:
            raise ConfigError(f"--variants {name!r} is unknown; allowed: {', '.join(known)}")
    return list(dict.fromkeys(names))
