"""Outliers as large models have them, put into the state of a small one without changing what it computes."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from calibrate.capture import Statistics, shape_of
from calibrate.recurrence import Run, Scan, mixers


@dataclasses.dataclass(frozen=True)
class Outliers:
    """Factors by which rows and columns of every layer's state are larger.

    x is multiplied by ``channel`` before the recurrence and y divided by it after; B is multiplied by ``state`` and C
    divided by it. So h[p, n] is ``channel[p] * state[n]`` times as large, and y is what it was.

    Attributes:
        channel: layer -> [h, p]; state: layer -> [g, n].
    """

    channel: dict[str, Tensor]
    state: dict[str, Tensor]

    @classmethod
    def random(cls, model: Any, factor: float = 20.0, share: float = 1 / 16, seed: int = 0) -> Outliers:
        """``factor`` for a random ``share`` of the rows and of the columns, 1 elsewhere."""
        generator = torch.Generator().manual_seed(seed)

        def some(count: int, size: int) -> Tensor:
            scale = torch.ones(count, size)
            chosen = torch.rand(count, size, generator=generator).argsort(dim=1)[:, : max(1, round(size * share))]
            return scale.scatter(1, chosen, factor)

        channel, state = {}, {}
        for layer, mixer in mixers(model).items():
            nheads, headdim, dstate = shape_of(mixer)
            channel[layer], state[layer] = some(nheads, headdim), some(int(mixer.n_groups), dstate)
        return cls(channel, state)

    def around(self, run: Run) -> Run:
        """``run`` on the larger states."""

        def rescaled(scan: Scan) -> tuple[Tensor, Tensor | None]:
            channel, state = self.channel[scan.layer], self.state[scan.layer]
            y, last = run(dataclasses.replace(scan, x=scan.x * channel, B=scan.B * state, C=scan.C / state))
            return y / channel, last

        return rescaled

    def factors(self, layer: str) -> Tensor:
        """[h, p, n]: how much larger each element is."""
        channel, state = self.channel[layer], self.state[layer]
        return channel[:, :, None] * state.repeat_interleave(len(channel) // len(state), dim=0)[:, None]

    def on_state_scale(self, layer: str, scale: Tensor) -> Tensor:
        """[h, n]: the scales of which a calibration of the larger states finds about the same."""
        return scale * self.state[layer].repeat_interleave(len(scale) // len(self.state[layer]), dim=0)

    def statistics(self, original: Statistics) -> Statistics:
        """What `capture` would have found with the larger states."""
        changed = dataclasses.replace(original, state_sum={}, state_max={}, rows={})
        for layer in original.state_sum:
            factors = self.factors(layer)
            changed.state_sum[layer] = original.state_sum[layer] * factors.double().square()
            changed.state_max[layer] = original.state_max[layer] * factors.double()
            changed.rows[layer] = original.rows[layer] * factors[:, original.channels[layer]]
        return changed

    def sensitivities(self, original: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `sensitivities` would have found."""
        return {layer: felt / self.factors(layer).double().square() for layer, felt in original.items()}
