"""Families whose Mamba2 layers live in other files, between attention, experts and shared blocks: tiny ones."""

from __future__ import annotations

import dataclasses

import torch
import transformers

from qmamba_compile import SkipReason

COMMON = {"vocab_size": 256, "hidden_size": 64, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
ATTENTION = {"intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
MAMBA = {"n_heads": 4, "d_head": 32, "n_groups": 2, "d_state": 32, "chunk_size": 16}
PREFIXED = {f"mamba_{name}": value for name, value in MAMBA.items()}


@dataclasses.dataclass(frozen=True)
class Family:
    """A tiny configuration, and what must be found in it.

    Attributes:
        scans: Mamba2 layers; linears: rewritten ones; routers: linears left alone, and why.
    """

    config: transformers.PretrainedConfig
    scans: int
    linears: int
    routers: dict[str, SkipReason] = dataclasses.field(default_factory=dict)
    attention_layers: int = 1


def families():
    layers = {"num_hidden_layers": 2}
    yield (
        "Bamba",
        Family(transformers.BambaConfig(**COMMON, **layers, **ATTENTION, **PREFIXED, attn_layer_indices=[1]), 1, 13),
    )
    yield (
        "FalconH1",
        Family(
            transformers.FalconH1Config(**COMMON, **layers, **ATTENTION, **PREFIXED, mamba_d_ssm=128, head_dim=16),
            2,
            19,
            attention_layers=2,
        ),
    )
    router = "model.layers.{}.block_sparse_moe.router"
    yield (
        "GraniteMoeHybrid",
        Family(
            transformers.GraniteMoeHybridConfig(
                **COMMON,
                **layers,
                **ATTENTION,
                **PREFIXED,
                shared_intermediate_size=64,
                num_local_experts=4,
                num_experts_per_tok=2,
                layer_types=["mamba", "attention"],
            ),
            1,
            11,
            {router.format(0): SkipReason.ROUTER, router.format(1): SkipReason.ROUTER},
        ),
    )
    yield (
        "NemotronH",
        Family(
            transformers.NemotronHConfig(
                **COMMON,
                **ATTENTION,
                layers_block_type=["mamba", "attention", "moe"],
                head_dim=16,
                mamba_num_heads=4,
                mamba_head_dim=32,
                n_groups=2,
                ssm_state_size=32,
                chunk_size=16,
                n_routed_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=32,
                moe_shared_expert_intermediate_size=32,
            ),
            1,
            9,
            {"model.layers.2.mixer.gate": SkipReason.NOT_A_PARAMETER},
        ),
    )
    yield (
        "Zamba2",
        Family(
            transformers.Zamba2Config(
                **COMMON,
                **(ATTENTION | {"num_key_value_heads": 4}),
                num_hidden_layers=3,
                layers_block_type=["mamba", "hybrid", "mamba"],
                hybrid_layer_ids=[1],
                mamba_headdim=32,
                n_mamba_heads=4,
                mamba_ngroups=2,
                mamba_d_state=32,
                chunk_size=16,
                num_mem_blocks=1,
                adapter_rank=8,
            ),
            3,
            16,
        ),
    )


FAMILIES = dict(families())


def build(family):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(family.config)
    return model.eval().requires_grad_(False)
