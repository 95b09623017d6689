"""Tiny models on disk, text for them, and scans of random inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

DEMO = Path(__file__).parents[2] / "demo"


@pytest.fixture(scope="session")
def text():
    """40,000 bytes of Python."""
    return (DEMO / "heldout.txt").read_bytes()[:40_000]


@pytest.fixture(scope="session")
def text_file(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "sample.txt"
    path.write_bytes(text)
    return path


@pytest.fixture(scope="session")
def windows(text):
    """[16, 96] bytes."""
    return torch.frombuffer(bytearray(text[: 16 * 96]), dtype=torch.uint8).long().view(16, 96)


@pytest.fixture(scope="session")
def bundled():
    """The bundled model."""
    return transformers.AutoModelForCausalLM.from_pretrained(DEMO / "tiny-mamba2").eval().requires_grad_(False)


@pytest.fixture(scope="session")
def lively(make_model):
    """A tiny random model whose B, C and dt matter: at its initial size they hardly do."""

    def make(**changes):
        model = make_model(**changes)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("in_proj.weight"):
                    parameter *= 8
        return model

    return make


@pytest.fixture(scope="session")
def model_folder(lively, tmp_path_factory):
    """A tiny random byte model, saved."""
    folder = tmp_path_factory.mktemp("model")
    lively().save_pretrained(folder)
    return folder
