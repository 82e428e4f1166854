"""The encoder equals transformers' CLIP vision tower with the same weights; sizes and guards."""

import pytest
import torch

from fulmen.config import UserError
from fulmen.model.config import VISION_LANGUAGE_PRESETS, VisionConfig
from fulmen.model.vision import VisionEncoder

TINY = VisionConfig(image_size=56, patch_size=14, hidden_size=48, num_layers=3, num_heads=4, mlp_size=80)


def clip_twin(encoder):
    """transformers' tower with the encoder's weights; its norm after the last layer is not ours."""
    transformers = pytest.importorskip("transformers")
    config = encoder.config
    twin = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.mlp_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_act="gelu",
            layer_norm_eps=config.norm_eps,
        )
    ).eval()
    state = twin.state_dict()
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in state) else ""
    lacking = twin.load_state_dict({prefix + name: p for name, p in encoder.state_dict().items()}, strict=False)
    assert all("post_layernorm" in name or "position_ids" in name for name in lacking.missing_keys)
    assert not lacking.unexpected_keys
    return twin


def randomised(config, seed=0):
    torch.manual_seed(seed)
    encoder = VisionEncoder(config)
    for name, parameter in encoder.named_parameters():
        torch.nn.init.normal_(parameter, std=0.05)
        if "norm" in name and name.endswith("weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return encoder


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [TINY, VisionConfig(image_size=336, hidden_size=64, num_layers=2, num_heads=2, mlp_size=128)],
    ids=["tiny", "336 pixels"],
)
def test_equals_transformers(config):
    encoder = randomised(config)
    pixels = torch.randn(2, 3, config.image_size, config.image_size)
    expected = clip_twin(encoder)(pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(encoder(pixels), expected, rtol=1e-4, atol=1e-4)
    assert encoder.all_tokens(pixels).shape == (2, 1 + config.side**2, config.hidden_size)


def test_the_released_size_has_303_million_parameters():
    config = VISION_LANGUAGE_PRESETS["minimax-vl-01"].vision
    with torch.device("meta"):
        parameters = list(VisionEncoder(config).parameters())
    assert sum(p.numel() for p in parameters) == config.count_parameters() == 303_505_408
    assert len(parameters) == 3 + 2 + 16 * 24


def test_every_weight_learns():
    encoder = VisionEncoder(TINY)
    encoder(torch.randn(2, 3, 56, 56)).square().sum().backward()
    still = [name for name, p in encoder.named_parameters() if not p.grad.abs().sum() > 0]
    assert still == []


def test_images_of_another_size_are_refused():
    with pytest.raises(AssertionError, match="takes"):
        VisionEncoder(TINY)(torch.randn(1, 3, 70, 70))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"image_size": 50}, "multiple of patch_size 14"),
        ({"num_heads": 5}, "multiple of num_heads"),
        ({"num_layers": 0}, "at least 1"),
    ],
)
def test_sizes_that_cannot_be(change, word):
    sizes = dict(image_size=56, patch_size=14, hidden_size=48, num_layers=3, num_heads=4, mlp_size=80)
    with pytest.raises(UserError, match=word):
        VisionConfig(**sizes | change)
