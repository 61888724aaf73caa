"""The number of lanes: eq. 3 without fixed costs, and no lane that costs more than it hides."""

from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd_server.costmodel.pipeline import (
    MOST_LANES,
    LayerTimes,
    MeasuredStages,
    StageTimes,
    choose_lanes,
    layer_s,
    quickest,
)

US = st.integers(1, 500)  # microseconds


def measured(fixed: StageTimes, by_row: StageTimes, few=8, many=32) -> MeasuredStages:
    def at(rows):
        return StageTimes(
            fixed.attention_s + rows * by_row.attention_s,
            fixed.ffn_s + rows * by_row.ffn_s,
            fixed.transfer_s + rows * by_row.transfer_s,
        )

    return MeasuredStages(few, at(few), many, at(many))


def stages(attention_us, ffn_us, transfer_us):
    return StageTimes(attention_us * 1e-6, ffn_us * 1e-6, transfer_us * 1e-6)


NOTHING = stages(0, 0, 0)
all_stages = st.builds(stages, US, US, US)


@given(all_stages)
def test_without_fixed_costs_lanes_are_those_of_the_formula(by_row):
    whole = by_row.attention_s + by_row.ffn_s + 2 * by_row.transfer_s
    needed = ceil(whole / max(by_row.attention_s, by_row.ffn_s) - 1e-9)
    choice = choose_lanes(measured(NOTHING, by_row), 32, 1, least_gain=0.0)
    assert choice.num_lanes == min(needed, MOST_LANES)


@given(
    all_stages,
    all_stages,
    st.integers(1, 64),
    st.sampled_from([0.5, 1, 2, 5]),
    st.sampled_from([0.0, 0.05]),
)
def test_no_number_of_lanes_is_expected_to_be_much_quicker_than_the_chosen(
    fixed, by_row, num_streams, num_sharing, gain
):
    choice = choose_lanes(measured(fixed, by_row), num_streams, num_sharing, gain)
    assert 1 <= choice.num_lanes <= min(num_streams, MOST_LANES) == len(choice.layer_s)
    chosen_s = choice.layer_s[choice.num_lanes - 1]
    assert chosen_s <= min(choice.layer_s) * (1 + gain + 1e-6)
    assert all(seconds > chosen_s for seconds in choice.layer_s[: choice.num_lanes - 1])


@given(st.builds(stages, US, US, st.just(0)), all_stages, US)
def test_a_longer_way_never_asks_for_fewer_lanes(fixed, by_row, more_us):
    further = StageTimes(fixed.attention_s, fixed.ffn_s, fixed.transfer_s + more_us * 1e-6)
    near, far = (choose_lanes(measured(f, by_row), 32, 1, 0.0) for f in (fixed, further))
    assert far.num_lanes >= near.num_lanes


def test_weights_that_each_lane_reads_again_are_worth_no_third_lane():
    """Two lanes hide little here, three would hide all of it but read the weights once more."""
    by_row = stages(4, 4, 1)
    assert choose_lanes(measured(NOTHING, by_row), 32, 1).num_lanes == 3
    fixed = stages(100, 100, 0)
    assert choose_lanes(measured(fixed, by_row), 32, 1).num_lanes == 2


def test_without_anything_to_hide_there_is_one_lane():
    assert choose_lanes(measured(NOTHING, NOTHING), 32, 1).num_lanes == 1
    assert choose_lanes(measured(stages(50, 0, 0), stages(5, 0, 0)), 32, 1).num_lanes == 1


def test_an_ffn_worker_that_others_keep_busy_is_worth_no_further_lane():
    times = measured(stages(10, 10, 5), stages(4, 4, 1))
    alone, in_company = (choose_lanes(times, 32, num_sharing) for num_sharing in (1, 4))
    assert alone.num_lanes == 3
    assert in_company.num_lanes == 1


def test_a_layer_takes_the_busier_side_or_the_way_of_one_lane():
    times = stages(30, 20, 10)
    got_us = [layer_s(times, lanes) * 1e6 for lanes in (1, 2, 3, 4)]
    assert got_us == pytest.approx([70, 70, 90, 120])
    assert layer_s(times, 2, num_sharing=4) * 1e6 == pytest.approx(160)


@given(all_stages, all_stages, st.integers(1, 40), st.integers(1, 40))
def test_measured_stages_come_back_and_noise_makes_no_time_negative(few, many, few_rows, more):
    stages_of = MeasuredStages(few_rows, few, few_rows + more, many)
    assert stages_of.at(few_rows + more) == many
    for rows in (0, 1, few_rows, 200):
        at = stages_of.at(rows)
        assert min(at.attention_s, at.ffn_s, at.transfer_s) >= -1e-12
    if few.ffn_s <= many.ffn_s and few.ffn_s / few_rows >= many.ffn_s / (few_rows + more):
        assert stages_of.at(few_rows).ffn_s == pytest.approx(few.ffn_s)


def test_one_size_is_taken_for_every_other():
    one = MeasuredStages(1, stages(3, 2, 1), 1, stages(3, 2, 1))
    assert one.at(1) == one.at(20) == stages(3, 2, 1)


def test_of_each_stage_the_least_counts_whichever_step_was_held_up():
    """A layer held up in one step was not in the other."""
    steps = [
        LayerTimes(6e-4, (9e-4, 2e-4), (2e-5, 5e-3)),
        LayerTimes(9e-4, (3e-4, 8e-4), (4e-3, 4e-5)),
    ]
    times = quickest(steps)
    expected = StageTimes(3e-4, 2.5e-4, 3e-5)
    assert (times.attention_s, times.ffn_s, times.transfer_s) == pytest.approx(
        (expected.attention_s, expected.ffn_s, expected.transfer_s)
    )
