"""Int8 linears and tuned rows without the passes: the numbers that the compiled model gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from calibrate.quantized_model import (
    TunedLinear,
    W8A8Linear,
    bcdt_rows,
    fit_artifact,
    linears,
    model_shapes,
    quantized_copy,
)
from qmamba_compile.artifact import Artifact, Header, write_artifact
from qmamba_compile.errors import ArtifactError


def artifact_of(model, tensors, model_class="Mamba2ForCausalLM"):
    header = Header(model_class, model_shapes(model), {}, "random", "digest", {}, {}, {})
    return Artifact(tensors, header)


def some_tensors(model):
    """SmoothQuant factors for every linear, and tuned rows for one in_proj."""
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"{path}.smooth": torch.rand(linear.in_features, generator=generator) + 0.5
        for path, linear in linears(model).items()
    }
    rows = bcdt_rows(model.backbone.layers[1].mixer)
    weight = model.backbone.layers[1].mixer.in_proj.weight[-rows:]
    tensors["backbone.layers.1.mixer.in_proj.weight_bcdt"] = weight + 0.05
    return tensors


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("with_artifact", [False, True])
@torch.no_grad()
def test_logits_of_the_compiled_model(lively, compiled, tokens, tmp_path, with_artifact, tied):
    sizes = {"tie_word_embeddings": tied}
    model, ids, path = lively(**sizes), tokens(2, 30), tmp_path / "artifact.safetensors"
    artifact, options = None, {}
    if with_artifact:
        artifact, options = artifact_of(model, some_tensors(model)), {"calibration": str(path)}
        write_artifact(path, artifact)
    ours = quantized_copy(model, artifact=artifact)(ids, use_cache=False).logits
    original = model(ids, use_cache=False).logits
    theirs = compiled(lively(**sizes), state_bits=None, **options)(ids, use_cache=False).logits
    # The scan adds up in another order, and an activation may round the other way.
    difference = (ours - theirs).abs().mean()
    assert difference < 0.02 * (ours - original).abs().mean()


def test_the_model_itself_is_not_touched(lively):
    model = lively()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    copy = quantized_copy(model, artifact=artifact_of(model, some_tensors(model)))
    assert sum(isinstance(module, W8A8Linear) for module in copy.modules()) == len(linears(model)) == 5
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    floats = quantized_copy(model, weights=None, artifact=artifact_of(model, some_tensors(model)))
    assert not torch.equal(
        floats.backbone.layers[1].mixer.in_proj.weight, before["backbone.layers.1.mixer.in_proj.weight"]
    )
    skipped = quantized_copy(model, skip_layers=("backbone.layers.0",))
    assert isinstance(skipped.backbone.layers[0].mixer.in_proj, nn.Linear)
    assert isinstance(skipped.backbone.layers[1].mixer.in_proj, W8A8Linear)


def test_an_embedding_tied_to_an_int8_linear_looks_its_values_up(lively):
    model = lively(tie_word_embeddings=True)
    weight = model.lm_head.weight

    def table(**options):
        return quantized_copy(model, **options).backbone.embeddings.weight

    head = W8A8Linear(weight, None)
    assert torch.equal(table(), head.qdata * head.scale) and not torch.equal(table(), weight)
    smoothed = artifact_of(model, {"lm_head.smooth": torch.rand(weight.shape[1]) + 0.5})
    tuned = artifact_of(model, {"lm_head.weight_bcdt": torch.randn(3, weight.shape[1])})
    for options in (
        {"weights": None},
        {"skip_layers": ("lm_head",)},
        {"skip_layers": ("backbone.embeddings",)},
        {"artifact": smoothed},
        {"artifact": tuned},
    ):
        assert torch.equal(table(**options), weight)
    assert model.backbone.embeddings.weight is model.lm_head.weight is weight
    untied = lively()
    assert torch.equal(quantized_copy(untied).backbone.embeddings.weight, untied.backbone.embeddings.weight)


def test_a_static_scale_is_where_the_weight_is():
    """An artifact's tensors are on the CPU."""
    linear = W8A8Linear(torch.empty(12, 16, device="meta"), None, act_scale=torch.tensor(0.1))
    assert linear.act_scale.device == linear.qdata.device == torch.device("meta")


@pytest.mark.parametrize("smooth", [False, True])
def test_an_int8_linear_has_a_straight_through_gradient(smooth):
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(12, 16, generator=generator), torch.randn(3, 5, 16, generator=generator)
    factors = torch.rand(16, generator=generator) + 0.5 if smooth else None
    linear = W8A8Linear(weight, None, smooth=factors)
    (grad,) = torch.autograd.grad(linear(x.requires_grad_()).square().sum() / 2, x)
    y = linear(x.detach())
    # Up to what int8 loses, that of the float linear behind the same output.
    torch.testing.assert_close(grad, y @ weight, rtol=0.05, atol=0.3)
    assert torch.equal(linear(x.detach()), linear(x).detach())


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("smooth", [False, True])
def test_a_tuned_linear_is_the_linear_it_will_become(int8, smooth):
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(12, 16, generator=generator), torch.randn(12, generator=generator)
    factors = torch.rand(16, generator=generator) + 0.5 if smooth and int8 else None
    tuned = TunedLinear(weight, bias, 5, int8=int8, smooth=factors)
    with torch.no_grad():
        tuned.rows += 0.3
    whole = torch.cat([weight[:-5], tuned.rows.detach()])
    final = W8A8Linear(whole, bias, smooth=factors) if int8 else lambda x: nn.functional.linear(x, whole, bias)
    x = torch.randn(7, 16, generator=generator)
    torch.testing.assert_close(tuned(x), final(x), rtol=1e-4, atol=1e-4)
    tuned(x).square().sum().backward()
    assert tuned.rows.grad.abs().min() > 0


def test_an_artifact_of_another_model(lively, make_model):
    model = lively()
    artifact = artifact_of(make_model(state_size=16), {})
    with pytest.raises(ArtifactError, match="another size"):
        quantized_copy(model, artifact=artifact)
    with pytest.raises(ArtifactError, match="made for LlamaForCausalLM"):
        quantized_copy(model, artifact=artifact_of(model, {}, "LlamaForCausalLM"))
    with pytest.raises(ArtifactError, match="no state_scale"):
        fit_artifact(artifact_of(model, {}), model, needs_state_scale=True)
