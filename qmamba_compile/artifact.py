"""The calibration artifact: one safetensors file with per-layer scales, tuned weights, and where they came from.

Tensors are float32, keyed by module path and kind, for example ``backbone.layers.3.mixer.state_scale``:
    - ``state_scale`` [nheads, dstate]: calibrated scales of a Mamba2 layer's state;
    - ``smooth`` [in_features]: SmoothQuant factors that multiply a linear's input;
    - ``act_scale`` []: static activation scale of a linear;
    - ``weight_bcdt`` [rows, ...], ``bias_bcdt`` [rows]: tuned values for the *last* rows of ``weight`` or ``bias``,
      where in_proj makes B, C and dt, and conv1d B and C.

A JSON header in the file's metadata says which model it is for and how it was made. Everything is checked on reading
and before writing, and `check_model` checks it against a model, so that no weight is touched by a wrong artifact.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from . import quant
from .errors import ArtifactError

FORMAT_VERSION = 1

Shapes = Mapping[str, tuple[int, ...]]

_HEADER_KEY = "qmamba"
_AGAIN = "calibrate again with `qmamba calibrate`"


class _Kind(NamedTuple):
    """What tensors of a kind look like, beside the ``parameter`` of the model that they serve."""

    parameter: str
    shape: str
    fits: Callable[[tuple[int, ...], tuple[int, ...]], bool]
    is_scale: bool = True


def _are_rows(shape: tuple[int, ...], parameter: tuple[int, ...]) -> bool:
    return len(shape) == len(parameter) and shape[1:] == parameter[1:] and 0 < shape[0] <= parameter[0]


_KINDS = {
    "state_scale": _Kind("A_log", "[nheads, dstate]", lambda s, A_log: len(s) == 2 and s[:1] == A_log and s[1] > 0),
    "smooth": _Kind("weight", "[in_features]", lambda s, weight: s == weight[1:]),
    "act_scale": _Kind("weight", "[]", lambda s, weight: s == ()),
    "weight_bcdt": _Kind("weight", "[rows, ...]", _are_rows, is_scale=False),
    "bias_bcdt": _Kind("bias", "[rows]", _are_rows, is_scale=False),
}


@dataclasses.dataclass(frozen=True)
class Header:
    """Where an artifact came from.

    Attributes:
        model_class: class of the calibrated model, such as ``Mamba2ForCausalLM``.
        shapes: `fingerprint` of its parameters.
        config: the options calibration ran with.
        data: what it ran on, in words.
        data_digest: sha256 of that data.
        metrics_before, metrics_after: such as ``{"perplexity": 3.71}``.
        versions: of the libraries, such as ``{"torch": "2.13.0"}``.
    """

    model_class: str
    shapes: Shapes
    config: Mapping[str, Any]
    data: str
    data_digest: str
    metrics_before: Mapping[str, float]
    metrics_after: Mapping[str, float]
    versions: Mapping[str, str]
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """Canonical text: the same header gives the same bytes."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, allow_nan=False)


@dataclasses.dataclass(frozen=True, eq=False)
class Artifact:
    """Tensors by ``<module path>.<kind>`` and their header. ``source`` is the file, for messages."""

    tensors: Mapping[str, Tensor]
    header: Header
    source: str = "<memory>"

    @property
    def layers(self) -> tuple[str, ...]:
        """Module paths that have a tensor, layer 2 before layer 10."""
        return tuple(sorted({_split(key)[0] for key in self.tensors}, key=_natural))

    def state_scale(self, layer: str) -> Tensor | None:
        """float32 [nheads, dstate]."""
        return self.tensors.get(f"{layer}.state_scale")

    def require_state_scale(self, layer: str, shape: tuple[int, int]) -> Tensor:
        """float32 ``shape``, [nheads, dstate] of the model; dstate is nothing that the parameters in the header tell.

        Raises:
            ArtifactError: the layer has none, or one of another shape.
        """
        scale = self.state_scale(layer)
        if scale is None:
            calibrated = [path for path in self.layers if self.state_scale(path) is not None]
            raise ArtifactError(
                f"{self.source}: {layer}: no state_scale; the artifact has one for {calibrated or 'no layer'}; "
                f"{_AGAIN}, add the layer to skip_layers, or use state_scales='dynamic'"
            )
        if tuple(scale.shape) != shape:
            raise ArtifactError(
                f"{self.source}: {layer}: state_scale is {list(scale.shape)}, and the state has [nheads, dstate] "
                f"{list(shape)}; {_AGAIN}"
            )
        return scale

    def smooth(self, layer: str) -> Tensor | None:
        """float32 [in_features]."""
        return self.tensors.get(f"{layer}.smooth")

    def act_scale(self, layer: str) -> Tensor | None:
        """float32 []."""
        return self.tensors.get(f"{layer}.act_scale")

    def weight_bcdt(self, layer: str) -> Tensor | None:
        """float32 [rows, ...], for the last rows of the layer's weight."""
        return self.tensors.get(f"{layer}.weight_bcdt")

    def bias_bcdt(self, layer: str) -> Tensor | None:
        """float32 [rows], for the last rows of the layer's bias."""
        return self.tensors.get(f"{layer}.bias_bcdt")

    @property
    def tuned_for(self) -> int | None:
        """flush_interval that its weights were tuned for; ``None`` when it has none."""
        if not any(key.endswith("_bcdt") for key in self.tensors):
            return None
        return self.header.config.get("flush_interval", 1)

    def other_interval(self, flush_interval: int) -> str:
        """What to say to who runs its weights with another interval.

        ESR bends weights against the error of one way of storing; without that error they are only bent. Bundled model,
        tuned for a store at every step, run with a store in eight: +0.91 % perplexity, not +0.18 %.
        """
        return (
            f"{self.source}: its weights were tuned for flush_interval={self.tuned_for} and run with {flush_interval}, "
            f"which may cost more than it saves; set flush_interval={self.tuned_for}, or calibrate with --no-esr"
        )

    @functools.cached_property
    def digest(self) -> str:
        """sha256 over header and tensors, independent of their order and of the file."""
        sha = hashlib.sha256(self.header.to_json().encode())
        for key in sorted(self.tensors):
            tensor = self.tensors[key].detach().cpu().contiguous()
            sha.update(f"\n{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            sha.update(tensor.numpy().tobytes())
        return sha.hexdigest()


def changes_weight(artifact: Artifact | None, layer: str) -> bool:
    """True when the int8 weight of a linear is made of another than its float one, so that a tied embedding keeps that.

    SmoothQuant factors could multiply what is looked up. But a model that is saved has torchao's lookup where it is
    loaded, which does not know of them.
    """
    return artifact is not None and not (artifact.smooth(layer) is None and artifact.weight_bcdt(layer) is None)


def with_last_rows(parameter: Tensor, rows: Tensor) -> Tensor:
    """A copy of ``parameter`` whose last rows are tuned ones."""
    return torch.cat([parameter[: -len(rows)], rows.to(parameter)])


def fingerprint(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Parameter path -> shape, sorted: what tells one model from another.

    Calibration takes it over ``model.named_parameters(remove_duplicate=False)``, since a tied weight has two paths; a
    traced graph knows a part of them.
    """
    return {path: tuple(int(extent) for extent in shapes[path]) for path in sorted(shapes)}


# --- files ---------------------------------------------------------------------------------------------------------


def write_artifact(path: str | os.PathLike[str], artifact: Artifact) -> None:
    """Write to ``path`` in one step: a reader, or a kill at any moment, finds the old file or the new one.

    A symbolic link stays one: what it points to is written.

    Raises:
        ArtifactError: the artifact is not valid, or ``path`` is something that no file may replace; all is left as it
            was.
    """
    require_file_name(path)
    _check(dataclasses.replace(artifact, source=str(path)))
    path = Path(os.path.realpath(path))
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in artifact.tensors.items()}
    content = safetensors.torch.save(tensors, metadata={_HEADER_KEY: artifact.header.to_json()})
    replace_file(path, content)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file in one step: a reader, or a kill at any moment, finds the old one or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def require_file_name(path: str | os.PathLike[str]) -> None:
    """Refuse what a new file would replace although it is none: a folder, a device such as ``/dev/full``, a pipe.

    Raises:
        ArtifactError: it is one of these.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a device, pipe or socket"
        example = path / "scales.safetensors" if path.is_dir() else "scales.safetensors"
        raise ArtifactError(f"{path}: {kind}; give the name of the file to write, such as {example}")


def read_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Read and check an artifact.

    Raises:
        ArtifactError: the file is missing, truncated or of another kind; its version is unknown; a header field or a
            tensor is missing, unexpected, or has a value that is not allowed.
    """
    source = os.path.expanduser(os.fspath(path))
    try:
        with safetensors.safe_open(source, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies, so that what happens to the file later does not change the scales in use.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise ArtifactError(
            f"{source}: cannot be opened ({error}); give the path that `qmamba calibrate` wrote"
        ) from error
    except safetensors.SafetensorError as error:
        raise ArtifactError(f"{source}: truncated, or not a safetensors file ({error}); {_AGAIN}") from error
    if _HEADER_KEY not in metadata:
        raise ArtifactError(
            f"{source}: a safetensors file without a {_HEADER_KEY!r} header (it has {sorted(metadata)}); "
            "give the path of an artifact that `qmamba calibrate` wrote"
        )
    artifact = Artifact(tensors, _parse_header(source, metadata[_HEADER_KEY]), source)
    _check(artifact)
    return artifact


def _parse_header(source: str, text: str) -> Header:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{source}: the header is not JSON ({error}); {_AGAIN}") from error
    if not isinstance(values, dict):
        raise ArtifactError(f"{source}: the header is {type(values).__name__}, not a JSON object; {_AGAIN}")
    # Before the names: another version may well have others.
    version = values.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ArtifactError(
            f"{source}: format_version={version!r} is unknown; this version of qmamba reads {FORMAT_VERSION}; {_AGAIN}"
        )
    expected, found = {field.name for field in dataclasses.fields(Header)}, set(values)
    if found != expected:
        raise ArtifactError(
            f"{source}: header fields missing: {sorted(expected - found)}, unknown: {sorted(found - expected)}; "
            f"{_AGAIN}"
        )
    if isinstance(values["shapes"], dict):
        values["shapes"] = {k: tuple(v) if isinstance(v, list) else v for k, v in values["shapes"].items()}
    return Header(**values)


# --- validation ----------------------------------------------------------------------------------------------------


def _check(artifact: Artifact) -> None:
    _check_header(artifact.source, artifact.header)
    for key in sorted(artifact.tensors, key=_natural):
        _check_tensor(artifact.source, key, artifact.tensors[key], artifact.header.shapes)


def _check_header(source: str, header: Header) -> None:
    def require(good: bool, name: str, value: Any, allowed: str) -> None:
        if not good:
            raise ArtifactError(f"{source}: header {name}={value!r} is not allowed; it must be {allowed}; {_AGAIN}")

    require(header.format_version == FORMAT_VERSION, "format_version", header.format_version, str(FORMAT_VERSION))
    for name in ("model_class", "data", "data_digest"):
        value = getattr(header, name)
        require(isinstance(value, str) and value != "", name, value, "a text that is not empty")
    for name in ("shapes", "config", "metrics_before", "metrics_after", "versions"):
        value = getattr(header, name)
        good = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
        require(good, name, value, "an object with names as keys")
    require(len(header.shapes) > 0, "shapes", header.shapes, "the shape of every parameter of the model")
    for path, shape in header.shapes.items():
        good = isinstance(shape, tuple) and all(type(extent) is int and extent >= 0 for extent in shape)
        require(good, f"shapes[{path!r}]", shape, "a list of sizes")
    for name in ("metrics_before", "metrics_after"):
        for metric, value in getattr(header, name).items():
            # Not math.isfinite, which raises where an integer fits no float.
            good = type(value) in (int, float) and abs(value) <= sys.float_info.max
            require(good, f"{name}[{metric!r}]", value, "a finite number")
    interval = header.config.get("flush_interval", 1)
    require(type(interval) is int and interval > 0, "config['flush_interval']", interval, "a number of steps")
    for library, version in header.versions.items():
        require(isinstance(version, str), f"versions[{library!r}]", version, "a text")
    try:
        header.to_json()
    except (TypeError, ValueError, RecursionError) as error:
        require(False, "config", header.config, f"plain JSON ({error})")


def _check_tensor(source: str, key: str, tensor: Tensor, shapes: Shapes) -> None:
    layer, name = _split(key)
    where = f"{source}: {layer}"
    kind = _KINDS.get(name)
    if kind is None:
        raise ArtifactError(f"{where}: tensor {name!r} is unknown; allowed: {', '.join(_KINDS)}; {_AGAIN}")
    parameter = shapes.get(f"{layer}.{kind.parameter}")
    if parameter is None:
        raise ArtifactError(
            f"{where}: {name} belongs to no layer of the model that the header describes (no parameter "
            f"{layer}.{kind.parameter}); {_AGAIN}"
        )
    if tensor.dtype != torch.float32:
        raise ArtifactError(f"{where}: {name} has dtype {tensor.dtype}; it must be torch.float32; {_AGAIN}")
    if not kind.fits(tuple(tensor.shape), parameter):
        raise ArtifactError(
            f"{where}: {name} has shape {list(tensor.shape)}; it must be {kind.shape}, in keeping with "
            f"{kind.parameter} {list(parameter)}; {_AGAIN}"
        )
    good = tensor.isfinite()
    allowed = "finite"
    if kind.is_scale:
        # A scale is stored in 16 bits, and its reciprocal is taken: both must stay finite, and nothing be clamped.
        good = quant.store_scale(tensor).isfinite() & (tensor >= quant.TINY_SCALE)
        allowed = f"finite and positive, at least {quant.TINY_SCALE:.3g}"
    if not good.all():
        index = (~good).nonzero()[0].tolist()
        value = tensor[tuple(index)].item()
        raise ArtifactError(
            f"{where}: {name}{index} is {value:g} ({int((~good).sum())} of {tensor.numel()} values are not allowed); "
            f"it must be {allowed}; {_AGAIN}"
        )


# --- against a model -----------------------------------------------------------------------------------------------


def check_model(artifact: Artifact, shapes: Mapping[str, Sequence[int]], *, model_class: str | None = None) -> Artifact:
    """The artifact under the paths by which a traced graph knows the model's layers.

    A graph may hold a part of the parameters, and may be traced from a submodule (``layers.3...`` for
    ``backbone.layers.3...``) or from a wrapper (``module.backbone.layers.3...``).

    Args:
        shapes: path -> shape of the parameters that the graph has.
        model_class: class of the traced model; ``None`` when unknown, or for a submodule.

    Raises:
        ArtifactError: another class, no common parameter, or another shape.
    """
    source, header = artifact.source, artifact.header
    if model_class is not None and model_class != header.model_class:
        raise ArtifactError(
            f"{source}: made for {header.model_class}, and the model is {model_class}; "
            "use the artifact of this model, or make one with `qmamba calibrate`"
        )
    rename = _renaming(artifact, shapes)
    known = {rename(path): shape for path, shape in header.shapes.items()}
    for path, shape in fingerprint(shapes).items():
        if known.get(path, shape) != shape:
            raise ArtifactError(
                f"{source}: made for a {header.model_class} of another size: {path} is {list(known[path])} in the "
                f"artifact and {list(shape)} in the model; use the artifact of this model, or make one with "
                "`qmamba calibrate`"
            )
    return Artifact({rename(key): tensor for key, tensor in artifact.tensors.items()}, header, source)


def _renaming(artifact: Artifact, graph: Collection[str]) -> Callable[[str], str]:
    """The function from the artifact's paths to the graph's: the same, a prefix taken away, or a prefix added."""
    own = artifact.header.shapes
    if any(path in own for path in graph):
        return lambda path: path
    inside, around = _prefixes(graph, own), _prefixes(own, graph)
    if len(inside) + len(around) > 1:
        raise ArtifactError(
            f"{artifact.source}: the graph's {min(graph)} could be that of {', '.join(inside + around)}; compile the "
            "whole model instead of one of its layers"
        )
    if inside:
        return lambda path: path.removeprefix(inside[0])
    if around:
        return lambda path: around[0] + path
    raise ArtifactError(
        f"{artifact.source}: made for another model, a {artifact.header.model_class} that has {min(own)} and none of "
        f"the graph's parameters, such as {min(graph, default='(no parameter)')}; use the artifact of this model, or "
        "make one with `qmamba calibrate`"
    )


def _prefixes(tails: Collection[str], paths: Collection[str]) -> list[str]:
    """What, put before ``tails``, gives the most of ``paths``; several when there is a tie."""
    counts = collections.Counter(
        path.removesuffix(tail) for tail in tails for path in paths if path.endswith(f".{tail}")
    )
    return sorted((prefix for prefix in counts if counts[prefix] == max(counts.values())), key=_natural)


def _split(key: str) -> tuple[str, str]:
    layer, _, name = key.rpartition(".")
    return layer, name


def _natural(path: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", path)]
