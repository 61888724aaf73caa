"""How many groups, shards and replicas each way to spread FFNs makes, and who holds what."""

from dataclasses import replace

import pytest

from afd_server.core.errors import ConfigError
from afd_server.core.model_spec import read_model_spec
from afd_server.core.topology import FFNParallel, Role
from afd_server.workers.config import dense_place, ffn_config, head_place, placement_of
from support.checkpoints import tiny_llama
from support.experts import tiny_routed
from support.families import family


@pytest.mark.parametrize(
    ("parallel", "num_workers", "shards_groups_replicas"),
    [
        (FFNParallel.TENSOR, 4, (4, 1, 1)),
        (FFNParallel.REPLICATE, 4, (1, 4, 4)),
        (FFNParallel.EXPERT, 4, (1, 4, 3)),
        (FFNParallel.HYBRID, 6, (2, 3, 3)),
        (FFNParallel.COLOCATED, 0, (1, 1, 1)),
    ],
)
def test_workers_make_groups_of_shards(parallel, num_workers, shards_groups_replicas):
    config = ffn_config(parallel, num_workers, num_replicas=3, num_shards=2)
    assert (config.num_parts, config.num_groups, config.num_replicas) == shards_groups_replicas
    if num_workers:
        assert config.num_parts * config.num_groups == num_workers


@pytest.mark.parametrize(
    ("setting", "num_attention", "num_ffn", "num_shards", "is_native", "place"),
    [
        ("auto", 1, 1, 1, True, (Role.FFN, True)),
        ("auto", 2, 3, 1, True, (Role.FFN, True)),
        ("auto", 2, 1, 1, True, (Role.FFN, False)),  # FFN workers have less time to wait
        ("auto", 1, 2, 2, True, (Role.FFN, False)),
        ("auto", 1, 1, 1, False, (Role.FFN, False)),
        ("auto", 2, 0, 1, True, (Role.FFN, False)),
        ("both", 2, 1, 1, True, (Role.FFN, True)),
        ("ffn", 1, 1, 1, True, (Role.FFN, False)),
        ("attention", 1, 1, 1, True, (Role.ATTENTION, False)),
    ],
)
def test_both_sides_compute_dense_layers_where_it_pays(
    setting, num_attention, num_ffn, num_shards, is_native, place
):
    assert dense_place(setting, num_attention, num_ffn, num_shards, is_native) == place


@pytest.mark.parametrize("shape", [(1, 1, 1, False), (1, 2, 2, True), (1, 0, 1, True)])
def test_both_sides_cannot_compute_what_is_cut_or_left_to_python(shape):
    with pytest.raises(ConfigError, match="needs workers on one host"):
        dense_place("both", *shape)


@pytest.fixture(scope="module")
def spec():
    return read_model_spec(tiny_routed("qwen3_moe", dense_layers=(0, 2))[0])


ALL = tuple(range(8))


def test_dense_layers_are_held_by_the_pool_that_the_setting_names(spec):
    config = ffn_config(FFNParallel.TENSOR, 2)
    placement = placement_of(config, spec)
    assert placement.experts_of(0) == placement.experts_of(1) == ((0,), ALL, (0,), ())
    assert placement.held_by(placement.attention_side) == ((), (), (), (0,))
    placement = placement_of(replace(config, dense_layers=Role.ATTENTION), spec)
    assert placement.experts_of(0) == placement.experts_of(1) == ((), ALL, (), ())
    assert placement.held_by(placement.attention_side) == ((0,), (), (0,), (0,))


def test_shared_experts_are_held_where_dense_layers_are():
    spec = read_model_spec(family("step3_text").directory)
    shared, chosen = spec.experts.num_experts, tuple(range(spec.experts.num_experts))
    config = ffn_config(FFNParallel.TENSOR, 2)
    for dense_layers, at_attention in [(Role.FFN, ()), (Role.ATTENTION, (shared,))]:
        placement = placement_of(replace(config, dense_layers=dense_layers), spec)
        layers = placement.held_by(placement.attention_side)[: spec.num_layers]
        routed = [held for held, r in zip(layers, spec.experts.is_routed, strict=True) if r]
        assert routed == [at_attention] * sum(spec.experts.is_routed)
    at_ffn = [h for h, r in zip(placement.experts_of(0), spec.experts.is_routed, strict=False) if r]
    assert at_ffn == [chosen] * sum(spec.experts.is_routed)


def test_with_hot_experts_the_others_have_one_holder_and_dense_layers_keep_theirs(spec):
    config = ffn_config(FFNParallel.EXPERT, 4, num_replicas=3)
    dense, routed, *_ = placement_of(replace(config, hot_experts=((1, 2), (1, 5))), spec).holders
    assert [len(groups) for groups in routed] == [1, 1, 3, 1, 1, 3, 1, 1]
    assert [len(groups) for groups in dense] == [3]


def test_the_head_comes_behind_the_layers_and_is_held_by_the_pool_that_the_setting_names(spec):
    config = replace(ffn_config(FFNParallel.EXPERT, 3, num_replicas=2), lm_head=Role.FFN)
    placement = placement_of(config, spec)
    assert placement.held_by(placement.attention_side) == ((), (), (), ())
    assert [placement.experts_of(slot)[-1] for slot in range(3)] == [(0,), (0,), ()]


def test_colocated_workers_hold_everything(spec):
    config = replace(ffn_config(FFNParallel.COLOCATED, 0), lm_head=Role.FFN)
    placement = placement_of(config, spec)
    assert placement.held_by(placement.attention_side) == ((0,), ALL, (0,), (0,))


@pytest.mark.parametrize(
    ("setting", "num_attention", "num_ffn", "is_near", "expected"),
    [
        ("auto", 1, 1, True, (Role.FFN, True)),
        ("auto", 1, 3, True, (Role.FFN, True)),
        ("auto", 2, 1, True, (Role.ATTENTION, False)),
        ("auto", 1, 1, False, (Role.ATTENTION, False)),
        ("auto", 1, 0, True, (Role.ATTENTION, False)),
        ("both", 2, 1, False, (Role.FFN, True)),
        ("ffn", 1, 1, True, (Role.FFN, False)),
        ("attention", 1, 1, True, (Role.ATTENTION, False)),
    ],
)
def test_the_head_is_shared_where_that_was_measured_to_pay(
    setting, num_attention, num_ffn, is_near, expected
):
    assert head_place(setting, num_attention, num_ffn, is_near) == expected


def test_a_shared_head_is_whole_with_every_number_of_shards():
    for config in (
        ffn_config(FFNParallel.TENSOR, 3),
        ffn_config(FFNParallel.REPLICATE, 3),
        ffn_config(FFNParallel.COLOCATED, 0),
    ):
        model = read_model_spec(tiny_llama()[0])
        placement = placement_of(replace(config, lm_head=Role.FFN, shares_head=True), model)
        shards = [placement.head_shard(shard) for shard in range(placement.num_shards)]
        if config.parallel is FFNParallel.COLOCATED:
            assert placement.head_shard(None) == (0, 1)
        else:
            count = config.num_parts + 1
            assert [placement.head_shard(None), *shards] == [(n, count) for n in range(count)]
        assert placement.held_by(placement.attention_side)[-1] == (0,)
