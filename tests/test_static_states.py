from __future__ import annotations

import threading

import pytest
import torch
from packed_states import LAYOUTS, layout_name, make_state

from qmamba_compile.static_states import StaticStates


def prompt(layout=LAYOUTS[0], seed=0):
    """Outputs of a prompt: logits, a layer's state and what its convolution has seen."""
    torch.manual_seed(seed)
    state = make_state(*layout)
    state.copy_(torch.randn(state.shape))
    return [torch.randn(2, 5), state, torch.randn(2, 7, 4)]


def addresses(outputs):
    return [outputs[2].data_ptr(), *(getattr(outputs[1], name).data_ptr() for name in outputs[1].own)]


def assert_same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        assert type(a) is type(b) and torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    names, meta = found[1].__tensor_flatten__()
    assert (names, meta) == wanted[1].__tensor_flatten__()
    for name in names:
        assert torch.equal(getattr(found[1], name), getattr(wanted[1], name)), name


@pytest.fixture
def place():
    return StaticStates([1, 2])


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
def test_the_next_cache_lies_where_a_dropped_one_lay(place, layout):
    first = place(prompt(layout))
    assert_same(first, prompt(layout))
    before, logits = addresses(first), first[0]
    del first
    second = place(prompt(layout, seed=1))
    assert_same(second, prompt(layout, seed=1))
    assert addresses(second) == before
    assert not torch.equal(logits, second[0])  # no state: left alone, whoever holds it


def test_caches_alive_at_once_keep_apart(place):
    first, second = place(prompt(seed=1)), place(prompt(seed=2))
    assert not set(addresses(first)) & set(addresses(second))
    places = addresses(first), addresses(second)
    del first
    third = place(prompt(seed=3))
    assert addresses(third) == places[0]
    assert_same(second, prompt(seed=2))
    del second, third
    assert [addresses(place(prompt(seed=4))), addresses(place(prompt(seed=5)))] == [places[0], places[0]]


HOLDERS = {
    "the state": lambda outputs: outputs[1],
    "an alias": lambda outputs: outputs[1].detach(),
    "one sequence": lambda outputs: outputs[1][0:1],
    "codes": lambda outputs: outputs[1].packed,
    "a view of a ring": lambda outputs: outputs[1].ring.x[:, :1],
    "what a convolution has seen": lambda outputs: outputs[2][:, 3],
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_what_somebody_holds_is_not_written_to(place, holder):
    layout = next(layout for layout in LAYOUTS if make_state(*layout).ring is not None)
    first = place(prompt(layout))
    before, held = addresses(first), HOLDERS[holder](first)
    del first
    second = place(prompt(layout, seed=1))
    assert not set(addresses(second)) & set(before)
    del held
    assert addresses(place(prompt(layout))) == before


def test_a_copy_holds_nothing(place):
    first = place(prompt())
    before, copy = addresses(first), first[1].clone()
    del first
    assert addresses(place(prompt(seed=1))) == before
    assert torch.equal(copy.packed, prompt()[1].packed)


def test_other_sizes_have_a_place_of_their_own(place):
    batch_2 = addresses(place(prompt()))
    wide = [torch.cat([value, value]) for value in prompt()]
    batch_4 = addresses(place(wide))
    assert not set(batch_2) & set(batch_4)
    assert addresses(place(prompt(seed=1))) == batch_2 and addresses(place(wide)) == batch_4


def of_batch(batch):
    return [torch.cat([value[:1]] * batch) for value in prompt()]


def test_memory_of_dropped_caches_does_not_pile_up(place):
    for batch in range(1, 30):
        place(of_batch(batch))
        unused = sum(kept.nbytes() for kept in place._places[:-1])
        assert unused <= place._places[-1].nbytes()
    # Two that take turns both stay, whichever came first.
    for batches in ((1, 9), (9, 1)):
        place = StaticStates([1, 2])
        for batch in batches:
            place(of_batch(batch))
        before = [addresses(place(of_batch(batch))) for batch in batches]
        assert before == [addresses(place(of_batch(batch))) for batch in batches]


def test_tensors_of_one_storage_get_storage_of_their_own():
    """Else each would hold the other, and their memory would never be free."""
    place = StaticStates([0, 1])
    for _ in range(3):
        first, second = place(torch.arange(8.0).chunk(2))
        assert first.tolist() == [0, 1, 2, 3] and second.tolist() == [4, 5, 6, 7]
        del first, second
    assert len(place._places) == 1


def test_inference_tensors_keep_to_themselves(place):
    """Nobody may write to them outside of inference mode."""
    with torch.inference_mode():
        inside = addresses(place(prompt()))
    outside = place(prompt())
    assert not set(addresses(outside)) & set(inside)
    outside[1].copy_(torch.zeros(outside[1].shape))
    with torch.inference_mode():
        assert addresses(place(prompt())) == inside


def test_calibrated_scales_stay_shared(place):
    layout = next(layout for layout in LAYOUTS if not make_state(*layout).dynamic)
    outputs = prompt(layout)
    scale = outputs[1].state_scale
    for _ in range(2):
        assert place(outputs)[1].state_scale is scale


def test_threads_never_share_a_place(place):
    errors = []

    def work(wanted):
        for turn in range(100):
            found = place([wanted[0], wanted[1].clone(), wanted[2].clone()])
            if not torch.equal(found[2], wanted[2]) or not torch.equal(found[1].packed, wanted[1].packed):
                errors.append(turn)

    threads = [threading.Thread(target=work, args=(prompt(seed=seed),)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Each thread has the last one while it makes the next.
    assert not errors and len(place._places) <= 8
