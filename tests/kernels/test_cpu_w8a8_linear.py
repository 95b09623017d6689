"""The generated C++ linear: the torch reference bit for bit, on every instruction set and at every size."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qmamba_compile import layer_ops
from qmamba_compile.cpu_templates import build
from qmamba_compile.cpu_templates import launch_layers as launch
from qmamba_compile.cpu_templates.render import render
from qmamba_compile.cpu_templates.specs import LAYER_KERNELS, LayerSpec
from qmamba_compile.errors import ConfigError

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")

GOLDEN = pathlib.Path(__file__).parent / "golden"
SPECS = [LayerSpec("w8a8_linear", isa) for isa in ("avx512", "avx2", "portable")]
SPECS += [LayerSpec("w8a8_linear", isa, vnni=True) for isa in ("avx512", "avx2")]
SPECS += [LayerSpec("w8a8_linear", "avx512", True, "amd")]
SPECS += [LayerSpec("w8a8_linear", isa, core="amd") for isa in ("avx2", "portable")]
SPECS += [LayerSpec("w8a8_linear", "avx512", vnni=True, amx=True)]
RUNNABLE = [
    spec for spec in SPECS if spec.isa in build.available_isas() and (build.vnni_flags(spec.isa) or not spec.vnni)
]


@contextlib.contextmanager
def only(spec: LayerSpec) -> Iterator[None]:
    """Launch the kernel of ``spec``, with outputs that hold NaN before it writes."""
    empty = torch.empty
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QMAMBA_CPU_ISA", "" if spec.amx else spec.isa)
        if spec.amx and not build.has_amx():
            emulate_tiles(patch)
        if not spec.vnni:
            patch.setattr(build, "vnni_flags", lambda isa: ())
        patch.setattr(build, "core", lambda: spec.core)
        patch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(torch.nan))
        launch.layer_kernel.cache_clear()
        yield
    launch.layer_kernel.cache_clear()


def emulate_tiles(patch: pytest.MonkeyPatch) -> None:
    """Run the same text without the instructions: what they are told is defined by amx_emulation.h."""
    include = "#include <immintrin.h>\n"
    emulation = (pathlib.Path(__file__).parent / "amx_emulation.h").read_text()
    patch.setattr(build, "has_amx", lambda: True)
    patch.setattr(build, "_AMX_FLAGS", ())
    patch.setattr(build, "render", lambda spec: render(spec).replace(include, include + emulation))


@pytest.fixture(params=RUNNABLE, ids=LayerSpec.slug)
def spec(request: pytest.FixtureRequest) -> Iterator[LayerSpec]:
    with only(request.param):
        yield request.param


def problem(
    tokens: int = 3,
    k: int = 131,
    o: int = 37,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    smooth: torch.dtype | None = None,
    static: bool = False,
    residual: torch.dtype | None = None,
    seed: int = 0,
) -> list[Any]:
    """Arguments of the operator; the weight has every code, -128 included, which only other quantizers make.

    The residual, if there is one, is as large as what is added to it, and part of a wider tensor.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    qdata = torch.randint(-128, 128, (o, k), generator=generator).to(torch.int8)
    return [
        (randn(tokens, k) * 3).to(dtype),
        qdata,
        randn(o, 1).abs() / 100,
        randn(o).to(dtype) if bias else None,
        (randn(k).abs() + 0.1).to(smooth) if smooth else None,
        torch.tensor(0.03) if static else None,  # clips
        *([(randn(tokens, 2 * o) * 20).to(residual)[:, :o]] if residual else []),
    ]


def wanted(
    x: Tensor, qdata: Tensor, scale: Tensor, bias: Any, smooth: Any, static: Any, residual: Tensor | None = None
) -> Tensor:
    y = layer_ops.w8a8_linear_reference(x, qdata, scale, bias, smooth, static)
    return y if residual is None else residual + y


def check(arguments: list[Any]) -> Tensor:
    y = launch.w8a8_linear(*arguments)
    expected = wanted(*arguments)
    assert y is not None and y.dtype == expected.dtype and y.shape == expected.shape
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.nan_to_num(), expected.nan_to_num())
    assert expected.nan_to_num().abs().max() > 0
    return y


@pytest.mark.parametrize("tokens", [*range(1, 18), 33, *range(35, 61), 130])
def test_every_number_of_tokens(spec: LayerSpec, tokens: int) -> None:
    check(problem(tokens))


@pytest.mark.parametrize("k", [2, 15, 16, 31, 63, 64, 65, 768])
@pytest.mark.parametrize("o", [1, 2, 3, 4, 5, 129])
def test_every_remainder_of_a_vector_and_a_block(spec: LayerSpec, k: int, o: int) -> None:
    for tokens in (1, 3):
        check(problem(tokens, k, o))


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
        {"bias": True},
        {"bias": True, "dtype": torch.bfloat16},
        {"bias": True, "dtype": torch.float16},
        {"smooth": torch.float32},
        {"smooth": torch.bfloat16},
        {"smooth": torch.bfloat16, "dtype": torch.bfloat16},
        {"smooth": torch.float32, "dtype": torch.bfloat16},
        {"smooth": torch.float16, "dtype": torch.float16},
        {"static": True},
        {"static": True, "smooth": torch.float32, "bias": True, "tokens": 9},
        {"static": True, "dtype": torch.bfloat16},
        *({"residual": torch.float32, "tokens": tokens} for tokens in (1, 2, 40)),
        *({"residual": torch.float32, "dtype": torch.bfloat16, "tokens": tokens} for tokens in (1, 2, 40)),
        {"residual": torch.bfloat16, "bias": True},
        {"residual": torch.bfloat16, "dtype": torch.bfloat16, "smooth": torch.bfloat16},
    ],
    ids=lambda change: "-".join(f"{name}={value}" for name, value in change.items()),
)
def test_options(spec: LayerSpec, change: dict[str, Any]) -> None:
    check(problem(**change))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_comes_out_as_nan_alone(spec: LayerSpec, bad: float, static: bool) -> None:
    arguments = problem(tokens=6, bias=True, static=static)
    for row, column in ((1, 0), (4, 130)):  # the first value, and the last one of an incomplete vector
        arguments[0][row, column] = bad
    y = check(arguments)
    assert y.isnan().all(dim=1).tolist() == [False, True, False, False, True, False]


def test_zeros_and_extremes(spec: LayerSpec) -> None:
    arguments = problem(tokens=5)
    for row, factor in enumerate((0.0, -0.0, 1e-38, 1e37, 1e-45)):
        arguments[0][row] *= factor
    y = check(arguments)
    assert (y[:2] == 0).all()


def test_ties_round_to_even(spec: LayerSpec) -> None:
    arguments = problem(tokens=1, k=64)
    arguments[0][0] = torch.arange(-32, 32) + 0.5
    arguments[0][0, 0] = 127  # a scale of exactly one
    y = check(arguments)
    codes = arguments[0].round()
    assert torch.equal(y, (codes.double() @ arguments[1].double().T).float() * arguments[2].T)


def test_largest_sums_do_not_saturate(spec: LayerSpec) -> None:
    """127 * -128 in every product: an int16 sum of four of them overflows, an int32 sum of 2**16 nearly does."""
    qdata = torch.full((5, 2**16), -128, dtype=torch.int8)
    x = torch.full((3, 2**16), 127.0)
    y = launch.w8a8_linear(x, qdata, torch.ones(5, 1), None, None, None)
    assert y is not None and (y == -(127.0 * 128 * 2**16)).all()


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x[:, :131], id="columns of a wider tensor"),
        pytest.param(lambda x: x[::2, 7:138], id="every other row, unaligned"),
        pytest.param(lambda x: x[:, ::2], id="every other column"),
        pytest.param(lambda x: x.t()[:131].t(), id="transposed twice"),
        pytest.param(lambda x: x[:, None, :131], id="three dimensions"),
        pytest.param(lambda x: x.view(2, 3, 262)[..., 131:], id="a split of a projection"),
        pytest.param(lambda x: x[0, :131], id="one vector"),
        pytest.param(lambda x: x[:1, :131].expand(4, 131), id="expanded"),
        pytest.param(lambda x: x[:0, :131], id="no tokens"),
    ],
)
def test_layouts_of_x(spec: LayerSpec, view: Any) -> None:
    x = torch.randn(6, 262, generator=torch.Generator().manual_seed(1))
    arguments = problem()
    arguments[0] = view(x)
    before = x.clone()
    y = launch.w8a8_linear(*arguments)
    assert y is not None and torch.equal(y, layer_ops.w8a8_linear_reference(*arguments))
    assert y.shape == (*arguments[0].shape[:-1], 37) and torch.equal(x, before)


@settings(max_examples=40, deadline=None)
@given(
    which=st.sampled_from(RUNNABLE),
    tokens=st.integers(1, 70),
    k=st.integers(2, 300),
    o=st.integers(1, 150),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bias=st.booleans(),
    smooth=st.sampled_from([None, torch.float32, torch.bfloat16]),
    static=st.booleans(),
    residual=st.sampled_from([None, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_any_problem(which: LayerSpec, **options: Any) -> None:
    assume(options["residual"] is None or options["smooth"] in (None, options["dtype"]))
    with only(which):
        check(problem(**options))


def test_panels_and_chunks(spec: LayerSpec) -> None:
    """Sizes that take several panels of weights, groups of them and chunks of tokens, none of them whole."""
    check(problem(tokens=707, k=768, o=103))
    check(problem(tokens=5, k=7001, o=7))  # four rows are more than a panel
    check(problem(tokens=100, k=7001, o=50))  # several chunks of tokens, groups of one repacked panel
    check(problem(tokens=40, k=768, o=1100))  # several groups of repacked panels


def test_threads_do_not_change_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    for tokens in (1, 40, 64):
        arguments = problem(tokens, o=900)
        one = launch.w8a8_linear(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(launch, "PARALLEL_WEIGHTS", 1)
            patch.setattr(torch, "get_num_threads", lambda: 3)
            assert torch.equal(launch.w8a8_linear(*arguments), one)


def test_what_the_kernel_does_not_read_is_left_to_the_reference() -> None:
    arguments = problem(o=38)
    expected = layer_ops.w8a8_linear_reference(*arguments)
    for position in (1, 2):
        strided = list(arguments)
        strided[position] = arguments[position].repeat_interleave(2, dim=0)[::2]
        assert launch.w8a8_linear(*strided) is None
        assert torch.equal(torch.ops.qmamba.w8a8_linear(*strided), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float16, "residual": torch.float32},
        {"residual": torch.float64},
        {"dtype": torch.bfloat16, "smooth": torch.float32, "residual": torch.float32},
    ],
)
def test_a_residual_that_the_kernel_does_not_add_is_added_behind_it(change: dict[str, Any]) -> None:
    arguments = problem(**change)
    assert launch.w8a8_linear(*arguments) is None
    y, expected = torch.ops.qmamba.w8a8_linear(*arguments), wanted(*arguments)
    assert y.dtype == expected.dtype and torch.equal(y, expected)


def test_a_residual_of_another_shape_is_refused() -> None:
    assert launch.w8a8_linear(*problem(), torch.randn(37)) is None
    with pytest.raises(ValueError, match="37"):
        torch.ops.qmamba.w8a8_linear(*problem(), torch.randn(37))
    with pytest.raises(ValueError, match="37"):
        torch.ops.qmamba.norm_w8a8_linear(*norm_problem(), torch.randn(37))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_layout_of_a_sum_is_that_of_the_linear(dtype: torch.dtype) -> None:
    """Compiled code reads what the shape function promises, whatever the residual's layout and whoever adds it."""
    x, *rest = problem(6, k=32, o=8, dtype=dtype)
    residual = torch.randn(3, 2, 8).to(dtype).transpose(0, 1)
    torch.library.opcheck(torch.ops.qmamba.w8a8_linear.default, (x.view(2, 3, 32), *rest, residual))
    norm = (x.view(2, 3, 32), None, torch.ones(32, dtype=dtype), 1e-5, 32, *rest, residual)
    for cast in ((), (torch.float16, torch.float16)):
        torch.library.opcheck(torch.ops.qmamba.norm_w8a8_linear.default, (*norm, *cast))


def test_a_norm_is_part_of_the_kernel_where_a_residual_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = norm_problem(residual=torch.float16)
    expected = wanted_behind_norm(arguments)
    monkeypatch.setattr(layer_ops, "rms_norm_reference", None)
    y = torch.ops.qmamba.norm_w8a8_linear(*arguments)
    assert y.dtype == expected.dtype and (y - expected).abs().max() <= NORM_TOLERANCE * expected.abs().max()


def test_the_operator_runs_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_ops, "w8a8_linear_reference", None)
    arguments = problem()
    y = torch.ops.qmamba.w8a8_linear(*arguments)
    monkeypatch.undo()
    assert torch.equal(y, layer_ops.w8a8_linear_reference(*arguments))


def test_what_the_machine_has_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    monkeypatch.setattr(build, "load", built.append)
    monkeypatch.delenv("QMAMBA_CPU_ISA", raising=False)
    machines = (
        ("avx512", True, "intel", True),
        ("avx512", True, "amd", False),
        ("avx512", False, "intel", False),
        ("avx2", True, "intel", False),
        ("avx2", False, "amd", False),
    )
    for isa, vnni, core, amx in machines:
        monkeypatch.setattr(build, "has_amx", lambda amx=amx: amx)
        monkeypatch.setattr(build, "available_isas", lambda isa=isa: (isa,))
        monkeypatch.setattr(build, "vnni_flags", lambda isa, vnni=vnni: ("-mvnni",) * vnni)
        monkeypatch.setattr(build, "core", lambda core=core: core)
        launch.layer_kernel.cache_clear()
        for name in LAYER_KERNELS:
            launch.layer_kernel(name)
    launch.layer_kernel.cache_clear()
    linears = [LayerSpec("w8a8_linear", isa, vnni, core, amx) for isa, vnni, core, amx in machines]
    assert [spec for spec in built if spec.kernel == "w8a8_linear"] == linears
    others = [name for name in LAYER_KERNELS if name != "w8a8_linear"]
    assert [spec for spec in built if spec not in linears] == [
        LayerSpec(name, spec.isa) for spec in linears for name in others
    ]


def test_vpdpbusd_is_found_on_clients_and_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    def flags(isas: tuple[str, ...], cpu: str, has_avx512_vnni: bool, knows: bool = True) -> list[tuple[str, ...]]:
        monkeypatch.setattr(build, "available_isas", lambda: isas)
        monkeypatch.setattr(build, "_cpu_words", cpu.split)
        monkeypatch.setattr(build, "_compiler_knows", lambda flag: knows)
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: has_avx512_vnni)
        return [build.vnni_flags.__wrapped__(isa) for isa in ("avx512", "avx2", "portable")]

    wide, narrow = ("avx512", "avx2", "portable"), ("avx2", "portable")
    assert flags(wide, "avx512_vnni", True) == [("-mavx512vnni",), ("-mavx512vnni", "-mavx512vl"), ()]
    assert flags(wide, "avx512_vnni avx_vnni", True) == [("-mavx512vnni",), ("-mavxvnni",), ()]
    assert flags(narrow, "avx_vnni", False) == [(), ("-mavxvnni",), ()]
    assert flags(narrow, "avx_vnni", False, knows=False) == [(), (), ()]
    assert flags(wide, "avx512_vnni avx_vnni", True, knows=False)[1] == ("-mavx512vnni", "-mavx512vl")
    assert flags(wide, "avx512f", False) == flags(narrow, "avx2", False) == [(), (), ()]
    assert flags(narrow, "avx512_vnni", True) == [(), (), ()]  # torch was told to do without AVX-512


def test_tiles_need_the_processor_linux_and_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(isa: str = "avx512", cpu: str = "amx_tile amx_int8", allowed: bool = True, knows: bool = True) -> bool:
        monkeypatch.setattr(build, "available_isas", lambda: (isa,))
        monkeypatch.setattr(build, "_cpu_words", cpu.split)
        monkeypatch.setattr(build, "_compiler_knows", lambda flag: knows)
        monkeypatch.setattr(torch.cpu, "_init_amx", lambda: allowed)
        return build.has_amx.__wrapped__()

    assert found()
    refusals = ({"isa": "avx2"}, {"cpu": "amx_tile amx_bf16"}, {"allowed": False}, {"knows": False})
    assert not any(found(**refusal) for refusal in refusals)


def test_who_names_avx512_gets_no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "has_amx", lambda: True)
    monkeypatch.setattr(build, "vnni_flags", lambda isa: ("-mavx512vnni",))
    spec = LayerSpec("w8a8_linear", "avx512")
    for value, amx in (("", True), ("avx512", False)):
        monkeypatch.setenv("QMAMBA_CPU_ISA", value)
        assert build.for_this_machine(spec).amx is amx


@pytest.mark.skipif(not all(map(build._compiler_knows, build._AMX_FLAGS)), reason="a compiler that knows no tiles")
def test_tiles_compile_to_their_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "vnni_flags", lambda isa: ("-mavx512vnni",))  # this machine may lack it, too
    library = build.build(SPECS[-1])
    assert library is not None
    # tdpbsud with sums in tile 0 or 1, codes in 4 and weights in 6 or 7.
    code = library.read_bytes()
    assert b"\xc4\xe2\x4a\x5e\xc4" in code and b"\xc4\xe2\x42\x5e\xcc" in code


def test_the_core_is_the_kernels_vendor(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, core in (("vendor_id : AuthenticAMD", "amd"), ("vendor_id : GenuineIntel", "intel"), (None, "intel")):

        def read_text(path: pathlib.Path, text: str | None = text) -> str:
            if text is None:
                raise FileNotFoundError(path)
            return text

        monkeypatch.setattr(pathlib.Path, "read_text", read_text)
        assert build.core.__wrapped__() == core


@pytest.mark.parametrize(
    "change, named",
    [
        ({"kernel": "ssm_update"}, "ssm_update"),
        ({"isa": "mmx"}, "mmx"),
        ({"vnni": True, "isa": "portable"}, "portable"),
        ({"core": "arm"}, "arm"),
        ({"kernel": "conv_update", "core": "amd"}, "amd"),
        ({"amx": True}, "amx"),
        ({"amx": True, "vnni": True, "isa": "avx2"}, "amx"),
    ],
)
def test_spec_refuses(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        dataclasses.replace(SPECS[0], **change)


@pytest.mark.parametrize("spec", SPECS, ids=LayerSpec.slug)
def test_rendered_text_is_readable(spec: LayerSpec) -> None:
    text = render(spec)
    assert max(len(line) for line in text.splitlines()) <= 120
    assert all(line == line.rstrip() for line in text.splitlines())
    assert "\n\n\n" not in text and "{%" not in text and "{{" not in text.replace("{{}", "")
    assert len({other.slug() for other in SPECS}) == len(SPECS)


@pytest.mark.parametrize("spec", [SPECS[2], SPECS[3]], ids=LayerSpec.slug)
def test_golden_text(spec: LayerSpec) -> None:
    """After a wanted change: ``QMAMBA_UPDATE_GOLDEN=1 pytest`` on this file, and read the diff."""
    golden = GOLDEN / f"{spec.slug()}.cpp"
    if os.environ.get("QMAMBA_UPDATE_GOLDEN"):
        golden.write_text(render(spec))
    assert render(spec) == golden.read_text()


# --- with a norm in front ------------------------------------------------------------------------------------------

NORM_TOLERANCE = 0.02
"""Of the largest y. A last bit of the root mean square or of silu moves a code by one at a tie: 1/127 of a product."""


NORM_CASTS: list[dict[str, Any]] = [
    {"residual": torch.float32},
    {"residual": torch.float32, "dtype": torch.bfloat16, "gate": True},
    {"residual": torch.bfloat16, "dtype": torch.bfloat16, "tokens": 20},
    {"x_dtype": torch.bfloat16, "weight_dtype": torch.bfloat16},
    {"x_dtype": torch.float32, "dtype": torch.bfloat16, "y_dtype": torch.bfloat16, "residual": torch.bfloat16},
    {"x_dtype": torch.bfloat16, "weight_dtype": torch.bfloat16, "smooth": torch.bfloat16, "gate": True},
    {"y_dtype": torch.bfloat16, "dtype": torch.float32, "weight_dtype": torch.bfloat16, "gate": True},
    {"y_dtype": torch.bfloat16, "residual": torch.float32, "weight_dtype": torch.bfloat16, "tokens": 70},
    {"y_dtype": torch.float32, "dtype": torch.bfloat16, "residual": torch.bfloat16},
]
"""A residual stream in float32 around blocks in 16 bits, and what else can be cast on the way."""


def norm_problem(
    tokens: int = 3,
    groups: int = 1,
    group_size: int = 131,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    gate: bool = False,
    x_dtype: torch.dtype | None = None,
    y_dtype: torch.dtype | None = None,
    **options: Any,
) -> list[Any]:
    k = groups * group_size
    x, *rest = problem(tokens, k, dtype=dtype, **options)
    generator = torch.Generator().manual_seed(4)
    # As in the model: a part of a projection's row.
    z = torch.randn(tokens, 2 * k, generator=generator).to(dtype)[:, :k] * 3 if gate else None
    weight = (torch.rand(k, generator=generator) + 0.5).to(weight_dtype or dtype)
    arguments = [x, z, weight, 1e-5, group_size, *rest]
    if x_dtype or y_dtype:
        arguments += [*[None] * (11 - len(arguments)), x_dtype, y_dtype]
    return arguments


def wanted_behind_norm(arguments: list[Any]) -> Tensor:
    x, gate, weight, epsilon, group_size, *linear = arguments[:10]
    residual, x_dtype, dtype = (*arguments[10:], *(None, None, None)[len(arguments) - 10 :])
    x = x if x_dtype is None else x.to(x_dtype)
    y = layer_ops.w8a8_linear_reference(layer_ops.rms_norm_reference(x, gate, weight, epsilon, group_size), *linear)
    y = y if dtype is None else y.to(dtype)
    return y if residual is None else residual + y


def check_norm(arguments: list[Any]) -> Tensor:
    y = launch.norm_w8a8_linear(*arguments)
    expected = wanted_behind_norm(arguments)
    assert y is not None and y.dtype == expected.dtype and y.shape == expected.shape
    assert torch.equal(y.isnan(), expected.isnan())
    error = (y.float() - expected.float()).nan_to_num().abs().max() / expected.nan_to_num().abs().max()
    assert error <= NORM_TOLERANCE, f"y is off by {error}"
    return y


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"gate": True},
        {"gate": True, "tokens": 1, "group_size": 1536},
        {"gate": True, "groups": 3, "group_size": 37},
        {"groups": 8, "group_size": 16},
        {"groups": 5, "group_size": 1},
        {"tokens": 70, "gate": True},
        {"dtype": torch.bfloat16, "gate": True},
        {"weight_dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "weight_dtype": torch.float32, "gate": True},
        {"bias": True, "smooth": torch.float32},
        {"static": True},
        *NORM_CASTS,
    ],
    ids=lambda change: "-".join(f"{name}={value}" for name, value in change.items()) or "base",
)
def test_norm_in_front(spec: LayerSpec, change: dict[str, Any]) -> None:
    check_norm(norm_problem(**change))


def test_norm_is_exact_where_its_arithmetic_is(spec: LayerSpec) -> None:
    """Values +-2^i, as many of each sign and size, have a mean of squares, a root and codes without rounding."""
    x = torch.tensor([2.0, -2.0] * 32).repeat(3, 1) * torch.tensor([[1.0], [4.0], [0.5]])
    arguments = [x, None, torch.ones(64), 0.0, 32, *problem(k=64)[1:]]
    y = check_norm(arguments)
    expected = layer_ops.w8a8_linear_reference(x.sign(), *arguments[5:])
    assert torch.equal(y, expected)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_stays_nan_behind_a_norm(spec: LayerSpec, bad: float, place: int) -> None:
    arguments = norm_problem(tokens=5, gate=True)
    arguments[place][3, 130] = bad
    y = check_norm(arguments)
    assert y[3].isnan().all() and y[[0, 1, 2, 4]].isfinite().all()


def test_silu_over_its_whole_range(spec: LayerSpec) -> None:
    """A static scale of 1/127 and a weight of one code show silu itself, to a code."""
    gate = torch.cat([torch.linspace(-120, 120, 500), torch.tensor([-1e30, 1e30, 0.0, -0.0])])
    ones = torch.ones_like(gate)[None]
    eye = torch.eye(len(gate)).to(torch.int8)
    y = launch.norm_w8a8_linear(ones, gate[None], ones[0], 1e-5, 1, eye, ones.T.clone(), None, None, None)
    expected = layer_ops.rms_norm_reference(ones, gate[None], ones[0], 1e-5, 1)
    assert y is not None and (y - expected).abs().max() <= 1.01 / 254


@settings(max_examples=30, deadline=None)
@given(
    which=st.sampled_from(RUNNABLE),
    tokens=st.integers(1, 20),
    groups=st.integers(1, 5),
    group_size=st.integers(2, 90),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    gate=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_norm(which: LayerSpec, **options: Any) -> None:
    with only(which):
        check_norm(norm_problem(**options))


def test_norm_operator_falls_back() -> None:
    arguments = norm_problem(dtype=torch.float16, gate=True)
    assert launch.norm_w8a8_linear(*arguments) is None
    expected = layer_ops.w8a8_linear_reference(layer_ops.rms_norm_reference(*arguments[:5]), *arguments[5:])
    assert torch.equal(torch.ops.qmamba.norm_w8a8_linear(*arguments), expected)


def test_norm_operator_is_declared_truthfully() -> None:
    for gate in (True, False):
        torch.library.opcheck(torch.ops.qmamba.norm_w8a8_linear.default, tuple(norm_problem(gate=gate, bias=True)))
