"""`GraphPass`: what every pass gets for free: switch, dump, timing, removal of what it made dead, lint."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import pathlib
import re
import time
from typing import Any

import torch
from torch import Tensor, fx

from ..artifact import Artifact
from ..config import QMambaConfig
from ..errors import ConfigError, SkipReason
from ..fx_utils import removable
from ..huge_pages import HugePages
from ..recurrence import Ring, new_ring
from ..report import Report

logger = logging.getLogger(__name__)

_dump_number = itertools.count()


@dataclasses.dataclass(frozen=True)
class RingLayout:
    """What the call wrapper makes the ring of a fresh state from; ``start`` differs from layer to layer, so that each
    decode step stores an equal share of the states.
    """

    flush_interval: int
    dtype: torch.dtype
    ngroups: int
    start: int

    def new(self, batch: int, nheads: int, headdim: int, dstate: int, device: torch.device) -> Ring:
        return new_ring(
            batch,
            nheads,
            headdim,
            self.ngroups,
            dstate,
            self.flush_interval,
            dtype=self.dtype,
            start=self.start,
            device=device,
        )

    def nbytes(self, batch: int, nheads: int, headdim: int, dstate: int) -> int:
        ring = self.new(batch, nheads, headdim, dstate, torch.device("meta"))
        return sum(tensor.nbytes for tensor in ring if tensor is not None)


@dataclasses.dataclass(frozen=True)
class StateOutput:
    """A `DSQState` that the compiled graph returns as plain tensors.

    Attributes:
        position: where Dynamo expects the state in the outputs.
        layer: module path.
        state_scale: the calibrated scales; None when the graph returns dynamic ones.
        ring: of a state that is not stored at every step.
    """

    position: int
    layer: str
    bits: int
    stochastic: bool
    state_scale: Tensor | None
    ring: RingLayout | None = None

    @property
    def width(self) -> int:
        """How many plain tensors stand for it: packed, channel_scale, rng, and state_scale when dynamic."""
        return 4 if self.state_scale is None else 3


@dataclasses.dataclass
class PassContext:
    """What the passes of one graph share.

    Attributes:
        example_inputs: Dynamo's arguments. `quantize_linear` puts the quantized weight in place of the float one.
        state_outputs: filled by `quantize_state`, in the order of the outputs.
        state_inputs: position of each `DSQState` argument and its layer, for `check_finite`.
        scope: where names of Dynamo's sources evaluate, to reach the modules of the model.
        pages: where the quantized weights go.
    """

    config: QMambaConfig
    artifact: Artifact | None
    example_inputs: list[Any]
    scope: dict[str, Any]
    pages: HugePages = dataclasses.field(default_factory=HugePages)
    state_outputs: list[StateOutput] = dataclasses.field(default_factory=list)
    state_inputs: dict[int, str] = dataclasses.field(default_factory=dict)


class NoMatchError(Exception):
    """An anchor has to be left as it is: the reason and the values that a pass reports."""

    def __init__(self, reason: SkipReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class GraphPass:
    """One rewrite of a Dynamo graph. Subclasses write `rewrite` and nothing else."""

    def __init__(self, context: PassContext) -> None:
        self.context = context
        self.config = context.config

    @classmethod
    def name(cls) -> str:
        """``FuseSsmUpdate`` -> ``fuse_ssm_update``: the name of its file, its switch and its test."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    @classmethod
    def enabled(cls, config: QMambaConfig) -> bool:
        return bool(getattr(config, cls.name()))

    def rewrite(self, graph: fx.Graph, report: Report) -> None:
        """Rewrite ``graph`` in place; end every anchor with ``report.rewrote`` or ``report.skipped``."""
        raise NotImplementedError

    def __call__(self, gm: fx.GraphModule, report: Report) -> None:
        report.start(self.name())
        began = time.perf_counter()
        _dump(gm, f"before_{self.name()}")
        # Calls whose result nobody read before the pass came act by themselves, or are none of its business.
        unread = {node for node in gm.graph.nodes if not node.users}
        self.rewrite(gm.graph, report)
        for node in reversed(gm.graph.nodes):
            if not node.users and node not in unread and removable(node):
                gm.graph.erase_node(node)
        gm.graph.lint()
        _dump(gm, f"after_{self.name()}")
        report.seconds[self.name()] = time.perf_counter() - began
        own = [entry for entry in report.entries if entry.rewrite == self.name()]
        logger.debug("%s: %d rewritten of %d anchors", self.name(), len(report.rewritten(self.name())), len(own))


def _dump(gm: fx.GraphModule, label: str) -> None:
    folder = os.environ.get("QMAMBA_DUMP")
    if folder:
        path = pathlib.Path(folder)
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / f"{next(_dump_number):04d}_{label}.py").write_text(gm.print_readable(print_output=False))
        except OSError as problem:
            raise ConfigError(
                f"QMAMBA_DUMP={folder!r}: cannot be written ({problem.strerror}); give a folder that can, or unset it"
            ) from problem
