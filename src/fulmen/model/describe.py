"""A model's sizes and memory as text."""

from fulmen.model.config import DTYPE_BYTES, LIGHTNING, ModelConfig, VisionLanguageConfig


def describe(config: ModelConfig | VisionLanguageConfig, *, context: int, batch: int, dtype: str) -> str:
    """Layers, parameters, and the memory at inference for `batch` sequences of `context` tokens.

    dtype is that of the weights; keys and values are never narrower than 2 bytes and lightning states are fp32.
    """
    if isinstance(config, VisionLanguageConfig):
        return (
            _table(_vision_rows(config, dtype))
            + "\n\n"
            + describe(config.text, context=context, batch=batch, dtype=dtype)
        )
    count = config.count_parameters()
    memory = config.estimate_memory(context=context, batch=batch, dtype=dtype)
    num_lightning = config.layers.count(LIGHTNING)
    rows = [
        ("layers", f"{config.num_layers}: {num_lightning} lightning, {config.num_layers - num_lightning} softmax"),
        ("plan", f"{config.layer_plan}, repeated"),
        ("hidden size", f"{config.hidden_size}"),
        ("heads", f"{config.num_heads} of {config.head_dim} ({config.num_kv_heads} for keys and values of softmax)"),
        ("rotary", f"{config.rotary_dim} of {config.head_dim} dims, base {config.rope_theta:g}"),
        ("experts", f"{config.num_experts} of width {config.expert_size}, {config.experts_per_token} a token"),
        ("vocabulary", f"{config.vocab_size}"),
        ("positions", f"{config.max_positions}"),
        (
            "parameters",
            f"{_count(count.total)} total, {_count(count.active)} active, {_count(count.embeddings)} embedding",
        ),
        ("", ""),
        (f"memory for {batch} x {context} tokens", f"weights in {dtype}"),
        ("  weights", _bytes(memory.weights)),
        ("  lightning state", f"{_bytes(memory.state)} (fp32, whatever the context)"),
        ("  keys and values", _bytes(memory.key_values)),
        ("  together", f"{_bytes(sum(memory))} and the activations"),
    ]
    return _table(rows)


def _vision_rows(config: VisionLanguageConfig, dtype: str) -> list[tuple[str, str]]:
    vision, count = config.vision, config.count_vision_parameters()
    side = vision.side
    return [
        ("encoder", f"{vision.num_layers} layers, hidden size {vision.hidden_size}, {vision.num_heads} heads"),
        ("images", f"crops of {vision.image_size} pixels, patches of {vision.patch_size}: {side} x {side} of a crop"),
        ("image token", f"{config.image_token}"),
        ("parameters", f"{_count(vision.count_parameters())} encoder, {_count(count)} with projector and newline"),
        ("weights", f"{_bytes(count * max(2, DTYPE_BYTES[dtype]))} of them"),
        ("text model", "as follows"),
    ]


def _table(rows: list[tuple[str, str]]) -> str:
    left = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{left}}  {value}".rstrip() for name, value in rows)


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _bytes(number: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1e3:.1f} kB"
