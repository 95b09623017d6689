"""Codes, floats and step sizes worked out without the package, and random states."""

import struct

import torch

LARGEST = {8: 127, 4: 7, 2: 1}
TINY = 2.0**-100

# Largest relative error of rounding to 8 significant bits.
BFLOAT16 = 2.0**-8

# Steps by which |h| / step may exceed what exact arithmetic gives: scales, reciprocals and products are each rounded to
# float32 (half of 2^-23, relative), at most six of them, on codes of up to 127: 127 * 6 * 2^-24 < 5e-5.
FLOAT_SLACK = 5e-5


def random_state(seed, shape, log_scale=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 10.0**log_scale


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


def steps(channel_scale, state_scale):
    """float64 step size of every element, [b, h, p, n]."""
    return channel_scale.double()[..., None] * state_scale.double()[..., None, :]
