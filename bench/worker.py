"""What has to run in a process of its own: compile times and peak memory. Started by `ask`, answers in JSON."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qmamba_compile import QMambaError

_ROOT = Path(__file__).resolve().parents[1]


class WorkerError(QMambaError):
    """A process that was to measure something failed."""


def ask(task: str, arguments: Mapping[str, Any], cache_dir: str | None = None) -> dict[str, Any]:
    """The answer of ``task`` (a function of this module) in a fresh process.

    Args:
        cache_dir: where Inductor, and our kernels with it, keep what they compiled.

    Raises:
        WorkerError: the process failed; the message ends with its last words.
    """
    environment = dict(os.environ)
    if cache_dir is not None:
        environment["TORCHINDUCTOR_CACHE_DIR"] = cache_dir
    command = [sys.executable, "-m", "bench.worker", task, json.dumps(arguments)]
    result = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        last = "\n".join(result.stderr.strip().splitlines()[-5:])
        raise WorkerError(f"{task} of {arguments.get('variant')} exited with {result.returncode}:\n{last}")
    return json.loads(result.stdout.splitlines()[-1])


def compile_times(
    *, shape: str, variant: str, batch: int, length: int, threads: int, option: list[str]
) -> dict[str, Any]:
    """Seconds that the first call takes longer than the second, and the error of its logits, by phase."""
    import torch
    from torch._dynamo.utils import counters

    from .measure import Gate
    from .shapes import shape_named
    from .variants import EAGER, Models, Runner, random_ids, with_options

    torch.set_num_threads(threads)
    torch._dynamo.config.recompile_limit = 64
    known = with_options(option)
    models = Models(shape_named(shape))
    prompt = random_ids(models.shape, batch, length, seed=3)
    token = prompt[:, :1].contiguous()
    runners = [Runner(known[EAGER], models), Runner(known[variant], models)]
    outputs: list[dict[str, Any]] = []
    seconds: dict[str, float] = {}
    with torch.no_grad():
        for runner in runners:
            with runner.compiling():
                (logits, cache), seconds["prefill"] = _first_over_second(lambda r=runner: r.prefill(prompt))  # type: ignore[misc]
                step, seconds["decode"] = _first_over_second(lambda r=runner, c=cache: r.step(token, c).clone())  # type: ignore[misc]
            outputs.append({"prefill": logits.float(), "decode": step.float()})
    tolerance = known[variant].tolerance
    errors = {phase: Gate.of(outputs[1][phase], outputs[0][phase], tolerance).error for phase in seconds}
    inductor, autograd = counters["inductor"], counters["aot_autograd"]
    return {
        "seconds": seconds,
        "errors": errors,
        "tolerance": tolerance,
        "hits": inductor["fxgraph_cache_hit"] + autograd["autograd_cache_hit"],
        "misses": inductor["fxgraph_cache_miss"] + autograd["autograd_cache_miss"],
        "bypassed": inductor["fxgraph_cache_bypass"] + autograd["autograd_cache_bypass"],
    }


def _first_over_second(call: Callable[[], Any]) -> tuple[Any, float]:
    """What the first call returned, and how much longer than the second it took."""
    began = time.perf_counter()
    result = call()
    between = time.perf_counter()
    call()
    return result, (between - began) - (time.perf_counter() - between)


def memory(*, shape: str, variant: str, batch: int, length: int, threads: int, option: list[str]) -> dict[str, Any]:
    """Bytes of weights and state as they are held, and resident memory around a prefill that is already compiled."""
    import torch

    from .shapes import shape_named
    from .variants import Models, Runner, random_ids, state_bytes, with_options

    torch.set_num_threads(threads)
    torch._dynamo.config.recompile_limit = 64
    chosen = with_options(option)[variant]
    models = Models(shape_named(shape))
    prompt = random_ids(models.shape, batch, length, seed=3)
    runner = Runner(chosen, models)
    if chosen.weights != "float32":
        del models.float32
    with torch.no_grad():
        with runner.compiling():
            _, cache = runner.prefill(prompt)
        held = state_bytes(cache)
        del cache
        gc.collect()
        _return_freed_memory()
        before = _resident("VmRSS")
        _forget_peak()
        logits, _ = runner.prefill(prompt)
        peak = _resident("VmHWM")
    if not bool(logits.isfinite().all()):
        raise WorkerError(f"{variant}: the logits are not finite; its memory would say nothing")
    return {
        "weights": runner.weight_bytes,
        "weights_held": runner.held_bytes,
        "state": held,
        "resident": before,
        "peak": peak,
    }


def calibration(*, shape: str, length: int, threads: int) -> dict[str, Any]:
    """Seconds of each part for one window and one block (statistics: two blocks and the head); peak resident memory."""
    import dataclasses
    import tempfile

    import torch

    from calibrate.capture import capture
    from calibrate.esr import FRACTIONS, EsrOptions, Reconstruction
    from calibrate.quantized_model import quantized_copy
    from calibrate.recurrence import Recurrence, float_scan
    from calibrate.state_scales import power_scale
    from calibrate.work import Work

    from .shapes import shape_named
    from .variants import random_ids

    torch.set_num_threads(threads)
    # Two blocks: one to tune, one behind it.
    small = dataclasses.replace(shape_named(shape), n_layers=2)
    model = small.build()
    ids = random_ids(small, 2, length, seed=3)
    seconds: dict[str, float] = {}

    def timed(call: Callable[[], Any]) -> tuple[Any, float]:
        began = time.perf_counter()
        return call(), time.perf_counter() - began

    statistics, seconds["capture"] = timed(lambda: capture(model, [ids[:1]]))
    scales = {layer: power_scale(statistics, layer, 0.5) for layer in statistics.state_sum}
    with tempfile.TemporaryDirectory() as folder:
        esr = Reconstruction(
            model,
            quantized_copy(model),
            Recurrence(4, state_scale=scales),
            EsrOptions(batch=1, epochs=1),
            ids[:1],
            ids[1:],
            smooth=None,
            seed=0,
            work=Work(Path(folder) / "esr", {}, resume=False),
            memory_limit=2**31,
        )
        hidden = esr._embedded(esr.blocks, esr.sample_ids)
        floats = esr._embedded(esr.float_blocks, esr.sample_ids)
        other = esr._embedded(esr.blocks, esr.validation_ids)
        esr._validate(other, 0)  # compiles what the process needs
        nats, validate = timed(lambda: esr._validate(other, 0))
        layer = esr.blocks.mixer[0]
        _, tune = timed(lambda: esr._tune(0, layer, hidden, floats, other, nats, lambda text, steps: None))
        _, seconds["float_forward"] = timed(
            lambda: esr._advance(esr.float_blocks, float_scan, esr.sample_ids, floats, 0)
        )
        _, seconds["quantized_forward"] = timed(
            lambda: esr._advance(esr.blocks, esr.recurrence, esr.sample_ids, hidden, 0)
        )
    # A decision validates once for each fraction of the way.
    seconds["step"] = max(0.0, tune - len(FRACTIONS) * validate)
    seconds["head"] = max(0.0, validate - 2 * seconds["quantized_forward"])
    held = sum(parameter.nbytes for parameter in model.parameters())
    return {**seconds, "peak": _resident("VmHWM"), "weights": held}


def _return_freed_memory() -> None:
    """Hand freed pages back, or the peak would start from what compilation left behind."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _resident(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS (now) or VmHWM (most since `_forget_peak`)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise WorkerError(f"{field} is not in /proc/self/status; peak memory is measured on Linux only")


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "compile_times": compile_times,
    "memory": memory,
    "calibration": calibration,
}


if __name__ == "__main__":
    print(json.dumps(TASKS[sys.argv[1]](**json.loads(sys.argv[2]))))
