"""Where the operators ``qmamba::*`` are registered: what `ops`, `layer_ops`, `scan_ops` and `scan_gradient` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

_library = torch.library.Library("qmamba", "DEF")

P = ParamSpec("P")
T = TypeVar("T")


def define(schema: str) -> None:
    """Declare an operator. Inductor hands it its arguments with the strides that the traced graph had."""
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))


def implement(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorates what an operator does, on every device."""
    return torch.library.impl(_library, name, "CompositeExplicitAutograd")


def fake(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorates what says of which shapes, dtypes and strides an operator's results are."""
    return torch.library.register_fake(f"qmamba::{name}", lib=_library)


def differentiate(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Give an operator its gradient, as `torch.library.register_autograd` takes it."""
    torch.library.register_autograd(f"qmamba::{name}", backward, setup_context=setup_context, lib=_library)
