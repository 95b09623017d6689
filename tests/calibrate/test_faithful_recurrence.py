"""The model on another recurrence: the faithful scan says what stepping through decode says."""

from __future__ import annotations

import sys

import pytest
import torch

from calibrate.recurrence import Recurrence, float_scan, mixers, replaced
from qmamba_compile.errors import StateError
from qmamba_compile.state import DSQState
from tests.e2e.test_hybrids import FAMILIES, build


def scales_of(model):
    generator = torch.Generator().manual_seed(3)
    return {
        path: torch.rand(mixer.A_log.numel(), mixer.ssm_state_size, generator=generator) + 0.5
        for path, mixer in mixers(model).items()
    }


def states_of(cache):
    return [layer.recurrent_states[0] for layer in cache.layers if getattr(layer, "recurrent_states", None)]


@pytest.mark.parametrize("calibrated", [False, True], ids=["dynamic", "calibrated"])
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@torch.no_grad()
def test_a_scan_says_what_decode_says(lively, tokens, calibrated, stochastic):
    """One forward against a token at a time from an empty packed state.

    The linears add up in another order, so a value may land on the other side of a tie: a few codes, and what follows
    from them. Measured against what quantization does altogether, that is little.
    """
    model, ids = lively(), tokens(2, 40)
    recurrence = Recurrence(4, stochastic, 5, state_scale=scales_of(model) if calibrated else None)
    with replaced(model, recurrence):
        whole = model(ids, use_cache=True)
        # The first token by a scan of its own, which is what makes the cache packed; then steps of the stock code.
        out = model(ids[:, :1], use_cache=True)
        logits = [out.logits]
        for position in range(1, ids.shape[1]):
            step = ids[:, position : position + 1].contiguous()
            out = model(step, cache_params=out.cache_params, use_cache=True)
            logits.append(out.logits)
    difference = (whole.logits - torch.cat(logits, dim=1)).abs().mean()
    assert difference < 0.02 * (whole.logits - model(ids, use_cache=False).logits).abs().mean()
    for scanned, stepped in zip(states_of(whole.cache_params), states_of(out.cache_params), strict=True):
        assert isinstance(scanned, DSQState) and isinstance(stepped, DSQState)
        assert torch.equal(scanned.rng, stepped.rng)
        assert (scanned.packed != stepped.packed).float().mean() < 0.01


@torch.no_grad()
def test_the_compiled_model_has_the_same_noise_and_codes(lively, compiled, tokens):
    """The backend quantizes behind the prompt, this scan from the first token: alike where the prompt is one token."""
    ids, options = tokens(2, 24), {"rounding": "stochastic", "seed": 5, "weights": None}
    with replaced(model := lively(), Recurrence(4, True, 5)):
        expected = model(ids, use_cache=True)
    model = compiled(lively(), **options)
    out = model(ids[:, :2], use_cache=True)
    assert isinstance(states_of(out.cache_params)[0], DSQState)
    assert states_of(out.cache_params)[0].rng[0, 0] == states_of(expected.cache_params)[0].rng[0, 0]


@torch.no_grad()
def test_the_float_scan_is_the_stock_one(lively, tokens):
    model, ids = lively(), tokens(2, 70)
    expected = model(ids, use_cache=False).logits
    with replaced(model, float_scan):
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_hybrids(family):
    """Their layers are found, their scan is replaced, and afterwards nothing is left of it."""
    model = build(FAMILIES[family])
    layers = mixers(model)
    assert len(layers) == FAMILIES[family].scans
    ids = torch.randint(3, 100, (2, 20), generator=torch.Generator().manual_seed(0))
    expected = model(ids, use_cache=False).logits
    seen = []

    def run(scan):
        seen.append(scan.layer)
        return float_scan(scan)

    with replaced(model, run):
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-3, atol=1e-4)
    assert seen == list(layers)
    with replaced(model, lambda scan: (float_scan(scan)[0].flip(1), None)):
        assert not torch.allclose(model(ids, use_cache=False).logits, expected, rtol=1e-3, atol=1e-4)
    with replaced(model, Recurrence(4)):
        assert model(ids, use_cache=False).logits.isfinite().all()
    assert torch.equal(model(ids, use_cache=False).logits, expected)
    for mixer in layers.values():
        assert not mixer._forward_pre_hooks
        assert "tests" not in sys.modules[type(mixer).__module__].mamba2_chunk_scan.__module__


def test_what_has_no_packed_form(lively, tokens):
    model, ids = lively(), tokens(1, 8)
    with replaced(model, Recurrence(3)), torch.no_grad():
        assert model(ids, use_cache=False).logits.isfinite().all()
        with pytest.raises(StateError, match="no packed state to go on from"):
            model(ids, use_cache=True)
    with replaced(model, Recurrence(4)), torch.no_grad():
        cache = model(ids, use_cache=True).cache_params
        with pytest.raises(StateError, match="token by token"):
            model(ids, cache_params=cache, use_cache=True)
