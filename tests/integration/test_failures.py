"""What goes wrong is said in one line with a non-zero status, and nothing is left running."""

import json
import shutil
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.checkpoints import tiny_llama, write_tiny_llama
from support.families import family
from support.server import run_cli

LOCAL = ("--launcher", "local", "--port", "0")


def assert_clean(temp_dir):
    assert not [path for path in temp_dir.iterdir() if path.name.startswith(("afd-", "ray"))]


def refused(temp_dir, *arguments, **env):
    done = run_cli(temp_dir, "serve", *arguments, **env)
    assert done.returncode in (1, 2), done
    assert "ready" not in done.stdout
    assert "Traceback" not in done.stderr
    assert_clean(temp_dir)
    return done.stderr


def test_a_port_in_use_is_named(short_dir):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        text = refused(short_dir, tiny_llama()[0], "--launcher", "local", "--port", port)
    assert f"port {port}" in text
    assert "--port" in text


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_model_directory_that_lacks_a_file_is_refused_by_name(short_dir, missing):
    model = short_dir / "model"
    model.mkdir()
    write_tiny_llama(model)
    (model / missing).unlink()
    expected = "*.safetensors" if missing == "model.safetensors" else missing
    assert expected in refused(short_dir, model, *LOCAL)


def test_a_directory_that_is_not_there_is_refused(short_dir):
    assert "/no/such/model" in refused(short_dir, "/no/such/model", *LOCAL)


def test_an_unknown_name_lists_the_known_ones(short_dir):
    assert "smollm2-135m-instruct" in refused(short_dir, "no-such-model", *LOCAL)


def test_an_unsupported_architecture_is_named_beside_the_supported(short_dir):
    model = changed_model(short_dir, lambda config: config.update(model_type="mamba"))
    text = refused(short_dir, model, *LOCAL)
    assert "'mamba'" in text
    assert "llama" in text


def changed_model(short_dir, change):
    model = short_dir / "model"
    model.mkdir()
    write_tiny_llama(model)
    config = json.loads((model / "config.json").read_text())
    change(config)
    (model / "config.json").write_text(json.dumps(config))
    return model


def test_a_context_longer_than_the_models_is_refused(short_dir):
    text = refused(short_dir, tiny_llama()[0], *LOCAL, "--max-model-len", 513)
    assert "513" in text
    assert "512" in text


def test_a_context_that_does_not_fit_the_kv_cache_is_refused(short_dir):
    def longer(config):
        config["max_position_embeddings"] = 100_000

    text = refused(short_dir, changed_model(short_dir, longer), *LOCAL, "--kv-cache-mb", 1)
    assert "kv_cache_mb 1" in text
    assert "max_model_len" in text


def test_layers_with_a_window_leave_room_for_a_longer_context(short_dir):
    """1 MiB: 256 blocks of one layer in bfloat16, 3 · 19 of them for the layers with a window."""
    model = family("step3p5").directory
    config = json.loads((model / "config.json").read_text())
    shutil.copytree(model, short_dir / "model")
    longer = json.dumps({**config, "max_position_embeddings": 4000})
    (short_dir / "model" / "config.json").write_text(longer)
    kv = "--kv-cache-mb", 1, "--kv-cache-dtype", "bfloat16"
    text = refused(short_dir, short_dir / "model", *LOCAL, *kv)
    assert "kv_cache_mb 1 holds 3184 tokens" in text


def test_a_tensor_missing_on_a_worker_is_named_and_everything_ends(short_dir):
    model = short_dir / "model"
    model.mkdir()
    write_tiny_llama(model)
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.2.mlp.down_proj.weight"]
    save_file(tensors, model / "model.safetensors")
    text = refused(short_dir, model, *LOCAL, "--dense-layers", "ffn")  # else both sides miss it
    assert "afd-server: ffn/0" in text.splitlines()[-1]
    assert "model.layers.2.mlp.down_proj.weight" in text.splitlines()[-1]


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(short_dir):
    model = short_dir / "model"
    model.mkdir()
    write_tiny_llama(model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(5)
    save_file(tensors, model / "model.safetensors")
    last = refused(short_dir, model, *LOCAL).splitlines()[-1]
    assert "attention/0" in last
    assert "[5]" in last
    assert "[96]" in last


def test_an_unknown_setting_is_refused_by_name_wherever_it_stands(short_dir):
    file = short_dir / "serve.yaml"
    file.write_text("atention-workers: 2\n")
    assert "atention_workers" in refused(short_dir, tiny_llama()[0], *LOCAL, "--config", file)
    assert "AFD_LANE" in refused(short_dir, tiny_llama()[0], *LOCAL, AFD_LANE="2")
    assert "--lane-count" in refused(short_dir, tiny_llama()[0], *LOCAL, "--lane-count", "2")


def test_more_column_shards_than_columns_are_refused(short_dir):
    text = refused(short_dir, tiny_llama()[0], *LOCAL, "--ffn-workers", 177)
    assert "replicate" in text


def test_tcp_beyond_loopback_needs_a_word_about_the_network(short_dir):
    text = refused(
        short_dir, tiny_llama()[0], *LOCAL, "--data-transport", "tcp", "--data-host", "192.0.2.1"
    )
    assert "--trusted-network" in text


def test_shared_memory_does_not_go_with_tcp(short_dir):
    arguments = ("--transport", "shm", "--data-transport", "tcp")
    text = refused(short_dir, tiny_llama()[0], *LOCAL, *arguments)
    assert "transport is shm, but it goes with data_transport ipc" in text


def test_an_address_of_another_machine_cannot_be_bound(short_dir):
    text = refused(
        short_dir, tiny_llama()[0], *LOCAL,
        "--data-transport", "tcp", "--data-host", "192.0.2.1", "--trusted-network",
    )  # fmt: skip
    assert "cannot listen on tcp://192.0.2.1" in text


def test_a_cluster_needs_an_address_that_its_nodes_can_reach(short_dir):
    text = refused(
        short_dir, tiny_llama()[0], "--port", "0", "--ray-address", "10.0.0.1:6379",
        "--data-transport", "tcp", "--trusted-network",
    )  # fmt: skip
    assert "data_host 127.0.0.1" in text


def test_status_of_no_server_says_so(short_dir):
    done = run_cli(short_dir, "status", "--url", "http://127.0.0.1:1")
    assert done.returncode == 2
    assert "no afd-server answers" in done.stderr
