"""Calibration artifacts as the backend meets them: used, refused before any weight is touched, read again."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from model_parts import float_parameters, make_artifact, some_scales, states

from qmamba_compile import Artifact, DSQState, SkipReason, report, write_artifact
from qmamba_compile.artifact import fingerprint


def test_artifact_end_to_end(make_model, tokens, compiled, decode, tmp_path):
    model, plain, path = make_model(), make_model(), tmp_path / "a.safetensors"
    in_proj = "backbone.layers.1.mixer.in_proj"
    smooth = torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.5
    tuned = plain.get_submodule(in_proj).weight[-66:] * 1.5
    tensors = some_scales(model) | {f"{in_proj}.smooth": smooth, f"{in_proj}.weight_bcdt": tuned}
    make_artifact(path, model, tensors=tensors)
    options = {"calibration": str(path), "state_scales": "calibrated", "state_bits": 8}
    prompt, more = tokens(2, 9), tokens(2, 4)
    logits, cache = decode(compiled(model, **options), prompt, more)
    weight = plain.get_submodule(in_proj).weight
    weight[-66:] = tuned
    expected, _ = decode(plain, prompt, more)
    assert (logits - expected).abs().max() < 0.1 * expected.abs().max()
    for state, scale in zip(states(cache), some_scales(model).values(), strict=True):
        assert torch.equal(state.state_scale, scale.to(torch.bfloat16))
    assert torch.allclose(model.get_submodule(in_proj).weight.act_pre_scale, smooth)
    assert report.recent[-1].rewritten("fuse_ssm_update")


def test_prompts_of_other_sizes(make_model, tokens, compiled, tmp_path):
    """Dynamo then marks sizes as dynamic, and symbols come first among a graph's inputs."""
    model, plain, path = make_model(), make_model(), tmp_path / "a.safetensors"
    act_scales = {f"backbone.layers.{i}.mixer.in_proj.act_scale": torch.tensor(0.03) for i in range(2)}
    make_artifact(path, model, tensors=some_scales(model) | act_scales)
    run = compiled(model, calibration=str(path), state_scales="calibrated", state_bits=8)
    for batch, length in ((2, 9), (2, 17), (3, 17), (1, 30)):
        prompt = tokens(batch, length)
        with torch.no_grad():
            output, expected = run(prompt, use_cache=True), plain(prompt).logits
        assert (output.logits - expected).abs().max() < 0.1 * expected.abs().max()
        assert all(isinstance(state, DSQState) and not state.dynamic for state in states(output.cache_params))


def test_another_interval_is_told_once_a_prompt(make_model, tokens, compiled, decode, tmp_path, caplog):
    model, path = make_model(), tmp_path / "a.safetensors"
    weight = model.get_submodule("backbone.layers.0.mixer.conv1d").weight
    make_artifact(path, model, tensors={"backbone.layers.0.mixer.conv1d.weight_bcdt": weight[-2 * 32 :].clone()})
    decode(compiled(model, calibration=str(path), flush_interval=4), tokens(2, 9), tokens(2, 2))
    told = [record.getMessage() for record in caplog.records if "flush_interval" in record.getMessage()]
    assert len(told) == 1 and [done.phase for done in report.recent][-2:] == ["prefill", "decode"]


def _other_size(artifact, model):
    shapes = {path: (*shape[:-1], shape[-1] + 1) if "in_proj" in path else shape for path, shape in artifact.items()}
    return shapes, some_scales(model)


def _other_model(artifact, model):
    return {f"gpt.{i}.weight": (4, 4) for i in range(3)} | {"gpt.0.A_log": (2,)}, {
        "gpt.0.state_scale": torch.ones(2, 32)
    }


def _missing_layer(artifact, model):
    return artifact, dict(list(some_scales(model).items())[:1])


def _other_dstate(artifact, model):
    return artifact, {key: torch.ones(2, 16) for key in some_scales(model)}


@pytest.mark.parametrize(
    "change, words",
    [
        (_other_size, ["in_proj"]),
        (_other_model, ["another model"]),
        (_missing_layer, ["backbone.layers.1.mixer", "state_scale"]),
        (_other_dstate, ["backbone.layers.0.mixer", "[2, 16]", "2, 32"]),
    ],
    ids=["another size", "another model", "missing layer", "another dstate"],
)
def test_wrong_artifact_leaves_every_weight_untouched(make_model, tokens, compiled, tmp_path, change, words):
    model, path = make_model(), tmp_path / "a.safetensors"
    good = make_artifact(path, model, tensors=some_scales(model))
    shapes, tensors = change(dict(good.header.shapes), model)
    write_artifact(path, Artifact(tensors, dataclasses.replace(good.header, shapes=fingerprint(shapes))))
    before = float_parameters(model)
    options = {"calibration": str(path), "state_scales": "calibrated"}
    with torch.no_grad(), pytest.raises(Exception) as caught:
        compiled(model, **options)(tokens(2, 9), use_cache=True)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert str(path) in str(caught.value)
    assert float_parameters(model) == before


@pytest.mark.parametrize("options", [{"apply_tuned_conv": False}, {"skip_layers": ["backbone.layers.0"]}], ids=str)
def test_options_that_leave_a_tuned_convolution_out(make_model, tokens, compiled, tmp_path, options):
    model, path = make_model(), tmp_path / "a.safetensors"
    make_artifact(path, model, tensors={"backbone.layers.0.mixer.conv1d.weight_bcdt": torch.ones(2, 1, 4)})
    before = float_parameters(model)
    with torch.no_grad(), pytest.raises(Exception, match=r"conv1d\.weight_bcdt: these options leave a tuned conv"):
        compiled(model, calibration=str(path), **options)(tokens(2, 9), use_cache=True)
    assert float_parameters(model) == before


def test_missing_scale_of_an_excluded_layer_is_no_error(make_model, tokens, compiled, tmp_path):
    model, path = make_model(), tmp_path / "a.safetensors"
    make_artifact(path, model, tensors=_missing_layer({}, model)[1])
    options = {"calibration": str(path), "state_scales": "calibrated", "skip_layers": ["backbone.layers.1.mixer"]}
    with torch.no_grad():
        cache = compiled(model, **options)(tokens(2, 9), use_cache=True).cache_params
    assert [type(state) for state in states(cache)] == [DSQState, torch.Tensor]
    assert SkipReason.EXCLUDED in {entry.reason for entry in report.recent[-1].skips()}


def test_a_changed_artifact_file_is_read_again(make_model, tokens, compiled, tmp_path):
    path = tmp_path / "a.safetensors"
    found = []
    for seed in (0, 1):
        torch._dynamo.reset()
        model = make_model()
        make_artifact(path, model, tensors=some_scales(model, seed))
        with torch.no_grad():
            options = {"calibration": str(path), "state_scales": "calibrated", "weights": None}
            cache = compiled(model, **options)(tokens(2, 9), use_cache=True).cache_params
        found.append(states(cache)[0].state_scale)
        assert torch.equal(found[-1], next(iter(some_scales(model, seed).values())).to(torch.bfloat16))
    assert not torch.equal(*found)


IN_PROJ = "backbone.layers.0.mixer.in_proj"


def _smooth(seed):
    return {f"{IN_PROJ}.smooth": torch.rand(64, generator=torch.Generator().manual_seed(seed)) + 0.5}


def _tuned(seed):
    return {f"{IN_PROJ}.weight_bcdt": torch.randn(66, 64, generator=torch.Generator().manual_seed(seed))}


@pytest.mark.parametrize(
    "first, second",
    [(None, _smooth(1)), (None, _tuned(1)), (_smooth(1), None), (_tuned(1), _tuned(2)), (_smooth(1), _tuned(1))],
)
def test_an_int8_weight_of_another_calibration_is_refused(make_model, tokens, compiled, tmp_path, first, second):
    """The float weight that the second one would start from is gone."""
    model = make_model()

    def run(tensors):
        options = {}
        if tensors is not None:
            path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
            make_artifact(path, model, tensors=some_scales(model) | tensors)
            options["calibration"] = str(path)
        torch._dynamo.reset()
        with torch.no_grad():
            return compiled(model, **options)(tokens(2, 9)).logits

    logits = run(first)
    assert torch.equal(run(first), logits)
    with pytest.raises(Exception, match=rf"{IN_PROJ}: its weight became int8 in an earlier compilation"):
        run(second)


def test_float_weights_do_not_come_back(make_model, tokens, compiled, caplog):
    model = make_model()
    with torch.no_grad():
        compiled(model, weights=None)(tokens(2, 9))
        compiled(model)(tokens(2, 9))
        assert "became int8" not in caplog.text
        torch._dynamo.reset()
        compiled(model, weights=None)(tokens(2, 9))
    assert "5 linears (backbone.layers.0.mixer.in_proj, ...) became int8 in an earlier compilation" in caplog.text
