"""Perplexity of the recurrence: what a model says of a text when its state is requantized as decode requantizes it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import distributed
from .recurrence import Run, replaced

PROMPT = 8
"""First tokens of a window, which nothing precedes, are not scored."""


@dataclasses.dataclass(frozen=True)
class Score:
    """Code lengths of windows.

    Attributes:
        nats: [w] float64, mean code length of a token in each window.
        tokens: number of tokens scored.
    """

    nats: Tensor
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the mean code length."""
        return math.exp(self.nats.mean().item())

    def increase_over(self, reference: Score) -> tuple[float, float]:
        """Relative increase of perplexity and its standard error, by paired differences of windows."""
        difference = self.nats - reference.nats
        return math.expm1(difference.mean().item()), standard_error(difference)


def standard_error(values: Tensor) -> float:
    """Of the mean of ``values`` [w]; NaN for a single one."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan


def token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Code length of each target [b, l], logits [b, l, vocab]."""
    return F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")


def window_nats(logits: Tensor, ids: Tensor, prompt: int = PROMPT) -> Tensor:
    """[b] float64: mean code length behind the prompt of windows ``ids`` [b, l], whose logits are [b, l, vocab]."""
    return token_nats(logits[:, prompt - 1 : -1], ids[:, prompt:]).double().mean(dim=1)


@torch.no_grad()
def score(
    model: Any,
    windows: Tensor,
    run: Run,
    *,
    batch: int = 16,
    prompt: int = PROMPT,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Score:
    """Code lengths of ``windows`` [w, l], each from an empty state; processes share them.

    Args:
        run: the recurrence, such as a `Recurrence`; `float_scan` for the float state.
        advance: called with the number of tokens of every batch that is done.
    """
    device = next(model.parameters()).device
    mine = []
    with replaced(model, run):
        for ids in distributed.share(windows.split(batch)):
            ids = ids.to(device)
            mine.append(window_nats(model(ids, use_cache=False).logits, ids, prompt).cpu())
            advance(ids.numel())
    nats = torch.cat(distributed.gathered(mine))
    return Score(nats, windows.shape[0] * (windows.shape[1] - prompt))
