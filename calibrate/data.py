"""Text for calibration and evaluation: files, data sets, tokens, and the windows that are cut from them."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmamba_compile.command_line import folder_or_hub_name

from .errors import DataError

BYTES = 256
"""A vocabulary of this size is bytes: no tokenizer is needed."""

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A text as one row of tokens.

    Attributes:
        ids: [l] int64.
        source: where it came from, in words.
        digest: sha256 of the ids.
        nbytes: bytes of the text in UTF-8, for bits per byte.
    """

    ids: Tensor
    source: str
    digest: str
    nbytes: int


def read_tokens(source: str, model_path: str, model: Any, *, field: str = "text", limit: int | None = None) -> Tokens:
    """Read a text and turn it into tokens of ``model``.

    Args:
        source: a text file, a JSONL or Parquet file with a column ``field``, or a data set ``name[:config][@split]``,
            whose name may be a folder of such files.
        model_path: folder or hub name where the model's tokenizer is.
        limit: read only so much of a data set as gives this many tokens, about.

    Raises:
        DataError: it cannot be read, is empty, or the tokenizer does not fit.
    """
    encode = _encoder(model_path, model)
    ids: list[Tensor] = []
    nbytes = count = 0
    for document in read_documents(source, field):
        ids.append(encode(document))
        nbytes += len(document)
        count += len(ids[-1])
        if limit is not None and count >= limit:
            break
    if count == 0:
        raise DataError(f"{source}: the text is empty; give a file or data set with some text in it")
    joined = torch.cat(ids)
    largest = int(joined.max())
    if largest >= model.config.vocab_size:
        raise DataError(
            f"{model_path}: the tokenizer gives token {largest}, and the model has {model.config.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )
    digest = hashlib.sha256(joined.numpy().tobytes()).hexdigest()
    return Tokens(joined, f"{source}, {count} tokens", digest, nbytes)


def read_documents(source: str, field: str = "text") -> Iterator[bytes]:
    """UTF-8 texts of a file or data set, one after the other.

    Raises:
        DataError: it is neither, cannot be reached, or has no such column.
    """
    path, folder = Path(source).expanduser(), Path(_parts(source)[0]).expanduser()
    if path.is_file() and path.suffix not in _READERS:
        try:
            yield path.read_bytes()
        except OSError as problem:
            raise DataError(
                f"{source}: cannot be read ({problem.strerror}); give a file that you may read"
            ) from problem
        return
    if folder.is_dir() and not any(file.suffix in _READERS for file in folder.rglob("*")):
        # The library would take its texts line by line, without the line breaks, and leave out those named like a test.
        raise DataError(f"{source}: a folder without JSONL or Parquet files; give one text file, joined from several")
    is_there = path.exists() or folder.is_dir()
    if not is_there and (source.startswith((".", "/", "~")) or path.suffix in (*_READERS, ".txt", ".md", ".py")):
        raise DataError(f"{source}: no such file; give a text, JSONL or Parquet file, or the name of a data set")
    for row in _rows(source, path):
        if field not in row or not isinstance(row[field], str):
            raise DataError(f"{source}: no text in column {field!r}; it has {sorted(row)}: choose one by --text-field")
        yield row[field].encode()


def _parts(source: str) -> tuple[str, str, str]:
    """Name, configuration and split of a data set; empty where not given."""
    name, _, split = source.partition("@")
    name, _, config = name.partition(":")
    return name, config, split


def _rows(source: str, path: Path) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError as problem:
        raise DataError(
            f"{source}: datasets is not installed ({problem}); give a text file, or "
            "pip install 'qmamba-compile[calibrate]'"
        ) from problem
    datasets.disable_progress_bars()
    name, config, split = _parts(source)
    name = os.path.expanduser(name)
    is_local = path.is_file() or os.path.isdir(name)
    try:
        # Streamed, so that nothing is copied to a cache and only what is used is read.
        if path.is_file():
            yield from datasets.load_dataset(_READERS[path.suffix], data_files=str(path), split="train", streaming=True)
            return
        yield from datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except DataError:
        raise
    except Exception as problem:
        # The library raises some twenty classes for a bad file, a wrong name and an unreachable hub.
        kind = "cannot be read" if is_local else "is no local file, and the data set cannot be reached"
        raise DataError(
            f"{source}: {kind} ({type(problem).__name__}: {str(problem).splitlines()[0]}); "
            "give a local text, JSONL or Parquet file, or name[:config][@split] of a data set"
        ) from problem


def _encoder(model_path: str, model: Any) -> Any:
    """bytes -> [l] int64 tokens: bytes themselves, or the model's tokenizer."""
    if model.config.vocab_size == BYTES:
        return lambda text: (
            torch.frombuffer(bytearray(text), dtype=torch.uint8).long() if text else torch.zeros(0).long()
        )
    tokenizer = load_tokenizer(model_path, model)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(text: bytes) -> Tensor:
        # Documents follow one another in a row: the end of one is marked.
        ids = tokenizer(text.decode(errors="replace"), add_special_tokens=False)["input_ids"]
        return torch.tensor([*ids, *(end if ids else [])], dtype=torch.int64)

    return encode


def load_tokenizer(model_path: str, model: Any) -> Any:
    """The tokenizer beside a model.

    Raises:
        DataError: there is none, or it has more tokens than the model.
    """
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder_or_hub_name(model_path))
    except Exception as problem:
        raise DataError(
            f"{model_path}: no tokenizer ({type(problem).__name__}: {str(problem).splitlines()[0]}), and a vocabulary "
            f"of {model.config.vocab_size} is not bytes; save the tokenizer beside the model"
        ) from problem
    if len(tokenizer) > model.config.vocab_size:
        raise DataError(
            f"{model_path}: the tokenizer has {len(tokenizer)} tokens, and the model {model.config.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )
    return tokenizer


def cut_windows(tokens: Tokens, length: int) -> Tensor:
    """All windows [w, length] of a text, one after the other without overlap.

    Raises:
        DataError: the text is shorter than one window.
    """
    count = len(tokens.ids) // length
    if count == 0:
        raise DataError(f"{tokens.source}: too short for one window of {length}; give more text, or lower --length")
    return tokens.ids[: count * length].view(count, length)


def spread(windows: Tensor, count: int | None) -> Tensor:
    """``count`` of the windows [w, l], evenly over the text; all where there are no more, or for ``None``."""
    if count is None or count >= len(windows):
        return windows
    return windows[torch.linspace(0, len(windows) - 1, count).long()]


def split_windows(tokens: Tokens, length: int, counts: tuple[int, ...], seed: int) -> tuple[Tensor, ...]:
    """Disjoint sets of windows, drawn at random from all over the text.

    Raises:
        DataError: the text has fewer windows than asked for.
    """
    windows = cut_windows(tokens, length)
    if len(windows) < sum(counts):
        raise DataError(
            f"{tokens.source}: {len(windows)} windows of {length} tokens, and {' + '.join(map(str, counts))} are "
            "wanted; give more text, or lower --samples, --validation or --length"
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[: sum(counts)]
    return tuple(windows[part] for part in order.split(counts))
