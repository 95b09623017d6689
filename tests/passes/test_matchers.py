"""The matchers: which nodes they name in the graphs of Dynamo, and what they do with half a region."""

import pytest
import torch
from regions import Scan, Step, scan_inputs, step_inputs
from torch import nn

from qmamba_compile.errors import SkipReason
from qmamba_compile.fx_utils import copy_graph, iter_calls, op_name, placeholders, shape_of, strip
from qmamba_compile.passes import phase_of
from qmamba_compile.passes.base import NoMatchError
from qmamba_compile.passes.match_scan import final_state_of, is_final_state, match_scan, scan_anchors
from qmamba_compile.passes.match_step import is_step, match_step


def trace(function, *inputs):
    """Dynamo's graph of a call, before any pass."""
    graphs = []

    def backend(gm, _):
        graphs.append(copy_graph(gm).graph)
        return gm.forward

    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    (graph,) = graphs
    return graph


def named_shapes(match):
    names = [name for name in ("x", "A", "B", "C", "D", "initial_state", "y", "final_state") if hasattr(match, name)]
    return {name: shape_of(getattr(match, name)) for name in names if getattr(match, name) is not None}


def test_scan_names_its_parts():
    graph = trace(Scan(), *scan_inputs(), torch.randn(2, 4, 8, 16))
    (anchor,) = scan_anchors(graph)
    scan = match_scan(anchor)
    assert named_shapes(scan) == {
        "x": (2, 19, 4, 8),
        "A": (4,),
        "B": (2, 19, 2, 16),
        "C": (2, 19, 2, 16),
        "D": (4,),
        "initial_state": (2, 4, 8, 16),
        "y": (2, 19, 4, 8),
        "final_state": (2, 4, 8, 16),
    }
    inputs = placeholders(graph)
    # A is computed from A_log; everything else is an input as it came.
    assert {scan.x, scan.time.dt, scan.time.dt_bias, scan.B, scan.C, scan.D, scan.initial_state} == {
        node for node in inputs if node is not strip(scan.A, "neg", "exp", "float")
    }
    assert scan.B is not scan.C
    assert (scan.time.softplus, scan.time.minimum, scan.time.maximum) == (True, 0.0, float("inf"))
    assert scan.final_state is final_state_of(anchor) and is_final_state(scan.final_state)
    assert not is_final_state(scan.y)


def test_step_names_its_parts():
    graph = trace(Step(), torch.randn(2, 4, 8, 16), *step_inputs())
    (store,) = iter_calls(graph, "copy_")
    state = store.args[0]
    assert is_step(store.args[1], state) and not is_step(store.args[1], graph.find_nodes(op="placeholder")[-1])
    step = match_step(store.args[1], state)
    assert named_shapes(step) == {
        "x": (2, 4, 8),
        "A": (4,),
        "B": (2, 2, 16),
        "C": (2, 2, 16),
        "D": (4,),
        "y": (2, 4, 8),
    }
    assert shape_of(step.time.dt) == (2, 4, 1) and shape_of(step.time.dt_bias) == (4,)
    assert {op_name(node) for node in (step.x, step.B, step.C, step.D, step.time.dt_bias)} == {"placeholder"}
    assert step.time.softplus


def test_absent_parts_are_none():
    graph = trace(Step(D=False, dt_bias=False, softplus=False), torch.randn(2, 4, 8, 16), *step_inputs())
    (store,) = iter_calls(graph, "copy_")
    step = match_step(store.args[1], store.args[0])
    assert (step.D, step.time.dt_bias, step.time.softplus) == (None, None, False)
    graph = trace(Scan(D=False, dt_bias=False, softplus=False), *scan_inputs())
    scan = match_scan(scan_anchors(graph)[0])
    assert (scan.D, scan.time.dt_bias, scan.time.softplus, scan.initial_state) == (None, None, False, None)


@pytest.mark.parametrize("softplus, reason", [({"beta": 2}, "beta"), ({"threshold": 5}, "threshold")])
def test_softplus_of_its_own_kind_is_refused(softplus, reason):
    step = Step(softplus=False, dt=lambda dt: nn.functional.softplus(dt, **softplus))
    graph = trace(step, torch.randn(2, 4, 8, 16), *step_inputs())
    (store,) = iter_calls(graph, "copy_")
    with pytest.raises(NoMatchError, match=reason) as caught:
        match_step(store.args[1], store.args[0])
    assert caught.value.reason is SkipReason.UNKNOWN_STRUCTURE


def test_scaled_addition_is_refused():
    class AddsTwice(Step):
        def at(self, place, value):
            return torch.add(value, value, alpha=0.5) if place == "new" else value

    graph = trace(AddsTwice(), torch.randn(2, 4, 8, 16), *step_inputs())
    (store,) = iter_calls(graph, "copy_")
    with pytest.raises(NoMatchError):
        match_step(store.args[1], store.args[0])


def test_limits_that_are_tensors_are_refused():
    step = Step(dt=lambda dt: torch.clamp(dt, min=dt * 0, max=dt + 1))
    graph = trace(step, torch.randn(2, 4, 8, 16), *step_inputs())
    (store,) = iter_calls(graph, "copy_")
    with pytest.raises(NoMatchError, match="by a tensor"):
        match_step(store.args[1], store.args[0])


class Attention(nn.Module):
    """Einsums, a cache and exponentials, but neither scan nor step."""

    def forward(self, q, k, cache):
        cache.copy_(cache + k)
        weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) + 1, -1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, cache)


@pytest.mark.parametrize(
    "function, inputs, phase",
    [
        (Scan(), scan_inputs(), "prefill"),
        (Step(), (torch.randn(2, 4, 8, 16), *step_inputs()), "decode"),
        (Step(dA=lambda dA: dA * 2), (torch.randn(2, 4, 8, 16), *step_inputs()), "decode"),
        (Attention(), (torch.randn(2, 5, 3, 4),) * 3, "other"),
        (nn.Linear(4, 4), (torch.randn(2, 4),), "other"),
    ],
    ids=["scan", "step", "altered step", "attention", "linear"],
)
def test_phase(function, inputs, phase):
    graph = trace(function, *inputs)
    assert len(list(graph.nodes)) > 3 and phase_of(graph) == phase


def test_einsum_letters_do_not_matter():
    def carry(decay, states):
        return torch.einsum("uvwx, uvxyz -> uwxyz", decay, states)

    assert len(scan_anchors(trace(carry, torch.randn(2, 3, 4, 5), torch.randn(2, 3, 5, 6, 7)))) == 1

    def other(decay, states):
        return torch.einsum("bzch,bzhpn->bchnp", decay, states)

    torch._dynamo.reset()
    assert scan_anchors(trace(other, torch.randn(2, 3, 4, 5), torch.randn(2, 3, 5, 6, 7))) == []


def test_a_carry_without_its_scan_is_refused():
    def carry(decay, states):
        return torch.einsum("bzch,bzhpn->bchpn", decay, states)[:, -1]

    (anchor,) = scan_anchors(trace(carry, torch.randn(2, 3, 4, 5), torch.randn(2, 3, 5, 6, 7)))
    with pytest.raises(NoMatchError) as caught:
        match_scan(anchor)
    assert caught.value.reason is SkipReason.UNKNOWN_STRUCTURE
