"""Generated Triton kernels as text and as loaded modules. The only file of this package that needs jinja2 or triton."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import logging
import os
import pathlib
import tempfile
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from .. import quant
from ..errors import ConfigError
from ..recurrence import EXP_CONSTANTS, RING_DTYPES

if TYPE_CHECKING:
    import jinja2

log = logging.getLogger(__name__)

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942", "gfx950", "interpreter")
"""Architectures that kernels are written for, and Triton's interpreter on the CPU (``TRITON_INTERPRET=1``)."""


def target_of(architecture: str) -> str:
    """The entry of `TARGETS` that serves ``architecture``: itself, or of NVIDIA's the latest before it.

    Raises:
        ConfigError: there is none.
    """
    if architecture in TARGETS:
        return architecture
    if architecture.startswith("sm_") and architecture[3:].isdecimal():
        older = [name for name in TARGETS if name.startswith("sm_") and int(name[3:]) <= int(architecture[3:])]
        if older:
            return max(older, key=lambda name: int(name[3:]))
    raise ConfigError(f"architecture {architecture!r} has no kernels; they are written for {TARGETS}")


OVERLAPPING = ("sm_90", "sm_100", "sm_103", "sm_120")
"""Architectures where a kernel may start before the one in front has ended (programmatic dependent launch)."""

PREFETCHED_TILES = 4
"""Most tiles of a program that are loaded before it computes: 64 bytes of each thread under way. Microseconds on an
H100, 2.7B shape, batch 128, 4 bits: 49.0 with 4 tiles; 54 with 2, and 50 with 8, which take more registers; 58.6 with
the loads in the loop."""

NOT_PREFETCHED = ("sm_100", "gfx942")
"""Targets whose compilers spill four tiles, or where nothing was measured."""

WALKING = ("sm_90", "interpreter")
"""Targets where few programs walk over the batch to find what is to be stored. Elsewhere, one a sequence: nothing was
measured there, and the loop takes registers (sm_90: 190 to 230)."""

STATE_DTYPES = ("float32", "bfloat16")

_HIGHEST_FIELD = 23
"""A field of bits can be read where it stands if it lies below bit 23, in a float32's mantissa."""


@dataclasses.dataclass(frozen=True)
class Spec:
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
        if self.target not in TARGETS:
            raise ConfigError(f"target={self.target!r} is not known; use one of {TARGETS}")
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
        """Name of the kernel, and the beginning of its file's name."""
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
        lanes = 64 if self.target.startswith("gfx") else 32
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


@dataclasses.dataclass(frozen=True)
class LinearSpec:
    """One `w8a8_linear` kernel. k, the numbers of rows and outputs, dtypes and optional inputs come with the call.

    Attributes:
        block_o, block_k, block_m: outputs of a program, elements of k that it takes at a time, and its rows.
        splits: programs that share one block of outputs, each with a part of k.
        warps, stages: of a program, and loads of weights under way.
        target: one of `TARGETS`.
        block_x: rows of x, padded to a power of two, which a program quantizes on the way; ``None``: x comes as the
            codes and scales of `quantize_rows`.
    """

    block_o: int = 32
    block_k: int = 256
    splits: int = 1
    warps: int = 4
    stages: int = 4
    target: str = "sm_90"
    block_m: int = 16
    block_x: int | None = None

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ConfigError(f"target={self.target!r} is not known; use one of {TARGETS}")
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
        """Name of the kernel, and the beginning of its file's name."""
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


@dataclasses.dataclass(frozen=True)
class ScanSpec:
    """One `chunk_scan` kernel. Batch, seqlen, nheads, ngroups, strides and optional inputs come with the call.

    Attributes:
        headdim, dstate: extents of one head's state.
        chunk: tokens handled by one set of matrix products.
        block_p: rows of the state that a program owns.
        warps: of a program.
        target: one of `TARGETS`.
    """

    headdim: int
    dstate: int
    chunk: int = 64
    block_p: int = 64
    warps: int = 4
    target: str = "sm_90"

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ConfigError(f"target={self.target!r} is not known; use one of {TARGETS}")
        if not 1 <= self.headdim <= 256 or not 1 <= self.dstate <= 256:
            raise ConfigError(f"headdim={self.headdim}, dstate={self.dstate}: 1 to 256 are allowed")
        for name, value, fewest in (("chunk", self.chunk, 16), ("block_p", self.block_p, 16), ("warps", self.warps, 1)):
            if not is_power_of_two(value) or not fewest <= value <= 256:
                raise ConfigError(f"{name}={value} is not allowed; use a power of two from {fewest} to 256")

    def slug(self) -> str:
        """Name of the kernel, and the beginning of its file's name."""
        return f"chunk_scan_p{self.headdim}_n{self.dstate}_c{self.chunk}_r{self.block_p}_w{self.warps}_{self.target}"

    @property
    def row_blocks(self) -> int:
        """Programs of one head."""
        return -(-self.headdim // self.block_p)


class LayerSpec:
    """What `render` needs of a spec in specs.py that is not of a state: its template's name and numbers."""

    kernel: ClassVar[str]

    def slug(self) -> str:
        raise NotImplementedError

    def constants(self) -> dict[str, Any]:
        raise NotImplementedError


AnySpec = Spec | LinearSpec | ScanSpec | LayerSpec

COMBINE_BLOCK = 256
"""Outputs of one program that adds up the parts of a split `w8a8_linear`."""


def render(spec: AnySpec) -> str:
    """Python source of the Triton kernel that ``spec`` names."""
    if isinstance(spec, Spec):
        name, constants = spec.template, _constants(spec)
    elif isinstance(spec, LinearSpec):
        name = "w8a8_linear"
        constants = {"combine_block": COMBINE_BLOCK, "tiny_scale": quant.TINY_SCALE}
    elif isinstance(spec, LayerSpec):
        name, constants = spec.kernel, spec.constants()
    else:
        name = "chunk_scan"
        state_size = spec.headdim * spec.dstate
        constants = {"padded_n": max(16, padded(spec.dstate)), "row_blocks": spec.row_blocks, "state_size": state_size}
    return _environment().get_template(f"{name}.py.jinja").render(spec=spec, exp=EXP_CONSTANTS, **constants)


@functools.cache
def load(spec: AnySpec) -> ModuleType:
    """The rendered kernel as a module; its source lies in Inductor's cache directory, for Triton and for debuggers."""
    return load_source(spec.slug(), render(spec))


def load_source(name: str, source: str) -> ModuleType:
    """Import ``source`` from a file of the cache directory, written there if need be."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = pathlib.Path(cache_dir(), "qmamba")
    path = folder / f"{name}_{hashlib.sha256(source.encode()).hexdigest()[:16]}.py"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".py", delete=False) as file:
            file.write(source)
        # Atomic: another process sees the whole file or none.
        os.replace(file.name, path)
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


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


def _constants(spec: Spec) -> dict[str, Any]:
    ragged_rows = spec.headdim % spec.rows != 0
    width = spec.words if spec.bits else spec.dstate
    ragged_columns = padded(width) != width
    row_test = f"row < {spec.headdim}"
    column_test = f"{'word' if spec.bits else 'column'} < {width}"
    tile_tests = [f"({row_test})[:, None]"] * ragged_rows + [f"({column_test})[None, :]"] * ragged_columns
    tile_mask = f", mask={' & '.join(tile_tests)}" if tile_tests else ""
    constants: dict[str, Any] = {
        "nvidia": spec.target.startswith("sm_"),
        "tile": spec.tile,
        "row_blocks": spec.row_blocks,
        "row_mask": f", mask={row_test}, other=0.0" if ragged_rows else "",
        "row_mask_store": f", mask={row_test}" if ragged_rows else "",
        "column_mask": f", mask={column_test}, other=0.0" if ragged_columns else "",
        "tile_mask": f"{tile_mask}, other=0.0" if tile_mask else "",
        "tile_mask_store": tile_mask,
        "padded_columns": padded(spec.dstate),
        "ring": spec.flush_interval - 1,
        "walks": spec.target in WALKING,
        # Programs that have done their part of a step are counted in a position's high bits meanwhile.
        "arrival": 2**8,
        "lifted": spec.lifted,
        "int8_ring": spec.ring_bits == 8,
        "padded_headdim": padded(spec.headdim),
        # Stochastic codes by the reference's own roundings, not by a fused product of g = h / state_scale.
        "exact": spec.dynamic or spec.kernel != "ssm_update",
    }
    if spec.bits is None:
        return constants
    runs = 8 // spec.bits
    run_length = spec.dstate // runs
    offset = 2 ** (spec.bits - 1)
    octant = -(-spec.dstate // 8)
    zero_word = sum(offset << shift for shift in range(0, 32, spec.bits))
    rounder = 3 * 2**22 + offset
    # What Horner's rule makes of the constant bits of ROUND (whose own offset belongs to the code), and the slot whose
    # own constant makes up for it: the first whose part of them lies beyond the word.
    surplus = sum(0x4B400000 << shift for shift in range(0, 32, spec.bits)) % 2**32
    balance = -(-10 // spec.bits)
    padded_run = max(32, padded(run_length))  # of a product of int8 matrices
    bytes_tests = [f"({row_test})[:, None]"] * ragged_rows
    bytes_tests += [f"(byte < {run_length})[None, :]"] * (padded_run != run_length)
    byte_mask = tile_mask.replace(column_test, f"byte_column < {run_length}")
    return constants | {
        "padded_terms": spec.terms,
        "padded_run": padded_run,
        # Triton's interpreter cannot multiply matrices of bfloat16.
        "operand": "tl.float32" if spec.target == "interpreter" else "tl.bfloat16",
        "top_mask": f"0x{(2**spec.bits - 1 << 8 - spec.bits) * 0x01010101:08X}",
        "run_mask": f", mask=byte < {run_length}, other=0.0" if padded_run != run_length else "",
        "run_mask_store": f", mask=byte < {run_length}" if padded_run != run_length else "",
        "bytes_mask": f", mask={' & '.join(bytes_tests)}, other=0" if bytes_tests else "",
        "words": spec.words,
        "padded_words": padded(spec.words),
        "lines": padded(-(-4 * spec.rows * spec.words // 128)),
        "padded_rows": spec.rows,
        "largest": quant.max_code(spec.bits),
        "tiny_scale": quant.TINY_SCALE,
        "noise_turn": quant.NOISE_TURN,
        "offset": offset,
        "rounder": rounder,
        "balance": balance,
        "balancing_rounder": rounder + ((-surplus % 2**32) >> (balance * spec.bits)),
        "zero_word": f"0x{zero_word:08X}",
        "slots": (slots := _slots(spec, run_length, offset)),
        "shift": _SHIFT[spec.bits],
        "uses_shifted": any(slot["source"] == "shifted" for slot in slots),
        "uses_raised": any(slot["source"] == "raised" for slot in slots),
        "runs": runs,
        "byte_columns": ", ".join(["c"] + [f"c + {index * run_length}" for index in range(1, runs)]),
        "column_of_place": "4 * word[:, None] + place[None, :]"
        if runs == 1
        else f"4 * word[:, None] + (place % 4 + place // 4 * {run_length})[None, :]",
        "column_mask": f", mask=({column_test})[:, None], other=0.0" if ragged_columns else "",
        "column_mask_store": f", mask=({column_test})[:, None]" if ragged_columns else "",
        "tile_mask": f"{tile_mask}, other={_signed(0 if spec.bits == 8 else zero_word)}" if tile_mask else "",
        "run_length": run_length,
        "byte_mask": f"{byte_mask}, other=0.0" if byte_mask else "",
        "byte_mask_store": byte_mask,
        "names": lambda letter: ", ".join(f"{letter}{index}" for index in range(32 // spec.bits)),
        "splits": splits(32 // spec.bits),
        "split_result": _split_result(runs, 32 // spec.bits),
        "octant": octant,
        "shares_philox": is_power_of_two(spec.dstate) and spec.dstate >= 8,
        "halves": [2**power for power in reversed(range(spec.rows.bit_length() - 1))],
        **state_scale_constants(),
    }


def state_scale_constants() -> dict[str, Any]:
    """What quant.dynamic_state_scale needs."""
    return {
        "log2_bounds": quant.LOG2_BOUNDS,
        "outlier_log2": quant.OUTLIER_LOG2,
        "scale_limit": quant.STATE_SCALE_LIMIT,
    }


_SHIFT = {8: 16, 4: 12, 2: 12}


def _slots(spec: Spec, run_length: int, offset: int) -> list[dict[str, Any]]:
    """The codes of a word in bit order: where each is read, and the column of its first word."""
    assert spec.bits is not None
    runs = 8 // spec.bits
    found = []
    for index in range(32 // spec.bits):
        byte, run = divmod(index, runs)
        position, source = index * spec.bits, "words"
        if position + spec.bits > _HIGHEST_FIELD:
            position, source = position - 16 if spec.bits == 8 else position - 12, "shifted"
        elif spec.dynamic and spec.bits < 8 and not _exact_bias(position, offset):
            position, source = position + 12, "raised"
        found.append(
            {
                "index": index,
                "source": source,
                "mask": f"0x{(2**spec.bits - 1) << position:X}",
                "bias": f"{2**23 + (offset << position)}.0",
                "unscaled": _unscaled(f"field({source}, 0x{(2**spec.bits - 1) << position:X})", position, offset),
                "times_unit": f" * {2.0**-position!r}" if position else "",
                "scaled": _scaled(f"field({source}, 0x{(2**spec.bits - 1) << position:X})", position, offset),
                "column": f"{run * run_length + byte}",
            }
        )
    return found


def _unscaled(field: str, position: int, offset: int) -> str:
    """The code in a field of bits at ``position``, in one addition or one fused multiply-add, exactly."""
    if position == 0:
        return f"{field} - {2**23 + offset}.0"
    return f"tl.fma({field}, {2.0**-position!r}, -{2.0 ** (23 - position) + offset!r})"


def _exact_bias(position: int, offset: int) -> bool:
    """The bias of a field at ``position`` has 16 bits, so that its product with a bfloat16 is exact."""
    return 23 - position - (offset.bit_length() - 1) < 16


def _scaled(field: str, position: int, offset: int) -> str:
    """The code in a field of bits at ``position`` times old_scale, a bfloat16, and 2**position, exactly."""
    bias = 2.0**23 + (offset << position)
    if _exact_bias(position, offset):
        # One fused multiply-add.
        return f"tl.fma({field}, old_scale, old_scale * -{bias!r})"
    return f"({field} - {bias!r}) * old_scale"


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


def _split_result(runs: int, count: int) -> str:
    """The columns that `_splits` ends in, ordered by slot: slot (byte, run) stands at place 4 * run + byte."""
    return ", ".join(f"c{4 * (index % runs) + index // runs}" for index in range(count))


def padded(size: int) -> int:
    return 1 << (size - 1).bit_length()


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def _itemsize(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word
