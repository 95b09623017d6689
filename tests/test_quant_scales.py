"""How scales are measured, against integer arithmetic and the properties that they promise."""

import math
from fractions import Fraction

import pytest
import torch
from by_hand import BFLOAT16, LARGEST, TINY, float32, random_state, word
from hypothesis import given, settings
from hypothesis import strategies as st

from qmamba_compile import quant

# A measured state_scale is from 2^-LIMIT to 2^LIMIT, a column's sum of magnitudes counts as from 2^-BOUND to 2^BOUND,
# and a column more than BAND octaves from what is typical of its head is an outlier.
LIMIT, BOUND, BAND = 32, 60, Fraction(5, 2)

# log2(1 + m) exceeds m, what a float's mantissa adds to it as an integer, by at most this (Mitchell 1962).
MITCHELL = 0.0861


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
