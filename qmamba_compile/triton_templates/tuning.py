"""Which kernel for which GPU and shape: a small table, each entry with the compiled-code fact behind it.

No entry was measured on a GPU yet. What compilers make of the kernels is held by tests/kernels/test_triton_compiled.py.
"""

from __future__ import annotations

import dataclasses

from .render import Spec


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Published figures of one GPU. Rates: memory in bytes/s; others in operations/s.

    Attributes:
        units: streaming multiprocessors, or compute units.
        registers: of 32 bits in one unit.
        clock: boost clock in Hz.
        issue: instructions of a whole warp that a unit issues in a cycle.
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
    "gfx942": Gpu("MI300X", 304, 131072, 2.1e9, 4, 5.3e12),
}

RESIDENT_WARPS = 16
"""Warps of 127 registers that a unit of 65536 registers holds. All packed kernels but 2-bit ones compile to 96-136."""

ELEMENTS_PER_THREAD = {"packed": 64, "float32": 64, "bfloat16": 64}


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
) -> Spec:
    """The kernel for ``heads`` = batch * nheads states of headdim x dstate.

    One warp owns rows: 4 warps on 64 rows would each prepare B / state_scale and C * state_scale anew, 2 to 3.5
    instructions an element (sm_90, 64 x 128, 4 bits). Of that preparation 64 rows a program leave 1.1 instructions an
    element less than 32 do (12.3 and 11.2), so rows are only split where the GPU would stay empty.

    Raises:
        ConfigError: no kernel serves these extents.
    """
    padded = 1 << (headdim - 1).bit_length()
    rows, warps = padded, 1
    if dynamic:
        # A head's float32 state stays in registers until its scales are known: 64 of them a thread.
        while warps < 16 and padded * dstate > 64 * 32 * warps:
            warps *= 2
    else:
        gpu = GPUS.get(architecture)
        wanted = gpu.units * RESIDENT_WARPS if gpu else heads
        while rows > 8 and (rows > 64 or heads * (padded // rows) < wanted):
            rows //= 2
    return Spec(headdim, dstate, bits, dynamic, stochastic, rows, warps, architecture, state_dtype)
