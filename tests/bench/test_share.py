"""Bytes of a model of any size, from models of one and two layers."""

import dataclasses

import pytest
import torch

from bench.shapes import shape_named
from bench.share import SCHEMES, held_bytes
from bench.variants import OURS, VARIANTS, Models, Runner, Variant, state_bytes


@torch.no_grad()
def test_bytes_are_those_of_the_whole_model():
    shape = dataclasses.replace(shape_named("tiny"), n_layers=4)
    models = Models(shape)
    runner = Runner(Variant("", "bfloat16", "qmamba", 0.0, {"inner_backend": "eager"}), models)
    halves = 2 * sum(parameter.numel() for parameter in models.bfloat16.parameters())
    states = 2 * 3 * shape.n_layers * (shape.d_inner * shape.dstate + 4 * shape.conv_dim)
    held = state_bytes(runner.cache(3))
    assert held_bytes(shape, 3, dict(VARIANTS[OURS].options)) == (runner.held_bytes, held, halves + states)


@pytest.mark.parametrize("name", [name for name in SCHEMES if "calibrated" in name])
@torch.no_grad()
def test_calibrated_scales_are_held_once(name):
    shape, batch = shape_named("tiny"), 5
    dynamic = held_bytes(shape, batch, {**SCHEMES[name], "state_scales": "dynamic"})
    weights, state, of_16_bits = held_bytes(shape, batch, SCHEMES[name])
    assert (weights, of_16_bits) == (dynamic[0], dynamic[2])
    assert dynamic[1] - state == (batch - 1) * 2 * shape.n_layers * shape.nheads * shape.dstate
