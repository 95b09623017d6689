"""Specs of the kernels around the recurrence: packing and unpacking a state, quantizing rows, the convolution."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from .. import quant
from ..errors import ConfigError
from .render import TARGETS, LayerSpec, Spec, is_power_of_two, padded, splits


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
