import json
from dataclasses import replace

import pytest
import torch

from fulmen.checkpoint import load_config, save_config
from fulmen.checkpoint.config import shortest_plan
from fulmen.config import UserError
from fulmen.model import ModelConfig

ALPHA = 3.5565588200778455

# The keys of the published file.
RELEASED = {
    "architectures": ["MiniMaxText01ForCausalLM"],
    "attention_dropout": 0.0,
    "attn_type_list": [0, 0, 0, 0, 0, 0, 0, 1] * 10,
    "auto_map": {"AutoConfig": "configuration_minimax_text_01.MiniMaxText01Config"},
    "bos_token_id": None,
    "eos_token_id": None,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 6144,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "layernorm_full_attention_alpha": ALPHA,
    "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_alpha": ALPHA,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_alpha": ALPHA,
    "layernorm_mlp_beta": 1.0,
    "max_position_embeddings": 10240000,
    "model_type": "minimax_text_01",
    "num_attention_heads": 64,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "postnorm": True,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000000,
    "rotary_dim": 64,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.45.2",
    "use_cache": True,
    "vocab_size": 200064,
}


def write(folder, keys):
    (folder / "config.json").write_text(json.dumps({key: value for key, value in keys.items() if value is not ...}))
    return folder


def test_the_released_file_is_the_preset(tmp_path):
    assert load_config(write(tmp_path, RELEASED)) == ModelConfig.preset("minimax-text-01")


@pytest.mark.parametrize("model_type", ["MiniMaxText01", "minimax_m1", "MiniMaxM1"])
def test_other_spellings_of_the_type(tmp_path, model_type):
    assert load_config(write(tmp_path, RELEASED | {"model_type": model_type})) == ModelConfig.preset("minimax-text-01")


def test_what_we_write_has_the_released_values(tmp_path):
    save_config(ModelConfig.preset("minimax-text-01"), tmp_path, dtype=torch.bfloat16)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written.pop("torch_dtype") == "bfloat16"
    assert written.items() <= {key: value for key, value in RELEASED.items() if not isinstance(value, dict)}.items()


@pytest.mark.parametrize("dialect", ["original", "transformers"])
@pytest.mark.parametrize("plan", ["L", "S", "LLS", "SSL", "LLLSS"])
def test_round_trip(tmp_path, config, dialect, plan):
    config = replace(config, layer_plan=plan)
    save_config(config, tmp_path / "new" / "folder", dialect, eos_id=3, bos_id=2)
    assert load_config(tmp_path / "new" / "folder") == config
    written = json.loads((tmp_path / "new" / "folder" / "config.json").read_text())
    assert (written["eos_token_id"], written["bos_token_id"]) == (3, 2)


def test_partial_rotary_round_trips_in_the_original_dialect_only(tmp_path, config):
    config = replace(config, rotary_dim=4)
    save_config(config, tmp_path)
    assert load_config(tmp_path) == config
    with pytest.raises(UserError, match=r"rotary_dim 4.*rotates all 8 dims.*original dialect"):
        save_config(config, tmp_path / "no", "transformers")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("layers", "plan"),
    [("LLLLLLLS" * 10, "LLLLLLLS"), ("LLLL", "L"), ("LLSLLSL", "LLS"), ("LLLSS", "LLLSS"), ("SLSL", "SL")],
)
def test_shortest_plan(layers, plan):
    assert shortest_plan(layers) == plan


@pytest.mark.parametrize(
    ("changes", "rotary_dim"),
    [
        ({}, 128),
        ({"rotary_dim": 64}, 64),
        ({"partial_rotary_factor": 0.5}, 64),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}}, 32),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e7}, "rope_theta": ...}, 128),
    ],
)
def test_transformers_dialect_honours_a_rotary_dim_that_transformers_drops(tmp_path, changes, rotary_dim):
    save_config(ModelConfig.preset("minimax-text-01", rotary_dim=128), tmp_path, "transformers")
    keys = json.loads((tmp_path / "config.json").read_text()) | changes
    config = load_config(write(tmp_path, keys))
    assert (config.rotary_dim, config.rope_theta) == (rotary_dim, 1e7)


def test_values_repeated_for_each_layer(tmp_path):
    keys = RELEASED | {"num_local_experts": [32] * 80, "shared_intermediate_size": [0]}
    assert load_config(write(tmp_path, keys)) == ModelConfig.preset("minimax-text-01")


def test_null_head_dim_is_hidden_over_heads(tmp_path):
    assert load_config(write(tmp_path, RELEASED | {"head_dim": None})).head_dim == 96


def test_other_dialects_spelling_is_read(tmp_path):
    keys = RELEASED | {"layernorm_mlp_beta": ..., "mlp_beta_factor": 0.7}
    assert load_config(write(tmp_path, keys)).mlp_beta == 0.7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "model_type 'mixtral'"),
        ({"model_type": ...}, "model_type None"),
        ({"use_qk_norm": True}, "unknown key use_qk_norm = True"),
        ({"rope_parameters": {"rope_theta": 1e7, "factor": 8}}, "unknown key rope_parameters.factor = 8"),
        ({"rope_parameters": {"full_attention": {}}}, "unknown key rope_parameters.full_attention"),
        ({"rope_parameters": 5}, "unknown key rope_parameters = 5"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type = 'yarn' is not supported"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "contradiction: rope_theta says 10000000"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling = {.*} is not supported"),
        ({"partial_rotary_factor": 1.0}, "contradiction: rotary_dim says 64, partial_rotary_factor says 128"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True"),
        ({"postnorm": False}, "postnorm = False"),
        ({"postnorm": ...}, "postnorm is missing"),
        ({"shared_intermediate_size": 1024}, "shared_intermediate_size = 1024"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = "),
        ({"vocab_size": ...}, "the key vocab_size is missing"),
        ({"rotary_dim": ...}, "the key rotary_dim is missing"),
        ({"layernorm_mlp_beta": ...}, "the key layernorm_mlp_beta or mlp_beta_factor is missing"),
        ({"mlp_beta_factor": 0.5}, "contradiction: layernorm_mlp_beta says 1.0, mlp_beta_factor says 0.5"),
        ({"attn_type_list": ...}, "the key attn_type_list or layer_types is missing"),
        ({"attn_type_list": [0, 2] * 40}, r"attn_type_list must be a list of \[0, 1\]"),
        ({"attn_type_list": [[0]] * 80}, r"attn_type_list must be a list of \[0, 1\]"),
        ({"attn_type_list": [0, 1]}, "num_hidden_layers is 80, but the list of layers has 2"),
        ({"attn_type_list": [], "num_hidden_layers": 0}, "num_layers must be at least 1"),
        ({"hidden_size": "6144"}, "hidden_size must be an integer, got '6144'"),
        ({"hidden_size": True}, "hidden_size must be an integer, got True"),
        ({"num_local_experts": [32, 16]}, r"num_local_experts must be an integer, got \[32, 16\]"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a number, got 'small'"),
        ({"num_key_value_heads": 7}, "num_heads 64 must be a multiple of num_kv_heads 7"),
        ({"num_attention_heads": 0, "head_dim": None}, "num_heads must be at least 1, got 0"),
    ],
)
def test_refused(tmp_path, changes, message):
    write(tmp_path, RELEASED | changes)
    with pytest.raises(UserError, match=message) as error:
        load_config(tmp_path)
    assert str(error.value).startswith(str(tmp_path / "config.json"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there is no config.json in"), (b"{", "is not JSON"), (b"\xff", "is not JSON"), (b"[]", "no JSON object")],
)
def test_unreadable(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path)


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    write(tmp_path, RELEASED)

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(UserError, match=r"cannot read .*config.json: Permission denied"):
        load_config(tmp_path)


def test_a_dialect_that_does_not_exist(tmp_path, config):
    with pytest.raises(UserError, match=r"no checkpoint dialect named 'gguf'; there are original, transformers"):
        save_config(config, tmp_path, "gguf")


def test_a_norm_eps_that_no_dialect_can_say(tmp_path, config):
    with pytest.raises(UserError, match=r"lightning_norm_eps = 0.1 cannot be saved"):
        save_config(replace(config, lightning_norm_eps=0.1), tmp_path)
