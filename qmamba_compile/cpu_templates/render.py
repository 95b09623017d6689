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

KERNELS = ("ssm_update", "quantize_state", "dequantize_state")

LANES = {"avx512": 16, "avx2": 8, "portable": 4}
"""Floats in one vector of each instruction set. Portable code uses the 16-byte vectors of SSE2 and NEON."""

MAX_ELEMENTS = 2**16
"""Largest headdim * dstate: 256 KiB of scratch on a thread's stack. Mamba2 models have 2**13 to 2**15."""

_PANEL_BYTES = 24 * 2**10
"""Weight rows that all tokens are multiplied with at a time; with a few tokens they fill a 32 KiB L1 cache."""

_CHUNK_BYTES = 2**19
"""Codes of tokens that stay in the L2 cache while all weights pass by."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """What one kernel is compiled for. Batch, nheads, ngroups, strides and input dtypes are arguments of the call.

    Attributes:
        kernel: one of `KERNELS`; the template's name.
        headdim, dstate: extents of one head's state.
        bits: bits of a code; ``None`` is a float32 state (``ssm_update`` only), the yardstick of the packed ones.
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
            if self.kernel != "ssm_update" or self.dynamic or self.stochastic:
                raise ConfigError("bits=None is a float32 state: kernel='ssm_update', dynamic=False, stochastic=False")
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


LAYER_KERNELS = ("w8a8_linear", "conv_update")


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What a kernel is compiled for whose extents are all arguments of the call: one library serves every layer.

    Attributes:
        kernel: one of `LAYER_KERNELS`; the template's name.
        isa: one of `LANES`.
        vnni: vpdpbusd may be used (``w8a8_linear`` with ``isa="avx512"`` only).

    Raises:
        ConfigError: a value that no kernel can be made for.
    """

    kernel: str
    isa: str = "avx512"
    vnni: bool = False

    def __post_init__(self) -> None:
        if self.kernel not in LAYER_KERNELS:
            raise ConfigError(f"kernel={self.kernel!r} is not known; use one of {LAYER_KERNELS}")
        if self.isa not in LANES:
            raise ConfigError(f"isa={self.isa!r} is not known; use one of {tuple(LANES)}")
        if self.vnni and (self.kernel, self.isa) != ("w8a8_linear", "avx512"):
            raise ConfigError(f"vnni=True is not allowed with {self.kernel!r} and isa={self.isa!r}")

    def slug(self) -> str:
        """Name of the kernel's function and the beginning of its file's name."""
        return f"{self.kernel}_{self.isa}{'_vnni' if self.vnni else ''}"


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
    runs = 1 if spec.bits is None else 8 // spec.bits
    run = spec.dstate // runs
    constants: dict[str, object] = {
        "lanes": lanes,
        "runs": runs,
        "run": run,
        "by_table": False,
        # Half of headdim, rounded up to a power of two.
        "half_headdim": max(1, (1 << (spec.headdim - 1).bit_length()) // 2),
        "rotations": _rotations(lanes),
        "unpacks": spec.kernel != "quantize_state",
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


def _layer_constants(spec: LayerSpec) -> dict[str, object]:
    lanes = LANES[spec.isa]
    return {
        "lanes": lanes,
        "rotations": _rotations(lanes),
        "step": 64 if spec.vnni else 2 * lanes if spec.isa != "portable" else 16,
        # 16 sums, 4 rows of weights and a token fill the 32 registers of AVX-512; the others have 16.
        "rows": 4,
        "tokens": 4 if spec.isa == "avx512" else 2,
        "panel_bytes": _PANEL_BYTES,
        "chunk_bytes": _CHUNK_BYTES,
        "tiny_scale": repr(quant.TINY_SCALE),
    }


def _rotations(lanes: int) -> list[list[int]]:
    """Lane orders that halve a vector step by step: rotation by lanes/2, lanes/4, ..., 1."""
    steps = [lanes >> shift for shift in range(1, lanes.bit_length())]
    return [[(lane + step) % lanes for lane in range(lanes)] for step in steps]
