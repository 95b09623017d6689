"""A child process in which Triton runs kernels by its interpreter, on the CPU."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., Any]]:
    """``interpreted(function, *args)`` calls a module's function there. ``TRITON_INTERPRET`` must be set before Triton
    is imported, and in this process it may be long since."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context, initializer=_one_thread) as pool:
        # The child starts, and copies this environment, at the first call.
        pool.submit(int).result()
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
