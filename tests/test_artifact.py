"""The calibration artifact: what is written comes back, and what must not be used is refused with a reason."""

import dataclasses
import io
import json
import math
import os
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qmamba_compile import artifact as artifact_module
from qmamba_compile.artifact import Artifact, Header, check_model, fingerprint, read_artifact, write_artifact
from qmamba_compile.errors import ArtifactError

NHEADS, DSTATE, D_MODEL, D_PROJ, D_CONV = 3, 16, 8, 70, 40
N_LAYERS = 12


def model_shapes(prefix="backbone.", n_layers=N_LAYERS, nheads=NHEADS):
    shapes = {f"{prefix}embeddings.weight": (256, D_MODEL), "lm_head.weight": (256, D_MODEL)}
    for i in range(n_layers):
        mixer = f"{prefix}layers.{i}.mixer."
        shapes |= {
            f"{mixer}A_log": (nheads,),
            f"{mixer}dt_bias": (nheads,),
            f"{mixer}in_proj.weight": (D_PROJ, D_MODEL),
            f"{mixer}conv1d.weight": (D_CONV, 1, 4),
            f"{mixer}conv1d.bias": (D_CONV,),
        }
    return fingerprint(shapes)


def make_header(**changes):
    header = Header(
        model_class="Mamba2ForCausalLM",
        shapes=model_shapes(),
        config={"state_bits": 4, "exponent": 0.5, "skip_layers": ["lm_head"]},
        data="heldout.txt, 24 windows of 1024 bytes",
        data_digest="0f" * 32,
        metrics_before={"perplexity": 3.75},
        metrics_after={"perplexity": 3.71, "tokens": 24576},
        versions={"torch": "2.13.0"},
    )
    return dataclasses.replace(header, **changes)


def make_tensors(n_layers=N_LAYERS):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i in range(n_layers):
        mixer = f"backbone.layers.{i}.mixer."
        tensors[f"{mixer}state_scale"] = torch.rand(NHEADS, DSTATE, generator=generator) + 0.5
        tensors[f"{mixer}in_proj.smooth"] = torch.rand(D_MODEL, generator=generator) + 0.5
        tensors[f"{mixer}in_proj.act_scale"] = torch.tensor(0.03)
        tensors[f"{mixer}in_proj.weight_bcdt"] = torch.randn(35, D_MODEL, generator=generator)
        tensors[f"{mixer}conv1d.weight_bcdt"] = torch.randn(32, 1, 4, generator=generator)
        tensors[f"{mixer}conv1d.bias_bcdt"] = torch.zeros(32)
    return tensors


def make_artifact(**changes):
    return Artifact(make_tensors(), make_header(**changes))


STATE_SCALE = "backbone.layers.3.mixer.state_scale"


def with_tensor(key, value):
    return Artifact(make_tensors() | {key: value}, make_header())


def save_raw(path, tensors, header_text):
    """A file as another program might write it: nothing is checked."""
    safetensors.torch.save_file(tensors, path, metadata={"qmamba": header_text})


# --- round trip ----------------------------------------------------------------------------------------------------


def test_what_is_written_comes_back(tmp_path):
    written = make_artifact()
    write_artifact(tmp_path / "a.safetensors", written)
    read = read_artifact(tmp_path / "a.safetensors")
    assert read.header == written.header
    assert set(read.tensors) == set(written.tensors) and len(read.tensors) == 6 * N_LAYERS
    for key, tensor in written.tensors.items():
        assert read.tensors[key].dtype == torch.float32
        assert torch.equal(read.tensors[key], tensor), key
    assert read.digest == written.digest
    assert read.source == str(tmp_path / "a.safetensors")


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_valid_artifact_round_trips(data, tmp_path_factory):
    n_layers, nheads, dstate = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 33))
    scales = st.floats(2.0**-100, 2.0**126, width=32)
    metrics = st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False, allow_infinity=False), max_size=3)
    shapes = model_shapes(n_layers=n_layers, nheads=nheads)
    tensors = {}
    for i in range(n_layers):
        row = data.draw(st.lists(scales, min_size=dstate, max_size=dstate))
        tensors[f"backbone.layers.{i}.mixer.state_scale"] = torch.tensor(row).repeat(nheads, 1)
        tensors[f"backbone.layers.{i}.mixer.in_proj.act_scale"] = torch.tensor(data.draw(scales))
    header = make_header(shapes=shapes, metrics_after=data.draw(metrics), data=data.draw(st.text(min_size=1)))
    written = Artifact(tensors, header)
    path = tmp_path_factory.mktemp("artifact") / "a.safetensors"
    write_artifact(path, written)
    read = read_artifact(path)
    assert read.header == header and read.digest == written.digest
    assert all(torch.equal(read.tensors[key], tensors[key]) for key in tensors)


def test_lookups_and_layers():
    artifact = make_artifact()
    mixer = "backbone.layers.10.mixer"
    assert torch.equal(artifact.state_scale(mixer), artifact.tensors[f"{mixer}.state_scale"])
    assert torch.equal(artifact.smooth(f"{mixer}.in_proj"), artifact.tensors[f"{mixer}.in_proj.smooth"])
    assert artifact.act_scale(f"{mixer}.in_proj").item() == pytest.approx(0.03)
    assert artifact.weight_bcdt(f"{mixer}.conv1d").shape == (32, 1, 4)
    assert artifact.bias_bcdt(f"{mixer}.conv1d").shape == (32,)
    assert artifact.state_scale("backbone.layers.99.mixer") is None
    assert artifact.smooth(mixer) is None and artifact.act_scale(mixer) is None
    layers = list(artifact.layers)
    assert len(layers) == 3 * N_LAYERS
    assert layers.index("backbone.layers.2.mixer") < layers.index(mixer)


def test_digest_depends_on_the_content_and_on_nothing_else():
    artifact = make_artifact()
    reordered = Artifact(dict(reversed(artifact.tensors.items())), artifact.header, "elsewhere")
    assert reordered.digest == artifact.digest
    # Fixed content, fixed digest: compile caches that outlive the process are keyed by it.
    one = Artifact({STATE_SCALE: torch.full((NHEADS, DSTATE), 0.25)}, make_header())
    assert one.digest == "70e0739940c71252dadf357792dad6613da84a2d1c255711235840e38a73b341"
    nudged = artifact.tensors[STATE_SCALE].clone()
    nudged[0, 0] = nudged[0, 0].nextafter(torch.tensor(2.0))
    others = [
        with_tensor(STATE_SCALE, nudged),
        make_artifact(data="other"),
        Artifact({k: v for k, v in artifact.tensors.items() if k != STATE_SCALE}, artifact.header),
        Artifact({k.replace("layers.3", "layers.4"): v for k, v in artifact.tensors.items()}, artifact.header),
    ]
    assert len({artifact.digest, *(other.digest for other in others)}) == 5


def test_reading_copies(tmp_path):
    path = tmp_path / "a.safetensors"
    write_artifact(path, make_artifact())
    read = read_artifact(path)
    expected = {key: tensor.clone() for key, tensor in read.tensors.items()}
    with open(path, "r+b") as file:
        size = os.path.getsize(path)
        file.write(b"\xff" * size)
    assert all(torch.equal(read.tensors[key], expected[key]) for key in expected)


def test_strided_and_shared_tensors_can_be_written(tmp_path):
    scale = torch.rand(DSTATE, NHEADS) + 0.5
    shared = {f"backbone.layers.{i}.mixer.state_scale": scale.t() for i in range(2)}
    write_artifact(tmp_path / "a.safetensors", Artifact(shared, make_header()))
    read = read_artifact(tmp_path / "a.safetensors")
    assert all(torch.equal(read.tensors[key], scale.t()) for key in shared)


# --- writing in one step -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dying", ["write", "fsync", "replace"])
def test_a_kill_while_writing_leaves_the_old_file(tmp_path, monkeypatch, dying):
    path = tmp_path / "a.safetensors"
    write_artifact(path, make_artifact())
    before = path.read_bytes()

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    if dying == "write":
        monkeypatch.setattr(artifact_module, "open", HalfFile, raising=False)
    else:
        monkeypatch.setattr(artifact_module.os, dying, die)
    with pytest.raises(KeyboardInterrupt):
        write_artifact(path, make_artifact(data="new data"))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert read_artifact(path).header.data != "new data"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


class HalfFile(io.FileIO):
    """A file that takes half of what it is given and dies."""

    def write(self, content):
        super().write(content[: len(content) // 2])
        raise KeyboardInterrupt


def test_what_is_no_file_is_not_replaced(tmp_path):
    """``--out /dev/full``, tried as root, used to leave a file where the device had been."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, kind in (("pipe", "a device, pipe"), ("folder", "a folder")):
        with pytest.raises(ArtifactError, match=f"{name}: {kind}"):
            write_artifact(tmp_path / name, make_artifact())
    assert (tmp_path / "pipe").is_fifo() and sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


def test_a_link_stays_and_what_it_points_to_is_written(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "a.safetensors"
    link.symlink_to(tmp_path / "elsewhere" / "b.safetensors")
    write_artifact(link, make_artifact())
    write_artifact(link, make_artifact(data="new data"))
    assert link.is_symlink() and read_artifact(tmp_path / "elsewhere" / "b.safetensors").header.data == "new data"


def test_an_invalid_artifact_is_not_written(tmp_path):
    path = tmp_path / "a.safetensors"
    write_artifact(path, make_artifact())
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match=r"a\.safetensors: backbone\.layers\.3\.mixer: state_scale\[1, 2\] is nan"):
        bad = torch.ones(NHEADS, DSTATE)
        bad[1, 2] = math.nan
        write_artifact(path, with_tensor(STATE_SCALE, bad))
    assert path.read_bytes() == before


# --- files that are refused ----------------------------------------------------------------------------------------


def assert_refused(path, *needles):
    """Every refusal names the file and says what to do."""
    with pytest.raises(ArtifactError) as caught:
        read_artifact(path)
    message = str(caught.value)
    for needle in (str(path), "qmamba calibrate", *needles):
        assert needle in message, f"{needle!r} not in {message!r}"


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert_refused(tmp_path / "none.safetensors", "cannot be opened")
    assert_refused(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.3, 0.9, 0.9999])
def test_a_truncated_file_is_refused(tmp_path, share):
    path = tmp_path / "a.safetensors"
    write_artifact(path, make_artifact())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert_refused(path, "truncated, or not a safetensors file")


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "a"
    path.write_text("this is not an artifact, and long enough to hold a length")
    assert_refused(path, "not a safetensors file")
    path.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    assert_refused(path, "not a safetensors file")
    safetensors.torch.save_file(make_tensors(), path, metadata={"format": "pt"})
    assert_refused(path, "without a 'qmamba' header", "format")
    safetensors.torch.save_file(make_tensors(), path)
    assert_refused(path, "without a 'qmamba' header")


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def header_json(**changes):
    return json.dumps(json.loads(make_header().to_json()) | changes)


@pytest.mark.parametrize(
    ("text", "needles"),
    [
        ("{", ["not JSON"]),
        ("[1]", ["list"]),
        (header_json(format_version=2), ["format_version=2", "reads 1"]),
        (header_json(format_version="1"), ["format_version='1'"]),
        (header_json(format_version=True), ["format_version=True"]),
        ("{}", ["format_version=None"]),
        ('{"format_version": 1}', ["missing", "model_class", "shapes"]),
        (header_json(colour="red"), ["unknown", "colour"]),
        (header_json(model_class=""), ["model_class=''"]),
        (header_json(model_class=7), ["model_class=7"]),
        (header_json(data_digest=None), ["data_digest=None"]),
        (header_json(shapes={}), ["shapes={}"]),
        (header_json(shapes=[1]), ["shapes=[1]"]),
        (header_json(shapes={"a": 3}), ["shapes['a']=3"]),
        (header_json(shapes={"a": [3, -1]}), ["shapes['a']", "-1"]),
        (header_json(shapes={"a": [2.5]}), ["shapes['a']", "2.5"]),
        (header_json(config="int4"), ["config='int4'"]),
        (header_json(config={"flush_interval": "8"}), ["config['flush_interval']='8'", "a number of steps"]),
        (header_json(config={"flush_interval": 0}), ["config['flush_interval']=0"]),
        (header_json(config={"flush_interval": True}), ["config['flush_interval']=True"]),
        (header_json(config={"a": nested(600)}), ["config={'a': [[", "recursion"]),
        (header_json().replace('"exponent"', f'"a": {"[" * 20000}{"]" * 20000}, "exponent"'), ["JSON", "recursion"]),
        (header_json(metrics_before={"perplexity": math.nan}), ["metrics_before['perplexity']=nan"]),
        (header_json(metrics_before={"tokens": 10**400}), ["metrics_before['tokens']=1000", "a finite number"]),
        (header_json(metrics_after={"perplexity": "low"}), ["metrics_after['perplexity']='low'"]),
        (header_json(versions={"torch": 2}), ["versions['torch']=2"]),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_header_that_is_not_valid_is_refused(tmp_path, text, needles):
    path = tmp_path / "a.safetensors"
    save_raw(path, make_tensors(), text)
    assert_refused(path, *needles)


def filled(value, shape=(NHEADS, DSTATE), at=(2, 5)):
    tensor = torch.ones(shape)
    tensor[at] = value
    return tensor


LAYER_3, IN_PROJ = "backbone.layers.3.mixer: ", "backbone.layers.3.mixer.in_proj: "


@pytest.mark.parametrize(
    ("key", "tensor", "needles"),
    [
        (STATE_SCALE, filled(math.nan), [LAYER_3, "state_scale[2, 5] is nan", "positive"]),
        (STATE_SCALE, filled(math.inf), [LAYER_3, "state_scale[2, 5] is inf"]),
        (STATE_SCALE, filled(-0.5), [LAYER_3, "state_scale[2, 5] is -0.5"]),
        (STATE_SCALE, filled(0.0), [LAYER_3, "state_scale[2, 5] is 0"]),
        (STATE_SCALE, filled(1e-37), [LAYER_3, "state_scale[2, 5] is 1e-37", "7.89e-31"]),
        # Finite in float32, but infinite in the 16 bits that it is stored in.
        (STATE_SCALE, filled(3.4e38), [LAYER_3, "state_scale[2, 5] is 3.4e+38"]),
        (STATE_SCALE, torch.ones(NHEADS), [LAYER_3, "shape [3]", "[nheads, dstate]"]),
        (STATE_SCALE, torch.ones(1, NHEADS, DSTATE), [LAYER_3, "shape [1, 3, 16]"]),
        (STATE_SCALE, torch.ones(NHEADS + 1, DSTATE), [LAYER_3, "shape [4, 16]", "A_log [3]"]),
        (STATE_SCALE, torch.ones(NHEADS, 0), [LAYER_3, "shape [3, 0]"]),
        (STATE_SCALE, torch.ones(NHEADS, DSTATE, dtype=torch.bfloat16), [LAYER_3, "torch.bfloat16", "torch.float32"]),
        (STATE_SCALE, torch.ones(NHEADS, DSTATE, dtype=torch.int64), [LAYER_3, "torch.int64"]),
        (f"{LAYER_3[:-2]}.in_proj.smooth", filled(-1.0, (D_MODEL,), 7), [IN_PROJ, "smooth[7] is -1"]),
        (f"{LAYER_3[:-2]}.in_proj.smooth", torch.ones(D_MODEL + 1), [IN_PROJ, "shape [9]", "weight [70, 8]"]),
        (f"{LAYER_3[:-2]}.in_proj.act_scale", torch.tensor(math.nan), [IN_PROJ, "act_scale[] is nan"]),
        (f"{LAYER_3[:-2]}.in_proj.act_scale", torch.ones(1), [IN_PROJ, "act_scale", "shape [1]"]),
        (
            f"{LAYER_3[:-2]}.in_proj.weight_bcdt",
            filled(math.inf, (4, D_MODEL), (3, 1)),
            [IN_PROJ, "weight_bcdt[3, 1] is inf"],
        ),
        (f"{LAYER_3[:-2]}.in_proj.weight_bcdt", torch.ones(D_PROJ + 1, D_MODEL), [IN_PROJ, "shape [71, 8]"]),
        (f"{LAYER_3[:-2]}.in_proj.weight_bcdt", torch.ones(4, D_MODEL - 1), [IN_PROJ, "shape [4, 7]"]),
        (f"{LAYER_3[:-2]}.in_proj.weight_bcdt", torch.ones(0, D_MODEL), [IN_PROJ, "shape [0, 8]"]),
        (f"{LAYER_3[:-2]}.in_proj.bias_bcdt", torch.ones(4), [IN_PROJ, "no layer of the model", "in_proj.bias"]),
        ("backbone.layers.77.mixer.state_scale", torch.ones(NHEADS, DSTATE), ["layers.77.mixer: ", "no layer"]),
        (f"{LAYER_3[:-2]}.statescale", torch.ones(NHEADS, DSTATE), [LAYER_3, "'statescale' is unknown", "state_scale"]),
        ("state_scale", torch.ones(NHEADS, DSTATE), ["no layer of the model"]),
    ],
)
def test_a_tensor_that_is_not_valid_is_refused(tmp_path, key, tensor, needles):
    path = tmp_path / "a.safetensors"
    save_raw(path, make_tensors() | {key: tensor}, make_header().to_json())
    assert_refused(path, *needles)


def test_tuned_weights_may_be_zero_and_negative_and_scales_at_their_limits(tmp_path):
    tensors = {
        "backbone.layers.3.mixer.in_proj.weight_bcdt": torch.full((D_PROJ, D_MODEL), -1.0),
        "backbone.layers.3.mixer.conv1d.bias_bcdt": torch.zeros(1),
        STATE_SCALE: torch.full((NHEADS, DSTATE), 2.0**-100),
        "backbone.layers.3.mixer.in_proj.smooth": torch.full((D_MODEL,), 3e38),
    }
    write_artifact(tmp_path / "a", Artifact(tensors, make_header()))
    assert set(read_artifact(tmp_path / "a").tensors) == set(tensors)


def test_a_header_that_json_cannot_hold_is_refused(tmp_path):
    for config in ({"scheme": object()}, {"exponent": math.nan}):
        with pytest.raises(ArtifactError, match="config"):
            write_artifact(tmp_path / "a", make_artifact(config=config))
    assert not (tmp_path / "a").exists()


# --- against a model -----------------------------------------------------------------------------------------------


def test_the_model_it_was_made_for_matches():
    artifact = make_artifact()
    matched = check_model(artifact, model_shapes(), model_class="Mamba2ForCausalLM")
    assert matched.digest == artifact.digest
    # A graph may know a part of the parameters, and others that the model does not have.
    part = {"backbone.layers.2.mixer.A_log": torch.Size([NHEADS]), "rotary.inv_freq": (4,)}
    assert check_model(artifact, part).layers == artifact.layers


def test_another_class_is_refused():
    with pytest.raises(ArtifactError, match=r"made for Mamba2ForCausalLM, and the model is BambaForCausalLM"):
        check_model(make_artifact(), model_shapes(), model_class="BambaForCausalLM")


def test_another_size_is_refused_and_the_first_parameter_that_differs_is_named():
    with pytest.raises(ArtifactError, match=r"backbone\.layers\.0\.mixer\.A_log is \[3\] in the artifact and \[4\]"):
        check_model(make_artifact(), model_shapes(nheads=NHEADS + 1))
    one = {"backbone.layers.5.mixer.in_proj.weight": (D_PROJ, D_MODEL * 2), "lm_head.weight": (256, D_MODEL)}
    with pytest.raises(ArtifactError, match=r"layers\.5\.mixer\.in_proj\.weight is \[70, 8\] .* \[70, 16\] in the"):
        check_model(make_artifact(), one)


@pytest.mark.parametrize("shapes", [{}, {"transformer.h.0.attn.weight": (8, 8)}])
def test_a_model_without_a_common_parameter_is_refused(shapes):
    with pytest.raises(ArtifactError, match=r"another model, a Mamba2ForCausalLM that has backbone\.embeddings"):
        check_model(make_artifact(), shapes)


def test_a_layer_without_scales_is_named():
    tensors = {key: value for key, value in make_tensors().items() if key != STATE_SCALE}
    with pytest.raises(ArtifactError, match=r"backbone\.layers\.3\.mixer: no state_scale; .*'backbone\.layers\.0\.mix"):
        Artifact(tensors, make_header()).require_state_scale("backbone.layers.3.mixer", (NHEADS, DSTATE))
    assert check_model(Artifact(tensors, make_header()), model_shapes()).layers


def test_scales_of_another_dstate_are_refused():
    with pytest.raises(ArtifactError, match=r"layers\.0\.mixer: state_scale is \[3, 16\], .*\[3, 32\]"):
        make_artifact().require_state_scale("backbone.layers.0.mixer", (NHEADS, 32))


@pytest.mark.parametrize(
    ("strip", "add"), [("backbone.", ""), ("", "module."), ("", "_orig_mod.model."), ("backbone.layers.", "")]
)
def test_a_graph_traced_from_a_submodule_or_a_wrapper_gets_its_own_paths(strip, add):
    artifact = make_artifact()
    shapes = {add + path.removeprefix(strip): shape for path, shape in model_shapes().items() if path.startswith(strip)}
    matched = check_model(artifact, shapes)
    for layer in (f"backbone.layers.{i}.mixer" for i in range(N_LAYERS)):
        found = matched.require_state_scale(add + layer.removeprefix(strip), (NHEADS, DSTATE))
        assert torch.equal(found, artifact.state_scale(layer))
    wrong = {path: (*shape[:-1], shape[-1] + 1) for path, shape in shapes.items()}
    with pytest.raises(ArtifactError, match="another size"):
        check_model(artifact, wrong)


def test_one_layer_alone_cannot_be_told_from_the_others():
    shapes = {path.split(".mixer.")[1]: shape for path, shape in model_shapes().items() if ".layers.4." in path}
    with pytest.raises(ArtifactError, match="compile the whole model"):
        check_model(make_artifact(), shapes)


def test_fingerprint_is_sorted_and_plain():
    parameters = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2)).named_parameters()
    found = fingerprint({name: parameter.shape for name, parameter in parameters})
    assert list(found.items()) == [("0.bias", (5,)), ("0.weight", (5, 3)), ("1.bias", (2,)), ("1.weight", (2, 5))]
    assert all(type(shape) is tuple for shape in found.values())
