"""Specs of the kernels of a decode step's state, which `launch` and `launch_state` call."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

from .. import quant
from ..errors import ConfigError
from ..recurrence import RING_DTYPES
from . import packed_words
from .specs import Spec, is_power_of_two, lanes_of, padded, splits, state_scale_constants

PREFETCHED_TILES = 4
"""Most tiles of a program that are loaded before it computes: 64 bytes of each thread under way. Microseconds on an
H100, 2.7B shape, batch 128, 4 bits: 49.0 with 4 tiles; 54 with 2, and 50 with 8, which take more registers; 58.6 with
the loads in the loop."""

NOT_PREFETCHED = ("sm_100", "sm_103", "gfx942", "gfx950")
"""Targets whose compilers spill four tiles, or where nothing was measured."""

WALKING = ("sm_90", "interpreter")
"""Targets where few programs walk over the batch to find what is to be stored. Elsewhere, one a sequence: nothing was
measured there, and the loop takes registers (sm_90: 190 to 230)."""

STATE_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class StateSpec(Spec):
    """One `ssm_update` kernel. Batch, nheads, ngroups, strides, input dtypes and optional inputs come with the call.

    Attributes:
        headdim, dstate: extents of one head's state.
        bits: bits of a code; ``None`` is a float state of ``state_dtype``, the yardstick of the packed ones.
        dynamic: state_scale is measured at each store, by a program that owns the head; otherwise it is calibrated.
        stochastic: rounding of the store.
        rows: rows of a head that one program updates; all of them when dynamic.
        warps: warps of a program.
        target: one of `TARGETS`.
        state_dtype: one of `STATE_DTYPES`, for ``bits=None``.
        flush_interval: L of a checkpointed state, which is stored once in L steps; 1 is a state without a ring.
        ring_bits: of the inputs in its ring; 16 stands for either floating type.

    Raises:
        ConfigError: a value that no kernel can be made for.
    """

    kernel: ClassVar[str] = "ssm_update"

    headdim: int
    dstate: int
    bits: int | None
    dynamic: bool = False
    stochastic: bool = False
    rows: int = 32
    warps: int = 1
    target: str = "sm_90"
    state_dtype: str = "float32"
    flush_interval: int = 1
    ring_bits: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.headdim <= 256 or not 4 <= self.dstate <= 256:
            raise ConfigError(f"headdim={self.headdim}, dstate={self.dstate}: 1 to 256 and 4 to 256 are allowed")
        if self.bits is None:
            if self.dynamic or self.stochastic:
                raise ConfigError("bits=None is a float state: dynamic=False, stochastic=False")
            if self.state_dtype not in STATE_DTYPES:
                raise ConfigError(f"state_dtype={self.state_dtype!r} is not known; use one of {STATE_DTYPES}")
        elif self.bits not in quant.STATE_BITS:
            raise ConfigError(f"bits={self.bits} is not allowed; use one of {quant.STATE_BITS} or None")
        elif self.dstate * self.bits % 32:
            raise ConfigError(
                f"dstate={self.dstate} at {self.bits} bits does not fill words of 32 bits; "
                f"use a multiple of {32 // self.bits}"
            )
        if not is_power_of_two(self.rows) or not is_power_of_two(self.warps) or self.warps > 16:
            raise ConfigError(f"rows={self.rows}, warps={self.warps}: powers of two are allowed, and 16 warps at most")
        if not 1 <= self.flush_interval <= 65 or (self.flush_interval > 1 and self.bits is None):
            raise ConfigError(f"flush_interval={self.flush_interval}: 1 to 65 are allowed, and 1 for a float state")
        if self.ring_bits not in RING_DTYPES or (self.ring_bits != 16 and self.flush_interval == 1):
            raise ConfigError(f"ring_bits={self.ring_bits}: {tuple(RING_DTYPES)} are allowed, and 16 without a ring")
        if self.flush_interval > 1 and self.rows < 16:
            raise ConfigError(f"rows={self.rows}: a product of matrices, for a checkpointed state, has at least 16")
        if self.dynamic and self.rows < self.headdim:
            raise ConfigError(f"rows={self.rows}: dynamic scales need all headdim={self.headdim} rows in one program")

    def slug(self) -> str:
        words = [self.kernel, f"p{self.headdim}", f"n{self.dstate}"]
        if self.bits is None:
            words.append(self.state_dtype)
        else:
            words.append(f"b{self.bits}")
            words += ["dynamic" if self.dynamic else "calibrated", "stochastic" if self.stochastic else "nearest"]
        if self.flush_interval > 1:
            words.append(f"every{self.flush_interval}")
        if self.ring_bits != 16:
            words.append(f"ring{self.ring_bits}")
        return "_".join([*words, f"r{self.rows}", f"w{self.warps}", self.target])

    @property
    def template(self) -> str:
        """Name of the template: of a checkpointed state another one."""
        return self.kernel if self.flush_interval == 1 else f"{self.kernel}_ring"

    @property
    def words(self) -> int:
        """32-bit words of a packed row."""
        return self.dstate * (self.bits or 0) // 32

    @property
    def tile(self) -> int:
        """Rows that a program holds in registers at a time: one 16-byte access a thread, four of a float state. Of a
        checkpointed one 64 elements a thread, and no fewer than a product of matrices has."""
        if self.dynamic and self.kernel == "quantize_state":
            return self.rows
        lanes = lanes_of(self.target)
        if self.flush_interval > 1:
            return min(self.rows, max(16, lanes * self.warps * 64 // padded(self.dstate)))
        row_bytes = padded(self.words) * 4 if self.bits else padded(self.dstate) * _itemsize(self.state_dtype) // 4
        access = 8 if self.dynamic and self.bits == 2 else 16
        return max(1, min(self.rows, lanes * self.warps * access // row_bytes))

    @property
    def lifted(self) -> bool:
        """The step works on h in units of a row's old scale, which saves a product an element."""
        return self.kernel == "ssm_update" and bool(self.bits) and not self.dynamic and self.flush_interval == 1

    @property
    def prefetched(self) -> bool:
        """A program asks for all of its tiles before it computes, and its loop over them is unrolled."""
        nearest = self.lifted and not self.stochastic and self.bits == 4
        return nearest and self.turns <= PREFETCHED_TILES and self.target not in NOT_PREFETCHED

    @property
    def walks(self) -> bool:
        """Programs that store walk over the batch."""
        return self.target in WALKING

    @property
    def turns(self) -> int:
        """Tiles of a program, one after the other."""
        return self.rows // self.tile

    @property
    def row_blocks(self) -> int:
        """Programs of one head."""
        return -(-self.headdim // self.rows)

    @property
    def terms(self) -> int:
        """Inputs in the ring of a checkpointed state, as a product of matrices has them: at least 16 of bfloat16."""
        return max(16, padded(self.flush_interval - 1))

    @property
    def shared_values(self) -> int:
        """What programs of a sequence and group read from another launch: C . B for each input, and the position."""
        return self.terms + 2

    def warps_of(self, stores: bool | None) -> int:
        """Warps of a program that stores a checkpointed state or (False) only reads it; None: either."""
        return 1 if stores is False else self.warps

    def constants(self) -> dict[str, Any]:
        constants: dict[str, Any] = {
            "tile": self.tile,
            "row_blocks": self.row_blocks,
            "row_mask": _mask(self._row_tests, "0.0"),
            "row_mask_store": _mask(self._row_tests),
            "tile_mask_store": _mask(self._tile_tests(self._column_tests)),
            "ring": self.flush_interval - 1,
            "lifted": self.lifted,
        }
        if self.bits is None:
            return constants | self._float_constants()
        return constants | self._packed_constants(self.bits) | self._ring_constants(self.bits)

    def _float_constants(self) -> dict[str, Any]:
        return {
            "padded_columns": padded(self.dstate),
            "column_mask": _mask(self._column_tests, "0.0"),
            "tile_mask": _mask(self._tile_tests(self._column_tests), "0.0"),
        }

    def _packed_constants(self, bits: int) -> dict[str, Any]:
        runs, codes = 8 // bits, 32 // bits
        run_length = self.dstate // runs
        offset = 2 ** (bits - 1)
        zero_word = sum(offset << shift for shift in range(0, 32, bits))
        rounder = 3 * 2**22 + offset
        # What Horner's rule makes of the constant bits of ROUND (whose own offset belongs to the code), and the slot
        # whose own constant makes up for it: the first whose part of them lies beyond the word.
        surplus = sum(0x4B400000 << shift for shift in range(0, 32, bits)) % 2**32
        balance = -(-10 // bits)
        slots = packed_words.slots(bits, run_length, self.dynamic)
        place = "place" if runs == 1 else f"(place % 4 + place // 4 * {run_length})"
        column_tests = [f"({test})[:, None]" for test in self._column_tests]
        byte_tests = self._tile_tests([f"byte_column < {run_length}"] * len(self._column_tests))
        return {
            "nvidia": self.target.startswith("sm_"),
            # Stochastic codes by the reference's own roundings, not by a fused product of g = h / state_scale.
            "exact": self.dynamic or self.kernel != "ssm_update",
            "words": self.words,
            "padded_words": padded(self.words),
            "padded_rows": self.rows,
            "largest": quant.max_code(bits),
            "tiny_scale": quant.TINY_SCALE,
            "noise_turn": quant.NOISE_TURN,
            "offset": offset,
            "rounder": rounder,
            "balance": balance,
            "balancing_rounder": rounder + ((-surplus % 2**32) >> (balance * bits)),
            "zero_word": f"0x{zero_word:08X}",
            "slots": slots,
            "shift": packed_words.SHIFT[bits],
            "uses_shifted": any(slot["source"] == "shifted" for slot in slots),
            "uses_raised": any(slot["source"] == "raised" for slot in slots),
            "runs": runs,
            "run_length": run_length,
            "byte_columns": ", ".join(["c"] + [f"c + {index * run_length}" for index in range(1, runs)]),
            "column_of_place": f"4 * word[:, None] + {place}[None, :]",
            "column_mask": _mask(column_tests, "0.0"),
            "column_mask_store": _mask(column_tests),
            "tile_mask": _mask(self._tile_tests(self._column_tests), _signed(0 if bits == 8 else zero_word)),
            "byte_mask": _mask(byte_tests, "0.0"),
            "byte_mask_store": _mask(byte_tests),
            "names": functools.partial(_names, codes),
            "splits": splits(codes),
            "split_result": packed_words.split_result(runs, codes),
            "octant": -(-self.dstate // 8),
            "shares_philox": is_power_of_two(self.dstate) and self.dstate >= 8,
            "halves": [2**power for power in reversed(range(self.rows.bit_length() - 1))],
            **state_scale_constants(),
        }

    def _ring_constants(self, bits: int) -> dict[str, Any]:
        run_length = self.dstate * bits // 8
        padded_run = max(32, padded(run_length))  # of a product of int8 matrices
        run_tests = [f"byte < {run_length}"] * (padded_run != run_length)
        return {
            "walks": self.walks,
            # Programs that have done their part of a step are counted in a position's high bits meanwhile.
            "arrival": 2**8,
            "int8_ring": self.ring_bits == 8,
            "padded_headdim": padded(self.headdim),
            "padded_terms": self.terms,
            "padded_run": padded_run,
            # Triton's interpreter cannot multiply matrices of bfloat16.
            "operand": "tl.float32" if self.target == "interpreter" else "tl.bfloat16",
            "top_mask": f"0x{(2**bits - 1 << 8 - bits) * 0x01010101:08X}",
            "run_mask": _mask(run_tests, "0.0"),
            "run_mask_store": _mask(run_tests),
            "bytes_mask": _mask(self._tile_tests(run_tests), "0"),
            "lines": padded(-(-4 * self.rows * self.words // 128)),
        }

    @property
    def _row_tests(self) -> list[str]:
        """What tells the rows of a head from those of the last block; nothing where it is full. So for columns."""
        return [f"row < {self.headdim}"] * (self.headdim % self.rows != 0)

    @property
    def _column_tests(self) -> list[str]:
        width, column = (self.words, "word") if self.bits else (self.dstate, "column")
        return [f"{column} < {width}"] * (padded(width) != width)

    def _tile_tests(self, column_tests: list[str]) -> list[str]:
        """Those of a tile [row, column]."""
        return [f"({test})[:, None]" for test in self._row_tests] + [f"({test})[None, :]" for test in column_tests]


@dataclasses.dataclass(frozen=True)
class QuantizeSpec(StateSpec):
    """One `quantize_state` kernel: a `StateSpec` whose state is only packed."""

    kernel: ClassVar[str] = "quantize_state"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits is None or self.flush_interval != 1:
            raise ConfigError(
                f"bits={self.bits}, flush_interval={self.flush_interval}: a state is packed to bits, at once"
            )


@dataclasses.dataclass(frozen=True)
class DequantizeSpec(StateSpec):
    """One `dequantize_state` kernel: a `StateSpec` whose state is only read, with scales of either kind."""

    kernel: ClassVar[str] = "dequantize_state"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits is None or self.flush_interval != 1 or self.dynamic or self.stochastic:
            raise ConfigError(f"{self}: nothing but bits, extents and block shape tells these kernels apart")


def _itemsize(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def _mask(tests: list[str], other: object = None) -> str:
    """Arguments of a load or store of what passes all ``tests``: none where there are none to pass."""
    if not tests:
        return ""
    return f", mask={' & '.join(tests)}" + ("" if other is None else f", other={other}")


def _names(count: int, letter: str) -> str:
    return ", ".join(f"{letter}{index}" for index in range(count))


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word
