"""ESR: gradients, decisions, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from calibrate.capture import capture
from calibrate.errors import CalibrationError
from calibrate.esr import PAPER, TOGETHER, EsrOptions, Reconstruction
from calibrate.evaluate import score
from calibrate.learned_scale import LearnedScale
from calibrate.quantized_model import W8A8Linear, bc_channels, bcdt_rows, quantized_copy
from calibrate.recurrence import Recurrence, Scan, mixers, replaced
from calibrate.state_scales import power_scale
from calibrate.work import Work
from qmamba_compile import quant

LAYERS = ("backbone.layers.0.mixer", "backbone.layers.1.mixer")


@pytest.fixture(scope="module")
def scales(lively, windows):
    statistics = capture(lively(), [windows[:4]])
    return {layer: power_scale(statistics, layer, 0.5) for layer in LAYERS}


@pytest.fixture
def reconstruct(lively, windows, scales, tmp_path):
    """Run ESR on a tiny model with a 2-bit state, which leaves something to gain."""

    def run(work=None, weights=None, bits=2, memory_limit=2**30, model=None, scales=scales, **changes):
        model = model or lively()
        quantized = quantized_copy(model, weights=weights)
        options = dataclasses.replace(EsrOptions(batch=4, epochs=2, learning_rate=3e-3, margin=0.0), **changes)
        reconstruction = Reconstruction(
            model,
            quantized,
            Recurrence(bits, state_scale=scales),
            options,
            windows[:8],
            windows[8:],
            smooth=None,
            seed=0,
            work=work or Work(tmp_path / "artifact", {}, resume=False),
            memory_limit=memory_limit,
        )
        reconstruction.run()
        return reconstruction, quantized

    return run


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": "mixer"},
        {"loss": "model"},
        {"trajectory": "single-step", "schedule": "constant"},
        {"weights": "int8"},
        {"learn": ("in_proj", "conv1d")},
        {"learn": ("conv1d",), "weights": "int8"},
    ],
    ids=str,
)
def test_training_lowers_the_loss(reconstruct, changes):
    reconstruction, _ = reconstruct(epochs=4, **changes)
    expected = [TOGETHER] if changes.get("loss") == "model" else list(LAYERS)
    assert [result.layer for result in reconstruction.results] == expected
    for result in reconstruction.results:
        assert result.loss_last < result.loss_first


@pytest.mark.parametrize("loss", ["block", "model"])
def test_what_is_kept_is_in_the_model_and_never_worse(reconstruct, windows, bundled, loss):
    """On a trained model: a random one says nothing of the text, and nothing makes it better."""
    statistics = capture(bundled, [windows[:4]])
    scales = {layer: power_scale(statistics, layer, 0.5) for layer in mixers(bundled)}
    reconstruction, quantized = reconstruct(model=bundled, scales=scales, loss=loss)
    kept = [result for result in reconstruction.results if result.kept]
    assert kept, reconstruction.results
    for before, after in itertools.pairwise(reconstruction.results):
        assert after.nats_before == (before.nats_after if before.kept else before.nats_before)
    for result in kept:
        assert result.nats_after < result.nats_before
    final = score(quantized, windows[8:], reconstruction.recurrence, batch=4)
    best = reconstruction.results[-1]
    assert final.nats.mean().item() == pytest.approx(best.nats_after if best.kept else best.nats_before, rel=1e-5)
    for layer in mixers(bundled):
        mixer, was = quantized.get_submodule(layer), bundled.get_submodule(layer)
        rows = bcdt_rows(mixer)
        # x and z are frozen, and so is what did not win.
        assert torch.equal(mixer.in_proj.weight[:-rows], was.in_proj.weight[:-rows])
        changed = not torch.equal(mixer.in_proj.weight[-rows:], was.in_proj.weight[-rows:])
        assert changed == (f"{layer}.in_proj.weight_bcdt" in reconstruction.tuned)
    names = list(mixers(bundled)) if kept[0].layer == TOGETHER else [result.layer for result in kept]
    assert set(reconstruction.tuned) == {f"{name}.in_proj.weight_bcdt" for name in names}


def test_weights_that_do_not_win_do_not_stay(reconstruct, lively):
    reconstruction, quantized = reconstruct(margin=1e9)
    assert not reconstruction.tuned and not any(result.kept for result in reconstruction.results)
    for name, parameter in lively().named_parameters():
        assert torch.equal(quantized.get_parameter(name), parameter)


def test_a_loss_that_is_not_finite(reconstruct, lively):
    reconstruction, quantized = reconstruct(learning_rate=1e30)
    for result in reconstruction.results:
        assert not result.kept and result.loss_last is None and "lower the learning rate" in result.note
    for name, parameter in lively().named_parameters():
        assert torch.equal(quantized.get_parameter(name), parameter)


def test_int8_linears_get_the_tuned_rows(reconstruct):
    reconstruction, quantized = reconstruct(weights="int8", margin=-1e9)
    original = quantized_copy(reconstruction.float_blocks.model)
    for layer in LAYERS:
        mixer, was = quantized.get_submodule(layer), original.get_submodule(layer)
        rows = bcdt_rows(mixer)
        assert isinstance(mixer.in_proj, W8A8Linear) and isinstance(mixer.out_proj, W8A8Linear)
        assert torch.equal(mixer.in_proj.qdata[:-rows], was.in_proj.qdata[:-rows])
        codes, scale = quant.quantize_rows(reconstruction.tuned[f"{layer}.in_proj.weight_bcdt"])
        assert torch.equal(mixer.in_proj.qdata[-rows:], codes) and torch.equal(mixer.in_proj.scale[-rows:], scale)


def test_activations_in_a_file_change_nothing(reconstruct, tmp_path):
    in_memory, _ = reconstruct(epochs=1)
    in_file, _ = reconstruct(Work(tmp_path / "other", {}, resume=False), epochs=1, memory_limit=0)
    assert in_file.results == in_memory.results
    assert not list((tmp_path / "other.work").glob("activations*"))


def test_an_interrupted_run_goes_on_where_it_was(reconstruct, tmp_path, monkeypatch):
    whole, _ = reconstruct(Work(tmp_path / "whole", {}, resume=False))
    tune, calls = Reconstruction._tune, []

    def killed(self, index, *args):
        calls.append(index)
        if index == 1:
            raise KeyboardInterrupt
        return tune(self, index, *args)

    monkeypatch.setattr(Reconstruction, "_tune", killed)
    with pytest.raises(KeyboardInterrupt):
        reconstruct(Work(tmp_path / "killed", {}, resume=False))

    def counted(self, index, *args):
        calls.append(index)
        return tune(self, index, *args)

    monkeypatch.setattr(Reconstruction, "_tune", counted)
    resumed, _ = reconstruct(Work(tmp_path / "killed", {}, resume=True))
    assert calls == [0, 1, 1]
    assert resumed.results == whole.results
    assert all(torch.equal(resumed.tuned[key], whole.tuned[key]) for key in whole.tuned)
    assert set(resumed.tuned) == set(whole.tuned)


def random_scan(seed=0, seqlen=24):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    A = -torch.rand(2, generator=generator)
    x, dt, B, C = randn(2, seqlen, 2, 8), randn(2, seqlen, 2), randn(2, seqlen, 1, 16), randn(2, seqlen, 1, 16)
    return Scan("layer", x, dt, A, B, C, randn(2), randn(2), None, True, 0.0, float("inf"))


@pytest.mark.parametrize("single_step", [False, True])
def test_a_learned_scale_runs_the_same_scan(single_step):
    scan = random_scan()
    scale = torch.rand(2, 16, generator=torch.Generator().manual_seed(1)) + 0.5
    recurrence = Recurrence(4, state_scale={"layer": scale}, single_step=single_step)
    learned = LearnedScale(recurrence, ["layer"])
    assert torch.equal(quant.store_scale(learned.scale("layer")), quant.store_scale(scale))
    torch.testing.assert_close(learned(scan)[0], recurrence(scan)[0], rtol=1e-4, atol=1e-4)


def test_a_learned_scale_needs_something_to_learn():
    scale = {"layer": torch.ones(2, 16)}
    for recurrence in (Recurrence(4), Recurrence(None, state_scale=scale)):
        with pytest.raises(CalibrationError, match="needs calibrated scales"):
            LearnedScale(recurrence, ["layer"])
    with pytest.raises(CalibrationError, match="both fixed"):
        LearnedScale(Recurrence(4, state_scale=scale, channel_scale={"layer": torch.ones(2, 8)}), ["layer"])


@pytest.mark.parametrize("learned", [False, True])
def test_another_seed_is_other_noise_of_the_same_parameters(learned):
    scan, scale = random_scan(), {"layer": torch.ones(2, 16)}
    run = Recurrence(3, stochastic=True, state_scale=scale)
    if learned:
        run = LearnedScale(run, ["layer"])
        assert run.with_seed(1).log_scale["layer"] is run.log_scale["layer"]
    first, again, other = (run.with_seed(seed)(scan)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first, run(scan)[0])


def test_every_step_trains_on_noise_of_its_own(reconstruct, monkeypatch):
    seeds, with_seed = [], Recurrence.with_seed
    monkeypatch.setattr(Recurrence, "with_seed", lambda self, seed: seeds.append(seed) or with_seed(self, seed))
    reconstruct(loss="model", epochs=2)
    assert seeds == [0, 1, 2, 3]  # two steps an epoch


def test_the_gradient_of_a_scale_lowers_the_error():
    """Steps along it bring the output of the recurrence nearer to the float one."""
    scan = random_scan(seqlen=16)
    learned = LearnedScale(Recurrence(3, state_scale={"layer": torch.ones(2, 16)}), ["layer"])
    target = Recurrence(None)(scan)[0]
    optimizer = torch.optim.Adam([learned.log_scale["layer"]], lr=0.03)
    errors = []
    for _ in range(25):
        optimizer.zero_grad()
        error = (learned(scan)[0] - target).square().mean()
        error.backward()
        assert (
            learned.log_scale["layer"].grad.sum(dim=1).abs().max()
            < 1e-5 * learned.log_scale["layer"].grad.abs().max() + 1e-7
        )
        optimizer.step()
        errors.append(error.item())
    assert sum(errors[-5:]) < 0.9 * sum(errors[:5])


@pytest.mark.parametrize("weights", [None, "int8"])
def test_channels_of_x_stay_frozen(reconstruct, lively, weights):
    reconstruction, quantized = reconstruct(learn=("conv1d",), epochs=1, margin=-1e9, weights=weights)
    for layer, mixer in mixers(quantized).items():
        was, channels = lively().get_submodule(layer), bc_channels(mixer)
        assert channels == 2 * 32 == len(mixer.conv1d.weight) - mixer.intermediate_size
        for name in ("weight", "bias"):
            found, old = getattr(mixer.conv1d, name), getattr(was.conv1d, name)
            assert torch.equal(found[-channels:], reconstruction.tuned[f"{layer}.conv1d.{name}_bcdt"])
            assert torch.equal(found[:-channels], old[:-channels])
            assert not torch.equal(found[-channels:], old[-channels:])
    names = {f"{layer}.conv1d.{name}_bcdt" for layer in LAYERS for name in ("weight", "bias")}
    assert set(reconstruction.tuned) == names


def test_convolutions_that_do_not_win_do_not_stay(reconstruct, lively):
    reconstruction, quantized = reconstruct(learn=("in_proj", "conv1d"), margin=1e9)
    assert not reconstruction.tuned
    for name, parameter in lively().named_parameters():
        assert torch.equal(quantized.get_parameter(name), parameter)


def test_learning_the_scale_too(reconstruct):
    reconstruction, _ = reconstruct(learn=("in_proj", "state_scale"), epochs=1, margin=-1e9)
    for layer in LAYERS:
        scale = reconstruction.tuned[f"{layer}.state_scale"]
        assert scale.shape == (2, 32)
        assert torch.equal(reconstruction.recurrence.state_scale[layer], scale)


def test_the_paper_s_recipe():
    assert (PAPER.trajectory, PAPER.learning_rate, PAPER.loss) == ("single-step", 1e-3, "block")
    assert PAPER.learn == ("in_proj",)


def test_the_faithful_scan_is_what_trains(lively, windows):
    """Straight-through gradients reach in_proj, and they are not those of the float scan."""
    gradients = []
    for bits in (2, None):
        model = lively().requires_grad_(True)
        with replaced(model, Recurrence(bits)):
            model(windows[:2], use_cache=False).logits.square().sum().backward()
        gradients.append(
            model.backbone.layers[0].mixer.in_proj.weight.grad[-bcdt_rows(model.backbone.layers[0].mixer) :]
        )
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    assert (gradients[0] - gradients[1]).norm() > 1e-3 * gradients[1].norm()
