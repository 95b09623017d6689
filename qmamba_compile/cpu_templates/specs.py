"""What a generated C++ kernel is compiled for; `render` makes the text of it."""

from __future__ import annotations

import dataclasses

from .. import quant, recurrence
from ..errors import ConfigError

KERNELS = ("ssm_update", "quantize_state", "dequantize_state", "ssm_scan", "ssm_scan_backward", "chunk_scan")

FLOAT_KERNELS = ("ssm_update", "ssm_scan", "ssm_scan_backward", "chunk_scan")
"""Those that exist for a float32 state; chunk_scan for no other."""

LANES = {"avx512": 16, "avx2": 8, "portable": 4}
"""Floats in one vector of each instruction set. Portable code uses the 16-byte vectors of SSE2 and NEON."""

RINGS = ("bfloat16", "int8", "float32")

CORES = ("intel", "amd")
"""Whose cores the way to memory of a kernel was measured on; other makers' get what is best on Intel's."""

MAX_FLUSH_INTERVAL = 64

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
        amx: many tokens are multiplied by tiles (``w8a8_linear`` with ``vnni`` and ``isa="avx512"`` only).

    Raises:
        ConfigError: a value that no kernel can be made for.
    """

    kernel: str
    isa: str = "avx512"
    vnni: bool = False
    core: str = "intel"
    amx: bool = False

    def __post_init__(self) -> None:
        if self.kernel not in LAYER_KERNELS:
            raise ConfigError(f"kernel={self.kernel!r} is not known; use one of {LAYER_KERNELS}")
        if self.isa not in LANES:
            raise ConfigError(f"isa={self.isa!r} is not known; use one of {tuple(LANES)}")
        if self.amx and not (self.vnni and self.isa == "avx512"):
            raise ConfigError(f"amx=True is not allowed with vnni={self.vnni} and isa={self.isa!r}")
        _check_tuning(self, repr(self.kernel))

    @property
    def multiplies_codes(self) -> bool:
        """As `Spec.multiplies_codes`."""
        return self.kernel == "w8a8_linear"

    def slug(self) -> str:
        """Name of the kernel's function and the beginning of its file's name."""
        return "_".join([self.kernel, self.isa, *["amx"] * self.amx, *_tuning(self)])


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
