"""What calibration and evaluation raise on purpose: one class a kind of mistake."""

from __future__ import annotations

from qmamba_compile.errors import QMambaError


class DataError(QMambaError, ValueError):
    """A text, data set or tokenizer cannot be read, is too short, or does not fit the model."""


class CalibrationError(QMambaError, RuntimeError):
    """Calibration cannot start, or cannot go on."""
