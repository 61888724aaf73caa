"""The memory of the blocks is what the model's spec says a token takes."""

import torch

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
