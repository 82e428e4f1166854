"""What an engine's memory is divided into, reckoned before anything is loaded. No tensors."""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

from fulmen.config import UserError
from fulmen.data.images import GRIDS
from fulmen.model import ModelConfig, VisionLanguageConfig
from fulmen.model.config import LIGHTNING, SOFTMAX
from fulmen.model.vision_language import CROPS_AT_ONCE
from fulmen.ops.softmax.paged import TOGETHER

GB = 10**9

STATE_BYTES = 4
"""States are fp32, whatever the weights are."""


DEFAULTS = {
    "cpu": {"chunk_tokens": 1024, "page_size": 16, "snapshot_interval": 1024},
    "cuda": {"chunk_tokens": 8192, "page_size": 64, "snapshot_interval": 8192},
}
"""Of `EngineSettings`, by the kind of device: it takes long pieces of prompts to keep a GPU busy."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How an engine uses its memory and its time; for None see `DEFAULTS`."""

    max_sequences: int = 64  # that run at the same time
    max_context: int | None = None  # tokens of prompt and answer; None: as many as the model has positions for, or fit
    memory: int | None = None  # bytes for everything; None: what the device has free, or a quarter of it on a CPU
    page_size: int | None = None  # tokens of a page of keys and values
    chunk_tokens: int | None = None  # of prompts in one step
    prefix_cache: bool = True
    snapshot_interval: int | None = None  # tokens of a prompt between two states that the prefix cache keeps
    max_waiting: int = 1024  # requests

    def __post_init__(self) -> None:
        for name in ("max_sequences", "max_context", "memory", "page_size", "chunk_tokens", "snapshot_interval"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if self.max_waiting < 0:
            raise UserError(f"max_waiting must be 0 or more, got {self.max_waiting}")

    def on(self, device: str) -> "EngineSettings":
        """With the defaults of a device ("cpu", "cuda:1" ...) where nothing was said."""
        kind = str(device).partition(":")[0]
        return replace(self, **{name: value for name, value in DEFAULTS[kind].items() if getattr(self, name) is None})


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes, and how many of what they are divided into."""

    budget: int
    weights: int
    activations: int
    slot_bytes: int  # the states of one sequence
    page_bytes: int
    slots: int
    snapshots: int
    pages: int
    page_size: int
    max_context: int
    notes: tuple[str, ...] = ()  # what was asked for and could not be had

    @property
    def total(self) -> int:
        cache = (self.slots + self.snapshots) * self.slot_bytes + self.pages * self.page_bytes
        return self.weights + self.activations + cache

    def table(self) -> str:
        """For a person to read, with the notes behind."""
        per_sequence = f"{_bytes(self.slot_bytes)} each"
        per_page = f"{_bytes(self.page_bytes)} each"
        tokens = self.pages * self.page_size
        rows = [
            ("weights", _bytes(self.weights), ""),
            ("activations", _bytes(self.activations), "at most, of one step"),
            ("states", _bytes(self.slots * self.slot_bytes), f"{self.slots} sequences at a time, {per_sequence}"),
            ("snapshots", _bytes(self.snapshots * self.slot_bytes), f"{self.snapshots} for the prefix cache"),
            ("pages", _bytes(self.pages * self.page_bytes), f"{self.pages} of {self.page_size} tokens, {per_page}"),
            ("together", _bytes(self.total), f"of {_bytes(self.budget)}"),
            ("longest sequence", f"{self.max_context}", f"tokens; {tokens} in all sequences together"),
        ]
        left, middle = (max(len(row[column]) for row in rows) for column in (0, 1))
        lines = [f"{name:<{left}}  {value:>{middle}}  {text}".rstrip() for name, value, text in rows]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def slot_bytes(config: ModelConfig) -> int:
    """The states of one sequence, all lightning layers."""
    return config.layers.count(LIGHTNING) * config.num_heads * config.head_dim**2 * STATE_BYTES


def page_bytes(config: ModelConfig, page_size: int, number_bytes: int) -> int:
    """Keys and values of a page's tokens, all softmax layers."""
    return config.layers.count(SOFTMAX) * page_size * 2 * config.num_kv_heads * config.head_dim * number_bytes


def estimate_activations(
    config: ModelConfig, settings: EngineSettings, number_bytes: int, is_int8: bool = False
) -> int:
    """Of one step: a piece of a prompt, and the logits of all that decode.

    Of int8 weights also the copy of a layer's largest matrices that products of many tokens take.
    """
    tokens, k = settings.chunk_tokens, config.experts_per_token
    attention = 6 * config.hidden_size + 6 * config.attention_size
    experts = k * (3 * config.expert_size + config.hidden_size)
    logits = 3 * settings.max_sequences * config.vocab_size * 4
    copied = is_int8 * 2 * config.num_experts * config.expert_size * config.hidden_size * number_bytes
    return tokens * (attention + experts) * max(number_bytes, 4) + logits + copied


def image_bytes(config: VisionLanguageConfig, settings: EngineSettings, number_bytes: int) -> int:
    """Of the largest image while it is encoded, some crops at a time, and put together, and of what a step inserts."""
    vision, hidden = config.vision, config.text.hidden_size
    tokens = CROPS_AT_ONCE * (vision.side**2 + 1)
    encoding = tokens * (6 * vision.hidden_size + 2 * vision.mlp_size) * max(number_bytes, 4)
    crops = 1 + max(rows * columns for rows, columns in GRIDS)
    # All crops, each image's and as one, and in fp32 those that are encoded now.
    pixels = (2 * crops + 2 * 4 * CROPS_AT_ONCE) * 3 * vision.image_size**2
    # As the groups' own, as one, with the newlines, and with the thumbnail before them.
    copies = 4 * crops * vision.side**2 * hidden * number_bytes
    return encoding + pixels + copies + settings.chunk_tokens * hidden * number_bytes


def gathered_bytes(config: ModelConfig, context: int, number_bytes: int) -> int:
    """Of one softmax layer's keys and values where a piece of a prompt continues sequences of a context."""
    tokens = max(context, TOGETHER) if SOFTMAX in config.layers else 0
    return 2 * tokens * config.num_kv_heads * config.head_dim * number_bytes


def plan_memory(
    config: ModelConfig | VisionLanguageConfig,
    settings: EngineSettings,
    *,
    budget: int,
    weights: int,
    activations: int | None = None,
    number_bytes: int = 2,
    is_int8: bool = False,
    device: str = "cpu",
) -> MemoryPlan:
    """Divide `budget` bytes.

    First comes one sequence of the longest context, then slots for the others as far as half of the rest goes, then
    snapshots, and what is left becomes pages.

    Args:
        activations: of a step that begins sequences, bytes; None: an estimate.
        number_bytes: of a key's number in the cache.
        is_int8: whether weights are, which an estimate differs with.
        device: whose defaults are taken where the settings are silent.

    Raises:
        UserError: one sequence of the longest context does not fit; it says what would.
    """
    config, settings, images = _settled(settings, config, device, number_bytes)
    slot, page = slot_bytes(config), page_bytes(config, settings.page_size, number_bytes)
    sizes = _Sizes(config, weights, activations, images, number_bytes, is_int8)
    longest, activations, rest = sizes.one_sequence(settings, budget)
    if not longest:
        raise UserError(_refusal(sizes, settings, budget))
    notes = []
    if longest < min(settings.max_context or config.max_positions, config.max_positions):
        notes.append(f"the model has {config.max_positions} positions; memory has room for {longest}")
    whole = -(-longest // settings.page_size)
    rest -= page * whole
    slots = 1 + _at_most(settings.max_sequences - 1, rest // 2, slot)
    if slots < settings.max_sequences:
        notes.append(f"{slots} sequences at a time fit, not {settings.max_sequences}, at {_bytes(slot)} of states each")
    rest -= (slots - 1) * slot
    snapshots = _at_most(4 * slots, rest // 2, slot) if settings.prefix_cache else 0
    if settings.prefix_cache and snapshots < 2:
        snapshots = 0
        notes.append(f"no prefix cache: there is no room for snapshots of {_bytes(slot)} beside the longest context")
    rest -= snapshots * slot
    most = (2 * slots + 1) * whole  # more than all that run and as much again is of no use
    return MemoryPlan(
        budget=budget,
        weights=weights,
        activations=activations,
        slot_bytes=slot,
        page_bytes=page,
        slots=slots,
        snapshots=snapshots,
        pages=min(whole + rest // page, most) if page else most,
        page_size=settings.page_size,
        max_context=longest,
        notes=tuple(notes),
    )


def _settled(
    settings: EngineSettings, config: ModelConfig | VisionLanguageConfig, device: str, number_bytes: int
) -> tuple[ModelConfig, EngineSettings, int]:
    """The text model's sizes, the settings with the device's defaults, and the bytes that images take beside."""
    if settings.max_context is not None and settings.max_context > config.max_positions:
        raise UserError(f"max_context {settings.max_context} exceeds the model's {config.max_positions} positions")
    settings = settings.on(device)
    if isinstance(config, VisionLanguageConfig):
        return config.text, settings, image_bytes(config, settings, number_bytes)
    return config, settings, 0


@dataclass(frozen=True)
class _Sizes:
    """What a model takes whatever the budget is; see `plan_memory`."""

    config: ModelConfig
    weights: int
    activations: int | None
    images: int
    number_bytes: int
    is_int8: bool

    def one_sequence(self, settings: EngineSettings, budget: int) -> tuple[int, int, int]:
        """(tokens of the longest sequence, 0 if it does not fit; activations; bytes left beside these and its state).

        Without a wish half of what there is goes to its pages at most.
        """
        slot, page = slot_bytes(self.config), page_bytes(self.config, settings.page_size, self.number_bytes)
        longest = settings.max_context or self.config.max_positions
        if settings.max_context is None and page:
            room = budget - self.weights - slot - self._activations(settings, 1)
            longest = min(longest, max(1, room // 2 // page) * settings.page_size)
        activations = self._activations(settings, longest)
        rest = budget - self.weights - activations - slot
        fitting = longest if page == 0 else max(0, rest) // page * settings.page_size
        least = settings.max_context or min(longest, 2 * settings.page_size)
        does_fit = rest >= 0 and fitting >= least
        return (min(longest, fitting) if does_fit else 0), activations, rest

    def _activations(self, settings: EngineSettings, context: int) -> int:
        found = self.activations
        if found is None:
            found = estimate_activations(self.config, settings, self.number_bytes, self.is_int8)
        return found + self.images + gathered_bytes(self.config, context, self.number_bytes)

    def enough(self, settings: EngineSettings, budget: int) -> int:
        """The least budget that does, where `budget` does not."""
        most = max(1, 2 * budget)
        while not self.one_sequence(settings, most)[0]:
            most *= 2
        return bisect_left(range(most), True, lo=budget, key=lambda tried: self.one_sequence(settings, tried)[0] > 0)

    def shorter(self, settings: EngineSettings, budget: int) -> int:
        """The longest context that does, where the one that is wished for does not; 0: none."""

        def is_too_long(context: int) -> bool:
            return not self.one_sequence(replace(settings, max_context=context), budget)[0]

        return bisect_left(range(settings.max_context or 1), True, lo=1, key=is_too_long) - 1


def _at_most(count: int, room: int, size: int) -> int:
    return count if size == 0 else max(0, min(count, room // size))


def _refusal(sizes: _Sizes, settings: EngineSettings, budget: int) -> str:
    _, activations, _ = sizes.one_sequence(settings, budget)
    parts = f"{_bytes(sizes.weights)} of weights, {_bytes(activations)} of activations"
    parts += f", {_bytes(slot_bytes(sizes.config))} of states"
    enough, shorter = _bytes(sizes.enough(settings, budget), math.ceil), sizes.shorter(settings, budget)
    if not shorter:
        return f"{_bytes(budget)} of memory are not enough for {parts} and keys and values: {enough} are"
    wish = f"{settings.max_context} tokens do not fit into {_bytes(budget)} beside {parts}"
    return f"{wish}: {shorter} would; give that as --max-context, or {enough} of memory"


def _bytes(number: float, whole: Callable[[float], int] = round) -> str:
    """With one decimal, to which `whole` rounds."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if number >= size:
            return f"{whole(number * 10 / size) / 10:.1f} {unit}"
    return f"{whole(number / 100) / 10:.1f} kB"
