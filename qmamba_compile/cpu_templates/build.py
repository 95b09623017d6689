"""Compile rendered kernels with the compiler that Inductor uses, and load them.

A kernel is a shared library in Inductor's cache directory, named by its slug and the hash of everything that decides
its bytes: source, flags, compiler version.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import importlib.machinery
import importlib.util
import logging
import os
import pathlib
import platform
import subprocess
import sys
import sysconfig
import types
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from ..errors import ConfigError, KernelBuildError
from ..generated_code import kept
from .render import render
from .specs import LANES, LayerSpec, Spec

log = logging.getLogger(__name__)

AnySpec = TypeVar("AnySpec", Spec, LayerSpec)

Kernel = Callable[[bytes], None]
"""A loaded kernel: takes the packed `Arguments` struct of its template."""

_X86 = platform.machine() in ("x86_64", "AMD64")

# Named extensions and not -march=native: a cache directory shared by several machines must not serve one machine's code
# to another. Without -mprefer-vector-width gcc copies 64-byte vectors in halves.
_ISA_FLAGS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512"),
    "avx2": ("-mavx2", "-mfma"),
    "portable": (),
}

_AMX_FLAGS = ("-mamx-tile", "-mamx-int8")

# No -ffast-math, and no fused multiply-add that the reference does not have: the codes must be the reference's.
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")


def best_isa() -> str:
    """The widest instruction set of this machine, or what ``QMAMBA_CPU_ISA`` names.

    Raises:
        ConfigError: the variable names an instruction set that is unknown or that this machine lacks.
    """
    available = available_isas()
    chosen = os.environ.get("QMAMBA_CPU_ISA")
    if not chosen:
        return available[0]
    if chosen not in LANES:
        raise ConfigError(f"QMAMBA_CPU_ISA={chosen!r} is not allowed; use one of {tuple(LANES)}")
    if chosen not in available:
        raise ConfigError(f"QMAMBA_CPU_ISA={chosen!r}: this machine lacks it; use one of {available}, or unset it")
    return chosen


@functools.cache
def available_isas() -> tuple[str, ...]:
    """Instruction sets that this machine runs, widest first."""
    capability = torch.backends.cpu.get_cpu_capability() if _X86 else "DEFAULT"
    return {"AVX512": ("avx512", "avx2", "portable"), "AVX2": ("avx2", "portable")}.get(capability, ("portable",))


@functools.cache
def vnni_flags(isa: str) -> tuple[str, ...]:
    """What the compiler is told for this machine's vpdpbusd on the vectors of ``isa``; nothing where it has none.

    Client processors without AVX-512 have it for 32 bytes (AVX-VNNI); AVX-512's is for 64, and for 32 as well.
    """
    has_avx512 = "avx512" in available_isas() and bool(torch.cpu._is_vnni_supported())
    if isa == "avx512" and has_avx512:
        return ("-mavx512vnni",)
    if isa == "avx2" and "avx2" in available_isas():
        if "avx_vnni" in _cpu_words() and _compiler_knows("-mavxvnni"):
            return ("-mavxvnni",)
        if has_avx512:
            return ("-mavx512vnni", "-mavx512vl")
    return ()


@functools.cache
def has_bf16() -> bool:
    """True when this machine has AVX-512 with vdpbf16ps, and its compiler knows."""
    supported = "avx512" in available_isas() and bool(torch.cpu._is_avx512_bf16_supported())
    return supported and _compiler_knows("-mavx512bf16")


@functools.cache
def has_amx() -> bool:
    """True when this machine multiplies tiles of bytes (AMX), Linux lets this process do so, and its compiler knows."""
    supported = "avx512" in available_isas() and {"amx_tile", "amx_int8"} <= set(_cpu_words())
    return supported and torch.cpu._init_amx() and all(map(_compiler_knows, _AMX_FLAGS))


@functools.cache
def core() -> str:
    """``"amd"`` where /proc/cpuinfo says so, otherwise ``"intel"``, on whose cores the rest was measured."""
    return "amd" if "AuthenticAMD" in _cpu_words() else "intel"


def _cpu_words() -> list[str]:
    """What Linux says of the processors: makers, names, features."""
    with contextlib.suppress(OSError):
        return pathlib.Path("/proc/cpuinfo").read_text().split()
    return []


def for_this_machine(spec: AnySpec) -> AnySpec:
    """``spec`` with what this machine has beside the instruction set of its ``isa``."""
    if not spec.multiplies_codes:
        return spec
    has_avx512 = spec.isa == "avx512"
    found: dict[str, Any] = {"vnni": bool(vnni_flags(spec.isa)), "core": core()}
    if isinstance(spec, Spec) and spec.ring != "float32":
        # On Zen 4 one takes as long as a fused multiply-add and does the work of two: a step that stores takes 2.5 us a
        # head of 64 x 128 for 2.9. Intel's cores were not measured.
        found["bf16"] = has_avx512 and has_bf16() and core() == "amd"
    if isinstance(spec, LayerSpec):
        # Who names an instruction set gets no tiles.
        found["amx"] = has_avx512 and found["vnni"] and has_amx() and not os.environ.get("QMAMBA_CPU_ISA")
    return dataclasses.replace(spec, **found)


def inductor_compiler() -> str | None:
    """The C++ compiler that Inductor uses, without which it compiles nothing for the CPU; ``None`` without one."""
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return get_cpp_compiler()
    except (exc.InvalidCxxCompiler, OSError):  # OSError: CXX names a folder, or a file that may not be run
        return None


def missing_compiler() -> str:
    """Why there is none, and what to do."""
    if "CXX" in os.environ:
        return f"CXX={os.environ['CXX']!r} cannot be run with --version; set it to a C++ compiler, or unset it"
    return "no C++ compiler was found; install g++, or set CXX to a compiler"


@functools.cache
def find_compiler() -> str | None:
    """The C++ compiler that our kernels are built with, Inductor's. ``None``, and one warning, where there is none."""
    if sys.platform == "win32":
        log.warning("C++ kernels are written for g++ and clang++; on Windows the slower torch reference runs instead")
        return None
    compiler = inductor_compiler()
    if compiler is None:
        log.warning(
            "%s. Until then plain torch runs on the CPU, Inductor's graphs and the SSM step, too: many times slower",
            missing_compiler(),
        )
    return compiler


@functools.cache
def _compiler_knows(flag: str) -> bool:
    """True when the compiler takes ``flag``. Of g++, -mavx512bf16 needs version 10 and -mavxvnni 11."""
    compiler = find_compiler()
    if compiler is None:
        return False
    command = [compiler, flag, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def build(spec: Spec | LayerSpec) -> pathlib.Path | None:
    """Path of the compiled kernel, from the cache where it has been built before; ``None`` without a compiler.

    Raises:
        KernelBuildError: the compiler rejected the code; the message holds its own.
    """
    openmp = () if sys.platform == "darwin" else ("-fopenmp",)
    more = [*vnni_flags(spec.isa)] * spec.vnni
    more += ["-mavx512bf16"] * spec.bf16 if isinstance(spec, Spec) else [*_AMX_FLAGS] * spec.amx
    remedy = "set CXX to another compiler" + (", or fuse_ssm_update=False" if isinstance(spec, Spec) else "")
    return _build(render(spec), spec.slug(), (*_FLAGS, *_ISA_FLAGS[spec.isa], *more, *openmp), remedy)


def load(spec: Spec | LayerSpec) -> Kernel | None:
    """The kernel of ``spec``, built if need be; ``None`` without a compiler.

    Raises:
        KernelBuildError: the compiler rejected the code, or the library does not load.
    """
    library = build(spec)
    if library is None:
        return None
    try:
        function = getattr(ctypes.CDLL(str(library)), spec.slug())
    except (OSError, AttributeError) as error:
        raise KernelBuildError(f"{spec.slug()}: {library} does not load ({error}); delete it to build anew") from error
    function.argtypes, function.restype = [ctypes.c_char_p], None
    return function


@functools.cache
def load_extension(name: str) -> types.ModuleType | None:
    """The Python module written in ``name``.cpp beside this file, built if need be; ``None`` without a compiler.

    Raises:
        KernelBuildError: the compiler rejected the code (it needs Python's headers, as Inductor does), or the module
            does not load.
    """
    source = pathlib.Path(__file__).with_name(f"{name}.cpp").read_text()
    include = f"-I{sysconfig.get_path('include')}"
    undefined = ("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()
    slug = f"{name}-{sysconfig.get_config_var('SOABI')}"
    library = _build(source, slug, (*_FLAGS, include, *undefined), "install Python's headers")
    if library is None:
        return None
    loader = importlib.machinery.ExtensionFileLoader(name, str(library))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        raise KernelBuildError(f"{name}: {library} does not load ({error}); delete it to build anew") from error
    return module


def _build(source: str, slug: str, flags: Sequence[str], remedy: str) -> pathlib.Path | None:
    """Path of the shared library made of ``source``; ``remedy`` ends the message when the compiler rejects it."""
    compiler = find_compiler()
    if compiler is None:
        return None
    from torch._inductor.cpp_builder import get_compiler_version_info

    flags = (*flags, "-shared", "-fPIC")
    identity = "\n".join((source, *flags, compiler, get_compiler_version_info(compiler), platform.machine()))
    name = f"{slug}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"

    def compile_to(library: pathlib.Path) -> None:
        # The source stays beside the library, for debuggers and for whoever reads the compiler's message.
        unit = kept(f"{name}.cpp", lambda path: path.write_text(source))
        command = [compiler, *flags, str(unit), "-o", str(library), "-lm"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise KernelBuildError(
                f"{slug}: {compiler} rejected {unit}\n{' '.join(command)}\n{result.stderr.strip()}\nTo go on, {remedy}"
            )
        if not library.exists():
            raise KernelBuildError(
                f"{slug}: {compiler} reported success and wrote no library: it is no C++ compiler; "
                "unset CXX, or set it to g++ or clang++"
            )
        log.info("built %s", library.name)

    return kept(f"{name}.so", compile_to)
