"""How long does a prompt take, and how close to the arithmetic roof is it?"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from . import cli
from .measure import Gate, Work
from .record import Record, console
from .shapes import shape_named
from .variants import (
    AGAINST,
    EAGER,
    TORCHAO,
    Models,
    Runner,
    choose,
    linear_ops,
    random_ids,
    state_bytes,
    with_options,
)

# Each of the first takes Inductor minutes to compile; the state's width changes nothing before its last step.
_UNUSUAL = (
    "inductor-float32-freezing",
    "inductor-bfloat16",
    TORCHAO,
    "ours-w8a8",
    "ours-w8a8h8",
    "ours-w8a8h4-flush1-stochastic",
)


def main(
    shape: cli.ShapeName = "130m",
    length: Annotated[str, typer.Option(help="Prompt lengths, separated by commas.")] = "2048",
    batch: cli.Batch = 1,
    variants: cli.Variants = "",
    option: cli.Options = [],  # noqa: B006  (typer reads it, nobody writes to it)
    repeats: cli.Repeats = 7,
    threads: cli.Threads = 0,
    json: cli.JsonFile = None,
    plot: cli.PlotFile = None,
) -> None:
    """Seconds of a whole prompt, with the logits of its last token and the state it leaves."""
    dimensions = shape_named(shape)
    known = with_options(option)
    lengths = cli.parse_numbers(length, "--length")
    chosen = choose(variants, known, _UNUSUAL)
    arguments = {"shape": shape, "batch": batch, "length": lengths, "variants": chosen, "repeats": repeats}
    torch._dynamo.config.recompile_limit = 64
    with torch.no_grad(), cli.recording("prefill", arguments, threads=threads, json=json, plot=plot) as found:
        models = Models(dimensions)
        runners = {name: Runner(known[name], models) for name in dict.fromkeys([EAGER, *chosen])}
        for size in lengths:
            _measure(found, models, runners, batch, size, repeats)
            torch._dynamo.reset()


def _measure(found: Record, models: Models, runners: dict[str, Runner], batch: int, length: int, repeats: int) -> None:
    ids = random_ids(models.shape, batch, length, seed=3)
    calls: dict[str, Callable[[], Any]] = {}
    gates: dict[str, Gate] = {}
    work: dict[str, Work] = {}
    reference: Tensor | None = None
    for name, runner in runners.items():
        with console.status(f"compiling and checking {name}, {length} tokens"), runner.compiling():
            logits, cache = runner.prefill(ids)
        logits = logits.float()
        reference = logits if reference is None else reference
        gates[name] = Gate.of(logits, reference, runner.variant.tolerance)
        # The head sees the last token only.
        head = 2 * models.shape.d_model * models.shape.vocab_size
        ops = linear_ops(runner.model, batch * length) - head * batch * (length - 1)
        by_dtype = {"float32_ops": _scan_ops(models, batch * length)}
        arithmetic = f"{runner.variant.arithmetic}_ops"
        by_dtype[arithmetic] = by_dtype.get(arithmetic, 0) + ops
        work[name] = Work(runner.weight_bytes, state_bytes(cache), **by_dtype)
        calls[name] = functools.partial(runner.prefill, ids)
        del cache
        gc.collect()
    group = {"shape": models.shape.name, "batch": batch, "length": length}
    with torch.compiler.set_stance("fail_on_recompile"):
        cli.compare(found, group, calls, gates, work, repeats=repeats, against=AGAINST)


def _scan_ops(models: Models, tokens: int) -> int:
    """The recurrence itself: three operations to update a state element (decay, add, B x) and two to read it."""
    shape = models.shape
    return 5 * tokens * shape.n_layers * shape.d_inner * shape.dstate


if __name__ == "__main__":
    cli.run("prefill", main)
