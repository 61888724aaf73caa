"""Settings: four sources, one order, and every mistake named with its source."""

import argparse
import functools
import os
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from afd_server.config import (
    ServeConfig,
    add_flags,
    load_config,
    parse_resources,
    prepare_ray_environment,
    process_environment,
)
from afd_server.core.errors import ConfigError

# Another value than the default for every setting, as a file would hold it.
OTHERS = {
    "model": "/models/other",
    "load_format": "dummy",
    "attention_workers": 3,
    "ffn_workers": 2,
    "ffn_parallel": "replicate",
    "dense_layers": "attention",
    "lm_head": "ffn",
    "expert_replicas": 2,
    "hot_experts": "hot.json",
    "expert_shards": 3,
    "host": "0.0.0.0",
    "port": 0,
    "served_model_name": "other",
    "max_model_len": 4096,
    "dtype": "bfloat16",
    "quantization": "int8",
    "kv_cache_dtype": "float32",
    "launcher": "local",
    "ray_address": "10.0.0.1:6379",
    "attention_resources": "CPU=2",
    "ffn_resources": "CPU=4,accelerator=0.5",
    "transport": "zmq",
    "data_transport": "tcp",
    "data_host": "10.0.0.1",
    "trusted_network": True,
    "frame_checksums": "off",
    "lanes": 4,
    "max_num_seqs": 7,
    "max_batch_tokens": 99,
    "block_size": 64,
    "prefix_caching": False,
    "kv_cache_mb": 12,
    "max_live_requests": 5,
    "slo_mode": "best-effort",
    "tpot_slo_ms": 20.0,
    "ttft_slo_ms": 1500.0,
    "max_queued_requests": 3,
    "compute_threads": 6,
    "pin_workers": True,
    "cache_dir": "/var/cache/models",
    "start_timeout_s": 12.5,
    "shutdown_timeout_s": 0.5,
    "log_level": "debug",
}
NAMES = [setting.name for setting in fields(ServeConfig)]


def parser():
    wide = functools.partial(argparse.HelpFormatter, width=1000)
    made = argparse.ArgumentParser(formatter_class=wide)
    made.add_argument("model", nargs="?", default=argparse.SUPPRESS)
    made.add_argument("--config", default=argparse.SUPPRESS)
    add_flags(made)
    return made


def from_flags(*arguments, environment=None):
    return load_config(vars(parser().parse_args(arguments)), environment or {})


def from_environment(**environment):
    return load_config({}, {f"AFD_{name.upper()}": value for name, value in environment.items()})


def from_file(directory, text, **flags):
    path = directory / "server.yaml"
    path.write_text(text)
    return load_config({"config": str(path), **flags}, {})


def refused(load, *words):
    with pytest.raises(ConfigError) as caught:
        load()
    for word in words:
        assert word in str(caught.value), caught.value


def test_every_setting_has_another_value_to_test_with():
    assert list(OTHERS) == NAMES
    defaults = ServeConfig()
    assert all(getattr(defaults, name) != OTHERS[name] for name in NAMES)


def test_without_any_source_the_defaults_hold():
    assert load_config({}, {"PATH": "/bin", "HOME": "/root"}) == ServeConfig()


# -- every setting in every source


@pytest.mark.parametrize("name", [name for name in NAMES if name != "model"])
def test_every_setting_has_a_flag(name):
    value = OTHERS[name]
    flag = f"--{name.replace('_', '-')}"
    switches = {True: [flag], False: [f"--no-{flag[2:]}"]}
    arguments = switches[value] if isinstance(value, bool) else [flag, str(value)]
    assert from_flags(*arguments) == ServeConfig(**{name: value})


def test_the_model_is_positional():
    assert from_flags("/models/other").model == "/models/other"


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_has_a_variable(name):
    value = str(OTHERS[name])
    assert from_environment(**{name: value}) == ServeConfig(**{name: OTHERS[name]})


@pytest.mark.parametrize("spell", [str, lambda name: name.replace("_", "-")], ids=["_", "-"])
@pytest.mark.parametrize("name", NAMES)
def test_every_setting_has_a_key_in_the_file(tmp_path, name, spell):
    text = yaml.safe_dump({spell(name): OTHERS[name]})
    assert from_file(tmp_path, text) == ServeConfig(**{name: OTHERS[name]})


def test_types_survive_every_source(tmp_path):
    everything = from_file(tmp_path, yaml.safe_dump(OTHERS))
    assert everything == ServeConfig(**OTHERS)
    assert from_environment(**{name: str(value) for name, value in OTHERS.items()}) == everything
    for name in NAMES:
        assert type(getattr(everything, name)) is type(OTHERS[name])


def test_help_tells_choices_and_defaults():
    text = " ".join(parser().format_help().split())
    assert "--ffn-parallel {tensor,replicate,expert,hybrid}" in text
    assert "--block-size {1,2,4,8,16,32,64}" in text
    assert "(default: 8000)" in text
    assert "(default: None)" not in text
    for setting in fields(ServeConfig):
        if setting.name != "model":
            assert " ".join(setting.metadata["help"].split()) in text


def test_flags_can_be_limited_to_some():
    made = argparse.ArgumentParser()
    add_flags(made, ["cache_dir"])
    assert vars(made.parse_args(["--cache-dir", "/x"])) == {"cache_dir": "/x"}
    assert vars(made.parse_args([])) == {}
    assert "--port" not in made.format_help()


# -- precedence


def test_flags_win_over_the_environment_and_the_environment_over_the_file(tmp_path):
    path = tmp_path / "server.yaml"
    path.write_text("port: 1\nlanes: 1\nhost: file\n")
    environment = {"AFD_PORT": "2", "AFD_LANES": "2"}
    config = from_flags("--config", str(path), "--port", "3", environment=environment)
    assert (config.port, config.lanes, config.host) == (3, 2, "file")
    assert config.max_num_seqs == ServeConfig().max_num_seqs


def test_the_file_can_be_named_by_a_variable_and_by_a_flag_first(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("port: 1")
    second.write_text("port: 2")
    assert load_config({}, {"AFD_CONFIG": str(second)}).port == 2
    assert load_config({"config": str(first)}, {"AFD_CONFIG": str(second)}).port == 1
    assert load_config({"config": None}, {"AFD_CONFIG": str(second)}).port == 2


def test_the_callers_flags_are_left_alone(tmp_path):
    flags = {"config": str(tmp_path / "x.yaml"), "port": "1"}
    (tmp_path / "x.yaml").write_text("")
    load_config(flags, {})
    assert set(flags) == {"config", "port"}


# -- unknown names


def test_an_unknown_flag_is_refused_by_name():
    refused(
        lambda: load_config({"lane": "1"}, {}),
        "unknown setting lane (command line)",
        "did you mean lanes?",
    )


def test_an_unknown_variable_is_refused_by_name():
    refused(
        lambda: from_environment(max_num_seq="1"),
        "unknown setting AFD_MAX_NUM_SEQ (environment)",
        "did you mean max_num_seqs?",
    )


def test_an_unknown_key_of_the_file_is_refused_by_name(tmp_path):
    refused(
        lambda: from_file(tmp_path, "block-sizes: 16"),
        f"unknown setting block_sizes ({tmp_path}/server.yaml)",
        "did you mean block_size?",
    )


def test_what_resembles_nothing_gets_no_suggestion(tmp_path):
    with pytest.raises(ConfigError) as caught:
        from_file(tmp_path, "xyzzy: 1")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("text", ["config: other.yaml", "1: 2", "model: {name: x}\nnested: {}"])
def test_a_file_holds_settings_and_nothing_else(tmp_path, text):
    refused(lambda: from_file(tmp_path, text), "server.yaml")


# -- wrong values

WRONG = [
    ("port", "http", "valid integer"),
    ("port", "65536", "0 … 65535"),
    ("port", "-1", "0 … 65535"),
    ("lanes", "0", "at least 1"),
    ("attention_workers", "0", "at least 1"),
    ("ffn_workers", "-1", "at least 0"),
    ("max_num_seqs", "0", "at least 1"),
    ("max_batch_tokens", "0", "at least 1"),
    ("kv_cache_mb", "0", "at least 1"),
    ("max_live_requests", "0", "at least 1"),
    ("max_queued_requests", "0", "at least 1"),
    ("slo_mode", "on", "'enforce', 'best-effort' or 'off'"),
    ("tpot_slo_ms", "0", "above 0"),
    ("ttft_slo_ms", "nan", "above 0"),
    ("ttft_slo_ms", "3600001", "at most 3600000"),
    ("compute_threads", "0", "at least 1"),
    ("max_model_len", "1", "at least 2"),
    ("max_model_len", "", "valid integer"),
    ("lanes", "2.5", "valid integer"),
    ("lanes", "many", "or: Input should be 'auto'"),
    ("attention_workers", "Auto", "or: Input should be 'auto'"),
    ("ffn_workers", "", "or: Input should be 'auto'"),
    ("start_timeout_s", "nan", "0 … 86400"),
    ("shutdown_timeout_s", "-1", "0 … 86400"),
    ("start_timeout_s", "86400", "0 … 86400"),
    ("start_timeout_s", "soon", "valid number"),
    ("dtype", "float16", "'auto', 'float32' or 'bfloat16'"),
    ("ffn_parallel", "experts", "'expert' or 'hybrid'"),
    ("dense_layers", "all", "'attention', 'ffn' or 'both'"),
    ("lm_head", "all", "'attention', 'ffn' or 'both'"),
    ("launcher", "slurm", "'ray' or 'local'"),
    ("transport", "rdma", "'auto', 'zmq' or 'shm'"),
    ("data_transport", "udp", "'ipc' or 'tcp'"),
    ("frame_checksums", "yes", "'auto', 'on' or 'off'"),
    ("log_level", "loud", "'debug'"),
    ("block_size", "3", "1, 2, 4, 8, 16, 32 or 64"),
    ("block_size", "x", "1, 2, 4, 8, 16, 32 or 64"),
    ("trusted_network", "maybe", "valid boolean"),
]


@pytest.mark.parametrize(("name", "value", "right"), WRONG)
def test_a_wrong_value_is_named_with_its_setting_its_source_and_what_is_right(
    tmp_path, name, value, right
):
    shown = value.removeprefix("-")
    refused(lambda: load_config({name: value}, {}), f"{name} is", shown, "(command line)", right)
    refused(lambda: from_environment(**{name: value}), f"{name} is", shown, "(environment)", right)
    text = yaml.safe_dump({name: value})
    refused(lambda: from_file(tmp_path, text), f"{name} is", shown, "server.yaml)", right)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("port: [1]", ("port is [1]", "valid integer")),
        ("host: 5", ("host is 5", "valid string")),
        ("lanes: {}", ("lanes is {}", "valid integer")),
        ("model:", ("model is None", "valid string")),
        ("block_size: '１６'", ()),  # digits, but not ours
    ],
)
def test_a_value_of_another_type_is_refused(tmp_path, text, words):
    if words:
        refused(lambda: from_file(tmp_path, text), *words)
    else:
        assert from_file(tmp_path, text).block_size == 16


def test_values_made_in_code_are_checked_as_well():
    refused(lambda: ServeConfig(lanes=0), "lanes is 0, must be at least 1")


@pytest.mark.parametrize("name", ["attention_workers", "ffn_workers", "lanes"])
def test_a_count_may_be_left_to_the_server(tmp_path, name):
    for config in (
        from_flags(f"--{name.replace('_', '-')}", "auto"),
        from_environment(**{name: "auto"}),
        from_file(tmp_path, f"{name}: auto"),
    ):
        assert getattr(config, name) == "auto"
    assert ServeConfig().lanes == "auto"


# -- booleans

BOOLEANS = [name for name, hint in get_type_hints(ServeConfig).items() if hint is bool]


def test_booleans_are_switched_on_and_off_by_flags():
    environment = {"AFD_TRUSTED_NETWORK": "true"}
    assert BOOLEANS == ["trusted_network", "prefix_caching", "pin_workers"]
    assert from_flags("--trusted-network").trusted_network
    assert not from_flags("--no-trusted-network", environment=environment).trusted_network
    assert from_flags(environment=environment).trusted_network


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1", True), ("true", True), ("True", True), ("yes", True), ("on", True),
     ("0", False), ("false", False), ("no", False), ("off", False)],
)  # fmt: skip
def test_booleans_are_read_in_the_usual_words(tmp_path, text, expected):
    assert from_environment(trusted_network=text).trusted_network is expected
    assert from_file(tmp_path, f"trusted_network: {text}").trusted_network is expected


def test_an_unquoted_on_or_off_of_a_file_is_a_word_where_a_word_is_asked_for(tmp_path):
    assert from_file(tmp_path, "frame_checksums: on").frame_checksums == "on"
    assert from_file(tmp_path, "frame_checksums: off").frame_checksums == "off"
    assert from_file(tmp_path, "frame_checksums: auto").frame_checksums == "auto"


# -- the file


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "---\n"])
def test_an_empty_file_sets_nothing(tmp_path, text):
    assert from_file(tmp_path, text) == ServeConfig()


def test_null_takes_back_what_has_no_default(tmp_path):
    assert from_file(tmp_path, "max_model_len: null").max_model_len is None


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "missing.yaml"
    refused(lambda: load_config({"config": str(path)}, {}), str(path), "No such file or directory")
    refused(lambda: load_config({"config": str(tmp_path)}, {}), str(tmp_path), "cannot be read")


@pytest.mark.parametrize("text", ["port: [1", "a: b: c", "\t- x", "port: 2024-99-99"])
def test_invalid_yaml_is_named(tmp_path, text):
    refused(lambda: from_file(tmp_path, text), "server.yaml is not valid YAML")


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "server.yaml").write_bytes(b"host: \xff\xfe")
    refused(
        lambda: load_config({"config": str(tmp_path / "server.yaml")}, {}),
        "server.yaml is not valid YAML",
    )


@pytest.mark.parametrize("text", ["- port\n- 8000", "8000", "port"])
def test_a_file_without_a_mapping_is_refused(tmp_path, text):
    refused(lambda: from_file(tmp_path, text), "holds no mapping of settings to values")


def test_a_file_cannot_make_objects(tmp_path):
    text = "host: !!python/object/apply:os.getcwd []"
    refused(lambda: from_file(tmp_path, text), "is not valid YAML")


# -- derived values


def test_models_are_kept_where_the_setting_or_the_desktop_says(monkeypatch):
    assert ServeConfig(cache_dir="/x").cache_directory == Path("/x")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert ServeConfig().cache_directory == Path("/cache/afd-server/models")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert ServeConfig().cache_directory == Path.home() / ".cache/afd-server/models"


def test_the_environment_is_that_of_this_process(monkeypatch):
    monkeypatch.setenv("AFD_LANES", "3")
    assert process_environment()["AFD_LANES"] == "3"


def test_a_ray_of_our_own_gets_a_secret_that_only_its_owner_can_read(tmp_path, monkeypatch):
    environment = {"RAY_AUTH_MODE": "disabled", "HOME": "/root"}
    monkeypatch.setattr(os, "environ", environment)
    secrets = []
    for name in ("first", "second"):
        path = tmp_path / name
        prepare_ray_environment(path)
        assert path.stat().st_mode & 0o777 == 0o600
        assert environment["RAY_AUTH_TOKEN_PATH"] == str(path)
        secrets.append(path.read_text())
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
    assert environment["HOME"] == "/root"
    assert len(secrets[0]) == 64
    assert secrets[0] != secrets[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CPU=1", {"CPU": 1.0}),
        ("CPU=0.5,accelerator=2", {"CPU": 0.5, "accelerator": 2.0}),
        (" CPU = 1 , GPU = 2 ,", {"CPU": 1.0, "GPU": 2.0}),
    ],
)
def test_resources_are_names_with_amounts(text, expected):
    assert parse_resources(text, "ffn_resources") == expected


@pytest.mark.parametrize(
    "text", ["CPU", "CPU=", "=1", "CPU=x", "CPU=0", "CPU=-1", "CPU=nan", "CPU=inf", "CPU=1,,GPU"]
)
def test_resources_of_another_form_are_refused(text):
    refused(lambda: parse_resources(text, "ffn_resources"), f"ffn_resources is {text!r}", "CPU=1,")


@pytest.mark.parametrize("text", ["", ","])
def test_a_worker_needs_some_resource(text):
    refused(lambda: parse_resources(text, "ffn_resources"), "ffn_resources is empty")
