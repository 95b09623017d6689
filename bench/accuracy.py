"""``python -m bench accuracy``: what a packed state costs in perplexity, by scheme, rounding and bits; ESR.

Every figure is the perplexity of the recurrence on held-out windows, requantized at every token, as an increase over
the float model on the same windows; the standard error is that of paired differences. Scales and ESR see other text.

Parts may run one by one, and by bits, seeds and rates: ``--out`` keeps what the others found, and ``--merge`` takes in
what other processes have written.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import rich.console
import rich.table
import torch
import typer
from torch import Tensor

from bench.outliers import Outliers
from bench.plot import require_matplotlib
from bench.record import machine_record
from bench.schemes import SCHEMES, SchemeRecurrence
from calibrate.capture import Statistics, capture
from calibrate.cli import load_model
from calibrate.data import Tokens, cut_windows, read_tokens, split_windows, spread
from calibrate.esr import PAPER, EsrOptions, Reconstruction
from calibrate.evaluate import Score, score, standard_error, token_nats
from calibrate.pipeline import Options
from calibrate.quantized_model import quantized_copy
from calibrate.recurrence import Recurrence, Run, float_scan, mixers, replaced
from calibrate.state_scales import EXPONENTS, fitted_scale, power_scale, sensitivities
from calibrate.work import Work
from qmamba_compile import quant

ROOT = Path(__file__).resolve().parents[1]
CLIPS = (0.25, 0.35, 0.5, 0.7, 1.0)
"""Static channel scales that are tried, relative to the one that serves the largest value seen."""
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
PARTS = ("table", "esr", "rates", "plots")
# Tables are wider than what rich assumes of a pipe.
console = rich.console.Console(width=None if sys.stdout.isatty() else 160)


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

    # --- ESR -------------------------------------------------------------------------------------------------------

    def reconstruct(
        self, run: Recurrence, options: EsrOptions, seed: int, weights: str = "none", mark: str = ""
    ) -> dict[str, Any]:
        """Share of the log-perplexity gap that ESR recovers on the held-out windows, which it never sees.

        ``recovered_validation`` is that of its validation windows, for choices such as that of a learning rate.
        """
        sizes = self.sizes
        counts = (sizes.esr_samples, sizes.esr_validation)
        samples, validation = split_windows(self.text, sizes.esr_length, counts, seed + 1)
        quantized = quantized_copy(self.model, weights=None if weights == "none" else weights)
        before = score(quantized, self.held_out, run, batch=self.batch)
        nats = [
            score(*of, batch=self.batch).nats
            for of in ((self.model, validation, float_scan), (quantized, validation, run))
        ]
        began, used = time.perf_counter(), time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            reconstruction = Reconstruction(
                self.model,
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
        after = score(quantized, self.held_out, reconstruction.recurrence, batch=self.batch)
        nats.append(score(quantized, validation, reconstruction.recurrence, batch=self.batch).nats)
        validation_float, validation_before, validation_after = (part.mean().item() for part in nats)
        gap, gain = before.nats - self.reference.nats, before.nats - after.nats
        self.add("with ESR", run, after, 16 / self.dstate, weights=weights, esr=f"{mark} seed {seed}".strip())
        floats = score(quantized, self.held_out, float_scan, batch=self.batch).nats - self.reference.nats
        return {
            "seed": seed,
            "recovered": (gain.mean() / gap.mean()).item(),
            "recovered_validation": (validation_before - validation_after) / (validation_before - validation_float),
            "nats_gained": gain.mean().item(),
            "nats_gained_error": standard_error(gain),
            "gap": gap.mean().item(),
            "float_state_change": floats.mean().item(),
            "perplexity": after.perplexity,
            "held_out_windows": len(self.held_out),
            "samples": len(samples),
            "length": sizes.esr_length,
            "options": dataclasses.asdict(options),
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "layers": [dataclasses.asdict(result) for result in reconstruction.results],
        }

    def esr(self, seeds: tuple[int, ...], only: str, keep: Callable[[dict[str, Any]], None]) -> None:
        """Every recipe in every one of `SETTINGS`.

        Args:
            only: of these, those whose setting and recipe match this regular expression.
            keep: called with what is found, as soon as it is.
        """
        for name, setting in SETTINGS.items():
            for recipe, options in RECIPES.items():
                if not re.search(only, f"{name}, {recipe}"):
                    continue
                run = (self.static if setting.static else self.calibrated)(setting.bits, setting.stochastic)
                runs = [self.reconstruct(run, options, seed, setting.weights, recipe) for seed in seeds]
                shares = torch.tensor([run["recovered"] for run in runs])
                spread = shares.std().item() if len(seeds) > 1 else math.nan
                console.print(f"{name}, {recipe}: {shares.mean():.1%} of the gap recovered, spread {spread:.1%}")
                keep({name: {recipe: runs}})

    def rates(self, rates: tuple[float, ...], keep: Callable[[dict[str, float]], None]) -> None:
        """The paper's ablation: held-out perplexity by learning rate, H4 fully static, the paper's recipe."""
        run = self.static(4, False)
        found = {"without ESR": score(self.model, self.held_out, run, batch=self.batch).perplexity}
        for rate in rates:
            options = dataclasses.replace(PAPER, learning_rate=rate)
            found[f"{rate:g}"] = self.reconstruct(run, options, 0, mark=f"rate {rate:g}")["perplexity"]
            keep(found)

    # --- plots -----------------------------------------------------------------------------------------------------

    def plots(self, out: Path, results: dict[str, Any]) -> None:
        """The state of one head, error against position; and of what is known: table, ESR by layer, learning rates."""
        pyplot = require_matplotlib(out / "state_magnitude.png")
        layer = max(self.felt, key=lambda name: self.statistics.state_rms(name).max().item())
        head = int(self.statistics.state_rms(layer).amax(dim=(1, 2)).argmax())
        figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
        for axis, statistics, title in zip(
            axes, (self.statistics, self.outliers.statistics(self.statistics)), ("as trained", "outliers"), strict=True
        ):
            image = axis.imshow(statistics.state_rms(layer)[head].log10(), aspect="auto")
            axis.set(title=f"{layer}, head {head}, {title}", xlabel="state n", ylabel="channel p")
            axis.title.set_fontsize(9)
            figure.colorbar(image, label="log10 of the root mean square")
        _save(figure, out / "state_magnitude.png")
        _save(self._draw_positions(pyplot), out / "error_by_position.png")
        if "table" in results:
            _save(_draw_table(pyplot, results["table"]["results"]), out / "schemes.png")
        if "esr" in results:
            _save(_draw_layers(pyplot, results["esr"]["results"]), out / "esr_loss.png")
        if "rates" in results:
            _save(_draw_rates(pyplot, results["rates"]), out / "esr_rates.png")

    def _draw_positions(self, pyplot: Any) -> Any:
        """On long windows, `_LONG` times as long as those of the table."""
        windows = spread(cut_windows(self.held_out_text, _LONG * self.sizes.length), _TEXTS)
        figure, axis = pyplot.subplots(figsize=(7, 4))
        reference = self._by_position(windows, float_scan)
        for name, run in {
            "dynamic, nearest": Recurrence(4),
            "dynamic, stochastic": Recurrence(4, True),
            "calibrated, nearest": self.calibrated(4, False),
            "dynamic, nearest, stored once in 8 steps": Recurrence(4, flush_interval=8),
        }.items():
            error = (self._by_position(windows, run) - reference).unflatten(0, (-1, _BIN)).mean(dim=1)
            axis.plot(torch.arange(len(error)) * _BIN + _BIN / 2, error, label=name)
        axis.axhline(0, color="black", linewidth=0.5)
        axis.set(
            xlabel=f"position in the text (means of {_BIN} bytes, {len(windows)} texts)",
            ylabel="nats over the float state",
            title="H4, error against position",
        )
        axis.legend(fontsize=8)
        return figure

    @torch.no_grad()
    def _by_position(self, windows: Tensor, run: Run) -> Tensor:
        """Mean code length at each position, as many as fill whole bins."""
        with replaced(self.model, run):
            nats = [
                token_nats(self.model(ids, use_cache=False).logits[:, :-1], ids[:, 1:]).double().sum(dim=0)
                for ids in windows.split(self.batch)
            ]
        total = torch.stack(nats).sum(dim=0) / len(windows)
        return total[: len(total) // _BIN * _BIN]


_LONG, _TEXTS = 8, 12


_BIN = 512
"""Positions averaged for a point of the plot."""


def _draw_table(pyplot: Any, rows: list[dict[str, Any]]) -> Any:
    """Increase against bits an element, natural states; one color a scheme, filled markers are stochastic."""
    figure, axis = pyplot.subplots(figsize=(9, 5.5))
    natural = [row for row in rows if not row["outliers"] and row["weights"] == "none" and row["scheme"] != "with ESR"]
    for index, scheme in enumerate(dict.fromkeys(row["scheme"] for row in natural)):
        for rounding, fill in (("nearest", "none"), ("stochastic", "full")):
            chosen = [row for row in natural if row["scheme"] == scheme and row["rounding"] == rounding]
            axis.plot(
                [row["bits_per_element"] for row in chosen],
                [max(100 * row["increase"], 0.005) for row in chosen],
                marker="o",
                fillstyle=fill,
                linestyle="-" if fill == "full" else ":",
                linewidth=0.8,
                color=f"C{index}",
                label=scheme if fill == "full" else None,
            )
    axis.set(
        yscale="log",
        xlabel="bits a state element, scales included (open, dotted: nearest; filled: stochastic)",
        ylabel="perplexity increase over a float state, %",
        title="requantized at every token",
    )
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return figure


def _draw_layers(pyplot: Any, results: dict[str, Any]) -> Any:
    """Loss of the first and of the last epoch by block, of the recipes that go block by block."""
    figure, axis = pyplot.subplots(figsize=(8, 4.5))
    index = 0
    for setting, recipes in results.items():
        for recipe, runs in recipes.items():
            layers = runs[0]["layers"]
            if len(layers) < 2:
                continue
            for when, style in (("loss_first", ":"), ("loss_last", "-")):
                label = f"{setting}, {recipe}" if when == "loss_last" else None
                values = [result[when] for result in layers]
                axis.plot(range(len(layers)), values, style, marker="o", color=f"C{index}", label=label)
            index += 1
    axis.set(
        xlabel="block",
        ylabel="square error relative to the target's",
        title="ESR loss by block: first epoch dotted, last epoch solid",
        yscale="log",
    )
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
    return figure


def _draw_rates(pyplot: Any, part: dict[str, Any]) -> Any:
    """Perplexity by learning rate, beside that without ESR and that of the float model."""
    figure, axis = pyplot.subplots(figsize=(6, 4))
    found = dict(part["results"])
    without = found.pop("without ESR")
    rates = sorted(found, key=float)
    axis.plot([float(rate) for rate in rates], [found[rate] for rate in rates], marker="o", label="the paper's recipe")
    axis.axhline(without, color="black", linestyle=":", label="without ESR")
    axis.axhline(part["float_perplexity"], color="gray", linestyle="--", label="float state")
    axis.set(xscale="log", xlabel="learning rate", ylabel="perplexity", title="H4 fully static")
    axis.legend()
    axis.grid(alpha=0.3)
    return figure


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    console.print(f"written to {path}", style="dim")


def accuracy(
    model: Annotated[str, typer.Option(help="Folder or hub name; by default the bundled model.")] = str(
        ROOT / "demo/tiny-mamba2"
    ),
    text: Annotated[str, typer.Option(help="Held-out text or data set.")] = str(ROOT / "demo/heldout.txt"),
    calibration_text: Annotated[
        str | None, typer.Option(help="Other text, for scales and ESR; by default the standard library's sources.")
    ] = None,
    windows: Annotated[int, typer.Option(min=2, help="Held-out windows, spread over the text.")] = 48,
    few: Annotated[int, typer.Option(min=2, help="Of these, for schemes that only plain torch knows.")] = 8,
    length: Annotated[int, typer.Option(min=64, help="Tokens of a window.")] = 1024,
    samples: Annotated[int, typer.Option(min=2, help="Windows for statistics.")] = 48,
    validation: Annotated[int, typer.Option(min=2, help="Windows for the choice of scales.")] = 16,
    esr_length: Annotated[int, typer.Option(min=64, help="Tokens of a window for ESR.")] = 512,
    esr_samples: Annotated[int, typer.Option(min=1)] = 96,
    esr_validation: Annotated[int, typer.Option(min=2)] = 48,
    bits: Annotated[str, typer.Option(help="Which of 8, 4, 3, 2.")] = "8,4,3,2",
    seeds: Annotated[str, typer.Option(help="Of the runs of every ESR recipe.")] = "0,1,2",
    only: Annotated[str, typer.Option(help="ESR settings and recipes that match this regular expression.")] = "",
    rates: Annotated[str, typer.Option(help="Learning rates of the ablation.")] = ",".join(map(str, RATES)),
    parts: Annotated[str, typer.Option(help=f"Which of {', '.join(PARTS)}.")] = ",".join(PARTS),
    merge: Annotated[
        list[Path] | None, typer.Option(help="Take in what lies in these folders, of the same model.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1)] = 16,
    out: Annotated[Path, typer.Option(help="Folder for JSON and plots; parts that are not run stay.")] = Path(
        "build/bench/accuracy"
    ),
) -> None:
    """Perplexity against bits, scales and rounding; ESR; plots."""
    wanted = parts.split(",")
    if set(wanted) - set(PARTS):
        raise typer.BadParameter(f"allowed: {', '.join(PARTS)}", param_hint="--parts")
    out.mkdir(parents=True, exist_ok=True)
    file = out / "accuracy.json"

    def keep(part: str, results: Any, about: dict[str, Any]) -> None:
        """At once, since a long run that is ended early has something to show; beside what others have written."""
        known = json.loads(file.read_text()) if file.exists() else {}
        known[part] = {"results": merged(part, known.get(part, {}).get("results"), results), **about}
        file.write_text(json.dumps(known, indent=1) + "\n")

    for folder in merge or ():
        for part, found in json.loads((folder / file.name).read_text()).items():
            keep(part, found.pop("results"), found)
    network = load_model(model)
    held_out = read_tokens(text, model, network)
    with _calibration_file(calibration_text) as source:
        other = read_tokens(source, model, network)
    sizes = Sizes(windows, length, samples, validation, batch, few, esr_length, esr_samples, esr_validation)
    bench = Bench(network, held_out, other, sizes)
    console.print(f"float: perplexity {bench.reference.perplexity:.5f}, {bench.reference.tokens:,} tokens")
    reference = {"float_perplexity": bench.reference.perplexity, "sizes": dataclasses.asdict(sizes)}

    def measured(part: str, results: Any) -> None:
        keep(part, results, {**reference, "machine": machine_record()})

    if "table" in wanted:
        widths = tuple(int(width) for width in bits.split(","))
        bench.table(widths, lambda: measured("table", [dataclasses.asdict(row) for row in bench.rows]))
    if "esr" in wanted:
        bench.esr(tuple(int(seed) for seed in seeds.split(",")), only, lambda results: measured("esr", results))
    if "rates" in wanted:
        bench.rates(tuple(float(rate) for rate in rates.split(",")), lambda results: measured("rates", results))
    if "plots" in wanted:
        bench.plots(out, json.loads(file.read_text()) if file.exists() else {})
    _print(bench.rows)
    console.print(f"written to {file}", style="dim")


def merged(part: str, known: Any, found: Any) -> Any:
    """Results of a part, those ``found`` in place of those ``known`` of the same row, rate, or recipe and seed."""
    if known is None:
        return found
    if part == "table":
        rows = {tuple(row[name] for name in _OF_ROW): row for row in (*known, *found)}
        return sorted(rows.values(), key=lambda row: -int(row["state_bits"]))
    if part != "esr":
        return {**known, **found}
    together = {setting: dict(recipes) for setting, recipes in known.items()}
    for setting, recipes in found.items():
        for recipe, runs in recipes.items():
            of_recipe = together.setdefault(setting, {})
            by_seed = {run["seed"]: run for run in (*of_recipe.get(recipe, ()), *runs)}
            of_recipe[recipe] = [by_seed[seed] for seed in sorted(by_seed)]
    return together


_OF_ROW = ("scheme", "rounding", "state_bits", "weights", "outliers", "esr")
"""What tells rows of the table apart."""


class _calibration_file:  # noqa: N801
    """A context that gives the path of the calibration text."""

    def __init__(self, given: str | None) -> None:
        self._given, self._folder = given, tempfile.TemporaryDirectory()

    def __enter__(self) -> str:
        if self._given is not None:
            return self._given
        sys.path.insert(0, str(ROOT / "demo"))
        from train import stdlib_files

        path = Path(self._folder.name) / "standard library"
        path.write_bytes(b"".join(stdlib_files(heldout=False).values()))
        return str(path)

    def __exit__(self, *_: Any) -> None:
        self._folder.cleanup()


def _print(rows: list[Row]) -> None:
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


def main() -> None:
    """Entry point of ``python -m bench accuracy`` and of ``python -m bench.accuracy``."""
    typer.run(accuracy)


if __name__ == "__main__":
    main()
