"""`FuseResidual`: a residual and the int8 linear it is added to as one operator, the same bits, and what is none."""

import pytest
import torch
from torch import nn

from qmamba_compile.errors import SkipReason
from qmamba_compile.fx_utils import iter_calls, layer_of, value_of
from qmamba_compile.passes import FuseNormLinear, FuseResidual, QuantizeLinear

LINEARS = ("qmamba.w8a8_linear", "qmamba.norm_w8a8_linear")


class Block(nn.Module):
    """A linear behind which a residual is added. Places: y, residual, end."""

    def __init__(self, dtype=torch.float32, k=24, **changes):
        super().__init__()
        torch.manual_seed(0)
        self.changes = changes
        self.linear = nn.Linear(k, 24, dtype=dtype).requires_grad_(False)

    def at(self, place, value):
        change = self.changes.get(place)
        return value if change is None else change(value)

    def forward(self, x, residual):
        y = self.linear(x)
        residual, y = self.at("residual", residual), self.at("y", y)
        total = residual + y
        return self.at("end", (total, x, residual, y)) if "end" in self.changes else total


def inputs(dtype=torch.float32, residual_dtype=torch.float32, *shape):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*(shape or (2, 3)), 24, generator=generator).to(dtype)
    return x, (torch.randn(x.shape, generator=generator) * 5).to(residual_dtype)


def run_both(capture, make, arguments):
    """With and without the pass: backend, results, expected results."""
    found = []
    for passes in ((QuantizeLinear, FuseResidual), (QuantizeLinear,)):
        torch._dynamo.reset()
        backend = capture(*passes)
        result = backend.compile(make())(*[argument.clone() for argument in arguments])
        found.append((backend, result if isinstance(result, tuple) else (result,)))
    (fused, y), (_, expected) = found
    return fused, y, expected


@pytest.mark.parametrize("n_layers", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_residual_of_a_model_goes_into_its_linear(make_model, tokens, capture, decode, n_layers, dtype):
    results = []
    for passes in ((QuantizeLinear, FuseNormLinear, FuseResidual), (QuantizeLinear, FuseNormLinear)):
        torch._dynamo.reset()
        backend = capture(*passes)
        model = make_model(num_hidden_layers=n_layers).to(dtype)
        logits, _ = decode(backend.compile(model), tokens(2, 37), tokens(2, 4, seed=2))
        results.append((backend, logits))
    (fused, logits), (_, expected) = results
    assert torch.equal(logits, expected)
    for graph in fused.graphs:
        layers = [f"backbone.layers.{i}.mixer.out_proj" for i in range(n_layers)]
        assert [entry.layer for entry in graph.report.rewritten("fuse_residual")] == layers
        assert not graph.report.skips()
        fused_layers = [layer_of(node) for node in iter_calls(graph.gm.graph, LINEARS[1]) if node.args[10] is not None]
        assert fused_layers == layers
        for node in iter_calls(graph.gm.graph, LINEARS[1]):
            # As the model has it: the residual stream in float32, whatever the weights are in.
            assert value_of(node).dtype == (torch.float32 if node.args[10] is not None else dtype)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="base"),
        pytest.param({"y": lambda y: y, "residual": lambda r: r.to(torch.float32)}, id="cast residual"),
        pytest.param({"residual": torch.sin}, id="computed in between"),
        pytest.param({"end": lambda values: (values[0], values[2].cos())}, id="residual read elsewhere"),
        pytest.param({"end": lambda values: (values[0] * 1, values[1].add_(1))}, id="x written behind"),
        pytest.param({"residual": lambda r: r.mT.contiguous().mT}, id="transposed residual"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits(capture, changes, dtype, residual_dtype):
    backend, y, expected = run_both(capture, lambda: Block(dtype, **changes), inputs(dtype, residual_dtype))
    (node,) = iter_calls(backend.only.gm.graph, LINEARS[0])
    assert node.args[6] is not None and backend.only.after["add"] == 0
    assert layer_of(node) == "linear" and value_of(node).dtype == expected[0].dtype
    for a, b in zip(y, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_the_sum_of_two_linears_takes_one_of_them_as_its_residual(capture):
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.left, self.right = (nn.Linear(24, 24).requires_grad_(False) for _ in range(2))

        def forward(self, x, residual):
            return residual + (self.left(x) + self.right(x))

    backend, y, expected = run_both(capture, Parallel, inputs())
    assert torch.equal(y[0], expected[0])
    residuals = [node.args[6:7] for node in iter_calls(backend.only.gm.graph, LINEARS[0])]
    assert sum(residual not in ((), (None,)) for residual in residuals) == 1
    assert backend.only.after["add"] == 1


def test_second_run_changes_nothing(capture):
    codes = []
    for runs in (1, 2):
        torch._dynamo.reset()
        backend = capture(QuantizeLinear, FuseResidual, runs=runs)
        backend.compile(Block())(*inputs())
        codes.append((backend.only.gm.code, len(backend.only.report.entries)))
    assert codes[0] == codes[1] and codes[0][1] == 2


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(lambda linear, x, r: (linear(x), x.zero_(), r), id="x"),
        pytest.param(lambda linear, x, r: (linear(x[:]), x.zero_(), r), id="what x is a view of"),
        pytest.param(lambda linear, x, r: (linear(x), x[0].zero_(), r), id="a view of x"),
    ],
)
def test_a_write_between_the_linear_and_the_sum(capture, parts):
    class Written(Block):
        def forward(self, x, residual):
            y, _, residual = parts(self.linear, x, residual)
            return residual + y

    backend, y, expected = run_both(capture, Written, inputs())
    (entry,) = backend.only.skips("fuse_residual")
    assert entry.reason is SkipReason.SECOND_READER and entry.detail and entry.layer == "linear"
    assert backend.only.after["add"] == 1
    for a, b in zip(y, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"y": lambda y: y * 0.5}, id="a multiplier in between"),
        pytest.param({"residual": lambda r: r[..., :1]}, id="broadcast"),
        pytest.param({"residual": lambda r: r[0]}, id="of another rank"),
        pytest.param({"residual": lambda r: 2.0}, id="a number"),
        pytest.param({"residual": lambda r: r.double()}, id="float64"),
        pytest.param({"residual": lambda r: r.round().int()}, id="integers"),
        pytest.param({"end": lambda v: (v[0], v[3].sin())}, id="y read elsewhere"),
    ],
)
def test_other_sums_are_no_anchors(capture, changes):
    backend, y, expected = run_both(capture, lambda: Block(**changes), inputs())
    assert not [entry for entry in backend.only.report.entries if entry.rewrite == "fuse_residual"]
    assert backend.only.after["add"] == 1 and torch.equal(y[0], expected[0])


def test_a_linear_is_not_its_own_residual(capture):
    class Doubled(Block):
        def forward(self, x, residual):
            y = self.linear(x)
            return y + y

    backend, y, expected = run_both(capture, Doubled, inputs())
    assert torch.equal(y[0], expected[0]) and backend.only.after[LINEARS[0]] == 1
    assert not [entry for entry in backend.only.report.entries if entry.rewrite == "fuse_residual"]


def test_a_scaled_sum_is_no_anchor(capture):
    class Scaled(Block):
        def forward(self, x, residual):
            return torch.add(residual, self.linear(x), alpha=2)

    backend, y, expected = run_both(capture, Scaled, inputs())
    assert torch.equal(y[0], expected[0]) and backend.only.after["add"] == 1
    assert not [entry for entry in backend.only.report.entries if entry.rewrite == "fuse_residual"]


def test_dynamic_tokens(capture):
    backend, module = capture(QuantizeLinear, FuseResidual), Block()
    compiled = backend.compile(module)
    for tokens in (3, 5, 9):
        x, residual = inputs(torch.float32, torch.float32, tokens, 2)
        y = compiled(x, residual)
        assert y.shape == residual.shape
    assert [graph.after["add"] for graph in backend.graphs] == [0, 0]
