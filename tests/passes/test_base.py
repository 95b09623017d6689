"""`GraphPass`: names and switches, removal of what a pass made dead, dumps, timing; `copy_graph`; `insert_call`."""

import dataclasses
import operator
import re

import pytest
import torch
from torch import fx

from qmamba_compile.config import QMambaConfig
from qmamba_compile.errors import SkipReason, StrictError
from qmamba_compile.fx_utils import (
    copy_graph,
    insert_call,
    iter_calls,
    layer_of,
    op_name,
    parameter_path,
    placeholders,
    removable,
    replace_node,
    split_path,
    value_of,
)
from qmamba_compile.passes import PIPELINE, GraphPass, PassContext
from qmamba_compile.passes.base import StateOutput
from qmamba_compile.report import Report


@pytest.mark.parametrize("rewrite", PIPELINE, ids=lambda rewrite: rewrite.__name__)
def test_class_file_and_switch_have_one_name(rewrite):
    name = rewrite.name()
    assert rewrite.__module__ == f"qmamba_compile.passes.{name}"
    assert rewrite.enabled(QMambaConfig())
    assert not rewrite.enabled(dataclasses.replace(QMambaConfig(), **{name: False}))
    assert "Before" in rewrite.__doc__ and "After" in rewrite.__doc__ and "Refuses" in rewrite.__doc__


class DoubleSine(GraphPass):
    """sin(x) -> sinh(x)."""

    def rewrite(self, graph, report):
        for node in iter_calls(graph, "sin"):
            replace_node(node, insert_call(node, torch.sinh, node.args[0]))
            report.rewrote(layer_of(node), "sine")


DoubleSine.enabled = classmethod(lambda cls, config: True)


def run(capture, function, *inputs, rewrite=DoubleSine):
    backend = capture(rewrite)
    return backend.compile(function)(*inputs), backend.only


def test_what_the_pass_made_dead_is_removed(capture):
    class KillsProducts(GraphPass):
        def rewrite(self, graph, report):
            for node in iter_calls(graph, "sin"):
                replace_node(node, insert_call(node, torch.sinh, placeholders(graph)[0]))

    y, graph = run(capture, lambda x: torch.sin(x * 2 + 1) + x, torch.ones(3), rewrite=KillsProducts)
    assert graph.before["mul"] == 1 and graph.before["add"] == 2
    assert (graph.after["mul"], graph.after["add"], graph.after["sinh"]) == (0, 1, 1)
    assert torch.equal(y, torch.ones(3).sinh() + 1)


def test_in_place_calls_survive_though_nobody_reads_them(capture):
    def function(x, cache, other):
        cache.copy_(x)
        other[0] = 5.0
        other += 1
        torch.relu_(cache)
        cache.add_(other)
        return torch.sin(x)

    x, cache, other = torch.tensor([-1.0, 2.0]), torch.zeros(2), torch.zeros(2)
    _, graph = run(capture, function, x, cache, other)
    assert graph.after["sinh"] == 1
    assert graph.before["copy_"] == graph.after["copy_"] == 1 and graph.after["add_"] == 1
    assert torch.equal(other, torch.tensor([6.0, 1.0])) and torch.equal(cache, torch.tensor([6.0, 3.0]))


def test_in_place_call_that_loses_its_only_reader_survives(capture):
    class Forgets(GraphPass):
        def rewrite(self, graph, report):
            for node in iter_calls(graph, "sin"):
                replace_node(node, insert_call(node, torch.sinh, placeholders(graph)[0]))

    cache = torch.zeros(2)
    _, graph = run(capture, lambda x, cache: torch.sin(cache.copy_(x)), torch.ones(2), cache, rewrite=Forgets)
    assert graph.after["copy_"] == graph.after["sinh"] == 1
    assert torch.equal(cache, torch.ones(2))


def test_every_kind_of_write_is_kept():
    graph = fx.Graph()
    x = graph.placeholder("x")
    writes = [
        graph.call_method("copy_", (x, x)),
        graph.call_method("zero_", (x,)),
        graph.call_function(torch.relu_, (x,)),
        graph.call_function(torch.nn.functional.relu, (x,), {"inplace": True}),
        graph.call_function(torch.add, (x, x), {"out": x}),
        graph.call_function(torch.ops.aten.add_.Tensor, (x, x)),
        graph.call_function(torch.ops.qmamba.quantize_state_.default, ()),
        *(graph.call_function(getattr(operator, name), (x, x)) for name in ("iadd", "imul", "iand", "ipow", "imatmul")),
        graph.call_function(operator.setitem, (x, 0, x)),
    ]
    reads = [
        graph.call_function(torch.add, (x, x)),
        graph.call_method("add", (x, x)),
        graph.call_method("__len__", (x,)),
        graph.call_function(operator.index, (x,)),
        graph.call_function(torch.nn.functional.relu, (x,), {"inplace": False}),
        graph.call_function(torch.isnan, (x,)),
    ]
    assert [str(node) for node in writes if removable(node)] == []
    assert [str(node) for node in reads if not removable(node)] == []
    assert not removable(x)


def test_calls_that_nobody_read_before_the_pass_stay(capture):
    def function(x):
        torch._C._log_api_usage_once("qmamba.test")
        return torch.sin(x)

    _, graph = run(capture, function, torch.ones(2))
    assert graph.before["_log_api_usage_once"] == graph.after["_log_api_usage_once"]
    assert graph.after["sinh"] == 1


def test_dump_writes_numbered_graphs_around_each_pass(capture, tmp_path, monkeypatch):
    monkeypatch.setenv("QMAMBA_DUMP", str(tmp_path / "graphs"))
    run(capture, torch.sin, torch.ones(2))
    before, after = sorted((tmp_path / "graphs").iterdir())
    assert re.fullmatch(r"\d{4}_before_double_sine\.py", before.name)
    assert re.fullmatch(r"\d{4}_after_double_sine\.py", after.name)
    assert "torch.sin(" in before.read_text() and "torch.sinh(" in after.read_text()


def test_no_dump_unless_asked(capture, tmp_path, monkeypatch):
    monkeypatch.delenv("QMAMBA_DUMP", raising=False)
    monkeypatch.chdir(tmp_path)
    run(capture, torch.sin, torch.ones(2))
    assert list(tmp_path.iterdir()) == []


def test_time_and_entries_are_reported_under_the_passes_name(capture):
    _, graph = run(capture, torch.sin, torch.ones(2))
    assert graph.report.seconds["double_sine"] > 0
    summary = graph.report.to_json()["passes"]["double_sine"]
    assert (summary["found"], summary["rewritten"], summary["skipped"]) == (1, 1, [])


def test_strict_report_raises_except_for_what_was_excluded():
    report = Report(strict=True)
    report.start("fuse_ssm_update")
    report.skipped("layers.0", SkipReason.EXCLUDED, "named")
    with pytest.raises(StrictError, match=r"layers\.1"):
        report.skipped("layers.1", SkipReason.ROUTER, "topk")
    assert len(report.skips()) == 2


def test_dynamos_own_graph_is_untouched(make_model, tokens):
    seen = []

    def backend(gm, inputs):
        before = gm.code
        copied = copy_graph(gm)
        for rewrite in PIPELINE:
            rewrite(PassContext(QMambaConfig(weights=None), None, list(inputs), {}))(copied, Report())
        copied.recompile()
        originals, copies = placeholders(gm.graph), placeholders(copied.graph)
        for index, (original, copied_node) in enumerate(zip(originals, copies, strict=True)):
            assert copied_node.meta["grapharg"] is original.meta["grapharg"]
            assert copied_node._dynamo_source is original._dynamo_source
            assert copied_node.meta["qmamba_input"].index == index
        seen.append((before, gm.code, copied.code, {parameter_path(node) for node in copies}))
        return gm.forward

    with torch.no_grad():
        torch.compile(make_model(), backend=backend, fullgraph=True)(tokens(2, 9))
    ((before, after, rewritten, paths),) = seen
    assert before == after != rewritten
    assert {"backbone.layers.1.mixer.in_proj.weight", "lm_head.weight"} < paths


def test_inserted_call_has_the_layer_and_a_fake_value(capture):
    class Layer(torch.nn.Module):
        def forward(self, x):
            return torch.sin(x)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([Layer(), Layer()])

        def forward(self, x):
            return self.blocks[1](self.blocks[0](x))

    _, graph = run(capture, Model(), torch.ones(2, 3))
    new = list(iter_calls(graph.gm.graph, "sinh"))
    assert [layer_of(node) for node in new] == ["blocks.0", "blocks.1"]
    assert all(value_of(node).shape == (2, 3) and node.meta["stack_trace"] for node in new)
    assert not [node for node in graph.gm.graph.nodes if op_name(node) == "sin"]


@pytest.mark.parametrize("scale, width", [(None, 4), (torch.ones(2, 4), 3)])
def test_state_output_width(scale, width):
    assert StateOutput(0, "layer", 4, False, scale).width == width


@pytest.mark.parametrize(
    "expression, expected",
    [
        ("L['self']._modules['a']._modules['0']._parameters['weight']", ("L['self']", "a.0.weight")),
        ("L['self'].bots[0]._modules['a']._buffers['b']", ("L['self'].bots[0]", "a.b")),
        ("L['self']._modules['a'].hidden._modules['b']", ("L['self']._modules['a'].hidden", "b")),
        ("G['models']['_modules']._parameters['w']", ("G['models']['_modules']", "w")),
        ("L['args'][0]", ("L['args'][0]", "")),
    ],
)
def test_a_path_starts_at_the_model_that_registers_it(expression, expected):
    assert split_path(expression) == expected
