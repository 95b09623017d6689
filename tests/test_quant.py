"""The reference arithmetic against independent float math: nothing expected here comes from the code under test."""

import math
import struct
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qmamba_compile import quant

LARGEST = {8: 127, 4: 7, 2: 1}
TINY = 2.0**-100

# Largest relative error of rounding to 8 significant bits.
BFLOAT16 = 2.0**-8

# Steps by which |h| / step may exceed what exact arithmetic gives: scales, reciprocals and products are each rounded to
# float32 (half of 2^-23, relative), at most six of them, on codes of up to 127: 127 * 6 * 2^-24 < 5e-5.
FLOAT_SLACK = 5e-5

# A measured state_scale is from 2^-LIMIT to 2^LIMIT, a column's sum of magnitudes counts as from 2^-BOUND to 2^BOUND,
# and a column more than BAND octaves from what is typical of its head is an outlier.
LIMIT, BOUND, BAND = 32, 60, Fraction(5, 2)

# log2(1 + m) exceeds m, what a float's mantissa adds to it as an integer, by at most this (Mitchell 1962).
MITCHELL = 0.0861

bits_of_state = st.sampled_from([8, 4, 2])


def random_state(seed, shape, log_scale=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 10.0**log_scale


def outer_outliers(seed, headdim, dstate, factor=20.0):
    """Rows and columns ``factor`` times larger than the rest, as large models have."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(1, 2, headdim, dstate, generator=generator)
    rows = torch.where(torch.rand(headdim, generator=generator) < 0.1, factor, 1.0)
    columns = torch.where(torch.rand(dstate, generator=generator) < 0.1, factor, 1.0)
    rows[0], columns[0] = factor, factor
    return h * rows[:, None] * columns


def unpack_by_hand(packed, bits):
    """Codes of one row of bytes, by integer arithmetic on Python ints."""
    per_byte = 8 // bits
    runs = [[] for _ in range(per_byte)]
    for byte in packed.tolist():
        for position in range(per_byte):
            runs[position].append(byte // 2 ** (bits * position) % 2**bits - 2 ** (bits - 1))
    return [code for run in runs for code in run]


def codes_by_hand(packed, bits):
    """int64 codes [..., n]."""
    if bits == 8:
        return packed.long()
    rows = [unpack_by_hand(row, bits) for row in packed.reshape(-1, packed.shape[-1])]
    return torch.tensor(rows).view(*packed.shape[:-1], -1)


def float32(word):
    """The float32 whose bits are ``word``."""
    return struct.unpack("<f", struct.pack("<i", word))[0]


def word(number):
    """The bits of a float32."""
    return struct.unpack("<i", struct.pack("<f", number))[0]


def half_octaves(totals):
    """Of the measured state_scales of one head whose columns' magnitudes sum to the float32 ``totals``."""
    logs = [min(max(Fraction(word(total), 2**23) - 127, -BOUND), BOUND) for total in totals]
    typical = Fraction(sum(math.floor(log * 2**11) for log in logs) // len(logs), 2**11)
    follows = []
    for log in logs:
        beyond = max(abs(log - typical) - BAND, 0)
        twice = log + (beyond if log > typical else -beyond)  # what the scale follows is half of it
        follows.append(min(max(math.floor(twice + Fraction(1, 2)), -2 * LIMIT), 2 * LIMIT))
    return follows


def scale_at(half_octave):
    """..., 0.75, 1, 1.5, 2, 3, ...: the scale that is ``half_octave`` steps above 1."""
    return (1.5 if half_octave % 2 else 1.0) * 2.0 ** (half_octave // 2)


def steps(channel_scale, state_scale):
    """float64 step size of every element, [b, h, p, n]."""
    return channel_scale.double()[..., None] * state_scale.double()[..., None, :]


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


# --- scales --------------------------------------------------------------------------------------------------------


def test_scales_are_bfloat16_rounded_to_nearest_and_never_below_tiny():
    # 8 significant bits: 1 + 3/256 lies between 1 + 1/128 and 1 + 2/128, a tie that goes to the even one.
    wanted = {1.0: 1.0, 1 + 3 / 256: 1 + 4 / 256, 1 + 1 / 256: 1.0, 1e-40: TINY, 0.0: TINY, TINY: TINY, -1.0: TINY}
    stored = quant.store_scale(torch.tensor(list(wanted)))
    assert stored.dtype == torch.bfloat16
    assert stored.tolist() == list(wanted.values())
    assert quant.store_scale(torch.tensor([math.nan, math.inf, 3.4e38])).isnan().all()
    # A magnitude that 16-bit floats with a short exponent cannot hold.
    assert quant.store_scale(torch.tensor(1e20)).item() == pytest.approx(1e20, rel=BFLOAT16)
    assert quant.TINY_SCALE == TINY


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 140), seed=st.integers(0, 999))
def test_halving_sum_adds_halves(size, seed):
    x = random_state(seed, (3, size))
    assert torch.allclose(quant.halving_sum(x, dim=-1).double(), x.double().sum(-1), rtol=0, atol=1e-4)

    # The exact order, on Python floats that are rounded to float32 at each addition.
    def add(a, b):
        return torch.tensor(a + b, dtype=torch.float32).item()

    values = x[0].tolist()
    width = 1
    while width < size:
        width *= 2
    values += [0.0] * (width - size)
    while len(values) > 1:
        half = len(values) // 2
        values = [add(values[i], values[i + half]) for i in range(half)]
    assert quant.halving_sum(x, dim=-1)[0].item() == values[0]


def with_outliers(seed, shape, log):
    """A random state of which some columns are larger or smaller by orders of magnitude, and some empty."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.exp2(torch.randint(-20, 21, shape[-1:], generator=generator) * 1.5)
    kind = torch.rand(shape[-1], generator=generator)
    columns = torch.where(kind < 0.7, 1.0, columns) * (kind < 0.95)
    return random_state(seed, shape, log) * columns


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), headdim=st.integers(1, 12), quarter=st.integers(1, 16), log=st.integers(-20, 20))
def test_measured_scales_follow_the_square_root_of_a_column_and_outliers_all_the_way(seed, headdim, quarter, log):
    h = with_outliers(seed, (2, 3, headdim, 4 * quarter), log)
    exact = h.double().abs()
    logs = exact.sum(-2).log2().clamp(-BOUND, BOUND)
    above = logs - logs.mean(-1, keepdim=True)
    wanted = ((logs + above - above.clamp(-float(BAND), float(BAND))) / 2).clamp(-LIMIT, LIMIT)
    for bits in (8, 4, 2):
        packed, channel_scale, state_scale = quant.quantize_state(h, bits)
        assert channel_scale.dtype == state_scale.dtype == torch.bfloat16
        assert channel_scale.shape == (2, 3, headdim) and state_scale.shape == (2, 3, 4 * quarter)
        mantissa, power = torch.frexp(state_scale.float())
        assert (mantissa.eq(0.5) | mantissa.eq(0.75)).all()
        found = power - 1 + (2 * mantissa - 1)  # 1.5 is half an octave
        # Half a step, an outlier's logarithm, half the typical one, and 2^-11 by which that is rounded down twice.
        assert ((found - wanted).abs() <= 0.25 + 1.5 * MITCHELL + 2.0**-11 + 1e-5).all()
        relative = exact / state_scale.double()[..., None, :]
        # One rounding to bfloat16; float32 noise is far below it.
        expected = (relative.amax(-1) / LARGEST[bits]).clamp(min=TINY)
        torch.testing.assert_close(channel_scale.double(), expected, rtol=BFLOAT16 + 1e-6, atol=0)
        assert packed.shape == (2, 3, headdim, 4 * quarter * bits // 8)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 9999), headdim=st.integers(1, 140), dstate=st.integers(1, 20), log=st.integers(-44, 36))
def test_measured_scales_are_those_of_integer_arithmetic(seed, headdim, dstate, log):
    h = with_outliers(seed, (headdim, dstate), log)
    sums = quant.halving_sum(h.abs(), dim=0)  # see test_halving_sum_adds_halves
    expected = [
        scale_at(half_octave) if math.isfinite(total) else math.nan
        for total, half_octave in zip(sums.tolist(), half_octaves(sums.tolist()), strict=True)
    ]
    torch.testing.assert_close(quant.dynamic_state_scale(h).tolist(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("headdim", [1, 3, 64])
@pytest.mark.parametrize("others", [[], [1.0], [1.0] * 4, [2.0**20, 1.5 * 2.0**22], [0.0, 2.0**-40, 7.0]], ids=str)
def test_a_measured_scale_changes_at_the_thresholds_of_its_definition(headdim, others):
    """The last column of a head grows: at the sum where its scale changes, and one unit of the last place below it."""

    def follows(bits):
        return half_octaves([*others, float32(bits)])[-1]

    lowest, highest = 0, word(2.0**BOUND)
    steps_up = range(follows(lowest) + 1, follows(highest) + 1)
    assert len(steps_up) >= 60
    for half_octave in steps_up:
        below, at = lowest, highest
        while at - below > 1:
            middle = (below + at) // 2
            below, at = (below, middle) if follows(middle) >= half_octave else (middle, at)
        for bits in (below, at):
            totals = [*others, float32(bits)]
            # One value a column, of either sign, the rest zeros.
            h = torch.zeros(headdim, len(totals))
            for column, total in enumerate(totals):
                h[column % headdim, column] = total * (-1) ** column
            scales = [scale_at(step) for step in half_octaves(totals)]
            assert quant.dynamic_state_scale(h).tolist() == scales
            assert scales[-1] == scale_at(half_octave - (bits == below))


@pytest.mark.parametrize("headdim", [1, 2, 7, 80])
@pytest.mark.parametrize("dstate", [1, 5, 16])
def test_equal_columns_get_the_square_root_of_their_sum(headdim, dstate):
    """What is typical is then what each has: from 1.5 * 2^(k - 1) to below 1.5 * 2^k the scale is k half octaves."""
    for k in range(-BOUND + 1, BOUND):
        first = 1.5 * 2.0 ** (k - 1)
        for total, half_octave in ((first, k), (float32(word(first) - 1), k - 1)):
            h = torch.zeros(headdim, dstate)
            h[-1] = total
            assert quant.dynamic_state_scale(h).tolist() == [scale_at(half_octave)] * dstate


@pytest.mark.parametrize("sign", [1, -1])
def test_a_scale_follows_a_column_by_half_inside_the_band_and_all_the_way_outside(sign):
    def scale_of(octaves):
        h = random_state(0, (64, 1)).repeat(1, 8)
        h[:, 5] *= 2.0 ** (sign * octaves)
        return quant.dynamic_state_scale(h)[5].item()

    assert scale_of(0) == 8 and scale_of(1) == {1: 12, -1: 6}[sign]  # half an octave
    assert scale_of(2) == scale_of(0) * 2.0 ** (sign * 1)
    # 16 octaves more, of which what is typical, the mean over 8 columns, takes 2, and half of those count.
    assert scale_of(24) == scale_of(8) * 2.0 ** (sign * 15)


def test_measured_scales_have_limits_and_empty_columns_do_not_decide_what_is_typical():
    tiny, smallest, largest = 2.0**-BOUND, 2.0**-LIMIT, 2.0**LIMIT
    for empty in (0.0, 1e-45, -1e-39, 1e-20):
        assert quant.dynamic_state_scale(torch.full((1, 3), empty)).tolist() == [tiny**0.5] * 3
        # As far apart as columns can be.
        assert quant.dynamic_state_scale(torch.tensor([[empty] * 99 + [3e38]]))[-1] == largest
        assert quant.dynamic_state_scale(torch.tensor([[3e38] * 99 + [empty]])).tolist() == [2.0**30] * 99 + [smallest]
        # 5 empty columns of 128 move what is typical by 2.3 octaves at most.
        found = quant.dynamic_state_scale(torch.tensor([[1.0] * 123 + [empty] * 5]))
        assert found.tolist() == [1.0] * 123 + [smallest] * 5


@pytest.mark.parametrize("bad", [[math.nan, 0.0], [math.inf, 1.0], [1.0, -math.inf], [3e38, 3e38]], ids=str)
def test_only_a_column_that_is_not_finite_gets_nan(bad):
    """[3e38, 3e38]: finite values whose sum is not."""
    h = torch.ones(2, 33)
    h[:, 7] = torch.tensor(bad)
    others = torch.arange(33) != 7
    scales = quant.dynamic_state_scale(h)
    assert scales[7].isnan() and scales[others].eq(1.5).all()  # of a sum of 2: half an octave


def test_measured_scales_are_found_by_column_sums_in_halves():
    """Kernels sum in that order: where the sum is next to a threshold, another order gives another scale."""
    threshold = 0.75  # of heads of one column: a scale of 0.75 below it, of 1 from it on
    magnitude = torch.rand(1000, 16, generator=torch.Generator().manual_seed(0)) * threshold / 8  # columns, as rows
    magnitude[:, 15] = (threshold - magnitude[:, :15].double().sum(-1)).abs().float()
    halves = magnitude
    while halves.shape[-1] > 1:
        first, second = halves.reshape(1000, 2, -1).unbind(1)
        halves = first + second
    in_sequence = magnitude[:, :1]
    for column in range(1, 16):
        in_sequence = in_sequence + magnitude[:, column : column + 1]
    expected, other = (torch.where(sums < threshold, 0.75, 1.0) for sums in (halves, in_sequence))
    assert not torch.equal(expected, other)
    _, _, state_scale = quant.quantize_state(magnitude[None, ..., None], 8)
    assert torch.equal(state_scale[0].float(), expected)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), headdim=st.integers(1, 12), quarter=st.integers(1, 16), log=st.integers(-20, 20))
def test_calibrated_channel_scales_serve_the_largest_of_a_row(seed, headdim, quarter, log):
    h = random_state(seed, (2, 3, headdim, 4 * quarter), log)
    given_scale = (random_state(seed + 1, (3, 4 * quarter)).abs() + 0.1).bfloat16()
    for bits in (8, 4, 2):
        _, channel_scale, state_scale = quant.quantize_state(h, bits, state_scale=given_scale)
        assert torch.equal(state_scale, given_scale) and state_scale.dtype == torch.bfloat16
        assert channel_scale.dtype == torch.bfloat16 and channel_scale.shape == (2, 3, headdim)
        expected = (h.double().abs() / given_scale.double()[:, None, :]).amax(-1) / LARGEST[bits]
        torch.testing.assert_close(channel_scale.double(), expected, rtol=BFLOAT16 + 1e-6, atol=0)


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


# --- random numbers ------------------------------------------------------------------------------------------------


def philox_by_hand(counter, key):
    """Philox4x32-10 from its definition, on Python ints."""
    c, k = list(counter), list(key)
    for round_ in range(10):
        if round_:
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 % 2**32, (p0 >> 32) ^ c[3] ^ k[1], p0 % 2**32]
    return c


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    # Random123's kat_vectors.
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_vectors(counter, key, expected):
    words = quant.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert [word.item() for word in words] == expected
    assert philox_by_hand(counter, key) == expected


@settings(max_examples=40, deadline=None)
@given(
    key=st.integers(0, 2**63 - 1), step=st.integers(0, 2**63 - 1), dstate=st.integers(1, 40), headdim=st.integers(1, 3)
)
def test_noise_is_the_documented_function_of_key_step_and_element(key, step, dstate, headdim):
    noise = quant.uniform_noise(torch.tensor([[key, step]]), (2, headdim, dstate))
    assert noise.shape == (1, 2, headdim, dstate) and noise.dtype == torch.float32
    octant = -(-dstate // 8)
    for row in range(2 * headdim):
        for c in range(dstate):
            counter = (row * octant + c % octant, 0, (step >> 16) % 2**32, step >> 48)
            word = philox_by_hand(counter, (key % 2**32, key >> 32))[c // octant // 2]
            half = word >> 16 if c // octant % 2 else word % 2**16
            half = (half + step * 40503) % 2**16
            assert noise[0, row // headdim, row % headdim, c].item() == (half + 0.5) / 65536


def test_noise_is_uniform_inside_the_open_interval():
    rng = torch.stack([torch.arange(64), torch.arange(64) * 3], dim=1)
    noise = quant.uniform_noise(rng, (4, 16, 64)).double()
    assert noise.min() > 0 and noise.max() < 1
    # Standard errors of mean and variance of 262,144 uniform numbers; four of them. Fixed keys: no flakiness.
    assert abs(noise.mean() - 0.5) < 4 * (1 / 12) ** 0.5 / noise.numel() ** 0.5
    assert abs(noise.var() - 1 / 12) < 4 * (1 / 180) ** 0.5 / noise.numel() ** 0.5
    # Each of the eight runs of a row by itself, and neighbours unrelated.
    for run in noise.view(-1, 8, 8).unbind(1):
        assert abs(run.mean() - 0.5) < 4 * (1 / 12) ** 0.5 / run.numel() ** 0.5
    flat = noise.flatten() - 0.5
    assert abs((flat[1:] * flat[:-1]).mean()) < 4 / 12 / flat.numel() ** 0.5


def test_noise_depends_on_step_key_and_element_but_not_on_the_batch_slot():
    rng = torch.tensor([[5, 9], [5, 10], [6, 9], [5, 9], [5 + 2**32, 9], [5, 9 + 2**32]])
    noise = quant.uniform_noise(rng, (2, 3, 16))
    assert torch.equal(noise[0], noise[3])
    assert torch.equal(noise, quant.uniform_noise(rng, (2, 3, 16)))
    assert torch.equal(noise[2:3], quant.uniform_noise(rng[2:3], (2, 3, 16)))
    for a, b in [(0, 1), (0, 2), (1, 2), (0, 4), (0, 5), (4, 5)]:
        # 96 pairs of 16-bit numbers: an equal pair has a chance of 1 in 700, for fixed keys once and for all.
        assert noise[a].ne(noise[b]).all(), (a, b)
    assert noise[0].unique().numel() == 96


def test_noise_visits_the_interval_evenly_over_the_steps_and_starts_anew_after_them():
    noise = torch.cat([quant.uniform_noise(torch.tensor([[7, step]]), (1, 2, 16)) for step in range(64)])
    # A turn by the golden ratio leaves no gap of more than 2.7 steps' share; 64 independent numbers leave 6 on average.
    gaps = noise.sort(dim=0).values.diff(dim=0)
    assert gaps.max() < 2.7 / 64
    assert noise[0].unique().numel() == 32
    first, again = (quant.uniform_noise(torch.tensor([[7, step]]), (1, 2, 16)) for step in (0, 2**16))
    assert first.ne(again).all()


def test_a_slow_state_keeps_its_mean_under_turning_noise():
    """h moves by a twentieth of a step size at every step, as in a head that remembers long."""
    one = torch.ones(1, dtype=quant.SCALE_DTYPE), torch.ones(64, dtype=quant.SCALE_DTYPE)
    drift, steps, h = 0.05, 100, torch.zeros(1, 64)
    for step in range(steps):
        noise = quant.uniform_noise(torch.tensor([[3, step]]), (1, 1, 64))[0, 0]
        h = quant.quantize_codes(h + drift, *one, 4, noise=noise).float()
    # Independent noise scatters by sqrt(100 * 0.05 * 0.95) = 2.2; this one stays within one code.
    assert (h - drift * steps).abs().max() <= 1


def test_new_rng_starts_at_step_zero_with_the_seed_as_key():
    assert quant.new_rng(3, seed=11).tolist() == [[11, 0]] * 3
    assert quant.new_rng(1, seed=2**32 - 1).dtype == torch.int64


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("calibrated", [False, True])
def test_stochastic_rounding_is_unbiased(bits, calibrated):
    keys = 2000
    h = random_state(1, (1, 1, 4, 16))
    scale = torch.linspace(0.5, 2, 16).bfloat16()[None] if calibrated else None
    rng = torch.stack([torch.arange(keys) * 977, torch.arange(keys)], dim=1)
    packed, channel_scale, state_scale = quant.quantize_state(
        h.expand(keys, -1, -1, -1), bits, state_scale=scale, rng=rng
    )
    step = steps(channel_scale, state_scale)[0]
    codes = codes_by_hand(packed, bits).double()
    exact = (h.double() / step)[0]
    # Values beyond the largest code (by the rounding of the scale to 16 bits) are clamped, hence biased, by design.
    inside = exact.abs() <= LARGEST[bits]
    assert inside.float().mean() > 0.75
    fraction = exact - exact.floor()
    # A rounded-up code is a coin of probability `fraction`; 16-bit noise moves that by at most 2^-17 and float32 by
    # less than 2^-15. Five standard errors: one in a million for each of 64 elements, and the keys are fixed.
    error = (codes.mean(0) - exact).abs()
    limit = 5 * (fraction * (1 - fraction) / keys).sqrt() + 2.0**-14
    assert (error[inside] <= limit[inside]).all()
    # All elements together, a test 8 times sharper: the mean of the errors over elements and keys.
    total = (codes.mean(0) - exact)[inside].mean().abs()
    assert total <= 5 * ((fraction * (1 - fraction))[inside].sum() / keys).sqrt() / inside.sum() + 2.0**-14
    # And it is a coin: neighbours of the exact value only, both of them where the value is not on the grid.
    assert ((codes - exact).abs() < 1 + FLOAT_SLACK).all()
    middling = inside & (fraction > 0.1) & (fraction < 0.9)
    assert middling.any() and (codes.amax(0) - codes.amin(0))[middling].eq(1).all()


def test_stochastic_rounding_is_reproducible_and_differs_across_steps_and_keys():
    h = random_state(2, (1, 2, 16, 32)).expand(5, -1, -1, -1)
    rng = torch.tensor([[1, 0], [1, 1], [2, 0], [1, 0], [1, 2**32]])
    packed, _, _ = quant.quantize_state(h, 4, rng=rng)
    assert torch.equal(packed, quant.quantize_state(h, 4, rng=rng)[0])
    assert torch.equal(packed[0], packed[3])
    # Alone, a sequence gets what it gets in a batch.
    assert torch.equal(packed[2:3], quant.quantize_state(h[2:3], 4, rng=rng[2:3])[0])
    for a, b in [(0, 1), (0, 2), (1, 2), (0, 4)]:
        different = codes_by_hand(packed[a], 4).ne(codes_by_hand(packed[b], 4)).double().mean()
        # Two independent coins of probability f differ with 2 f (1 - f), one third on average over f; those of two
        # successive steps with 2 min(f, 1 - f, 0.382), which is 0.47.
        low, high = (0.35, 0.6) if (a, b) == (0, 1) else (0.2, 0.45)
        assert low < different < high
    assert not torch.equal(packed[0], quant.quantize_state(h, 4)[0][0])


def test_values_on_the_grid_stay_where_they_are_under_noise():
    codes = torch.arange(-7, 8).float()[None]
    one = torch.ones(1).bfloat16(), torch.ones(15).bfloat16()
    for noise in (0.5 / 65536, 0.5, 65535.5 / 65536):
        found = quant.quantize_codes(codes, *one, 4, noise=torch.full((1, 15), noise))
        assert found.tolist() == codes.to(torch.int8).tolist()


def test_noise_that_reaches_the_next_code_exactly_rounds_up():
    h = torch.tensor([[-1.5, -0.5, 0.5, 1.5, 2.5, 0.25]])
    one = torch.ones(1).bfloat16(), torch.ones(6).bfloat16()
    noise = torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.5, 0.75]])
    assert quant.quantize_codes(h, *one, 4, noise=noise).tolist() == [[-1, 0, 1, 2, 3, 1]]


# --- int8 rows -----------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
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
    torch.testing.assert_close(scale.double(), x.double().abs().amax(-1, keepdim=True) / 127, rtol=2.0**-23, atol=0)
    assert codes.long().abs().amax(-1).eq(127).all()
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
