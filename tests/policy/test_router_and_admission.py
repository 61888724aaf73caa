import contextlib

import pytest

from afd_server.core.errors import InvalidRequest, Overloaded
from afd_server.core.request import SLO
from afd_server.core.topology import Member, Role
from afd_server.policy.admission import (
    LONGEST_WAIT,
    SHORTEST_WAIT,
    AdmissionConfig,
    FirstTokenQueue,
    check_capacity,
    check_reachable,
    fit_max_tokens,
)
from afd_server.policy.router import BLOCK_TOKENS, PrefixMap, choose_worker, prefix_blocks

WORKERS = [Member(Role.ATTENTION, slot, f"i{slot}", "ipc://x", "f") for slot in range(3)]
LIMITS = AdmissionConfig(max_live_requests=4, max_model_len=100)


def test_the_least_loaded_worker_is_chosen_and_the_lowest_slot_among_equals():
    assert choose_worker(WORKERS, {"i0": 5, "i1": 2, "i2": 2}) is WORKERS[1]


def test_a_worker_that_is_too_slow_for_the_target_is_the_last_choice():
    assert choose_worker(WORKERS, {"i1": 5, "i2": 7}, {"i0"}) is WORKERS[1]
    assert choose_worker(WORKERS, {"i0": 9, "i1": 5}, {"i0", "i1", "i2"}) is WORKERS[2]


def test_workers_are_known_by_the_beginnings_of_prompts_that_they_were_given():
    prefixes, prompt = PrefixMap(), list(range(4 * BLOCK_TOKENS + 1))
    prefixes.note(prefix_blocks(prompt, "a"), "w0")
    assert prefixes.num_tokens(prefix_blocks(prompt, "a"), "w0") == 4 * BLOCK_TOKENS
    assert prefixes.num_tokens(prefix_blocks(prompt, "a"), "w1") == 0
    assert prefixes.num_tokens(prefix_blocks(prompt, "b"), "w0") == 0, "another tenant's"
    turned = [*prompt[: 2 * BLOCK_TOKENS], 7, *prompt]
    assert prefixes.num_tokens(prefix_blocks(turned, "a"), "w0") == 2 * BLOCK_TOKENS
    assert prefix_blocks(prompt[:BLOCK_TOKENS], "a") == [], "its last token is computed anyway"


def test_the_oldest_beginnings_are_forgotten(monkeypatch):
    monkeypatch.setattr("afd_server.policy.router.MOST_BLOCKS", 3)
    prefixes, blocks = PrefixMap(), [bytes([number]) for number in range(4)]
    prefixes.note(blocks[:2], "w")
    prefixes.note(blocks[:1], "w")
    prefixes.note(blocks[2:], "w")
    assert prefixes.num_tokens(blocks[:1], "w") == BLOCK_TOKENS
    assert prefixes.num_tokens(blocks[1:], "w") == 0


def test_without_workers_there_is_no_choice():
    assert choose_worker([], {}) is None


def test_a_full_gateway_refuses_and_says_when_to_come_back():
    check_capacity(LIMITS, num_live=2, num_new=2, retry_after_s=7.0)
    with pytest.raises(Overloaded, match="limit is 4") as refusal:
        check_capacity(LIMITS, num_live=3, num_new=2, retry_after_s=7.0)
    assert refusal.value.retry_after_s == 7.0


def test_more_choices_than_may_ever_live_are_a_wrong_request_and_not_to_be_sent_again():
    with pytest.raises(InvalidRequest, match=r"5 choices .* at most 4") as refusal:
        check_capacity(LIMITS, num_live=0, num_new=5, retry_after_s=7.0)
    assert refusal.value.param == "n"


def test_who_is_refused_comes_back_when_the_queue_is_drained_but_within_the_patience_of_clients():
    assert queue_of().retry_after_s(NOW) == 1.0
    waiting = [(0, "a")] * 6
    assert queue_of(*waiting).retry_after_s(NOW) == pytest.approx(3.0, rel=0.01)
    assert queue_of(*waiting, interval_s=60.0).retry_after_s(NOW) == 60.0


def test_max_tokens_defaults_to_what_the_context_leaves():
    assert fit_max_tokens(LIMITS, 30, None) == 70
    assert fit_max_tokens(LIMITS, 30, 70) == 70


@pytest.mark.parametrize(
    ("prompt", "wanted", "param"), [(100, 1, "prompt"), (30, 71, "max_tokens")]
)
def test_what_does_not_fit_the_context_is_refused_by_name(prompt, wanted, param):
    with pytest.raises(InvalidRequest) as refusal:
        fit_max_tokens(LIMITS, prompt, wanted)
    assert refusal.value.param == param


NOW = 100.0
ENFORCED = AdmissionConfig(100, 100, max_queued_requests=8, slo_mode="enforce")


def queue_of(*waiting, interval_s=0.5):
    """Return a queue of (priority, tenant), whose first tokens come at this interval."""
    queue = FirstTokenQueue()
    queue.enter(0, 0, "", 0.0, 0.0)
    for turn in range(1, 200):
        queue.enter(turn, 0, "", 0.0, turn * interval_s)
        queue.serve(turn - 1, turn * interval_s)
    queue.leave(199)
    for key, (priority, tenant) in enumerate(waiting, 1000):
        queue.enter(key, priority, tenant, NOW, NOW)
    return queue


def test_who_would_wait_for_too_much_of_its_first_target_is_refused_at_once():
    queue = queue_of(*[(0, "a")] * 4)
    longest_s = 2.0 / LONGEST_WAIT
    queue.check(ENFORCED, 1.01 * longest_s, 0, "a", 1, NOW)
    queue.check(ENFORCED, None, 0, "a", 4, NOW)
    with pytest.raises(Overloaded, match=r"4 requests wait .* 2\.0 s") as refusal:
        queue.check(ENFORCED, 0.75 * longest_s, 0, "a", 1, NOW)
    assert refusal.value.reason == "expected_wait"
    assert refusal.value.retry_after_s == pytest.approx(0.5, rel=0.01)
    with pytest.raises(Overloaded):
        queue.check(ENFORCED, 1.01 * longest_s, 0, "a", 2, NOW)  # the second would wait too long


def test_the_longest_wait_is_shorter_while_many_are_refused():
    queue = queue_of(*[(0, "a")] * 4)
    ttft_s = 1.01 * 2.0 / LONGEST_WAIT
    queue.check(ENFORCED, ttft_s, 0, "a", 1, NOW)
    for _ in range(40):
        with pytest.raises(Overloaded):
            queue.check(ENFORCED, 0.1, 0, "a", 1, NOW)
    assert queue.wait_share == pytest.approx(SHORTEST_WAIT)
    with pytest.raises(Overloaded):
        queue.check(ENFORCED, ttft_s, 0, "a", 1, NOW)
    queue.check(ENFORCED, 1.01 * 2.0 / SHORTEST_WAIT, 0, "a", 1, NOW)
    urgent = queue_of((0, "a"), *[(-1, "a")] * 4)
    for _ in range(40):
        with pytest.raises(Overloaded):
            urgent.check(ENFORCED, 0.1, 0, "a", 1, NOW)
    assert urgent.wait_share == pytest.approx(SHORTEST_WAIT)
    urgent.check(ENFORCED, ttft_s, -1, "a", 1, NOW)  # overtakes somebody
    for _ in range(200):
        queue.check(ENFORCED, None, 0, "a", 1, NOW)
    queue.check(ENFORCED, ttft_s, 0, "a", 1, NOW)


def test_the_wait_is_soon_a_long_one_again_once_nobody_waits():
    queue = queue_of((0, "a"))
    for _ in range(40):
        with pytest.raises(Overloaded):
            queue.check(ENFORCED, 0.1, 0, "a", 1, NOW)
    assert queue.wait_share == pytest.approx(SHORTEST_WAIT)
    queue.serve(1000, NOW)
    for _ in range(6):
        queue.check(ENFORCED, 4.0, 0, "a", 1, NOW)
    assert queue.wait_share > 0.95 * LONGEST_WAIT


def test_who_is_alone_too_many_shortens_the_wait_of_nobody_else():
    queue = queue_of(*[(0, "many")] * 6, (0, "few"))
    for _ in range(40):
        with pytest.raises(Overloaded) as refusal:
            queue.check(ENFORCED, 4.0, 0, "many", 1, NOW)
        assert refusal.value.is_own_doing
    assert queue.wait_share == LONGEST_WAIT


@pytest.mark.parametrize("num_new", [1, 8])
def test_an_empty_queue_takes_anybody_however_slow_it_was(num_new):
    queue_of(interval_s=60.0).check(ENFORCED, 0.001, 0, "a", num_new, NOW)


def test_the_pace_is_known_from_the_first_tokens_on():
    queue = FirstTokenQueue()
    for key in range(4):
        queue.enter(key, 0, "a", 0.0, 0.0)
    queue.serve(0, 2.0)
    assert queue.expected_wait_s(0, "a") == pytest.approx(3 * 2.0)
    queue.serve(1, 3.0)
    assert queue.expected_wait_s(0, "a") == pytest.approx(2 * 1.5)


def test_a_long_prompt_that_nobody_waited_behind_says_little_of_the_pace():
    queue = FirstTokenQueue()
    queue.enter(0, 0, "a", 0.0, 0.0)
    queue.serve(0, 14.0)
    for key in range(1, 4):
        queue.enter(key, 0, "a", 14.0, 14.0)
    queue.check(ENFORCED, 4.0, 0, "a", 1, 14.0)
    assert 0 < queue.expected_wait_s(0, "a") < 2.0
    queue.serve(1, 14.5)
    assert queue.expected_wait_s(0, "a") == pytest.approx(2 * 0.5), "now it is known"


def test_nobody_is_told_to_come_back_sooner_than_after_as_long_a_silence_as_there_was():
    queue = queue_of((0, "a"), interval_s=0.01)
    assert queue.drain_s(NOW + 5.0) == queue.retry_after_s(NOW + 5.0) == 5.0
    queue.check(ENFORCED, 1.0, 0, "a", 1, NOW + 5.0)
    with pytest.raises(Overloaded, match=r"1 requests wait .* 5\.0 s") as refusal:
        queue.check(ENFORCED, 1.0, 0, "a", 8, NOW + 5.0)
    assert refusal.value.retry_after_s == 5.0
    queue.serve(1000, NOW + 5.0)
    assert queue.silence_s(NOW + 1000.0) == 0.0, "nobody waits"


def test_the_queue_is_bounded_even_when_nothing_is_known_of_its_pace():
    queue = FirstTokenQueue()
    for key in range(8):
        queue.enter(key, 0, "a", 0.0, 0.0)
    with pytest.raises(Overloaded) as refusal:
        queue.check(ENFORCED, 4.0, 0, "a", 1, NOW)
    assert refusal.value.reason == "queue_full"


@pytest.mark.parametrize(
    "askers",
    [
        [(priority, "a") for priority in (3, 2, 1, 0, -1) for _ in range(8)],
        [(0, str(number)) for number in range(40)],
        [(-number, str(number)) for number in range(40)],
    ],
)
def test_no_mixture_of_priorities_and_tenants_gets_more_places_than_there_are(askers):
    queue = queue_of()
    for key, (priority, tenant) in enumerate(askers):
        with contextlib.suppress(Overloaded):
            queue.check(ENFORCED, None, priority, tenant, 1, NOW)
            queue.enter(key, priority, tenant, NOW, NOW)
    assert 6 <= queue.num_waiting <= 8


def test_a_crowd_that_others_overtake_leaves_a_quarter_of_the_places_to_them():
    queue = queue_of(*[(0, "many")] * 6)
    with pytest.raises(Overloaded) as refusal:
        queue.check(ENFORCED, None, 0, "many", 1, NOW)
    assert (refusal.value.reason, refusal.value.is_own_doing) == ("queue_full", False)
    queue.check(ENFORCED, None, 0, "few", 2, NOW)
    queue.check(ENFORCED, None, -1, "many", 2, NOW)
    queue.enter(1, 0, "few", NOW, NOW)
    queue.enter(2, -1, "few", NOW, NOW)
    for priority, tenant, is_own_doing in [(-1, "few", False), (-1, "many", True)]:
        with pytest.raises(Overloaded, match="8 requests wait .* 1 of them before") as refusal:
            queue.check(ENFORCED, None, priority, tenant, 1, NOW)
        assert refusal.value.reason == "queue_full"
        assert refusal.value.is_own_doing == is_own_doing


def test_the_more_urgent_and_those_who_ask_little_do_not_wait_for_the_rest():
    queue = queue_of(*[(0, "many")] * 6)
    assert queue.expected_wait_s(0, "many") == pytest.approx(3.0, rel=0.01)
    assert queue.expected_wait_s(0, "few") == pytest.approx(0.5, rel=0.01)
    assert queue.expected_wait_s(-1, "many") == 0
    assert queue.expected_wait_s(1, "few") == pytest.approx(3.0, rel=0.01)


def test_who_has_more_time_keeps_nobody_out_who_has_less():
    queue = queue_of((0, "a"), (0, "a"))
    for key in range(3):
        queue.enter(key, 0, "a", NOW + 60.0, NOW)
    assert queue.expected_wait_s(0, "a", NOW + 4.0) == pytest.approx(1.0, rel=0.01)
    assert queue.expected_wait_s(0, "a", NOW + 60.0) == pytest.approx(2.5, rel=0.01)
    queue.check(ENFORCED, 1.05 / LONGEST_WAIT, 0, "a", 1, NOW)
    with pytest.raises(Overloaded, match="2 of them before") as refusal:
        queue.check(ENFORCED, 0.95 / LONGEST_WAIT, 0, "a", 1, NOW)
    assert refusal.value.reason == "expected_wait"


def test_who_alone_is_too_many_is_told_to_slow_down():
    queue = queue_of(*[(0, "many")] * 6, (0, "few"))
    with pytest.raises(Overloaded) as refusal:
        queue.check(ENFORCED, 4.0, 0, "many", 1, NOW)
    assert refusal.value.is_own_doing
    crowd = queue_of(*[(0, str(tenant)) for tenant in range(7)])
    with pytest.raises(Overloaded) as refusal:
        crowd.check(ENFORCED, 4.0, 0, "new", 1, NOW)
    assert not refusal.value.is_own_doing


def test_those_who_leave_without_a_token_do_not_count_as_served():
    queue = queue_of((0, "a"), (0, "b"))
    before = queue.expected_wait_s(0, "c")
    queue.leave(1000)
    queue.leave(1000)
    assert queue.expected_wait_s(0, "c") == pytest.approx(before / 2)


@pytest.mark.parametrize(
    ("slo", "complaint", "param"),
    [
        (SLO(4.0, 0.001), r"TPOT of 1 ms is out of reach.*every 10\.0 ms", "x-slo-tpot-ms"),
        (SLO(4.0, 0.012), r"TPOT of 12 ms .* ask for at least 12\.2 ms", "x-slo-tpot-ms"),
        (SLO(0.002, 0.05), r"TTFT of 2 ms is out of reach.*takes 10\.0 ms", "x-slo-ttft-ms"),
    ],
)
def test_a_target_below_what_a_request_alone_gets_is_refused_by_name(slo, complaint, param):
    with pytest.raises(InvalidRequest, match=complaint) as refusal:
        check_reachable(slo, SLO(4.0, 0.05), alone_s=0.01)
    assert refusal.value.param == param


@pytest.mark.parametrize("slo", [SLO(0.01, 0.0123), SLO(None, None), SLO(1.0, 0.05)])
def test_a_target_that_one_alone_keeps_is_in_reach_and_nobodys_own_ones_are_not_judged(slo):
    check_reachable(slo, SLO(4.0, 0.05), alone_s=0.01)
    check_reachable(SLO(4.0, 0.05), SLO(4.0, 0.05), alone_s=10.0)
