"""Slack is spent, debts are repaid first, and loose targets give way to tight ones."""

import pytest

from afd_server.core.request import SLO, Request, SamplingParams
from afd_server.core.sequence import Sequence
from afd_server.policy.pace import (
    GAP_QUANTILE,
    HEADROOM,
    LONGEST_GAP,
    MIN_PREFILL,
    PATIENCE_S,
    TRIAL_EVERY,
    TRIAL_STEPS,
    WORTH_A_STEP,
    Pace,
)
from afd_server.policy.step_time import StepLoad

CALIBRATION = (
    (StepLoad(rows=1, keys=200), 0.010),
    (StepLoad(rows=16, keys=3200), 0.025),
    (StepLoad(prefill=47, prefill_keys=1104), 0.056),
    (StepLoad(prefill=128, prefill_keys=8192), 0.137),
    (StepLoad(prefill=128, prefill_keys=131072), 0.139),
)


@pytest.fixture
def pace():
    """One lane; a step takes 9 ms, and a row or a token of a prompt 1 ms more."""
    pace = Pace(num_lanes=1)
    pace.model.calibrate(CALIBRATION * 3)
    return pace


def decoding(first_s, tokens, tpot_s=0.05, length=100, key=1):
    """Return a sequence that had its first token at a moment, and so many since."""
    sampling = SamplingParams(max_tokens=500)
    request = Request(key, tuple(range(length)), sampling, slo=SLO(4.0, tpot_s))
    sequence = Sequence(request, key, arrived_s=first_s - 1)
    sequence.begun_s = first_s - 0.5
    for _ in range(tokens):
        sequence.num_computed = len(sequence.token_ids)
        sequence.append(7, first_s)
    return sequence


def waiting(tpot_s=0.05, length=100, key=9, max_tokens=500):
    sampling = SamplingParams(max_tokens=max_tokens)
    request = Request(key, tuple(range(length)), sampling, slo=SLO(4.0, tpot_s))
    return Sequence(request, key, arrived_s=100.0)


def test_a_token_is_due_one_target_after_the_other_counted_from_the_first(pace):
    sequence = decoding(100.0, 4)
    assert pace.due_s(sequence) == pytest.approx(100.0 + 4 * 0.05 * HEADROOM)
    assert pace.due_s(waiting()) == pytest.approx(104.0)
    assert pace.due_s(Sequence(Request(1, (1,), SamplingParams(max_tokens=1)), 0, 0.0)) > 1e9


def test_without_a_target_for_its_pace_a_sequence_that_has_begun_is_never_due(pace):
    assert pace.due_s(decoding(100.0, 4, tpot_s=None)) == float("inf")


def test_slack_that_was_earned_is_spent_on_prefill_but_not_in_one_gap(pace):
    now_s = 100.0
    late, even, ahead = (decoding(now_s - 0.047 * k, n) for k, n in [(5, 4), (4, 4), (1, 4)])
    budgets = [
        pace.prefill_budget(StepLoad(rows=1, keys=100), 0, [s], 256, now_s, {})
        for s in (late, even, ahead)
    ]
    assert budgets[0] == budgets[1] == MIN_PREFILL  # nothing was done for long: starved
    assert 50 < budgets[2] < LONGEST_GAP * 50
    pace.note_prefill(now_s)
    assert pace.prefill_budget(StepLoad(rows=1, keys=100), 0, [late], 256, now_s, {}) == 0
    assert pace.prefill_budget(StepLoad(), 0, [], 256, now_s, {}) == 256


def test_where_steps_stray_far_less_is_read_in_one_gap(pace):
    ahead, load = decoding(99.0, 200), StepLoad(rows=1, keys=100)
    budgets = [pace.prefill_budget(load, 0, [ahead], 256, 100.0, {})]
    reading = StepLoad(rows=1, keys=100, prefill=60)
    usual_s = pace.model.predict(reading)
    for spread in (0.2, 0.4):
        for step in range(400):
            pace.model.observe(reading, usual_s * (1 + spread * (-1) ** step))
        budgets.append(pace.prefill_budget(load, 0, [ahead], 256, 100.0, {}))
    assert budgets[0] > budgets[1] > budgets[2] >= MIN_PREFILL


def test_what_holds_short_steps_up_does_not_keep_prompts_out(pace):
    """12 ms more are twice a step that decodes, and an eighth of one that reads a prompt."""
    ahead, load = decoding(99.0, 200), StepLoad(rows=1, keys=100)
    before = pace.prefill_budget(load, 0, [ahead], 256, 100.0, {})
    usual_s = pace.model.predict(load)
    for step in range(400):
        pace.model.observe(load, usual_s + (step % 20 == 0) * 0.012)
    assert pace.model.predict(load, GAP_QUANTILE) > 2 * usual_s
    assert pace.prefill_budget(load, 0, [ahead], 256, 100.0, {}) > 0.6 * before


def test_gaps_that_are_too_long_without_any_prompt_do_not_cut_prompts(pace):
    ahead, load = decoding(99.0, 200), StepLoad(rows=1, keys=100)
    usual_s = pace.model.predict(load)
    for step in range(400):
        pace.model.observe(load, usual_s + (step % 25 == 0) * 0.12)
    assert pace.model.longest(load, GAP_QUANTILE) > LONGEST_GAP * 0.05
    assert pace.prefill_budget(load, 0, [ahead], 256, 100.0, {}) > 50


def test_who_has_least_slack_decides_how_much_is_read(pace):
    pace.note_prefill(100.0)
    ahead, near = decoding(99.975, 4), decoding(99.975, 2)
    alone = pace.prefill_budget(StepLoad(rows=2), 0, [ahead], 256, 100.0, {})
    both = pace.prefill_budget(StepLoad(rows=2), 0, [ahead, near], 256, 100.0, {})
    assert 0 < both < alone


def test_slack_is_saved_until_it_is_worth_a_step(pace):
    pace.note_prefill(now_s := 100.0)
    load, near = StepLoad(rows=8, keys=800), decoding(now_s - 0.0508, 2)
    fits = [pace.prefill_budget(load, 0, [near], most, now_s, {}) for most in (16, 20, 32, 256)]
    assert fits == [16, 20, 0, 0], "what is left of a prompt needs no more room than it takes"
    later_s = now_s + PATIENCE_S + 0.001
    saved = decoding(later_s - 0.0508, 2)
    assert MIN_PREFILL < pace.prefill_budget(load, 0, [saved], 256, later_s, {}) < WORTH_A_STEP, (
        "but not long"
    )
    near = decoding(now_s - 0.02, 2)
    assert pace.prefill_budget(load, 0, [near], 256, now_s, {}) >= WORTH_A_STEP
    tight = decoding(now_s - 0.004, 2, tpot_s=0.02)  # no gap of 34 ms has room for 40 tokens
    assert MIN_PREFILL <= pace.prefill_budget(StepLoad(), 0, [tight], 256, now_s, {}) < 30


def test_whose_token_another_lane_is_about_to_bring_may_wait_for_the_next_one(pace):
    pace.note_prefill(now_s := 100.0)
    due_soon, load = decoding(now_s - 0.02, 1), StepLoad(rows=2, keys=200)  # within 27 ms
    assert pace.prefill_budget(load, 0, [due_soon], 256, now_s, {}) == 0
    budgets = [
        pace.prefill_budget(load, 0, [due_soon], 256, now_s, {due_soon.arrival: now_s + left_s})
        for left_s in (-0.1, 0.0, 0.005, 0.04)
    ]
    assert budgets[0] == budgets[1] > budgets[2] > 0, (
        "a step that takes longer than expected ends now"
    )
    assert budgets[3] == 0, "that token will be late: debts first"
    far = pace.prefill_budget(load, 0, [due_soon], 256, now_s, {due_soon.arrival + 1: now_s})
    assert far == 0, "somebody else's step"


def test_who_is_about_to_begin_elsewhere_will_want_the_next_token_in_time(pace):
    """A first token 10 ms from now leaves 57 ms, of which a step takes 9 besides the tokens."""
    now_s, load = 100.0, StepLoad()
    reading = waiting(key=2)
    alone = pace.prefill_budget(load, 0, [reading], 256, now_s, {})
    assert alone == 256, "nobody else is there"
    soon = waiting(key=3)
    soon.num_reached = len(soon.token_ids)
    ends_s = {soon.arrival: now_s + 0.01}
    assert 30 < pace.prefill_budget(load, 0, [reading, soon], 256, now_s, ends_s) < 50
    soon.num_reached -= 1  # not the last part of its prompt
    in_a_gap = pace.prefill_budget(load, 0, [reading, soon], 256, now_s, ends_s)
    assert 60 < in_a_gap < 85, "two are reading: neither is to wait longer for a second token"
    single = waiting(key=4, max_tokens=1)
    single.num_reached = len(single.token_ids)
    ends_s = {single.arrival: now_s + 0.01}
    assert pace.prefill_budget(load, 0, [reading, single], 256, now_s, ends_s) == 256


def test_a_target_that_has_become_out_of_reach_has_no_say_for_others(pace):
    hopeless, running = decoding(95.0, 9, tpot_s=0.005), [decoding(99.99, 1, key=2)]
    assert pace.fits(waiting(), [hopeless, *running], 100.0)
    assert not pace.fits(waiting(), [decoding(95.0, 9), *running], 100.0), "debts first"
    assert not pace.fits(waiting(0.005), [hopeless], 100.0), "if nobody's is in reach, one by one"


def test_one_more_fits_as_long_as_a_step_of_all_is_short_enough(pace):
    running = []
    while pace.fits(waiting(), running, 100.0):
        running.append(decoding(99.99, 1, key=len(running) + 1))
    assert 25 <= len(running) <= 34  # 9 ms and one for each, in 41
    assert pace.decode_step_s(running) == pytest.approx(0.04, abs=0.004)


def test_few_share_a_lane_and_many_are_spread_over_as_many_as_pay():
    """A step beside another takes 4 ms longer, and half a millisecond for each row of that."""
    pace = Pace(num_lanes=2)
    beside = [(2, 0.016), (8, 0.025)]
    together = [(StepLoad(n, 200 * n, others=1, other_rows=n), s) for n, s in beside]
    pace.model.calibrate([*CALIBRATION, *together])
    few, some, many = ([decoding(99.99, 1, key=k) for k in range(n)] for n in (3, 20, 32))
    assert pace.lanes_for(few) == pace.lanes_for(many) == 2, "as many as there are to be"
    pace.open_lanes(2, fewest=1)
    skip_trial(pace, few)
    assert (pace.lanes_for(few), pace.lanes_for(many)) == (1, 2)
    assert pace.decode_step_s(few) == pytest.approx(0.012, rel=0.15)
    assert pace.decode_step_s(many) == pytest.approx(0.037, rel=0.15)
    assert pace.lanes_for(some) == 2
    assert pace.lanes_for(few) == 1
    assert pace.lanes_for(some) == 1, "no change for 3 %"


def test_the_number_of_lanes_in_use_is_known():
    pace = Pace(num_lanes=2)
    assert pace.num_lanes == 2
    pace.open_lanes(1, 1)
    assert pace.lanes_for([decoding(100.0, 2)]) == pace.num_lanes == 1


def test_the_second_best_number_of_lanes_has_its_trials():
    pace = Pace(num_lanes=2)
    together = StepLoad(rows=2, keys=400, others=1, other_rows=2)
    pace.model.calibrate([*CALIBRATION, (together, 0.014)])
    pace.open_lanes(2, fewest=1)
    near, few = ([decoding(99.99, 1, key=k) for k in range(n)] for n in (3, 2))
    chosen = [pace.lanes_for(near) for _ in range(10 * TRIAL_EVERY)]
    assert chosen.count(2) == 10 * TRIAL_STEPS
    pace.model.calibrate([*CALIBRATION, (together, 0.024)])
    chosen = [pace.lanes_for(few) for _ in range(10 * TRIAL_EVERY)]
    assert chosen.count(2) == 0, "not where it would cost too much"


def skip_trial(pace, sequences):
    for _ in range(TRIAL_STEPS):
        pace.lanes_for(sequences)


def test_nobody_is_begun_while_somebody_is_far_behind(pace):
    assert pace.fits(waiting(), [decoding(99.9, 2)], 100.0)
    assert not pace.fits(waiting(), [decoding(99.0, 2)], 100.0)
    assert pace.fits(waiting(0.001), [], 100.0), "an idle worker takes anything"


def test_a_tight_target_keeps_others_out_and_loose_ones_count_in_part(pace):
    tight = decoding(99.999, 1, tpot_s=0.02)
    loose = [decoding(99.999, 1, tpot_s=0.1, key=2 + k) for k in range(20)]
    assert pace.fits(waiting(0.05), [tight], 100.0)
    assert pace.fits(waiting(0.1), [tight, *loose], 100.0)
    assert not pace.fits(waiting(0.02), [tight, *loose, *[tight] * 6], 100.0)


def test_a_loose_one_misses_a_step_for_a_tight_one_that_would_be_late_or_for_prompts(pace):
    now_s = 100.0
    tight, loose = decoding(now_s - 0.001, 1, tpot_s=0.02), decoding(now_s, 2, tpot_s=0.1)
    crowded, empty = StepLoad(rows=14, keys=2800), StepLoad(rows=1, keys=100)
    assert pace.can_wait(loose, crowded, tight, False, now_s)
    assert not pace.can_wait(loose, empty, tight, False, now_s)
    assert pace.can_wait(loose, empty, tight, True, now_s)
    assert not pace.can_wait(tight, crowded, loose, True, now_s)
    due_soon = decoding(now_s - 0.18, 2, tpot_s=0.1)
    assert not pace.can_wait(due_soon, crowded, tight, True, now_s)


def test_what_a_request_alone_gets_is_known(pace):
    assert pace.alone_s == pytest.approx(0.010, rel=0.1)
