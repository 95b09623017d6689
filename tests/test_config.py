"""`QMambaConfig`: what is not an option, or not a value of one, is refused before anything is compiled."""

import dataclasses
from pathlib import Path

import pytest

from qmamba_compile import config as config_module
from qmamba_compile.config import QMambaConfig
from qmamba_compile.errors import ConfigError, QMambaError

FIELDS = {field.name: field for field in dataclasses.fields(QMambaConfig)}
SWITCHES = [name for name, field in FIELDS.items() if isinstance(field.default, bool)]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in FIELDS:
        monkeypatch.delenv(f"QMAMBA_{name.upper()}", raising=False)


def test_defaults_are_w8a8h4_with_every_pass_on():
    config = QMambaConfig.from_options()
    assert config == QMambaConfig()
    assert (config.weights, config.state_bits, config.state_scales, config.rounding) == (
        "int8",
        4,
        "dynamic",
        "nearest",
    )
    passes = ("quantize_linear", "fuse_chunk_scan", "quantize_state", "fuse_ssm_update")
    passes += ("apply_tuned_conv", "fuse_conv_update", "fuse_causal_conv", "fuse_norm_linear")
    passes += ("fuse_residual", "hoist_decay")
    assert all(getattr(config, name) is True for name in passes)
    assert config.calibration is None and config.skip_layers == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weights", None),
        ("weights", "int8"),
        ("state_bits", 8),
        ("state_bits", 2),
        ("state_bits", None),
        ("rounding", "stochastic"),
        ("flush_interval", 16),
        ("ring_bits", 8),
        ("inner_backend", "eager"),
        ("seed", 0),
        ("seed", 2**32 - 1),
        ("skip_layers", ("lm_head",)),
        ("fuse_ssm_update", False),
        ("strict", True),
    ],
)
def test_allowed_values_are_kept(name, value):
    config = QMambaConfig.from_options({name: value})
    assert getattr(config, name) == value
    assert dataclasses.replace(config, **{name: FIELDS[name].default}) == QMambaConfig()


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("weights", "int4", "'int8', None"),
        ("weights", True, "'int8', None"),
        ("state_bits", 3, "8, 4, 2, None"),
        ("state_bits", "4", "8, 4, 2, None"),
        ("state_bits", 4.0, "8, 4, 2, None"),
        ("state_bits", True, "8, 4, 2, None"),
        ("state_scales", "static", "'dynamic', 'calibrated'"),
        ("state_scales", None, "'dynamic', 'calibrated'"),
        ("rounding", "up", "'nearest', 'stochastic'"),
        ("flush_interval", 0, "1, 2, 4, 8, 16"),
        ("flush_interval", True, "1, 2, 4, 8, 16"),
        ("ring_bits", 4, "16, 8"),
        ("inner_backend", "tvm", "'inductor', 'aot_eager', 'eager'"),
        ("seed", -1, "0 to 2**32 - 1"),
        ("seed", 2**32, "0 to 2**32 - 1"),
        ("seed", 1.0, "0 to 2**32 - 1"),
        ("seed", True, "0 to 2**32 - 1"),
        ("skip_layers", "lm_head", "['lm_head']"),
        *((name, value, "True or False") for name in SWITCHES for value in (1, 0, "yes", None)),
    ],
)
def test_other_values_are_refused_with_what_is_allowed(name, value, allowed):
    with pytest.raises(ConfigError) as caught:
        QMambaConfig.from_options({name: value})
    message = str(caught.value)
    assert f"{name}={value!r}" in message and allowed in message


def test_there_are_switches():
    assert {"quantize_linear", "quantize_state", "fuse_ssm_update", "fuse_chunk_scan", "strict"} <= set(SWITCHES)


def test_an_unknown_option_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown option 'state_bit'; allowed: .*state_bits"):
        QMambaConfig.from_options({"state_bit": 4})


def test_errors_are_of_the_package_and_of_python():
    assert issubclass(ConfigError, QMambaError) and issubclass(ConfigError, ValueError)


def test_calibrated_scales_need_an_artifact():
    with pytest.raises(ConfigError, match=r"needs calibration=.*qmamba calibrate.*state_scales='dynamic'"):
        QMambaConfig.from_options({"state_scales": "calibrated"})
    given = QMambaConfig.from_options({"state_scales": "calibrated", "calibration": Path("scales.safetensors")})
    assert given.calibration == "scales.safetensors"
    # Without a packed state there is nothing to scale.
    assert QMambaConfig.from_options({"state_scales": "calibrated", "state_bits": None}).calibration is None


def test_a_config_does_not_change():
    config = QMambaConfig(skip_layers=["lm_head"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.state_bits = 8
    assert config.skip_layers == ("lm_head",)
    assert hash(config) == hash(QMambaConfig(skip_layers=("lm_head",)))
    layers = ["lm_head"]
    config = QMambaConfig(skip_layers=layers)
    layers.append("other")
    assert config.skip_layers == ("lm_head",)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("state_bits", "8", 8),
        ("state_bits", "None", None),
        ("weights", "none", None),
        ("weights", "int8", "int8"),
        ("rounding", "stochastic", "stochastic"),
        ("seed", "7", 7),
        ("strict", "1", True),
        ("strict", "true", True),
        ("fuse_ssm_update", "0", False),
        ("fuse_ssm_update", "False", False),
        ("skip_layers", "lm_head, backbone.layers.0", ("lm_head", "backbone.layers.0")),
        ("calibration", "a.safetensors", "a.safetensors"),
    ],
)
def test_the_environment_changes_defaults_and_options_win(monkeypatch, name, text, value):
    monkeypatch.setenv(f"QMAMBA_{name.upper()}", text)
    assert getattr(QMambaConfig.from_options(), name) == value
    default = FIELDS[name].default
    assert getattr(QMambaConfig.from_options({name: default}), name) == default


@pytest.mark.parametrize(
    ("name", "text"),
    [("strict", "yes"), ("strict", "2"), ("state_bits", "four"), ("state_bits", "3"), ("seed", "1.5"), ("seed", "-1")],
)
def test_the_environment_is_checked_too(monkeypatch, name, text):
    monkeypatch.setenv(f"QMAMBA_{name.upper()}", text)
    with pytest.raises(ConfigError, match=name.upper() if text not in ("3", "-1") else name):
        QMambaConfig.from_options()


@pytest.mark.parametrize("name", FIELDS)
def test_an_empty_variable_is_no_override(monkeypatch, name):
    monkeypatch.setenv(f"QMAMBA_{name.upper()}", "")
    assert QMambaConfig.from_options() == QMambaConfig()


def test_a_variable_that_nothing_reads_is_named_once(monkeypatch, caplog):
    monkeypatch.setenv("QMAMBA_STATE_BIT", "8")
    monkeypatch.setenv("QMAMBA_DUMP", "")
    config_module._warn_of_variable.cache_clear()
    for _ in range(2):
        assert QMambaConfig.from_options() == QMambaConfig()
    assert [record.args[0] for record in caplog.records] == ["QMAMBA_STATE_BIT"]
    assert "QMAMBA_STATE_BITS" in caplog.text


def test_skip_layers_name_a_module_or_a_parent_of_it():
    config = QMambaConfig(skip_layers=("lm_head", "backbone.layers.1"))
    assert config.excludes("lm_head") and config.excludes("backbone.layers.1.mixer.in_proj")
    assert not config.excludes("backbone.layers.10.mixer") and not config.excludes("backbone.layers")
    assert not QMambaConfig().excludes("lm_head")


@pytest.mark.parametrize("value", [None, 3, [1], ("lm_head", None)])
def test_skip_layers_of_other_types_are_refused(value):
    with pytest.raises(ConfigError, match="skip_layers"):
        QMambaConfig.from_options({"skip_layers": value})


@pytest.mark.parametrize("value", [3, True, ["a"]])
def test_a_calibration_that_is_not_a_path_is_refused(value):
    with pytest.raises(ConfigError, match="calibration"):
        QMambaConfig.from_options({"calibration": value})
