"""Targets over HTTP: refusals that say when to return, nonsense refused by name, metrics."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from support.checkpoints import tiny_llama
from support.server import serving


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(
        tmp_path_factory.mktemp("slo"), tiny_llama()[0], "--launcher", "local",
        "--slo-mode", "enforce", "--max-queued-requests", "2", "--tpot-slo-ms", "200",
    ) as server:  # fmt: skip
        yield server


def ask(server, headers=None, **fields):
    body = {"prompt": [5, 6, 7], "max_tokens": 8, "ignore_eos": True, **fields}
    return server.http.post("/v1/completions", json=body, headers=headers)


def test_a_choice_says_how_it_was_served_if_asked(server):
    metrics = ask(server, return_metrics=True, n=2).json()["choices"][1]["metrics"]
    assert set(metrics) == {"ttft_ms", "tpot_ms", "queue_ms", "slo_met"}
    assert 0 <= metrics["queue_ms"] <= metrics["ttft_ms"]
    assert metrics["slo_met"] is (metrics["tpot_ms"] <= 200 and metrics["ttft_ms"] <= 4000)
    assert "metrics" not in ask(server).json()["choices"][0]
    chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4, "stream": True}
    lines = server.http.post("/v1/chat/completions", json=chat | {"return_metrics": True}).text
    assert lines.count('"metrics":{"ttft_ms":') == 1
    message = server.http.post("/v1/messages", json=chat | {"return_metrics": True}).text
    assert message.count('"metrics":{"ttft_ms":') == 1


@pytest.mark.parametrize(
    ("headers", "text"),
    [
        ({"x-slo-tpot-ms": "soon"}, "expected milliseconds"),
        ({"x-slo-tpot-ms": "0"}, "expected milliseconds"),
        ({"x-slo-ttft-ms": "-1"}, "expected milliseconds"),
        ({"x-slo-tpot-ms": "0.0001"}, "out of reach: a request that is alone gets a token every"),
        ({"x-slo-ttft-ms": "0.0001"}, "out of reach: a step for a single token takes"),
    ],
)
def test_a_target_that_means_nothing_is_refused_by_its_name(server, headers, text):
    ask(server)  # the server knows by then what a request alone gets
    response = ask(server, headers)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, next(iter(headers)))
    assert text in error["message"]


@pytest.mark.parametrize("priority", [-1001, 1001, "high"])
def test_a_priority_outside_of_the_range_is_refused(server, priority):
    response = ask(server, priority=priority)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "priority")


@pytest.mark.parametrize("stream", [False, True])
def test_more_than_the_queue_holds_is_refused_at_once_and_told_when_to_return(server, stream):
    def one(_number):
        with httpx.Client(base_url=server.url, timeout=60) as http:
            body = {"prompt": [5] * 60, "max_tokens": 30, "ignore_eos": True, "stream": stream}
            return http.post("/v1/completions", json=body)

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(one, range(48)))
    refused = [answer for answer in answers if answer.status_code == 503]
    assert refused
    assert {answer.status_code for answer in answers} == {200, 503}
    for answer in refused:
        assert answer.json()["error"]["code"] == "server_is_overloaded"
        assert answer.headers["x-afd-reject-reason"] in ("queue_full", "expected_wait")
        assert int(answer.headers["retry-after"]) >= 1
        assert int(answer.headers["retry-after-ms"]) >= 50
    assert ask(server).status_code == 200, "the overload is over"
    text = server.http.get("/metrics").text
    assert 'afd_requests_by_slo_total{met="yes"}' in text
    assert "afd_expected_alone_step_seconds{" in text


def test_more_prompts_than_the_queue_holds_never_fit(server):
    response = ask(server, prompt=[[5], [6], [7]])
    assert response.status_code == 400
    assert "3 choices in one request, at most 2" in response.json()["error"]["message"]
