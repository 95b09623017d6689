"""The torch.compile backend ``qmamba``: rewrites a copy of Dynamo's graph and hands it to Inductor."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._dynamo.cache_size import _has_same_id_matched_objs
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import ops as _ops  # noqa: F401  (registers qmamba::*)
from . import quant, startup
from . import report as report_module
from .artifact import Artifact, read_artifact
from .config import QMambaConfig
from .cpu_templates.build import best_isa, find_compiler, inductor_compiler
from .cpu_templates.call_site import inductor_options
from .errors import NonFiniteStateError
from .fx_utils import InputSource, copy_graph, mark_written_static, placeholders, value_of, written_outputs
from .passes import PassContext, StateOutput, phase_of, run_pipeline
from .report import Report
from .state import DSQState
from .static_states import StaticStates

logger = logging.getLogger(__name__)

Compiled = Callable[..., Any]

# The first graph is traced before the backend is called, but after torch.compile has looked it up.
startup.hurry_dynamo()


def qmamba(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """Compile one graph. Called by torch.compile; ``options`` are those of `QMambaConfig`.

    Raises:
        ConfigError: an option is unknown or its value is not allowed.
        ArtifactError: the calibration artifact is damaged or belongs to another model.
        StateError: the state of a layer cannot be packed as asked.
    """
    startup.hurry_dynamo()
    config = QMambaConfig.from_options(options)
    report = Report(strict=config.strict)
    report.phase = phase_of(gm.graph)
    on_cpu, mode = _runs_on_cpu(gm), mode or config.mode
    if on_cpu:
        best_isa()  # refuses a wrong QMAMBA_CPU_ISA before any weight is touched
    if config.inner_backend == "inductor" and on_cpu and inductor_compiler() is None:
        find_compiler()  # warns, once
        config = dataclasses.replace(config, inner_backend="eager")
    inner = _inner_compiler(config, mode, report.phase, on_cpu)
    _warn_before_recompile_limit()
    report_module.recent.append(report)
    if _needs_gradients(gm):
        logger.warning(
            "qmamba: gradients are required, so this graph is left to plain Inductor; call the model under "
            "torch.no_grad() or torch.inference_mode(), or use model.eval().requires_grad_(False)"
        )
        return inner(gm, example_inputs)
    if report.phase == "other":
        logger.warning("qmamba: no Mamba2 layer in this graph, so it is left to plain Inductor")
        return inner(gm, example_inputs)
    artifact = _load_artifact(config)
    rewritten = copy_graph(gm)
    recorded = report.phase == "prefill" and not on_cpu and _records_cuda_graphs(config, mode)
    static_states = StaticStates(written_outputs(rewritten.graph)) if recorded else None
    context = PassContext(config, artifact, list(example_inputs), _scope())
    asks = config.inner_backend == "inductor" and on_cpu
    with startup.inductor_asked_meanwhile() if asks else contextlib.nullcontext():
        run_pipeline(rewritten, context, report)
        mark_written_static(rewritten.graph)
        sources = [node.meta["qmamba_input"] for node in placeholders(rewritten.graph)]
        inputs = _examples(sources, context)
    return _Runner(inner(rewritten, inputs), sources, context, static_states)


class _Runner:
    """Calls the compiled graph with what it takes instead of Dynamo's arguments, and wraps what it returns.

    AOTAutograd therefore sees plain tensors only: packed states and int8 weights are taken apart here.
    """

    def __init__(
        self,
        compiled: Compiled,
        sources: Sequence[InputSource],
        context: PassContext,
        static_states: StaticStates | None = None,
    ) -> None:
        self._compiled = compiled
        self._static_states = static_states
        self._fetch = _fetch_all(sources)
        self._outputs = sorted(context.state_outputs, key=lambda output: output.position)
        self._state_inputs = context.state_inputs if context.config.check_finite else {}
        self._check_finite = context.config.check_finite

    def __call__(self, *args: Any) -> Any:
        results = self._compiled(*self._fetch(args))
        if self._outputs:
            results = self._wrap(list(results))
        if self._static_states is not None:
            results = self._static_states(results)
        for index, layer in self._state_inputs.items():
            _require_finite(args[index], layer)
        return results

    def _wrap(self, flat: list[Any]) -> tuple[Any, ...]:
        # From the front: each state found puts the later ones at the position Dynamo knows.
        for output in self._outputs:
            parts = flat[output.position : output.position + output.width]
            state = _make_state(output, parts)
            if self._check_finite:
                _require_finite(state, output.layer)
            flat[output.position : output.position + output.width] = [state]
        return tuple(flat)


def _fetch_all(sources: Sequence[InputSource]) -> Callable[[tuple[Any, ...]], list[Any]]:
    """What each source stands for, in one expression: 9 us instead of 18 for the 165 inputs of 8 layers."""
    names: dict[str, Any] = {}
    terms = []
    for number, source in enumerate(sources):
        names[f"constant{number}"], names[f"getter{number}"] = source.constant, source.getter
        value = f"constant{number}" if source.index is None else f"args[{source.index}]"
        terms.append(value if source.getter is None else f"getter{number}({value})")
    fetch: Callable[[tuple[Any, ...]], list[Any]] = eval(f"lambda args: [{', '.join(terms)}]", names)
    return fetch


def _make_state(output: StateOutput, parts: list[Tensor]) -> DSQState:
    packed, channel_scale, rng = parts[:3]
    state_scale = parts[3] if output.state_scale is None else output.state_scale
    ring = None
    if output.ring is not None:
        batch, nheads, headdim, width = packed.shape
        ring = output.ring.new(batch, nheads, headdim, quant.unpacked_width(width, output.bits), packed.device)
    return DSQState(packed, channel_scale, state_scale, rng, output.bits, output.stochastic, ring)


def _require_finite(state: DSQState, layer: str) -> None:
    bad = state.nonfinite()
    if bool(bad.any()):
        batch, head = (int(i) for i in bad.nonzero()[0])
        raise NonFiniteStateError(
            f"{layer}: the SSM state of sequence {batch}, head {head} is NaN or infinite; "
            "the inputs or weights of this layer overflowed (check_finite=False lets NaN run through to the logits)"
        )


def _examples(sources: Sequence[InputSource], context: PassContext) -> list[Any]:
    """What AOTAutograd traces inputs with: Dynamo's own examples, or fakes of the tensors taken out of them."""
    tracing = torch._guards.TracingContext.get()
    mode = tracing.fake_mode
    assert mode is not None

    @functools.cache
    def whole(index: int) -> Any:
        """The argument whose parts are inputs. Inner sizes of a state must get the symbols that Dynamo gave them."""
        value = context.example_inputs[index]
        if not is_traceable_wrapper_subclass(value) or value not in tracing.tensor_to_context:
            return value
        symbolic = tracing.tensor_to_context[value]
        return mode.from_tensor(cast(Tensor, value), symbolic_context=symbolic, source=symbolic.tensor_source)

    def example(source: InputSource) -> Any:
        if source.index is None:
            value = cast(Tensor, source.constant)
        elif source.getter is None:
            return context.example_inputs[source.index]
        else:
            value = source.getter(whole(source.index))
        return value if isinstance(value, FakeTensor) else mode.from_tensor(value, static_shapes=True)

    return [example(source) for source in sources]


def _inner_compiler(config: QMambaConfig, mode: str | None, phase: str, on_cpu: bool) -> Compiled:
    if config.inner_backend != "inductor":
        return torch._dynamo.lookup_backend(config.inner_backend)
    from torch._inductor.compile_fx import compile_fx

    patches = inductor_options() | _mode_options(mode)
    if phase == "prefill":
        # The states that a prompt leaves must outlive the next prompt, and memory of a CUDA graph does not.
        patches["triton.cudagraphs"] = False
    return lambda gm, inputs: compile_fx(gm, inputs, config_patches=patches | (_vector_width() if on_cpu else {}))


def _vector_width() -> dict[str, Any]:
    """What Inductor picks by itself, as a setting: those are a part of its cache's key, and the machine is not.

    Its code for the CPU is written for one width of vectors. From a cache that a machine with AVX-512 has filled, one
    with AVX2 gets NaN; the other way round the heap is corrupted (torch 2.13, two lines of torch.compile alone).
    """
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    chosen = torch._inductor.config.cpp.simdlen
    return {"cpp.simdlen": pick_vec_isa().bit_width() if chosen is None else chosen}


def _records_cuda_graphs(config: QMambaConfig, mode: str | None) -> bool:
    """True when Inductor is to record decode steps, by ``mode`` or by its own setting."""
    if config.inner_backend != "inductor":
        return False
    return bool(_mode_options(mode).get("triton.cudagraphs", torch._inductor.config.triton.cudagraphs))


def _mode_options(mode: str | None) -> dict[str, Any]:
    return {} if mode in (None, "default") else torch._inductor.list_mode_options(mode)


def _runs_on_cpu(gm: fx.GraphModule) -> bool:
    values = (value_of(node) for node in placeholders(gm.graph))
    return any(isinstance(value, Tensor) and value.device.type == "cpu" for value in values)


def _needs_gradients(gm: fx.GraphModule) -> bool:
    if not torch.is_grad_enabled():
        return False
    values = (value_of(node) for node in placeholders(gm.graph))
    return any(isinstance(value, Tensor) and value.requires_grad for value in values)


def _scope() -> dict[str, Any]:
    """Where Dynamo's source expressions evaluate: locals and globals of the frame being compiled."""
    tx = torch._dynamo.symbolic_convert.InstructionTranslator.current_tx()
    return {"L": tx.output.local_scope, "G": tx.output.global_scope}


def _load_artifact(config: QMambaConfig) -> Artifact | None:
    if config.calibration is None:
        return None
    status = os.stat(config.calibration) if os.path.exists(config.calibration) else None
    return _read_artifact_once(config.calibration, (status.st_mtime_ns, status.st_size) if status else None)


@functools.lru_cache(maxsize=4)
def _read_artifact_once(path: str, _changed: tuple[int, int] | None) -> Artifact:
    return read_artifact(path)


def _graphs_kept() -> int:
    """How many graphs Dynamo counts against ``recompile_limit``, the one being compiled left out.

    Those of models that are gone count, those that failed do not.
    """
    frame: Any = torch._dynamo.symbolic_convert.InstructionTranslator.current_tx().output.root_tx
    eval_frame = torch._C._dynamo.eval_frame
    if hasattr(eval_frame, "_get_cache_entries_for_region"):
        # torch.compile(isolate_recompiles=True), of torch 2.13, counts its own.
        region = eval_frame.get_eval_frame_isolate_recompiles_id()
        kept = eval_frame._get_cache_entries_for_region(frame.f_code, region)
    else:
        kept = eval_frame._debug_get_cache_entry_list(frame.f_code)
    return sum(_has_same_id_matched_objs(frame, entry) for entry in kept)


_RAISE_LIMIT = (
    "Pass recompile_limit=64 to torch.compile or model.compile"
    if "recompile_limit" in inspect.signature(torch.compile).parameters
    else "Set torch._dynamo.config.recompile_limit higher in each thread that calls the model"
)


def _warn_before_recompile_limit() -> None:
    if torch._guards.CompileContext.current_compile_id() is None:  # called by hand
        return
    count = _graphs_kept()
    if count + 1 == torch._dynamo.config.recompile_limit:
        logger.warning(
            "qmamba: this is compilation %d of the same function and the last that Dynamo allows; beyond it PyTorch "
            "silently runs eager. %s, or use fewer kinds of inputs (batch 1 or more, with or without attention mask, "
            "prompts of one or several chunks)",
            count + 1,
            _RAISE_LIMIT,
        )
