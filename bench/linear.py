"""How fast is an int8 linear, activation quantization included, against floating point?

For every linear of a shape and several numbers of rows (tokens). One call runs through as many layers as the model
has, each with a weight of its own, so that weights are as cold as in a model. What is compiled is called without
Dynamo (`compile_graph`), and memory of outputs is used again (`keep_freed_memory`), for all variants alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torchao.quantization import Int8Tensor

import qmamba_compile.ops  # noqa: F401  (registers qmamba::*)
from qmamba_compile.cpu_templates.call_site import inductor_options
from qmamba_compile.huge_pages import HugePages
from qmamba_compile.passes.int8_weight import quantize_weight

from . import cli
from .compiled import compile_graph
from .measure import Gate, Work, keep_freed_memory
from .record import Record, console
from .shapes import Linear, shape_named

FLOAT = "float32"
FLOAT_FREEZING = "inductor-freezing-float32"  # without freezing Inductor calls what FLOAT does: 1 to 3 % slower
HALF = "bfloat16"
INT_MM = "eager-int-mm"
TORCHAO = "torchao-inductor-freezing"
OURS = "ours-w8a8"
VARIANTS = (FLOAT, FLOAT_FREEZING, HALF, INT_MM, TORCHAO, OURS)

# bfloat16 leaves 0.2 % of noise on random normal numbers, 8 bits for weights and activations 1.2 %.
_TOLERANCES = {FLOAT: 0.0, FLOAT_FREEZING: 1e-5, HALF: 0.005}
_INT8_TOLERANCE = 0.02

_HEADS = 4
"""Copies of ``lm_head``: in a model everything else is read between two calls of it."""

Call = Callable[[Tensor], list[Tensor]]


def main(
    shape: cli.ShapeName = "130m",
    rows: Annotated[str, typer.Option(help="Numbers of rows (M), separated by commas.")] = "1,4,64,512",
    variants: cli.Variants = "",
    repeats: cli.Repeats = 15,
    threads: cli.Threads = 0,
    json: cli.JsonFile = None,
    plot: cli.PlotFile = None,
) -> None:
    """Seconds of the linears of all layers, quantization of activations included."""
    dimensions = shape_named(shape)
    sizes = cli.parse_numbers(rows, "--rows")
    chosen = list(dict.fromkeys([FLOAT, *cli.choose(variants, VARIANTS)]))
    arguments = {"shape": shape, "rows": sizes, "variants": chosen, "repeats": repeats}
    torch._dynamo.config.recompile_limit = 64
    keep_freed_memory()
    with torch.no_grad(), cli.recording("linear", arguments, threads=threads, json=json, plot=plot) as found:
        for linear in dimensions.linears:
            with console.status(f"making the weights of {linear.name}"):
                layers = _Layers(linear, chosen)
            for size in sizes:
                _measure(found, shape, layers, size, repeats)
            torch._dynamo.reset()


class _Layers:
    """The linears of one kind, in every layer, in the form that each variant needs."""

    def __init__(self, linear: Linear, chosen: Sequence[str]) -> None:
        self.linear = linear
        self.count = linear.count if linear.count > 1 else _HEADS
        extents = (linear.out_features, linear.in_features)
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(extents, generator=generator) for _ in range(self.count)]
        pages = HugePages()
        int8 = [quantize_weight(w, pages=pages) for w in weights] if {INT_MM, OURS} & set(chosen) else []
        calls: dict[str, Callable[[], Call]] = {
            FLOAT: lambda: lambda x: [F.linear(x, w) for w in weights],
            FLOAT_FREEZING: lambda: _inductor(_float_layers(weights), freezing=True),
            HALF: lambda: _half([w.bfloat16() for w in weights]),
            INT_MM: lambda: lambda x: [_int_mm_linear(x, w.qdata, w.scale) for w in int8],
            TORCHAO: lambda: _torchao(weights),
            OURS: lambda: _ours(int8),
        }
        self.calls = {name: calls[name]() for name in chosen}

    def work(self, variant: str, rows: int) -> Work:
        width = 2 if variant == HALF else 1 if variant in (INT_MM, TORCHAO, OURS) else 4
        weights = self.linear.in_features * self.linear.out_features
        scales = 4 * self.linear.out_features if width == 1 else 0
        activations = 4 * rows * (self.linear.in_features + self.linear.out_features)
        read = self.count * (weights * width + scales + activations)
        arithmetic = {4: "float32_ops", 2: "bfloat16_ops", 1: "int8_ops"}[width]
        return Work(read=read, **{arithmetic: self.count * 2 * rows * weights})


def _measure(found: Record, shape: str, layers: _Layers, rows: int, repeats: int) -> None:
    x = torch.randn(rows, layers.linear.in_features, generator=torch.Generator().manual_seed(rows))
    gates: dict[str, Gate] = {}
    reference: Tensor | None = None
    for name, call in layers.calls.items():
        with console.status(f"compiling and checking {name}, {layers.linear.name}, {rows} rows"):
            y = torch.stack(call(x))
        reference = y if reference is None else reference
        gates[name] = Gate.of(y, reference, _TOLERANCES.get(name, _INT8_TOLERANCE))
    calls = {name: lambda call=call: call(x) for name, call in layers.calls.items()}
    work = {name: layers.work(name, rows) for name in calls}
    group = {"shape": shape, "linear": layers.linear.name, "layers": layers.count, "rows": rows}
    cli.compare(found, group, calls, gates, work, repeats=repeats, against=(FLOAT, FLOAT_FREEZING), block_seconds=0.02)


def _half(weights: Iterable[Tensor]) -> Call:
    held = list(weights)
    return lambda x: [F.linear(x.bfloat16(), w).float() for w in held]


def _int_mm_linear(x: Tensor, qdata: Tensor, scale: Tensor) -> Tensor:
    """What torch offers without a kernel of one's own: quantize, library product, dequantize, all eager."""
    step = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 127
    codes = (x / step).round().to(torch.int8)
    return torch._int_mm(codes, qdata.t()) * step * scale.view(1, -1)


class _Int8Linear(nn.Module):
    """Our operator on the codes and scales of one weight."""

    def __init__(self, qdata: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("qdata", qdata)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.qmamba.w8a8_linear.default(x, self.qdata, self.scale, None, None, None)


class _AllLayers(nn.Module):
    """One graph of all layers: a call of Dynamo a layer would be measured too."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


def _float_layers(weights: Iterable[Tensor]) -> _AllLayers:
    linears = []
    for weight in weights:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linears.append(linear)
    return _AllLayers(linears)


def _inductor(module: nn.Module, *, freezing: bool = False, **options: Any) -> Call:
    """`compile_graph` of ``module`` at the first call with an ``x`` of a new shape, all inputs but ``x`` bound."""
    compiled: dict[torch.Size, Call] = {}

    def call(x: Tensor) -> list[Tensor]:
        if x.shape not in compiled:
            # Dynamo asks Inductor's global setting whether weights are to be frozen.
            with torch._inductor.config.patch(freezing=freezing):
                run, inputs = compile_graph(module, x, **options)
            [position] = [i for i, value in enumerate(inputs) if value is x]
            before, after = inputs[:position], inputs[position + 1 :]
            compiled[x.shape] = lambda x: run(*before, x, *after)
        return compiled[x.shape](x)

    return call


def _torchao(weights: Iterable[Tensor]) -> Call:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    module = _float_layers(weights)
    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    return _inductor(module, freezing=True)


def _ours(weights: Iterable[Int8Tensor]) -> Call:
    return _inductor(_AllLayers(_Int8Linear(w.qdata, w.scale) for w in weights), **inductor_options())


if __name__ == "__main__":
    cli.run("linear", main)
