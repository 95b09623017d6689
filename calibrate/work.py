"""The folder beside an artifact that is being made: finished stages, each one file, for ``--resume``."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from qmamba_compile.artifact import replace_file

from . import distributed
from .errors import CalibrationError


class Work:
    """Stages of one calibration on disk. The main process writes; all read.

    Attributes:
        folder: ``<out>.work``.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], *, resume: bool) -> None:
        """Open or make the folder.

        Args:
            identity: what a calibration depends on: model, data, options. A resumed one must have the same.

        Raises:
            CalibrationError: the folder belongs to another calibration, or cannot be written.
        """
        self.folder = out.with_name(f"{out.name}.work")
        if distributed.is_main():
            if not resume:
                shutil.rmtree(self.folder, ignore_errors=True)
            with writing(self.folder, begun=False):
                self.folder.mkdir(parents=True, exist_ok=True)
            self._check_identity(json.loads(json.dumps(identity)))
        distributed.barrier()

    def _check_identity(self, identity: dict[str, Any]) -> None:
        path = self.folder / "identity.json"
        if not path.exists():
            _replace(path, json.dumps(identity, indent=1, sort_keys=True).encode())
            return
        before = json.loads(path.read_text())
        changed = sorted(key for key in {*before, *identity} if before.get(key) != identity.get(key))
        if changed:
            differences = "; ".join(f"{key} was {before.get(key)!r} and is {identity.get(key)!r}" for key in changed)
            raise CalibrationError(
                f"{self.folder}: made by another calibration ({differences}); give the same options, or start over "
                "without --resume"
            )

    def save(self, stage: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any] | None = None) -> None:
        """Keep a finished stage: a kill at any moment leaves the whole file or none."""
        if distributed.is_main():
            content = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            content.setdefault("_", torch.zeros(0))
            metadata = {"notes": json.dumps(notes or {})}
            _replace(self.folder / f"{stage}.safetensors", safetensors.torch.save(content, metadata=metadata))

    def load(self, stage: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and notes of a finished stage, or ``None``; the same answer in all processes."""
        path = self.folder / f"{stage}.safetensors"
        if not distributed.from_main(path.exists):
            return None
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key).clone() for key in file.keys() if key != "_"}  # noqa: SIM118
            return tensors, json.loads((file.metadata() or {})["notes"])

    def remove(self) -> None:
        """Called when the artifact is written."""
        if distributed.is_main():
            shutil.rmtree(self.folder, ignore_errors=True)


def _replace(path: Path, content: bytes) -> None:
    with writing(path):
        replace_file(path, content)


@contextlib.contextmanager
def writing(path: Path, *, begun: bool = True) -> Iterator[None]:
    """Say which file could not be written, and what to do about it; once ``begun``, there are stages to go on with."""
    try:
        yield
    except OSError as problem:
        remedy = f"free space or choose another --out, then continue: {distributed.RESUME}"
        raise CalibrationError(
            f"{path}: cannot be written ({problem.strerror or problem}); {remedy if begun else 'choose another --out'}"
        ) from problem
