"""qmamba-compile: ``torch.compile(model, backend="qmamba")`` for Mamba2 models (Q-Mamba, W8A8H4).

The backend itself is `qmamba_compile.backend.qmamba`; torch finds it by its entry point, so nothing has to be imported.
"""

from .artifact import Artifact, read_artifact, write_artifact
from .config import QMambaConfig
from .errors import ArtifactError, ConfigError, NonFiniteStateError, QMambaError, SkipReason, StateError, StrictError
from .report import Report
from .state import DSQState

__all__ = [
    "Artifact",
    "ArtifactError",
    "ConfigError",
    "DSQState",
    "NonFiniteStateError",
    "QMambaConfig",
    "QMambaError",
    "Report",
    "SkipReason",
    "StateError",
    "StrictError",
    "read_artifact",
    "write_artifact",
]
__version__ = "0.1.0"
