"""Perplexity of the recurrence on the bundled model: what W8A8H4 costs over float32."""

import math
from pathlib import Path

import pytest
import torch
import transformers

DEMO = Path(__file__).parents[2] / "demo"
WINDOWS, LENGTH, PROMPT = 380, 1024, 8


@pytest.fixture(scope="module")
def windows():
    """[WINDOWS, LENGTH] bytes: nearly all of the held-out text."""
    text = torch.frombuffer(bytearray((DEMO / "heldout.txt").read_bytes()), dtype=torch.uint8).long()
    return text[: WINDOWS * LENGTH].view(WINDOWS, LENGTH)


def load():
    return transformers.AutoModelForCausalLM.from_pretrained(DEMO / "tiny-mamba2").eval().requires_grad_(False)


def nats(logits, targets):
    """Code length of each target, [b, l]."""
    return torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")


def recurrent_nats(model, windows):
    """Mean code length of each window, one decode step a byte behind a prompt of `PROMPT` bytes."""
    output = model(windows[:, :PROMPT], use_cache=True)
    logits, cache, total = output.logits[:, -1:], output.cache_params, 0.0
    for position in range(PROMPT, windows.shape[1]):
        ids = windows[:, position : position + 1].contiguous()
        total = total + nats(logits, ids)[:, 0].double()
        logits = model(ids, cache_params=cache, use_cache=True).logits
    return total / (windows.shape[1] - PROMPT)


@pytest.fixture(scope="module")
def float_nats(windows):
    """The same of the float32 model. A float state may be scanned in parallel: see the test below."""
    model = load()
    with torch.no_grad():
        batches = [nats(model(w[:, :-1], use_cache=False).logits, w[:, 1:]) for w in windows.split(4)]
    return torch.cat(batches)[:, PROMPT - 1 :].double().mean(dim=1)


def increase(quantized, reference):
    """Relative increase of perplexity and its standard error over windows."""
    difference = quantized - reference
    return math.expm1(difference.mean()), difference.std().item() / len(difference) ** 0.5


@pytest.mark.slow
def test_the_float_recurrence_equals_the_parallel_scan(windows, float_nats):
    with torch.no_grad():
        few = recurrent_nats(load(), windows[:2])
    torch.testing.assert_close(few, float_nats[:2], rtol=1e-4, atol=1e-5)


CALIBRATED = {"state_scales": "calibrated", "calibration": str(DEMO / "tiny-mamba2" / "calibration.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({}, 0.0025),
        ({"flush_interval": 1, "rounding": "stochastic"}, 0.0055),
        ({"flush_interval": 1} | CALIBRATED, 0.015),
    ],
    ids=["default", "every step, stochastic", "every step, nearest, calibrated"],
)
def test_w8a8h4_costs_little(windows, float_nats, options, limit, record_property):
    model = load()
    model.compile(backend="qmamba", fullgraph=True, options={"inner_backend": "eager", **options})
    with torch.no_grad():
        cost, error = increase(recurrent_nats(model, windows), float_nats)
    record_property("increase", cost)
    print(f"\nW8A8H4 {options}: {cost:+.3%} +- {error:.3%} perplexity over float32, {windows.numel()} bytes")
    assert cost <= limit
