"""Generated C++ kernels as text; `build` compiles them."""

from __future__ import annotations

import pathlib
import struct

from .. import quant, recurrence
from ..generated_code import templates
from .specs import LANES, MOST_TAPS, LayerSpec, Spec

SCAN_CHUNK = 32
"""Tokens of a chunk of chunk_scan: quadratic work grows with it, traffic of the state shrinks. 2048 tokens, 24 heads
of 64 x 128, one thread of Zen 5, CPU time, median (best): 15.5 ms (14.8) at 32, 19.7 (14.6) at 64, 24.1 (16.4) at 128.
"""

_PANEL_BYTES = 24 * 2**10
"""Weight rows that all tokens are multiplied with at a time; with a few tokens they fill a 32 KiB L1 cache."""

_BLOCK = {"avx512": 12, "avx2": 6, "amx": 32}
"""Tokens that meet a repacked panel of weights at a time: of the 32 or 16 registers two sums for each of them; of eight
tiles four hold sums of 16 tokens and 16 rows."""

_BLOCKS_TO_PACK = 3
"""From so many blocks of tokens on, repacking weights pays. Microseconds as they lie / repacked, Xeon with AVX-512 and
VNNI, one thread: 768x3352 518 / 474 at 32 tokens, 578 / 480 at 36; 1536x768 194 / 217 and 214 / 219; 2560x10576 5680 /
4880 at 36. Milliseconds of all linears of the 130M shape with 32-byte vectors, one thread of Zen 4: with vpdpbusd
22 / 20 at 18 tokens, 49 / 38 at 48, 257 / 201 at 256; without it 39 / 40, 95 / 86, 545 / 442. With tiles, whose times
nobody has measured yet, from one block of 32 tokens on."""

_GROUP_BYTES = 3 * 2**17
"""Repacked weights that stay in the L2 cache while all tokens pass by. Milliseconds for 512 tokens, same machine, with
groups of 96, 192, 384 and 768 KiB: 768x50288 72.1, 66.1, 65.6 and 64.2 (by panels of 24 KiB: 73.2); 768x3352 4.98,
4.54, 4.47 and 4.48 (5.11)."""

_CHUNK_BYTES = 2**19
"""Codes of tokens that stay in the L2 cache while all weights pass by."""


def render(spec: Spec | LayerSpec) -> str:
    """C++ source of the kernel that ``spec`` names."""
    template = templates(pathlib.Path(__file__).parent).get_template(f"{spec.kernel}.cpp.jinja")
    constants = _constants(spec) if isinstance(spec, Spec) else _layer_constants(spec)
    return template.render(spec=spec, has_state=isinstance(spec, Spec), **constants)


def _constants(spec: Spec) -> dict[str, object]:
    lanes = LANES[spec.isa]
    runs = 1 if spec.bits is None or spec.kernel.startswith("ssm_scan") else 8 // spec.bits
    run = spec.dstate // runs
    constants: dict[str, object] = {
        "lanes": lanes,
        "runs": runs,
        "run": run,
        "by_table": False,
        "log2_bounds": quant.LOG2_BOUNDS,
        "outlier_log2": quant.OUTLIER_LOG2,
        "scale_limit": quant.STATE_SCALE_LIMIT,
        # Half of headdim, rounded up to a power of two.
        "half_headdim": max(1, (1 << (spec.headdim - 1).bit_length()) // 2),
        "rotations": _rotations(lanes),
        "merges": _merges(lanes),
        "chunk": SCAN_CHUNK,
        "unpacks": spec.kernel in ("ssm_update", "dequantize_state"),
        "packs": spec.kernel != "dequantize_state",
        "scratch_bytes": 4 * spec.headdim * runs * -(-run // lanes) * lanes,
        "exp": {name: _literals(values) for name, values in recurrence.EXP_CONSTANTS.items()},
        "slots": spec.flush_interval - 1,
    }
    if spec.ring is not None:
        constants |= _ring_constants(spec)
    if spec.bits is not None:
        offset = 0 if spec.bits == 8 else 2 ** (spec.bits - 1)
        codes_of_nibbles = [nibble % 2**spec.bits - offset for nibble in range(16)]
        constants |= {
            "largest": quant.max_code(spec.bits),
            "offset": offset,
            "zero_byte": quant.zero_byte(spec.bits),
            "noise_turn": quant.NOISE_TURN,
            "byte_columns": ", ".join(["c"] + [f"c + {index * run}" for index in range(1, runs)]),
            # Sixteen floats fit in one AVX-512 register, which vpermps indexes with four bits of each lane.
            "by_table": spec.kernel == "ssm_update" and spec.isa == "avx512" and spec.bits < 8,
            "table": codes_of_nibbles,
        }
    return constants


def _ring_constants(spec: Spec) -> dict[str, object]:
    lanes, bits = LANES[spec.isa], spec.bits
    assert bits is not None
    largest_code = 2**bits - 1
    return {
        "ring_type": {"bfloat16": "uint16_t", "int8": "int8_t", "float32": "float"}[str(spec.ring)],
        "ring_bytes": {"bfloat16": 2, "int8": 1, "float32": 4}[str(spec.ring)],
        "read_offset": 2 ** (bits - 1),
        "code_mask": f"{largest_code * (0x01010101 if spec.vnni else 0x10001):#010x}u",
        # No sum of dstate products leaves 32 bits; and vpdpbusd takes C as two signed bytes, 127 * 256 + 127 at most.
        "C_limit": min(32639 if spec.vnni else 32767, (2**31 - 1) // (largest_code * spec.dstate)),
        "even_shorts": _in_lines(range(0, 4 * lanes, 2)),
        "odd_shorts": _in_lines(range(1, 4 * lanes, 2)),
    }


def _in_lines(numbers: range) -> str:
    """Sixteen a line."""
    return (",\n" + 16 * " ").join(
        ", ".join(map(str, numbers[begin : begin + 16])) for begin in range(0, len(numbers), 16)
    )


def _literals(values: float | tuple[float, ...]) -> str | list[str]:
    """float32 literals of C++ that mean exactly what torch makes of a Python number."""
    if isinstance(values, tuple):
        return [str(_literals(value)) for value in values]
    text = f"{struct.unpack('f', struct.pack('f', values))[0]:.9g}"
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"


def _layer_constants(spec: LayerSpec) -> dict[str, object]:
    lanes = LANES[spec.isa]
    return {
        "lanes": lanes,
        "slots": 0,
        "rotations": _rotations(lanes),
        "merges": _merges(lanes),
        "step": 4 * lanes if spec.vnni else 2 * lanes if spec.isa != "portable" else 16,
        # 16 sums, 4 rows of weights and a token fill the 32 registers of AVX-512; the others have 16.
        "rows": 4,
        "tokens": 4 if spec.isa == "avx512" else 2,
        "panel_bytes": _PANEL_BYTES,
        "chunk_bytes": _CHUNK_BYTES,
        "block": _BLOCK.get("amx" if spec.amx else spec.isa),
        "blocks_to_pack": 1 if spec.amx else _BLOCKS_TO_PACK,
        "group_bytes": _GROUP_BYTES,
        **_transposition(lanes),
        "tiny_scale": repr(quant.TINY_SCALE),
        "most_taps": MOST_TAPS,
    }


def _transposition(lanes: int) -> dict[str, list[list[int]]]:
    """Lane orders of conv_update, where a vector holds four taps of each of ``lanes / 4`` channels.

    ``shifts[i]`` moves the taps of vector i by one and takes the new ones from a vector with one for each channel;
    ``by_taps`` makes of two vectors one with their taps 0 and 1, and one with 2 and 3; ``halves`` joins such vectors.
    """
    channels, half = range(lanes // 4), lanes // 2
    return {
        "shifts": [
            [lane + 1 if lane % 4 < 3 else lanes + i * len(channels) + lane // 4 for lane in range(lanes)]
            for i in range(4)
        ],
        "by_taps": [
            [4 * channel + vector * lanes + tap for tap in taps for vector in (0, 1) for channel in channels]
            for taps in ((0, 1), (2, 3))
        ],
        "halves": [[begin + lane + vector * lanes for vector in (0, 1) for lane in range(half)] for begin in (0, half)],
    }


def _rotations(lanes: int) -> list[list[int]]:
    """Lane orders that halve a vector step by step: rotation by lanes/2, lanes/4, ..., 1."""
    steps = [lanes >> shift for shift in range(1, lanes.bit_length())]
    return [[(lane + step) % lanes for lane in range(lanes)] for step in steps]


def _merges(lanes: int) -> list[tuple[list[int], list[int]]]:
    """Lanes of two vectors whose halves are added to make one, step by step, until one vector holds the sums of all.

    A vector holds blocks of lanes, one for each vector it stands for; each step halves the blocks. What is kept stays
    in its lane, the first half of a block of one vector and the second half of the other: a blend, since x86 does only
    one shuffle a cycle.
    """
    merges = []
    for half in (lanes >> shift for shift in range(1, lanes.bit_length())):
        of_second = [lane % (2 * half) >= half for lane in range(lanes)]
        keep = [lane + lanes if second else lane for lane, second in enumerate(of_second)]
        add = [lane - half + lanes if second else lane + half for lane, second in enumerate(of_second)]
        merges.append((keep, add))
    return merges
