"""What the passes over depthwise convolutions have in common: the call, the part that is read, the activation."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import fx

from ..errors import SkipReason
from ..fx_utils import argument, op_name, same_size, shape_of, users, value_of
from .base import NoMatchError


@dataclasses.dataclass(frozen=True)
class Depthwise:
    """A depthwise convolution without stride and dilation.

    Attributes:
        x: [b, d, l]; weight: [d, 1, d_conv]; bias: [d] or None.
        padding: zeros on both sides.
    """

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    padding: int

    @property
    def taps(self) -> int:
        """d_conv."""
        return int(shape_of(self.weight)[-1])


def match_depthwise(conv: fx.Node) -> Depthwise | None:
    """Name the parts of ``conv``; None if it is something else, or autocast has to make one dtype of its operands."""
    if op_name(conv) != "conv1d":
        return None
    x, weight, bias = (argument(conv, position, name) for position, name in enumerate(("input", "weight", "bias")))
    padding = _number(argument(conv, 4, "padding", 0))
    steps = [_number(argument(conv, position, name, 1)) for position, name in ((3, "stride"), (5, "dilation"))]
    channels, depth, _ = shape_of(weight)
    if depth != 1 or not same_size(argument(conv, 6, "groups", 1), channels) or padding is None or steps != [1, 1]:
        return None
    dtypes = {value_of(node).dtype for node in (x, weight, bias) if node is not None}
    if len(shape_of(x)) != 3 or len(dtypes) != 1:
        return None
    return Depthwise(x, weight, bias, padding)


def only_slice(node: fx.Node) -> fx.Node:
    """The one user of ``node``, which has to take a part of it.

    Raises:
        NoMatchError: there are others.
    """
    found = list(node.users)
    if len(found) != 1 or op_name(found[0]) != "getitem":
        raise NoMatchError(SkipReason.SECOND_READER, f"{node} has {len(found)} readers, expected one slice")
    return found[0]


def activation_of(y: fx.Node) -> fx.Node | None:
    """silu, where nothing else reads ``y``."""
    activations = users(y, "silu")
    return activations[0] if len(activations) == len(y.users) == 1 else None


def _number(value: Any) -> int | None:
    """Of an option of conv1d, which may be a sequence of one; None for ``"same"`` and the like."""
    if isinstance(value, (tuple, list)) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, int) else None
