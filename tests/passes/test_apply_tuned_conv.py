"""`ApplyTunedConv`: the tuned channels in prefill and decode, the model's own parameters as they were."""

from __future__ import annotations

import copy

import pytest
import torch

from qmamba_compile.artifact import Artifact, Header, fingerprint
from qmamba_compile.fx_utils import iter_calls, placeholders, value_of
from qmamba_compile.passes import ApplyTunedConv, FuseConvUpdate

CHANNELS = 64
"""B and C of the tiny model: 2 * dstate."""


def tuned(model, *, bias=True, layers=None):
    """An artifact with tuned channels for ``layers`` (all of them by default), and a model that has them."""
    expected, tensors = copy.deepcopy(model), {}
    for index, block in enumerate(expected.backbone.layers):
        if layers is not None and index not in layers:
            continue
        for name in ("weight", "bias") if bias else ("weight",):
            parameter = getattr(block.mixer.conv1d, name)
            rows = torch.randn(CHANNELS, *parameter.shape[1:], generator=torch.Generator().manual_seed(index))
            tensors[f"backbone.layers.{index}.mixer.conv1d.{name}_bcdt"] = rows
            with torch.no_grad():
                parameter[-CHANNELS:] = rows
    shapes = fingerprint({name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)})
    header = Header("Mamba2ForCausalLM", shapes, {}, "none", "0" * 8, {}, {}, {})
    return Artifact(tensors, header), expected


@pytest.mark.parametrize("n_layers", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fused", [False, True])
def test_prefill_and_decode_are_those_of_the_tuned_model(make_model, tokens, capture, decode, n_layers, bias, fused):
    model, prompt, later = make_model(num_hidden_layers=n_layers), tokens(2, 37), tokens(2, 4, seed=2)
    artifact, expected = tuned(model, bias=bias)
    passes = (ApplyTunedConv, FuseConvUpdate) if fused else (ApplyTunedConv,)
    backend = capture(*passes, artifact=artifact)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found, _ = decode(backend.compile(model), prompt, later)
    wanted, _ = decode(expected, prompt, later)
    untuned, _ = decode(make_model(num_hidden_layers=n_layers), prompt, later)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (untuned - wanted).abs().max() > 1e-2
    assert len(backend.graphs) == 2
    for graph in backend.graphs:
        assert len(graph.report.rewritten("apply_tuned_conv")) == n_layers * (2 if bias else 1)
        assert not graph.skips("apply_tuned_conv")
    if fused:
        assert backend.graphs[1].after["qmamba.conv_update"] == n_layers
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_only_the_layers_that_are_tuned(make_model, tokens, capture):
    model = make_model(num_hidden_layers=3)
    artifact, expected = tuned(model, layers={1})
    backend = capture(ApplyTunedConv, artifact=artifact)
    with torch.no_grad():
        found = backend.compile(model)(tokens(2, 9), use_cache=False).logits
        wanted = expected(tokens(2, 9), use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    rewritten = backend.only.report.rewritten("apply_tuned_conv")
    assert {entry.layer for entry in rewritten} == {"backbone.layers.1.mixer.conv1d"}


def test_without_an_artifact_nothing_changes(make_model, tokens, capture):
    model, backend = make_model(), capture(ApplyTunedConv)
    with torch.no_grad():
        backend.compile(model)(tokens(2, 9), use_cache=False)
    assert backend.only.before == backend.only.after and not backend.only.report.entries


def test_metadata_and_a_second_run(make_model, tokens, capture):
    model = make_model()
    artifact, _ = tuned(model)
    counts = []
    for runs in (1, 2):
        torch._dynamo.reset()
        backend = capture(ApplyTunedConv, artifact=artifact, runs=runs)
        with torch.no_grad():
            backend.compile(model)(tokens(2, 9), use_cache=False)
        graph = backend.only.gm.graph
        counts.append((len(placeholders(graph)), len(backend.only.report.rewritten("apply_tuned_conv"))))
        weights = [node for node in placeholders(graph) if node.name.endswith("conv1d_parameters_weight__tuned")]
        assert len(weights) == 2
        for node in weights:
            assert value_of(node).shape == model.backbone.layers[0].mixer.conv1d.weight.shape
            assert node.meta["qmamba_input"].getter is not None
        assert all(node.meta.get("example_value") is not None for node in iter_calls(graph, "conv1d"))
    assert counts[0] == counts[1]


def test_another_model_of_the_same_sizes_gets_its_own_x_channels(make_model, tokens, capture):
    """Dynamo runs one graph for both: what is made beside a parameter is found by the parameter."""
    first, second = make_model(seed=0), make_model(seed=1)
    artifact, _ = tuned(first)
    _, expected = tuned(second)
    backend = capture(ApplyTunedConv, artifact=artifact)
    with torch.no_grad():
        backend.compile(first)(tokens(2, 9), use_cache=False)
        found = backend.compile(second)(tokens(2, 9), use_cache=False).logits
        wanted = expected(tokens(2, 9), use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_parameter_that_is_written_to_is_read_again(make_model, tokens, capture):
    model = make_model()
    artifact, _ = tuned(model)
    compiled = capture(ApplyTunedConv, artifact=artifact).compile(model)
    with torch.no_grad():
        compiled(tokens(2, 9), use_cache=False)
        for block in model.backbone.layers:
            block.mixer.conv1d.weight.mul_(2.0)
        found = compiled(tokens(2, 9), use_cache=False).logits
        wanted = tuned(model)[1](tokens(2, 9), use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
