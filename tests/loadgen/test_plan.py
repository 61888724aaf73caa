"""What a run sends of a trace: the first requests, at a rate of these, again for a search."""

import json
from math import inf

import pytest

from afd_server.core.errors import ConfigError
from afd_server.loadgen.config import BenchConfig
from afd_server.loadgen.plan import Plan, Point


@pytest.fixture
def plan(tmp_path):
    def planning(times_s, rate=None, **settings):
        path = tmp_path / "t.jsonl"
        entries = [
            {"timestamp": 1000 * at_s, "input_length": 16, "output_length": n + 1, "hash_ids": [7]}
            for n, at_s in enumerate(times_s)
        ]
        path.write_text("\n".join(map(json.dumps, entries)))
        return Plan(BenchConfig(trace=path, trace_block_size=8, request_rate=(rate,), **settings))

    return planning


def offers(plan, rate=None):
    found, count = plan.offers(Point(0, rate, None))
    found = list(found)
    assert len(found) == count
    return found


def times(found):
    return [offer.at_s for offer in found]


def mean_rate(found):
    return (len(found) - 1) / found[-1].at_s


def test_of_a_trace_the_first_requests_are_replayed_as_recorded(plan):
    cut = plan([5, 6, 8, 100], num_prompts=3)
    found = offers(cut)
    assert times(found) == pytest.approx([0.0, 1.0, 3.0])
    assert [offer.shape.num_output_tokens for offer in found] == [1, 2, 3]
    assert cut.recorded_rate() == pytest.approx(2 / 3)


def test_rates_and_lengths_are_those_of_the_first_requests(plan):
    cut = plan([5, 6, 8, 100], rate=4.0, num_prompts=3)
    assert mean_rate(offers(cut, 4.0)) == pytest.approx(4.0)
    cut.check_lengths("m", 19)
    with pytest.raises(ConfigError, match="1 of 3 requests of .* the longest has 19"):
        cut.check_lengths("m", 18)


def test_a_search_repeats_a_trace_with_other_prompts(plan):
    found = offers(plan([0, 1, 3], find_goodput=True, duration_s=4.0), 3.0)
    assert len(found) == 12
    assert times(found) == sorted(times(found))
    assert mean_rate(found) == pytest.approx(3.0)
    assert [offer.shape.num_output_tokens for offer in found] == [1, 2, 3] * 4
    rounds = [[offer.shape.prompt for offer in found[n : n + 3]] for n in range(0, 12, 3)]
    blocks = [{parts[0] for parts in prompts} for prompts in rounds]
    assert [len(shared) for shared in blocks] == [1] * 4
    assert len(set.union(*blocks)) == 4
    assert len({parts for prompts in rounds for parts in prompts}) == 12


def test_a_search_sends_more_than_what_came_at_once(plan):
    found = offers(plan([0] * 15 + [3, 6], find_goodput=True, duration_s=1.0), 2.0)
    assert times(found) == pytest.approx([0.0] * 15 + [7.5])


@pytest.mark.parametrize(("times_s", "count"), [([4, 4, 9], 2), ([4, 4], None), ([4], None)])
def test_requests_of_one_moment_have_no_rate_but_can_be_sent_when_there_is_room(
    plan, times_s, count
):
    with pytest.raises(ConfigError, match=r"the \d requests to replay of .* the same timestamp"):
        plan(times_s, rate=2.0, num_prompts=count)
    found = offers(plan(times_s, rate=inf, num_prompts=count), inf)
    assert times(found) == [None] * (count or len(times_s))
