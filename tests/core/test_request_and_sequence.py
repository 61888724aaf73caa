"""Requests hold together from the start; sequences say how far they have come."""

import pytest

from afd_server.core.batch import PlannedSequence, StepPlan
from afd_server.core.errors import AFDError, InvalidRequest, Overloaded, ProtocolError
from afd_server.core.request import SLO, FinishReason, Request, SamplingParams
from afd_server.core.sequence import BlockTable, Sequence, SequenceState
from afd_server.core.stage import StageId

GREEDY = SamplingParams(max_tokens=4, temperature=0.0)


@pytest.mark.parametrize(
    ("field", "wrong", "right"),
    [
        ("max_tokens", [0, -1], [1, 2**31]),
        ("temperature", [-0.1], [0, 0.0, 100.0]),
        ("top_p", [0, -0.5, 1.1], [1e-9, 1]),
        ("top_k", [-1], [0, 1]),
        ("min_p", [-0.1, 1.1], [0, 1]),
        ("top_n_sigma", [-0.1], [0, 1.0, 9.5]),
        ("min_k", [-0.1], [0, 3.0, 100.0]),
        ("guard_window", [-1, 1, 65], [0, 2, 64]),
        ("seed", [-1, 2**63], [0, 2**63 - 1]),
    ],
)
def test_sampling_parameters_out_of_range_are_a_broken_promise(field, wrong, right):
    for value in wrong:
        with pytest.raises(AssertionError, match=f"{field} is {value}"):
            SamplingParams(**{"max_tokens": 1, field: value})
    for value in right:
        assert SamplingParams(**{"max_tokens": 1, field: value})


def test_a_request_needs_a_prompt():
    with pytest.raises(AssertionError, match="at least one prompt token"):
        Request(1, (), GREEDY)


def test_a_request_with_all_its_tokens_is_over():
    assert Request(1, (5,), GREEDY, emitted_ids=(6, 6, 6))
    with pytest.raises(AssertionError, match="nothing is left"):
        Request(1, (5,), GREEDY, emitted_ids=(6, 6, 6, 6))


def test_with_guard_a_request_has_an_entropy_for_each_emitted_token():
    guarded = SamplingParams(max_tokens=4, guard_window=2)
    for params, entropies in [(guarded, ()), (GREEDY, (0.5,))]:
        with pytest.raises(AssertionError, match="entropies for"):
            Request(1, (5,), params, emitted_ids=(6,), emitted_entropies=entropies)
    request = Request(1, (5, 6), guarded, emitted_ids=(6,), emitted_entropies=(0.5,))
    sequence = Sequence(request, arrival=0, arrived_s=0.0)
    sequence.num_computed = 3
    sequence.append(9, 0.0, entropy=1.5)
    assert sequence.history.counts == {5: 1, 6: 2, 9: 1}
    assert sequence.history.entropies == [0.5, 1.5]
    assert Sequence(Request(1, (5,), GREEDY), arrival=0, arrived_s=0.0).history is None


def test_a_request_begins_with_its_first_attempt_and_no_targets():
    request = Request(1, (5,), GREEDY)
    assert (request.attempt, request.emitted_ids, request.slo) == (1, (), SLO(None, None))


def test_the_finish_reasons_on_the_wire_do_not_change():
    assert [int(reason) for reason in FinishReason] == [1, 2, 3, 4, 5]
    assert FinishReason.STOP == 1
    assert FinishReason.LENGTH == 2
    assert FinishReason.CANCELLED == 3
    assert FinishReason.REFUSED == 5


def test_a_sequence_prefills_what_earlier_attempts_emitted():
    sequence = Sequence(
        Request(1, (5, 6), GREEDY, attempt=2, emitted_ids=(7,)), arrival=3, arrived_s=5.0
    )
    assert sequence.token_ids == [5, 6, 7]
    assert (sequence.num_pending, sequence.num_emitted) == (3, 1)
    assert sequence.state is SequenceState.WAITING
    assert sequence.arrival == 3


def test_a_sampled_token_is_pending_until_it_is_computed():
    sequence = Sequence(Request(1, (5, 6), GREEDY), arrival=0, arrived_s=0.0)
    sequence.num_computed = 2
    sequence.append(9, 7.0)
    assert (sequence.num_pending, sequence.num_emitted) == (1, 1)
    assert (sequence.first_token_s, sequence.num_since_first) == (7.0, 1)
    with pytest.raises(AssertionError, match="before all others were computed"):
        sequence.append(10, 8.0)


def test_a_preempted_sequence_gives_its_blocks_back_and_keeps_its_tokens():
    sequence = Sequence(Request(1, (5, 6), GREEDY), arrival=0, arrived_s=0.0)
    sequence.state, sequence.num_computed = SequenceState.RUNNING, 2
    sequence.tables[0].block_ids += [4, 2]
    sequence.append(9, 7.0)
    assert sequence.forget_computed() == [4, 2]
    assert sequence.forget_computed() == []
    assert (sequence.num_pending, sequence.state) == (3, SequenceState.WAITING)
    assert sequence.token_ids == [5, 6, 9]


def test_a_sequence_gives_back_what_it_owns_in_every_table_and_no_more():
    sequence = Sequence(Request(1, (5, 6), GREEDY), arrival=0, arrived_s=0.0, num_tables=2)
    sequence.tables[0].block_ids += [4, 2, 7]
    sequence.tables[1].block_ids += [4, 4, 9]
    sequence.tables[1].num_left = 2
    assert sequence.release() == [4, 2, 7, 9]
    assert sequence.tables == [BlockTable(), BlockTable()]


def test_a_plan_counts_its_rows():
    chunks = [(1, 2, 3), (4,)]
    sequences = tuple(
        PlannedSequence(key, 1, tokens, 0, ((0,),), samples=True, sampling=GREEDY)
        for key, tokens in enumerate(chunks)
    )
    assert StepPlan(1, 0, sequences).num_tokens == 4
    assert StepPlan(1, 0, ()).num_tokens == 0


def test_stages_are_ordered_as_they_are_run():
    assert StageId(1, 0, 2) < StageId(1, 1, 0) < StageId(2, 0, 0)


def test_errors_carry_what_their_handlers_need():
    assert InvalidRequest("too long", param="prompt").param == "prompt"
    assert InvalidRequest("too long").param is None
    assert Overloaded("full", 2.0, "queue_full").retry_after_s == 2.0
    assert ProtocolError("bits differ", "crc").reason == "crc"
    assert all(str(e) == "x" for e in (InvalidRequest("x"), Overloaded("x", 1, "y"), AFDError("x")))
