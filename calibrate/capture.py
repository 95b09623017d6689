"""What calibration needs to know of a model's activations and states, summed up in one pass over the samples."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from .quantized_model import linears
from .recurrence import Scan, float_scan, mixers, replaced

SEGMENT = 32
"""Tokens between two looks at the state. Neighbouring states are alike: every step would cost 32 times as much."""

ROWS = 1024
"""Rows of states that are kept for each layer."""


@dataclasses.dataclass
class Statistics:
    """Sums over all samples; everything is float64 while it grows, so that the order of samples does not show.

    Attributes:
        state_sum: layer -> sum of h^2 over samples and looks, [h, p, n].
        state_max: layer -> largest |h|, [h, p, n].
        rows: layer -> rows of single states, [h, k, n] float32, the same k places for all heads.
        channels: layer -> the channel p that each row is of, [k] int64.
        looks: number of states summed.
        input_max: linear -> largest magnitude of each input feature, [in_features].
    """

    state_sum: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    state_max: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    rows: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    channels: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    input_max: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    looks: int = 0

    def state_rms(self, layer: str) -> Tensor:
        """Root of the mean square of every state element, [h, p, n] float32."""
        return (self.state_sum[layer] / self.looks).sqrt().float()

    def tensors(self) -> dict[str, Tensor]:
        """All of it as named tensors, for a file."""
        named = {
            f"{field.name}/{key}": tensor
            for field in dataclasses.fields(self)
            if field.name != "looks"
            for key, tensor in getattr(self, field.name).items()
        }
        return {**named, "looks": torch.tensor(self.looks)}

    @classmethod
    def from_tensors(cls, named: dict[str, Tensor]) -> Statistics:
        """Inverse of `tensors`."""
        statistics = cls(looks=int(named["looks"]))
        for name, tensor in named.items():
            field, _, key = name.partition("/")
            if key:
                getattr(statistics, field)[key] = tensor
        return statistics


@torch.no_grad()
def capture(model: Any, batches: Sequence[Tensor], advance: Callable[[int], None] = lambda tokens: None) -> Statistics:
    """Statistics of the float model over ``batches`` [b, l], of which each process takes its share.

    Args:
        advance: called with the number of tokens of every batch that is done.
    """
    layers = mixers(model)
    statistics = Statistics()
    for path, mixer in layers.items():
        # Filled even where no batch of this process reaches it, so that all processes reduce the same tensors.
        zeros = torch.zeros(shape_of(mixer), dtype=torch.float64, device=mixer.A_log.device)
        statistics.state_sum[path], statistics.state_max[path] = zeros, zeros.clone()
    all_looks = sum(math.ceil(ids.shape[1] / SEGMENT) for ids in batches)
    rows_a_look = math.ceil(ROWS / max(all_looks, 1))
    looks = torch.zeros((), dtype=torch.float64)
    generator = torch.Generator()
    picked: dict[str, list[Tensor]] = {}
    channels: dict[str, list[Tensor]] = {}

    def look(scan: Scan) -> tuple[Tensor, Tensor | None]:
        outputs, state = [], scan.initial_state
        picks, places = [], []
        for start in range(0, scan.x.shape[1], SEGMENT):
            piece = slice(start, start + SEGMENT)
            x, dt, B, C = (tensor[:, piece] for tensor in (scan.x, scan.dt, scan.B, scan.C))
            y, state = float_scan(dataclasses.replace(scan, x=x, dt=dt, B=B, C=C, initial_state=state))
            assert state is not None
            outputs.append(y)
            h = state.double()
            statistics.state_sum[scan.layer] += h.square().sum(dim=0)
            statistics.state_max[scan.layer] = torch.maximum(statistics.state_max[scan.layer], h.abs().amax(dim=0))
            sample = torch.randint(len(h), (rows_a_look,), generator=generator)
            places.append(torch.randint(h.shape[2], (rows_a_look,), generator=generator))
            picks.append(state[sample, :, places[-1]].transpose(0, 1).cpu())
        picked[scan.layer].append(torch.cat(picks, dim=1))
        channels[scan.layer].append(torch.cat(places))
        return torch.cat(outputs, dim=1), state

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            largest = args[0].detach().double().abs().flatten(0, -2).amax(dim=0)
            statistics.input_max[path] = torch.maximum(statistics.input_max[path], largest)

        return hook

    handles = []
    for path, linear in linears(model).items():
        statistics.input_max[path] = torch.zeros(linear.in_features, dtype=torch.float64, device=linear.weight.device)
        handles.append(linear.register_forward_pre_hook(watch(path)))
    for path in layers:
        picked[path], channels[path] = [], []
    try:
        with replaced(model, look):
            for index, ids in distributed.share(enumerate(batches)):
                # By the batch, not by the process: any number of processes picks the same rows.
                generator.manual_seed(index)
                model(ids, use_cache=False)
                looks += len(ids) * math.ceil(ids.shape[1] / SEGMENT)
                advance(ids.numel())
    finally:
        for handle in handles:
            handle.remove()
    distributed.sum_([*statistics.state_sum.values(), looks])
    distributed.max_([*statistics.state_max.values(), *statistics.input_max.values()])
    statistics.looks = int(looks)
    for path in layers:
        statistics.rows[path] = torch.cat(distributed.gathered(picked[path]), dim=1)
        statistics.channels[path] = torch.cat(distributed.gathered(channels[path]))
    return statistics


def shape_of(mixer: Any) -> tuple[int, int, int]:
    """(nheads, headdim, dstate) of a Mamba2 layer."""
    return mixer.A_log.numel(), int(mixer.head_dim), int(mixer.ssm_state_size)
