"""The demo of `make demo`: the bundled model three ways, side by side: eager float32, plain Inductor, W8A8H4.

Perplexity is that of the recurrence: held-out windows are fed byte by byte through decode. W8A8H4 runs with the
default options, which store the 4-bit state once in eight steps and keep the inputs since in a ring; beside it stands
what the smallest state costs, without a ring: stored at every step, rounded stochastically.
Writes ``build/demo.json``.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

for _noisy in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)

import rich.console  # noqa: E402
import rich.progress  # noqa: E402
import rich.table  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor  # noqa: E402

from qmamba_compile import DSQState  # noqa: E402
from qmamba_compile.passes.int8_weight import held_nbytes  # noqa: E402

HERE = Path(__file__).resolve().parent
VARIANTS = ("eager_fp32", "inductor_fp32", "w8a8h4")
EVERY_STEP = "w8a8h4_flush1"
PROMPT = 'import os\nimport sys\n\n\ndef read_config(path):\n    """'
TIMED_BLOCKS, BLOCK_STEPS = 9, 16
console = rich.console.Console()


class Variant:
    """One way to run the model: a prefill that fills a cache and a decode step that continues it."""

    def __init__(self, name: str, model: Any) -> None:
        self.name = name
        self.model = copy.deepcopy(model)
        # As transformers 5.24 and later call the argument and the output, or earlier ones.
        self.cache = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "cache_params"
        self.prefill = self.decode = self.model.forward
        if name == "inductor_fp32":
            # Its prefill stays eager: compiling it with dynamic shapes takes minutes, and only decode is measured.
            self.decode = torch.compile(self.model, dynamic=True)
        elif name == "w8a8h4":
            self.model.compile(backend="qmamba", dynamic=True)
            self.prefill = self.decode = self.model
        elif name == EVERY_STEP:
            # Only its perplexity and size are wanted, which do not depend on who compiles what surrounds the kernels.
            options = {"flush_interval": 1, "rounding": "stochastic", "inner_backend": "eager"}
            self.model.compile(backend="qmamba", options=options)
            self.prefill = self.decode = self.model

    def start(self, ids: Tensor) -> tuple[Tensor, Any]:
        """Logits [b, vocab] behind ``ids`` [b, l], and the cache."""
        output = self.prefill(input_ids=ids, use_cache=True)
        return output.logits[:, -1], output[self.cache]

    def step(self, ids: Tensor, cache: Any) -> Tensor:
        """Logits [b, vocab] behind one more byte ``ids`` [b, 1]."""
        return self.decode(input_ids=ids, use_cache=True, **{self.cache: cache}).logits[:, -1]


def held_out_windows(count: int, length: int) -> Tensor:
    """[count, length] bytes, spread evenly over demo/heldout.txt."""
    text = torch.frombuffer(bytearray((HERE / "heldout.txt").read_bytes()), dtype=torch.uint8).long()
    starts = torch.linspace(0, len(text) - length, count).long()
    return torch.stack([text[start : start + length] for start in starts])


def perplexity(variant: Variant, windows: Tensor, advance: Callable[[], None]) -> float:
    """Perplexity a byte of ``windows`` [b, l], one recurrent step a byte."""
    logits, cache = variant.start(windows[:, :8])
    nats = torch.zeros((), dtype=torch.float64)
    for position in range(8, windows.shape[1]):
        target = windows[:, position]
        nats += torch.nn.functional.cross_entropy(logits.float(), target, reduction="sum")
        logits = variant.step(target[:, None], cache)
        advance()
    return math.exp(nats.item() / (windows.shape[0] * (windows.shape[1] - 8)))


def tokens_per_second(
    variants: list[Variant], batch: int, windows: Tensor, advance: Callable[[], None]
) -> dict[str, float]:
    """Median decode speed of each variant; blocks of steps are interleaved, so drift of the machine hits all alike."""
    caches = {variant.name: variant.start(windows[:batch, :8])[1] for variant in variants}
    ids = windows[:batch, 8:9].contiguous()
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for block in range(TIMED_BLOCKS + 1):
        for variant in variants:
            began = time.perf_counter()
            for _ in range(BLOCK_STEPS):
                variant.step(ids, caches[variant.name])
            # The first block compiles and warms up.
            if block:
                seconds[variant.name].append(time.perf_counter() - began)
            advance()
    return {name: batch * BLOCK_STEPS / statistics.median(times) for name, times in seconds.items()}


def state_numbers(variant: Variant, ids: Tensor) -> tuple[int, float]:
    """Bytes of one sequence's SSM states, all layers, and bits per element."""
    states = [layer.recurrent_states[0] for layer in variant.start(ids)[1].layers]
    held = sum(state.packed_nbytes if isinstance(state, DSQState) else state.nbytes for state in states)
    return held, 8 * held / sum(state.numel() for state in states)


def write_completion(variant: Variant, length: int) -> str:
    """Sampled continuation of the prompt by the compiled model; greedily, so small a model soon repeats itself."""
    ids = torch.tensor([list(PROMPT.encode())])
    torch.manual_seed(0)
    generated = variant.model.generate(ids, max_new_tokens=length, do_sample=True, temperature=0.6)
    return bytes(generated[0].tolist()).decode("utf-8", "replace")


def show(results: dict[str, dict[str, Any]]) -> None:
    """The table."""
    table = rich.table.Table(title="bundled model, decode")
    table.add_column("")
    for name in (*VARIANTS, EVERY_STEP):
        table.add_column(name, justify="right")

    def over_float(name: str) -> str:
        return f"{results['perplexity'][name] / results['perplexity']['eager_fp32'] - 1:+.2%}"

    def speed(name: str, batch: str) -> str:
        return f"{results['tokens_per_s'][name][batch]:,.0f}" if name in results["tokens_per_s"] else ""

    rows: list[tuple[str, Callable[[str], str]]] = [
        ("held-out perplexity a byte", lambda v: f"{results['perplexity'][v]:.4f}"),
        ("  over float32", over_float),
        ("bits per state element", lambda v: f"{results['state_bits_per_element'][v]:.2f}"),
        ("bytes of weights", lambda v: f"{results['weight_bytes'][v]:,}"),
        ("bytes of state, one sequence", lambda v: f"{results['state_bytes'][v]:,}"),
        ("tokens/s, batch 1", lambda v: speed(v, "1")),
        ("tokens/s, batch 8", lambda v: speed(v, "8")),
    ]
    for label, cell in rows:
        table.add_row(label, *(cell(name) for name in (*VARIANTS, EVERY_STEP)))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=32, help="held-out windows, run as one batch")
    parser.add_argument("--length", type=int, default=1024, help="bytes of a window")
    parser.add_argument("--out", type=Path, default=Path("build/demo.json"))
    args = parser.parse_args()

    transformers.logging.set_verbosity_error()
    torch._dynamo.config.recompile_limit = 64
    model = transformers.AutoModelForCausalLM.from_pretrained(HERE / "tiny-mamba2").eval().requires_grad_(False)
    windows = held_out_windows(args.windows, args.length)
    variants = [Variant(name, model) for name in VARIANTS]
    results: dict[str, Any] = {
        key: {} for key in ("perplexity", "weight_bytes", "state_bytes", "state_bits_per_element", "tokens_per_s")
    }
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
    )
    with rich.progress.Progress(*columns, console=console) as progress, torch.no_grad():
        every_step = Variant(EVERY_STEP, model)
        for variant in [*variants, every_step]:
            task = progress.add_task(f"perplexity   {variant.name}", total=args.length - 8)
            results["perplexity"][variant.name] = perplexity(variant, windows, lambda t=task: progress.advance(t))
        for batch in (8, 1):
            task = progress.add_task(f"speed        batch {batch}", total=len(variants) * (TIMED_BLOCKS + 1))
            speeds = tokens_per_second(variants, batch, windows, lambda t=task: progress.advance(t))
            for name, speed in speeds.items():
                results["tokens_per_s"].setdefault(name, {})[str(batch)] = round(speed, 1)
        task = progress.add_task("completion   w8a8h4", total=1)
        completion = write_completion(variants[-1], 300)
        progress.advance(task)
        for variant in [*variants, every_step]:
            held, bits = state_numbers(variant, windows[:1, :8])
            results["state_bytes"][variant.name], results["state_bits_per_element"][variant.name] = held, bits
            results["weight_bytes"][variant.name] = held_nbytes(variant.model)
    console.rule("written by the compiled model (W8A8H4)")
    sys.stdout.write(completion + "\n")
    console.rule()
    show(results)
    console.print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {windows.numel():,} held-out bytes", style="dim"
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    console.print(f"written to {args.out}", style="dim")


if __name__ == "__main__":
    main()
