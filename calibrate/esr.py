"""ESR, efficient selectivity reconstruction: tune what makes B, C and dt to a quantized state (Q-Mamba, section 4.2).

Block after block: a block's input is what the quantized blocks before it give, its target what the float model has at
that place. Learnable are the last rows of ``in_proj``; x and z stay frozen. Gradients go straight through
requantization, along the exact quantized trajectory or, as in the paper, through single steps from a float one.

A block keeps its new weights only if they win on the validation samples, by perplexity of the whole model.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import distributed
from .activations import Activations
from .blocks import Blocks
from .evaluate import PROMPT, standard_error, window_nats
from .learned_scale import LearnedScale
from .quantized_model import TunedLinear, W8A8Linear, bcdt_rows, set_module
from .recurrence import Recurrence, Run, float_scan, replaced
from .work import Work


@dataclasses.dataclass(frozen=True)
class EsrOptions:
    """How ESR trains.

    Attributes:
        trajectory: ``"exact"``, the recurrence that decode runs, or ``"single-step"``, the paper's simulation.
        learn: what is tuned: rows of ``in_proj`` (``"in_proj"``), and ``"state_scale"`` with them.
        loss: mean square error of the ``"block"``'s output or of the ``"mixer"``'s, or ``"model"``: how far the model's
            prediction is from the float one (Kullback-Leibler), which takes the blocks behind into every step.
        learning_rate: of AdamW, weight decay 0.
        schedule: ``"constant"`` as in the paper, or ``"cosine"`` to zero.
        epochs, batch: passes over the samples, samples a step.
        margin: standard errors by which new weights must win on the validation samples.
    """

    trajectory: str = "exact"
    learn: tuple[str, ...] = ("in_proj",)
    loss: str = "block"
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    epochs: int = 3
    batch: int = 8
    margin: float = 1.0


PAPER = EsrOptions(trajectory="single-step", schedule="constant")


@dataclasses.dataclass(frozen=True)
class BlockResult:
    """What ESR did to a block.

    Attributes:
        layer: the Mamba2 layer that was tuned.
        loss_first, loss_last: over the first and over the last epoch, relative to the mean square of the target, or in
            nats a token (``"model"``); ``None`` where it was not finite.
        nats_before, nats_after: of the validation samples by the whole quantized model, with old and with new weights.
        kept: the new weights stay.
        note: why not, where it is not plain.
    """

    layer: str
    loss_first: float | None
    loss_last: float | None
    nats_before: float
    nats_after: float | None
    kept: bool
    note: str = ""


class Reconstruction:
    """One run of ESR over a model.

    Attributes:
        tuned: artifact key -> tensor, of the blocks that kept theirs.
        results: one for each Mamba2 layer.
    """

    def __init__(
        self,
        model: Any,
        quantized: Any,
        recurrence: Recurrence,
        options: EsrOptions,
        samples: Tensor,
        validation: Tensor,
        *,
        smooth: Mapping[str, Tensor] | None,
        seed: int,
        work: Work,
        memory_limit: int,
    ) -> None:
        """Prepare; `run` does the work.

        Args:
            model: the float model. ``quantized``: its `quantized_copy`, which is changed as blocks are tuned.
            recurrence: of the quantized state; its state_scale is changed when it is learned.
            samples, validation: windows [w, l].
            smooth: linear -> SmoothQuant factors of the int8 linears, or ``None``.
            memory_limit: bytes of activations to hold in memory, in each of four sets.
        """
        self.float_blocks, self.blocks = Blocks(model), Blocks(quantized)
        self.recurrence, self.options = recurrence, options
        self.smooth, self.seed, self.work, self.memory_limit = smooth or {}, seed, work, memory_limit
        self.device = next(model.parameters()).device
        rank, size = distributed.world()
        self.count = len(samples)
        self.sample_ids, self.validation_ids = samples[rank::size], validation[rank::size]
        self.tuned: dict[str, Tensor] = {}
        self.results: list[BlockResult] = []

    def run(self, advance: Callable[[str, int], None] = lambda text, steps: None) -> None:
        """Tune every block, or take over what an interrupted run has finished.

        Args:
            advance: called with what is being tuned and the number of optimizer steps that are done.
        """
        float_hidden = self._embedded(self.sample_ids)
        hidden = self._embedded(self.sample_ids)
        validation = self._embedded(self.validation_ids)
        nats: Tensor | None = None
        for index in range(len(self.blocks.names)):
            layer = self.blocks.mixer.get(index)
            if layer is not None:
                done = self.work.load(f"esr_{index:03}")
                if done is None:
                    nats = self._validate(validation, index) if nats is None else nats
                    result, tensors, nats = self._tune(index, layer, hidden, float_hidden, validation, nats, advance)
                    self.work.save(f"esr_{index:03}", {**tensors, "nats": nats}, dataclasses.asdict(result))
                else:
                    tensors, result = done[0], BlockResult(**done[1])
                    nats = tensors.pop("nats")
                    self._install(layer, tensors)
                    advance(layer, self.steps_per_block)
                self.results.append(result)
                self.tuned.update(tensors)
            self._advance(self.float_blocks, float_scan, self.sample_ids, float_hidden, index)
            self._advance(self.blocks, self.recurrence, self.sample_ids, hidden, index)
            self._advance(self.blocks, self.recurrence, self.validation_ids, validation, index)

    @property
    def steps_per_block(self) -> int:
        """Optimizer steps for one layer."""
        return self.options.epochs * math.ceil(self.count / self.options.batch)

    # --- activations -----------------------------------------------------------------------------------------------

    def _batches(self, ids: Tensor) -> Iterator[Tensor]:
        yield from torch.arange(len(ids)).split(self.options.batch)

    def _room(self, ids: Tensor, width: int) -> Activations:
        return Activations((len(ids), ids.shape[1], width), self.work.folder, self.memory_limit)

    @torch.no_grad()
    def _embedded(self, ids: Tensor) -> Activations:
        width = self.float_blocks.embed(torch.zeros(1, 1, dtype=torch.int64, device=self.device)).shape[-1]
        room = self._room(ids, width)
        for batch in self._batches(ids):
            room[batch] = self.float_blocks.embed(ids[batch].to(self.device))
        return room

    @torch.no_grad()
    def _advance(self, blocks: Blocks, run: Run, ids: Tensor, hidden: Activations, index: int) -> None:
        """Replace what enters block ``index`` by what leaves it."""
        with replaced(blocks.model, run):
            for batch in self._batches(ids):
                entered = hidden[batch].to(self.device)
                hidden[batch] = blocks.run(ids[batch].to(self.device), entered, index, index + 1)

    def _output(self, blocks: Blocks, run: Run, ids: Tensor, hidden: Tensor, index: int) -> Tensor:
        """Output of block ``index``, or of its mixer, [b, l, d] float32."""
        seen: list[Tensor] = []
        mixer = blocks.model.get_submodule(blocks.mixer[index])
        handle = mixer.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            with replaced(blocks.model, run):
                out = blocks.run(ids.to(self.device), hidden.to(self.device), index, index + 1)
        finally:
            handle.remove()
        return (seen[0] if self.options.loss == "mixer" else out).float()

    @torch.no_grad()
    def _validate(self, validation: Activations, index: int) -> Tensor:
        """Code length of every validation window by the quantized model, from block ``index`` on: [w] float64."""
        nats = []
        with replaced(self.blocks.model, self.recurrence):
            for batch in self._batches(self.validation_ids):
                ids = self.validation_ids[batch].to(self.device)
                logits = self.blocks.logits(ids, validation[batch].to(self.device), index)
                nats += window_nats(logits, ids, PROMPT).cpu()
        return torch.stack(distributed.gathered(nats))

    # --- one block -------------------------------------------------------------------------------------------------

    def _tune(
        self,
        index: int,
        layer: str,
        hidden: Activations,
        float_hidden: Activations,
        validation: Activations,
        nats: Tensor,
        advance: Callable[[str, int], None],
    ) -> tuple[BlockResult, dict[str, Tensor], Tensor]:
        """Train one block and decide; what is kept, and the validation windows' code lengths after it."""
        model, path = self.blocks.model, f"{layer}.in_proj"
        rows = bcdt_rows(model.get_submodule(layer))
        old, original = model.get_submodule(path), self.float_blocks.model.get_submodule(path)
        int8 = isinstance(old, W8A8Linear)
        tuned = TunedLinear(original.weight, original.bias, rows, int8=int8, smooth=self.smooth.get(path))
        run: Any = dataclasses.replace(self.recurrence, single_step=self.options.trajectory == "single-step")
        parameters = [tuned.rows]
        if "state_scale" in self.options.learn:
            run = LearnedScale(run, layer)
            parameters.append(run.log_scale)
        set_module(model, path, tuned)
        try:
            first, last = self._train(index, layer, parameters, run, hidden, float_hidden, advance)
        finally:
            set_module(model, path, old)
        tensors = {f"{path}.weight_bcdt": tuned.rows.detach().cpu()}
        if "state_scale" in self.options.learn:
            tensors[f"{layer}.state_scale"] = run.scale().cpu()
        mean = nats.mean().item()
        if not math.isfinite(last):
            note = f"loss {last}: lower the learning rate"
            return BlockResult(layer, _finite(first), None, mean, mean, False, note), {}, nats
        undo = self._install(layer, tensors)
        after = self._validate(validation, index)
        gain = nats - after
        # NaN compares as False: it never wins.
        kept = bool(gain.mean() > self.options.margin * standard_error(gain))
        result = BlockResult(layer, first, last, mean, _finite(after.mean().item()), kept)
        if kept:
            return result, tensors, after
        undo()
        return result, {}, nats

    def _install(self, layer: str, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
        """Put tuned tensors into the quantized model and its recurrence; returns what takes them out again."""
        model, recurrence, undo = self.blocks.model, self.recurrence, []
        path = f"{layer}.in_proj"
        rows = tensors.get(f"{path}.weight_bcdt")
        if rows is not None:
            old, original = model.get_submodule(path), self.float_blocks.model.get_submodule(path)
            weight = torch.cat([original.weight[: -len(rows)], rows.to(original.weight)]).detach()
            if isinstance(old, W8A8Linear):
                new: nn.Module = W8A8Linear(weight, original.bias, smooth=old.smooth, act_scale=old.act_scale)
            else:
                new = copy.deepcopy(original)
                new.weight = nn.Parameter(weight, requires_grad=False)
            set_module(model, path, new)
            undo.append(lambda: set_module(model, path, old))
        scale = tensors.get(f"{layer}.state_scale")
        if scale is not None and recurrence.state_scale is not None:
            scales = {**recurrence.state_scale, layer: scale.to(self.device)}
            self.recurrence = dataclasses.replace(recurrence, state_scale=scales)
            undo.append(lambda: setattr(self, "recurrence", recurrence))
        return lambda: [step() for step in undo] and None

    def _train(
        self,
        index: int,
        layer: str,
        parameters: list[nn.Parameter],
        run: Run,
        hidden: Activations,
        float_hidden: Activations,
        advance: Callable[[str, int], None],
    ) -> tuple[float, float]:
        """Mean loss over the first and over the last epoch, relative to the mean square of the target.

        Every process works on its own samples of a step; their gradients are added up, so that all take the same step.
        """
        rank, size = distributed.world()
        options = self.options
        optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
        steps = self.steps_per_block
        if options.schedule == "cosine":
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator = torch.Generator().manual_seed(self.seed * 10007 + index)
        losses: list[float] = []
        for epoch in range(options.epochs):
            sums = torch.zeros(2, dtype=torch.float64)
            for batch in torch.randperm(self.count, generator=generator).split(options.batch):
                optimizer.zero_grad()
                mine = batch[batch % size == rank] // size
                if len(mine):
                    error, size_of_target = self._loss(index, run, mine, hidden, float_hidden)
                    # A mean over the whole step's samples, whichever process has them.
                    (error / len(batch)).backward()
                    sums += torch.tensor([error.item(), size_of_target], dtype=torch.float64)
                gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
                distributed.sum_(gradients)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                if not all(gradient.isfinite().all() for gradient in gradients):
                    return losses[0] if losses else math.nan, math.nan
                optimizer.step()
                if options.schedule == "cosine":
                    schedule.step()
                advance(f"{layer}, epoch {epoch + 1}", 1)
            distributed.sum_([sums])
            losses.append((sums[0] / sums[1]).item())
        return losses[0], losses[-1]

    def _loss(
        self, index: int, run: Run, mine: Tensor, hidden: Activations, float_hidden: Activations
    ) -> tuple[Tensor, float]:
        """Loss summed over samples ``mine`` [b], a mean over everything else, and what it is relative to."""
        ids, entered, float_entered = self.sample_ids[mine], hidden[mine], float_hidden[mine]
        if self.options.loss != "model":
            with torch.no_grad():
                target = self._output(self.float_blocks, float_scan, ids, float_entered, index)
            error = (self._output(self.blocks, run, ids, entered, index) - target).square()
            return error.flatten(1).mean(dim=1).sum(), target.double().square().flatten(1).mean(dim=1).sum().item()
        ids = ids.to(self.device)
        with torch.no_grad(), replaced(self.float_blocks.model, float_scan):
            logits = self.float_blocks.logits(ids, float_entered.to(self.device), index).float()
        with replaced(self.blocks.model, run):
            said = self.blocks.logits(ids, entered.to(self.device), index).float()
        divergence = F.kl_div(said.log_softmax(-1), logits.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        return divergence.mean(dim=1).sum(), float(len(mine))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
