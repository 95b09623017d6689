"""The operators' schemas and plain references, against a float64 loop written here and against transformers.

The generated kernels have tests of their own; most tests here make them decline, so that the reference runs.
"""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.mamba2 import modeling_mamba2

from qmamba_compile import quant, recurrence
from qmamba_compile.cpu_templates import launch, launch_layers, launch_scan

qmamba = torch.ops.qmamba

SCHEMES = [(bits, calibrated, stochastic) for bits in (8, 4, 2) for calibrated in (0, 1) for stochastic in (0, 1)]
INFINITY = math.inf

# Relative to the largest value: float32 sums of up to 200 terms and exponentials of running sums up to about 100, which
# carry 100 * 2^-24 each.
SCAN_TOLERANCE = 5e-5
# One step: a dot product of at most 32 terms and one exponential.
STEP_TOLERANCE = 5e-6


@pytest.fixture
def no_kernels(monkeypatch):
    kernels = {
        launch: ("ssm_update", "quantize_state_", "dequantize_state"),
        launch_layers: ("w8a8_linear", "norm_w8a8_linear", "causal_conv", "conv_update"),
    }
    for module, names in kernels.items():
        for name in names:
            monkeypatch.setattr(module, name, lambda *args: None)


def scheme_id(scheme):
    return f"{scheme[0]}-{'calibrated' if scheme[1] else 'dynamic'}-{'stochastic' if scheme[2] else 'nearest'}"


def randn(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(found, wanted, tolerance):
    assert found.shape == wanted.shape
    assert (found.double() - wanted.double()).abs().max() <= tolerance * wanted.double().abs().max()


def scan_inputs(batch=2, seqlen=7, nheads=4, headdim=5, ngroups=2, dstate=8, dtype=torch.float32, seed=0):
    return {
        "x": randn(seed, batch, seqlen, nheads, headdim, dtype=dtype),
        "dt": randn(seed + 1, batch, seqlen, nheads, dtype=dtype),
        "A": -randn(seed + 2, nheads).abs() - 0.1,
        "B": randn(seed + 3, batch, seqlen, ngroups, dstate, dtype=dtype),
        "C": randn(seed + 4, batch, seqlen, ngroups, dstate, dtype=dtype),
        "D": randn(seed + 5, nheads),
        "dt_bias": randn(seed + 6, nheads) - 1,
        "initial_state": randn(seed + 7, batch, nheads, headdim, dstate),
        "dt_softplus": True,
        "dt_min": 0.0,
        "dt_max": INFINITY,
    }


def scan_by_hand(x, dt, A, B, C, D, dt_bias, initial_state, dt_softplus, dt_min, dt_max):
    """The recurrence in float64, one token, one head at a time."""
    batch, seqlen, nheads, headdim = x.shape
    x, dt, A, B, C = x.double(), dt.double(), A.double(), B.double(), C.double()
    state = torch.zeros(batch, nheads, headdim, B.shape[-1], dtype=torch.float64)
    if initial_state is not None:
        state = initial_state.double().clone()
    y = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(seqlen):
        for head in range(nheads):
            group = head * B.shape[2] // nheads
            delta = dt[:, t, head] + (0 if dt_bias is None else dt_bias[head].double())
            if dt_softplus:
                delta = delta.exp().log1p()
            delta = delta.clamp(dt_min, dt_max)
            for p in range(headdim):
                added = (delta * x[:, t, head, p])[:, None] * B[:, t, group]
                state[:, head, p] = (delta * A[head]).exp()[:, None] * state[:, head, p] + added
                y[:, t, head, p] = (state[:, head, p] * C[:, t, group]).sum(-1)
                if D is not None:
                    y[:, t, head, p] += D[head].double() * x[:, t, head, p]
    return y, state


def step_of(inputs, t):
    """Arguments of a step, without its state, from those of a scan."""
    return {
        **{name: inputs[name][:, t] for name in ("x", "dt", "B", "C")},
        **{name: inputs[name] for name in ("A", "D", "dt_bias", "dt_softplus")},
    }


# --- schemas -------------------------------------------------------------------------------------------------------


def packed_state(bits, calibrated, stochastic, batch=2, nheads=4, headdim=5, dstate=8):
    state_scale = (randn(9, nheads, dstate).abs() + 0.1).bfloat16() if calibrated else None
    rng = torch.stack([torch.arange(batch) + 3, torch.arange(batch)], dim=1)
    packed, channel_scale, found = quant.quantize_state(
        randn(8, batch, nheads, headdim, dstate), bits, state_scale=state_scale, rng=rng if stochastic else None
    )
    return packed, channel_scale, None if calibrated else found, rng, state_scale


def update_arguments(scheme, **changes):
    bits, _, stochastic = scheme
    packed, channel_scale, state_scale_out, rng, state_scale = packed_state(*scheme)
    step = step_of(scan_inputs(), 0) | changes
    return (
        *(packed, channel_scale, state_scale_out, rng, step["x"], step["dt"], step["A"], step["B"], step["C"]),
        *(step["D"], step["dt_bias"], state_scale, True, bits, bool(stochastic)),
    )


def test_every_operator_is_checked():
    defined = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("qmamba::")}
    checked = {"quantize_state", "quantize_state_", "dequantize_state", "ssm_update", "chunk_scan", "w8a8_linear"}
    checked |= {"ssm_scan_quantized", "ssm_scan_quantized_backward", "norm_w8a8_linear", "causal_conv", "conv_update"}
    assert defined == checked, "a new operator needs an opcheck below"


# Every kind of argument: both dtypes of codes, either state scale, with and without noise.
@pytest.mark.parametrize("scheme", [(8, 0, 0), (4, 0, 1), (4, 1, 0), (2, 1, 1)], ids=scheme_id)
def test_schemas_of_the_state_operators(scheme, no_kernels):
    bits, calibrated, stochastic = scheme
    packed, channel_scale, state_scale_out, rng, state_scale = packed_state(*scheme)
    h = randn(7, 2, 4, 5, 8)
    torch.library.opcheck(qmamba.quantize_state.default, (h, state_scale, bits, bool(stochastic), 11))
    torch.library.opcheck(
        qmamba.quantize_state_.default,
        (packed, channel_scale, state_scale_out, rng, h, state_scale, bits, bool(stochastic)),
    )
    scale = state_scale if calibrated else state_scale_out
    torch.library.opcheck(qmamba.dequantize_state.default, (packed, channel_scale, scale, bits))
    torch.library.opcheck(qmamba.ssm_update.default, update_arguments(scheme))


@pytest.mark.parametrize("absent", [{"D": None}, {"dt_bias": None}, {"D": None, "dt_bias": None}], ids=str)
def test_schema_of_a_step_without_its_optional_inputs(absent, no_kernels):
    torch.library.opcheck(qmamba.ssm_update.default, update_arguments((4, 0, 0), **absent))


def test_schemas_with_the_kernels_of_this_machine():
    """The same promises when a generated kernel answers: one scheme, since each kernel has tests of its own."""
    arguments = update_arguments((4, 0, 0))
    torch.library.opcheck(qmamba.ssm_update.default, arguments)
    torch.library.opcheck(qmamba.dequantize_state.default, (*arguments[:3], 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("absent", [(), ("D", "dt_bias", "initial_state")])
def test_schema_of_the_scan(dtype, absent):
    inputs = scan_inputs(dtype=dtype) | dict.fromkeys(absent)
    torch.library.opcheck(qmamba.chunk_scan.default, tuple(inputs.values()))


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("bits, calibrated", [(4, 0), (8, 1), (3, 1), (None, 0)])
def test_schemas_of_the_faithful_scan_and_its_gradient(bits, calibrated, kernel, monkeypatch):
    if not kernel:
        for name in ("ssm_scan", "ssm_scan_backward"):
            monkeypatch.setattr(launch_scan, name, lambda *args: None)
    inputs = scan_inputs(seqlen=3)
    names = [name for name in inputs if isinstance(inputs[name], torch.Tensor)]
    learned = [inputs[name].clone().requires_grad_() for name in names]
    state_scale = randn(8, 4, 8).abs() + 0.5 if calibrated else None
    settings = (state_scale, True, 0.0, INFINITY, bits, False, 7, 1)
    torch.library.opcheck(qmamba.ssm_scan_quantized.default, (*learned, *settings))
    tensors = [inputs[name] for name in names]
    torch.library.opcheck(
        qmamba.ssm_scan_quantized_backward.default, (randn(9, 2, 3, 4, 5), None, *tensors, *settings, False, None)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optional", [False, True])
def test_schema_of_the_linear(dtype, optional):
    _, qdata, scale = int8_weight(16, 24)
    extras = (randn(2, 16), randn(3, 24).abs() + 0.5, torch.tensor(0.05)) if optional else (None, None, None)
    bias, pre_scale, act_scale = randn(2, 16) if optional else None, *extras[1:]
    x = randn(4, 2, 3, 24, dtype=dtype)
    torch.library.opcheck(qmamba.w8a8_linear.default, (x, qdata, scale, bias, pre_scale, act_scale))


@pytest.mark.parametrize("optional", [True, False])
def test_schemas_of_the_operators_around_a_linear(optional, no_kernels):
    _, qdata, scale = int8_weight(12, 16)
    x, gate, bias = randn(1, 2, 3, 16), randn(2, 2, 3, 16), randn(3, 12)
    norm = (x, gate if optional else None, randn(4, 16), 1e-5, 8)
    torch.library.opcheck(
        qmamba.norm_w8a8_linear.default, (*norm, qdata, scale, bias if optional else None, None, None)
    )
    convolution = (randn(7, 6, 1, 4), randn(8, 6) if optional else None, optional)
    torch.library.opcheck(qmamba.conv_update.default, (randn(5, 2, 6, 4), randn(6, 2, 6, 1), *convolution))
    torch.library.opcheck(qmamba.causal_conv.default, (randn(6, 2, 9, 6).mT, *convolution))


# --- one step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ngroups", [1, 2, 4])
@pytest.mark.parametrize("absent", [(), ("D",), ("dt_bias",)], ids=str)
@pytest.mark.parametrize("softplus", [True, False])
def test_a_step_is_the_recurrence(ngroups, absent, softplus):
    inputs = scan_inputs(seqlen=1, ngroups=ngroups) | dict.fromkeys(absent) | {"dt_softplus": softplus}
    if not softplus:
        inputs["dt"] = inputs["dt"].abs() + 1.5  # a time step is positive
        inputs["dt_bias"] = None if inputs["dt_bias"] is None else inputs["dt_bias"].abs()
    wanted_y, wanted_state = scan_by_hand(**inputs)
    state, y = recurrence.step(inputs["initial_state"], **step_of(inputs, 0))
    assert_near(state, wanted_state, STEP_TOLERANCE)
    assert_near(y, wanted_y[:, 0], STEP_TOLERANCE)


def test_a_step_of_bfloat16_inputs_rounds_its_output_only():
    inputs = scan_inputs(seqlen=1, dtype=torch.bfloat16)
    wanted_y, wanted_state = scan_by_hand(**inputs)
    state, y = recurrence.step(inputs["initial_state"], **step_of(inputs, 0))
    assert state.dtype == torch.float32 and y.dtype == torch.bfloat16
    assert_near(state, wanted_state, STEP_TOLERANCE)
    assert_near(y, wanted_y[:, 0], 2.0**-8)  # bfloat16 has 8 significant bits


@pytest.mark.parametrize("scheme", SCHEMES, ids=scheme_id)
def test_an_update_reads_y_before_it_packs_the_state_again(scheme, no_kernels):
    bits, _, stochastic = scheme
    arguments = update_arguments(scheme)
    packed, channel_scale, state_scale_out, rng, *_ = (None if t is None else t.clone() for t in arguments[:4])
    state_scale = arguments[11]
    h = quant.dequantize_state(packed, channel_scale, state_scale if scheme[1] else state_scale_out, bits)
    inputs = scan_inputs()
    one_token = {name: inputs[name][:, :1] for name in ("x", "dt", "B", "C")}
    wanted_y, wanted_state = scan_by_hand(**(inputs | one_token | {"initial_state": h}))
    y = qmamba.ssm_update(*arguments)
    assert_near(y, wanted_y[:, 0], STEP_TOLERANCE)
    expected = quant.quantize_state(
        wanted_state.float(), bits, state_scale=state_scale, rng=rng if stochastic else None
    )
    # The float64 loop and the step differ by float32 rounding, which moves a code where a value is at a tie.
    moved = quant.unpack(arguments[0], bits).long() - quant.unpack(expected[0], bits).long()
    assert moved.abs().max() <= 1 and moved.ne(0).float().mean() < 0.01
    torch.testing.assert_close(arguments[1].float(), expected[1].float(), rtol=2.0**-7, atol=0)
    assert torch.equal(arguments[3][:, 1], rng[:, 1] + 1) and torch.equal(arguments[3][:, 0], rng[:, 0])


def test_an_update_equals_the_plain_functions_one_after_the_other(no_kernels):
    """64 steps, code for code: the operator is exactly dequantize, step, requantize."""
    arguments = list(update_arguments((4, 1, 1), D=None))
    packed, channel_scale, _, rng = (None if t is None else t.clone() for t in arguments[:4])
    state_scale = arguments[11]
    for t in range(64):
        inputs = scan_inputs(seqlen=1, seed=100 + 10 * t) | {"A": arguments[6], "dt_bias": arguments[10], "D": None}
        step = step_of(inputs, 0)
        arguments[4:9] = [step[name] for name in ("x", "dt", "A", "B", "C")]
        h = quant.dequantize_state(packed, channel_scale, state_scale, 4)
        h, wanted = recurrence.step(h, **step)
        packed, channel_scale, _ = quant.quantize_state(h, 4, state_scale=state_scale, rng=rng)
        rng[:, 1] += 1
        assert torch.equal(qmamba.ssm_update(*arguments), wanted)
        assert torch.equal(arguments[0], packed) and torch.equal(arguments[1], channel_scale)
        assert torch.equal(arguments[3], rng)


@pytest.mark.parametrize("scheme", SCHEMES, ids=scheme_id)
def test_a_fresh_state_and_a_stored_one_are_the_same(scheme, no_kernels):
    bits, calibrated, stochastic = scheme
    packed, channel_scale, state_scale_out, rng, state_scale = packed_state(*scheme)
    h = randn(5, *packed.shape[:3], 8)
    fresh = qmamba.quantize_state(h, state_scale, bits, bool(stochastic), 17)
    rng[:, 0], rng[:, 1] = 17, 0
    qmamba.quantize_state_(packed, channel_scale, state_scale_out, rng, h, state_scale, bits, bool(stochastic))
    stored = [packed, channel_scale, rng, *([] if calibrated else [state_scale_out])]
    assert len(fresh) == len(stored)
    assert all(torch.equal(a, b) for a, b in zip(fresh, stored, strict=True))
    assert rng.tolist() == [[17, 1]] * 2
    read = qmamba.dequantize_state(packed, channel_scale, state_scale if calibrated else state_scale_out, bits)
    step = channel_scale.double()[..., None] * (state_scale if calibrated else state_scale_out).double()[..., None, :]
    # Half a step to nearest, a whole one stochastically; and float32 rounding of codes up to 127.
    assert ((read.double() - h.double()).abs() <= step * (1 if stochastic else 0.5) + 1e-4 * step).all()


# --- the scan ------------------------------------------------------------------------------------------------------


LENGTHS = [1, 2, 63, 64, 65, 200]


@pytest.mark.parametrize("seqlen", LENGTHS)
@pytest.mark.parametrize("ngroups", [1, 2])
@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scan_is_as_many_steps(seqlen, ngroups, start, dtype):
    inputs = scan_inputs(seqlen=seqlen, ngroups=ngroups, dtype=dtype)
    if not start:
        inputs["initial_state"] = None
    y, final = qmamba.chunk_scan(*inputs.values())
    assert y.dtype == final.dtype == torch.float32
    h = torch.zeros(2, 4, 5, 8) if inputs["initial_state"] is None else inputs["initial_state"]
    for t in range(seqlen):
        step = step_of(inputs, t)
        h, wanted = recurrence.step(h, **(step | {"x": step["x"].float()}))
        assert_near(y[:, t], wanted, 10 * SCAN_TOLERANCE)  # of this token's largest value, which may be a small one
    assert_near(final, h, SCAN_TOLERANCE)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    seqlen=st.integers(1, 70),
    ngroups=st.integers(1, 3),
    repeats=st.integers(1, 2),
    headdim=st.integers(1, 3),
    dstate=st.integers(1, 6),
    limits=st.sampled_from([(0.0, INFINITY), (0.05, 0.3), (0.0, 0.1)]),
    absent=st.sets(st.sampled_from(["D", "dt_bias", "initial_state"])),
)
def test_the_scan_is_the_recurrence_for_any_shape(batch, seqlen, ngroups, repeats, headdim, dstate, limits, absent):
    inputs = scan_inputs(batch, seqlen, ngroups * repeats, headdim, ngroups, dstate)
    inputs |= {"dt_min": limits[0], "dt_max": limits[1], **dict.fromkeys(absent)}
    wanted_y, wanted_state = scan_by_hand(**inputs)
    y, final = qmamba.chunk_scan(*inputs.values())
    assert_near(y, wanted_y, SCAN_TOLERANCE)
    assert_near(final, wanted_state, SCAN_TOLERANCE)


@pytest.mark.parametrize("cut", [1, 64, 70, 129])
def test_two_parts_make_the_whole(cut):
    inputs = scan_inputs(seqlen=130)
    parts = ("x", "dt", "B", "C")
    whole_y, whole_state = qmamba.chunk_scan(*inputs.values())
    first = inputs | {name: inputs[name][:, :cut] for name in parts}
    first_y, state = qmamba.chunk_scan(*first.values())
    second = inputs | {name: inputs[name][:, cut:] for name in parts} | {"initial_state": state}
    second_y, final = qmamba.chunk_scan(*second.values())
    assert_near(torch.cat([first_y, second_y], dim=1), whole_y, SCAN_TOLERANCE)
    assert_near(final, whole_state, SCAN_TOLERANCE)


def test_strides_of_the_inputs_do_not_matter():
    inputs = scan_inputs(seqlen=66)
    y, final = qmamba.chunk_scan(*inputs.values())
    strided = {
        key: value.transpose(0, -1).contiguous().transpose(0, -1) if isinstance(value, torch.Tensor) else value
        for key, value in inputs.items()
    }
    strided_y, strided_final = qmamba.chunk_scan(*strided.values())
    # Matrix products of other strides may sum in another order.
    assert_near(strided_y, y, SCAN_TOLERANCE)
    assert_near(strided_final, final, SCAN_TOLERANCE)
    assert strided_y.is_contiguous() and strided_final.is_contiguous()


def test_the_initial_state_is_not_written():
    inputs = scan_inputs(seqlen=3)
    before = inputs["initial_state"].clone()
    qmamba.chunk_scan(*inputs.values())
    assert torch.equal(inputs["initial_state"], before)


# --- transformers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seqlen", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("ngroups", [1, 2])
@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("limits", [(0.0, INFINITY), (0.05, 0.3)])
def test_the_scan_is_that_of_transformers(seqlen, ngroups, start, limits):
    theirs = inspect.unwrap(modeling_mamba2.mamba2_chunk_scan)
    inputs = scan_inputs(seqlen=seqlen, ngroups=ngroups) | {"dt_min": limits[0], "dt_max": limits[1]}
    if not start:
        inputs["initial_state"] = None
    wanted_y, wanted_state = theirs(
        *(inputs[name] for name in ("x", "dt", "A", "B", "C")),
        chunk_size=32,
        D=inputs["D"],
        dt_bias=inputs["dt_bias"],
        initial_states=inputs["initial_state"],
        dt_softplus=True,
        dt_limit=limits,
        return_final_states=True,
    )
    y, final = qmamba.chunk_scan(*inputs.values())
    assert_near(y, wanted_y, SCAN_TOLERANCE)
    assert_near(final, wanted_state, SCAN_TOLERANCE)


@pytest.mark.parametrize("ngroups", [1, 2])
@pytest.mark.parametrize("absent", [(), ("D",), ("dt_bias",)], ids=str)
def test_the_step_is_that_of_transformers(ngroups, absent):
    theirs = inspect.unwrap(modeling_mamba2.mamba2_selective_state_update)
    inputs = scan_inputs(seqlen=1, ngroups=ngroups) | dict.fromkeys(absent)
    step = step_of(inputs, 0)
    headdim, dstate = inputs["x"].shape[-1], inputs["B"].shape[-1]

    def per_channel(vector):  # as Mamba2Mixer expands a parameter of a head
        return None if vector is None else vector[..., None].expand(*vector.shape, headdim)

    wanted_state = inputs["initial_state"].clone()
    wanted_y = theirs(
        wanted_state,
        step["x"],
        per_channel(step["dt"]),
        per_channel(step["A"])[..., None].expand(-1, -1, dstate),
        step["B"],
        step["C"],
        D=per_channel(step["D"]),
        dt_bias=per_channel(step["dt_bias"]),
        dt_softplus=True,
    )
    state, y = recurrence.step(inputs["initial_state"], **step)
    assert_near(state, wanted_state, STEP_TOLERANCE)
    assert_near(y, wanted_y, STEP_TOLERANCE)


# --- linears -------------------------------------------------------------------------------------------------------


def int8_weight(out_features, in_features, seed=0):
    """Float weight, codes and scale, by arithmetic of its own."""
    weight = randn(seed, out_features, in_features)
    scale = weight.abs().amax(1, keepdim=True) / 127
    return weight, (weight / scale).round().to(torch.int8), scale


def quantization_bound(x, x_step, weight, weight_step):
    """Largest |y - y_float| when every x is off by half of x_step and every weight by half of weight_step."""
    x, x_step, weight, weight_step = x.double().abs(), x_step.double(), weight.double().abs(), weight_step.double()
    rounding = x @ (weight_step / 2).expand_as(weight).T + (x_step / 2).expand_as(x) @ weight.T
    both = x.shape[-1] * x_step / 2 * weight_step.T / 2
    # float32: 2^-20 of what is summed is far more than its few roundings take.
    return rounding + both + (x @ weight.T) * 2.0**-20


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), out_features=st.integers(1, 40), in_features=st.integers(2, 70), seed=st.integers(0, 99))
def test_the_linear_is_within_the_quantization_bound_of_the_float_one(rows, out_features, in_features, seed):
    # From 2 features: torch 2.13's _int_mm on the CPU is wrong for an inner size of 1.
    weight, qdata, scale = int8_weight(out_features, in_features, seed)
    x, bias = randn(seed + 1, rows, in_features) * 3, randn(seed + 2, out_features)
    y = qmamba.w8a8_linear(x, qdata, scale, bias, None, None)
    wanted = x.double() @ weight.double().T + bias.double()
    bound = quantization_bound(x, x.abs().amax(1, keepdim=True) / 127, weight, scale) + bias.abs() * 2.0**-22
    assert y.dtype == torch.float32 and ((y.double() - wanted).abs() <= bound).all()


def test_the_linear_is_exact_where_the_codes_are():
    qdata = torch.randint(-127, 128, (12, 20), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    x = torch.randint(-127, 128, (2, 3, 20), generator=torch.Generator().manual_seed(1)).float()
    x[..., 0] = 127  # a scale of exactly one
    y = qmamba.w8a8_linear(x, qdata, torch.full((12, 1), 0.5), None, None, None)
    assert y.shape == (2, 3, 12) and torch.equal(y, x @ qdata.float().T * 0.5)


def test_each_token_has_its_own_scale_unless_one_is_given():
    weight, qdata, scale = int8_weight(16, 32)
    x = randn(1, 6, 32) * 10.0 ** torch.arange(-3, 3)[:, None]
    y = qmamba.w8a8_linear(x, qdata, scale, None, None, None)
    alone = torch.cat([qmamba.w8a8_linear(row[None], qdata, scale, None, None, None) for row in x])
    assert torch.equal(y, alone)
    act_scale = torch.tensor(0.04)
    codes = (x.double() / act_scale.double()).round().clamp(-127, 127)
    assert codes[0].abs().max() <= 1 and codes[-1].abs().max() == 127  # it does clip, and does not rescale
    wanted = codes @ qdata.double().T * act_scale.double() * scale.double().T
    for shape in ((), (1,), (1, 1)):
        assert_near(qmamba.w8a8_linear(x, qdata, scale, None, None, act_scale.view(shape)), wanted, 1e-6)
    assert weight.shape == (16, 32)


def test_smooth_factors_multiply_the_input_before_it_is_quantized():
    weight, _, _ = int8_weight(16, 32)
    x = randn(1, 5, 32)
    x[:, 3] *= 1000  # an activation outlier
    factors = torch.ones(32)
    factors[3] = 1e-3
    balanced = weight / factors
    scale = balanced.abs().amax(1, keepdim=True) / 127
    qdata = (balanced / scale).round().to(torch.int8)
    y = qmamba.w8a8_linear(x, qdata, scale, None, factors, None)
    smooth = x * factors
    bound = quantization_bound(smooth, smooth.abs().amax(1, keepdim=True) / 127, balanced, scale)
    assert ((y.double() - x.double() @ weight.double().T).abs() <= bound).all()
    # Without the division of the weight the factors are seen.
    _, plain, plain_scale = int8_weight(16, 32)
    scaled = qmamba.w8a8_linear(x, plain, plain_scale, None, factors, None)
    assert torch.equal(scaled, qmamba.w8a8_linear(smooth, plain, plain_scale, None, None, None))


def test_bfloat16_activations_give_a_bfloat16_result():
    weight, qdata, scale = int8_weight(16, 32)
    x = randn(1, 4, 32, dtype=torch.bfloat16)
    y = qmamba.w8a8_linear(x, qdata, scale, randn(2, 16), None, None)
    wanted = qmamba.w8a8_linear(x.float(), qdata, scale, randn(2, 16), None, None)
    assert y.dtype == torch.bfloat16 and torch.equal(y, wanted.bfloat16())
    assert weight.shape == (16, 32)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_token_that_is_not_finite_comes_out_as_nan_alone(bad):
    _, qdata, scale = int8_weight(16, 32)
    x = randn(1, 4, 32)
    clean = qmamba.w8a8_linear(x, qdata, scale, None, None, None)
    x[2, 5] = bad
    y = qmamba.w8a8_linear(x, qdata, scale, None, None, None)
    assert y[2].isnan().all() and torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])
