"""`DSQState`: the packed SSM state, a tensor subclass that looks like the float state it stands for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils._pytree import tree_map_only

from . import ops as _ops  # noqa: F401  (registers qmamba::*)
from . import quant
from .errors import ConfigError, StateError
from .recurrence import Ring

aten = torch.ops.aten

RING_TENSORS = tuple(f"ring_{name}" for name in Ring._fields)
"""Names of a ring's tensors among those that a state is made of."""

Form = tuple[tuple[str, ...], tuple[int, bool], tuple[Any, ...]]


@functools.cache
def _shared(form: Form) -> Form:
    """The same object for equal forms: a guard of Dynamo then compares addresses."""
    return form


class DSQState(torch.Tensor):
    """SSM state [batch, nheads, headdim, dstate], float32 to look at, packed codes and two scale vectors inside.

    The model's own cache holds it like any tensor. Reads dequantize to a plain snapshot, ``copy_`` of a float state
    requantizes, ``copy_`` of a `DSQState` copies codes. Batch indexing (``index_select``, ``s[idx]``, ``cat``,
    ``chunk``), ``clone``, ``to``, ``zero_``, deep copies and pickling keep it packed. Every other write raises
    `StateError`, since a write to a dequantized snapshot would be lost: as one to a view is (``s[0]``, not ``s[:1]``).

    Attributes:
        packed: codes [b, h, p, n*bits/8] (uint8; int8 at 8 bits), see `quant.pack`.
        channel_scale: bfloat16 [b, h, p].
        state_scale: bfloat16 [b, h, n] when dynamic, [h, n] when calibrated (shared by the batch, never written).
        rng: int64 [b, 2], the key and the number of stores so far of each sequence.
        bits: bits of a code.
        stochastic: rounding of the next store.
        form: all that two states have in common that differ in nothing but batch and values: names of the inner
            tensors; bits and stochastic; dtype, sizes behind the first and strides of each inner tensor.
        ring_x, ring_B, ...: of a checkpointed state, what `ring` is made of.
    """

    packed: Tensor
    channel_scale: Tensor
    state_scale: Tensor
    rng: Tensor
    bits: int
    stochastic: bool
    form: Form

    @staticmethod
    def __new__(
        cls,
        packed: Tensor,
        channel_scale: Tensor,
        state_scale: Tensor,
        rng: Tensor,
        bits: int,
        stochastic: bool = False,
        ring: Ring | None = None,
        outer_size: Sequence[int] | None = None,
        outer_stride: Sequence[int] | None = None,
    ) -> DSQState:
        if outer_size is None:
            dstate = quant.unpacked_width(packed.shape[-1], bits)
            outer_size = (*packed.shape[:-1], dstate)
            outer_stride = _contiguous_strides(outer_size)
        self = torch.Tensor._make_wrapper_subclass(
            cls, outer_size, strides=outer_stride, dtype=torch.float32, device=packed.device, requires_grad=False
        )
        self.packed, self.channel_scale, self.state_scale, self.rng = packed, channel_scale, state_scale, rng
        self.bits, self.stochastic = bits, stochastic
        names: tuple[str, ...] = ("packed", "channel_scale", "state_scale", "rng")
        if ring is not None:
            for name, tensor in zip(RING_TENSORS, ring, strict=True):
                setattr(self, name, tensor)
            names += tuple(name for name in RING_TENSORS if getattr(self, name) is not None)
        self.form = _shared((names, (bits, stochastic), tuple(_layout(getattr(self, name)) for name in names)))
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    @classmethod
    def from_float(
        cls,
        h: Tensor,
        bits: int = 4,
        *,
        state_scale: Tensor | None = None,
        stochastic: bool = False,
        seed: int = 0,
        ring: Ring | None = None,
    ) -> DSQState:
        """Quantize ``h`` [b, h, p, n]; ``state_scale`` [h, n] selects calibrated scales, an empty ``ring`` checkpoints.

        Raises:
            ConfigError: ``bits`` is none of `quant.STATE_BITS`.
            StateError: ``h`` or ``state_scale`` has another shape, or dstate does not pack into whole bytes.
        """
        if bits not in quant.STATE_BITS:
            raise ConfigError(f"bits={bits} is not allowed; use one of {quant.STATE_BITS}")
        if h.dim() != 4:
            raise StateError(f"a state of shape {list(h.shape)} cannot be packed; it must be [b, h, p, n]")
        if state_scale is not None and state_scale.shape != (h.shape[1], h.shape[3]):
            raise StateError(
                f"state_scale of shape {list(state_scale.shape)} does not belong to a state {list(h.shape)}; "
                f"it must be {[h.shape[1], h.shape[3]]}, or None to measure it"
            )
        require_packable(h.shape[-1], bits, "DSQState")
        calibrated = None if state_scale is None else quant.store_scale(state_scale)
        packed, channel_scale, rng, *dynamic = torch.ops.qmamba.quantize_state(
            h.detach(), calibrated, bits, stochastic, seed
        )
        state_scale = calibrated if calibrated is not None else dynamic[0]
        return cls(packed, channel_scale, state_scale, rng, bits, stochastic, ring)

    @property
    def ring(self) -> Ring | None:
        """Inputs of the steps since the codes were stored, or None when every step stores."""
        return Ring(*(getattr(self, name) for name in RING_TENSORS)) if hasattr(self, "ring_x") else None

    @property
    def flush_interval(self) -> int:
        """Steps from one store of the codes to the next."""
        return 1 if self.ring is None else self.ring.x.shape[1] + 1

    @property
    def dynamic(self) -> bool:
        """True when state_scale is taken from the state at each store."""
        return self.state_scale.dim() == 3

    @property
    def own(self) -> tuple[str, ...]:
        """Names of the inner tensors that no other state shares: all but calibrated scales."""
        return tuple(name for name in self.form[0] if name != "state_scale" or self.dynamic)

    @property
    def packed_nbytes(self) -> int:
        """Bytes really held, shared calibrated scales included (``nbytes`` shows the float facade)."""
        return sum(getattr(self, name).nbytes for name in self.__tensor_flatten__()[0])

    @property
    def bits_per_element(self) -> float:
        """Bits per state element, everything that grows with the batch included (all slots of the ring, too)."""
        shared = 0 if self.dynamic else self.state_scale.nbytes
        return 8 * (self.packed_nbytes - shared) / self.numel()

    def dequantize(self) -> Tensor:
        """Plain float32 snapshot [b, h, p, n] of the state now, the inputs in the ring included."""
        return torch.ops.qmamba.dequantize_state(
            self.packed, self.channel_scale, self.state_scale, self.bits, *(self.ring or ())
        )

    materialize = dequantize

    def nonfinite(self) -> Tensor:
        """Heads [b, h] whose state is NaN or infinite: its scale says so, or what a step in the ring adds to it."""
        bad = ~self.channel_scale.isfinite().all(dim=-1)
        if self.ring is not None and self.flush_interval > 1:
            ring = self.ring
            # A step adds the products of its x and its B: that of the largest is finite where all are.
            x, B = (tensor.float().abs().amax(dim=-1) for tensor in (ring.x, ring.B))  # [b, R, h], [b, R, g]
            product = x * B.repeat_interleave(x.shape[2] // B.shape[2], dim=2)
            inputs = (product if ring.scale is None else product * ring.scale).isfinite()
            decays = ring.decay.isfinite()
            slots = torch.arange(ring.decay.shape[1], device=self.device)
            filled = (slots < ring.position[:, None])[..., None]  # [b, R, 1]
            bad = bad | (filled & ~(inputs & decays)).any(dim=1)
        return bad

    # --- torch plumbing --------------------------------------------------------------------------------------------

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __tensor_flatten__(self) -> tuple[list[str], tuple[int, bool]]:
        names, meta, _ = self.form
        return list(names), meta

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], meta: tuple[int, bool], outer_size: Sequence[int], outer_stride: Sequence[int]
    ) -> DSQState:
        return DSQState(
            inner["packed"],
            inner["channel_scale"],
            inner["state_scale"],
            inner["rng"],
            *meta,
            Ring(*map(inner.get, RING_TENSORS)) if "ring_x" in inner else None,  # type: ignore[arg-type]
            outer_size=outer_size,
            outer_stride=outer_stride,
        )

    def _stable_hash_for_caching(self) -> str:
        ring = None if self.ring is None else (self.ring.x.dtype, tuple(self.ring.x.shape), tuple(self.ring.B.shape))
        return f"DSQState-{self.bits}-{self.stochastic}-{self.dynamic}-{tuple(self.shape)}-{ring}-{self.device}"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and args and type(args[0]) is DSQState and not args[0].is_inference():
            # Autograd counts the versions of what is a view of such a state, and a tensor of inference mode has none.
            with torch.inference_mode(False), torch.no_grad():
                return cls.__torch_dispatch__(func, types, args, kwargs)
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        _refuse_writes(func, args, kwargs)
        args, kwargs = tree_map_only(DSQState, DSQState.dequantize, (args, kwargs))
        return func(*args, **kwargs)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise StateError(
            f"DSQState{list(self.shape)}: item assignment would be lost; use copy_ of a whole state, "
            "or dequantize(), change it, and DSQState.from_float()"
        )

    # Neither of the next two reaches the dispatcher.
    @property
    def data(self) -> Tensor:
        """The same packed state, as ``detach()`` gives it."""
        return self.detach()

    @data.setter
    def data(self, value: Any) -> None:
        raise StateError(f"DSQState{list(self.shape)}: assignment to .data would be lost; use copy_")

    def apply_(self, function: Any) -> DSQState:
        raise StateError(f"DSQState{list(self.shape)}: apply_ would be lost; use copy_")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        scales = "dynamic" if self.dynamic else "calibrated"
        rounding = "stochastic" if self.stochastic else "nearest"
        stores = f", flush_interval={self.flush_interval}" if self.ring is not None else ""
        return f"DSQState(shape={list(self.shape)}, bits={self.bits}, scales={scales}, rounding={rounding}{stores})"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        inner = (self.packed, self.channel_scale, self.state_scale, self.rng)
        return DSQState, (*inner, self.bits, self.stochastic, self.ring)

    def __deepcopy__(self, memo: dict[int, Any]) -> DSQState:
        copied = _map(self, Tensor.clone, Tensor.clone)
        memo[id(self)] = copied
        return copied


torch.serialization.add_safe_globals([DSQState, Ring])


def require_packable(dstate: int, bits: int, layer: str) -> None:
    """Raise `StateError` unless ``dstate`` codes of ``bits`` bits fill whole bytes."""
    if not quant.packable(dstate, bits):
        raise StateError(
            f"{layer}: dstate={dstate} cannot be packed {8 // bits} per byte; "
            f"use a dstate divisible by {8 // bits} or state_bits=8"
        )


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    """What `DSQState.form` says of an inner tensor; None for a symbolic size, which only a traced one has."""
    return tensor.dtype, *(n if type(n) is int else None for n in (*tensor.shape[1:], *tensor.stride()))


def _contiguous_strides(size: Sequence[int]) -> tuple[int, ...]:
    strides: list[int] = [1]
    for extent in reversed(size[1:]):
        strides.insert(0, strides[0] * extent)
    return tuple(strides)


def _map(
    state: DSQState, on_batch: Callable[[Tensor], Tensor], on_shared: Callable[[Tensor], Tensor] = lambda t: t
) -> DSQState:
    """Apply ``on_batch`` to what has a batch dimension and ``on_shared`` to a calibrated state_scale."""
    state_scale = on_batch(state.state_scale) if state.dynamic else on_shared(state.state_scale)
    return DSQState(
        on_batch(state.packed),
        on_batch(state.channel_scale),
        state_scale,
        on_batch(state.rng),
        state.bits,
        state.stochastic,
        _map_rings(on_batch, state.ring),
    )


def _map_rings(function: Callable[..., Tensor], *rings: Ring | None) -> Ring | None:
    """A ring whose tensors are ``function`` of the rings' tensors; None when there are none."""
    if rings[0] is None:
        return None
    tensors = zip(*(ring for ring in rings if ring is not None), strict=True)
    return Ring(*(None if parts[0] is None else function(*parts) for parts in tensors))  # type: ignore[arg-type]


def _same_layout(a: DSQState, b: DSQState) -> bool:
    """True when codes of ``a`` mean the same in ``b``."""
    if (a.bits, a.stochastic, a.dynamic, a.shape[1:]) != (b.bits, b.stochastic, b.dynamic, b.shape[1:]):
        return False
    if _ring_layout(a) != _ring_layout(b):
        return False
    # A trace cannot look at values: compiled code trusts that one layer's states share their calibrated scales.
    if a.dynamic or a.state_scale is b.state_scale or is_fake(a.state_scale):
        return True
    return torch.equal(a.state_scale, b.state_scale.to(a.device))


def _ring_layout(state: DSQState) -> Any:
    return None if state.ring is None else (state.ring.x.dtype, state.ring.x.shape[1], state.ring.B.shape[1:])


def _refuse_writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, DSQState):
                raise StateError(
                    f"{func} writes to a packed state and the write would be lost; allowed: copy_ and zero_. "
                    "Work on dequantize() and copy_ the result back"
                )


# --- operations that keep the state packed -------------------------------------------------------------------------


def _alias(state: DSQState, **_: Any) -> DSQState:
    return _map(state, lambda t: t)


def _clone(state: DSQState, **_: Any) -> DSQState:
    return _map(state, Tensor.clone, Tensor.clone)


def _to_copy(state: DSQState, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Any:
    if dtype not in (None, torch.float32):
        return NotImplemented

    def move(inner: Tensor) -> Tensor:
        return inner.to(device=device, copy=True)

    return _map(state, move, move)


def _index_select(state: DSQState, dim: int, index: Tensor) -> Any:
    if dim not in (0, -4) or not isinstance(state, DSQState):
        return NotImplemented
    return _map(state, lambda t: t.index_select(0, index))


def _index(state: DSQState, indices: list[Tensor | None]) -> Any:
    if len(indices) != 1 or not isinstance(state, DSQState) or indices[0] is None or indices[0].dim() != 1:
        return NotImplemented
    return _map(state, lambda t: t[indices[0]])


def _slice(state: DSQState, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    if dim not in (0, -4):
        return NotImplemented
    return _map(state, lambda t: aten.slice.Tensor(t, 0, start, end, step))


def _split(state: DSQState, sizes: Any, dim: int = 0) -> Any:
    if dim not in (0, -4):
        return NotImplemented
    lengths = [piece.shape[0] for piece in state.rng.split(sizes)]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [_slice(state, 0, start, start + length) for start, length in zip(starts, lengths, strict=True)]


def _cat(states: Sequence[Tensor], dim: int = 0) -> Any:
    first = states[0]
    if dim not in (0, -4) or not all(isinstance(s, DSQState) and _same_layout(s, first) for s in states):  # type: ignore[arg-type]
        return NotImplemented
    assert isinstance(first, DSQState)
    state_scale = torch.cat([s.state_scale for s in states]) if first.dynamic else first.state_scale  # type: ignore[attr-defined]
    return DSQState(
        torch.cat([s.packed for s in states]),  # type: ignore[attr-defined]
        torch.cat([s.channel_scale for s in states]),  # type: ignore[attr-defined]
        state_scale,
        torch.cat([s.rng for s in states]),  # type: ignore[attr-defined]
        first.bits,
        first.stochastic,
        _map_rings(lambda *parts: torch.cat(parts), *(s.ring for s in states)),  # type: ignore[attr-defined]
    )


def _zero_(state: DSQState) -> DSQState:
    state.packed.fill_(quant.zero_byte(state.bits))
    state.channel_scale.fill_(quant.TINY_SCALE)
    if state.dynamic:
        state.state_scale.fill_(1.0)  # any that a kernel can divide by: all codes are zero
    state.rng[:, 1] = 0
    for tensor in state.ring or ():
        if tensor is not None:
            tensor.zero_()
    return state


def _zeros_like(state: DSQState, **kwargs: Any) -> Any:
    copied = _to_copy(state, **kwargs)
    return copied if copied is NotImplemented else _zero_(copied)


def _copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Any:
    if not isinstance(target, DSQState):
        return NotImplemented
    if isinstance(source, DSQState):
        if not _same_layout(target, source):
            raise StateError(
                f"copy_ of {source!r} to {target!r}: layouts or scales differ; use copy_(source.dequantize())"
            )
        for name in target.own:
            getattr(target, name).copy_(getattr(source, name))
        return target
    torch.ops.qmamba.quantize_state_(
        target.packed,
        target.channel_scale,
        target.state_scale if target.dynamic else None,
        target.rng,
        source.detach().to(target.device).expand(target.shape),
        None if target.dynamic else target.state_scale,
        target.bits,
        target.stochastic,
        None if target.ring is None else target.ring.position,
    )
    return target


_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _alias,
    aten.alias.default: _alias,
    aten.lift_fresh.default: _alias,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.cat.default: _cat,
    aten.zero_.default: _zero_,
    aten.zeros_like.default: _zeros_like,
    aten.copy_.default: _copy_,
}
