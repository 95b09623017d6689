"""States at the addresses of earlier ones, for which CUDA graphs have been recorded."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .state import DSQState


class StaticStates:
    """Puts the states that a prompt leaves where those of an earlier prompt lay, when nobody holds these any more.

    A CUDA graph reads and writes at the addresses that it was recorded with. Every new cache would cost another
    recording of the decode step, which PyTorch keeps until the model is gone. As it is, memory is kept for as many
    caches of a batch size as lived at the same time, each with one recording. What is kept for nobody takes no more
    than what is in use.

    Args:
        positions: of the states among the outputs of the prompt's graph.
    """

    def __init__(self, positions: Sequence[int]) -> None:
        self._positions = positions
        self._places: list[_Place] = []  # longest unused first
        self._lock = threading.Lock()

    def __call__(self, outputs: Sequence[Any]) -> list[Any]:
        """``outputs``, with states of the same values at addresses of earlier ones where there are such."""
        outputs = list(outputs)
        fresh = [tensor for position in self._positions for tensor in _tensors(outputs[position])]
        with self._lock:
            placed = iter(self._place(fresh))
        for position in self._positions:
            outputs[position] = _rebuilt(outputs[position], placed)
        return outputs

    def _place(self, fresh: list[Tensor]) -> list[Tensor]:
        layout = _layout(fresh)
        fitting = (place for place in reversed(self._places) if place.layout == layout and not place.is_held())
        place = next(fitting, None)
        if place is None:
            place = _Place([tensor if _owners(tensor) == 1 else tensor.clone() for tensor in fresh], layout)
            self._make_room(place.nbytes())
        else:
            self._places.remove(place)
            with torch.no_grad():
                torch._foreach_copy_(place.tensors, fresh)
        self._places.append(place)
        return place.aliases()

    def _make_room(self, wanted: int) -> None:
        unused = [place for place in self._places if not place.is_held()]
        used = wanted + sum(place.nbytes() for place in self._places if place not in unused)
        while sum(place.nbytes() for place in unused) > used:
            self._places.remove(unused.pop(0))


class _Place:
    """Tensors of one cache, of which everybody else gets aliases."""

    def __init__(self, tensors: list[Tensor], layout: Any) -> None:
        self.tensors, self.layout = tensors, layout

    def is_held(self) -> bool:
        """True when anybody has an alias or a view of one of the tensors."""
        return any(_owners(tensor) > 1 for tensor in self.tensors)

    def aliases(self) -> list[Tensor]:
        return [tensor.detach() for tensor in self.tensors]

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def _owners(tensor: Tensor) -> int:
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) - 1  # `storage` itself


def _layout(tensors: list[Tensor]) -> Any:
    """What must be equal for some tensors to take the place of others; on another stream these may still be in use."""
    on_gpu = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
    stream = None if on_gpu is None else torch.cuda.current_stream(on_gpu).stream_id
    return stream, [(t.shape, t.stride(), t.dtype, t.device, t.is_inference()) for t in tensors]


def _tensors(state: Tensor) -> list[Tensor]:
    return [getattr(state, name) for name in state.own] if isinstance(state, DSQState) else [state]


def _rebuilt(state: Tensor, tensors: Iterator[Tensor]) -> Tensor:
    """``state`` made of the next of ``tensors``."""
    if not isinstance(state, DSQState):
        return next(tensors)
    names, meta = state.__tensor_flatten__()
    inner = {name: next(tensors) if name in state.own else getattr(state, name) for name in names}
    return DSQState.__tensor_unflatten__(inner, meta, state.shape, state.stride())
