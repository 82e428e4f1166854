"""What an engine's memory is divided into, reckoned before anything is loaded. No tensors."""

from dataclasses import dataclass, replace

from fulmen.config import UserError
from fulmen.model import ModelConfig
from fulmen.model.config import LIGHTNING, SOFTMAX

GB = 10**9

STATE_BYTES = 4
"""States are fp32, whatever the weights are."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How an engine uses its memory and its time."""

    max_sequences: int = 64  # that run at the same time
    max_context: int | None = None  # tokens of prompt and answer; None: as many as the model has positions for, or fit
    memory: int | None = None  # bytes for everything; None: what the device has free, or a quarter of it on a CPU
    page_size: int = 16  # tokens of a page of keys and values
    chunk_tokens: int = 512  # of prompts in one step
    prefix_cache: bool = True
    snapshot_interval: int = 1024  # tokens of a prompt between two states that the prefix cache keeps
    max_waiting: int = 1024  # requests

    def __post_init__(self) -> None:
        for name in ("max_sequences", "max_context", "memory", "page_size", "chunk_tokens", "snapshot_interval"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if self.max_waiting < 0:
            raise UserError(f"max_waiting must be 0 or more, got {self.max_waiting}")


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


def estimate_activations(config: ModelConfig, settings: EngineSettings, number_bytes: int) -> int:
    """Of one step: a piece of a prompt that ends a longest sequence, and the logits of all that decode."""
    tokens, k = settings.chunk_tokens, config.experts_per_token
    attention = 6 * config.hidden_size + 6 * config.attention_size
    experts = k * (3 * config.expert_size + config.hidden_size)
    logits = 3 * settings.max_sequences * config.vocab_size * 4
    context = config.max_positions if settings.max_context is None else settings.max_context
    gathered = 2 * min(context, config.max_positions) * config.num_kv_heads * config.head_dim * number_bytes
    has_pages = SOFTMAX in config.layers
    return tokens * (attention + experts) * max(number_bytes, 4) + logits + has_pages * gathered


def plan_memory(
    config: ModelConfig,
    settings: EngineSettings,
    *,
    budget: int,
    weights: int,
    activations: int | None = None,
    number_bytes: int = 2,
) -> MemoryPlan:
    """Divide `budget` bytes; `number_bytes` is the size of a cached key's number. `activations` None: an estimate.

    First comes one sequence of the longest context, then slots for the others as far as half of the rest goes, then
    snapshots, and what is left becomes pages. Raises UserError, with what would fit, if one sequence does not.
    """
    longest = min(settings.max_context or config.max_positions, config.max_positions)
    if settings.max_context is not None and settings.max_context > config.max_positions:
        raise UserError(f"max_context {settings.max_context} exceeds the model's {config.max_positions} positions")
    slot, page = slot_bytes(config), page_bytes(config, settings.page_size, number_bytes)
    if activations is None:
        longest, activations = _fitting(config, settings, budget - weights - slot, page, number_bytes)
    rest = budget - weights - activations - slot
    fitting = longest if page == 0 else max(0, rest) // page * settings.page_size
    least = settings.max_context or min(longest, 2 * settings.page_size)
    if rest < 0 or fitting < least:
        raise UserError(_refusal(budget, weights, activations, slot, fitting, least, rest))
    longest, notes = min(longest, fitting), []
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


def _fitting(config: ModelConfig, settings: EngineSettings, room: int, page: int, number_bytes: int) -> tuple[int, int]:
    """(the longest context, its activations): without a wish half of the room is for one sequence's pages at most."""
    longest = min(settings.max_context or config.max_positions, config.max_positions)
    if settings.max_context is None and page:
        longest = min(longest, max(1, room // 2 // page) * settings.page_size)
    wished = replace(settings, max_context=longest)
    return longest, estimate_activations(config, wished, number_bytes)


def _at_most(count: int, room: int, size: int) -> int:
    return count if size == 0 else max(0, min(count, room // size))


def _refusal(budget: int, weights: int, activations: int, slot: int, fitting: int, least: int, rest: int) -> str:
    parts = f"{_bytes(weights)} of weights, {_bytes(activations)} of activations, {_bytes(slot)} of states"
    if rest < 0:
        return f"{_bytes(budget)} of memory are not enough for {parts}: {_bytes(budget - rest)} are"
    return f"{least} tokens do not fit into {_bytes(budget)} beside {parts}: {fitting} would; give that as --context"


def _bytes(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1e3:.1f} kB"
