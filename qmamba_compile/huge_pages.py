"""Memory in huge pages, for weights and states that every step reads from one end to the other."""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE_PAGE = 2**21
"""Bytes of one on x86; where they are larger, as on some Arm machines, nothing is gained and nothing lost."""

SMALLEST = 2**18
"""Bytes of a tensor that is put there. The linears of the 130M shape are 1 and 2.5 MB, the codes of a layer's states
100 KB a sequence; smaller ones than this would waste more of the last huge page than they gain."""

_LINE = 64
"""Bytes from one tensor to the next: a multiple of a line of the cache."""


class HugePages:
    """Makes empty tensors that lie one behind the other in huge pages.

    With pages of 4 KiB, a core that reads weights looks up an address more often than its tables hold, and what it
    fetches ahead by itself ends with the page. One linear of 768x3352 for one token, one thread of Zen 4: 131 us so,
    98 us from huge pages. The same machine's SSM step when it only reads codes, 130M shape, batch 8 and 32: 0.28 and
    0.33 us a head so, 0.24 and 0.25 from huge pages. A tensor in pages of its own would waste half a one; so they share
    them, and a chunk goes with the last of its tensors, the one in use also with this object or when the next is begun.
    A copy of a tensor is a plain one.

    Args:
        chunk: bytes of address space taken at a time; what nothing is put into takes no memory.
    """

    def __init__(self, chunk: int = 2**26) -> None:
        self._size = chunk
        self._chunk: mmap.mmap | None = None
        self._free = slice(0, 0)  # of the chunk
        self._lock = threading.Lock()

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """As `torch.empty`, which makes it where the system has no huge pages to give, and what is small."""
        elements = math.prod(shape)
        nbytes = elements * dtype.itemsize
        if nbytes < SMALLEST or device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        with self._lock:
            if not self._has_room(nbytes):
                return torch.empty(shape, dtype=dtype, device=device)
            chunk, begin = self._chunk, self._free.start
            self._free = slice(begin + -(-nbytes // _LINE) * _LINE, self._free.stop)
        # A storage of these bytes alone, so that saving the tensor saves no others; it keeps the chunk alive.
        return torch.frombuffer(chunk, dtype=dtype, count=elements, offset=begin).view(shape)

    def _has_room(self, nbytes: int) -> bool:
        """True when the chunk has room for so many bytes, if need be a new one."""
        if self._free.stop - self._free.start >= nbytes:
            return True
        size = max(self._size, nbytes) + HUGE_PAGE
        try:
            chunk = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            chunk.madvise(mmap.MADV_HUGEPAGE)
        except (AttributeError, OSError, TypeError):
            # Not Linux, a kernel without huge pages, or no address space to spare.
            return False
        address = torch.frombuffer(chunk, dtype=torch.uint8, count=1).data_ptr()
        self._chunk, self._free = chunk, slice(-address % HUGE_PAGE, size)
        return True
