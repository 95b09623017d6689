"""`QMambaConfig`: the options of ``torch.compile(model, backend="qmamba", options={...})``."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import logging
import os
from collections.abc import Mapping
from typing import Any

from .errors import ConfigError

log = logging.getLogger(__name__)

_ENV_PREFIX = "QMAMBA_"

_OTHER_VARIABLES = tuple(_ENV_PREFIX + name for name in ("CPU_ISA", "DUMP", "TRACEBACK", "UPDATE_GOLDEN"))
"""Of no option."""

LARGEST_SEED = 2**32 - 1

_ALLOWED: dict[str, tuple[Any, ...]] = {
    "weights": ("int8", None),
    "state_bits": (8, 4, 2, None),
    "state_scales": ("dynamic", "calibrated"),
    "rounding": ("nearest", "stochastic"),
    "flush_interval": (1, 2, 4, 8, 16),
    "ring_bits": (16, 8),
    "inner_backend": ("inductor", "aot_eager", "eager"),
    "mode": (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
}


@dataclasses.dataclass(frozen=True)
class QMambaConfig:
    """What the passes do. Immutable; unknown names and values are refused.

    Attributes:
        weights: ``"int8"`` turns linears into W8A8; ``None`` leaves them in floating point.
        state_bits: bits per element of the SSM state; ``None`` keeps the float state.
        state_scales: ``"dynamic"`` takes both scale vectors from the state at each store;
            ``"calibrated"`` reads ``state_scale`` from the artifact named by ``calibration``.
        rounding: ``"nearest"`` (ties to even) or ``"stochastic"`` (Philox, reproducible from ``seed``).
        seed: seed of stochastic rounding.
        flush_interval: decode steps from one requantization of the state to the next. Above 1 the inputs of the steps
            in between wait in a ring, and the state is only read.
        ring_bits: bits of an input in that ring.
        calibration: path of a calibration artifact, or ``None``.
        skip_layers: module paths (or prefixes of them) to leave alone, such as ``("lm_head",)``.
        check_finite: raise as soon as a packed state is not finite, naming its layer (a few reductions a step).
        strict: raise instead of reporting when an anchor is left alone.
        inner_backend: what compiles the rewritten graph; ``"aot_eager"`` and ``"eager"`` find faults by subtraction.
        mode: Inductor's mode, for torch.compile takes either its own ``mode`` or ``options``. ``"reduce-overhead"``
            replays decode as CUDA graphs.
        quantize_linear, fuse_chunk_scan, quantize_state, fuse_ssm_update, apply_tuned_conv, fuse_conv_update,
            fuse_causal_conv, fuse_norm_linear, fuse_residual, hoist_decay: one switch a pass.
    """

    weights: str | None = "int8"
    state_bits: int | None = 4
    state_scales: str = "dynamic"
    rounding: str = "nearest"
    seed: int = 0
    flush_interval: int = 8
    ring_bits: int = 16
    calibration: str | None = None
    skip_layers: tuple[str, ...] = ()
    check_finite: bool = False
    strict: bool = False
    inner_backend: str = "inductor"
    mode: str | None = None
    quantize_linear: bool = True
    fuse_chunk_scan: bool = True
    quantize_state: bool = True
    fuse_ssm_update: bool = True
    apply_tuned_conv: bool = True
    fuse_conv_update: bool = True
    fuse_causal_conv: bool = True
    fuse_norm_linear: bool = True
    fuse_residual: bool = True
    hoist_decay: bool = True

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            _require(name, getattr(self, name), allowed)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, bool) and not isinstance(value, bool):
                raise ConfigError(f"{field.name}={value!r} is not allowed; use True or False")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed <= LARGEST_SEED:
            raise ConfigError(f"seed={self.seed!r} is not allowed; use an integer from 0 to 2**32 - 1")
        if self.calibration is not None:
            if not isinstance(self.calibration, (str, os.PathLike)):
                raise ConfigError(f"calibration={self.calibration!r} is not allowed; use a path or None")
            object.__setattr__(self, "calibration", os.path.expanduser(os.fspath(self.calibration)))
        if not isinstance(self.skip_layers, (list, tuple)) or not all(isinstance(s, str) for s in self.skip_layers):
            raise ConfigError(
                f"skip_layers={self.skip_layers!r} is not allowed; use a list of module paths, such as ['lm_head']"
            )
        object.__setattr__(self, "skip_layers", tuple(self.skip_layers))
        if self.state_scales == "calibrated" and self.state_bits is not None and self.calibration is None:
            raise ConfigError(
                "state_scales='calibrated' needs calibration=<path of an artifact>; "
                "make one with `qmamba calibrate`, or use state_scales='dynamic'"
            )

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None = None) -> QMambaConfig:
        """Config from the ``options`` of ``torch.compile``, over ``QMAMBA_<NAME>`` environment variables.

        Raises:
            ConfigError: an unknown option, or a value that is not allowed.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for name, field in fields.items():
            text = os.environ.get(_ENV_PREFIX + name.upper())
            if text:
                values[name] = _parse(_ENV_PREFIX + name.upper(), text, field.default)
        known = (*_OTHER_VARIABLES, *(_ENV_PREFIX + name.upper() for name in fields))
        for variable in os.environ:
            if variable.startswith(_ENV_PREFIX) and variable not in known:
                _warn_of_variable(variable, known)
        for name, value in (options or {}).items():
            if name not in fields:
                raise ConfigError(f"unknown option {name!r}; allowed: {', '.join(sorted(fields))}")
            values[name] = value
        return cls(**values)

    def excludes(self, layer: str) -> bool:
        """True when ``skip_layers`` names this module path or a parent of it."""
        return any(layer == skip or layer.startswith(skip + ".") for skip in self.skip_layers)


def layer_seed(seed: int, layer: str) -> int:
    """Philox key of a layer's stochastic rounding, from the option ``seed``: layers must not share their noise."""
    digest = hashlib.blake2b(f"{seed}:{layer}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@functools.cache
def _warn_of_variable(variable: str, known: tuple[str, ...]) -> None:
    near = difflib.get_close_matches(variable, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "README lists the variables"
    log.warning("the environment variable %s is set, but nothing reads it; %s", variable, hint)


def _require(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    # True == 1, so the type is compared as well.
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        choices = ", ".join(repr(choice) for choice in allowed)
        raise ConfigError(f"{name}={value!r} is not allowed; use one of {choices}")


def _parse(variable: str, text: str, default: Any) -> Any:
    """Value of an environment variable, in the type of the option it overrides."""
    if text.lower() == "none":
        return None
    if isinstance(default, bool):
        if text.lower() not in ("0", "1", "false", "true"):
            raise ConfigError(f"{variable}={text!r} is not allowed; use 0 or 1")
        return text.lower() in ("1", "true")
    if isinstance(default, int):
        try:
            return int(text)
        except ValueError:
            raise ConfigError(f"{variable}={text!r} is not allowed; use an integer") from None
    if isinstance(default, tuple):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return text
