"""Two functions of transformers' Mamba2, rewritten to train faster on a CPU with the same result.

Only ``train.py`` uses them; the saved model runs on the stock code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.mamba2 import modeling_mamba2


@torch.library.custom_op("demo::materialize", mutates_args=())
def materialize(x: Tensor) -> Tensor:
    """Write ``x`` to memory, contiguous, so that Inductor fuses nothing across this point.

    It would inline the gradient of everything after the convolution into each of the four taps of its
    backward, and would not vectorize the norm over a transposed view.
    """
    return x.clone(memory_format=torch.contiguous_format)


@materialize.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


materialize.register_autograd(lambda ctx, grad: materialize(grad))


class ProductNT(torch.autograd.Function):
    """``a @ b.mT``, whose gradients come out in the layouts of ``a`` and ``b``.

    Autograd's own gradient of ``b.mT`` is transposed, and Inductor (torch 2.13, AVX-512, two threads) turns
    reading it back in tiles of 32 x 32 bf16 into NaN.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a @ b.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return grad @ b, grad.mT @ a


class ProductTN(torch.autograd.Function):
    """``a.mT @ b``, for the same reason."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a.mT @ b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return b @ grad.mT, a @ grad


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, activation: str, **_: Any) -> Tensor:
    """``causal_conv1d_fn`` with SiLU, as shifted products, which Inductor fuses.

    x: [b, d, l]; weight: [d, k]; bias: [d].
    """
    assert activation == "silu"
    taps, seqlen = weight.shape[-1], x.shape[-1]
    padded = F.pad(x.transpose(1, 2), (0, 0, taps - 1, 0))
    out = bias + sum(padded[:, tap : tap + seqlen] * weight[:, tap] for tap in range(taps))
    return F.silu(materialize(out.to(x.dtype))).transpose(1, 2)


def chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor,
    dt_bias: Tensor,
    **_: Any,
) -> Tensor:
    """``mamba2_chunk_scan`` for one group and no initial state, its products in the dtype of ``x``.

    The stock function repeats B and C for every head and sums decays over [.., l, l]; this one does neither.
    x: [b, l, h, p]; dt: [b, l, h]; A, D, dt_bias: [h]; B, C: [b, l, 1, n]. ``l`` is a multiple of chunk_size.
    """
    batch, seqlen, nheads, headdim = x.shape
    nchunks = seqlen // chunk_size
    dt = F.softplus(dt.float() + dt_bias)
    dt = dt.view(batch, nchunks, chunk_size, nheads).transpose(2, 3)  # [b, c, h, q]
    xc = x.view(batch, nchunks, chunk_size, nheads, headdim).transpose(2, 3)  # [b, c, h, q, p]
    Bc, Cc = (t.view(batch, nchunks, chunk_size, -1) for t in (B, C))  # [b, c, q, n]
    log_decay = torch.cumsum(dt * A[:, None], -1)  # [b, c, h, q]

    within = decay_between(log_decay, log_decay, diagonal=0)  # [b, c, h, q, q]
    scores = ProductNT.apply(Cc, Bc)[:, :, None] * within * dt[..., None, :]
    y_within = scores.to(x.dtype) @ xc

    weighted_B = (dt * (log_decay[..., -1:] - log_decay).exp())[..., None] * Bc[:, :, None]
    chunk_states = ProductTN.apply(xc, weighted_B.to(x.dtype))  # [b, c, h, p, n]
    total = F.pad(log_decay[..., -1], (0, 0, 1, 0)).transpose(1, 2).cumsum(-1)  # [b, h, c + 1]
    carry = decay_between(total[..., :-1], total[..., 1:], diagonal=-1)  # [b, h, c, c]
    # The state at each chunk's start.
    states = torch.einsum("bhcz,bzhpn->bchpn", carry.to(x.dtype), chunk_states)
    weighted_C = log_decay.exp()[..., None] * Cc[:, :, None]
    y_before = ProductNT.apply(weighted_C.to(x.dtype), states.to(x.dtype))

    y = (y_within + y_before + xc * D[:, None, None]).transpose(2, 3).to(x.dtype)
    return materialize(y.reshape(batch, seqlen, -1)).view(batch, seqlen, nheads, headdim)


def decay_between(late: Tensor, early: Tensor, diagonal: int) -> Tensor:
    """``exp(late[i] - early[j])`` where ``j <= i + diagonal``, else 0. [.., l] -> [.., l, l]."""
    keep = torch.ones(late.shape[-1], early.shape[-1], dtype=torch.bool).tril(diagonal)
    return (late[..., :, None] - early[..., None, :]).masked_fill(~keep, -torch.inf).exp()


@contextmanager
def fast_mamba2(model: nn.Module, seqlen: int) -> Iterator[None]:
    """Run the functions above in place of the stock ones, after checking that the logits stay the same."""
    stock = modeling_mamba2.causal_conv1d_fn, modeling_mamba2.mamba2_chunk_scan
    ids = torch.randint(256, (1, seqlen))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    modeling_mamba2.causal_conv1d_fn, modeling_mamba2.mamba2_chunk_scan = causal_conv1d, chunk_scan
    try:
        with torch.no_grad():
            torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-3, atol=1e-4)
        yield
    finally:
        modeling_mamba2.causal_conv1d_fn, modeling_mamba2.mamba2_chunk_scan = stock
