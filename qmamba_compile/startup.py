"""What every process would wait for again while it compiles, although the answer is known or nobody asked."""

from __future__ import annotations

import contextlib
import contextvars
import gc
import hashlib
import pathlib
import threading
from typing import Any
from unittest import mock

import torch
from torch._dynamo.callback import callback_handler

from .cpu_templates.build import find_compiler

_PATIENT = 50_000
"""Allocations from one collection to the next while Dynamo traces. 130M shape: 0.4 s of collecting instead of 1.5 s."""

_usual: tuple[int, ...] | None = None


def collect_less_often_while_compiling() -> None:
    """Let Python look for cyclic garbage less often while Dynamo compiles, whatever the backend.

    Nearly all that is allocated there lives until the end, and each collection walks it again. Asked at each
    compilation, because ``torch._dynamo.reset`` forgets callbacks; it holds from the next one on.
    """
    if _start not in callback_handler.start_callbacks:
        callback_handler.register_start_callback(_start)
        callback_handler.register_end_callback(_end)


def _start(_: Any) -> None:
    global _usual
    usual = gc.get_threshold()
    # 0: the program has switched collection off.
    if 0 < usual[0] < _PATIENT:
        _usual = usual
        gc.set_threshold(_PATIENT, *usual[1:])


def _end(_: Any) -> None:
    global _usual
    if _usual is not None:
        gc.set_threshold(*_usual)
        _usual = None


def ask_inductor_early() -> threading.Thread:
    """Ask in a thread what Inductor asks in every process before it compiles for the CPU, or finds it compiled.

    Everything here keeps its answer, and fails again, loudly, where Inductor asks.
    """

    def ask() -> None:
        from torch._inductor.codecache import torch_key

        for question in (_vector_instructions, torch_key, _system):
            with contextlib.suppress(Exception):
                question()

    # Inductor's options live in context variables, which a new thread does not inherit.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(ask,), name="qmamba-startup", daemon=True)
    thread.start()
    return thread


def _vector_instructions() -> None:
    """The instruction sets that Inductor may use, each probed once for a cache directory instead of once a process.

    A probe builds a small library and loads it in a process of its own: 1.0 s on one core for all, though the libraries
    stay built. What passed passes again with the same torch, compiler, flags and code; what failed is tried again.
    """
    from torch._inductor.cpp_builder import get_compiler_version_info
    from torch._inductor.cpu_vec_isa import VecISA, valid_vec_isa_list
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    compiler = find_compiler()
    if compiler is None:
        return
    toolchain = (torch.__version__, torch.__file__, compiler, get_compiler_version_info(compiler))
    probe = VecISA.check_build

    def probe_once(isa: VecISA, code: str) -> bool:
        identity = "\n".join((*toolchain, isa.build_arch_flags(), code))
        passed = pathlib.Path(cache_dir(), "qmamba", f"probe-{hashlib.sha256(identity.encode()).hexdigest()[:16]}")
        if not passed.exists():
            if not probe(isa, code):
                return False
            passed.parent.mkdir(parents=True, exist_ok=True)
            passed.touch()
        return True

    with mock.patch.object(VecISA, "check_build", probe_once):
        valid_vec_isa_list()


def _system() -> None:
    """What Inductor says of the GPU in its cache keys. Without one it hashes all of Triton, 0.4 s, and forgets it."""
    from torch._inductor import codecache

    if torch.cuda.is_available():
        codecache.CacheBase.get_system()
        return
    triton_key: Any = codecache.triton_key
    triton_key.set(None)
    try:
        codecache.CacheBase.get_system()
    finally:
        triton_key.clear()
