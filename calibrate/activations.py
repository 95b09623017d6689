"""Activations of one block for many samples: in memory, or in a file that is mapped into it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from .work import writing


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
        numel = shape[0] * shape[1] * shape[2]
        # A name of its own: under torchrun all processes have this folder. The mapping keeps the file alive without it.
        with writing(folder / "activations"), tempfile.NamedTemporaryFile(dir=folder, prefix="activations.") as file:
            # Room on the disk now: a page that finds none later kills the process without a word.
            os.posix_fallocate(file.fileno(), 0, 4 * numel)
            self._rows = torch.from_file(file.name, shared=True, size=numel, dtype=torch.float32).view(shape)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Tensor) -> Tensor:
        """Samples ``index`` [b]: [b, l, d]."""
        return self._rows[index]

    def __setitem__(self, index: Tensor, values: Tensor) -> None:
        self._rows[index] = values.detach().float().cpu()
