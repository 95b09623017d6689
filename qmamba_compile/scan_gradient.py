"""The gradient of ``qmamba::ssm_scan_quantized``, straight through every store, for ESR (Q-Mamba).

It follows the trajectory of the forward pass, which is computed anew in chunks. What a store lets through is
`scan_ops.StateStore.pass_through`'s. Importing this module registers it. Shapes as in `scan_ops`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import recurrence
from .cpu_templates import launch_scan as cpu_kernels
from .extents import unfit
from .op_library import define, differentiate, fake, implement
from .recurrence import StoreRule
from .scan_ops import StateStore, first_states, step_sizes
from .triton_templates import launch_scan as gpu_kernels

define(
    "ssm_scan_quantized_backward(Tensor grad_y, Tensor? grad_state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, "
    "Tensor? D, Tensor? dt_bias, Tensor? initial_state, Tensor? state_scale, bool dt_softplus, float dt_min, "
    "float dt_max, int? bits, bool stochastic, int seed, int flush_interval, bool single_step, Tensor? channel_scale) "
    "-> Tensor[]",
)

_CHUNK = 64
"""Tokens whose states the plain gradient holds at once, beside one state of each chunk."""


@implement("ssm_scan_quantized_backward")
def ssm_scan_quantized_backward(
    grad_y: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    state_scale: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    bits: int | None,
    stochastic: bool,
    seed: int,
    flush_interval: int,
    single_step: bool,
    channel_scale: Tensor | None,
) -> list[Tensor]:
    """Gradient of `ssm_scan_quantized`, straight through every store (`StateStore.pass_through`).

    It follows the quantized trajectory, which is computed anew from the inputs, in chunks: memory for one state a chunk
    and one chunk's states.

    Args:
        grad_y: [b, l, h, p]; grad_state: [b, h, p, n] of the float state (``bits=None``), or ``None`` for zeros.

    Raises:
        ValueError: one of them has another shape.

    Returns:
        Gradients of x, dt, A, B, C, D [h], dt_bias [h] and initial_state, in their dtypes (the last three float32).
    """
    states_shape = (x.shape[0], *x.shape[2:], B.shape[-1])
    if wrong := unfit(grad_y=(grad_y, x.shape), grad_state=(grad_state, states_shape)):
        raise ValueError(wrong)
    rule = StoreRule(bits, stochastic, seed, flush_interval, single_step, state_scale, channel_scale)
    step_dt, decay = step_sizes(dt, A, dt_bias, dt_softplus, dt_min, dt_max)
    states, store = first_states(initial_state, B, rule, x.shape)
    kernels = cpu_kernels if x.is_cpu else gpu_kernels
    found = kernels.ssm_scan_backward(grad_y, grad_state, x, step_dt, decay, B, C, states, rule)
    if found is None:
        state = x.new_zeros((*x.shape[:1], *x.shape[2:], B.shape[-1])) if states[0] is None else states[0]
        if single_step and store is not None:
            store.rng[:, 1] = 0  # the plain scan stores the first state itself
        found = scan_backward_reference(grad_y, grad_state, x, step_dt, decay, B, C, state, store)
    grad_x, grad_dt, grad_decay, grad_B, grad_C, grad_initial = found
    if store is not None and initial_state is not None and not single_step:
        assert states[0] is not None
        grad_initial = store.pass_through(grad_initial, initial_state.float(), states[0])
    groups = (*B.shape[:3], -1, B.shape[-1])
    grad_B, grad_C = grad_B.view(groups).sum(3), grad_C.view(groups).sum(3)
    if D is not None:
        grad_x = grad_x + grad_y * D.float()[:, None]
    through = grad_decay * decay
    grad_dt = grad_dt + through * A.float()
    raw = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    free = recurrence.softplus(raw) if dt_softplus else raw
    grad_dt = torch.where((free >= dt_min) & (free <= dt_max), grad_dt, 0.0)
    if dt_softplus:
        grad_dt = grad_dt * torch.sigmoid(raw)
    return [
        grad_x.to(x.dtype),
        grad_dt.to(dt.dtype),
        (through * step_dt).sum((0, 1)).to(A.dtype),
        grad_B.to(B.dtype),
        grad_C.to(C.dtype),
        (grad_y * x.float()).sum((0, 1, 3)),
        grad_dt.sum((0, 1)),
        grad_initial,
    ]


@fake("ssm_scan_quantized_backward")
def _(grad_y, grad_state, x, dt, A, B, C, *args) -> list[Tensor]:  # type: ignore[no-untyped-def]
    batch, _, nheads, headdim = x.shape
    shapes = [(nheads,), (nheads,), (batch, nheads, headdim, B.shape[-1])]
    return [tensor.new_empty(tensor.shape) for tensor in (x, dt, A, B, C)] + [
        x.new_empty(shape, dtype=torch.float32) for shape in shapes
    ]


def scan_backward_reference(
    grad_y: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    decay: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    store: StateStore | None,
) -> list[Tensor]:
    """Gradient of `scan_reference` in plain torch: of x, dt, decay, B and C for each head [b, l, h, n], and state.

    ``state`` is what the first token begins at: its own store is not part of this.
    """
    seqlen, repeats = x.shape[1], x.shape[2] // B.shape[2]
    x, B, C = x.float(), B.float().repeat_interleave(repeats, 2), C.float().repeat_interleave(repeats, 2)
    # Each chunk's first state, and how many stores were made before it.
    kept = []
    begins = range(0, seqlen, _CHUNK)

    def after_step(state: Tensor, t: int) -> Tensor:
        dBx = (dt[:, t, :, None] * B[:, t])[:, :, None, :] * x[:, t, :, :, None]
        return recurrence.multiply_add(state, decay[:, t, :, None, None], dBx)

    def advance(state: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """The state that step t begins at as y sees it, and the state after it."""
        seen = store(state) if store is not None and store.rule.single_step else state
        h = after_step(state, t)
        return seen, store(h) if store is not None and store.rule.stores_after(t) else h

    for begin in begins:
        kept.append((state, None if store is None else store.rng.clone()))
        for t in range(begin, min(begin + _CHUNK, seqlen)):
            _, state = advance(state, t)
    grads = [torch.empty_like(like) for like in (x, dt, decay, B, C)]
    grad = torch.zeros_like(state) if grad_state is None else grad_state.float()
    for begin, (state, rng) in reversed(list(zip(begins, kept, strict=True))):
        if store is not None and rng is not None:
            store.rng.copy_(rng)
        states = []
        for t in range(begin, min(begin + _CHUNK, seqlen)):
            seen, after = advance(state, t)
            states.append((t, state, seen, after))
            state = after
        for t, before, seen, after in reversed(states):
            step = dt[:, t, :, None]  # [b, h, 1]
            h = after_step(seen, t)
            if store is not None and store.rule.stores_after(t):
                grad = store.pass_through(grad, h, after)
            from_y = C[:, t, :, None, :] * grad_y[:, t, :, :, None]  # [b, h, p, n]
            grad_dtx = torch.einsum("bhpn,bhn->bhp", grad + from_y, B[:, t])
            grads[0][:, t] = step * grad_dtx
            grads[1][:, t] = (grad_dtx * x[:, t]).sum(-1)
            grads[2][:, t] = (grad * before + from_y * seen).sum((-1, -2))
            grads[3][:, t] = step * torch.einsum("bhpn,bhp->bhn", grad + from_y, x[:, t])
            grads[4][:, t] = torch.einsum("bhpn,bhp->bhn", h, grad_y[:, t])
            if store is not None and store.rule.single_step:
                from_y = store.pass_through(from_y, before, seen)
            grad = (grad + from_y) * decay[:, t, :, None, None]
    return [*grads, grad]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, ctx.channel_scale = (*inputs[:9], inputs[17])
    ctx.save_for_backward(*tensors)
    ctx.settings = inputs[9:17]
    # Codes, scales and counters have no gradient.
    ctx.mark_non_differentiable(*(output[1:] if inputs[12] is not None else []))


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    tensors, settings = ctx.saved_tensors, ctx.settings
    x, bits = tensors[0], settings[3]
    grad_y = grads[0] if grads[0] is not None else x.new_zeros(x.shape, dtype=torch.float32)
    found = torch.ops.qmamba.ssm_scan_quantized_backward(
        grad_y, grads[1] if bits is None else None, *tensors, *settings, ctx.channel_scale
    )
    wanted = [grad if needed else None for grad, needed in zip(found, ctx.needs_input_grad, strict=False)]
    # As many as there were arguments: the dispatcher drops those that equal their defaults from the end.
    return (*wanted, *[None] * (len(ctx.needs_input_grad) - len(wanted)))


differentiate("ssm_scan_quantized", _backward, _setup_context)
