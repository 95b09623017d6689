"""The faithful scan: what decode does token by token, bit for bit; and its straight-through gradient."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from ties import assert_tied, tied_state
from torch import Tensor

from qmamba_compile import ops, quant, recurrence, scan_ops
from qmamba_compile.cpu_templates import build, launch, launch_scan

assert ops.scan_gradient is not None  # importing it defines the operators
qmamba = torch.ops.qmamba

Y_TOLERANCE = 1e-5
"""Of the largest y. A sum of dstate float32 products in another order differs by about sqrt(dstate) * 2^-24 of it."""

BASE: dict[str, Any] = {
    "batch": 2,
    "seqlen": 24,
    "nheads": 4,
    "headdim": 8,
    "dstate": 64,
    "ngroups": 1,
    "bits": 4,
    "scales": "dynamic",  # or "calibrated", "fixed": channel_scale calibrated as well
    "stochastic": False,
    "flush_interval": 1,
    "single_step": False,
    "start": True,
    "D": True,
    "dt_bias": True,
    "dt_softplus": True,
    "dtype": torch.float32,
}


@pytest.fixture(params=build.available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("QMAMBA_CPU_ISA", request.param)
    launch.kernel.cache_clear()
    yield request.param
    launch.kernel.cache_clear()


def name_of(change: dict[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in change.items()) or "base"


def problem(seed: int = 0, **row: Any) -> dict[str, Any]:
    """Arguments of the operator by name."""
    unknown = set(row) - set(BASE)
    assert not unknown, unknown
    row = BASE | row
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    batch, seqlen, nheads, headdim = row["batch"], row["seqlen"], row["nheads"], row["headdim"]
    dstate, ngroups = row["dstate"], row["ngroups"]
    sizes = [nheads * headdim, ngroups * dstate, ngroups * dstate, nheads]
    # As in the model: views of one projection.
    x, B, C, dt = randn(batch, seqlen, sum(sizes)).to(row["dtype"]).split(sizes, dim=-1)
    initial = randn(batch, nheads, headdim, dstate)
    state_scale = quant.store_scale(initial.abs().mean(dim=(0, 2)).sqrt())
    channel_scale = quant.store_scale(initial.abs().mean(dim=(0, 3)).sqrt() / quant.max_code(row["bits"] or 8) * 3)
    return {
        "x": x.reshape(batch, seqlen, nheads, headdim) if batch == 1 else x.view(batch, seqlen, nheads, headdim),
        "dt": dt if row["dt_softplus"] else dt.abs() / 4,
        "A": -torch.rand(nheads, generator=generator) * 4,
        "B": B.view(batch, seqlen, ngroups, dstate),
        "C": C.view(batch, seqlen, ngroups, dstate),
        "D": randn(nheads) if row["D"] else None,
        "dt_bias": (randn(nheads) - 2 if row["dt_softplus"] else randn(nheads).abs()) if row["dt_bias"] else None,
        "initial_state": initial if row["start"] else None,
        "state_scale": None if row["scales"] == "dynamic" else state_scale,
        "dt_softplus": row["dt_softplus"],
        "dt_min": 0.0,
        "dt_max": math.inf,
        "bits": row["bits"],
        "stochastic": row["stochastic"],
        "seed": 2**63 - 5,
        "flush_interval": row["flush_interval"],
        "single_step": row["single_step"],
        "channel_scale": channel_scale if row["scales"] == "fixed" else None,
    }


def decode(arguments: dict[str, Any]) -> list[Tensor]:
    """What a cache goes through: one store of prefill's state, then `ssm_update` for each token."""
    x, state_scale, bits, stochastic = (arguments[name] for name in ("x", "state_scale", "bits", "stochastic"))
    batch, seqlen, nheads, headdim = x.shape
    state = arguments["initial_state"]
    if state is None:
        state = torch.zeros(batch, nheads, headdim, arguments["B"].shape[-1])
    packed, channel_scale, rng, *found = qmamba.quantize_state(state, state_scale, bits, stochastic, arguments["seed"])
    state_scale_out = found[0] if found else None
    outputs = []
    for t in range(seqlen):
        token = [arguments[name][:, t] if name in ("x", "dt", "B", "C") else arguments[name] for name in TOKEN]
        outputs.append(
            qmamba.ssm_update(
                packed,
                channel_scale,
                state_scale_out,
                rng,
                *token,
                state_scale,
                arguments["dt_softplus"],
                bits,
                stochastic,
            ).float()
        )
    return [torch.stack(outputs, dim=1), packed, channel_scale, rng, *found]


TOKEN = ("x", "dt", "A", "B", "C", "D", "dt_bias")
NAMES = ("y", "packed", "channel_scale", "rng", "state_scale")


def assert_same(found: list[Tensor], wanted: list[Tensor], tolerance: float = Y_TOLERANCE) -> None:
    assert len(found) == len(wanted)
    for name, tensor, expected in zip(NAMES[1:], found[1:], wanted[1:], strict=False):
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), name
    assert found[0].dtype == torch.float32 and found[0].shape == wanted[0].shape
    assert (found[0] - wanted[0]).abs().max() <= tolerance * wanted[0].abs().max()


SHAPES = [
    {},
    {"batch": 1, "seqlen": 1},
    {"batch": 1, "nheads": 1},
    {"batch": 3, "nheads": 5},
    {"ngroups": 2},
    {"headdim": 5, "dstate": 96},
    {"dstate": 20},
    {"dstate": 33, "bits": 8, "stochastic": True},
    {"D": False, "dt_bias": False},
    {"dt_softplus": False},
    {"start": False},
    {"headdim": 64, "dstate": 128, "nheads": 24, "seqlen": 4},
]
SCHEMES = [
    {"bits": bits, "scales": scales, "stochastic": stochastic, "seqlen": 64}
    for bits, scales, stochastic in itertools.product((8, 4, 2), ("dynamic", "calibrated"), (False, True))
]


@pytest.mark.parametrize("change", [*SHAPES, *SCHEMES], ids=name_of)
def test_it_is_decode_token_by_token(change: dict[str, Any]) -> None:
    arguments = problem(**change)
    assert_same(qmamba.ssm_scan_quantized(**arguments), decode(arguments))


def test_bfloat16_inputs_give_the_codes_of_decode() -> None:
    arguments = problem(dtype=torch.bfloat16)
    # Decode rounds y to the dtype of x.
    assert_same(qmamba.ssm_scan_quantized(**arguments), decode(arguments), torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("change", [{}, {"single_step": True}, {"stochastic": True}], ids=str)
def test_a_float_state_is_the_float_scan(change: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """By its kernel, whose absence would be warned of: it has no rounding that could be stochastic."""
    arguments = problem(bits=None, seqlen=70, **change)
    launch.kernel.cache_clear()
    y, state = qmamba.ssm_scan_quantized(**arguments)
    assert not caplog.records
    names = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state", "dt_softplus", "dt_min", "dt_max")
    wanted_y, wanted_state = qmamba.chunk_scan(*(arguments[name] for name in names))
    assert (y - wanted_y).abs().max() <= 5e-5 * wanted_y.abs().max()
    assert (state - wanted_state).abs().max() <= 5e-5 * wanted_state.abs().max()


@pytest.mark.parametrize(
    "change",
    [
        {"scales": "fixed"},
        {"scales": "fixed", "stochastic": True, "bits": 2},
        {"bits": 3, "scales": "calibrated", "stochastic": True},
        {"bits": 3},
        {"flush_interval": 5},
        {"flush_interval": 8, "scales": "calibrated", "stochastic": True},
        {"flush_interval": 50},
        {"flush_interval": 50, "start": False},
        {"single_step": True},
        {"single_step": True, "scales": "calibrated", "stochastic": True, "headdim": 5, "dstate": 20},
        {"single_step": True, "scales": "fixed", "start": False},
    ],
    ids=name_of,
)
def test_what_decode_has_not_is_the_reference(change: dict[str, Any]) -> None:
    arguments = problem(**change)
    found = qmamba.ssm_scan_quantized(**arguments)
    assert_same(found, scan_ops.ssm_scan_quantized_reference(**arguments))
    assert found[3].tolist() == [[2**63 - 5, 1 + 24 // arguments["flush_interval"]]] * 2


@pytest.mark.parametrize("single_step", [False, True])
def test_every_instruction_set(isa: str, single_step: bool) -> None:
    for change in (
        {},
        {"bits": 8, "scales": "calibrated", "stochastic": True, "headdim": 5, "dstate": 33},
        {"bits": 3, "scales": "fixed"},
    ):
        arguments = problem(**change, single_step=single_step)
        assert_same(qmamba.ssm_scan_quantized(**arguments), scan_ops.ssm_scan_quantized_reference(**arguments))
        names, grads = gradients(qmamba.ssm_scan_quantized, arguments)
        for name, grad, wanted in zip(
            names, grads, gradients(scan_ops.ssm_scan_quantized_reference, arguments)[1], strict=True
        ):
            assert (grad - wanted).abs().max() <= GRADIENT_TOLERANCE * wanted.abs().max(), name


@pytest.mark.parametrize("bits", quant.STATE_BITS)
def test_ties_are_those_of_the_exact_product(isa: str, bits: int) -> None:
    """What a single step of length 0 stores is the initial state."""
    arguments = problem(bits=bits, seqlen=1, single_step=True, dt_bias=False, dt_softplus=False)
    h = tied_state(tuple(arguments["initial_state"].shape), bits, None)
    packed, *scales = quant.quantize_state(h, bits)
    assert_tied(h, *scales)
    arguments |= {"initial_state": h, "dt": torch.zeros_like(arguments["dt"])}
    found = qmamba.ssm_scan_quantized(**arguments)
    assert torch.equal(found[1], packed)
    assert_same(found, scan_ops.ssm_scan_quantized_reference(**arguments))


def test_a_single_step_begins_at_the_float_state_quantized() -> None:
    """Against its definition, written out: the float scan's state, quantized by itself at every step."""
    arguments = problem(single_step=True, scales="calibrated", D=False)
    y, *stored = qmamba.ssm_scan_quantized(**arguments)
    dt, dA = scan_ops.step_sizes(
        *(arguments[name] for name in ("dt", "A", "dt_bias", "dt_softplus", "dt_min", "dt_max"))
    )
    h, scale = arguments["initial_state"], arguments["state_scale"]
    for t in range(24):
        codes = qmamba.quantize_state(h, scale, 4, False, 0)
        dBx = (dt[:, t, :, None] * arguments["B"][:, t])[:, :, None, :] * arguments["x"][:, t, :, :, None]
        decay = dA[:, t, :, None, None]
        hbar = decay * qmamba.dequantize_state(*codes[:2], scale, 4) + dBx
        wanted = torch.einsum("bhpn,bn->bhp", hbar, arguments["C"][:, t, 0])
        assert (y[:, t] - wanted).abs().max() <= Y_TOLERANCE * wanted.abs().max()
        h = decay * h + dBx
    assert torch.equal(stored[0], qmamba.quantize_state(h, scale, 4, False, 0)[0])


def test_the_error_shrinks_with_the_bits_and_with_the_flush_interval() -> None:
    exact, _ = qmamba.ssm_scan_quantized(**problem(bits=None, seqlen=64))

    def error(**row: Any) -> float:
        y = qmamba.ssm_scan_quantized(**problem(seqlen=64, scales="calibrated", **row))[0]
        return float((y - exact).norm() / exact.norm())

    by_bits = [error(bits=bits) for bits in (2, 3, 4, 8)]
    assert by_bits == sorted(by_bits, reverse=True) and 0 < by_bits[-1] < 0.1 * by_bits[0]
    assert 0 < error(flush_interval=16) < error()


@pytest.mark.parametrize("scales", ["dynamic", "calibrated", "fixed"])
def test_nan_and_infinity_show_in_the_scales(scales: str) -> None:
    arguments = problem(scales=scales)
    x = arguments["x"].clone()
    x[0, 20, 1, 2], x[1, 20, 0, 0] = torch.nan, torch.inf
    arguments["x"] = x
    found = qmamba.ssm_scan_quantized(**arguments)
    wanted = scan_ops.ssm_scan_quantized_reference(**arguments)
    for name, tensor, expected in zip(NAMES[1:], found[1:], wanted[1:], strict=False):
        assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8)), name
    assert found[2][0, 1, 2].isnan() and found[2][1, 0, 0].isnan() and found[2][1, 1].isfinite().all()


def test_threads_do_not_change_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = problem()
    monkeypatch.setattr(launch, "PARALLEL_ELEMENTS", 2**40)
    one = qmamba.ssm_scan_quantized(**arguments)
    monkeypatch.setattr(launch, "PARALLEL_ELEMENTS", 1)
    assert all(torch.equal(a, b) for a, b in zip(one, qmamba.ssm_scan_quantized(**arguments), strict=True))


def test_step_sizes_have_the_bits_of_one_token_alone() -> None:
    """Whatever torch's vectors and threads make of a long tensor."""
    generator = torch.Generator().manual_seed(0)
    dt = torch.randn(3, 700, 5, generator=generator) * 3
    A, dt_bias = -torch.rand(5, generator=generator), torch.randn(5, generator=generator)
    found, decay = scan_ops.step_sizes(dt, A, dt_bias, True, 0.0, math.inf)
    for t in range(0, 700, 23):
        alone, dA = recurrence.step_sizes(dt[:, t], A, dt_bias, True)
        assert torch.equal(found[:, t], alone) and torch.equal(decay[:, t], recurrence.exp(dA))


@pytest.mark.parametrize(
    "change, word",
    [
        ({"bits": 5}, "bits=5"),
        ({"flush_interval": 0}, "flush_interval=0"),
        ({"flush_interval": 2, "single_step": True}, "single step"),
        ({"channel_scale": torch.ones(4, 8)}, "state_scale"),
    ],
)
def test_contradictions_are_refused(change: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        qmamba.ssm_scan_quantized(**(problem() | change))


def test_the_plain_scan_takes_any_quantizer() -> None:
    """One scale for each group of 32 states, as the calibration's tables compare."""
    arguments = problem(D=False, bits=None)

    def groups_of_32(h: Tensor) -> Tensor:
        groups = h.unflatten(-1, (-1, 32))
        step = groups.abs().amax(-1, keepdim=True) / 7
        return ((groups / step).round() * step).flatten(-2)

    names = ("dt", "A", "dt_bias", "dt_softplus", "dt_min", "dt_max")
    dt, dA = scan_ops.step_sizes(*(arguments[name] for name in names))
    start = groups_of_32(arguments["initial_state"])
    y, state = scan_ops.scan_reference(arguments["x"], dt, dA, arguments["B"], arguments["C"], start, groups_of_32)
    assert torch.equal(state, groups_of_32(state))
    exact, _ = qmamba.ssm_scan_quantized(**arguments)
    assert 0 < (y - exact).norm() / exact.norm() < 0.2


# --- gradient ------------------------------------------------------------------------------------------------------

LEARNED = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")


def learnable(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.clone().requires_grad_() if name in LEARNED and value is not None else value
        for name, value in arguments.items()
    }


def gradients(function: Any, arguments: dict[str, Any]) -> tuple[list[str], list[Tensor]]:
    arguments = learnable(arguments)
    names = [name for name in LEARNED if arguments[name] is not None]
    y, state, *_ = function(**arguments)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    loss = (y * weights).sum()
    if arguments["bits"] is None:
        loss = loss + (state * torch.randn(state.shape, generator=torch.Generator().manual_seed(8))).sum()
    return names, torch.autograd.grad(loss, [arguments[name] for name in names])


GRADIENT_TOLERANCE = 2e-4
"""Of the largest: sums of up to batch * seqlen * headdim * dstate products, whose signs differ, in another order."""


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"seqlen": 100},
        {"seqlen": 65, "scales": "calibrated", "stochastic": True},
        {"seqlen": 33, "scales": "fixed"},
        {"seqlen": 41, "scales": "fixed", "flush_interval": 4},
        {"seqlen": 70, "single_step": True},
        {"seqlen": 70, "single_step": True, "scales": "fixed", "stochastic": True},
        {"seqlen": 70, "bits": None},
        {"seqlen": 70, "bits": 3, "flush_interval": 4, "scales": "calibrated"},
        {"ngroups": 2, "headdim": 5, "dstate": 20, "bits": 8},
        {"D": False, "dt_bias": False, "dt_softplus": False, "start": False},
        {"dtype": torch.bfloat16},
    ],
    ids=name_of,
)
@pytest.mark.parametrize("kernel", [True, False])
def test_the_gradient_is_autograd_through_the_reference(
    change: dict[str, Any], kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = problem(**change)
    if not kernel:
        monkeypatch.setattr(launch_scan, "ssm_scan_backward", lambda *args: None)
    names, found = gradients(qmamba.ssm_scan_quantized, arguments)
    _, wanted = gradients(scan_ops.ssm_scan_quantized_reference, arguments)
    for name, grad, expected in zip(names, found, wanted, strict=True):
        assert grad.dtype == expected.dtype and grad.shape == expected.shape, name
        tolerance = GRADIENT_TOLERANCE if grad.dtype == torch.float32 else 2 * torch.finfo(grad.dtype).eps
        error = (grad - expected).abs().max() / expected.abs().max()
        assert error <= tolerance, f"gradient of {name} is off by {error}"


@pytest.mark.parametrize("single_step", [False, True])
@pytest.mark.parametrize("kernel", [True, False])
def test_what_clamps_passes_no_gradient(single_step: bool, kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every code clamps, the last output depends on its own token alone; but a single step tells the state."""
    if not kernel:
        monkeypatch.setattr(launch_scan, "ssm_scan_backward", lambda *args: None)
    arguments = learnable(problem(scales="fixed", single_step=single_step, seqlen=9))
    arguments["channel_scale"] = arguments["channel_scale"] * 2.0**-40
    y, *_ = qmamba.ssm_scan_quantized(**arguments)
    grad_x, grad_initial = torch.autograd.grad(y[:, -1].sum(), [arguments["x"], arguments["initial_state"]])
    assert grad_x[:, -1].all() and bool(grad_x[:, :-1].any()) == bool(grad_initial.any()) == single_step


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_a_store_scales_with_a_row(bits: int) -> None:
    """Codes do not change when a row is scaled; what is read does, by the measured scale. So along h the derivative of
    what is read is what is read."""
    h, grad = torch.randn(2, 3, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    h[0, 0, 0] = 0
    rule = recurrence.StoreRule(bits, state_scale=quant.store_scale(torch.rand(4, 16) + 0.5))
    store = scan_ops.StateStore(rule, quant.new_rng(3, 0))
    read = store(h)
    along = (store.pass_through(grad, h, read) * h).sum(dim=-1)
    torch.testing.assert_close(along, (grad * read).sum(dim=-1), rtol=1e-4, atol=1e-4)
    assert torch.equal(store.pass_through(grad, h, read)[0, 0, 0], grad[0, 0, 0])
