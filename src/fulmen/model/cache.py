"""What a sequence leaves behind for its next tokens: a state per lightning layer, keys and values per softmax layer.

Here are what the model asks of any cache, and the cache of a batch that advances together; `pool.py` has the one of
sequences that come and go.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fulmen.config import UserError
from fulmen.model.config import LIGHTNING, ModelConfig
from fulmen.ops.cpu.step import LayerMemory, Places
from fulmen.ops.lightning import silu_lightning_attention
from fulmen.ops.softmax import softmax_attention

SMALLEST = 64
"""Tokens that a buffer of keys and values has room for, at least."""


class NextTokens(NamedTuple):
    """What the step of all layers in one call needs of a cache to decode a token of each sequence."""

    owner: object  # that lives as long as the memories are its
    memories: list[LayerMemory]
    places: Places


class LayerCache(Protocol):
    """What an attention module asks of a cache."""

    def attend(self, *computed: Tensor) -> Tensor:
        """[B, T, H, D] of the new tokens over themselves and all before, which it keeps: lightning layers give qkv
        [B, T, H, 3, D] and rates [H], softmax layers q, k and v [B, T, H or H_kv, D] in their positions."""


class SequenceCache(Protocol):
    """What the model asks of a cache; it is advanced in place."""

    layers: list[LayerCache]

    def check(self, tokens: Tensor, config: ModelConfig) -> None:
        """Raise UserError where these tokens cannot continue the sequences; nothing has changed then."""

    def positions(self, tokens: Tensor) -> Tensor:
        """[1, T] int64 on the tokens' device: the place of each of tokens [B, T] in its sequence."""

    def next_tokens(self, x: Tensor) -> NextTokens | None:
        """What decoding embedded tokens x takes, with room for them; None if not each sequence brings just one, or its
        memory is empty or is not as the step takes it."""

    def advance(self, count: int) -> None:
        """All layers have attended to `count` more tokens of each row."""

    def stepped(self) -> None:
        """A step on `next_tokens` has seen and written them."""


class LightningState:
    """One fp32 state [B, H, K, V], whatever the length of the sequence; None before the first token."""

    def __init__(self) -> None:
        self.state: Tensor | None = None

    def attend(self, qkv: Tensor, rates: Tensor) -> Tensor:
        """[B, T, H, D] of projections qkv [B, T, H, 3, D], see `silu_lightning_attention`."""
        out, self.state = silu_lightning_attention(qkv, rates, state=self.state, return_state=True)
        return out

    def memory(self, x: Tensor) -> LayerMemory | None:
        """For a step on x, which changes the state in place; None if it is not as the step takes it."""
        state = self.state
        if state is None or state.device != x.device or state.dtype != torch.float32 or state.requires_grad:
            return None
        return LayerMemory(state, None, None) if state.is_contiguous() else None

    def stepped(self) -> None:
        """A step has changed the state, whose shape says nothing of the tokens."""


class KeyValues:
    """Keys and values [B, S, H_kv, D] of all tokens so far, in a buffer that doubles when it is full."""

    def __init__(self) -> None:
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, T, H, D] of q over k, v [B, T, H_kv, D] and those before."""
        return softmax_attention(q, *self.append(k, v))

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
            room = max(SMALLEST, 2 * length)
            self.keys, self.values = (_moved(old, self.length, room) for old in (self.keys, self.values))

    def memory(self, x: Tensor) -> LayerMemory | None:
        """For a step on x, with room for its tokens; None if it is not as the step takes it."""
        if self.keys is None or self.keys.device != x.device or self.keys.dtype != x.dtype:
            return None
        self.reserve(self.length + 1)
        return LayerMemory(None, self.keys, self.values)

    def stepped(self) -> None:
        """A step has written a token of each sequence."""
        self.length += 1


class Cache:
    """The caches of all layers for a batch of sequences of equal length. The model advances it in place."""

    def __init__(self, config: ModelConfig, batch_size: int):
        self.config = config
        self.batch_size = batch_size
        self.length = 0
        self.layers = [LightningState() if kind == LIGHTNING else KeyValues() for kind in config.layers]

    def check(self, tokens: Tensor, config: ModelConfig) -> None:
        check_config(self.config, config)
        if self.batch_size != tokens.shape[0]:
            raise UserError(f"the cache is for {self.batch_size} sequences, got tokens {tuple(tokens.shape)}")
        check_positions(self.length + tokens.shape[1], config)

    def positions(self, tokens: Tensor) -> Tensor:
        return torch.arange(self.length, self.length + tokens.shape[1], device=tokens.device)[None]

    def next_tokens(self, x: Tensor) -> NextTokens | None:
        if x.shape[1] != 1 or not self.length:
            return None
        memories = [layer.memory(x) for layer in self.layers]
        if None in memories:
            return None
        return NextTokens(self, memories, Places.plain(self.batch_size, self.length))

    def advance(self, count: int) -> None:
        self.length += count

    def stepped(self) -> None:
        self.length += 1
        for layer in self.layers:
            layer.stepped()


def check_positions(count: int, config: ModelConfig) -> None:
    """Raise UserError if a sequence of so many tokens is longer than the model's."""
    if count > config.max_positions:
        raise UserError(f"{count} positions exceed the model's max_positions {config.max_positions}")


def check_config(ours: ModelConfig, models: ModelConfig) -> None:
    """Raise UserError if a cache is another model's: a kernel would read past its ends."""
    if ours is not models and ours != models:
        raise UserError("the cache was made for a model of another configuration; make one with this model's")


def _moved(buffer: Tensor, length: int, room: int) -> Tensor:
    """Its first `length` tokens [B, length, ...] in a new buffer [B, room, ...]."""
    larger = buffer.new_empty(buffer.shape[0], room, *buffer.shape[2:])
    larger[:, :length] = buffer[:, :length]
    return larger
