"""Tensors in huge pages: theirs alone, one behind the other, freed with the last of them, and plain ones elsewhere."""

from __future__ import annotations

import concurrent.futures
import copy
import gc
import io
import mmap
import pathlib
import time
import weakref
from typing import Any

import pytest
import torch

from qmamba_compile import ops, quant
from qmamba_compile.huge_pages import HUGE_PAGE, SMALLEST, HugePages
from qmamba_compile.passes.int8_weight import quantize_weight

CPU = torch.device("cpu")

needs_huge_pages = pytest.mark.skipif(
    not pathlib.Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a system without huge pages"
)


@needs_huge_pages
def test_tensors_lie_one_behind_the_other_from_the_beginning_of_a_huge_page() -> None:
    pages = HugePages()
    first = pages.empty((3, SMALLEST), torch.int8, CPU)
    second = pages.empty((SMALLEST + 1,), torch.int16, CPU)
    third = pages.empty((SMALLEST,), torch.int8, CPU)
    assert first.data_ptr() % HUGE_PAGE == 0 and first.shape == (3, SMALLEST) and first.dtype is torch.int8
    assert second.data_ptr() == first.data_ptr() + first.nbytes and second.dtype is torch.int16
    assert third.data_ptr() == second.data_ptr() + second.nbytes + 62
    for value, tensor in enumerate((first, second, third)):
        tensor.fill_(value + 1)
    assert [int(tensor.unique()) for tensor in (first, second, third)] == [1, 2, 3]


@needs_huge_pages
def test_a_tensor_larger_than_a_chunk_and_one_that_does_not_fit_behind_it() -> None:
    pages = HugePages()
    large = pages.empty((2**27,), torch.int8, CPU)
    other = pages.empty((2**24,), torch.int8, CPU)
    assert large.data_ptr() % HUGE_PAGE == 0 and other.data_ptr() % HUGE_PAGE == 0
    large[-1], other[0] = 1, 2
    assert int(large[-1]) == 1


@needs_huge_pages
def test_the_last_tensor_frees_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = []

    class Chunk(mmap.mmap):
        pass

    def new(*args: int, **flags: int) -> Chunk:
        chunk = Chunk(*args, **flags)
        chunks.append(weakref.ref(chunk))
        return chunk

    monkeypatch.setattr(mmap, "mmap", new)
    pages = HugePages()
    first, second = (pages.empty((SMALLEST,), torch.int8, CPU) for _ in range(2))
    del pages, first
    gc.collect()
    assert [chunk() is None for chunk in chunks] == [False]
    second.zero_()
    del second
    gc.collect()
    assert [chunk() is None for chunk in chunks] == [True]


@needs_huge_pages
def test_a_saved_or_copied_tensor_takes_no_other_with_it() -> None:
    pages = HugePages()
    pages.empty((SMALLEST,), torch.int8, CPU).fill_(1)
    tensor = pages.empty((SMALLEST,), torch.int8, CPU).random_()
    assert tensor.untyped_storage().nbytes() == SMALLEST
    file = io.BytesIO()
    torch.save(tensor, file)
    assert len(file.getvalue()) < SMALLEST + 4096
    file.seek(0)
    assert torch.equal(torch.load(file), tensor) and torch.equal(copy.deepcopy(tensor), tensor)


def no_madvise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)


def no_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Chunk(mmap.mmap):
        def madvise(self, *advice: int) -> None:
            raise OSError("a kernel without huge pages")

    monkeypatch.setattr(mmap, "mmap", Chunk)


def no_address_space(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: int, **flags: int) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(mmap, "mmap", refuse)


@pytest.mark.parametrize("lacking", [no_madvise, no_huge_pages, no_address_space])
def test_tensors_are_plain_where_there_are_none(monkeypatch: pytest.MonkeyPatch, lacking: Any) -> None:
    lacking(monkeypatch)
    pages = HugePages()
    for _ in range(2):
        assert pages.empty((SMALLEST,), torch.int8, CPU).fill_(1).sum() == SMALLEST


def test_what_is_small_or_elsewhere_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "mmap", None)
    pages = HugePages()
    assert pages.empty((SMALLEST - 1,), torch.int8, CPU).shape == (SMALLEST - 1,)
    assert pages.empty((SMALLEST,), torch.int8, torch.device("meta")).is_meta


@needs_huge_pages
def test_the_kernel_is_asked_for_huge_pages() -> None:
    tensor = HugePages().empty((SMALLEST,), torch.int8, CPU)
    flags, inside = "", False
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            begin, end = (int(address, 16) for address in words[0].split("-"))
            inside = begin <= tensor.data_ptr() < end
        elif inside and words[0] == "VmFlags:":
            flags = line
    assert "hg" in flags.split()


@needs_huge_pages
def test_weights_share_pages() -> None:
    pages, weights = HugePages(), [torch.randn(600, 512) for _ in range(2)]
    made = [quantize_weight(weight, pages=pages) for weight in weights]
    assert made[1].qdata.data_ptr() == made[0].qdata.data_ptr() + made[0].qdata.nbytes
    for weight, quantized in zip(weights, made, strict=True):
        torch.testing.assert_close(quantized.dequantize(), weight, rtol=0, atol=float(weight.abs().max()) / 254 + 1e-6)


@needs_huge_pages
def test_states_share_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_state_pages", HugePages())
    states = [torch.randn(2, 32, 64, 128) for _ in range(2)]
    first, second = (ops.quantize_state(state, None, 4, False, 0) for state in states)
    assert second[0].data_ptr() == first[0].data_ptr() + first[0].nbytes
    for state, packed in zip(states, (first, second), strict=True):
        assert torch.equal(packed[0], quant.quantize_state(state, 4)[0])


@needs_huge_pages
def test_threads_get_different_memory() -> None:
    class Slow(HugePages):
        @property
        def _free(self) -> Any:
            found = vars(self)["free"]
            time.sleep(0.005)  # for another thread to see the same
            return found

        @_free.setter
        def _free(self, free: Any) -> None:
            vars(self)["free"] = free

    pages = Slow()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        tensors = list(pool.map(lambda _: pages.empty((SMALLEST,), torch.int8, CPU), range(8)))
    assert len({tensor.data_ptr() for tensor in tensors}) == 8
