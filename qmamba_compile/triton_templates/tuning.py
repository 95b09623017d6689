"""Which kernel for which GPU and shape: a small table, each entry with the measurement or compiled-code fact behind it.

Microseconds are of an H100 SXM (bench/results/gpu-h100.json); no other GPU was measured. What compilers make of the
kernels is held by tests/kernels/test_triton_compiled.py.
"""

from __future__ import annotations

import dataclasses

from .layer_specs import CausalConvSpec, ConvSpec, LinearSpec, RowsSpec
from .scan_specs import ChunkScanSpec, SsmScanBackwardSpec, SsmScanSpec
from .specs import lanes_of, latest_before, padded
from .state_specs import NOT_PREFETCHED, PREFETCHED_TILES, DequantizeSpec, QuantizeSpec, StateSpec


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Published figures of one GPU.

    Attributes:
        units: streaming multiprocessors, or compute units.
        registers: of 32 bits in one unit.
        clock: boost clock in Hz.
        issue: instructions of a whole warp that a unit executes in a cycle: four quarters of 32 lanes each on NVIDIA;
            four of 16 lanes, for warps of 64, on AMD.
        memory: bandwidth in bytes/s.
    """

    name: str
    units: int
    registers: int
    clock: float
    issue: int
    memory: float


GPUS = {
    "sm_80": Gpu("A100 SXM 80 GB", 108, 65536, 1.41e9, 4, 2.04e12),
    "sm_86": Gpu("RTX A5000", 64, 65536, 1.695e9, 4, 0.768e12),
    "sm_89": Gpu("L40S", 142, 65536, 2.52e9, 4, 0.864e12),
    "sm_90": Gpu("H200 SXM", 132, 65536, 1.98e9, 4, 4.8e12),
    "sm_100": Gpu("B200", 148, 65536, 1.965e9, 4, 8.0e12),
    "sm_120": Gpu("RTX 5090", 170, 65536, 2.407e9, 4, 1.792e12),
    "gfx942": Gpu("MI300X", 304, 131072, 2.1e9, 1, 5.3e12),
    "gfx950": Gpu("MI355X", 256, 131072, 2.4e9, 1, 8.0e12),
}
"""One GPU of each architecture; other GPUs of it are taken for as large."""


def gpu_of(architecture: str) -> Gpu | None:
    """Figures for one of `specs.TARGETS`: its own, or of NVIDIA's the latest before it. None for the interpreter."""
    if architecture == "interpreter":
        return None
    return GPUS[latest_before(architecture, GPUS)]


PLANNED_WARPS = {"float or 8": 24, "other": 8}
"""Warps that a unit must at least hold at once, which a kernel's registers decide. 8 bits, calibrated, nearest: 80.
4 bits with four tiles in registers: 168. At 2 bits a thread's 16-byte access is 64 columns, and B, C and the state of
each lie in a register; stochastic rounding and dynamic scales need more as well: 212 to 255."""


def planned_warps(bits: int | None, dynamic: bool, stochastic: bool) -> int:
    """Entry of `PLANNED_WARPS` for a kernel."""
    return PLANNED_WARPS["other" if dynamic or stochastic or bits in (2, 4) else "float or 8"]


MEASURED_BY_A_THREAD = 256
"""Most elements of a head, with dynamic scales, for each thread of its program: a head of 64 x 128 has one warp. Where
there are fewer heads than units half of it: batch 1 of 2.7B's shape takes 5.8 us with two warps for 7.9 with one."""


def ssm_update(
    architecture: str,
    heads: int,
    headdim: int,
    dstate: int,
    bits: int | None,
    dynamic: bool,
    stochastic: bool,
    *,
    state_dtype: str = "float32",
    flush_interval: int = 1,
    ring_bits: int = 16,
    loads_ahead: bool = True,
) -> StateSpec:
    """The kernel for ``heads`` = batch * nheads states of headdim x dstate.

    Calibrated: one warp owns rows, four tiles of them, all loaded before it computes (`PREFETCHED_TILES`). With fewer
    the preparation of B / state_scale and C * state_scale weighs more: 11.3 instructions an element with 32 rows, 13.8
    with 16 (sm_90, 64 x 128, 4 bits); so a head is split further only where the GPU would stay empty.

    Dynamic: one warp owns the head, so that a column's sum is of its own threads. Microseconds when h still waited in
    registers for its scales (H100, 2.7B shape, batch 128, 4 bits): 133 with one warp, which spilled; 267 with two, 679
    with four. What warps exchange through shared memory collides in its banks, 11 to 14 accesses at a time. Now h is
    computed twice, from words read twice: 20.5 instructions an element, 18 barriers and room for 12 warps of a unit,
    where two warps took 20.5, 58 and 8 (sm_90, triton 3.6), and 77 us.

    Checkpointed: a head is split only where all programs stay resident at once, since that saves a launch (2.7B shape,
    batch 8: 5.8 us with 640 programs, 7.3 with 1280). What only reads has one warp a head. What stores has 64 elements
    a thread; 32 of stochastic rounding; of dynamic scales one warp a head, as above: 32 instructions an element and
    207 us, where two warps and one pass took 26, and 375 us.

    Raises:
        ConfigError: no kernel serves these extents.
    """
    padded = 1 << (headdim - 1).bit_length()
    lanes = lanes_of(architecture)
    rows, warps = padded, 1
    gpu = gpu_of(architecture)
    if dynamic:
        few = gpu is not None and heads <= gpu.units and flush_interval == 1
        while warps < 16 and padded * dstate > (MEASURED_BY_A_THREAD >> few) * lanes * warps:
            warps *= 2
    else:
        wanted = gpu.units * planned_warps(bits, dynamic, stochastic) if gpu else heads
        # Fewer rows than one 16-byte access of all lanes covers would narrow the accesses.
        # A row of less than a byte is StateSpec's to refuse.
        row_bytes = max(1, dstate * (bits or (32 if state_dtype == "float32" else 16)) // 8)
        fewest = max(1, lanes * 16 // row_bytes)
        ahead = loads_ahead and bits == 4 and not stochastic and flush_interval == 1
        most = PREFETCHED_TILES * fewest if ahead and architecture not in NOT_PREFETCHED else 64
        if flush_interval > 1:
            wanted //= 2
        while rows > fewest and (rows > most or heads * (padded // rows) < wanted):
            rows //= 2
    if flush_interval > 1:
        rows, tile = max(16, rows), max(16, padded if dynamic else 16)
        held = MEASURED_BY_A_THREAD if dynamic else 32 if stochastic else 64
        while warps < 16 and tile * dstate > held * lanes * warps:
            warps *= 2
    extents = (headdim, dstate, bits, dynamic, stochastic)
    return StateSpec(*extents, rows, warps, architecture, state_dtype, flush_interval, ring_bits)


def launches(spec: StateSpec, programs: int, batch: int) -> dict[bool | None, int]:
    """The launches of a checkpointed step whose sequences take ``programs`` each: STORES, and the grid's last extent.

    One that does either, where all programs are resident at once: 4.4 us for 6.1 (2.7B shape, batch 1). It has the
    registers of storing, which reading a larger batch has no use for. Then one that stores, whose programs walk over
    the batch, as many as are resident, and one that reads. One storing program for each sequence took 7.8 us to find
    nothing to store (batch 128), walking ones 3.8.
    """
    gpu = gpu_of(spec.target)
    resident = gpu.units * PLANNED_WARPS["other"] // spec.warps if gpu else 1
    if programs * batch <= resident:
        return {None: batch}
    turns = -(-programs * batch // resident)
    return {True: -(-batch // turns) if spec.walks else batch, False: batch}


MOST_QUANTIZED_ON_THE_WAY = 10240
"""Elements of x, rows padded to a power of two, that a `w8a8_linear` quantizes itself, as each of its programs does
anew. Microseconds, and with `quantize_rows`: 3352 x 768, 1 row 3.6 (4.9), 8 rows 4.8 (5.0), 16 rows 6.3 (5.1);
2560 x 5120, 1 row 8.6 (8.9), 2 rows 9.1 (10.6), 8 rows 15.4 (10.6)."""

QUANTIZED_BY_FEW_WARPS = 2
"""Rows up to which as many warps do so as multiply codes. Beyond, four: 4 rows of 1536 take 4.0 us for 4.4 with
two; one row of 5120 takes 10.8 with four, and 8.6 with two."""


def w8a8_linear(architecture: str, rows: int, outputs: int, k: int, *, prequantized: bool = False) -> LinearSpec:
    """The kernel for x [rows, k] and weights [outputs, k].

    x is quantized on the way where it is small, by `MOST_QUANTIZED_ON_THE_WAY`.

    Up to 16 rows the weights are read once, so what counts is bytes under way: 32 to 64 KiB a program. Beyond, tiles
    are as large as still give each unit one. k is split only where it is long and few programs would share it: the
    launch that adds up the parts costs more than it saves elsewhere (2560 x 5120, one row: 7.6 us whole, 8.7 in four
    parts).
    """
    gpu = gpu_of(architecture)
    units = gpu.units if gpu else 1

    def programs(block_m: int, block_o: int) -> int:
        return -(-outputs // block_o) * -(-rows // block_m)

    splits, warps = 1, 4
    block_m = min(64, max(16, 1 << (rows - 1).bit_length()))
    if rows <= 16:
        block_o, block_k, stages = 32, 256, 4
        if programs(16, 32) < 2 * units:
            block_o, block_k, warps = 16, 512, 2
        while gpu and programs(16, block_o) * splits < units // 4 and k // (2 * splits) >= 4 * block_k:
            splits *= 2
    elif rows <= 64:
        block_o, block_k, stages = 64, 256, 3
        if programs(64, 64) < units:
            block_o, stages = (32 if programs(64, 32) >= units // 2 else 16), 4
    elif programs(128, 128) >= 4 * units and k >= 2048:
        # Four warps hold a tile of sm_90 without spills, and eight do not; elsewhere it is the other way around.
        block_m, block_o, block_k, stages, warps = 128, 128, 128, 3, 4 if architecture == "sm_90" else 8
    elif programs(128, 64) >= units:
        block_m, block_o, block_k, stages = 128, 64, 128, 4 if programs(128, 64) <= 2 * units else 3
    else:
        block_o, block_k, stages = 64, 256, 3
    if architecture.startswith("gfx"):
        stages = 2  # its shared memory is 64 KiB
    quantized_here = padded(rows) * k
    block_x = None
    if not prequantized and rows <= 16 and quantized_here <= MOST_QUANTIZED_ON_THE_WAY:
        block_x, warps = padded(rows), warps if rows <= QUANTIZED_BY_FEW_WARPS else 4
    return LinearSpec(block_o, block_k, splits, warps, stages, architecture, block_m, block_x)


def chunk_scan(architecture: str, headdim: int, dstate: int) -> ChunkScanSpec:
    """The kernel for states of headdim x dstate.

    As many rows as hold the state in 64 registers a thread: C . B is computed once more for each further block of rows.
    A token of a head takes 169 instructions with 64 rows, 283 with 32 (sm_90, 64 x 128). 32 tokens: with 64, the
    operands of one product after another spill.

    Raises:
        ConfigError: no kernel serves these extents.
    """
    block_p = min(64 if dstate <= 128 else 32, max(16, padded(headdim)))
    return ChunkScanSpec(headdim, dstate, 32 if dstate <= 128 else 16, block_p, 4, architecture)


SCAN_PROGRAMS = 2
"""Programs of `chunk_scan` that a unit of NVIDIA's holds at once: 128 threads of up to 256 registers. Of AMD's, one."""

FEWEST_CHUNKS = 8
"""Chunks of a part of a scan. Its first state costs a read of a state for each part before it, 32 KiB of 64 x 128."""


def scan_parts(architecture: str, programs: int, chunks: int) -> int:
    """Parts of a sequence of ``chunks`` chunks that are scanned side by side, by ``programs`` programs each.

    Every part but the last is walked twice, the first time for its state alone, which takes 0.43 of the instructions
    (sm_90, 64 x 128: 587 a chunk and warp for 1354); so there are no more than the GPU holds at once. 4096 tokens of 80
    heads: three parts, 83,000 instructions of a warp one after another where one part has 173,000.
    """
    gpu = gpu_of(architecture)
    if gpu is None:
        return 1
    held = gpu.units * (1 if lanes_of(architecture) == 64 else SCAN_PROGRAMS)
    return max(1, min(held // programs, chunks // FEWEST_CHUNKS))


def quantize_state(
    architecture: str, heads: int, headdim: int, dstate: int, bits: int, dynamic: bool, stochastic: bool
) -> QuantizeSpec:
    """Rows as `ssm_update` has them, and its warps but for dynamic scales: here the whole head waits in registers, 128
    elements a thread, or 64 where 128 spill.

    Raises:
        ConfigError: no kernel serves these extents.
    """
    spec = ssm_update(architecture, heads, headdim, dstate, bits, dynamic, stochastic, loads_ahead=False)
    warps = spec.warps
    if dynamic:
        lanes = lanes_of(architecture)
        held = 64 if stochastic or bits == 2 or lanes == 64 else 128
        while warps < 16 and spec.rows * dstate > held * lanes * warps:
            warps *= 2
    return QuantizeSpec(headdim, dstate, bits, dynamic, stochastic, spec.rows, warps, architecture)


def dequantize_state(architecture: str, heads: int, headdim: int, dstate: int, bits: int) -> DequantizeSpec:
    """The same for unpacking, which needs no row but its own.

    Raises:
        ConfigError: no kernel serves these extents.
    """
    spec = ssm_update(architecture, heads, headdim, dstate, bits, False, False, loads_ahead=False)
    return DequantizeSpec(headdim, dstate, bits, rows=spec.rows, warps=spec.warps, target=architecture)


def quantize_rows(architecture: str, k: int, group_size: int | None) -> RowsSpec:
    """One program a row, 16 features a thread where that takes at most 16 warps.

    Raises:
        ConfigError: no kernel serves these extents.
    """
    spec = RowsSpec(k, group_size, 1, architecture)
    lanes, warps = lanes_of(architecture), 1
    while warps < 16 and spec.elements > 16 * lanes * warps:
        warps *= 2
    return dataclasses.replace(spec, warps=warps)


def conv_update(architecture: str, channels: int, length: int, taps: int) -> ConvSpec:
    """The kernel for ``channels`` = batch * d: a channel a thread, in blocks of one warp where those fill the GPU less
    than twice, of four otherwise.

    Raises:
        ConfigError: no kernel serves these extents.
    """
    lanes = lanes_of(architecture)
    gpu = gpu_of(architecture)
    warps = 1 if gpu and channels < 2 * 4 * lanes * gpu.units else 4
    return ConvSpec(length, taps, warps * lanes, warps, architecture)


CONVOLVED_TOKENS = (16, 4)
"""Most and fewest tokens of a program of `causal_conv`, which reads three more. Instructions an element (sm_90,
bfloat16): 17.5 with 16 tokens, 19.9 with 8, 24.1 with 4. 16.5 with 32, of which half as many share a long prompt."""

CONVOLVING_WARPS = 16
"""Warps of `causal_conv` that a unit must at least hold at once."""


def causal_conv(architecture: str, batch: int, channels: int, seqlen: int, taps: int, itemsize: int) -> CausalConvSpec:
    """The kernel for xBC [batch, channels, seqlen]: one warp, of whose threads each has 16 bytes of a token.

    A thread walks along the tokens, and so loads and converts an input once for its products with four taps: 17.5
    instructions an element, where tiles with four shifted loads take 25 to 31 (sm_90, bfloat16). Fewer tokens a program
    where programs would fill the GPU less than twice.

    Raises:
        ConfigError: no kernel serves these extents.
    """
    block = lanes_of(architecture) * 16 // itemsize
    gpu = gpu_of(architecture)
    wanted = 2 * gpu.units * CONVOLVING_WARPS if gpu else 1
    tokens, fewest = CONVOLVED_TOKENS
    while tokens > fewest and batch * -(-channels // block) * -(-seqlen // tokens) < wanted:
        tokens //= 2
    return CausalConvSpec(taps, tokens, block, 1, architecture)


SCAN_ELEMENTS = 32
"""Elements of the state that a thread of the faithful scan or its gradient holds."""


def ssm_scan(
    architecture: str, headdim: int, dstate: int, bits: int | None, dynamic: bool, stochastic: bool
) -> SsmScanSpec:
    """The faithful scan of states of headdim x dstate.

    Calibrated or float: one warp a program, whose rows need nothing from other rows, so that the steps of many programs
    hide each other's latency. Dynamic: as many warps as hold the head.

    Raises:
        ConfigError: no kernel serves these extents.
    """
    held = SCAN_ELEMENTS * lanes_of(architecture)
    rows, columns = padded(headdim), padded(dstate)
    if dynamic:
        warps = max(1, min(16, rows * columns // held))
    else:
        rows, warps = max(1, min(rows, held // columns)), 1
    return SsmScanSpec(headdim, dstate, bits, dynamic, stochastic, rows, warps, architecture)


def ssm_scan_backward(architecture: str, headdim: int, dstate: int) -> SsmScanBackwardSpec:
    """Its gradient, which sums over rows: as many warps as hold the head.

    Raises:
        ConfigError: no kernel serves these extents.
    """
    held = SCAN_ELEMENTS * lanes_of(architecture)
    warps = max(1, min(16, padded(headdim) * padded(dstate) // held))
    return SsmScanBackwardSpec(headdim, dstate, warps, architecture)
