"""`DSQState`: packed where a cache moves it, a plain snapshot where it is read; writes that would be lost raise."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from qmamba_compile import quant, recurrence
from qmamba_compile.errors import StateError
from qmamba_compile.recurrence import Ring, new_ring
from qmamba_compile.state import DSQState, require_packable

BATCH, NHEADS, HEADDIM, DSTATE = 4, 2, 8, 16
NGROUPS, FLUSH_INTERVAL = 1, 4

# bits, calibrated, stochastic, dtype of the ring
LAYOUTS = [(8, 0, 0), (8, 1, 1), (4, 0, 0), (4, 0, 1), (4, 1, 0), (4, 1, 1), (2, 0, 1), (2, 1, 0)]
LAYOUTS += [(4, 0, 0, torch.bfloat16), (4, 1, 1, torch.int8), (8, 1, 0, torch.float32)]


def make_float(seed=0, batch=BATCH):
    return torch.randn(batch, NHEADS, HEADDIM, DSTATE, generator=torch.Generator().manual_seed(seed))


def make_state(bits=4, calibrated=False, stochastic=False, ring=None, seed=0, batch=BATCH):
    scale = torch.linspace(0.5, 2, NHEADS * DSTATE).view(NHEADS, DSTATE) if calibrated else None
    if ring is not None:
        ring = make_ring(ring, seed, batch)
    state = DSQState.from_float(
        make_float(seed, batch), bits, state_scale=scale, stochastic=bool(stochastic), seed=5 + seed, ring=ring
    )
    state.rng[:, 1] += torch.arange(batch)  # sequences of different ages
    return state


def make_ring(dtype, seed=0, batch=BATCH):
    """A ring that each sequence has filled to another position."""
    ring = new_ring(batch, NHEADS, HEADDIM, NGROUPS, DSTATE, FLUSH_INTERVAL, dtype=dtype)
    generator = torch.Generator().manual_seed(100 + seed)
    for number in range(FLUSH_INTERVAL - 1):
        x, dt, B = (
            torch.randn(shape, generator=generator)
            for shape in ((batch, NHEADS, HEADDIM), (batch, NHEADS), (batch, NGROUPS, DSTATE))
        )
        recurrence.append_(ring, x, dt.abs(), B, torch.full((batch, NHEADS), -0.1 * (number + 1)))
    ring.position.copy_(torch.arange(batch) % FLUSH_INTERVAL)
    return ring


@pytest.fixture(
    params=LAYOUTS,
    ids=lambda p: "-".join([str(p[0]), "calibrated" if p[1] else "dynamic", "sn"[not p[2]], *map(str, p[3:])]),
)
def state(request):
    return make_state(*request.param)


def names(state):
    return state.__tensor_flatten__()[0]


def inner(state):
    return {name: getattr(state, name) for name in names(state)}


def assert_same_bytes(actual, expected):
    assert type(actual) is DSQState and type(expected) is DSQState
    assert (actual.bits, actual.stochastic, actual.shape) == (expected.bits, expected.stochastic, expected.shape)
    assert names(actual) == names(expected)
    for name in names(expected):
        found, wanted = getattr(actual, name), getattr(expected, name)
        assert found.dtype == wanted.dtype and torch.equal(found, wanted), name


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


# --- copy_ ---------------------------------------------------------------------------------------------------------


def test_copy_from_a_state_copies_codes_and_never_requantizes(state, monkeypatch):
    ring = None if state.ring is None else state.ring.x.dtype
    target = make_state(state.bits, not state.dynamic, state.stochastic, ring, seed=1)
    monkeypatch.setattr(quant, "quantize_state", None)
    monkeypatch.setattr(quant, "dequantize_state", None)
    returned = target.copy_(state)
    monkeypatch.undo()
    assert returned is target
    assert_same_bytes(target, state)


def test_copy_from_a_float_state_requantizes_and_ages(state):
    expected = quant.quantize_state(
        make_float(1),
        state.bits,
        state_scale=None if state.dynamic else state.state_scale,
        rng=state.rng.clone() if state.stochastic else None,
    )
    ages, scale = state.rng[:, 1].clone(), state.state_scale
    assert state.copy_(make_float(1)) is state
    assert torch.equal(state.packed, expected[0]) and torch.equal(state.channel_scale, expected[1])
    assert torch.equal(state.state_scale, expected[2]) and state.state_scale is scale
    assert torch.equal(state.rng[:, 1], ages + 1) and state.rng[:, 0].eq(5).all()


def test_copy_takes_other_dtypes_and_broadcasts(state):
    twin = state.clone()
    state.copy_(make_float(1).bfloat16())
    assert_same_bytes(state, twin.copy_(make_float(1).bfloat16().float()))
    state.copy_(make_float(1)[:1])
    assert_same_bytes(state, twin.copy_(make_float(1)[:1].expand(BATCH, -1, -1, -1)))


def test_copy_to_a_plain_tensor_is_a_read(state):
    plain = torch.empty(BATCH, NHEADS, HEADDIM, DSTATE)
    assert torch.equal(plain.copy_(state), state.dequantize())
    assert torch.equal(plain.bfloat16().copy_(state), state.dequantize().bfloat16())


@pytest.mark.parametrize("change", [{"bits": 8}, {"stochastic": True}, {"calibrated": True}, {"ring": torch.bfloat16}])
def test_copy_between_different_layouts_is_refused(change):
    state, other = make_state(), make_state(**change)
    with pytest.raises(StateError, match=r"layouts or scales differ; use copy_\(source\.dequantize\(\)\)"):
        state.copy_(other)
    assert_same_bytes(state.copy_(other.dequantize()), make_state().copy_(other.dequantize()))


def test_codes_never_change_their_calibrated_scales():
    a = make_state(calibrated=True)
    b = DSQState.from_float(make_float(), state_scale=torch.ones(NHEADS, DSTATE))
    before = b.dequantize()
    with pytest.raises(StateError, match="layouts or scales differ"):
        b.copy_(a)
    assert torch.equal(b.dequantize(), before)
    both = torch.cat([a, b])
    assert type(both) is torch.Tensor
    assert torch.equal(both, torch.cat([a.dequantize(), b.dequantize()]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_stays(state, bad):
    h = make_float()
    h[1, 1, 2, 3] = bad
    state.copy_(h)
    for _ in range(3):
        assert state.dequantize()[1, 1, 2, 3].isnan() and state[0:1].isfinite().all() and state[2:].isfinite().all()
        state.copy_(state * 0.5 + make_float(4))


# --- reads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("arithmetic", lambda s: s * 2 + 1),
        ("reflected", lambda s: 1 - s),
        ("matmul", lambda s: s @ torch.ones(DSTATE, 3)),
        ("einsum", lambda s: torch.einsum("bhpn,bn->bhp", s, torch.ones(s.shape[0], DSTATE))),
        ("reduction", lambda s: s.sum(-1)),
        ("isnan", lambda s: s.isnan()),
        ("item", lambda s: s[0]),
        ("inner slice", lambda s: s[:, :, 1:3]),
        ("two indices", lambda s: s[torch.tensor([0, 1]), torch.tensor([1, 0])]),
        ("inner index", lambda s: s[:, torch.tensor([1, 0])]),
        ("two-dimensional index", lambda s: s[torch.tensor([[0, 1]])]),
        ("index_select inside", lambda s: s.index_select(1, torch.tensor([1]))),
        ("new axis", lambda s: s[None]),
        ("transpose", lambda s: s.transpose(2, 3)),
        ("reshape", lambda s: s.reshape(s.shape[0], -1)),
        ("chunk inside", lambda s: s.chunk(2, dim=1)[1]),
        ("split inside", lambda s: s.split(8, dim=3)[1]),
        ("cat inside", lambda s: torch.cat([s, s], dim=1)),
        ("cat with a float state", lambda s: torch.cat([s, torch.ones(1, NHEADS, HEADDIM, DSTATE)])),
        ("stack", lambda s: torch.stack([s, s])),
        ("bfloat16", lambda s: s.to(torch.bfloat16)),
        ("double", lambda s: s.double()),
        ("repeat", lambda s: s.repeat(2, 1, 1, 1)),
        ("where", lambda s: torch.where(s > 0, s, 0.0)),
    ],
)
def test_reads_are_plain_snapshots(state, name, read):
    found, wanted = read(state), read(state.dequantize())
    assert type(found) is torch.Tensor and found.dtype == wanted.dtype and torch.equal(found, wanted)
    # A snapshot: what happens to it does not reach the state.
    before = {key: tensor.clone() for key, tensor in inner(state).items()}
    found.zero_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in inner(state).items())


def test_values_come_out_of_a_state(state):
    assert torch.equal(state, state.dequantize()) and torch.allclose(state, state.clone())
    assert float(state.abs().max()) == state.dequantize().abs().max().item()
    assert bool(state.isfinite().all())


# --- writes --------------------------------------------------------------------------------------------------------


WRITING_OPS = [
    (overload, argument.name)
    for name in sorted(torch._C._dispatch_get_all_op_names())
    if name.startswith("aten::")
    for packet, _, suffix in [name.removeprefix("aten::").partition(".")]
    if hasattr(torch.ops.aten, packet) and (suffix or "default") in getattr(torch.ops.aten, packet).overloads()
    for overload in [getattr(getattr(torch.ops.aten, packet), suffix or "default")]
    for argument in overload._schema.arguments
    if argument.alias_info is not None and argument.alias_info.is_write and "Tensor" in str(argument.type)
]
KEPT = {torch.ops.aten.copy_.default, torch.ops.aten.zero_.default}


def test_there_are_ops_to_try():
    names = {overload.name() for overload, _ in WRITING_OPS}
    assert len(names) > 1000
    assert {"aten::mul_.Tensor", "aten::add.out", "aten::index_put_", "aten::_foreach_mul_.Scalar"} <= names


def test_every_write_that_torch_has_a_schema_for_is_refused_by_position_and_by_name():
    state = make_state()
    before = {key: tensor.clone() for key, tensor in inner(state).items()}
    for overload, written in WRITING_OPS:
        if overload in KEPT:
            continue
        arguments = overload._schema.arguments
        position = [argument.name for argument in arguments].index(written)
        value = [state] if "List" in str(arguments[position].type) else state
        with pytest.raises(StateError, match=r"writes to a packed state and the write would be lost"):
            DSQState.__torch_dispatch__(overload, (), (), {written: value})
        if not arguments[position].kwarg_only:
            with pytest.raises(StateError):
                DSQState.__torch_dispatch__(overload, (), (*[None] * position, value))
    assert all(torch.equal(tensor, before[key]) for key, tensor in inner(state).items())


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("mul_", lambda s: s.mul_(2)),
        ("+=", lambda s: s.__iadd__(1)),
        ("out=", lambda s: torch.add(make_float(), 1, out=s)),
        ("out= of cat", lambda s: torch.cat([make_float()[:2]] * 2, out=s)),
        ("out= of index_select", lambda s: torch.index_select(make_float(), 0, torch.arange(4), out=s)),
        ("out= of two", lambda s: torch.max(make_float()[None], 0, out=(s, torch.zeros(s.shape, dtype=torch.long)))),
        ("item", lambda s: s.__setitem__(0, 1.0)),
        ("inner items", lambda s: s.__setitem__((slice(None), 0), make_float()[:, 0])),
        ("all items", lambda s: s.__setitem__(..., make_float())),
        ("items by mask", lambda s: s.__setitem__(s > 0, 0.0)),
        ("index_put_", lambda s: s.index_put_((torch.tensor([0]),), torch.tensor(1.0))),
        ("index_copy_", lambda s: s.index_copy_(0, torch.tensor([0]), make_float()[:1])),
        ("index_fill_", lambda s: s.index_fill_(0, torch.tensor([0]), 0.0)),
        ("masked_fill_", lambda s: s.masked_fill_(s.isnan(), 0.0)),
        ("scatter_", lambda s: s.scatter_(0, torch.zeros(s.shape, dtype=torch.long), make_float())),
        ("fill_", lambda s: s.fill_(1.0)),
        ("normal_", lambda s: torch.nn.init.normal_(s)),
        ("uniform_", lambda s: s.uniform_()),
        ("clamp_", lambda s: s.clamp_(-1, 1)),
        ("relu inplace", lambda s: torch.nn.functional.relu(s, inplace=True)),
        ("dropout inplace", lambda s: torch.nn.functional.dropout(s, inplace=True)),
        ("foreach", lambda s: torch._foreach_mul_([make_float(), s], 2.0)),
        ("transpose_", lambda s: s.transpose_(2, 3)),
        ("resize_", lambda s: s.resize_(1)),
        ("set_", lambda s: s.set_(make_float())),
        ("data", lambda s: setattr(s, "data", make_float())),
        ("apply_", lambda s: s.apply_(lambda value: value)),
        ("slice.mul_", lambda s: s[0:1].mul_(2)),
        ("slice item", lambda s: s[0:1].__setitem__(0, 0.0)),
    ],
)
def test_writes_that_would_be_lost_raise(state, name, write):
    before = {key: tensor.clone() for key, tensor in inner(state).items()}
    with pytest.raises(StateError, match=r"lost.*copy_"):
        write(state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in inner(state).items())


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
