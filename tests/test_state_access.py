"""Reads of a `DSQState` are plain snapshots; `copy_` writes it, and writes that would be lost raise."""

import math

import pytest
import torch
from packed_states import (
    BATCH,
    DSTATE,
    HEADDIM,
    LAYOUTS,
    NHEADS,
    assert_same_bytes,
    inner,
    layout_name,
    make_float,
    make_state,
)

from qmamba_compile import quant
from qmamba_compile.errors import StateError
from qmamba_compile.state import DSQState


@pytest.fixture(params=LAYOUTS, ids=layout_name)
def state(request):
    return make_state(*request.param)


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


@pytest.mark.parametrize("inside", [False, True])
def test_inference_mode_reads_states_made_outside_and_inside(inside):
    with torch.inference_mode(inside):
        state = make_state()
    wanted = state.dequantize()
    with torch.inference_mode():
        for read in (lambda s: s[0], lambda s: s.view(-1), lambda s: s[1:], lambda s: s.unbind()[1], torch.clone):
            found = read(state)
            assert torch.equal(found.clone(), read(wanted))
        assert type(state[1:]) is DSQState
        state[:1].zero_()
    assert not state[0].any() and torch.equal(state[1], wanted[1])


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
