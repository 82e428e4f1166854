"""A model whose projections and experts are int8 computes what its rounded weights say, in every form."""

import copy

import pytest
import torch

from fulmen.checkpoint import load_model, save_model
from fulmen.config import UserError
from fulmen.model import step
from fulmen.model.int8 import NAMES, int8_matrices, quantize_
from fulmen.model.pool import CachePool, PoolBatch
from fulmen.ops import cpu
from fulmen.ops.int8 import Int8


@pytest.fixture
def pair(model):
    """The model in int8, and one of fp32 weights with the same numbers."""
    rounded, same = copy.deepcopy(model), copy.deepcopy(model)
    quantize_(rounded)
    weights = dict(same.named_parameters())
    for name, (module, matrix) in int8_matrices(rounded).items():
        weights[name].data.copy_(Int8(getattr(module, matrix), getattr(module, NAMES[matrix])).dense(torch.float32))
    return rounded, same


def test_what_is_rounded(pair, model):
    int8 = {name for name, parameter in pair[0].named_parameters() if parameter.dtype == torch.int8}
    kept = {"block_sparse_moe.gate", "norm", "embed_tokens", "lm_head"}
    assert int8 == {name for name, _ in model.named_parameters() if not any(part in name for part in kept)}
    assert not any(parameter.requires_grad for parameter in pair[0].parameters())
    tensors = [*pair[0].parameters(), *(buffer for buffer in pair[0].buffers() if buffer.dim() != 1 or len(buffer) > 4)]
    assert sum(tensor.nbytes for tensor in tensors) == model.config.weight_bytes("int8", rest="float32")


@pytest.mark.parametrize("length", [5, 150])
def test_forward(pair, length):
    rounded, same = pair
    tokens = torch.randint(61, (2, length))
    with torch.no_grad():
        torch.testing.assert_close(rounded(tokens), same(tokens), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rounded(tokens), same(tokens).detach(), rtol=1e-5, atol=1e-5)  # gradients recorded


@torch.inference_mode()
def test_decoding_in_one_call(pair, monkeypatch):
    rounded, same = pair
    tokens, cache = torch.randint(61, (3, 20)), rounded.new_cache(3)
    out = [rounded(column, cache=cache) for column in tokens.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(out, dim=1), same(tokens), rtol=1e-4, atol=1e-5)
    if cpu.load() is not None:
        assert step._PLANS[rounded].step._kernel == "step_int8"


@torch.inference_mode()
def test_decoding_in_a_pool(pair):
    rounded, same = pair
    pool = CachePool(rounded.config, slots=1, pages=5, page_size=4)
    tokens, out = torch.randint(61, (1, 20)), []
    for start, length in ((0, 7), *((t, 1) for t in range(7, 20))):
        batch = PoolBatch(pool, slots=[0], tables=[[4, 2, 0, 1, 3]], starts=[start], lengths=[length])
        out.append(rounded(tokens[:, start : start + length], cache=batch))
    torch.testing.assert_close(torch.cat(out, dim=1), same(tokens), rtol=1e-4, atol=1e-5)


def test_bf16_beside_int8(pair):
    """The modules decode; scales and decay rates stay fp32."""
    rounded, same = (model.bfloat16() for model in pair)
    before = [buffer.clone() for buffer in rounded.buffers()]
    assert {buffer.dtype for buffer in before} == {torch.float32}
    tokens, cache = torch.randint(61, (1, 9)), rounded.new_cache(1)
    with torch.inference_mode():
        out = torch.cat([rounded(column, cache=cache) for column in tokens.split(1, dim=1)], dim=1)
        torch.testing.assert_close(out, same(tokens), rtol=0.05, atol=0.05)


def test_loading_rounds_each_tensor(pair, model, tmp_path):
    for shard in (10_000, 10**9):
        save_model(model, tmp_path / "checkpoint", max_shard_bytes=shard)
        loaded = load_model(tmp_path / "checkpoint", dtype=torch.int8)
        for kind in ("named_parameters", "named_buffers"):
            theirs = dict(getattr(loaded, kind)())
            for name, tensor in getattr(pair[0], kind)():
                assert torch.equal(theirs[name], tensor), name
        assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_weights_that_are_not_finite_are_named(model, tmp_path):
    with torch.no_grad():
        model.layers[2].self_attn.k_proj.weight[3, 4] = torch.nan
    save_model(model, tmp_path / "checkpoint")
    with pytest.raises(UserError, match=r"model\.layers\.2\.self_attn\.k_proj\.weight cannot be int8: .* not finite"):
        load_model(tmp_path / "checkpoint", dtype=torch.int8)


def test_int8_is_not_saved(pair, tmp_path):
    with pytest.raises(UserError, match="is int8, which no checkpoint holds"):
        save_model(pair[0], tmp_path / "checkpoint")
    assert not list(tmp_path.iterdir())
