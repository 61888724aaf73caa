"""What goes ahead of the rest of a step, and that nothing is lost or changed by it."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from afd_server.core.batch import PlannedSequence, StepPlan
from afd_server.core.request import SamplingParams
from afd_server.policy.ahead import MIN_ROWS, go_ahead

SAMPLING = SamplingParams(max_tokens=4, temperature=0.0)


def planned(key, count, samples, start=0):
    ids = tuple(range(1000 * key, 1000 * key + count))
    return PlannedSequence(key, 1, ids, start, ((key,),), samples, SAMPLING)


def counts(plan):
    return [(sequence.key, len(sequence.token_ids)) for sequence in plan.sequences]


def step(*sequences):
    return StepPlan(7, 1, sequences)


def rows(plan):
    """Return what is computed at which position of which sequence."""
    return {
        (sequence.key, sequence.start + place): token
        for sequence in plan.sequences
        for place, token in enumerate(sequence.token_ids)
    }


def test_the_first_half_of_a_prompt_goes_ahead():
    ahead, rest = go_ahead(step(planned(1, 100, True, start=16)))
    assert [(len(p.token_ids), p.start, p.samples) for p in ahead.sequences] == [(50, 16, False)]
    assert [(len(p.token_ids), p.start, p.samples) for p in rest.sequences] == [(50, 66, True)]
    assert (ahead.step, ahead.lane, rest.step, rest.lane) == (7, 1, 7, 1)


def test_decoding_sequences_stay_with_the_rest_in_their_order():
    decoding = [planned(key, 1, True, start=40 + key) for key in range(2, 10)]
    plan = step(*decoding[:4], planned(1, 60, True), *decoding[4:])
    ahead, rest = go_ahead(plan)
    assert [p.key for p in ahead.sequences] == [1] and ahead.num_tokens == 34
    assert [p.key for p in rest.sequences] == [2, 3, 4, 5, 1, 6, 7, 8, 9]


def test_half_of_those_that_decode_go_ahead_and_are_sampled_there():
    ahead, rest = go_ahead(step(*(planned(key, 1, True) for key in range(21))))
    assert [(p.key, p.samples) for p in ahead.sequences] == [(key, True) for key in range(10)]
    assert [(p.key, p.samples) for p in rest.sequences] == [(key, True) for key in range(10, 21)]


def test_prompts_go_ahead_before_any_that_decode():
    decoding = [planned(key, 1, True) for key in range(2, 14)]
    ahead, rest = go_ahead(step(*decoding, planned(1, 9, True, start=7)))
    assert counts(ahead) == [(2, 1), (3, 1), (1, 8)]
    assert counts(rest) == [
        *((key, 1) for key in range(4, 14)), (1, 1),
    ]  # fmt: skip


def test_a_step_of_few_rows_or_that_is_to_stay_whole_does():
    assert go_ahead(step(*(planned(key, 1, True) for key in range(2 * MIN_ROWS - 1)))) is None
    assert go_ahead(step(planned(1, 2 * MIN_ROWS - 1, True))) is None
    large = step(planned(1, 2 * MIN_ROWS, True))
    assert go_ahead(large) is not None
    assert go_ahead(replace(large, may_be_cut=False)) is None


def test_a_chunk_that_samples_nothing_may_go_ahead_whole():
    ahead, rest = go_ahead(step(planned(1, 40, False), planned(2, 60, True)))
    assert [(p.key, len(p.token_ids)) for p in ahead.sequences] == [(1, 40), (2, 10)]
    assert [(p.key, len(p.token_ids), p.start) for p in rest.sequences] == [(2, 50, 10)]


@given(
    st.lists(
        st.tuples(st.integers(1, 80), st.booleans(), st.integers(0, 300)), min_size=1, max_size=12
    )
)
def test_every_row_is_computed_once_and_sampled_where_it_was(drawn):
    plan = step(*(planned(key, *sequence) for key, sequence in enumerate(drawn)))
    parts = go_ahead(plan)
    assert (parts is not None) == (plan.num_tokens >= 2 * MIN_ROWS)
    if parts is None:
        return
    ahead, rest = parts
    assert rows(ahead) | rows(rest) == rows(plan)
    assert ahead.num_tokens + rest.num_tokens == plan.num_tokens
    assert MIN_ROWS <= ahead.num_tokens <= rest.num_tokens <= ahead.num_tokens + 1
    sampled = [p.key for p in (*ahead.sequences, *rest.sequences) if p.samples]
    assert sorted(sampled) == [p.key for p in plan.sequences if p.samples]
    begins = {p.key: p.start for p in rest.sequences}
    for sequence in ahead.sequences:  # what goes ahead of a sequence is its beginning
        stop = sequence.start + len(sequence.token_ids)
        assert begins.get(sequence.key, stop) == stop
