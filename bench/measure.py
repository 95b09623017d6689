"""Timing that holds on a noisy machine: variants interleaved in one process, medians, and ratios with an interval.

A ratio is only made of variants whose numerics were checked in the same run (`Gate`), and every time stands beside
the time that this machine's measured memory and arithmetic roofs allow (`Roof`).
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Clock = Callable[[], float]

_RESAMPLES = 2000


# --- timing --------------------------------------------------------------------------------------------------------


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    block_seconds: float = 0.0,
    samples: dict[str, list[float]] | None = None,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of one call of each variant, one sample a round.

    Every round runs each variant once, in a new random order, so that drift of the machine and what the one before
    left in the caches hit all alike. A sample is the mean of as many calls as fill ``block_seconds``.

    Args:
        samples: filled as rounds end, so that an interrupted run keeps what it has.
    """
    samples = {} if samples is None else samples
    lengths: dict[str, int] = {}
    for name, call in calls.items():
        call()
        began = clock()
        call()
        lengths[name] = max(1, math.ceil(block_seconds / max(clock() - began, 1e-9)))
    order = list(calls)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        taken: dict[str, float] = {}
        for name in order:
            call, length = calls[name], lengths[name]
            began = clock()
            for _ in range(length):
                call()
            taken[name] = (clock() - began) / length
        # All at once: an interrupted round would leave samples that do not belong together.
        for name, seconds in taken.items():
            samples.setdefault(name, []).append(seconds)
    return samples


def keep_freed_memory() -> None:
    """Let libc keep what this process frees, from now on, and hand it out again; nothing where it cannot be told so.

    By default glibc maps a large tensor at each call, the kernel clears its pages one by one as they are first written,
    and freeing it gives them back. Of 512 rows of logits (103 MB) that is 39 ms, beside 66 for their int8 product: a
    comparison of products would be one of the kernel's clearing of pages, the same for all.
    """
    if sys.platform != "linux":
        return
    # Not the threshold of mapping, which may be 32 MB at the most.
    mmap_max, trim_threshold = -4, -1  # of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)


@dataclasses.dataclass(frozen=True)
class Summary:
    """Median and quartiles of ``samples``, in seconds."""

    median: float
    q1: float
    q3: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary:
        q1, median, q3 = (float(q) for q in np.quantile(np.asarray(samples, dtype=np.float64), (0.25, 0.5, 0.75)))
        return cls(median, q1, q3, tuple(samples))


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times faster, with a 95 % interval, which a single round leaves empty: ``low == value == high``."""

    value: float
    low: float
    high: float


def speedup(slow: Sequence[float], fast: Sequence[float], seed: int = 0) -> Ratio:
    """Ratio of medians ``slow / fast``; the interval resamples rounds, in which both were measured side by side."""
    if len(slow) != len(fast):
        raise ValueError(f"samples of different rounds: {len(slow)} and {len(fast)}")
    above, below = np.asarray(slow), np.asarray(fast)
    rounds = np.random.default_rng(seed).integers(0, len(above), (_RESAMPLES, len(above)))
    ratios = np.median(above[rounds], axis=1) / np.median(below[rounds], axis=1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return Ratio(float(np.median(above) / np.median(below)), float(low), float(high))


# --- numerics ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Gate:
    """Result of a numerics check: ``error`` of an output against the float32 one, and how large it may be."""

    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN

    @classmethod
    def of(cls, output: Any, reference: Any, tolerance: float) -> Gate:
        """Error as ``|output - reference| / |reference|``, Euclidean norms over all elements."""
        if output.shape != reference.shape:
            return cls(math.inf, tolerance)
        reference = reference.double()
        error = (output.double() - reference).norm() / reference.norm().clamp(min=1e-30)
        return cls(float(error), tolerance)


def checked_speedup(slow: Sequence[float], slow_gate: Gate, fast: Sequence[float], fast_gate: Gate) -> Ratio | str:
    """`speedup`, or the reason why there is none to be shown."""
    for gate, which in ((fast_gate, "this variant"), (slow_gate, "the other variant")):
        if not gate.passed:
            return f"refused: numerics of {which} failed (error {gate.error:.2g}, allowed {gate.tolerance:.2g})"
    return speedup(slow, fast)


# --- roofs ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Work:
    """What one call must do at the least: bytes read, bytes read and written back in place, operations by dtype.

    A multiply-add is two operations.
    """

    read: int = 0
    updated: int = 0
    int8_ops: int = 0
    bfloat16_ops: int = 0
    float32_ops: int = 0

    @property
    def bytes_moved(self) -> int:
        return self.read + 2 * self.updated


@dataclasses.dataclass(frozen=True)
class Roof:
    """What this machine reaches, measured in the same run: bytes a second and operations a second."""

    read: float
    update: float
    copy: float
    int8: float
    bfloat16: float
    float32: float

    def seconds(self, work: Work) -> float:
        """The least time for ``work``: memory and arithmetic overlap, so the slower of the two."""
        memory = work.read / self.read + 2 * work.updated / self.update
        arithmetic = (work.int8_ops, self.int8), (work.bfloat16_ops, self.bfloat16), (work.float32_ops, self.float32)
        return max(memory, sum(ops / rate for ops, rate in arithmetic))


def measure_roof(nbytes: int = 2**29, extent: int = 1024, tries: int = 7) -> Roof:
    """Best of ``tries`` for a read (sum), an update in place, a copy (read plus write) and square matrix products.

    ``nbytes`` must be many times the last-level cache. torch's sum reads within 10 % of a hand-written loop here.
    """
    import torch

    source = torch.ones(nbytes // 4)
    target = torch.empty_like(source)
    matrix = torch.randn(extent, extent)
    half = matrix.bfloat16()
    codes = torch.randint(-127, 128, (extent, extent), dtype=torch.int8)
    transposed = codes.t()

    def rate(call: Callable[[], Any], amount: int) -> float:
        call()
        best = math.inf
        for _ in range(tries):
            began = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - began)
        return amount / best

    return Roof(
        read=rate(source.sum, nbytes),
        update=rate(source.neg_, 2 * nbytes),
        copy=rate(lambda: target.copy_(source), 2 * nbytes),
        int8=rate(lambda: torch._int_mm(codes, transposed), 2 * extent**3),
        bfloat16=rate(lambda: half @ half, 2 * extent**3),
        float32=rate(lambda: matrix @ matrix, 2 * extent**3),
    )
