"""Named model shapes: the published Mamba2 sizes and a tiny one, with random weights; and layers of other models."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

from qmamba_compile import ConfigError


@dataclasses.dataclass(frozen=True)
class Linear:
    """One kind of linear layer: ``count`` weights [out_features, in_features] in the model."""

    name: str
    in_features: int
    out_features: int
    count: int


@dataclasses.dataclass(frozen=True)
class Shape:
    """Dimensions of a Mamba2 model whose ``lm_head`` is tied to its embedding, as in the published checkpoints."""

    name: str
    d_model: int
    n_layers: int
    headdim: int = 64
    dstate: int = 128
    ngroups: int = 1
    chunk_size: int = 256
    vocab_size: int = 50288

    @property
    def d_inner(self) -> int:
        return 2 * self.d_model

    @property
    def nheads(self) -> int:
        return self.d_inner // self.headdim

    @property
    def conv_dim(self) -> int:
        return self.d_inner + 2 * self.ngroups * self.dstate

    @property
    def linears(self) -> tuple[Linear, ...]:
        in_proj = self.d_inner + self.conv_dim + self.nheads
        return (
            Linear("in_proj", self.d_model, in_proj, self.n_layers),
            Linear("out_proj", self.d_inner, self.d_model, self.n_layers),
            Linear("lm_head", self.d_model, self.vocab_size, 1),
        )

    def config(self) -> Any:
        """The transformers configuration of this shape, initialized as Mamba2 was for its training.

        transformers' own default of five times larger weights makes a model whose logits no quantization survives.
        """
        from transformers import Mamba2Config

        return Mamba2Config(
            vocab_size=self.vocab_size,
            hidden_size=self.d_model,
            num_hidden_layers=self.n_layers,
            num_heads=self.nheads,
            head_dim=self.headdim,
            state_size=self.dstate,
            n_groups=self.ngroups,
            chunk_size=self.chunk_size,
            initializer_range=0.02,
            rescale_prenorm_residual=True,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )

    def build(self, seed: int = 0) -> Any:
        """``Mamba2ForCausalLM`` with random float32 weights, ready for inference."""
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        torch.manual_seed(seed)
        return transformers.Mamba2ForCausalLM(self.config()).eval().requires_grad_(False)


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("tiny", 128, 2, dstate=32, chunk_size=32, vocab_size=256),
        Shape("130m", 768, 24),
        Shape("370m", 1024, 48),
        Shape("780m", 1536, 48),
        Shape("1.3b", 2048, 48),
        Shape("2.7b", 2560, 64),
    )
}

STEP_SHAPES: dict[str, Shape] = SHAPES | {
    shape.name: shape
    for shape in (
        Shape("codestral-7b", 4096, 64, ngroups=8, vocab_size=32768),
        # The Mamba2 layers of Nemotron-H-8B; its attention and MLP layers are not counted.
        Shape("nemotron-h-8b", 4096, 24, ngroups=8, vocab_size=131072),
    )
}
"""Shapes of which one step is counted or measured, layer by layer; those not in `SHAPES` are not built as a model."""


@functools.cache
def shape_named(name: str) -> Shape:
    """The shape of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in SHAPES:
        raise ConfigError(f"--shape {name!r} is unknown; allowed: {', '.join(SHAPES)}")
    return SHAPES[name]


def cache_name(model: Any) -> str:
    """What a Mamba2 model calls the cache that it takes and returns: transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "cache_params"
