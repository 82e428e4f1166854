"""Caches: keys and values that grow, states that do not."""

import dataclasses

import pytest
import torch

from fulmen.config import UserError
from fulmen.model import LanguageModel
from fulmen.model.cache import Cache, KeyValues, LightningState


def test_one_cache_a_layer_of_the_layers_kind(config):
    cache = Cache(config, 3)
    kinds = {"L": LightningState, "S": KeyValues}
    assert [type(layer) for layer in cache.layers] == [kinds[kind] for kind in config.layers]
    assert (cache.batch_size, cache.length) == (3, 0)


def test_keys_and_values_of_all_tokens_come_back_in_order():
    cache, keys, values = KeyValues(), [], []
    for length in (1, 70, 1, 1, 300, 2, 1, 1000):
        keys.append(torch.randn(2, length, 3, 4))
        values.append(torch.randn(2, length, 3, 4))
        k, v = cache.append(keys[-1], values[-1])
        assert torch.equal(k, torch.cat(keys, dim=1))
        assert torch.equal(v, torch.cat(values, dim=1))
    assert cache.length == 1376


def test_a_buffer_moves_seldom_and_keeps_the_dtype():
    cache, buffers = KeyValues(), []
    for _ in range(1000):
        keys, _ = cache.append(*torch.zeros(2, 1, 1, 2, 4, dtype=torch.bfloat16))
        if not buffers or keys.data_ptr() != buffers[-1].data_ptr():
            # Kept alive, so that no two buffers can have the same address.
            buffers.append(keys)
    assert keys.dtype == torch.bfloat16
    assert len(buffers) <= 6


def test_room_for_a_prompt_is_made_at_once():
    cache = KeyValues()
    cache.append(torch.zeros(1, 500, 2, 4), torch.zeros(1, 500, 2, 4))
    buffer = cache.keys
    cache.append(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))
    assert cache.keys is buffer


@torch.no_grad()
def test_a_lightning_state_does_not_grow(config, model):
    cache = model.new_cache(2)
    for length in (1, 50, 1):
        model(torch.randint(61, (2, length)), cache=cache)
        state = cache.layers[0].state
        assert state.shape == (2, config.num_heads, config.head_dim, config.head_dim)
        assert state.dtype == torch.float32
    assert cache.length == 52
    assert cache.layers[2].length == 52


@torch.no_grad()
def test_a_cache_is_for_its_model(config, model):
    cache = LanguageModel(dataclasses.replace(config, num_layers=6)).new_cache(1)
    with pytest.raises(UserError, match="a model of another configuration"):
        model(torch.ones(1, 1, dtype=torch.int64), cache=cache)
    equal = LanguageModel(dataclasses.replace(config)).new_cache(1)
    model(torch.ones(1, 1, dtype=torch.int64), cache=equal)
