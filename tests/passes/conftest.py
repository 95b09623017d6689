"""Run chosen passes, and nothing else, on the graphs that Dynamo captures."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import pytest
import torch
from torch import fx

from qmamba_compile.backend import _Runner, _scope
from qmamba_compile.config import QMambaConfig
from qmamba_compile.fx_utils import copy_graph, op_name, placeholders
from qmamba_compile.passes import PassContext
from qmamba_compile.report import Report


def count_ops(graph: fx.Graph) -> collections.Counter[str]:
    return collections.Counter(op_name(node) for node in graph.nodes if node.op.startswith("call_"))


@dataclasses.dataclass
class Captured:
    """One graph: operation counts before and after the passes, the rewritten graph, and what was reported."""

    before: collections.Counter[str]
    after: collections.Counter[str]
    gm: fx.GraphModule
    report: Report
    context: PassContext

    def skips(self, rewrite: str) -> list[Any]:
        return [entry for entry in self.report.skips() if entry.rewrite == rewrite]


class Capture:
    """A torch.compile backend that runs ``passes`` on each graph and executes the result as it is."""

    def __init__(self, *passes, artifact=None, runs=1, **options):
        self.passes, self.artifact, self.runs = passes, artifact, runs
        self.config = QMambaConfig(**options)
        self.graphs: list[Captured] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]):
        rewritten, report = copy_graph(gm), Report(strict=self.config.strict)
        context = PassContext(self.config, self.artifact, list(example_inputs), _scope())
        before = count_ops(rewritten.graph)
        for _ in range(self.runs):
            for rewrite in self.passes:
                rewrite(context)(rewritten, report)
        rewritten.recompile()
        captured = Captured(before, count_ops(rewritten.graph), rewritten, report, context)
        self.graphs.append(captured)
        sources = [node.meta["qmamba_input"] for node in placeholders(rewritten.graph)]
        return _Runner(rewritten.forward, sources, context)

    def compile(self, function, dynamic=None):
        return torch.compile(function, backend=self, fullgraph=True, dynamic=dynamic)

    @property
    def only(self) -> Captured:
        assert len(self.graphs) == 1
        return self.graphs[0]


@pytest.fixture(scope="session")
def capture():
    """``capture(FuseChunkScan, state_bits=8)`` is a backend; ``.compile(f)`` compiles, ``.graphs`` has the results."""
    return Capture
