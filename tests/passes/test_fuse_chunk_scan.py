"""`FuseChunkScan`: one operator for the scan, the same numbers, and a refusal for whatever is not the scan."""

import pytest
import torch
from regions import Scan, scan_inputs

from qmamba_compile.errors import SkipReason
from qmamba_compile.fx_utils import iter_calls, layer_of, value_of
from qmamba_compile.passes import FuseChunkScan

CHUNK_SCAN = "qmamba.chunk_scan"


def assert_same(result, reference):
    # Another order of the same float32 sums: 1e-5 of the largest magnitude is some thirty roundings.
    for found, expected in zip(result, reference, strict=True):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-6


@pytest.mark.parametrize("n_layers", [1, 3])
def test_every_layer_becomes_one_operator(make_model, tokens, capture, n_layers):
    model, prompt = make_model(num_hidden_layers=n_layers), tokens(2, 37)
    backend = capture(FuseChunkScan)
    with torch.no_grad():
        logits = backend.compile(model)(prompt).logits
        expected = model(prompt).logits
    graph = backend.only
    assert (graph.before["einsum"], graph.before[CHUNK_SCAN]) == (5 * n_layers, 0)
    assert (graph.after["einsum"], graph.after[CHUNK_SCAN]) == (0, n_layers)
    assert graph.after["cumsum"] == graph.after["masked_fill"] == 0
    assert [entry.layer for entry in graph.report.rewritten("fuse_chunk_scan")] == [
        f"backbone.layers.{i}.mixer" for i in range(n_layers)
    ]
    assert not graph.report.skips()
    assert_same([logits], [expected])


def test_new_nodes_carry_layer_and_value(make_model, tokens, capture):
    backend = capture(FuseChunkScan)
    with torch.no_grad():
        backend.compile(make_model())(tokens(2, 37))
    fused = list(iter_calls(backend.only.gm.graph, CHUNK_SCAN))
    assert [layer_of(node) for node in fused] == ["backbone.layers.0.mixer", "backbone.layers.1.mixer"]
    for node in fused:
        assert [tuple(value.shape) for value in value_of(node)] == [(2, 37, 2, 64), (2, 2, 64, 32)]
        parts = {user.args[1]: user for user in node.users}
        assert value_of(parts[0]).shape == (2, 37, 2, 64) and value_of(parts[1]).shape == (2, 2, 64, 32)


@pytest.mark.parametrize(
    "options, inputs, initial",
    [
        pytest.param({}, {}, False, id="base"),
        pytest.param({"D": False}, {}, False, id="without D"),
        pytest.param({"dt_bias": False}, {}, False, id="without dt_bias"),
        pytest.param({"dt_bias": False, "softplus": False}, {}, False, id="without softplus"),
        pytest.param({}, {}, True, id="initial state"),
        pytest.param({}, {"ngroups": 1}, True, id="one group"),
        pytest.param({}, {"ngroups": 4}, False, id="a group a head"),
        pytest.param({}, {"seqlen": 1}, False, id="one token"),
        pytest.param({}, {"seqlen": 8}, True, id="exactly one chunk"),
        pytest.param({}, {"seqlen": 24}, False, id="whole chunks"),
        pytest.param({}, {"batch": 1, "headdim": 5, "dstate": 7}, True, id="odd sizes"),
        pytest.param({"dt": lambda dt: dt.clamp(max=0.5)}, {}, False, id="dt limited before"),
        pytest.param({"dt": lambda dt: dt * 2}, {}, False, id="dt scaled before"),
    ],
)
def test_numbers_of_every_form(capture, options, inputs, initial):
    scan, inputs = Scan(**options), scan_inputs(**inputs)
    batch, _, nheads, headdim = inputs[0].shape
    start = torch.randn(batch, nheads, headdim, inputs[2].shape[-1]) if initial else None
    backend = capture(FuseChunkScan)
    result = backend.compile(scan)(*inputs, start)
    assert (backend.only.after[CHUNK_SCAN], backend.only.after["einsum"]) == (1, 0)
    assert_same(result, scan(*inputs, start))


def test_dt_limits_reach_the_operator(make_model, tokens, capture):
    model, prompt = make_model(time_step_limit=(0.01, 0.05)), tokens(2, 37)
    backend = capture(FuseChunkScan)
    with torch.no_grad():
        assert_same([backend.compile(model)(prompt).logits], [model(prompt).logits])
    assert [node.args[-2:] for node in iter_calls(backend.only.gm.graph, CHUNK_SCAN)] == [(0.01, 0.05)] * 2


def test_dynamic_shapes_stay_symbolic(make_model, tokens, capture):
    model, backend = make_model(num_hidden_layers=1), capture(FuseChunkScan)
    compiled = backend.compile(model)
    with torch.no_grad():
        for batch, seqlen in ((2, 37), (3, 45), (5, 51), (4, 61)):
            prompt = tokens(batch, seqlen)
            assert_same([compiled(prompt).logits], [model(prompt).logits])
    static, dynamic = backend.graphs
    assert static.after[CHUNK_SCAN] == dynamic.after[CHUNK_SCAN] == 1
    (fused,) = iter_calls(dynamic.gm.graph, CHUNK_SCAN)
    assert all(isinstance(size, torch.SymInt) for size in value_of(fused)[0].shape[:2])


def test_bfloat16_model(make_model, tokens, capture):
    model, prompt = make_model(dtype=torch.bfloat16), tokens(2, 37)
    backend = capture(FuseChunkScan)
    with torch.no_grad():
        logits = backend.compile(model)(prompt).logits
        expected = make_model(dtype=torch.float32)(prompt).logits
        plain = model(prompt).logits
    assert backend.only.after[CHUNK_SCAN] == 2
    # The operator computes dt in float32, so it is nearer to the float32 model than to the same roundings.
    assert (logits - expected).abs().mean() <= 1.1 * (plain - expected).abs().mean()


def test_unused_final_state(make_model, tokens, capture):
    model, prompt = make_model(), tokens(2, 37)
    backend = capture(FuseChunkScan)
    with torch.no_grad():
        out = backend.compile(model)(prompt, use_cache=False)
        assert_same([out.logits], [model(prompt).logits])
    assert out.cache_params is None and backend.only.after[CHUNK_SCAN] == 2
    for fused in iter_calls(backend.only.gm.graph, CHUNK_SCAN):
        assert [user.args[1] for user in fused.users] == [0]


def test_state_read_before_the_output(capture):
    def end(y, final, G):
        return final.sum() + y

    scan, inputs = Scan(end=end), scan_inputs()
    backend = capture(FuseChunkScan)
    assert_same([backend.compile(scan)(*inputs)], [scan(*inputs)])
    assert backend.only.after[CHUNK_SCAN] == 1


def test_an_inner_value_that_is_read_elsewhere_stays(capture):
    scan, inputs = Scan(end=lambda y, final, G: (y, final, G)), scan_inputs()
    backend = capture(FuseChunkScan)
    assert_same(backend.compile(scan)(*inputs), scan(*inputs))
    assert (backend.only.after[CHUNK_SCAN], backend.only.after["einsum"]) == (1, 1)


def test_second_run_changes_nothing(make_model, tokens, capture):
    once, twice = capture(FuseChunkScan), capture(FuseChunkScan, runs=2)
    for backend in (once, twice):
        torch._dynamo.reset()
        with torch.no_grad():
            backend.compile(make_model())(tokens(2, 37))
    assert once.only.after[CHUNK_SCAN] == 2
    assert once.only.gm.code == twice.only.gm.code
    assert len(once.only.report.entries) == len(twice.only.report.entries) == 2


class BroadcastStart(Scan):
    """A learned initial state [h, p, n], the same for every sequence."""

    def forward(self, x, dt, B, C, initial):
        return super().forward(x, dt, B, C, initial[None].expand(x.shape[0], -1, -1, -1))


class StepPerChannel(Scan):
    """dt of its own for every channel: [b, l, h * p] with one channel a head, by dt_bias [l]."""

    def at(self, place, value):
        return torch.ones(19)[:, None] if place == "bias" else super().at(place, value)


@pytest.mark.parametrize(
    "scan, reason",
    [
        pytest.param(Scan(x=lambda x: x.flip(1)), SkipReason.UNKNOWN_STRUCTURE, id="reversed x"),
        pytest.param(Scan(x=lambda x: x * 2), SkipReason.UNKNOWN_STRUCTURE, id="scaled x"),
        pytest.param(Scan(G=torch.tanh), SkipReason.UNKNOWN_STRUCTURE, id="function of the scores"),
        pytest.param(Scan(G=lambda G: G * 2), SkipReason.UNKNOWN_STRUCTURE, id="scaled scores"),
        pytest.param(Scan(L=torch.sqrt), SkipReason.UNKNOWN_STRUCTURE, id="function of the decay"),
        pytest.param(Scan(L=lambda L: L.tril(-1)), SkipReason.UNKNOWN_STRUCTURE, id="without the diagonal"),
        pytest.param(Scan(output=torch.relu), SkipReason.UNKNOWN_STRUCTURE, id="function of the output"),
        pytest.param(Scan(cut=lambda y, seqlen: y[:, -seqlen:]), SkipReason.UNKNOWN_STRUCTURE, id="cut at the front"),
        pytest.param(
            Scan(x=lambda x: x.to(torch.int32).float()), SkipReason.UNKNOWN_STRUCTURE, id="x in whole numbers"
        ),
        pytest.param(BroadcastStart(), SkipReason.UNKNOWN_STRUCTURE, id="one initial state for all"),
        pytest.param(StepPerChannel(), SkipReason.NOT_PER_HEAD, id="dt_bias per token"),
    ],
)
def test_refusals_leave_the_scan_alone(capture, scan, reason):
    inputs = scan_inputs()
    start = torch.randn(4, 8, 16) if isinstance(scan, BroadcastStart) else None
    backend = capture(FuseChunkScan)
    result = backend.compile(scan)(*inputs, start)
    (entry,) = backend.only.skips("fuse_chunk_scan")
    assert entry.reason is reason and entry.detail
    assert (backend.only.after["einsum"], backend.only.after[CHUNK_SCAN]) == (5, 0)
    assert_same(result, scan(*inputs, start))


def test_skip_per_channel_is_refused_though_there_are_as_many_heads(capture):
    scan, inputs = Scan(nheads=8, D=False), scan_inputs(nheads=8, headdim=8)
    scan.D = torch.nn.Parameter(torch.randn(8), requires_grad=False)
    scan.changes["D"] = lambda D: D[:, 0][None, :]
    backend = capture(FuseChunkScan)
    result = backend.compile(scan)(*inputs)
    (entry,) = backend.only.skips("fuse_chunk_scan")
    assert entry.reason is SkipReason.NOT_PER_HEAD
    assert_same(result, scan(*inputs))
