"""Calibration from end to end: the artifact, resuming, refusals, several processes, and the commands."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from hybrid_models import FAMILIES, build
from typer.testing import CliRunner

from calibrate import cli, distributed, models, pipeline, work
from calibrate.data import read_tokens
from calibrate.errors import CalibrationError, DataError
from calibrate.esr import EsrOptions
from calibrate.pipeline import Calibration, Options
from calibrate.recurrence import Recurrence, mixers
from qmamba_compile import report
from qmamba_compile.artifact import read_artifact
from qmamba_compile.config import QMambaConfig
from qmamba_compile.errors import ArtifactError, ConfigError

ROOT = Path(__file__).parents[2]
# A rate that leaves a clear trace even where only a quarter of the way is taken.
ESR = EsrOptions(epochs=1, batch=4, margin=-1e9, learning_rate=4e-3)
SMALL = Options(samples=8, validation=4, length=64, batch=4, esr=ESR)
FLAGS = ["--samples", "8", "--validation", "4", "--length", "64", "--batch", "4"]
FLAGS += ["--esr-batch", "4", "--esr-epochs", "1", "--quiet"]


@pytest.fixture
def calibrate(lively, text_file, tmp_path):
    def run(name="a.safetensors", options=SMALL, resume=False, model=None):
        model = model or lively()
        tokens = read_tokens(str(text_file), "", model)
        return Calibration(model, tokens, options, tmp_path / name, resume=resume, quiet=True).run()

    return run


def test_the_artifact_is_what_the_backend_reads(calibrate, lively, compiled, tokens, tmp_path):
    artifact = calibrate()
    path = tmp_path / "a.safetensors"
    read = read_artifact(path)
    assert read.digest == artifact.digest
    assert not path.with_name("a.safetensors.work").exists()
    for layer in mixers(lively()):
        assert read.state_scale(layer).shape == (2, 32)
        assert read.weight_bcdt(f"{layer}.in_proj").shape == (66, 64)
        assert f"esr/{layer}/nats_before" in read.header.metrics_before
        assert f"esr/{layer}/nats_after" in read.header.metrics_after
    assert {"perplexity_float", "perplexity_dynamic_scales"} <= set(read.header.metrics_before)
    model = compiled(lively(), state_scales="calibrated", calibration=str(path))
    with torch.no_grad():
        theirs = model(tokens(2, 20), use_cache=True).logits
        ours, _ = models.quantize(
            lively(), state_bits=4, weights="int8", state_scales=None, rounding="nearest", calibration=str(path)
        )
        original = lively()(tokens(2, 20), use_cache=False).logits
        expected = ours(tokens(2, 20), use_cache=False).logits
    assert (theirs - expected).abs().mean() < 0.02 * (original - expected).abs().mean()


@pytest.mark.parametrize("name", FAMILIES)
def test_hybrids(name, calibrate, compiled, tokens, tmp_path):
    family = FAMILIES[name]
    artifact = calibrate(model=build(family))
    layers = [layer.removesuffix(".state_scale") for layer in artifact.tensors if layer.endswith(".state_scale")]
    assert layers == list(mixers(build(family))) and len(layers) == family.scans
    assert all(f"esr/{layer}/nats_before" in artifact.header.metrics_before for layer in layers)
    model = compiled(build(family), state_scales="calibrated", calibration=str(tmp_path / "a.safetensors"))
    prompt = tokens(2, 20)
    with torch.no_grad():
        expected, logits = build(family)(prompt).logits, model(prompt, use_cache=True).logits
    assert (logits - expected).pow(2).mean() < 0.15**2 * expected.pow(2).mean()
    assert len(report.recent[-1].rewritten("quantize_state")) == family.scans


def test_tuned_convolutions_run_in_the_backend(calibrate, lively, compiled, tokens, tmp_path):
    esr = dataclasses.replace(SMALL.esr, learn=("in_proj", "conv1d"), learning_rate=0.03)
    artifact = calibrate(options=dataclasses.replace(SMALL, esr=esr))
    assert artifact.weight_bcdt("backbone.layers.0.mixer.conv1d").shape == (64, 1, 4)
    assert artifact.bias_bcdt("backbone.layers.0.mixer.conv1d").shape == (64,)
    path = str(tmp_path / "a.safetensors")
    model = compiled(lively(), state_scales="calibrated", calibration=path)
    with torch.no_grad():
        found = model(tokens(2, 20), use_cache=True).logits
        ours, _ = models.quantize(
            lively(), state_bits=4, weights="int8", state_scales=None, rounding="nearest", calibration=path
        )
        original = lively()(tokens(2, 20), use_cache=False).logits
        expected = ours(tokens(2, 20), use_cache=False).logits
    assert (found - expected).abs().mean() < 0.02 * (original - expected).abs().mean()


@pytest.mark.parametrize("flags, interval", [([], 8), (["--flush-interval", "1"], 1)], ids=str)
def test_the_interval_is_the_backend_s_unless_given(model_folder, text_file, tmp_path, caplog, flags, interval):
    out, scored = tmp_path / "a.safetensors", {}
    flags = [*FLAGS, "--no-smooth", "--no-fit", "--no-esr", *flags]
    assert invoke(cli.calibrate_app, model_folder, "--data", text_file, "--out", out, *flags).exit_code == 0
    artifact = read_artifact(out)
    assert artifact.header.config["flush_interval"] == interval and artifact.tuned_for is None
    assert QMambaConfig().flush_interval == 8
    for name in ("", "1", "8"):
        more = ["--flush-interval", name] if name else []
        arguments = ["--model", model_folder, "--text", text_file, "--length", "64", "--windows", "4", *more, "--json"]
        report = json.loads(invoke(cli.evaluate_app, *arguments).stdout.splitlines()[-1])
        assert report["flush_interval"] == int(name or 8)
        scored[name] = report["perplexity"]
    assert scored[""] == scored["8"] != scored["1"]


def test_weights_tuned_for_another_interval_are_told(calibrate, lively, tmp_path, caplog):
    artifact = calibrate()
    assert artifact.tuned_for == 8
    arguments = {"state_bits": 4, "weights": "int8", "state_scales": None, "rounding": "nearest"}
    arguments["calibration"] = str(tmp_path / "a.safetensors")
    models.quantize(lively(), **arguments)
    assert not caplog.records
    models.quantize(lively(), **arguments, flush_interval=1)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_single_step_needs_a_store_at_every_step(calibrate):
    esr = dataclasses.replace(SMALL.esr, trajectory="single-step")
    with pytest.raises(CalibrationError, match="use --flush-interval 1"):
        calibrate(options=dataclasses.replace(SMALL, esr=esr))
    assert calibrate(options=dataclasses.replace(SMALL, esr=esr, flush_interval=1)).tuned_for == 1


def test_the_backend_refuses_tuned_rows_that_it_would_not_apply(calibrate, lively, compiled, tokens, tmp_path):
    calibrate()
    for options in ({"weights": None}, {"skip_layers": ["backbone.layers.1"]}):
        model = compiled(lively(), calibration=str(tmp_path / "a.safetensors"), **options)
        with torch.no_grad(), pytest.raises(Exception, match="tuned rows are applied when their linear becomes int8"):
            model(tokens(2, 20), use_cache=True)


def test_the_same_seed_gives_the_same_artifact(calibrate):
    first, second = calibrate("a.safetensors"), calibrate("b.safetensors")
    assert first.digest == second.digest
    other = calibrate("c.safetensors", Options(**{**vars(SMALL), "seed": 1}))
    assert other.digest != first.digest


@pytest.mark.parametrize("stage", ["statistics", "state_scales", "smooth", "esr_000", "score_after", "artifact"])
def test_a_kill_at_any_stage_costs_nothing_but_it(calibrate, monkeypatch, tmp_path, stage):
    """Right after a stage's file has been written, and right before the artifact is."""
    whole = calibrate("whole.safetensors")
    save, replace = work.Work.save, os.replace

    def killed(self, name, *args):
        save(self, name, *args)
        if name == stage:
            raise KeyboardInterrupt

    def killed_before(source, target):
        if stage == "artifact" and str(target).endswith("a.safetensors"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(work.Work, "save", killed)
    monkeypatch.setattr(os, "replace", killed_before)
    with pytest.raises(KeyboardInterrupt):
        calibrate("a.safetensors")
    monkeypatch.undo()
    assert not (tmp_path / "a.safetensors").exists()
    assert calibrate("a.safetensors", resume=True).digest == whole.digest


def test_an_interrupted_run_says_how_to_go_on(model_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(Calibration, "_smooth", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    out = tmp_path / "a.safetensors"
    result = invoke(cli.calibrate_app, model_folder, "--data", text_file, "--out", out, *FLAGS)
    assert result.exit_code == 130 and "interrupted; the finished stages are kept" in result.stderr


def test_a_resumed_run_must_be_the_same_calibration(calibrate, monkeypatch):
    monkeypatch.setattr(Calibration, "_smooth", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        calibrate()
    monkeypatch.undo()
    other = Options(**{**vars(SMALL), "seed": 7})
    with pytest.raises(CalibrationError, match=r"another calibration \(options was .*start over without --resume"):
        calibrate(options=other, resume=True)
    assert calibrate(options=other).digest


def test_a_full_disk(calibrate, monkeypatch, tmp_path):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a.safetensors").write_bytes(b"what was there")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CalibrationError, match=r"cannot be written \(No space left on device\); free space"):
        calibrate()
    assert (tmp_path / "a.safetensors").read_bytes() == b"what was there"
    assert not list(tmp_path.rglob("*.partial"))


def test_no_room_for_activations(calibrate, monkeypatch):
    """Told when the file is made: a mapped page that finds no room would end the process without a word."""

    def full(descriptor, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CalibrationError, match=r"work/activations: cannot be written \(No space left on device\)"):
        calibrate(options=dataclasses.replace(SMALL, memory=0))


def test_a_place_where_no_folder_can_be(calibrate, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CalibrationError, match=r"cannot be written \(.*\); choose another --out$"):
        calibrate("file/a.safetensors")


def test_an_output_that_is_a_folder(calibrate, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArtifactError, match="folder: a folder; give the name of the file"):
        calibrate("folder")


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_a_learning_rate_that_is_none(calibrate, rate):
    esr = EsrOptions(learning_rate=rate)
    with pytest.raises(CalibrationError, match="--esr-lr"):
        calibrate(options=dataclasses.replace(SMALL, esr=esr))


def test_a_model_that_is_not_finite(calibrate, lively):
    model = lively()
    with torch.no_grad():
        model.backbone.layers[1].mixer.in_proj.weight[0] = torch.inf
    with pytest.raises(CalibrationError, match="the float model's perplexity is nan; check its weights"):
        calibrate(model=model)


def test_too_little_text(calibrate):
    with pytest.raises(DataError, match=r"windows of 64 tokens, and 8000 \+ 4 are wanted"):
        calibrate(options=Options(**{**vars(SMALL), "samples": 8000}))


# --- commands ------------------------------------------------------------------------------------------------------


def invoke(app, *arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_calibrate_and_eval(model_folder, text_file, tmp_path):
    out = tmp_path / "out" / "a.safetensors"
    result = invoke(cli.calibrate_app, model_folder, "--data", text_file, "--out", out, *FLAGS)
    assert result.exit_code == 0, result.output
    assert read_artifact(out).header.model_class == "Mamba2ForCausalLM"
    window = ["--length", "64", "--windows", "4"]
    reports = {}
    for name, flags in {
        "calibrated": ["--calibration", out],
        "dynamic": ["--calibration", out, "--state-scales", "dynamic"],
        "float": ["--state-bits", "none", "--weights", "none"],
        "8 bits": ["--state-bits", "8", "--weights", "none"],
    }.items():
        result = invoke(cli.evaluate_app, "--model", model_folder, "--text", text_file, *window, *flags, "--json")
        assert result.exit_code == 0, result.output
        reports[name] = json.loads(result.stdout.splitlines()[-1])
        assert reports[name]["tokens"] == 4 * (64 - 8)
    assert reports["calibrated"]["perplexity"] != reports["dynamic"]["perplexity"]
    assert reports["8 bits"]["perplexity"] == pytest.approx(reports["float"]["perplexity"], rel=1e-3)
    nats = torch.tensor(reports["float"]["perplexity"], dtype=torch.float64).log()
    assert reports["float"]["bits_per_byte"] == pytest.approx((nats / torch.tensor(2.0).log()).item())


def test_eval_is_the_code_length_of_the_text(model_folder, text_file, text):
    flags = ["--state-bits", "none", "--weights", "none", "--length", "64", "--windows", "1", "--json"]
    result = invoke(cli.evaluate_app, "--model", model_folder, "--text", text_file, *flags)
    ids = torch.tensor([list(text[:64])])
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        log = model(ids, use_cache=False).logits.log_softmax(-1)
    said = log[0, 7:-1].gather(1, ids[0, 8:, None])
    assert json.loads(result.stdout.splitlines()[-1])["perplexity"] == pytest.approx(
        said.mean().neg().exp().item(), rel=1e-4
    )


def test_commands_refuse_with_words(model_folder, text_file, tmp_path):
    out = tmp_path / "a.safetensors"
    llama = transformers.LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    transformers.LlamaForCausalLM(llama).save_pretrained(tmp_path / "llama")
    evaluation = ("--text", text_file, "--length", "64")
    cases = [
        (cli.calibrate_app, [tmp_path / "nowhere", "--data", text_file, "--out", out], ConfigError, "no such folder"),
        (
            cli.calibrate_app,
            [tmp_path / "llama", "--data", text_file, "--out", out],
            CalibrationError,
            "without a Mamba2",
        ),
        (cli.calibrate_app, [model_folder, "--data", "/no.txt", "--out", out], DataError, "no such file"),
        (
            cli.calibrate_app,
            [model_folder, "--data", text_file, "--out", out, "--state-bits", "5"],
            ConfigError,
            "use one",
        ),
        (
            cli.evaluate_app,
            ["--model", model_folder, *evaluation, "--state-scales", "calibrated"],
            ConfigError,
            "needs --calibration",
        ),
        (
            cli.evaluate_app,
            ["--model", model_folder, *evaluation, "--calibration", text_file],
            ArtifactError,
            "not a safetensors file",
        ),
    ]
    for app, arguments, error, message in cases:
        result = invoke(app, *arguments)
        assert isinstance(result.exception, error) and message in str(result.exception), result.exception
    assert not out.exists()


def test_what_overflowed_is_left_out_of_the_header(model_folder, text_file, tmp_path, monkeypatch):
    """Of the schemes tried, such a one is not chosen; the calibration used to fail at its last line."""
    out, score = tmp_path / "scales.safetensors", pipeline.score

    def first_overflows(*args, **kwargs):
        result = score(*args, **kwargs)
        scored.append(result)
        return dataclasses.replace(result, nats=result.nats * math.nan) if len(scored) == 2 else result

    scored = []
    monkeypatch.setattr(pipeline, "score", first_overflows)
    result = invoke(cli.calibrate_app, model_folder, "--data", text_file, "--out", out, *FLAGS, "--no-esr", "--no-fit")
    assert result.exit_code == 0, result.exception
    tried = [name for name in read_artifact(out).header.metrics_after if name.startswith("tried/state_scale")]
    assert len(tried) == len(pipeline.EXPONENTS) - 1


# --- several processes ---------------------------------------------------------------------------------------------


def launch(model_folder, text_file, out, *flags, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "calibrate", str(model_folder), "--data", str(text_file), "--out", str(out), *FLAGS, *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_two_processes_make_the_artifact_of_one(model_folder, text_file, tmp_path):
    """Statistics and scales are equal; the rows that ESR tunes differ by the order in which gradients add up."""
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    assert invoke(cli.calibrate_app, model_folder, "--data", text_file, "--out", one, *FLAGS).exit_code == 0
    process = launch(model_folder, text_file, two)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    expected, found = read_artifact(one), read_artifact(two)
    assert set(expected.tensors) == set(found.tensors)
    for key, tensor in expected.tensors.items():
        if key.endswith("weight_bcdt"):
            # AdamW's first steps are as long as the learning rate, whichever way a tiny gradient points.
            assert (found.tensors[key] - tensor).abs().mean() < 1e-4 * tensor.abs().mean()
        else:
            torch.testing.assert_close(found.tensors[key], tensor, rtol=1e-6, atol=0)
    for name, value in expected.header.metrics_after.items():
        assert found.header.metrics_after[name] == pytest.approx(value, rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_job_with_words(model_folder, text_file, tmp_path):
    import psutil

    out = tmp_path / "a.safetensors"
    process = launch(model_folder, text_file, out, "--esr-epochs", "500")
    deadline = time.monotonic() + 240
    while not (out.with_name("a.safetensors.work") / "smooth.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    workers = [child for child in psutil.Process(process.pid).children() if "calibrate" in " ".join(child.cmdline())]
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "--resume" in output
    assert not out.exists()


def test_sharing_gives_everything_once_and_in_order(monkeypatch):
    items = list(range(7))
    shares = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "world", lambda rank=rank: (rank, 3))
        shares.append(list(distributed.share(items)))
    assert sorted(item for part in shares for item in part) == items

    def gather(box, mine):
        box[:] = shares

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    assert distributed.gathered(shares[0]) == items


def test_three_bits_can_be_calibrated(calibrate):
    artifact = calibrate(options=Options(**{**vars(SMALL), "state_bits": 3, "weights": None, "esr": None}))
    assert all(key.endswith("state_scale") for key in artifact.tensors)
    assert Recurrence(3).bits == 3
