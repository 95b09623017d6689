"""A model by its name, and its quantized copy with the recurrence that runs it."""

from __future__ import annotations

import logging
from typing import Any

from qmamba_compile.artifact import read_artifact
from qmamba_compile.command_line import load_pretrained
from qmamba_compile.config import QMambaConfig
from qmamba_compile.errors import ConfigError

from .errors import CalibrationError
from .quantized_model import fit_artifact, quantized_copy
from .recurrence import Recurrence, Run, float_scan, mixers

logger = logging.getLogger(__name__)


def load_model(name: str) -> Any:
    """A transformers model, ready for inference.

    Raises:
        ConfigError: there is none. CalibrationError: it has no Mamba2 layer.
    """
    import transformers

    # Both warn about their own optional parts.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = load_pretrained(name)
    if not mixers(model):
        raise CalibrationError(
            f"{name}: a {type(model).__name__} without a Mamba2 layer; give a Mamba2 model or a hybrid"
        )
    return model


def quantize(
    model: Any,
    *,
    state_bits: int | None,
    weights: str | None,
    state_scales: str | None,
    rounding: str,
    calibration: str | None,
    seed: int = 0,
    flush_interval: int = QMambaConfig.flush_interval,
) -> tuple[Any, Run]:
    """A quantized copy of ``model`` and its recurrence.

    Raises:
        ConfigError: calibrated scales without an artifact. ArtifactError: the artifact belongs to another model.
    """
    if state_scales is None:
        state_scales = "calibrated" if calibration else "dynamic"
    calibrated = state_scales == "calibrated" and state_bits is not None
    if calibrated and calibration is None:
        raise ConfigError("--state-scales calibrated needs --calibration FILE; make one with `qmamba calibrate`")
    artifact = None
    if calibration is not None:
        artifact = fit_artifact(read_artifact(calibration), model, needs_state_scale=calibrated)
        if artifact.tuned_for not in (None, flush_interval):
            logger.warning(artifact.other_interval(flush_interval))
    device = next(model.parameters()).device
    quantized = quantized_copy(model, weights=weights, artifact=artifact).to(device)
    if state_bits is None:
        return quantized, float_scan
    scales = None
    if calibrated:
        assert artifact is not None
        scales = {layer: artifact.tensors[f"{layer}.state_scale"].to(device) for layer in mixers(model)}
    run = Recurrence(state_bits, rounding == "stochastic", seed, flush_interval=flush_interval, state_scale=scales)
    return quantized, run


def allow(option: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Refuse a value of an option.

    Raises:
        ConfigError: it is not among those ``allowed``.
    """
    if value not in allowed:
        raise ConfigError(f"{option} {value!r} is not allowed; use one of {', '.join(str(a) for a in allowed if a)}")
