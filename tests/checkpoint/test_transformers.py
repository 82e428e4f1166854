"""The oracle is transformers' own MiniMaxForCausalLM: each side reads what the other has saved."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MiniMaxConfig, MiniMaxForCausalLM

from fulmen.checkpoint import load_config, load_generation_config, load_model, make_tiny, save_model

# Theirs works in blocks of 256: three of them, the last one ragged.
LENGTH = 600


@pytest.fixture
def theirs():
    """Builds their model with weights large enough that logits differ, all norms' weights off one."""

    def build(layer_types, **changes):
        config = MiniMaxConfig(
            vocab_size=61,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=len(layer_types),
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=3,
            num_experts_per_tok=2,
            layer_types=layer_types,
            max_position_embeddings=700,
            rms_norm_eps=2e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
            linear_attn_alpha_factor=1.3,
            linear_attn_beta_factor=0.9,
            full_attn_alpha_factor=1.7,
            full_attn_beta_factor=0.8,
            mlp_alpha_factor=1.1,
            mlp_beta_factor=1.2,
            bos_token_id=None,
            eos_token_id=None,
            **changes,
        )
        model = MiniMaxForCausalLM(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            else:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        return model

    return build


def read_by_transformers(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def assert_same_logits(ours, theirs, vocab_size=61):
    tokens = torch.randint(vocab_size, (2, LENGTH))
    expected = theirs(tokens).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def assert_same_greedy_tokens(ours, theirs, vocab_size=61):
    for length in (1, 300):
        prompt = torch.randint(vocab_size, (1, length))
        expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
        cache, tokens = ours.new_cache(1), prompt
        for _ in range(20):
            step = ours(tokens[:, cache.length :], cache=cache)[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, step], 1)
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize("plan", ["LLS", "S", "SLL"])
def test_saved_by_transformers_read_by_us(theirs, tmp_path, plan):
    kinds = {"L": "linear_attention", "S": "full_attention"}
    model = theirs([kinds[kind] for kind in (plan * 3)[:5]])
    model.save_pretrained(tmp_path, max_shard_size="200KB" if plan == "LLS" else "5GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (plan == "LLS")
    ours = load_model(tmp_path)
    assert ours.config.layers == (plan * 3)[:5]
    assert_same_logits(ours, model)
    assert_same_greedy_tokens(ours, model)


def test_saved_by_transformers_under_its_names_in_memory(theirs, tmp_path):
    model = theirs(["linear_attention", "full_attention"])
    model.save_pretrained(tmp_path, save_original_format=False)
    assert_same_logits(load_model(tmp_path), model)


def test_default_block_and_other_settings_of_transformers_do_not_matter(theirs, tmp_path):
    model = theirs(["linear_attention", "full_attention"], block_size=64, output_router_logits=False, use_cache=False)
    model.save_pretrained(tmp_path)
    assert_same_logits(load_model(tmp_path), model)


@pytest.mark.parametrize("max_shard_bytes", [20_000, 2**30])
def test_saved_by_us_read_by_transformers(random_model, config, tmp_path, max_shard_bytes):
    ours = random_model(config)
    save_model(ours, tmp_path, "transformers", max_shard_bytes=max_shard_bytes)
    model = read_by_transformers(tmp_path)
    assert_same_logits(ours, model)
    assert_same_greedy_tokens(ours, model)


def test_heads_that_are_no_power_of_two(random_model, config, tmp_path):
    """Both sides take the plain formula for the decay rates."""
    ours = random_model(replace(config, num_heads=6))
    save_model(ours, tmp_path, "transformers")
    assert_same_logits(ours, read_by_transformers(tmp_path))


def test_their_copy_of_ours_is_ours(random_model, config, tmp_path):
    ours = random_model(config)
    save_model(ours, tmp_path / "ours", "transformers", eos_id=5, bos_id=4)
    read_by_transformers(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = load_model(tmp_path / "theirs")
    assert load_config(tmp_path / "theirs") == config
    assert load_generation_config(tmp_path / "theirs") == load_generation_config(tmp_path / "ours")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))


def test_tiny_checkpoint_loads_with_the_auto_classes(tmp_path):
    make_tiny(tmp_path, "transformers")
    model, ours = read_by_transformers(tmp_path), load_model(tmp_path)
    assert_same_logits(ours, model, vocab_size=512)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer("the state of a head").input_ids) == "the state of a head"
    assert (tokenizer.eos_token_id,) == load_generation_config(tmp_path).eos_ids
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
