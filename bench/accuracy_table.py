"""The table of `python -m bench accuracy`: a model and its text, scales for it, and the perplexity of every scheme."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import rich.table
import torch
from torch import Tensor

from bench.outliers import Outliers
from bench.record import console
from bench.schemes import SCHEMES, SchemeRecurrence
from calibrate.capture import Statistics, capture
from calibrate.data import Tokens, cut_windows, split_windows, spread
from calibrate.evaluate import Score, score
from calibrate.quantized_model import quantized_copy
from calibrate.recurrence import Recurrence, Run, float_scan, mixers
from calibrate.state_scales import EXPONENTS, fitted_scale, power_scale, sensitivities
from qmamba_compile import quant

CLIPS = (0.25, 0.35, 0.5, 0.7, 1.0)
"""Static channel scales that are tried, relative to the one that serves the largest value seen."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; ``increase`` and ``error`` are relative, such as 0.012."""

    scheme: str
    rounding: str
    state_bits: int
    weights: str
    outliers: bool
    esr: str
    windows: int
    perplexity: float
    increase: float
    error: float
    bits_per_element: float
    state_bytes: int


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much text.

    Attributes:
        windows: held-out ones. length: tokens of a window. batch: at a time.
        samples, validation: windows for statistics and for choices.
        few: held-out windows for a scheme that only plain torch knows.
        esr_length, esr_samples, esr_validation: of ESR's own windows, drawn anew for every seed.
    """

    windows: int
    length: int
    samples: int
    validation: int
    batch: int
    few: int
    esr_length: int
    esr_samples: int
    esr_validation: int


class Bench:
    """A model, its calibration text and its held-out windows.

    Attributes:
        rows: of the table so far.
        reference: the float model on the held-out windows.
        few: of these, how many a scheme sees that only plain torch knows.
    """

    def __init__(self, model: Any, held_out_text: Tokens, text: Tokens, sizes: Sizes) -> None:
        """Statistics and scales come from ``text``, which is none of the held-out one."""
        self.model, self.held_out_text, self.text = model, held_out_text, text
        self.sizes, self.batch = sizes, sizes.batch
        self.held_out = spread(cut_windows(held_out_text, sizes.length), sizes.windows)
        self.reference = score(model, self.held_out, float_scan, batch=self.batch)
        samples, self.validation = split_windows(text, sizes.length, (sizes.samples, sizes.validation), 0)
        self.statistics = capture(model, list(samples.split(self.batch)))
        self.felt = sensitivities(model, list(samples[: max(1, len(samples) // 2)].split(self.batch)))
        self.outliers = Outliers.random(model)
        self.int8 = quantized_copy(model)
        self.rows: list[Row] = []
        self._chosen: dict[tuple[str, int, bool], Recurrence] = {}
        mixer = next(iter(mixers(model).values()))
        self.headdim, self.dstate = int(mixer.head_dim), int(mixer.ssm_state_size)
        self.elements = sum(m.A_log.numel() * self.headdim * self.dstate for m in mixers(model).values())

    # --- scales ----------------------------------------------------------------------------------------------------

    def calibrated(self, bits: int, stochastic: bool, *, outliers: bool = False) -> Recurrence:
        """DSQ with calibrated scales, chosen on the validation windows as `qmamba calibrate` does."""

        def tried() -> list[Recurrence]:
            statistics, felt = self._seen(outliers)
            scales = [{layer: power_scale(statistics, layer, e) for layer in felt} for e in EXPONENTS]
            fitted = {
                layer: fitted_scale(statistics.rows[layer], statistics.channels[layer], felt[layer]) for layer in felt
            }
            return [Recurrence(bits, state_scale=choice) for choice in (*scales, fitted)]

        return self._best("calibrated", bits, stochastic, outliers, tried)

    def static(self, bits: int, stochastic: bool, *, outliers: bool = False) -> Recurrence:
        """Both vectors from calibration; how much of the largest values is clipped, the validation windows decide."""

        def tried() -> list[Recurrence]:
            base = self.calibrated(bits, False, outliers=outliers)
            statistics, _ = self._seen(outliers)
            assert base.state_scale is not None
            scales = {layer: quant.store_scale(scale).float() for layer, scale in base.state_scale.items()}
            largest = {
                layer: (statistics.state_max[layer].float() / scale[:, None]).amax(-1) / quant.max_code(bits)
                for layer, scale in scales.items()
            }
            return [
                dataclasses.replace(base, channel_scale={layer: clip * scale for layer, scale in largest.items()})
                for clip in CLIPS
            ]

        return self._best("static", bits, stochastic, outliers, tried)

    def _best(
        self, kind: str, bits: int, stochastic: bool, outliers: bool, tried: Callable[[], list[Recurrence]]
    ) -> Recurrence:
        """The best on the validation windows, rounded to nearest; the same scales serve both roundings."""
        key = (kind, bits, outliers)
        if key not in self._chosen:
            runs = tried()
            nats = [self._validate(run, outliers) for run in runs]
            self._chosen[key] = runs[nats.index(min(nats))]
        return dataclasses.replace(self._chosen[key], stochastic=stochastic)

    def _seen(self, outliers: bool) -> tuple[Statistics, dict[str, Tensor]]:
        if not outliers:
            return self.statistics, self.felt
        return self.outliers.statistics(self.statistics), self.outliers.sensitivities(self.felt)

    def _validate(self, run: Run, outliers: bool) -> float:
        run = self.outliers.around(run) if outliers else run
        nats = score(self.model, self.validation, run, batch=self.batch).nats.mean().item()
        return nats if math.isfinite(nats) else math.inf

    # --- rows ------------------------------------------------------------------------------------------------------

    def measure(
        self, scheme: str, run: Any, extra_bits: float, *, weights: str = "none", outliers: bool = False
    ) -> None:
        """Add a row and print it."""
        model = self.int8 if weights == "int8" else self.model
        windows = self.held_out
        if isinstance(run, SchemeRecurrence) and not run.by_kernel:
            windows = spread(windows, self.sizes.few)
        result = score(model, windows, self.outliers.around(run) if outliers else run, batch=self.batch)
        self.add(scheme, run, result, extra_bits, weights=weights, outliers=outliers)

    def add(
        self,
        scheme: str,
        run: Any,
        result: Score,
        extra_bits: float,
        *,
        weights: str = "none",
        outliers: bool = False,
        esr: str = "",
    ) -> None:
        """Add a row of what has been measured, and print it."""
        seen = len(result.nats)
        reference = Score(spread(self.reference.nats, seen), result.tokens)
        increase, error = result.increase_over(reference)
        bits = run.bits + extra_bits
        rounding = "stochastic" if run.stochastic else "nearest"
        state_bytes = round(self.elements * bits / 8)
        perplexity = result.perplexity
        self.rows.append(
            Row(
                scheme, rounding, run.bits, weights, outliers, esr, seen, perplexity, increase, error, bits, state_bytes
            )
        )
        marks = ", ".join(text for text in (f"W {weights}", "outliers" if outliers else "", esr) if text)
        console.print(f"{scheme:18} H{run.bits} {rounding:10} {marks:24} {increase:+9.3%} +- {error:.3%}")

    def table(self, bits: tuple[int, ...], keep: Callable[[], None]) -> None:
        """Every scheme at every number of bits; outliers at 4 bits, and what only plain torch knows at 4 and 3."""
        p, n = self.headdim, self.dstate
        for width in bits:
            for stochastic in (False, True):
                ones = {layer: torch.ones_like(power_scale(self.statistics, layer, 1.0)) for layer in self.felt}
                per_channel = Recurrence(width, stochastic, state_scale=ones)
                dynamic = Recurrence(width, stochastic)
                for outliers in (False, True) if width == 4 else (False,):
                    for name, (_, extra) in SCHEMES.items():
                        run = SchemeRecurrence(name, width, stochastic)
                        if run.by_kernel or width == 4 or (width == 3 and not stochastic):
                            self.measure(name, run, extra(p, n), outliers=outliers)
                    self.measure("per channel", per_channel, 16 / n, outliers=outliers)
                    self.measure("DSQ dynamic", dynamic, 16 / n + 16 / p, outliers=outliers)
                    calibrated = self.calibrated(width, stochastic, outliers=outliers)
                    self.measure("DSQ calibrated", calibrated, 16 / n, outliers=outliers)
                    static = self.static(width, stochastic, outliers=outliers)
                    self.measure("DSQ static", static, 0.0, outliers=outliers)
                    if not outliers:
                        self.measure("DSQ dynamic", dynamic, 16 / n + 16 / p, weights="int8")
                        self.measure("DSQ calibrated", calibrated, 16 / n, weights="int8")
                    keep()


def print_table(rows: list[Row]) -> None:
    table = rich.table.Table(title="perplexity over the float model, recurrent, requantized at every token")
    for column in (
        "scheme",
        "rounding",
        "bits",
        "weights",
        "outliers",
        "ESR",
        "windows",
        "increase",
        "+-",
        "bits/element",
        "bytes",
    ):
        table.add_column(column, justify="left" if column in ("scheme", "rounding", "ESR") else "right")
    for row in rows:
        table.add_row(
            row.scheme,
            row.rounding,
            str(row.state_bits),
            row.weights,
            "yes" if row.outliers else "",
            row.esr,
            str(row.windows),
            f"{row.increase:+.3%}",
            f"{row.error:.3%}",
            f"{row.bits_per_element:.3f}",
            f"{row.state_bytes:,}",
        )
    console.print(table)
