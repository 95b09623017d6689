"""Run a stock transformers model on another recurrence: the faithful scan that decode would have run, or any other.

Every Mamba2 layer of transformers calls ``mamba2_chunk_scan`` of its own modeling file for a sequence. Inside
`replaced` that function is ours. A step of one token needs no replacement: the stock function, given a `DSQState`,
reads its values, and its ``copy_`` requantizes them. Nothing is compiled, and the model is not changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import qmamba_compile.ops  # noqa: F401  (registers the operators)
from qmamba_compile import quant
from qmamba_compile.config import layer_seed
from qmamba_compile.errors import StateError
from qmamba_compile.state import DSQState, require_packable

_SCAN = "mamba2_chunk_scan"


@dataclasses.dataclass(frozen=True)
class Scan:
    """Arguments of one layer's scan over a sequence.

    Attributes:
        layer: module path of the mixer.
        x: [b, l, h, p]; dt: [b, l, h] before bias and softplus; A, D, dt_bias: [h]; B, C: [b, l, g, n].
        initial_state: [b, h, p, n], or ``None`` for zeros.
        dt_min, dt_max: what the parallel scan clamps dt to; a decode step does not.
    """

    layer: str
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor | None
    dt_softplus: bool
    dt_min: float
    dt_max: float


Run = Callable[[Scan], tuple[Tensor, Tensor | None]]
"""y [b, l, h, p] and the final state: float, a `DSQState` for the cache to keep, or ``None`` where there is no such."""


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """How a state is requantized; called with a `Scan`, it runs the sequence as decode would, token by token.

    Attributes:
        bits: 8, 4, 3 or 2; ``None`` keeps the float state, and is differentiable, which `float_scan` is not.
        stochastic: rounding; nearest otherwise.
        seed: of stochastic rounding.
        flush_interval: steps between two requantizations.
        state_scale: layer -> calibrated scales [h, n]; ``None`` takes both vectors from the state.
        channel_scale: layer -> [h, p], for scales that are static altogether.
        single_step: the paper's simulation, each step from the quantized float state (Q-Mamba, ESR).
    """

    bits: int | None = 4
    stochastic: bool = False
    seed: int = 0
    flush_interval: int = 1
    state_scale: Mapping[str, Tensor] | None = None
    channel_scale: Mapping[str, Tensor] | None = None
    single_step: bool = False

    def with_seed(self, seed: int) -> Recurrence:
        """The same with other noise."""
        return dataclasses.replace(self, seed=seed)

    def __call__(self, scan: Scan) -> tuple[Tensor, Tensor | None]:
        # At 3 bits there is no packed form, and none is needed to evaluate.
        if self.bits in quant.STATE_BITS:
            require_packable(scan.B.shape[-1], self.bits, scan.layer)
        if isinstance(scan.initial_state, DSQState):
            raise StateError(
                f"{scan.layer}: a sequence behind a packed state must run token by token; "
                "start from an empty cache, or feed one token at a time"
            )
        calibrated = None
        if self.state_scale is not None and self.bits is not None:
            calibrated = quant.store_scale(self.state_scale[scan.layer])
        # Decode does not clamp dt.
        limits = (scan.dt_min, scan.dt_max) if self.bits is None else (0.0, math.inf)
        y, *state = torch.ops.qmamba.ssm_scan_quantized(
            scan.x,
            scan.dt,
            scan.A,
            scan.B,
            scan.C,
            scan.D,
            scan.dt_bias,
            scan.initial_state,
            calibrated,
            scan.dt_softplus,
            *limits,
            self.bits,
            self.stochastic,
            layer_seed(self.seed, scan.layer),
            self.flush_interval,
            self.single_step,
            None if self.channel_scale is None else self.channel_scale[scan.layer],
        )
        if self.bits is None:
            return y, state[0]
        if self.bits not in quant.STATE_BITS or self.flush_interval > 1:
            return y, None
        packed, channel_scale, rng, *dynamic = state
        return y, DSQState(
            packed, channel_scale, calibrated if calibrated is not None else dynamic[0], rng, self.bits, self.stochastic
        )


def float_scan(scan: Scan) -> tuple[Tensor, Tensor]:
    """The scan of the float model, by the operator that prefill uses."""
    return torch.ops.qmamba.chunk_scan(
        scan.x,
        scan.dt,
        scan.A,
        scan.B,
        scan.C,
        scan.D,
        scan.dt_bias,
        scan.initial_state,
        scan.dt_softplus,
        scan.dt_min,
        scan.dt_max,
    )


def mixers(model: nn.Module) -> dict[str, Any]:
    """Module path -> Mamba2 layer, in the order of the model."""
    found = {}
    for path, module in model.named_modules():
        functions = sys.modules.get(type(module).__module__)
        if hasattr(module, "A_log") and hasattr(module, "in_proj") and hasattr(functions, _SCAN):
            found[path] = module
    return found


@contextlib.contextmanager
def replaced(model: nn.Module, run: Run) -> Iterator[None]:
    """Inside, the Mamba2 layers of ``model`` call ``run`` for a sequence; not for several threads at a time."""
    layers = mixers(model)
    modules = {sys.modules[type(module).__module__] for module in layers.values()}
    current: list[str] = []

    def enter(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            current[:] = [path]

        return hook

    def chunk_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, **kwargs: Any) -> Any:
        dt_min, dt_max = kwargs.get("dt_limit") or (0.0, math.inf)
        y, state = run(
            Scan(
                current[0],
                x,
                dt,
                A,
                B,
                C,
                kwargs.get("D"),
                kwargs.get("dt_bias"),
                kwargs.get("initial_states"),
                kwargs.get("dt_softplus", False),
                dt_min,
                dt_max,
            )
        )
        if not kwargs.get("return_final_states"):
            return y
        if state is None:
            raise StateError(
                f"{current[0]}: no packed state to go on from (3 bits, or flush_interval > 1); "
                "pass use_cache=False, or use 8, 4 or 2 bits and flush_interval=1"
            )
        return y, state

    with contextlib.ExitStack() as stack:
        for path, module in layers.items():
            stack.callback(module.register_forward_pre_hook(enter(path)).remove)
        for functions in modules:
            stack.callback(setattr, functions, _SCAN, getattr(functions, _SCAN))
            setattr(functions, _SCAN, chunk_scan)
        yield
