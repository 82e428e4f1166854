"""The vocabulary of config.json in its two dialects, the original and that of transformers, as data.

Every key of a file is one of four things: it is translated; it must have the one value that the model computes with
(`FIXED`); it does not touch the mathematics of inference (`HARMLESS`); or it is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fulmen.model.config import LIGHTNING, SOFTMAX


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """What one dialect of config.json calls things."""

    architecture: str
    model_types: tuple[str, ...]  # the first is the one that is written
    layers_key: str
    layer_kinds: Mapping[str, int | str]  # letter of a layer plan -> entry of the list of layers
    scales: Mapping[str, str]  # field of ModelConfig -> key
    dtype_key: str


DIALECTS = {
    "original": Dialect(
        architecture="MiniMaxText01ForCausalLM",
        # The release's file and its configuration class spell the type differently; M1 is the same architecture.
        model_types=("minimax_text_01", "MiniMaxText01", "minimax_m1", "MiniMaxM1"),
        layers_key="attn_type_list",
        layer_kinds={LIGHTNING: 0, SOFTMAX: 1},
        scales={
            "lightning_alpha": "layernorm_linear_attention_alpha",
            "lightning_beta": "layernorm_linear_attention_beta",
            "softmax_alpha": "layernorm_full_attention_alpha",
            "softmax_beta": "layernorm_full_attention_beta",
            "mlp_alpha": "layernorm_mlp_alpha",
            "mlp_beta": "layernorm_mlp_beta",
        },
        dtype_key="torch_dtype",
    ),
    "transformers": Dialect(
        architecture="MiniMaxForCausalLM",
        model_types=("minimax",),
        layers_key="layer_types",
        layer_kinds={LIGHTNING: "linear_attention", SOFTMAX: "full_attention"},
        scales={
            "lightning_alpha": "linear_attn_alpha_factor",
            "lightning_beta": "linear_attn_beta_factor",
            "softmax_alpha": "full_attn_alpha_factor",
            "softmax_beta": "full_attn_beta_factor",
            "mlp_alpha": "mlp_alpha_factor",
            "mlp_beta": "mlp_beta_factor",
        },
        dtype_key="dtype",
    ),
}

COUNTS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
}
ROPE_THETA = ("rope_theta", "rope_parameters.rope_theta")
ROTARY_DIM = ("rotary_dim", "rope_parameters.rotary_dim")
ROTARY_FACTOR = ("partial_rotary_factor", "rope_parameters.partial_rotary_factor")

FIXED = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "postnorm": True,
    "shared_intermediate_size": 0,
    "sliding_window": None,
    "rope_scaling": None,
    "rope_parameters.rope_type": "default",
    "rope_parameters.type": "default",
    "attention_bias": False,
    "quantization_config": None,
}

HARMLESS = {
    # Where the file comes from and how others run it.
    "model_type",
    "architectures",
    "auto_map",
    "transformers_version",
    "_name_or_path",
    "_attn_implementation",
    "dtype",
    "torch_dtype",
    "use_cache",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    # Training alone.
    "initializer_range",
    "attention_dropout",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
    # Results do not depend on the block.
    "block_size",
    # Without a shared expert its mode says nothing.
    "shared_moe_mode",
    # Tokens: `load_generation_config` reads them.
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}

# Neither dialect has a key for it: both have this value in their code.
LIGHTNING_NORM_EPS = 1e-6
