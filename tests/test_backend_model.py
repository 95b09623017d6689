"""What the backend makes of the model and its cache: which weights it holds, and what works without the backend."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import pickle
import subprocess
import sys
import textwrap
import types
import weakref

import numpy
import pytest
import torch
from model_parts import INNER, states
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8Tensor, quantize_

from qmamba_compile import DSQState, quant, report
from qmamba_compile.passes.int8_weight import held_nbytes


@contextlib.contextmanager
def eager():
    torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        torch.compiler.set_stance("default")


def test_float_weights_are_gone(make_model, tokens, compiled):
    model = make_model()
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    floats = [weakref.ref(module.weight) for module in linears.values()]
    with torch.no_grad():
        cache = compiled(model)(tokens(2, 9), use_cache=True).cache_params
        model(tokens(2, 1), cache_params=cache, use_cache=True)
    gc.collect()
    assert len(linears) == 5 and all(isinstance(module.weight, Int8Tensor) for module in linears.values())
    assert [reference() for reference in floats] == [None] * 5
    shapes = {module.weight.shape for module in linears.values()}
    # The embedding has the head's shape; nothing else of a linear's shape is in floating point.
    left = [
        t
        for t in gc.get_objects()
        if type(t) in (torch.Tensor, nn.Parameter) and t.shape in shapes and t.is_floating_point()
    ]
    assert {id(t) for t in left} <= {id(model.backbone.embeddings.weight)}


MEMORY = """
import ctypes, gc, logging, sys, torch
logging.disable(logging.WARNING)
from transformers import Mamba2Config, Mamba2ForCausalLM
def resident():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024
def make(hidden, layers):
    config = Mamba2Config(vocab_size=256, hidden_size=hidden, num_heads=hidden // 32, head_dim=64, state_size=32,
                          num_hidden_layers=layers, n_groups=1, chunk_size=32, eos_token_id=None)
    model = Mamba2ForCausalLM(config).eval().requires_grad_(False)
    model.compile(backend="qmamba", options={"inner_backend": "eager"})
    return model
def run(model):
    with torch.no_grad():
        cache = model(torch.ones(1, 8, dtype=torch.long), use_cache=True).cache_params
        model(torch.ones(1, 1, dtype=torch.long), cache_params=cache, use_cache=True)
run(make(64, 1))  # what the libraries take once
torch._dynamo.reset()
model = make(1536, 4)
linears = sum(m.weight.numel() * 4 for m in model.modules() if isinstance(m, torch.nn.Linear)) / 2**20
before = resident()
run(model)
print(linears, before, resident())
"""


def test_resident_memory_falls_by_the_float_weights():
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(MEMORY)], capture_output=True, text=True, check=True)
    linears, before, after = map(float, done.stdout.split()[-3:])
    assert linears > 200
    # A quarter stays as int8; the rest of the allowance is code and activations.
    assert before - after > 0.65 * linears


@pytest.mark.usefixtures("exact_torchao")
def test_model_works_without_the_backend_afterwards(make_model, tokens, compiled, decode):
    model, prompt, more = make_model(), tokens(2, 9), tokens(2, 3)
    compiled_logits, _ = decode(compiled(model), prompt, more)
    with eager():
        logits, cache = decode(model, prompt, more)
        continued = model(tokens(2, 5), cache_params=cache, use_cache=True).logits
    assert type(states(cache)[0]) is torch.Tensor
    assert logits.isfinite().all() and continued.isfinite().all()
    # Same int8 weights and activations, the state in floating point.
    assert (logits - compiled_logits).abs().max() < 0.3
    model._compiled_call_impl = None
    assert torch.equal(decode(model, prompt, more)[0], logits)


@pytest.mark.parametrize("flush_interval", [1, 8])
def test_packed_cache_continues_in_eager(make_model, tokens, compiled, decode, flush_interval):
    model = compiled(make_model(num_hidden_layers=1), weights=None, flush_interval=flush_interval)
    prompt, more = tokens(2, 9), tokens(2, 3)
    _, cache = decode(model, prompt, more)
    other = copy.deepcopy(cache)
    with torch.no_grad():
        expected = model(tokens(2, 1), cache_params=cache, use_cache=True).logits
        with eager():
            logits = model(tokens(2, 1), cache_params=other, use_cache=True).logits
    # A step that only reads rounds C to 16 bits.
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    for one, two in zip(states(cache), states(other), strict=True):
        if flush_interval == 1:
            assert all(torch.equal(getattr(one, name), getattr(two, name)) for name in INNER)
        else:
            # Eager stores at every step, and what it has stored is where its next step begins.
            assert one.ring.position.tolist() == [4, 4] and two.ring.position.tolist() == [0, 0]
            assert (one.dequantize() - two.dequantize()).norm() < 0.2 * one.dequantize().norm()


def test_layers_store_their_states_in_turn(make_model, tokens, compiled, decode):
    model = compiled(make_model(num_hidden_layers=3), weights=None, flush_interval=2)
    _, cache = decode(model, tokens(2, 9), tokens(2, 3))
    assert [state.flush_interval for state in states(cache)] == [2, 2, 2]
    assert [state.ring.position.tolist() for state in states(cache)] == [[1, 1], [0, 0], [1, 1]]
    assert [state.rng[0, 1].item() for state in states(cache)] == [2, 3, 2]


@pytest.mark.parametrize("options", [{"flush_interval": 4}, {"flush_interval": 8, "ring_bits": 8}])
def test_a_checkpointed_state_is_nearer_to_the_float_one(make_model, tokens, compiled, decode, options):
    prompt, more = tokens(2, 9), tokens(2, 20)
    errors = []
    for chosen in ({"state_bits": None}, {"flush_interval": 1}, options):
        logits, cache = decode(compiled(make_model(num_hidden_layers=1), weights=None, **chosen), prompt, more)
        h = states(cache)[0]
        errors.append((logits, h.dequantize() if isinstance(h, DSQState) else h))
    (exact, h), *others = errors
    every_step, checkpointed = (((logits - exact).norm().item(), (d - h).norm().item()) for logits, d in others)
    assert checkpointed[0] < 0.85 * every_step[0] and checkpointed[1] < 0.85 * every_step[1]


def test_an_unfused_scan_falls_back_to_storing_at_every_step(make_model, tokens, compiled, decode):
    model = compiled(make_model(num_hidden_layers=1), fuse_chunk_scan=False, flush_interval=8)
    _, cache = decode(model, tokens(2, 9), tokens(2, 2))
    assert states(cache)[0].flush_interval == 1
    (entry,) = report.recent[0].rewritten("quantize_state")
    assert "stored at every step: the scan, which names B, was not fused" in entry.detail


@pytest.mark.usefixtures("exact_torchao")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_head_and_embedding_are_one_int8_table(make_model, tokens, compiled, decode, dtype):
    model, prompt, more = make_model(dtype=dtype, tie_word_embeddings=True), tokens(2, 9), tokens(2, 3)
    plain, table = make_model(dtype=dtype, tie_word_embeddings=True), weakref.ref(model.lm_head.weight)
    codes, scale = quant.quantize_rows(model.lm_head.weight)
    found, _ = decode(compiled(model, state_bits=8), prompt, more)
    expected, _ = decode(plain, prompt, more)
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()
    gc.collect()
    assert table() is None and isinstance(model.lm_head.weight, Int8Tensor)
    assert model.lm_head.weight is model.backbone.embeddings.weight
    for done in list(report.recent):
        entries = done.rewritten("quantize_linear")
        assert [entry.layer for entry in entries][-2:] == ["lm_head", "backbone.embeddings"] and len(entries) == 6
        held = sum(p.nbytes for p in model.parameters() if not isinstance(p, Int8Tensor))
        assert held_nbytes(model) == held + sum(entry.bytes_after for entry in entries)
        assert held_nbytes(plain) == held + sum(entry.bytes_before for entry in entries)
        assert not done.skips()
    # Without the backend, after a tie that was made again.
    model.tie_weights()
    assert torch.equal(model.get_input_embeddings()(prompt), (codes * scale).to(dtype)[prompt])
    count = len(report.recent)
    with eager():
        again, _ = decode(model, prompt, more)
    assert (again - found).abs().max() < 0.1 * expected.abs().max()
    assert torch.equal(decode(copy.deepcopy(model), prompt, more)[0], again), "copies are not compiled"
    assert torch.equal(decode(model, prompt, more)[0], found) and len(report.recent) == count


def test_tied_head_follows_an_embedding_that_stays_float(make_model, tokens, compiled):
    model, plain, prompt = make_model(tie_word_embeddings=True), make_model(tie_word_embeddings=True), tokens(2, 9)
    compiled(model, skip_layers=("backbone.embeddings",))
    with torch.no_grad():
        for factor in (1.0, 0.5):
            for m in (model, plain):
                m.backbone.embeddings.weight.mul_(factor)
            found, expected = model(prompt).logits, plain(prompt).logits
            assert (found - expected).abs().max() < 0.1 * expected.abs().max()
    assert model.lm_head.weight is model.backbone.embeddings.weight
    assert type(model.lm_head.weight) is nn.Parameter
    entries = [entry for entry in report.recent[0].rewritten("quantize_linear") if entry.layer == "lm_head"]
    assert len(entries) == 1 and len(report.recent[0].rewritten("quantize_linear")) == 5
    # The head [256, 64] is held twice: in float32 as the embedding, and in int8 with a scale a row beside it.
    beside = 256 * 64 + 256 * 4
    int8 = sum(w.qdata.nbytes + w.scale.nbytes for w in model.parameters() if isinstance(w, Int8Tensor))
    floats = sum(w.nbytes for w in model.parameters() if not isinstance(w, Int8Tensor))
    assert held_nbytes(model) == int8 + floats + beside


def test_tied_head_of_a_model_that_starts_from_embeddings(make_model, tokens, compiled):
    """The graph then holds the head and not the embedding, and a later one holds both."""
    model, prompt = compiled(make_model(tie_word_embeddings=True)), tokens(2, 9)
    vectors = model.get_input_embeddings()(prompt)
    with torch.no_grad():
        model(inputs_embeds=vectors)
        assert isinstance(model.backbone.embeddings.weight, Int8Tensor)
        rounded = model.get_input_embeddings()(prompt)
        assert (rounded - vectors).abs().max() < 0.01 * vectors.abs().max()
        assert torch.equal(model(prompt).logits, model(inputs_embeds=rounded).logits)
    assert model.lm_head.weight is model.backbone.embeddings.weight


@pytest.mark.parametrize("skip_layers", [(), ("backbone.embeddings",)], ids=["int8", "beside"])
def test_tied_head_of_another_model_at_the_same_address(make_model, tokens, compiled, decode, skip_layers):
    """One checkpoint after the other: Dynamo runs the first model's graph, the allocator reuses its memory."""
    memory = numpy.empty((256, 64), dtype=numpy.float32)
    prompt, more = tokens(2, 9), tokens(2, 2)
    for seed in (0, 1):
        model = make_model(seed, num_hidden_layers=1, tie_word_embeddings=True)
        expected, _ = decode(model, prompt, more)
        memory[:] = model.lm_head.weight.numpy()
        weight = nn.Parameter(torch.from_numpy(memory), requires_grad=False)
        model.backbone.embeddings.weight = model.lm_head.weight = weight
        logits, _ = decode(compiled(model, state_bits=8, skip_layers=skip_layers), prompt, more)
        assert (logits - expected).abs().max() < 0.1 * expected.abs().max()
        del model, weight
        gc.collect()
    assert [done.phase for done in report.recent][:2] == ["prefill", "decode"]


def test_weights_that_the_user_still_holds(make_model, tokens, compiled):
    model = make_model(num_hidden_layers=1)
    held = dict(model.named_parameters())
    with torch.no_grad():
        out = compiled(model)(tokens(2, 9), use_cache=True)
        model(tokens(2, 1), cache_params=out.cache_params, use_cache=True)
        model(tokens(2, 9), use_cache=True)
    assert len(report.recent) == 2
    assert isinstance(model.lm_head.weight, Int8Tensor) and type(held["lm_head.weight"]) is nn.Parameter


@pytest.mark.usefixtures("exact_torchao")
def test_model_already_quantized_by_torchao(make_model, tokens, compiled):
    model, plain, prompt = make_model(), make_model(), tokens(2, 9)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    with torch.no_grad():
        expected = model(prompt).logits
        logits = compiled(model)(prompt).logits
    assert len(report.recent[-1].rewritten("quantize_linear")) == 5
    own = compiled(plain)
    with torch.no_grad():
        # Its own kernel rounds activations a little differently: nearer to torchao than to the float model.
        assert (logits - expected).abs().max() < 0.3
        assert (logits - own(prompt).logits).abs().max() < 0.3


def test_copy_of_a_compiled_model_is_independent(make_model, tokens, compiled):
    model, prompt = compiled(make_model()), tokens(2, 9)
    with torch.no_grad():
        expected = model(prompt).logits
        copied = copy.deepcopy(model)
        for parameter in copied.parameters():
            if type(parameter) is nn.Parameter:
                parameter.zero_()
        assert torch.equal(model(prompt).logits, expected)
    assert isinstance(copied.lm_head.weight, Int8Tensor)


def test_cache_with_packed_states_copies_and_pickles(make_model, tokens, compiled, decode):
    model = compiled(make_model(), weights=None)
    _, cache = decode(model, tokens(2, 9), tokens(2, 2))
    copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    with torch.no_grad():
        expected = model(tokens(2, 1), cache_params=cache, use_cache=True).logits
        for other in copies:
            assert [type(state) for state in states(other)] == [DSQState] * 2
            assert torch.equal(model(tokens(2, 1), cache_params=other, use_cache=True).logits, expected)
            for one, two in zip(states(cache), states(other), strict=True):
                assert all(torch.equal(getattr(one, name), getattr(two, name)) for name in INNER)
    assert len(report.recent) == 2


class Unregistering(nn.Module):
    """Holds a model, but not as a child."""

    def __init__(self, model):
        super().__init__()
        self.models = [model]

    def forward(self, ids):
        return self.models[0](ids)


HOLDERS = {
    "an argument": lambda compile, model: functools.partial(compile(lambda held, ids: held(ids)), model),
    "a closure": lambda compile, model: compile(lambda ids: model(ids)),
    "an object": lambda compile, model: _by_object(compile, types.SimpleNamespace(model=model)),
    "a list in an object": lambda compile, model: _by_list(compile, types.SimpleNamespace(models=[model])),
    "a list in a module": lambda compile, model: compile(Unregistering(model)),
    "a module": lambda compile, model: compile(nn.Sequential(model)),
}


def _by_object(compile, holder):
    return compile(lambda ids: holder.model(ids))


def _by_list(compile, holder):
    return compile(lambda ids: holder.models[0](ids))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("holder", HOLDERS)
def test_whoever_holds_the_model_its_layers_have_their_names(make_model, tokens, holder, tied):
    """A compiled method of a plain class used to crash where weights become int8, and to overlook skip_layers."""
    model, ids = make_model(tie_word_embeddings=tied), tokens(2, 9)
    prefix = "0." if holder == "a module" else ""
    options = {"inner_backend": "eager", "skip_layers": (f"{prefix}backbone.layers.0",)}
    compile = functools.partial(torch.compile, backend="qmamba", fullgraph=True, options=options)
    with torch.no_grad():
        expected = model(ids).logits
        logits = HOLDERS[holder](compile, model)(ids).logits
    assert (logits - expected).abs().max() < 0.1 * expected.abs().max()
    assert type(model.lm_head.weight).__name__ == "Int8Tensor"
    layers = {entry.layer for entry in report.recent[-1].rewritten("quantize_state")}
    assert layers == {f"{prefix}backbone.layers.1.mixer"}
    assert type(model.backbone.layers[0].mixer.in_proj.weight) is nn.Parameter


def test_a_cache_that_is_dropped_is_no_anchor(make_model, tokens):
    """Such a wrapper makes a cache only because use_cache is True by default."""
    model, ids = make_model(), tokens(2, 9)
    options = {"inner_backend": "eager", "strict": True}
    with torch.no_grad():
        expected = model(ids).logits
        logits = torch.compile(lambda ids: model(ids).logits, backend="qmamba", options=options)(ids)
    assert (logits - expected).abs().max() < 0.1 * expected.abs().max()
    assert report.recent[-1].rewritten("fuse_chunk_scan") and not report.recent[-1].rewritten("quantize_state")
