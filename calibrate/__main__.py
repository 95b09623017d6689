"""``python -m calibrate``: the same as ``qmamba calibrate``, and what ``torchrun -m calibrate`` starts."""

from __future__ import annotations

import os
import sys

import rich.console

from qmamba_compile.errors import QMambaError

from .cli import calibrate_app


def main() -> None:
    """Entry point; one line instead of a traceback for errors that have something to say."""
    try:
        calibrate_app()
    except QMambaError as problem:
        if os.environ.get("QMAMBA_TRACEBACK"):
            raise
        console = rich.console.Console(stderr=True)
        console.print(
            f"{type(problem).__name__}: {problem}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
