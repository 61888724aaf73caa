"""A trace and the stage metrics of a real server."""

import json
import re
import threading

import pytest

from support.server import run_cli

BODY = {"prompt": [list(range(5, 40))], "max_tokens": 300, "temperature": 0, "ignore_eos": True}


def metric(server, name):
    text = server.http.get("/metrics").text
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1])


@pytest.mark.slow
def test_a_trace_shows_every_layer_of_both_pools_and_the_metrics_count_them(server, short_dir):
    asking = threading.Thread(target=lambda: [server.http.post("/v1/completions", json=BODY)
                                              for _ in range(6)])  # fmt: skip
    asking.start()
    file = short_dir / "trace.json"
    done = run_cli(short_dir, "trace", "--url", server.url, "--seconds", 1.5, "-o", file)
    asking.join()
    assert done.returncode == 0, done.stderr
    assert "perfetto" in done.stdout
    rows = json.loads(file.read_text("utf-8"))["traceEvents"]
    pids = {row["args"]["name"]: row["pid"] for row in rows if row["name"] == "process_name"}
    assert set(pids) == {"attention/0", "ffn/0"}
    spans = [row for row in rows if row["ph"] == "X"]
    assert all(row["dur"] >= 0 and row["ts"] >= 0 and row["tid"] > 0 for row in spans)
    for worker, name, expected in (  # behind the three layers comes the head, on both sides
        ("attention/0", "attention", {0, 1, 2, 3}),
        ("attention/0", "ffn", {3}),
        ("ffn/0", "ffn", {0, 1, 2, 3}),
    ):
        layers = {
            s["args"]["layer"] for s in spans if (s["pid"], s["name"]) == (pids[worker], name)
        }
        assert layers == expected
    assert {span["name"] for span in spans} >= {"a_to_f", "f_to_a", "bubble", "sampling", "step"}
    for series in (
        "afd_attention_seconds_count", "afd_ffn_seconds_count", "afd_sampling_seconds_count",
        "afd_lane_step_seconds_count", 'afd_transfer_seconds_count{direction="a_to_f"}',
        'afd_transfer_seconds_count{direction="f_to_a"}',
        'afd_bubble_seconds_count{pool="attention"}', 'afd_bubble_seconds_count{pool="ffn"}',
    ):  # fmt: skip
        assert metric(server, series) > 0, series
    for pool in ("attention", "ffn"):
        assert 0 <= metric(server, f'afd_pool_busy_ratio{{pool="{pool}"}}') <= 1


def test_a_call_lies_between_its_two_transfers(server, short_dir):
    """On one host both ends read the same clock, so spans of two workers can be compared."""
    server.http.post("/v1/completions", json={**BODY, "max_tokens": 50})
    server.wait_for(lambda: len(server.http.get("/debug/trace").json()["traceEvents"]) > 100)
    rows = server.http.get("/debug/trace?seconds=30").json()["traceEvents"]
    pids = {row["args"]["name"]: row["pid"] for row in rows if row["name"] == "process_name"}
    found = {
        (row["name"], row["args"]["step"], row["args"]["layer"]): row
        for row in rows
        if (row["pid"], row["name"])
        in {
            (pids["attention/0"], "a_to_f"),
            (pids["ffn/0"], "ffn"),
            (pids["attention/0"], "f_to_a"),
        }
    }
    calls = [(key[1:], row) for key, row in found.items() if key[0] == "ffn"]
    compared, slack_us = 0, 3  # two stamps cut to whole microseconds, and rounding
    for key, call in calls:
        there, back = found.get(("a_to_f", *key)), found.get(("f_to_a", *key))
        if there is None or back is None:
            continue
        compared += 1
        assert there["ts"] + there["dur"] <= call["ts"] + slack_us
        assert call["ts"] + call["dur"] <= back["ts"] + slack_us
    assert compared > 50


@pytest.mark.parametrize("seconds", ["0", "-1", "31", "nan", "many"])
def test_a_trace_of_no_possible_length_is_refused(server, seconds):
    answer = server.http.get("/debug/trace", params={"seconds": seconds})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "seconds"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--seconds", "0"), "seconds is 0, must be in 0 … 30"),
        (("--seconds", "nan"), "must be in 0 … 30"),
        (("--seconds", "0.1", "--url", "http://127.0.0.1:9"), "no afd-server answers at"),
        (("--seconds", "0.1", "--url", "nonsense"), "no afd-server answers at"),
        (("--seconds", "0.1", "-o", "/nowhere/trace.json"), "/nowhere/trace.json cannot be"),
    ],
)
def test_what_is_wrong_with_a_trace_command_is_said_in_one_line(
    server, short_dir, arguments, sentence
):
    url = () if "--url" in arguments else ("--url", server.url)
    done = run_cli(short_dir, "trace", *arguments, *url)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
