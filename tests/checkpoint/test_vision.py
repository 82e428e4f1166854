"""An encoder's folder: what transformers makes of it, what comes back, what is refused; and a whole CoCa's."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fulmen.checkpoint.vision import load_coca, load_encoder, save_coca, save_encoder
from fulmen.config import UserError
from fulmen.data import Tokenizer
from fulmen.model import VisionConfig, VisionEncoder
from fulmen.model.coca import CoCa, CoCaConfig
from fulmen.model.vision import resize_encoder

VISION = VisionConfig(image_size=28, patch_size=7, hidden_size=48, num_layers=3, num_heads=4, mlp_size=80)
COCA = CoCaConfig(
    vision=VISION,
    vocab_size=300,
    hidden_size=32,
    num_heads=2,
    mlp_size=40,
    unimodal_layers=1,
    multimodal_layers=1,
    caption_queries=3,
    max_caption=16,
)


@torch.no_grad()
def randomised(module):
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(std=0.1)
    return module.eval()


@pytest.fixture
def encoder():
    return randomised(VisionEncoder(VISION))


@pytest.fixture
def coca():
    return randomised(CoCa(COCA))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["a red bird on a blue bowl, and the bowl is round " * 20, "the grey goat sees a ship"], 270)


def change_config(folder, **changes):
    file = folder / "config.json"
    keys = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in keys.items() if value is not None}))


@torch.no_grad()
def test_transformers_reads_it(encoder, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_encoder(encoder, tmp_path / "encoder")
    twin, report = transformers.CLIPVisionModel.from_pretrained(tmp_path / "encoder", output_loading_info=True)
    assert not report["unexpected_keys"]
    assert all("post_layernorm" in name for name in report["missing_keys"])
    assert twin.config.hidden_act == "gelu"
    pixels = torch.randn(2, 3, 28, 28)
    expected = twin.eval()(pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(encoder(pixels), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_reads_what_transformers_writes(encoder, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_encoder(encoder, tmp_path / "ours")
    twin = transformers.CLIPVisionModel.from_pretrained(tmp_path / "ours")
    twin.save_pretrained(tmp_path / "theirs")
    pixels = torch.randn(2, 3, 28, 28)
    assert torch.equal(load_encoder(tmp_path / "theirs")(pixels), encoder(pixels))


def test_comes_back(encoder, tmp_path):
    save_encoder(encoder, tmp_path / "encoder")
    save_encoder(encoder, tmp_path / "encoder")
    loaded = load_encoder(tmp_path / "encoder")
    assert loaded.config == VISION
    assert not loaded.training
    assert loaded.state_dict().keys() == encoder.state_dict().keys()
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in loaded.state_dict().items())
    save_encoder(encoder.bfloat16(), tmp_path / "narrow")
    assert (
        load_file(tmp_path / "narrow" / "model.safetensors")["vision_model.pre_layrnorm.bias"].dtype == torch.bfloat16
    )
    assert load_encoder(tmp_path / "narrow").pre_layrnorm.bias.dtype == torch.float32


@torch.no_grad()
def test_coca_comes_back(coca, tokenizer, tmp_path):
    """With the encoder at the size that it has by then."""
    resize_encoder(coca.encoder, 42)
    save_coca(coca, tmp_path / "coca", tokenizer)
    save_coca(coca, tmp_path / "coca", tokenizer)
    loaded, its_tokenizer = load_coca(tmp_path / "coca")
    assert loaded.encoder.config.image_size == loaded.config.vision.image_size == 42
    assert its_tokenizer.fingerprint == tokenizer.fingerprint
    assert not loaded.training
    assert loaded.state_dict().keys() == coca.state_dict().keys()
    assert all(torch.equal(value, coca.state_dict()[name]) for name, value in loaded.state_dict().items())
    pixels = torch.randn(2, 3, 42, 42)
    assert torch.equal(load_encoder(tmp_path / "coca")(pixels), coca.encoder(pixels))
    modes = {file.stat().st_mode for file in (tmp_path / "coca").iterdir() if file.suffix == ".safetensors"}
    assert modes == {(tmp_path / "coca" / "config.json").stat().st_mode}


def test_encoders_that_are_refused(encoder, tmp_path):
    save_encoder(encoder, tmp_path / "good")

    def broken(**changes):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        change_config(tmp_path / "bad", **changes)
        with pytest.raises(UserError) as error:
            load_encoder(tmp_path / "bad")
        return str(error.value)

    assert "of type 'minimax'" in broken(model_type="minimax")
    assert "hidden_act = 'quick_gelu' is not supported" in broken(hidden_act="quick_gelu")
    assert "unknown key depth" in broken(depth=3)
    assert "num_hidden_layers is missing" in broken(num_hidden_layers=None)
    assert "16 of 69 tensors are missing: vision_model.encoder.layers.3" in broken(num_hidden_layers=4)
    assert "tensors are not of this model: vision_model.encoder.layers.2" in broken(num_hidden_layers=2)
    assert "should have the shape [5, 48], found [17, 48]" in broken(image_size=14)
    with pytest.raises(UserError, match=r"there is no config\.json"):
        load_encoder(tmp_path / "nowhere")


def test_cocas_that_are_refused(coca, encoder, tokenizer, tmp_path):
    save_coca(coca, tmp_path / "coca", tokenizer)
    save_encoder(encoder, tmp_path / "encoder")
    with pytest.raises(UserError, match=r"has no coca\.json, so it is no CoCa"):
        load_coca(tmp_path / "encoder")
    sizes = json.loads((tmp_path / "coca" / "coca.json").read_text())
    (tmp_path / "coca" / "coca.json").write_text(json.dumps(sizes | {"hidden_size": "wide"}))
    with pytest.raises(UserError, match=r"coca\.json: hidden_size must be an integer, got 'wide'"):
        load_coca(tmp_path / "coca")
    (tmp_path / "coca" / "coca.json").write_text(json.dumps(sizes))
    tensors = load_file(tmp_path / "coca" / "coca.safetensors")
    del tensors["norm.bias"]
    save_file(tensors, tmp_path / "coca" / "coca.safetensors")
    with pytest.raises(UserError, match=r"1 of \d+ tensors are missing: norm\.bias"):
        load_coca(tmp_path / "coca")
    (tmp_path / "coca" / "coca.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no coca\.safetensors"):
        load_coca(tmp_path / "coca")
