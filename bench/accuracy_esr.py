"""ESR in `python -m bench accuracy`: how much of the gap its recipes recover, and the paper's learning rates."""

from __future__ import annotations

import dataclasses
import math
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.accuracy_table import Bench
from bench.record import console
from calibrate.data import split_windows
from calibrate.esr import PAPER, EsrOptions, Reconstruction
from calibrate.evaluate import score, standard_error
from calibrate.pipeline import Options
from calibrate.quantized_model import quantized_copy
from calibrate.recurrence import Recurrence, float_scan
from calibrate.work import Work

RATES = (1e-5, 1e-4, 5e-4, 1e-3, 5e-3)
RECIPES = {
    "paper (single step, block by block)": PAPER,
    "paper, 5 epochs, 4 samples a step": dataclasses.replace(PAPER, epochs=5, batch=4),
    "exact trajectory, block by block": EsrOptions(),
    "exact trajectory, all layers by the prediction": EsrOptions(loss="model"),
    "the same, conv1d too": EsrOptions(learn=("in_proj", "conv1d"), loss="model"),
}


class Setting(NamedTuple):
    """Where there is a gap. ``static``: both scale vectors are from calibration; otherwise state_scale alone."""

    bits: int
    static: bool = False
    stochastic: bool = False
    weights: str = "none"


SETTINGS = {
    "H4 fully static": Setting(4, static=True),
    "H3 calibrated": Setting(3),
    "H3 calibrated, stochastic": Setting(3, stochastic=True),
    "W8A8H4 calibrated": Setting(4, weights="int8"),
}


def reconstruct(
    bench: Bench, run: Recurrence, options: EsrOptions, seed: int, weights: str = "none", mark: str = ""
) -> dict[str, Any]:
    """Share of the log-perplexity gap that ESR recovers on the held-out windows, which it never sees.

    ``recovered_validation`` is that of its validation windows, for choices such as that of a learning rate.
    """
    sizes = bench.sizes
    counts = (sizes.esr_samples, sizes.esr_validation)
    samples, validation = split_windows(bench.text, sizes.esr_length, counts, seed + 1)
    quantized = quantized_copy(bench.model, weights=None if weights == "none" else weights)
    before = score(quantized, bench.held_out, run, batch=bench.batch)
    nats = [
        score(*of, batch=bench.batch).nats
        for of in ((bench.model, validation, float_scan), (quantized, validation, run))
    ]
    began, used = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        reconstruction = Reconstruction(
            bench.model,
            quantized,
            run,
            options,
            samples,
            validation,
            smooth=None,
            seed=seed,
            work=Work(Path(folder) / "esr", {}, resume=False),
            memory_limit=Options.memory,
        )
        reconstruction.run()
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - used
    after = score(quantized, bench.held_out, reconstruction.recurrence, batch=bench.batch)
    nats.append(score(quantized, validation, reconstruction.recurrence, batch=bench.batch).nats)
    validation_float, validation_before, validation_after = (part.mean().item() for part in nats)
    gap, gain = before.nats - bench.reference.nats, before.nats - after.nats
    bench.add("with ESR", run, after, 16 / bench.dstate, weights=weights, esr=f"{mark} seed {seed}".strip())
    floats = score(quantized, bench.held_out, float_scan, batch=bench.batch).nats - bench.reference.nats
    return {
        "seed": seed,
        "recovered": (gain.mean() / gap.mean()).item(),
        "recovered_validation": (validation_before - validation_after) / (validation_before - validation_float),
        "nats_gained": gain.mean().item(),
        "nats_gained_error": standard_error(gain),
        "gap": gap.mean().item(),
        "float_state_change": floats.mean().item(),
        "perplexity": after.perplexity,
        "held_out_windows": len(bench.held_out),
        "samples": len(samples),
        "length": sizes.esr_length,
        "options": dataclasses.asdict(options),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "layers": [dataclasses.asdict(result) for result in reconstruction.results],
    }


def esr(bench: Bench, seeds: tuple[int, ...], only: str, keep: Callable[[dict[str, Any]], None]) -> None:
    """Every recipe in every one of `SETTINGS`.

    Args:
        only: of these, those whose setting and recipe match this regular expression.
        keep: called with what is found, as soon as it is.
    """
    for name, setting in SETTINGS.items():
        for recipe, options in RECIPES.items():
            if not re.search(only, f"{name}, {recipe}"):
                continue
            run = (bench.static if setting.static else bench.calibrated)(setting.bits, setting.stochastic)
            runs = [reconstruct(bench, run, options, seed, setting.weights, recipe) for seed in seeds]
            shares = torch.tensor([run["recovered"] for run in runs])
            spread = shares.std().item() if len(seeds) > 1 else math.nan
            console.print(f"{name}, {recipe}: {shares.mean():.1%} of the gap recovered, spread {spread:.1%}")
            keep({name: {recipe: runs}})


def learning_rates(bench: Bench, rates: tuple[float, ...], keep: Callable[[dict[str, float]], None]) -> None:
    """The paper's ablation: held-out perplexity by learning rate, H4 fully static, the paper's recipe."""
    run = bench.static(4, False)
    found = {"without ESR": score(bench.model, bench.held_out, run, batch=bench.batch).perplexity}
    for rate in rates:
        options = dataclasses.replace(PAPER, learning_rate=rate)
        found[f"{rate:g}"] = reconstruct(bench, run, options, 0, mark=f"rate {rate:g}")["perplexity"]
        keep(found)
