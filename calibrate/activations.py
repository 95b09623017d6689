"""Activations of one block for many samples: in memory, or in a file that is mapped into it."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import torch
from torch import Tensor

from .work import writing

_counter = itertools.count()


class Activations:
    """[samples, l, d] float32, written and read a few samples at a time.

    Attributes:
        in_file: True when memory would not hold them.
    """

    def __init__(self, shape: tuple[int, int, int], folder: Path, limit: int) -> None:
        """Room for ``shape``; beyond ``limit`` bytes in a file of ``folder`` that no kill leaves behind."""
        self.in_file = 4 * shape[0] * shape[1] * shape[2] > limit
        if not self.in_file:
            self._rows = torch.empty(shape)
            return
        path = folder / f"activations.{next(_counter)}"
        numel = shape[0] * shape[1] * shape[2]
        # Room on the disk now: a page that finds none later kills the process without a word.
        with writing(path), open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, 4 * numel)
        self._rows = torch.from_file(str(path), shared=True, size=numel, dtype=torch.float32).view(shape)
        # The mapping keeps the file alive; nothing else needs its name.
        path.unlink()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Tensor) -> Tensor:
        """Samples ``index`` [b]: [b, l, d]."""
        return self._rows[index]

    def __setitem__(self, index: Tensor, values: Tensor) -> None:
        self._rows[index] = values.detach().float().cpu()
