"""Command lines: ``qmamba calibrate`` (``python -m calibrate`` for torchrun), ``qmamba eval``, ``qmamba lm-eval``."""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import rich.console
import rich.table
import typer

from qmamba_compile.artifact import Artifact
from qmamba_compile.command_line import print_error
from qmamba_compile.config import LARGEST_SEED, QMambaConfig
from qmamba_compile.errors import QMambaError

from . import distributed
from .data import cut_windows, read_tokens, spread
from .errors import CalibrationError
from .esr import LEARNABLE, EsrOptions
from .evaluate import PROMPT, Score, score
from .models import allow, load_model, quantize
from .pipeline import Calibration, Options

logger = logging.getLogger(__name__)

# Without markup: a path may hold brackets.
_out = rich.console.Console(markup=False)

ModelArgument = Annotated[str, typer.Argument(help="Folder or hub name of a transformers model.")]
FlushInterval = Annotated[int, typer.Option(min=1, help="Steps from one requantization of the state to the next.")]
TextField = Annotated[str, typer.Option(help="Column of a JSONL or Parquet file or a data set that holds the text.")]

# The backslash is for rich, to which [@split] is markup.
_SOURCE = (
    "Text, JSONL or Parquet file, or a data set, by its name or a folder of JSONL or Parquet files: "
    "name[:config]\\[@split], of which train is the default."
)


def calibrate(
    model: ModelArgument,
    data: Annotated[str, typer.Option(help=_SOURCE)],
    out: Annotated[Path, typer.Option(help="The artifact to write.")],
    text_field: TextField = "text",
    weights: Annotated[str, typer.Option(help="Linears to calibrate for: int8 or none.")] = "int8",
    state_bits: Annotated[int, typer.Option(help="Bits of the state: 8, 4, 3 or 2.")] = 4,
    rounding: Annotated[str, typer.Option(help="nearest or stochastic.")] = QMambaConfig.rounding,
    flush_interval: FlushInterval = QMambaConfig.flush_interval,
    samples: Annotated[int, typer.Option(min=1, help="Windows for statistics and ESR.")] = 64,
    validation: Annotated[int, typer.Option(min=2, help="Windows that every choice is made on.")] = 32,
    length: Annotated[int, typer.Option(min=PROMPT + 1, help="Tokens of a window.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Windows that run together.")] = 8,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED)] = 0,
    fit: Annotated[bool, typer.Option(help="Try scales fitted to what the loss feels (a backward pass).")] = True,
    smooth: Annotated[bool, typer.Option(help="Try SmoothQuant.")] = True,
    static_activations: Annotated[bool, typer.Option(help="Write static activation scales.")] = False,
    esr: Annotated[bool, typer.Option(help="Tune what makes B, C and dt.")] = True,
    esr_trajectory: Annotated[str, typer.Option(help="exact, or single-step as in the paper.")] = "exact",
    esr_learn: Annotated[str, typer.Option(help=f"What is tuned, by commas, of {', '.join(LEARNABLE)}.")] = ",".join(
        EsrOptions.learn
    ),
    esr_loss: Annotated[str, typer.Option(help="Error of the output of the: block, mixer or model.")] = "block",
    esr_lr: Annotated[float, typer.Option(help="Learning rate.")] = EsrOptions.learning_rate,
    esr_schedule: Annotated[str, typer.Option(help="cosine or constant.")] = EsrOptions.schedule,
    esr_epochs: Annotated[int, typer.Option(min=1)] = EsrOptions.epochs,
    esr_batch: Annotated[
        int, typer.Option(min=1, help="Windows of one optimizer step, shared by the processes of torchrun.")
    ] = EsrOptions.batch,
    memory: Annotated[
        float,
        typer.Option(min=0.0, max=2**20, help="GB of activations to hold in memory; beyond it they are in a file."),
    ] = 2.0,
    resume: Annotated[bool, typer.Option(help="Go on with what an interrupted run has finished.")] = False,
    quiet: Annotated[bool, typer.Option(help="No progress bars.")] = False,
) -> None:
    """Make a calibration artifact: state scales, SmoothQuant factors, weights tuned by ESR.

    Every choice is made by recurrent perplexity on validation samples, so nothing that is written makes it worse there.
    Under torchrun, processes share the samples.
    """
    allow("--weights", weights, ("int8", "none"))
    allow("--state-bits", state_bits, (8, 4, 3, 2))
    allow("--rounding", rounding, ("nearest", "stochastic"))
    allow("--esr-trajectory", esr_trajectory, ("exact", "single-step"))
    allow("--esr-loss", esr_loss, ("block", "mixer", "model"))
    allow("--esr-schedule", esr_schedule, ("cosine", "constant"))
    learn = tuple(esr_learn.split(","))
    for name in learn:
        allow("--esr-learn", name, LEARNABLE)
    QMambaConfig(flush_interval=flush_interval)  # refuses what the backend does not run
    options = Options(
        weights=None if weights == "none" else weights,
        state_bits=state_bits,
        rounding=rounding,
        flush_interval=flush_interval,
        samples=samples,
        validation=validation,
        length=length,
        batch=batch,
        seed=seed,
        fit=fit,
        smooth=smooth,
        static_activations=static_activations,
        memory=int(memory * 2**30),
        esr=EsrOptions(esr_trajectory, learn, esr_loss, esr_lr, esr_schedule, esr_epochs, esr_batch) if esr else None,
    )
    with distributed.joined() as device:
        network = load_model(model).to(device)
        limit = 4 * (samples + validation) * length
        tokens = read_tokens(data, model, network, field=text_field, limit=limit)
        calibration = Calibration(network, tokens, options, out.expanduser(), resume=resume, quiet=quiet)
        try:
            artifact = calibration.run()
        except KeyboardInterrupt:
            print_error(f"interrupted; {distributed.RESUME}")
            raise
        if distributed.is_main():
            _summary(artifact, calibration)


def evaluate(
    model: Annotated[str, typer.Option(help="Folder or hub name of a transformers model.")],
    text: Annotated[str, typer.Option(help=_SOURCE)],
    text_field: TextField = "text",
    calibration: Annotated[str | None, typer.Option(help="Calibration artifact.")] = None,
    state_bits: Annotated[str, typer.Option(help="8, 4, 3, 2 or none.")] = "4",
    weights: Annotated[str, typer.Option(help="int8 or none.")] = "int8",
    state_scales: Annotated[
        str | None, typer.Option(help="dynamic or calibrated; by default calibrated when --calibration is given.")
    ] = None,
    rounding: Annotated[str, typer.Option(help="nearest or stochastic.")] = "nearest",
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of stochastic rounding.")] = 0,
    flush_interval: FlushInterval = QMambaConfig.flush_interval,
    length: Annotated[int, typer.Option(min=PROMPT + 1, help="Tokens of a window.")] = 1024,
    windows: Annotated[int | None, typer.Option(min=1, help="Only so many, spread evenly over the text.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows that run together.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Perplexity of the recurrence on a text, with the state requantized as decode does it.

    The text is cut into windows, each from an empty state. Bits per byte are of its UTF-8.
    """
    allow("--state-bits", state_bits, ("8", "4", "3", "2", "none"))
    allow("--weights", weights, ("int8", "none"))
    allow("--rounding", rounding, ("nearest", "stochastic"))
    allow("--state-scales", state_scales, ("dynamic", "calibrated", None))
    with distributed.joined() as device:
        network = load_model(model).to(device)
        network, run = quantize(
            network,
            state_bits=None if state_bits == "none" else int(state_bits),
            weights=None if weights == "none" else weights,
            state_scales=state_scales,
            rounding=rounding,
            calibration=calibration,
            seed=seed,
            flush_interval=flush_interval,
        )
        tokens = read_tokens(text, model, network, field=text_field)
        result = score(network, spread(cut_windows(tokens, length), windows), run, batch=batch)
    if not distributed.is_main():
        return
    if not math.isfinite(result.nats.mean().item()):
        raise CalibrationError(
            f"{model}: the perplexity on {text} is not finite; try --state-bits 8 or none, to see where it comes from"
        )
    report = _report(result, tokens.nbytes / len(tokens.ids))
    report |= {"model": model, "text": text, "state_bits": state_bits, "weights": weights, "rounding": rounding}
    report |= {
        "flush_interval": flush_interval,
        "state_scales": state_scales or ("calibrated" if calibration else "dynamic"),
        "calibration": calibration,
    }
    if as_json:
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        table = rich.table.Table(show_header=False, box=None)
        for key, value in report.items():
            table.add_row(key, f"{value:.5f}" if isinstance(value, float) else str(value))
        _out.print(table)


def lm_eval(context: typer.Context) -> None:
    """lm-eval with the model `qmamba` registered: all arguments go to lm_eval, such as --tasks and --model_args."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as problem:
        raise CalibrationError(
            f"lm-eval is not installed ({problem}); pip install 'qmamba-compile[calibrate]'"
        ) from problem
    from . import lm_eval_model  # noqa: F401  (registers the model)

    arguments = list(context.args)
    if "--model" not in arguments:
        arguments += ["--model", "qmamba"]
    sys.argv = ["lm_eval", *arguments]
    try:
        cli_evaluate()
    except QMambaError:
        raise
    except ValueError as problem:  # lm-eval's word for an unknown task and the like
        raise CalibrationError(f"lm-eval: {problem} (QMAMBA_TRACEBACK=1 shows where)") from problem


def _command(function: Any, **settings: Any) -> typer.Typer:
    """A Typer application of one command; `qmamba` finds it as an entry point."""
    application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    application.command(**settings)(function)
    return application


calibrate_app = _command(calibrate)
evaluate_app = _command(evaluate)
lm_eval_app = _command(
    lm_eval, add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)


# --- output --------------------------------------------------------------------------------------------------------


def _report(result: Score, bytes_per_token: float) -> dict[str, Any]:
    nats = result.nats.mean().item()
    # A tokenizer's tokens are as long as they are on average over the whole text.
    return {
        "perplexity": result.perplexity,
        "bits_per_byte": nats / math.log(2) / bytes_per_token,
        "tokens": result.tokens,
        "windows": len(result.nats),
    }


def _summary(artifact: Artifact, calibration: Calibration) -> None:
    table = rich.table.Table(title="tried on the validation samples", title_justify="left", box=None)
    for column in ("stage", "tried", "perplexity", ""):
        table.add_column(column, justify="right" if column == "perplexity" else "left")
    for choice in calibration.choices:
        table.add_row(choice.stage, choice.name, f"{choice.perplexity:.4f}", "taken" if choice.taken else "")
    _out.print(table)
    if calibration.results:
        table = rich.table.Table(title="ESR", title_justify="left", box=None)
        for column in ("layer", "loss, first epoch", "last epoch", "perplexity before", "after", ""):
            table.add_column(column, justify="left" if column in ("layer", "") else "right")
        for result in calibration.results:
            cells = [
                "-" if value is None else f"{value:.5f}"
                for value in (
                    result.loss_first,
                    result.loss_last,
                    math.exp(result.nats_before),
                    None if result.nats_after is None else math.exp(result.nats_after),
                )
            ]
            table.add_row(result.layer, *cells, "kept" if result.kept else result.note or "old weights stay")
        _out.print(table)
    header = artifact.header
    table = rich.table.Table(title="recurrent perplexity on the validation samples", title_justify="left", box=None)
    table.add_row("float", f"{header.metrics_before['perplexity_float']:.4f}")
    table.add_row("quantized, dynamic scales", f"{header.metrics_before['perplexity_dynamic_scales']:.4f}")
    table.add_row("quantized, calibrated", f"{header.metrics_after['perplexity']:.4f}")
    _out.print(table)
    _out.print(f"{artifact.source}: {sum(t.nbytes for t in artifact.tensors.values()):,} bytes of tensors")
