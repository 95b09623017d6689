"""What all command lines share, calibration's and the benchmarks' too: a model by its name, errors, versions."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from typing import Any

import rich.console

from .errors import ConfigError, QMambaError, StrictError

REFUSED, BAD_INPUT, INTERRUPTED = 1, 2, 130
"""Exit statuses: a check that was asked for failed (--strict, a benchmark's numerics); any other error that has
something to say; Ctrl-C."""


def load_pretrained(name: str) -> Any:
    """The transformers model in a folder or of a hub name, ready for inference.

    Raises:
        ConfigError: the folder does not exist, or holds no model.
    """
    import transformers

    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") != 1
    source = folder_or_hub_name(name)
    if looks_like_path and not os.path.isdir(source):
        raise ConfigError(f"{name}: no such folder; give a folder with config.json, or a hub name")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(source)
    except Exception as problem:
        # For a damaged file, weights of other sizes or a wrong name each library has a class of its own.
        raise ConfigError(f"{name}: cannot be loaded ({type(problem).__name__}: {problem})") from problem
    return model.eval().requires_grad_(False)


def folder_or_hub_name(name: str) -> str:
    """What `from_pretrained` takes for ``name``: no shell expands the ``~`` of ``--model=~/folder``."""
    return os.path.expanduser(name)


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """One line instead of a traceback for errors that have something to say; QMAMBA_TRACEBACK=1 shows it all."""
    try:
        yield
    except Exception as problem:
        # torch wraps what a backend raises.
        cause = getattr(problem, "inner_exception", problem)
        if not isinstance(cause, QMambaError) or os.environ.get("QMAMBA_TRACEBACK"):
            raise
        print_error(f"{type(cause).__name__}: {cause}")
        sys.exit(REFUSED if isinstance(cause, StrictError) else BAD_INPUT)


def print_error(text: str) -> None:
    """A line on standard error; brackets in it, such as those of shapes, are no markup."""
    rich.console.Console(stderr=True).print(text, style="red", markup=False, highlight=False, soft_wrap=True)


def version_of(package: str) -> str | None:
    """Of an installed package; ``None`` where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
