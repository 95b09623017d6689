"""`QuantizeLinear`: int8 weights in place of float ones, equal to the plain reference, and what it leaves alone."""

import gc
import pathlib
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchao.quantization import Int8Tensor, PerRow, PerTensor
from torchao.quantization.quant_primitives import MappingType

from qmamba_compile import quant
from qmamba_compile.errors import SkipReason, StrictError
from qmamba_compile.fx_utils import iter_calls, layer_of, value_of
from qmamba_compile.passes import QuantizeLinear
from qmamba_compile.passes.int8_weight import BLOCK_WEIGHTS, quantize_for_layer, quantize_weight

LINEAR = "qmamba.w8a8_linear"


def reference(x, weight, bias=None):
    """W8A8 spelled out: both operands on their grids, the product exact in float64."""
    codes, scale = quant.quantize_rows(weight)
    rows, row_scale = quant.quantize_rows(x.reshape(-1, x.shape[-1]))
    product = (rows.double() @ codes.double().t()).float() * row_scale * scale.view(1, -1)
    y = product if bias is None else product + bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], -1)


def linear(k=16, o=24, bias=True, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Linear(k, o, bias=bias).to(dtype).requires_grad_(False)


class Two(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.second(F.silu(self.first(x)))


@pytest.mark.parametrize("n_layers", [1, 3])
def test_every_linear_becomes_int8(make_model, tokens, capture, n_layers):
    model, backend = make_model(num_hidden_layers=n_layers), capture(QuantizeLinear)
    with torch.no_grad():
        backend.compile(model)(tokens(2, 9))
    count = 2 * n_layers + 1
    graph = backend.only
    assert (graph.before["linear"], graph.before[LINEAR]) == (count, 0)
    assert (graph.after["linear"], graph.after[LINEAR]) == (0, count)
    expected = [f"backbone.layers.{i}.mixer.{name}" for i in range(n_layers) for name in ("in_proj", "out_proj")]
    entries = graph.report.rewritten("quantize_linear")
    assert [entry.layer for entry in entries] == [*expected, "lm_head"]
    assert [layer_of(node) for node in iter_calls(graph.gm.graph, LINEAR)] == [*expected, "lm_head"]
    assert not graph.report.skips()
    for entry in entries:
        weight = model.get_submodule(entry.layer).weight
        assert entry.bytes_before == 4 * weight.numel()
        assert entry.bytes_after == weight.numel() + 4 * weight.shape[0] == weight.qdata.nbytes + weight.scale.nbytes


@pytest.mark.skipif(
    not pathlib.Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a system without huge pages"
)
def test_weights_share_huge_pages(capture):
    layers, backend = Two(linear(600, 512), linear(512, 600)), capture(QuantizeLinear)
    with torch.no_grad():
        backend.compile(layers)(torch.randn(2, 600))
    first, second = (layer.weight.qdata for layer in (layers.first, layers.second))
    assert second.data_ptr() == first.data_ptr() + first.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 16), (16,), (2, 5, 16), (40, 16)], ids=str)
def test_numbers(capture, dtype, shape):
    layers = Two(linear(dtype=dtype), linear(24, 8, bias=False, dtype=dtype))
    x = torch.randn(shape).to(dtype)
    expected = reference(F.silu(reference(x, layers.first.weight, layers.first.bias)).to(dtype), layers.second.weight)
    backend = capture(QuantizeLinear)
    y = backend.compile(layers)(x)
    assert backend.only.after[LINEAR] == 2
    assert y.dtype == dtype and y.shape == (*shape[:-1], 8)
    torch.testing.assert_close(y, expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
    for node in iter_calls(backend.only.gm.graph, LINEAR):
        assert value_of(node).dtype == dtype and value_of(node).dim() == len(shape)


def test_dynamic_rows(capture):
    layers, backend = Two(linear(), linear(24, 8)), capture(QuantizeLinear)
    floats = [layers.first.weight.clone(), layers.second.weight.clone()]
    compiled = backend.compile(layers)
    for rows in (3, 5, 9):
        x = torch.randn(rows, 16)
        expected = reference(F.silu(reference(x, floats[0], layers.first.bias)), floats[1], layers.second.bias)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
    assert [graph.after[LINEAR] for graph in backend.graphs] == [2, 2]


def test_float_weight_is_gone_and_the_model_holds_int8(capture):
    layers = Two(linear(), linear(24, 8))
    floats = [weakref.ref(layer.weight) for layer in (layers.first, layers.second)]
    storages = {layer.weight.data_ptr() for layer in (layers.first, layers.second)}
    backend = capture(QuantizeLinear)
    backend.compile(layers)(torch.randn(3, 16))
    assert backend.only.after[LINEAR] == 2
    backend.graphs.clear()
    gc.collect()
    assert [reference() for reference in floats] == [None, None]
    alive = {t.data_ptr() for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and t.shape == (24, 16)}
    assert not alive & storages
    for layer in (layers.first, layers.second):
        assert isinstance(layer.weight, Int8Tensor) and isinstance(layer.weight, nn.Parameter)
        assert layer.weight.qdata.dtype == torch.int8 and not layer.weight.requires_grad
    assert {name for name, _ in layers.named_parameters()} == {
        "first.weight",
        "first.bias",
        "second.weight",
        "second.bias",
    }


def test_a_weight_that_someone_else_holds_does_not_disturb(capture):
    """An optimizer, a list of parameters: the float tensor lives on, the compiled model uses int8 all the same."""
    layers = Two(linear(), linear(24, 8))
    held = list(layers.parameters())
    backend = capture(QuantizeLinear)
    compiled = backend.compile(layers)
    first = compiled(torch.randn(3, 16))
    assert first.shape == (3, 8) and backend.only.after[LINEAR] == 2
    compiled(torch.randn(3, 16))
    assert len(backend.graphs) == 1
    assert type(held[0]) is nn.Parameter and isinstance(layers.first.weight, Int8Tensor)


@pytest.mark.usefixtures("exact_torchao")
def test_eager_model_works_afterwards(capture):
    layers, x = Two(linear(), linear(24, 8)), torch.randn(3, 16)
    y = capture(QuantizeLinear).compile(layers)(x)
    assert isinstance(layers.first.weight, Int8Tensor)
    # torchao rounds the activations with a scale that is a few units in the last place off.
    torch.testing.assert_close(layers(x), y, rtol=0.02, atol=0.02)


def test_later_graphs_find_the_int8_weight(capture):
    layers, backend = Two(linear(), linear(24, 8)), capture(QuantizeLinear)
    compiled = backend.compile(layers)
    compiled(torch.randn(3, 16))
    held = layers.first.weight
    compiled(torch.randn(2, 3, 16))
    assert [graph.after[LINEAR] for graph in backend.graphs] == [2, 2]
    assert layers.first.weight is held


PARTS = {*Int8Tensor.tensor_data_names, "block_size", "dtype", "zero_point", "act_pre_scale", "act_quant_kwargs"}


def like(weight: Int8Tensor, **changes) -> nn.Parameter:
    """An int8 weight made of the parts of another."""
    kept = {name: getattr(weight, name) for name in PARTS if name not in changes}
    return nn.Parameter(Int8Tensor(**kept, **changes), requires_grad=False)


REPLACEMENTS = {
    "the same form, other values": lambda weight: quantize_weight(torch.randn(weight.shape)),
    "with factors": lambda weight: quantize_weight(torch.randn(weight.shape), smooth=torch.rand(16) + 0.5),
    "without a zero point": lambda weight: like(weight, zero_point=None),
    "static activations": lambda weight: like(weight, act_quant_kwargs=None, act_quant_scale=torch.ones(1, 1)),
    "float activations": lambda weight: like(weight, act_quant_kwargs=None),
    "one scale": lambda weight: like(weight, scale=torch.ones(1, 1), block_size=list(weight.shape)),
    "codes in another layout": lambda weight: like(weight, qdata=weight.qdata.t().contiguous().t()),
    "scales in another dtype": lambda weight: like(weight, scale=weight.scale.double()),
    "another dtype": lambda weight: like(weight, dtype=torch.bfloat16),
    "another size": lambda weight: quantize_weight(torch.randn(24, 8)),
    "float": lambda weight: torch.randn(weight.shape),
}


@pytest.mark.parametrize("graph", ["replaces the float weight", "finds an int8 weight"])
@pytest.mark.parametrize("change", REPLACEMENTS)
def test_another_weight_compiles_again(capture, graph, change):
    layers, backend = Two(linear(), linear(24, 8)), capture(QuantizeLinear)
    compiled = backend.compile(layers)
    compiled(torch.randn(3, 16))
    if graph == "finds an int8 weight":
        torch._dynamo.reset()
        compiled(torch.randn(3, 16))
    backend.graphs.clear()
    compiled(torch.randn(3, 16))
    assert not backend.graphs
    layers.first.weight = nn.Parameter(REPLACEMENTS[change](layers.first.weight), requires_grad=False)
    compiled(torch.randn(3, layers.first.weight.shape[1]).to(layers.first.weight.dtype))
    assert len(backend.graphs) == 1


def test_guards_do_not_look_into_an_int8_weight(capture, monkeypatch):
    """They see by the version of a module's dictionaries, where Dynamo is told to, that it holds the same weights."""
    layers, backend, guards = Two(linear(), linear(24, 8)), capture(QuantizeLinear), []
    compiled = backend.compile(layers)
    compiled(torch.randn(3, 16))
    torch._dynamo.reset()  # the next graph finds int8 weights
    monkeypatch.setattr(
        torch._dynamo.guards, "guard_manager_testing_hook_fn", lambda manager, *_: guards.append(str(manager))
    )
    with torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=True):
        compiled(torch.randn(3, 16))
    assert "__tensor_flatten__" not in guards[0] and "___check_metadata" not in guards[0], "these call Python"
    assert "['weight']." not in guards[0].replace("['weight'] is the same object", "")
    (first,) = [line for line in guards[0].splitlines() if "source=L['self']._modules['first'], " in line]
    assert "tag_safe=(True, " in first


class Tied(nn.Module):
    """An embedding whose weight is the head's, too."""

    def __init__(self, dtype=torch.float32, **options):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 16, **options).to(dtype).requires_grad_(False)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids=None, x=None):
        return self.head(self.embedding(ids) if x is None else x)


IDS = torch.tensor([[3, 1, 4], [1, 5, 19]])


def table(weight):
    """What an int8 table stands for, in the dtype of ``weight``."""
    codes, scale = quant.quantize_rows(weight)
    return (codes * scale).to(weight.dtype)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 1}, {"sparse": True, "scale_grad_by_freq": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tied_embedding_reads_the_codes_of_its_linear(capture, dtype, options):
    model = Tied(dtype, **options)
    weight, backend = model.head.weight.clone(), capture(QuantizeLinear)
    y = backend.compile(model)(IDS)
    rows = table(weight)[IDS]
    assert torch.equal(y, torch.ops.qmamba.w8a8_linear(rows, *quant.quantize_rows(weight), None, None, None))
    assert y.dtype == dtype and not torch.equal(rows, weight[IDS])
    graph = backend.only
    assert (graph.before["embedding"], graph.before["linear"]) == (1, 1)
    assert (graph.after["embedding"], graph.after["aten.embedding"], graph.after[LINEAR]) == (0, 2, 1)
    head, embedding = graph.report.rewritten("quantize_linear")
    assert [(entry.layer, entry.detail) for entry in (head, embedding)] == [("head", "int8"), ("embedding", "int8")]
    assert (head.bytes_before, head.bytes_after) == (weight.nbytes, 20 * 16 + 20 * 4)
    assert embedding.bytes_before == embedding.bytes_after == 0, "counted with the head"
    (lookup,) = [node for node in graph.gm.graph.nodes if node.target is torch.ops.aten.mul.Tensor]
    assert layer_of(lookup) == "embedding" and value_of(lookup).shape == (2, 3, 16)
    # The same in eager.
    assert isinstance(model.embedding.weight, Int8Tensor) and model.head.weight is model.embedding.weight
    assert torch.equal(model.embedding(IDS), rows)


@pytest.mark.parametrize("first", ["ids", "vectors"])
def test_graphs_with_and_without_the_embedding_share_one_table(capture, first):
    model, backend = Tied(), capture(QuantizeLinear)
    rows = table(model.head.weight)[IDS]
    float_weight, compiled = weakref.ref(model.head.weight), backend.compile(model)
    calls = [lambda: compiled(IDS), lambda: compiled(x=rows)]
    one = calls[first == "vectors"]()
    held = model.head.weight
    gc.collect()
    assert float_weight() is None and isinstance(held, Int8Tensor) and model.embedding.weight is held
    assert torch.equal(calls[first == "ids"](), one)
    assert torch.equal(calls[0](), calls[1]()) and len(backend.graphs) == 2
    assert model.embedding.weight is held and [graph.after["aten.embedding"] for graph in backend.graphs].count(2) == 1
    assert not any(graph.report.skips() for graph in backend.graphs)


def test_a_graph_with_the_embedding_alone_finds_the_table(capture):
    model, backend = Tied(), capture(QuantizeLinear)
    rows = table(model.head.weight)[IDS]
    alone = backend.compile(model.embedding)
    assert torch.equal(alone(IDS), model.embedding.weight[IDS]), "nothing is shared with a linear that is int8"
    backend.compile(model)(x=rows)
    assert torch.equal(alone(IDS), rows)
    assert [graph.after["embedding"] for graph in backend.graphs] == [1, 0, 0]
    (entry,) = backend.graphs[-1].report.rewritten("quantize_linear")
    assert (entry.bytes_before, entry.bytes_after) == (4 * 20 * 16, 20 * 16 + 20 * 4)


def test_guards_of_a_shared_table_call_no_python(capture, monkeypatch):
    model, guards = Tied(), []
    capture(QuantizeLinear).compile(model)(IDS)
    torch._dynamo.reset()  # the next graph finds the table in int8
    monkeypatch.setattr(
        torch._dynamo.guards, "guard_manager_testing_hook_fn", lambda manager, *_: guards.append(str(manager))
    )
    capture(QuantizeLinear).compile(model)(IDS)
    assert "is the same object" in guards[0]
    assert "__tensor_flatten__" not in guards[0] and "___check_metadata" not in guards[0]


class ReadsOtherwise(Tied):
    def forward(self, ids):
        return self.head(self.embedding(ids)) + self.embedding.weight.sum()


class Holder(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight


class HeldOtherwise(Tied):
    def __init__(self):
        super().__init__()
        self.other = Holder(self.head.weight)


@pytest.mark.parametrize(
    "model, options, reason",
    [
        (Tied, {"skip_layers": ("embedding",)}, SkipReason.EXCLUDED),
        (lambda: Tied(max_norm=1.0), {}, SkipReason.SECOND_READER),
        (ReadsOtherwise, {}, SkipReason.SECOND_READER),
        (HeldOtherwise, {}, SkipReason.SECOND_READER),
        (Tied, {"smooth": torch.rand(16) + 0.5}, SkipReason.OTHER_WEIGHT),
        (Tied, {"weight_bcdt": torch.randn(5, 16)}, SkipReason.OTHER_WEIGHT),
    ],
    ids=["excluded", "max_norm", "read otherwise", "held otherwise", "smoothed", "tuned"],
)
def test_an_embedding_that_must_stay_float_has_its_linear_quantized_beside_it(capture, model, options, reason):
    model = model()
    artifact = Scales("head", **{name: options.pop(name) for name in ("smooth", "weight_bcdt") & options.keys()})
    held, backend = model.head.weight, capture(QuantizeLinear, artifact=artifact, **options)
    rows = model.embedding(IDS)
    beside = quantize_for_layer(held, "head", artifact)
    expected = torch.ops.qmamba.w8a8_linear(rows, beside.qdata, beside.scale, None, beside.act_pre_scale, None)
    expected = expected + held.sum() if isinstance(model, ReadsOtherwise) else expected
    compiled = backend.compile(model)
    torch.testing.assert_close(compiled(IDS), expected, rtol=1e-5, atol=1e-5)
    assert model.head.weight is held and model.embedding.weight is held and type(held) is nn.Parameter
    (entry,) = backend.only.skips("quantize_linear")
    assert (entry.layer, entry.reason) == ("embedding", reason) and entry.detail
    (head,) = backend.only.report.rewritten("quantize_linear")
    factors = 0 if beside.act_pre_scale is None else beside.act_pre_scale.nbytes
    assert (head.bytes_before, head.bytes_after) == (held.nbytes, held.nbytes + 20 * 16 + 20 * 4 + factors)


@pytest.mark.parametrize("with_embedding", [True, False], ids=["from ids", "from vectors"])
def test_a_table_that_stays_float_is_followed(capture, with_embedding):
    model, backend = Tied(), capture(QuantizeLinear, skip_layers=("embedding",))
    compiled = backend.compile(model)
    for factor in (1.0, 0.5):
        with torch.no_grad():
            model.embedding.weight.mul_(factor)
        x = model.embedding(IDS)
        y = compiled(IDS) if with_embedding else compiled(x=x)
        torch.testing.assert_close(y, reference(x, model.embedding.weight), rtol=1e-5, atol=1e-6)
    assert backend.only.after[LINEAR] == 1
    assert type(model.embedding.weight) is nn.Parameter and model.head.weight is model.embedding.weight


def test_a_head_left_alone_leaves_its_embedding_alone(capture):
    model, backend = Tied(), capture(QuantizeLinear, skip_layers=("head",))
    assert torch.equal(backend.compile(model)(IDS), model(IDS))
    assert type(model.embedding.weight) is nn.Parameter and backend.only.after["embedding"] == 1
    assert [entry.layer for entry in backend.only.skips("quantize_linear")] == ["head"]


def test_an_embedding_of_its_own_stays_float(capture):
    model, backend = Tied(), capture(QuantizeLinear, strict=True)
    model.head.weight = nn.Parameter(model.head.weight.clone(), requires_grad=False)
    y = backend.compile(model)(IDS)
    assert torch.equal(
        y,
        torch.ops.qmamba.w8a8_linear(
            model.embedding(IDS), *quant.quantize_rows(model.embedding.weight), None, None, None
        ),
    )
    assert type(model.embedding.weight) is nn.Parameter and isinstance(model.head.weight, Int8Tensor)
    assert [entry.layer for entry in backend.only.report.entries] == ["head"]


def test_a_table_of_another_form_is_left_to_torchao(capture):
    model, backend = nn.Embedding(20, 16), capture(QuantizeLinear)
    weight = quantize_weight(model.weight.detach(), smooth=torch.rand(16) + 0.5)
    model.weight = nn.Parameter(weight, requires_grad=False)
    assert torch.equal(backend.compile(model)(IDS), (weight.qdata * weight.scale)[IDS])
    (entry,) = backend.only.skips("quantize_linear")
    assert entry.reason is SkipReason.DTYPE and backend.only.after["embedding"] == 1


@pytest.mark.parametrize("granularity", [PerRow(), PerTensor()], ids=["rows", "tensor"])
@pytest.mark.parametrize("mapping", [MappingType.SYMMETRIC, MappingType.ASYMMETRIC], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lookup_in_eager_has_the_values_of_the_whole_table(granularity, mapping, dtype):
    torch.manual_seed(0)
    weight = Int8Tensor.from_hp(torch.randn(20, 16).to(dtype) + 0.5, granularity, mapping)
    found = F.embedding(IDS, weight, padding_idx=1)
    assert found.dtype == dtype and torch.equal(found, weight.dequantize()[IDS])


class Shared(nn.Module):
    """Two layers, one parameter, as in Zamba2's shared blocks."""

    def __init__(self):
        super().__init__()
        self.first, self.second = linear(16, 16), linear(16, 16, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


def test_shared_weight_is_quantized_once(capture):
    model, x = Shared(), torch.randn(3, 16)
    weight = model.first.weight.clone()
    backend = capture(QuantizeLinear)
    y = backend.compile(model)(x)
    assert model.first.weight is model.second.weight and isinstance(model.first.weight, Int8Tensor)
    first, second = backend.only.report.rewritten("quantize_linear")
    assert (first.bytes_before, second.bytes_before) == (1024, 0)
    torch.testing.assert_close(y, reference(reference(x, weight, model.first.bias), weight), rtol=1e-5, atol=1e-5)


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.expert = linear(16, 4, bias=False), linear(16, 16)

    def forward(self, x):
        scores, chosen = F.softmax(self.router(x).float(), dim=-1).topk(2, dim=-1)
        return self.expert(x) * scores.sum(-1, keepdim=True), chosen


class ComputedWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain, self.base = linear(16, 16), nn.Parameter(torch.randn(16, 16), requires_grad=False)

    def forward(self, x):
        return F.linear(self.plain(x), self.base * 2)


class WeightIsAnInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain, self.given = linear(16, 16), torch.randn(8, 16)

    def forward(self, x):
        return F.linear(self.plain(x), self.given)


class DoubleWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain, self.other = linear(16, 16), linear(16, 16, dtype=torch.float64)

    def forward(self, x):
        return self.other(self.plain(x).double())


@pytest.mark.parametrize(
    "model, options, layer, reason",
    [
        (Router, {}, "router", SkipReason.ROUTER),
        (ComputedWeight, {}, "", SkipReason.NOT_A_PARAMETER),
        (WeightIsAnInput, {}, "", SkipReason.NOT_A_PARAMETER),
        (DoubleWeight, {}, "other", SkipReason.DTYPE),
        (lambda: Two(linear(), linear(24, 8)), {"skip_layers": ("second",)}, "second", SkipReason.EXCLUDED),
    ],
    ids=["router", "computed", "input", "float64", "excluded"],
)
def test_refusals_leave_one_linear_alone(capture, model, options, layer, reason):
    torch.manual_seed(0)
    model, backend, x = model(), capture(QuantizeLinear, **options), torch.randn(3, 16)
    backend.compile(model)(x)
    (entry,) = backend.only.skips("quantize_linear")
    assert (entry.layer, entry.reason) == (layer, reason) and entry.detail
    assert (backend.only.after["linear"], backend.only.after[LINEAR]) == (1, 1)
    floats = {name for name, p in model.named_parameters() if p.dim() == 2 and type(p) is nn.Parameter}
    assert floats == ({f"{layer}.weight"} if layer else {"base"} & set(dict(model.named_parameters())))


def test_excluding_a_parent_excludes_what_is_below(make_model, tokens, capture):
    backend = capture(QuantizeLinear, skip_layers=("backbone.layers.1", "lm_head"), strict=True)
    with torch.no_grad():
        backend.compile(make_model())(tokens(2, 9))
    assert (backend.only.after["linear"], backend.only.after[LINEAR]) == (3, 2)


def test_strict_raises_before_any_weight_is_touched_by_that_layer(capture):
    model = Router()
    with pytest.raises(Exception) as caught:
        capture(QuantizeLinear, strict=True).compile(model)(torch.randn(3, 16))
    assert isinstance(caught.value.inner_exception, StrictError)
    assert type(model.router.weight) is nn.Parameter


def test_weights_none_changes_nothing(capture):
    model, backend = Two(linear(), linear(24, 8)), capture(QuantizeLinear, weights=None)
    backend.compile(model)(torch.randn(3, 16))
    assert backend.only.before == backend.only.after and backend.only.after["linear"] == 2
    assert type(model.first.weight) is nn.Parameter


def test_second_run_changes_nothing(capture):
    graphs = []
    for runs in (1, 2):
        torch._dynamo.reset()
        backend = capture(QuantizeLinear, runs=runs)
        backend.compile(Two(linear(), linear(24, 8)))(torch.randn(3, 16))
        graphs.append(backend.only)
    assert graphs[0].after[LINEAR] == 2 and graphs[0].gm.code == graphs[1].gm.code
    assert len(graphs[0].report.entries) == len(graphs[1].report.entries)


class Scales:
    """As much of an artifact as the pass asks for."""

    digest = "d"

    def __init__(self, layer="first", smooth=None, act_scale=None, weight_bcdt=None):
        self._layer = layer
        self._values = {"smooth": smooth, "act_scale": act_scale, "weight_bcdt": weight_bcdt}

    def __getattr__(self, name):
        return lambda layer: self._values[name] if layer == self._layer else None


@pytest.mark.usefixtures("exact_torchao")
def test_smooth_factors_multiply_the_input_and_divide_the_weight(capture):
    layers, x, smooth = Two(linear(), linear(24, 8)), torch.randn(3, 16), torch.rand(16) + 0.5
    first = reference(x * smooth, layers.first.weight / smooth, layers.first.bias)
    expected = reference(F.silu(first), layers.second.weight, layers.second.bias)
    backend = capture(QuantizeLinear, artifact=Scales(smooth=smooth))
    torch.testing.assert_close(backend.compile(layers)(x), expected, rtol=1e-5, atol=1e-5)
    assert backend.only.after[LINEAR] == 2
    torch.testing.assert_close(layers(x), expected, rtol=0.02, atol=0.02)  # torchao applies them, too


def test_tuned_rows_replace_the_last_of_the_weight(capture):
    layers, x, tuned = Two(linear(), linear(24, 8)), torch.randn(3, 16), torch.randn(5, 16)
    weight = torch.cat([layers.first.weight[:-5], tuned])
    expected = reference(F.silu(reference(x, weight, layers.first.bias)), layers.second.weight, layers.second.bias)
    backend = capture(QuantizeLinear, artifact=Scales(weight_bcdt=tuned))
    torch.testing.assert_close(backend.compile(layers)(x), expected, rtol=1e-5, atol=1e-5)


def test_static_activation_scale(capture):
    layers, x, scale = Two(linear(), linear(24, 8)), torch.randn(3, 16), torch.tensor(0.03)
    codes, weight_scale = quant.quantize_rows(layers.first.weight)
    rows = (x / scale).round().clamp(-127, 127)
    first = (rows.double() @ codes.double().t()).float() * scale * weight_scale.view(1, -1) + layers.first.bias
    expected = reference(F.silu(first), layers.second.weight, layers.second.bias)
    backend = capture(QuantizeLinear, artifact=Scales(act_scale=scale))
    torch.testing.assert_close(backend.compile(layers)(x), expected, rtol=1e-4, atol=1e-4)
    static = [node.args[5] is not None for node in iter_calls(backend.only.gm.graph, LINEAR)]
    assert static == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothed", [False, True])
def test_weights_of_several_blocks_have_the_codes_of_the_whole(dtype, smoothed):
    torch.manual_seed(0)
    k = 96
    rows = 2 * (BLOCK_WEIGHTS // k) + 5
    weight = torch.randn(rows, k).to(dtype)
    weight[rows - 1, 3] = torch.nan
    smooth = torch.rand(k) + 0.5 if smoothed else None
    made = quantize_weight(weight, smooth=smooth)
    codes, scale = quant.quantize_rows(weight if smooth is None else weight / smooth.to(dtype))
    assert torch.equal(made.qdata, codes)
    assert torch.equal(made.scale.nan_to_num(-1.0), scale.nan_to_num(-1.0))
