"""Packed states of every layout, and what is compared of them."""

import torch

from qmamba_compile import recurrence
from qmamba_compile.recurrence import new_ring
from qmamba_compile.state import DSQState

BATCH, NHEADS, HEADDIM, DSTATE = 4, 2, 8, 16
NGROUPS, FLUSH_INTERVAL = 1, 4

# bits, calibrated, stochastic, dtype of the ring
LAYOUTS = [(8, 0, 0), (8, 1, 1), (4, 0, 0), (4, 0, 1), (4, 1, 0), (4, 1, 1), (2, 0, 1), (2, 1, 0)]
LAYOUTS += [(4, 0, 0, torch.bfloat16), (4, 1, 1, torch.int8), (8, 1, 0, torch.float32)]


def layout_name(layout):
    return "-".join(
        [str(layout[0]), "calibrated" if layout[1] else "dynamic", "sn"[not layout[2]], *map(str, layout[3:])]
    )


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
