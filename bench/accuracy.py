"""``python -m bench accuracy``: what a packed state costs in perplexity, by scheme, rounding and bits; ESR.

Every figure is the perplexity of the recurrence on held-out windows, requantized at every token, as an increase over
the float model on the same windows; the standard error is that of paired differences. Scales and ESR see other text.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import rich.console
import rich.table
import torch
import typer
from torch import Tensor

from bench.outliers import Outliers
from bench.schemes import SCHEMES, SchemeRecurrence
from calibrate.capture import Statistics, capture
from calibrate.cli import load_model
from calibrate.data import cut_windows, read_tokens, split_windows
from calibrate.esr import PAPER, EsrOptions, Reconstruction
from calibrate.evaluate import Score, score, standard_error, token_nats
from calibrate.pipeline import Options
from calibrate.quantized_model import quantized_copy
from calibrate.recurrence import Recurrence, Run, float_scan, mixers, replaced
from calibrate.state_scales import EXPONENTS, fitted_scale, power_scale, sensitivities
from calibrate.work import Work
from qmamba_compile import quant

ROOT = Path(__file__).resolve().parents[1]
CLIPS = (0.5, 0.65, 0.8, 1.0, 1.25)
"""Static channel scales that are tried, relative to the one that serves the largest value seen."""
RATES = (1e-5, 1e-4, 5e-4, 1e-3, 5e-3)
RECIPES = {
    "paper (single step, constant rate)": PAPER,
    "exact trajectory, block by block": EsrOptions(),
    "exact trajectory, all layers by the prediction": EsrOptions(loss="model", batch=4),
}
PARTS = ("table", "esr", "rates", "plots")
console = rich.console.Console()


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; ``increase`` and ``error`` are relative, such as 0.012."""

    scheme: str
    rounding: str
    state_bits: int
    weights: str
    outliers: bool
    esr: str
    perplexity: float
    increase: float
    error: float
    bits_per_element: float
    state_bytes: int


class Bench:
    """A model, its calibration text and its held-out windows.

    Attributes:
        rows: of the table so far.
        reference: the float model on the held-out windows.
    """

    def __init__(self, model: Any, held_out: Tensor, samples: Tensor, validation: Tensor, batch: int) -> None:
        self.model, self.held_out, self.samples, self.validation = model, held_out, samples, validation
        self.batch = batch
        self.reference = score(model, held_out, float_scan, batch=batch)
        self.statistics = capture(model, list(samples.split(batch)))
        self.felt = sensitivities(model, list(samples[: max(1, len(samples) // 2)].split(batch)))
        self.outliers = Outliers.random(model)
        self.int8 = quantized_copy(model)
        self.rows: list[Row] = []
        mixer = next(iter(mixers(model).values()))
        self.headdim, self.dstate = int(mixer.head_dim), int(mixer.ssm_state_size)
        self.elements = sum(m.A_log.numel() * self.headdim * self.dstate for m in mixers(model).values())

    # --- scales ----------------------------------------------------------------------------------------------------

    def calibrated(self, bits: int, stochastic: bool, *, outliers: bool = False) -> Recurrence:
        """DSQ with calibrated scales, chosen on the validation windows as `qmamba calibrate` does."""
        statistics, felt = self._seen(outliers)
        tried = {f"rms^{e:g}": {layer: power_scale(statistics, layer, e) for layer in felt} for e in EXPONENTS}
        tried["fitted"] = {
            layer: fitted_scale(statistics.rows[layer], statistics.channels[layer], felt[layer]) for layer in felt
        }
        runs = [Recurrence(bits, stochastic, state_scale=scales) for scales in tried.values()]
        return min(runs, key=lambda run: self._validate(run, outliers))

    def static(self, bits: int, stochastic: bool, *, outliers: bool = False) -> Recurrence:
        """Both vectors from calibration; how much of the largest values is clipped, the validation windows decide."""
        base = self.calibrated(bits, stochastic, outliers=outliers)
        statistics, _ = self._seen(outliers)
        assert base.state_scale is not None
        scales = {layer: quant.store_scale(scale).float() for layer, scale in base.state_scale.items()}
        largest = {
            layer: (statistics.state_max[layer].float() / scale[:, None]).amax(-1) / quant.max_code(bits)
            for layer, scale in scales.items()
        }
        runs = [
            dataclasses.replace(base, channel_scale={layer: clip * scale for layer, scale in largest.items()})
            for clip in CLIPS
        ]
        return min(runs, key=lambda run: self._validate(run, outliers))

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
        result = score(model, self.held_out, self.outliers.around(run) if outliers else run, batch=self.batch)
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
        increase, error = result.increase_over(self.reference)
        bits = run.bits + extra_bits
        rounding = "stochastic" if run.stochastic else "nearest"
        state_bytes = round(self.elements * bits / 8)
        perplexity = result.perplexity
        self.rows.append(
            Row(scheme, rounding, run.bits, weights, outliers, esr, perplexity, increase, error, bits, state_bytes)
        )
        marks = ", ".join(text for text in (f"W {weights}", "outliers" if outliers else "", esr) if text)
        console.print(f"{scheme:18} H{run.bits} {rounding:10} {marks:24} {increase:+9.3%} +- {error:.3%}")

    def table(self, bits: tuple[int, ...]) -> None:
        """Every scheme at every number of bits; outliers and int8 linears at 4 bits."""
        p, n = self.headdim, self.dstate
        for width in bits:
            for stochastic in (False, True):
                ones = {layer: torch.ones_like(power_scale(self.statistics, layer, 1.0)) for layer in self.felt}
                per_channel = Recurrence(width, stochastic, state_scale=ones)
                dynamic = Recurrence(width, stochastic)
                for outliers in (False, True) if width == 4 else (False,):
                    for name, (_, extra) in SCHEMES.items():
                        run = SchemeRecurrence(name, width, stochastic)
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

    # --- ESR -------------------------------------------------------------------------------------------------------

    def reconstruct(self, run: Recurrence, options: EsrOptions, seed: int, weights: str = "none") -> dict[str, Any]:
        """Share of the log-perplexity gap that ESR recovers on the held-out windows."""
        generator = torch.Generator().manual_seed(seed)
        samples = self.samples[torch.randperm(len(self.samples), generator=generator)]
        quantized = quantized_copy(self.model, weights=None if weights == "none" else weights)
        before = score(quantized, self.held_out, run, batch=self.batch)
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            reconstruction = Reconstruction(
                self.model,
                quantized,
                run,
                options,
                samples,
                self.validation,
                smooth=None,
                seed=seed,
                work=Work(Path(folder) / "esr", {}, resume=False),
                memory_limit=Options.memory,
            )
            reconstruction.run()
        seconds = time.perf_counter() - began
        after = score(quantized, self.held_out, reconstruction.recurrence, batch=self.batch)
        gap, gain = before.nats - self.reference.nats, before.nats - after.nats
        self.add("with ESR", run, after, 16 / self.dstate, weights=weights, esr=f"seed {seed}")
        return {
            "recovered": (gain.mean() / gap.mean()).item(),
            "nats_gained": gain.mean().item(),
            "nats_gained_error": standard_error(gain),
            "gap": gap.mean().item(),
            "float_state_change": (
                score(quantized, self.held_out, float_scan, batch=self.batch).nats - self.reference.nats
            )
            .mean()
            .item(),
            "seconds": seconds,
            "layers": [dataclasses.asdict(result) for result in reconstruction.results],
        }

    def esr(self, seeds: int, only: str = "") -> dict[str, Any]:
        """Every recipe where there is a gap: H4 fully static, H3 calibrated, and W8A8H4 calibrated.

        Args:
            only: of these, those whose setting and recipe match this regular expression.
        """
        settings: dict[str, tuple[Recurrence, str]] = {
            "H4 fully static": (self.static(4, False), "none"),
            "H3 calibrated": (self.calibrated(3, False), "none"),
            "W8A8H4 calibrated": (self.calibrated(4, False), "int8"),
        }
        results: dict[str, Any] = {}
        for setting, (run, weights) in settings.items():
            for recipe, options in RECIPES.items():
                if not re.search(only, f"{setting}, {recipe}"):
                    continue
                runs = [self.reconstruct(run, options, seed, weights) for seed in range(seeds)]
                shares = torch.tensor([run["recovered"] for run in runs])
                spread = shares.std().item() if seeds > 1 else math.nan
                console.print(f"{setting}, {recipe}: {shares.mean():.1%} of the gap recovered, spread {spread:.1%}")
                results.setdefault(setting, {})[recipe] = runs
        return results

    def rates(self) -> dict[str, float]:
        """The paper's ablation: held-out perplexity by learning rate, H3 calibrated, the paper's recipe."""
        run = self.calibrated(3, False)
        found = {"without ESR": score(self.model, self.held_out, run, batch=self.batch).perplexity}
        for rate in RATES:
            self.reconstruct(run, dataclasses.replace(PAPER, learning_rate=rate), 0)
            found[f"{rate:g}"] = self.rows[-1].perplexity
        return found

    # --- plots -----------------------------------------------------------------------------------------------------

    def plots(self, out: Path, esr: dict[str, Any]) -> None:
        """State magnitude of one head, error against position, ESR loss by layer."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        layer = max(self.felt, key=lambda name: self.statistics.state_rms(name).max().item())
        figure, axes = plt.subplots(1, 2, figsize=(10, 4))
        for axis, statistics, title in zip(
            axes, (self.statistics, self.outliers.statistics(self.statistics)), ("as trained", "outliers"), strict=True
        ):
            head = int(statistics.state_rms(layer).amax(dim=(1, 2)).argmax())
            image = axis.imshow(statistics.state_rms(layer)[head].log10(), aspect="auto")
            axis.set(title=f"{layer}, head {head}, {title}", xlabel="state n", ylabel="channel p")
            figure.colorbar(image, label="log10 of the root mean square")
        _save(figure, out / "state_magnitude.png")
        figure, axis = plt.subplots(figsize=(7, 4))
        for name, run in {
            "DSQ dynamic, nearest": Recurrence(4),
            "DSQ dynamic, stochastic": Recurrence(4, True),
            "DSQ calibrated, nearest": self.calibrated(4, False),
        }.items():
            error = self._by_position(run) - self._by_position(float_scan)
            axis.plot(torch.arange(len(error)) * _BIN + _BIN / 2, error, label=name)
        axis.set(xlabel="position in the text", ylabel="nats over the float state", title="H4, error against position")
        axis.legend()
        _save(figure, out / "error_by_position.png")
        figure, axis = plt.subplots(figsize=(7, 4))
        for setting, recipes in esr.items():
            layers = recipes.get(next(name for name, o in RECIPES.items() if o.loss == "block"), [{}])[0].get(
                "layers", []
            )
            for when, style in (("loss_first", "--"), ("loss_last", "-")):
                axis.plot([result[when] for result in layers], style, marker="o", label=f"{setting}, {when[5:]} epoch")
        axis.set(xlabel="block", ylabel="relative square error", title="ESR loss by block", yscale="log")
        if esr:
            axis.legend(fontsize=7)
        _save(figure, out / "esr_loss.png")

    @torch.no_grad()
    def _by_position(self, run: Run) -> Tensor:
        total = torch.zeros(0)
        with replaced(self.model, run):
            for ids in self.held_out.split(self.batch):
                nats = token_nats(self.model(ids, use_cache=False).logits[:, :-1], ids[:, 1:]).double().sum(dim=0)
                total = nats if len(total) == 0 else total + nats
        usable = len(total) // _BIN * _BIN
        return total[:usable].view(-1, _BIN).mean(dim=1) / len(self.held_out)


_BIN = 64
"""Positions averaged for a point of the plot."""


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    console.print(f"written to {path}", style="dim")


def accuracy(
    model: Annotated[str, typer.Option(help="Folder or hub name; by default the bundled model.")] = str(
        ROOT / "demo/tiny-mamba2"
    ),
    text: Annotated[str, typer.Option(help="Held-out text or data set.")] = str(ROOT / "demo/heldout.txt"),
    calibration_text: Annotated[
        str | None, typer.Option(help="Other text, for scales and ESR; by default the standard library's sources.")
    ] = None,
    windows: Annotated[int, typer.Option(min=2, help="Held-out windows, spread over the text.")] = 95,
    length: Annotated[int, typer.Option(min=64)] = 1024,
    samples: Annotated[int, typer.Option(min=2)] = 64,
    validation: Annotated[int, typer.Option(min=2)] = 32,
    bits: Annotated[str, typer.Option(help="Which of 8, 4, 3, 2.")] = "8,4,3,2",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every ESR recipe.")] = 3,
    only: Annotated[str, typer.Option(help="ESR settings and recipes that match this regular expression.")] = "",
    parts: Annotated[str, typer.Option(help="Which of table, esr, rates, plots.")] = ",".join(PARTS),
    batch: Annotated[int, typer.Option(min=1)] = 16,
    out: Annotated[Path, typer.Option(help="Folder for JSON and plots.")] = Path("build/bench/accuracy"),
) -> None:
    """Perplexity against bits, scales and rounding; ESR; plots."""
    wanted = parts.split(",")
    if set(wanted) - set(PARTS):
        raise typer.BadParameter(f"allowed: {', '.join(PARTS)}", param_hint="--parts")
    out.mkdir(parents=True, exist_ok=True)
    network = load_model(model)
    tokens = read_tokens(text, model, network)
    cut = cut_windows(tokens, length)
    held_out = cut[torch.linspace(0, len(cut) - 1, min(windows, len(cut))).long()]
    with _calibration_file(calibration_text) as source:
        other = read_tokens(source, model, network)
    train, validate = split_windows(other, length, (samples, validation), 0)
    bench = Bench(network, held_out, train, validate, batch)
    console.print(f"float: perplexity {bench.reference.perplexity:.5f}, {bench.reference.tokens:,} tokens")
    results: dict[str, Any] = {"model": model, "text": text, "float_perplexity": bench.reference.perplexity}
    results |= {"tokens": bench.reference.tokens, "machine": _machine(), "torch": torch.__version__}
    steps: dict[str, Callable[[], Any]] = {
        "table": lambda: bench.table(tuple(int(width) for width in bits.split(","))),
        "esr": lambda: bench.esr(seeds, only),
        "rates": bench.rates,
        "plots": lambda: bench.plots(out, results.get("esr") or {}),
    }
    for part in PARTS:
        if part in wanted:
            results[part] = steps[part]()
            results["rows"] = [dataclasses.asdict(row) for row in bench.rows]
            # After each part: a long run that is ended early has something to show.
            (out / "accuracy.json").write_text(json.dumps(results, indent=1) + "\n")
    _print(bench.rows)
    console.print(f"written to {out / 'accuracy.json'}", style="dim")


class _calibration_file:  # noqa: N801
    """A context that gives the path of the calibration text."""

    def __init__(self, given: str | None) -> None:
        self._given, self._folder = given, tempfile.TemporaryDirectory()

    def __enter__(self) -> str:
        if self._given is not None:
            return self._given
        import sys

        sys.path.insert(0, str(ROOT / "demo"))
        from train import stdlib_files

        path = Path(self._folder.name) / "standard library"
        path.write_bytes(b"".join(stdlib_files(heldout=False).values()))
        return str(path)

    def __exit__(self, *_: Any) -> None:
        self._folder.cleanup()


def _machine() -> str:
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _print(rows: list[Row]) -> None:
    table = rich.table.Table(title="perplexity over the float model, recurrent, requantized at every token")
    for column in (
        "scheme",
        "rounding",
        "bits",
        "weights",
        "outliers",
        "ESR",
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
