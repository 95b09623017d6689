"""How much memory do weights and state take, and how much a prefill?"""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from . import cli
from .record import Row, console, print_rows
from .shapes import shape_named
from .variants import EAGER, INDUCTOR, OURS, choose, with_options
from .worker import ask


def main(
    shape: cli.ShapeName = "130m",
    batch: cli.Batch = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 2048,
    variants: cli.Variants = f"{EAGER},{INDUCTOR},{OURS}",
    option: cli.Options = [],  # noqa: B006  (typer reads it, nobody writes to it)
    threads: cli.Threads = 0,
    json: cli.JsonFile = None,
    plot: cli.PlotFile = None,
) -> None:
    """Bytes of weights and state as held, and peak resident memory of a compiled prefill, in fresh processes."""
    shape_named(shape)
    known = with_options(option)
    chosen = choose(variants, known)
    arguments = {"shape": shape, "batch": batch, "length": length, "variants": chosen}
    group = {"shape": shape, "batch": batch, "length": length}
    with cli.recording("memory", arguments, threads=threads, json=json, plot=plot, roof=False) as found:
        task = {"shape": shape, "batch": batch, "length": length, "threads": torch.get_num_threads(), "option": option}
        for name in chosen:
            with console.status(f"compiling and running {name}"):
                answer = ask("memory", {**task, "variant": name})
            values = {
                "prefill MB": (answer["peak"] - answer["resident"]) / 1e6,
                "peak resident MB": answer["peak"] / 1e6,
                "resident before MB": answer["resident"] / 1e6,
                "weights read MB": answer["weights"] / 1e6,
                "weights held MB": answer["weights_held"] / 1e6,
                "state MB": answer["state"] / 1e6,
            }
            found.add([Row(group, name, values=values)])
        print_rows(found.rows)


if __name__ == "__main__":
    cli.run("memory", main)
