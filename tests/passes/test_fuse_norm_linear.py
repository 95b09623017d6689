"""`FuseNormLinear`: the norm and the int8 linear behind it as one operator, the same numbers, and what is no norm."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qmamba_compile.errors import SkipReason
from qmamba_compile.fx_utils import iter_calls, layer_of, value_of
from qmamba_compile.passes import FuseNormLinear, QuantizeLinear

LINEAR, FUSED = "qmamba.w8a8_linear", "qmamba.norm_w8a8_linear"

TOLERANCE = 0.02
"""Of the largest y: a code that differs by one at a tie is 1/127 of one product."""


class Normed(nn.Module):
    """RMSNorm, gated or not, and a linear, as transformers writes them. Places: x, square, h, normed, weighted, end."""

    def __init__(
        self, k=32, group_size=None, dtype=torch.float32, linear_dtype=None, bias=False, rounded=True, **changes
    ):
        super().__init__()
        self.rounded = rounded
        torch.manual_seed(0)
        self.k, self.group_size, self.changes = k, group_size or k, changes
        self.weight = nn.Parameter((torch.rand(k) + 0.5).to(dtype), requires_grad=False)
        self.linear = nn.Linear(k, 24, bias=bias, dtype=linear_dtype or dtype).requires_grad_(False)

    def at(self, place, value):
        change = self.changes.get(place)
        return value if change is None else change(value)

    def forward(self, x, gate=None):
        x = self.at("x", x)
        h = x.to(torch.float32)
        if gate is not None:
            h = h * self.at("activated", F.silu(gate.to(torch.float32)))
        groups = self.at("h", h.view(*h.shape[:-1], self.k // self.group_size, self.group_size))
        variance = self.at("square", groups.pow(2)).mean(-1, keepdim=True)
        groups = groups * torch.rsqrt(self.at("variance", variance) + 1e-5)
        normed = groups.view(*h.shape[:-1], self.k)
        weight, normed = (self.weight, normed.to(x.dtype)) if self.rounded else (self.weight.float(), normed)
        weighted = self.at("weighted", weight * self.at("normed", normed))
        y = self.linear(self.at("input", weighted))
        return self.at("end", (y, weighted, x)) if "end" in self.changes else y


def inputs(*shape, dtype=torch.float32, gate=False, k=32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*(shape or (2, 3)), k, generator=generator).to(dtype)
    return (x, torch.randn(x.shape, generator=generator).to(dtype)) if gate else (x,)


def run_both(capture, make, arguments, dynamic=None):
    """The module with and without fusion: backend, y, expected y."""
    results = []
    for passes in ((QuantizeLinear, FuseNormLinear), (QuantizeLinear,)):
        torch._dynamo.reset()
        backend = capture(*passes)
        fresh = [argument.clone() for argument in arguments]
        results.append((backend, backend.compile(make(), dynamic=dynamic)(*fresh)))
    (fused, y), (unfused, expected) = results
    assert unfused.only.after[LINEAR] == 1 and unfused.only.after[FUSED] == 0
    return fused, y, expected


@pytest.mark.parametrize("n_layers", [1, 3])
def test_every_norm_of_a_model_goes_into_its_linear(make_model, tokens, capture, decode, n_layers):
    results = []
    for passes in ((QuantizeLinear, FuseNormLinear), (QuantizeLinear,)):
        torch._dynamo.reset()
        backend = capture(*passes)
        logits, _ = decode(backend.compile(make_model(num_hidden_layers=n_layers)), tokens(2, 37), tokens(2, 4, seed=2))
        results.append((backend, logits))
    (fused, logits), (_, expected) = results
    assert (logits - expected).abs().max() <= TOLERANCE * expected.abs().max()
    mixers = [f"backbone.layers.{i}.mixer" for i in range(n_layers)]
    for graph in fused.graphs:
        assert (graph.before["rsqrt"], graph.before["linear"]) == (2 * n_layers + 1, 2 * n_layers + 1)
        assert (graph.after["rsqrt"], graph.after[LINEAR], graph.after[FUSED]) == (0, 0, 2 * n_layers + 1)
        layers = [f"{mixer}.{name}" for mixer in mixers for name in ("in_proj", "out_proj")] + ["lm_head"]
        entries = graph.report.rewritten("fuse_norm_linear")
        assert [entry.layer for entry in entries] == layers and not graph.report.skips()
        assert [entry.detail for entry in entries] == ["norm", "gated norm"] * n_layers + ["norm"]
        assert [layer_of(node) for node in iter_calls(graph.gm.graph, FUSED)] == layers


@pytest.mark.parametrize(
    "options, gated, shape",
    [
        pytest.param({}, False, (2, 3), id="base"),
        pytest.param({}, True, (2, 3), id="gated"),
        pytest.param({"group_size": 8}, True, (2, 3), id="gated groups"),
        pytest.param({"bias": True}, False, (5,), id="two dimensions and a bias"),
        pytest.param({"dtype": torch.bfloat16}, True, (2, 3), id="bfloat16"),
        pytest.param({"normed": lambda t: t.float().float()}, False, (2, 3), id="casts that change nothing"),
        pytest.param(
            {"input": lambda t: t.to(torch.bfloat16), "linear_dtype": torch.bfloat16}, True, (2, 3), id="cast"
        ),
        pytest.param(
            {"dtype": torch.bfloat16, "rounded": False, "weighted": lambda t: t.to(torch.bfloat16)},
            False,
            (2, 3),
            id="weighted in float32, as NemotronH has it",
        ),
        pytest.param(
            {"dtype": torch.bfloat16, "rounded": False, "weighted": lambda t: t.to(torch.bfloat16)[:, -1:]},
            True,
            (2, 3),
            id="and then only the last token",
        ),
        pytest.param({"activated": torch.tanh}, True, (2, 3), id="a gate of another kind stays outside"),
        pytest.param({"weighted": lambda t: t[:, -1:, :]}, True, (2, 3), id="only the last token"),
        pytest.param({"weighted": lambda t: t[:1][:, 1:]}, False, (2, 3), id="two slices"),
    ],
)
def test_the_same_numbers(capture, options, gated, shape):
    dtype = options.get("dtype", torch.float32)
    backend, y, expected = run_both(capture, lambda: Normed(**options), inputs(*shape, dtype=dtype, gate=gated))
    graph = backend.only
    assert (graph.after[FUSED], graph.after[LINEAR], graph.after["rsqrt"]) == (1, 0, 0)
    assert y.dtype == expected.dtype and y.shape == expected.shape
    assert (y.float() - expected.float()).abs().max() <= TOLERANCE * expected.float().abs().max()
    (node,) = iter_calls(graph.gm.graph, FUSED)
    assert layer_of(node) == "linear" and value_of(node).shape == y.shape and value_of(node).dtype == y.dtype
    assert node.args[11] is (None if options.get("rounded", True) else torch.float32)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("weight, cast", [(torch.bfloat16, True), (torch.float16, True), (torch.float32, False)])
def test_a_residual_stream_in_float32_is_cast_inside(capture, gate, weight, cast):
    arguments = inputs(gate=gate)
    change = {"x": lambda t: t.to(weight)}
    backend, y, expected = run_both(capture, lambda: Normed(dtype=weight, **change), arguments)
    (node,) = iter_calls(backend.only.gm.graph, FUSED)
    assert node.args[11] is (weight if cast else None) and value_of(node.args[0]).dtype == torch.float32
    assert backend.only.after["to"] == backend.only.after["float"] == 0
    assert y.dtype == expected.dtype == weight
    assert (y.float() - expected.float()).abs().max() <= TOLERANCE * expected.float().abs().max()


def test_dynamic_tokens(capture):
    backend, module = capture(QuantizeLinear, FuseNormLinear), Normed()
    compiled, plain = backend.compile(module), Normed()
    for tokens in (3, 5, 9):
        (x,) = inputs(tokens, 2)
        expected = plain(x)
        assert (compiled(x) - expected).abs().max() <= 0.1 * expected.abs().max()
    assert [graph.after[FUSED] for graph in backend.graphs] == [1, 1]


class Several(Normed):
    """One norm that two linears read."""

    def __init__(self, **changes):
        super().__init__(**changes)
        self.other = nn.Linear(32, 8).requires_grad_(False)

    def forward(self, x):
        _, weighted, _ = super().forward(x)
        return self.linear(weighted) + self.other(weighted).sum(-1, keepdim=True)


def test_a_norm_that_two_int8_linears_read_is_repeated(capture):
    backend = capture(QuantizeLinear, FuseNormLinear)
    module = Several(end=lambda values: values)
    (x,) = inputs()
    expected = module(x)
    y = backend.compile(module)(x)
    assert (backend.only.after[LINEAR], backend.only.after["rsqrt"]) == (0, 0)
    assert backend.only.after[FUSED] >= 2
    assert (y - expected).abs().max() <= 0.1 * expected.abs().max()


def test_a_linear_without_a_norm_is_no_anchor(capture):
    backend = capture(QuantizeLinear, FuseNormLinear)
    backend.compile(nn.Sequential(nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 8)).requires_grad_(False))(*inputs())
    assert backend.only.after[LINEAR] == 2
    assert not [entry for entry in backend.only.report.entries if entry.rewrite == "fuse_norm_linear"]


def test_second_run_changes_nothing(capture):
    codes = []
    for runs in (1, 2):
        torch._dynamo.reset()
        backend = capture(QuantizeLinear, FuseNormLinear, runs=runs)
        backend.compile(Normed())(*inputs())
        codes.append((backend.only.gm.code, len(backend.only.report.entries)))
    assert codes[0] == codes[1] and codes[0][1] == 2


@pytest.mark.parametrize(
    "options, gated, reason",
    [
        pytest.param({"normed": lambda t: t - 0.1}, False, SkipReason.UNKNOWN_STRUCTURE, id="shifted"),
        pytest.param({"weighted": lambda t: t * 2.0}, False, SkipReason.UNKNOWN_STRUCTURE, id="a factor behind"),
        pytest.param({"weighted": F.silu}, False, SkipReason.UNKNOWN_STRUCTURE, id="an activation behind"),
        pytest.param({"square": lambda t: t.abs()}, False, SkipReason.UNKNOWN_STRUCTURE, id="not of squares"),
        pytest.param({"variance": lambda t: t * 2}, False, SkipReason.UNKNOWN_STRUCTURE, id="scaled mean"),
        pytest.param(
            {"weighted": lambda t: t[..., ::2]}, False, SkipReason.UNKNOWN_STRUCTURE, id="half of the features"
        ),
        pytest.param({"normed": lambda t: t.to(torch.bfloat16).float()}, False, SkipReason.DTYPE, id="precision lost"),
        pytest.param({"end": lambda v: (v[0], v[1].sum())}, False, SkipReason.SECOND_READER, id="read elsewhere"),
        pytest.param({"end": lambda v: (v[0], v[2].add_(1))}, False, SkipReason.SECOND_READER, id="x written"),
    ],
)
def test_refusals_change_nothing(capture, options, gated, reason):
    def make():
        module = Normed(**options)
        if options.get("weighted") is not None and module.at("weighted", torch.ones(1, 32)).shape[-1] == 16:
            module.linear = nn.Linear(16, 24).requires_grad_(False)
        return module

    backend, y, expected = run_both(capture, make, inputs(gate=gated))
    (entry,) = backend.only.skips("fuse_norm_linear")
    assert entry.reason is reason and entry.detail and entry.layer == "linear"
    assert (backend.only.after[LINEAR], backend.only.after[FUSED]) == (1, 0)
    if not isinstance(y, tuple):
        y, expected = (y,), (expected,)
    assert torch.equal(y[0], expected[0])
