"""Call the kernels that run a whole sequence, as `launch` calls those of a step and under the same promises."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import quant
from ..errors import ConfigError
from ..extents import unfit_sequence
from ..recurrence import StoreRule
from . import tuning
from .launch import refuse, target
from .render import load
from .scan_specs import SsmScanBackwardSpec, SsmScanSpec

log = logging.getLogger(__name__)

SCAN_STAGES = 2
"""Chunks of a scan that are under way from memory or in use. A chunk is computed for longer than a load takes; a third
would cost shared memory and 7 percent of instructions (sm_90)."""

MAMBA_SSM_CHUNK = 256
"""mamba-ssm's own default of chunk_size."""


@functools.cache
def _mamba_ssm_scan() -> Callable[..., tuple[Tensor, Tensor]] | None:
    """mamba-ssm's SSD kernels, where that package is installed and loads."""
    if importlib.util.find_spec("mamba_ssm") is None:
        return None
    try:
        module = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    except ImportError as error:
        log.warning("mamba-ssm is installed but does not load (%s): our own chunk_scan runs instead", error)
        return None
    scan: Callable[..., tuple[Tensor, Tensor]] = module.mamba_chunk_scan_combined
    return scan


def chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> tuple[Tensor, Tensor] | None:
    """`ops.chunk_scan` on a GPU: y [b, l, h, p] float32 and the final state [b, h, p, n] float32."""
    architecture = target(x.device.type, x.device.index)
    if architecture is None or x.shape[1] == 0:
        return None
    if wrong := unfit_sequence(x, dt, B, C, A=A, D=D, dt_bias=dt_bias, states=(initial_state,)):
        return refuse("chunk_scan", wrong)
    scan = _mamba_ssm_scan() if architecture != "interpreter" else None
    if scan is not None:
        y, state = scan(
            x,
            dt,
            A,
            B,
            C,
            MAMBA_SSM_CHUNK,
            D=D,
            dt_bias=dt_bias,
            initial_states=initial_state,
            dt_softplus=dt_softplus,
            dt_limit=(dt_min, dt_max),
            return_final_states=True,
        )
        return y.float(), state.float().contiguous()
    batch, seqlen, nheads, headdim = x.shape
    ngroups, dstate = B.shape[2:]
    try:
        spec = tuning.chunk_scan(architecture, headdim, dstate)
    except ConfigError as error:
        return refuse("chunk_scan", str(error))
    if B.dtype != C.dtype:
        B, C = (tensor.to(torch.promote_types(B.dtype, C.dtype)) for tensor in (B, C))
    x, B, C = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (x, B, C))
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    final_state = torch.empty((batch, nheads, headdim, dstate), dtype=torch.float32, device=x.device)
    A, D, dt_bias, initial_state = (None if t is None else t.contiguous() for t in (A, D, dt_bias, initial_state))  # type: ignore[assignment]
    chunks = -(-seqlen // spec.chunk)
    part_chunks = -(-chunks // tuning.scan_parts(architecture, batch * nheads * spec.row_blocks, chunks))
    parts = -(-chunks // part_chunks)
    part_states = part_decays = None
    if parts > 1:
        part_states = torch.empty((parts - 1, *final_state.shape), dtype=torch.float32, device=x.device)
        part_decays = torch.empty((parts - 1, batch, nheads), dtype=torch.float32, device=x.device)

    def run(count: int, *tensors: Tensor | None) -> None:
        load(spec).chunk_scan[count * spec.row_blocks, nheads, batch](
            *(x, dt, A, B, C, D, dt_bias, *tensors, part_states, part_decays),
            *(seqlen, part_chunks * spec.chunk, nheads // ngroups, dt_min, dt_max),
            *(*x.stride()[:3], *dt.stride(), *B.stride()[:3], *C.stride()[:3], dt_softplus),
            # Products of 16-bit inputs lose nothing by TF32's 11 bits; a float32 model asked for float32.
            "ieee" if x.dtype == torch.float32 else "tf32",
            num_warps=spec.warps,
            num_stages=SCAN_STAGES,
            enable_fp_fusion=False,
        )

    if parts > 1:
        run(parts - 1, None, None, None)
    run(parts, initial_state, y, final_state)
    return y, final_state


# --- the faithful scan ---------------------------------------------------------------------------------------------


@functools.cache
def _chosen(
    architecture: str, headdim: int, dstate: int, bits: int | None, dynamic: bool, stochastic: bool
) -> tuple[SsmScanSpec, SsmScanBackwardSpec] | None:
    try:
        scan = tuning.ssm_scan(architecture, headdim, dstate, bits, dynamic, stochastic)
        return scan, tuning.ssm_scan_backward(architecture, headdim, dstate)
    except ConfigError as error:
        return refuse("ssm_scan", str(error))


@dataclasses.dataclass(frozen=True)
class _Scan:
    """The inputs of a scan as its kernels take them, and which these are."""

    spec: SsmScanSpec
    backward_spec: SsmScanBackwardSpec
    x: Tensor
    dt: Tensor
    decay: Tensor
    B: Tensor
    C: Tensor
    states: tuple[Tensor | None, Tensor | None]
    scales: tuple[Tensor | None, Tensor | None]
    key: Tensor | None
    flush_interval: int
    single_step: bool

    @classmethod
    def of(
        cls,
        x: Tensor,
        dt: Tensor,
        decay: Tensor,
        B: Tensor,
        C: Tensor,
        states: tuple[Tensor | None, Tensor | None],
        rule: StoreRule,
        D: Tensor | None = None,
    ) -> _Scan | None:
        """``None``: no kernel serves these arguments."""
        architecture = target(x.device.type, x.device.index)
        if architecture is None or x.numel() == 0:
            return None
        scales = {"state_scale": rule.state_scale, "channel_scale": rule.fixed_scale}
        if wrong := unfit_sequence(x, dt, B, C, dA=decay, D=D, states=states, **scales):
            return refuse("ssm_scan", wrong)
        specs = _chosen(architecture, x.shape[-1], B.shape[-1], rule.bits, rule.dynamic, rule.stochastic)
        if specs is None:
            return None
        carried, copy = (None if state is None else state.float().contiguous() for state in states)
        state_scale, channel_scale = (
            None if scale is None else scale.contiguous() for scale in (rule.state_scale, rule.fixed_scale)
        )
        # Not a number: Triton would make another kernel of each that fits in 32 bits or is 1.
        key = torch.full((1,), rule.seed, dtype=torch.int64, device=x.device) if rule.stochastic else None
        return cls(
            *specs,
            x,
            dt.contiguous(),
            decay.contiguous(),
            B,
            C,
            (carried, copy if rule.single_step else None),
            (state_scale, channel_scale),
            key,
            rule.flush_interval,
            rule.single_step,
        )

    @property
    def shape_of_states(self) -> tuple[int, ...]:
        """[b, h, p, n]."""
        return (self.x.shape[0], *self.x.shape[2:], self.B.shape[-1])

    @property
    def _strides(self) -> tuple[int, ...]:
        return self.x.shape[2] // self.B.shape[2], *self.x.stride(), *self.B.stride(), *self.C.stride()

    def run(
        self,
        tokens: range,
        states: tuple[Tensor | None, Tensor | None],
        D: Tensor | None,
        outputs: Sequence[Tensor | None],
        kept: Tensor | None = None,
    ) -> None:
        """Scan ``tokens``; one state of each ``tokens.step`` is put into ``kept``."""
        quantized = self.spec.bits is not None
        load(self.spec).ssm_scan[self.spec.row_blocks, self.x.shape[2], self.x.shape[0]](
            *(self.x, self.dt, self.decay, self.B, self.C, *states),
            *((*self.scales, self.key) if quantized else ()),
            *(self.x.shape[1], tokens.start, tokens.stop, self.flush_interval, *self._strides),
            *(None if D is None else D.contiguous(), kept, tokens.step, *outputs),
            num_warps=self.spec.warps,
            enable_fp_fusion=False,
        )

    def run_back(self, tokens: range, kept: Tensor, gradients: Sequence[Tensor]) -> None:
        """The gradient of ``tokens``, each of which, and the one after them, began at its state in ``kept``."""
        scales = (None, None) if self.spec.bits is None else self.scales
        load(self.backward_spec).ssm_scan_backward[1, self.x.shape[2], self.x.shape[0]](
            *(self.x, self.dt, self.decay, self.B, self.C, kept, *gradients, *scales),
            *(self.x.shape[1], tokens.start, tokens.stop, self.flush_interval, *self._strides),
            *(self.single_step, 0 if self.spec.bits is None else quant.max_code(self.spec.bits)),
            num_warps=self.backward_spec.warps,
            enable_fp_fusion=False,
        )


def ssm_scan(
    x: Tensor,
    dt: Tensor,
    decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    states: tuple[Tensor | None, Tensor | None],
    rule: StoreRule,
) -> list[Tensor] | None:
    """The faithful scan on a GPU; ``dt`` and ``decay`` [b, l, h] as `scan_ops.step_sizes` gives them.

    Args:
        states: the state before the first token, as decode reads it, and with ``single_step`` its quantized copy.

    Returns:
        y and codes int8 [b, h, p, n], channel_scale [b, h, p], state_scale [b, h, n] (left as it was unless dynamic)
        after the last store; ``bits=None``: y and the state. No store happens before step ``flush_interval``.
    """
    scan = _Scan.of(x, dt, decay, B, C, states, rule, D)
    if scan is None:
        return None
    batch, nheads, headdim, dstate = scan.shape_of_states
    outputs = [torch.empty(x.shape, dtype=torch.float32, device=x.device)]
    if rule.bits is None:
        outputs.append(torch.empty(scan.shape_of_states, dtype=torch.float32, device=x.device))
    else:
        outputs += [
            torch.empty(scan.shape_of_states, dtype=torch.int8, device=x.device),
            torch.empty((batch, nheads, headdim), dtype=quant.SCALE_DTYPE, device=x.device),
            torch.empty((batch, nheads, dstate), dtype=quant.SCALE_DTYPE, device=x.device),
        ]
    scan.run(range(x.shape[1]), scan.states, D, outputs)
    return outputs


def ssm_scan_backward(
    grad_y: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    decay: Tensor,
    B: Tensor,
    C: Tensor,
    states: tuple[Tensor | None, Tensor | None],
    rule: StoreRule,
) -> list[Tensor] | None:
    """Gradient of `ssm_scan` without D: of x, dt, decay, B and C for each head [b, l, h, n], and the first state.

    The states that the scan went through are computed anew: once to keep one of each chunk, and then, from the last
    chunk to the first, each chunk's from its first. That is memory for 2 * sqrt(seqlen) states, twice as many for
    single steps.
    """
    scan = _Scan.of(x, dt, decay, B, C, states, rule)
    if scan is None:
        return None
    batch, seqlen, nheads, headdim = x.shape

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    chunk = math.isqrt(seqlen)
    begins = range(0, seqlen, chunk)
    kinds = 1 + scan.single_step
    kept, inside = (empty(count, kinds, *scan.shape_of_states) for count in (len(begins), chunk + 1))
    nothing = [None] * (2 if rule.bits is None else 4)
    scan.run(range(0, begins[-1] + 1, chunk), scan.states, None, nothing, kept)

    tokens, columns = (batch, seqlen, nheads), (batch, seqlen, nheads, B.shape[-1])
    grads = [empty(*shape) for shape in ((*tokens, headdim), tokens, tokens, columns, columns)]
    if grad_state is None:
        grad_carried = x.new_zeros(scan.shape_of_states, dtype=torch.float32)
    else:
        grad_carried = grad_state.float().clone(memory_format=torch.contiguous_format)
    grad_y = grad_y.float().contiguous()
    for begin, first in reversed(list(zip(begins, kept, strict=True))):
        part = range(begin, min(begin + chunk, seqlen))
        scan.run(part, (first[-1], first[0] if scan.single_step else None), None, nothing, inside)
        scan.run_back(part, inside, (grad_y, grad_carried, *grads))
        inside[chunk] = first  # what follows the chunk before this one; only the last is shorter
    return [*grads, grad_carried]
