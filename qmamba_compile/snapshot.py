"""Views of a packed state, such as ``state[0]``: float snapshots to read, since the state would not see a write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import StateError

_OPERATORS = "add sub mul matmul truediv floordiv mod pow and or xor lshift rshift"
_IN_PLACE = {"__setitem__", "__set__", *(f"__i{name}__" for name in _OPERATORS.split())}  # `__set__` of .data


class Snapshot(Tensor):
    """A tensor that refuses writes. Views of it are snapshots, too; all other results are plain tensors."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        written = args[0] if args and _writes(func) else kwargs.get("out")
        if isinstance(written, Snapshot):
            raise StateError(
                f"{func.__name__} writes to a view of a packed state, a snapshot {list(written.shape)}, and the write "
                "would be lost; reset sequence i by state[i : i + 1].zero_(), or clone() the view"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            memory = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Snapshot)}
            return snapshots(result, lambda tensor: tensor.untyped_storage().data_ptr() in memory)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._plain().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self._plain().clone()

    def _plain(self) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)


def _writes(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
    return in_place or name in _IN_PLACE


def snapshots(result: Any, chosen: Callable[[Tensor], bool] = lambda tensor: True) -> Any:
    """``result``, or each tensor of a list or tuple, as a `Snapshot` where it is a real tensor and ``chosen``."""
    if type(result) in (list, tuple):
        return type(result)(snapshots(item, chosen) for item in result)
    real = type(result) in (Tensor, Snapshot) and result.device.type != "meta"
    return result.as_subclass(Snapshot) if real and chosen(result) else result
