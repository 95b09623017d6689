"""What a model computes behind the backend: equal to the plain references, whatever the options and the type."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from model_parts import INNER, make_artifact, some_scales, states

from qmamba_compile import DSQState, NonFiniteStateError, quant, report


def on_a_tie(found, expected, h, noise):
    """How many rows and codes of two states differ, each of them as only what lies on a tie may.

    Kernels and the model's own code add and approximate in their own ways, so ``h`` (the model's own) differs in its
    last bits. Where channel_scale lies that near the middle of two bfloat16s, it goes either way and the codes of its
    row with it; where it does not, a code still may, whose h lies as near to where rounding turns.
    """
    assert torch.equal(found.state_scale, expected.state_scale) and torch.equal(found.rng, expected.rng)
    rows = (found.channel_scale.view(torch.int16) - expected.channel_scale.view(torch.int16)).abs()
    codes = [quant.unpack(state.packed, state.bits).int() for state in (found, expected)]
    apart = (codes[0] - codes[1]).abs()
    assert rows.max() <= 1 and apart.max() <= 1
    alone = (apart == 1) & (rows == 0)[..., None]
    step = expected.channel_scale.double()[..., None] * expected.state_scale.double()[..., None, :]
    scaled = (h.double() / step)[alone]
    # Between the two codes; where noise is added before rounding down, at the upper one.
    turn = (codes[0] + codes[1])[alone] / 2 if noise is None else torch.maximum(*codes)[alone] - noise[alone]
    assert ((scaled - turn).abs() <= 2**-20 * (scaled.abs() + 1)).all()
    return torch.tensor([int(rows.sum()), int(alone.sum())])


def _all_kinds_of_state():
    usual = {
        (8, "nearest", "dynamic"),
        (8, "stochastic", "calibrated"),
        (4, "nearest", "dynamic"),
        (4, "stochastic", "dynamic"),
        (4, "nearest", "calibrated"),
        (2, "stochastic", "calibrated"),
    }
    for kind in itertools.product((8, 4, 2), ("nearest", "stochastic"), ("dynamic", "calibrated")):
        yield pytest.param(*kind, marks=() if kind in usual else pytest.mark.slow)


@pytest.mark.parametrize("bits, rounding, scales", list(_all_kinds_of_state()))
def test_decode_equals_an_eager_step_loop(make_model, tokens, compiled, tmp_path, bits, rounding, scales):
    model, plain = make_model(num_hidden_layers=1), make_model(num_hidden_layers=1)
    prompt, more = tokens(2, 9), tokens(2, 6, seed=2)
    options = {"weights": None, "state_bits": bits, "rounding": rounding, "state_scales": scales, "flush_interval": 1}
    chosen = None
    if scales == "calibrated":
        tensors = some_scales(model)
        make_artifact(tmp_path / "a.safetensors", model, tensors=tensors)
        options["calibration"], (chosen,) = str(tmp_path / "a.safetensors"), tensors.values()
    fast, ties = compiled(model, **options), torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        cache, other = (which(prompt, use_cache=True).cache_params for which in (fast, plain))
        (state,), (h,) = states(cache), states(other)
        seed = int(state.rng[0, 0])
        stored = DSQState.from_float(h, bits, state_scale=chosen, stochastic=rounding == "stochastic", seed=seed)
        assert all(torch.equal(getattr(state, name), getattr(stored, name)) for name in INNER)
        for token in more.split(1, dim=1):
            # The model's own code from the same state: what one step may differ by does not add up.
            other, floating = copy.deepcopy(cache), copy.deepcopy(cache)
            floating.layers[0].recurrent_states[0] = states(cache)[0].dequantize()
            noise = quant.uniform_noise(states(cache)[0].rng, h.shape[1:]) if rounding == "stochastic" else None
            found, expected, _ = (
                which(token.contiguous(), cache_params=before, use_cache=True).logits
                for which, before in ((fast, cache), (plain, other), (plain, floating))
            )
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(cache.layers[0].conv_states[0], other.layers[0].conv_states[0])
            ties += on_a_tie(*states(cache), *states(other), *states(floating), noise)
    (state,) = states(cache)
    assert report.recent[-1].rewritten("fuse_ssm_update") and (state.bits, state.dynamic, state.stochastic) == (
        bits,
        scales == "dynamic",
        rounding == "stochastic",
    )
    # h differs by up to 2^-21 of itself. bfloat16s differ by 2^-8 or more: of 1,536 rows 0.2 are expected on a tie at
    # most. A code c moves by c * 2^-21: of 49,152 codes, 44 on average at 8 bits and 2.3 at 4, 1 and 0.05.
    rows, codes = ties.tolist()
    assert rows <= 1 and codes <= (3 if bits == 8 else 1)


def test_groups_biases_and_bfloat16(make_model, tokens, compiled, decode):
    sizes = {
        "n_groups": 2,
        "num_heads": 4,
        "head_dim": 32,
        "use_bias": True,
        "dtype": torch.bfloat16,
        "num_hidden_layers": 1,
    }
    prompt, more = tokens(2, 37), tokens(2, 4)
    expected, _ = decode(make_model(**sizes), prompt, more)
    logits, cache = decode(compiled(make_model(**sizes)), prompt, more)
    assert (logits - expected).abs().max() < 0.5 < expected.abs().max()
    assert all(isinstance(state, DSQState) for state in states(cache))
    assert all(layer.conv_states[0].dtype == torch.bfloat16 for layer in cache.layers)
    assert [len(done.rewritten("quantize_linear")) for done in report.recent] == [3, 3]


def test_float16_model(make_model, tokens, compiled, decode):
    prompt, more = tokens(2, 37), tokens(2, 3)
    expected, _ = decode(make_model(dtype=torch.float16, num_hidden_layers=1), prompt, more)
    logits, _ = decode(compiled(make_model(dtype=torch.float16, num_hidden_layers=1)), prompt, more)
    assert (logits - expected).abs().max() < 0.5 < expected.abs().max()


def test_inference_mode_and_no_grad_in_turn(make_model, tokens, compiled, decode):
    prompt, more = tokens(2, 9), tokens(2, 2)
    model = compiled(make_model(num_hidden_layers=1))
    with torch.inference_mode():
        first, _ = decode(model, prompt, more)
    # Parameters that were made in inference mode must not be bound to it.
    assert not model.lm_head.weight.qdata.is_inference()
    second, _ = decode(model, prompt, more)
    with torch.inference_mode():
        third, _ = decode(model, prompt, more)
    assert torch.equal(first, second) and torch.equal(second, third)


def test_outputs_that_a_user_asks_for(make_model, tokens, compiled):
    model, plain, prompt = (
        compiled(make_model(num_hidden_layers=1), weights=None, state_bits=8),
        make_model(num_hidden_layers=1),
        tokens(2, 9),
    )
    with torch.no_grad():
        found = model(prompt, labels=prompt, output_hidden_states=True, use_cache=True)
        expected = plain(prompt, labels=prompt, output_hidden_states=True, use_cache=True)
        torch.testing.assert_close(found.loss, expected.loss)
        assert len(found.hidden_states) == 2
        for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert all(isinstance(state, DSQState) for state in states(found.cache_params))
        last = model(prompt, logits_to_keep=1, use_cache=False)
        assert last.logits.shape == (2, 1, 256) and last.cache_params is None
        torch.testing.assert_close(last.logits, expected.logits[:, -1:], rtol=1e-4, atol=1e-5)
        logits, cache = model(prompt, use_cache=True, return_dict=False)
        torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-5)
        assert all(isinstance(state, DSQState) for state in states(cache))


def test_cache_that_was_reset(make_model, tokens, compiled):
    model, plain = (
        compiled(make_model(num_hidden_layers=1), weights=None, state_bits=8, strict=True),
        make_model(num_hidden_layers=1),
    )
    with torch.no_grad():
        caches = [m(tokens(2, 37), use_cache=True).cache_params for m in (model, plain)]
        held = states(caches[0])
        for cache in caches:
            for layer in cache.layers:
                layer.reset()
        for ids in (tokens(2, 37, seed=3), tokens(2, 1, seed=4), tokens(2, 1, seed=5)):
            found, expected = (
                m(ids, cache_params=cache, use_cache=True).logits
                for m, cache in zip((model, plain), caches, strict=True)
            )
            torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)
    assert all(a is b for a, b in zip(states(caches[0]), held, strict=True))


def test_empty_attention_mask_keeps_the_state_at_zero(make_model, tokens, compiled):
    model, plain, prompt = (
        compiled(make_model(num_hidden_layers=1), weights=None),
        make_model(num_hidden_layers=1),
        tokens(2, 9),
    )
    mask = torch.ones_like(prompt)
    mask[0] = 0
    with torch.no_grad():
        found = model(prompt, attention_mask=mask, use_cache=True)
        torch.testing.assert_close(found.logits, plain(prompt, attention_mask=mask).logits, rtol=1e-4, atol=1e-5)
        for state in states(found.cache_params):
            assert not state.dequantize()[0].any() and state.dequantize()[1].any()
        after = model(tokens(2, 1), cache_params=found.cache_params, use_cache=True)
    assert after.logits.isfinite().all()


@pytest.mark.parametrize("weights", [None, "int8"])
def test_nan_stays_nan_in_output_and_state_of_its_sequence(make_model, tokens, compiled, weights):
    model, prompt = make_model(), tokens(2, 9).clamp(min=10)
    model.backbone.embeddings.weight[7] = float("inf")
    compiled(model, weights=weights)
    with torch.no_grad():
        out = model(prompt, use_cache=True)
        assert out.logits.isfinite().all()
        for ids in (torch.tensor([[7], [20]]), *tokens(2, 4, seed=9).clamp(min=10).split(1, dim=1)):
            out = model(ids.contiguous(), cache_params=out.cache_params, use_cache=True)
            assert out.logits[0].isnan().all() and out.logits[1].isfinite().all()
            for state in states(out.cache_params):
                assert state.dequantize()[0].isnan().all() and state.dequantize()[1].isfinite().all()


def test_nan_of_a_prompt_reaches_the_state(make_model, tokens, compiled):
    model, prompt = make_model(), tokens(2, 9).clamp(min=10)
    model.backbone.embeddings.weight[7] = float("nan")
    prompt[1, 4] = 7
    with torch.no_grad():
        out = compiled(model)(prompt, use_cache=True)
        out = model(torch.full((2, 1), 20), cache_params=out.cache_params, use_cache=True)
    assert out.logits[1].isnan().all() and out.logits[0].isfinite().all()
    assert all(state.dequantize()[1].isnan().all() for state in states(out.cache_params))


def test_check_finite_names_the_layer(make_model, tokens, compiled):
    model = compiled(make_model(), check_finite=True)
    model.backbone.embeddings.weight[7] = float("inf")
    prompt = tokens(2, 9).clamp(min=10)
    bad = prompt.clone()
    bad[1, 4] = 7
    with torch.no_grad():
        with pytest.raises(NonFiniteStateError, match=r"backbone\.layers\.0\.mixer.*sequence 1"):
            model(bad, use_cache=True)
        cache = model(prompt, use_cache=True).cache_params
        model(torch.full((2, 1), 20), cache_params=cache, use_cache=True)
        with pytest.raises(NonFiniteStateError, match=r"backbone\.layers\.0\.mixer.*sequence 0"):
            model(torch.tensor([[7], [20]]), cache_params=cache, use_cache=True)
