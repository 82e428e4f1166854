"""The image encoder: CLIP's ViT (arXiv:2103.00020) as MiniMax-VL-01 uses it (minimax-01.md section 12).

Module names are those of published checkpoints, `pre_layrnorm` included. S: pixels along a side, P: an image's patches.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fulmen.model.config import VisionConfig

# cuDNN's would be planned anew, for milliseconds, for every number of crops.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class VisionEncoder(nn.Module):
    """Square images to features of their patches: pre-norm, exact GELU, learned positions, no norm at the end.

    Weights are drawn from torch's global generator: normal, of a width that falls with depth as CLIP's.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = PatchEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_layers))
        if not self.embeddings.class_embedding.is_meta:
            self.init_weights()

    def forward(self, pixels: Tensor) -> Tensor:
        """[N, P, hidden] of pixels [N, 3, S, S], normalised, patches row by row; the class token is dropped."""
        return self.all_tokens(pixels)[:, 1:]

    def all_tokens(self, pixels: Tensor) -> Tensor:
        """[N, 1 + P, hidden], the class token first."""
        x = self.pre_layrnorm(self.embeddings(pixels))
        for layer in self.encoder.layers:
            x = layer(x)
        return x

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all weights anew."""
        hidden, depth = self.config.hidden_size, (2 * self.config.num_layers) ** -0.5
        nn.init.normal_(self.embeddings.class_embedding, std=hidden**-0.5)
        nn.init.normal_(self.embeddings.patch_embedding.weight, std=0.02)
        nn.init.normal_(self.embeddings.position_embedding.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in self.encoder.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for inner in (attention.q_proj, attention.k_proj, attention.v_proj):
                nn.init.normal_(inner.weight, std=hidden**-0.5)
            nn.init.normal_(attention.out_proj.weight, std=hidden**-0.5 * depth)
            nn.init.normal_(mlp.fc1.weight, std=(2 * hidden) ** -0.5)
            nn.init.normal_(mlp.fc2.weight, std=hidden**-0.5 * depth)


class PatchEmbeddings(nn.Module):
    """A class token and a product for each patch, plus learned positions."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        patch = config.patch_size
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, kernel_size=patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(1 + config.side**2, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """[N, 1 + P, hidden] of pixels [N, 3, S, S]."""
        # From the positions, and not the configuration, because pretraining lends it positions of another size.
        size = math.isqrt(len(self.position_embedding.weight) - 1) * self.patch_embedding.kernel_size[0]
        expected = (3, size, size)
        assert pixels.shape[1:] == expected, f"images of {tuple(pixels.shape[1:])}, the encoder takes {expected}"
        weight = self.patch_embedding.weight
        patches = self.patch_embedding(pixels.to(weight.dtype)).flatten(2).transpose(1, 2)
        first = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class VisionLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = VisionMlp(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionAttention(nn.Module):
    """Softmax attention of every token over every token of an image."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        with sdpa_kernel(ATTENTION):
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class VisionMlp(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_size)
        self.fc2 = nn.Linear(config.mlp_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def resize_positions(positions: Tensor, side: int) -> Tensor:
    """Positions [1 + side**2, hidden] from [1 + G**2, hidden], of which the class token's, the first, stays as it is.

    The square of the others is interpolated bicubically; at the same side the tensor itself comes back.
    """
    grid = math.isqrt(len(positions) - 1)
    if grid == side:
        return positions
    square = positions[1:].float().T.unflatten(1, (grid, grid))[None]
    resized = F.interpolate(square, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], resized[0].flatten(1).T.to(positions.dtype)])


@torch.no_grad()
def resize_encoder(encoder: VisionEncoder, image_size: int) -> None:
    """Let an encoder take images of another size from here on: its positions become new parameters, interpolated.

    Raises UserError for a size that its patches do not divide.
    """
    config = dataclasses.replace(encoder.config, image_size=image_size)
    embedding = encoder.embeddings.position_embedding
    encoder.embeddings.position_embedding = nn.Embedding.from_pretrained(
        resize_positions(embedding.weight, config.side).clone(), freeze=False
    )
    encoder.config = config
