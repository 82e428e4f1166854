"""What a sequence leaves behind for its next tokens: a state per lightning layer, keys and values per softmax layer."""

import torch
from torch import Tensor

from fulmen.model.config import LIGHTNING, ModelConfig


class LightningState:
    """One fp32 state [B, H, K, V], whatever the length of the sequence; None before the first token."""

    def __init__(self) -> None:
        self.state: Tensor | None = None


class KeyValues:
    """Keys and values [B, S, H_kv, D] of all tokens so far, in a buffer that doubles when it is full."""

    def __init__(self) -> None:
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add k, v [B, T, H_kv, D]; gives back those of all tokens."""
        start, self.length = self.length, self.length + k.shape[1]
        self.keys = _written(self.keys, k, start)
        self.values = _written(self.values, v, start)
        return self.keys[:, : self.length], self.values[:, : self.length]


class Cache:
    """The caches of all layers for a batch of sequences of equal length. The model advances it in place."""

    def __init__(self, config: ModelConfig, batch_size: int):
        self.batch_size = batch_size
        self.length = 0
        self.layers = [LightningState() if kind == LIGHTNING else KeyValues() for kind in config.layers]


def _written(buffer: Tensor | None, new: Tensor, start: int) -> Tensor:
    """The buffer [B, room, ...] with `new` [B, T, ...] written at `start`, moved to a larger one where it has to be."""
    end = start + new.shape[1]
    if buffer is None or buffer.shape[1] < end:
        grown = torch.empty(new.shape[0], max(64, 2 * end), *new.shape[2:], dtype=new.dtype, device=new.device)
        if buffer is not None:
            grown[:, :start] = buffer[:, :start]
        buffer = grown
    buffer[:, start:end] = new
    return buffer
