"""Vision-language checkpoints: transformers' LLaVA-NeXT reads and writes them, both dialects, names, refusals."""

import json

import pytest
import torch
from PIL import Image

from fulmen.checkpoint import load_config, load_model, make_tiny, save_model
from fulmen.checkpoint.names import published_pieces
from fulmen.config import UserError
from fulmen.data import PlacedImage
from fulmen.model import VISION_LANGUAGE_PRESETS, VisionLanguageModel


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_tiny(folder, "transformers", vision=True)
    return folder


@pytest.fixture(scope="module")
def sample(tiny):
    """Tokens [1, T] around an image of several crops, and the image placed."""
    config = load_config(tiny)
    noise = torch.randint(0, 256, (60, 100, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    image = config.vision.processor().process(Image.fromarray(noise.numpy()))
    tokens = torch.tensor([[5, 6, *[config.image_token] * image.positions, 7, 8, 9]])
    return tokens, [PlacedImage(image, 2, 0, image.positions)]


@torch.no_grad()
def test_transformers_reads_it_and_we_read_what_it_writes(tiny, sample, tmp_path):
    """A whole oracle: pixels and tokens in, logits out."""
    transformers = pytest.importorskip("transformers")
    twin = transformers.LlavaNextForConditionalGeneration.from_pretrained(tiny, dtype=torch.float32).eval()
    tokens, images = sample
    pixels, (width, height) = images[0].image.pixels, images[0].image.layout.size
    expected = twin(input_ids=tokens, pixel_values=pixels[None], image_sizes=torch.tensor([[height, width]])).logits
    torch.testing.assert_close(load_model(tiny)(tokens, images=images), expected, rtol=1e-4, atol=1e-4)
    twin.save_pretrained(tmp_path / "theirs")
    again = load_model(tmp_path / "theirs")
    torch.testing.assert_close(again(tokens, images=images), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dialect", ["original", "transformers"])
def test_what_is_saved_is_read(tiny, sample, tmp_path, dialect):
    tokens, images = sample
    model = load_model(tiny)
    save_model(model, tmp_path / "copy", dialect, max_shard_bytes=200_000)
    assert len(list((tmp_path / "copy").glob("model-*.safetensors"))) > 3
    again = load_model(tmp_path / "copy")
    assert again.config == model.config
    torch.testing.assert_close(again(tokens, images=images), model(tokens, images=images), rtol=0, atol=0)


def test_the_release_has_8637_tensors():
    with torch.device("meta"):
        model = VisionLanguageModel(VISION_LANGUAGE_PRESETS["minimax-vl-01"])
    names = {piece.name: piece.shape for piece in published_pieces(model)}
    assert len(names) == 8637
    expected = {
        "image_newline": (6144,),
        "multi_modal_projector.linear_1.weight": (6144, 1024),
        "multi_modal_projector.linear_2.bias": (6144,),
        "vision_tower.vision_model.embeddings.class_embedding": (1024,),
        "vision_tower.vision_model.embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        "vision_tower.vision_model.embeddings.position_embedding.weight": (577, 1024),
        "vision_tower.vision_model.pre_layrnorm.weight": (1024,),
        "vision_tower.vision_model.encoder.layers.23.self_attn.out_proj.bias": (1024,),
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": (4096, 1024),
        "language_model.lm_head.weight": (200064, 6144),
        "language_model.model.embed_tokens.weight": (200064, 6144),
        "language_model.model.layers.7.self_attn.q_proj.weight": (8192, 6144),
        "language_model.model.layers.79.block_sparse_moe.experts.31.w2.weight": (6144, 9216),
    }
    assert expected.items() <= names.items()


@torch.no_grad()
def test_int8_is_of_the_text_model(tiny, sample):
    tokens, images = sample
    rounded, full = load_model(tiny, dtype=torch.int8), load_model(tiny)
    assert rounded.vision_tower.vision_model.encoder.layers[0].mlp.fc1.weight.dtype == torch.float32
    assert rounded.language_model.layers[0].self_attn.qkv_proj.weight.dtype == torch.int8
    expected = full(tokens, images=images)
    assert (rounded(tokens, images=images) - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"vision_feature_layer": -2}, "vision_feature_layer = -2 is not supported"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
        ({"image_grid_pinpoints": [[56, 112]]}, "28 published grids of crops of 56"),
        ({"rope_scaling": 2}, "unknown key rope_scaling"),
        ({"image_token_index": None}, "image_token_index or image_token_id is missing"),
        ({"image_token_index": 512}, "image_token must be one of"),
        ({"text_config": None}, "text_config is missing"),
        ({"vision_config": {"hidden_act": "quick_gelu"}}, "vision_config: hidden_act = 'quick_gelu'"),
        ({"vision_config": {"hidden_act": None}}, "vision_config: the key hidden_act is missing"),
        ({"vision_config": {"patch_size": 15}}, "vision_config: image_size 56 of an encoder must be a multiple"),
        ({"text_config": {"hidden_act": "relu"}}, "text_config: hidden_act = 'relu'"),
    ],
)
def test_what_is_not_computed_is_refused(tiny, tmp_path, change, word):
    raw = json.loads((tiny / "config.json").read_text())
    for key, value in change.items():
        raw[key] = raw[key] | value if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=word.replace("(", r"\(")):
        load_config(tmp_path)
