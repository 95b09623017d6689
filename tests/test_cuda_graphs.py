"""What CUDA graphs need of the graphs that reach Inductor, seen without a GPU: tests/e2e/test_cuda.py replays them."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from qmamba_compile import backend
from qmamba_compile.fx_utils import mutates, placeholders

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


def test_a_prompt_is_no_input_that_keeps_its_place(make_model, tokens, compiled, decode, handed_over):
    decode(compiled(make_model(), inner_backend="inductor"), tokens(2, 9), tokens(2, 1))
    for gm, _ in handed_over:
        ids = next(node for node in placeholders(gm.graph) if node.meta["example_value"].dtype is torch.int64)
        assert ids.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") is None


def test_a_mode_beside_options(make_model, handed_over, tokens):
    model = make_model()
    model.compile(backend="qmamba", mode="reduce-overhead")
    with torch.no_grad():
        model(tokens(1, 9))
    assert len(handed_over) == 1 and backend.QMambaConfig(mode="reduce-overhead").mode == "reduce-overhead"
