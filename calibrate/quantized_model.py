"""Int8 linears and an artifact's weights on a stock model, without the passes: what evaluation and ESR run on."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qmamba_compile import quant
from qmamba_compile.artifact import Artifact, changes_weight, check_model, fingerprint
from qmamba_compile.config import QMambaConfig

from .recurrence import mixers


class W8A8Linear(nn.Module):
    """A linear as the compiled model runs it: the same operator on the same codes.

    Attributes:
        smooth: SmoothQuant factors [in_features] that multiply the input, or ``None``.
        act_scale: static activation scale [], or ``None`` for one scale a token.
    """

    qdata: Tensor
    scale: Tensor
    bias: Tensor | None
    smooth: Tensor | None
    act_scale: Tensor | None

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, smooth: Tensor | None = None, act_scale: Tensor | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        smooth = None if smooth is None else smooth.to(weight)
        codes, scale = quant.quantize_rows(weight if smooth is None else weight / smooth)
        self.dtype = weight.dtype
        self.register_buffer("qdata", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("smooth", smooth)
        self.register_buffer("act_scale", None if act_scale is None else act_scale.to(weight.device))

    @property
    def weight(self) -> Tensor:
        """dtype and shape of the float weight, which models look at; it has no values."""
        return torch.empty(self.qdata.shape, dtype=self.dtype, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            return _StraightThroughLinear.apply(x, self)
        return self.quantized(x)

    def quantized(self, x: Tensor) -> Tensor:
        """The operator."""
        return torch.ops.qmamba.w8a8_linear(x, self.qdata, self.scale, self.bias, self.smooth, self.act_scale)


class _StraightThroughLinear(torch.autograd.Function):
    """The int8 product forward; backward, that of the values which its codes stand for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: W8A8Linear) -> Tensor:
        ctx.linear = linear
        return linear.quantized(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        linear = ctx.linear
        weight = linear.qdata.to(grad) * linear.scale.to(grad).view(-1, 1)
        back = grad @ weight
        return back if linear.smooth is None else back * linear.smooth, None


class TunedLinear(nn.Module):
    """A linear whose last rows are being tuned, differentiable in them and in the input.

    Its int8 arithmetic is that of `W8A8Linear` with dynamic activation scales, simulated in float32 with
    straight-through gradients.

    Attributes:
        rows: the parameter [r, in_features], for the last r rows of the weight.
    """

    frozen: Tensor
    bias: Tensor | None
    smooth: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int, *, int8: bool, smooth: Tensor | None) -> None:
        super().__init__()
        self.rows = nn.Parameter(weight[-rows:].detach().float().clone())
        self.register_buffer("frozen", weight[:-rows].detach())
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("smooth", None if smooth is None else smooth.to(weight))
        self.int8 = int8

    @property
    def weight(self) -> Tensor:
        return torch.cat([self.frozen, self.rows.to(self.frozen)])

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if not self.int8:
            return F.linear(x, weight, self.bias)
        if self.smooth is not None:
            x, weight = x * self.smooth, weight / self.smooth
        return F.linear(_through_int8(x), _through_int8(weight), self.bias)


class TunedConv(nn.Module):
    """A causal convolution whose last channels are being tuned: the attributes that a Mamba2 layer reads of its own.

    Attributes:
        rows: the parameter [r, 1, d_conv], for the last r channels of the weight; bias_rows: [r], where it has a bias.
    """

    frozen: Tensor
    frozen_bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(weight[-rows:].detach().float().clone())
        self.bias_rows = None if bias is None else nn.Parameter(bias[-rows:].detach().float().clone())
        self.register_buffer("frozen", weight[:-rows].detach())
        self.register_buffer("frozen_bias", None if bias is None else bias[:-rows].detach())

    @property
    def weight(self) -> Tensor:
        return torch.cat([self.frozen, self.rows.to(self.frozen)])

    @property
    def bias(self) -> Tensor | None:
        if self.frozen_bias is None or self.bias_rows is None:
            return None
        return torch.cat([self.frozen_bias, self.bias_rows.to(self.frozen_bias)])


def _through_int8(x: Tensor) -> Tensor:
    """Values of x [..., k] after row-wise int8 quantization, with the gradient of the identity."""
    codes, scale = quant.quantize_rows(x.detach())
    return x + ((codes * scale).to(x) - x.detach())


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Module path -> linear that becomes int8, as the passes choose them: no single input feature."""
    return {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) and module.in_features > 1
    }


def model_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """`fingerprint` of a model's parameters."""
    return fingerprint({name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)})


def fit_artifact(artifact: Artifact, model: Any, *, needs_state_scale: bool) -> Artifact:
    """The artifact after all checks against ``model``.

    Raises:
        ArtifactError: it belongs to another model, or lacks a layer's state_scale.
    """
    fitted = check_model(artifact, model_shapes(model), model_class=type(model).__name__)
    for layer, mixer in mixers(model).items() if needs_state_scale else ():
        fitted.require_state_scale(layer, state_shape(mixer))
    return fitted


def state_shape(mixer: Any) -> tuple[int, int]:
    """(nheads, dstate) of a Mamba2 layer."""
    return mixer.A_log.numel(), int(mixer.ssm_state_size)


def bcdt_rows(mixer: Any) -> int:
    """Rows at the end of ``in_proj`` that make B, C and dt."""
    nheads, dstate = state_shape(mixer)
    return 2 * int(mixer.n_groups) * dstate + nheads


def bc_channels(mixer: Any) -> int:
    """Channels at the end of ``conv1d`` that carry B and C."""
    return 2 * int(mixer.n_groups) * state_shape(mixer)[1]


def quantized_copy(
    model: Any, *, weights: str | None = "int8", artifact: Artifact | None = None, skip_layers: tuple[str, ...] = ()
) -> Any:
    """A copy of ``model`` with an artifact's tuned weights and int8 linears. The original is not touched.

    Raises:
        ArtifactError: the artifact belongs to another model.
    """
    if artifact is not None:
        artifact = fit_artifact(artifact, model, needs_state_scale=False)
    model = copy.deepcopy(model).eval().requires_grad_(False)
    if artifact is not None:
        apply_tuned(model, artifact)
    if weights == "int8":
        quantize_linears(model, artifact, skip_layers)
    return model


def apply_tuned(model: nn.Module, artifact: Artifact) -> None:
    """Write the tuned rows of an artifact into a model's float parameters."""
    for name, parameter in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        tuned = artifact.tensors.get(f"{layer}.{kind}_bcdt")
        if tuned is not None:
            with torch.no_grad():
                parameter[-tuned.shape[0] :] = tuned.to(parameter)


def quantize_linears(model: nn.Module, artifact: Artifact | None = None, skip_layers: tuple[str, ...] = ()) -> None:
    """Replace every linear of ``model`` by its int8 form; an embedding tied to one looks its values up, as compiled."""
    excluded = QMambaConfig(skip_layers=skip_layers).excludes
    tables = [
        module
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.max_norm is None and not excluded(path)
    ]
    for path, linear in linears(model).items():
        if excluded(path):
            continue
        smooth = None if artifact is None else artifact.smooth(path)
        act_scale = None if artifact is None else artifact.act_scale(path)
        int8 = W8A8Linear(linear.weight.detach(), linear.bias, smooth=smooth, act_scale=act_scale)
        for table in tables:
            if table.weight is linear.weight and not changes_weight(artifact, path):
                values = (int8.qdata * int8.scale).to(linear.weight.dtype)
                table.weight = nn.Parameter(values, requires_grad=False)
        set_module(model, path, int8)


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` where ``path`` leads."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
