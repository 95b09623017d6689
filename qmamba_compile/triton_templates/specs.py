"""What a kernel is compiled for: the base of the specs in state_specs.py, scan_specs.py and layer_specs.py."""

from __future__ import annotations

import abc
from collections.abc import Collection
from typing import Any, ClassVar

from .. import quant
from ..errors import ConfigError

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942", "gfx950", "interpreter")
"""Architectures that kernels are written for, and Triton's interpreter on the CPU (``TRITON_INTERPRET=1``)."""


def target_of(architecture: str) -> str:
    """The entry of `TARGETS` that serves ``architecture``: itself, or of NVIDIA's the latest before it.

    Raises:
        ConfigError: there is none.
    """
    try:
        return latest_before(architecture, TARGETS)
    except KeyError:
        raise ConfigError(f"architecture {architecture!r} has no kernels; they are written for {TARGETS}") from None


def latest_before(architecture: str, known: Collection[str]) -> str:
    """``architecture`` itself if it is ``known``, or of NVIDIA's the latest known before it.

    Raises:
        KeyError: there is none.
    """
    if architecture in known:
        return architecture
    if architecture.startswith("sm_") and architecture[3:].isdecimal():
        older = [name for name in known if name.startswith("sm_") and int(name[3:]) <= int(architecture[3:])]
        if older:
            return max(older, key=lambda name: int(name[3:]))
    raise KeyError(architecture)


def lanes_of(target: str) -> int:
    """Threads of a warp."""
    return 64 if target.startswith("gfx") else 32


class Spec(abc.ABC):
    """One kernel, as a frozen dataclass that validates itself. Whatever is not in it comes with the call.

    Attributes:
        kernel: what is made.
        warps: of a program.
        target: one of `TARGETS`.

    Raises:
        ConfigError: a value that no kernel can be made for.
    """

    kernel: ClassVar[str]
    warps: int
    target: str

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ConfigError(f"target={self.target!r} is not known; use one of {TARGETS}")

    @property
    def template(self) -> str:
        """Name of the template."""
        return self.kernel

    @abc.abstractmethod
    def slug(self) -> str:
        """Name of the kernel, and the beginning of its file's name."""

    @abc.abstractmethod
    def constants(self) -> dict[str, Any]:
        """What the template needs besides the spec."""


def state_scale_constants() -> dict[str, Any]:
    """What quant.dynamic_state_scale needs."""
    return {
        "log2_bounds": quant.LOG2_BOUNDS,
        "outlier_log2": quant.OUTLIER_LOG2,
        "scale_limit": quant.STATE_SCALE_LIMIT,
    }


def splits(width: int, whole: str = "columns", part: str = "c", first: int = 0) -> list[dict[str, Any]]:
    """Steps that halve [word, place] by the lowest bit of the place, breadth first, down to columns c0, c1, ..."""

    def name(place: int, step: int) -> str:
        return whole if step == 1 else f"{part}{first + place}" if step == width else f"{part}{place}_by_{step}"

    steps, step = [], 1
    while step < width:
        steps += [
            {
                "source": name(place, step),
                "width": width // step,
                "low": name(place, 2 * step),
                "high": name(place + step, 2 * step),
            }
            for place in range(step)
        ]
        step *= 2
    return steps


def padded(size: int) -> int:
    return 1 << (size - 1).bit_length()


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0
