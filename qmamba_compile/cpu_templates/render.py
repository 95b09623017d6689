"""Generated C++ kernels as text; `build` compiles them. The only file of this package that needs jinja2."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import struct
from typing import TYPE_CHECKING

from .. import quant, recurrence
from ..errors import ConfigError

if TYPE_CHECKING:
    import jinja2

KERNELS = ("ssm_update", "quantize_state", "dequantize_state", "ssm_scan", "ssm_scan_backward", "chunk_scan")

FLOAT_KERNELS = ("ssm_update", "ssm_scan", "ssm_scan_backward", "chunk_scan")
"""Those that exist for a float32 state; chunk_scan for no other."""

SCAN_CHUNK = 32
"""Tokens of a chunk of chunk_scan: quadratic work grows with it, traffic of the state shrinks. 2048 tokens, 24 heads
of 64 x 128, one thread of Zen 5, CPU time, median (best): 15.5 ms (14.8) at 32, 19.7 (14.6) at 64, 24.1 (16.4) at 128.
"""

LANES = {"avx512": 16, "avx2": 8, "portable": 4}
"""Floats in one vector of each instruction set. Portable code uses the 16-byte vectors of SSE2 and NEON."""

RINGS = ("bfloat16", "int8", "float32")

CORES = ("intel", "amd")
"""Whose cores the way to memory of a kernel was measured on; other makers' get what is best on Intel's."""

MAX_FLUSH_INTERVAL = 64

MAX_ELEMENTS = 2**16
"""Largest headdim * dstate: 256 KiB of scratch on a thread's stack. Mamba2 models have 2**13 to 2**15."""

_PANEL_BYTES = 24 * 2**10
"""Weight rows that all tokens are multiplied with at a time; with a few tokens they fill a 32 KiB L1 cache."""

_BLOCK = {"avx512": 12, "avx2": 6}
"""Tokens that meet a repacked panel of weights at a time: of the 32 or 16 registers two sums for each of them."""

_BLOCKS_TO_PACK = 3
"""From so many blocks of tokens on, repacking weights pays. Microseconds as they lie / repacked, Xeon with AVX-512 and
VNNI, one thread: 768x3352 518 / 474 at 32 tokens, 578 / 480 at 36; 1536x768 194 / 217 and 214 / 219; 2560x10576 5680 /
4880 at 36. Milliseconds of all linears of the 130M shape with 32-byte vectors, one thread of Zen 4: with vpdpbusd
22 / 20 at 18 tokens, 49 / 38 at 48, 257 / 201 at 256; without it 39 / 40, 95 / 86, 545 / 442."""

_GROUP_BYTES = 3 * 2**17
"""Repacked weights that stay in the L2 cache while all tokens pass by. Milliseconds for 512 tokens, same machine, with
groups of 96, 192, 384 and 768 KiB: 768x50288 72.1, 66.1, 65.6 and 64.2 (by panels of 24 KiB: 73.2); 768x3352 4.98,
4.54, 4.47 and 4.48 (5.11)."""

_CHUNK_BYTES = 2**19
"""Codes of tokens that stay in the L2 cache while all weights pass by."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """What one kernel is compiled for. Batch, nheads, ngroups, strides and input dtypes are arguments of the call.

    Attributes:
        kernel: one of `KERNELS`; the template's name.
        headdim, dstate: extents of one head's state.
        bits: bits of a code; ``None`` is a float32 state (`FLOAT_KERNELS` only), the yardstick of the packed ones.
        dynamic: state_scale is measured at each store; otherwise calibrated and only read.
        stochastic: rounding of the store.
        isa: one of `LANES`.
        flush_interval: steps from one store of the codes to the next (``ssm_update`` only).
        ring: what the inputs since the last store are kept in, one of `RINGS`; None when every step stores.
        vnni: vpdpbusd may be used (with a ring, and not with ``isa="portable"``).
        bf16: vdpbf16ps is used (with a ring of 16 or 8 bits and ``isa="avx512"`` only).
        core: whose cores it is tuned for, one of `CORES` (with a ring only).

    Raises:
        ConfigError: a value that no kernel can be made for.
    """

    kernel: str
    headdim: int
    dstate: int
    bits: int | None
    dynamic: bool = True
    stochastic: bool = False
    isa: str = "avx512"
    flush_interval: int = 1
    ring: str | None = None
    vnni: bool = False
    bf16: bool = False
    core: str = "intel"

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise ConfigError(f"kernel={self.kernel!r} is not known; use one of {KERNELS}")
        if self.isa not in LANES:
            raise ConfigError(f"isa={self.isa!r} is not known; use one of {tuple(LANES)}")
        if self.headdim < 1 or self.dstate < 1 or self.headdim * self.dstate > MAX_ELEMENTS:
            raise ConfigError(
                f"headdim={self.headdim}, dstate={self.dstate}: a head of 1 to {MAX_ELEMENTS} elements is allowed"
            )
        if self.bits is None:
            if self.kernel not in FLOAT_KERNELS or self.dynamic or self.stochastic:
                raise ConfigError(
                    f"bits=None is a float32 state: a kernel of {FLOAT_KERNELS}, dynamic=False, stochastic=False"
                )
        elif self.kernel == "chunk_scan":
            raise ConfigError(f"bits={self.bits} is not allowed: chunk_scan ends in a float32 state; use None")
        elif self.kernel.startswith("ssm_scan"):
            if self.bits not in recurrence.SCAN_BITS:
                raise ConfigError(f"bits={self.bits} is not allowed; use one of {recurrence.SCAN_BITS} or None")
        elif self.bits not in quant.STATE_BITS:
            raise ConfigError(f"bits={self.bits} is not allowed; use one of {quant.STATE_BITS} or None")
        elif not quant.packable(self.dstate, self.bits):
            raise ConfigError(f"dstate={self.dstate} does not fill whole bytes at {self.bits} bits")
        if not 1 <= self.flush_interval <= MAX_FLUSH_INTERVAL:
            raise ConfigError(f"flush_interval={self.flush_interval} is not allowed; use 1 to {MAX_FLUSH_INTERVAL}")
        if self.flush_interval == 1:
            if self.ring is not None:
                raise ConfigError(f"ring={self.ring!r} holds nothing at flush_interval=1; use None")
        elif self.ring not in RINGS or self.kernel != "ssm_update" or self.bits is None:
            raise ConfigError(
                f"flush_interval={self.flush_interval} needs kernel='ssm_update', packed bits and a ring of {RINGS}; "
                f"not {self.kernel!r}, {self.bits} and {self.ring!r}"
            )
        if self.bf16 and not (self.ring in ("bfloat16", "int8") and self.isa == "avx512"):
            raise ConfigError(f"bf16=True is not allowed with ring={self.ring!r} and isa={self.isa!r}")
        _check_tuning(self, f"ring={self.ring!r}")

    @property
    def multiplies_codes(self) -> bool:
        """The products are of integers: `vnni` and `core` are for these kernels only."""
        return self.ring is not None

    def slug(self) -> str:
        """Name of the kernel's function and the beginning of its file's name."""
        words = [self.kernel, f"p{self.headdim}", f"n{self.dstate}"]
        if self.bits is None:
            words.append("float32")
        else:
            words.append(f"b{self.bits}")
            if self.kernel != "dequantize_state":
                words += ["dynamic" if self.dynamic else "calibrated", "stochastic" if self.stochastic else "nearest"]
        if self.flush_interval > 1:
            words += [f"L{self.flush_interval}", str(self.ring)]
        return "_".join([*words, self.isa, *["bf16"] * self.bf16, *_tuning(self)])


MOST_TAPS = 8
"""Of `causal_conv`, whose window of inputs lies in registers."""

LAYER_KERNELS = ("w8a8_linear", "causal_conv", "conv_update")


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What a kernel is compiled for whose extents are all arguments of the call: one library serves every layer.

    Attributes:
        kernel: one of `LAYER_KERNELS`; the template's name.
        isa: one of `LANES`.
        vnni: vpdpbusd may be used (``w8a8_linear``, and not with ``isa="portable"``).
        core: as `Spec.core` (``w8a8_linear`` only).

    Raises:
        ConfigError: a value that no kernel can be made for.
    """

    kernel: str
    isa: str = "avx512"
    vnni: bool = False
    core: str = "intel"

    def __post_init__(self) -> None:
        if self.kernel not in LAYER_KERNELS:
            raise ConfigError(f"kernel={self.kernel!r} is not known; use one of {LAYER_KERNELS}")
        if self.isa not in LANES:
            raise ConfigError(f"isa={self.isa!r} is not known; use one of {tuple(LANES)}")
        _check_tuning(self, repr(self.kernel))

    @property
    def multiplies_codes(self) -> bool:
        """As `Spec.multiplies_codes`."""
        return self.kernel == "w8a8_linear"

    def slug(self) -> str:
        """Name of the kernel's function and the beginning of its file's name."""
        return "_".join([self.kernel, self.isa, *_tuning(self)])


def _check_tuning(spec: Spec | LayerSpec, what: str) -> None:
    """Refuse a core and instructions for which no such kernel is made; ``what`` of ``spec`` decides that."""
    if spec.core not in CORES:
        raise ConfigError(f"core={spec.core!r} is not known; use one of {CORES}")
    if spec.vnni and not (spec.multiplies_codes and spec.isa != "portable"):
        raise ConfigError(f"vnni=True is not allowed with {what} and isa={spec.isa!r}")
    if spec.core != "intel" and not spec.multiplies_codes:
        raise ConfigError(f"core={spec.core!r} is not allowed with {what}, for which no core is told from another")


def _tuning(spec: Spec | LayerSpec) -> list[str]:
    """Words of a slug."""
    return ["vnni"] * spec.vnni + [spec.core] * (spec.core != "intel")


def render(spec: Spec | LayerSpec) -> str:
    """C++ source of the kernel that ``spec`` names."""
    template = _environment().get_template(f"{spec.kernel}.cpp.jinja")
    constants = _constants(spec) if isinstance(spec, Spec) else _layer_constants(spec)
    return template.render(spec=spec, has_state=isinstance(spec, Spec), **constants)


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


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
        "block": _BLOCK.get(spec.isa),
        "blocks_to_pack": _BLOCKS_TO_PACK,
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
