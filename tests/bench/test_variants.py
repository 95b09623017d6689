"""Variants of a whole model: shared weights, own graphs, bytes, and options by name."""

import copy

import pytest
import torch

from bench.shapes import shape_named
from bench.variants import EAGER, OURS, VARIANTS, Models, Runner, choose, random_ids, restore, state_bytes, with_options
from qmamba_compile import ConfigError, DSQState


def test_an_option_makes_one_more_variant():
    known = with_options(["rounding=stochastic", "seed=7", "skip_layers=lm_head,backbone.layers.0"])
    (name,) = set(known) - set(VARIANTS)
    assert "rounding=stochastic" in name
    assert known[name].options["rounding"] == "stochastic" and known[name].options["seed"] == 7
    assert known[name].options["skip_layers"] == ("lm_head", "backbone.layers.0")
    assert known[name].weights != VARIANTS[OURS].weights
    assert with_options([]) == VARIANTS


@pytest.mark.parametrize("text", ["rounding", "nonsense=1", "rounding=up", "state_bits=5"])
def test_an_option_that_is_not_allowed_is_refused(text):
    with pytest.raises(ConfigError) as refusal:
        with_options([text])
    assert text.partition("=")[0] in str(refusal.value)


@pytest.fixture(scope="module")
def models():
    return Models(shape_named("tiny"))


@torch.no_grad()
def test_caches_start_from_the_same_prompt_and_can_be_restored(models):
    ids = random_ids(models.shape, 3, 1, seed=5)
    for name in (EAGER, OURS):
        options = {**VARIANTS[name].options, "inner_backend": "eager"} if name == OURS else {}
        variant = VARIANTS[name]
        runner = Runner(type(variant)(name, variant.weights, variant.backend, variant.tolerance, options), models)
        cache = runner.cache(3)
        saved = copy.deepcopy(cache)
        first = runner.step(ids, cache)
        assert first.shape == (3, models.shape.vocab_size)
        assert not torch.equal(runner.step(ids, cache), first)
        restore(cache, saved)
        assert torch.equal(runner.step(ids, cache), first)
        assert isinstance(cache.layers[0].recurrent_states[0], DSQState) == (name == OURS)


@torch.no_grad()
def test_bytes_of_weights_and_state(models):
    shape = models.shape
    linear = sum(s.in_features * s.out_features * s.count for s in shape.linears)
    vectors = 4 * sum(p.numel() for p in models.float32.parameters() if p.dim() != 2)
    floats, ours = Runner(VARIANTS[EAGER], models), Runner(VARIANTS[OURS], models)
    states = shape.n_layers * 4 * (shape.d_inner * shape.dstate + 4 * shape.conv_dim)
    assert state_bytes(floats.cache(2)) == 2 * states
    assert state_bytes(ours.cache(2)) < states
    assert floats.weight_bytes == floats.held_bytes == 4 * linear + vectors
    # A scale a row; the table of head and embedding is held once.
    rows = sum(s.out_features * s.count for s in shape.linears)
    assert ours.weight_bytes == ours.held_bytes == linear + 4 * rows + vectors


@torch.no_grad()
def test_an_embedding_that_stays_float_beside_its_head_is_not_read(models):
    options = ["skip_layers=backbone.embeddings", "inner_backend=eager"]
    beside = Runner(list(with_options(options).values())[-1], Models(models.shape))
    beside.cache(1)
    assert beside.held_bytes - beside.weight_bytes == 4 * models.shape.vocab_size * models.shape.d_model


@torch.no_grad()
def test_a_head_left_alone_is_read_as_the_embedding_it_is_tied_to(models):
    skipping = Runner(list(with_options(["skip_layers=lm_head", "inner_backend=eager"]).values())[-1], models)
    skipping.cache(1)
    assert skipping.held_bytes == skipping.weight_bytes


def test_what_has_options_of_its_own_runs_whether_it_is_named_or_not():
    known, own = with_options(["state_bits=8"]), f"{OURS}[state_bits=8]"
    assert choose(EAGER, known) == [EAGER, own]
    assert choose(f"{own},{EAGER}", known) == [own, EAGER]
    assert choose("", known, unusual=[EAGER]) == [name for name in known if name != EAGER]
    assert choose(EAGER, with_options([])) == [EAGER]
