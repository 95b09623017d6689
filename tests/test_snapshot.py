"""Views of a packed state: what is read is plain, and no write is lost in silence."""

import contextlib
import copy
import io
import pickle

import pytest
import torch
from packed_states import make_state

from qmamba_compile.errors import StateError
from qmamba_compile.snapshot import Snapshot

WRITES = {
    "state[0].zero_()": lambda s: s[0].zero_(),
    "state[0, 1].fill_(1)": lambda s: s[0, 1].fill_(1),
    "state[:, 0].mul_(2)": lambda s: s[:, 0].mul_(2),
    "state[0][1].zero_()": lambda s: s[0][1].zero_(),
    "state[0][...] = 0": lambda s: s[0].__setitem__(..., 0),
    "state[0] += 1": lambda s: s[0].__iadd__(1),
    "state[0].copy_()": lambda s: s[0].copy_(torch.zeros_like(s[0])),
    "state.select(0, 1).zero_()": lambda s: s.select(0, 1).zero_(),
    "state.view(-1).zero_()": lambda s: s.view(-1).zero_(),
    "state.transpose(2, 3).zero_()": lambda s: s.transpose(2, 3).zero_(),
    "state[:1].squeeze(0).zero_()": lambda s: s[:1].squeeze(0).zero_(),
    "for row in state": lambda s: [row.zero_() for row in s],
    "state.unbind()": lambda s: s.unbind()[0].zero_(),
    "state[0].data": lambda s: s[0].data.zero_(),
    "out=state[0]": lambda s: torch.add(s[0] + 0, 1, out=s[0]),
    "init": lambda s: torch.nn.init.zeros_(s[0]),
}


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_to_a_view_is_refused(write, mode):
    with mode():
        state = make_state()
        before = state.dequantize()
        with pytest.raises(StateError, match=r"view of a packed state.*state\[i : i \+ 1\]"):
            write(state)
        assert torch.equal(state.dequantize(), before)


def test_the_advice_holds():
    state = make_state()
    before = state.dequantize()
    state[1:2].zero_()
    assert not state[1].any() and torch.equal(state[0], before[0]) and state[0].any()
    clone = state[0].clone()
    assert type(clone) is torch.Tensor and not clone.zero_().any()


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.inference_mode])
def test_what_is_read_is_plain(mode):
    with mode():
        state = make_state()
        floats = state.dequantize()
        row = state[0]
        assert isinstance(row, Snapshot) and torch.equal(row, floats[0])
        results = (row + 1, row.clone(), row.sum(), row.double(), torch.stack([row, row]), row[row > 0], row @ row.mT)
        assert {type(result) for result in results} == {torch.Tensor}
        total = row * 2
        total.add_(1)  # its own memory
        assert torch.equal(total, floats[0] * 2 + 1)
        target = torch.zeros_like(floats[0])
        target.copy_(row)
        target += row
        assert torch.equal(target, floats[0] * 2)
        assert row.tolist() == floats[0].tolist() and (row.numpy() == floats[0].numpy()).all()
        assert state[0, 0, 0, 0].item() == floats[0, 0, 0, 0].item()


def test_copies_are_plain_tensors():
    row = make_state()[0]
    file = io.BytesIO()
    torch.save({"row": row}, file)
    file.seek(0)
    for copied in (torch.load(file)["row"], pickle.loads(pickle.dumps(row)), copy.deepcopy(row)):
        assert type(copied) is torch.Tensor and torch.equal(copied, row)


def test_a_compiled_reader_gets_plain_tensors():
    state = make_state()
    read = torch.compile(lambda s: s[0] * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(read(state), state.dequantize()[0] * 2) and type(read(state)) is torch.Tensor
