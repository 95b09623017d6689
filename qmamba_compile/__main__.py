"""Command line: ``qmamba explain | generate | render | env``, and what packages add."""

from __future__ import annotations

import importlib.metadata
import io
import logging
import platform
import sys
from typing import Annotated, Any

import rich.console
import rich.table
import torch
import typer

from . import report as report_module
from .command_line import INTERRUPTED, load_pretrained, readable_errors, version_of
from .config import LARGEST_SEED, QMambaConfig
from .errors import ConfigError, SkipReason, StrictError
from .print_kernel import CPU_KERNELS, GPU_ONLY, print_cpu_kernel, print_gpu_kernel
from .print_report import print_reports, reports_as_json
from .print_text import Printer, text_codec
from .state import DSQState


class _Commands(typer.core.TyperGroup):
    """The commands of this file, and those that installed packages name as entry points ``qmamba.commands``.

    So ``qmamba calibrate`` exists, and this package imports nothing of calibration.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *sorted(_added_commands())]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        entry_point = _added_commands().get(cmd_name)
        if entry_point is None:
            return super().get_command(ctx, cmd_name)
        command = typer.main.get_command(entry_point.load())
        command.name = cmd_name
        return command


def _added_commands() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group="qmamba.commands")}


app = typer.Typer(
    cls=_Commands,
    help="Run Mamba2 models with int8 linears and a 4-bit SSM state: torch.compile(model, backend='qmamba').",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# Without markup: a path may hold brackets.
_out = rich.console.Console(markup=False)
_err = rich.console.Console(stderr=True)

_RECOMPILE_LIMIT = 64
"""Prefill and decode, batch 1 and more, one chunk and several, with and without a mask: more than Dynamo's 8."""

Model = Annotated[str, typer.Option(help="Folder or hub name of a transformers model, or 'toy' for a tiny random one.")]
# The variables are those of `QMambaConfig.from_options`: a default of the command line must not hide them.
Bits = Annotated[str, typer.Option(envvar="QMAMBA_STATE_BITS", help="Bits of the SSM state: 8, 4, 2 or none.")]
Weights = Annotated[str, typer.Option(envvar="QMAMBA_WEIGHTS", help="Linears: int8 or none.")]
Scales = Annotated[str, typer.Option(envvar="QMAMBA_STATE_SCALES", help="Scales of the state: dynamic or calibrated.")]
Rounding = Annotated[str, typer.Option(envvar="QMAMBA_ROUNDING", help="nearest or stochastic.")]
FlushInterval = Annotated[
    int, typer.Option(envvar="QMAMBA_FLUSH_INTERVAL", help="Steps from one store of the state's codes to the next.")
]
Calibration = Annotated[str | None, typer.Option(envvar="QMAMBA_CALIBRATION", help="Calibration artifact.")]


@app.command()
def explain(
    model: Model,
    state_bits: Bits = "4",
    weights: Weights = "int8",
    state_scales: Scales = "dynamic",
    rounding: Rounding = "nearest",
    flush_interval: FlushInterval = QMambaConfig.flush_interval,
    calibration: Calibration = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    strict: Annotated[
        bool, typer.Option(help="Exit with status 1 when anything was left alone but by skip_layers.")
    ] = False,
) -> None:
    """What the passes found, rewrote and left alone in a model, why, and the bytes before and after."""
    from .passes.int8_weight import held_nbytes

    options = _options(state_bits, weights, state_scales, rounding, flush_interval, calibration)
    network = _load(model)
    weight_bytes = [held_nbytes(network)]
    report_module.recent.clear()
    torch._dynamo.reset()  # a graph that this process already has would not be reported again
    # Nothing is compiled: the rewritten graphs run as they are, which takes seconds.
    network.compile(backend="qmamba", fullgraph=True, options={**options, "inner_backend": "eager"})
    ids = torch.randint(0, network.config.vocab_size, (1, 9))
    with torch.inference_mode():
        cache = _cache_of(network(ids, use_cache=True))
        network(ids[:, :1], use_cache=True, **cache)
    weight_bytes.append(held_nbytes(network))
    held = {"weights": tuple(weight_bytes), "state of one sequence": _state_bytes(*cache.values())}
    reports = list(report_module.recent)
    if as_json:
        _out.print_json(data=reports_as_json(model, reports, held))
    else:
        print_reports(reports, held)
    unwanted = [skip for report in reports for skip in report.skips() if skip.reason is not SkipReason.EXCLUDED]
    if strict and (unwanted or any(report.phase == "other" for report in reports)):
        raise StrictError(f"{model}: something was left alone (see above); name it in skip_layers or drop --strict")


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[
        int,
        typer.Option(
            envvar="QMAMBA_SEED", min=0, max=LARGEST_SEED, help="Seed of sampling and of stochastic rounding."
        ),
    ] = 0,
    state_bits: Bits = "4",
    weights: Weights = "int8",
    state_scales: Scales = "dynamic",
    rounding: Rounding = "nearest",
    flush_interval: FlushInterval = QMambaConfig.flush_interval,
    calibration: Calibration = None,
) -> None:
    """Continue a prompt with the compiled model, printing text as it comes."""
    options = {**_options(state_bits, weights, state_scales, rounding, flush_interval, calibration), "seed": seed}
    if any("\ud800" <= character <= "\udfff" for character in prompt):  # what Python makes of bytes that are no text
        raise ConfigError("--prompt is not valid text in this terminal's encoding; give it in UTF-8")
    network = _load(model)
    encode, decode = text_codec(model, network)
    ids = torch.tensor([encode(prompt)])
    if ids.shape[1] == 0:
        raise ConfigError("--prompt has no token of this model in it; give at least one character that it knows")
    network.compile(backend="qmamba", options=options)
    torch.manual_seed(seed)
    sampling = {"do_sample": temperature > 0, **({"temperature": temperature} if temperature > 0 else {})}
    _err.print("compiling on the first tokens, once for each kind of input ...", style="dim")
    printer = Printer(prompt, decode)
    try:
        network.generate(ids, max_new_tokens=max_new_tokens, streamer=printer, **sampling)
    except KeyboardInterrupt:
        printer.end()
        sys.exit(INTERRUPTED)


@app.command()
def render(
    kernel: Annotated[str, typer.Argument(help=f"{', '.join(CPU_KERNELS)}. Of a GPU, also {', '.join(GPU_ONLY)}.")],
    headdim: Annotated[int, typer.Option()] = 64,
    dstate: Annotated[int, typer.Option()] = 128,
    bits: Annotated[int, typer.Option(envvar="QMAMBA_STATE_BITS", help="8, 4 or 2.")] = 4,
    state_scales: Scales = "dynamic",
    rounding: Rounding = "nearest",
    flush_interval: FlushInterval = QMambaConfig.flush_interval,
    ring_bits: Annotated[
        int, typer.Option(envvar="QMAMBA_RING_BITS", help="ssm_update: of the inputs since the last store, 16 or 8.")
    ] = QMambaConfig.ring_bits,
    target: Annotated[
        str, typer.Option(help="cpu, or an instruction set (avx512, avx2, portable), or a GPU (sm_90, gfx942, ...).")
    ] = "cpu",
    heads: Annotated[int, typer.Option(min=1, help="GPU: batch * nheads, by which block sizes are chosen.")] = 5120,
    k: Annotated[int, typer.Option(min=1, help="GPU: features of a linear's input, or of a row.")] = 2560,
    outputs: Annotated[int, typer.Option(min=1, help="GPU: outputs of a linear.")] = 10576,
    rows: Annotated[int, typer.Option(min=1, help="GPU: rows of a linear's input.")] = 1,
    stats: Annotated[bool, typer.Option("--stats", help="GPU: what the compiler made of it, instead of text.")] = False,
) -> None:
    """Print the source that is generated for a kernel."""
    # Refuses what is not allowed. Without a state no artifact is asked for; kernels have their own check of the bits.
    QMambaConfig(
        state_bits=None,
        state_scales=state_scales,
        rounding=rounding,
        flush_interval=flush_interval,
        ring_bits=ring_bits,
    )
    scheme = (headdim, dstate, bits, state_scales == "dynamic", rounding == "stochastic")
    checkpoint = (flush_interval, ring_bits)
    if target.startswith(("sm_", "gfx")):
        print_gpu_kernel(kernel, target, heads, scheme, checkpoint, (rows, outputs, k), stats)
    elif stats:
        raise ConfigError(f"--stats needs a GPU as --target, such as sm_90; {target!r} is not one")
    else:
        print_cpu_kernel(kernel, target, scheme, checkpoint)


@app.command()
def env() -> None:
    """Versions, compiler, instruction set, threads, and the options that environment variables set."""
    from .cpu_templates import build
    from .cpu_templates.specs import LayerSpec

    table = rich.table.Table(show_header=False, box=None)
    table.add_row("python", platform.python_version())
    for package in ("qmamba-compile", "torch", "triton", "transformers", "torchao", "mamba-ssm"):
        table.add_row(package, version_of(package) or "not installed")
    table.add_row("C++ compiler", build.inductor_compiler() or f"none, so plain torch runs: {build.missing_compiler()}")
    linear = build.for_this_machine(LayerSpec("w8a8_linear", build.best_isa()))
    words = [linear.isa, *["VNNI"] * linear.vnni, *["AMX"] * linear.amx]
    table.add_row("instruction set", f"{', '.join(words)}; kernels tuned for {linear.core}")
    table.add_row("threads", str(torch.get_num_threads()))
    table.add_row("CUDA device", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
    defaults, current = QMambaConfig(), QMambaConfig.from_options()
    changed = {name: value for name, value in vars(current).items() if value != getattr(defaults, name)}
    table.add_row("options set by QMAMBA_*", ", ".join(f"{k}={v!r}" for k, v in changed.items()) or "none")
    _out.print(table)


# --- models and text -----------------------------------------------------------------------------------------------


def _options(
    state_bits: str, weights: str, state_scales: str, rounding: str, flush_interval: int, calibration: str | None
) -> dict[str, Any]:
    def number(text: str) -> Any:
        return None if text.lower() == "none" else int(text) if text.isdecimal() else text

    options = {
        "state_bits": number(state_bits),
        "weights": None if weights.lower() == "none" else weights,
        "state_scales": state_scales,
        "rounding": rounding,
        "flush_interval": flush_interval,
        "calibration": None if calibration is not None and calibration.lower() == "none" else calibration,
    }
    QMambaConfig.from_options(options)
    return options


def _load(name: str) -> Any:
    """The model, ready for inference.

    Raises:
        ConfigError: the folder does not exist, or holds no model.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT
    if name == "toy":
        config = transformers.Mamba2Config(
            vocab_size=256, hidden_size=128, num_hidden_layers=2, num_heads=4, head_dim=64, state_size=64, n_groups=1
        )
        return transformers.Mamba2ForCausalLM(config).eval().requires_grad_(False)
    return load_pretrained(name)


def _cache_of(output: Any) -> dict[str, Any]:
    """The cache of a model's output under the name by which the model takes it back."""
    # The first name is that of transformers 5.24 and later; before, it depends on the model.
    name = next((name for name in ("cache", "cache_params", "past_key_values") if name in output), None)
    if name is None:
        raise ConfigError("this model gives no cache back, so it has no decode step; use a causal language model")
    return {name: output[name]}


def _state_bytes(cache: Any) -> tuple[int, int]:
    """Bytes of the SSM states that a cache of one sequence holds: as floats, and as they are.

    What all sequences share, such as calibrated scales, is not counted.
    """
    states = [s for layer in cache.layers for s in getattr(layer, "recurrent_states", {}).values() if s is not None]
    packed = [round(s.bits_per_element * s.numel() / 8) if isinstance(s, DSQState) else s.nbytes for s in states]
    return sum(s.nbytes for s in states), sum(packed)


def main() -> None:
    """Entry point of the console script."""
    # Both warn about their own optional parts at import.
    for noisy in ("torchao", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may well make what the terminal's encoding has not
    with readable_errors():
        app(standalone_mode=True)


if __name__ == "__main__":
    main()
