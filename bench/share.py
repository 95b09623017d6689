"""What share of 16-bit weights and states does a model hold, at a size that this machine need not hold?

Layers are alike, and so are sequences: models of one and two layers, with one and two sequences, give all of them.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch

from qmamba_compile import Artifact, write_artifact
from qmamba_compile.artifact import Header, fingerprint

from . import cli
from .record import Row, print_rows
from .shapes import Shape, shape_named
from .variants import OURS, VARIANTS, Models, Runner, Variant, state_bytes, states, with_options

SCHEMES: dict[str, dict[str, Any]] = {
    "default": {},
    "default, calibrated": {"state_scales": "calibrated"},
    "flush_interval=1": {"flush_interval": 1},
    "flush_interval=1, calibrated": {"flush_interval": 1, "state_scales": "calibrated"},
}


def main(
    shape: cli.ShapeName = "2.7b",
    batch: cli.Batch = 128,
    option: cli.Options = [],  # noqa: B006  (typer reads it, nobody writes to it)
    json: cli.JsonFile = None,
) -> None:
    """Bytes of a bfloat16 model's weights, SSM and convolution states as the backend holds them, and all in 16 bits."""
    sizes = shape_named(shape)
    given = with_options(option)[f"{OURS}[{','.join(option)}]"].options if option else VARIANTS[OURS].options
    arguments = {"shape": shape, "batch": batch, "option": option}
    with cli.recording("share", arguments, threads=1, json=json, plot=None, roof=False) as found, torch.no_grad():
        rows = []
        for name, options in SCHEMES.items():
            weights, held, of_16_bits = held_bytes(sizes, batch, {**given, **options})
            values = {
                "weights MB": weights / 1e6,
                "state MB": held / 1e6,
                "% of 16 bits": 100 * (weights + held) / of_16_bits,
            }
            rows.append(Row({"shape": shape, "batch": batch}, name, values=values))
        found.add(rows)
        print_rows(found.rows)


def held_bytes(shape: Shape, batch: int, options: dict[str, Any]) -> tuple[int, int, int]:
    """Bytes of weights, of states, and of both in 16 bits."""
    (weights, halves, states_1), (weights_2, halves_2, _) = (_measured(shape, layers, options) for layers in (1, 2))
    weights += (shape.n_layers - 1) * (weights_2 - weights)
    halves += (shape.n_layers - 1) * (halves_2 - halves)
    # Of one layer with one and two sequences; calibrated scales are there once.
    held, of_16_bits = (shape.n_layers * (one + (batch - 1) * (two - one)) for one, two in states_1)
    return weights, held, halves + of_16_bits


def _measured(shape: Shape, layers: int, options: dict[str, Any]) -> tuple[int, int, list[tuple[int, int]]]:
    """Weights as held and in 16 bits, and the same of the states, each for one and for two sequences."""
    torch._dynamo.reset()
    models = Models(dataclasses.replace(shape, n_layers=layers))
    halves = sum(parameter.nbytes for parameter in models.bfloat16.parameters())
    options = {**options, "inner_backend": "eager"}
    with tempfile.TemporaryDirectory() as folder:
        if options.get("state_scales") == "calibrated" and "calibration" not in options:
            options["calibration"] = str(Path(folder) / "scales.safetensors")
            write_artifact(options["calibration"], _scales(models.bfloat16, shape))
        runner = Runner(Variant("", "bfloat16", "qmamba", 0.0, options), models)
        caches = [runner.cache(batch) for batch in (1, 2)]
    numbers = [sum(state.numel() for state in states(cache)) for cache in caches]
    one, two = (state_bytes(cache) for cache in caches)
    return runner.held_bytes, halves, [(one, two), (2 * numbers[0], 2 * numbers[1])]


def _scales(model: Any, shape: Shape) -> Artifact:
    """Calibrated scales of any value: only their size matters here."""
    shapes = fingerprint({name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)})
    header = Header(type(model).__name__, shapes, {}, "none", "none", {}, {}, {})
    layers = range(model.config.num_hidden_layers)
    scale = torch.ones(shape.nheads, shape.dstate)
    return Artifact({f"backbone.layers.{layer}.mixer.state_scale": scale.clone() for layer in layers}, header)


if __name__ == "__main__":
    cli.run("share", main)
