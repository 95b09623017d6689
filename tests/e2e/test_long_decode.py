"""A very long decode on the bundled model: the packed state neither drifts nor grows."""

import math
import os

import psutil
import pytest
import torch
from test_accuracy import DEMO, load, nats

STEPS, LAST, CHUNK = 100_000, 10_000, 2_000


def compiled(**options):
    model = load()
    model.compile(backend="qmamba", options={"inner_backend": "eager", **options})
    return model


@pytest.fixture(scope="module")
def text():
    held_out = (DEMO / "heldout.txt").read_bytes()[: STEPS + 1]
    return torch.frombuffer(bytearray(held_out), dtype=torch.uint8).long()[None]


@pytest.fixture(scope="module")
def float_state_nats(text):
    """Code lengths with int8 linears and a float state, which may be scanned chunk by chunk."""
    model, cache, found = compiled(state_bits=None), None, []
    with torch.inference_mode():
        for start in range(0, STEPS, CHUNK):
            output = model(text[:, start : start + CHUNK], cache_params=cache, use_cache=True)
            cache = output.cache_params
            found.append(nats(output.logits, text[:, start + 1 : start + CHUNK + 1])[0])
    return torch.cat(found).double()


@pytest.mark.slow
def test_a_hundred_thousand_steps(text, float_state_nats):
    model = compiled(flush_interval=8)
    process, sizes = psutil.Process(os.getpid()), []
    found = torch.empty(STEPS, dtype=torch.float64)
    with torch.inference_mode():
        output = model(text[:, :2], use_cache=True)
        cache = output.cache_params
        for step in range(2, STEPS):
            output = model(text[:, step : step + 1], cache_params=cache, use_cache=True)
            found[step] = nats(output.logits, text[:, step + 1 : step + 2])[0, 0]
            if step % (STEPS // 10) == 0:
                sizes.append(process.memory_info().rss)
    cost = (found - float_state_nats)[2:]
    parts = [math.expm1(part.mean()) for part in cost.split(LAST)]
    print(f"\nperplexity of a 4-bit state, flush_interval=8, over a float state, by {LAST} steps:", end="")
    print("".join(f" {part:+.2%}" for part in parts), f"; resident MB {[size // 2**20 for size in sizes]}")
    assert parts[-1] <= 0.003
    assert sizes[-1] - sizes[1] <= 2**22
