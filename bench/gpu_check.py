"""The kernels on the GPU of this machine against their references: what `bench.gpu` checks before it measures."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.roofline import VARIANTS, Variant
from bench.shapes import STEP_SHAPES, Shape
from qmamba_compile import layer_ops, ops, quant, recurrence, scan_gradient, scan_ops
from qmamba_compile.triton_templates import launch, launch_layers, launch_scan, tuning

CODES_OFF = 1e-5
"""Share of codes that may be off by one: exp and fused multiply-adds of the GPU differ from torch's in the last bit."""

SCALES_OFF = 1e-3
"""Share of codes whose scale may differ in its last of 8 bits for the same reason: about 2**-16 a scale and unit in the
last place of what it serves."""

TRAJECTORY_OFF = 5e-3
"""Share of a trajectory that may differ after some steps, each of which rounds `SCALES_OFF` of the scales differently.
What a wrong kernel makes differs everywhere."""

_CHECK_STEPS = 64


@dataclasses.dataclass
class Step:
    """A state and the inputs of one `ssm_update`, on a device; with a ring if the state is checkpointed."""

    variant: Variant
    state: Any
    inputs: Any
    calibrated: Tensor | None
    ring: recurrence.Ring | None = None

    @classmethod
    def random(cls, model: Shape, variant: Variant, batch: int, device: str, dtype: torch.dtype, seed: int = 0) -> Step:
        generator = torch.Generator(device).manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        nheads, groups, dstate = model.nheads, model.ngroups, model.dstate
        sizes = [nheads * model.headdim, groups * dstate, groups * dstate, nheads]
        x, B, C, dt = randn(batch, sum(sizes)).to(dtype).split(sizes, dim=-1)
        x, B, C = (t.unflatten(-1, (n, -1)) for t, n in ((x, nheads), (B, groups), (C, groups)))
        A = -torch.rand(nheads, generator=generator, device=device) * 4
        inputs = (x, dt, A, B, C, randn(nheads), randn(nheads) - 2)
        h = randn(batch, nheads, model.headdim, dstate)
        if variant.bits is None:
            return cls(variant, (h.to(getattr(torch, variant.state_dtype)),), inputs, None)
        calibrated = None if variant.dynamic else quant.store_scale(h.abs().mean(dim=(0, 2)).sqrt())
        rng = quant.new_rng(batch, seed, device)
        packed, channel_scale, state_scale = quant.quantize_state(h, variant.bits, state_scale=calibrated)
        state_scale_out = state_scale.clone() if variant.dynamic else None
        ring = None
        if variant.flush_interval > 1:
            interval = variant.flush_interval
            ring = recurrence.new_ring(batch, nheads, model.headdim, groups, dstate, interval, device=device)
        return cls(variant, (packed, channel_scale, state_scale_out, rng), inputs, calibrated, ring)

    def run(self, packed_step: Callable[..., Tensor | None] = launch.ssm_update) -> Tensor:
        """One step by our kernel.

        Raises:
            RuntimeError: there is no kernel for these arguments; a reference must not be measured in its place.
        """
        if self.variant.bits is None:
            y = launch.ssm_update_float(*self.state, *(*self.inputs, True))
        else:
            options = (self.calibrated, True, self.variant.bits, self.variant.stochastic)
            ring = () if self.ring is None else (self.ring,) if packed_step is launch.ssm_update else self.ring
            y = packed_step(*self.state, *self.inputs, *options, *ring)
        if y is None:
            raise RuntimeError(f"no kernel serves {self.variant.name} on this device")
        return y

    def copy(self, position: int | None = None) -> Step:
        """A copy with tensors of its own; ``position`` is where its sequences stand in their rings."""

        def clones(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
            return [None if t is None else t.clone() for t in tensors]

        ring = None if self.ring is None else recurrence.Ring(*clones(self.ring))  # type: ignore[arg-type]
        if ring is not None and position is not None:
            ring.position.fill_(position % self.variant.flush_interval)
        return dataclasses.replace(self, state=tuple(clones(self.state)), ring=ring)


def check_step(model: Shape, variant: Variant, device: str, steps: int = _CHECK_STEPS) -> dict[str, Any]:
    """Kernel and reference from the same state at each of ``steps`` steps: share of codes off, error of y."""
    step = Step.random(model, variant, 2, device, torch.bfloat16)
    if step.ring is not None:
        # The two sequences store at different steps.
        step.ring.position.copy_(torch.arange(2))
    off = beyond = seen = scales_off = 0
    worst = 0.0
    for number in range(steps):
        step.inputs = Step.random(model, variant, 2, device, torch.bfloat16, seed=number).inputs
        if variant.bits is None:
            state, expected = recurrence.step(step.state[0].float(), *(*step.inputs, True))
            y = step.run()
            unit = torch.finfo(step.state[0].dtype).eps
            beyond += int(((step.state[0].float() - state).abs() > 16 * unit * (1 + state.abs())).sum())
        else:
            reference = step.copy()
            expected = reference.run(ops.ssm_update_reference)
            y = step.run()
            found, wanted = (quant.unpack(s.state[0], variant.bits).int() for s in (step, reference))
            distance = (found - wanted).abs()
            # A scale whose last of 8 bits differs moves the codes of its row or column: seldom, and by one at 4 bits.
            same = (step.state[1] == reference.state[1])[..., None].expand_as(distance)
            if variant.dynamic:
                same = same & (step.state[2] == reference.state[2])[:, :, None, :]
            scales_off += int((~same).sum())
            off += int((distance[same] > 0).sum())
            beyond += int((distance > (1 if variant.bits < 8 else 2)).sum())
            seen += distance.numel()
            beyond += int(not torch.equal(step.state[3], reference.state[3]))
            if step.ring is not None and reference.ring is not None:
                for ours, theirs in zip(step.ring[:4], reference.ring[:4], strict=True):
                    # A dt whose last bit differs may round a 16-bit input to its neighbour.
                    unit = torch.finfo(ours.dtype).eps if ours.is_floating_point() else 0.0
                    beyond += int(((ours - theirs).abs() > unit * theirs.abs()).sum())
        worst = max(worst, float((y.float() - expected.float()).abs().max() / expected.float().abs().max()))
    within = off <= CODES_OFF * max(seen, 1) and scales_off <= SCALES_OFF * max(seen, 1)
    return {
        "codes_off_by_one": off,
        "codes_further_off": beyond,
        "codes_under_another_scale": scales_off,
        "codes": seen,
        "y_error": worst,
        "correct": beyond == 0 and within and worst <= 2 * torch.finfo(torch.bfloat16).eps,
    }


def check_linear(rows: int, outputs: int, inputs: int, device: str) -> dict[str, Any]:
    """Kernel against the integer product in float64, which is exact, and with a residual against their sum."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator, device=device)
    qdata, scale = quant.quantize_rows(torch.randn(outputs, inputs, generator=generator, device=device))
    y = layer_ops.w8a8_linear(x, qdata, scale, None, None, None)
    codes, row_scale = quant.quantize_rows(x)
    expected = (codes.double() @ qdata.double().t()).float() * row_scale * scale.view(1, -1)
    error = float((y - expected).abs().max() / expected.abs().max())
    residual = torch.randn(rows, outputs, generator=generator, device=device) * 50
    sums_off = 0
    # Triton's interpreter, where tests run this, truncates what it stores in bfloat16.
    for dtype, unit in ((torch.float32, 0.0), (torch.bfloat16, torch.finfo(torch.bfloat16).eps)):
        operands = (x.to(dtype), qdata, scale, None, None, None)
        y = layer_ops.w8a8_linear(*operands)
        off = (layer_ops.w8a8_linear(*operands, residual) - (residual + y)).abs() > unit * y.float().abs()
        sums_off += int(off.sum())
    return {"y_error": error, "sums_off": sums_off, "correct": error <= 1e-6 and not sums_off}


def check_norm_linear(rows: int, outputs: int, inputs: int, device: str, calls: int = 20) -> dict[str, Any]:
    """Linears behind their norms, one after another in a CUDA graph, as a model's: each against the same call alone."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator, device=device)
    call = functools.partial(_norm_linear, *quant.quantize_rows(weight))
    xs = [torch.randn(rows, inputs, generator=generator, device=device).bfloat16() for _ in range(calls)]
    alone = []
    for x in xs:
        alone.append(call(x).clone())
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        together = [call(x) for x in xs]
    graph.replay()
    torch.cuda.synchronize()
    differ = sum(not torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    # A residual stream in float32 holds more bits than the norm takes.
    stream = torch.randn(rows, inputs, generator=generator, device=device)
    differ += not torch.equal(call(stream, torch.bfloat16), call(stream.bfloat16()))
    return {"calls": calls, "differ": differ, "correct": differ == 0}


def _norm_linear(qdata: Tensor, scale: Tensor, x: Tensor, x_dtype: torch.dtype | None = None) -> Tensor:
    """`layer_ops.norm_w8a8_linear` of x [m, k] with a weight of 1 in bfloat16."""
    norm = torch.ones(x.shape[1], device=x.device, dtype=torch.bfloat16)
    linear = (qdata, scale, None, None, None, None)
    y: Tensor = torch.ops.qmamba.norm_w8a8_linear(x, None, norm, 1e-5, x.shape[1], *linear, x_dtype)
    return y


def check_scan(model: Shape, device: str, dtype: torch.dtype, tokens: int = 1000) -> dict[str, Any]:
    """Our scan kernel against the recurrence, token by token, over enough of them for several parts."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x, dt = randn(1, tokens, model.nheads, model.headdim), randn(1, tokens, model.nheads)
    B, C = randn(1, tokens, model.ngroups, model.dstate), randn(1, tokens, model.ngroups, model.dstate)
    A, D, bias = -torch.rand(model.nheads, device=device) * 4, randn(model.nheads), randn(model.nheads) - 2
    x, B, C = (t.to(dtype) for t in (x, B, C))
    found = launch_scan.chunk_scan(x, dt, A, B, C, D, bias, None, True, 0.0, float("inf"))
    if found is None:
        return {"correct": False, "reason": "no kernel serves these extents"}
    h = torch.zeros(1, model.nheads, model.headdim, model.dstate, device=device)
    ys = []
    for t in range(tokens):
        h, y = recurrence.step(h, x[:, t], dt[:, t], A, B[:, t], C[:, t], D, bias, True)
        ys.append(y)
    expected = torch.stack(ys, dim=1)
    error = float((found[0] - expected).abs().max() / expected.abs().max())
    state_error = float((found[1] - h).abs().max() / h.abs().max())
    # mamba-ssm's kernels, where they serve, multiply in TF32.
    return {"y_error": error, "state_error": state_error, "correct": max(error, state_error) <= 5e-3}


def check_conv(model: Shape, device: str, dtype: torch.dtype, tokens: int = 1000, steps: int = 8) -> dict[str, Any]:
    """Our convolution of a sequence, and of steps that go on from its middle, against torch's in float64."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    channels, begin = model.conv_dim, tokens // 2
    zxBCdt = randn(2, tokens, model.d_inner + channels + model.nheads)
    xBC = zxBCdt[..., model.d_inner : model.d_inner + channels].transpose(1, 2)
    weight, bias = randn(channels, 1, 4), randn(channels)
    found = launch_layers.causal_conv(xBC, weight, bias, True)
    state = xBC[..., begin - 4 : begin].contiguous()
    inputs = (xBC[..., t : t + 1] for t in range(begin, begin + steps))
    stepped = [launch_layers.conv_update(state, x, weight, bias, True) for x in inputs]
    if found is None or any(y is None for y in stepped):
        return {"correct": False, "reason": "no kernel serves these extents"}
    expected = layer_ops.causal_conv_reference(xBC.double(), weight.double(), bias.double(), True)
    largest = expected.abs().max()
    error = float((found - expected).abs().max() / largest)
    expected = expected[..., begin : begin + steps]
    step_error = float((torch.cat(stepped, dim=-1) - expected).abs().max() / largest)  # type: ignore[arg-type]
    # Rounded before silu and after.
    correct = max(error, step_error) <= 2 * torch.finfo(dtype).eps
    return {"y_error": error, "step_error": step_error, "correct": correct}


def check_quantized_scan(model: Shape, variant: Variant, device: str, tokens: int = 16) -> dict[str, Any]:
    """The faithful scan and its gradient against their references: the share of codes, y and gradients that are off.

    Nothing brings two trajectories together again once a code or a scale has been rounded to its other neighbour, so
    what is bounded is how many are touched.
    """
    step = Step.random(model, variant, 2, device, torch.bfloat16)
    generator = torch.Generator(device).manual_seed(1)
    x, dt, B, C = (
        torch.randn((2, tokens, *t.shape[1:]), generator=generator, device=device).to(t.dtype)
        for t in (step.inputs[index] for index in (0, 1, 3, 4))
    )
    _, _, A, _, _, D, bias = step.inputs
    options = (None, step.calibrated, True, 0.0, float("inf"), variant.bits, variant.stochastic, 7, 1)
    dt_steps, decay = scan_ops.step_sizes(dt, A, bias, True, 0.0, float("inf"))
    kernel = (x, dt_steps, decay, B, C)
    rule = recurrence.StoreRule(variant.bits, variant.stochastic, seed=7, state_scale=step.calibrated)
    found = launch_scan.ssm_scan(*kernel, D, (None, None), rule)
    grad_y = torch.randn(x.shape, generator=generator, device=device)
    grads = launch_scan.ssm_scan_backward(grad_y, None, *kernel, (None, None), rule)
    if found is None or grads is None:
        return {"correct": False, "reason": "no kernel serves these extents"}
    y, packed, *_ = scan_ops.ssm_scan_quantized_reference(x, dt, A, B, C, D, bias, *options)
    codes = found[1].int() - (quant.unpack(packed, variant.bits) if variant.bits is not None else packed).int()
    store = scan_ops.StateStore(rule, quant.new_rng(2, 7, device))
    state = store(x.new_zeros(found[1].shape, dtype=torch.float32))
    wanted = scan_gradient.scan_backward_reference(grad_y, None, *kernel, state, store)

    def share_off(ours: Tensor, reference: Tensor) -> float:
        return float(((ours - reference).abs() > 1e-3 * reference.abs().max()).float().mean())

    result = {
        "codes_off": float((codes != 0).float().mean()),
        "y_off": share_off(found[0], y),
        "gradients_off": max(share_off(a, b) for a, b in zip(grads, wanted, strict=True)),
    }
    furthest = int(codes.abs().max())
    correct = furthest <= (1 if variant.bits != 8 else 2) and max(result.values()) <= TRAJECTORY_OFF
    return result | {"furthest": furthest, "correct": correct}


def check(device: str) -> dict[str, dict[str, Any]]:
    """Everything that is measured below, by name."""
    model = STEP_SHAPES["130m"]
    results = {f"ssm {name}": check_step(model, variant, device) for name, variant in VARIANTS.items()}
    for name, variant in VARIANTS.items():
        if variant.flush_interval > 1:
            # As larger batches run, and one program walking over both sequences.
            with mock.patch.object(tuning, "launches", lambda spec, programs, batch: {True: 1, False: batch}):
                results[f"ssm {name}, two launches"] = check_step(model, variant, device)
    for rows in (1, 7, 16, 64):
        results[f"linear {rows} rows"] = check_linear(rows, 768, 1536, device)
        results[f"norm and linear, {rows} rows"] = check_norm_linear(rows, 768, 1536, device)
    for dtype in (torch.float32, torch.bfloat16):
        results[f"convolution {dtype}"] = check_conv(model, device, dtype)
        results[f"chunk_scan {dtype}"] = check_scan(model, device, dtype)
    for name in ("int4 calibrated", "int4 dynamic", "int4 stochastic"):
        results[f"ssm_scan_quantized {name}"] = check_quantized_scan(model, VARIANTS[name], device)
    return results
