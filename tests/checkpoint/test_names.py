import torch

from fulmen.checkpoint.names import ignored_names, published_pieces, stacked_pieces
from fulmen.model import LanguageModel, ModelConfig


def meta_model(config):
    with torch.device("meta"):
        return LanguageModel(config)


def test_the_release_has_8243_tensors_of_its_parameter_count():
    config = ModelConfig.preset("minimax-text-01")
    pieces = published_pieces(meta_model(config))
    assert len({piece.name for piece in pieces}) == len(pieces) == 8243
    assert sum(torch.Size(piece.shape).numel() for piece in pieces) == config.count_parameters().total


def test_names_are_the_published_ones(config):
    names = {piece.name: piece.shape for piece in published_pieces(meta_model(config))}
    layer = {
        "input_layernorm.weight": (24,),
        "post_attention_layernorm.weight": (24,),
        "block_sparse_moe.gate.weight": (3, 24),
    }
    for expert in range(3):
        layer[f"block_sparse_moe.experts.{expert}.w1.weight"] = (40, 24)
        layer[f"block_sparse_moe.experts.{expert}.w2.weight"] = (24, 40)
        layer[f"block_sparse_moe.experts.{expert}.w3.weight"] = (40, 24)
    lightning = {"qkv_proj": (96, 24), "output_gate": (32, 24), "norm": (32,), "out_proj": (24, 32)}
    softmax = {"q_proj": (32, 24), "k_proj": (16, 24), "v_proj": (16, 24), "o_proj": (24, 32)}
    expected = {"model.embed_tokens.weight": (61, 24), "model.norm.weight": (24,), "lm_head.weight": (61, 24)}
    for number, kind in enumerate("LLSLL"):
        mixer = {f"self_attn.{name}.weight": s for name, s in (lightning if kind == "L" else softmax).items()}
        expected |= {f"model.layers.{number}.{name}": shape for name, shape in (layer | mixer).items()}
    assert names == expected


def test_pieces_tile_every_parameter(config):
    model = LanguageModel(config)
    for pieces in (published_pieces(model), stacked_pieces(model)):
        parameters = dict(model.named_parameters())
        counts = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        for piece in pieces:
            assert counts[piece.parameter][piece.index].shape == piece.shape
            counts[piece.parameter][piece.index] += 1
        assert all((count == 1).all() for count in counts.values())


def test_gate_is_over_up_in_the_stack(config):
    pieces = {piece.name: piece for piece in published_pieces(meta_model(config))}
    experts = "model.layers.0.block_sparse_moe.experts.2."
    assert pieces[experts + "w1.weight"].index == (2, slice(0, 40))
    assert pieces[experts + "w3.weight"].index == (2, slice(40, 80))


def test_only_lightning_layers_have_ignored_buffers(config):
    layers = {name.split(".")[2] for name in ignored_names(meta_model(config))}
    assert layers == {"0", "1", "3", "4"}
