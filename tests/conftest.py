"""Fixtures that every test may use: tiny random models, compiling them, and a clean Dynamo before each test."""

from __future__ import annotations

import concurrent.futures
import logging
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from qmamba_compile import report


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No compiled graph, no report of an earlier test."""
    # Tests that never compile should not pay for importing Dynamo.
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    report.recent.clear()


@pytest.fixture(autouse=True, scope="session")
def quiet_libraries():
    """transformers tells once a process that it runs without the CUDA kernels, torchao that it lacks its own."""
    for name in ("transformers", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(scope="session")
def exact_torchao():
    """For tests that compare with torchao's linears: without VNNI the int8 product of torch that they use saturates."""
    large = torch.full((32, 32), 127, dtype=torch.int8)
    if not (torch._int_mm(large, large) == 32 * 127**2).all():
        pytest.skip("torch's int8 product is not exact on this processor")


@pytest.fixture(scope="session")
def make_model():
    """Factory of a tiny random ``Mamba2ForCausalLM``: the same seed and sizes give the same weights."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
        sizes = dict(
            vocab_size=256,
            hidden_size=64,
            num_heads=2,
            head_dim=64,
            state_size=32,
            num_hidden_layers=2,
            n_groups=1,
            chunk_size=32,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=0,
        )
        torch.manual_seed(seed)
        model = Mamba2ForCausalLM(Mamba2Config(**(sizes | changes)))
        return model.to(dtype).eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def compiled():
    """``model.compile(backend="qmamba")`` without Inductor unless asked: the rewritten graph runs as it is."""

    def compile_model(model, *, dynamic=None, **options):
        options = {"inner_backend": "eager"} | options
        model.compile(backend="qmamba", fullgraph=True, dynamic=dynamic, options=options)
        return model

    return compile_model


@pytest.fixture(scope="session")
def decode():
    """Run a prompt and then tokens one by one: logits of every step, and the cache."""

    @torch.no_grad()
    def run(model, prompt, tokens, **first):
        out = model(prompt, use_cache=True, **first)
        logits = [out.logits[:, -1]]
        for token in tokens.split(1, dim=1):
            out = model(token.contiguous(), cache_params=out.cache_params, use_cache=True)
            logits.append(out.logits[:, -1])
        return torch.stack(logits, dim=1), out.cache_params

    return run


def tokens(batch: int, length: int, seed: int = 1, vocabulary: int = 256) -> torch.Tensor:
    """Random ids that never are the padding token."""
    return torch.randint(1, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session", name="tokens")
def tokens_fixture():
    return tokens


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., Any]]:
    """``interpreted(function, *args)`` calls a module's function there. ``TRITON_INTERPRET`` must be set before Triton
    is imported, and in this process it may be long since."""
    context = multiprocessing.get_context("spawn")
    options = {"mp_context": context, "initializer": torch.set_num_threads, "initargs": (1,)}
    with concurrent.futures.ProcessPoolExecutor(1, **options) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            # The child starts, and copies this environment, at the first call.
            pool.submit(int).result()
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()
