"""Specs of the kernels of linears and convolutions, which `launch_layers` calls."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from .. import quant
from ..errors import ConfigError
from .specs import Spec, is_power_of_two, padded, splits

OVERLAPPING = ("sm_90", "sm_100", "sm_103", "sm_120")
"""Architectures where a kernel may start before the one in front has ended (programmatic dependent launch)."""

COMBINE_BLOCK = 256
"""Outputs of one program that adds up the parts of a split `w8a8_linear`."""

RESIDUAL_HELD = 16
"""Elements of a residual that a thread loads before its products, which hide how long that takes; larger tiles need the
registers for sums. No kernel spills with it (tests/kernels/test_triton_quantize_rows.py); not timed on a GPU."""


@dataclasses.dataclass(frozen=True)
class LinearSpec(Spec):
    """One `w8a8_linear` kernel. k, the numbers of rows and outputs, dtypes and optional inputs come with the call.

    Attributes:
        block_o, block_k, block_m: outputs of a program, elements of k that it takes at a time, and its rows.
        splits: programs that share one block of outputs, each with a part of k.
        warps, stages: of a program, and loads of weights under way.
        target: one of `TARGETS`.
        block_x: rows of x, padded to a power of two, which a program quantizes on the way; ``None``: x comes as the
            codes and scales of `quantize_rows`.
    """

    kernel: ClassVar[str] = "w8a8_linear"

    block_o: int = 32
    block_k: int = 256
    splits: int = 1
    warps: int = 4
    stages: int = 4
    target: str = "sm_90"
    block_m: int = 16
    block_x: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        extents = (self.block_m, self.block_o, self.block_k, self.block_x or 1, self.warps)
        if not all(is_power_of_two(n) for n in extents):
            raise ConfigError(f"{self}: block_m, block_o, block_k, block_x and warps must be powers of two")
        if self.block_x is not None and self.block_x > self.block_m:
            raise ConfigError(f"{self}: a program takes no more than block_m rows of x")
        if min(self.block_m, self.block_o) < 16 or self.block_k < 32 or self.splits < 1 or self.stages < 1:
            raise ConfigError(
                f"{self}: int8 products need block_m, block_o >= 16, block_k >= 32, and at least 1 split and stage"
            )

    def slug(self) -> str:
        name = "w8a8_linear_prequantized" if self.prequantized else f"w8a8_linear_x{self.block_x}"
        tile = f"m{self.block_m}_o{self.block_o}_k{self.block_k}"
        return f"{name}_{tile}_s{self.splits}_w{self.warps}_st{self.stages}_{self.target}"

    @property
    def prequantized(self) -> bool:
        """x comes as codes and scales."""
        return self.block_x is None

    @property
    def overlaps(self) -> bool:
        """The kernel may start before `quantize_rows` has ended."""
        return self.prequantized and self.target in OVERLAPPING

    def constants(self) -> dict[str, Any]:
        return {
            "combine_block": COMBINE_BLOCK,
            "tiny_scale": quant.TINY_SCALE,
            "holds_residual": self.block_m * self.block_o <= RESIDUAL_HELD * 32 * self.warps,
        }


@dataclasses.dataclass(frozen=True)
class RowsSpec(Spec):
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
        super().__post_init__()
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
        norm = "" if self.group_size is None else f"_norm{self.group_size}"
        return f"quantize_rows{norm}_k{self.k}_w{self.warps}_{self.target}"

    def constants(self) -> dict[str, Any]:
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
class ConvSpec(Spec):
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
        super().__post_init__()
        if not 1 <= self.length <= 16 or not 1 <= self.taps <= self.length + 1:
            raise ConfigError(f"length={self.length}, taps={self.taps}: 1 to 16 and 1 to length + 1 are allowed")
        if not is_power_of_two(self.block) or not is_power_of_two(self.warps) or self.warps > 16:
            raise ConfigError(
                f"block={self.block}, warps={self.warps}: powers of two are allowed, and 16 warps at most"
            )

    def slug(self) -> str:
        return f"conv_update_s{self.length}_t{self.taps}_c{self.block}_w{self.warps}_{self.target}"

    def constants(self) -> dict[str, Any]:
        return {"splits": splits, "is_power_of_two": is_power_of_two}


@dataclasses.dataclass(frozen=True)
class CausalConvSpec(Spec):
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
        super().__post_init__()
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
        return f"causal_conv_t{self.taps}_l{self.tokens}_c{self.block}_w{self.warps}_{self.target}"

    def constants(self) -> dict[str, Any]:
        return {}


TOKENS_AHEAD = 6
"""Loads of a `causal_conv` under way, 16 bytes a thread each: 48 KiB of a unit with the 16 warps that 128 registers
leave it, the most that 6 take; 8 take 136. Left to itself the compiler asks for a token where the one before is stored,
since y might be xBC."""
