"""Text from files and data sets, as tokens and windows; every way in which it can be wrong has words."""

from __future__ import annotations

import errno
import json
import sys
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
import transformers
from typer.testing import CliRunner

from calibrate.cli import calibrate_app, evaluate_app
from calibrate.data import Tokens, cut_windows, read_documents, read_tokens, split_windows, spread
from calibrate.errors import DataError


def byte_model(vocab_size=256):
    return types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=vocab_size))


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["[UNK]", "</s>", "one", "two", "three"]
    model = tokenizers.models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


def test_a_text_is_its_bytes(text_file, text):
    tokens = read_tokens(str(text_file), "", byte_model())
    assert bytes(tokens.ids.tolist()) == text
    assert tokens.nbytes == len(text)
    assert tokens.digest == read_tokens(str(text_file), "", byte_model()).digest


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_of_a_file(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    rows = [{"text": "one", "other": "x"}, {"text": "zwei ä", "other": "y"}]
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    assert list(read_documents(str(path))) == [b"one", "zwei ä".encode()]
    assert list(read_documents(str(path), "other")) == [b"x", b"y"]
    with pytest.raises(DataError, match=r"no text in column 'body'.*\['other', 'text'\]"):
        list(read_documents(str(path), "body"))


def test_a_folder_is_a_data_set_or_refused(tmp_path):
    (tmp_path / "part.txt").write_text("one\ntwo\n")
    with pytest.raises(DataError, match="a folder without JSONL or Parquet files; give one text file"):
        list(read_documents(str(tmp_path)))
    for split in ("train", "test"):
        folder = tmp_path / "set" / split
        folder.mkdir(parents=True)
        (folder / "part.jsonl").write_text(json.dumps({"text": f"of {split}"}) + "\n")
    source = str(tmp_path / "set")
    assert list(read_documents(source)) == [b"of train"]
    assert list(read_documents(f"{source}@test")) == [b"of test"]
    with pytest.raises(DataError, match=r"set@other: cannot be read .*Bad split"):
        list(read_documents(f"{source}@other"))


def test_help_says_what_a_source_may_be():
    for application in (calibrate_app, evaluate_app):
        assert "[@split]" in CliRunner().invoke(application, ["--help"], env={"COLUMNS": "300"}).output


def test_a_tokenizer_marks_the_end_of_documents(tokenizer_folder, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one two"}\n{"text": ""}\n{"text": "three four"}\n')
    tokens = read_tokens(str(path), str(tokenizer_folder), byte_model(vocab_size=5))
    assert tokens.ids.tolist() == [2, 3, 1, 4, 0, 1]


def test_a_tokenizer_that_does_not_fit(tokenizer_folder, text_file):
    with pytest.raises(DataError, match="tokenizer has 5 tokens, and the model 3"):
        read_tokens(str(text_file), str(tokenizer_folder), byte_model(vocab_size=3))
    with pytest.raises(DataError, match=r"no tokenizer.*vocabulary of 300 is not bytes"):
        read_tokens(str(text_file), str(text_file.parent), byte_model(vocab_size=300))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere/text.txt", "no such file"),
        ("missing.jsonl", "no such file"),
        ("no-such-name/no-such-set", "cannot be reached"),
    ],
)
def test_a_source_that_is_not_there(source, message, monkeypatch):
    # Offline, whatever the machine has: the test must not wait for a hub.
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=message):
        list(read_documents(source))


def test_broken_and_empty_files(tmp_path):
    broken, empty = tmp_path / "broken.jsonl", tmp_path / "empty.txt"
    broken.write_text('{"text": "on')
    empty.write_text("")
    with pytest.raises(DataError, match=r"broken.jsonl: cannot be read"):
        list(read_documents(str(broken)))
    with pytest.raises(DataError, match="the text is empty"):
        read_tokens(str(empty), "", byte_model())


def test_rows_without_datasets(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n')
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"datasets is not installed.*pip install 'qmamba-compile\[calibrate\]'"):
        list(read_documents(str(path)))


def test_a_file_that_may_not_be_read(text_file, monkeypatch):
    def refused(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\)"):
        list(read_documents(str(text_file)))


def test_spread_windows():
    windows = torch.arange(20).view(10, 2)
    assert spread(windows, 3)[:, 0].tolist() == [0, 8, 18]
    assert torch.equal(spread(windows, 10), windows) and torch.equal(spread(windows, None), windows)


def test_windows_are_disjoint_and_drawn_by_seed():
    tokens = Tokens(torch.arange(1000), "numbers", "digest", 1000)
    first, second = split_windows(tokens, 10, (60, 30), seed=1)
    assert first.shape == (60, 10) and second.shape == (30, 10)
    assert len(set(first[:, 0].tolist()) | set(second[:, 0].tolist())) == 90
    assert torch.equal(first, split_windows(tokens, 10, (60, 30), seed=1)[0])
    assert not torch.equal(first, split_windows(tokens, 10, (60, 30), seed=2)[0])


def test_a_text_that_is_too_short():
    tokens = Tokens(torch.arange(95), "numbers", "digest", 95)
    with pytest.raises(DataError, match=r"9 windows of 10 tokens, and 8 \+ 2 are wanted"):
        split_windows(tokens, 10, (8, 2), seed=0)
    with pytest.raises(DataError, match="too short for one window of 96"):
        cut_windows(tokens, 96)
