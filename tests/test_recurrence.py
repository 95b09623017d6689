"""The recurrence in plain torch: its own exp and softplus, and a ring of inputs that changes nothing but rounding."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qmamba_compile import recurrence
from qmamba_compile.recurrence import Ring
from qmamba_compile.state import DSQState

HALF_UNIT = 2.0**-24

NHEADS, HEADDIM, NGROUPS, DSTATE = 4, 8, 2, 16


def relative_error(found, wanted):
    return ((found.double() - wanted).abs() / wanted).max().item()


def test_exp_is_accurate_where_float32_has_normal_numbers():
    x = torch.cat([torch.linspace(-87, 88, 1_000_001), torch.linspace(-1e-3, 1e-3, 10_001)])
    assert relative_error(recurrence.exp(x), x.double().exp()) <= 1.4 * HALF_UNIT


def test_softplus_is_accurate_everywhere():
    x = torch.linspace(-87, 87, 1_000_001)
    wanted = torch.nn.functional.softplus(x.double(), threshold=1e9)
    assert relative_error(recurrence.softplus(x), wanted) <= 5 * HALF_UNIT


def test_ends_and_what_is_not_finite():
    x = torch.tensor([0.0, -0.0, -1e4, 1e4, -math.inf, math.inf, math.nan])
    assert recurrence.exp(x)[:6].tolist() == [1, 1, 0, math.inf, 0, math.inf] and recurrence.exp(x)[6].isnan()
    assert recurrence.softplus(x)[2:6].tolist() == [0, 1e4, 0, math.inf] and recurrence.softplus(x)[6].isnan()


def test_a_value_has_the_same_bits_wherever_it_stands():
    """What torch's own functions do not promise: they take what is left over after whole vectors by other code."""
    x = torch.randn(1001, generator=torch.Generator().manual_seed(0)) * 20
    for function in (recurrence.exp, recurrence.softplus):
        together = function(x)
        assert all(torch.equal(function(x[i : i + 1])[0], together[i]) for i in range(0, 1001, 13))


def test_their_gradients_are_those_of_the_functions():
    x = torch.linspace(-9, 9, 1001).requires_grad_()
    recurrence.exp(x).sum().backward()
    torch.testing.assert_close(x.grad, x.detach().exp(), rtol=1e-5, atol=0)
    x.grad = None
    recurrence.softplus(x).sum().backward()
    torch.testing.assert_close(x.grad, x.detach().sigmoid(), rtol=1e-4, atol=1e-6)


# --- the ring ------------------------------------------------------------------------------------------------------


def test_a_fused_product_and_sum_is_rounded_once():
    almost = torch.tensor(1 + 2.0**-12)
    assert almost * almost - (1 + 2.0**-11) == 0
    fused = recurrence.multiply_add(almost, almost, -torch.tensor(1 + 2.0**-11))
    assert fused.dtype is torch.float32 and fused == 2.0**-24


def inputs_of(steps, batch=2, seed=0):
    """x, dt, B, C of every step, and A, D, dt_bias."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, NHEADS, HEADDIM), (batch, NHEADS), (batch, NGROUPS, DSTATE), (batch, NGROUPS, DSTATE)
    sequence = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(steps)]
    A = -torch.logspace(-2, 0.5, NHEADS)
    return sequence, (A, torch.randn(NHEADS, generator=generator), torch.randn(NHEADS, generator=generator) - 2)


@pytest.mark.parametrize("flush_interval", [1, 2, 4, 8, 16])
def test_an_unquantized_checkpoint_is_the_float_recurrence(flush_interval):
    sequence, (A, D, dt_bias) = inputs_of(4096)
    h = checkpoint = torch.randn(2, NHEADS, HEADDIM, DSTATE, generator=torch.Generator().manual_seed(1))
    ring = recurrence.new_ring(2, NHEADS, HEADDIM, NGROUPS, DSTATE, flush_interval, dtype=torch.float32)
    ring.position[1] = flush_interval // 2
    worst = 0.0
    for x, dt, B, C in sequence:
        h, y = recurrence.step(h, x, dt, A, B, C, D, dt_bias, True)
        dt, dA = recurrence.step_sizes(dt, A, dt_bias, True)
        total = recurrence.elapsed(ring) + dA
        now = recurrence.materialize(checkpoint, ring, total, recurrence.input_factors(x, dt, B))
        full = ring.position == flush_interval - 1
        checkpoint = torch.where(full[:, None, None, None], now, checkpoint)
        recurrence.append_(ring, x, dt, B, total)
        worst = max(worst, ((recurrence.read(now, x, C, D) - y).norm() / y.norm()).item())
        assert torch.equal(ring.position == 0, full)
    assert worst <= 1e-5 and (now - h).norm() <= 1e-5 * h.norm()


def make_state(flush_interval, bits=4, ring=torch.bfloat16, batch=2, stochastic=False):
    h = torch.randn(batch, NHEADS, HEADDIM, DSTATE, generator=torch.Generator().manual_seed(2))
    empty = recurrence.new_ring(batch, NHEADS, HEADDIM, NGROUPS, DSTATE, flush_interval, dtype=ring)
    return DSQState.from_float(h, bits, stochastic=stochastic, seed=3, ring=empty)


def advance(state, x, dt, B, C, constants):
    """One decode step on a `DSQState`, as the compiled graph does it."""
    A, D, dt_bias = constants
    ring = () if state.ring is None else state.ring
    return torch.ops.qmamba.ssm_update(
        *(state.packed, state.channel_scale, state.state_scale, state.rng),
        *(x, dt, A, B, C, D, dt_bias, None, True, state.bits, state.stochastic, *ring),
    )


def test_storing_at_every_step_is_the_plain_step_bit_for_bit():
    sequence, constants = inputs_of(20)
    plain = make_state(1)
    plain = DSQState(plain.packed, plain.channel_scale, plain.state_scale, plain.rng, 4)
    # Two slots that are always full: the step before has put nothing into them.
    ringed = make_state(3)
    for inputs in sequence:
        ringed.ring.position.fill_(2)
        ringed.ring.x.zero_()
        ringed.ring.decay.zero_()
        assert torch.equal(advance(plain, *inputs, constants), advance(ringed, *inputs, constants))
        for name in ("packed", "channel_scale", "state_scale", "rng"):
            assert torch.equal(getattr(plain, name), getattr(ringed, name)), name


@pytest.mark.parametrize("ring", [torch.bfloat16, torch.int8, torch.float32])
def test_reading_is_the_product_with_the_materialized_state(ring):
    sequence, constants = inputs_of(20)
    state = make_state(8, ring=ring)
    for x, dt, B, C in sequence:
        stores = state.rng[0, 1].item()
        y = advance(state, x, dt, B, C, constants)
        if state.rng[0, 1].item() == stores:
            wanted = recurrence.read(state.materialize(), x, C, constants[1])
            # y takes the step's own input as it came; the state has it as the ring keeps it.
            tolerance = {torch.bfloat16: 0.02, torch.int8: 0.05, torch.float32: 1e-3}[ring]
            assert (y - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("ring", [torch.bfloat16, torch.int8])
def test_what_a_slot_adds_to_the_state_is_an_exact_product(ring):
    """Or kernels that fuse the addition would make another state than those that do not."""
    ((x, dt, B, _),), _ = inputs_of(1)
    held = recurrence.new_ring(2, NHEADS, HEADDIM, NGROUPS, DSTATE, 2, dtype=ring)
    recurrence.append_(held, x, dt.abs(), B, torch.full((2, NHEADS), -0.3))
    zeros, total = torch.zeros(2, NHEADS, HEADDIM, DSTATE), torch.full((2, NHEADS), -0.7)
    added = recurrence.materialize(zeros, held, total, to_store=True)
    stored_B = held.B[:, 0].double().repeat_interleave(NHEADS // NGROUPS, dim=1)[:, :, None]  # [b, h, 1, n]
    largest = stored_B.abs().argmax(dim=-1, keepdim=True)
    weighted = added.double().gather(-1, largest.expand(-1, -1, HEADDIM, 1)) / stored_B.gather(-1, largest)
    assert added.any() and torch.equal(added.double(), weighted * stored_B)


@settings(deadline=None, max_examples=40)
@given(
    flush_interval=st.sampled_from([2, 3, 8]),
    ring=st.sampled_from([torch.bfloat16, torch.int8]),
    stochastic=st.booleans(),
    cut=st.integers(0, 18),
    order=st.lists(st.integers(0, 2), min_size=1, max_size=4),
    move=st.sampled_from(["index_select", "index", "pickle", "cat", "copy_"]),
)
def test_interrupting_and_reordering_at_any_position_changes_nothing(
    flush_interval, ring, stochastic, cut, order, move
):
    sequence, constants = inputs_of(20, batch=3)
    whole = make_state(flush_interval, ring=ring, batch=3, stochastic=stochastic)
    whole.ring.position.copy_(torch.arange(3) % flush_interval)
    for inputs in sequence[:cut]:
        advance(whole, *inputs, constants)
    moved = MOVES[move](whole, torch.tensor(order))
    for inputs in sequence[cut:]:
        y = advance(whole, *inputs, constants)
        again = advance(moved, *(tensor[order] for tensor in inputs), constants)
        assert torch.equal(again, y[order])
    for name in whole.__tensor_flatten__()[0]:
        assert torch.equal(getattr(moved, name), getattr(whole, name)[order]), name
    assert torch.equal(moved.materialize(), whole.materialize()[order])


def _pickled(state, order):
    import pickle

    return pickle.loads(pickle.dumps(state.index_select(0, order)))


def _copied(state, order):
    target = torch.zeros_like(state.index_select(0, order))
    return target.copy_(state[order])


MOVES = {
    "index_select": lambda state, order: state.index_select(0, order),
    "index": lambda state, order: state[order],
    "cat": lambda state, order: torch.cat([state[order[i : i + 1]] for i in range(len(order))]),
    "pickle": _pickled,
    "copy_": _copied,
}


def test_a_new_ring_may_start_anywhere_and_holds_nothing():
    for start in range(8):
        ring = recurrence.new_ring(2, NHEADS, HEADDIM, NGROUPS, DSTATE, 8, start=start)
        h = torch.randn(2, NHEADS, HEADDIM, DSTATE)
        assert torch.equal(recurrence.materialize(h, ring), h) and recurrence.elapsed(ring).eq(0).all()
    assert Ring._fields == ("x", "B", "decay", "position", "scale")
