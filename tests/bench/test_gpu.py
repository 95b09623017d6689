"""`bench.gpu` without a GPU: its checks in Triton's interpreter, its report from invented figures (TEST_DATA)."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import typer
from typer.testing import CliRunner

from bench import gpu, gpu_check
from bench.roofline import VARIANTS
from bench.shapes import Shape
from qmamba_compile.command_line import BAD_INPUT
from qmamba_compile.errors import ConfigError

TINY = Shape("two heads", d_model=16, n_layers=1, headdim=16, dstate=32, vocab_size=64)


def entry(**fields: Any) -> dict[str, Any]:
    seconds = dataclasses.asdict(gpu.Timing.of([fields.pop("median")] * 3))
    return fields | {"seconds": seconds, "TEST_DATA": True}


@pytest.fixture
def record() -> dict[str, Any]:
    """Invented: no such device, no such times."""
    ssm = [
        entry(model="2.7b", batch=batch, state=state, kernel=kernel, median=batch * microseconds * 1e-6)
        for batch in (1, 64)
        for state, kernel, microseconds in (
            ("float32", "ours", 8.0),
            ("bfloat16", "ours", 4.0),
            ("bfloat16", "mamba-ssm", 6.0),
            ("int4 calibrated", "ours", 2.0),
            ("int4 every 8", "ours", 1.6),
            ("int4 every 8", "ours, a step that reads", 1.25),
        )
    ]
    linear = [
        entry(model="2.7b", outputs=64, inputs=32, rows=rows, kind=kind, median=1e-6)
        for rows in (1, 16)
        for kind in "ab"
    ]
    decode = [
        entry(model="2.7b", layers=8, backend=backend, batch=1, tokens=16, median=1e-3, peak_bytes=2**30)
        for backend in ("inductor", "qmamba")
    ]
    sections = {"ssm": ssm, "linear": linear, "decode": decode}
    return {"device": "TEST_DATA", "sections": sections, "skipped": {"prefill": "TEST_DATA: no reason"}}


def test_speedups_compare_like_with_like(record: dict[str, Any]) -> None:
    rows = gpu.ssm_speedups(record["sections"]["ssm"])
    assert [row["batch"] for row in rows] == [1, 1, 64, 64]
    for row in rows[1::2]:
        assert row["state"] == "int4 every 8"
        assert row["over L=1"] == pytest.approx(1.25) and row["us, reads"] == pytest.approx(1.25 * row["batch"])
    for row in rows[::2]:
        assert row["state"] == "int4 calibrated" and "over L=1" not in row
        assert row["over bfloat16, ours"] == pytest.approx(2.0)
        assert row["over bfloat16, mamba-ssm"] == pytest.approx(3.0)
        assert row["over float32, ours"] == pytest.approx(4.0)
        assert "over float32, mamba-ssm" not in row


def test_record_is_written_and_plotted(record: dict[str, Any], tmp_path: pathlib.Path) -> None:
    files = gpu.write(record, tmp_path)
    assert json.loads(files[0].read_text()) == record
    if importlib.util.find_spec("matplotlib"):
        assert [path.name for path in files[1:]] == ["gpu_ssm.png", "gpu_linear.png", "gpu_decode.png"]
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in files[1:])


def test_record_without_matplotlib(
    record: dict[str, Any], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert [path.name for path in gpu.write(record, tmp_path)] == ["gpu.json"]


def test_record_is_printed(record: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    gpu._out.file = sys.stdout
    gpu.print_record(record)
    text = capsys.readouterr().out
    gpu._out.file = None
    assert "2.00" in text and "3.00" in text and "peak 1024.0 MiB" in text and "no reason" in text


def test_quartiles() -> None:
    assert gpu.Timing.of([1.0, 2.0, 3.0, 4.0, 5.0]) == gpu.Timing(3.0, 1.5, 4.5, 5)
    assert gpu.Timing.of([2.0]) == gpu.Timing(2.0, 2.0, 2.0, 1)


def test_copies_overflow_the_cache() -> None:
    for moved in (10**3, 10**6, 10**9):
        copies = gpu.copies_beyond_l2(moved)
        assert 1 <= copies <= 256 and (copies == 256 or copies * moved >= gpu._L2_BYTES)


def test_without_a_gpu_it_says_so_and_ends_with_2() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    result = subprocess.run([sys.executable, "-m", "bench.gpu"], capture_output=True, text=True, check=False)
    assert result.returncode == BAD_INPUT and "nothing was measured" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [["--only", "music"], ["--model", "9B"]])
def test_refuses_unknown_choices(arguments: list[str]) -> None:
    app = typer.Typer()
    app.command()(gpu.main)
    problem = CliRunner().invoke(app, arguments).exception
    assert isinstance(problem, ConfigError) and all(argument in str(problem) for argument in arguments)


def test_a_wrong_kernel_is_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpu_check.launch, "target", lambda *_: "sm_90")
    monkeypatch.setattr(gpu, "environment", lambda device: {"device": "TEST_DATA"})
    monkeypatch.setattr(gpu, "check", lambda device: {"ssm": {"correct": False}})
    monkeypatch.setattr(gpu, "copy_bandwidth", lambda device: pytest.fail("measured all the same"))
    with pytest.raises(SystemExit) as ended:
        gpu.main(None, tmp_path, 1.0, "2.7b", 1, False)
    assert ended.value.code == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", VARIANTS)
def test_the_check_passes_on_our_kernels(interpreted: Callable[..., Any], name: str) -> None:
    found = interpreted(gpu_check.check_step, TINY, VARIANTS[name], "cpu", 9 if "every" in name else 2)
    assert found["correct"], found


def wrong_kernel() -> dict[str, Any]:
    """The check of a kernel that loses the sign of a few codes."""
    right = gpu_check.launch.ssm_update

    def wrong(packed: Any, *args: Any) -> Any:
        y = right(packed, *args)
        packed[0, 0, 0, :2] ^= 0x88
        return y

    gpu_check.launch.ssm_update, gpu_check.Step.run.__defaults__ = wrong, (wrong,)
    try:
        return gpu_check.check_step(TINY, VARIANTS["int4 calibrated"], "cpu", 2)
    finally:
        gpu_check.launch.ssm_update, gpu_check.Step.run.__defaults__ = right, (right,)


def test_the_check_sees_a_wrong_kernel(interpreted: Callable[..., Any]) -> None:
    assert not interpreted(wrong_kernel)["correct"]


def check_of_rings() -> tuple[list[int], list[int], list[int], bool]:
    """Where copies stand, and where they stand after a step of each."""
    first = gpu_check.Step.random(TINY, VARIANTS["int4 every 8"], 2, "cpu", torch.float32)
    steps = [first.copy(position) for position in range(9)]
    before = [int(step.ring.position[0]) for step in steps]
    written = [step.state[0].clone() for step in steps]
    for step in steps:
        step.run()
    after = [int(step.ring.position[0]) for step in steps]
    stored = [
        i for i, (step, old) in enumerate(zip(steps, written, strict=True)) if not torch.equal(step.state[0], old)
    ]
    return before, after, stored, int(first.ring.position[0]) == 0


def test_copies_stand_at_all_positions_of_the_ring(interpreted: Callable[..., Any]) -> None:
    before, after, stored, untouched = interpreted(check_of_rings)
    assert before == [*range(8), 0] and after == [*range(1, 8), 0, 1] and stored == [7] and untouched


def test_reads_and_stores_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays of a cycle of eight whose eighth step takes five times as long; one has run before the first replay."""
    steps = [gpu_check.Step(VARIANTS["int4 every 8"], (), (), None)]
    seconds = [5.0 if (number + 1) % 8 == 7 else 1.0 for number in range(40)]
    monkeypatch.setattr(gpu, "replays", lambda calls, least: seconds)
    found = gpu.time_positions(steps)
    assert found["reads"].median == found["reads"].high == 1.0 and found["reads"].replays == 34
    assert found["stores"].median == found["stores"].low == 5.0 and found["stores"].replays == 5


def check_of_two_launches() -> dict[str, Any]:
    with mock.patch.object(gpu_check.tuning, "launches", lambda spec, programs, batch: {True: 1, False: batch}):
        return gpu_check.check_step(TINY, VARIANTS["int4 every 8"], "cpu", 17)


def test_a_step_in_two_launches_passes_its_check(interpreted: Callable[..., Any]) -> None:
    assert interpreted(check_of_two_launches)["correct"]


@pytest.mark.parametrize("name", ["int4 calibrated", "int4 dynamic", "int4 stochastic"])
def test_the_faithful_scan_passes_its_check(interpreted: Callable[..., Any], name: str) -> None:
    found = interpreted(gpu_check.check_quantized_scan, TINY, VARIANTS[name], "cpu", 5)
    assert found["correct"] and found["codes_off"] == 0, found


def check_of_another_conv() -> dict[str, Any]:
    """The check of a kernel that takes the taps from the wrong end."""
    right = gpu_check.launch_layers.causal_conv
    gpu_check.launch_layers.causal_conv = lambda xBC, weight, *rest: right(xBC, weight.flip(-1), *rest)
    try:
        return gpu_check.check_conv(TINY, "cpu", torch.float32, 20, 3)
    finally:
        gpu_check.launch_layers.causal_conv = right


def test_convolutions_pass_their_check(interpreted: Callable[..., Any]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        found = interpreted(gpu_check.check_conv, TINY, "cpu", dtype, 20, 3)
        assert found["correct"], found
    wrong = interpreted(check_of_another_conv)
    assert not wrong["correct"] and wrong["step_error"] < 1e-6 < wrong["y_error"]


def check_of_linear_and_scan() -> tuple[dict[str, Any], dict[str, Any]]:
    linear = gpu_check.layer_ops.w8a8_linear
    gpu_check.layer_ops.w8a8_linear = gpu_check.launch_layers.w8a8_linear
    try:
        return gpu_check.check_linear(3, 32, 64, "cpu"), gpu_check.check_scan(TINY, "cpu", torch.float32, 20)
    finally:
        gpu_check.layer_ops.w8a8_linear = linear


def test_linear_and_scan_pass_their_checks(interpreted: Callable[..., Any]) -> None:
    linear, scan = interpreted(check_of_linear_and_scan)
    assert linear["correct"] and scan["correct"], (linear, scan)
