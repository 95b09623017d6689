"""`DSQState`: what it looks like, and how it stays packed where a cache moves it."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_states import (
    BATCH,
    DSTATE,
    FLUSH_INTERVAL,
    HEADDIM,
    LAYOUTS,
    NGROUPS,
    NHEADS,
    assert_same_bytes,
    inner,
    layout_name,
    make_float,
    make_state,
    names,
)

from qmamba_compile import quant, recurrence
from qmamba_compile.errors import ConfigError, StateError
from qmamba_compile.recurrence import Ring, new_ring
from qmamba_compile.state import DSQState, require_packable


@pytest.fixture(params=LAYOUTS, ids=layout_name)
def state(request):
    return make_state(*request.param)


def assert_rows(actual, state, rows):
    """``actual`` holds these sequences of ``state``, code for code."""
    assert type(actual) is DSQState
    assert actual.shape == (len(rows), NHEADS, HEADDIM, DSTATE)
    for name in names(state):
        wanted = getattr(state, name)
        if name != "state_scale" or state.dynamic:
            wanted = torch.stack([wanted[row] for row in rows])
        assert torch.equal(getattr(actual, name), wanted), name
    assert torch.equal(actual.dequantize(), torch.stack([state.dequantize()[row] for row in rows]))


# --- what it is ----------------------------------------------------------------------------------------------------


def test_it_looks_like_the_float_state(state):
    assert isinstance(state, torch.Tensor) and state.shape == (BATCH, NHEADS, HEADDIM, DSTATE)
    assert state.dtype == torch.float32 and state.device.type == "cpu" and state.is_contiguous()
    assert state.nbytes == 4 * state.numel() and not state.requires_grad
    assert state.packed.shape == (BATCH, NHEADS, HEADDIM, DSTATE * state.bits // 8)
    assert state.packed.dtype == (torch.int8 if state.bits == 8 else torch.uint8)
    assert state.channel_scale.shape == (BATCH, NHEADS, HEADDIM)
    assert state.state_scale.shape == ((BATCH, NHEADS, DSTATE) if state.dynamic else (NHEADS, DSTATE))
    assert state.channel_scale.dtype == state.state_scale.dtype == torch.bfloat16
    assert state.rng.shape == (BATCH, 2) and state.rng.dtype == torch.int64


def test_from_float_holds_what_the_reference_packs(state):
    scale = None if state.dynamic else state.state_scale
    rng = quant.new_rng(BATCH, 5) if state.stochastic else None
    packed, channel_scale, state_scale = quant.quantize_state(make_float(), state.bits, state_scale=scale, rng=rng)
    assert torch.equal(state.packed, packed) and torch.equal(state.channel_scale, channel_scale)
    assert torch.equal(state.state_scale, state_scale)
    assert state.rng[:, 0].eq(5).all() and state.rng[:, 1].tolist() == [1, 2, 3, 4]
    checkpoint = quant.dequantize_state(packed, channel_scale, state_scale, state.bits)
    now = checkpoint if state.ring is None else recurrence.materialize(checkpoint, state.ring)
    assert torch.equal(state.dequantize(), now)
    assert state.ring is None or not torch.equal(checkpoint[1:], now[1:])


def test_from_float_takes_no_autograd_graph_along():
    state = DSQState.from_float(make_float().requires_grad_())
    assert not any(tensor.requires_grad for tensor in inner(state).values())


def test_from_float_stores_calibrated_scales_in_16_bits():
    scale = torch.full((NHEADS, DSTATE), 1.003)
    assert DSQState.from_float(make_float(), state_scale=scale).state_scale.eq(1.0).all()


@pytest.mark.parametrize(("dstate", "bits"), [(15, 4), (14, 2), (15, 2)])
def test_a_dstate_that_does_not_pack_is_refused(dstate, bits):
    with pytest.raises(StateError, match=rf"dstate={dstate} cannot be packed {8 // bits} per byte; .*state_bits=8"):
        DSQState.from_float(torch.zeros(1, 1, 2, dstate), bits)
    with pytest.raises(StateError, match=r"^layers\.3\.mixer: dstate"):
        require_packable(dstate, bits, "layers.3.mixer")
    assert DSQState.from_float(torch.zeros(1, 1, 2, dstate), 8).packed.shape == (1, 1, 2, dstate)


@pytest.mark.parametrize("bits", [3, 0, 16])
def test_from_float_refuses_bits_that_no_state_has(bits):
    with pytest.raises(ConfigError, match=rf"bits={bits} is not allowed; .*\(8, 4, 2\)"):
        DSQState.from_float(make_float(), bits)


@pytest.mark.parametrize("shape", [(DSTATE,), (1, DSTATE), (NHEADS, DSTATE + 1), (BATCH, NHEADS, DSTATE)])
def test_from_float_refuses_scales_of_another_state(shape):
    with pytest.raises(StateError, match=rf"state_scale of shape .* must be \[{NHEADS}, {DSTATE}\]"):
        DSQState.from_float(make_float(), state_scale=torch.ones(shape))


def test_from_float_refuses_what_is_no_state():
    with pytest.raises(StateError, match=r"\[2, 8, 16\] cannot be packed"):
        DSQState.from_float(make_float()[0])


def test_repr_says_what_it_is():
    assert (
        repr(make_state())
        == f"{make_state()}"
        == ("DSQState(shape=[4, 2, 8, 16], bits=4, scales=dynamic, rounding=nearest)")
    )
    assert "bits=2, scales=calibrated, rounding=stochastic" in str(make_state(2, True, True))


@pytest.mark.parametrize("ring_bits", [16, 8])
def test_bits_per_element_count_the_ring(ring_bits):
    ring = new_ring(2, 24, 64, 1, 128, 8, dtype=recurrence.RING_DTYPES[ring_bits])
    state = DSQState.from_float(torch.randn(2, 24, 64, 128), 4, ring=ring)
    # Seven slots of x, B and S, with a scale at 8 bits; 32 bits of position a sequence.
    slots = 7 * (ring_bits * (24 * 64 + 128) + (32 if ring_bits == 16 else 64) * 24)
    expected = 4 + 16 / 128 + 16 / 64 + (128 + 32 + slots) / (24 * 64 * 128)
    assert state.bits_per_element == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("dstate", "limit"), [(64, 4.6), (128, 4.4)])
@pytest.mark.parametrize("calibrated", [False, True])
def test_bits_per_element_include_everything(dstate, limit, calibrated):
    scale = torch.ones(24, dstate) if calibrated else None
    state = DSQState.from_float(torch.randn(2, 24, 64, dstate), 4, state_scale=scale)
    # 4 bits, 16 a row of dstate, 16 a column of headdim when dynamic, 128 of key and step a sequence.
    expected = 4 + 16 / dstate + (0 if calibrated else 16 / 64) + 128 / (24 * 64 * dstate)
    assert state.bits_per_element == pytest.approx(expected, rel=1e-12)
    assert state.bits_per_element <= limit
    assert state.packed_nbytes == sum(tensor.nbytes for tensor in inner(state).values())
    assert state.packed_nbytes < 0.16 * state.nbytes


# --- operations that keep it packed --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "select", "rows"),
    [
        ("index_select", lambda s: s.index_select(0, torch.tensor([2, 0, 0])), [2, 0, 0]),
        ("index_select from the end", lambda s: torch.index_select(s, -4, torch.tensor([3])), [3]),
        ("tensor index", lambda s: s[torch.tensor([3, 1])], [3, 1]),
        ("negative index", lambda s: s[torch.tensor([-1, 0])], [3, 0]),
        ("list index", lambda s: s[[1, 1]], [1, 1]),
        ("index and full slices", lambda s: s[torch.tensor([1, 2]), ...], [1, 2]),
        ("mask", lambda s: s[torch.tensor([True, False, False, True])], [0, 3]),
        ("slice", lambda s: s[1:3], [1, 2]),
        ("slice from the end", lambda s: s[-1:], [3]),
        ("strided slice", lambda s: s[::2], [0, 2]),
        ("full slice", lambda s: s[:], [0, 1, 2, 3]),
        ("ellipsis", lambda s: s[...], [0, 1, 2, 3]),
        ("narrow", lambda s: s.narrow(0, 1, 2), [1, 2]),
        ("first chunk", lambda s: s.chunk(3)[0], [0, 1]),
        ("last chunk", lambda s: s.chunk(3, dim=-4)[-1], [2, 3]),
        ("split", lambda s: s.split([1, 3])[1], [1, 2, 3]),
        ("tensor_split", lambda s: s.tensor_split(2)[1], [2, 3]),
        ("cat", lambda s: torch.cat([s[2:], s[:1]]), [2, 3, 0]),
        ("cat from the end", lambda s: torch.cat([s[3:], s[3:]], dim=-4), [3, 3]),
        ("clone", lambda s: s.clone(), [0, 1, 2, 3]),
        ("detach", lambda s: s.detach(), [0, 1, 2, 3]),
        ("data", lambda s: s.data, [0, 1, 2, 3]),
        ("contiguous", lambda s: s.contiguous(), [0, 1, 2, 3]),
        ("to", lambda s: s.to("cpu", copy=True), [0, 1, 2, 3]),
        ("to float32", lambda s: s.to(torch.float32), [0, 1, 2, 3]),
        ("cpu", lambda s: s.cpu(), [0, 1, 2, 3]),
        ("copy.copy", lambda s: copy.copy(s), [0, 1, 2, 3]),
        ("deepcopy", lambda s: copy.deepcopy(s), [0, 1, 2, 3]),
        ("pickle", lambda s: pickle.loads(pickle.dumps(s)), [0, 1, 2, 3]),
    ],
)
def test_moves_keep_codes(state, name, select, rows):
    before = {key: tensor.clone() for key, tensor in inner(state).items()}
    assert_rows(select(state), state, rows)
    assert all(torch.equal(tensor, before[key]) for key, tensor in inner(state).items())


def test_torch_save_and_load_weights_only(state):
    file = io.BytesIO()
    torch.save({"layers": [state, state]}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["layers"]
    assert_same_bytes(loaded[0], state)
    assert_same_bytes(loaded[1], state)


def test_the_whole_of_a_batch_can_be_taken_apart_and_put_together(state):
    assert_same_bytes(torch.cat(state.chunk(4)), state)
    assert_same_bytes(torch.cat(state.split(3)), state)
    assert len(state.split(3)) == 2 and [piece.shape[0] for piece in state.split(3)] == [3, 1]


def test_copies_are_independent_and_slices_share(state):
    for duplicate in (
        state.clone(),
        copy.deepcopy(state),
        state.to("cpu", copy=True),
        pickle.loads(pickle.dumps(state)),
    ):
        before = {key: tensor.clone() for key, tensor in inner(state).items()}
        duplicate.copy_(make_float(9))
        assert all(torch.equal(tensor, before[key]) for key, tensor in inner(state).items())
        for name in names(state):
            assert getattr(duplicate, name).data_ptr() != getattr(state, name).data_ptr(), name
    # A slice is a view, as of any tensor: what is written to it arrives.
    expected = state.clone()
    state[1:3].copy_(make_float(7)[1:3])
    assert_rows(state[[0, 3]], expected, [0, 3])
    expected.copy_(make_float(7))
    assert_rows(state[1:3], expected, [1, 2])
    state[:1].zero_()
    assert state.dequantize()[0].eq(0).all() and state.dequantize()[1].ne(0).any()
    state.detach().zero_()
    assert state.dequantize().eq(0).all()


def test_beams_are_reordered_with_their_keys_and_ages(state):
    """What ``generate`` does between two steps: the copies then go on exactly as their parents would have."""
    order = torch.tensor([2, 2, 0, 1])
    parent, reordered = state.clone(), state.index_select(0, order)
    step = make_float(3)
    parent.copy_(parent * 0.9 + step)
    reordered.copy_(reordered * 0.9 + step[order])
    assert_same_bytes(reordered, parent.index_select(0, order))


def test_zero_makes_an_empty_state(state):
    kept_scale = state.state_scale.clone()
    returned = state.zero_()
    assert returned is state and state.dequantize().eq(0).all() and state.rng[:, 1].eq(0).all()
    assert state.rng[:, 0].eq(5).all()
    if not state.dynamic:
        assert torch.equal(state.state_scale, kept_scale)
    ring = None if state.ring is None else state.ring.x.dtype
    fresh = make_state(state.bits, not state.dynamic, state.stochastic, ring)
    fresh.rng[:, 1] = 0
    for tensor in () if ring is None else fresh.ring:
        if tensor is not None:
            tensor.zero_()
    fresh.copy_(make_float(2))
    assert_same_bytes(state.copy_(make_float(2)), fresh)


@pytest.mark.parametrize("log2", [-40, 0, 40])
def test_a_step_from_a_reset_state_is_that_of_a_new_one(state, log2):
    """A reset leaves other scales than zeros do: no code and no output may depend on them."""
    reset, scale = state.zero_(), None if state.dynamic else state.state_scale
    ring = None if state.ring is None else Ring(*(None if t is None else torch.zeros_like(t) for t in state.ring))
    new = DSQState.from_float(
        torch.zeros(state.shape), state.bits, state_scale=scale, stochastic=state.stochastic, ring=ring
    )
    new.rng.copy_(reset.rng)
    generator = torch.Generator().manual_seed(0)
    x, dt, B, C = (
        torch.randn(shape, generator=generator)
        for shape in ((BATCH, NHEADS, HEADDIM), (BATCH, NHEADS), *[(BATCH, NGROUPS, DSTATE)] * 2)
    )
    x, A = x * 2.0**log2, -torch.ones(NHEADS)
    for _ in range(FLUSH_INTERVAL + 1):
        outputs = [
            torch.ops.qmamba.ssm_update(
                *(each.packed, each.channel_scale, each.state_scale if each.dynamic else None, each.rng),
                *(x, dt, A, B, C, None, None, scale, True, each.bits, each.stochastic, *(each.ring or ())),
            )
            for each in (reset, new)
        ]
        assert torch.equal(*outputs) and outputs[0].ne(0).any()
        assert torch.equal(reset.dequantize(), new.dequantize())
    assert_same_bytes(reset, new)


def test_zeros_like_is_an_empty_state_of_the_same_kind(state):
    before = {key: tensor.clone() for key, tensor in inner(state).items()}
    zeros = torch.zeros_like(state)
    assert type(zeros) is DSQState and zeros.shape == state.shape and zeros.dequantize().eq(0).all()
    assert (zeros.bits, zeros.dynamic, zeros.stochastic) == (state.bits, state.dynamic, state.stochastic)
    assert all(torch.equal(tensor, before[key]) for key, tensor in inner(state).items())
    assert_same_bytes(zeros.copy_(state), state)
    other = torch.zeros_like(state, dtype=torch.bfloat16)
    assert type(other) is torch.Tensor and other.dtype == torch.bfloat16 and other.eq(0).all()
    assert torch.zeros_like(state, device="meta").device.type == "meta"


def test_to_another_device_moves_every_inner_tensor(state):
    moved = state.to("meta")
    assert type(moved) is DSQState and moved.device.type == "meta"
    assert all(tensor.device.type == "meta" for tensor in inner(moved).values())


def test_a_mask_with_any_pattern_selects_like_the_float_state():
    state = make_state()
    for pattern in range(16):
        rows = [row for row in range(4) if pattern >> row & 1]
        mask = torch.tensor([row in rows for row in range(4)])
        assert torch.equal(state[mask].dequantize(), state.dequantize()[mask])


# --- under torch.compile -------------------------------------------------------------------------------------------


def step(state, x):
    y = (state * 2).sum(-1)
    state.copy_(state * 0.9 + x)
    return y


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("stochastic", [False, True])
def test_compiled_steps_give_the_bytes_of_eager_ones_in_place(calibrated, stochastic):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled_step = torch.compile(step, backend=counter, fullgraph=True)
    compiled, eager = make_state(4, calibrated, stochastic), make_state(4, calibrated, stochastic)
    pointers = {key: tensor.data_ptr() for key, tensor in inner(compiled).items()}
    for i in range(3):
        assert torch.equal(compiled_step(compiled, make_float(i)), step(eager, make_float(i)))
        assert_same_bytes(compiled, eager)
    assert counter.frame_count == 1
    assert {key: tensor.data_ptr() for key, tensor in inner(compiled).items()} == pointers
    assert compiled.rng[:, 1].tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(
    "move",
    [
        lambda s, t: s.index_select(0, torch.tensor([1, 0])),
        lambda s, t: torch.cat([s, t]),
        lambda s, t: t.copy_(s),
        lambda s, t: s[1:3].clone(),
        lambda s, t: s.chunk(2)[1].clone(),
        lambda s, t: torch.zeros_like(s),
        lambda s, t: s.zero_(),
    ],
    ids=["index_select", "cat", "copy_", "slice", "chunk", "zeros_like", "zero_"],
)
def test_moves_stay_packed_when_compiled(calibrated, move):
    torch._dynamo.reset()
    compiled = torch.compile(move, backend="aot_eager", fullgraph=True)
    s, t = make_state(4, calibrated), make_state(4, calibrated, seed=1)
    assert_same_bytes(compiled(s.clone(), t.clone()), move(s.clone(), t.clone()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
@pytest.mark.parametrize("large", [{"B": math.inf}, {"B": math.nan}, {"x": math.inf}, {"x": 1e30, "B": 1e30}])
def test_a_step_in_the_ring_that_is_not_finite_is_found_at_once(dtype, large):
    """Before the codes are stored again, with finite codes; an infinite B beside a finite x, and their product, too."""
    ring = recurrence.new_ring(2, NHEADS, HEADDIM, NGROUPS, DSTATE, FLUSH_INTERVAL, dtype=dtype)
    state = DSQState.from_float(make_float(batch=2), ring=ring)
    x, B = torch.ones(2, NHEADS, HEADDIM), torch.ones(2, NGROUPS, DSTATE)
    recurrence.append_(state.ring, x, torch.ones(2, NHEADS), B, torch.full((2, NHEADS), -0.1))
    assert not state.nonfinite().any()
    x[1, :, 3], B[1, :, 5] = large.get("x", 1.0), large.get("B", 1.0)
    recurrence.append_(state.ring, x, torch.ones(2, NHEADS), B, torch.full((2, NHEADS), -0.2))
    assert not state.dequantize()[1].isfinite().all()
    assert state.nonfinite().tolist() == [[False] * NHEADS, [True] * NHEADS]
    state.ring.position[1] = 1  # what lies behind the position is no part of the state
    assert not state.nonfinite().any()


def test_metadata_holds_constants_only():
    names, meta = make_state(2, stochastic=True).__tensor_flatten__()
    assert names == ["packed", "channel_scale", "state_scale", "rng"] and meta == (2, True)
    hashes = {make_state(*layout)._stable_hash_for_caching() for layout in LAYOUTS}
    assert len(hashes) == len(LAYOUTS)
    assert make_state(seed=0)._stable_hash_for_caching() == make_state(seed=1)._stable_hash_for_caching()
    assert make_state(batch=1)._stable_hash_for_caching() not in hashes


# --- a life of it --------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(layout=st.sampled_from(LAYOUTS), moves=st.lists(st.integers(0, 6), min_size=1, max_size=6))
def test_any_sequence_of_moves_keeps_what_each_sequence_holds(layout, moves):
    state = make_state(*layout)
    plain = state.dequantize()
    for move in moves:
        rows = torch.tensor([move % len(state), 0])
        take = [
            lambda t, rows=rows: t[rows],
            lambda t, rows=rows: t.index_select(0, rows),
            lambda t, rows=rows: torch.cat([t[:1], t]),
            lambda t, rows=rows: t.chunk(2)[-1],
            lambda t, rows=rows: t[-3:],
            lambda t, rows=rows: copy.deepcopy(t),
            lambda t, rows=rows: t[::2].clone(),
        ][move]
        state, plain = take(state), take(plain)
        assert type(state) is DSQState and torch.equal(state.dequantize(), plain)


def test_form_is_equal_where_only_batch_and_values_differ():
    h = torch.randn(4, 2, 8, 16)
    state = DSQState.from_float(h)
    assert state.form is DSQState.from_float(torch.randn(1, 2, 8, 16)).form
    assert state[:2].form is state.form and state.clone().form is state.form
    others = [
        DSQState.from_float(h, 8),
        DSQState.from_float(h, stochastic=True),
        DSQState.from_float(h, state_scale=torch.ones(2, 16)),
        DSQState.from_float(h[:, :, :4]),
        DSQState.from_float(h[..., :8]),
        state[::2],
        DSQState(state.packed, state.channel_scale.float(), state.state_scale, state.rng, 4),
    ]
    assert len({state.form, *(other.form for other in others)}) == 1 + len(others)
