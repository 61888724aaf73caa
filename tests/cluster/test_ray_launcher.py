"""Ray places, starts and stops; it leaves no placement group, process or file."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from afd_server.core.errors import ConfigError
from support.checkpoints import tiny_llama
from support.server import (
    assert_nothing_left,
    command,
    environment,
    read_until_ready,
    run_cli,
    serving,
)

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


def test_a_colocated_pool_needs_no_place_for_ffn_workers(short_dir):
    with serving(short_dir, tiny_llama()[0], "--ffn-workers", 0) as server:
        assert server.topology == "1A0F"
        answer = server.http.post("/v1/completions", json=BODY)
        assert len(answer.json()["choices"][0]["token_ids"]) >= 1


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
        RayLauncher(dead, lambda: None)


@pytest.fixture
def cluster():
    """A Ray of somebody else's on this machine, with resources that keep the pools apart."""
    port, env = (
        free_port(),
        {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"},
    )
    with tempfile.TemporaryDirectory(prefix="r-") as directory:
        head = subprocess.Popen(
            [
                Path(sys.executable).with_name("ray"), "start", "--head", "--block",
                "--node-ip-address", "127.0.0.1", "--port", str(port), "--num-cpus", "4",
                "--resources", '{"attention_node": 1, "ffn_node": 2}', "--temp-dir", directory,
                "--include-dashboard", "false", "--object-store-memory", "80000000",
                "--disable-usage-stats",
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env, start_new_session=True,
        )  # fmt: skip
        try:
            yield port, env
        finally:
            processes = psutil.Process(head.pid).children(recursive=True)
            for process in (*processes, head):
                process.kill()
            head.wait()
            psutil.wait_procs(processes, 10)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


ASK_CLUSTER = """
import json, ray, sys
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
groups = [g["state"] for g in ray.util.placement_group_table().values()]
print(json.dumps([ray.available_resources(), groups]))
"""


def ask(port, env):
    done = subprocess.run(
        [sys.executable, "-c", ASK_CLUSTER, f"127.0.0.1:{port}"],
        capture_output=True, text=True, env=env, check=False, timeout=60,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def test_a_cluster_that_goes_on_gets_its_resources_and_placement_groups_back(cluster, short_dir):
    port, env = cluster
    give_up = time.monotonic() + 60
    while (before := ask(port, env)) is None:
        assert time.monotonic() < give_up, "the cluster did not start"
    assert before[0]["ffn_node"] == 2
    with serving(
        short_dir, tiny_llama()[0], "--attention-workers", 1, "--ffn-workers", 2,
        "--ray-address", f"127.0.0.1:{port}", "--data-transport", "tcp",
        "--attention-resources", "CPU=1,attention_node=1", "--ffn-resources", "CPU=1,ffn_node=1",
        env={"RAY_AUTH_MODE": "disabled"},
    ) as server:  # fmt: skip
        assert server.http.post("/v1/completions", json=BODY).status_code == 200
        during = ask(port, env)
        assert during[1] == ["CREATED", "CREATED"]
        assert "ffn_node" not in during[0] and "attention_node" not in during[0]
    after = ask(port, env)
    assert set(after[1]) == {"REMOVED"}
    assert after[0]["ffn_node"] == 2 and after[0]["CPU"] == before[0]["CPU"]


def test_ctrl_c_for_the_whole_process_group_leaves_no_process_file_or_session(short_dir):
    """A terminal signals everybody in the group, Ray's own processes as well."""
    before = set(Path("/dev/shm").iterdir()) | set(Path("/tmp").glob("ray*"))
    process = subprocess.Popen(
        command("serve", tiny_llama()[0], "--port", 0),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(short_dir),
        start_new_session=True,
    )  # fmt: skip
    try:
        read_until_ready(process, 100)
        children = psutil.Process(process.pid).children(recursive=True)
        assert any("raylet" in " ".join(child.cmdline()) for child in children)
        os.killpg(process.pid, signal.SIGINT)
        rest = process.communicate(timeout=60)[0].decode()
        assert process.returncode == 0
        assert "Error" not in rest, rest
        assert_nothing_left(children, short_dir)
        assert set(Path("/dev/shm").iterdir()) | set(Path("/tmp").glob("ray*")) <= before
    finally:
        process.kill()
        process.communicate()
