"""Refusals as clients and operators see them: the whole gateway, without workers."""

import asyncio
import contextlib
import threading
from pathlib import Path

import httpx
import pytest
from starlette.requests import Request

from afd_server.api.openai import CompletionRequest
from afd_server.core.clock import ManualClock
from afd_server.core.request import SLO
from afd_server.core.topology import Member, Role, Topology
from afd_server.gateway.app import create_app
from afd_server.gateway.config import GatewaySpec
from afd_server.gateway.exchange import admit, admit_and_tokenise, num_chat_chars
from afd_server.gateway.service import Service
from afd_server.gateway.text import MOST_CHARS_AT_ONCE
from afd_server.transport.messages import EMPTY, LoadReport

MODEL = Path(__file__).parents[2] / "configs" / "llama-mini"
WORKER = Member(Role.ATTENTION, 0, "w0", "", "f")
COMPLETION = ("/v1/completions", {"prompt": "a"})
CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})
MESSAGE = ("/v1/messages", {"max_tokens": 5, "messages": [{"role": "user", "content": "a"}]})


class NoCodec:
    """Fails whoever looks at a prompt."""

    def encode(self, *_text):
        raise AssertionError("a prompt was looked at")

    encode_chat = encode_open_chat = encode


@contextlib.contextmanager
def gateway(slo_mode="enforce", **changes):
    """Make a gateway that believes an attention worker to be there."""
    spec = GatewaySpec(
        incarnation="g", listen_fd=-1, url="", supervisor="s", supervisor_address="ipc:///none",
        model_path=str(MODEL), model_digest="", served_model_name="tiny", max_model_len=512,
        num_attention=1, num_ffn=0, num_ffn_parts=0, with_crc=False, shutdown_timeout_s=1.0,
        log_level="warning", load_format="dummy", tpot_slo_s=0.05, slo_mode=slo_mode,
        **{"max_live_requests": 100, "max_queued_requests": 8, "ttft_slo_s": 4.0, **changes},
    )  # fmt: skip
    service = Service(spec, ManualClock(1.0))
    service.pools.follow(Topology(1, (WORKER,)))
    try:
        yield service
    finally:
        service._link.close()


def post(service, path, body, **headers):
    """Return an answer that does not wait for tokens."""

    async def posting():
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
            return await asyncio.wait_for(http.post(path, json=body, headers=headers), 10)

    return asyncio.run(posting())


def admitted(service, **headers):
    """Return for whom a request with these headers would run; raises if it is refused."""
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    request = Request({"type": "http", "headers": raw})
    return admit(service, request, CompletionRequest.model_validate(COMPLETION[1]), 1)


def fill(service, *keys):
    """Let requests with these API keys wait, whose first tokens come every second."""
    queue = service.generations.queue
    queue.enter(-1, 0, "", 0.0, 0.0)
    queue.enter(-2, 0, "", 0.0, 0.0)
    queue.serve(-1, 1.0)
    queue.leave(-2)
    for number, key in enumerate(keys):
        tenant = service.asker_of({"authorization": key}, None, 0).tenant
        queue.enter(number, 0, tenant, 1.0, 1.0)
        service.generations._live[number] = None


def metric(service, name, **labels):
    return service.metrics.registry.get_sample_value(name, labels)


def test_a_target_out_of_reach_is_counted_among_the_refusals():
    with gateway() as service:
        zeros = [0] * 14
        service.pools.take_report("w0", LoadReport(*zeros, 20_000, 10_000, 1, 1000, EMPTY))
        for number, header in enumerate(("x-slo-tpot-ms", "x-slo-ttft-ms")):
            answer = post(service, *COMPLETION, **{header: "1"})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, header)
            reason = answer.headers["x-afd-reject-reason"]
            assert metric(service, "afd_refused_requests_total", reason=reason) == number + 1


def test_what_an_attention_worker_reports_of_its_controller_is_shown():
    with gateway() as service:
        report = LoadReport(*[0] * 14, 20_000, 10_000, 2, 1_250, EMPTY)
        service._show_load(Member(Role.ATTENTION, 0, "w0", "", ""), report, None)
        for name, value in (
            ("afd_expected_step_seconds", 0.02),
            ("afd_expected_alone_step_seconds", 0.01),
            ("afd_decode_lanes", 2),
            ("afd_step_slowness_ratio", 1.25),
        ):
            assert metric(service, name, worker="attention/0") == value


def test_the_expected_wait_is_that_for_the_whole_queue_whosever_it_is():
    with gateway() as service:
        fill(service, *["Bearer many"] * 4)
        service._beat()
        assert metric(service, "afd_queued_requests") == 4
        assert metric(service, "afd_expected_wait_seconds") == 4.0


def test_a_full_queue_that_stands_still_is_not_said_to_move_soon():
    with gateway(max_queued_requests=4, ttft_slo_s=None) as service:
        fill(service, "Bearer a", "Bearer b", "Bearer c", "Bearer d")
        service.clock.advance(20.0)
        answer = post(service, *COMPLETION)
        assert answer.headers["x-afd-reject-reason"] == "queue_full"
        assert int(answer.headers["retry-after-ms"]) >= 20_000
        assert "for some 0.0 s" not in answer.json()["error"]["message"]


def test_who_fills_the_queue_alone_gets_a_429_and_another_one_is_taken():
    many, few = {"authorization": "Bearer many"}, {"authorization": "Bearer few"}
    with gateway(max_queued_requests=64, ttft_slo_s=9.8) as service:
        fill(service, *["Bearer many"] * 5, "Bearer few")
        for path, body in (COMPLETION, MESSAGE):
            answer = post(service, path, body, **many)
            assert answer.status_code == 429
            assert answer.headers["x-afd-reject-reason"] == "expected_wait"
            assert int(answer.headers["retry-after-ms"]) >= 1000
        assert admitted(service, **few).tenant == service.asker_of(few, None, 0).tenant
    assert answer.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize(
    "refusal",
    [
        {"max_queued_requests": 4, "ttft_slo_s": None},
        {"max_queued_requests": 64},
        {"max_live_requests": 4},
    ],
)
@pytest.mark.parametrize(("path", "body"), [COMPLETION, CHAT, MESSAGE])
def test_who_is_refused_is_refused_before_its_prompt_is_looked_at(refusal, path, body):
    with gateway(**refusal) as service:
        fill(service, "Bearer a", "Bearer b", "Bearer c", "Bearer d")
        service.codec = NoCodec()
        answer = post(service, path, body)
        assert answer.status_code == (529 if path == MESSAGE[0] else 503)


@pytest.mark.parametrize("slo_mode", ["enforce", "best-effort", "off"])
def test_more_choices_than_may_ever_live_are_no_overload(slo_mode):
    with gateway(slo_mode, max_live_requests=7, max_queued_requests=100) as service:
        answer = post(service, COMPLETION[0], {"prompt": ["a"] * 4, "n": 2})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, "n")
        assert "8 choices" in error["message"]
        assert "at most 7" in error["message"]


def test_refusals_are_counted_by_choice_as_those_admitted_are():
    with gateway(max_live_requests=5) as service:
        fill(service, *["Bearer a"] * 4)
        post(service, COMPLETION[0], {"prompt": ["a", "b"], "n": 2})
        assert metric(service, "afd_refused_requests_total", reason="max_live_requests") == 4


def test_who_comes_while_the_server_starts_or_stops_is_told_so_and_counted():
    with gateway() as service:
        service.is_draining = True
        answers = [post(service, *MESSAGE)]
        service.is_draining = False
        service.pools.follow(Topology(2, ()))
        answers.append(post(service, *COMPLETION))
        for answer, reason in zip(answers, ("stopping", "starting"), strict=True):
            assert (answer.status_code, answer.headers["x-afd-reject-reason"]) == (503, reason)
            assert metric(service, "afd_refused_requests_total", reason=reason) == 1


LONG = "ab" * 2**14


def long_body(path):
    return {"prompt": LONG} if path == COMPLETION[0] else {
        "max_tokens": 5, "messages": [{"role": "user", "content": LONG}]
    }  # fmt: skip


@pytest.mark.parametrize("path", [COMPLETION[0], CHAT[0], MESSAGE[0]])
def test_what_cannot_fit_the_context_is_refused_by_its_length(path):
    with gateway() as service:
        answer = post(service, path, long_body(path))
        assert answer.status_code == 400
        assert "shorten the prompt" in answer.json()["error"]["message"]
        assert "bytes, the context holds 512 tokens" in answer.json()["error"]["message"]


def test_the_tokens_of_a_prompt_that_does_not_fit_are_counted_all_the_same():
    with gateway() as service:
        path = MESSAGE[0] + "/count_tokens"
        answer = post(service, path, {"messages": long_body(MESSAGE[0])["messages"]})
        assert answer.json()["input_tokens"] == len("user: \nassistant:") + len(LONG)


class SlowCodec:
    """Takes a second for a prompt, in which something else may happen."""

    def __init__(self, service, meanwhile=lambda: None):
        self.service, self.meanwhile = service, meanwhile
        self.thread = None

    def encode(self, *_text):
        self.thread = threading.current_thread()
        self.service.clock.advance(1.0)
        self.meanwhile()
        return [1]

    encode_chat = encode_open_chat = encode


@pytest.mark.parametrize("path", [COMPLETION[0], CHAT[0], MESSAGE[0]])
def test_who_has_no_room_any_more_after_a_long_text_was_tokenised_is_refused(path):
    with gateway(max_live_requests=4) as service:
        service.codec = SlowCodec(service, lambda: fill(service, *["Bearer a"] * 4))
        answer = post(service, path, long_body(path))
        assert answer.headers["x-afd-reject-reason"] == "max_live_requests"


@pytest.mark.parametrize(("num_chars", "is_beside"), [(100, False), (10**6, True)])
def test_long_texts_are_tokenised_in_a_thread_and_the_time_counts(num_chars, is_beside):
    with gateway() as service:
        service.codec = SlowCodec(service)
        request = Request({"type": "http", "headers": []})
        body = CompletionRequest.model_validate(COMPLETION[1])
        asker, ids = asyncio.run(
            admit_and_tokenise(service, request, body, 1, num_chars, service.codec.encode)
        )
        assert (asker.arrived_s, service.clock.now(), ids) == (1.0, 2.0, [1])
        assert (service.codec.thread is not threading.main_thread()) == is_beside


def test_many_empty_messages_are_a_long_text():
    assert num_chat_chars([{"role": "user", "content": ""}] * 1000) > MOST_CHARS_AT_ONCE


def test_best_effort_knows_targets_and_refuses_nobody_for_them():
    with gateway("best-effort") as service:
        fill(service, *["Bearer many"] * 20)
        assert admitted(service).slo == SLO(ttft_s=4.0, tpot_s=0.05)
        assert admitted(service, **{"x-slo-tpot-ms": "0.001"}).slo.tpot_s == 1e-6
    with gateway("off") as service:
        assert admitted(service).slo == SLO()
