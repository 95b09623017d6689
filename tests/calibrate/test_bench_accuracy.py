"""What `python -m bench accuracy` compares with: schemes in plain torch, and outliers that change nothing."""

from __future__ import annotations

import pytest
import torch

from bench.accuracy import merged
from bench.outliers import Outliers
from bench.schemes import SCHEMES, SchemeRecurrence
from calibrate.capture import capture
from calibrate.recurrence import Recurrence, float_scan, mixers, replaced
from calibrate.state_scales import fitted_scale, sensitivities


@torch.no_grad()
def logits(model, ids, run):
    with replaced(model, run):
        return model(ids, use_cache=False).logits


def test_outliers_do_not_change_the_function(lively, windows):
    model, ids = lively(), windows[:2]
    outliers = Outliers.random(model)
    expected = logits(model, ids, float_scan)
    torch.testing.assert_close(logits(model, ids, outliers.around(float_scan)), expected, rtol=1e-3, atol=1e-4)
    # They are there: one scale a row is hurt by a column that is 20 times larger.
    ones = {layer: torch.ones(2, 32) for layer in mixers(model)}
    errors = [
        (logits(model, ids, run) - expected).abs().mean()
        for run in (Recurrence(4, state_scale=ones), outliers.around(Recurrence(4, state_scale=ones)))
    ]
    assert errors[1] > 2 * errors[0]


def test_statistics_of_outliers_need_no_second_capture(lively, windows):
    """Fitted scales follow the columns, whatever the rows do."""
    model = lively()
    statistics, felt = capture(model, [windows[:4]]), sensitivities(model, [windows[:4]])
    outliers = Outliers.random(model)
    larger, felt_larger = outliers.statistics(statistics), outliers.sensitivities(felt)
    for layer in felt:
        scale = fitted_scale(statistics.rows[layer], statistics.channels[layer], felt[layer])
        found = fitted_scale(larger.rows[layer], larger.channels[layer], felt_larger[layer])
        expected = scale * outliers.state[layer]
        ratio = found / expected
        assert (ratio / ratio.mean(dim=1, keepdim=True) - 1).abs().max() < 0.25


@pytest.mark.parametrize("name", SCHEMES)
def test_schemes(lively, windows, name):
    model, ids = lively(), windows[:2, :48]
    expected = logits(model, ids, float_scan)
    errors = [(logits(model, ids, SchemeRecurrence(name, bits)) - expected).abs().mean() for bits in (8, 4, 2)]
    assert errors[0] < errors[1] < errors[2]
    h = torch.randn(2, 3, 16, 64)
    step, extra = SCHEMES[name][0](h, 4), SCHEMES[name][1](16, 64)
    assert (h.abs() / step).max() < 7.1
    scales = {"per head": 1, "per state": 64, "groups of 32": 32, "DSQ as printed": 16 + 64}[name]
    assert extra == pytest.approx(16 * scales / (16 * 64))


def test_groups_by_the_kernel_are_those_of_plain_torch(lively, windows):
    """Two groups a row at dstate 64. A code may differ where a rounding of the last bit does."""
    model, ids = lively(state_size=64), windows[:2, :48]
    scheme = SchemeRecurrence("groups of 32", 4)
    assert scheme.by_kernel and not SchemeRecurrence("per head", 4).by_kernel
    found, expected = logits(model, ids, scheme.grouped), logits(model, ids, scheme.plain)
    floats = logits(model, ids, float_scan)
    assert (found - expected).abs().mean() < 0.05 * (floats - expected).abs().mean()


def test_one_group_a_row_is_the_packed_state_s_per_channel(lively, windows):
    """dstate is 32 here, so a group is a row, which the kernel knows as calibrated scales of 1."""
    model, ids = lively(), windows[:2, :48]
    ones = {layer: torch.ones(2, 32) for layer in mixers(model)}
    expected = logits(model, ids, Recurrence(4, state_scale=ones))
    found = logits(model, ids, SchemeRecurrence("groups of 32", 4).plain)
    floats = logits(model, ids, float_scan)
    assert (found - expected).abs().mean() < 0.05 * (floats - expected).abs().mean()


def test_parts_of_several_processes_are_merged():
    """Later results take the place of earlier ones of the same row, rate, or recipe and seed; others stay."""
    names = ("scheme", "rounding", "state_bits", "weights", "outliers", "esr")
    rows = [dict(zip(names, ("per head", "nearest", bits, "none", False, ""), strict=True)) for bits in (8, 4, 2)]
    found = merged("table", [rows[2] | {"increase": 0.1}, rows[0]], [rows[1], rows[2] | {"increase": 0.2}])
    assert found == [rows[0], rows[1], rows[2] | {"increase": 0.2}]

    assert merged("rates", {"0.1": 2.0, "0.2": 3.0}, {"0.2": 4.0}) == {"0.1": 2.0, "0.2": 4.0}
    assert merged("rates", None, {"0.2": 4.0}) == {"0.2": 4.0}

    known = {"H4": {"one": [{"seed": 0, "recovered": 0.1}, {"seed": 2, "recovered": 0.3}], "two": [{"seed": 0}]}}
    found = merged("esr", known, {"H4": {"one": [{"seed": 1}, {"seed": 0, "recovered": 0.2}]}, "H3": {"one": []}})
    one = [{"seed": 0, "recovered": 0.2}, {"seed": 1}, {"seed": 2, "recovered": 0.3}]
    assert found == {"H4": {"one": one, "two": [{"seed": 0}]}, "H3": {"one": []}}
    assert known["H4"]["one"][0]["recovered"] == 0.1
