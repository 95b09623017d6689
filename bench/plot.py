"""``python -m bench.plot RECORD ... --plot IMAGE``: draw records that were written before."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qmamba_compile import ConfigError

from .cli import run
from .draw import draw
from .record import Record


def main(
    records: Annotated[list[Path], typer.Argument(help="Records of one question, written by --json.")],
    plot: Annotated[Path, typer.Option("--plot", help="Image to write (.png).")],
) -> None:
    """Draw records that were written before."""
    try:
        loaded = [Record.read(path) for path in records]
    except (OSError, ValueError) as problem:
        raise ConfigError(str(problem)) from None
    draw(loaded, plot)


if __name__ == "__main__":
    run("plot", main)
