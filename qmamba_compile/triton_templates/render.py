"""Specs turned into text and loaded modules. The only file of this package that needs jinja2 or triton."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import pathlib
import tempfile
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..recurrence import EXP_CONSTANTS
from .specs import Spec

if TYPE_CHECKING:
    import jinja2
    import torch


def render(spec: Spec) -> str:
    """Python source of the Triton kernel that ``spec`` names."""
    template = _environment().get_template(f"{spec.template}.py.jinja")
    return template.render(spec=spec, exp=EXP_CONSTANTS, **spec.constants())


@functools.cache
def load(spec: Spec) -> ModuleType:
    """The rendered kernel as a module; its source lies in Inductor's cache directory, for Triton and for debuggers."""
    return load_source(spec.slug(), render(spec))


@functools.cache
def triton_dtype(dtype: torch.dtype) -> Any:
    """The type of Triton's that kernels take for ``dtype`` as a constant."""
    import triton.language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))


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
