"""Replayed launches: what compiled code calls must do what the operator does, with whatever tensors it is given."""

import concurrent.futures
import weakref

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from qmamba_compile import DSQState, ops, recurrence  # noqa: F401  (ops registers qmamba::*)
from qmamba_compile.cpu_templates import build, call_site, launch, launch_layers
from qmamba_compile.cpu_templates.call_site import LAUNCHERS, CallSite

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="needs a C++ compiler")

b, h, p, n, k, o = 2, 3, 8, 32, 64, 24


def step_arguments(ring_dtype=None):
    state = DSQState.from_float(torch.randn(b, h, p, n), 4)
    ring = () if ring_dtype is None else recurrence.new_ring(b, h, p, 1, n, 3, dtype=ring_dtype)
    zxBCdt = torch.randn(b, h * p + 2 * n + h)
    x, B, C, dt = zxBCdt.split([h * p, n, n, h], dim=1)
    vectors = -torch.rand(h), B.view(b, 1, n), C.view(b, 1, n), torch.randn(h), torch.randn(h)
    scales = state.channel_scale, state.state_scale, state.rng
    return [state.packed, *scales, x.view(b, h, p), dt, *vectors, None, True, 4, False, *ring]


def bfloat16(arguments, *kept):
    """As a model in bfloat16 gives them: all floats but those at ``kept`` and the states."""
    return [
        a.bfloat16() if isinstance(a, torch.Tensor) and a.dtype is torch.float32 and i not in kept else a
        for i, a in enumerate(arguments)
    ]


def linear_arguments(dtype=torch.float32):
    x = torch.randn(b, 1, k + 8, dtype=dtype)[..., :k]
    return [x, torch.randint(-127, 128, (o, k), dtype=torch.int8), torch.rand(o, 1), torch.randn(o), None, None]


def norm_arguments():
    x, *rest = linear_arguments()
    return [x, torch.randn(b, 1, k), torch.rand(k), 1e-5, k, *rest]


def residual_arguments():
    return [*norm_arguments(), torch.randn(b, 1, o), torch.bfloat16, torch.bfloat16]


def conv_arguments():
    return [torch.randn(b, k, 3), torch.randn(b, 1, k).mT, torch.randn(k, 1, 4), torch.randn(k), True]


def sequence_arguments():
    return [torch.randn(b, 7, k + 8)[..., :k].mT, torch.randn(k, 1, 4), torch.randn(k), True]


CASES = {
    "ssm_update": step_arguments,
    "ssm_update, ring": lambda: step_arguments(torch.bfloat16),
    "ssm_update, int8 ring": lambda: step_arguments(torch.int8),
    "ssm_update, bfloat16": lambda: bfloat16(step_arguments(), 6),  # A
    "w8a8_linear": linear_arguments,
    "w8a8_linear, bfloat16": lambda: bfloat16(linear_arguments(), 2),  # the scale of the weight
    "norm_w8a8_linear": norm_arguments,
    "norm_w8a8_linear, bfloat16": lambda: bfloat16(norm_arguments(), 6),
    "w8a8_linear, residual": lambda: [*linear_arguments(), torch.randn(b, 1, o)],
    "norm_w8a8_linear, residual": residual_arguments,
    "norm_w8a8_linear, residual in float32": lambda: bfloat16(residual_arguments(), 0, 6, 10),
    "conv_update": conv_arguments,
    "conv_update, bfloat16": lambda: bfloat16(conv_arguments()),
    "causal_conv": sequence_arguments,
    "causal_conv, bfloat16": lambda: bfloat16(sequence_arguments()),
}


def copied(arguments):
    """The same values elsewhere in memory, in the same layout."""
    return [
        torch.empty_strided(a.shape, a.stride(), dtype=a.dtype).copy_(a) if isinstance(a, torch.Tensor) else a
        for a in arguments
    ]


@pytest.mark.parametrize("case", CASES)
def test_every_call_is_what_the_operator_does(case):
    name = case.partition(",")[0]
    site, operator = CallSite(name), getattr(torch.ops.qmamba, name).default
    for _ in range(5):
        arguments = CASES[case]()
        expected_arguments = copied(arguments)
        y, expected = site(*arguments), operator(*expected_arguments)
        assert site.launch is not None
        assert y.dtype is expected.dtype and y.stride() == expected.stride() and torch.equal(y, expected)
        for found, wanted in zip(arguments, expected_arguments, strict=True):
            assert not isinstance(found, torch.Tensor) or torch.equal(found, wanted)


def test_every_launcher_has_a_case():
    assert {case.partition(",")[0] for case in CASES} == set(LAUNCHERS)


def test_converted_arguments_are_left_to_the_operator():
    """A copy made at the first call would be read at every later one."""
    site = CallSite("w8a8_linear")
    for _ in range(2):
        arguments = linear_arguments(torch.float16)
        assert torch.equal(site(*arguments), torch.ops.qmamba.w8a8_linear(*arguments))
        assert site.launch is None


def test_no_kernel_leaves_the_call_to_the_operator(monkeypatch):
    monkeypatch.setitem(LAUNCHERS, "conv_update", lambda *arguments: None)
    site, arguments = CallSite("conv_update"), conv_arguments()
    copies = copied(arguments)
    assert torch.equal(site(*arguments), torch.ops.qmamba.conv_update(*copies))


def test_no_compiler_makes_the_operator_the_call_site(monkeypatch):
    monkeypatch.setattr(call_site, "load_extension", lambda name: None)
    state, xBC, *rest = conv_arguments()
    expected = torch.ops.qmamba.conv_update(state.clone(), xBC, *rest)
    site = CallSite("conv_update", {1: (xBC.shape, xBC.stride(), 8)})
    padded = torch.cat([torch.randn(8), xBC.flatten()])
    assert torch.equal(site(state, padded, *rest), expected)


def test_a_view_is_found_from_its_base():
    _, xBC, *rest = conv_arguments()
    site = CallSite("conv_update", {1: (xBC.shape, xBC.stride(), 8)})
    for _ in range(3):
        state, base = torch.randn(b, k, 3), torch.randn(4 + 8 + xBC.numel())[4:]
        expected = torch.ops.qmamba.conv_update(state.clone(), base[8:].view(b, 1, k).mT, *rest)
        assert torch.equal(site(state, base, *rest), expected)
    assert site.launch.inputs[1][1:] == (1, 32)


def test_errors_of_a_call_are_raised():
    site, arguments = CallSite("conv_update"), conv_arguments()
    with pytest.raises(AttributeError):
        site(0, *arguments[1:])  # the launcher's own
    site(*arguments)
    with pytest.raises(RuntimeError, match="non-tensor"):
        site(0, *arguments[1:])  # in place of an address


def test_a_call_holds_nothing_but_its_output():
    """What a call allocates and what it was given is freed with the last reference outside of it."""
    site, freed = CallSite("conv_update"), []
    for _ in range(3):
        arguments = conv_arguments()
        y = site(*arguments)
        for tensor in (*arguments[:4], y):
            weakref.finalize(tensor, freed.append, None)
    del tensor, arguments, y
    assert len(freed) == 15


def test_threads_share_a_call_site():
    """The kernel runs without the lock of the interpreter: each call has fields of its own."""
    site = CallSite("conv_update")
    calls = [conv_arguments() for _ in range(64)]
    expected = [torch.ops.qmamba.conv_update(*copied(arguments)) for arguments in calls]
    site(*conv_arguments())
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda arguments: site(*arguments), calls))
    assert all(map(torch.equal, found, expected))


def test_the_number_of_threads_is_that_of_the_call():
    site, arguments = CallSite("w8a8_linear"), linear_arguments()
    arguments[1:4] = torch.ones(2**18 // k, k, dtype=torch.int8), torch.rand(2**18 // k, 1), None
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            site(*arguments)
            assert site.launch.constants[-1] == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_calls_what_has_fixed_sizes(dynamic):
    call_site.inductor_options()

    def layer(x, *rest):
        # Of the last k of 2 k columns: a view.
        return torch.ops.qmamba.w8a8_linear(torch.cat([x, x.relu()], dim=-1)[..., k:], *rest) + 1

    torch._dynamo.reset()
    arguments = linear_arguments()
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        y, (code,) = run_and_get_code(torch.compile(layer, dynamic=dynamic), *arguments)
    assert torch.equal(y, layer(*arguments))
    assert (f"CallSite('w8a8_linear', {{0: ((2, 1, 64), ({2 * k}, {2 * k}, 1), {k})}})" in code) is not dynamic


def test_cached_code_does_not_outlive_a_version_of_the_package(make_model, tokens, compiled, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counters = torch._dynamo.utils.counters["inductor"]
    model, found = make_model(num_hidden_layers=1), []
    for version in ("1", "1", "2"):
        torch._dynamo.reset()
        counters.clear()
        monkeypatch.setattr(call_site, "_version", lambda folder, version=version: version)
        with torch.no_grad():
            compiled(model, inner_backend="inductor")(tokens(2, 9))
        found.append((counters["fxgraph_cache_hit"], counters["fxgraph_cache_miss"]))
    assert found == [(0, 1), (1, 0), (0, 1)]


def test_every_module_is_a_part_of_the_version(tmp_path):
    path = tmp_path / "templates" / "shapes.py"
    path.parent.mkdir()
    versions = set()
    for text in ("contiguous", "transposed"):
        path.write_text(text)
        call_site._version.cache_clear()
        versions.add(call_site._version(tmp_path))
    assert len(versions) == 2


def test_functions_that_a_user_marked_later_stay_marked():
    call_site.inductor_options()
    with torch._inductor.config.patch(unsafe_marked_cacheable_functions={"theirs": "1"}):
        assert call_site.inductor_options()["unsafe_marked_cacheable_functions"]["theirs"] == "1"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_a_model_prepares_no_launch_anew(make_model, tokens, compiled, monkeypatch, dtype):
    pytest.importorskip("torch._inductor.codegen.custom_extern_kernel_codegen")  # torch 2.11: operators are called
    model = compiled(make_model(num_hidden_layers=1, dtype=dtype), inner_backend="inductor")
    token = tokens(2, 1, seed=1)

    with torch.no_grad():
        cache = model(tokens(2, 9), use_cache=True).cache_params
        for _ in range(2):
            model(token, cache_params=cache, use_cache=True)

        def refuse(*arguments):
            raise AssertionError("a launch is prepared")

        # What call sites and operators need for one.
        monkeypatch.setattr(launch, "kernel", refuse)
        monkeypatch.setattr(launch_layers, "layer_kernel", refuse)
        assert model(token, cache_params=cache, use_cache=True).logits.isfinite().all()
