"""``python -m bench.gpu``: the kernels on the GPU of this machine. Correctness first; no speed without it.

Times are of CUDA graphs, replayed; each graph walks over as many copies of its tensors as overflow the L2 cache, as the
layers of a model do. A figure is the median of the replays, with their quartiles.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import rich.console
import rich.table
import torch
import typer
from torch import Tensor

from bench import cli
from bench.gpu_check import Step, check
from bench.roofline import VARIANTS, step_bytes
from bench.shapes import STEP_SHAPES, cache_name
from bench.variants import state_bytes
from qmamba_compile import quant, recurrence
from qmamba_compile.command_line import REFUSED, version_of
from qmamba_compile.errors import ConfigError
from qmamba_compile.passes.int8_weight import held_nbytes
from qmamba_compile.triton_templates import launch

_out = rich.console.Console(width=140)

SHARES = {"ssm": 0.3, "linear": 0.1, "decode": 0.4, "prefill": 0.2}
"""Sections, and the part of the time that each may take."""

SECTIONS = tuple(SHARES)
SSM_BATCHES = (1, 8, 64, 128, 256)
LINEAR_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
DECODE_BATCHES = (1, 128, 64, 32, 8)
PREFILL_TOKENS = (1024, 4096, 16384)
BACKENDS = ("inductor", "qmamba")

_L2_BYTES = 128 * 2**20
"""More than the L2 cache of any GPU that the kernels are written for."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call: median and quartiles of ``replays``."""

    median: float
    low: float
    high: float
    replays: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        return cls(median, low, high, len(seconds))


class Deadline:
    """What is left of the time that the command may take."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def passed(self) -> bool:
        return time.monotonic() > self.end

    def share(self, part: float) -> Deadline:
        """A deadline of its own for some part of the time left."""
        return Deadline(part * max(0.0, self.end - time.monotonic()))


# --- time ----------------------------------------------------------------------------------------------------------


def replays(calls: list[Callable[[], Any]], seconds: float = 0.15, least: int = 5) -> list[float]:
    """Seconds of one of ``calls``, run once, captured together in a CUDA graph, and replayed for about ``seconds``."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    found: list[float] = []
    end = time.monotonic() + seconds
    while len(found) < least or (time.monotonic() < end and len(found) < 1000):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        found.append(start.elapsed_time(stop) * 1e-3 / len(calls))
    return found


def time_graph(calls: list[Callable[[], Any]], seconds: float = 0.1) -> Timing:
    """Seconds of one of ``calls`` by `replays`, but for the first."""
    return Timing.of(replays(calls, seconds)[1:])


def time_positions(steps: list[Step]) -> dict[str, Timing]:
    """Seconds of a checkpointed state's steps that only read, and of those that store.

    All ``steps`` begin at position 0 of their rings and go on together, one position a replay.
    """
    interval = steps[0].variant.flush_interval
    by_kind: dict[str, list[float]] = {"reads": [], "stores": []}
    for number, seconds in enumerate(replays([step.run for step in steps], least=4 * interval)):
        # They ran once before the first replay.
        stores = (number + 1) % interval == interval - 1
        if number > 0:
            by_kind["stores" if stores else "reads"].append(seconds)
    return {kind: Timing.of(found) for kind, found in by_kind.items()}


def copy_bandwidth(device: str, size: int = 2**32) -> float:
    """Bytes a second, read and written: the better of a copy of ``size`` bytes and a pass over them in place."""
    source, sink = (torch.ones(size // 4, device=device) for _ in range(2))
    seconds = min(time_graph([call]).median for call in (lambda: sink.copy_(source), lambda: sink.neg_()))
    return 2 * size / seconds


def copies_beyond_l2(moved: float) -> int:
    return max(1, min(256, math.ceil(2 * _L2_BYTES / moved)))


def mamba_ssm_step() -> Callable[..., Tensor] | None:
    """mamba-ssm's own kernel of the unquantized step."""
    if importlib.util.find_spec("mamba_ssm") is None:
        return None
    try:
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    except ImportError:
        return None
    step: Callable[..., Tensor] = selective_state_update
    return step


def baseline_call(step: Step, kernel: Callable[..., Tensor] | None) -> Callable[[], Any]:
    """The step of mamba-ssm on a float state, or its reference in plain torch."""
    (state,), (x, dt, A, B, C, D, bias) = step.state, step.inputs
    if kernel is None:
        return lambda: state.copy_(recurrence.step(state.float(), *(*step.inputs, True))[0])
    headdim, dstate = state.shape[-2:]
    # It takes per-head vectors expanded by strides of 0.
    arguments = (
        state,
        x,
        dt[..., None].expand(-1, -1, headdim),
        A[:, None, None].expand(-1, headdim, dstate),
        B,
        C,
    )
    options = {"D": D[:, None].expand(-1, headdim), "dt_bias": bias[:, None].expand(-1, headdim), "dt_softplus": True}
    return lambda: kernel(*arguments, **options)


def measure_ssm(device: str, bandwidth: float, deadline: Deadline) -> Iterator[dict[str, Any]]:
    """One layer's step: each state, each model, each batch."""
    kernel = mamba_ssm_step()
    for model_name in ("2.7b", "130m", "nemotron-h-8b"):
        model = STEP_SHAPES[model_name]
        for batch in SSM_BATCHES:
            for name, variant in VARIANTS.items():
                if deadline.passed():
                    return
                moved = step_bytes(model, variant, batch)
                interval = variant.flush_interval
                # As the layers of a model do, copies stand at all positions of a cycle, equally many at each.
                count = -(-copies_beyond_l2(moved) // interval) * interval
                first = Step.random(model, variant, batch, device, torch.bfloat16)
                steps = [first.copy(position) for position in range(count)]
                entry = {"model": model_name, "batch": batch, "state": name, "bytes": moved, "copies": count}
                timing = time_graph([step.run for step in steps])
                yield entry | {
                    "kernel": "ours",
                    "seconds": dataclasses.asdict(timing),
                    "of_copy_bandwidth": moved / bandwidth / timing.median,
                }
                if interval > 1:
                    for kind, timing in time_positions([first.copy(0) for _ in range(count)]).items():
                        at = range(interval - 1) if kind == "reads" else range(interval - 1, interval)
                        moved = sum(step_bytes(model, variant, batch, position) for position in at) / len(at)
                        yield entry | {
                            "bytes": moved,
                            "kernel": f"ours, a step that {kind}",
                            "seconds": dataclasses.asdict(timing),
                            "of_copy_bandwidth": moved / bandwidth / timing.median,
                        }
                if variant.bits is None:
                    timing = time_graph([baseline_call(step, kernel) for step in steps])
                    source = "mamba-ssm" if kernel else "torch reference"
                    yield entry | {"kernel": source, "seconds": dataclasses.asdict(timing)}
                del first, steps


def measure_linear(device: str, deadline: Deadline) -> Iterator[dict[str, Any]]:
    """W8A8, quantization included, against bf16: the linears of 130m and 2.7b."""
    for model_name in ("2.7b", "130m"):
        for linear in STEP_SHAPES[model_name].linears[:2]:
            outputs, inputs = linear.out_features, linear.in_features
            weight = torch.randn(outputs, inputs, device=device)
            qdata, scale = quant.quantize_rows(weight)
            half = weight.to(torch.bfloat16)
            count = copies_beyond_l2(outputs * inputs)
            packed = [(qdata.clone(), scale) for _ in range(count)]
            halves = [(half.clone(),) for _ in range(count)]
            for rows in LINEAR_ROWS:
                if deadline.passed():
                    return
                x = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16)
                norm = torch.ones(inputs, device=device, dtype=torch.bfloat16)
                for kind, call in linear_calls(x, norm).items():
                    weights: list[tuple[Tensor, ...]] = packed if "w8a8" in kind else halves  # type: ignore[assignment]
                    calls: list[Callable[[], Any]] = [functools.partial(call, *w) for w in weights]
                    entry = {"model": model_name, "outputs": outputs, "inputs": inputs, "rows": rows, "kind": kind}
                    yield entry | {"seconds": dataclasses.asdict(time_graph(calls, 0.05))}


def linear_calls(x: Tensor, norm: Tensor) -> dict[str, Callable[..., Tensor]]:
    """A linear of x, alone and behind its RMSNorm as a model has it: functions of the weight (and its scale)."""
    functional, ours = torch.nn.functional, torch.ops.qmamba

    def after_norm(qdata: Tensor, scale: Tensor) -> Tensor:
        return ours.norm_w8a8_linear(x, None, norm, 1e-5, x.shape[1], qdata, scale, None, None, None)

    return {
        "w8a8": lambda qdata, scale: ours.w8a8_linear(x, qdata, scale, None, None, None),
        "bf16": lambda weight: functional.linear(x, weight),
        "norm, w8a8": after_norm,
        "norm, bf16": lambda weight: functional.linear(functional.rms_norm(x, norm.shape, norm, 1e-5), weight),
    }


@contextlib.contextmanager
def _whole_scans() -> Iterator[None]:
    """Inductor's scans in one piece. torch 2.11 cannot generate those of a prompt that it would split (TypeError)."""
    from torch._inductor.ir import ReductionHint, Scan

    with mock.patch.object(Scan, "num_splits", lambda **_: (ReductionHint.DEFAULT, 1)):
        yield


def _network(model_name: str, layers: int, device: str, prompt: int) -> Any:
    import transformers

    # A prompt is padded to whole chunks: a short one would become 256 tokens of each sequence.
    shape = dataclasses.replace(STEP_SHAPES[model_name], n_layers=layers, chunk_size=min(prompt, 256))
    with torch.device(device):
        network: Any = transformers.Mamba2ForCausalLM(shape.config())
    return network.to(torch.bfloat16).eval().requires_grad_(False)


def _time_calls(call: Callable[[], Any], repeats: int = 20) -> tuple[Timing, Timing]:
    """Seconds of a call with its launches, what a caller waits; and until it returns, what the host works on it."""
    for _ in range(3):  # compiles, warms up, records
        call()
    whole, host = [], []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        host.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        whole.append(time.perf_counter() - start)
    return Timing.of(whole), Timing.of(host)


def _time_model(network: Any, backend: str, ids: Tensor, decode: bool) -> tuple[dict[str, Timing], Any]:
    """A prompt, or one decode step after it, by `_time_calls`, the step once more without guards; and the cache."""
    with torch.inference_mode():
        if not decode:
            seconds, host = _time_calls(lambda: network(ids, use_cache=True), 5)
            cache = network(ids, use_cache=True)[cache_name(network)]
            return {"seconds": seconds, "host_seconds": host}, cache
        # Only the eager model marks its cache as fit for CUDA graphs; ours packs it in the compiled prompt.
        torch.compiler.set_stance("force_eager" if backend == "inductor" else "default")
        name = cache_name(network)
        cache = network(ids, use_cache=True)[name]
        torch.compiler.set_stance("default")
        token = ids[:, :1].contiguous()

        def step() -> Any:
            return network(token, use_cache=True, **{name: cache})

        seconds, host = _time_calls(step)
        with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
            unguarded, _ = _time_calls(step)
        return {"seconds": seconds, "host_seconds": host, "unguarded_seconds": unguarded}, cache


def measure_model(
    section: str, model_name: str, layers: int, device: str, deadline: Deadline
) -> Iterator[dict[str, Any]]:
    """Decode steps by batch, or prompts by length, of a model of some layers: plain Inductor in bf16, and qmamba."""
    decode = section == "decode"
    sizes = [(batch, 16) for batch in DECODE_BATCHES] if decode else [(1, n) for n in PREFILL_TOKENS]
    for number, backend in enumerate(BACKENDS):
        own = deadline.share(1 / (len(BACKENDS) - number))
        torch._dynamo.reset()
        network = _network(model_name, layers, device, sizes[0][1])
        network.compile(backend=backend, mode="reduce-overhead" if decode else None)
        for batch, tokens in sizes:
            if own.passed():
                break
            ids = torch.randint(1, 1000, (batch, tokens), device=device)
            torch.cuda.reset_peak_memory_stats()
            torch._dynamo.utils.counters["inductor"].pop("cudagraph_skips", None)
            with _whole_scans():
                times, cache = _time_model(network, backend, ids, decode)
            yield {
                "model": model_name,
                "layers": layers,
                "backend": backend,
                "batch": batch,
                "tokens": tokens,
                **{name: dataclasses.asdict(timing) for name, timing in times.items()},
                "weight_bytes": held_nbytes(network),
                "state_bytes": state_bytes(cache),
                "peak_bytes": torch.cuda.max_memory_allocated(),
                # Where Inductor finds a reason against CUDA graphs it runs without them, and only this tells.
                "cudagraph_skips": torch._dynamo.utils.counters["inductor"]["cudagraph_skips"],
            }
            del cache
        del network
        torch.cuda.empty_cache()


# --- report --------------------------------------------------------------------------------------------------------


def environment(device: str) -> dict[str, Any]:
    """What the figures belong to."""
    packages = ("torch", "triton", "transformers", "torchao", "mamba-ssm")
    return {
        "device": torch.cuda.get_device_name(device),
        "capability": list(torch.cuda.get_device_capability(device)),
        "target": launch.target("cuda", torch.cuda.current_device()),
        "python": platform.python_version(),
        "versions": {package: version_of(package) for package in packages},
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }


def ssm_speedups(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each of our packed steps over float states of the same model and batch, where both are there."""
    times = {(e["model"], e["batch"], e["state"], e["kernel"]): e["seconds"]["median"] for e in entries}
    found = []
    for (model, batch, state, kernel), seconds in times.items():
        if kernel != "ours" or state in ("float32", "bfloat16"):
            continue
        row: dict[str, Any] = {"model": model, "batch": batch, "state": state}
        for kind in ("reads", "stores"):
            one = times.get((model, batch, state, f"ours, a step that {kind}"))
            if one is not None:
                row[f"us, {kind}"] = one * 1e6
        scheme = state.partition(" every")[0]
        scheme = scheme if "dynamic" in scheme else f"{scheme} calibrated"
        stored_each_step = times.get((model, batch, scheme, "ours"))
        if " every" in state and stored_each_step is not None:
            row["over L=1"] = stored_each_step / seconds
        for base in ("bfloat16", "float32"):
            for source in ("ours", "mamba-ssm"):
                other = times.get((model, batch, base, source))
                if other is not None:
                    row[f"over {base}, {source}"] = other / seconds
        found.append(row)
    return found


def print_record(record: dict[str, Any]) -> None:
    """Tables of whatever sections a record has."""
    rows = ssm_speedups(record["sections"].get("ssm", []))
    if rows:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        view = rich.table.Table(title="ssm_update, times faster", title_justify="left", box=None, title_style="bold")
        for column in columns:
            view.add_column(column)
        for row in rows:
            cells = (row.get(column, "") for column in columns)
            view.add_row(*(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells))
        _out.print(view)
    for section in ("linear", "decode", "prefill"):
        for entry in record["sections"].get(section, []):
            sizes, times = ("peak_bytes", "weight_bytes", "state_bytes"), ("host_seconds", "unguarded_seconds")
            hidden = ("seconds", *sizes, *times, "cudagraph_skips")
            words = [f"{key} {value}" for key, value in entry.items() if key not in hidden]
            more = "".join(f", {key[:-6]} {entry[key] / 2**20:.1f} MiB" for key in sizes if key in entry)
            for key in times:
                if key in entry:
                    more += f", {key[:-8]} {entry[key]['median'] * 1e6:.1f} us"
            more += ", without CUDA graphs" if entry.get("cudagraph_skips") else ""
            _out.print(f"{section}: {', '.join(words)}: {entry['seconds']['median'] * 1e6:.1f} us{more}")
    for section, reason in record["skipped"].items():
        _out.print(f"{section}: {reason}", style="yellow")


def plot(record: dict[str, Any], folder: Path) -> list[Path]:
    """One picture a section that has figures. Returns the files; none without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
        "ssm": ("batch", lambda e: f"{e['model']} {e['state']} ({e['kernel']})"),
        "linear": ("rows", lambda e: f"{e['outputs']}x{e['inputs']} {e['kind']}"),
        "decode": ("batch", lambda e: e["backend"]),
        "prefill": ("tokens", lambda e: e["backend"]),
    }
    files = []
    for section, (axis, label) in lines.items():
        series: dict[str, list[tuple[int, float]]] = {}
        for entry in record["sections"].get(section, []):
            series.setdefault(label(entry), []).append((entry[axis], entry["seconds"]["median"] * 1e6))
        if not series:
            continue
        figure, axes = plt.subplots(figsize=(9, 6))
        for name, points in series.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axes.set(xscale="log", yscale="log", xlabel=axis, ylabel="microseconds", title=f"{section}, {record['device']}")
        axes.legend(fontsize="x-small")
        files.append(folder / f"gpu_{section}.png")
        figure.savefig(files[-1], dpi=120, bbox_inches="tight")
        plt.close(figure)
    return files


def write(record: dict[str, Any], folder: Path) -> list[Path]:
    """JSON and plots of a record."""
    path = folder / "gpu.json"
    path.write_text(json.dumps(record, indent=1))
    return [path, *plot(record, folder)]


def main(
    only: Annotated[
        list[str] | None, typer.Option(help=f"Sections, of {', '.join(SECTIONS)}; may be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the JSON and the plots.")] = Path("bench/results"),
    budget: Annotated[float, typer.Option(help="Seconds; what does not fit is left out, and said.")] = 450.0,
    model: Annotated[str, typer.Option(help="Model of decode and prefill.")] = "2.7b",
    layers: Annotated[
        int, typer.Option(min=1, help="Layers of it; compiling all 64 takes longer than the budget.")
    ] = 8,
    check_only: Annotated[bool, typer.Option("--check-only", help="Correctness, no times.")] = False,
) -> None:
    """Check the kernels on this machine's GPU, then measure them."""
    chosen = only or list(SECTIONS)
    if unknown := [section for section in chosen if section not in SECTIONS]:
        raise ConfigError(f"--only {unknown[0]!r} is unknown; allowed: {', '.join(SECTIONS)}")
    if model not in STEP_SHAPES:
        raise ConfigError(f"--model {model!r} is unknown; allowed: {', '.join(STEP_SHAPES)}")
    cli.require_folder(out, f"--out {out}")
    if not torch.cuda.is_available():
        raise ConfigError("this machine has no CUDA device: nothing was checked and nothing was measured")
    device = f"cuda:{torch.cuda.current_device()}"
    if launch.target("cuda", torch.cuda.current_device()) is None:
        raise ConfigError(f"no kernels for {torch.cuda.get_device_name(device)}: nothing was measured")
    deadline = Deadline(budget)
    record: dict[str, Any] = environment(device) | {"sections": {}, "skipped": {}}
    record["correctness"] = check(device)
    wrong = [name for name, result in record["correctness"].items() if not result["correct"]]
    for name, result in record["correctness"].items():
        _out.print(f"{'WRONG' if name in wrong else 'ok':<6}{name}: {result}", style="red" if name in wrong else None)
    if wrong:
        _out.print("Not measured: the figures of a wrong kernel say nothing.", style="red")
        sys.exit(REFUSED)
    if check_only:
        return
    record["copy_bandwidth"] = copy_bandwidth(device)
    _out.print(f"copy bandwidth {record['copy_bandwidth'] / 1e12:.2f} TB/s")
    bandwidth = record["copy_bandwidth"]
    sections: dict[str, Callable[[Deadline], Iterator[dict[str, Any]]]] = {
        "ssm": lambda deadline: measure_ssm(device, bandwidth, deadline),
        "linear": lambda deadline: measure_linear(device, deadline),
        "decode": lambda deadline: measure_model("decode", model, layers, device, deadline),
        "prefill": lambda deadline: measure_model("prefill", model, layers, device, deadline),
    }
    for number, section in enumerate(chosen):
        if section in ("decode", "prefill") and importlib.util.find_spec("transformers") is None:
            record["skipped"][section] = "transformers is not installed"
            continue
        own = deadline.share(SHARES[section] / sum(SHARES[later] for later in chosen[number:]))
        entries = record["sections"][section] = []
        try:
            for entry in sections[section](own):
                entries.append(entry)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            record["skipped"][section] = f"failed after {len(entries)} figures: {error}"
        if own.passed():
            record["skipped"].setdefault(section, f"cut short: its share of {budget:.0f} s was spent")
        # Whatever happens later, this much is on disk.
        write(record, out)
    print_record(record)
    for path in write(record, out):
        _out.print(f"wrote {path}")


if __name__ == "__main__":
    cli.run("gpu", main)
