"""Where the codes of a packed 32-bit word are, and the expressions that read them there (fields.py.jinja)."""

from __future__ import annotations

from typing import Any

_HIGHEST_FIELD = 23
"""A field of bits can be read where it stands if it lies below bit 23, in a float32's mantissa."""

SHIFT = {8: 16, 4: 12, 2: 12}
"""Bits that a word is shifted by, for each size of a code, so that the fields beyond can be read as well."""


def slots(bits: int, run_length: int, dynamic: bool) -> list[dict[str, Any]]:
    """The codes of a word in bit order: where each is read, and the column of its first word."""
    runs, offset = 8 // bits, 2 ** (bits - 1)
    found = []
    for index in range(32 // bits):
        byte, run = divmod(index, runs)
        position, source = index * bits, "words"
        if position + bits > _HIGHEST_FIELD:
            position, source = position - SHIFT[bits], "shifted"
        elif dynamic and bits < 8 and not _exact_bias(position, offset):
            position, source = position + 12, "raised"
        found.append(
            {
                "index": index,
                "source": source,
                "mask": f"0x{(2**bits - 1) << position:X}",
                "bias": f"{2**23 + (offset << position)}.0",
                "unscaled": _unscaled(f"field({source}, 0x{(2**bits - 1) << position:X})", position, offset),
                "times_unit": f" * {2.0**-position!r}" if position else "",
                "scaled": _scaled(f"field({source}, 0x{(2**bits - 1) << position:X})", position, offset),
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


def split_result(runs: int, count: int) -> str:
    """The columns that `specs.splits` ends in, ordered by slot: slot (byte, run) stands at place 4 * run + byte."""
    return ", ".join(f"c{4 * (index % runs) + index // runs}" for index in range(count))
