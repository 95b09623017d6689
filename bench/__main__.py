"""``python -m bench QUESTION ...``: runs ``bench/<question>.py``, loading nothing else."""

from __future__ import annotations

import runpy
import sys
from typing import Annotated

import typer

QUESTIONS = {
    "linear": ("linear", "int8 linears against floating point, by rows"),
    "ssm": ("ssm", "one SSM step: packed states against float loops"),
    "decode": ("decode", "one decode step of a whole model; --profile for where time goes"),
    "prefill": ("prefill", "a prompt through a whole model"),
    "compile": ("compile_time", "cold and warm compile time in fresh processes"),
    "memory": ("memory", "bytes of weights and state, peak of prefill"),
    "share": ("share", "weights and states as a share of 16 bits, of any size"),
    "cost": ("cost", "time against tokens generated, batch and length"),
    "calibration": ("calibration", "what statistics and ESR cost a block, extrapolated"),
    "accuracy": ("accuracy", "perplexity against bits, scales and rounding"),
    "flush": ("flush", "accuracy, size and time by flush_interval"),
    "roofline": ("roofline", "generated kernels against the roofs of GPUs"),
    "gpu": ("gpu", "kernels on the GPU of this machine"),
}


def dispatch(
    context: typer.Context,
    question: Annotated[str, typer.Argument(help="What to measure; QUESTION --help lists its options.")],
) -> None:
    if question not in QUESTIONS:
        raise typer.BadParameter(f"{question!r} is unknown; allowed: {', '.join(QUESTIONS)}", param_hint="QUESTION")
    module = f"bench.{QUESTIONS[question][0]}"
    sys.argv = [f"python -m bench {question}", *context.args]
    runpy.run_module(module, run_name="__main__")


def main() -> None:
    # What follows the question belongs to its script, --help included.
    settings = {"allow_interspersed_args": False, "allow_extra_args": True, "ignore_unknown_options": True}
    width = max(map(len, QUESTIONS)) + 2
    listing = "\n".join(f"  {name:<{width}}{text}" for name, (_, text) in QUESTIONS.items())
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(context_settings=settings, help=f"Benchmarks.\n\n\b\n{listing}", no_args_is_help=True)(dispatch)
    app(prog_name="python -m bench")


if __name__ == "__main__":
    main()
