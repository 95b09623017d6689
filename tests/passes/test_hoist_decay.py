"""`HoistDecay`: the decay rates of many layers by one call in front of them, the same bits, and what is none."""

import pytest
import torch
from torch import nn

from qmamba_compile.fx_utils import iter_calls, layer_of, parameter_path, placeholders
from qmamba_compile.passes import HoistDecay
from qmamba_compile.passes.hoist_decay import AT_ONCE

AT_ONCE_CALL = "_foreach_neg"


class Rates(nn.Module):
    """Layers that each decay x by exp(-exp(A_log))."""

    def __init__(self, layers=3, rate=lambda log: -torch.exp(log.float()), dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.rate = rate
        self.logs = nn.ParameterList(torch.randn(8, generator=generator).to(dtype) for _ in range(layers))
        self.logs.requires_grad_(False)

    def forward(self, x):
        for log in self.logs:
            x = x * torch.exp(self.rate(log)) + 1
        return x


def run(capture, make, runs=1):
    torch._dynamo.reset()
    backend = capture(HoistDecay, runs=runs)
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    y = backend.compile(make())(x)
    assert torch.equal(y, make()(x))
    return backend


def test_all_layers_of_a_model(make_model, tokens, capture, decode):
    expected, _ = decode(make_model(num_hidden_layers=3), tokens(2, 9), tokens(2, 2))
    backend = capture(HoistDecay)
    logits, _ = decode(backend.compile(make_model(num_hidden_layers=3)), tokens(2, 9), tokens(2, 2))
    assert torch.equal(logits, expected)
    assert len(backend.graphs) == 2
    for graph in backend.graphs:
        assert (graph.after[AT_ONCE_CALL], graph.after["neg"], graph.before["neg"]) == (1, 0, 3)
        assert graph.after["exp"] == graph.before["exp"]
        layers = [f"backbone.layers.{i}.mixer" for i in range(3)]
        assert [entry.layer for entry in graph.report.rewritten("hoist_decay")] == layers
        (at_once,) = iter_calls(graph.gm.graph, AT_ONCE_CALL)
        rates = list(at_once.users)
        assert [layer_of(rate) for rate in rates] == layers
        # Nothing that a token is part of comes before.
        computed = [node for node in graph.gm.graph.nodes if node < at_once and node.op != "placeholder"]
        parameters = {node for node in placeholders(graph.gm.graph) if parameter_path(node).endswith(".A_log")}
        assert {source for node in computed for source in node.all_input_nodes} <= parameters | set(computed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits(capture, dtype):
    backend = run(capture, lambda: Rates(dtype=dtype))
    assert backend.only.after[AT_ONCE_CALL] == 1 and backend.only.after["neg"] == 0


def test_more_layers_than_share_a_kernel(capture):
    layers = 2 * AT_ONCE + 3
    backend = run(capture, lambda: Rates(layers=layers))
    assert backend.only.after[AT_ONCE_CALL] == 3 and backend.only.after["neg"] == 0
    assert len(backend.only.report.entries) == layers


def test_one_layer_is_left_as_it_is(capture):
    backend = run(capture, lambda: Rates(layers=1))
    assert backend.only.after[AT_ONCE_CALL] == 0 and not backend.only.report.entries


def test_second_run_changes_nothing(capture):
    graphs = [run(capture, Rates, runs).only for runs in (1, 2)]
    assert graphs[0].gm.code == graphs[1].gm.code
    assert [len(graph.report.entries) for graph in graphs] == [3, 3]


@pytest.mark.parametrize(
    "rate, dtype",
    [
        pytest.param(lambda log: -torch.exp(log), torch.bfloat16, id="in another dtype"),
        pytest.param(lambda log: -torch.exp(2 * log.float()), torch.float32, id="scaled"),
        pytest.param(lambda log: -log.float(), torch.float32, id="no exponential"),
        pytest.param(lambda log: -torch.exp(log.float()[:, None].expand(8, 8)).sum(1), torch.float32, id="a matrix"),
        pytest.param(lambda log: -torch.exp(log.add_(0.0)), torch.float32, id="written in place"),
    ],
)
def test_what_is_no_decay_rate(capture, rate, dtype):
    backend = run(capture, lambda: Rates(rate=rate, dtype=dtype))
    assert backend.only.after[AT_ONCE_CALL] == 0 and not backend.only.report.entries
