"""ESR, efficient selectivity reconstruction: tune what makes B, C and dt to a quantized state (Q-Mamba, section 4.2).

Block after block: a block's input is what the quantized blocks before it give, its target what the float model has at
that place. Learnable are the last rows of ``in_proj`` and the last channels of ``conv1d``; x and z stay frozen.
Gradients go straight through the rounding of a state, but not past its clamping or its measured channel_scale
(`scan_ops.StateStore.pass_through` has the rule), along the exact quantized trajectory or, as in the paper, through
single steps from a float one.

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
from .quantized_model import TunedConv, TunedLinear, W8A8Linear, bc_channels, bcdt_rows, set_module
from .recurrence import Recurrence, Run, float_scan, replaced
from .work import Work

LEARNABLE = ("in_proj", "conv1d", "state_scale")


@dataclasses.dataclass(frozen=True)
class EsrOptions:
    """How ESR trains.

    Attributes:
        trajectory: ``"exact"``, the recurrence that decode runs, or ``"single-step"``, the paper's simulation.
        learn: what is tuned, of `LEARNABLE`: the rows of ``in_proj`` that make B, C and dt, the channels of ``conv1d``
            that carry B and C, and ``state_scale``.
        loss: mean square error of the ``"block"``'s output or of the ``"mixer"``'s; or ``"model"``: all layers at once,
            by how far the model's prediction is from the float one (Kullback-Leibler). That takes the whole model's
            activations for one step's samples, and as many block runs as the others.
        learning_rate: of AdamW, weight decay 0.
        schedule: ``"cosine"`` to zero, or ``"constant"``, whose last steps are as noisy as the first: on the bundled
            model, H4 fully static, the paper's recipe recovers 34 % of the gap with the one, 2 to 18 % with the other.
        epochs, batch: passes over the samples, samples a step. Small steps are many.
        margin: standard errors by which new weights must win on the validation samples.
    """

    trajectory: str = "exact"
    learn: tuple[str, ...] = ("in_proj",)
    loss: str = "block"
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    epochs: int = 3
    batch: int = 2
    margin: float = 1.0


TOGETHER = "all layers"

FRACTIONS = (1.0, 0.5, 0.25)
"""Of the way from the old weights to the trained ones, what is tried on the validation samples. Straight-through
gradients are noisy: of a step, its noise costs by its square, what it gains goes by its length.
"""

PAPER = EsrOptions(trajectory="single-step", learning_rate=1e-3)
"""What is known of the paper's recipe: AdamW, weight decay 0, a rate of 1e-3, 128 samples, a few epochs.

It says nothing of the schedule or of the samples a step. At a constant rate and one sample a step the loss grows.
"""


@dataclasses.dataclass(frozen=True)
class BlockResult:
    """What ESR did to a block.

    Attributes:
        layer: the Mamba2 layer that was tuned, or `TOGETHER`.
        loss_first, loss_last: over the first and over the last epoch, relative to the mean square of the target, or in
            nats a token (``"model"``); ``None`` where it was not finite.
        nats_before, nats_after: of the validation samples by the whole quantized model, with old and with new weights.
        kept: the new weights stay.
        fraction: of the way to the trained weights that was best; nats_after is there.
        note: why not, where it is not plain.
    """

    layer: str
    loss_first: float | None
    loss_last: float | None
    nats_before: float
    nats_after: float | None
    kept: bool
    note: str = ""
    fraction: float = 1.0


Outcome = tuple[BlockResult, dict[str, Tensor], Tensor]
"""The result, what is kept by artifact key, and the code lengths of the validation windows from then on."""


class Reconstruction:
    """One run of ESR over a model.

    Attributes:
        tuned: artifact key -> tensor, of the blocks that kept theirs.
        results: one for each Mamba2 layer; or one altogether.
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
            memory_limit: bytes of activations to hold in memory, in each of three sets.
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
        if self.options.loss == "model":
            self._take_over("esr_all", lambda: self._tune_together(advance))
            return
        float_hidden = self._embedded(self.float_blocks, self.sample_ids)
        hidden = self._embedded(self.blocks, self.sample_ids)
        validation = self._embedded(self.blocks, self.validation_ids)
        nats: Tensor | None = None
        for index in range(len(self.blocks.names)):
            layer = self.blocks.mixer.get(index)
            if layer is not None:
                before = nats

                def tune(index: int = index, layer: str = layer, before: Tensor | None = before) -> Outcome:
                    nats = self._validate(validation, index) if before is None else before
                    return self._tune(index, layer, hidden, float_hidden, validation, nats, advance)

                nats, resumed = self._take_over(f"esr_{index:03}", tune)
                if resumed:
                    advance(layer, self.steps_per_layer)
            self._advance(self.float_blocks, float_scan, self.sample_ids, float_hidden, index)
            self._advance(self.blocks, self.recurrence, self.sample_ids, hidden, index)
            self._advance(self.blocks, self.recurrence, self.validation_ids, validation, index)

    def _take_over(self, stage: str, tune: Callable[[], Outcome]) -> tuple[Tensor, bool]:
        """The outcome of ``tune``, or of an interrupted run: noted, kept on disk, and in the model.

        Returns the code lengths of the validation windows, and whether an interrupted run had it.
        """
        done = self.work.load(stage)
        if done is None:
            result, tensors, nats = tune()
            self.work.save(stage, {**tensors, "nats": nats}, dataclasses.asdict(result))
        else:
            tensors, result = done[0], BlockResult(**done[1])
            nats = tensors.pop("nats")
            self._install(tensors)
        self.results.append(result)
        self.tuned.update(tensors)
        return nats, done is not None

    @property
    def steps_per_layer(self) -> int:
        """Optimizer steps for one layer."""
        return self.options.epochs * math.ceil(self.count / self.options.batch)

    # --- activations -----------------------------------------------------------------------------------------------

    def _batches(self, ids: Tensor) -> Iterator[Tensor]:
        yield from torch.arange(len(ids)).split(self.options.batch)

    def _room(self, ids: Tensor, width: int) -> Activations:
        return Activations((len(ids), ids.shape[1], width), self.work.folder, self.memory_limit)

    @torch.no_grad()
    def _embedded(self, blocks: Blocks, ids: Tensor) -> Activations:
        width = blocks.embed(torch.zeros(1, 1, dtype=torch.int64, device=self.device)).shape[-1]
        room = self._room(ids, width)
        for batch in self._batches(ids):
            room[batch] = blocks.embed(ids[batch].to(self.device))
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
        nats: list[Tensor] = []
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
    ) -> Outcome:
        """Train one block and decide."""

        def loss_of(run: Run, mine: Tensor) -> tuple[Tensor, float]:
            ids = self.sample_ids[mine]
            with torch.no_grad():
                target = self._output(self.float_blocks, float_scan, ids, float_hidden[mine], index)
            error = (self._output(self.blocks, run, ids, hidden[mine], index) - target).square()
            return error.flatten(1).mean(dim=1).sum(), target.double().square().flatten(1).mean(dim=1).sum().item()

        trained = self._train([layer], loss_of, index, advance)
        return self._decide(layer, *trained, nats, lambda: self._validate(validation, index))

    def _tune_together(self, advance: Callable[[str, int], None]) -> Outcome:
        """Train all layers at once by the model's prediction, and decide."""
        validation = self._embedded(self.blocks, self.validation_ids)

        def loss_of(run: Run, mine: Tensor) -> tuple[Tensor, float]:
            ids = self.sample_ids[mine].to(self.device)
            with torch.no_grad(), replaced(self.float_blocks.model, float_scan):
                target = self.float_blocks.model(ids, use_cache=False).logits.float().log_softmax(-1)
            with replaced(self.blocks.model, run):
                said = self.blocks.model(ids, use_cache=False).logits.float().log_softmax(-1)
            divergence = F.kl_div(said, target, reduction="none", log_target=True).sum(-1)
            return divergence.mean(dim=1).sum(), float(len(mine))

        nats = self._validate(validation, 0)
        trained = self._train(list(self.blocks.mixer.values()), loss_of, 0, advance)
        return self._decide(TOGETHER, *trained, nats, lambda: self._validate(validation, 0))

    def _decide(
        self, layer: str, tensors: dict[str, Tensor], losses: list[float], nats: Tensor, validate: Callable[[], Tensor]
    ) -> Outcome:
        """Keep trained tensors only if they win."""
        mean = nats.mean().item()
        first, last = _finite(losses[0]), _finite(losses[-1])
        if last is None:
            note = "the loss was not finite: lower the learning rate"
            return BlockResult(layer, first, None, mean, mean, False, note), {}, nats
        tried: dict[float, Tensor] = {}
        for fraction in FRACTIONS:
            undo = self._install(self._towards(tensors, fraction))
            tried[fraction] = validate()
            undo()
        best = min(tried, key=lambda fraction: _finite(tried[fraction].mean().item()) or math.inf)
        after, gain = tried[best], nats - tried[best]
        # NaN compares as False: it never wins.
        kept = bool(gain.mean() > self.options.margin * standard_error(gain))
        result = BlockResult(layer, first, last, mean, _finite(after.mean().item()), kept, fraction=best)
        if not kept:
            return result, {}, nats
        tensors = self._towards(tensors, best)
        self._install(tensors)
        return result, tensors, after

    def _towards(self, tensors: Mapping[str, Tensor], fraction: float) -> dict[str, Tensor]:
        """``fraction`` of the way from what the model has to ``tensors``; of a scale, in its logarithm."""
        found = {}
        for key, tensor in tensors.items():
            path, _, kind = key.rpartition(".")
            if kind == "state_scale":
                assert self.recurrence.state_scale is not None
                old = self.recurrence.state_scale[path].to(tensor)
                found[key] = old * (tensor / old) ** fraction
            else:
                old = self.float_blocks.model.get_submodule(path).get_parameter(kind.removesuffix("_bcdt"))
                found[key] = old[-len(tensor) :].to(tensor).lerp(tensor, fraction)
        return found

    def _install(self, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
        """Put tuned tensors into the quantized model and its recurrence; returns what takes them out again."""
        model, recurrence = self.blocks.model, self.recurrence
        replaced_modules: dict[str, nn.Module] = {}
        for key, tensor in tensors.items():
            path, _, kind = key.rpartition(".")
            if kind == "state_scale":
                scales = {**(self.recurrence.state_scale or {}), path: tensor.to(self.device)}
                self.recurrence = dataclasses.replace(self.recurrence, state_scale=scales)
                continue
            name = kind.removesuffix("_bcdt")
            old, original = model.get_submodule(path), self.float_blocks.model.get_submodule(path)
            whole = original.get_parameter(name)
            whole = torch.cat([whole[: -len(tensor)], tensor.to(whole)]).detach()
            if isinstance(old, W8A8Linear):
                new: nn.Module = W8A8Linear(whole, original.bias, smooth=old.smooth, act_scale=old.act_scale)
            else:
                new = copy.deepcopy(old)
                setattr(new, name, nn.Parameter(whole, requires_grad=False))
            replaced_modules.setdefault(path, old)
            set_module(model, path, new)

        def undo() -> None:
            self.recurrence = recurrence
            for path, module in replaced_modules.items():
                set_module(model, path, module)

        return undo

    def _train(
        self,
        layers: list[str],
        loss_of: Callable[[Run, Tensor], tuple[Tensor, float]],
        number: int,
        advance: Callable[[str, int], None],
    ) -> tuple[dict[str, Tensor], list[float]]:
        """Tensors by artifact key, and the mean loss of every epoch; NaN in the last place when it was not finite.

        Args:
            loss_of: (recurrence, samples [b]) -> loss summed over the samples, and the size of what it is relative to.
            number: of this training, for its order of samples.
        """
        model, tensors = self.blocks.model, dict[str, nn.Parameter]()
        run: Any = dataclasses.replace(self.recurrence, single_step=self.options.trajectory == "single-step")

        def at(step: int) -> Run:
            """Noise of a step's own: tokens at the same place of two samples have the same."""
            return run.with_seed(self.recurrence.seed + step)

        modules = {
            f"{layer}.{name}": self._tuned(layer, name, tensors)
            for layer in layers
            for name in ("in_proj", "conv1d")
            if name in self.options.learn
        }
        before = {path: model.get_submodule(path) for path in modules}
        parameters = list(tensors.values())
        if "state_scale" in self.options.learn:
            run = LearnedScale(run, layers)
            parameters += run.log_scale.values()
        try:
            for path, tuned in modules.items():
                set_module(model, path, tuned)
            losses = self._descend(parameters, lambda mine, step: loss_of(at(step), mine), number, layers[0], advance)
        finally:
            for path, module in before.items():
                set_module(model, path, module)
        found = {key: rows.detach().cpu() for key, rows in tensors.items()}
        if isinstance(run, LearnedScale):
            found |= {f"{layer}.state_scale": run.scale(layer).cpu() for layer in layers}
        return found, losses

    def _tuned(self, layer: str, name: str, tensors: dict[str, nn.Parameter]) -> nn.Module:
        """The trainable stand-in of ``in_proj`` or ``conv1d``; its parameters join ``tensors`` by artifact key."""
        path, mixer = f"{layer}.{name}", self.blocks.model.get_submodule(layer)
        original = self.float_blocks.model.get_submodule(path)
        if name == "in_proj":
            int8 = isinstance(mixer.in_proj, W8A8Linear)
            smooth = self.smooth.get(path)
            tuned = TunedLinear(original.weight, original.bias, bcdt_rows(mixer), int8=int8, smooth=smooth)
            tensors[f"{path}.weight_bcdt"] = tuned.rows
            return tuned
        channels = TunedConv(original.weight, original.bias, bc_channels(mixer))
        tensors[f"{path}.weight_bcdt"] = channels.rows
        if channels.bias_rows is not None:
            tensors[f"{path}.bias_bcdt"] = channels.bias_rows
        return channels

    def _descend(
        self,
        parameters: list[nn.Parameter],
        loss_of: Callable[[Tensor, int], tuple[Tensor, float]],
        number: int,
        text: str,
        advance: Callable[[str, int], None],
    ) -> list[float]:
        """Every process works on its own samples of a step; gradients are added up, so that all take the same step."""
        rank, size = distributed.world()
        options = self.options
        optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
        steps = self.steps_per_layer
        if options.schedule == "cosine":
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator = torch.Generator().manual_seed(self.seed * 10007 + number)
        losses: list[float] = []
        step = 0
        for epoch in range(options.epochs):
            sums = torch.zeros(2, dtype=torch.float64)
            for batch in torch.randperm(self.count, generator=generator).split(options.batch):
                optimizer.zero_grad()
                mine = batch[batch % size == rank] // size
                if len(mine):
                    error, size_of_target = loss_of(mine, step)
                    # A mean over the whole step's samples, whichever process has them.
                    (error / len(batch)).backward()
                    sums += torch.tensor([error.item(), size_of_target], dtype=torch.float64)
                gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
                distributed.sum_(gradients)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                if not all(gradient.isfinite().all() for gradient in gradients):
                    return [*losses, math.nan]
                optimizer.step()
                if options.schedule == "cosine":
                    schedule.step()
                advance(f"{text}, epoch {epoch + 1}", 1)
                step += 1
            distributed.sum_([sums])
            losses.append((sums[0] / sums[1]).item())
        return losses


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
