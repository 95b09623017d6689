from __future__ import annotations

import functools

from torch import fx

from ..artifact import Artifact, with_last_rows
from ..fx_utils import InputSource, add_input, fake_like, mark_static, parameter_path, placeholders, replace_node
from ..report import Report
from .base import GraphPass
from .parameter_forms import FindBeside


class ApplyTunedConv(GraphPass):
    """Run the convolutions of Mamba2 layers with the channels of B and C that ESR has tuned.

    The parameters of the module stay as they are; what the graph reads instead is made once beside each.

    Before:
        xBC = conv1d(window, weight, bias, groups=d)
    After:
        xBC = conv1d(window, weight_tuned, bias_tuned, groups=d)

    Refuses: nothing. Options that would leave a tuned convolution out are an error before any pass runs.
    """

    def rewrite(self, graph: fx.Graph, report: Report) -> None:
        artifact = self.context.artifact
        if artifact is None:
            return
        for node in placeholders(graph):
            path = parameter_path(node)
            layer, _, kind = path.rpartition(".")
            rows = artifact.tensors.get(f"{path}_bcdt")
            if rows is None or not is_convolution(artifact, layer):
                continue
            index = node.meta["qmamba_input"].index
            find = FindBeside((path, artifact.digest), functools.partial(with_last_rows, rows=rows))
            fake = fake_like(graph, find(self.context.example_inputs[index]))
            tuned = add_input(graph, node, f"{node.name}_tuned", InputSource(index, find), fake)
            mark_static(tuned)
            replace_node(node, tuned)
            report.rewrote(layer, f"{len(rows)} channels of its {kind}")


def is_convolution(artifact: Artifact, layer: str) -> bool:
    """True for a depthwise convolution, by the shapes of the calibrated model."""
    return len(artifact.header.shapes.get(f"{layer}.weight", ())) == 3
