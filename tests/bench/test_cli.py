"""The questions as commands: help, refusals, interruption, and one real tiny run of two of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import accuracy, cli, decode, flush, gpu, linear, plot, roofline, ssm
from bench.record import Record
from qmamba_compile import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_help_lists_the_questions_that_are_there():
    result = bench("--help")
    assert result.returncode == 0
    listed = {line.split()[0] for line in result.stdout.splitlines() if line.startswith("  ") and line.split()}
    for question in ("linear", "ssm", "decode", "prefill", "compile", "memory", "cost", "calibration"):
        assert question in listed


def test_an_unknown_question_lists_the_known_ones():
    result = bench("lineer")
    assert result.returncode == 2
    assert all(word in result.stderr for word in ("lineer", "linear", "decode", "cost"))


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        (("ssm", "--shape", "3b"), ("3b", "2.7b")),
        (("accuracy", "--model", "./nowhere"), ("./nowhere", "no such folder")),
        (("roofline", "--target", "sm_1"), ("sm_1", "sm_90")),
        (("gpu", "--only", "music"), ("music", "decode")),
    ],
)
def test_a_refusal_is_one_line_and_status_2(arguments, wanted):
    result = bench(*arguments)
    assert result.returncode == 2
    assert all(word in result.stderr for word in wanted) and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("question", "arguments", "wanted"),
    [
        (linear, {"shape": "3b"}, ["3b", "130m", "2.7b"]),
        (linear, {"shape": "tiny", "rows": "1,x"}, ["--rows", "1,x"]),
        (decode, {"shape": "tiny", "option": ["colour=red"]}, ["colour", "rounding", "state_bits"]),
        (decode, {"shape": "tiny", "variants": "ours"}, ["'ours'", "ours-w8a8h4", "torchao"]),
        (ssm, {"shape": "tiny", "batch": "0"}, ["--batch", "'0'"]),
        (ssm, {"shape": "tiny", "variants": "ours-h9"}, ["ours-h9", "ours-h8", "fused-float32"]),
        (linear, {"shape": "tiny", "json": Path("/dev/null/x/y.json")}, ["--json", "/dev/null/x/y.json", "folder"]),
        (roofline, {"json_path": ROOT}, ["--json", str(ROOT), "name of a file"]),
        (plot, {"records": [ROOT / "README.md"], "plot": Path("picture.png")}, ["README.md", "no JSON"]),
        (accuracy, {"bits": "4,5"}, ["--bits", "4,5", "8, 4, 3, 2"]),
        (flush, {"bits": "5"}, ["--bits", "5", "8, 4, 3, 2"]),
        (accuracy, {"seeds": "-1"}, ["--seeds", "-1", "from 0 on"]),
        (accuracy, {"rates": "1e-3,nan"}, ["--rates", "nan", "above 0"]),
        (accuracy, {"only": "("}, ["--only", "regular expression"]),
        (accuracy, {"merge": [Path("nowhere")]}, ["--merge", "nowhere"]),
        (accuracy, {"out": Path("/dev/null/x")}, ["--out", "/dev/null/x", "folder"]),
        (gpu, {"out": Path("/dev/null/x")}, ["--out", "/dev/null/x", "folder"]),
        (ssm, {"shape": "tiny", "batch": "1", "plot": Path("picture.pdf")}, ["picture.pdf", ".png"]),
    ],
)
def test_bad_input_lists_what_is_allowed(question, arguments, wanted):
    with pytest.raises(ConfigError) as refusal:
        question.main(**arguments)
    assert all(word in str(refusal.value) for word in wanted)


def test_linear_for_real(tmp_path, capsys):
    path, image = tmp_path / "linear.json", tmp_path / "linear.png"
    pytest.importorskip("matplotlib")
    linear.main(shape="tiny", rows="1,3", variants="bfloat16,ours-w8a8", repeats=3, json=path, plot=image)
    found = Record.read(path)
    assert found.complete and len(found.rows) == 3 * 2 * 3
    assert {row.variant for row in found.rows} == {"float32", "bfloat16", "ours-w8a8"}
    for row in found.rows:
        assert row.time.median > 0 and len(row.time.samples) == 3 and row.floor > 0
        if row.variant != "float32":
            assert row.gate.error > 0 and row.speedups["float32"].value > 0
    assert image.read_bytes().startswith(b"\x89PNG")
    plot.main([path], tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == image.read_bytes()


def test_without_matplotlib_a_plot_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"qmamba-compile\[bench\]"):
        linear.main(shape="tiny", plot=tmp_path / "linear.png")


def test_ssm_for_real(tmp_path):
    path = tmp_path / "ssm.json"
    chosen = "fused-float32,ours-h8,ours-h4,ours-h4-torch-reference"
    ssm.main(shape="tiny", batch="2", variants=chosen, repeats=3, json=path)
    rows = {row.variant: row for row in Record.read(path).rows}
    assert 0 < rows["ours-h8"].gate.error < rows["ours-h4"].gate.error
    assert rows["ours-h4"].gate.error == pytest.approx(rows["ours-h4-torch-reference"].gate.error, rel=1e-3)
    assert rows["ours-h4"].speedups["fused-float32"].value > 0
    assert rows["ours-h4"].work.updated < rows["ours-h8"].work.updated < rows["fused-float32"].work.updated


def test_a_failed_check_refuses_the_ratio_and_fails_the_run(tmp_path, monkeypatch, capsys):
    path = tmp_path / "ssm.json"
    monkeypatch.setattr(ssm, "_H4", 1e-6)
    with pytest.raises(SystemExit) as end:
        ssm.main(shape="tiny", batch="1", variants="fused-float32,ours-h8,ours-h4", repeats=3, json=path)
    assert end.value.code == cli.REFUSED
    rows = {row.variant: row for row in Record.read(path).rows}
    assert "refused" in rows["ours-h4"].speedups["fused-float32"]
    assert rows["ours-h8"].speedups["fused-float32"].value > 0
    assert "numerics" in capsys.readouterr().err


def test_interrupt_leaves_what_was_measured(tmp_path, monkeypatch):
    path = tmp_path / "ssm.json"

    def interrupted(calls, *, samples, **settings):
        real(calls, **settings | {"rounds": 2}, samples=samples)
        if len(runs) == 1:
            raise KeyboardInterrupt
        runs.append(calls)
        return samples

    real, runs = cli.interleave, []
    monkeypatch.setattr(cli, "interleave", interrupted)
    with pytest.raises(SystemExit) as end:
        ssm.main(shape="tiny", batch="1,2,4", variants="fused-float32", repeats=9, json=path)
    assert end.value.code == cli.INTERRUPTED
    found = Record.read(path)
    assert not found.complete
    assert [row.group["batch"] for row in found.rows] == [1, 1, 2, 2]
    assert all(len(row.time.samples) == 2 for row in found.rows)
