"""The reference arithmetic against independent float math: nothing expected here comes from the code under test."""

import math
import os
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
from by_hand import BFLOAT16, FLOAT_SLACK, LARGEST, TINY, codes_by_hand, float32, random_state, steps, word
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from qmamba_compile import quant

bits_of_state = st.sampled_from([8, 4, 2])


def outer_outliers(seed, headdim, dstate, factor=20.0):
    """Rows and columns ``factor`` times larger than the rest, as large models have."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(1, 2, headdim, dstate, generator=generator)
    rows = torch.where(torch.rand(headdim, generator=generator) < 0.1, factor, 1.0)
    columns = torch.where(torch.rand(dstate, generator=generator) < 0.1, factor, 1.0)
    rows[0], columns[0] = factor, factor
    return h * rows[:, None] * columns


# --- packing -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(bits=bits_of_state, width=st.integers(1, 40), rows=st.integers(1, 5), seed=st.integers(0, 99))
def test_pack_round_trips_at_every_width(bits, width, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    dstate = width * 8 // bits
    codes = torch.randint(-LARGEST[bits], LARGEST[bits] + 1, (rows, dstate), generator=generator).to(torch.int8)
    packed = quant.pack(codes, bits)
    assert packed.shape == (rows, width) and packed.dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert packed.shape[-1] == quant.packed_width(dstate, bits)
    assert quant.unpacked_width(width, bits) == dstate
    assert quant.unpack(packed, bits).dtype == torch.int8
    assert torch.equal(quant.unpack(packed, bits), codes)
    assert torch.equal(codes_by_hand(packed, bits), codes.long())


@pytest.mark.parametrize("bits", [4, 2])
def test_every_byte_round_trips(bits):
    every = torch.arange(256, dtype=torch.uint8).view(2, 128)
    codes = quant.unpack(every, bits)
    assert codes.tolist() == codes_by_hand(every, bits).tolist()
    assert torch.equal(quant.pack(codes, bits), every)


def test_four_bit_layout_is_halves_with_an_offset_of_eight():
    # Codes n in the low nibble, n + dstate/2 in the high one.
    codes = torch.tensor([[-7, 0, 1, 7, 2, -1]], dtype=torch.int8)
    assert quant.pack(codes, 4).tolist() == [[(7 + 8) * 16 + 1, (2 + 8) * 16 + 8, (-1 + 8) * 16 + 9]]
    assert quant.unpack(torch.tensor([[0x1F, 0x80]], dtype=torch.uint8), 4).tolist() == [[7, -8, -7, 0]]


def test_two_bit_layout_is_quarters_with_an_offset_of_two():
    codes = torch.tensor([[-1, 0, 1, 1]], dtype=torch.int8)
    assert quant.pack(codes, 2).tolist() == [[1 + 2 * 4 + 3 * 16 + 3 * 64]]
    assert quant.unpack(torch.tensor([[0b00_01_10_11, 0b11_10_01_00]], dtype=torch.uint8), 2).tolist() == [
        [1, -2, 0, -1, -1, 0, -2, 1]
    ]


def test_a_dstate_that_does_not_fill_bytes_is_refused():
    assert [quant.packable(95, bits) for bits in (8, 4, 2)] == [True, False, False]
    assert [quant.packable(94, bits) for bits in (8, 4, 2)] == [True, True, False]
    with pytest.raises(ValueError, match="dstate=95 does not fill whole bytes at 4 bits"):
        quant.pack(torch.zeros(1, 95, dtype=torch.int8), 4)
    with pytest.raises(ValueError, match="dstate=94"):
        quant.pack(torch.zeros(1, 94, dtype=torch.int8), 2)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_zero_byte_holds_zero_codes(bits):
    assert quant.zero_byte(bits) == {8: 0, 4: 0x88, 2: 0b10101010}[bits]
    byte = torch.tensor([[quant.zero_byte(bits)]], dtype=torch.uint8).view(torch.int8 if bits == 8 else torch.uint8)
    assert codes_by_hand(byte, bits).eq(0).all()


def test_grid_is_symmetric():
    assert [quant.max_code(bits) for bits in (8, 4, 3, 2)] == [127, 7, 3, 1]


# --- rounding to nearest -------------------------------------------------------------------------------------------


def draw_state(data):
    """States of many shapes and magnitudes, each kind on purpose."""
    seed, headdim = data.draw(st.integers(0, 9999)), data.draw(st.integers(1, 16))
    dstate = 4 * data.draw(st.integers(1, 16))
    kind = data.draw(st.sampled_from(["normal", "outer", "one-hot", "mixed", "zero rows"]))
    h = random_state(seed, (2, 2, headdim, dstate))
    if kind == "outer":
        h = outer_outliers(seed, headdim, dstate)
    elif kind == "one-hot":
        h = torch.nn.functional.one_hot(torch.arange(4 * headdim) % dstate, dstate).view(2, 2, headdim, dstate).float()
    elif kind == "mixed":
        h = h * 10.0 ** random_state(seed + 1, (2, 2, headdim, 1)).clamp(-3, 3)
    elif kind == "zero rows":
        h[:, :, :: data.draw(st.integers(1, 3))] = 0
    return h * 10.0 ** data.draw(st.sampled_from([0, 0, -3, 3, 30, -30, -37]))


def draw_scale(data, h):
    """None for dynamic scales, else calibrated ones [h, n]."""
    if data.draw(st.booleans(), label="dynamic"):
        return None
    scale = random_state(data.draw(st.integers(0, 99)), (h.shape[1], h.shape[-1])).abs() + 0.05
    return scale.bfloat16()


@settings(max_examples=150, deadline=None)
@given(data=st.data(), bits=bits_of_state)
def test_error_is_at_most_half_a_step_everywhere(data, bits):
    h = draw_state(data)
    packed, channel_scale, state_scale = quant.quantize_state(h, bits, state_scale=draw_scale(data, h))
    step = steps(channel_scale, state_scale)
    codes = codes_by_hand(packed, bits)
    assert codes.abs().max() <= LARGEST[bits]  # -2^(b-1) is never used
    error = (h.double() - codes * step).abs() / step
    # A scale that is rounded down to bfloat16 leaves its largest value up to 2^-8 beyond the largest code: at 8 bits
    # that is 127/256 of a step, just below half of one. Nothing else is added but float32 rounding.
    assert error.max() <= 0.5 + FLOAT_SLACK
    read = quant.dequantize_state(packed, channel_scale, state_scale, bits)
    assert read.dtype == torch.float32 and read.shape == h.shape
    # 2^-149: float32 has nothing smaller, which matters when a step is subnormal.
    assert ((read.double() - codes * step).abs() <= (codes * step).abs() * 2.0**-22 + 2.0**-149).all()


@settings(max_examples=100, deadline=None)
@given(data=st.data(), bits=bits_of_state)
def test_the_largest_magnitude_of_each_row_gets_the_largest_code(data, bits):
    h = draw_state(data)
    scale = draw_scale(data, h)
    packed, _, state_scale = quant.quantize_state(h, bits, state_scale=scale)
    codes = codes_by_hand(packed, bits).abs()
    # Each row: the largest |h| / state_scale.
    relative = h.double().abs() / state_scale.double()[..., None, :]
    served = relative.amax(-1) > LARGEST[bits] * TINY
    found = codes.gather(-1, relative.argmax(-1, keepdim=True)).squeeze(-1)
    assume(served.any())
    assert (found[served] == LARGEST[bits]).all()
    assert (found[~served] <= LARGEST[bits]).all()


def test_ties_go_to_even():
    ones = torch.ones(1, dtype=torch.bfloat16), torch.ones(12, dtype=torch.bfloat16)
    h = torch.tensor([[-6.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5]])
    codes = quant.quantize_codes(h, *ones, 4)
    assert codes.dtype == torch.int8
    assert codes.tolist() == [[-6, -2, -2, 0, 0, 2, 2, 4, 4, 6, 6, 7]]
    assert quant.quantize_codes(h * 100, *ones, 4).tolist() == [[-7] * 4 + [7] * 8]


def float32_product(a, b):
    """Exact in float64 (24 + 24 bits), then rounded once."""
    return (a.double() * b.double()).float()


def test_reciprocals_are_applied_state_scale_first_and_the_second_product_is_exact():
    """Codes feed back, so kernels need the order and the roundings: all computed here in float64."""
    generator = torch.Generator().manual_seed(3)
    channel_scale = (torch.rand(64, generator=generator) + 0.5).bfloat16()
    state_scale = (torch.rand(512, generator=generator) + 0.5).bfloat16()
    per_channel = (1 / channel_scale.double()).float()[:, None]
    per_state = (1 / state_scale.double()).float()[None, :]
    # Right at the ties, where all this decides. |h| stays below the largest code.
    codes = torch.randint(-5, 5, (64, 512), generator=generator) + 0.5
    h = (codes.double() * channel_scale.double()[:, None] * state_scale.double()).float()
    expected = (float32_product(h, per_state).double() * per_channel.double()).round()
    channel_first = (float32_product(h, per_channel).double() * per_state.double()).round()
    rounded_twice = float32_product(float32_product(h, per_state), per_channel).round()
    assert expected.ne(channel_first).any() and expected.ne(rounded_twice).any()
    assert torch.equal(quant.quantize_codes(h, channel_scale, state_scale, 4), expected.to(torch.int8))


@pytest.mark.parametrize("calibrated", [False, True])
def test_quantize_state_rounds_likewise(calibrated):
    """The same through the whole function, on values moved to the ties of the scales that they had."""
    h = random_state(0, (4, 2, 64, 64))
    scale = (random_state(1, (2, 64)).abs() + 0.1).bfloat16() if calibrated else None
    _, channel_scale, state_scale = quant.quantize_state(h, 8, state_scale=scale)
    step = steps(channel_scale, state_scale)
    ties = ((h / step).floor() + 0.5) * step
    h = torch.where((h / step).abs() < 100, ties, h).float()
    packed, channel_scale, state_scale = quant.quantize_state(h, 8, state_scale=scale)
    per_channel = (1 / channel_scale.double()).float()[..., None]
    per_state = (1 / state_scale.double()).float()[..., None, :]
    scaled = float32_product(h, per_state)
    assert not torch.equal(scaled.double(), h.double() * per_state)
    expected = scaled.double() * per_channel
    channel_first = float32_product(h, per_channel).double() * per_state
    assert channel_first.round().ne(expected.round()).any()
    assert expected.float().round().ne(expected.round()).any()
    assert torch.equal(codes_by_hand(packed, 8), expected.round().clamp(-127, 127).long())


@settings(max_examples=100, deadline=None)
@given(
    code=st.integers(-7, 6),
    scale=st.integers(128, 255),
    power=st.integers(-40, 40),
    ulps=st.integers(-2, 2),
    state_power=st.integers(-30, 30),
)
def test_rounding_next_to_a_tie_is_that_of_the_exact_product(code, scale, power, ulps, state_power):
    """On fractions: the reciprocal of a channel_scale of 8 significant bits, times h in units of state_scale."""
    channel_scale = scale * 2.0**power
    inverse = float32(word(1 / channel_scale))
    scaled = float32(word((code + 0.5) / inverse) + ulps)
    h = torch.tensor([[scaled * 2.0**state_power]])
    scales = torch.tensor([channel_scale]).bfloat16(), torch.tensor([2.0**state_power]).bfloat16()
    assert quant.quantize_codes(h, *scales, 4).item() == round(Fraction(scaled) * Fraction(inverse))


def test_a_product_whose_float32_is_a_tie_is_not_one():
    # 1 / 1.5 in float32 is above 2/3, and the products are above and below the ties 0.5 and 1.5 by less than 2^-25.
    inverse = float32(word(1 / 1.5))
    above, below = 0.75, float32(word(2.25) - 1)
    assert 0.5 < above * inverse < 0.5 + 2**-25 and 1.5 - 2**-23 < below * inverse < 1.5
    assert float32(word(above * inverse)) == 0.5 and float32(word(below * inverse)) < 1.5
    scales = torch.tensor([1.5]).bfloat16(), torch.ones(4).bfloat16()
    h = torch.tensor([[above, -above, below, -below]])
    assert quant.quantize_codes(h, *scales, 4).tolist() == [[1, -1, 1, -1]]


def test_zero_rows_and_zero_states_come_back_as_zeros():
    h = random_state(0, (2, 2, 8, 16))
    h[0, :, 3] = 0
    h[1, 1] = 0
    for scale in (None, torch.ones(2, 16, dtype=torch.bfloat16)):
        for bits in (8, 4, 2):
            packed, channel_scale, state_scale = quant.quantize_state(h, bits, state_scale=scale)
            assert channel_scale.isfinite().all() and state_scale.isfinite().all()
            assert channel_scale[0, :, 3].eq(TINY).all() and channel_scale[1, 1].eq(TINY).all()
            read = quant.dequantize_state(packed, channel_scale, state_scale, bits)
            assert read[0, :, 3].eq(0).all() and read[1, 1].eq(0).all() and read[0, 0, 0].ne(0).any()


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("magnitude", [1e30, 1.0, 1e-30, 1e-37])
def test_one_hot_rows_come_back_at_any_magnitude(bits, magnitude):
    """One value a row and a column: both scales are exact for it but for their rounding to 16 bits."""
    h = torch.eye(16).view(1, 1, 16, 16) * magnitude
    for scale in (None, torch.ones(1, 16, dtype=torch.bfloat16)):
        if scale is not None and magnitude < 1e-29:
            continue  # below TINY in units of state_scale: see the next test
        read = quant.dequantize_state(*quant.quantize_state(h, bits, state_scale=scale), bits)
        assert torch.equal(read.ne(0), h.ne(0))
        # Two bfloat16 scales.
        torch.testing.assert_close(read, h, rtol=2 * BFLOAT16 + 1e-4, atol=0)


def test_calibrated_rows_below_the_smallest_scale_come_back_as_zeros():
    h = torch.full((1, 1, 2, 16), 1e-38)
    packed, channel_scale, state_scale = quant.quantize_state(h, 4, state_scale=torch.ones(1, 16).bfloat16())
    assert channel_scale.eq(TINY).all()
    assert quant.dequantize_state(packed, channel_scale, state_scale, 4).eq(0).all()


# --- against other schemes -----------------------------------------------------------------------------------------


def one_vector_error(h, bits, dim):
    """Mean squared error of symmetric absmax scales along one dimension only, in float64."""
    h = h.double()
    step = h.abs().amax(dim, keepdim=True) / LARGEST[bits]
    return (h - (h / step).round() * step).square().mean()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("seed", range(8))
def test_two_scale_vectors_beat_one_where_both_dimensions_have_outliers(bits, seed):
    h = outer_outliers(seed, 64, 128)
    best = min(one_vector_error(h, bits, -1), one_vector_error(h, bits, -2))
    columns = h.double().square().mean(-2).sqrt()[0].sqrt().bfloat16()  # rms over channels ^ 0.5
    for scale in (None, columns):
        read = quant.dequantize_state(*quant.quantize_state(h, bits, state_scale=scale), bits)
        assert (h.double() - read.double()).square().mean() <= best


@pytest.mark.parametrize(("dstate", "limit"), [(64, 4.6), (128, 4.4)])
def test_bits_per_element(dstate, limit):
    h = random_state(0, (1, 3, 64, dstate))
    parts = quant.quantize_state(h, 4)
    assert 4 < 8 * sum(part.nbytes for part in parts) / h.numel() <= limit


# --- not finite ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_value_that_is_not_finite_comes_back_as_nan_and_stays_in_its_head(bad, bits, stochastic, calibrated):
    clean = random_state(0, (3, 2, 8, 16))
    h = clean.clone()
    h[1, 0, 3, 5] = bad
    scale = torch.ones(2, 16, dtype=torch.bfloat16) if calibrated else None
    rng = quant.new_rng(3, seed=7) if stochastic else None
    packed, channel_scale, state_scale = quant.quantize_state(h, bits, state_scale=scale, rng=rng)
    read = quant.dequantize_state(packed, channel_scale, state_scale, bits)
    assert read[1, 0, 3, 5].isnan() and not read.isinf().any()
    expected = quant.dequantize_state(*quant.quantize_state(clean, bits, state_scale=scale, rng=rng), bits)
    outside = torch.ones(3, 2, dtype=torch.bool)
    outside[1, 0] = False
    assert torch.equal(read[outside], expected[outside])
    # Once more through the recurrence's loop: it stays.
    again = quant.dequantize_state(*quant.quantize_state(read * 0.5, bits, state_scale=scale, rng=rng), bits)
    assert again[1, 0, 3, 5].isnan()
    if calibrated:
        # A row needs nothing from the other rows.
        rows = torch.ones(8, dtype=torch.bool)
        rows[3] = False
        assert torch.equal(read[1, 0, rows], expected[1, 0, rows])
        assert read[1, 0, 3].isnan().all()


def test_codes_under_a_scale_that_is_not_finite_are_defined():
    nan = torch.tensor([math.nan]).bfloat16()
    one = torch.ones(4).bfloat16()
    assert quant.quantize_codes(torch.ones(1, 4), nan, one, 4).tolist() == [[0, 0, 0, 0]]
    h = torch.tensor([[math.nan, math.inf, -math.inf, 1.0]])
    assert quant.quantize_codes(h, one[:1], one, 4).tolist() == [[0, 0, 0, 1]]


# --- int8 rows -----------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@example(seed=105, rows=2, width=1, log=-25)
@given(
    seed=st.integers(0, 9999),
    rows=st.integers(1, 6),
    width=st.integers(1, 70),
    log=st.sampled_from([0, -3, 3, 30, -25]),
)
def test_rows_of_int8(seed, rows, width, log):
    x = random_state(seed, (rows, width), log)
    codes, scale = quant.quantize_rows(x)
    assert codes.dtype == torch.int8 and codes.shape == x.shape
    assert scale.dtype == torch.float32 and scale.shape == (rows, 1)
    exact = x.double().abs().amax(-1, keepdim=True) / 127
    torch.testing.assert_close(scale.double(), exact.clamp(min=quant.TINY_SCALE), rtol=2.0**-23, atol=0)
    assert codes.long().abs().amax(-1, keepdim=True)[exact >= quant.TINY_SCALE].eq(127).all()
    assert ((x.double() / scale.double() - codes.double()).abs() <= 0.5 + FLOAT_SLACK).all()


def test_rows_of_zeros_ties_and_values_that_are_not_finite():
    x = torch.tensor(
        [[0.0, 0, 0, 0], [127, 0.5, 1.5, -2.5], [1, math.nan, 1, 1], [1, math.inf, 1, 1], [1e-38, 0, 0, 0]]
    )
    codes, scale = quant.quantize_rows(x)
    assert codes.tolist()[:2] == [[0, 0, 0, 0], [127, 0, 2, -2]]
    assert codes.tolist()[4] == [0, 0, 0, 0]
    assert scale[0].item() == scale[4].item() == TINY and scale[1].item() == 1
    assert scale[2:4].isnan().all()
    assert (codes[2:4] * scale[2:4]).isnan().all()


def test_rows_of_bfloat16_are_taken_as_float32():
    x = random_state(0, (3, 5, 33)).bfloat16()
    codes, scale = quant.quantize_rows(x)
    wanted_codes, wanted_scale = quant.quantize_rows(x.float())
    assert torch.equal(codes, wanted_codes) and torch.equal(scale, wanted_scale) and scale.shape == (3, 5, 1)


def test_a_product_of_codes_stays_on_its_device(monkeypatch):
    """And is not left to `torch._int_mm`, which on CUDA refuses up to 16 rows."""
    monkeypatch.setattr(torch, "_int_mm", None)
    codes, weights = (torch.zeros(shape, dtype=torch.int8, device="meta") for shape in ((3, 1500), (5, 1500)))
    product = quant.integer_product(codes, weights)
    assert product.device.type == "meta" and product.shape == (3, 5) and product.dtype == torch.int32


@pytest.mark.parametrize("isa", [None, "AVX2"])
def test_a_product_of_codes_is_exact(isa):
    """Also where oneDNN has no VNNI, and pairs of its products saturate at 16 bits, and under autocast."""
    program = """
import torch
from qmamba_compile import quant
generator = torch.Generator().manual_seed(0)
for m, k, o in ((1, 5, 3), (20, 768, 33), (3, 2500, 4)):
    codes = torch.randint(-127, 128, (m, k), generator=generator).to(torch.int8)
    weights = torch.randint(-128, 128, (o, k), generator=generator).to(torch.int8)
    weights[0], codes[0] = -128, 127
    with torch.autocast("cpu"):
        product = quant.integer_product(codes, weights)
    assert product.dtype == torch.int32 and torch.equal(product.long(), codes.long() @ weights.long().t())
"""
    environment = os.environ | ({"ONEDNN_MAX_CPU_ISA": isa} if isa else {})
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
