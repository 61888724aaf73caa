"""Whoever holds the experts and in whatever order they answer: the same bits."""

import functools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afd_server.core.topology import Placement
from afd_server.models.base import FFNCall, FFNShare
from afd_server.models.catalogue import ARCHITECTURES
from afd_server.models.forward import add_in_part_order
from afd_server.models.routing import RoutedRows, choose_experts, experts_of, join
from afd_server.weights.checkpoint import Checkpoint
from afd_server.weights.packed import PackedWeights
from afd_server.workers.attention.shares import cut, put_together
from afd_server.workers.config import Numerics
from afd_server.workers.runtime import select_kernels
from afd_server.workers.tensors import row_dtype
from support.experts import tiny_routed
from support.monolith import load_halves
from support.pools import EXACT

LAYER, EXPERTS, CHOSEN = 1, 8, 2
NUMERICS = [
    EXACT,
    Numerics("reference", "bfloat16", "bfloat16"),
    Numerics("native", "int8", "bfloat16"),
    Numerics("native", "float32", "float32"),
    Numerics("native", "bfloat16", "bfloat16"),
]


@functools.cache
def spec_and_whole(numerics, num_shards):
    spec, _, held = load_halves(tiny_routed("mixtral")[0], numerics, num_shards)
    return spec, held


@functools.cache
def half_of(numerics, shard, num_shards, experts):
    """Return the FFN half with these experts of every layer."""
    directory, _ = tiny_routed("mixtral")
    spec, kernels = spec_and_whole(numerics, num_shards)[0], select_kernels(numerics)
    weights = PackedWeights(Checkpoint(directory, row_dtype(numerics)), kernels, None)
    share = FFNShare(shard, num_shards, (experts,) * spec.num_layers)
    return ARCHITECTURES["mixtral"].ffn(spec, weights, kernels, share)


def call_of(numerics, logits):
    """Return a call whose gate gave these logits."""
    generator = torch.Generator().manual_seed(logits.shape[0])
    rows = torch.randn(logits.shape[0], 96, generator=generator).to(row_dtype(numerics))
    rows = select_kernels(numerics).prepare(rows)
    choice = choose_experts(logits, spec_and_whole(numerics, 1)[0].experts)
    return FFNCall(LAYER, join(RoutedRows(rows, *choice)), CHOSEN)


def random_logits(tokens):
    return torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(tokens))


def sum_over(call, placement, numerics, rng):
    """Compute a call under a placement: holders at random, workers in random order."""
    group_of = [rng.choice(groups) for groups in placement.holders[LAYER]]
    shares = cut(call, group_of)
    assert shares is not None
    asked = [
        (i, shard)
        for i, share in enumerate(shares)
        for shard in range(num_shards(placement, share))
    ]
    rng.shuffle(asked)
    answers = {}
    for i, shard in asked:
        share = shares[i]
        held = placement.held_by(share.group)[LAYER]
        half = half_of(numerics, shard, num_shards(placement, share), held)
        answers[i, shard] = half.partial_sum(LAYER, share.rows)
        assert answers[i, shard].shape == (share.num_answers, 96)
    by_share = [
        [answers[i, shard] for shard in range(num_shards(placement, share))]
        for i, share in enumerate(shares)
    ]
    return put_together(call, shares, by_share)


def num_shards(placement, share):
    return 1 if share.group == placement.attention_side else placement.num_shards


@st.composite
def placements(draw):
    """Return any placement, of whole experts also with some at the attention side."""
    num_groups, num_shards = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2]))
    groups = st.sets(st.integers(0, num_groups - 1), min_size=1).map(sorted).map(tuple)
    if num_shards == 1:
        groups |= st.just((num_groups,))
    layer = st.lists(groups, min_size=EXPERTS, max_size=EXPERTS).map(tuple)
    return Placement((draw(layer),) * 3, num_groups, num_shards)


@pytest.mark.parametrize("numerics", NUMERICS, ids=lambda n: f"{n.kernels}-{n.weights}")
@settings(deadline=None, max_examples=40)  # halves are loaded on the way
@given(placement=placements(), tokens=st.integers(1, 20), rng=st.randoms())
def test_any_placement_replica_and_order_of_answers_gives_the_bits_of_the_whole(
    numerics, placement, tokens, rng
):
    call = call_of(numerics, random_logits(tokens))
    _, whole = spec_and_whole(numerics, placement.num_shards)
    expected = add_in_part_order([held.answer(LAYER, call.rows) for held in whole])
    assert torch.equal(sum_over(call, placement, numerics, rng), expected)


ONE_EACH = Placement((tuple((expert,) for expert in range(EXPERTS)),) * 3, EXPERTS)


def test_only_groups_with_a_chosen_expert_are_asked_and_only_for_its_rows():
    logits = torch.full((5, EXPERTS), -9.0)
    logits[:, 3] = logits[0, 1] = logits[1:, 6] = 9.0
    call = call_of(EXACT, logits)
    shares = cut(call, range(EXPERTS))
    assert [(share.group, share.rows.shape[0]) for share in shares] == [(1, 1), (3, 5), (6, 4)]
    for share in shares:
        assert set(experts_of(share.rows, CHOSEN).flatten().tolist()) <= {share.group, -1}


def test_one_token_and_all_tokens_on_the_same_experts_give_the_bits_of_the_whole():
    for tokens in (1, 33):
        logits = torch.zeros(tokens, EXPERTS)
        logits[:, 5] = logits[:, 2] = 4.0
        call = call_of(EXACT, logits)
        expected = spec_and_whole(EXACT, 1)[1][0].answer(LAYER, call.rows)
        assert torch.equal(sum_over(call, ONE_EACH, EXACT, random.Random(1)), expected)


def test_an_expert_of_the_attention_side_is_not_cut_and_added_with_the_first_shard():
    logits = torch.zeros(5, EXPERTS)
    logits[:, 2] = logits[:, 5] = 4.0
    call = call_of(EXACT, logits)
    holders = tuple((1,) if expert == 5 else (0,) for expert in range(EXPERTS))
    remote, own = cut(call, [groups[0] for groups in holders])
    shards = [half_of(EXACT, s, 2, (2,)).partial_sum(LAYER, remote.rows) for s in (0, 1)]
    whole = half_of(EXACT, 0, 1, (5,)).partial_sum(LAYER, own.rows)
    expected = add_in_part_order([add_in_part_order([shards[0], whole]), shards[1]])
    placement = Placement((holders,) * 3, num_groups=1, num_shards=2)
    assert torch.equal(sum_over(call, placement, EXACT, random.Random(2)), expected)


def test_a_call_for_one_group_travels_as_it_is():
    call = call_of(EXACT, random_logits(7))
    (share,) = cut(call, [4] * EXPERTS)
    assert share.rows is call.rows
    assert (share.group, share.num_answers) == (4, 7)


def test_a_call_is_not_cut_while_nobody_holds_an_expert_that_it_wants():
    logits = torch.zeros(3, EXPERTS)
    logits[:, 5] = logits[:, 2] = 4.0
    call = call_of(EXACT, logits)
    assert cut(call, [0, 1, 2, 3, 4, None, 6, 7]) is None
    assert cut(call, [None, 0, 0, 1, 1, 1, 1, None]) is not None


def test_a_dense_call_goes_whole_to_its_one_holder():
    call = FFNCall(0, torch.ones(3, 96))
    (share,) = cut(call, [2])
    assert (share.group, share.num_answers, share.rows is call.rows) == (2, 3, True)
    assert cut(call, [None]) is None
