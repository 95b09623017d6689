"""Generated C++ kernels as text; `build` compiles them. The only file of this package that needs jinja2."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import TYPE_CHECKING

from .. import quant
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

SCAN_BITS = (8, 4, 3, 2)
"""Bits of a code inside ssm_scan, whose codes are never packed."""

LANES = {"avx512": 16, "avx2": 8, "portable": 4}
"""Floats in one vector of each instruction set. Portable code uses the 16-byte vectors of SSE2 and NEON."""

MAX_ELEMENTS = 2**16
"""Largest headdim * dstate: 256 KiB of scratch on a thread's stack. Mamba2 models have 2**13 to 2**15."""


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
            if self.bits not in SCAN_BITS:
                raise ConfigError(f"bits={self.bits} is not allowed; use one of {SCAN_BITS} or None")
        elif self.bits not in quant.STATE_BITS:
            raise ConfigError(f"bits={self.bits} is not allowed; use one of {quant.STATE_BITS} or None")
        elif not quant.packable(self.dstate, self.bits):
            raise ConfigError(f"dstate={self.dstate} does not fill whole bytes at {self.bits} bits")

    def slug(self) -> str:
        """Name of the kernel's function and the beginning of its file's name."""
        words = [self.kernel, f"p{self.headdim}", f"n{self.dstate}"]
        if self.bits is None:
            words.append("float32")
        else:
            words.append(f"b{self.bits}")
            if self.kernel != "dequantize_state":
                words += ["dynamic" if self.dynamic else "calibrated", "stochastic" if self.stochastic else "nearest"]
        return "_".join([*words, self.isa])


def render(spec: Spec) -> str:
    """C++ source of the kernel that ``spec`` names."""
    template = _environment().get_template(f"{spec.kernel}.cpp.jinja")
    return template.render(spec=spec, **_constants(spec))


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
        # Half of headdim, rounded up to a power of two.
        "half_headdim": max(1, (1 << (spec.headdim - 1).bit_length()) // 2),
        "rotations": _rotations(lanes),
        "merges": _merges(lanes),
        "chunk": SCAN_CHUNK,
        "unpacks": spec.kernel in ("ssm_update", "dequantize_state"),
        "packs": spec.kernel != "dequantize_state",
        "scratch_bytes": 4 * spec.headdim * runs * -(-run // lanes) * lanes,
    }
    if spec.bits is not None:
        offset = 0 if spec.bits == 8 else 2 ** (spec.bits - 1)
        codes_of_nibbles = [nibble % 2**spec.bits - offset for nibble in range(16)]
        constants |= {
            "largest": quant.max_code(spec.bits),
            "offset": offset,
            "zero_byte": quant.zero_byte(spec.bits),
            "byte_columns": ", ".join(["c"] + [f"c + {index * run}" for index in range(1, runs)]),
            # Sixteen floats fit in one AVX-512 register, which vpermps indexes with four bits of each lane.
            "by_table": spec.kernel == "ssm_update" and spec.isa == "avx512" and spec.bits < 8,
            "table": codes_of_nibbles,
        }
    return constants


def _rotations(lanes: int) -> list[list[int]]:
    """Lane orders that halve a vector step by step: rotation by lanes/2, lanes/4, ..., 1."""
    steps = [lanes >> shift for shift in range(1, lanes.bit_length())]
    return [[(lane + step) % lanes for lane in range(lanes)] for step in steps]


def _merges(lanes: int) -> list[tuple[list[int], list[int]]]:
    """Lanes of two vectors whose halves are added to make one, step by step, until one vector holds the sums of all.

    A vector holds blocks of ``width`` lanes, one for each vector it stands for; each step halves the width.
    """
    merges = []
    for width in (lanes >> shift for shift in range(lanes.bit_length() - 1)):
        blocks = [start + first for first in range(0, lanes, width) for start in (0, lanes)]
        keep = [block + lane for block in blocks for lane in range(width // 2)]
        merges.append((keep, [lane + width // 2 for lane in keep]))
    return merges
