"""A model as a row of blocks: run a part of it on activations that are kept between the parts.

The model's own forward calls every block, so each family gets the masks, positions and embeddings it wants. Blocks
before the part are stood in for by what they would have returned, and the run ends behind the part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import CalibrationError
from .recurrence import mixers


class _PartDone(Exception):  # noqa: N818  no error: the way out of a forward
    """The part has run; carries the output of its last block."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class Blocks:
    """The blocks of a model, and partial runs over them.

    Attributes:
        model: the whole model.
        names: module path of each block.
        mixer: block index -> module path of its Mamba2 layer; other blocks are absent.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        layers = mixers(model)
        if not layers:
            raise CalibrationError(
                f"{type(model).__name__} has no Mamba2 layer (none of its modules has A_log, in_proj and transformers' "
                "mamba2_chunk_scan); give a Mamba2 model or a hybrid of one"
            )
        path = next(iter(layers))
        while path and not isinstance(model.get_submodule(path), nn.ModuleList):
            path = path.rpartition(".")[0]
        stack = model.get_submodule(path)
        if not isinstance(stack, nn.ModuleList) or not all(name.startswith(f"{path}.") for name in layers):
            raise CalibrationError(
                f"{type(model).__name__}: its Mamba2 layers are not in one ModuleList: {list(layers)}"
            )
        self.names = [f"{path}.{index}" for index in range(len(stack))]
        self._width: dict[int, int] = {}
        self.mixer = {
            index: layer
            for index, name in enumerate(self.names)
            for layer in layers
            if layer == name or layer.startswith(name + ".")
        }

    def block(self, index: int) -> nn.Module:
        """The module of a block."""
        return self.model.get_submodule(self.names[index])

    def run(self, ids: Tensor, hidden: Tensor | None, start: int, stop: int) -> Tensor:
        """Output [b, l, d] of block ``stop - 1``, when ``hidden`` [b, l, d] enters block ``start``.

        Args:
            ids: [b, l] tokens; their embedding enters when ``hidden`` is ``None``.
        """

        def finish(module: nn.Module, args: Any, output: Any) -> None:
            raise _PartDone(output[0] if isinstance(output, tuple) else output)

        with self._standing_in(ids, hidden, start):
            return self._run_to(stop - 1, ids, self.block(stop - 1).register_forward_hook(finish))

    def embed(self, ids: Tensor) -> Tensor:
        """What enters the first block, [b, l, d]."""

        def finish(module: nn.Module, args: Any, kwargs: Any) -> None:
            raise _PartDone(args[0] if args else kwargs["hidden_states"])

        return self._run_to(0, ids, self.block(0).register_forward_pre_hook(finish, with_kwargs=True))

    def _run_to(self, index: int, ids: Tensor, hook: RemovableHandle) -> Tensor:
        """What the hook of a block, which ends the run, has taken out of it."""
        try:
            self.model(ids, use_cache=False)
        except _PartDone as part:
            return part.hidden
        finally:
            hook.remove()
        raise CalibrationError(f"{self.names[index]}: the model's forward does not call this block")

    def logits(self, ids: Tensor, hidden: Tensor, start: int) -> Tensor:
        """Logits [b, l, vocab] when ``hidden`` enters block ``start``; behind the last one, it enters the head."""
        with self._standing_in(ids, hidden, start):
            return self.model(ids, use_cache=False).logits

    @contextlib.contextmanager
    def _standing_in(self, ids: Tensor, hidden: Tensor | None, start: int) -> Iterator[None]:
        if hidden is None:
            yield
            return
        if not self._width:
            self._probe(ids)
        with contextlib.ExitStack() as stack:
            for index in range(start):
                block = self.block(index)
                block.forward = _returning(hidden, self._width[index])
                stack.callback(block.__dict__.pop, "forward")
            yield

    def _probe(self, ids: Tensor) -> None:
        """Learn which blocks return their output bare and which as the first of several."""

        def see(index: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                self._width[index] = len(output) if isinstance(output, tuple) else 0

            return hook

        handles = [self.block(index).register_forward_hook(see(index)) for index in range(len(self.names))]
        try:
            with torch.no_grad():
                self.model(ids[:1, :1], use_cache=False)
        finally:
            for handle in handles:
                handle.remove()


def _returning(hidden: Tensor, width: int) -> Callable[..., Any]:
    return lambda *args, **kwargs: (hidden, *[None] * (width - 1)) if width else hidden
