"""Every exception that qmamba raises, and the reasons for which a pass leaves something alone."""

from __future__ import annotations

import enum


class QMambaError(Exception):
    """Base of all errors raised on purpose by this package."""


class ConfigError(QMambaError, ValueError):
    """An option is unknown, or its value is not allowed."""


class ArtifactError(QMambaError, ValueError):
    """A calibration artifact cannot be read, or does not belong to this model."""


class StateError(QMambaError, RuntimeError):
    """A packed state was used in a way that would lose or corrupt it."""


class NonFiniteStateError(StateError):
    """``check_finite`` found NaN or infinity in a state."""


class KernelBuildError(QMambaError, RuntimeError):
    """A generated kernel could not be kept on disk, or the C++ compiler that was found made no library of it."""


class StrictError(QMambaError, RuntimeError):
    """``strict`` is set, and an anchor was left alone."""


class SkipReason(enum.Enum):
    """Why an anchor was left as it was. The text beside it in the report names the values."""

    EXCLUDED = "excluded by skip_layers"
    NOT_A_PARAMETER = "the weight is not a parameter of the model"
    DTYPE = "no kernel takes values of that dtype"
    SHAPE = "the weight is too small for an int8 product"
    ROUTER = "the layer routes tokens to experts"
    FLOAT_STATE = "the cache holds a float state"
    UNKNOWN_STRUCTURE = "the surrounding operations are not those of a Mamba2 layer"
    SECOND_READER = "a value inside the region is read or written elsewhere"
    OTHER_WEIGHT = "the calibration artifact changes a weight that layers share"
    NOT_PER_HEAD = "dt, A, D or dt_bias differs inside a head"
