"""Ray places, starts and stops; it leaves no placement group, process or file."""

import pytest

from afd_server.core.errors import ConfigError
from support.checkpoints import tiny_llama
from support.server import run_cli, serving

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

BODY = {"prompt": [[9, 8, 7]], "max_tokens": 5, "temperature": 0, "return_token_ids": True}


def test_pools_run_on_resources_of_their_own(short_dir):
    with serving(
        short_dir, tiny_llama()[0], "--attention-workers", 2, "--ffn-workers", 2,
        "--attention-resources", "CPU=0.5,attention_node=1",
        "--ffn-resources", "CPU=0.5,ffn_node=1",
    ) as server:  # fmt: skip
        assert server.topology == "2A2F"
        answer = server.http.post("/v1/completions", json=BODY)
        assert len(answer.json()["choices"][0]["token_ids"]) >= 1
        names = [" ".join(p.cmdline()) for p in server.descendants()]
        assert sum("_WorkerActor.run" in name for name in names) == 4


def test_a_killed_actor_is_replaced(short_dir):
    with serving(short_dir, tiny_llama()[0]) as server:
        before = server.http.post("/v1/completions", json=BODY).json()["choices"][0]["token_ids"]
        victim = next(p for p in server.descendants() if "_WorkerActor" in " ".join(p.cmdline()))
        victim.kill()
        server.wait_for(lambda: server.status()["epoch"] >= 3, 60)
        after = server.http.post("/v1/completions", json=BODY).json()["choices"][0]["token_ids"]
    assert before == after


def test_a_model_error_in_an_actor_is_told_and_ray_is_gone(short_dir):
    from safetensors.torch import load_file, save_file

    from support.checkpoints import write_tiny_llama

    model = short_dir / "model"
    model.mkdir()
    write_tiny_llama(model)
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors")
    done = run_cli(short_dir, "serve", model, "--port", 0, seconds=120)
    assert done.returncode == 1
    assert "model.norm.weight" in done.stderr.splitlines()[-1]
    assert not [p for p in short_dir.iterdir() if p.name.startswith(("afd-", "ray"))]


def test_no_cluster_at_the_address_is_said_within_seconds(short_dir):
    from afd_server.cluster.ray_launcher import RayConfig, RayLauncher

    dead = RayConfig("127.0.0.1:1", short_dir, {}, {}, "warning")
    with pytest.raises(ConfigError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"):
        RayLauncher(dead)
