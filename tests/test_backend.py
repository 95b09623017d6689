"""The backend as a user meets it: options, errors, warnings, and several models at once."""

from __future__ import annotations

import gc
import inspect
import logging
import os
import subprocess
import sys
import threading

import pytest
import torch
from model_parts import float_parameters, states
from torch import nn
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torchao.quantization import Int8Tensor

from qmamba_compile import DSQState, backend, report
from qmamba_compile.cpu_templates.build import available_isas
from qmamba_compile.fx_utils import op_name
from qmamba_compile.passes import PIPELINE


def warnings_of(caplog):
    return [r for r in caplog.records if r.name.startswith("qmamba_compile") and r.levelno == logging.WARNING]


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


@pytest.mark.parametrize("options, warnings", [({}, 1), ({"quantize_state": False}, 0), ({"state_bits": 4}, 0)])
def test_two_bits_with_measured_scales_are_warned_of(make_model, tokens, compiled, decode, caplog, options, warnings):
    decode(compiled(make_model(), **{"state_bits": 2, **options}), tokens(2, 9), tokens(2, 1))
    assert len(warnings_of(caplog)) == warnings


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


@pytest.mark.skipif(
    "recompile_limit" not in inspect.signature(torch.compile).parameters, reason="this torch has one limit for all"
)
def test_the_limit_that_the_warning_advises_holds_in_threads(make_model, tokens, caplog):
    """`torch._dynamo.config` of the main thread does not."""
    model = make_model(num_hidden_layers=1)
    assert "recompile_limit=64 to torch.compile" in backend._RAISE_LIMIT
    model.compile(backend="qmamba", recompile_limit=3, options={"inner_backend": "eager", "weights": None})

    @torch.no_grad()
    def serve():
        for options in ({}, {"use_cache": False}, {"output_hidden_states": True}):
            model(tokens(2, 9), **options)

    with torch._dynamo.config.patch(recompile_limit=2):
        thread = threading.Thread(target=serve)
        thread.start()
        thread.join()
    assert len(report.recent) == 3 and len(warnings_of(caplog)) == 1


def test_a_mamba1_model_is_left_alone(tokens):
    """Its state is no [b, h, p, n], though its step looks like ours."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=256, hidden_size=32, num_hidden_layers=1, state_size=8)
    model = MambaForCausalLM(config).eval().requires_grad_(False)
    before = float_parameters(model)
    model.compile(backend="qmamba", options={"inner_backend": "eager"})
    with torch.no_grad():
        cache = model(tokens(2, 9), use_cache=True).cache_params
        model(tokens(2, 1), cache_params=cache, use_cache=True)
    assert [found.phase for found in report.recent] == ["other", "other"] and float_parameters(model) == before


def test_all_switches_off_gives_inductor_dynamos_own_graph(make_model, tokens, monkeypatch):
    graphs = []

    def capture(gm, inputs):
        graphs.append([(node.op, op_name(node)) for node in gm.graph.nodes])
        return gm.forward

    monkeypatch.setattr(backend, "_inner_compiler", lambda config, mode, phase, on_cpu: capture)
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
    model, prompt, more = make_model(num_hidden_layers=2), tokens(2, 9), tokens(2, 2)
    expected, _ = decode(model, prompt, more)
    logits, _ = decode(compiled(model, state_bits=8, **{switch: False}), prompt, more)
    ran = {entry.rewrite for done in report.recent for entry in done.entries}
    names = {rewrite.name() for rewrite in PIPELINE}
    gone = {switch} | ({"fuse_ssm_update"} if switch == "quantize_state" else set())
    gone |= {"fuse_norm_linear", "fuse_residual"} if switch == "quantize_linear" else set()
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


PROMPT_OF_A_PROCESS = """
import torch, transformers
torch.manual_seed(0)
extents = dict(hidden_size=64, num_heads=8, head_dim=16, state_size=16, n_groups=1, chunk_size=8, vocab_size=64)
config = transformers.Mamba2Config(**extents, num_hidden_layers=1)
model = transformers.Mamba2ForCausalLM(config).eval().requires_grad_(False)
ids = torch.arange(24).view(2, 12)
expected = model(ids).logits
model.compile(backend="qmamba", options={"weights": None})
with torch.no_grad():
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-4)
print(torch.backends.cpu.get_cpu_capability())
"""


@pytest.mark.slow
@pytest.mark.skipif("avx512" not in available_isas(), reason="this machine has one width of vectors")
def test_machines_of_different_vectors_share_a_cache_directory(tmp_path):
    for capability in ("avx512", "avx2", "avx512"):
        environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", PROMPT_OF_A_PROCESS]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.stdout.split() == [capability.upper()], result.stderr[-2000:]


@pytest.mark.parametrize("chosen", [None, 256])
def test_the_width_of_vectors_is_a_setting(make_model, tokens, compiled, monkeypatch, chosen):
    """And so a part of the key of Inductor's cache, see the slow test above."""
    widths = []

    def compile_fx(gm, inputs, config_patches):
        widths.append(config_patches["cpp.simdlen"])
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    with torch.no_grad(), torch._inductor.config.patch({"cpp.simdlen": chosen}):
        compiled(make_model(num_hidden_layers=1), inner_backend="inductor")(tokens(2, 9))
        assert widths == [pick_vec_isa().bit_width()]
