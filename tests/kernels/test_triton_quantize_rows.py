"""Rows to int8 behind a norm, and the products of quantized rows, in Triton's interpreter and as compiled code."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_cpu_w8a8_linear import NORM_CASTS, NORM_TOLERANCE, norm_problem, problem, wanted, wanted_behind_norm
from test_triton_conv_update import poisoned

from qmamba_compile import layer_ops, quant
from qmamba_compile.errors import ConfigError
from qmamba_compile.triton_templates import compiled, launch_layers, tuning
from qmamba_compile.triton_templates.layer_specs import LinearSpec, RowsSpec
from qmamba_compile.triton_templates.render import load, render, triton_dtype
from qmamba_compile.triton_templates.specs import lanes_of

GOLDEN = pathlib.Path(__file__).parent / "golden"
Interpreted = Callable[..., Any]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

CODES_OFF = 2e-3
"""Share of codes that may differ by one behind a norm: a last bit of the root mean square or of silu, at a tie. Half
precisions have few values, and so more ties."""


def names(change: dict[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in change.items()) or "base"


def poisoned_rows(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    codes, row_scale = poisoned(launch_layers.quantize_rows, *arguments)
    return codes, row_scale


def check_codes(change: dict[str, Any]) -> None:
    """Without a norm: the bits of the reference."""
    row = {"rows": 3, "k": 100, "dtype": F32, "smooth": None, "static": None} | change
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(row["rows"], 2 * row["k"], generator=generator)[:, : row["k"]].to(row["dtype"])
    x[0] = 0
    if row.get("poison") is not None:
        x[1, 5] = row["poison"]
    if row.get("strided"):
        x = x.repeat_interleave(2, dim=1)[:, ::2]
    smooth = row["smooth"] and (torch.rand(row["k"], generator=generator) + 0.5).to(row["smooth"])
    static = None if row["static"] is None else torch.tensor(row["static"])
    codes, row_scale = poisoned_rows(x, smooth, static)
    # The products of codes and an identity, in units of row_scale.
    rows = x if smooth is None else x * smooth
    if static is None:
        wanted, wanted_scale = quant.quantize_rows(rows)
    else:
        wanted = (rows.float() * static.reciprocal()).round().clamp(-127, 127).nan_to_num(0.0).to(torch.int8)
        finite = (rows.float() * static.reciprocal()).isfinite().all(dim=1, keepdim=True)
        wanted, wanted_scale = torch.where(finite, wanted, 0), torch.where(finite, static, torch.nan)
    broken = wanted_scale[:, 0].isnan()
    assert torch.equal(row_scale.nan_to_num(7.0), wanted_scale[:, 0].nan_to_num(7.0))
    assert torch.equal(codes[~broken], wanted[~broken]) and (codes[broken] == 0).all()
    assert broken.any() == (row.get("poison") is not None or row["static"] == 1e-38)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"rows": 1, "k": 1},
        {"k": 2048},
        {"dtype": BF16},
        {"dtype": F16},
        {"smooth": F32},
        {"smooth": F32, "dtype": BF16},
        {"smooth": BF16, "dtype": BF16},
        {"smooth": F16, "dtype": BF16},
        {"smooth": F16, "dtype": F16},
        {"static": 0.02},
        {"static": 0.02, "smooth": BF16, "dtype": BF16},
        {"static": 1e-38},
        {"static": 0.02, "poison": torch.inf},
        {"poison": torch.nan},
        {"poison": -torch.inf, "dtype": BF16, "smooth": BF16},
        {"strided": True},
    ],
    ids=names,
)
def test_codes_of_rows(interpreted: Interpreted, change: dict[str, Any]) -> None:
    interpreted(check_codes, change)


def check_norm(change: dict[str, Any]) -> None:
    arguments = norm_problem(**change)
    if "static" in change:
        arguments[9] = torch.tensor(0.02)
    x, gate, weight, epsilon, group_size, *_, smooth, static = arguments[:10]
    x_dtype = change.get("x_dtype")
    before = x.clone()
    norm = launch_layers.Norm(gate, weight, epsilon, group_size, x_dtype)
    codes, row_scale = poisoned_rows(x, smooth, static, norm)
    assert torch.equal(x, before)
    rows = layer_ops.rms_norm_reference(x if x_dtype is None else x.to(x_dtype), gate, weight, epsilon, group_size)
    rows = rows if smooth is None else rows * smooth
    scale = quant.quantize_rows(rows)[1] if static is None else static.expand(len(x), 1)
    torch.testing.assert_close(row_scale[:, None], scale, rtol=torch.finfo(rows.dtype).eps * 2, atol=0)
    # On the grid of its own scale, which a last bit may have moved.
    wanted = (rows.float() / row_scale[:, None]).round().clamp(-127, 127)
    distance = (codes.float() - wanted).abs()
    assert distance.max() <= 1 and distance.count_nonzero() <= CODES_OFF * distance.numel() + 1
    y = poisoned(launch_layers.norm_w8a8_linear, *arguments)
    expected = wanted_behind_norm(arguments)
    assert y.dtype == expected.dtype and y.shape == expected.shape
    assert (y.float() - expected.float()).abs().max() <= NORM_TOLERANCE * expected.abs().max()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"gate": True},
        {"gate": True, "tokens": 1, "group_size": 1536},
        {"gate": True, "groups": 3, "group_size": 37},
        {"groups": 8, "group_size": 16},
        {"groups": 5, "group_size": 1},
        {"tokens": 20, "gate": True, "groups": 2, "group_size": 32, "o": 24},
        {"tokens": 20, "o": 24},
        {"dtype": BF16, "gate": True},
        {"weight_dtype": BF16},
        {"dtype": BF16, "weight_dtype": F32, "gate": True},
        {"dtype": F16, "weight_dtype": BF16},
        {"bias": True, "smooth": F32},
        {"smooth": BF16, "dtype": BF16},
        {"static": True},
        {"static": True, "tokens": 17, "groups": 1, "group_size": 64, "o": 16, "bias": True},
        *NORM_CASTS,
        {"x_dtype": F16, "weight_dtype": F16, "residual": F16, "y_dtype": F16},
    ],
    ids=names,
)
def test_norm_in_front(interpreted: Interpreted, change: dict[str, Any]) -> None:
    interpreted(check_norm, change)


def check_exact_norm() -> None:
    """Values +-2^i, as many of each sign and size, have a mean of squares, a root and codes without rounding."""
    x = torch.tensor([2.0, -2.0] * 32).repeat(3, 1) * torch.tensor([[1.0], [4.0], [0.5]])
    rest = problem(k=64)[1:]
    y = poisoned(launch_layers.norm_w8a8_linear, x, None, torch.ones(64), 0.0, 32, *rest)
    assert torch.equal(y, layer_ops.w8a8_linear_reference(x.sign(), *rest))


def test_norm_is_exact_where_its_arithmetic_is(interpreted: Interpreted) -> None:
    interpreted(check_exact_norm)


def check_broken_row(bad: float, place: int) -> None:
    arguments = norm_problem(tokens=5, gate=True)
    arguments[place][3, 130] = bad
    y = poisoned(launch_layers.norm_w8a8_linear, *arguments)
    assert y[3].isnan().all() and y[[0, 1, 2, 4]].isfinite().all()


@pytest.mark.parametrize("bad, place", [(torch.nan, 0), (torch.inf, 0), (torch.nan, 1), (torch.inf, 1)])
def test_a_row_that_is_not_finite_stays_nan_behind_a_norm(interpreted: Interpreted, bad: float, place: int) -> None:
    interpreted(check_broken_row, bad, place)


def check_silu() -> None:
    gate = torch.cat([torch.linspace(-120, 120, 500), torch.tensor([-1e30, 1e30, 0.0, -0.0])])
    ones = torch.ones_like(gate)[None]
    eye = torch.eye(len(gate)).to(torch.int8)
    y = poisoned(
        launch_layers.norm_w8a8_linear, ones, gate[None], ones[0], 1e-5, 1, eye, ones.T.clone(), None, None, None
    )
    expected = layer_ops.rms_norm_reference(ones, gate[None], ones[0], 1e-5, 1)
    assert (y - expected).abs().max() <= 1.01 / 254


def test_silu_over_its_whole_range(interpreted: Interpreted) -> None:
    interpreted(check_silu)


def check_product(
    rows: int, k: int, outputs: int, splits: int, dtype: torch.dtype, bias: bool, residual: torch.dtype | None
) -> None:
    """Prequantized rows: the bits of the reference, by either product."""
    arguments = problem(rows, k, o=outputs, dtype=dtype, bias=bias, residual=residual)
    choice = tuning.w8a8_linear
    tuning.w8a8_linear = lambda *_, **__: LinearSpec(16, 64, splits, target="interpreter")
    try:
        y = poisoned(launch_layers.w8a8_linear, *arguments)
    finally:
        tuning.w8a8_linear = choice
    expected = wanted(*arguments)
    assert y.dtype == expected.dtype
    # Triton's interpreter truncates where a GPU rounds: one unit of the last place.
    tolerance = 0.0 if y.dtype == F32 else torch.finfo(y.dtype).eps
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize(
    "rows, k, outputs, splits, dtype, bias, residual",
    [
        (1, 200, 40, 1, F32, True, None),
        (16, 96, 39, 2, F32, False, None),
        (20, 131, 40, 3, F32, True, F32),
        (17, 64, 264, 4, F32, True, None),
        (33, 136, 8, 1, F32, False, F32),
        (18, 64, 16, 1, BF16, True, None),
        (18, 64, 16, 1, BF16, True, F32),
        (18, 64, 264, 2, BF16, False, F32),
        (18, 64, 16, 1, BF16, True, BF16),
        (2, 64, 16, 2, F16, True, None),
    ],
)
def test_product_of_quantized_rows(
    interpreted: Interpreted,
    rows: int,
    k: int,
    outputs: int,
    splits: int,
    dtype: torch.dtype,
    bias: bool,
    residual: torch.dtype | None,
) -> None:
    interpreted(check_product, rows, k, outputs, splits, dtype, bias, residual)


def check_large_tile() -> None:
    """So large that the residual is loaded behind the products."""
    arguments = problem(70, 64, o=150, dtype=BF16, residual=F32)
    choice = tuning.w8a8_linear
    tuning.w8a8_linear = lambda *_, **__: LinearSpec(64, 64, warps=4, target="interpreter", block_m=64)
    try:
        y = poisoned(launch_layers.w8a8_linear, *arguments)
    finally:
        tuning.w8a8_linear = choice
    assert torch.equal(y, wanted(*arguments))


def test_a_large_tile_with_a_residual(interpreted: Interpreted) -> None:
    interpreted(check_large_tile)


def check_large_linear() -> None:
    """More rows than are quantized on the way."""
    arguments = problem(18, 64, o=16, bias=True, smooth=F32)
    y = poisoned(launch_layers.w8a8_linear, *arguments)
    assert torch.equal(y, layer_ops.w8a8_linear_reference(*arguments))
    three = problem(20, 64, o=16)
    three[0] = three[0].view(4, 5, 64)
    assert torch.equal(poisoned(launch_layers.w8a8_linear, *three), layer_ops.w8a8_linear_reference(*three))


def test_a_linear_of_many_rows(interpreted: Interpreted) -> None:
    interpreted(check_large_linear)


def check_refusals() -> None:
    x = torch.randn(2, 64, dtype=torch.float64)
    assert launch_layers.quantize_rows(x, None, None) is None
    assert launch_layers.quantize_rows(torch.randn(2, 2**15 + 1), None, None) is None
    arguments = norm_problem(gate=True)
    arguments[1] = arguments[1][:1]
    assert launch_layers.norm_w8a8_linear(*arguments) is None
    for residual in (torch.randn(37), torch.randn(3, 37, dtype=torch.float64)):
        assert launch_layers.w8a8_linear(*problem(), residual) is None
        assert launch_layers.norm_w8a8_linear(*norm_problem(), residual) is None
    assert launch_layers.norm_w8a8_linear(*norm_problem(y_dtype=torch.float64)) is None


def test_what_the_kernels_do_not_take_is_left_to_the_reference(interpreted: Interpreted) -> None:
    interpreted(check_refusals)


# --- text and compiled code ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, named",
    [
        ({"k": 2**15 + 1}, "k=32769"),
        ({"group_size": 3}, "group_size=3"),
        ({"group_size": 0}, "group_size=0"),
        ({"warps": 3}, "warps=3"),
        ({"target": "sm_70"}, "sm_70"),
    ],
)
def test_spec_refuses(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        RowsSpec(**{"k": 64} | change)


GOLDEN_SPECS = [RowsSpec(5120, 640), LinearSpec(splits=2), LinearSpec(block_x=2)]


@pytest.mark.parametrize("spec", GOLDEN_SPECS, ids=lambda spec: spec.slug())
def test_golden_text(spec: RowsSpec | LinearSpec) -> None:
    """After a wanted change: ``QMAMBA_UPDATE_GOLDEN=1 pytest`` on this file, and read the diff."""
    golden = GOLDEN / f"{spec.slug()}.py.txt"
    if os.environ.get("QMAMBA_UPDATE_GOLDEN"):
        golden.write_text(render(spec))
    assert render(spec) == golden.read_text()


@pytest.mark.parametrize(
    "spec",
    [
        RowsSpec(768, target="interpreter"),
        LinearSpec(),
        LinearSpec(block_x=16),
        LinearSpec(splits=2, block_x=4),
    ],
    ids=lambda spec: spec.slug(),
)
def test_rendered_text_is_readable(spec: RowsSpec | LinearSpec) -> None:
    text = render(spec)
    compile(text, "rendered", "exec")
    assert max(len(line) for line in text.splitlines()) <= 120 and "\n\n\n\n" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize("k, group_size", [(768, None), (2560, 2560), (8192, 1024)])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_rows_compile_without_spills(target: str, k: int, group_size: int | None) -> None:
    spec = tuning.quantize_rows(target, k, group_size)
    types = dict.fromkeys(("x", "gate", "norm_weight", "pre_scale"), "*bf16") | {"codes": "*i8", "row_scale": "*fp32"}
    types |= {"epsilon": "fp32", "x_stride": "i32", "gate_stride": "i32"}
    constants: dict[str, Any] = {"static_scale": None}
    if group_size is not None:
        constants["X"] = triton_dtype(torch.bfloat16)
    kernel = compiled.compile_kernel(load(spec), "quantize_rows", types, constants, target, spec.warps)
    found = compiled.facts(kernel)
    assert found.spills == 0 and found.local_accesses == 0 and found.registers <= 128
    # A bfloat16 row passes in 16-byte loads, eight features each.
    lanes = lanes_of(target) * spec.warps
    inputs = 2 if group_size is None else 4
    assert found.accesses.get(("load", 16), 0) == inputs * max(1, spec.elements // (8 * lanes)), found.accesses


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("outputs, k", [(768, 1536), (3352, 768), (10576, 2560)])
@pytest.mark.parametrize("rows", [1, 40, 512, 4096])
def test_products_compile_to_wide_loads_and_int8_products(target: str, outputs: int, k: int, rows: int) -> None:
    spec = tuning.w8a8_linear(target, rows, outputs, k, prequantized=True)
    types = dict.fromkeys(("codes", "qdata"), "*i8") | {"scale": "*fp32", "bias": "*bf16", "y": "*bf16"}
    types |= {"partial": "*i32", "row_scale": "*fp32", "rows": "i32"}
    constants: dict[str, Any] = {"OUTPUTS": outputs, "K": k, "LINEAR": triton_dtype(torch.bfloat16)}
    # A model's out_proj has a residual, its in_proj has none.
    if outputs < k:
        types |= {"residual": "*fp32", "y": "*fp32"}
    else:
        constants["residual"] = None
    for name in ("w8a8_linear", "combine")[: 1 + (spec.splits > 1)]:
        constants = {key: value for key, value in constants.items() if name == "w8a8_linear" or key != "K"}
        kernel = compiled.compile_kernel(load(spec), name, types, constants, target, spec.warps)
        found = compiled.facts(kernel)
        assert found.spills == 0 and found.local_accesses == 0
        assert found.shared_bytes <= (64 if target == "gfx942" or rows == 1 else 160) * 1024
        if name == "w8a8_linear":
            text = compiled.disassemble(kernel)
            # Many rows: the matrix units of a whole warp group, where there are such.
            many = {"sm_90": "IGMMA", "sm_100": "UTCIMMA"} if spec.block_m >= 64 and rows > 1 else {}
            assert ("v_mfma_i32" if target == "gfx942" else many.get(target, "IMMA")) in text
        if rows > 16 and target != "gfx942":
            # 3352 outputs are a multiple of 8: a row of results is written at least 16 bytes at a time.
            assert min(width for kind, width in found.accesses if kind == "store") >= 16, found.accesses


@pytest.mark.parametrize("target", ["sm_89", "sm_120"])
@pytest.mark.parametrize("rows", [40, 512, 4096])
def test_products_fit_a_consumers_gpu(target: str, rows: int) -> None:
    """A program may have 99 KiB of shared memory there, of data centers' GPUs 163 or more."""
    spec = tuning.w8a8_linear(target, rows, 10576, 2560, prequantized=True)
    types = dict.fromkeys(("codes", "qdata"), "*i8") | {"scale": "*fp32", "bias": "*bf16", "y": "*bf16"}
    types |= {"partial": "*i32", "row_scale": "*fp32", "rows": "i32"}
    constants = {"OUTPUTS": 10576, "K": 2560, "residual": None, "LINEAR": triton_dtype(torch.bfloat16)}
    kernel = compiled.compile_kernel(load(spec), "w8a8_linear", types, constants, target, spec.warps)
    found = compiled.facts(kernel)
    assert found.shared_bytes <= 99 * 1024 and found.spills == 0


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_the_product_starts_while_rows_are_quantized(target: str) -> None:
    types = {"x": "*bf16", "codes": "*i8", "row_scale": "*fp32", "x_stride": "i32"}
    rows = tuning.quantize_rows(target, 768, None)
    constants: dict[str, Any] = {"pre_scale": None, "static_scale": None}
    kernel = compiled.compile_kernel(load(rows), "quantize_rows", types, constants, target, rows.warps)
    text = compiled.disassemble(kernel)
    assert 0 < text.index("PREEXIT") < text.index("LDG")
    spec = tuning.w8a8_linear(target, 1, 3352, 768, prequantized=True)
    types = {"codes": "*i8", "qdata": "*i8", "scale": "*fp32", "y": "*bf16", "row_scale": "*fp32", "rows": "i32"}
    constants = {"bias": None, "residual": None, "partial": None, "OUTPUTS": 3352, "K": 768}
    constants["LINEAR"] = triton_dtype(torch.bfloat16)
    text = compiled.disassemble(
        compiled.compile_kernel(load(spec), "w8a8_linear", types, constants, target, spec.warps)
    )
    # Nothing that quantize_rows writes is read before the wait for its end.
    wait = text.index("ACQBULK")
    assert 0 < wait < text.index("LDGSTS") and len(re.findall(r"\bLDG\.", text[:wait])) == 1  # scale
