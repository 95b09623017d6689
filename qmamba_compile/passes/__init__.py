"""The pipeline. State passes come first: what can be refused is refused before any weight is touched.

fuse_chunk_scan   (fusion)    prefill's scan becomes one operator
quantize_state    (semantic)  prefill hands the state over packed, decode keeps it packed
fuse_ssm_update   (fusion)    a decode step runs on the packed state
fuse_conv_update  (fusion)    a decode step's causal convolution becomes one operator
quantize_linear   (semantic)  linears become int8 W8A8
fuse_norm_linear  (fusion)    the norm before a linear becomes part of it
"""

from __future__ import annotations

import logging

from torch import fx

from ..artifact import Artifact, check_model
from ..config import QMambaConfig
from ..errors import ArtifactError
from ..fx_utils import iter_calls, op_name, parameter_path, placeholders, shape_of
from ..report import Report
from .base import GraphPass, PassContext, StateOutput
from .fuse_chunk_scan import FuseChunkScan
from .fuse_conv_update import FuseConvUpdate
from .fuse_norm_linear import FuseNormLinear
from .fuse_ssm_update import FuseSsmUpdate
from .match_mamba2 import is_step, scan_anchors
from .quantize_linear import QuantizeLinear
from .quantize_state import QuantizeState

logger = logging.getLogger(__name__)

__all__ = ["PIPELINE", "GraphPass", "PassContext", "StateOutput", "phase_of", "run_pipeline"]

PIPELINE: tuple[type[GraphPass], ...] = (
    FuseChunkScan,
    QuantizeState,
    FuseSsmUpdate,
    FuseConvUpdate,
    QuantizeLinear,
    FuseNormLinear,
)


def phase_of(graph: fx.Graph) -> str:
    """``"prefill"`` with a Mamba2 scan, ``"decode"`` with a Mamba2 step, ``"other"`` with neither."""
    if scan_anchors(graph):
        return "prefill"
    stores = (copy for copy in iter_calls(graph, "copy_") if op_name(copy.args[0]) == "placeholder")
    return "decode" if any(is_step(copy.args[1], copy.args[0]) for copy in stores) else "other"


def run_pipeline(gm: fx.GraphModule, context: PassContext, report: Report) -> None:
    """Run every enabled pass on ``gm``, a copy made by `fx_utils.copy_graph`."""
    if context.artifact is not None:
        shapes = {parameter_path(node): shape_of(node) for node in placeholders(gm.graph) if parameter_path(node)}
        context.artifact = check_model(context.artifact, shapes)
        _refuse_unapplied(context.artifact, context.config)
        _warn_of_other_interval(context.artifact, context.config)
    for rewrite in PIPELINE:
        if rewrite.enabled(context.config):
            rewrite(context)(gm, report)
    # Once: printing the code of a whole model takes as long as rewriting it.
    gm.recompile()


def _warn_of_other_interval(artifact: Artifact, config: QMambaConfig) -> None:
    """ESR bends weights against the error of one way of storing; without that error they are only bent.

    Bundled model, tuned for a store at every step, run with a store in eight: +0.91 % perplexity, not +0.18 %.
    """
    tuned_for = artifact.header.config.get("flush_interval", 1)
    if tuned_for != config.flush_interval and any(key.endswith(".weight_bcdt") for key in artifact.tensors):
        logger.warning(
            "%s: its weights were tuned for flush_interval=%s and run with %s, which may cost more than it saves; "
            "set flush_interval=%s, or calibrate with --no-esr",
            artifact.source,
            tuned_for,
            config.flush_interval,
            tuned_for,
        )


def _refuse_unapplied(artifact: Artifact, config: QMambaConfig) -> None:
    """Tuned weights that no pass applies: running without them would be another model."""
    for key in artifact.tensors:
        layer, _, kind = key.rpartition(".")
        convolution = len(artifact.header.shapes.get(f"{layer}.weight", ())) == 3
        if kind == "bias_bcdt" or (kind == "weight_bcdt" and convolution):
            raise ArtifactError(
                f"{artifact.source}: {key}: tuned convolutions and biases are not applied by this version; allowed: "
                "weight_bcdt of linears; calibrate without them"
            )
        if kind == "weight_bcdt" and (config.weights is None or not config.quantize_linear or config.excludes(layer)):
            raise ArtifactError(
                f"{artifact.source}: {key}: tuned rows are applied when their linear becomes int8, and these options "
                "leave it in floating point; allowed: weights='int8'; or calibrate with --no-esr"
            )
