"""Calibration from a model and its samples to an artifact, stage by stage."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import rich.progress
from torch import Tensor

from qmamba_compile.artifact import Artifact, Header, require_file_name, write_artifact
from qmamba_compile.config import QMambaConfig

from . import distributed
from .blocks import Blocks
from .capture import Statistics, capture
from .data import Tokens, split_windows
from .errors import CalibrationError
from .esr import EsrOptions, Reconstruction
from .evaluate import Score, score, standard_error
from .quantized_model import model_shapes, quantized_copy
from .recurrence import Recurrence, Run, float_scan, mixers
from .smooth import STRENGTHS, activation_scales, smooth_factors
from .state_scales import EXPONENTS, fitted_scale, power_scale, sensitivities
from .work import Work, writing

_VERSIONS = ("qmamba-compile", "torch", "transformers")


@dataclasses.dataclass(frozen=True)
class Options:
    """What calibration does.

    Attributes:
        weights: ``"int8"``, or ``None`` for float linears.
        state_bits: bits of the state that scales and ESR are made for: 8, 4, 3 or 2.
        rounding: ``"nearest"`` or ``"stochastic"``; flush_interval: steps from one requantization to the next.
            Scales are chosen and ESR trains for these; weights tuned for another interval cost more than they save.
        samples, validation: numbers of windows for statistics and ESR, and for every choice.
        length: tokens of a window. batch: windows that run together.
        fit: also try scales fitted to what the loss feels, which takes a backward pass through the float model.
        smooth: try SmoothQuant. static_activations: write activation scales.
        esr: options of ESR, or ``None``.
        memory: bytes of activations that each of three sets may hold in memory.
    """

    weights: str | None = "int8"
    state_bits: int = 4
    rounding: str = QMambaConfig.rounding
    flush_interval: int = QMambaConfig.flush_interval
    samples: int = 64
    validation: int = 32
    length: int = 1024
    batch: int = 8
    seed: int = 0
    fit: bool = True
    smooth: bool = True
    static_activations: bool = False
    esr: EsrOptions | None = dataclasses.field(default_factory=EsrOptions)
    memory: int = 2**31


@dataclasses.dataclass(frozen=True)
class Choice:
    """One thing that was tried on the validation samples: perplexity, and whether it was taken."""

    stage: str
    name: str
    perplexity: float
    taken: bool


class Calibration:
    """One calibration of a model. `run` goes through the stages; ``choices`` and ``results`` say what happened."""

    def __init__(self, model: Any, tokens: Tokens, options: Options, out: Path, *, resume: bool, quiet: bool) -> None:
        """Check everything that can be checked before the first stage.

        Raises:
            DataError: too little text. ArtifactError: ``out`` is no name for a file. CalibrationError: no Mamba2 layer,
                an option of ESR, ``out`` cannot be written, or another calibration's stages lie there.
        """
        self.model, self.tokens, self.options, self.out = model, tokens, options, out
        Blocks(model)
        if options.esr is not None and options.esr.batch < 1:
            raise CalibrationError(f"--esr-batch {options.esr.batch} is not allowed; use 1 or more")
        if options.esr is not None and not 0 < options.esr.learning_rate < math.inf:
            raise CalibrationError(
                f"--esr-lr {options.esr.learning_rate} is not allowed; use a rate above 0, such as 1e-3"
            )
        if options.esr is not None and options.esr.trajectory == "single-step" and options.flush_interval != 1:
            raise CalibrationError(
                f"--flush-interval {options.flush_interval} does not go with --esr-trajectory single-step, which "
                "simulates a state that is stored at every step; use --flush-interval 1, or --esr-trajectory exact"
            )
        self.samples, self.validation = split_windows(
            tokens, options.length, (options.samples, options.validation), options.seed
        )
        require_file_name(out)
        with writing(out, begun=False):
            Path(os.path.realpath(out)).parent.mkdir(parents=True, exist_ok=True)
        self.work = Work(out, self._identity(), resume=resume)
        self.choices: list[Choice] = []
        self.results: list[Any] = []
        self.quiet = quiet or not distributed.is_main()

    def _identity(self) -> dict[str, Any]:
        options = dataclasses.asdict(self.options)
        del options["memory"]
        weights = hashlib.sha256()
        for name, parameter in sorted(self.model.named_parameters()):
            # A sum tells other weights of the same sizes apart, at the price of reading them once.
            weights.update(f"{name} {tuple(parameter.shape)} {parameter.double().sum().item()!r}".encode())
        return {"options": options, "data": self.tokens.digest, "model": weights.hexdigest()}

    def run(self) -> Artifact:
        """All stages; writes the artifact and removes the work folder."""
        tensors: dict[str, Tensor] = {}
        float_score = self._score("float", self.model, float_scan)
        if not math.isfinite(float_score.perplexity):
            raise CalibrationError(
                f"{self.tokens.source}: the float model's perplexity is {float_score.perplexity}; check its weights, "
                "and that the text is of the kind it was trained on"
            )
        statistics = self._statistics()
        scales = self._state_scales(statistics)
        tensors |= {f"{layer}.state_scale": scale.cpu() for layer, scale in scales.items()}
        smooth = self._smooth(statistics)
        tensors |= {f"{path}.smooth": factors.cpu() for path, factors in smooth.items()}
        if self.options.static_activations and self.options.weights:
            for path, scale in activation_scales(statistics, smooth or None).items():
                tensors[f"{path}.act_scale"] = scale.cpu()
        recurrence = self._recurrence(scales)
        uncalibrated = quantized_copy(self.model, weights=self.options.weights)
        before = self._score("before", uncalibrated, dataclasses.replace(recurrence, state_scale=None))
        quantized = quantized_copy(self.model, weights=self.options.weights, artifact=self._artifact(tensors))
        metrics = {}
        if self.options.esr is not None:
            reconstruction = self._esr(quantized, recurrence, smooth)
            tensors |= reconstruction.tuned
            recurrence = reconstruction.recurrence
            metrics = _esr_metrics(self.results)
        after = self._score("after", quantized, recurrence)
        artifact = self._artifact(
            tensors,
            metrics_before=_finite(
                {
                    "perplexity_float": float_score.perplexity,
                    "perplexity_dynamic_scales": before.perplexity,
                    **{key: value for key, value in metrics.items() if key.endswith("before")},
                }
            ),
            metrics_after=_finite(
                {
                    "perplexity": after.perplexity,
                    **{f"tried/{c.stage}/{c.name}": c.perplexity for c in self.choices},
                    **{key: value for key, value in metrics.items() if not key.endswith("before")},
                }
            ),
        )
        if distributed.is_main():
            with writing(self.out):
                write_artifact(self.out, artifact)
        distributed.barrier()
        self.work.remove()
        return artifact

    def _artifact(self, tensors: dict[str, Tensor], metrics_before: Any = None, metrics_after: Any = None) -> Artifact:
        header = Header(
            model_class=type(self.model).__name__,
            shapes=model_shapes(self.model),
            config=dataclasses.asdict(self.options),
            data=f"{self.tokens.source}; {len(self.samples)} + {len(self.validation)} windows of {self.options.length}",
            data_digest=self.tokens.digest,
            metrics_before=metrics_before or {},
            metrics_after=metrics_after or {},
            versions={name: importlib.metadata.version(name) for name in _VERSIONS},
        )
        return Artifact({key: tensor.float() for key, tensor in tensors.items()}, header, str(self.out))

    # --- stages ----------------------------------------------------------------------------------------------------

    def _recurrence(self, scales: dict[str, Tensor] | None) -> Recurrence:
        stochastic = self.options.rounding == "stochastic"
        return Recurrence(
            self.options.state_bits, stochastic, self.options.seed, self.options.flush_interval, state_scale=scales
        )

    def _score(self, stage: str, model: Any, run: Run) -> Score:
        """Validation samples; kept as a stage, since a resumed run needs it again."""
        done = self.work.load(f"score_{stage}")
        if done is None:
            with self._progress(f"perplexity, {stage}", self.validation.numel()) as advance:
                result = score(model, self.validation, run, batch=self.options.batch, advance=advance)
            self.work.save(f"score_{stage}", {"nats": result.nats}, {"tokens": result.tokens})
            return result
        return Score(done[0]["nats"], done[1]["tokens"])

    def _statistics(self) -> Statistics:
        done = self.work.load("statistics")
        if done is not None:
            return Statistics.from_tensors(done[0])
        with self._progress("statistics", self.samples.numel()) as advance:
            statistics = capture(self.model, self._batches(self.samples), advance)
        for layer, total in statistics.state_sum.items():
            if not total.isfinite().all():
                raise CalibrationError(f"{layer}: its state is not finite on this text; check the model's weights")
        self.work.save("statistics", statistics.tensors())
        return statistics

    def _batches(self, windows: Tensor) -> list[Tensor]:
        device = next(self.model.parameters()).device
        return [ids.to(device) for ids in windows.split(self.options.batch)]

    def _state_scales(self, statistics: Statistics) -> dict[str, Tensor]:
        device = next(self.model.parameters()).device
        done = self.work.load("state_scales")
        if done is not None:
            self.choices += [Choice(**choice) for choice in done[1]["choices"]]
            return {layer: scale.to(device) for layer, scale in done[0].items()}
        layers = list(mixers(self.model))
        tried = {f"rms^{e:g}": {layer: power_scale(statistics, layer, e) for layer in layers} for e in EXPONENTS}
        if self.options.fit:
            few = self._batches(self.samples[: max(self.options.batch, len(self.samples) // 2)])
            with self._progress("sensitivity of the loss", sum(ids.numel() for ids in few)) as advance:
                felt = sensitivities(self.model, few, advance)
            tried["fitted"] = {
                layer: fitted_scale(statistics.rows[layer], statistics.channels[layer], felt[layer].cpu())
                for layer in layers
            }
        scores = {}
        with self._progress("state scales", self.validation.numel() * len(tried)) as advance:
            for name, scales in tried.items():
                tried[name] = {layer: scale.to(device) for layer, scale in scales.items()}
                run = self._recurrence(tried[name])
                scores[name] = score(self.model, self.validation, run, batch=self.options.batch, advance=advance)
        best = min(
            scores, key=lambda name: scores[name].perplexity if math.isfinite(scores[name].perplexity) else math.inf
        )
        choices = [Choice("state_scale", name, s.perplexity, name == best) for name, s in scores.items()]
        self.choices += choices
        self.work.save("state_scales", tried[best], {"choices": [dataclasses.asdict(choice) for choice in choices]})
        return tried[best]

    def _smooth(self, statistics: Statistics) -> dict[str, Tensor]:
        """SmoothQuant's factors where they win on the validation samples, else none."""
        if not self.options.smooth or self.options.weights is None:
            return {}
        done = self.work.load("smooth")
        if done is not None:
            self.choices += [Choice(**choice) for choice in done[1]["choices"]]
            return done[0]
        tried = {"none": {}, **{f"alpha={a:g}": smooth_factors(self.model, statistics, a) for a in STRENGTHS}}
        scores = {}
        with self._progress("SmoothQuant", self.validation.numel() * len(tried)) as advance:
            for name, factors in tried.items():
                artifact = self._artifact({f"{path}.smooth": f.cpu() for path, f in factors.items()})
                quantized = quantized_copy(self.model, weights="int8", artifact=artifact if factors else None)
                # With the float state, whose chaos would hide what the linears do.
                scores[name] = score(quantized, self.validation, float_scan, batch=self.options.batch, advance=advance)
        best = "none"
        for name, candidate in scores.items():
            gain = scores[best].nats - candidate.nats
            if gain.mean() > standard_error(gain):
                best = name
        choices = [Choice("smooth", name, s.perplexity, name == best) for name, s in scores.items()]
        self.choices += choices
        self.work.save("smooth", tried[best], {"choices": [dataclasses.asdict(choice) for choice in choices]})
        return tried[best]

    def _esr(self, quantized: Any, recurrence: Recurrence, smooth: dict[str, Tensor]) -> Reconstruction:
        assert self.options.esr is not None
        reconstruction = Reconstruction(
            self.model,
            quantized,
            recurrence,
            self.options.esr,
            self.samples,
            self.validation,
            smooth=smooth,
            seed=self.options.seed,
            work=self.work,
            memory_limit=self.options.memory,
        )
        trainings = 1 if self.options.esr.loss == "model" else len(mixers(self.model))
        total = reconstruction.steps_per_layer * trainings
        with self._progress("ESR", total) as advance:
            reconstruction.run(advance)
        self.results = reconstruction.results
        return reconstruction

    @contextlib.contextmanager
    def _progress(self, text: str, total: int) -> Iterator[Callable[..., None]]:
        columns = (
            rich.progress.TextColumn("{task.description:40}"),
            rich.progress.BarColumn(),
            rich.progress.TaskProgressColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
        )
        shares = distributed.world()[1]
        with rich.progress.Progress(*columns, disable=self.quiet) as progress:
            task = progress.add_task(text, total=total)

            def advance(*args: Any) -> None:
                """(amount) of a stage that processes share, or (what, steps) of one that they walk together."""
                if len(args) == 2:
                    progress.update(task, advance=args[1], description=f"{text}: {args[0]}")
                else:
                    progress.advance(task, args[0] * shares)

            yield advance


def _esr_metrics(results: list[Any]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for result in results:
        values = {
            "nats_before": result.nats_before,
            "nats_after": result.nats_after,
            "loss_first": result.loss_first,
            "loss_last": result.loss_last,
            "kept": float(result.kept),
        }
        metrics |= {f"esr/{result.layer}/{name}": value for name, value in values.items() if value is not None}
    return metrics


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    """What a header may hold: of what was tried, some may have overflowed, and is not chosen."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
