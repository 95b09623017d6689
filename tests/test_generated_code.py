"""Where generated code is kept: shared by users and processes."""

import errno
import os
import stat

import pytest

from qmamba_compile.errors import KernelBuildError
from qmamba_compile.generated_code import kept
from qmamba_compile.triton_templates.render import load_source


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path / "qmamba"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_who_may_read_a_module_is_the_umask_s_to_say(folder, umask, mode):
    before = os.umask(umask)
    try:
        assert load_source("kernel", "answer = 42").answer == 42
    finally:
        os.umask(before)
    (path,) = folder.glob("kernel_*.py")
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_file_is_made_once_and_nothing_else_stays(folder):
    made = []
    for _ in range(2):
        path = kept("one.txt", lambda place: made.append(place.write_text("text")))
        assert path == folder / "one.txt" and path.read_text() == "text"
    assert len(made) == 1 and list(folder.iterdir()) == [path]


def test_what_fails_half_way_leaves_nothing(folder):
    def fail(place):
        place.write_text("half")
        raise KernelBuildError("no more")

    with pytest.raises(KernelBuildError, match="no more"):
        kept("one.txt", fail)
    assert list(folder.iterdir()) == []


def test_a_full_disk(folder):
    def write(place):
        place.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(KernelBuildError, match=r"one.txt: cannot be kept \(.*No space left on device\); set TORCHIND"):
        kept("one.txt", write)
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(folder):
    folder.write_text("in the way")
    with pytest.raises(KernelBuildError, match=r"qmamba: no folder can be made there .*set TORCHINDUCTOR_CACHE_DIR"):
        load_source("kernel", "answer = 42")
