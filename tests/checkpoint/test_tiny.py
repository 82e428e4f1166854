import pytest
import torch

from fulmen.checkpoint import load_config, load_generation_config, load_model, make_tiny
from fulmen.config import UserError
from fulmen.data import Tokenizer


@pytest.mark.parametrize(("dialect", "rotary_dim"), [("original", 32), ("transformers", 64)])
def test_it_loads_and_is_small(tmp_path, dialect, rotary_dim):
    make_tiny(tmp_path, dialect)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 2e6
    config, tokenizer = load_config(tmp_path), Tokenizer.load(tmp_path)
    assert (config.layers, config.head_dim, config.rotary_dim) == ("LLLLLLLS", 64, rotary_dim)
    assert config.vocab_size == tokenizer.vocab_size
    assert load_generation_config(tmp_path).eos_ids == (tokenizer.eos_id,)
    logits = load_model(tmp_path)(torch.tensor([tokenizer.encode("Attention lets every token look.")]))
    assert logits.isfinite().all()
    assert logits.std() > 0.1


def test_the_seed_decides(tmp_path):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_tiny(tmp_path / name, seed=seed)
    files = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert files["a"] == files["b"] != files["c"]
    # The caller's random numbers are as if nothing had happened.
    assert torch.equal(torch.rand(1), expected)


def test_no_norm_is_one(tmp_path):
    make_tiny(tmp_path)
    norms = [parameter for parameter in load_model(tmp_path).parameters() if parameter.ndim == 1]
    assert len(norms) == 2 * 8 + 7 + 1
    assert all(norm.std() > 0.1 for norm in norms)


def test_a_dialect_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint dialect named 'gguf'"):
        make_tiny(tmp_path / "out", "gguf")
