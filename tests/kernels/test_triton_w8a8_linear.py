"""The generated int8 linear in Triton's interpreter: the bits of the torch op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qmamba_compile import layer_ops, quant
from qmamba_compile.triton_templates import compiled, launch_layers, tuning
from qmamba_compile.triton_templates.layer_specs import LinearSpec
from qmamba_compile.triton_templates.render import load, triton_dtype

BASE: dict[str, Any] = {
    "rows": 3,
    "outputs": 40,
    "k": 512,
    "dtype": torch.float32,
    "bias": True,
    "smooth": None,
    "static": False,
    "splits": 1,
    "residual": None,
}


def check(change: dict[str, Any]) -> None:
    row = BASE | change
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(row["rows"], 2 * row["k"], generator=generator)[:, : row["k"]].to(row["dtype"])
    x[0, 3] = 40.0
    if row.get("poison") is not None:
        x[1, 5] = row["poison"]
    weight = torch.randn(row["outputs"], row["k"], generator=generator)
    qdata, scale = quant.quantize_rows(weight)
    bias = torch.randn(row["outputs"], generator=generator) if row["bias"] else None
    smooth = None if row["smooth"] is None else torch.rand(row["k"], generator=generator).to(row["smooth"]) + 0.5
    static = torch.tensor(0.02) if row["static"] else None
    residual = None
    if row["residual"] is not None:
        residual = 20 * torch.randn(row["rows"], 2 * row["outputs"], generator=generator).to(row["residual"])
        residual = residual[:, : row["outputs"]]
    arguments = (x, qdata, scale, bias, smooth, static, residual)
    choice = tuning.w8a8_linear
    block_x = 1 << (row["rows"] - 1).bit_length()
    tuning.w8a8_linear = lambda *_, **__: LinearSpec(16, 64, row["splits"], target="interpreter", block_x=block_x)
    try:
        y = launch_layers._quantize_on_the_way(*arguments)
    finally:
        tuning.w8a8_linear = choice
    expected = layer_ops.w8a8_linear(*arguments)
    assert y is not None and y.dtype == expected.dtype and y.shape == expected.shape
    if expected.dtype == torch.float32:
        assert torch.equal(y.nan_to_num(3.0), expected.nan_to_num(3.0))
    else:
        # Triton's interpreter truncates where a GPU rounds: one unit of the last place.
        assert ((y - expected).abs() <= torch.finfo(y.dtype).eps * expected.abs()).all()
    if row.get("poison") is not None:
        assert y[1].isnan().all() and y[0].isfinite().all()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"rows": 1},
        {"rows": 16},
        {"rows": 15, "outputs": 39},
        {"outputs": 5},
        {"k": 200},
        {"k": 96, "splits": 2},
        {"splits": 4},
        {"splits": 3, "k": 330, "rows": 14, "outputs": 300},
        {"bias": False},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16, "splits": 2},
        {"smooth": torch.float32},
        {"smooth": torch.float32, "dtype": torch.float16},
        {"static": True},
        {"static": True, "splits": 2, "poison": torch.nan},
        {"poison": torch.nan},
        {"poison": torch.inf, "splits": 2},
        {"residual": torch.float32},
        {"residual": torch.float32, "splits": 2, "rows": 5, "outputs": 300},
        {"residual": torch.float32, "dtype": torch.bfloat16, "outputs": 39},
        {"residual": torch.float32, "dtype": torch.bfloat16, "splits": 2},
        {"residual": torch.bfloat16, "dtype": torch.bfloat16},
        {"residual": torch.bfloat16},
    ],
    ids=lambda change: "-".join(f"{name}={value}" for name, value in change.items()) or "base",
)
def test_same_bits_as_the_op(interpreted: Callable[..., Any], change: dict[str, Any]) -> None:
    interpreted(check, change)


def check_strided() -> None:
    """Every other element of a longer vector, as a slice of a fused parameter may be."""
    x, (qdata, scale) = torch.randn(3, 64), quant.quantize_rows(torch.randn(32, 64))
    bias, smooth = torch.randn(32), torch.rand(64) + 0.5
    wanted = launch_layers._quantize_on_the_way(x, qdata, scale, bias, smooth, None)
    strided = [torch.stack([t, torch.full_like(t, torch.nan)], dim=-1)[..., 0] for t in (scale, bias, smooth)]
    found = launch_layers._quantize_on_the_way(x, qdata, *strided, None)
    assert wanted is not None and found is not None and torch.equal(found, wanted)


def test_strided_vectors(interpreted: Callable[..., Any]) -> None:
    interpreted(check_strided)


def test_a_large_x_is_quantized_once_before(interpreted: Callable[..., Any]) -> None:
    x, qdata = torch.randn(17, 64), torch.ones(32, 64, dtype=torch.int8)
    assert interpreted(launch_layers._quantize_on_the_way, x, qdata, torch.ones(32, 1), None, None, None) is None
    assert (
        interpreted(launch_layers._quantize_on_the_way, x[:16], qdata, torch.ones(32, 1), None, None, None) is not None
    )
    long = tuning.MOST_QUANTIZED_ON_THE_WAY // 4
    assert tuning.w8a8_linear("sm_90", 3, 768, long).block_x == 4
    assert tuning.w8a8_linear("sm_90", 3, 768, 2 * long).prequantized


# in_proj and out_proj of 130M and 2.7B, and a head.
SHAPES = [(3352, 768), (768, 1536), (10576, 2560), (2560, 5120), (50288, 768)]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("residual", [None, "*fp32"])
@pytest.mark.parametrize("rows, outputs, k", [(1, 768, 1536), (4, 768, 1536), (1, 10576, 2560)])
def test_compiles_to_wide_loads_and_int8_products(
    target: str, rows: int, outputs: int, k: int, residual: str | None
) -> None:
    spec = tuning.w8a8_linear(target, rows, outputs, k)
    assert spec.block_x == rows
    types = dict.fromkeys(("x", "bias", "y"), "*bf16") | {"qdata": "*i8", "scale": "*fp32"}
    types |= {"partial": "*i32", "row_scale": "*fp32", "rows": "i32", "x_stride": "i32"}
    constants: dict[str, Any] = {"pre_scale": None, "static_scale": None, "OUTPUTS": outputs, "K": k}
    constants["LINEAR"] = triton_dtype(torch.bfloat16)
    if residual is None:
        constants["residual"] = None
    else:
        types |= {"residual": residual, "y": residual}
    kernel = compiled.compile_kernel(load(spec), "w8a8_linear", types, constants, target, spec.warps)
    found = compiled.facts(kernel)
    assert found.spills == 0 and found.local_accesses == 0
    text = compiled.disassemble(kernel)
    products = {"sm_80": "IMMA", "sm_90": "IMMA", "sm_100": "IMMA", "gfx942": "v_mfma_i32"}[target]
    assert products in text
    if target != "gfx942":
        # Weights go to shared memory 16 bytes at a time, without passing through registers.
        assert "LDGSTS.E.BYPASS.LTC128B.128" in text or "LDGSTS.E.BYPASS.128" in text, text.count("LDGSTS")
    # AMD has no more; elsewhere it leaves room for two programs a unit.
    assert found.shared_bytes <= (64 if target == "gfx942" else 80) * 1024


def test_k_is_split_where_few_programs_would_share_a_long_one() -> None:
    splits = {shape: tuning.w8a8_linear("sm_90", 1, *shape).splits for shape in SHAPES}
    assert set(splits.values()) == {1}
    assert tuning.w8a8_linear("sm_90", 1, 256, 16384).splits > 1
