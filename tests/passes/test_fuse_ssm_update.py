"""`FuseSsmUpdate`: one mutating operator a step, the same packed state, and a refusal for whatever is not the step."""

import copy

import pytest
import torch
from regions import Step, step_inputs

from qmamba_compile.errors import SkipReason
from qmamba_compile.fx_utils import iter_calls, layer_of, op_name, value_of
from qmamba_compile.passes import FuseSsmUpdate, QuantizeState
from qmamba_compile.state import DSQState

SSM_UPDATE, STORE, READ = "qmamba.ssm_update", "qmamba.quantize_state_", "qmamba.dequantize_state"
INNER = ("packed", "channel_scale", "state_scale", "rng")


def make_state(inputs, bits=4, *, calibrated=False, stochastic=False):
    batch, nheads, headdim = inputs[0].shape
    dstate = inputs[2].shape[-1]
    generator = torch.Generator().manual_seed(5)
    scale = torch.rand(nheads, dstate, generator=generator) + 0.5 if calibrated else None
    h = torch.randn(batch, nheads, headdim, dstate, generator=generator)
    return DSQState.from_float(h, bits, state_scale=scale, stochastic=stochastic, seed=11)


def assert_same_state(found, expected):
    for name in INNER:
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def assert_close(y, expected):
    # The kernel sums the products of a row in another order.
    assert y.dtype == expected.dtype
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()


def run_both(capture, step, inputs, state, steps=1, dynamic=None):
    """The step with and without fusion on copies of ``state``: backend, results, states."""
    fused, unfused = capture(QuantizeState, FuseSsmUpdate), capture(QuantizeState)
    states = [state, copy.deepcopy(state)]
    results = [[], []]
    for index, backend in enumerate((fused, unfused)):
        torch._dynamo.reset()
        compiled = backend.compile(step, dynamic=dynamic)
        for seed in range(steps):
            later = step_inputs(*inputs[0].shape, inputs[2].shape[-1], inputs[2].shape[1], inputs[0].dtype, seed=seed)
            results[index].append(compiled(states[index], *(inputs if seed == 0 else later)))
    assert unfused.graphs[0].after[SSM_UPDATE] == 0 and unfused.graphs[0].after[STORE] == 1
    return fused, results, states


@pytest.mark.parametrize("n_layers", [1, 3])
def test_every_layer_becomes_one_operator(make_model, tokens, capture, decode, n_layers):
    model, prompt = make_model(num_hidden_layers=n_layers), tokens(2, 37)
    fused, unfused = capture(QuantizeState, FuseSsmUpdate, state_bits=4), capture(QuantizeState, state_bits=4)
    results = []
    for backend in (fused, unfused):
        torch._dynamo.reset()
        results.append(decode(backend.compile(model), prompt, tokens(2, 6, seed=2)))
    (logits, cache), (expected, expected_cache) = results
    _, graph = fused.graphs
    assert (graph.before["exp"], graph.before["bmm"]) == (2 * n_layers, n_layers)  # A's exp and dA's
    assert (graph.after[SSM_UPDATE], graph.after[STORE], graph.after[READ]) == (n_layers, 0, 0)
    assert (graph.after["exp"], graph.after["bmm"]) == (n_layers, 0)
    assert [entry.layer for entry in graph.report.rewritten("fuse_ssm_update")] == [
        f"backbone.layers.{i}.mixer" for i in range(n_layers)
    ]
    assert not graph.report.skips()
    for layer, other in zip(cache.layers, expected_cache.layers, strict=True):
        assert_same_state(layer.recurrent_states[0], other.recurrent_states[0])
        torch.testing.assert_close(layer.conv_states[0], other.conv_states[0], rtol=1e-5, atol=1e-5)
    assert_close(logits, expected)


def test_new_nodes_carry_layer_and_value(make_model, tokens, capture, decode):
    backend = capture(QuantizeState, FuseSsmUpdate)
    decode(backend.compile(make_model()), tokens(2, 37), tokens(2, 1))
    fused = list(iter_calls(backend.graphs[-1].gm.graph, SSM_UPDATE))
    assert [layer_of(node) for node in fused] == ["backbone.layers.0.mixer", "backbone.layers.1.mixer"]
    for node in fused:
        assert value_of(node).shape == (2, 2, 64) and value_of(node).dtype == torch.float32
        assert [op_name(argument) for argument in node.args[:4]] == ["placeholder"] * 4


@pytest.mark.parametrize(
    "options, sizes, state",
    [
        pytest.param({}, {}, {}, id="base"),
        pytest.param({"D": False}, {}, {}, id="without D"),
        pytest.param({"dt_bias": False}, {}, {}, id="without dt_bias"),
        pytest.param({"dt_bias": False, "softplus": False}, {}, {}, id="without softplus"),
        pytest.param({}, {"batch": 1}, {}, id="batch 1"),
        pytest.param({}, {"ngroups": 1}, {}, id="one group"),
        pytest.param({}, {"ngroups": 4}, {}, id="a group a head"),
        pytest.param({}, {"headdim": 5}, {}, id="odd headdim"),
        pytest.param({"dt": lambda dt: dt.clamp(min=0.0)}, {}, {}, id="limit that softplus keeps anyway"),
        pytest.param({}, {}, {"bits": 8}, id="8 bits"),
        pytest.param({}, {}, {"bits": 2}, id="2 bits"),
        pytest.param({}, {}, {"calibrated": True}, id="calibrated"),
        pytest.param({}, {}, {"stochastic": True}, id="stochastic"),
        pytest.param({}, {}, {"bits": 2, "calibrated": True, "stochastic": True}, id="calibrated stochastic"),
    ],
)
def test_same_state_and_output_over_several_steps(capture, options, sizes, state):
    inputs = step_inputs(**sizes)
    backend, (fused, unfused), states = run_both(capture, Step(**options), inputs, make_state(inputs, **state), steps=4)
    assert backend.only.after[SSM_UPDATE] == 1 and backend.only.after[READ] == backend.only.after[STORE] == 0
    assert states[0].rng[0, 1] == 5
    assert_same_state(*states)
    for y, expected in zip(fused, unfused, strict=True):
        assert_close(y, expected)


def test_dynamic_batch(capture):
    backend, step = capture(QuantizeState, FuseSsmUpdate), Step()
    compiled = backend.compile(step)
    for batch in (2, 3, 5):
        inputs = step_inputs(batch=batch)
        state = make_state(inputs)
        expected = step(state.dequantize(), *inputs)
        assert_close(compiled(state, *inputs), expected)
    static, dynamic = backend.graphs
    assert static.after[SSM_UPDATE] == dynamic.after[SSM_UPDATE] == 1
    (node,) = iter_calls(dynamic.gm.graph, SSM_UPDATE)
    assert isinstance(value_of(node).shape[0], torch.SymInt)


def test_bfloat16_inputs(capture):
    inputs = step_inputs(dtype=torch.bfloat16)
    backend, (fused, unfused), _ = run_both(capture, Step(), inputs, make_state(inputs))
    assert backend.only.after[SSM_UPDATE] == 1
    # Both give 8 significant bits; the unfused step also rounds dt and the state to them before the product.
    torch.testing.assert_close(fused[0], unfused[0], rtol=0.05, atol=0.05)


def test_second_run_changes_nothing(capture):
    inputs = step_inputs()
    graphs = []
    for runs in (1, 2):
        torch._dynamo.reset()
        backend = capture(QuantizeState, FuseSsmUpdate, runs=runs)
        backend.compile(Step())(make_state(inputs), *inputs)
        graphs.append(backend.only)
    assert graphs[0].after[SSM_UPDATE] == 1
    assert graphs[0].gm.code == graphs[1].gm.code
    assert len(graphs[0].report.entries) == len(graphs[1].report.entries) == 2


class PerChannel(Step):
    """One parameter [p] per channel in place of one per head, as many channels as heads."""

    def __init__(self, place):
        super().__init__(nheads=8)
        self.place = place
        self.values = torch.nn.Parameter(torch.linspace(-1, 1, 8), requires_grad=False)

    def at(self, place, value):
        if place != self.place:
            return super().at(place, value)
        return self.values[None, :, None].expand(8, 8, 16) if place == "A" else self.values[None].expand(8, 8)


@pytest.mark.parametrize(
    "step, reason",
    [
        pytest.param(Step(dA=lambda dA: dA * 0.5), SkipReason.UNKNOWN_STRUCTURE, id="scaled decay"),
        pytest.param(Step(new=torch.tanh), SkipReason.UNKNOWN_STRUCTURE, id="function of the new state"),
        pytest.param(Step(stored=torch.relu), SkipReason.UNKNOWN_STRUCTURE, id="function of the stored state"),
        pytest.param(Step(dBx=lambda v: v.to(torch.int32).float()), SkipReason.UNKNOWN_STRUCTURE, id="whole numbers"),
        pytest.param(Step(B=lambda B: B * 2), SkipReason.UNKNOWN_STRUCTURE, id="scaled B"),
        pytest.param(Step(B=lambda B: B.flip(1)), SkipReason.UNKNOWN_STRUCTURE, id="groups in another order"),
        pytest.param(Step(skip=torch.tanh), SkipReason.UNKNOWN_STRUCTURE, id="D times something else than x"),
        pytest.param(Step(dt=lambda dt: dt.clamp(max=0.5)), SkipReason.UNKNOWN_STRUCTURE, id="limited dt"),
        pytest.param(
            Step(dt_bias=False, softplus=False, dt=lambda dt: dt.clamp(min=0.0)),
            SkipReason.UNKNOWN_STRUCTURE,
            id="dt limited below, without softplus",
        ),
        pytest.param(Step(dt_raw=lambda dt: dt * torch.arange(1.0, 9.0)), SkipReason.NOT_PER_HEAD, id="dt per channel"),
        pytest.param(Step(A=lambda A: A * torch.arange(1.0, 17.0)), SkipReason.NOT_PER_HEAD, id="A per element"),
        pytest.param(PerChannel("A"), SkipReason.NOT_PER_HEAD, id="A per channel"),
        pytest.param(PerChannel("D"), SkipReason.NOT_PER_HEAD, id="D per channel"),
        pytest.param(PerChannel("bias"), SkipReason.NOT_PER_HEAD, id="dt_bias per channel"),
        pytest.param(Step(end=lambda v: (v[0], v[1].sum())), SkipReason.SECOND_READER, id="second reader"),
        pytest.param(Step(end=lambda v: (v[0], v[2].sum())), SkipReason.SECOND_READER, id="state read again"),
    ],
)
def test_refusals_leave_a_correct_step(capture, step, reason):
    inputs = step_inputs(nheads=8) if isinstance(step, PerChannel) else step_inputs()
    backend, (fused, unfused), states = run_both(capture, step, inputs, make_state(inputs))
    (entry,) = backend.only.skips("fuse_ssm_update")
    assert entry.reason is reason and entry.detail
    assert (backend.only.after[SSM_UPDATE], backend.only.after[STORE]) == (0, 1)
    assert_same_state(*states)
    for found, expected in zip(fused, unfused, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_prompt_that_continues_a_packed_state_is_no_step(make_model, tokens, capture):
    backend = capture(QuantizeState, FuseSsmUpdate)
    compiled = backend.compile(make_model(num_hidden_layers=1))
    with torch.no_grad():
        cache = compiled(tokens(2, 37), use_cache=True).cache_params
        compiled(tokens(2, 37, seed=2), cache_params=cache, use_cache=True)
    assert backend.graphs[-1].after[STORE] == 1
    assert not backend.graphs[-1].skips("fuse_ssm_update")
