"""Other forms of parameters that stay as they are, kept beside them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class FindBeside:
    """From a parameter to a form of it, shared by all graphs that ask by the same key.

    Looked up by the parameter at each call: Dynamo runs this graph for another model of the same sizes, too.
    """

    def __init__(self, key: Hashable, make: Callable[[Tensor], Tensor]) -> None:
        self._key, self._make = key, make

    def __call__(self, parameter: Tensor) -> Tensor:
        forms = _beside.setdefault(parameter, {})
        if self._key not in forms:
            forms[self._key] = _Form(self._make)
        return forms[self._key](parameter)


class _Form:
    """One form of a parameter; made again when the parameter moved, or its version shows that it was written to.

    Writes through ``.data`` raise no version, so the old form stays.
    """

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        self._make = make
        self._made_from: tuple[int, int] | None = None
        self.made: Tensor | None = None

    def __call__(self, parameter: Tensor) -> Tensor:
        now = (parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version)
        if self.made is None or self._made_from != now:
            with torch.inference_mode(False), torch.no_grad():
                self.made = self._make(parameter.detach())
            self._made_from = now
        return self.made


_beside: Any = WeakIdKeyDictionary()


def forms_of(parameter: Tensor) -> Iterator[Tensor]:
    """What is held beside a parameter."""
    for form in _beside.get(parameter, {}).values():
        if form.made is not None:
            yield form.made
