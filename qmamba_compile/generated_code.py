"""What packages of templates share: how their text is made, and where what is made of it is kept."""

from __future__ import annotations

import functools
import pathlib
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING

from .errors import KernelBuildError

if TYPE_CHECKING:
    import jinja2


@functools.cache
def templates(folder: pathlib.Path) -> jinja2.Environment:
    """The templates in ``folder``; what they name and are not given is an error."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def kept(name: str, make: Callable[[pathlib.Path], object]) -> pathlib.Path:
    """Path of the file ``name`` in Inductor's cache directory, made there unless it is there.

    It appears by an atomic rename, so two processes may make it at once, and a process killed half way leaves nothing
    that a later one would load. Its mode is that of any file, by the umask: users may share the directory.

    Args:
        make: writes the file to the path that it is given, which has the same name in a folder of its own.

    Raises:
        KernelBuildError: the directory cannot be written, or has no room.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    try:
        folder = pathlib.Path(cache_dir(), "qmamba")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / name
        if path.exists():
            return path
        workplace = tempfile.TemporaryDirectory(prefix=f"{path.stem}-", dir=folder)
    except OSError as error:
        raise KernelBuildError(
            f"{error.filename}: no folder can be made there ({error.strerror}); set TORCHINDUCTOR_CACHE_DIR "
            "to one that can be written"
        ) from error
    try:
        with workplace as place:
            made = pathlib.Path(place, name)
            make(made)
            made.replace(path)
    except OSError as error:
        raise KernelBuildError(
            f"{path}: cannot be kept ({error}); set TORCHINDUCTOR_CACHE_DIR to a folder with room"
        ) from error
    return path
