"""Stochastic rounding: the random numbers, and what they do to codes."""

import pytest
import torch
from by_hand import FLOAT_SLACK, LARGEST, codes_by_hand, random_state, steps
from hypothesis import given, settings
from hypothesis import strategies as st

from qmamba_compile import quant


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
