"""The command line: what it prints, what it refuses, and with which words."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
import transformers
from typer.testing import CliRunner

from qmamba_compile import __main__ as cli
from qmamba_compile import errors, print_kernel, print_report, print_text
from qmamba_compile.cpu_templates.specs import KERNELS, LAYER_KERNELS
from qmamba_compile.report import Report

BUNDLED = Path(__file__).parents[1] / "demo" / "tiny-mamba2"
runner = CliRunner()


def invoke(*args: str):
    return runner.invoke(cli.app, list(args), catch_exceptions=True)


@pytest.fixture(scope="module")
def toy():
    result = invoke("explain", "--model", "toy", "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_explain_counts_what_the_toy_model_has(toy):
    prefill, decode = toy["graphs"]
    assert (prefill["phase"], decode["phase"]) == ("prefill", "decode")
    counts = {name: (p["found"], p["rewritten"]) for name, p in prefill["passes"].items()}
    # Two layers, each with a scan and in_proj and out_proj; one lm_head.
    assert counts == {
        "fuse_chunk_scan": (2, 2),
        "quantize_state": (2, 2),
        "fuse_ssm_update": (0, 0),
        "apply_tuned_conv": (0, 0),
        "fuse_conv_update": (0, 0),
        "fuse_causal_conv": (2, 2),
        "quantize_linear": (5, 5),
        "fuse_norm_linear": (5, 5),
        "fuse_residual": (2, 2),
        "hoist_decay": (2, 2),
    }
    assert decode["passes"]["fuse_conv_update"]["rewritten"] == 2
    assert decode["passes"]["fuse_ssm_update"]["rewritten"] == 2


def test_explain_gives_bytes_before_and_after(toy):
    state, weights = toy["bytes"]["state_per_sequence"], toy["bytes"]["weights"]
    # Two layers of 4 heads, headdim 64, dstate 64: 4 bytes an element before, 4.5 bits and 16 bytes a sequence after;
    # and a ring: seven slots of x and B in 16 bits and 4 sums, and a position.
    ring = 7 * (2 * 4 * 64 + 2 * 64 + 4 * 4) + 4
    assert state["before"] == 2 * 4 * 64 * 64 * 4
    assert state["after"] == 2 * (4 * 64 * 64 // 2 + 2 * 4 * (64 + 64) + 16 + ring)
    linears = sum(g["passes"]["quantize_linear"]["bytes_before"] for g in toy["graphs"][:1])
    assert weights["before"] - weights["after"] > 0.7 * linears


@pytest.mark.parametrize(
    "variables, arguments, share",
    [
        ({}, (), 27656),
        ({"STATE_BITS": "8"}, (), 44040),
        ({"STATE_BITS": "8"}, ("--state-bits", "4"), 27656),
        # Without a ring.
        ({}, ("--flush-interval", "1"), 2 * (4 * 64 * 64 // 2 + 2 * 4 * (64 + 64) + 16)),
        ({"FLUSH_INTERVAL": "1"}, (), 2 * (4 * 64 * 64 // 2 + 2 * 4 * (64 + 64) + 16)),
        ({"FLUSH_INTERVAL": "1"}, ("--flush-interval", "8"), 27656),
        ({"STATE_BITS": "None"}, (), 131072),
        ({"QUANTIZE_STATE": "0"}, (), 131072),
        ({"SKIP_LAYERS": "backbone.layers.0"}, (), 27656 // 2 + 131072 // 2),
    ],
)
def test_explain_follows_the_variables_and_counts_what_the_cache_holds(monkeypatch, variables, arguments, share):
    for name, value in variables.items():
        monkeypatch.setenv(f"QMAMBA_{name}", value)
    result = invoke("explain", "--model", "toy", "--json", *arguments)
    assert json.loads(result.stdout)["bytes"]["state_per_sequence"] == {"before": 131072, "after": share}


def test_render_follows_the_variables(monkeypatch):
    monkeypatch.setenv("QMAMBA_FLUSH_INTERVAL", "1")
    monkeypatch.setenv("QMAMBA_ROUNDING", "stochastic")
    assert (
        "ssm_update_p64_n128_b4_dynamic_stochastic_portable"
        in invoke("render", "ssm_update", "--target", "portable").stdout
    )


def test_strict_accepts_what_skip_layers_names(monkeypatch):
    monkeypatch.setenv("QMAMBA_SKIP_LAYERS", "lm_head")
    result = invoke("explain", "--model", "toy", "--strict")
    assert result.exit_code == 0 and "lm_head alone" in result.stdout


def test_explain_prints_brackets_as_they_are(capsys):
    report = Report()
    report.skipped("layer", errors.SkipReason.UNKNOWN_STRUCTURE, "shape [3], not [b, h, p, n] nor [/b]")
    print_report.print_reports([report], {})
    assert "shape [3], not [b, h, p, n] nor [/b]" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "--model", "toy", "--prompt", "x", "--seed", "-1"),
        ("generate", "--model", "toy", "--prompt", "x", "--seed", str(2**64)),
        ("render", "w8a8_linear", "--target", "sm_90", "--k", "0"),
        ("render", "w8a8_linear", "--target", "sm_90", "--rows", "-1"),
    ],
)
def test_numbers_out_of_range_are_named(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2 and arguments[-2] in result.output


def test_explain_prints_a_table_of_passes():
    result = invoke("explain", "--model", "toy", "--state-bits", "8", "--weights", "none")
    assert result.exit_code == 0, result.output
    assert "fuse_ssm_update" in result.stdout and "state of one sequence" in result.stdout


def test_strict_refuses_a_model_without_a_mamba2_layer(tmp_path):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    relaxed = invoke("explain", "--model", str(tmp_path))
    assert relaxed.exit_code == 0 and "no Mamba2 layer" in relaxed.stdout
    assert isinstance(invoke("explain", "--model", str(tmp_path), "--strict").exception, errors.StrictError)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("explain", "--model", "./nowhere"), ("./nowhere", "no such folder")),
        (("explain", "--model", "toy", "--state-bits", "3"), ("state_bits=3", "8, 4, 2")),
        (("explain", "--model", "toy", "--weights", "int4"), ("weights='int4'", "int8")),
        (("explain", "--model", "toy", "--state-scales", "calibrated"), ("calibration", "qmamba calibrate")),
        (("explain", "--model", "toy", "--state-bits", "²"), ("state_bits='²'", "8, 4, 2")),
        (("explain", "--model", "toy", "--flush-interval", "3"), ("flush_interval=3", "1, 2, 4, 8, 16")),
        (("generate", "--model", "toy", "--prompt", "x", "--flush-interval", "3"), ("flush_interval=3",)),
        (("generate", "--model", "toy", "--prompt", ""), ("--prompt",)),
        (("generate", "--model", "toy", "--prompt", "caf\udce9"), ("--prompt", "UTF-8")),
        (("render", "ssm_updat"), ("ssm_updat", "ssm_update")),
        (("render", "ssm_update", "--dstate", "95"), ("dstate=95", "4 bits")),
    ],
)
def test_bad_input_is_named(args, words):
    problem = invoke(*args).exception
    assert isinstance(problem, errors.QMambaError)
    assert all(word in str(problem) for word in words), str(problem)


def test_render_prints_the_kernel_of_the_spec():
    source = invoke("render", "ssm_update", "--headdim", "32", "--dstate", "64", "--target", "portable").stdout
    assert "ssm_update_p32_n64_b4_dynamic_nearest_L8_bfloat16_portable" in source


def test_env_shows_versions_and_overrides(monkeypatch):
    monkeypatch.setenv("QMAMBA_STATE_BITS", "8")
    output = invoke("env").stdout
    assert "torch" in output and "state_bits=8" in output


def byte_tokens():
    """As GPT-NeoX's: a token is a part of a character."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def pieces():
    """As SentencePiece's: a word begins with its space, which the first one of a text loses in decoding."""
    vocabulary = ["<unk>", "▁", "n", "o", "k", "ok", "▁n", "▁ok", "é", "漢"]
    vocabulary += [f"<0x{byte:02X}>" for byte in range(256)]
    merges = [("▁", "n"), ("o", "k"), ("▁", "ok")]
    model = tokenizers.models.BPE({piece: i for i, piece in enumerate(vocabulary)}, merges, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


@pytest.mark.parametrize("make", [byte_tokens, pieces, None], ids=["byte-level", "pieces", "bytes"])
def test_text_is_printed_as_it_is(tmp_path, monkeypatch, make):
    """Characters of several tokens are whole, spaces stay, nothing waits that is complete, and the end is no loss."""
    vocab_size = 256 if make is None else 600
    if make is not None:
        transformers.PreTrainedTokenizerFast(tokenizer_object=make()).save_pretrained(tmp_path)
    encode, decode = print_text.text_codec(
        str(tmp_path), SimpleNamespace(config=SimpleNamespace(vocab_size=vocab_size))
    )
    prompt, text = "né", " 漢 ok()\n ok 😀!"
    ids = encode(prompt + text)
    start = len(encode(prompt))
    printed = io.StringIO()
    monkeypatch.setattr(sys, "stdout", printed)
    printer = print_text.Printer(prompt, decode)
    printer.put(torch.tensor([ids[:start]]))
    seen = []
    for token in ids[start:]:
        printer.put(torch.tensor([token]))
        seen.append(printed.getvalue())
    assert seen[-1] == prompt + text
    assert all((prompt + text).startswith(part) for part in seen)
    # Before ")" comes; TextStreamer would wait for a space.
    assert prompt + " 漢 ok(" in seen
    printer.put(torch.tensor([encode("😀")[-4]]))
    printer.end()
    assert printed.getvalue() == prompt + text + "\N{REPLACEMENT CHARACTER}\n"


def test_a_token_is_decoded_behind_a_few(tmp_path):
    """However long the prompt is, and however long no character becomes whole."""
    transformers.PreTrainedTokenizerFast(tokenizer_object=byte_tokens()).save_pretrained(tmp_path)
    encode, decode = print_text.text_codec(str(tmp_path), SimpleNamespace(config=SimpleNamespace(vocab_size=600)))
    decode(encode("a" * 1000), True)
    lengths, plain = [], decode._decode

    def counted(ids):
        lengths.append(len(ids))
        return plain(ids)

    decode._decode = counted
    said = "".join(decode(encode("😀")[:1]) for _ in range(100))
    assert max(lengths) <= 16 and said.count("\N{REPLACEMENT CHARACTER}") >= 90


def test_an_interrupted_generation_says_so(monkeypatch):
    def interrupted(self, ids, *, streamer, **options):
        streamer.put(ids)
        streamer.put(torch.tensor([33]))
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.Mamba2ForCausalLM, "generate", interrupted)
    result = invoke("generate", "--model", "toy", "--prompt", "hello")
    assert result.exit_code == 130 and result.stdout == "hello!\n"


def test_generate_compiles_with_its_options(monkeypatch):
    given = {}
    monkeypatch.setattr(transformers.Mamba2ForCausalLM, "compile", lambda self, **settings: given.update(settings))
    monkeypatch.setattr(transformers.Mamba2ForCausalLM, "generate", lambda self, ids, **settings: None)
    invoke("generate", "--model", "toy", "--prompt", "x", "--flush-interval", "1", "--rounding", "stochastic")
    assert given["options"]["flush_interval"] == 1 and given["options"]["rounding"] == "stochastic"


def test_explain_refuses_a_model_without_a_cache(tmp_path):
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path)
    problem = invoke("explain", "--model", str(tmp_path)).exception
    assert isinstance(problem, errors.ConfigError) and "no cache" in str(problem)


@pytest.mark.slow
def test_generate_streams_text_and_errors_are_one_line():
    environment = {**os.environ, "QMAMBA_INNER_BACKEND": "eager"}
    command = [sys.executable, "-m", "qmamba_compile"]
    good = subprocess.run(
        [*command, "generate", "--model", str(BUNDLED), "--prompt", "def main(", "--max-new-tokens", "20"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert good.returncode == 0, good.stderr
    assert good.stdout.startswith("def main(") and len(good.stdout) >= 29
    bad = subprocess.run([*command, "explain", "--model", "./nowhere"], capture_output=True, text=True)
    assert bad.returncode == 2 and "Traceback" not in bad.stderr and "no such folder" in bad.stderr


def test_render_prints_a_triton_kernel():
    result = invoke("render", "ssm_update", "--target", "sm_90", "--state-scales", "calibrated")
    assert result.exit_code == 0, result.output
    compile(result.stdout, "rendered", "exec")
    assert "lop3.b32" in result.stdout and "p64_n128_b4_calibrated_nearest" in result.stdout


@pytest.mark.parametrize("kernel", print_kernel.GPU_KERNELS)
def test_render_prints_every_gpu_kernel(kernel):
    result = invoke("render", kernel, "--target", "gfx942")
    assert result.exit_code == 0, result.output
    compile(result.stdout, "rendered", "exec")
    assert kernel.removeprefix("norm_") in result.stdout.splitlines()[0] and "gfx942" in result.stdout.splitlines()[0]


@pytest.mark.parametrize("kernel", (*KERNELS, *LAYER_KERNELS))
def test_render_prints_every_cpu_kernel(kernel):
    result = invoke("render", kernel, "--target", "avx2")
    assert result.exit_code == 0, result.output
    assert kernel in result.stdout.splitlines()[0] and f'extern "C" void {kernel}' in result.stdout


def test_help_of_render_names_every_kernel():
    said = invoke("render", "--help").output
    of_cpu, _, of_gpu_alone = " ".join(word.strip("│ ") for word in said.split()).partition("Of a GPU, also")
    assert all(kernel in of_cpu for kernel in (*KERNELS, *LAYER_KERNELS))
    for kernel in print_kernel.GPU_ONLY:
        assert kernel in of_gpu_alone
        assert isinstance(invoke("render", kernel, "--target", "avx2").exception, errors.ConfigError)


@pytest.mark.parametrize("interval, steps", [("1", []), ("8", ["a step that only reads", "a step that stores"])])
def test_render_says_what_the_compiler_made_of_it(interval, steps):
    scheme = ("--state-scales", "calibrated", "--flush-interval", interval)
    result = invoke("render", "ssm_update", "--target", "sm_90", *scheme, "--stats")
    assert result.exit_code == 0, result.output
    assert "registers of a thread" in result.stdout and "16-byte loads of a warp" in result.stdout
    assert all(step in result.stdout for step in steps) and result.stdout.count("spilled bytes") == max(1, len(steps))


def test_render_prints_by_default_what_runs_by_default():
    assert "nearest_L8_bfloat16" in invoke("render", "ssm_update").stdout.splitlines()[0]
    assert "nearest_every8" in invoke("render", "ssm_update", "--target", "sm_90").stdout.splitlines()[0]
    assert "_L" not in invoke("render", "quantize_state").stdout.splitlines()[0]


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["ssm_update", "--target", "sm_70"], "sm_70"),
        (["ssm_update", "--target", "sm_"], "sm_"),
        (["ssm_update", "--rounding", "up"], "rounding='up'"),
        (["ssm_update", "--state-scales", "static"], "state_scales='static'"),
        (["ssm_scam", "--target", "sm_90"], "ssm_scam"),
        (["conv_update", "--target", "sm_90", "--stats"], "conv_update"),
        (["ssm_update", "--stats"], "--stats"),
        (["ssm_update", "--flush-interval", "3"], "flush_interval=3"),
        (["ssm_update", "--target", "gfx942", "--dstate", "20"], "dstate=20"),
        (
            ["ssm_update", "--target", "sm_90", "--dstate", "1", "--bits", "4", "--state-scales", "calibrated"],
            "dstate=1",
        ),
        (["dequantize_state", "--target", "sm_90", "--dstate", "1", "--bits", "4"], "dstate=1"),
    ],
)
def test_render_refuses(arguments, named):
    result = invoke("render", *arguments)
    assert isinstance(result.exception, errors.ConfigError) and named in str(result.exception)
