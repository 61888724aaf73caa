"""`afd-server bench` against a real server with a tiny model."""

import json

from support.server import run_cli

LOAD = (
    "--token-ids", "3:258", "--input-len", "8:24", "--output-len", "4:8", "--request-rate", "20",
    "--num-prompts", "20", "--prefix-len", "32", "--slo-mix", "50:1,1000:1",
)  # fmt: skip


def test_a_load_is_served_and_reported_with_plots(server, tmp_path):
    path = tmp_path / "run.json"
    ran = run_cli(
        tmp_path, "bench", "--url", server.url, *LOAD, "--output", path, "--save-detailed"
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    result = json.loads(path.read_text())
    assert result["completed"] + result["refused"] == 20
    assert sum(result["output_lens"]) == result["total_output_tokens"]
    assert all(40 <= length <= 56 for length in result["input_lens"])
    assert (result["model_id"], result["server"]["topology"]) == ("tiny", "1A1F")
    drawn = run_cli(tmp_path, "bench", "report", path, "-d", tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "timeline-run.png").exists()


def test_a_chat_load_with_clients_that_leave_frees_their_blocks(server, tmp_path):
    path = tmp_path / "run.json"
    ran = run_cli(
        tmp_path, "bench", "--url", f"{server.url}/v1", "--endpoint-type", "chat",
        "--input-len", "8", "--output-len", "64", "--request-rate", "inf", "--max-concurrency", "4",
        "--num-prompts", "8", "--cancel-share", "0.5", "--cancel-after-s", "0.05",
        "--output", path,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    result = json.loads(path.read_text())
    assert result["cancelled"] >= 1
    assert result["completed"] + result["cancelled"] == 8
    assert server.wait_for(server.all_blocks_free)


def test_lengths_beyond_the_model_and_a_server_that_is_not_there_are_one_line(server, tmp_path):
    ran = run_cli(tmp_path, "bench", "--url", server.url, "--input-len", "600")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "max_model_len of tiny is 512" in ran.stderr
    ran = run_cli(tmp_path, "bench", "--url", "http://127.0.0.1:1")
    assert ran.returncode == 1
    assert ran.stderr.startswith("afd-server: no server listens at http://127.0.0.1:1")
