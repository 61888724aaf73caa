"""Servers of other shapes: topologies, tcp, replicas, settings; Ctrl-C; the status command."""

import re
import signal
import subprocess

import pytest

from support.checkpoints import tiny_llama
from support.server import (
    assert_nothing_left,
    command,
    environment,
    read_until_ready,
    run_cli,
    serving,
)

BODY = {"prompt": [[9, 8, 7, 6]], "max_tokens": 12, "temperature": 0, "return_token_ids": True}


def tokens_of(server):
    return server.http.post("/v1/completions", json=BODY).json()["choices"][0]["token_ids"]


@pytest.mark.parametrize(
    ("notation", "arguments"),
    [
        pytest.param(
            "2A2F", ["--attention-workers", 2, "--ffn-workers", 2], marks=pytest.mark.slow
        ),
        ("2A0F", ["--attention-workers", 2, "--ffn-workers", 0]),
        pytest.param(
            "1A3F",
            ["--ffn-workers", 3, "--ffn-parallel", "replicate", "--lanes", 4],
            marks=pytest.mark.slow,
        ),
        ("1A1F", ["--data-transport", "tcp"]),
        ("1A1F", ["--transport", "zmq"]),
        pytest.param(
            "2A2F",
            ["--attention-workers", 2, "--ffn-workers", 2, "--transport", "shm"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_any_topology_and_transport_gives_the_same_tokens(short_dir, notation, arguments):
    exact = ("--launcher", "local", "--quantization", "none")
    with serving(short_dir, tiny_llama()[0], *exact, *arguments) as server:
        assert server.topology == notation
        got = tokens_of(server)
        status = run_cli(short_dir, "status", "--url", server.url)
        assert status.returncode == 0
        assert notation in status.stdout
        assert ("ffn/0" in status.stdout) == (notation != "2A0F")
    assert got == expected_tokens()


def test_int8_tokens_depend_on_the_request_alone(short_dir):
    """Default settings: int8 products, native attention, lanes and company of every size."""
    import concurrent.futures

    bodies = [
        {"prompt": [[3 + (7 * i + k) % 200 for i in range(5 + 23 * k)]], "max_tokens": 30,
         "temperature": 0.9 * (k % 2), "seed": k, "ignore_eos": True, "return_token_ids": True}
        for k in range(12)
    ]  # fmt: skip

    def ask(body):
        return server.http.post("/v1/completions", json=body).json()["choices"][0]["token_ids"]

    with serving(short_dir, tiny_llama()[0], "--launcher", "local", "--lanes", 3) as server:
        alone = [ask(body) for body in bodies]
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            assert list(pool.map(ask, bodies)) == alone


def expected_tokens():
    import torch

    model, ids = tiny_llama()[1], list(BODY["prompt"][0])
    for _ in range(BODY["max_tokens"]):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 2:
            break
    return ids[4:]


def test_the_printed_curl_line_works_when_pasted(short_dir):
    name = 'the user\'s "own" name'
    arguments = (tiny_llama()[0], "--launcher", "local", "--served-model-name", name)
    with serving(short_dir, *arguments) as server:
        line = next(line for line in server.output.splitlines() if line.startswith("try:"))
        pasted = line.removeprefix("try:").strip()
        answer = subprocess.run(["bash", "-c", f"{pasted} -sS"], capture_output=True, check=True)
        assert b'"finish_reason"' in answer.stdout


def test_settings_come_from_file_environment_and_flags_in_rising_order(short_dir):
    file = short_dir / "serve.yaml"
    file.write_text("served-model-name: of-file\nlanes: 3\nmax_model_len: 64\nlauncher: local\n")
    process = subprocess.Popen(
        command("serve", tiny_llama()[0], "--config", file, "--port", 0, "--max-model-len", 99),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=environment(short_dir, AFD_SERVED_MODEL_NAME="of-env"),
    )  # fmt: skip
    try:
        output = read_until_ready(process, 60)
        assert "model of-env" in output
        url = output.split()[1]
        import httpx

        card = httpx.get(f"{url}/v1/models").json()["data"][0]
        assert (card["id"], card["max_model_len"]) == ("of-env", 99)
    finally:
        process.terminate()
        process.communicate(timeout=30)


@pytest.mark.parametrize(
    ("path", "fields", "ending"),
    [
        (
            "/v1/completions",
            BODY,
            r'data: .*("finish_reason":"length"|"error").*\ndata: \[DONE\]',
        ),
        (
            "/v1/messages",
            {"messages": [{"role": "user", "content": "a"}], "temperature": 0},
            r'event: message_stop\n.*|event: error\ndata: \{"type":"error",.*',
        ),
    ],
)
def test_ctrl_c_ends_running_streams_openly_and_leaves_nothing(short_dir, path, fields, ending):
    process = subprocess.Popen(
        command("serve", tiny_llama()[0], "--launcher", "local", "--port", 0,
                "--shutdown-timeout-s", 0.2),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(short_dir),
    )  # fmt: skip
    try:
        output = read_until_ready(process, 60)
        import httpx
        import psutil

        children = psutil.Process(process.pid).children(recursive=True)
        url = output.split()[1]
        body = {**fields, "max_tokens": 480, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}{path}", json=body, timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            rest = [line for line in lines if line]
        assert re.fullmatch(ending, "\n".join(rest[-2:]))
        assert process.wait(30) == 0
        assert_nothing_left(children, short_dir)
    finally:
        process.kill()
        process.communicate()


def test_a_stop_signal_while_starting_leaves_nothing(short_dir):
    process = subprocess.Popen(
        command("serve", tiny_llama()[0], "--launcher", "local", "--port", 0),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(short_dir),
    )  # fmt: skip
    import psutil

    while not (children := psutil.Process(process.pid).children(recursive=True)):
        pass
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    process.communicate()
    assert_nothing_left(children, short_dir)


@pytest.mark.faults
def test_when_the_serve_process_is_killed_its_workers_follow(short_dir):
    process = subprocess.Popen(
        command("serve", tiny_llama()[0], "--launcher", "local", "--port", 0),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(short_dir),
    )  # fmt: skip
    import psutil

    read_until_ready(process, 60)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


@pytest.mark.faults
@pytest.mark.parametrize("transport", ["zmq", "shm"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_is_replaced_and_the_stream_goes_on(short_dir, victim, transport):
    """Recovery has its own guarantees later; the path must stand already."""
    arguments = ("--launcher", "local", "--transport", transport)
    with serving(short_dir, tiny_llama()[0], *arguments) as server:
        body = {**BODY, "max_tokens": 400, "ignore_eos": True}
        calm = server.http.post("/v1/completions", json=body).json()["choices"][0]["token_ids"]
        with server.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
            lines = stream.iter_lines()
            first = [next(lines) for _ in range(20)]
            server.worker_processes()[victim].kill()
            rest = list(lines)
        import json

        chunks = [json.loads(x[6:]) for x in first + rest if x.startswith("data: {")]
        tokens = [i for c in chunks for i in c["choices"][0]["token_ids"]]
        assert tokens == calm
        assert server.status()["epoch"] > 1
