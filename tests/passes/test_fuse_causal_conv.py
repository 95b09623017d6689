"""`FuseCausalConv`: one operator a prompt, the same results, and a refusal for whatever is not the convolution."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qmamba_compile import ops, report
from qmamba_compile.errors import SkipReason
from qmamba_compile.fx_utils import iter_calls, layer_of, value_of
from qmamba_compile.passes import PIPELINE, FuseCausalConv

CONV = "qmamba.causal_conv"


class Conv(nn.Module):
    """The convolution of a prompt as transformers writes it, ahead of a scan. Places: input, options, weight, conv,
    between, y, turned, end.
    """

    def __init__(self, channels=6, taps=4, bias=True, silu=True, dtype=torch.float32, scan=True, **changes):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(channels, 1, taps).to(dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(channels).to(dtype), requires_grad=False) if bias else None
        self.silu, self.changes, self.options = silu, changes, {"padding": taps - 1, "groups": channels}
        self.scan = scan

    def at(self, place, value):
        change = self.changes.get(place)
        return value if change is None else change(value)

    def forward(self, x):
        """x [b, l, d] -> y [b, l, d] and what a scan makes of it (and what ``end`` adds)."""
        seqlen, x = x.shape[1], x.transpose(1, 2)
        options, weight = self.at("options", self.options), self.at("weight", self.weight.squeeze(1).unsqueeze(1))
        inputs = self.at("input", x.to(self.weight.dtype))
        out = F.conv1d(inputs, weight, self.bias, **options)
        y = self.at("conv", out)[:, :, :seqlen]
        self.at("between", inputs)
        y = F.silu(y) if self.silu else y
        y = self.at("turned", self.at("y", y).to(x.dtype).transpose(1, 2))
        scanned = _scan(y) if self.scan else y
        return self.at("end", (y, scanned, out)) if "end" in self.changes else (y, scanned)


def _scan(y):
    """The scan of one head of headdim 2 and dstate 2, what makes a layer a Mamba2 layer."""
    x, B, C = (part.float().unsqueeze(2) for part in y.split(2, dim=-1))
    dt, A = torch.ones_like(x[..., 0]), torch.full((1,), -1.0)
    return torch.ops.qmamba.chunk_scan.default(x, dt, A, B, C, None, None, None, False, 0.0, torch.inf)[0]


def sequence(batch=2, seqlen=9, channels=6, dtype=torch.float32, seed=1):
    return torch.randn(batch, seqlen, channels, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("n_layers", [1, 3])
def test_every_layer_becomes_one_operator(make_model, tokens, capture, decode, n_layers):
    model, prompt, later = make_model(num_hidden_layers=n_layers), tokens(2, 37), tokens(2, 6, seed=2)
    backend = capture(FuseCausalConv)
    expected, expected_cache = decode(model, prompt, later)
    logits, cache = decode(backend.compile(model), prompt, later)
    prefill, step = backend.graphs
    assert (prefill.before["conv1d"], prefill.after["conv1d"], prefill.after[CONV]) == (n_layers, 0, n_layers)
    # A step's convolution is no anchor.
    assert step.after[CONV] == 0 and not step.report.entries
    layers = [f"backbone.layers.{i}.mixer" for i in range(n_layers)]
    assert [entry.layer for entry in prefill.report.rewritten("fuse_causal_conv")] == layers
    assert [layer_of(node) for node in iter_calls(prefill.gm.graph, CONV)] == layers
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    for layer, other in zip(cache.layers, expected_cache.layers, strict=True):
        torch.testing.assert_close(layer.conv_states[0], other.conv_states[0], rtol=1e-4, atol=1e-5)


def test_the_scan_reads_the_rows_that_the_convolution_leaves(make_model, tokens, monkeypatch):
    """All passes, to the strides that kernels are called with: a copy between the two would turn rows over again."""
    seen, scan = [], ops.cpu_scans.chunk_scan

    def note_strides(x, dt, A, B, C, *rest):
        seen.append([(tensor.stride(-1), tensor.stride(1)) for tensor in (x, B, C)])
        return scan(x, dt, A, B, C, *rest)

    monkeypatch.setattr(ops.cpu_scans, "chunk_scan", note_strides)
    model, prompt = make_model(), tokens(2, 37)
    compiled = torch.compile(model, backend="qmamba", options={"inner_backend": "aot_eager"})
    with torch.no_grad():
        compiled(prompt)
    assert seen == [[(1, model.backbone.layers[0].mixer.conv_dim)] * 3] * 2


@pytest.mark.parametrize(
    "options, sizes",
    [
        pytest.param({}, {}, id="base"),
        pytest.param({}, {"batch": 1}, id="batch 1"),
        pytest.param({}, {"seqlen": 1}, id="one token"),
        pytest.param({}, {"seqlen": 2}, id="fewer tokens than taps"),
        pytest.param({"bias": False}, {}, id="without bias"),
        pytest.param({"silu": False}, {}, id="without activation"),
        pytest.param({"taps": 2}, {}, id="two taps"),
        pytest.param({"taps": 9}, {}, id="more taps than a kernel has"),
        pytest.param({"between": lambda x: x.zero_()}, {}, id="an input that is written to before silu"),
        pytest.param({"dtype": torch.bfloat16}, {"dtype": torch.bfloat16}, id="bfloat16"),
        pytest.param({}, {"dtype": torch.bfloat16}, id="converted before and after"),
        pytest.param({"turned": lambda y: y + 1}, {}, id="something behind"),
        pytest.param({"conv": lambda out: out, "options": lambda o: o | {"padding": (3,)}}, {}, id="a sequence of one"),
    ],
)
def test_same_results(capture, options, sizes):
    backend, module, x = capture(FuseCausalConv), Conv(**options), sequence(**sizes)
    # From a copy: one case writes to its input.
    expected = module(x.clone())
    found = backend.compile(module)(x)
    after = backend.only.after
    assert (after[CONV], after["conv1d"], after["silu"]) == (1, 0, 0)
    assert found[0].dtype == expected[0].dtype
    tolerance = 5e-6 if found[0].dtype == torch.float32 else 0.02
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    (node,) = iter_calls(backend.only.gm.graph, CONV)
    assert value_of(node).shape == (*x.shape[::2], x.shape[1])


def test_autocast(capture):
    """The convolution is float32 then, which is more than was asked for; what follows sees the dtype it expects."""
    backend, module, x = capture(FuseCausalConv), Conv(), sequence()
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = module(x), backend.compile(module)(x)
    (node,) = iter_calls(backend.only.gm.graph, CONV)
    (converted,) = node.users
    assert (value_of(node).dtype, value_of(converted).dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_a_result_before_silu_that_is_read_elsewhere_stays(capture):
    module = Conv(silu=False, turned=lambda y: y + F.silu(y))
    backend, x = capture(FuseCausalConv), sequence()
    torch.testing.assert_close(backend.compile(module)(x), module(x), rtol=5e-6, atol=5e-6)
    assert (backend.only.after[CONV], backend.only.after["silu"]) == (1, 1)


def test_dynamic_sizes(capture):
    backend, module = capture(FuseCausalConv), Conv()
    compiled = backend.compile(module)
    for batch, seqlen in ((2, 9), (3, 12), (5, 30), (2, 3)):
        x = sequence(batch=batch, seqlen=seqlen)
        torch.testing.assert_close(compiled(x), module(x), rtol=5e-6, atol=5e-6)
    assert [graph.after[CONV] for graph in backend.graphs] == [1, 1]


def test_second_run_changes_nothing(capture):
    found = []
    for runs in (1, 2):
        torch._dynamo.reset()
        backend = capture(FuseCausalConv, runs=runs)
        backend.compile(Conv())(sequence())
        found.append((backend.only.gm.code, len(backend.only.report.entries)))
    assert found[0] == found[1] and found[0][1] == 1


@pytest.mark.parametrize(
    "options, reason",
    [
        pytest.param({"end": lambda v: (v[0], v[2].sum())}, SkipReason.SECOND_READER, id="later results read"),
        pytest.param(
            {"y": lambda y: y.view(2, -1).view(2, 6, 9)}, SkipReason.UNKNOWN_STRUCTURE, id="read before turned"
        ),
        pytest.param({"y": lambda y: y + 1}, SkipReason.UNKNOWN_STRUCTURE, id="another operation before turned"),
        pytest.param({"conv": lambda out: out[:, :, 1:]}, SkipReason.UNKNOWN_STRUCTURE, id="other results"),
        pytest.param({"conv": lambda out: out.flip(-1)}, SkipReason.SECOND_READER, id="another reader"),
        pytest.param({"options": lambda o: o | {"padding": 4}}, SkipReason.UNKNOWN_STRUCTURE, id="more padding"),
        pytest.param(
            {"options": lambda o: o | {"padding": "same"}}, SkipReason.UNKNOWN_STRUCTURE, id="padding by name"
        ),
        pytest.param(
            {"options": lambda o: o | {"dilation": 2}, "conv": lambda out: F.pad(out, (3, 0))},
            SkipReason.UNKNOWN_STRUCTURE,
            id="dilated",
        ),
        pytest.param(
            {"options": lambda o: o | {"groups": 1}, "weight": lambda w: w.expand(6, 6, 4)},
            SkipReason.UNKNOWN_STRUCTURE,
            id="not depthwise",
        ),
        pytest.param(
            {"input": lambda x: x[0], "conv": lambda out: out[None]}, SkipReason.UNKNOWN_STRUCTURE, id="without batch"
        ),
    ],
)
def test_refusals_leave_a_correct_convolution(capture, options, reason):
    backend, module, x = capture(FuseCausalConv), Conv(**options), sequence()
    torch.testing.assert_close(backend.compile(module)(x), module(x))
    (entry,) = backend.only.skips("fuse_causal_conv")
    assert entry.reason is reason and entry.detail
    assert (backend.only.after[CONV], backend.only.after["conv1d"]) == (0, 1)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"taps": 1}, id="one tap"),
        pytest.param({"options": lambda o: o | {"padding": 0}, "conv": lambda out: F.pad(out, (3, 0))}, id="a step's"),
        pytest.param({"scan": False}, id="no Mamba2 layer"),
        pytest.param({"scan": False, "conv": lambda out: out[:, :, :-3]}, id="no Mamba2 layer, written otherwise"),
    ],
)
def test_other_convolutions_are_no_anchors(capture, options):
    backend, module, x = capture(FuseCausalConv), Conv(**options), sequence()
    torch.testing.assert_close(backend.compile(module)(x), module(x))
    assert backend.only.after[CONV] == 0 and not backend.only.report.entries


def test_its_switch_leaves_the_convolution_to_inductor(make_model, tokens):
    assert FuseCausalConv in PIPELINE
    model, prompt = make_model(num_hidden_layers=1), tokens(2, 37)
    report.recent.clear()
    options = {"inner_backend": "eager", "fuse_causal_conv": False}
    with torch.no_grad():
        torch.compile(model, backend="qmamba", options=options)(prompt)
    assert "fuse_causal_conv" not in report.recent[0].to_json()["passes"]
