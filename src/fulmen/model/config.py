"""What a model is made of, the named sizes, and what they cost in parameters and memory."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from fulmen.config import UserError
from fulmen.data.images import ImageProcessor

LIGHTNING, SOFTMAX = "L", "S"

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
"""Of a weight. With int8 only experts and projections are that narrow, the rest is bfloat16, as are keys and values."""


class ParameterCount(NamedTuple):
    """`active`: what a token's forward pass uses, embedding and head left out, as the report counts."""

    total: int
    active: int
    embeddings: int  # input embedding and head together


class MemoryEstimate(NamedTuple):
    """Bytes at inference."""

    weights: int
    state: int  # lightning states of all sequences, fp32, whatever the context
    key_values: int  # keys and values of the softmax layers


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A hybrid decoder: `layer_plan` is repeated over the depth, L for lightning attention and S for softmax.

    The three pairs (alpha, beta) weigh residual and branch of each sub-layer: y = alpha * n + beta * f(n), n the
    normed input. An alpha of None stands for DeepNorm's (2 num_layers)^0.25.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    layer_plan: str = "LLLLLLLS"
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int | None = None  # None: half of head_dim, as released
    rope_theta: float = 10_000.0
    num_experts: int
    experts_per_token: int = 2
    expert_size: int
    max_positions: int = 8192
    norm_eps: float = 1e-5
    lightning_norm_eps: float = 1e-6
    lightning_alpha: float | None = None
    lightning_beta: float = 1.0
    softmax_alpha: float | None = None
    softmax_beta: float = 1.0
    mlp_alpha: float | None = None
    mlp_beta: float = 1.0

    def __post_init__(self) -> None:
        deepnorm = (2 * self.num_layers) ** 0.25
        for name in ("lightning_alpha", "softmax_alpha", "mlp_alpha"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, deepnorm)
        if self.rotary_dim is None:
            object.__setattr__(self, "rotary_dim", self.head_dim // 2)
        self._check()

    def _check(self) -> None:
        counts = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "num_experts")
        for name in (*counts, "experts_per_token", "expert_size", "max_positions"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.layer_plan or set(self.layer_plan) - {LIGHTNING, SOFTMAX}:
            raise UserError(f"layer_plan is a string of {LIGHTNING} and {SOFTMAX}, got {self.layer_plan!r}")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        if self.experts_per_token > self.num_experts:
            raise UserError(f"experts_per_token {self.experts_per_token} exceeds num_experts {self.num_experts}")
        for name in ("hidden_size", "expert_size"):
            if getattr(self, name) % 8:
                raise UserError(
                    f"{name} must be a multiple of 8, as grouped products in bf16 ask, got {getattr(self, name)}"
                )
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise UserError(f"rotary_dim must be even and in 2..head_dim {self.head_dim}, got {self.rotary_dim}")

    @property
    def layers(self) -> str:
        """One letter per layer."""
        repeats = math.ceil(self.num_layers / len(self.layer_plan))
        return (self.layer_plan * repeats)[: self.num_layers]

    @property
    def attention_size(self) -> int:
        """Inner width of attention, H * D; need not equal the hidden size."""
        return self.num_heads * self.head_dim

    @classmethod
    def preset(cls, name: str, **changes) -> "ModelConfig":
        """A named size, with some fields changed."""
        if name not in SIZES:
            raise UserError(f"no model size named {name!r}; there are {', '.join(SIZES)}")
        return cls(**SIZES[name] | changes)

    def count_parameters(self) -> ParameterCount:
        """Counted from the shapes; nothing is allocated."""
        hidden, inner = self.hidden_size, self.attention_size
        lightning = hidden * 3 * inner + 2 * hidden * inner + inner
        softmax = 2 * hidden * inner + 2 * hidden * self.num_kv_heads * self.head_dim
        expert = 3 * hidden * self.expert_size
        shared = 2 * hidden + hidden * self.num_experts  # two norms and the router
        num_softmax = self.layers.count(SOFTMAX)
        mixers = num_softmax * softmax + (self.num_layers - num_softmax) * lightning
        embeddings = 2 * self.vocab_size * hidden
        rest = mixers + self.num_layers * shared + hidden
        return ParameterCount(
            total=rest + self.num_layers * self.num_experts * expert + embeddings,
            active=rest + self.num_layers * self.experts_per_token * expert,
            embeddings=embeddings,
        )

    def weight_bytes(self, dtype: str, rest: str = "bfloat16") -> int:
        """Bytes of all weights; "int8": experts and projections, with an fp32 scale for each row, the others `rest`."""
        total = self.count_parameters().total
        if dtype != "int8":
            return total * DTYPE_BYTES[dtype]
        hidden, inner, num_softmax = self.hidden_size, self.attention_size, self.layers.count(SOFTMAX)
        num_lightning = self.num_layers - num_softmax
        norms_and_routers = hidden + self.num_layers * hidden * (2 + self.num_experts) + num_lightning * inner
        kept = norms_and_routers + 2 * self.vocab_size * hidden
        rows = num_lightning * (4 * inner + hidden)
        rows += num_softmax * (inner + 2 * self.num_kv_heads * self.head_dim + hidden)
        rows += self.num_layers * self.num_experts * (2 * self.expert_size + hidden)
        return total - kept + kept * DTYPE_BYTES[rest] + rows * DTYPE_BYTES["float32"]

    def estimate_memory(self, *, context: int, batch: int, dtype: str) -> MemoryEstimate:
        """Bytes for `batch` sequences of `context` tokens; keys and values have the weights' dtype, or 2 bytes."""
        num_softmax = self.layers.count(SOFTMAX)
        state = (self.num_layers - num_softmax) * self.num_heads * self.head_dim**2 * 4
        per_token = num_softmax * 2 * self.num_kv_heads * self.head_dim * max(2, DTYPE_BYTES[dtype])
        return MemoryEstimate(
            weights=self.weight_bytes(dtype), state=batch * state, key_values=batch * context * per_token
        )


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A ViT whose image is a square of `image_size` pixels (minimax-01.md section 12)."""

    image_size: int = 336
    patch_size: int = 14
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "hidden_size", "num_layers", "num_heads", "mlp_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} of an encoder must be at least 1, got {getattr(self, name)}")
        for whole, part in (("image_size", "patch_size"), ("hidden_size", "num_heads")):
            if getattr(self, whole) % getattr(self, part):
                raise UserError(
                    f"{whole} {getattr(self, whole)} of an encoder must be a multiple of {part} {getattr(self, part)}"
                )

    @property
    def side(self) -> int:
        """Patches along a side of the image."""
        return self.image_size // self.patch_size

    def processor(self, *, dynamic: bool = True) -> ImageProcessor:
        """What makes its input of an image."""
        return ImageProcessor(crop_size=self.image_size, patch_size=self.patch_size, dynamic=dynamic)

    def count_parameters(self) -> int:
        """Counted from the shapes; nothing is allocated."""
        hidden = self.hidden_size
        embeddings = hidden * (1 + 3 * self.patch_size**2 + self.side**2 + 1)
        layer = 4 * (hidden + 1) * hidden + 2 * hidden * self.mlp_size + self.mlp_size + hidden + 4 * hidden
        return embeddings + 2 * hidden + self.num_layers * layer


@dataclass(frozen=True, kw_only=True)
class VisionLanguageConfig:
    """An encoder's features, projected, in the place of the tokens `image_token` of a text model's prompt."""

    text: ModelConfig
    vision: VisionConfig
    image_token: int

    def __post_init__(self) -> None:
        if not 0 <= self.image_token < self.text.vocab_size:
            raise UserError(f"image_token must be one of the model's {self.text.vocab_size}, got {self.image_token}")

    @classmethod
    def preset(cls, name: str) -> "VisionLanguageConfig":
        """A named size."""
        if name not in VISION_LANGUAGE_SIZES:
            sizes = ", ".join(VISION_LANGUAGE_SIZES)
            raise UserError(f"no vision-language model size named {name!r}; there are {sizes}")
        size = VISION_LANGUAGE_SIZES[name]
        text = ModelConfig.preset(size["text"])
        return cls(text=text, vision=VisionConfig(**size["vision"]), image_token=size["image_token"])

    def weight_bytes(self, dtype: str, rest: str = "bfloat16") -> int:
        """As of `ModelConfig`; encoder and projector have the dtype of what int8 leaves."""
        kept = DTYPE_BYTES[rest if dtype == "int8" else dtype]
        return self.text.weight_bytes(dtype, rest) + self.count_vision_parameters() * kept

    @property
    def vocab_size(self) -> int:
        return self.text.vocab_size

    @property
    def max_positions(self) -> int:
        return self.text.max_positions

    def count_vision_parameters(self) -> int:
        """Of encoder, projector and newline, which are not the text model's."""
        hidden = self.text.hidden_size
        projector = (self.vision.hidden_size + 1) * hidden + (hidden + 1) * hidden
        return self.vision.count_parameters() + projector + hidden


def _ladder(hidden: int, layers: int, head_dim: int, expert: int, experts: int) -> dict:
    """A size of the scaling study as hybrid mixture of experts; its name says its total parameters."""
    heads = hidden // head_dim
    return dict(
        vocab_size=32768,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=max(1, heads // 4),
        head_dim=head_dim,
        num_experts=experts,
        expert_size=expert,
    )


SIZES = {
    "tiny": dict(
        vocab_size=4096,
        hidden_size=256,
        num_layers=8,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        rotary_dim=64,  # all of the head, so that transformers reads it too
        num_experts=8,
        expert_size=256,
    ),
    "70m": _ladder(384, 8, 64, 512, 8),
    "160m": _ladder(512, 16, 64, 512, 8),
    "410m": _ladder(768, 16, 64, 512, 16),
    "1b": _ladder(1024, 16, 128, 1024, 16),
    "3b": _ladder(1536, 24, 128, 1408, 16),
    "7b": _ladder(2048, 32, 128, 1920, 16),
    "minimax-text-01": dict(
        vocab_size=200_064,
        hidden_size=6144,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        rotary_dim=64,
        rope_theta=10_000_000.0,
        num_experts=32,
        expert_size=9216,
        max_positions=10_240_000,
    ),
}

PRESETS = {name: ModelConfig(**fields) for name, fields in SIZES.items()}
"""The named sizes."""

VISION_LANGUAGE_SIZES = {
    "tiny-vl": dict(
        text="tiny",
        vision=dict(image_size=112, hidden_size=192, num_layers=6, num_heads=6, mlp_size=768),
        image_token=4095,
    ),
    "minimax-vl-01": dict(
        text="minimax-text-01",
        vision=dict(hidden_size=1024, num_layers=24, num_heads=16, mlp_size=4096),
        image_token=200_025,
    ),
}

VISION_LANGUAGE_PRESETS = {name: VisionLanguageConfig.preset(name) for name in VISION_LANGUAGE_SIZES}
"""The named sizes of vision-language models."""
