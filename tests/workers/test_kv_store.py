"""The memory of the blocks is what the model's spec says a token takes."""

from pathlib import Path

import pytest
import torch

from afd_server.core.kv_groups import KVGroup
from afd_server.core.model_spec import read_model_spec
from afd_server.workers.attention.kv_store import KVStore
from support.families import family


def test_keys_and_values_have_the_shapes_of_their_layer_and_share_nothing():
    spec = read_model_spec(family("qwen3").directory)
    layers = KVStore(spec, num_blocks=5, block_size=4, dtype=torch.bfloat16).layers
    assert len(layers) == spec.num_layers
    for keys, values in layers:
        assert keys.shape == values.shape == (5, 2, 4, 32)
        assert keys.dtype is values.dtype is torch.bfloat16
        assert not keys.any()
        assert not values.any()
    for number, blocks in enumerate(blocks for layer in layers for blocks in layer):
        blocks.fill_(number)
    assert [int(blocks.max()) for layer in layers for blocks in layer] == list(range(6))
    assert sum(blocks.nbytes for layer in layers for blocks in layer) == (
        spec.kv_elements_per_token * 5 * 4 * 2
    )


def test_values_that_are_keys_take_no_memory():
    spec = read_model_spec(family("mfa_kr").directory)
    assert spec.kv_elements_per_token == 4 * 32
    for keys, values in KVStore(spec, num_blocks=5, block_size=4, dtype=torch.float32).layers:
        assert keys.shape == values.shape == (5, 1, 4, 32)
        assert keys.data_ptr() == values.data_ptr()


def test_deepseek_v3_takes_576_elements_of_memory_for_a_token_and_layer():
    spec = read_model_spec(Path(__file__).parents[2] / "configs" / "deepseek-v3")
    store = KVStore(spec, num_blocks=3, block_size=4, dtype=torch.bfloat16)
    storages = {s.data_ptr(): s.nbytes() for layer in store.layers for s in map(storage, layer)}
    assert sum(storages.values()) == 61 * 3 * 4 * 576 * 2


def storage(blocks):
    return blocks.untyped_storage()


def test_latent_attention_caches_the_latent_and_one_rotated_key():
    spec = read_model_spec(family("deepseek_v3").directory)
    store = KVStore(spec, num_blocks=5, block_size=4, dtype=torch.bfloat16)
    for keys, values in store.layers:
        assert keys.shape == (5, 1, 4, 40 + 16)
        assert values.shape == (5, 1, 4, 40)
        keys[2, 0, 1] = torch.arange(56)
        assert values[2, 0, 1].tolist() == list(range(40))
        assert keys.untyped_storage().nbytes() == 5 * 4 * 56 * 2  # and nothing beside


def test_cleared_blocks_are_zero_and_the_others_as_they_were():
    spec = read_model_spec(family("mfa_kr").directory)
    store = KVStore(spec, num_blocks=5, block_size=4, dtype=torch.float32)
    for keys, values in store.layers:
        keys.fill_(1)
        values.fill_(1)
    store.clear([0, 3])
    for blocks in (blocks for layer in store.layers for blocks in layer):
        assert [int(blocks[block].max()) for block in range(5)] == [0, 1, 1, 0, 1]


def test_layers_of_different_groups_share_memory_and_layers_of_one_do_not():
    spec = read_model_spec(family("step3p5").directory)
    groups = (KVGroup((0, 3), None), KVGroup((1, 2), 21))
    store = KVStore(spec, num_blocks=5, block_size=4, dtype=torch.float32, groups=groups)
    assert store.group_of == (0, 1, 1, 0)
    places = [layer.keys.data_ptr() for layer in store.layers]
    assert places[0] == places[1] != places[2] == places[3]
    whole = KVStore(spec, num_blocks=5, block_size=4, dtype=torch.float32)
    assert whole.group_of == (0, 0, 0, 0)
    assert len({layer.keys.data_ptr() for layer in whole.layers}) == 4
    assert spec.kv_slot_bytes("float32") == spec.kv_elements_per_token  # a layer of four, 4 bytes


@pytest.mark.parametrize(
    ("name", "num_vectors", "token_bytes"),
    [("qwen3", 2, 3 * 4 * 36), ("mfa_kr", 1, 4 * 36), ("deepseek_v3", 1, 3 * 60)],
)
def test_int8_takes_a_byte_an_element_and_a_scale_for_each_head(name, num_vectors, token_bytes):
    spec = read_model_spec(family(name).directory)
    layers = KVStore(spec, num_blocks=5, block_size=4, dtype=torch.int8).layers
    assert spec.kv_slot_bytes("int8") == token_bytes
    memory = sum(layer.keys.nbytes for layer in layers)
    memory += sum(layer.values.nbytes for layer in layers) * (num_vectors - 1)
    assert memory == 5 * 4 * token_bytes
