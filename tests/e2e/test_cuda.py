"""The whole backend on a GPU, against the same backend on the CPU: skipped without one.

The bundled model: its 4-bit states have been seen to work, and a fault of a kernel shows in its perplexity.
"""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import pytest
import torch

from qmamba_compile import DSQState, report

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

MODEL = Path(__file__).parents[2] / "demo" / "tiny-mamba2"
HELD_OUT = MODEL.parent / "heldout.txt"

SCHEMES = {
    "default": {},
    "every step": {"flush_interval": 1},
    "stochastic": {"flush_interval": 1, "rounding": "stochastic"},
    "float state": {"state_bits": None},
}


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL).eval().requires_grad_(False)


def held_out(batch: int, length: int) -> torch.Tensor:
    text = HELD_OUT.read_bytes()[: batch * length]
    return torch.tensor(list(text)).view(batch, length)


@torch.inference_mode()
def losses(model, ids: torch.Tensor, prompt: int = 64) -> torch.Tensor:
    """Nats of each token behind the prompt, by decode."""
    out = model(ids[:, :prompt], use_cache=True)
    logits = [out.logits[:, -1].float()]
    for token in ids[:, prompt:-1].split(1, dim=1):
        out = model(token.contiguous(), cache_params=out.cache_params, use_cache=True)
        logits.append(out.logits[:, -1].float().clone())
    logits = torch.stack(logits, dim=1).cpu()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, prompt:].flatten().cpu(), reduction="none")


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_decode_is_that_of_the_cpu(model, scheme, mode):
    ids = held_out(2, 128)
    on_cpu, on_gpu = copy.deepcopy(model), copy.deepcopy(model).cuda()
    on_cpu.compile(backend="qmamba", fullgraph=True, options=SCHEMES[scheme] | {"inner_backend": "eager"})
    on_gpu.compile(backend="qmamba", fullgraph=True, options=SCHEMES[scheme] | {"mode": mode})
    expected = losses(on_cpu, ids)
    torch._dynamo.reset()
    for _ in range(2):
        # The second cache lies elsewhere: a CUDA graph must not go on with the first.
        found = losses(on_gpu, ids.cuda())
        # Codes at a tie fall to either side, and states then differ by a code; a wrong state costs whole nats.
        assert float(found.mean()) == pytest.approx(float(expected.mean()), rel=0.01)
        assert float((found - expected).abs().mean()) < 0.05


@pytest.mark.parametrize("options", [{}, {"mode": "reduce-overhead"}], ids=["plain", "CUDA graphs"])
def test_generate_in_bfloat16(model, options):
    network = copy.deepcopy(model).to("cuda", torch.bfloat16)
    network.compile(backend="qmamba", fullgraph=True, options=options)
    ids = held_out(2, 48).cuda()
    with torch.inference_mode():
        first = network.generate(ids, max_new_tokens=24, do_sample=False)
        second = network.generate(ids, max_new_tokens=24, do_sample=False)
        longer = network.generate(held_out(3, 65).cuda(), max_new_tokens=24, do_sample=False)
    assert torch.equal(first, second) and first.shape == (2, 72) and longer.shape == (3, 89)
    assert not any(entry.reason for done in report.recent for entry in done.entries)


def test_a_step_does_not_wait_for_the_device(model):
    network = copy.deepcopy(model).cuda()
    network.compile(backend="qmamba", fullgraph=True)
    ids = held_out(2, 40).cuda()
    with torch.inference_mode():
        cache = network(ids, use_cache=True).cache_params
        token = ids[:, :1].contiguous()
        for _ in range(9):
            network(token, cache_params=cache, use_cache=True)
        assert all(isinstance(layer.recurrent_states[0], DSQState) for layer in cache.layers)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(9):
                network(token, cache_params=cache, use_cache=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_cuda_graphs_are_recorded(model):
    """Nothing but a counter tells: where Inductor finds a reason against CUDA graphs, it runs without them."""
    network = copy.deepcopy(model).cuda()
    network.compile(backend="qmamba", fullgraph=True, options={"mode": "reduce-overhead"})
    torch._dynamo.utils.counters.clear()
    losses(network, held_out(1, 80).cuda())
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    manager = torch._inductor.cudagraph_trees.get_container(torch.cuda.current_device()).tree_manager
    assert manager is not None and manager.current_node is not None


def test_the_next_cache_needs_no_recording(model):
    network = copy.deepcopy(model).cuda()
    network.compile(backend="qmamba", fullgraph=True, options={"mode": "reduce-overhead"})
    recorded = []
    for start in range(4):
        losses(network, held_out(1, 80 + start).cuda())
        gc.collect()
        recorded.append(recordings())
    assert recorded[0] > 0 and recorded[1:] == [recorded[1]] * 3


def recordings() -> int:
    """CUDA graphs that Inductor holds."""
    manager = torch._inductor.cudagraph_trees.get_container(torch.cuda.current_device()).tree_manager
    count, nodes = 0, [node for nodes in manager.roots.values() for node in nodes]
    while nodes:
        node = nodes.pop()
        count += 1
        nodes += [child for children in node.children.values() for child in children]
    return count
