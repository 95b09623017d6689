"""What does calibrating a large model cost? One block of a shape is measured, all blocks follow from it."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from calibrate.esr import FRACTIONS

from . import cli
from .record import Row, console, print_rows
from .shapes import shape_named
from .worker import ask


def main(
    shape: cli.ShapeName = "130m",
    length: Annotated[int, typer.Option(min=64, help="Tokens of a window.")] = 2048,
    samples: Annotated[int, typer.Option(min=1, help="Windows for ESR, to extrapolate to.")] = 128,
    validation: Annotated[int, typer.Option(min=2, help="Windows for its decisions.")] = 32,
    epochs: Annotated[int, typer.Option(min=1)] = 3,
    threads: cli.Threads = 0,
    json: cli.JsonFile = None,
) -> None:
    """Seconds a block of statistics and ESR, with random weights; extrapolated to the whole model; peak memory.

    A block is trained once on one window (an optimizer step a window), and validated once by the blocks behind it.
    """
    sizes = shape_named(shape)
    arguments = {"shape": shape, "length": length, "samples": samples, "validation": validation, "epochs": epochs}
    with cli.recording("calibration", arguments, threads=threads, json=json, plot=None, roof=False) as found:
        with console.status("calibrating one block"):
            one = ask("calibration", {"shape": shape, "length": length, "threads": torch.get_num_threads()})
        # A decision runs the validation windows through the blocks that are left, and the head: half of all on average.
        validate = len(FRACTIONS) * validation * (sizes.n_layers / 2 * one["quantized_forward"] + one["head"])
        advance = samples * (one["float_forward"] + one["quantized_forward"]) + validation * one["quantized_forward"]
        block = epochs * samples * one["step"] + validate + advance
        values = {
            "statistics, s a window, 2 blocks and head": one["capture"],
            "ESR step, s a window": one["step"],
            "float forward, s": one["float_forward"],
            "quantized forward, s": one["quantized_forward"],
            "head, s a window": one["head"],
            "ESR, min a block": block / 60,
            "ESR, h for all blocks": block * sizes.n_layers / 3600,
            "peak resident MB": one["peak"] / 1e6,
            "of it weights MB": one["weights"] / 1e6,
        }
        found.add([Row(arguments, "block-wise ESR", values=values)])
        print_rows(found.rows)


if __name__ == "__main__":
    cli.run("calibration", main)
