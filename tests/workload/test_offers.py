"""Offers follow from a seed; what is asked of them changes nothing else."""

from itertools import islice, repeat

import pytest

from afd_server.core.errors import ConfigError
from afd_server.core.request import SLO
from afd_server.workload.lengths import UniformLengths
from afd_server.workload.offers import (
    Clients,
    PromptPart,
    make_offers,
    parse_targets,
    synthetic_shapes,
    trace_shapes,
)
from afd_server.workload.trace import TraceEntry

VOCABULARY = range(100, 40000)


def shapes(seed="0", count=50, **prefixes):
    lengths = UniformLengths(5, 50), UniformLengths(1, 9)
    return list(islice(synthetic_shapes(*lengths, seed, **prefixes), count))


def tokens(shape):
    return tuple(token for part in shape.prompt for token in part.token_ids(VOCABULARY))


def offers(clients, count=2000):
    return list(make_offers(repeat(None), shapes(count=count), clients, "0"))


def test_a_seed_repeats_shapes_and_another_one_gives_others():
    assert list(map(tokens, shapes("1"))) == list(map(tokens, shapes("1")))
    assert not set(map(tokens, shapes("1"))) & set(map(tokens, shapes("2")))


def test_prompts_have_their_length_their_vocabulary_and_no_equals():
    prompts = list(map(tokens, shapes()))
    assert [len(prompt) for prompt in prompts] == [s.num_input_tokens for s in shapes()]
    assert len(set(prompts)) == 50
    assert all(token in VOCABULARY for prompt in prompts for token in prompt)


def test_prefixes_are_shared_and_leave_the_own_parts_as_they_were():
    found = shapes(prefix_tokens=16, num_prefixes=3)
    assert len({tokens(shape)[:16] for shape in found}) == 3
    assert [shape.prompt[-1] for shape in found] == [shape.prompt[-1] for shape in shapes()]


def test_blocks_of_a_trace_with_the_same_id_have_the_same_tokens():
    entries = [TraceEntry(0, 20, 3, (7, 8, 9)), TraceEntry(1, 18, 4, (7, 8)), TraceEntry(2, 5, 1)]
    first, second, third = map(tokens, trace_shapes(entries, 8, "0"))
    assert (len(first), len(second), len(third)) == (20, 18, 5)
    assert first[:16] == second[:16]
    assert first[16:18] != second[16:]
    assert [shape.num_output_tokens for shape in trace_shapes(entries, 8, "0")] == [3, 4, 1]


def test_targets_come_in_their_proportions_and_without_a_mix_there_are_none():
    found = [offer.slo.tpot_s for offer in offers(Clients(targets=((0.02, 1), (0.05, 3))))]
    assert found.count(0.05) / len(found) == pytest.approx(0.75, abs=0.03)
    assert {offer.slo for offer in offers(Clients())} == {SLO()}


def test_the_asked_share_of_clients_gives_up():
    found = offers(Clients(cancel_share=0.25, cancel_after_s=0.5))
    assert {offer.cancel_after_s for offer in found} == {None, 0.5}
    share = sum(offer.cancel_after_s is not None for offer in found) / len(found)
    assert share == pytest.approx(0.25, abs=0.03)


def test_offers_end_with_their_times():
    assert [offer.at_s for offer in make_offers([1.0, 2.0], shapes(), Clients(), "0")] == [1.0, 2.0]


def test_a_part_is_a_function_of_its_key():
    assert PromptPart("a", 9).token_ids(VOCABULARY) == PromptPart("a", 9).token_ids(VOCABULARY)
    assert PromptPart("a", 9).token_ids(VOCABULARY) != PromptPart("b", 9).token_ids(VOCABULARY)


def test_a_mix_is_read_in_milliseconds():
    assert parse_targets("20:1,50:2.5", "slo_mix") == ((0.02, 1.0), (0.05, 2.5))


@pytest.mark.parametrize("text", ["", "20", "20:1,", "a:b", "0:1", "20:0", "nan:1", "20:1:2"])
def test_another_mix_is_refused(text):
    with pytest.raises(ConfigError, match="slo_mix is .* as in 20:1,50:2"):
        parse_targets(text, "slo_mix")
