"""What goes ahead of the rest of a step, and that nothing is lost or changed by it."""

from hypothesis import given
from hypothesis import strategies as st

from afd_server.core.batch import PlannedSequence, StepPlan
from afd_server.core.request import SamplingParams
from afd_server.policy.ahead import MIN_ROWS, go_ahead, least_prefill

SAMPLING = SamplingParams(max_tokens=4, temperature=0.0)


def planned(key, count, samples, start=0):
    ids = tuple(range(1000 * key, 1000 * key + count))
    return PlannedSequence(key, 1, ids, start, ((key,),), samples, SAMPLING)


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


def test_a_step_without_enough_prefill_stays_whole():
    assert go_ahead(step(*(planned(key, 1, True) for key in range(100)))) is None
    assert go_ahead(step(planned(1, 2 * MIN_ROWS - 1, True))) is None
    many = [planned(key, 1, True) for key in range(2, 80)]
    assert go_ahead(step(planned(1, MIN_ROWS, True), *many)) is None
    assert go_ahead(step(planned(1, MIN_ROWS + 1, True), *many)) is not None


def test_a_chunk_that_samples_nothing_may_go_ahead_whole():
    ahead, rest = go_ahead(step(planned(1, 40, False), planned(2, 60, True)))
    assert [(p.key, len(p.token_ids)) for p in ahead.sequences] == [(1, 40), (2, 10)]
    assert [(p.key, len(p.token_ids), p.start) for p in rest.sequences] == [(2, 50, 10)]


@given(num_decoding=st.integers(0, 80), num_tokens=st.integers(2, 120))
def test_the_least_prefill_of_a_step_in_two_parts_is_known_beforehand(num_decoding, num_tokens):
    decoding = [planned(key, 1, True) for key in range(2, 2 + num_decoding)]
    is_cut = go_ahead(step(planned(1, num_tokens, True), *decoding)) is not None
    assert is_cut == (num_tokens >= least_prefill(num_decoding))


@given(
    st.lists(
        st.tuples(st.integers(1, 80), st.booleans(), st.integers(0, 300)), min_size=1, max_size=12
    )
)
def test_every_row_is_computed_once_and_sampled_where_it_was(drawn):
    plan = step(*(planned(key, *sequence) for key, sequence in enumerate(drawn)))
    parts = go_ahead(plan)
    if parts is None:
        return
    ahead, rest = parts
    assert rows(ahead) | rows(rest) == rows(plan)
    assert ahead.num_tokens + rest.num_tokens == plan.num_tokens
    assert MIN_ROWS <= ahead.num_tokens <= rest.num_tokens
    assert not any(sequence.samples for sequence in ahead.sequences)
    assert [p.key for p in rest.sequences if p.samples] == [
        p.key for p in plan.sequences if p.samples
    ]
    begins = {p.key: p.start for p in rest.sequences}
    for sequence in ahead.sequences:  # what goes ahead of a sequence is its beginning
        stop = sequence.start + len(sequence.token_ids)
        assert begins.get(sequence.key, stop) == stop
