"""The journal: no token lost, repeated or taken from an attempt that is over."""

import array
import asyncio

import pytest

from afd_server.core.clock import ManualClock
from afd_server.core.errors import Overloaded, ProtocolError, WorkerFailed
from afd_server.core.request import SLO, FinishReason, SamplingParams
from afd_server.core.topology import Member, Role, Topology
from afd_server.gateway.asker import Asker
from afd_server.gateway.byte_codec import byte_codec
from afd_server.gateway.choices import ChoicePlan, Choices, run_to_end
from afd_server.gateway.generation import (
    ASK_AGAIN_AFTER_S,
    GIVE_UP_AFTER_S,
    MAX_ATTEMPTS,
    MOVE_AFTER_S,
    EventQueue,
    FailureEvent,
    Generations,
    TokenEvent,
)
from afd_server.telemetry.metrics import GatewayMetrics
from afd_server.transport.messages import (
    TOKEN_COLUMNS,
    Cancel,
    DType,
    Payload,
    Submit,
    TokenChunk,
    bits_float,
    float_bits,
)

WORKERS = [Member(Role.ATTENTION, slot, f"w{slot}", "", "f") for slot in range(2)]


class FakeEndpoint:
    """Remembers what was sent."""

    def __init__(self, *workers):
        self.topology = Topology(1, workers)
        self.sent = []

    def try_send(self, peer, message):
        self.sent.append((peer, message))
        return True

    def take(self):
        sent, self.sent = self.sent, []
        return sent


ASKER = Asker("salt", "tenant", -3, SLO(ttft_s=4.0, tpot_s=0.05), arrived_s=0.0)


class Bench:
    """A journal with one request and everything around it."""

    def __init__(self, *workers, max_tokens=5):
        self.endpoint = FakeEndpoint(*(workers or WORKERS[:1]))
        self.clock = ManualClock()
        self.metrics = GatewayMetrics("m")
        self.generations = Generations(self.endpoint, self.clock, self.metrics)
        self.events = EventQueue()
        self.key = self.start(max_tokens)

    def start(self, max_tokens=5, guard_window=0, asker=ASKER):
        sampling = SamplingParams(
            max_tokens=max_tokens, seed=4, stop_token_ids=(2,), guard_window=guard_window
        )
        return self.generations.start(0, (7, 8, 9), sampling, asker, self.events)

    def chunk(self, *rows, source="w0"):
        values = array.array("q", [value for row in rows for value in row])
        payload = Payload(DType.INT64, (len(rows), TOKEN_COLUMNS), values.tobytes())
        self.generations.take(source, TokenChunk(payload))

    def token(self, index, token_id, *, attempt=1, finish=0, source="w0", key=None, cached=0,
              bits=0, queued_us=0):  # fmt: skip
        row = (key or self.key, attempt, index, 1, token_id, finish, cached, bits, queued_us)
        self.chunk(row, source=source)

    def heard(self):
        return [self.events.get_nowait() for _ in range(self.events.qsize())]

    def metric(self, name):
        return self.metrics.registry.get_sample_value(name, {})


def submits(sent):
    return [(peer, m.attempt, m.num_emitted) for peer, m in sent if isinstance(m, Submit)]


def ids_of(submit):
    return list(array.array("i", bytes(submit.tokens.data)))


def test_a_request_is_sent_with_everything_that_decides_its_tokens():
    bench = Bench()
    ((peer, submit),) = bench.endpoint.take()
    assert peer == "w0"
    assert (submit.key, submit.attempt, submit.max_tokens, submit.seed) == (bench.key, 1, 5, 4)
    assert (submit.num_prompt, submit.num_emitted, ids_of(submit)) == (3, 0, [7, 8, 9, 2])
    assert submit.salt == "salt"


def test_tokens_in_order_reach_the_client_and_the_last_ends_the_request():
    bench = Bench()
    bench.token(0, 50)
    bench.clock.advance(0.04)
    bench.token(1, 2, finish=FinishReason.STOP)
    first, last = bench.heard()
    assert first == TokenEvent(0, 50, None, 0, first.timing)
    assert last == TokenEvent(0, 2, FinishReason.STOP, 0, last.timing)
    assert bench.generations.num_live == 0


@pytest.mark.parametrize(
    "stray",
    [
        {"attempt": 2},
        {"attempt": 0},
        {"source": "w1"},
        {"key": 12345},
        {"index": 0},  # said already
    ],
)
def test_a_token_of_no_current_attempt_or_said_before_is_fenced(stray):
    bench = Bench()
    bench.token(0, 50)
    bench.heard()
    bench.token(**{"index": 1, "token_id": 51, **stray})
    assert bench.heard() == []
    assert bench.metric("afd_fenced_tokens_total") == 1


def test_after_a_gap_a_new_attempt_goes_on_from_the_journal():
    bench = Bench()
    bench.token(0, 50)
    bench.endpoint.take()
    bench.token(2, 52)  # 1 was lost
    sent = bench.endpoint.take()
    assert ("w0", Cancel(bench.key, 1)) in sent
    assert submits(sent) == [("w0", 2, 1)]
    assert ids_of(sent[-1][1]) == [7, 8, 9, 50, 2]
    bench.token(1, 51, attempt=1)  # a late one of the old attempt
    bench.token(1, 51, attempt=2)
    assert [event.token_id for event in bench.heard()] == [50, 51]


def test_a_silent_request_is_submitted_again_with_the_same_attempt():
    bench = Bench()
    bench.token(0, 50)
    bench.endpoint.take()
    bench.clock.advance(ASK_AGAIN_AFTER_S / 2)
    bench.generations.ask_again()
    assert bench.endpoint.take() == []
    bench.clock.advance(ASK_AGAIN_AFTER_S)
    bench.generations.ask_again()
    assert submits(bench.endpoint.take()) == [("w0", 1, 1)]


def test_a_sign_of_life_counts_as_news_but_is_no_token():
    bench = Bench()
    bench.endpoint.take()
    bench.clock.advance(ASK_AGAIN_AFTER_S * 0.9)
    bench.chunk((bench.key, 1, 0, 0, 0, 0, 0, 0, 0))
    bench.clock.advance(ASK_AGAIN_AFTER_S * 0.9)
    bench.generations.ask_again()
    assert bench.endpoint.take() == []
    assert bench.heard() == []


def test_when_its_worker_is_lost_a_request_moves_with_its_tokens():
    bench = Bench(*WORKERS)
    bench.token(0, 50)
    bench.endpoint.take()
    bench.endpoint.topology = Topology(2, WORKERS[1:])
    bench.generations.follow(bench.endpoint.topology)
    assert submits(bench.endpoint.take()) == [("w1", 2, 1)]
    bench.token(1, 51, attempt=2, source="w1")
    assert [event.token_id for event in bench.heard()] == [50, 51]


def test_without_a_worker_a_request_waits_for_one_and_then_gives_up():
    bench = Bench()
    bench.endpoint.topology = Topology(2, ())
    bench.generations.follow(bench.endpoint.topology)
    bench.endpoint.take()
    bench.endpoint.topology = Topology(3, WORKERS[1:])
    bench.generations.follow(bench.endpoint.topology)
    assert submits(bench.endpoint.take()) == [("w1", 2, 0)]
    bench.endpoint.topology = Topology(4, ())
    bench.generations.follow(bench.endpoint.topology)
    bench.clock.advance(GIVE_UP_AFTER_S - 1)
    bench.generations.ask_again()
    assert bench.heard() == []
    bench.clock.advance(2)
    bench.generations.ask_again()
    (event,) = bench.heard()
    assert isinstance(event.error, WorkerFailed)
    assert bench.generations.num_live == 0


def test_a_request_that_keeps_failing_is_not_tried_for_ever():
    bench = Bench()
    for _ in range(MAX_ATTEMPTS):
        bench.token(3, 1, attempt=len(submits(bench.endpoint.sent)))
    (event,) = bench.heard()
    assert isinstance(event, FailureEvent)
    assert str(MAX_ATTEMPTS) in str(event.error)


def test_a_request_that_waits_long_with_signs_of_life_is_left_alone():
    bench = Bench()
    for _ in range(300):
        bench.clock.advance(1.0)
        bench.chunk((bench.key, 1, 0, 0, 0, 0, 0, 0, 0))
        bench.generations.ask_again()
    assert bench.heard() == []
    assert bench.generations.num_live == 1


def test_attempts_that_bring_tokens_are_not_counted_against_a_request():
    bench = Bench(max_tokens=50)
    for lost in range(2 * MAX_ATTEMPTS):
        bench.token(lost, 50, attempt=lost + 1)
        bench.token(lost + 2, 50, attempt=lost + 1)  # the one before it was lost
    assert bench.generations.num_live == 1


def test_what_an_attempt_found_computed_comes_with_its_tokens():
    bench = Bench(*WORKERS)
    bench.token(0, 50, cached=2)
    bench.endpoint.topology = Topology(2, WORKERS[1:])
    bench.generations.follow(bench.endpoint.topology)
    bench.token(1, 51, attempt=2, source="w1", cached=0)
    assert [event.num_cached for event in bench.heard()] == [2, 0]
    assert bench.endpoint.take()[-1][1].salt == "salt"


@pytest.mark.parametrize("cached", [-1, 4])
def test_more_found_computed_than_the_prompt_has_is_refused(cached):
    bench = Bench()
    with pytest.raises(ProtocolError):
        bench.token(0, 50, cached=cached)


def test_with_guard_the_entropies_are_journalled_and_sent_again():
    bench = Bench(*WORKERS)
    bench.generations.abandon(bench.key, "abort")
    bench.key = bench.start(guard_window=4)
    bench.token(0, 50, bits=float_bits(1.5))
    bench.token(1, 51, bits=float_bits(0.1))
    bench.endpoint.topology = Topology(2, WORKERS[1:])
    bench.generations.follow(bench.endpoint.topology)
    submit = bench.endpoint.take()[-1][1]
    assert submit.guard_window == 4
    ids = ids_of(submit)
    assert (ids[:5], ids[7:]) == ([7, 8, 9, 50, 51], [2])
    assert [bits_float(bits) for bits in ids[5:7]] == [1.5, bits_float(float_bits(0.1))]


@pytest.mark.parametrize("bits", [-1, 2**32, float_bits(float("nan")), float_bits(float("inf"))])
def test_an_entropy_that_is_no_number_is_refused(bits):
    bench = Bench()
    with pytest.raises(ProtocolError):
        bench.token(0, 50, bits=bits)


def test_an_unknown_finish_reason_is_refused():
    bench = Bench()
    with pytest.raises(ProtocolError):
        bench.token(0, 50, finish=99)


def test_abandoning_cancels_once():
    bench = Bench()
    bench.endpoint.take()
    bench.generations.abandon(bench.key, "abort")
    bench.generations.abandon(bench.key, "abort")
    assert bench.endpoint.take() == [("w0", Cancel(bench.key, 1))]
    assert bench.generations.num_live == 0


def test_stopping_ends_every_request_with_an_error():
    bench = Bench()
    bench.start()
    bench.generations.fail_all(WorkerFailed("over"))
    assert [str(event.error) for event in bench.heard()] == ["over", "over"]


def test_requests_spread_over_the_workers():
    bench = Bench(*WORKERS)
    bench.start()
    bench.start()
    assert sorted(peer for peer, _, _ in submits(bench.endpoint.take())) == ["w0", "w0", "w1"]


def test_requests_that_begin_alike_meet_at_one_worker_as_long_as_it_is_not_much_busier():
    bench = Bench(*WORKERS)  # with a request of 8 tokens at w0

    def worker_of(prompt):
        bench.endpoint.take()
        bench.generations.start(0, prompt, SamplingParams(max_tokens=5), ASKER, bench.events)
        return submits(bench.endpoint.take())[0][0]

    alike = tuple(range(300))
    assert worker_of(alike) == "w1"
    assert worker_of(alike[:280]) == "w0", "w1 has 305 tokens to do, and 256 of this computed"
    assert worker_of(tuple(range(900, 1200))) == "w0"
    assert worker_of(alike) == "w1", "w0 has 585 tokens to do, w1 305"
    assert worker_of(alike[:270]) == "w0"


def test_who_gives_no_limit_weighs_no_more_than_is_expected_of_it():
    bench = Bench(*WORKERS, max_tokens=4000)  # 3 + 64 tokens at w0
    bench.generations.start(0, (7,) * 66, SamplingParams(max_tokens=5), ASKER, bench.events)
    bench.start()
    assert [peer for peer, _, _ in submits(bench.endpoint.take())] == ["w0", "w1", "w0"]


def test_a_request_weighs_less_with_every_token():
    bench = Bench(*WORKERS, max_tokens=6)
    bench.start(max_tokens=5)
    for index in range(2):
        bench.token(index, 50)
    bench.start()
    assert [peer for peer, _, _ in submits(bench.endpoint.take())] == ["w0", "w1", "w0"]


def test_a_worker_whose_steps_are_too_long_is_avoided():
    bench = Bench(*WORKERS)
    bench.generations.expect_step("w1", 0.06)
    bench.start()
    assert [peer for peer, _, _ in submits(bench.endpoint.take())] == ["w0", "w0"]
    bench.generations.expect_step("w1", 0.04)
    bench.start()
    assert [peer for peer, _, _ in submits(bench.endpoint.take())] == ["w1"]


def test_rows_of_another_shape_are_refused():
    bench = Bench()
    with pytest.raises(ProtocolError):
        bench.generations.take("w0", TokenChunk(Payload(DType.INT64, (1, 5), bytes(40))))


def test_latencies_are_counted_from_arrival_and_between_tokens():
    bench = Bench()
    bench.clock.advance(0.5)
    bench.token(0, 50)
    for index in (1, 2):
        bench.clock.advance(0.04)
        bench.token(index, 50 + index, finish=FinishReason.LENGTH if index == 2 else 0)

    def sample(name, **labels):
        return bench.metrics.registry.get_sample_value(name, {"model_name": "m", **labels})

    assert sample("vllm:time_to_first_token_seconds_sum") == pytest.approx(0.5)
    assert sample("vllm:inter_token_latency_seconds_count") == 2
    assert sample("vllm:request_time_per_output_token_seconds_bucket", le="0.05") == 1
    assert sample("vllm:request_success_total", finished_reason="length") == 1


def test_a_submit_that_could_not_be_sent_is_sent_at_the_next_turn():
    bench = Bench()
    bench.endpoint.take()
    bench.endpoint.topology = Topology(2, WORKERS[1:])
    bench.endpoint.try_send = lambda _peer, _message: False
    bench.generations.follow(bench.endpoint.topology)
    del bench.endpoint.try_send
    bench.generations.ask_again()
    assert submits(bench.endpoint.take()) == [("w1", 2, 0)]


def test_after_three_unanswered_submits_another_worker_takes_over():
    bench = Bench(*WORKERS)
    bench.token(0, 50)
    bench.endpoint.take()
    for _ in range(int(MOVE_AFTER_S) + 1):
        bench.clock.advance(1.0)
        bench.generations.ask_again()
    sent = bench.endpoint.take()
    assert submits(sent)[-1] == ("w1", 2, 1)
    assert ("w0", Cancel(bench.key, 1)) in sent


def test_a_request_the_worker_refuses_fails_alone():
    bench = Bench()
    other = bench.start()
    bench.chunk((bench.key, 1, 0, 0, 0, FinishReason.ERROR, 0, 0, 0))
    (event,) = bench.heard()
    assert isinstance(event, FailureEvent)
    assert bench.generations.num_live == 1
    assert other != bench.key


def test_an_ended_request_says_how_it_was_served():
    bench = Bench()
    bench.clock.advance(1.5)
    bench.token(0, 50, queued_us=700_000)
    for index, gap in [(1, 0.03), (2, 0.06)]:
        bench.clock.advance(gap)
        bench.token(index, 51, finish=FinishReason.LENGTH if index == 2 else 0)
    timing = bench.heard()[-1].timing
    assert (timing.ttft_s, timing.queue_s, timing.slo_met) == (1.5, 0.7, True)
    assert timing.tpot_s == pytest.approx(0.045)
    by_slo = bench.metrics.registry.get_sample_value
    assert by_slo("afd_requests_by_slo_total", {"met": "yes"}) == 1


@pytest.mark.parametrize(("ttft_s", "gap_s"), [(4.5, 0.02), (1.0, 0.06)])
def test_a_request_that_was_late_or_slow_missed_its_targets(ttft_s, gap_s):
    bench = Bench()
    bench.clock.advance(ttft_s)
    bench.token(0, 50)
    bench.clock.advance(gap_s)
    bench.token(1, 2, finish=FinishReason.STOP)
    assert not bench.heard()[-1].timing.slo_met


def test_what_is_left_of_the_first_target_travels_with_rank_and_tenant():
    bench = Bench(*WORKERS[:2])
    ((_, submit),) = bench.endpoint.take()
    assert (submit.ttft_s, submit.tpot_s, submit.rank, submit.tenant) == (4.0, 0.05, 997, "tenant")
    bench.clock.advance(1.0)
    bench.generations.follow(Topology(2, WORKERS[1:2]))
    assert [m.ttft_s for _, m in bench.endpoint.take() if isinstance(m, Submit)] == [3.0]


def test_a_request_that_was_not_begun_in_time_is_refused_as_overload():
    bench = Bench()
    own, bench.events = bench.events, EventQueue()  # the others have other clients
    first, *_others = [bench.start() for _ in range(3)]
    bench.clock.advance(2.0)
    bench.token(0, 50, key=first)
    bench.clock.advance(100.0)
    bench.chunk((bench.key, 1, 0, 0, 0, FinishReason.REFUSED, 0, 0, 0))
    event = own.get_nowait()
    assert isinstance(event.error, Overloaded)
    assert (event.error.reason, event.error.retry_after_s) == ("queue_timeout", 60.0)
    refused = bench.metrics.registry.get_sample_value
    assert refused("afd_refused_requests_total", {"reason": "queue_timeout"}) == 1
    assert bench.generations.queue.num_waiting == 2


def test_a_choice_beside_one_that_has_begun_is_not_refused_but_waits_on():
    bench = Bench()
    late = bench.start()
    bench.token(0, 50)
    bench.heard()
    bench.endpoint.take()
    for attempt in range(1, MAX_ATTEMPTS + 2):
        bench.clock.advance(4.1)
        bench.chunk((late, attempt, 0, 0, 0, FinishReason.REFUSED, 0, 0, 0))
        ((_, submit),) = bench.endpoint.take()
        assert (submit.key, submit.attempt, submit.ttft_s) == (late, attempt + 1, 4.0)
    assert bench.heard() == []
    bench.token(0, 60, key=late, attempt=submit.attempt, finish=FinishReason.LENGTH)
    assert not bench.heard()[0].timing.slo_met
    refused = bench.metrics.registry.get_sample_value
    assert refused("afd_refused_requests_total", {"reason": "queue_timeout"}) == 0


@pytest.mark.parametrize(
    ("finish", "reason", "num_refused"),
    [(FinishReason.REFUSED, "refused", 3), (FinishReason.ERROR, "error", 0)],
)
@pytest.mark.parametrize("wait", [Choices.begin, run_to_end])
def test_choices_beside_one_that_is_refused_or_fails_are_counted_as_it_is(
    wait, finish, reason, num_refused
):
    bench, plan = Bench(), ChoicePlan(0, (7,), SamplingParams(max_tokens=5), ())
    bench.generations.abandon(bench.key, "length")
    choices = Choices(bench.generations, byte_codec(300), [plan] * 3, ASKER, ())
    with pytest.raises((Overloaded, WorkerFailed)), choices:
        bench.chunk((choices.states[1].key, 1, 0, 0, 0, finish, 0, 0, 0))
        asyncio.run(wait(choices))
    sample = bench.metrics.registry.get_sample_value
    for name, count in ((reason, 3), ("abort", 0)):
        labels = {"model_name": "m", "finished_reason": name}
        assert sample("vllm:request_success_total", labels) == count
    assert sample("afd_refused_requests_total", {"reason": "queue_timeout"}) == num_refused


def test_what_was_done_for_a_request_before_its_start_is_part_of_its_wait():
    bench = Bench()
    bench.clock.advance(1.0)  # a long text is tokenised
    bench.endpoint.take()
    bench.key = bench.start()
    ((_, submit),) = bench.endpoint.take()
    assert submit.ttft_s == 3.0
    bench.clock.advance(2.0)
    bench.token(0, 50, queued_us=700_000)
    timing = bench.heard()[-1].timing
    assert (timing.ttft_s, timing.queue_s) == (3.0, 1.7)
    ttft = bench.metrics.registry.get_sample_value
    assert ttft("vllm:time_to_first_token_seconds_sum", {"model_name": "m"}) == 3.0


def test_requests_are_in_the_queue_until_their_first_token():
    bench = Bench()
    other = bench.start()
    assert bench.generations.queue.num_waiting == 2
    assert bench.metric("afd_admitted_requests_total") == 2
    bench.token(0, 50)
    assert bench.generations.queue.num_waiting == 1
    bench.generations.abandon(other, "abort")
    assert bench.generations.queue.num_waiting == 0
