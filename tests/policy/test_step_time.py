"""The step-time model finds the costs of a machine from noisy steps, and follows it."""

import random
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest

from afd_server.policy.step_time import (
    REFIT_EVERY,
    STALE_STEPS,
    StepLoad,
    StepTimeModel,
    beside,
    beside_those_of,
)


def true_s(load: StepLoad, speed: float = 1.0) -> float:
    return speed * (
        0.008
        + 0.0012 * load.rows
        + 1.5e-7 * load.keys
        + 0.0009 * load.prefill
        + 1e-7 * load.prefill_keys
        + 0.004 * load.others
        + 0.0004 * load.other_rows
        + 0.0005 * load.other_prefill
        + 0.8e-7 * load.other_prefill_keys
    )


def some_load(rng) -> StepLoad:
    def one() -> StepLoad:
        rows, prefill = rng.randint(0, 20), rng.choice([0, 0, 0, rng.randint(1, 128)])
        keys, prefill_keys = rows * rng.randint(50, 600), prefill * rng.randint(0, 500)
        return StepLoad(rows=rows, keys=keys, prefill=prefill, prefill_keys=prefill_keys)

    return beside_those_of(one(), beside(one() for _ in range(rng.choice([0, 1, 1]))))


def teach(model, rng, steps, speed=1.0, noise=0.1, stalls=0.0):
    for _ in range(steps):
        load = some_load(rng)
        seconds = true_s(load, speed) * rng.lognormvariate(0, noise)
        model.observe(load, seconds + (0.5 if rng.random() < stalls else 0))


def error(model, rng, speed=1.0):
    loads = [some_load(rng) for _ in range(200)]
    ratios = sorted(model.predict(load) / true_s(load, speed) for load in loads)
    return max(abs(ratios[10] - 1), abs(ratios[-11] - 1))


def test_noisy_steps_teach_the_costs():
    rng, model = random.Random(1), StepTimeModel()
    teach(model, rng, 400)
    assert error(model, rng) < 0.1


def test_rare_stalls_hardly_disturb_it():
    rng, model = random.Random(2), StepTimeModel()
    teach(model, rng, 600, stalls=0.01)
    assert error(model, rng) < 0.15


def test_a_machine_that_becomes_slower_is_followed():
    rng = random.Random(3)
    model = calibrated(rng)
    teach(model, rng, 400)
    teach(model, rng, 1200, speed=2.0)
    assert error(model, rng, speed=2.0) < 0.25


def test_quantiles_hold_for_steps_to_come():
    held = Counter()
    for seed in range(4):
        rng, model = random.Random(seed), StepTimeModel()
        teach(model, rng, 500, noise=0.2)
        for quantile, load in product((0.5, 0.9), [some_load(rng) for _ in range(500)]):
            seconds = true_s(load) * rng.lognormvariate(0, 0.2)
            held[quantile] += seconds <= model.predict(load, quantile)
    assert held[0.5] / 2000 == pytest.approx(0.5, abs=0.05)
    assert held[0.9] / 2000 == pytest.approx(0.9, abs=0.05)


def test_a_steady_load_says_nothing_of_others_but_more_work_never_takes_less():
    model, load = StepTimeModel(), StepLoad(rows=8, keys=2000, other_rows=8)
    for _ in range(500):
        model.observe(load, 0.03)
    assert model.predict(load) == pytest.approx(0.03, rel=0.05)
    for more in (
        StepLoad(rows=9, keys=2000, other_rows=8),
        StepLoad(rows=8, keys=4000, other_rows=8),
        StepLoad(rows=8, keys=2000, prefill=64, prefill_keys=4096, other_rows=8),
        StepLoad(rows=8, keys=2000, other_rows=12, other_prefill=64),
        StepLoad(rows=8, keys=2000, other_rows=8, other_prefill_keys=4096),
    ):
        assert model.predict(more) >= model.predict(load)
    prefilling = StepLoad(rows=8, keys=2000, prefill=128, other_rows=8)
    assert model.predict(prefilling) > 0.1, "what was never seen is as slow as the prior says"


def test_before_the_first_step_the_prediction_is_the_prior():
    assert StepTimeModel().predict(StepLoad()) == pytest.approx(0.01)
    assert StepTimeModel().predict(StepLoad(prefill=128)) == pytest.approx(0.10)


CALIBRATION = (
    StepLoad(rows=1, keys=200),
    StepLoad(rows=16, keys=3200),
    StepLoad(prefill=128, prefill_keys=8192),
    StepLoad(prefill=128, prefill_keys=128 * 1024),
)


TOGETHER = (
    StepLoad(rows=2, keys=400, others=1, other_rows=2),
    StepLoad(rows=8, keys=1600, others=1, other_rows=8),
)


def test_steps_that_others_made_quicker_cost_these_nothing():
    """Alone, something held the small steps up the longest; beside another, nothing did."""
    model = StepTimeModel()
    few, many = (StepLoad(rows=n, keys=200 * n) for n in (2, 32))
    together = [replace(load, others=1, other_rows=load.rows) for load in (few, many)]
    prompt = StepLoad(prefill=512, prefill_keys=131072)
    alone = [(few, 0.03), (many, 0.02), (prompt, 0.01)]
    model.calibrate([*alone, *zip(together, (0.002, 0.004), strict=True)])
    assert model.predict(together[1]) == pytest.approx(model.predict(many))


def calibrated(rng) -> StepTimeModel:
    model = StepTimeModel()
    model.calibrate((load, true_s(load) * rng.lognormvariate(0, 0.03)) for load in CALIBRATION * 2)
    return model


def test_a_calibration_is_known_at_once():
    model = calibrated(random.Random(5))
    for load in (*CALIBRATION, StepLoad(rows=8, keys=1600), StepLoad(rows=4, prefill=64)):
        assert model.predict(load) == pytest.approx(true_s(load), rel=0.15)


def test_what_steps_cost_each_other_is_known_at_once_where_it_was_timed():
    model = StepTimeModel()
    model.calibrate((load, true_s(load)) for load in (*CALIBRATION, *TOGETHER))
    for rows in (1, 4, 12):
        load = StepLoad(rows=rows, keys=200 * rows, others=1, other_rows=rows)
        assert model.predict(load) == pytest.approx(true_s(load), rel=0.1)


def test_who_fills_every_step_to_the_same_time_still_knows_what_a_row_costs():
    """Such steps all take the same, whatever is in them: they could be all constant."""
    rng = random.Random(6)
    model = calibrated(rng)
    rows = 8
    for _ in range(20_000):
        rows = max(2, min(16, rows + rng.choice([-1, 0, 0, 1])))
        load = StepLoad(rows=rows, keys=rows * 250, others=1, other_rows=rows)
        prefill = 0
        while model.predict(replace(load, prefill=prefill + 1), 0.75) < 0.045:
            prefill += 1
        load = replace(load, prefill=prefill, prefill_keys=prefill * 100)
        model.observe(load, true_s(load) * rng.lognormvariate(0, 0.05))
    alone = StepLoad(rows=1, keys=256)
    assert model.predict(alone) == pytest.approx(true_s(alone), rel=0.35)
    full = StepLoad(rows=24, keys=24 * 250, others=1, other_rows=24)
    assert model.predict(full) == pytest.approx(true_s(full), rel=0.2)


def test_a_slower_machine_is_noticed_within_some_steps():
    rng = random.Random(7)
    model = calibrated(rng)
    teach(model, rng, 300)
    teach(model, rng, 60, speed=1.5)
    assert error(model, rng, speed=1.5) < 0.25


@pytest.mark.parametrize("speed", [0.3, 3.0])
def test_a_calibration_at_another_pace_does_not_put_all_of_a_step_on_some_of_it(speed):
    """Prompts are seen less than rows: held to what they took then, they would explain it all."""
    rng = random.Random(10)
    model = calibrated(rng)
    decoding = StepLoad(rows=20, keys=4000, others=1, other_rows=20, other_prefill=60)
    reading = replace(decoding, prefill=60, prefill_keys=6000, other_prefill=0)
    for number in range(400):
        rows = 8 + number // 20
        for load in (decoding, reading):
            load = replace(load, rows=rows, keys=200 * rows, other_rows=rows)
            model.observe(load, true_s(load, speed) * rng.lognormvariate(0, 0.1))
    for load in (decoding, reading):
        assert model.predict(load) == pytest.approx(true_s(load, speed), rel=0.15)
    alone = StepLoad(rows=20, keys=4000)
    assert model.predict(alone) == pytest.approx(true_s(alone, speed), rel=0.3)


def test_a_long_prompt_takes_as_long_for_the_lane_beside_it():
    """Else the speed would rise for what only some steps take longer, and with it all limits."""
    rng = random.Random(12)
    model = calibrated(rng)
    for start in range(0, 4000, 16):
        keys = 16 * (start + 8)
        beside = StepLoad(rows=9, keys=2700, others=1, other_rows=7, other_prefill=16,
                          other_prefill_keys=keys)  # fmt: skip
        reading = StepLoad(rows=7, keys=2100, prefill=16, prefill_keys=keys, others=1, other_rows=9)
        for load in (beside, reading):
            model.observe(load, true_s(load) * rng.lognormvariate(0, 0.1))
    for load in (beside, reading):
        assert model.predict(load) == pytest.approx(true_s(load), rel=0.1)
    assert model.slowness == pytest.approx(1.0, abs=0.1)


def test_steps_that_take_no_time_at_all_are_taken_in():
    model = StepTimeModel()
    for rows in range(500):
        model.observe(StepLoad(rows=rows % 20), 0.0)
    assert 0 <= model.predict(StepLoad(rows=20)) < 0.001


def test_a_crowded_machine_leaves_no_belief_that_lanes_hold_each_other_up_for_good():
    """Nobody would use a second lane again, and so nobody would find out."""
    rng, model = random.Random(8), StepTimeModel()
    teach(model, rng, 300)
    alone, beside = StepLoad(rows=1, keys=256), StepLoad(rows=1, keys=256, others=1, other_rows=1)
    for _ in range(400):  # something else takes the cores
        model.observe(beside, 6 * true_s(beside) * rng.lognormvariate(0, 0.1))
        model.observe(alone, 2 * true_s(alone) * rng.lognormvariate(0, 0.1))
    for _ in range(STALE_STEPS + 5 * REFIT_EVERY):  # it has gone, and there is a single lane now
        model.observe(alone, true_s(alone) * rng.lognormvariate(0, 0.1))
    assert model.predict(alone) == pytest.approx(true_s(alone), rel=0.25)
    assert model.predict(beside) <= 1.7 * model.predict(alone)


def test_a_trial_of_some_steps_shows_that_a_lane_for_all_is_quicker():
    """Where the calibration saw the opposite, and nobody runs alone otherwise."""
    rng, model = random.Random(9), StepTimeModel()
    alone, beside = StepLoad(rows=2, keys=400), StepLoad(rows=1, keys=200, others=1, other_rows=1)
    model.calibrate([(alone, 0.026), (beside, 0.023)] * 3)
    for _ in range(100):
        model.observe(beside, 0.024 * rng.lognormvariate(0, 0.1))
    assert model.predict(alone) > model.predict(beside)
    for _ in range(8):
        model.observe(alone, 0.016 * rng.lognormvariate(0, 0.1))
    for _ in range(20):
        model.observe(beside, 0.024 * rng.lognormvariate(0, 0.1))
    assert model.predict(alone) < model.predict(beside)
    assert model.predict(beside) == pytest.approx(0.024, rel=0.15)
