"""Activations in files: what processes that share a folder, as under torchrun, write does not mix."""

import multiprocessing
import os

import pytest
import torch

from calibrate import activations
from calibrate.activations import Activations

SHAPE = (2, 3, 4)


def _fill(folder, value, barrier, answers):
    # Both are between making the file and mapping it at the same time.
    allocate = os.posix_fallocate

    def together(*arguments):
        allocate(*arguments)
        barrier.wait()

    activations.os.posix_fallocate = together
    room = Activations(SHAPE, folder, 0)
    room[torch.arange(2)] = torch.full(SHAPE, float(value))
    barrier.wait()
    answers.put((value, room[torch.arange(2)].unique().tolist()))


def test_processes_share_a_folder_and_no_file(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(2, timeout=60), context.Queue()
    ranks = [context.Process(target=_fill, args=(tmp_path, value, barrier, answers)) for value in (1, 2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert sorted(answers.get(timeout=10) for _ in ranks) == [(1, [1.0]), (2, [2.0])]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("limit, in_file", [(0, True), (4 * 2 * 3 * 4, False)])
def test_what_is_written_comes_back(tmp_path, limit, in_file):
    room = Activations(SHAPE, tmp_path, limit)
    values = torch.randn(SHAPE)
    room[torch.tensor([1, 0])] = values
    assert room.in_file == in_file and len(room) == 2
    assert torch.equal(room[torch.tensor([1, 0])], values)
    assert not list(tmp_path.iterdir())
