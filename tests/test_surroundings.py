"""Surroundings that are not as they should be: what is said, and that nothing is lost."""

import pytest
import torch

from qmamba_compile.cpu_templates import build, launch, launch_layers
from qmamba_compile.errors import ConfigError


@pytest.fixture
def no_compiler(monkeypatch):
    from torch._inductor import cpp_builder, exc

    def nothing():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", nothing)
    caches = (launch.kernel, launch_layers.layer_kernel, build.find_compiler)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_without_a_compiler_the_model_runs_all_the_same(no_compiler, make_model, compiled, tokens, decode):
    """Inductor compiles nothing for the CPU then, and raises."""
    prompt, more = tokens(2, 9), tokens(2, 3, seed=2)
    expected, _ = decode(compiled(make_model()), prompt, more)
    torch._dynamo.reset()
    logits, _ = decode(compiled(make_model(), inner_backend="inductor"), prompt, more)
    torch.testing.assert_close(logits, expected)


def test_pytorchs_filter_of_guards_goes_with_our_options(make_model, tokens, decode):
    """torch.compile takes it out of the options; the guards that it drops are some of those that passes narrow."""
    prompt, more = tokens(2, 9), tokens(2, 3, seed=2)
    model = make_model()
    lax = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    model.compile(backend="qmamba", options=lax | {"inner_backend": "eager", "state_bits": 8})
    expected, _ = decode(model, prompt, more)
    torch._dynamo.reset()
    other = make_model()
    other.compile(backend="qmamba", options={"inner_backend": "eager", "state_bits": 8})
    logits, cache = decode(other, prompt, more)
    assert torch.equal(logits, expected) and cache.layers[0].recurrent_states[0].bits == 8


@pytest.mark.parametrize("flush_interval", [1, 8])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, "cpu", "meta"], ids=str)
def test_defaults_of_torch_decide_nothing(make_model, compiled, tokens, decode, default, flush_interval):
    """Kernels used to write float32 into outputs of the default dtype, beyond their end where it is shorter."""
    prompt, more = tokens(2, 9), tokens(2, 3, seed=2)
    expected, _ = decode(compiled(make_model(), flush_interval=flush_interval), prompt, more)
    torch._dynamo.reset()
    model = compiled(make_model(), flush_interval=flush_interval)
    mask = torch.ones(2, 9, dtype=torch.int64)
    try:
        if isinstance(default, str):
            torch.set_default_device(default)
        else:
            torch.set_default_dtype(default)
        logits, _ = decode(model, prompt, more, attention_mask=mask)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize(
    "names, unknown",
    [
        (("lm_haed", "lm_head"), ["lm_haed"]),
        (("backbone.layers",), []),
        (("backbone.layers.0.mixer.conv1d",), []),
        (("backbone.layers.1.mixer.in_pro",), None),
    ],
)
def test_a_name_in_skip_layers_that_no_layer_has(make_model, compiled, tokens, decode, caplog, names, unknown):
    decode(compiled(make_model(), skip_layers=names), tokens(2, 9), tokens(2, 1))
    unknown = list(names) if unknown is None else unknown
    assert [record.args[0] for record in caplog.records if "skip_layers" in record.msg] == unknown


def test_a_dump_folder_that_cannot_be(make_model, compiled, tokens, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QMAMBA_DUMP", str(tmp_path / "file"))
    with pytest.raises(Exception) as caught, torch.no_grad():
        compiled(make_model())(tokens(2, 9))
    assert isinstance(caught.value.inner_exception, ConfigError) and "QMAMBA_DUMP" in str(caught.value)


def test_a_wrong_instruction_set_is_refused_before_any_weight_is_touched(make_model, compiled, tokens, monkeypatch):
    model = make_model()
    monkeypatch.setenv("QMAMBA_CPU_ISA", "AVX2")
    with pytest.raises(Exception, match="QMAMBA_CPU_ISA='AVX2' is not allowed"), torch.no_grad():
        compiled(model)(tokens(2, 9))
    assert {type(parameter) for parameter in model.parameters()} == {torch.nn.Parameter}
