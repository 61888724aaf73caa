"""Requests are sent when they are due, whatever the answers do."""

import asyncio
import time

import pytest

from afd_server.core.request import SLO
from afd_server.loadgen.client import BodyStyle, Client
from afd_server.loadgen.http import find_origin
from afd_server.loadgen.run import AHEAD, ClientLoad, run_load
from afd_server.workload.limits import AIMD, FixedLimit
from afd_server.workload.offers import Offer, PromptPart, Shape
from afd_server.workload.report import Outcome, summarise
from support.fake_openai import faking


class SlowClient(Client):
    """Takes `prepare_s` for each request, as for a very long prompt."""

    prepare_s = 0.0

    def prepare(self, offer):
        time.sleep(self.prepare_s)
        return super().prepare(offer)


def client_of(fake, prepare_s=0.0):
    style = BodyStyle("completions", "fake", range(100, 200), "salt", {})
    client = SlowClient(find_origin(fake.url, {}), style, 10.0)
    client.prepare_s = prepare_s
    return client


def offers(*times_s):
    return [
        Offer(at_s, Shape((PromptPart(str(n), 4),), 3), SLO()) for n, at_s in enumerate(times_s)
    ]


def run(fake, wanted, prepare_s=0.0, **options):
    return asyncio.run(run_load(client_of(fake, prepare_s), wanted, **options))


def outcomes(found):
    return [record.outcome for record in found.records]


def test_a_slow_server_does_not_slow_its_load_down():
    with faking(first_s=0.5) as fake:
        found = run(fake, offers(0.0, 0.02, 0.04, 0.06))
    first = found.records[0]
    intended = [record.intended_s - first.intended_s for record in found.records]
    assert intended == pytest.approx([0.0, 0.02, 0.04, 0.06])
    assert found.records[-1].sent_s < first.chunk_times_s[0]
    assert summarise(found.records, SLO())["max_concurrent_requests"] == 4


def test_a_cap_lets_requests_wait_in_the_client_and_counts_the_wait():
    with faking(first_s=0.05) as fake:
        found = run(fake, offers(0.0, 0.0, 0.0), limit=FixedLimit(1))
    ttfts = [record.ttft_s for record in found.records]
    assert ttfts == sorted(ttfts)
    assert ttfts[2] >= 0.15
    assert summarise(found.records, SLO())["max_concurrent_requests"] == 1


def test_a_limit_that_learns_is_told_of_every_answer_and_lets_more_in_at_once():
    limit = AIMD(1, SLO(tpot_s=10.0))
    with faking(first_s=0.05) as fake:
        found = run(fake, offers(*[0.0] * 8), limit=limit)
    assert outcomes(found) == [Outcome.COMPLETED] * 8
    assert limit.width > 1
    assert 2 <= summarise(found.records, SLO())["max_concurrent_requests"] <= limit.width


def test_requests_without_a_time_follow_each_other_and_wait_for_none():
    with faking(first_s=0.3) as fake:
        found = run(fake, offers(None, None, None, None), limit=FixedLimit(2))
    assert all(record.ttft_s >= 0.3 for record in found.records)
    assert all(record.sent_s - record.intended_s < 0.2 for record in found.records)
    assert summarise(found.records, SLO())["max_concurrent_requests"] == 2


def test_a_burst_of_long_prompts_goes_out_together():
    with faking() as fake:
        found = run(fake, offers(*[0.6] * 6), prepare_s=0.08)
    sent = [record.sent_s for record in found.records]
    assert max(sent) - min(sent) < 0.08


def test_what_keeps_the_client_from_timing_chunks_counts_as_lateness():
    with faking() as fake:
        found = run(fake, offers(0.3, 0.6), prepare_s=0.05)
    assert found.load.p99_lateness_s >= 0.05
    assert found.load.is_bottleneck


def test_no_more_is_prepared_ahead_than_allowed():
    left = iter(offers(0.0, *[60.0] * 99))
    with faking() as fake:
        run(fake, left, limit_s=0.5)
    assert len(list(left)) == 99 - AHEAD


def test_requests_without_a_time_are_not_late_against_the_beginning():
    with faking() as fake:
        found = run(fake, offers(*[None] * 60), prepare_s=0.01)
    assert found.records[-1].sent_s - found.records[0].sent_s > 0.4
    assert found.load.p99_lateness_s < 0.2


def test_every_record_is_noted_at_once_and_refusals_stand_beside_the_others():
    noted = []
    with faking(conduct=lambda number: "refuse" if number % 2 else "serve") as fake:
        found = run(fake, offers(0.0, 0.03, 0.06, 0.09), note=noted.append)
    assert sorted(noted, key=lambda record: record.intended_s) == found.records
    assert outcomes(found).count(Outcome.REFUSED) == 2


def test_a_limit_leaves_what_is_under_way_unfinished():
    with faking(conduct=lambda number: "silence" if number else "serve") as fake:
        found = run(fake, offers(0.0, 0.1, 60.0), limit_s=0.5)
    assert outcomes(found) == [Outcome.COMPLETED, Outcome.UNFINISHED]
    assert not found.interrupted


def test_an_interrupted_run_keeps_what_it_has():
    async def interrupted(fake):
        task = asyncio.ensure_future(
            run_load(client_of(fake), offers(0.0, 0.0, 60.0), note=lambda _record: task.cancel())
        )
        return await task

    with faking(conduct=lambda number: "silence" if number else "serve") as fake:
        found = asyncio.run(interrupted(fake))
    assert sorted(outcomes(found)) == [Outcome.COMPLETED, Outcome.UNFINISHED]
    assert found.interrupted


def test_a_server_that_goes_away_leaves_failures_and_the_run_ends():
    with faking(conduct=lambda number: "die" if number == 1 else "serve") as fake:
        found = run(fake, offers(0.0, 0.05, 0.5, 0.55))
    assert outcomes(found) == [Outcome.COMPLETED, *[Outcome.FAILED] * 3]
    assert found.records[-1].reason.startswith("no connection")


@pytest.mark.parametrize(
    ("load", "is_bottleneck"),
    [(ClientLoad(0.1, 0.001), False), (ClientLoad(0.9, 0.001), True), (ClientLoad(0.1, 0.1), True)],
)
def test_a_client_that_is_busy_or_late_is_the_bottleneck(load, is_bottleneck):
    assert load.is_bottleneck is is_bottleneck
    assert load.as_json()["is_bottleneck"] is is_bottleneck


def test_the_share_of_the_cpu_is_measured():
    with faking() as fake:
        found = run(fake, offers(0.0, 0.2))
    assert 0 < found.load.cpu_share < 1
    assert found.load.p99_lateness_s >= 0
