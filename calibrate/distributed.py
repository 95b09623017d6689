"""Several processes under torch's launcher: who takes what, and sums over all. Alone, each function is the identity."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import CalibrationError

T = TypeVar("T")

RESUME = "the finished stages are kept: run the same command with --resume"


def world() -> tuple[int, int]:
    """(rank, number of processes)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_main() -> bool:
    """True in the one process that writes files and prints."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def joined() -> Iterator[torch.device]:
    """Join the processes of ``torchrun``; yields this process's device. Alone, nothing is joined.

    Raises:
        CalibrationError: another process ended while this one waited for it.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    # The launcher ends the other workers by SIGTERM when one is gone; the default handler would say nothing.
    signal.signal(signal.SIGTERM, _terminated)
    # Statistics and errors are summed on the CPU, and nccl knows no such tensors.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield device
    except (dist.DistError, RuntimeError) as problem:
        if not _is_lost_peer(problem):
            raise
        raise CalibrationError(f"another process of this job ended ({problem}); {RESUME}") from problem
    finally:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()


def _terminated(number: int, frame: Any) -> None:
    sys.stderr.write(f"rank {os.environ.get('RANK')}: the job was ended from outside; {RESUME}\n")
    sys.stderr.flush()
    os._exit(1)


def _is_lost_peer(problem: Exception) -> bool:
    if isinstance(problem, dist.DistError):
        return True
    return any(
        text in str(problem) for text in ("Connection closed by peer", "Connection reset", "gloo", "Broken pipe")
    )


def share(items: Iterable[T]) -> Iterator[T]:
    """Every item that is this process's: the r-th of each ``world`` in turn."""
    rank, size = world()
    return (item for index, item in enumerate(items) if index % size == rank)


def sum_(tensors: Iterable[Tensor]) -> None:
    """Add up each tensor over all processes, in place."""
    _reduce(tensors, dist.ReduceOp.SUM)


def max_(tensors: Iterable[Tensor]) -> None:
    """The elementwise largest of each tensor over all processes, in place."""
    _reduce(tensors, dist.ReduceOp.MAX)


def _reduce(tensors: Iterable[Tensor], op: Any) -> None:
    if world()[1] > 1:
        for tensor in tensors:
            dist.all_reduce(tensor, op)


def gathered(mine: list[T]) -> list[T]:
    """The items of all processes in the order in which `share` dealt them out."""
    size = world()[1]
    if size == 1:
        return mine
    all_of_them: list[list[T]] = [[] for _ in range(size)]
    dist.all_gather_object(all_of_them, mine)
    return [part[turn] for turn in range(max(map(len, all_of_them))) for part in all_of_them if turn < len(part)]


def from_main(make: Callable[[], T]) -> T:
    """What ``make`` returns in the main process, in every process."""
    rank, size = world()
    if size == 1:
        return make()
    box = [make() if rank == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def barrier() -> None:
    """Wait for all processes."""
    if world()[1] > 1:
        dist.barrier()
