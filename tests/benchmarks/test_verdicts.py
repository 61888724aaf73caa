"""What is said of a run under load follows from its points."""

import pytest
from verdicts import OURS, verdicts

LOADS = (0.5, 2.0)


def point(part, label, load, goodput, seed=0, **changes):
    return {
        "part": part,
        "label": label,
        "load": load,
        "seed": seed,
        "goodput": goodput,
        "goodput_with_ttft": goodput,
        "goodput_of_one": 0.06,
        "good": 100,
        "judged": 100,
        "refused_after_ms": [5.0],
        "commit": "c",
        **changes,
    }


def ours(*rates, seed=0, **changes):
    return [
        point("loads", OURS, load, rate, seed, **changes)
        for load, rate in zip(LOADS, rates, strict=True)
    ]


def held(points, number):
    return [verdict.is_held for verdict in verdicts(points) if verdict.number == number]


def test_a_run_that_keeps_every_promise():
    found = verdicts(ours(4.0, 7.0))
    assert [verdict.number for verdict in found] == ["1a", "1b", "1c"]
    assert all(verdict.is_held for verdict in found)


@pytest.mark.parametrize(
    ("number", "points"),
    [
        ("1a", ours(4.0, 7.0, good=98)),
        ("1b", ours(7.0, 6.6)),
        ("1c", ours(4.0, 7.0, refused_after_ms=[5.0, 90.0])),
    ],
)
def test_what_is_missed_is_said(number, points):
    assert {v.number for v in verdicts(points) if not v.is_held} == {number}


def test_goodput_is_compared_with_the_best_of_those_with_the_same_arrivals():
    points = [
        *ours(4.0, 7.0), *ours(9.0, 9.0, seed=1),
        point("baselines", "cap", 0.5, 4.05), point("baselines", "AIMD", 0.5, 3.0),
        point("baselines", "cap", 2.0, 3.0), point("baselines", "AIMD", 2.0, 7.1),
    ]  # fmt: skip
    assert held(points, "2") == held(points, "2+") == [True, False]
    apart = [verdict.measured for verdict in verdicts(points) if verdict.number == "2"]
    assert "4.05 cap, 3.00 AIMD (-0.05, standard error 0.00, equal)" in apart[0]
    assert "3.00 cap, 7.10 AIMD (-0.10, standard error 0.00)" in apart[1]


def test_goodputs_are_equal_within_the_standard_error_of_differences_seed_by_seed():
    own = [point("loads", OURS, 2.0, rate, seed) for seed, rate in enumerate((5.0, 7.0, 9.0))]

    def beside(*rates):
        theirs = [point("baselines", "cap", 2.0, rate, seed) for seed, rate in enumerate(rates)]
        return held([*own, *theirs], "2")

    assert beside(5.5, 7.2, 8.8) == [True], "behind by 0.17, which may be 0.20"
    assert beside(5.2, 7.2, 9.2) == [False], "by as much in each"
    assert beside(9.1, 5.4, 7.1) == [True]
    assert beside(5.2, 7.2, 9.2, 7.2) == [False], "ours has no such run yet"
    assert beside(4.0, 6.0, 8.0) == [True]


def test_goodput_by_both_targets_is_another_promise():
    points = [*ours(4.0, 7.0), point("baselines", "cap", 2.0, 8.0, goodput_with_ttft=1.0)]
    assert held(points, "2") == [False]
    assert held(points, "2+") == [True]


def test_points_of_several_commits_are_said_to_be_so():
    early, late = ours(4.0, 7.0)
    texts = [v.measured for v in verdicts([early, late | {"commit": "d"}])]
    assert all("several commits: c, d" in text for text in texts)
    assert not any("several" in v.measured for v in verdicts([early, late]))


def burst(**changes):
    found = {
        "ttft_before_ms": 70.0, "ttft_after_ms": 80.0, "recovery_s": 2.0, "usual_ttft_ms": 200.0
    }  # fmt: skip
    return {"part": "burst", "good": 9, "judged": 9, "burst": found | changes}


@pytest.mark.parametrize(
    ("changes", "is_held"),
    [({}, True), ({"recovery_s": 5.1}, False), ({"ttft_after_ms": None}, False)],
)
def test_a_burst_is_over_when_nobody_waits_longer_than_usual(changes, is_held):
    assert held([burst(**changes)], "3b") == [is_held]
    assert held([burst(), burst(**changes), burst(recovery_s=0.0)], "3b") == [True]
    assert held([burst(), burst(**changes), burst(recovery_s=9.0)], "3b") == [is_held]


def long(**changes):
    found = {
        "all_to_the_end": True, "all_served": True, "p99_gap_ms": 90.0, "num_gaps": 99,
        "num_prompt_tokens": 4000, "read_s": 5.0, "mean_tpot_ms": 40.0, "worst_tpot_ms": 60.0,
        "num_streams": 16,
    }  # fmt: skip
    return {"part": "long", "commit": "c", "tpot_slo_ms": 50.0, "long": found | changes}


@pytest.mark.parametrize(
    ("changes", "are_held"),
    [
        ({}, [True, True]),
        ({"p99_gap_ms": 101.0}, [False, True]),
        ({"mean_tpot_ms": 51.0}, [True, False]),
        ({"all_served": False}, [False, False]),
        ({"all_to_the_end": False}, [False, False]),
    ],
)
def test_beside_a_long_prompt_gaps_and_means_are_those_of_streams_that_saw_all_of_it(
    changes, are_held
):
    assert held([long(**changes)], "4a") + held([long(**changes)], "4b") == are_held


def test_of_several_long_prompts_the_median_gap_counts_and_the_highest_mean():
    several = [long(), long(p99_gap_ms=101.0), long(mean_tpot_ms=51.0)]
    assert held(several, "4a") == [True]
    assert held(several, "4b") == [False]
    assert held([*several, long(p99_gap_ms=120.0), long(p99_gap_ms=130.0)], "4a") == [False]


def test_each_class_of_targets_is_judged_alone_over_all_seeds():
    def classes(*goods):
        return {"part": "mixed", "commit": "c", "classes": [
            {"tpot_ms": target, "completed": 100, "good": good}
            for target, good in zip((20, 50), goods, strict=True)
        ]}  # fmt: skip

    assert held([classes(100, 98), classes(99, 99)], "5") == [True, False]
