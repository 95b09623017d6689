"""The backend as a user meets it: options, errors, warnings, what happens to the model, and several models at once."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import inspect
import itertools
import logging
import pickle
import subprocess
import sys
import textwrap
import weakref

import numpy
import pytest
import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8Tensor, quantize_

from qmamba_compile import Artifact, DSQState, NonFiniteStateError, SkipReason, backend, quant, report, write_artifact
from qmamba_compile.artifact import Header, fingerprint
from qmamba_compile.fx_utils import op_name
from qmamba_compile.passes import PIPELINE
from qmamba_compile.passes.int8_weight import held_nbytes

INNER = ("packed", "channel_scale", "state_scale", "rng")


def float_parameters(model):
    return {name: (id(p), type(p), p.data_ptr()) for name, p in model.named_parameters()}


def states(cache):
    return [layer.recurrent_states[0] for layer in cache.layers]


def warnings_of(caplog):
    return [r for r in caplog.records if r.name.startswith("qmamba_compile") and r.levelno == logging.WARNING]


@contextlib.contextmanager
def eager():
    torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        torch.compiler.set_stance("default")


# --- options and errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"bits": 4}, ["bits", "state_bits"]),
        ({"state_bits": 3}, ["state_bits=3", "8", "4", "2"]),
        ({"calibration": "/nowhere/a.safetensors"}, ["/nowhere/a.safetensors"]),
    ],
    ids=["unknown", "value", "no file"],
)
def test_error_text_reaches_the_user_and_no_weight_is_touched(make_model, tokens, compiled, options, words):
    model = make_model()
    before = float_parameters(model)
    with torch.no_grad(), pytest.raises(Exception) as caught:
        compiled(model, **options)(tokens(2, 9))
    assert all(word in str(caught.value) for word in words)
    assert float_parameters(model) == before


def test_odd_dstate_names_layer_value_allowed_and_next_step(make_model, tokens, compiled):
    model = make_model(state_size=31)
    before = float_parameters(model)
    with torch.no_grad(), pytest.raises(Exception) as caught:
        compiled(model)(tokens(2, 9), use_cache=True)
    text = str(caught.value)
    assert all(word in text for word in ("backbone.layers.0.mixer", "31", "divisible by 2", "state_bits=8"))
    assert float_parameters(model) == before


def test_odd_dstate_at_8_bits(make_model, tokens, compiled, decode):
    model, prompt, more = make_model(state_size=31, num_hidden_layers=1), tokens(2, 9), tokens(2, 3)
    expected, _ = decode(model, prompt, more)
    logits, cache = decode(compiled(model, state_bits=8, weights=None), prompt, more)
    assert all(state.packed.shape[-1] == 31 for state in states(cache))
    torch.testing.assert_close(logits, expected, rtol=0.01, atol=0.01)


def test_gradients_give_one_warning_and_the_plain_result(make_model, tokens, compiled, caplog):
    model, prompt = make_model().requires_grad_(True), tokens(2, 9)
    expected = model(prompt, labels=prompt)
    expected.loss.backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    out = compiled(model)(prompt, labels=prompt)
    out.loss.backward()
    torch.testing.assert_close(out.logits, expected.logits)
    torch.testing.assert_close(model.lm_head.weight.grad, gradient)
    assert len(warnings_of(caplog)) == 1
    assert {type(p) for p in model.parameters()} == {nn.Parameter}


def test_training_mode_without_gradients_runs(make_model, tokens, compiled, caplog):
    model, prompt = make_model(), tokens(2, 9)
    expected = model(prompt).logits
    with torch.no_grad():
        out = compiled(model.train(), weights=None)(prompt)
    torch.testing.assert_close(out.logits, expected, rtol=1e-4, atol=1e-5)
    assert not warnings_of(caplog) and report.recent[-1].rewritten("fuse_chunk_scan")


def test_model_without_mamba2_gives_a_warning_and_the_plain_result(compiled, caplog):
    class Perceptron(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return torch.relu(self.linear(x))

    model, x = Perceptron().requires_grad_(False), torch.randn(2, 8)
    expected = model(x)
    assert torch.equal(compiled(model)(x), expected)
    assert len(warnings_of(caplog)) == 1
    assert type(model.linear.weight) is nn.Parameter and report.recent[-1].phase == "other"


def test_the_warning_counts_the_compilations_that_dynamo_counts(make_model, tokens, compiled, caplog):
    def run(options, **inputs):
        model = compiled(make_model(num_hidden_layers=1), **options)
        model(tokens(2, 9), **inputs)

    with torch._dynamo.config.patch(recompile_limit=3), torch.no_grad():
        run({})
        for _ in range(2):
            with pytest.raises(Exception, match="state_bits=3"):
                run({"state_bits": 3})
        gc.collect()
        run({})  # the first model is gone, what was compiled for it counts
        assert len(report.recent) == 2 and not warnings_of(caplog)
        run({})
        assert len(report.recent) == 3 and len(warnings_of(caplog)) == 1
        with pytest.raises(Exception, match="fullgraph=True"):
            run({})
    assert len(report.recent) == 3


@pytest.mark.skipif(
    "isolate_recompiles" not in inspect.signature(torch.compile).parameters, reason="this torch counts per function"
)
def test_the_warning_counts_an_isolated_model_by_itself(make_model, tokens, caplog):
    with torch._dynamo.config.patch(recompile_limit=2), torch.no_grad():
        models = [make_model(num_hidden_layers=1) for _ in range(3)]
        for model in models:
            model.compile(backend="qmamba", isolate_recompiles=True, options={"inner_backend": "eager"})
            model(tokens(2, 9))
        assert len(report.recent) == 3 and not warnings_of(caplog)
        models[0](tokens(2, 9), use_cache=False)
        assert len(warnings_of(caplog)) == 1


def test_last_compilation_before_the_limit_warns(make_model, tokens, compiled, caplog):
    model = compiled(make_model(num_hidden_layers=1), weights=None)
    with torch._dynamo.config.patch(recompile_limit=3), torch.no_grad():
        model(tokens(2, 9))
        model(tokens(2, 9), use_cache=False)
        assert not warnings_of(caplog)
        model(tokens(2, 9), output_hidden_states=True)
        assert len(warnings_of(caplog)) == 1
    assert len(report.recent) == 3


def test_all_switches_off_gives_inductor_dynamos_own_graph(make_model, tokens, monkeypatch):
    graphs = []

    def capture(gm, inputs):
        graphs.append([(node.op, op_name(node)) for node in gm.graph.nodes])
        return gm.forward

    monkeypatch.setattr(backend, "_inner_compiler", lambda config, mode, phase: capture)
    off = {rewrite.name(): False for rewrite in PIPELINE}
    model = make_model()
    for chosen in ({"backend": capture}, {"backend": "qmamba", "options": off}):
        torch._dynamo.reset()
        function = torch.compile(model, fullgraph=True, **chosen)
        with torch.no_grad():
            cache = function(tokens(2, 9), use_cache=True).cache_params
            function(tokens(2, 1), cache_params=cache, use_cache=True)
    assert len(graphs) == 4 and len(graphs[0]) > 100
    assert graphs[:2] == graphs[2:]
    assert {type(p) for p in model.parameters()} == {nn.Parameter}


@pytest.mark.parametrize("switch", [rewrite.name() for rewrite in PIPELINE])
def test_each_switch_takes_away_its_own_rewrite(make_model, tokens, compiled, decode, switch):
    model, prompt, more = make_model(num_hidden_layers=1), tokens(2, 9), tokens(2, 2)
    expected, _ = decode(model, prompt, more)
    logits, _ = decode(compiled(model, state_bits=8, **{switch: False}), prompt, more)
    ran = {entry.rewrite for done in report.recent for entry in done.entries}
    names = {rewrite.name() for rewrite in PIPELINE}
    gone = {switch} | ({"fuse_ssm_update"} if switch == "quantize_state" else set())
    gone |= {"fuse_norm_linear"} if switch == "quantize_linear" else set()
    # Nothing is tuned without an artifact: see tests/passes/test_apply_tuned_conv.py.
    gone |= {"apply_tuned_conv"}
    assert ran == names - gone
    # int8 linears move the logits, of magnitude 5, by about 0.1.
    assert (logits - expected).abs().max() < (0.02 if switch == "quantize_linear" else 0.4)


def test_torch_compile_and_model_compile_give_the_same(make_model, tokens, compiled, decode):
    prompt, more = tokens(2, 9), tokens(2, 3)
    by_method, _ = decode(compiled(make_model(num_hidden_layers=1)), prompt, more)
    torch._dynamo.reset()
    function = torch.compile(make_model(num_hidden_layers=1), backend="qmamba", options={"inner_backend": "eager"})
    by_function, cache = decode(function, prompt, more)
    assert torch.equal(by_method, by_function)
    assert all(isinstance(state, DSQState) for state in states(cache))


def test_compiled_function_of_the_user(make_model, tokens):
    """A decoding step of the user's own, the model and the choice of the token in one graph."""
    model, expected = make_model(num_hidden_layers=1), make_model(num_hidden_layers=1)

    def step(model, ids, cache=None):
        out = model(ids, cache_params=cache, use_cache=True)
        return out.logits[:, -1].argmax(-1, keepdim=True), out.cache_params

    options = {"inner_backend": "eager", "weights": None, "state_bits": 8}
    fast = torch.compile(step, backend="qmamba", fullgraph=True, options=options)
    results = []
    for function, which in ((fast, model), (step, expected)):
        ids, cache, seen = tokens(2, 9), None, []
        with torch.no_grad():
            for _ in range(4):
                ids, cache = function(which, ids, cache)
                seen.append(ids)
        results.append(torch.cat(seen, dim=1))
    assert torch.equal(*results)
    assert [len(done.rewritten("quantize_state")) for done in report.recent] == [1, 1]


def test_two_models_with_different_options(make_model, tokens, compiled, decode):
    prompt, more = tokens(2, 9), tokens(2, 3)
    plain = [decode(make_model(seed, num_hidden_layers=1), prompt, more)[0] for seed in (0, 1)]
    first = compiled(make_model(0, num_hidden_layers=1), weights=None, state_bits=8)
    second = compiled(make_model(1, num_hidden_layers=1), state_bits=2, rounding="stochastic")
    for _ in range(2):
        one, one_cache = decode(first, prompt, more)
        two, two_cache = decode(second, prompt, more)
    assert [state.bits for state in states(one_cache) + states(two_cache)] == [8, 2]
    assert type(first.lm_head.weight) is nn.Parameter and isinstance(second.lm_head.weight, Int8Tensor)
    torch.testing.assert_close(one, plain[0], rtol=0.01, atol=0.01)
    assert 0.01 < (two - plain[1]).abs().max() < 1.5


# --- numbers -------------------------------------------------------------------------------------------------------


def rows_on_a_tie(found, expected):
    """How many rows of two states differ, by no more than a channel_scale on a tie of bfloat16 explains.

    Kernels and the model's own code add and approximate in their own ways, so h differs in its last bits. Where
    channel_scale lies that near the middle of two bfloat16s, it goes either way and the codes of its row with it.
    """
    assert torch.equal(found.state_scale, expected.state_scale) and torch.equal(found.rng, expected.rng)
    apart = (found.channel_scale.view(torch.int16) - expected.channel_scale.view(torch.int16)).abs()
    assert apart.max() <= 1
    assert torch.equal(found.packed[apart == 0], expected.packed[apart == 0])
    codes = [quant.unpack(state.packed[apart == 1], state.bits).int() for state in (found, expected)]
    assert (codes[0] - codes[1]).abs().le(1).all()
    return int(apart.sum())


def make_artifact(path, model, **tensors):
    shapes = fingerprint({name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)})
    header = Header(
        model_class=type(model).__name__,
        shapes=shapes,
        config={},
        data="random",
        data_digest="00",
        metrics_before={},
        metrics_after={},
        versions={"torch": torch.__version__},
    )
    artifact = Artifact(dict(tensors.pop("tensors")), header)
    write_artifact(path, artifact)
    return artifact


def some_scales(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixers = [layer.mixer for layer in model.backbone.layers]
    return {
        f"backbone.layers.{i}.mixer.state_scale": torch.rand(m.num_heads, m.ssm_state_size, generator=generator) * 0.1
        + 0.01
        for i, m in enumerate(mixers)
    }


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
    fast, ties = compiled(model, **options), 0
    with torch.no_grad():
        cache, other = (which(prompt, use_cache=True).cache_params for which in (fast, plain))
        (state,), (h,) = states(cache), states(other)
        seed = int(state.rng[0, 0])
        stored = DSQState.from_float(h, bits, state_scale=chosen, stochastic=rounding == "stochastic", seed=seed)
        assert all(torch.equal(getattr(state, name), getattr(stored, name)) for name in INNER)
        for token in more.split(1, dim=1):
            # The model's own code from the same state: what one step may differ by does not add up.
            other = copy.deepcopy(cache)
            found, expected = (
                which(token.contiguous(), cache_params=before, use_cache=True).logits
                for which, before in ((fast, cache), (plain, other))
            )
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(cache.layers[0].conv_states[0], other.layers[0].conv_states[0])
            ties += rows_on_a_tie(*states(cache), *states(other))
    (state,) = states(cache)
    assert report.recent[-1].rewritten("fuse_ssm_update") and (state.bits, state.dynamic, state.stochastic) == (
        bits,
        scales == "dynamic",
        rounding == "stochastic",
    )
    # 1,536 rows; h differs by up to 2^-21 of itself and bfloat16s by 2^-8 or more: 0.2 ties are expected at most.
    assert ties <= 1


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


# --- what happens to the model -------------------------------------------------------------------------------------


def test_float_weights_are_gone(make_model, tokens, compiled):
    model = make_model()
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    floats = [weakref.ref(module.weight) for module in linears.values()]
    with torch.no_grad():
        cache = compiled(model)(tokens(2, 9), use_cache=True).cache_params
        model(tokens(2, 1), cache_params=cache, use_cache=True)
    gc.collect()
    assert len(linears) == 5 and all(isinstance(module.weight, Int8Tensor) for module in linears.values())
    assert [reference() for reference in floats] == [None] * 5
    shapes = {module.weight.shape for module in linears.values()}
    # The embedding has the head's shape; nothing else of a linear's shape is in floating point.
    left = [
        t
        for t in gc.get_objects()
        if type(t) in (torch.Tensor, nn.Parameter) and t.shape in shapes and t.is_floating_point()
    ]
    assert {id(t) for t in left} <= {id(model.backbone.embeddings.weight)}


MEMORY = """
import ctypes, gc, logging, sys, torch
logging.disable(logging.WARNING)
from transformers import Mamba2Config, Mamba2ForCausalLM
def resident():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024
def make(hidden, layers):
    config = Mamba2Config(vocab_size=256, hidden_size=hidden, num_heads=hidden // 32, head_dim=64, state_size=32,
                          num_hidden_layers=layers, n_groups=1, chunk_size=32, eos_token_id=None)
    model = Mamba2ForCausalLM(config).eval().requires_grad_(False)
    model.compile(backend="qmamba", options={"inner_backend": "eager"})
    return model
def run(model):
    with torch.no_grad():
        cache = model(torch.ones(1, 8, dtype=torch.long), use_cache=True).cache_params
        model(torch.ones(1, 1, dtype=torch.long), cache_params=cache, use_cache=True)
run(make(64, 1))  # what the libraries take once
torch._dynamo.reset()
model = make(1536, 4)
linears = sum(m.weight.numel() * 4 for m in model.modules() if isinstance(m, torch.nn.Linear)) / 2**20
before = resident()
run(model)
print(linears, before, resident())
"""


def test_resident_memory_falls_by_the_float_weights():
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(MEMORY)], capture_output=True, text=True, check=True)
    linears, before, after = map(float, done.stdout.split()[-3:])
    assert linears > 200
    # A quarter stays as int8; the rest of the allowance is code and activations.
    assert before - after > 0.65 * linears


def test_model_works_without_the_backend_afterwards(make_model, tokens, compiled, decode):
    model, prompt, more = make_model(), tokens(2, 9), tokens(2, 3)
    compiled_logits, _ = decode(compiled(model), prompt, more)
    with eager():
        logits, cache = decode(model, prompt, more)
        continued = model(tokens(2, 5), cache_params=cache, use_cache=True).logits
    assert type(states(cache)[0]) is torch.Tensor
    assert logits.isfinite().all() and continued.isfinite().all()
    # Same int8 weights and activations, the state in floating point.
    assert (logits - compiled_logits).abs().max() < 0.3
    model._compiled_call_impl = None
    assert torch.equal(decode(model, prompt, more)[0], logits)


@pytest.mark.parametrize("flush_interval", [1, 8])
def test_packed_cache_continues_in_eager(make_model, tokens, compiled, decode, flush_interval):
    model = compiled(make_model(num_hidden_layers=1), weights=None, flush_interval=flush_interval)
    prompt, more = tokens(2, 9), tokens(2, 3)
    _, cache = decode(model, prompt, more)
    other = copy.deepcopy(cache)
    with torch.no_grad():
        expected = model(tokens(2, 1), cache_params=cache, use_cache=True).logits
        with eager():
            logits = model(tokens(2, 1), cache_params=other, use_cache=True).logits
    # A step that only reads rounds C to 16 bits.
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    for one, two in zip(states(cache), states(other), strict=True):
        if flush_interval == 1:
            assert all(torch.equal(getattr(one, name), getattr(two, name)) for name in INNER)
        else:
            # Eager stores at every step, and what it has stored is where its next step begins.
            assert one.ring.position.tolist() == [4, 4] and two.ring.position.tolist() == [0, 0]
            assert (one.dequantize() - two.dequantize()).norm() < 0.2 * one.dequantize().norm()


def test_layers_store_their_states_in_turn(make_model, tokens, compiled, decode):
    model = compiled(make_model(num_hidden_layers=3), weights=None, flush_interval=2)
    _, cache = decode(model, tokens(2, 9), tokens(2, 3))
    assert [state.flush_interval for state in states(cache)] == [2, 2, 2]
    assert [state.ring.position.tolist() for state in states(cache)] == [[1, 1], [0, 0], [1, 1]]
    assert [state.rng[0, 1].item() for state in states(cache)] == [2, 3, 2]


@pytest.mark.parametrize("options", [{"flush_interval": 4}, {"flush_interval": 8, "ring_bits": 8}])
def test_a_checkpointed_state_is_nearer_to_the_float_one(make_model, tokens, compiled, decode, options):
    prompt, more = tokens(2, 9), tokens(2, 20)
    errors = []
    for chosen in ({"state_bits": None}, {"flush_interval": 1}, options):
        logits, cache = decode(compiled(make_model(num_hidden_layers=1), weights=None, **chosen), prompt, more)
        h = states(cache)[0]
        errors.append((logits, h.dequantize() if isinstance(h, DSQState) else h))
    (exact, h), *others = errors
    every_step, checkpointed = (((logits - exact).norm().item(), (d - h).norm().item()) for logits, d in others)
    assert checkpointed[0] < 0.85 * every_step[0] and checkpointed[1] < 0.85 * every_step[1]


def test_an_unfused_scan_falls_back_to_storing_at_every_step(make_model, tokens, compiled, decode):
    model = compiled(make_model(num_hidden_layers=1), fuse_chunk_scan=False, flush_interval=8)
    _, cache = decode(model, tokens(2, 9), tokens(2, 2))
    assert states(cache)[0].flush_interval == 1
    (entry,) = report.recent[0].rewritten("quantize_state")
    assert "stored at every step: the scan, which names B, was not fused" in entry.detail


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_head_and_embedding_are_one_int8_table(make_model, tokens, compiled, decode, dtype):
    model, prompt, more = make_model(dtype=dtype, tie_word_embeddings=True), tokens(2, 9), tokens(2, 3)
    plain, table = make_model(dtype=dtype, tie_word_embeddings=True), weakref.ref(model.lm_head.weight)
    codes, scale = quant.quantize_rows(model.lm_head.weight)
    found, _ = decode(compiled(model, state_bits=8), prompt, more)
    expected, _ = decode(plain, prompt, more)
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()
    gc.collect()
    assert table() is None and isinstance(model.lm_head.weight, Int8Tensor)
    assert model.lm_head.weight is model.backbone.embeddings.weight
    for done in list(report.recent):
        entries = done.rewritten("quantize_linear")
        assert [entry.layer for entry in entries][-2:] == ["lm_head", "backbone.embeddings"] and len(entries) == 6
        held = sum(p.nbytes for p in model.parameters() if not isinstance(p, Int8Tensor))
        assert held_nbytes(model) == held + sum(entry.bytes_after for entry in entries)
        assert held_nbytes(plain) == held + sum(entry.bytes_before for entry in entries)
        assert not done.skips()
    # Without the backend, after a tie that was made again.
    model.tie_weights()
    assert torch.equal(model.get_input_embeddings()(prompt), (codes * scale).to(dtype)[prompt])
    count = len(report.recent)
    with eager():
        again, _ = decode(model, prompt, more)
    assert (again - found).abs().max() < 0.1 * expected.abs().max()
    assert torch.equal(decode(copy.deepcopy(model), prompt, more)[0], again), "copies are not compiled"
    assert torch.equal(decode(model, prompt, more)[0], found) and len(report.recent) == count


def test_tied_head_follows_an_embedding_that_stays_float(make_model, tokens, compiled):
    model, plain, prompt = make_model(tie_word_embeddings=True), make_model(tie_word_embeddings=True), tokens(2, 9)
    compiled(model, skip_layers=("backbone.embeddings",))
    with torch.no_grad():
        for factor in (1.0, 0.5):
            for m in (model, plain):
                m.backbone.embeddings.weight.mul_(factor)
            found, expected = model(prompt).logits, plain(prompt).logits
            assert (found - expected).abs().max() < 0.1 * expected.abs().max()
    assert model.lm_head.weight is model.backbone.embeddings.weight
    assert type(model.lm_head.weight) is nn.Parameter
    entries = [entry for entry in report.recent[0].rewritten("quantize_linear") if entry.layer == "lm_head"]
    assert len(entries) == 1 and len(report.recent[0].rewritten("quantize_linear")) == 5
    # The head [256, 64] is held twice: in float32 as the embedding, and in int8 with a scale a row beside it.
    beside = 256 * 64 + 256 * 4
    int8 = sum(w.qdata.nbytes + w.scale.nbytes for w in model.parameters() if isinstance(w, Int8Tensor))
    floats = sum(w.nbytes for w in model.parameters() if not isinstance(w, Int8Tensor))
    assert held_nbytes(model) == int8 + floats + beside


def test_tied_head_of_a_model_that_starts_from_embeddings(make_model, tokens, compiled):
    """The graph then holds the head and not the embedding, and a later one holds both."""
    model, prompt = compiled(make_model(tie_word_embeddings=True)), tokens(2, 9)
    vectors = model.get_input_embeddings()(prompt)
    with torch.no_grad():
        model(inputs_embeds=vectors)
        assert isinstance(model.backbone.embeddings.weight, Int8Tensor)
        rounded = model.get_input_embeddings()(prompt)
        assert (rounded - vectors).abs().max() < 0.01 * vectors.abs().max()
        assert torch.equal(model(prompt).logits, model(inputs_embeds=rounded).logits)
    assert model.lm_head.weight is model.backbone.embeddings.weight


@pytest.mark.parametrize("skip_layers", [(), ("backbone.embeddings",)], ids=["int8", "beside"])
def test_tied_head_of_another_model_at_the_same_address(make_model, tokens, compiled, decode, skip_layers):
    """One checkpoint after the other: Dynamo runs the first model's graph, the allocator reuses its memory."""
    memory = numpy.empty((256, 64), dtype=numpy.float32)
    prompt, more = tokens(2, 9), tokens(2, 2)
    for seed in (0, 1):
        model = make_model(seed, num_hidden_layers=1, tie_word_embeddings=True)
        expected, _ = decode(model, prompt, more)
        memory[:] = model.lm_head.weight.numpy()
        weight = nn.Parameter(torch.from_numpy(memory), requires_grad=False)
        model.backbone.embeddings.weight = model.lm_head.weight = weight
        logits, _ = decode(compiled(model, state_bits=8, skip_layers=skip_layers), prompt, more)
        assert (logits - expected).abs().max() < 0.1 * expected.abs().max()
        del model, weight
        gc.collect()
    assert [done.phase for done in report.recent][:2] == ["prefill", "decode"]


def test_weights_that_the_user_still_holds(make_model, tokens, compiled):
    model = make_model(num_hidden_layers=1)
    held = dict(model.named_parameters())
    with torch.no_grad():
        out = compiled(model)(tokens(2, 9), use_cache=True)
        model(tokens(2, 1), cache_params=out.cache_params, use_cache=True)
        model(tokens(2, 9), use_cache=True)
    assert len(report.recent) == 2
    assert isinstance(model.lm_head.weight, Int8Tensor) and type(held["lm_head.weight"]) is nn.Parameter


def test_model_already_quantized_by_torchao(make_model, tokens, compiled):
    model, plain, prompt = make_model(), make_model(), tokens(2, 9)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    with torch.no_grad():
        expected = model(prompt).logits
        logits = compiled(model)(prompt).logits
    assert len(report.recent[-1].rewritten("quantize_linear")) == 5
    own = compiled(plain)
    with torch.no_grad():
        # Its own kernel rounds activations a little differently: nearer to torchao than to the float model.
        assert (logits - expected).abs().max() < 0.3
        assert (logits - own(prompt).logits).abs().max() < 0.3


def test_copy_of_a_compiled_model_is_independent(make_model, tokens, compiled):
    model, prompt = compiled(make_model()), tokens(2, 9)
    with torch.no_grad():
        expected = model(prompt).logits
        copied = copy.deepcopy(model)
        for parameter in copied.parameters():
            if type(parameter) is nn.Parameter:
                parameter.zero_()
        assert torch.equal(model(prompt).logits, expected)
    assert isinstance(copied.lm_head.weight, Int8Tensor)


def test_cache_with_packed_states_copies_and_pickles(make_model, tokens, compiled, decode):
    model = compiled(make_model(), weights=None)
    _, cache = decode(model, tokens(2, 9), tokens(2, 2))
    copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    with torch.no_grad():
        expected = model(tokens(2, 1), cache_params=cache, use_cache=True).logits
        for other in copies:
            assert [type(state) for state in states(other)] == [DSQState] * 2
            assert torch.equal(model(tokens(2, 1), cache_params=other, use_cache=True).logits, expected)
            for one, two in zip(states(cache), states(other), strict=True):
                assert all(torch.equal(getattr(one, name), getattr(two, name)) for name in INNER)
    assert len(report.recent) == 2


# --- artifacts -----------------------------------------------------------------------------------------------------


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
