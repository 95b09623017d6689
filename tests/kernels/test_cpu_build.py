"""Specs, rendered text, compilation and its failures."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config

from qmamba_compile import generated_code, ops
from qmamba_compile.cpu_templates import build, launch
from qmamba_compile.cpu_templates.render import render
from qmamba_compile.cpu_templates.specs import LayerSpec, Spec
from qmamba_compile.errors import ConfigError, KernelBuildError

GOLDEN = pathlib.Path(__file__).parent / "golden"
SPEC = Spec("ssm_update", 8, 64, 4, dynamic=True, stochastic=False, isa="portable")
GOLDEN_SPECS = [
    Spec("ssm_update", 64, 128, 4, dynamic=True, stochastic=False, isa="avx512"),
    Spec("ssm_update", 5, 12, 2, dynamic=False, stochastic=True, isa="avx2"),
    Spec("ssm_update", 64, 128, 4, dynamic=True, flush_interval=8, ring="bfloat16", isa="avx512", vnni=True),
]

needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Any:
    """An empty kernel cache, and nothing remembered before or after."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for cache in (launch.kernel, build.find_compiler):
        cache.cache_clear()
    yield tmp_path
    for cache in (launch.kernel, build.find_compiler):
        cache.cache_clear()


def quantize_and_dequantize() -> tuple[torch.Tensor, torch.Tensor]:
    h = torch.randn(1, 2, 3, 8)
    packed, channel_scale, _, state_scale = ops.quantize_state(h, None, 4, False, 0)
    return h, ops.dequantize_state(packed, channel_scale, state_scale, 4)


@pytest.mark.parametrize("spec", GOLDEN_SPECS, ids=Spec.slug)
def test_golden_text(spec: Spec) -> None:
    """After a wanted change: ``QMAMBA_UPDATE_GOLDEN=1 pytest tests/kernels/test_cpu_build.py``, and read the diff."""
    golden = GOLDEN / f"{spec.slug()}.cpp"
    if os.environ.get("QMAMBA_UPDATE_GOLDEN"):
        golden.write_text(render(spec))
    assert render(spec) == golden.read_text()


@pytest.mark.parametrize("kernel", ["ssm_update", "quantize_state", "dequantize_state"])
@pytest.mark.parametrize("bits, dynamic, stochastic", [(8, True, True), (4, False, False), (2, True, False)])
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_rendered_text_is_readable(kernel: str, bits: int, dynamic: bool, stochastic: bool, isa: str) -> None:
    check_readable(render(Spec(kernel, 64, 128, bits, dynamic, stochastic, isa)))


@pytest.mark.parametrize(
    "tuned", [{}, {"vnni": True}, {"vnni": True, "bf16": True, "core": "amd"}], ids=lambda tuned: "-".join(tuned)
)
def test_a_rendered_ring_is_readable(tuned: dict[str, Any]) -> None:
    check_readable(render(Spec("ssm_update", 64, 128, 4, flush_interval=16, ring="bfloat16", **tuned)))


def check_readable(text: str) -> None:
    assert max(len(line) for line in text.splitlines()) <= 120
    assert all(line == line.rstrip() for line in text.splitlines())
    assert "\n\n\n" not in text and "{%" not in text and "{{" not in text.replace("{{}", "")


@pytest.mark.parametrize(
    "change, named",
    [
        ({"kernel": "scan"}, "scan"),
        ({"bits": 3}, "bits=3"),
        ({"dstate": 95}, "dstate=95"),
        ({"headdim": 0}, "headdim=0"),
        ({"headdim": 2**12}, "headdim=4096"),
        ({"isa": "mmx"}, "mmx"),
        ({"bits": None}, "float32"),
        ({"vnni": True, "isa": "avx512"}, "vnni"),
        ({"vnni": True, "flush_interval": 8, "ring": "int8"}, "portable"),
        ({"bf16": True, "isa": "avx512"}, "bf16"),
        ({"bf16": True, "flush_interval": 8, "ring": "float32", "isa": "avx512"}, "float32"),
        ({"bf16": True, "flush_interval": 8, "ring": "int8"}, "portable"),
        ({"core": "amd"}, "amd"),
        ({"core": "arm", "flush_interval": 8, "ring": "int8"}, "arm"),
    ],
)
def test_spec_refuses(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        dataclasses.replace(SPEC, **change)


def test_slugs_differ_where_specs_do() -> None:
    ringed = {"flush_interval": 8, "ring": "bfloat16", "isa": "avx512"}
    changes: list[dict[str, Any]] = [
        {},
        ringed,
        {**ringed, "vnni": True},
        {**ringed, "bf16": True},
        {**ringed, "core": "amd"},
        {"headdim": 9},
        {"dstate": 32},
        {"bits": 8},
        {"bits": None, "dynamic": False},
        {"dynamic": False},
        {"stochastic": True},
        {"isa": "avx2"},
        {"kernel": "quantize_state"},
        {"kernel": "dequantize_state"},
    ]
    assert len({dataclasses.replace(SPEC, **change).slug() for change in changes}) == len(changes)


def test_instruction_set_is_chosen_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QMAMBA_CPU_ISA", "portable")
    assert build.best_isa() == "portable"
    monkeypatch.delenv("QMAMBA_CPU_ISA")
    assert build.best_isa() == build.available_isas()[0]
    monkeypatch.setenv("QMAMBA_CPU_ISA", "mmx")
    with pytest.raises(ConfigError, match="mmx"):
        build.best_isa()
    monkeypatch.setenv("QMAMBA_CPU_ISA", "avx512")
    monkeypatch.setattr(build, "available_isas", lambda: ("portable",))
    with pytest.raises(ConfigError, match="lacks"):
        build.best_isa()


@needs_compiler
@pytest.mark.skipif("avx2" not in build.available_isas(), reason="not an x86 machine with AVX2")
@pytest.mark.parametrize(
    "spec",
    [
        LayerSpec("w8a8_linear", "avx2", vnni=True),
        Spec("ssm_update", 64, 128, 4, isa="avx2", flush_interval=8, ring="bfloat16", vnni=True),
    ],
    ids=lambda spec: spec.kernel,
)
def test_clients_vpdpbusd_is_compiled(fresh: pathlib.Path, monkeypatch: pytest.MonkeyPatch, spec: Any) -> None:
    """Other tests run these kernels where AVX-512 has the same instruction; this machine may lack AVX-VNNI."""
    monkeypatch.setattr(build, "vnni_flags", lambda isa: ("-mavxvnni",))
    library = build.build(spec)
    assert library is not None and library.exists()


@needs_compiler
def test_second_build_is_a_look_up(fresh: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build.build(SPEC)
    assert first is not None and first.is_relative_to(fresh)
    written = first.stat().st_mtime_ns
    assert build.build(SPEC) == first and first.stat().st_mtime_ns == written
    # What changes the bytes changes the name.
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-g"))
    assert build.build(SPEC) != first


@needs_compiler
def test_a_cache_directory_that_cannot_be_made(fresh: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh / "qmamba").write_text("in the way")
    for place in (fresh, fresh / "qmamba" / "below"):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(place))
        with pytest.raises(KernelBuildError, match=r"can be made there.*TORCHINDUCTOR_CACHE_DIR"):
            build.build(SPEC)
    (fresh / "qmamba").unlink()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(fresh))
    # What a folder that is there and may not be written answers; nobody forbids root anything.
    refusal = PermissionError(13, "Permission denied", str(fresh / "qmamba"))
    monkeypatch.setattr(generated_code.tempfile, "mkdtemp", lambda *args: (_ for _ in ()).throw(refusal))
    with pytest.raises(KernelBuildError, match=r"can be made there \(Permission denied\).*TORCHINDUCTOR_CACHE_DIR"):
        build.build(SPEC)


@needs_compiler
def test_compiler_rejects_the_code(fresh: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "render", lambda spec: "int main( {")
    with pytest.raises(KernelBuildError, match=r"error: .*"):
        build.build(SPEC)
    assert not list(fresh.rglob("*.so"))


@needs_compiler
def test_flags_that_the_compiler_knows() -> None:
    assert build._compiler_knows("-O2")
    assert not build._compiler_knows("-mno-such-instructions")


@needs_compiler
def test_a_compiler_that_writes_nothing(fresh: pathlib.Path) -> None:
    message = r"/bin/true reported success and wrote no library.*unset CXX"
    with inductor_config.patch({"cpp.cxx": (None, "/bin/true")}), pytest.raises(KernelBuildError, match=message):
        build.build(SPEC)


@pytest.mark.parametrize("named", ["/bin/false", "/nowhere/g++", ".", "ccache g++", ""])
def test_a_compiler_that_cannot_be_run_is_named(monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    monkeypatch.setenv("CXX", named)
    with inductor_config.patch({"cpp.cxx": (None, named)}):
        assert build.inductor_compiler() is None
    assert f"CXX={named!r}" in build.missing_compiler() and "unset it" in build.missing_compiler()


@needs_compiler
def test_damaged_library(fresh: pathlib.Path) -> None:
    library = build.build(SPEC)
    assert library is not None
    library.write_bytes(b"not a library")
    with pytest.raises(KernelBuildError, match="delete it"):
        build.load(SPEC)


@needs_compiler
def test_extension_is_built_once_and_says_what_it_lacks(fresh: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = build.load_extension.__wrapped__
    assert callable(load("replay").CallSite) and callable(load("replay").CallSite)
    assert [path.suffix for path in sorted((fresh / "qmamba").iterdir())] == [".cpp", ".so"]
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(fresh))
    with pytest.raises(KernelBuildError, match="install Python's headers"):
        load("replay")


def test_without_a_compiler_the_reference_runs(fresh: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def nothing() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", nothing)
    monkeypatch.setattr(build, "log", _Warnings())
    h, read = quantize_and_dequantize()
    assert (read - h).abs().max() <= h.abs().max() / 7
    quantize_and_dequantize()
    assert not list(fresh.rglob("*.so"))
    assert build.log.count == 1


class _Warnings:
    count = 0

    def warning(self, *_: Any) -> None:
        self.count += 1


@needs_compiler
def test_two_processes_build_one_kernel_at_once(tmp_path: pathlib.Path) -> None:
    program = (
        "from qmamba_compile.cpu_templates import build; from qmamba_compile.cpu_templates.specs import Spec;"
        f"assert build.load({SPEC!r}) is not None"
    )
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    processes = [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert [path.suffix for path in sorted((tmp_path / "qmamba").iterdir())] == [".cpp", ".so"]


def test_importing_the_ops_loads_no_template_engine() -> None:
    program = "import sys, torch; before = 'jinja2' in sys.modules; import qmamba_compile.ops; "
    program += "assert before or 'jinja2' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
