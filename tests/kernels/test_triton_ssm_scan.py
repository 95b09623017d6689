"""The generated Triton scan and its gradient in Triton's interpreter, against the reference; and as compiled code."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from packaging.version import Version
from test_cpu_ssm_scan import GRADIENT_TOLERANCE, NAMES, assert_same, decode, gradients, problem

from qmamba_compile import recurrence, scan_gradient, scan_ops
from qmamba_compile.errors import ConfigError
from qmamba_compile.triton_templates import compiled, launch_scan, tuning
from qmamba_compile.triton_templates.render import load, render
from qmamba_compile.triton_templates.scan_specs import SsmScanBackwardSpec, SsmScanSpec

Interpreted = Callable[..., Any]

SMALL: dict[str, Any] = {"batch": 1, "seqlen": 6, "nheads": 2, "headdim": 8, "dstate": 32}

ELEMENTS = tuning.SCAN_ELEMENTS


def by_triton(function: Callable[..., Any], *args: Any, elements: int = ELEMENTS, **kwargs: Any) -> Any:
    """``function`` with the op's C++ kernels replaced by the interpreted ones, whose memory is full of NaN at first."""
    empty, kernels, served = torch.empty, scan_ops.cpu_kernels, []

    class Kernels:
        """`launch_scan`, which must serve."""

        @staticmethod
        def ssm_scan(*args: Any) -> Any:
            served.append(found := launch_scan.ssm_scan(*args))
            return found

        @staticmethod
        def ssm_scan_backward(*args: Any) -> Any:
            served.append(found := launch_scan.ssm_scan_backward(*args))
            return found

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(99)

    tuning.SCAN_ELEMENTS = elements
    launch_scan._chosen.cache_clear()
    torch.empty, scan_ops.cpu_kernels, scan_gradient.cpu_kernels = poisoned, Kernels, Kernels
    try:
        found = function(*args, **kwargs)
    finally:
        torch.empty, scan_ops.cpu_kernels, scan_gradient.cpu_kernels = empty, kernels, kernels
        tuning.SCAN_ELEMENTS = ELEMENTS
    assert served and all(output is not None for output in served)
    return found


def check(change: dict[str, Any], elements: int = ELEMENTS) -> None:
    arguments = problem(**SMALL | change)
    found = by_triton(torch.ops.qmamba.ssm_scan_quantized, **arguments, elements=elements)
    assert_same(found, scan_ops.ssm_scan_quantized_reference(**arguments))


def name_of(change: dict[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in change.items()) or "base"


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"batch": 2, "seqlen": 1},
        {"batch": 2, "nheads": 4, "ngroups": 2},
        {"headdim": 5, "dstate": 20},
        {"headdim": 1, "dstate": 1, "bits": 8},
        {"headdim": 40, "nheads": 1, "stochastic": True},
        {"dstate": 33, "bits": 8, "stochastic": True},
        {"dstate": 96, "stochastic": True, "scales": "calibrated"},
        {"D": False, "dt_bias": False},
        {"dt_softplus": False},
        {"start": False},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16, "scales": "calibrated"},
        {"scales": "fixed", "bits": 2, "stochastic": True},
        {"scales": "fixed", "headdim": 5},
        {"flush_interval": 4, "seqlen": 11},
        {"flush_interval": 4, "seqlen": 12, "scales": "calibrated", "stochastic": True, "batch": 2},
        {"flush_interval": 50},
        {"flush_interval": 50, "start": False},
        {"single_step": True},
        {"single_step": True, "scales": "calibrated", "stochastic": True, "headdim": 5, "dstate": 20},
        {"single_step": True, "scales": "fixed", "start": False},
        {"headdim": 64, "dstate": 128, "nheads": 1, "seqlen": 3},
        {"headdim": 64, "dstate": 128, "nheads": 1, "seqlen": 3, "scales": "calibrated"},
    ],
    ids=name_of,
)
def test_equals_reference(interpreted: Interpreted, change: dict[str, Any]) -> None:
    interpreted(check, change)


@pytest.mark.parametrize(
    "bits, scales, stochastic",
    [
        # The interpreter takes longest for these.
        pytest.param(*row, marks=[pytest.mark.slow] * (row[2] and row[:2] != (4, "dynamic")))
        for row in itertools.product(recurrence.SCAN_BITS, ("dynamic", "calibrated"), (False, True))
    ],
)
def test_64_steps(interpreted: Interpreted, bits: int, scales: str, stochastic: bool) -> None:
    """Identical codes, where one in 100,000 would be allowed: nothing is computed in another order."""
    row = {"seqlen": 64, "nheads": 1, "headdim": 4, "dstate": 128}
    interpreted(check, row | {"bits": bits, "scales": scales, "stochastic": stochastic})


@pytest.mark.parametrize(
    "change", [{}, {"headdim": 7}, {"headdim": 7, "single_step": True, "stochastic": True}], ids=name_of
)
def test_a_head_in_several_programs(interpreted: Interpreted, change: dict[str, Any]) -> None:
    interpreted(check, {"scales": "calibrated"} | change, elements=2)


def check_decode() -> None:
    arguments = problem(**SMALL)
    assert_same(by_triton(torch.ops.qmamba.ssm_scan_quantized, **arguments), decode(arguments))


def test_it_is_decode_token_by_token(interpreted: Interpreted) -> None:
    interpreted(check_decode)


def check_float_state(change: dict[str, Any]) -> None:
    arguments = problem(**SMALL | {"bits": None, "batch": 2} | change)
    found = by_triton(torch.ops.qmamba.ssm_scan_quantized, **arguments)
    y, state = scan_ops.ssm_scan_quantized_reference(**arguments)
    # GPUs round a product and a sum once, and so does Triton's interpreter since 3.9.
    if Version(triton.__version__) >= Version("3.9"):
        assert torch.equal(found[1], state)
    assert (found[1] - state).abs().max() <= 2e-7 * state.abs().max()
    assert (found[0] - y).abs().max() <= 1e-5 * y.abs().max()


@pytest.mark.parametrize(
    "change", [{}, {"headdim": 5, "dstate": 20, "start": False}, {"single_step": True}], ids=name_of
)
def test_float_state(interpreted: Interpreted, change: dict[str, Any]) -> None:
    interpreted(check_float_state, change)


def check_non_finite(scales: str) -> None:
    arguments = problem(**SMALL | {"batch": 2}, scales=scales)
    x = arguments["x"].clone()
    x[0, 4, 1, 2], x[1, 4, 0, 0] = torch.nan, torch.inf
    arguments["x"] = x
    found = by_triton(torch.ops.qmamba.ssm_scan_quantized, **arguments)
    wanted = scan_ops.ssm_scan_quantized_reference(**arguments)
    for name, tensor, expected in zip(NAMES[1:], found[1:], wanted[1:], strict=False):
        assert torch.equal(tensor.nan_to_num(7), expected.nan_to_num(7)), name
    assert found[2][0, 1, 2].isnan() and found[2][1, 0, 0].isnan() and found[2][1, 1].isfinite().all()


@pytest.mark.parametrize("scales", ["dynamic", "calibrated", "fixed"])
def test_nan_and_infinity_show_in_the_scales(interpreted: Interpreted, scales: str) -> None:
    interpreted(check_non_finite, scales)


def check_gradient(change: dict[str, Any]) -> None:
    arguments = problem(**SMALL | {"seqlen": 11} | change)
    names, found = by_triton(gradients, torch.ops.qmamba.ssm_scan_quantized, arguments)
    _, wanted = gradients(scan_ops.ssm_scan_quantized_reference, arguments)
    for name, grad, expected in zip(names, found, wanted, strict=True):
        assert grad.dtype == expected.dtype and grad.shape == expected.shape, name
        tolerance = GRADIENT_TOLERANCE if grad.dtype == torch.float32 else 2 * torch.finfo(grad.dtype).eps
        error = (grad - expected).abs().max() / expected.abs().max()
        assert error <= tolerance, f"gradient of {name} is off by {error}"


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"batch": 2, "seqlen": 1},
        {"seqlen": 20, "scales": "calibrated", "stochastic": True},
        {"scales": "fixed", "batch": 2},
        {"scales": "fixed", "flush_interval": 2},
        {"single_step": True},
        {"single_step": True, "scales": "fixed", "stochastic": True},
        {"bits": None},
        {"bits": 3, "flush_interval": 4, "scales": "calibrated"},
        {"nheads": 4, "ngroups": 2, "headdim": 5, "dstate": 20, "bits": 8, "stochastic": True},
        {"D": False, "dt_bias": False, "dt_softplus": False, "start": False},
        {"dtype": torch.bfloat16},
    ],
    ids=name_of,
)
def test_the_gradient_is_autograd_through_the_reference(interpreted: Interpreted, change: dict[str, Any]) -> None:
    interpreted(check_gradient, change)


def check_refusals() -> None:
    arguments = problem(**SMALL | {"dstate": 300})
    names = ("x", "dt", "dt", "B", "C", "D")
    scan = [arguments[name] for name in names]
    options = ((None, None), recurrence.StoreRule(4))
    assert launch_scan.ssm_scan(*scan, *options) is None
    empty = [t[:, :0] if t is not None and t.dim() > 2 else t for t in scan]
    assert launch_scan.ssm_scan(*empty, *options) is None


def test_what_the_kernels_do_not_take_is_left_to_the_reference(interpreted: Interpreted) -> None:
    interpreted(check_refusals)


def test_without_a_gpu_there_is_no_target() -> None:
    arguments = problem(**SMALL)
    scan = [arguments[name] for name in ("x", "dt", "dt", "B", "C", "D")]
    assert launch_scan.ssm_scan(*scan, (None, None), recurrence.StoreRule(4)) is None


# --- specs and compiled code ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, named",
    [
        ({"bits": 1}, "bits=1"),
        ({"dstate": 512}, "dstate=512"),
        ({"rows": 24}, "rows=24"),
        ({"warps": 32}, "warps=32"),
        ({"target": "sm_70"}, "sm_70"),
        ({"dynamic": True}, "rows=8"),
        ({"bits": None, "stochastic": True}, "float state"),
    ],
)
def test_spec_refuses(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        dataclasses.replace(SsmScanSpec(64, 128, 4), **change)


GOLDEN = pathlib.Path(__file__).parent / "golden"
GOLDEN_SPECS = [SsmScanSpec(64, 128, 4), SsmScanSpec(5, 20, 3, dynamic=True, stochastic=True, target="gfx942")]


@pytest.mark.parametrize("spec", [*GOLDEN_SPECS, SsmScanBackwardSpec(40, 96)], ids=lambda spec: spec.slug())
def test_golden_text(spec: SsmScanSpec | SsmScanBackwardSpec) -> None:
    """After a wanted change: ``QMAMBA_UPDATE_GOLDEN=1 pytest`` with this test; read the diff."""
    golden = GOLDEN / f"{spec.slug()}.py.txt"
    if os.environ.get("QMAMBA_UPDATE_GOLDEN"):
        golden.write_text(render(spec))
    assert render(spec) == golden.read_text()


@pytest.mark.parametrize("target", ["sm_90", "gfx942", "interpreter"])
@pytest.mark.parametrize("headdim, dstate", [(64, 128), (5, 20)])
@pytest.mark.parametrize(
    "bits, dynamic, stochastic", [(4, True, True), (3, False, True), (8, True, False), (None, False, False)]
)
def test_rendered_text_is_readable(
    headdim: int, dstate: int, bits: int | None, dynamic: bool, stochastic: bool, target: str
) -> None:
    specs = [tuning.ssm_scan(target, headdim, dstate, bits, dynamic, stochastic)]
    specs.append(tuning.ssm_scan_backward(target, headdim, dstate))
    for spec in specs:
        text = render(spec)
        compile(text, "rendered", "exec")
        assert max(len(line) for line in text.splitlines()) <= 120
        assert all(line == line.rstrip() for line in text.splitlines())
        assert "\n\n\n\n" not in text and "{%" not in text and "{{" not in text


def compile_scan(
    spec: SsmScanSpec | SsmScanBackwardSpec, keeps: bool = False, single_step: bool = False, scales: str = "calibrated"
) -> compiled.Facts:
    """As calibration calls it: bfloat16 inputs with contiguous columns, an initial state.

    ``scales`` is for a gradient: those that its stores had.
    """
    name = "ssm_scan" if isinstance(spec, SsmScanSpec) else "ssm_scan_backward"
    module = load(spec)
    arguments = getattr(module, name).arg_names
    types = dict.fromkeys(("x", "B", "C", "state_scale", "channel_scale", "state_scale_out"), "*bf16")
    types |= dict.fromkeys(("dt", "decay", "D", "carried", "quantized", "y", "state", "kept", "fixed_scale"), "*fp32")
    types |= {"codes": "*i8", "key": "*i64"}
    for argument in arguments:
        types.setdefault(argument, "*fp32" if argument.startswith("grad") else "i32")
    constants: dict[str, Any] = {"x_stride_p": 1, "B_stride_n": 1, "C_stride_n": 1, "flush_interval": 1}
    constants |= {"SINGLE_STEP": single_step, "LARGEST": 7} | ({} if single_step else {"quantized": None})
    constants |= {} if scales == "fixed" else {"fixed_scale": None}
    if isinstance(spec, SsmScanSpec):
        absent = ("y", "D", "codes", "channel_scale", "state_scale_out", "state") if keeps else ("kept",)
        constants |= dict.fromkeys(absent, None)
        constants |= {"state_scale": None} if spec.dynamic else {}
        constants |= {} if spec.stochastic else {"key": None}
    elif scales == "measured":
        constants["state_scale"] = None
    constants = {argument: value for argument, value in constants.items() if argument in arguments}
    return compiled.facts(compiled.compile_kernel(module, name, types, constants, spec.target, spec.warps))


KINDS = {
    "float": (None, False, False),
    "calibrated": (4, False, False),
    "dynamic": (4, True, False),
    "calibrated stochastic": (4, False, True),
    "dynamic stochastic": (4, True, True),
}


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("kind", KINDS)
def test_scans_compile_without_spills(kind: str, target: str) -> None:
    """At the shape of 130M to 2.7B. A single step holds two states."""
    bits, dynamic, stochastic = KINDS[kind]
    spec = tuning.ssm_scan(target, 64, 128, bits, dynamic, stochastic)
    for keeps, single_step in ((False, False), (True, False), (False, True))[: 3 if bits else 2]:
        found = compile_scan(spec, keeps, single_step)
        assert found.spills == 0 and found.local_accesses == 0, found
        assert found.shared_bytes <= 64 * 1024


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("single_step", [False, True])
@pytest.mark.parametrize("scales", ["measured", "calibrated", "fixed"])
def test_gradients_compile_without_spills(scales: str, single_step: bool, target: str) -> None:
    found = compile_scan(tuning.ssm_scan_backward(target, 64, 128), single_step=single_step, scales=scales)
    assert found.spills == 0 and found.local_accesses == 0, found
    assert found.shared_bytes <= 64 * 1024


def test_only_what_the_reference_fuses_decides_a_code() -> None:
    """A fused multiply-add rounds once where a product and a sum round twice: four products of an element and a sum
    stand alone. Two more are fused, in the reference as well: the decay of the state, and the rounding to a code."""
    spec = tuning.ssm_scan("sm_90", 64, 128, 4, False, False)
    mix = compile_scan(spec, keeps=True).mix
    elements = spec.rows * spec.columns // (32 * spec.warps)
    assert mix["FMUL"] >= 4 * elements and mix["FADD"] >= elements
    # What else is fused is for rows and columns.
    assert 2 * elements <= mix["FFMA"] < 3.5 * elements
