"""`QuantizeState`: prefill returns packed states, decode keeps them packed, equal to the plain reference."""

import copy

import pytest
import torch
from regions import Scan, Step, scan_inputs, step_inputs

from qmamba_compile.artifact import Artifact, Header
from qmamba_compile.backend import _make_state
from qmamba_compile.errors import ArtifactError, SkipReason, StrictError
from qmamba_compile.fx_utils import iter_calls, layer_of, op_name, placeholders, value_of
from qmamba_compile.passes import FuseChunkScan, QuantizeState
from qmamba_compile.recurrence import new_ring
from qmamba_compile.state import DSQState

PACK, STORE, READ = "qmamba.quantize_state", "qmamba.quantize_state_", "qmamba.dequantize_state"
INNER = ("packed", "channel_scale", "state_scale", "rng")


def assert_same_state(found, expected):
    for name in INNER:
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("n_layers", [1, 3])
def test_every_layer_hands_over_and_keeps_a_packed_state(make_model, tokens, capture, decode, n_layers):
    backend = capture(QuantizeState)
    _, cache = decode(backend.compile(make_model(num_hidden_layers=n_layers)), tokens(2, 37), tokens(2, 3))
    prefill, step = backend.graphs
    assert (prefill.before["zeros_like"], prefill.before[PACK]) == (2 * n_layers, 0)  # the scan's start, the cache
    assert (prefill.after["zeros_like"], prefill.after[PACK]) == (n_layers, n_layers)
    assert (step.before["copy_"], step.after["copy_"]) == (2 * n_layers, n_layers)  # conv states stay
    assert (step.after[READ], step.after[STORE]) == (n_layers, n_layers)
    assert all(not isinstance(value_of(node), DSQState) for node in placeholders(step.gm.graph))
    paths = [f"backbone.layers.{i}.mixer" for i in range(n_layers)]
    for graph in backend.graphs:
        assert [entry.layer for entry in graph.report.rewritten("quantize_state")] == paths
        assert not graph.report.skips()
    assert all(isinstance(layer.recurrent_states[0], DSQState) for layer in cache.layers)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_prefill_returns_the_reference_of_its_float_state(capture, bits, rounding):
    inputs = scan_inputs()
    backend = capture(QuantizeState, state_bits=bits, rounding=rounding)
    y, state = backend.compile(Scan())(*inputs)
    expected_y, h = Scan()(*inputs)
    seed = int(state.rng[0, 0])
    assert_same_state(state, DSQState.from_float(h, bits, stochastic=rounding == "stochastic", seed=seed))
    assert torch.equal(y, expected_y)
    assert (state.bits, state.stochastic) == (bits, rounding == "stochastic")
    entry = backend.only.report.rewritten("quantize_state")[0]
    assert (entry.bytes_before, entry.bytes_after) == (h.nbytes, state.packed_nbytes)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("stochastic", [False, True])
def test_step_equals_the_subclass_without_any_pass(capture, bits, calibrated, stochastic):
    inputs, step = step_inputs(), Step()
    scale = torch.rand(4, 16) + 0.5 if calibrated else None
    state = DSQState.from_float(torch.randn(2, 4, 8, 16), bits, state_scale=scale, stochastic=stochastic, seed=3)
    expected = copy.deepcopy(state)
    backend = capture(QuantizeState)
    compiled = backend.compile(step)
    for seed in range(3):
        inputs = step_inputs(seed=seed)
        assert torch.equal(compiled(state, *inputs), step(expected, *inputs))
        assert_same_state(state, expected)
    assert (backend.only.after[READ], backend.only.after[STORE]) == (1, 1)
    writes = next(iter_calls(backend.only.gm.graph, STORE)).args
    assert (writes[2] is None, writes[5] is None) == (calibrated, not calibrated)


def state_of(batch=2, bits=4, ring=None, **options):
    return DSQState.from_float(torch.randn(batch, 4, 8, 16), bits, ring=ring, **options)


def ring_of(flush_interval=8, dtype=torch.bfloat16):
    return new_ring(2, 4, 8, 1, 16, flush_interval, dtype=dtype)


REPLACEMENTS = {
    "the same form, other values": (state_of, 0),
    "a clone": (lambda: state_of().clone(), 0),
    "another rounding": (lambda: state_of(stochastic=True), 1),
    "other bits": (lambda: state_of(bits=8), 1),
    "calibrated scales": (lambda: state_of(state_scale=torch.rand(4, 16) + 0.5), 1),
    "with a ring": (lambda: state_of(ring=ring_of()), 1),
    "with a ring of scaled inputs": (lambda: state_of(ring=ring_of(dtype=torch.int8)), 1),
    "a part that is not contiguous": (lambda: state_of(batch=4)[::2], 1),
    "float": (lambda: torch.randn(2, 4, 8, 16), 1),
}


@pytest.mark.parametrize("change", REPLACEMENTS)
def test_guards_on_a_state_are_no_calls_of_python_and_another_form_compiles_again(capture, monkeypatch, change):
    replace, compilations = REPLACEMENTS[change]
    step, backend, guards = Step(), capture(QuantizeState), []
    compiled = backend.compile(step)
    monkeypatch.setattr(
        torch._dynamo.guards, "guard_manager_testing_hook_fn", lambda manager, *_: guards.append(str(manager))
    )
    compiled(state_of(), *step_inputs())
    assert "__tensor_flatten__" not in guards[0] and "___check_metadata" not in guards[0], "these call Python"
    assert guards[0].count("EQUALS_MATCH: L['state'].form") == 1
    assert guards[0].count("source=L['state'].") == 1, "nothing else of the inside is looked at"
    state = replace()
    expected, inputs = copy.deepcopy(state), step_inputs(seed=1)
    backend.graphs.clear()
    assert torch.equal(compiled(state, *inputs), step(expected, *inputs))
    assert len(backend.graphs) == compilations
    if isinstance(state, DSQState):
        assert_same_state(state, expected)


@pytest.mark.parametrize("first, then", [(ring_of(4), None), (ring_of(4), ring_of(4, torch.int8)), (None, ring_of(4))])
def test_a_ring_that_comes_or_goes_compiles_again(capture, first, then):
    backend = capture(QuantizeState)
    compiled = backend.compile(Step())
    for ring, compilations in ((first, 1), (first, 1), (then, 2)):
        compiled(state_of(ring=copy.deepcopy(ring)), *step_inputs())
        assert len(backend.graphs) == compilations


def test_conv_state_is_still_written(make_model, tokens, capture, decode):
    model, prompt, later = make_model(), tokens(2, 37), tokens(2, 6, seed=2)
    _, cache = decode(capture(QuantizeState, state_bits=8).compile(model), prompt, later)
    _, expected = decode(model, prompt, later)
    # Layer 0 sees the same tokens whatever the states; the next layer sees what 8 bits changed.
    first, second = (
        (a.conv_states[0] - b.conv_states[0]).abs().max() for a, b in zip(cache.layers, expected.layers, strict=True)
    )
    assert first <= 1e-6 and second <= 1e-2
    assert expected.layers[0].conv_states[0].abs().max() > 0.1


def test_new_nodes_carry_layer_and_value(make_model, tokens, capture, decode):
    backend = capture(QuantizeState)
    decode(backend.compile(make_model()), tokens(2, 37), tokens(2, 1))
    prefill, step = (graph.gm.graph for graph in backend.graphs)
    layers = ["backbone.layers.0.mixer", "backbone.layers.1.mixer"]
    for graph, name in ((prefill, PACK), (step, READ), (step, STORE)):
        assert [layer_of(node) for node in iter_calls(graph, name)] == layers
    for node in iter_calls(prefill, PACK):
        shapes = [tuple(value.shape) for value in value_of(node)]
        assert shapes == [(2, 2, 64, 16), (2, 2, 64), (2, 2), (2, 2, 32)]
    for node in iter_calls(step, READ):
        assert value_of(node).shape == (2, 2, 64, 32) and value_of(node).dtype == torch.float32


def test_layers_do_not_share_their_noise(make_model, tokens, capture, decode):
    of_seed = []
    for seed in (0, 1):
        torch._dynamo.reset()
        backend = capture(QuantizeState, rounding="stochastic", seed=seed)
        _, cache = decode(backend.compile(make_model()), tokens(3, 9), tokens(3, 2))
        keys = torch.stack([layer.recurrent_states[0].rng[:, 0] for layer in cache.layers])
        assert len(set(keys[:, 0].tolist())) == 2 and bool((keys == keys[:, :1]).all())
        assert [layer.recurrent_states[0].rng[0, 1].item() for layer in cache.layers] == [3, 3]
        of_seed.append(keys[:, 0])
    assert not torch.equal(*of_seed)


def test_second_run_changes_nothing(make_model, tokens, capture, decode):
    graphs = []
    for runs in (1, 2):
        torch._dynamo.reset()
        backend = capture(FuseChunkScan, QuantizeState, runs=runs)
        decode(backend.compile(make_model(num_hidden_layers=1)), tokens(2, 37), tokens(2, 1))
        graphs.append(backend.graphs)
    assert graphs[0][0].after[PACK] == graphs[0][1].after[STORE] == 1
    for once, twice in zip(*graphs, strict=True):
        assert once.gm.code == twice.gm.code
        assert len(once.report.rewritten("quantize_state")) == len(twice.report.rewritten("quantize_state")) == 1


def test_state_bits_none_changes_nothing_in_a_prefill(capture):
    backend = capture(QuantizeState, state_bits=None)
    _, state = backend.compile(Scan())(*scan_inputs())
    assert type(state) is torch.Tensor and backend.only.before == backend.only.after
    assert backend.only.before["einsum"] == 5


@pytest.mark.parametrize("length", [1, 9])
def test_float_cache_is_reported_and_left_alone(make_model, tokens, capture, length):
    model, backend = make_model(), capture(FuseChunkScan, QuantizeState)
    compiled = backend.compile(model)
    with torch.no_grad():
        cache, expected = (model(tokens(2, 37), use_cache=True).cache_params for _ in range(2))
        more = tokens(2, length)
        logits = compiled(more, cache_params=cache, use_cache=True).logits
        torch.testing.assert_close(
            logits, model(more, cache_params=expected, use_cache=True).logits, rtol=1e-4, atol=1e-5
        )
    assert type(cache.layers[0].recurrent_states[0]) is torch.Tensor
    entries = backend.only.skips("quantize_state")
    assert [entry.reason for entry in entries] == [SkipReason.FLOAT_STATE] * 2
    assert all(entry.bytes_before == 2 * 2 * 64 * 32 * 4 for entry in entries)


def test_excluded_layer_keeps_its_float_state_even_when_strict(make_model, tokens, capture, decode):
    backend = capture(QuantizeState, skip_layers=("backbone.layers.0",), strict=True)
    _, cache = decode(backend.compile(make_model()), tokens(2, 37), tokens(2, 2))
    kinds = [type(layer.recurrent_states[0]) for layer in cache.layers]
    assert kinds == [torch.Tensor, DSQState]
    for graph in backend.graphs:
        (entry,) = graph.skips("quantize_state")
        assert (entry.layer, entry.reason) == ("backbone.layers.0.mixer", SkipReason.EXCLUDED)
        assert len(graph.report.rewritten("quantize_state")) == 1


class ReadsItsState(Scan):
    """A prefill that also returns something computed from the state it caches."""

    def forward(self, *inputs):
        y, cached = super().forward(*inputs)
        return y, cached, cached.sum()


def test_prefill_state_that_is_read_again_stays_float(capture):
    backend = capture(QuantizeState)
    results = backend.compile(ReadsItsState())(*scan_inputs())
    (entry,) = backend.only.skips("quantize_state")
    assert entry.reason is SkipReason.SECOND_READER and backend.only.after[PACK] == 0
    for found, expected in zip(results, ReadsItsState()(*scan_inputs()), strict=True):
        assert type(found) is torch.Tensor
        torch.testing.assert_close(found, expected)


def test_strict_raises_on_a_skip(capture):
    with pytest.raises(Exception) as caught:
        capture(QuantizeState, strict=True).compile(ReadsItsState())(*scan_inputs())
    assert isinstance(caught.value.__cause__ or caught.value.inner_exception, StrictError)


def test_odd_dstate_is_refused_by_name(make_model, tokens, capture):
    model = make_model(state_size=31)
    with torch.no_grad(), pytest.raises(Exception, match=r"backbone\.layers\.0\.mixer: dstate=31 .*state_bits=8"):
        capture(QuantizeState).compile(model)(tokens(2, 9), use_cache=True)


def test_write_to_the_state_that_would_be_lost_is_refused(capture):
    step = Step(end=lambda v: (v[0], v[2].zero_().sum()))
    inputs = step_inputs()
    state = DSQState.from_float(torch.randn(2, 4, 8, 16))
    before = copy.deepcopy(state)
    with pytest.raises(Exception, match="zero_"):
        capture(QuantizeState).compile(step)(state, *inputs)
    assert_same_state(state, before)


def test_reader_after_the_store_sees_the_new_state(capture):
    step, inputs = Step(end=lambda v: (v[0], v[2] * 1.0)), step_inputs()
    state = DSQState.from_float(torch.randn(2, 4, 8, 16))
    old = state.dequantize()
    backend = capture(QuantizeState)
    _, seen = backend.compile(step)(state, *inputs)
    assert backend.only.after[READ] == 2
    assert torch.equal(seen, state.dequantize()) and not torch.equal(seen, old)


def one_scale(scale):
    """An artifact for a region that is in no layer."""
    return Artifact(
        {} if scale is None else {".state_scale": scale}, Header("", {}, {}, "", "", {}, {}, {}), "a.safetensors"
    )


def test_calibrated_scales_come_from_the_artifact(capture):
    scale = torch.rand(4, 16) + 0.5
    backend = capture(QuantizeState, state_scales="calibrated", calibration="a.safetensors", artifact=one_scale(scale))
    _, state = backend.compile(Scan())(*scan_inputs())
    _, h = Scan()(*scan_inputs())
    assert_same_state(state, DSQState.from_float(h, 4, state_scale=scale, seed=int(state.rng[0, 0])))
    assert not state.dynamic and backend.only.after[PACK] == 1
    (output,) = backend.only.context.state_outputs
    assert output.width == 3 and _make_state(output, [state.packed, state.channel_scale, state.rng]).bits == 4


@pytest.mark.parametrize("scale", [None, torch.ones(4, 15)], ids=["missing", "shape"])
def test_artifact_that_does_not_fit_the_layer(capture, scale):
    backend = capture(QuantizeState, state_scales="calibrated", calibration="a.safetensors", artifact=one_scale(scale))
    with pytest.raises(Exception) as caught:
        backend.compile(Scan())(*scan_inputs())
    assert isinstance(caught.value.inner_exception, ArtifactError) and "a.safetensors" in str(caught.value)


def test_mixed_states_of_one_cache(make_model, tokens, capture):
    """Two states of different width in one graph: each keeps its own."""
    model, backend = make_model(), capture(QuantizeState, state_bits=8)
    with torch.no_grad():
        cache = backend.compile(model)(tokens(2, 9), use_cache=True).cache_params
        first = cache.layers[0]
        first.recurrent_states[0] = DSQState.from_float(first.recurrent_states[0].dequantize(), 2)
        backend.compile(model)(tokens(2, 1), cache_params=cache, use_cache=True)
    assert [node.args[-1] for node in iter_calls(backend.graphs[-1].gm.graph, READ)] == [2, 8]
    assert [layer.recurrent_states[0].bits for layer in cache.layers] == [2, 8]
    assert op_name(next(iter_calls(backend.graphs[-1].gm.graph, STORE)).args[0]) == "placeholder"
