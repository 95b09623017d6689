"""Ways to run a whole model: eager, Inductor, torchao under Inductor, and this project's backend.

Variants share the weights they can share: one float32 model, one in bfloat16, one of torchao, one with our int8
weights of each. Each gets a compiled graph of its own.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qmamba_compile import ConfigError, DSQState, QMambaConfig
from qmamba_compile.passes.int8_weight import held_nbytes
from qmamba_compile.passes.parameter_forms import forms_of

from . import cli
from .shapes import Shape, cache_name

FREEZING = "freezing"
"""Key of `Variant.options` for Inductor: constants are folded and weights prepacked (``torch._inductor.config``)."""

_PROMPT = 16


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run a model.

    Attributes:
        weights: attribute of `Models`, shared by the variants that name it.
        backend: ``None`` (eager), ``inductor`` or ``qmamba``.
        tolerance: allowed error of the logits against eager float32 (`measure.Gate`).
        options: those of `QMambaConfig` for qmamba, `FREEZING` for Inductor.
    """

    name: str
    weights: str
    backend: str | None
    tolerance: float
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def arithmetic(self) -> str:
        """dtype of the products: ``int8``, ``bfloat16`` or ``float32``."""
        return self.weights if self.weights in ("float32", "bfloat16") else "int8"


EAGER = "eager-float32"
INDUCTOR = "inductor-float32"
TORCHAO = "torchao-int8-freezing"
OURS_FLOAT = "ours-float32"
OURS = "ours-w8a8h4"

# About twice the error at 130m with random weights, whose logits no training has made robust: 0.034 for bfloat16, 0.15
# for torchao, 0.16 for ours with any state. An output that has nothing to do with the reference has an error of 1.4.
_EXACT, _HALF, _INT8 = 1e-4, 0.07, 0.35

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant(EAGER, "float32", None, 0.0),
        Variant(INDUCTOR, "float32", "inductor", _EXACT),
        Variant("inductor-float32-freezing", "float32", "inductor", _EXACT, {FREEZING: True}),
        Variant("inductor-bfloat16", "bfloat16", "inductor", _HALF),
        Variant(TORCHAO, "torchao", "inductor", _INT8, {FREEZING: True}),
        Variant(OURS_FLOAT, "float32", "qmamba", _EXACT, {"weights": None, "state_bits": None}),
        Variant("ours-w8a8", "int8", "qmamba", _INT8, {"state_bits": None}),
        Variant("ours-w8a8h8", "int8", "qmamba", _INT8, {"state_bits": 8, "flush_interval": 1}),
        Variant(OURS, "int8", "qmamba", _INT8),
        Variant("ours-w8a8h4-bfloat16", "int8_of_bfloat16", "qmamba", _INT8),
        Variant("ours-w8a8h4-flush1", "int8", "qmamba", _INT8, {"flush_interval": 1}),
        Variant(
            "ours-w8a8h4-flush1-stochastic",
            "int8",
            "qmamba",
            _INT8,
            {"flush_interval": 1, "rounding": "stochastic"},
        ),
    )
}

AGAINST = (INDUCTOR, TORCHAO, OURS_FLOAT)
"""What the issue asks to be compared with."""


def with_options(texts: Sequence[str]) -> dict[str, Variant]:
    """All variants, and with ``texts`` (``name=value``) one more: `OURS` with these options of `QMambaConfig`.

    Raises:
        ConfigError: an option or its value is not allowed.
    """
    if not texts:
        return VARIANTS
    options = dict(VARIANTS[OURS].options)
    fields = {field.name: field.default for field in dataclasses.fields(QMambaConfig)}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in fields:
            raise ConfigError(f"--option {text!r} is not allowed; use name=value with one of {', '.join(fields)}")
        options[name] = tuple(value.split(",")) if isinstance(fields[name], tuple) else _value(value)
    config = QMambaConfig.from_options(options)
    name = f"{OURS}[{','.join(texts)}]"
    # Not shared: skip_layers or a calibration make other weights.
    weights = "float32" if config.weights is None else "int8_alone"
    return VARIANTS | {name: Variant(name, weights, "qmamba", _INT8, options)}


def choose(text: str, known: Mapping[str, Variant], unusual: Sequence[str] = ()) -> list[str]:
    """`cli.choose` among `with_options`; what has options of its own runs whether it is named or not."""
    names = cli.choose(text, known, unusual)
    return names + [name for name in known if name not in VARIANTS and name not in names]


def _value(text: str) -> Any:
    constants = {"none": None, "true": True, "false": False}
    if text.lower() in constants:
        return constants[text.lower()]
    return int(text) if text.lstrip("-").isdigit() else text


class Models:
    """The models of one shape, one for each kind of weights, made when first asked for."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    @functools.cached_property
    def float32(self) -> Any:
        return self.shape.build()

    @functools.cached_property
    def bfloat16(self) -> Any:
        return copy.deepcopy(self.float32).to(torch.bfloat16)

    @functools.cached_property
    def torchao(self) -> Any:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        model = copy.deepcopy(self.float32)
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        return model

    @functools.cached_property
    def int8(self) -> Any:
        # The backend puts int8 weights in place of the float ones when it first compiles this model.
        return copy.deepcopy(self.float32)

    @functools.cached_property
    def int8_of_bfloat16(self) -> Any:
        return copy.deepcopy(self.bfloat16)

    @functools.cached_property
    def int8_alone(self) -> Any:
        return copy.deepcopy(self.float32)


class Runner:
    """One variant of one shape: prefill, one decode step, and the caches they work on."""

    def __init__(self, variant: Variant, models: Models, dynamic: bool | None = False) -> None:
        self.variant = variant
        self.model = getattr(models, variant.weights)
        self.shape = models.shape
        self._cache_name = cache_name(self.model)
        self._options = dict(variant.options)
        self._freezing = bool(self._options.get(FREEZING))
        if variant.backend is None:
            self._compiled = self.model
        elif variant.backend == "inductor":
            # As an option too: graphs of one model are told apart by their backend and its options.
            self._compiled = torch.compile(self.model, dynamic=dynamic, options=self._options or None)
        else:
            self._compiled = torch.compile(self.model, backend="qmamba", dynamic=dynamic, options=self._options)

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Where first calls belong: Dynamo asks Inductor's global setting whether weights are to be frozen."""
        with torch._inductor.config.patch(freezing=self._freezing):
            yield

    def prefill(self, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """Logits [b, vocab] behind ``ids`` [b, l], and the cache, as `generate` would run it."""
        output = self._compiled(input_ids=ids, use_cache=True, logits_to_keep=1, **{self._cache_name: cache})
        return output.logits[:, -1], output[self._cache_name]

    def step(self, ids: Tensor, cache: Any) -> Tensor:
        """Logits [b, vocab] behind one more token ``ids`` [b, 1]; the cache is updated in place."""
        return self._compiled(input_ids=ids, use_cache=True, **{self._cache_name: cache}).logits[:, -1]

    def cache(self, batch: int) -> Any:
        """A cache of ``batch`` sequences behind the same short prompt."""
        cache = copy.deepcopy(self._prompted)
        cache.reorder_cache(torch.zeros(batch, dtype=torch.long))
        return cache

    @functools.cached_property
    def _prompted(self) -> Any:
        """Made without Inductor, which would take as long to compile prefill as decode: only its values matter."""
        ids = random_ids(self.shape, 1, _PROMPT, seed=1)
        forward = self.model
        if self.variant.backend == "qmamba":
            forward = torch.compile(self.model, backend="qmamba", options={**self._options, "inner_backend": "eager"})
        return forward(input_ids=ids, use_cache=True, logits_to_keep=1)[self._cache_name]

    @property
    def held_bytes(self) -> int:
        """Bytes of all parameters in the form in which they are held."""
        return held_nbytes(self.model)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that one forward reads: all that are held, of the embedding only if it is the head too."""
        embedding, head = self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight
        is_head = head is embedding and next(forms_of(embedding), None) is None
        return self.held_bytes - (0 if is_head else embedding.nbytes)


def random_ids(shape: Shape, batch: int, length: int, seed: int) -> Tensor:
    """Token ids [batch, length] that never are the padding token."""
    return torch.randint(1, shape.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def states(cache: Any) -> list[Tensor]:
    """Every SSM and convolution state that a cache holds."""
    return [
        tensor
        for layer in cache.layers
        for held in (layer.recurrent_states, layer.conv_states)
        for tensor in held.values()
    ]


def state_bytes(cache: Any) -> int:
    """Bytes of all states as they are held."""
    return sum(state.packed_nbytes if isinstance(state, DSQState) else state.nbytes for state in states(cache))


def restore(cache: Any, saved: Any) -> None:
    """Put the values of ``saved``, a deep copy made earlier, back into the tensors of ``cache``."""
    for target, source in zip(states(cache), states(saved), strict=True):
        target.copy_(source)


def linear_ops(model: nn.Module, rows: int) -> int:
    """Operations (two a multiply-add) of all linears of ``model`` on ``rows`` rows."""
    return sum(2 * rows * m.in_features * m.out_features for m in model.modules() if isinstance(m, nn.Linear))
