"""The two regions that passes match, written as transformers writes them, with named places where a test changes one.

They mirror ``mamba2_selective_state_update`` and ``mamba2_chunk_scan`` of transformers (see its ``modeling_mamba2``);
the unchanged functions are covered through whole models. A change is a function from the value at a place to what takes
its stead, so that each refusal is tried on the smallest graph that has it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Region(nn.Module):
    def __init__(self, *, nheads=4, D=True, dt_bias=True, softplus=True, **changes):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.A_log = nn.Parameter(torch.rand(nheads, generator=generator), requires_grad=False)
        self.D = nn.Parameter(torch.randn(nheads, generator=generator), requires_grad=False) if D else None
        self.dt_bias = nn.Parameter(torch.randn(nheads, generator=generator), requires_grad=False) if dt_bias else None
        self.softplus = softplus
        self.changes = changes

    def at(self, place: str, value):
        change = self.changes.get(place)
        return value if change is None else change(value)


class Step(_Region):
    """One decode step. Places: dt_raw, bias, A, dt, dA, B, C, dBx, new, stored, D, skip, end."""

    def forward(self, state: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor):
        """state [b, h, p, n]; x [b, h, p]; dt [b, 1, h]; B, C [b, g, n] -> y [b, h, p] (and what ``end`` adds)."""
        batch, nheads, headdim = x.shape
        ngroups, dstate = B.shape[1:]
        dt = self.at("dt_raw", dt.transpose(1, 2).expand(-1, -1, headdim))
        A = -torch.exp(self.A_log.float())
        A = self.at("A", A[:, None, None].expand(-1, headdim, dstate))
        if self.dt_bias is not None:
            dt = dt + self.at("bias", self.dt_bias[:, None].expand(-1, headdim)).to(dt.dtype)
        if self.softplus:
            dt = F.softplus(dt)
        dt = self.at("dt", dt)[..., None]
        dA = self.at("dA", torch.exp(dt.float() * A.float()))
        B = self.at("B", B.reshape(batch, ngroups, 1, dstate).expand(-1, -1, nheads // ngroups, -1)).contiguous()
        dBx = self.at("dBx", dt * B.reshape(batch, nheads, 1, dstate) * x[..., None])
        new = self.at("new", state * dA + dBx)
        state.copy_(self.at("stored", new).to(state.dtype))
        C = C.reshape(batch, ngroups, 1, dstate).expand(-1, -1, nheads // ngroups, -1).contiguous()
        rows = new.to(C.dtype).view(batch * nheads, headdim, dstate)
        y = torch.bmm(rows, C.reshape(batch * nheads, dstate, 1)).view(batch, nheads, headdim)
        if self.D is not None:
            D = self.at("D", self.D[:, None].expand(-1, headdim))
            y = y + (D * self.at("skip", x) if "skip" in self.changes else x * D)
        y = y.to(x.dtype)
        return self.at("end", (y, new, state)) if "end" in self.changes else y


class Scan(_Region):
    """A prefill's scan. Places: dt, x, A, D, L, G, L_permuted, carried, initial, output, cut, end."""

    def __init__(self, *, chunk_size=8, **options):
        super().__init__(**options)
        self.chunk_size = chunk_size

    def forward(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, initial: Tensor | None = None):
        """x [b, l, h, p]; dt [b, l, h]; B, C [b, l, g, n]; initial [b, h, p, n] -> y, cached state."""
        batch, seqlen, nheads, headdim = x.shape
        ngroups, size = B.shape[2], self.chunk_size
        if self.dt_bias is not None:
            dt = dt + self.at("bias", self.dt_bias.to(dt.dtype))
        if self.softplus:
            dt = F.softplus(dt)
        dt = torch.clamp(self.at("dt", dt), min=0.0, max=float("inf"))
        x = x.float()
        B = B.float().repeat_interleave(nheads // ngroups, dim=2, output_size=nheads)
        C = C.float().repeat_interleave(nheads // ngroups, dim=2, output_size=nheads)
        pad = (size - seqlen % size) % size
        residual = None
        if self.D is not None:
            residual = self.at("D", self.D[..., None]) * F.pad(x, (0, 0, 0, 0, 0, pad, 0, 0))
        x = self.at("x", x * dt[..., None].float())
        A = self.at("A", -torch.exp(self.A_log.float())) * dt.float()
        x, B, C = (F.pad(t, (0, 0, 0, 0, 0, pad, 0, 0)).reshape(batch, -1, size, *t.shape[2:]) for t in (x, B, C))
        A = F.pad(A, (0, 0, 0, pad, 0, 0)).reshape(batch, -1, size, nheads).permute(0, 3, 1, 2)
        A_cumsum = torch.cumsum(A, dim=-1)
        L = self.at("L", torch.exp(_segment_sum(A)))
        G = self.at("G", torch.einsum("bclhn,bcshn->bclsh", C, B))
        Y_diag = torch.einsum("bclsh,bcshp->bclhp", G * L.permute(0, 2, 3, 4, 1), x)
        decay = torch.exp(A_cumsum[:, :, :, -1:] - A_cumsum)
        states = torch.einsum("bclhn,bclhp->bchpn", B * decay.permute(0, -2, -1, 1)[..., None], x)
        start = torch.zeros_like(states[:, :1]) if initial is None else self.at("initial", initial[:, None]).to(x.dtype)
        states = torch.cat([start, states], dim=1)
        decay_chunk = torch.exp(_segment_sum(F.pad(A_cumsum[:, :, :, -1], (1, 0)))).transpose(1, 3)
        new_states = torch.einsum("bzch,bzhpn->bchpn", decay_chunk, states)
        states, final = new_states[:, :-1], new_states[:, -1]
        Y_off = torch.einsum("bclhn,bchpn->bclhp", C, states) * torch.exp(A_cumsum).permute(0, 2, 3, 1)[..., None]
        y = self.at("output", (Y_diag + Y_off).contiguous().reshape(batch, -1, nheads, headdim))
        if residual is not None:
            y = y + residual
        if pad:
            y = self.changes["cut"](y, seqlen) if "cut" in self.changes else y[:, :seqlen]
        if "end" in self.changes:
            return self.changes["end"](y, final, G)
        cached = torch.zeros_like(final)
        cached.copy_(final)
        return y, cached


def _segment_sum(values: Tensor) -> Tensor:
    size = values.size(-1)
    values = values[..., None].expand(*values.size(), size)
    below = torch.tril(torch.ones(size, size, device=values.device, dtype=torch.bool), diagonal=-1)
    sums = torch.cumsum(values.masked_fill(~below, 0), dim=-2)
    upto = torch.tril(torch.ones(size, size, device=values.device, dtype=torch.bool), diagonal=0)
    return sums.masked_fill(~upto, -torch.inf)


def step_inputs(batch=2, nheads=4, headdim=8, dstate=16, ngroups=2, dtype=torch.float32, seed=0):
    """x, dt, B, C of one step."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    return (
        random(batch, nheads, headdim),
        random(batch, 1, nheads),
        random(batch, ngroups, dstate),
        random(batch, ngroups, dstate),
    )


def scan_inputs(batch=2, seqlen=19, nheads=4, headdim=8, dstate=16, ngroups=2, dtype=torch.float32, seed=0):
    """x, dt, B, C of one scan."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    return (
        random(batch, seqlen, nheads, headdim),
        random(batch, seqlen, nheads),
        random(batch, seqlen, ngroups, dstate),
        random(batch, seqlen, ngroups, dstate),
    )
