"""The named shapes are those of the published Mamba2 checkpoints."""

import pytest
import torch

from bench.shapes import SHAPES, shape_named
from qmamba_compile import ConfigError

# d_model, n_layers, and parameters in millions, as the checkpoints' names round them.
PUBLISHED = {
    "130m": (768, 24, 129),
    "370m": (1024, 48, 368),
    "780m": (1536, 48, 780),
    "1.3b": (2048, 48, 1344),
    "2.7b": (2560, 64, 2703),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_dimensions(name):
    d_model, n_layers, millions = PUBLISHED[name]
    shape = shape_named(name)
    assert (shape.d_model, shape.n_layers) == (d_model, n_layers)
    assert (shape.headdim, shape.dstate, shape.ngroups) == (64, 128, 1)
    from transformers import Mamba2ForCausalLM

    with torch.device("meta"):
        model = Mamba2ForCausalLM(shape.config())
    model.tie_weights()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_linears_are_those_of_the_model():
    shape = shape_named("tiny")
    model = shape.build()
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            key = (path.rsplit(".", 1)[-1], module.in_features, module.out_features)
            found[key] = found.get(key, 0) + 1
    assert found == {(s.name, s.in_features, s.out_features): s.count for s in shape.linears}
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_the_same_seed_builds_the_same_model():
    first, second = shape_named("tiny").build(), shape_named("tiny").build()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_an_unknown_shape_lists_the_known_ones():
    with pytest.raises(ConfigError) as refusal:
        shape_named("3b")
    assert "'3b'" in str(refusal.value) and all(name in str(refusal.value) for name in SHAPES)
