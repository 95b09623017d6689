"""What every process would wait for again while it compiles, although the answer is known or nobody asked."""

from __future__ import annotations

import contextlib
import contextvars
import gc
import hashlib
import logging
import pathlib
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch._dynamo import side_effects, symbolic_convert
from torch._dynamo.callback import callback_handler
from torch._logging._internal import trace_log

from .cpu_templates.build import find_compiler

_PATIENT = 50_000
"""Allocations from one collection to the next while Dynamo traces. 130M shape: 0.3 s of collecting instead of 1.5 s, as
with 1,000,000, since what lives has to be walked once.
"""

_taken = contextlib.ExitStack()
"""What `_end` takes back."""


def hurry_dynamo() -> None:
    """Spare Dynamo, whatever the backend, what nobody asked for while it compiles.

    Asked at each compilation, because ``torch._dynamo.reset`` forgets callbacks; it holds from the next one on.
    """
    if _start not in callback_handler.start_callbacks:
        callback_handler.register_start_callback(_start)
        callback_handler.register_end_callback(_end)


def _start(_: Any) -> None:
    for measure in (_collect_less_often, _settings_at_hand, _no_text_for_logs_that_are_off):
        # A later torch may lack what a measure touches, and compiles without it.
        with contextlib.suppress(AttributeError):
            _taken.enter_context(measure())


def _end(_: Any) -> None:
    _taken.close()


@contextlib.contextmanager
def _collect_less_often() -> Iterator[None]:
    """Let Python look for cyclic garbage less often: nearly all that is allocated lives until the end, and each
    collection walks it again.
    """
    usual = gc.get_threshold()
    # 0: the program has switched collection off.
    if not 0 < usual[0] < _PATIENT:
        yield
        return
    gc.set_threshold(_PATIENT, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)


@contextlib.contextmanager
def _settings_at_hand() -> Iterator[None]:
    """Answer some of Dynamo's settings from its module's dictionary, where Python looks first.

    It asks for ``verbose`` at each instruction, 165,000 times for the 130M shape, and for the next two at each node; a
    setting takes a failed search and a function to find, 0.5 s in all. And it describes side effects, 0.2 s, although
    their log is off.
    """
    config = torch._dynamo.config
    often = ("verbose", "use_graph_deduplication", "track_nodes_for_deduplication")
    answers: dict[str, Any] = {name: getattr(config, name) for name in often}
    if config.side_effect_replay_policy == "info":
        # The trace is what `tlparse` reads.
        read = trace_log.handlers or side_effects.side_effects_log.isEnabledFor(logging.DEBUG)
        answers["side_effect_replay_policy"] = "info" if read else "silent"
    vars(config).update(answers)
    try:
        yield
    finally:
        for name in answers:
            vars(config).pop(name, None)


@contextlib.contextmanager
def _no_text_for_logs_that_are_off() -> Iterator[None]:
    """Leave a line's function out of a header that only logs show: to name it, whole files are tokenized, 0.2 s."""
    logs = (symbolic_convert.trace_source_log, symbolic_convert.trace_call_log)
    if any(log.isEnabledFor(logging.DEBUG) for log in logs):
        yield
        return
    with mock.patch.object(symbolic_convert, "get_funcname", lambda filename, lineno: None):
        yield


@contextlib.contextmanager
def inductor_asked_meanwhile() -> Iterator[None]:
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
    try:
        yield
    finally:
        thread.join()


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
    from torch._inductor.runtime import triton_compat

    if torch.cuda.is_available():
        codecache.CacheBase.get_system()
        return
    # torch 2.11 asks Triton itself, 2.13 what it remembers of that.
    asked = codecache if hasattr(codecache, "triton_key") else triton_compat
    with mock.patch.object(asked, "triton_key", lambda: None):
        codecache.CacheBase.get_system()
