"""int8 / int4 / int2 and DSQ arithmetic in plain torch. THE reference: kernels reproduce it bit for bit.

A state is ``h`` [..., p, n] (headdim, dstate) in float32. Its step size is the outer product of two vectors
(decoupled scale quantization, as in Q-Mamba's Eq. 7): ``step[p, n] = channel_scale[p] * state_scale[n]``.
state_scale comes from calibration or from the state itself, channel_scale always from the state.
Codes are symmetric, ``-(2^(b-1)-1) .. 2^(b-1)-1``, and are taken against the *stored* (16-bit) scales, so the
largest magnitude that a scale serves lands on the largest code.

What is defined here to the last bit, because codes feed back into the next step:
    - scales are rounded to bfloat16 before use and are never below ``TINY_SCALE``;
    - division by a scale is multiplication by its float32 reciprocal, first of state_scale, then of channel_scale;
    - rounding to nearest rounds the second product exactly, not its float32: one fused multiply-add;
    - the mean over p is summed by halving, an order that SIMD and GPU code can follow;
    - NaN and infinity turn the scale that serves them into NaN, hence every value read through it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What linears and kernels take."""

SCALE_DTYPE = torch.bfloat16

TINY_SCALE = 2.0**-100
"""Smallest scale. Rows of zeros get it, so that a reciprocal stays finite; values below it round to zero."""

STATE_SCALE_LIMIT = 32
"""A measured state_scale is from 2^-32 to 2^32: h / state_scale stays a normal float32 for h from 2^-90 to 2^90."""

LOG2_BOUNDS = (127 - 60 << 23, 127 + 60 << 23)
"""A column's sum of magnitudes counts as from 2^-60 to 2^60: an empty one must not decide what is typical."""

OUTLIER_LOG2 = 5 << 22
"""How far from the typical magnitude an outlier begins, in 2^-23 of an octave."""

STATE_BITS = (8, 4, 2)

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS = 10
NOISE_TURN = 40503
"""What a step adds to every 16 random bits: 2^16 over the golden ratio, odd, so that 2^16 steps visit every value."""
_MASK32 = 0xFFFFFFFF


def max_code(bits: int) -> int:
    """Largest code of a symmetric grid of ``bits`` bits: 127, 7, 3 (3 bits), 1."""
    return 2 ** (bits - 1) - 1


def packable(dstate: int, bits: int) -> bool:
    """True when ``dstate`` codes of ``bits`` bits fill whole bytes."""
    return dstate * bits % 8 == 0


def packed_width(dstate: int, bits: int) -> int:
    """Bytes that one row of ``dstate`` codes takes."""
    return dstate * bits // 8


def unpacked_width(width: int, bits: int) -> int:
    """dstate of a row that takes ``width`` bytes."""
    return width * 8 // bits


# --- packing -------------------------------------------------------------------------------------------------------


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack int8 codes [..., n] to bytes: int8 [..., n] at 8 bits, uint8 [..., n*bits/8] at 4 and 2.

    A byte of k = 8/bits codes holds n, n + dstate/k, ..., lowest bits first, so that unpacking gives k contiguous
    runs and neither SIMD nor GPU code has to interleave. Codes are stored with an offset of 2^(b-1).

    Raises:
        ValueError: n codes do not fill whole bytes.
    """
    if bits == 8:
        return codes.to(torch.int8)
    dstate = codes.shape[-1]
    if not packable(dstate, bits):
        raise ValueError(f"dstate={dstate} does not fill whole bytes at {bits} bits")
    offset = (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    runs = offset.chunk(8 // bits, dim=-1)
    packed = runs[0]
    for index, run in enumerate(runs[1:], start=1):
        packed = packed | (run << (index * bits))
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`: int8 codes [..., n]."""
    if bits == 8:
        return packed
    mask = 2**bits - 1
    runs = [(packed >> shift) & mask for shift in range(0, 8, bits)]
    return (torch.cat(runs, dim=-1).to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


def zero_byte(bits: int) -> int:
    """The packed byte whose codes are all zero."""
    if bits == 8:
        return 0
    return sum(2 ** (bits - 1) << shift for shift in range(0, 8, bits))


# --- scales --------------------------------------------------------------------------------------------------------


def store_scale(scale: Tensor) -> Tensor:
    """Round a scale to 16 bits: at least `TINY_SCALE`, NaN where it is not finite."""
    stored = scale.clamp(min=TINY_SCALE).to(SCALE_DTYPE)
    return torch.where(stored.isfinite(), stored, torch.full_like(stored, math.nan))


def halving_sum(x: Tensor, dim: int) -> Tensor:
    """Sum over ``dim`` as ``x[:half] + x[half:]``, repeated, zero-padded to a power of two."""
    x = x.movedim(dim, -1)
    size = x.shape[-1]
    width = 1 << max(size - 1, 0).bit_length()
    x = torch.nn.functional.pad(x, (0, width - size))
    while width > 1:
        width //= 2
        x = x[..., :width] + x[..., width:]
    return x[..., 0]


def dynamic_state_scale(h: Tensor) -> Tensor:
    """state_scale [..., n] of ``h`` [..., p, n] from itself: follows the magnitude of a column in half octaves.

    Q-Mamba's Eq. 7 with the two vectors exchanged: the square root of the column's summed magnitude. But an outlier,
    `OUTLIER_LOG2` from what is typical of its head, is followed all the way: a factor on B that C takes back should
    change no code. And only 1 and 1.5 times a power of two: a scale that moves at every step moves all codes of its
    column, and these seldom move.

    Perplexity over the float state, bundled model, all of the held-out text, beside powers of two alone: stored once in
    8 steps +0.131 % (+0.149 %), the same with 20-fold outliers injected +0.171 % (+0.193 %); at every step, stochastic,
    with W8A8 +0.524 % (+0.561 %). Quarters of an octave were no better.

    Logarithms are Mitchell's (1962): the bits of a float32 as an integer, exponent and mantissa being whole part and
    fraction, so that a half is 1.5. Off by 0.086 at most, they move a threshold a little, by the same bits everywhere.
    """
    total = halving_sum(h.abs(), dim=-2)
    log2 = total.view(torch.int32).clamp(*LOG2_BOUNDS)
    typical = (log2 >> 12).sum(dim=-1, keepdim=True, dtype=torch.int32) // h.shape[-1] << 12
    above = log2 - typical
    far = above - above.clamp(-OUTLIER_LOG2, OUTLIER_LOG2)
    halves = (log2 - (127 << 23) + far + (1 << 22) >> 23).clamp(-2 * STATE_SCALE_LIMIT, 2 * STATE_SCALE_LIMIT)
    scale = ((halves << 22) + (127 << 23)).view(torch.float32).to(SCALE_DTYPE)
    return torch.where(total.isfinite(), scale, torch.full_like(scale, math.nan))


def channel_scale_of(h: Tensor, state_scale: Tensor, bits: int) -> Tensor:
    """channel_scale [..., p] that maps each row's largest ``|h / state_scale|`` to the largest code."""
    rows = (h.abs() * state_scale.float().reciprocal()[..., None, :]).amax(dim=-1)
    return store_scale(rows / max_code(bits))


# --- quantization --------------------------------------------------------------------------------------------------


def quantize_codes(
    h: Tensor, channel_scale: Tensor, state_scale: Tensor, bits: int, *, noise: Tensor | None = None
) -> Tensor:
    """int8 codes of ``h`` [..., p, n] on the grid of the two stored scales.

    Args:
        noise: uniform numbers in (0, 1) of h's shape for stochastic rounding; ``None`` rounds half to even.
    """
    scaled, inverse = h * state_scale.float().reciprocal()[..., None, :], channel_scale.float().reciprocal()[..., None]
    # A product of two float32 is exact in float64.
    scaled = scaled.double() * inverse.double() if noise is None else scaled * inverse
    rounded = scaled.round() if noise is None else (scaled + noise).floor()
    largest = max_code(bits)
    # The scale of a non-finite value is NaN and makes it NaN again when read; the code itself must only be defined.
    return torch.where(scaled.isfinite(), rounded.clamp(-largest, largest), 0.0).to(torch.int8)


def quantize_state(
    h: Tensor, bits: int, *, state_scale: Tensor | None = None, rng: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize and pack a float32 state.

    Args:
        h: [b, h, p, n].
        state_scale: calibrated scales [h, n]; ``None`` takes both vectors from ``h``.
        rng: [b, 2] key and step of each sequence, for stochastic rounding; ``None`` rounds to nearest.

    Returns:
        packed [b, h, p, n*bits/8], channel_scale [b, h, p], state_scale ([b, h, n] dynamic, the argument otherwise).
    """
    h = h.float()
    if state_scale is None:
        state_scale = dynamic_state_scale(h)
    channel_scale = channel_scale_of(h, state_scale, bits)
    noise = None if rng is None else uniform_noise(rng, h.shape[1:])
    codes = quantize_codes(h, channel_scale, state_scale, bits, noise=noise)
    return pack(codes, bits), channel_scale, state_scale


def dequantize_state(packed: Tensor, channel_scale: Tensor, state_scale: Tensor, bits: int) -> Tensor:
    """float32 state [..., p, n] of packed codes and their two scales."""
    codes = unpack(packed, bits).float()
    return codes * state_scale.float()[..., None, :] * channel_scale.float()[..., None]


# --- random numbers ------------------------------------------------------------------------------------------------


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC 2011) on int64 tensors that hold 32-bit words; four words each."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_PHILOX_ROUNDS):
        product0 = _wide_product(c0, _PHILOX_MULTIPLIERS[0])
        product1 = _wide_product(c2, _PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = product1[0] ^ c1 ^ k0, product1[1], product0[0] ^ c3 ^ k1, product0[1]
        k0 = (k0 + _PHILOX_KEY_STEPS[0]) & _MASK32
        k1 = (k1 + _PHILOX_KEY_STEPS[1]) & _MASK32
    return c0, c1, c2, c3


def _wide_product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32x32-bit product, in signed 64-bit arithmetic that never overflows."""
    low_part = a * (b & 0xFFFF)
    high_part = a * (b >> 16)
    total = low_part + ((high_part & 0xFFFF) << 16)
    return ((high_part >> 16) + (total >> 32)) & _MASK32, total & _MASK32


def uniform_noise(rng: Tensor, shape: torch.Size | tuple[int, int, int]) -> Tensor:
    """Uniform numbers in (0, 1), float32 [b, h, p, n], that depend on key, step and element, not on the batch slot.

    Each is uniform, so rounding is unbiased; but an element's numbers at successive steps are not independent: they
    turn by the golden ratio from a random start, which is drawn anew every 2^16 steps. A slow state that moves by a
    small part of a step size is so lifted to the next code at even intervals, and its errors do not add up as a random
    walk does. Perplexity over the float state, bundled model, stored at every step, 95 windows of 1024 bytes,
    independent / turning: dynamic +0.63, +0.50 % / +0.49, +0.45 % (two seeds), calibrated +0.61 / +0.42 %, 3 bits +3.6
    / +2.8 %.

    One Philox call gives eight numbers of 16 bits: with ``octant = ceil(n / 8)``, column ``c`` of a row takes counter
    ``row * octant + c % octant``, word ``c // octant // 2``, low half first. So eight runs of a row are contiguous.

    Args:
        rng: int64 [b, 2], key and step of each sequence.
        shape: (nheads, headdim, dstate).
    """
    nheads, headdim, dstate = shape
    octant = (dstate + 7) // 8
    counter = torch.arange(nheads * headdim * octant, device=rng.device).view(1, nheads, headdim, octant)
    key, step = rng[:, 0].view(-1, 1, 1, 1), rng[:, 1].view(-1, 1, 1, 1)
    zero, start = torch.zeros_like(counter * step), step >> 16
    words = philox(
        (counter + zero, zero, (start & _MASK32) + zero, ((start >> 32) & _MASK32) + zero),
        (key & _MASK32, (key >> 32) & _MASK32),
    )
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    columns = (torch.cat(halves, dim=-1)[..., :dstate] + (step & 0xFFFF) * NOISE_TURN) & 0xFFFF
    return (columns.float() + 0.5) * 2.0**-16


def new_rng(batch: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """rng [b, 2] of fresh sequences: the key of a layer and step 0."""
    rng = torch.zeros(batch, 2, dtype=torch.int64, device=device)
    rng[:, 0] = seed
    return rng


# --- int8 linears --------------------------------------------------------------------------------------------------


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and float32 scale of each row of x [..., k], symmetric: the largest magnitude becomes 127.

    Used for weights (per output channel) and for activations (per token). A row with NaN or infinity gets a NaN scale.
    """
    largest = x.float().abs().amax(dim=-1, keepdim=True)
    scale = (largest / max_code(8)).clamp(min=TINY_SCALE)
    scale = torch.where(scale.isfinite(), scale, math.nan)
    # Rows with a finite scale have finite codes, the others' are all NaN. Asking `isfinite` of each code would take
    # longer than all the rest: 0.20 s instead of 0.08 s for an lm_head [50288, 768].
    codes = (x.float() * scale.reciprocal()).round().nan_to_num(nan=0.0)
    return codes.to(torch.int8), scale


def integer_product(codes: Tensor, weights: Tensor) -> Tensor:
    """int32 [m, o] of int8 codes [m, k] and weights [o, k], exact, on any device and for any extents.

    `torch._int_mm` is neither. On CPUs without VNNI pairs of its products saturate at 16 bits (768 products of 127 by
    127 give 97,920 and not 12,387,072); on CUDA it raises for up to 16 rows. Float32 is exact up to 2^24, which 1024
    products of int8 do not exceed.
    """
    product = torch.empty(codes.shape[0], weights.shape[0], dtype=torch.float32, device=codes.device)
    sums = torch.zeros_like(product, dtype=torch.int32)
    for some_codes, some_weights in zip(codes.split(1024, dim=1), weights.split(1024, dim=1), strict=True):
        # Autocast, which would multiply in 16 bits, leaves alone what has a place for its result.
        torch.mm(some_codes.float(), some_weights.float().t(), out=product)
        sums += product.to(torch.int32)
    return sums
