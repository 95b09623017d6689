"""Families whose Mamba2 layers live in other files, between attention, experts and shared blocks."""

from __future__ import annotations

import pytest
import torch
from hybrid_models import FAMILIES, build
from torch import nn
from torchao.quantization import Int8Tensor

from qmamba_compile import DSQState, report


def cache_of(out):
    return out.past_key_values if getattr(out, "past_key_values", None) is not None else out.cache_params


def mamba_states(cache):
    kinds = [getattr(layer, "recurrent_states", {}).get(0) for layer in cache.layers]
    return [state for state in kinds if state is not None]


@torch.no_grad()
def decode(model, prompt, more):
    out = model(prompt, use_cache=True)
    logits = [out.logits]
    for token in more.split(1, dim=1):
        out = model(token.contiguous(), past_key_values=cache_of(out), use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, dim=1), cache_of(out)


@pytest.fixture(scope="module", params=list(FAMILIES))
def ran(request, compiled, tokens):
    """Float linears and an 8-bit state; then W8A8 linears as well."""
    family = FAMILIES[request.param]
    prompt, more = tokens(2, 19, vocabulary=128), tokens(2, 1, seed=2, vocabulary=128)
    plain = build(family)
    results = {}
    with torch._dynamo.config.patch(recompile_limit=32):
        for name, options in {"exact": {"weights": None}, "w8a8": {}}.items():
            torch._dynamo.reset()
            report.recent.clear()
            model = compiled(build(family), state_bits=8, **options)
            logits, cache = decode(model, prompt, more)
            results[name] = (logits, cache, [done.to_json() for done in report.recent], list(report.recent), model)
    return family, results, *decode(plain, prompt, more)


NORMS = {"BambaConfig": 10, "FalconH1Config": 5, "GraniteMoeHybridConfig": 6, "NemotronHConfig": 6, "Zamba2Config": 12}
"""Int8 linears directly behind a norm that nothing else reads: no multiplier (FalconH1), no router beside it."""

RESIDUALS = {"BambaConfig": 4, "GraniteMoeHybridConfig": 2, "NemotronHConfig": 3, "Zamba2Config": 5}
"""Int8 linears whose output is added to something as it is: without a multiplier (FalconH1; GraniteMoeHybrid has one
behind its mixers, none between experts and shared MLP)."""


def test_counts(ran):
    family, results, *_ = ran
    for name, linears in (("exact", 0), ("w8a8", family.linears)):
        reports = results[name][2]
        assert [done["phase"] for done in reports] == ["prefill", "decode"]
        for done in reports:
            scans, steps = (family.scans, 0) if done["phase"] == "prefill" else (0, family.scans)
            rewritten = {rewrite: entry["rewritten"] for rewrite, entry in done["passes"].items()}
            assert rewritten == {
                "fuse_chunk_scan": scans,
                "quantize_state": family.scans,
                "fuse_ssm_update": steps,
                "apply_tuned_conv": 0,
                "fuse_conv_update": steps,
                "fuse_causal_conv": scans,
                # With an embedding that is tied to the head.
                "quantize_linear": linears + (linears > 0 and family.config.tie_word_embeddings),
                "fuse_norm_linear": NORMS[type(family.config).__name__] if linears else 0,
                "fuse_residual": RESIDUALS.get(type(family.config).__name__, 0) if linears else 0,
                "hoist_decay": family.scans if family.scans > 1 else 0,
            }


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_is_rewritten_like_float32(name, compiled, tokens):
    family = FAMILIES[name]
    with torch._dynamo.config.patch(recompile_limit=32):
        decode(compiled(build(family).bfloat16()), tokens(2, 19, vocabulary=128), tokens(2, 1, vocabulary=128))
    kind = type(family.config).__name__
    for done in report.recent:
        assert len(done.rewritten("fuse_norm_linear")) == NORMS[kind]
        assert len(done.rewritten("fuse_residual")) == RESIDUALS.get(kind, 0)


def test_only_routers_are_left_alone(ran):
    family, results, *_ = ran
    for done in results["w8a8"][3]:
        skips = [entry for entry in done.skips() if entry.rewrite != "fuse_norm_linear"]
        assert {entry.layer: entry.reason for entry in skips} == family.routers
    model = results["w8a8"][4]
    for name in family.routers:
        assert type(model.get_submodule(name).weight) is nn.Parameter
    quantized = {name for name, p in model.named_parameters() if isinstance(p, Int8Tensor)}
    assert len([name for name in quantized if ".in_proj." in name]) == family.scans


def test_logits_and_states_are_those_of_the_eager_model(ran):
    _, results, expected, expected_cache = ran
    logits, cache, *_ = results["exact"]
    # The prompt sees no quantization at all; what follows sees an 8-bit state.
    torch.testing.assert_close(logits[:, :19], expected[:, :19], rtol=1e-4, atol=1e-5)
    assert (logits - expected).abs().max() < 0.01 * expected.abs().max()
    states, floats = mamba_states(cache), mamba_states(expected_cache)
    assert states and all(isinstance(state, DSQState) for state in states)
    for state, h in zip(states, floats, strict=True):
        assert (state.dequantize() - h).abs().max() < 0.02 * h.abs().max()


def test_w8a8_stays_near(ran):
    _, results, expected, _ = ran
    logits = results["w8a8"][0]
    error = (logits - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
    assert 1e-5 < error < 0.15


def test_attention_and_its_cache_are_untouched(ran):
    family, results, _, expected_cache = ran
    cache = results["exact"][1]
    pairs = [
        (layer, other)
        for layer, other in zip(cache.layers, expected_cache.layers, strict=True)
        if getattr(layer, "keys", None) is not None and layer.keys.numel()
    ]
    assert len(pairs) == family.attention_layers
    for layer, other in pairs:
        assert type(layer.keys) is torch.Tensor and layer.keys.shape[2] == 20
        torch.testing.assert_close(layer.keys, other.keys, rtol=0.02, atol=0.02)
        torch.testing.assert_close(layer.values, other.values, rtol=0.02, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FAMILIES))
def test_generate(compiled, tokens, name):
    family = FAMILIES[name]
    model, plain = compiled(build(family), state_bits=8, weights=None), build(family)
    with torch._dynamo.config.patch(recompile_limit=32):
        for batch, length in ((2, 19), (3, 23)):
            prompt = tokens(batch, length, vocabulary=128)
            found, expected = (m.generate(prompt, max_new_tokens=6, do_sample=False) for m in (model, plain))
            assert torch.equal(found, expected)
