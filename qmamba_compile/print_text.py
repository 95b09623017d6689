"""What ``qmamba generate`` prints: text as tokens come, with the model's tokenizer or without one."""

from __future__ import annotations

import codecs
import functools
import sys
from typing import Any

import torch

from .command_line import folder_or_hub_name
from .errors import ConfigError


def text_codec(name: str, network: Any) -> tuple[Any, Any]:
    """(text -> ids, incremental (ids, final) -> text): the model's tokenizer, or bytes for a vocabulary of 256."""
    if network.config.vocab_size == 256:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda text: list(text.encode()), lambda ids, final=False: decoder.decode(bytes(ids), final)
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder_or_hub_name(name))
    except Exception as problem:
        raise ConfigError(
            f"--model {name}: no tokenizer, and the vocabulary is not bytes ({type(problem).__name__}: {problem})"
        ) from problem
    return tokenizer.encode, _TokenDecoder(tokenizer)


_LONGEST = 8
"""Tokens that are kept back for a character to become whole, and that the next is decoded behind; four make one."""


class _TokenDecoder:
    """Text of tokens as they come, for any tokenizer.

    A token is decoded behind those before it, since a leading space may be taken from the first; and not before the
    character is whole that it is a part of. transformers' TextStreamer keeps back more: whole words, and whatever code
    has between two spaces.
    """

    def __init__(self, tokenizer: Any) -> None:
        # What cleans up spaces takes back some that were printed.
        self._decode = functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)
        self._said: list[int] = []
        self._waiting: list[int] = []

    def __call__(self, ids: list[int], final: bool = False) -> str:
        self._waiting += ids
        text = self._decode(self._said + self._waiting)[len(self._decode(self._said)) :]
        whole = text != "" and not text.endswith("\N{REPLACEMENT CHARACTER}")
        if not (whole or final or len(self._waiting) >= _LONGEST):
            return ""
        self._said, self._waiting = self._waiting[-_LONGEST:], []
        return text


class Printer:
    """Streamer of `generate`: prints the prompt with the first token, when nothing can be refused any more."""

    def __init__(self, prompt: str, decode: Any) -> None:
        self._prompt = prompt
        self._decode = decode
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        text = self._decode(value.flatten().tolist(), self._is_prompt)
        if not self._is_prompt:
            sys.stdout.write(self._prompt + text)
            sys.stdout.flush()
            self._prompt = ""
        self._is_prompt = False

    def end(self) -> None:
        sys.stdout.write(self._decode([], True) + "\n")
