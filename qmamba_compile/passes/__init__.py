"""The pipeline. State passes come first: what can be refused is refused before any weight is touched.

fuse_chunk_scan   (fusion)    prefill's scan becomes one operator
quantize_state    (semantic)  prefill hands the state over packed, decode keeps it packed
fuse_ssm_update   (fusion)    a decode step runs on the packed state
apply_tuned_conv  (semantic)  convolutions get the channels that ESR has tuned
fuse_conv_update  (fusion)    a decode step's causal convolution becomes one operator
fuse_causal_conv  (fusion)    a prompt's as well
quantize_linear   (semantic)  linears become int8 W8A8, and embeddings tied to them read the codes
fuse_norm_linear  (fusion)    the norm before a linear becomes part of it
fuse_residual     (fusion)    a residual that a linear is added to as well
hoist_decay       (fusion)    decay rates of many layers are computed at once
"""

from __future__ import annotations

import logging

from torch import fx

from ..artifact import Artifact, check_model
from ..config import QMambaConfig
from ..errors import ArtifactError
from ..fx_utils import iter_calls, layer_of, op_name, parameter_path, placeholders, shape_of
from ..report import Report
from .apply_tuned_conv import ApplyTunedConv, is_convolution
from .base import GraphPass, PassContext, StateOutput
from .fuse_causal_conv import FuseCausalConv
from .fuse_chunk_scan import FuseChunkScan
from .fuse_conv_update import FuseConvUpdate
from .fuse_norm_linear import FuseNormLinear
from .fuse_residual import FuseResidual
from .fuse_ssm_update import FuseSsmUpdate
from .hoist_decay import HoistDecay
from .match_scan import scan_anchors
from .match_step import is_step
from .quantize_linear import QuantizeLinear
from .quantize_state import QuantizeState

logger = logging.getLogger(__name__)

__all__ = ["PIPELINE", "GraphPass", "PassContext", "StateOutput", "phase_of", "run_pipeline"]

PIPELINE: tuple[type[GraphPass], ...] = (
    FuseChunkScan,
    QuantizeState,
    FuseSsmUpdate,
    ApplyTunedConv,
    FuseConvUpdate,
    FuseCausalConv,
    QuantizeLinear,
    FuseNormLinear,
    FuseResidual,
    HoistDecay,
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
    if report.phase == "prefill":
        _warn_of_options(gm.graph, context)
    for rewrite in PIPELINE:
        if rewrite.enabled(context.config):
            rewrite(context)(gm, report)
    # Once: printing the code of a whole model takes as long as rewriting it.
    gm.recompile()


def _warn_of_options(graph: fx.Graph, context: PassContext) -> None:
    """Of what is allowed and yet hardly meant, once a prompt's graph: a decode step's would only repeat it.

    A name that no layer has is no error, for a graph need not hold the whole model, such as one that starts from
    ``inputs_embeds``.
    """
    config, artifact = context.config, context.artifact
    if artifact is not None and artifact.tuned_for not in (None, config.flush_interval):
        logger.warning(artifact.other_interval(config.flush_interval))
    if config.quantize_state and config.state_bits == 2 and config.state_scales == "dynamic":
        logger.warning(
            "state_bits=2 with dynamic scales makes a model useless (perplexity times 4 on the bundled one); make "
            "calibrated ones by `qmamba calibrate`, and use state_scales='calibrated', or state_bits=4"
        )
    if not config.skip_layers:
        return
    # A convolution is traced in its mixer; its weight has its name.
    parameters = {parameter_path(node).rpartition(".")[0] for node in placeholders(graph)}
    layers = {layer_of(node) for node in graph.nodes} | parameters
    for name in config.skip_layers:
        if not any(layer == name or layer.startswith(name + ".") for layer in layers):
            logger.warning(
                "qmamba: skip_layers names %r, and nothing in this graph has that path; its layers are named like %r",
                name,
                max(layers, key=len),
            )


def _refuse_unapplied(artifact: Artifact, config: QMambaConfig) -> None:
    """Tuned weights that no pass applies: running without them would be another model."""
    for key in artifact.tensors:
        layer, _, kind = key.rpartition(".")
        if not kind.endswith("_bcdt"):
            continue
        if is_convolution(artifact, layer):
            if not config.apply_tuned_conv or config.excludes(layer):
                raise ArtifactError(
                    f"{artifact.source}: {key}: these options leave a tuned convolution out; allowed: "
                    "apply_tuned_conv=True and no skip_layers that name it; or calibrate with --esr-learn in_proj"
                )
            continue
        if kind == "bias_bcdt":
            raise ArtifactError(
                f"{artifact.source}: {key}: tuned biases of linears are not applied by this version; allowed: "
                "weight_bcdt of linears, weight_bcdt and bias_bcdt of convolutions; calibrate without them"
            )
        if config.weights is None or not config.quantize_linear or config.excludes(layer):
            raise ArtifactError(
                f"{artifact.source}: {key}: tuned rows are applied when their linear becomes int8, and these options "
                "leave it in floating point; allowed: weights='int8'; or calibrate with --no-esr"
            )
