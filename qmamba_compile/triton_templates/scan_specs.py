"""Specs of the kernels that run a whole sequence, which `launch_scan` calls."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from .. import quant
from ..errors import ConfigError
from .specs import Spec, is_power_of_two, padded, state_scale_constants


@dataclasses.dataclass(frozen=True)
class ChunkScanSpec(Spec):
    """One `chunk_scan` kernel. Batch, seqlen, nheads, ngroups, strides and optional inputs come with the call.

    Attributes:
        headdim, dstate: extents of one head's state.
        chunk: tokens handled by one set of matrix products.
        block_p: rows of the state that a program owns.
        warps: of a program.
        target: one of `TARGETS`.
    """

    kernel: ClassVar[str] = "chunk_scan"

    headdim: int
    dstate: int
    chunk: int = 64
    block_p: int = 64
    warps: int = 4
    target: str = "sm_90"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.headdim <= 256 or not 1 <= self.dstate <= 256:
            raise ConfigError(f"headdim={self.headdim}, dstate={self.dstate}: 1 to 256 are allowed")
        for name, value, fewest in (("chunk", self.chunk, 16), ("block_p", self.block_p, 16), ("warps", self.warps, 1)):
            if not is_power_of_two(value) or not fewest <= value <= 256:
                raise ConfigError(f"{name}={value} is not allowed; use a power of two from {fewest} to 256")

    def slug(self) -> str:
        return f"chunk_scan_p{self.headdim}_n{self.dstate}_c{self.chunk}_r{self.block_p}_w{self.warps}_{self.target}"

    @property
    def row_blocks(self) -> int:
        """Programs of one head."""
        return -(-self.headdim // self.block_p)

    def constants(self) -> dict[str, Any]:
        return {
            "padded_n": max(16, padded(self.dstate)),
            "row_blocks": self.row_blocks,
            "state_size": self.headdim * self.dstate,
        }


@dataclasses.dataclass(frozen=True)
class SsmScanSpec(Spec):
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
        super().__post_init__()
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
class SsmScanBackwardSpec(Spec):
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
