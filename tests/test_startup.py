"""What a process asks early, and what Dynamo is spared: answers, settings and effects are as without this backend."""

from __future__ import annotations

import gc
import logging
import threading

import pytest
import torch
from torch._dynamo import config, side_effects, symbolic_convert
from torch._dynamo.callback import callback_handler
from torch._inductor import codecache, cpu_vec_isa
from torch._inductor.runtime import triton_compat

from qmamba_compile import startup


@pytest.fixture
def thresholds():
    """Python's usual thresholds, and afterwards whatever they were."""
    before = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield
    gc.set_threshold(*before)


def while_compiling(look, function=lambda x: x + 1):
    """What ``look()`` gives while a function is being compiled."""
    seen = []

    def backend(gm, example_inputs):
        seen.append(look())
        return gm.forward

    torch.compile(function, backend=backend)(torch.ones(2))
    return seen[0]


def spared() -> dict[str, object]:
    """Settings that Dynamo finds in its module's dictionary, and what it asks for the name of a line's function."""
    found = {name: value for name, value in vars(config).items() if name in config._config}
    return {**found, "get_funcname": symbolic_convert.get_funcname}


def test_collections_are_rare_while_dynamo_compiles_and_as_before_afterwards(thresholds):
    for _ in range(2):  # Dynamo's reset forgets callbacks, and asking twice must not register twice
        startup.hurry_dynamo()
        startup.hurry_dynamo()
        assert callback_handler.start_callbacks.count(startup._start) == 1
        assert while_compiling(gc.get_threshold) == (startup._PATIENT, 10, 10)
        assert gc.get_threshold() == (700, 10, 10)
        torch._dynamo.reset()


def test_everything_comes_back_when_compiling_fails(thresholds):
    startup.hurry_dynamo()
    before = spared()

    def backend(gm, example_inputs):
        raise RuntimeError("on purpose")

    with pytest.raises(Exception, match="on purpose"):
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert gc.get_threshold() == (700, 10, 10) and spared() == before


@pytest.mark.parametrize("chosen", [(0, 10, 10), (100_000, 20, 20)], ids=["off", "more patient"])
def test_a_choice_of_the_program_is_kept(thresholds, chosen):
    gc.set_threshold(*chosen)
    startup.hurry_dynamo()
    assert while_compiling(gc.get_threshold) == chosen
    assert gc.get_threshold() == chosen


@pytest.mark.parametrize("verbose", [False, True])
def test_settings_are_at_hand_with_their_values_while_dynamo_compiles(verbose):
    startup.hurry_dynamo()
    before = spared()
    with config.patch(verbose=verbose):
        during = while_compiling(spared)
    assert during["verbose"] is verbose and not during["use_graph_deduplication"]
    assert spared() == before == {"get_funcname": symbolic_convert.get_funcname}


def test_side_effects_are_described_only_for_a_log_that_is_on(monkeypatch):
    monkeypatch.setattr(startup.trace_log, "handlers", [])  # pytest listens to every log
    startup.hurry_dynamo()
    effects = []

    def function(x):
        effects.append(1)
        return x + 1

    def policy():
        return config.side_effect_replay_policy

    assert while_compiling(policy, function) == "silent" and effects == [1]
    assert policy() == "info"
    with config.patch(side_effect_replay_policy="warn"):
        assert while_compiling(policy) == "warn"
    with monkeypatch.context() as patched:
        patched.setattr(side_effects.side_effects_log, "isEnabledFor", lambda level: True)
        assert while_compiling(policy) == "info"
    monkeypatch.setattr(startup.trace_log, "handlers", [logging.NullHandler()])
    assert while_compiling(policy) == "info"


def test_a_torch_without_what_is_touched_compiles(monkeypatch, thresholds):
    startup.hurry_dynamo()
    monkeypatch.delattr(symbolic_convert, "trace_call_log")
    assert while_compiling(gc.get_threshold) == (startup._PATIENT, 10, 10)
    assert gc.get_threshold() == (700, 10, 10)


@pytest.mark.parametrize("log", ["trace_source_log", "trace_call_log"])
def test_lines_are_named_only_for_a_log_that_is_on(monkeypatch, log):
    startup.hurry_dynamo()
    usual = symbolic_convert.get_funcname
    assert while_compiling(lambda: symbolic_convert.get_funcname) is not usual
    assert symbolic_convert.get_funcname is usual
    monkeypatch.setattr(getattr(symbolic_convert, log), "isEnabledFor", lambda level: True)
    assert while_compiling(lambda: symbolic_convert.get_funcname) is usual


@pytest.fixture
def probes(monkeypatch, tmp_path):
    """What was probed, on a processor with two instruction sets and an empty cache directory; ``failing`` ones fail."""

    class Probes(list):
        failing: frozenset[str] = frozenset()

    probed = Probes()

    def check_build(isa, code):
        probed.append(str(isa))
        return str(isa) not in probed.failing

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cpu_vec_isa.sys, "platform", "linux")
    monkeypatch.setattr(cpu_vec_isa.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(cpu_vec_isa, "x86_isa_checker", lambda: ["avx2", "avx512"])
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # another probe, of the same set
    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", check_build)
    monkeypatch.setattr(startup, "find_compiler", lambda: "c++")
    new_process(probed)
    yield probed
    new_process(probed)


def new_process(probed: list[str]) -> None:
    """Forget what a process keeps: Inductor caches its answers by function."""
    probed.clear()
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    cpu_vec_isa.VecISA._VecISA__bool__impl.cache_clear()
    for isa in cpu_vec_isa.supported_vec_isa_list:
        getattr(type(isa).__bool__, "cache_clear", lambda: None)()


def names() -> list[str]:
    return [str(isa) for isa in cpu_vec_isa.valid_vec_isa_list()]


def test_instruction_sets_are_probed_once_for_a_cache_directory(probes):
    startup._vector_instructions()
    assert set(probes) == {"avx512", "avx2"} and names() == ["avx512", "avx2"]
    new_process(probes)
    startup._vector_instructions()
    assert probes == [] and names() == ["avx512", "avx2"]
    new_process(probes)
    assert names() == ["avx512", "avx2"] and set(probes) == {"avx512", "avx2"}, "Inductor's own probe is back"


def test_what_failed_is_probed_by_every_process(probes):
    probes.failing = frozenset({"avx512"})
    startup._vector_instructions()
    assert names() == ["avx2"]
    new_process(probes)
    startup._vector_instructions()
    assert set(probes) == {"avx512"} and names() == ["avx2"]


@pytest.mark.parametrize("change", ["compiler", "torch", "flags"])
def test_a_remembered_probe_belongs_to_torch_compiler_and_flags(probes, monkeypatch, change):
    startup._vector_instructions()
    new_process(probes)
    if change == "compiler":
        monkeypatch.setattr(startup, "find_compiler", lambda: "other-c++")
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "0.0")
    else:
        monkeypatch.setattr(cpu_vec_isa.VecAVX2, "_arch_flags", "-mother")
    startup._vector_instructions()
    assert "avx2" in probes


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton's key is a part of Inductor's")
def test_inductors_cache_key_is_the_same_without_tritons(monkeypatch):
    get_system, hashed = codecache.CacheBase.get_system, []
    monkeypatch.setattr(triton_compat, "triton_key", lambda: hashed.append(True) or "key", raising=False)
    monkeypatch.setattr(triton_compat, "HAS_TRITON", True)
    triton_key = getattr(codecache, "triton_key", triton_compat.triton_key)
    forget = getattr(triton_key, "clear", lambda: None)  # torch 2.11 remembers nothing of its own
    try:
        forget()
        usual = get_system.__wrapped__()
        assert hashed
        hashed.clear()
        forget()
        get_system.cache_clear()
        startup._system()
        assert get_system() == usual and not hashed
        assert triton_key() == "key", "whoever asks for Triton's key still gets it"
    finally:
        forget()


def test_inductor_has_been_asked_when_a_pass_fails():
    """Its answers are patched in while a thread asks, which must not outlast the compilation."""
    with pytest.raises(RuntimeError, match="on purpose"), startup.inductor_asked_meanwhile():
        raise RuntimeError("on purpose")
    assert not [thread for thread in threading.enumerate() if thread.name == "qmamba-startup"]
