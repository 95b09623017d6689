"""What runs on a GPU beside our kernels: the code that Inductor generates for it, read without one."""

from __future__ import annotations

import re

import pytest
import torch
from pretended_gpu import code_for_gpu, graphs_for_inductor

pytestmark = pytest.mark.skipif(torch.__version__ < "2.13", reason="the pretended GPU answers what torch 2.13 asks")

LAYERS = 3


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def launched(request, make_model, tokens, compiled, decode):
    """Of a prompt and of a step: our operators, and Inductor's kernels by what they compute, in order."""
    with graphs_for_inductor() as graphs:
        model = make_model(num_hidden_layers=LAYERS).to(request.param)
        decode(compiled(model, inner_backend="inductor"), tokens(2, 9), tokens(2, 2))
    found = []
    for graph in graphs:
        code = code_for_gpu(*graph)
        body = code[code.index("def call(") :]
        calls = re.findall(r"(triton_\w+?)_\d+\.run\(|torch\.ops\.(\w+\.\w+)\.\w+\(|(extern_kernels\.\w+)\(", body)
        names = ["".join(call) for call in calls]
        ours = [name.removeprefix("qmamba.") for name in names if name.startswith("qmamba.")]
        found.append((ours, [name for name in names if not name.startswith("qmamba.")]))
    # Logits that the model returns in float32.
    return *found, int(request.param != torch.float32)


def test_a_decode_step_has_three_kernels_at_most_for_all_layers_beside_ours(launched):
    _, (ours, others), casts = launched
    layer = ["norm_w8a8_linear", "conv_update", "ssm_update", "norm_w8a8_linear"]
    assert ours == layer * LAYERS + ["norm_w8a8_linear"]
    assert len(others) == 2 + casts, others
    assert "for_fused" in others[0] and "embedding" in others[1]


def test_a_prompt_has_one_kernel_a_layer_beside_ours(launched):
    (ours, others), _, casts = launched
    layer = ["norm_w8a8_linear", "causal_conv", "chunk_scan", "norm_w8a8_linear", "quantize_state"]
    assert sorted(ours) == sorted(layer * LAYERS + ["norm_w8a8_linear"])
    # What the convolution's state is filled with.
    assert len(others) == 2 + LAYERS + casts, others
