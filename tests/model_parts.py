"""Parts of a model and of its cache that tests compare, and a calibration artifact for it."""

from __future__ import annotations

import torch

from qmamba_compile import Artifact, write_artifact
from qmamba_compile.artifact import Header, fingerprint

INNER = ("packed", "channel_scale", "state_scale", "rng")


def float_parameters(model):
    return {name: (id(p), type(p), p.data_ptr()) for name, p in model.named_parameters()}


def states(cache):
    return [layer.recurrent_states[0] for layer in cache.layers]


def make_artifact(path, model, **tensors):
    shapes = fingerprint({name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)})
    header = Header(
        model_class=type(model).__name__,
        shapes=shapes,
        config={},
        data="random",
        data_digest="00",
        metrics_before={},
        metrics_after={},
        versions={"torch": torch.__version__},
    )
    artifact = Artifact(dict(tensors.pop("tensors")), header)
    write_artifact(path, artifact)
    return artifact


def some_scales(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixers = [layer.mixer for layer in model.backbone.layers]
    return {
        f"backbone.layers.{i}.mixer.state_scale": torch.rand(m.num_heads, m.ssm_state_size, generator=generator) * 0.1
        + 0.01
        for i, m in enumerate(mixers)
    }
