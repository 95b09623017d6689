"""A state_scale that is learned with the weights: the gradient that rounding has with respect to its own step size."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qmamba_compile import quant
from qmamba_compile.config import layer_seed
from qmamba_compile.recurrence import StoreRule
from qmamba_compile.scan_ops import StateStore, step_sizes

from .errors import CalibrationError
from .recurrence import Recurrence, Scan


class _Requantize(torch.autograd.Function):
    """A store and the read after it; `StateStore.pass_through` for h, the derivative of the grid for log_scale [h, n].

    With q = channel_scale * state_scale * code, and the code held fixed, dq / dlog state_scale[n] is q[n]; straight
    through the code, it is q[n] - h[n]. A row's channel_scale moves against the state_scale of its largest element.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, log_scale: Tensor, rule: StoreRule, rng: Tensor) -> Tensor:
        ctx.store = StateStore(dataclasses.replace(rule, state_scale=quant.store_scale(log_scale.exp())), rng)
        read = ctx.store(h)
        ctx.save_for_backward(h, read)
        return read

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        h, read = ctx.saved_tensors
        felt = grad * (read - h)  # [b, h, p, n]
        _, largest = ctx.store.largest_of_rows(h)
        felt = felt.scatter_add(-1, largest, -felt.sum(dim=-1, keepdim=True))
        return ctx.store.pass_through(grad, h, read), felt.sum(dim=(0, 2)), None, None


class LearnedScale:
    """A recurrence whose state_scale is a parameter in some layers. There in plain torch, one token at a time: slow.

    Attributes:
        log_scale: layer -> the parameter [h, n].
    """

    def __init__(self, recurrence: Recurrence, layers: Iterable[str]) -> None:
        if recurrence.state_scale is None or recurrence.bits is None:
            raise CalibrationError("a learned state_scale needs calibrated scales and a quantized state")
        if recurrence.channel_scale is not None:
            raise CalibrationError("a learned state_scale measures its channel_scale; both fixed is not supported")
        self.recurrence = recurrence
        self.log_scale = {layer: nn.Parameter(recurrence.state_scale[layer].float().log()) for layer in layers}

    def with_seed(self, seed: int) -> LearnedScale:
        """The same parameters with other noise."""
        found = copy.copy(self)
        found.recurrence = self.recurrence.with_seed(seed)
        return found

    def scale(self, layer: str) -> Tensor:
        """state_scale [h, n] as learned so far."""
        return self.log_scale[layer].detach().exp()

    def __call__(self, scan: Scan) -> tuple[Tensor, Tensor | None]:
        """The scan, differentiable in ``log_scale``."""
        if scan.layer not in self.log_scale:
            return self.recurrence(scan)
        recurrence, batch = self.recurrence, scan.x.shape[0]
        dt, dA = step_sizes(scan.dt, scan.A, scan.dt_bias, scan.dt_softplus, 0.0, math.inf)
        rng = quant.new_rng(batch, layer_seed(recurrence.seed, scan.layer), scan.x.device)
        rule = StoreRule(recurrence.bits, recurrence.stochastic)
        state = scan.x.new_zeros((batch, *scan.x.shape[2:], scan.B.shape[-1]), dtype=torch.float32)
        x, repeats, outputs = scan.x.float(), scan.x.shape[2] // scan.B.shape[2], []
        for t in range(x.shape[1]):
            decay = dA[:, t, :, None, None]
            B, C = (tensor[:, t].float().repeat_interleave(repeats, dim=1) for tensor in (scan.B, scan.C))
            dBx = (dt[:, t, :, None] * B)[:, :, None, :] * x[:, t, :, :, None]
            read = (
                _Requantize.apply(state, self.log_scale[scan.layer], rule, rng)
                if t % recurrence.flush_interval == 0
                else state
            )
            h = read * decay + dBx
            outputs.append(torch.einsum("bhpn,bhn->bhp", h, C))
            state = state * decay + dBx if recurrence.single_step else h
        y = torch.stack(outputs, dim=1)
        if scan.D is not None:
            y = y + x * scan.D.float()[:, None]
        return y, None
