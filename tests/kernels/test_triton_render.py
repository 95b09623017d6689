"""Specs and the text of the generated Triton kernels."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from qmamba_compile import quant
from qmamba_compile.errors import ConfigError
from qmamba_compile.triton_templates import tuning
from qmamba_compile.triton_templates.render import render
from qmamba_compile.triton_templates.specs import TARGETS, target_of
from qmamba_compile.triton_templates.state_specs import StateSpec

GOLDEN = pathlib.Path(__file__).parent / "golden"
SPEC = StateSpec(64, 128, 4)
GOLDEN_SPECS = [
    SPEC,
    StateSpec(5, 48, 2, dynamic=True, stochastic=True, rows=8, target="gfx942"),
    StateSpec(64, 128, 4, flush_interval=8, ring_bits=8),
]


@pytest.mark.parametrize("spec", GOLDEN_SPECS, ids=StateSpec.slug)
def test_golden_text(spec: StateSpec) -> None:
    """After a wanted change: ``QMAMBA_UPDATE_GOLDEN=1 pytest tests/kernels/test_triton_render.py``; read the diff."""
    golden = GOLDEN / f"{spec.slug()}.py.txt"
    if os.environ.get("QMAMBA_UPDATE_GOLDEN"):
        golden.write_text(render(spec))
    assert render(spec) == golden.read_text()


@pytest.mark.parametrize("bits", [*quant.STATE_BITS, None])
@pytest.mark.parametrize("dynamic, stochastic", [(True, True), (False, False), (True, False)])
@pytest.mark.parametrize("target", ["sm_90", "gfx942", "interpreter"])
def test_rendered_text_is_readable(bits: int | None, dynamic: bool, stochastic: bool, target: str) -> None:
    if bits is None:
        dynamic = stochastic = False
    check_readable(StateSpec(64, 128, bits, dynamic, stochastic, rows=64, target=target))


@pytest.mark.parametrize("ring_bits", [16, 8])
def test_rendered_ring_is_readable(ring_bits: int) -> None:
    check_readable(StateSpec(60, 96, 4, rows=16, flush_interval=8, ring_bits=ring_bits))


def check_readable(spec: StateSpec) -> None:
    text = render(spec)
    compile(text, "rendered", "exec")
    assert max(len(line) for line in text.splitlines()) <= 120
    assert all(line == line.rstrip() for line in text.splitlines())
    assert "\n\n\n\n" not in text and "{%" not in text and "{{" not in text


@pytest.mark.parametrize(
    "change, named",
    [
        ({"bits": 3}, "bits=3"),
        ({"dstate": 20}, "dstate=20"),
        ({"dstate": 512}, "dstate=512"),
        ({"headdim": 0}, "headdim=0"),
        ({"rows": 24}, "rows=24"),
        ({"warps": 32}, "warps=32"),
        ({"target": "sm_70"}, "sm_70"),
        ({"dynamic": True, "rows": 32}, "rows=32"),
        ({"bits": None, "state_dtype": "float16"}, "float16"),
        ({"bits": None, "dynamic": True}, "float state"),
    ],
)
def test_spec_refuses(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        dataclasses.replace(SPEC, **change)


def test_slugs_tell_specs_apart() -> None:
    changes = [{}, {"bits": 8}, {"stochastic": True}, {"rows": 64}, {"warps": 2}, {"target": "sm_80"}, {"headdim": 32}]
    changes += [{"flush_interval": 8}, {"flush_interval": 8, "ring_bits": 8}]
    changes += [{"dynamic": True, "rows": 64}, {"bits": None}, {"bits": None, "state_dtype": "bfloat16"}]
    assert len({dataclasses.replace(SPEC, **change).slug() for change in changes}) == len(changes)


def test_architectures_that_are_served() -> None:
    assert target_of("sm_90") == "sm_90" and target_of("sm_87") == "sm_86" and target_of("sm_121") == "sm_120"
    figures = {target: tuning.gpu_of(target) for target in TARGETS}
    assert figures["sm_103"] is tuning.GPUS["sm_100"] and figures["sm_120"] is tuning.GPUS["sm_120"]
    assert [target for target, gpu in figures.items() if gpu is None] == ["interpreter"]
    for unknown in ("sm_75", "gfx906"):
        with pytest.raises(ConfigError, match=unknown):
            target_of(unknown)


def test_importing_the_launcher_loads_neither_triton_nor_jinja2() -> None:
    def loaded_by(module: str) -> str:
        program = f"import sys, {module}\nprint([name for name in ('triton', 'jinja2') if name in sys.modules])"
        return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    assert loaded_by("qmamba_compile.triton_templates.launch") == loaded_by("torch")
    assert "jinja2" in loaded_by("jinja2")
