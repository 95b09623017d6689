"""Parts of a model, one after the other, give what the whole gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from calibrate.blocks import Blocks
from calibrate.errors import CalibrationError
from tests.e2e.test_hybrids import FAMILIES, build


@torch.no_grad()
def check(model, ids):
    blocks = Blocks(model)
    expected = model(ids, use_cache=False).logits
    hidden = blocks.embed(ids)
    for index in range(len(blocks.names)):
        assert hidden.shape[:2] == ids.shape
        torch.testing.assert_close(blocks.logits(ids, hidden, index), expected, rtol=1e-4, atol=1e-5)
        hidden = blocks.run(ids, hidden, index, index + 1)
    torch.testing.assert_close(blocks.logits(ids, hidden, len(blocks.names)), expected, rtol=1e-4, atol=1e-5)
    # Another hidden state gives other logits: the stand-in is what counts.
    assert not torch.allclose(blocks.logits(ids, hidden + 1, len(blocks.names) - 1), expected)
    assert torch.equal(model(ids, use_cache=False).logits, expected)
    return blocks


def test_mamba2(lively, tokens):
    blocks = check(lively(num_hidden_layers=3), tokens(2, 20))
    assert blocks.mixer == {index: f"backbone.layers.{index}.mixer" for index in range(3)}


@pytest.mark.parametrize("family", FAMILIES)
def test_hybrids(family):
    ids = torch.randint(3, 100, (2, 20), generator=torch.Generator().manual_seed(0))
    blocks = check(build(FAMILIES[family]), ids)
    assert len(blocks.mixer) == FAMILIES[family].scans


def test_a_gradient_reaches_one_block(lively, tokens):
    model, ids = lively(), tokens(2, 20)
    blocks = Blocks(model)
    with torch.no_grad():
        hidden = blocks.run(ids, None, 0, 1)
    model.requires_grad_(True)
    blocks.run(ids, hidden, 1, 2).square().sum().backward()
    touched = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert touched and all(name.startswith("backbone.layers.1.") for name in touched)


def test_a_model_without_mamba2():
    with pytest.raises(CalibrationError, match="Linear has no Mamba2 layer"):
        Blocks(nn.Linear(2, 2))
