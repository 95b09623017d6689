"""`FuseConvUpdate`: one mutating operator a step, the same state, and a refusal for whatever is not the step."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qmamba_compile.errors import SkipReason
from qmamba_compile.fx_utils import iter_calls, layer_of, op_name, value_of
from qmamba_compile.passes import FuseConvUpdate

CONV = "qmamba.conv_update"


class Conv(nn.Module):
    """A step of the convolution as transformers writes it. Places: window, stored, weight, conv, y, end."""

    def __init__(self, channels=6, length=4, taps=4, bias=True, silu=True, dtype=torch.float32, **changes):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(channels, 1, taps).to(dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(channels).to(dtype), requires_grad=False) if bias else None
        self.silu, self.changes, self.options = silu, changes, {"padding": 0, "groups": channels}

    def at(self, place, value):
        change = self.changes.get(place)
        return value if change is None else change(value)

    def forward(self, state, x):
        """state [b, d, s]; x [b, 1, d] -> y [b, d, 1] (and what ``end`` adds)."""
        x = x.transpose(1, 2)
        seqlen, length = x.shape[-1], state.shape[-1]
        window = self.at("window", torch.cat([state, x], dim=-1).to(self.weight.dtype))
        state.copy_(self.at("stored", window[:, :, -length:]))
        options = self.at("options", self.options)
        out = F.conv1d(window, self.at("weight", self.weight.squeeze(1).unsqueeze(1)), self.bias, **options)
        y = self.at("conv", out)[:, :, -seqlen:]
        y = F.silu(y) if self.silu else y
        y = self.at("y", y).to(x.dtype)
        return self.at("end", (y, window, state)) if "end" in self.changes else y


def step_inputs(batch=2, seqlen=1, channels=6, length=4, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(batch, channels, length, generator=generator).to(dtype)
    return state, torch.randn(batch, seqlen, channels, generator=generator).to(dtype)


def run_both(capture, module, sizes, steps=3):
    """The step with and without fusion: backend, results, states."""
    backend = capture(FuseConvUpdate)
    compiled = backend.compile(module)
    state, _ = step_inputs(**sizes)
    states, results = (state, state.clone()), ([], [])
    for seed in range(steps):
        x = step_inputs(**sizes, seed=seed)[1]
        results[0].append(compiled(states[0], x))
        results[1].append(module(states[1], x))
    return backend, results, states


@pytest.mark.parametrize("n_layers", [1, 3])
def test_every_layer_becomes_one_operator(make_model, tokens, capture, decode, n_layers):
    model, prompt, later = make_model(num_hidden_layers=n_layers), tokens(2, 37), tokens(2, 6, seed=2)
    backend = capture(FuseConvUpdate)
    expected, expected_cache = decode(model, prompt, later)
    logits, cache = decode(backend.compile(model), prompt, later)
    prefill, step = backend.graphs
    assert prefill.before["conv1d"] == prefill.after["conv1d"] == n_layers and prefill.after[CONV] == 0
    assert not prefill.report.entries
    assert (step.before["conv1d"], step.before["cat"], step.before["copy_"]) == (n_layers, n_layers, 2 * n_layers)
    assert (step.after["conv1d"], step.after["cat"], step.after["copy_"]) == (0, 0, n_layers)
    assert step.after[CONV] == n_layers and not step.report.skips()
    layers = [f"backbone.layers.{i}.mixer" for i in range(n_layers)]
    assert [entry.layer for entry in step.report.rewritten("fuse_conv_update")] == layers
    assert [layer_of(node) for node in iter_calls(step.gm.graph, CONV)] == layers
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    for layer, other in zip(cache.layers, expected_cache.layers, strict=True):
        torch.testing.assert_close(layer.conv_states[0], other.conv_states[0], rtol=1e-4, atol=1e-5)
        assert layer.conv_states[0].dtype == other.conv_states[0].dtype


@pytest.mark.parametrize(
    "options, sizes",
    [
        pytest.param({}, {}, id="base"),
        pytest.param({}, {"batch": 1}, id="batch 1"),
        pytest.param({"bias": False}, {}, id="without bias"),
        pytest.param({"silu": False}, {}, id="without activation"),
        pytest.param({"length": 3}, {"length": 3}, id="a state one shorter"),
        pytest.param({"length": 6}, {"length": 6}, id="a state longer than the taps"),
        pytest.param({"dtype": torch.bfloat16}, {"dtype": torch.bfloat16}, id="bfloat16"),
        pytest.param({"y": lambda y: y + 1}, {}, id="something behind"),
    ],
)
def test_same_state_and_output_over_several_steps(capture, options, sizes):
    backend, (results, expected), states = run_both(capture, Conv(**options), sizes)
    after = backend.only.after
    assert (after[CONV], after["conv1d"], after["cat"], after["copy_"], after["silu"]) == (1, 0, 0, 0, 0)
    assert torch.equal(*states)
    tolerance = 2e-6 if expected[0].dtype == torch.float32 else 0.02
    for y, wanted in zip(results, expected, strict=True):
        assert y.dtype == wanted.dtype
        torch.testing.assert_close(y, wanted, rtol=tolerance, atol=tolerance)
    (node,) = iter_calls(backend.only.gm.graph, CONV)
    assert value_of(node).shape == results[0].shape and op_name(node.args[0]) == "placeholder"


def test_dynamic_batch(capture):
    backend, module = capture(FuseConvUpdate), Conv()
    compiled = backend.compile(module)
    for batch in (2, 3, 5):
        state, x = step_inputs(batch=batch)
        expected_state = state.clone()
        torch.testing.assert_close(compiled(state, x), module(expected_state, x), rtol=2e-6, atol=2e-6)
        assert torch.equal(state, expected_state)
    assert [graph.after[CONV] for graph in backend.graphs] == [1, 1]


def test_second_run_changes_nothing(capture):
    found = []
    for runs in (1, 2):
        torch._dynamo.reset()
        backend = capture(FuseConvUpdate, runs=runs)
        backend.compile(Conv())(*step_inputs())
        found.append((backend.only.gm.code, len(backend.only.report.entries)))
    assert found[0] == found[1] and found[0][1] == 1


@pytest.mark.parametrize(
    "options, sizes, reason",
    [
        pytest.param({}, {"seqlen": 2}, SkipReason.UNKNOWN_STRUCTURE, id="two new tokens"),
        pytest.param({"end": lambda v: (v[0], v[1].sum())}, {}, SkipReason.SECOND_READER, id="window read elsewhere"),
        pytest.param({"end": lambda v: (v[0], v[2].sum())}, {}, SkipReason.SECOND_READER, id="state read again"),
        pytest.param(
            {"options": lambda o: o | {"dilation": 1, "padding": 1}}, {}, SkipReason.UNKNOWN_STRUCTURE, id="padded"
        ),
        pytest.param(
            {"options": lambda o: o | {"groups": 1}, "weight": lambda w: w.expand(6, 6, 4)},
            {},
            SkipReason.UNKNOWN_STRUCTURE,
            id="not depthwise",
        ),
        pytest.param({"conv": lambda out: out.flip(-1)}, {}, SkipReason.SECOND_READER, id="another result"),
    ],
)
def test_refusals_leave_a_correct_step(capture, options, sizes, reason):
    backend, (results, expected), states = run_both(capture, Conv(**options), sizes)
    (entry,) = backend.only.skips("fuse_conv_update")
    assert entry.reason is reason and entry.detail
    assert (backend.only.after[CONV], backend.only.after["conv1d"]) == (0, 1)
    assert torch.equal(*states)
    for found, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    "options", [{"stored": lambda s: s * 2}, {"stored": lambda s: s.flip(-1)}], ids=["scaled", "reversed"]
)
def test_another_state_is_no_anchor(capture, options):
    backend, (results, expected), states = run_both(capture, Conv(**options), {})
    assert backend.only.after[CONV] == 0 and not backend.only.report.entries
    assert torch.equal(*states)
    torch.testing.assert_close(results, expected)


def test_autocast(capture):
    """The convolution is float32 then, which is more than was asked for; what follows sees the dtype it expects."""
    backend, module, (state, x) = capture(FuseConvUpdate), Conv(), step_inputs()
    ours = state.clone()
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = module(state, x), backend.compile(module)(ours, x)
    (node,) = iter_calls(backend.only.gm.graph, CONV)
    (converted,) = node.users
    assert (value_of(node).dtype, value_of(converted).dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    assert torch.equal(ours, state)
