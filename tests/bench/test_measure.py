"""Interleaving and statistics on a clock that the tests turn, and the gate that refuses ratios."""

import ctypes
import math
import subprocess
import sys

import pytest
import torch

from bench.measure import Gate, Roof, Summary, Work, checked_speedup, interleave, measure_roof, speedup


class FakeClock:
    """Time that passes only when a variant runs; ``drift`` slows everything as the run goes on."""

    def __init__(self, drift=0.0):
        self.now, self.drift, self.order = 0.0, drift, []

    def __call__(self):
        return self.now

    def variant(self, name, seconds):
        def call():
            self.order.append(name)
            self.now += seconds * (1 + self.drift * self.now)

        return call


def test_every_round_runs_every_variant_once_in_changing_order():
    clock = FakeClock()
    seconds = {"a": 1.0, "b": 2.0, "c": 3.0}
    calls = {name: clock.variant(name, s) for name, s in seconds.items()}
    samples = interleave(calls, rounds=12, clock=clock)
    assert {name: set(taken) for name, taken in samples.items()} == {name: {s} for name, s in seconds.items()}
    assert all(len(taken) == 12 for taken in samples.values())
    timed = clock.order[2 * len(calls) :]  # warm-up and the choice of block length come first
    rounds = [tuple(timed[start : start + 3]) for start in range(0, len(timed), 3)]
    assert len(rounds) == 12 and all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 2


def test_short_calls_are_timed_in_blocks():
    clock = FakeClock()
    samples = interleave({"a": clock.variant("a", 0.25)}, rounds=3, block_seconds=1.0, clock=clock)
    assert samples["a"] == [0.25] * 3
    assert len(clock.order) == 2 + 3 * 4


def test_drift_of_the_machine_cancels_in_the_ratio():
    clock = FakeClock(drift=0.01)
    calls = {"slow": clock.variant("slow", 2.0), "fast": clock.variant("fast", 1.0)}
    samples = interleave(calls, rounds=30, clock=clock)
    assert samples["slow"][-1] > 1.5 * samples["slow"][0]
    assert speedup(samples["slow"], samples["fast"]).value == pytest.approx(2.0, rel=0.03)


def test_an_interrupted_run_keeps_whole_rounds():
    clock = FakeClock()
    left = 2 * 2 + 2 * 4 + 1  # warm-up, four rounds, and half a round

    def interrupted():
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        clock.now += 1

    samples = {}
    with pytest.raises(KeyboardInterrupt):
        interleave({"a": interrupted, "b": interrupted}, rounds=100, clock=clock, samples=samples)
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 4, "b": 4}


def test_summary_is_median_and_quartiles():
    summary = Summary.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (summary.q1, summary.median, summary.q3) == (2.0, 3.0, 4.0)
    assert summary.samples == (5.0, 1.0, 2.0, 4.0, 3.0)


def test_the_interval_of_a_ratio_holds_it_and_narrows_with_the_noise():
    quiet = speedup([2.0, 2.02, 1.98, 2.01, 1.99], [1.0, 1.01, 0.99, 1.0, 1.0])
    noisy = speedup([2.0, 3.0, 1.0, 2.5, 1.5], [1.0, 1.5, 0.5, 1.2, 0.8])
    assert quiet.value == noisy.value == 2.0
    assert quiet.low <= 2.0 <= quiet.high and noisy.low <= 2.0 <= noisy.high
    assert quiet.high - quiet.low < 0.1 < noisy.high - noisy.low
    with pytest.raises(ValueError, match="different rounds"):
        speedup([1.0, 2.0], [1.0])


def test_gate_measures_the_relative_error():
    reference = torch.tensor([3.0, 4.0])
    assert Gate.of(reference + torch.tensor([0.0, 0.5]), reference, 0.2).error == pytest.approx(0.1)
    assert Gate.of(reference, reference, 0.0).passed
    assert not Gate.of(reference * 1.5, reference, 0.2).passed
    assert not Gate.of(reference * torch.nan, reference, math.inf).passed
    assert not Gate.of(reference[:1], reference, 1e9).passed  # broadcasting would hide it


def test_a_ratio_is_refused_when_either_side_fails_its_check():
    good, bad = Gate(0.01, 0.1), Gate(0.5, 0.1)
    assert checked_speedup([2.0, 2.0], good, [1.0, 1.0], good).value == 2.0
    for gates in ((good, bad), (bad, good)):
        refusal = checked_speedup([2.0, 2.0], gates[0], [1.0, 1.0], gates[1])
        assert isinstance(refusal, str) and "0.5" in refusal and "0.1" in refusal


def test_the_roof_is_the_slower_of_memory_and_arithmetic():
    roof = Roof(read=100.0, update=200.0, copy=200.0, int8=1000.0, bfloat16=500.0, float32=250.0)
    assert roof.seconds(Work(read=100, updated=100)) == pytest.approx(1.0 + 1.0)
    assert roof.seconds(Work(read=100, int8_ops=5000)) == pytest.approx(5.0)
    assert roof.seconds(Work(int8_ops=1000, bfloat16_ops=500, float32_ops=250)) == pytest.approx(3.0)
    assert Work(read=100, updated=30).bytes_moved == 160


def test_a_measured_roof_is_finite_and_positive():
    roof = measure_roof(nbytes=2**20, extent=64, tries=2)
    assert all(0 < rate < math.inf for rate in vars(roof).values())


_PAGES_CLEARED_AGAIN = """
import resource, torch
from bench.measure import keep_freed_memory
keep_freed_memory()
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    outputs = [torch.ones(2**24) for _ in range(4)]
    del outputs
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="libc cannot be told to keep memory"
)
def test_memory_that_is_kept_is_not_cleared_again():
    """Outputs of 64 MB, 16,384 pages each, as layers of one call leave them; in a process of its own."""
    result = subprocess.run([sys.executable, "-c", _PAGES_CLEARED_AGAIN], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 1000
