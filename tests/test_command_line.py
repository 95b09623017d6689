"""What command lines share: which errors become one line, with which status, and which models are refused."""

import shutil
import types
from pathlib import Path

import pytest

from calibrate.data import load_tokenizer
from qmamba_compile.artifact import read_artifact
from qmamba_compile.command_line import load_pretrained, readable_errors, version_of
from qmamba_compile.config import QMambaConfig
from qmamba_compile.errors import ConfigError, StrictError
from qmamba_compile.print_text import text_codec

BUNDLED = Path(__file__).parents[1] / "demo" / "tiny-mamba2"


class WrappedError(Exception):
    """As torch wraps what a backend raises."""

    def __init__(self, inner):
        super().__init__("backend='qmamba' raised")
        self.inner_exception = inner


@pytest.mark.parametrize(
    "problem, status",
    [(ConfigError("shape [3]"), 2), (StrictError("shape [3]"), 1), (WrappedError(ConfigError("shape [3]")), 2)],
    ids=["config", "strict", "wrapped"],
)
def test_errors_of_ours_are_one_line(monkeypatch, capsys, problem, status):
    monkeypatch.delenv("QMAMBA_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as end, readable_errors():
        raise problem
    assert end.value.code == status
    assert capsys.readouterr().err.rstrip().endswith("Error: shape [3]")


@pytest.mark.parametrize(
    "problem", [RuntimeError("a mistake"), WrappedError(RuntimeError("a mistake"))], ids=["own", "wrapped"]
)
def test_other_errors_keep_their_traceback(monkeypatch, problem):
    monkeypatch.delenv("QMAMBA_TRACEBACK", raising=False)
    with pytest.raises(type(problem)), readable_errors():
        raise problem


def test_the_variable_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("QMAMBA_TRACEBACK", "1")
    with pytest.raises(ConfigError), readable_errors():
        raise ConfigError("shape [3]")


@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "~/nowhere/at/all", ""])
def test_a_folder_that_is_not_there(name):
    with pytest.raises(ConfigError, match=f"{name}: no such folder"):
        load_pretrained(name)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    """For the tokenizer and the artifact, too, not for the weights alone."""
    import tokenizers
    import transformers

    monkeypatch.setenv("HOME", str(tmp_path))
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "one": 1}, unk_token="[UNK]"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "model")
    model = types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=300))
    encode, _ = text_codec("~/model", model)
    assert encode("one") == [1]
    assert len(load_tokenizer("~/model", model)) == 2
    shutil.copy(BUNDLED / "calibration.safetensors", tmp_path / "scales.safetensors")
    assert read_artifact("~/scales.safetensors").source == str(tmp_path / "scales.safetensors")
    assert QMambaConfig(calibration="~/scales.safetensors").calibration == str(tmp_path / "scales.safetensors")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_pretrained(str(tmp_path))


@pytest.mark.parametrize("damage", [b"", b"{", b"\0" * 100])
def test_a_model_whose_file_is_damaged(tmp_path, damage):
    shutil.copy(BUNDLED / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(damage)
    with pytest.raises(ConfigError, match=r"cannot be loaded \(SafetensorError: "):
        load_pretrained(str(tmp_path))


def test_versions():
    assert version_of("torch") and version_of("no-such-package") is None
