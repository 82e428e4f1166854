"""CoCa (arXiv:2205.01917): an image encoder learns from captions, by telling pairs apart and by writing captions.

Two decoders read a caption. The unimodal one sees the text alone; a class token behind the text gathers it into one
vector, which a contrastive loss compares with the picture's. The multimodal one goes on from there, with
cross-attention to the picture, and predicts each next token. N: pairs, T: tokens, D: hidden size.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fulmen.config import UserError
from fulmen.model.config import VISION_LANGUAGE_SIZES, VisionConfig
from fulmen.model.vision import VisionEncoder, resize_encoder, resize_positions
from fulmen.ops.contrastive import contrastive_loss
from fulmen.ops.loss import IGNORE, linear_cross_entropy

TEMPERATURE = 0.07
"""Of the contrastive loss before the first step, CLIP's."""
LARGEST_SCALE = 100.0
"""1 over the temperature may not pass it, as in CLIP: beyond it a few pairs alone would make the gradient."""


@dataclass(frozen=True, kw_only=True)
class CoCaConfig:
    """An encoder, and the decoders and poolers that train it; all but `vision` is used in its pretraining only."""

    vision: VisionConfig
    vocab_size: int
    hidden_size: int  # of decoders, poolers and the space that pictures and texts meet in
    num_heads: int
    mlp_size: int
    unimodal_layers: int
    multimodal_layers: int
    caption_queries: int = 256  # vectors that a picture is pooled to for the multimodal decoder
    max_caption: int = 76  # tokens of a caption that are read, the first of them bos
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        counts = ("vocab_size", "hidden_size", "num_heads", "mlp_size", "unimodal_layers", "multimodal_layers")
        for name in (*counts, "caption_queries", "max_caption"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} of CoCa must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % self.num_heads:
            raise UserError(f"hidden_size {self.hidden_size} of CoCa must be a multiple of num_heads {self.num_heads}")

    @classmethod
    def preset(cls, name: str, *, vision: Mapping[str, Any] | None = None, **changes) -> "CoCaConfig":
        """A named size, with some fields of it and of its encoder (`vision`) changed."""
        if name not in SIZES:
            raise UserError(f"no CoCa named {name!r}; there are {', '.join(SIZES)}")
        encoder = VisionConfig(**VISION_LANGUAGE_SIZES[SIZES[name]["vision"]]["vision"] | dict(vision or {}))
        return cls(**SIZES[name] | changes | {"vision": encoder})


SIZES = {
    "tiny": dict(
        vision="tiny-vl",
        vocab_size=2048,
        hidden_size=192,
        num_heads=6,
        mlp_size=768,
        unimodal_layers=2,
        multimodal_layers=2,
        caption_queries=32,
    ),
    # The published CoCa-Large, whose encoder is MiniMax-VL-01's.
    "large": dict(
        vision="minimax-vl-01",
        vocab_size=64_000,
        hidden_size=1024,
        num_heads=16,
        mlp_size=4096,
        unimodal_layers=12,
        multimodal_layers=12,
    ),
}
"""The named sizes; `vision` is the vision-language model whose encoder is trained."""


class CoCaLoss(NamedTuple):
    """What `CoCa.loss` gives back; scalars are fp32."""

    contrastive: Tensor  # nats per pair, both directions together
    nll: Tensor  # sum over targets of -log p(target), nats
    targets: Tensor  # number of targets, int64
    images: Tensor  # [N, D] fp32 of length 1
    texts: Tensor  # [N, D] fp32 of length 1


class CoCa(nn.Module):
    """Encoder, two poolers, two decoders and a temperature, all learned.

    Weights are drawn from torch's global generator: matrices normal with a standard deviation of fan-in^-0.5, those
    that write into a decoder's residual narrower by (2 layers)^-0.5; embeddings and queries normal with 0.02; biases 0.
    """

    def __init__(self, config: CoCaConfig):
        super().__init__()
        self.config = config
        hidden, eps = config.hidden_size, config.norm_eps
        layer = dict(
            d_model=hidden,
            nhead=config.num_heads,
            dim_feedforward=config.mlp_size,
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=eps,
            batch_first=True,
            norm_first=True,
        )
        self.encoder = VisionEncoder(config.vision)
        self.contrastive_pooler = AttentionalPooler(config, queries=1)
        self.caption_pooler = AttentionalPooler(config, queries=config.caption_queries)
        self.embed_tokens = nn.Embedding(config.vocab_size, hidden)
        self.embed_positions = nn.Embedding(config.max_caption, hidden)
        self.class_embedding = nn.Parameter(torch.empty(hidden))
        self.unimodal = nn.ModuleList(nn.TransformerEncoderLayer(**layer) for _ in range(config.unimodal_layers))
        self.class_norm = nn.LayerNorm(hidden, eps=eps)
        self.multimodal = nn.ModuleList(nn.TransformerDecoderLayer(**layer) for _ in range(config.multimodal_layers))
        self.norm = nn.LayerNorm(hidden, eps=eps)
        self.lm_head = nn.Linear(hidden, config.vocab_size, bias=False)
        self.log_temperature = nn.Parameter(torch.empty(()))
        if not self.class_embedding.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all weights anew."""
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.MultiheadAttention):
                _init_attention(module)
        linears = [module for module in self.modules() if isinstance(module, nn.Linear)]
        for linear in linears:
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        for decoder in (self.unimodal, self.multimodal):
            narrow = (2 * len(decoder)) ** -0.5
            for name, parameter in decoder.named_parameters():
                if name.endswith(("out_proj.weight", "linear2.weight")):
                    parameter.mul_(narrow)
        for vectors in (self.class_embedding, self.contrastive_pooler.query, self.caption_pooler.query):
            nn.init.normal_(vectors, std=0.02)
        self.log_temperature.fill_(math.log(TEMPERATURE))
        self.encoder.init_weights()

    @property
    def scale(self) -> Tensor:
        """1 over the temperature, fp32 scalar."""
        return torch.exp(-self.log_temperature.float()).clamp(max=LARGEST_SCALE)

    def features(self, pixels: Tensor) -> Tensor:
        """[N, P, encoder's hidden] of square pictures [N, 3, S, S] of any size that its patches divide."""
        config = self.encoder.config
        name = "embeddings.position_embedding.weight"
        positions = resize_positions(self.encoder.get_parameter(name), pixels.shape[-1] // config.patch_size)
        return functional_call(self.encoder, {name: positions}, pixels)

    def resize(self, image_size: int) -> None:
        """Let the encoder take images of another size from here on, its positions interpolated for good."""
        resize_encoder(self.encoder, image_size)
        self.config = dataclasses.replace(self.config, vision=self.encoder.config)

    def embed_images(self, pixels: Tensor) -> Tensor:
        """[N, D] fp32 of length 1."""
        return self._embed_features(self.features(pixels))

    def embed_texts(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """[N, D] fp32 of length 1, of tokens [N, T] int64 of which the first lengths [N] count."""
        return self._embed_class(self._read(tokens, lengths), lengths)

    def loss(self, pixels: Tensor, tokens: Tensor, targets: Tensor) -> CoCaLoss:
        """Both losses of a batch of pairs.

        pixels: [N, 3, S, S]. tokens: [N, T] int64, captions. targets: [N, T] int64, the token after each; -100 behind
        the end of a caption, where the tokens are anything.
        """
        lengths = (targets != IGNORE).sum(dim=1)
        features = self.features(pixels)
        read = self._read(tokens, lengths)
        images, texts = self._embed_features(features), self._embed_class(read, lengths)
        # The class token's place predicts nothing, and no token before it sees it.
        hidden = self._write(read[:, :-1], features)
        nll = linear_cross_entropy(hidden.flatten(0, 1), self.lm_head.weight, targets.flatten())
        return CoCaLoss(contrastive_loss(images, texts, self.scale), nll, lengths.sum(), images, texts)

    def caption_logits(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """[N, T, V]: what follows each of the tokens [N, T] of captions of these pictures."""
        lengths = torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
        return self.lm_head(self._write(self._read(tokens, lengths)[:, :-1], self.features(pixels)))

    def _embed_features(self, features: Tensor) -> Tensor:
        return F.normalize(self.contrastive_pooler(features)[:, 0].float(), dim=-1)

    def _embed_class(self, read: Tensor, lengths: Tensor) -> Tensor:
        at_class = read[torch.arange(len(read), device=read.device), lengths]
        return F.normalize(self.class_norm(at_class).float(), dim=-1)

    def _read(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """The unimodal decoder: [N, T + 1, D], with the class token right behind each caption.

        There it sees all of the caption, and what pads a batch comes after it: the causal mask is all that is needed.
        """
        assert tokens.shape[1] <= self.config.max_caption, f"captions of {tokens.shape[1]} tokens"
        x = F.pad(self.embed_tokens(tokens) + self.embed_positions.weight[: tokens.shape[1]], (0, 0, 0, 1))
        is_class = torch.arange(x.shape[1], device=x.device) == lengths[:, None]
        x = torch.where(is_class[..., None], self.class_embedding, x)
        mask = _causal_mask(x)
        for layer in self.unimodal:
            x = layer(x, src_mask=mask, is_causal=True)
        return x

    def _write(self, read: Tensor, features: Tensor) -> Tensor:
        """The multimodal decoder: [N, T, D] of the unimodal one's output at the same tokens."""
        x, seen, mask = read, self.caption_pooler(features), _causal_mask(read)
        for layer in self.multimodal:
            x = layer(x, seen, tgt_mask=mask, tgt_is_causal=True)
        return self.norm(x)


class AttentionalPooler(nn.Module):
    """A fixed number of learned queries that look at an encoder's features (CoCa, section 3.2).

    The features get a norm of their own, since the encoder's last layer has none.
    """

    def __init__(self, config: CoCaConfig, *, queries: int):
        super().__init__()
        hidden, width = config.hidden_size, config.vision.hidden_size
        self.query = nn.Parameter(torch.empty(queries, hidden))
        self.features_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.attention = nn.MultiheadAttention(hidden, config.num_heads, kdim=width, vdim=width, batch_first=True)
        self.norm = nn.LayerNorm(hidden, eps=config.norm_eps)

    def forward(self, features: Tensor) -> Tensor:
        """[N, queries, D] of features [N, P, encoder's hidden]."""
        features = self.features_norm(features)
        query = self.query.to(features.dtype).expand(len(features), -1, -1)
        return self.norm(self.attention(query, features, features, need_weights=False)[0])


def _init_attention(attention: nn.MultiheadAttention) -> None:
    """Inputs; its output is one of the linears."""
    for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        if (weight := getattr(attention, name)) is not None:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    nn.init.zeros_(attention.in_proj_bias)


def _causal_mask(x: Tensor) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
