"""Specs turned into text and loaded modules."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import pathlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..generated_code import kept, templates
from ..recurrence import EXP_CONSTANTS
from .specs import Spec

if TYPE_CHECKING:
    import torch


def render(spec: Spec) -> str:
    """Python source of the Triton kernel that ``spec`` names."""
    template = templates(pathlib.Path(__file__).parent).get_template(f"{spec.template}.py.jinja")
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
    name = f"{name}_{hashlib.sha256(source.encode()).hexdigest()[:16]}.py"
    path = kept(name, lambda path: path.write_text(source))
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module
