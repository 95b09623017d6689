"""Train the demo model: a byte-level Mamba2 on the Python standard library.

    python demo/train.py --resume          # train, evaluate, save to demo/tiny-mamba2
    python demo/train.py --export          # evaluate and save the latest checkpoint as it is
    python demo/train.py --write-heldout   # only rewrite demo/heldout.txt

A token is a byte, so no tokenizer is needed. The saved model is a stock transformers checkpoint. Files whose
name hashes into the held-out set are never trained on; ``demo/heldout.txt`` is made of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fast_mamba2 import fast_mamba2
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM

DEMO = Path(__file__).resolve().parent
HELDOUT = DEMO / "heldout.txt"
HELDOUT_LIMIT = 390_000
# Tests would be two thirds of the text, and tables and generated files teach no Python.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
EVAL_WINDOW = 1024
# What a checkpoint must agree on to continue it.
IDENTITY = ("d_model", "layers", "batch", "seqlen", "steps", "horizon", "cooldown", "lr", "seed")


def stdlib_files(heldout: bool) -> dict[str, bytes]:
    """Sources of this interpreter's standard library by relative name: the held-out ones, or the others."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts: dict[str, bytes] = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        generated = name.parts[0].startswith("config-") or name.name.startswith("_sysconfigdata")
        if generated or SKIPPED_FOLDERS & set(name.parts):
            continue
        # By name, so that the split is the same on every machine and survives a patch release.
        if (hashlib.sha256(name.as_posix().encode()).digest()[0] % 16 == 0) != heldout:
            continue
        text = path.read_bytes()
        try:
            text.decode("utf-8")
        except UnicodeDecodeError:
            continue
        texts[name.as_posix()] = text
    return texts


def write_heldout(path: Path) -> None:
    """Join held-out files, in the order of their names, into at most ``HELDOUT_LIMIT`` bytes."""
    joined = b""
    for text in stdlib_files(heldout=True).values():
        if len(joined) + len(text) <= HELDOUT_LIMIT:
            joined += text
    path.write_bytes(joined)


class Batches:
    """Blocks of text, each once an epoch: a function of seed and step, so a resume repeats none."""

    def __init__(self, data: Tensor, batch: int, seqlen: int, seed: int) -> None:
        self.data, self.batch, self.seqlen, self.seed = data, batch, seqlen, seed
        # One block fewer, to leave room for each epoch's random phase.
        self.steps_per_epoch = ((len(data) - 1) // seqlen - 1) // batch

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Input ids and targets, each [b, l] int64."""
        epoch, index = divmod(step, self.steps_per_epoch)
        rng = np.random.default_rng((self.seed, epoch))
        phase = int(rng.integers(self.seqlen))
        order = rng.permutation(self.steps_per_epoch * self.batch)
        blocks = order[index * self.batch : (index + 1) * self.batch]
        rows = [self.data[start : start + self.seqlen + 1] for start in phase + blocks * self.seqlen]
        ids = torch.stack(rows).long()
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def as_bytes(text: bytes) -> Tensor:
    """[l] uint8."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


@torch.no_grad()
def bits_per_byte(model: nn.Module, data: Tensor, windows: int | None = None) -> float:
    """Mean over ``windows`` (default: all) windows of ``EVAL_WINDOW`` bytes, each from an empty state."""
    count = (len(data) - 1) // EVAL_WINDOW
    nats = []
    for index in range(0, count, max(1, count // windows) if windows else 1):
        ids = data[index * EVAL_WINDOW :][: EVAL_WINDOW + 1].long()[None]
        logits = model(ids[:, :-1], use_cache=False).logits[0].float()
        nats.append(F.cross_entropy(logits, ids[0, 1:]).item())
    return sum(nats) / len(nats) / math.log(2)


def make_model(args: argparse.Namespace) -> Mamba2ForCausalLM:
    """A float32 model with random weights."""
    config = Mamba2Config(
        vocab_size=256,
        hidden_size=args.d_model,
        num_hidden_layers=args.layers,
        num_heads=2 * args.d_model // 64,
        head_dim=64,
        state_size=64,
        n_groups=1,
        chunk_size=64,
        initializer_range=0.02,
        rescale_prenorm_residual=True,
        tie_word_embeddings=True,
        # Every id is a byte of text: none may end or pad a generation.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return Mamba2ForCausalLM(config)


def make_optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the projections: 2.44 bits a byte after 120 steps, where AdamW alone has 2.51."""
    projections, rest = list[nn.Parameter](), list[nn.Parameter]()
    for name, parameter in model.named_parameters():
        (projections if name.endswith(("in_proj.weight", "out_proj.weight")) else rest).append(parameter)
    return [
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
        torch.optim.Muon(projections, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]


def lr_factor(step: int, steps: int, horizon: int, cooldown: int, warmup: int = 100) -> float:
    """Linear warmup, a cosine that would reach zero at ``horizon``, and a linear way down over the last ``cooldown``.

    A function of the step alone, so a resume keeps the schedule.
    """
    if step < warmup:
        return (step + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, horizon - warmup)))
    return cosine * min(1.0, (steps - step) / cooldown)


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Write beside ``path`` and rename, so that a kill leaves the old checkpoint or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    torch.save(state, partial)
    os.replace(partial, path)


def compiled_loss(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The training loss in bits per byte, under bf16 autocast, compiled by Inductor."""

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()) / math.log(2)

    return torch.compile(loss, fullgraph=True)


def train(model: Mamba2ForCausalLM, args: argparse.Namespace, heldout: Tensor, console: Console) -> None:
    """Train to ``args.steps``, from the checkpoint if ``args.resume`` and there is one."""
    optimizers = make_optimizers(model, args.lr)
    identity = {key: getattr(args, key) for key in IDENTITY}
    first = 0
    if args.resume and args.checkpoint.exists():
        state = torch.load(args.checkpoint, weights_only=True)
        if state["identity"] != identity:
            raise SystemExit(
                f"{args.checkpoint}: made with {state['identity']}, not {identity}; remove it or pass these"
            )
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first = state["step"]
        console.print(f"resumed at step {first}")
    text = b"".join(stdlib_files(heldout=False).values())
    batches = Batches(as_bytes(text), args.batch, args.seqlen, args.seed)
    console.print(f"{len(text) / 1e6:.1f} MB of text, {batches.steps_per_epoch} steps an epoch")
    progress = Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console)
    loss_of = compiled_loss(model)
    mark, window = time.perf_counter(), torch.zeros(())
    with fast_mamba2(model, args.seqlen), progress:
        task = progress.add_task("compiling", total=args.steps, completed=first)
        for step in range(first, args.steps):
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = args.lr * lr_factor(step, args.steps, args.horizon, args.cooldown)
            loss = loss_of(*batches(step))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            window += loss.detach() / args.log_every
            done = step + 1
            progress.update(task, completed=done, description=f"{loss.item():.3f} bits/byte")
            if done % args.log_every == 0:
                rate = args.log_every * args.batch * args.seqlen / (time.perf_counter() - mark)
                console.print(f"step {done}: {window.item():.4f} bits/byte, {rate:,.0f} bytes/s")
                mark, window = time.perf_counter(), torch.zeros(())
            if done % args.save_every == 0 or done == args.steps:
                states = [optimizer.state_dict() for optimizer in optimizers]
                state = {
                    "identity": identity,
                    "step": done,
                    "model": model.state_dict(),
                    "optimizers": states,
                }
                save_atomically(state, args.checkpoint)
                sample = bits_per_byte(model, heldout, windows=32)
                console.print(f"step {done}: {sample:.4f} bits/byte on 32 held-out windows")


def parse_args() -> argparse.Namespace:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--out", type=Path, default=DEMO / "tiny-mamba2", help="where the model is saved")
    parser.add_argument("--checkpoint", type=Path, default=DEMO.parent / "build/train/checkpoint.pt")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint if there is one")
    parser.add_argument("--export", action="store_true", help="save the checkpoint without training")
    parser.add_argument("--write-heldout", action="store_true", help="only write demo/heldout.txt")
    parser.add_argument("--write-training", type=Path, help="only write the training text to this file")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--horizon", type=int, default=3000, help="where the cosine would end without the cooldown")
    parser.add_argument("--cooldown", type=int, default=250, help="steps over which the learning rate goes to zero")
    parser.add_argument("--d-model", type=int, default=160, help="a multiple of 32")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=1024, help="a multiple of 64")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--save-every", type=int, default=250)
    return parser.parse_args()


def main() -> None:
    args, console = parse_args(), Console()
    if args.write_heldout or not HELDOUT.exists():
        write_heldout(HELDOUT)
        console.print(f"{HELDOUT}: {HELDOUT.stat().st_size} bytes")
    if args.write_training is not None:
        args.write_training.parent.mkdir(parents=True, exist_ok=True)
        args.write_training.write_bytes(b"".join(stdlib_files(heldout=False).values()))
    if args.write_heldout or args.write_training is not None:
        return
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    heldout = as_bytes(HELDOUT.read_bytes())
    model = make_model(args)
    if args.export:
        model.load_state_dict(torch.load(args.checkpoint, weights_only=True)["model"])
    else:
        train(model, args, heldout, console)
    model.save_pretrained(args.out)
    # Reloaded, to measure what was saved, and on the stock code.
    saved = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    result = {"bits_per_byte": round(bits_per_byte(saved, heldout), 4), "parameters": saved.num_parameters()}
    console.print(json.dumps(result))


if __name__ == "__main__":
    main()
