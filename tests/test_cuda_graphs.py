"""What CUDA graphs need of the graphs that reach Inductor, seen without a GPU: tests/e2e/test_cuda.py replays them."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import fx

from qmamba_compile import backend
from qmamba_compile.fx_utils import mutates, placeholders
from qmamba_compile.state import DSQState

STATIC = ("guarded", "unguarded")


@pytest.fixture
def handed_over(monkeypatch) -> list[tuple[fx.GraphModule, dict]]:
    """Each graph as the inner compiler gets it, with its patches of Inductor's options."""
    seen = []

    def compile_fx(gm, inputs, config_patches=None):
        seen.append((gm, config_patches or {}))
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    return seen


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("flush_interval", [1, 8])
def test_decode_is_replayed_and_its_states_keep_their_place(
    make_model, tokens, compiled, decode, handed_over, mode, flush_interval
):
    options = {"inner_backend": "inductor", "mode": mode, "flush_interval": flush_interval}
    decode(compiled(make_model(), **options), tokens(2, 9), tokens(2, 2))
    (_, for_prompts), (step, for_steps) = handed_over
    written = [node for node in placeholders(step.graph) if any(mutates(user) for user in node.users)]
    # Two layers: codes, two scales, a step counter and the convolution's inputs, and of a ring its position.
    assert len(written) >= 2 * (5 if flush_interval == 1 else 6)
    for node in written:
        assert node.meta["tensor_dict"]["_dynamo_static_input_type"] in STATIC, node
    assert bool(for_steps.get("triton.cudagraphs")) == (mode is not None)
    assert not for_prompts.get("triton.cudagraphs")


@pytest.mark.parametrize("options", [{}, {"state_bits": None}], ids=["packed", "float"])
def test_the_next_cache_lies_where_a_dropped_one_lay(
    make_model, tokens, compiled, decode, handed_over, monkeypatch, options
):
    """Else each `generate` would record the decode step anew, and PyTorch keeps all recordings."""
    monkeypatch.setattr(backend, "_runs_on_cpu", lambda gm: False)
    options = {"inner_backend": "inductor", "mode": "reduce-overhead"} | options
    model = compiled(make_model(), **options)
    wanted, _ = decode(compiled(make_model(), **options | {"mode": None}), tokens(2, 9), tokens(2, 3))
    places = []
    for _ in range(3):
        logits, cache = decode(model, tokens(2, 9), tokens(2, 3))
        assert torch.equal(logits, wanted)
        places.append(addresses(cache))
        del cache
        gc.collect()
    assert places[0] == places[1] == places[2]
    assert len(places[0]) == 2 * (2 if "state_bits" in options else 5 + 4)


def addresses(cache) -> list[int]:
    """Of all that a decode step writes to."""
    found = []
    for layer in cache.layers:
        state = layer.recurrent_states[0]
        found.append(layer.conv_states[0].data_ptr())
        own = [getattr(state, name) for name in state.own] if isinstance(state, DSQState) else [state]
        found += [tensor.data_ptr() for tensor in own]
    return found


@pytest.mark.parametrize("mode", [None, "default"])
def test_without_cuda_graphs_memory_is_not_kept(make_model, tokens, compiled, handed_over, monkeypatch, mode):
    monkeypatch.setattr(backend, "_runs_on_cpu", lambda gm: False)
    monkeypatch.setattr(backend, "StaticStates", None)
    with torch.no_grad():
        compiled(make_model(), inner_backend="inductor", mode=mode)(tokens(2, 9))
        with torch._inductor.config.patch("triton.cudagraphs", True), pytest.raises(Exception, match="callable"):
            compiled(make_model(), inner_backend="inductor", mode=mode)(tokens(2, 9))


def test_a_prompt_is_no_input_that_keeps_its_place(make_model, tokens, compiled, decode, handed_over):
    decode(compiled(make_model(), inner_backend="inductor"), tokens(2, 9), tokens(2, 1))
    assert len(handed_over) == 2
    for gm, _ in handed_over:
        ids = next(node for node in placeholders(gm.graph) if node.meta["example_value"].dtype is torch.int64)
        assert ids.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") is None


def test_a_mode_beside_options(make_model, handed_over, tokens):
    model = make_model()
    model.compile(backend="qmamba", mode="reduce-overhead")
    with torch.no_grad():
        model(tokens(1, 9))
    assert len(handed_over) == 1 and backend.QMambaConfig(mode="reduce-overhead").mode == "reduce-overhead"
