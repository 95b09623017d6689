"""Statistics, what the loss feels of a state's errors, and the scales that follow."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from calibrate.capture import ROWS, SEGMENT, Statistics, capture
from calibrate.recurrence import float_scan, replaced
from calibrate.smooth import activation_scales, smooth_factors
from calibrate.state_scales import LOOK, fitted_scale, power_scale, sensitivities
from qmamba_compile import quant, recurrence


@pytest.fixture(scope="module")
def statistics(lively, windows):
    return capture(lively(), list(windows[:8].split(4)))


@torch.no_grad()
def test_statistics_are_those_of_the_states(lively, windows, statistics):
    """Against states taken by running every prefix of the samples."""
    model, looks = lively(), []

    def look(scan):
        y, state = float_scan(scan)
        if scan.layer == "backbone.layers.1.mixer":
            looks.append(state)
        return y, state

    with replaced(model, look):
        for end in range(SEGMENT, windows.shape[1] + 1, SEGMENT):
            model(windows[:8, :end], use_cache=False)
    states = torch.cat(looks)
    assert statistics.looks == len(states)
    expected = states.double().square().mean(dim=0).sqrt().float()
    torch.testing.assert_close(statistics.state_rms("backbone.layers.1.mixer"), expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(
        statistics.state_max["backbone.layers.1.mixer"].float(), states.abs().amax(dim=0), rtol=1e-3, atol=1e-6
    )
    rows, channels = statistics.rows["backbone.layers.1.mixer"], statistics.channels["backbone.layers.1.mixer"]
    assert rows.shape[1] == len(channels) >= ROWS
    # Each row is one of a state, at its channel.
    for index in (0, len(channels) // 2, len(channels) - 1):
        candidates = states[:, :, channels[index]]
        assert (candidates - rows[:, index]).abs().amax(dim=(1, 2)).min() < 1e-5


def test_the_order_of_samples_does_not_show(lively, windows, statistics):
    other = capture(lively(), list(windows[:8].flip(0).split(4)))
    for layer, total in statistics.state_sum.items():
        torch.testing.assert_close(other.state_sum[layer], total, rtol=1e-6, atol=1e-12)
    again = Statistics.from_tensors(statistics.tensors())
    assert all(torch.equal(a, b) for a, b in zip(again.tensors().values(), statistics.tensors().values(), strict=True))


def test_sensitivities_are_squared_gradients(lively, windows):
    """Against autograd through a scan that is written out step by step, for the last layer."""
    model, ids, layer = lively(), windows[:2, :48], "backbone.layers.1.mixer"
    found = sensitivities(model, [ids])[layer]
    states = []

    def run(scan):
        if scan.layer != layer:
            return float_scan(scan)
        state, outputs = torch.zeros(2, *found.shape), []
        for t in range(scan.x.shape[1]):
            # A leaf added to every state has the gradient that the state has.
            bump = torch.zeros_like(state, requires_grad=True)
            states.append(bump)
            state, y = recurrence.step(
                state, scan.x[:, t], scan.dt[:, t], scan.A, scan.B[:, t], scan.C[:, t], scan.D, scan.dt_bias, True
            )
            repeats = scan.x.shape[2] // scan.C.shape[2]
            outputs.append(y + torch.einsum("bhpn,bhn->bhp", bump, scan.C[:, t].repeat_interleave(repeats, 1)))
            state = state + bump
        return torch.stack(outputs, dim=1), None

    with replaced(model, run), torch.enable_grad():
        logits = model(ids, use_cache=False).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    expected = sum(states[t].grad.double().square().sum(dim=0) for t in range(len(states) - LOOK, -1, -LOOK))
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-12)


def felt(scale, rows, channels, sensitivity):
    step = (rows.abs() / scale[:, None]).amax(dim=-1, keepdim=True) * scale[:, None]
    return (step.square() * sensitivity[:, channels]).sum(dim=(1, 2))


def test_fitted_scales_are_felt_least(lively, windows, statistics):
    sensitivity = {k: v.float() for k, v in sensitivities(lively(), [windows[:4]]).items()}
    for layer, rows in statistics.rows.items():
        channels = statistics.channels[layer]
        fitted = felt(fitted_scale(rows, channels, sensitivity[layer]), rows, channels, sensitivity[layer])
        for exponent in (0.0, 0.3, 0.5, 0.7, 1.0):
            power = felt(power_scale(statistics, layer, exponent), rows, channels, sensitivity[layer])
            assert (fitted < power).all(), (layer, exponent, fitted / power)


def test_scales_of_dead_and_of_wild_states_can_be_stored():
    rows = torch.randn(2, 50, 8) * torch.tensor([0.0, 1e-20, 1e-6, 1, 1, 1e6, 1e12, 0])
    for sensitivity in (torch.ones(2, 4, 8), torch.zeros(2, 4, 8)):
        scale = fitted_scale(rows, torch.arange(50) % 4, sensitivity)
        assert scale.isfinite().all() and (scale >= quant.TINY_SCALE).all()


def test_smooth_factors_even_out_an_outlier(lively, windows, statistics):
    model = lively()
    statistics = capture(model, [windows[:4]])
    path = "backbone.layers.0.mixer.in_proj"
    statistics.input_max[path][3] *= 50
    statistics.input_max[path][5] = 0
    factors = smooth_factors(model, statistics, 0.5)[path]
    smoothed = statistics.input_max[path] * factors
    assert smoothed.max() / smoothed.median() < 0.3 * 50
    assert factors[5] == 1 and factors.isfinite().all()
    scales = activation_scales(
        statistics, {path: factors, **{k: torch.ones(len(v)) for k, v in statistics.input_max.items() if k != path}}
    )
    assert scales[path] == pytest.approx((smoothed.max() / 127).item())
    assert smooth_factors(model, statistics, 0.75)[path][3] < factors[3]


def test_a_tied_head_is_not_smoothed(lively, windows):
    """Its factors would divide the embedding, too."""
    model = lively(tie_word_embeddings=True, num_hidden_layers=1)
    statistics = capture(model, [windows])
    factors = smooth_factors(model, statistics, 0.5)
    assert list(factors) == ["backbone.layers.0.mixer.in_proj", "backbone.layers.0.mixer.out_proj"]
    scales = activation_scales(statistics, factors)
    assert scales["lm_head"].item() == pytest.approx(statistics.input_max["lm_head"].max().item() / 127)
