"""Specs of the kernels around the decode step: packing and unpacking a state, rows, convolution, the faithful scan."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from .. import quant
from ..errors import ConfigError
from .render import OVERLAPPING, TARGETS, LayerSpec, Spec, is_power_of_two, padded, splits, state_scale_constants


@dataclasses.dataclass(frozen=True)
class QuantizeSpec(Spec):
    """One `quantize_state` kernel: a `Spec` whose state is only packed."""

    kernel: ClassVar[str] = "quantize_state"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits is None or self.flush_interval != 1:
            raise ConfigError(
                f"bits={self.bits}, flush_interval={self.flush_interval}: a state is packed to bits, at once"
            )


@dataclasses.dataclass(frozen=True)
class DequantizeSpec(Spec):
    """One `dequantize_state` kernel: a `Spec` whose state is only read, with scales of either kind."""

    kernel: ClassVar[str] = "dequantize_state"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits is None or self.flush_interval != 1 or self.dynamic or self.stochastic:
            raise ConfigError(f"{self}: nothing but bits, extents and block shape tells these kernels apart")


@dataclasses.dataclass(frozen=True)
class RowsSpec(LayerSpec):
    """One `quantize_rows` kernel. The number of rows, dtypes and optional inputs come with the call.

    Attributes:
        k: features of a row, all of them in one program's registers.
        group_size: features that share a root mean square, or ``None``: there is no norm.
        warps: of a program.
        target: one of `TARGETS`.
    """

    kernel: ClassVar[str] = "quantize_rows"

    k: int
    group_size: int | None = None
    warps: int = 4
    target: str = "sm_90"

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ConfigError(f"target={self.target!r} is not known; use one of {TARGETS}")
        if self.group_size is not None and (self.group_size < 1 or self.k % self.group_size):
            raise ConfigError(f"group_size={self.group_size} does not divide k={self.k}")
        if self.k < 1 or self.elements > MOST_FEATURES:
            raise ConfigError(f"k={self.k}, group_size={self.group_size}: {MOST_FEATURES} padded features are allowed")
        if not is_power_of_two(self.warps) or self.warps > 16:
            raise ConfigError(f"warps={self.warps}: powers of two are allowed, and 16 at most")

    @property
    def elements(self) -> int:
        """Features of a row, padded to powers of two."""
        features = self.group_size or self.k
        return padded(features) * padded(self.k // features)

    def slug(self) -> str:
        """Name of the kernel, and the beginning of its file's name."""
        norm = "" if self.group_size is None else f"_norm{self.group_size}"
        return f"quantize_rows{norm}_k{self.k}_w{self.warps}_{self.target}"

    def constants(self) -> dict[str, Any]:
        """What the template needs besides the spec."""
        features = self.group_size or self.k
        return {
            "features": features,
            "groups": self.k // features,
            "padded_features": padded(features),
            "padded_groups": padded(self.k // features),
            "tiny_scale": quant.TINY_SCALE,
            "overlaps": self.target in OVERLAPPING,
        }


MOST_FEATURES = 2**15
"""64 registers a thread with 16 warps."""


@dataclasses.dataclass(frozen=True)
class ConvSpec(LayerSpec):
    """One `conv_update` kernel. Batch, channels, strides, dtypes and optional inputs come with the call.

    Attributes:
        length: inputs that the state keeps of a channel.
        taps: d_conv.
        block: channels of a program.
        warps: of a program.
        target: one of `TARGETS`.
    """

    kernel: ClassVar[str] = "conv_update"

    length: int
    taps: int
    block: int = 256
    warps: int = 4
    target: str = "sm_90"

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ConfigError(f"target={self.target!r} is not known; use one of {TARGETS}")
        if not 1 <= self.length <= 16 or not 1 <= self.taps <= self.length + 1:
            raise ConfigError(f"length={self.length}, taps={self.taps}: 1 to 16 and 1 to length + 1 are allowed")
        if not is_power_of_two(self.block) or not is_power_of_two(self.warps) or self.warps > 16:
            raise ConfigError(
                f"block={self.block}, warps={self.warps}: powers of two are allowed, and 16 warps at most"
            )

    def slug(self) -> str:
        """Name of the kernel, and the beginning of its file's name."""
        return f"conv_update_s{self.length}_t{self.taps}_c{self.block}_w{self.warps}_{self.target}"

    def constants(self) -> dict[str, Any]:
        """What the template needs besides the spec."""
        return {"splits": splits, "is_power_of_two": is_power_of_two}


@dataclasses.dataclass(frozen=True)
class CausalConvSpec(LayerSpec):
    """One `causal_conv` kernel. Batch, seqlen, channels, strides, dtypes and optional inputs come with the call.

    Attributes:
        taps: d_conv.
        tokens: of a program, one after the other.
        block: channels of a program.
        warps: of a program.
        target: one of `TARGETS`.
    """

    kernel: ClassVar[str] = "causal_conv"

    taps: int
    tokens: int = 16
    block: int = 256
    warps: int = 1
    target: str = "sm_90"

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ConfigError(f"target={self.target!r} is not known; use one of {TARGETS}")
        if not 1 <= self.taps <= 8 or not 1 <= self.tokens <= 64:
            raise ConfigError(f"taps={self.taps}, tokens={self.tokens}: 1 to 8 and 1 to 64 are allowed")
        if not is_power_of_two(self.block) or not is_power_of_two(self.warps) or self.warps > 16:
            raise ConfigError(
                f"block={self.block}, warps={self.warps}: powers of two are allowed, and 16 warps at most"
            )

    @property
    def ahead(self) -> int:
        """Tokens that are loaded before the one in work is computed."""
        return min(self.tokens, TOKENS_AHEAD)

    def slug(self) -> str:
        """Name of the kernel, and the beginning of its file's name."""
        return f"causal_conv_t{self.taps}_l{self.tokens}_c{self.block}_w{self.warps}_{self.target}"

    def constants(self) -> dict[str, Any]:
        """What the template needs besides the spec."""
        return {}


TOKENS_AHEAD = 6
"""Loads of a `causal_conv` under way, 16 bytes a thread each: 48 KiB of a unit with the 16 warps that 128 registers
leave it, the most that 6 take; 8 take 136. Left to itself the compiler asks for a token where the one before is stored,
since y might be xBC."""


@dataclasses.dataclass(frozen=True)
class SsmScanSpec(LayerSpec):
    """One `ssm_scan` kernel, of the faithful scan.

    Batch, seqlen, nheads, ngroups, strides, dtypes, flush_interval and optional inputs come with the call.

    Attributes:
        headdim, dstate: extents of one head's state.
        bits: bits of a code; ``None`` is a float32 state.
        dynamic: state_scale is measured at each store, by a program that owns the head; otherwise it is calibrated.
        stochastic: rounding of the stores.
        rows: rows of a head that one program holds; all of them when dynamic.
        warps: of a program.
        target: one of `TARGETS`.

    Raises:
        ConfigError: a value that no kernel can be made for.
    """

    kernel: ClassVar[str] = "ssm_scan"

    headdim: int
    dstate: int
    bits: int | None
    dynamic: bool = False
    stochastic: bool = False
    rows: int = 8
    warps: int = 1
    target: str = "sm_90"

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ConfigError(f"target={self.target!r} is not known; use one of {TARGETS}")
        if not 1 <= self.headdim <= 256 or not 1 <= self.dstate <= 256:
            raise ConfigError(f"headdim={self.headdim}, dstate={self.dstate}: 1 to 256 are allowed")
        if self.bits is None and (self.dynamic or self.stochastic):
            raise ConfigError("bits=None is a float state: dynamic=False, stochastic=False")
        if self.bits is not None and not 2 <= self.bits <= 8:
            raise ConfigError(f"bits={self.bits} is not allowed; use 2 to 8 or None")
        if not is_power_of_two(self.rows) or not is_power_of_two(self.warps) or self.warps > 16:
            raise ConfigError(f"rows={self.rows}, warps={self.warps}: powers of two are allowed, and 16 warps at most")
        if self.dynamic and self.rows < self.headdim:
            raise ConfigError(f"rows={self.rows}: dynamic scales need all headdim={self.headdim} rows in one program")

    def slug(self) -> str:
        """Name of the kernel, and the beginning of its file's name."""
        words = ["ssm_scan", f"p{self.headdim}", f"n{self.dstate}"]
        if self.bits is None:
            words.append("float32")
        else:
            words.append(f"b{self.bits}")
            words += ["dynamic" if self.dynamic else "calibrated", "stochastic" if self.stochastic else "nearest"]
        return "_".join([*words, f"r{self.rows}", f"w{self.warps}", self.target])

    @property
    def columns(self) -> int:
        """Columns of the tile that a program holds, padding included."""
        # Stochastic: eight runs, as the noise of a row comes.
        return 8 * padded(-(-self.dstate // 8)) if self.stochastic else padded(self.dstate)

    @property
    def row_blocks(self) -> int:
        """Programs of one head."""
        return -(-self.headdim // self.rows)

    def constants(self) -> dict[str, Any]:
        """What the template needs besides the spec."""
        constants = _tile_constants(self) | {
            "nvidia": self.target.startswith("sm_"),
            "row_blocks": self.row_blocks,
            "octant": -(-self.dstate // 8),
            "padded_octant": self.columns // 8,
        }
        if self.bits is None:
            return constants
        return constants | {
            "largest": quant.max_code(self.bits),
            "tiny_scale": quant.TINY_SCALE,
            "noise_turn": quant.NOISE_TURN,
            # Codes are not packed here, and have no offset.
            "rounder": 3 * 2**22,
            "ring": 0,
            "halves": [2**power for power in reversed(range(self.rows.bit_length() - 1))],
            **state_scale_constants(),
        }


@dataclasses.dataclass(frozen=True)
class SsmScanBackwardSpec(LayerSpec):
    """One `ssm_scan_backward` kernel: the gradient of a chunk of tokens whose states are there.

    Attributes:
        headdim, dstate: extents of one head's state, which one program owns.
        warps: of a program.
        target: one of `TARGETS`.

    Raises:
        ConfigError: a value that no kernel can be made for.
    """

    kernel: ClassVar[str] = "ssm_scan_backward"

    headdim: int
    dstate: int
    warps: int = 8
    target: str = "sm_90"

    def __post_init__(self) -> None:
        # The same limits.
        SsmScanSpec(self.headdim, self.dstate, None, warps=self.warps, target=self.target)

    def slug(self) -> str:
        """Name of the kernel, and the beginning of its file's name."""
        return f"ssm_scan_backward_p{self.headdim}_n{self.dstate}_w{self.warps}_{self.target}"

    @property
    def rows(self) -> int:
        """Rows of the tile that a program holds, padding included."""
        return padded(self.headdim)

    @property
    def columns(self) -> int:
        """Columns of that tile."""
        return padded(self.dstate)

    def constants(self) -> dict[str, Any]:
        """What the template needs besides the spec."""
        return _tile_constants(self) | {"tiny_scale": quant.TINY_SCALE}


def _tile_constants(spec: SsmScanSpec | SsmScanBackwardSpec) -> dict[str, Any]:
    """Masks of a tile [rows, columns] of a head, where it does not end with the head."""
    ragged_rows, ragged_columns = spec.headdim % spec.rows != 0, spec.columns != spec.dstate
    tests = {
        "row": f"row < {spec.headdim}" if ragged_rows else "",
        "column": f"column < {spec.dstate}" if ragged_columns else "",
    }
    tile = [f"({tests['row']})[:, None]"] * ragged_rows + [f"({tests['column']})[None, :]"] * ragged_columns
    constants: dict[str, Any] = {"columns": spec.columns}
    for name, test in (tests | {"tile": " & ".join(tile)}).items():
        constants[f"{name}_mask"] = f", mask={test}, other=0.0" if test else ""
        constants[f"{name}_mask_store"] = f", mask={test}" if test else ""
    return constants
