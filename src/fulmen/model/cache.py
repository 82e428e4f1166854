"""What a sequence leaves behind for its next tokens: a state per lightning layer, keys and values per softmax layer."""

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
        end = self.length + k.shape[1]
        if self.keys is None:
            self.keys, self.values = k[:, :0], v[:, :0]
        self.reserve(end)
        self.keys[:, self.length : end] = k
        self.values[:, self.length : end] = v
        self.length = end
        return self.keys[:, :end], self.values[:, :end]

    def reserve(self, length: int) -> None:
        """Make sure that the buffers, once there are any, have room for `length` tokens."""
        if self.keys.shape[1] < length:
            room = max(64, 2 * length)
            self.keys, self.values = (_moved(old, self.length, room) for old in (self.keys, self.values))


class Cache:
    """The caches of all layers for a batch of sequences of equal length. The model advances it in place."""

    def __init__(self, config: ModelConfig, batch_size: int):
        self.batch_size = batch_size
        self.length = 0
        self.layers = [LightningState() if kind == LIGHTNING else KeyValues() for kind in config.layers]


def _moved(buffer: Tensor, length: int, room: int) -> Tensor:
    """Its first `length` tokens [B, length, ...] in a new buffer [B, room, ...]."""
    larger = buffer.new_empty(buffer.shape[0], room, *buffer.shape[2:])
    larger[:, :length] = buffer[:, :length]
    return larger
