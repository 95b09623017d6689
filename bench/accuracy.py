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
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import cli
from bench.accuracy_esr import RATES, esr, learning_rates
from bench.accuracy_plots import plots
from bench.accuracy_table import Bench, Sizes, print_table
from bench.record import console, machine_record
from calibrate.data import read_tokens
from calibrate.models import load_model
from qmamba_compile.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("table", "esr", "rates", "plots")


def main(
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
        raise ConfigError(f"--parts {parts!r} is not allowed; use some of {', '.join(PARTS)}, separated by commas")
    widths, seed_numbers = cli.parse_bits(bits), cli.parse_numbers(seeds, "--seeds", least=0)
    rate_numbers = _parse_rates(rates)
    try:
        re.compile(only)
    except re.error as problem:
        raise ConfigError(f"--only {only!r} is no regular expression: {problem}") from None
    for folder in merge or ():
        if not (folder / "accuracy.json").is_file():
            raise ConfigError(f"--merge {folder}: no accuracy.json in there; give what was --out of another run")
    cli.require_folder(out, f"--out {out}")
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
        bench.table(tuple(widths), lambda: measured("table", [dataclasses.asdict(row) for row in bench.rows]))
    if "esr" in wanted:
        esr(bench, tuple(seed_numbers), only, lambda results: measured("esr", results))
    if "rates" in wanted:
        learning_rates(bench, rate_numbers, lambda results: measured("rates", results))
    if "plots" in wanted:
        plots(bench, out, json.loads(file.read_text()) if file.exists() else {})
    print_table(bench.rows)
    console.print(f"written to {file}", style="dim")


def _parse_rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(rate) for rate in text.split(","))
    except ValueError:
        rates = ()
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise ConfigError(f"--rates {text!r} is not allowed; use numbers above 0, separated by commas")
    return rates


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


if __name__ == "__main__":
    cli.run("accuracy", main)
