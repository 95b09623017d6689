"""``python -m calibrate``: the same as ``qmamba calibrate``, and what ``torchrun -m calibrate`` starts."""

from __future__ import annotations

from qmamba_compile.command_line import readable_errors

from .cli import calibrate_app


def main() -> None:
    """Entry point."""
    with readable_errors():
        calibrate_app()


if __name__ == "__main__":
    main()
