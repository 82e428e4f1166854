"""A plan of serving over several GPUs: what falls to each of them, and how long a prompt and a next token take.

`fulmen.serve.plan` divides the memory of all GPUs together; here is how much of it a single one holds. Attention and
vocabulary are split over tp, all GPUs, and experts over ep, as many as divide them, and by their width over the rest.
"""

import math
from dataclasses import dataclass

from fulmen.config import UserError
from fulmen.model import ModelConfig, VisionLanguageConfig
from fulmen.model.config import DTYPE_BYTES, LIGHTNING, SOFTMAX
from fulmen.parallel.plan.job import FP32, Piece
from fulmen.parallel.plan.machines import Group, Machine
from fulmen.parallel.plan.timing import layer_work
from fulmen.parallel.plan.training import columns, size

KEPT = "bfloat16"
"""The dtype of what int8 weights leave."""

NUMBER = 2
"""Bytes of what goes from layer to layer, and of keys and values unless weights are wider."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """A model over `devices` GPUs of one machine, its weights of a dtype of `DTYPE_BYTES`.

    Raises UserError where heads or the width of experts cannot be split.
    """

    model: ModelConfig | VisionLanguageConfig
    machine: Machine
    devices: int
    dtype: str

    def __post_init__(self) -> None:
        config = self.config
        if config.num_heads % self.devices:
            raise UserError(f"{config.num_heads} heads cannot be split over {self.devices} devices")
        if config.expert_size % self.etp:
            raise UserError(f"experts of width {config.expert_size} cannot be split over {self.etp} devices each")

    @property
    def config(self) -> ModelConfig:
        """Of the text model."""
        return self.model if isinstance(self.model, ModelConfig) else self.model.text

    @property
    def ep(self) -> int:
        return math.gcd(self.devices, self.config.num_experts)

    @property
    def etp(self) -> int:
        return self.devices // self.ep

    @property
    def weights(self) -> float:
        """Bytes on each GPU: all that is split, and what all hold alike: norms, routers, and what sees images."""
        config = self.config
        alike = config.num_layers * config.hidden_size * (2 + config.num_experts) + config.hidden_size
        if isinstance(self.model, VisionLanguageConfig):
            alike += self.model.count_vision_parameters()
        kept = alike * DTYPE_BYTES[KEPT if self.dtype == "int8" else self.dtype]
        return (self.model.weight_bytes(self.dtype) - kept) / self.devices + kept

    @property
    def state(self) -> float:
        """Bytes on each GPU of one sequence, whatever its length."""
        config = self.config
        return config.layers.count(LIGHTNING) * config.num_heads / self.devices * config.head_dim**2 * FP32

    @property
    def key_values(self) -> float:
        """Bytes on each GPU of one token; GPUs that are more than the heads of keys hold copies."""
        config = self.config
        heads = max(1.0, config.num_kv_heads / self.devices)
        return config.layers.count(SOFTMAX) * 2 * heads * config.head_dim * max(NUMBER, DTYPE_BYTES[self.dtype])

    def prefill_seconds(self, tokens: int, chunk: int) -> float:
        """Of a prompt in pieces of `chunk` tokens, nobody else being served, with nothing hidden.

        Every piece reads all weights, and of int8 ones writes and reads a copy that products take.
        """
        config, machine = self.config, self.machine
        piece = Piece(config=config, context=tokens, tp=self.devices, ep=self.ep, etp=self.etp)
        work = sum(layer_work(piece, kind, machine, 1).total() for kind in config.layers)
        copies = 2 * piece.number * (self.dtype == "int8")
        moved = self.weights * (1 + copies / DTYPE_BYTES[self.dtype])
        pieces = math.ceil(tokens / chunk)
        return work + pieces * (moved / (machine.bandwidth * machine.passes) + self._talk(min(chunk, tokens)))

    def decode_seconds(self, sequences: int, context: int) -> float:
        """Of a step that gives each of some sequences of `context` tokens its next one: bytes read, and talking."""
        config, machine = self.config, self.machine
        # Experts that nobody chose are not read.
        idle = (1 - config.experts_per_token / config.num_experts) ** sequences
        experts = 3 * config.hidden_size * config.expert_size * config.num_experts * config.num_layers
        unread = idle * experts * DTYPE_BYTES[self.dtype] / self.devices
        states = sequences * (2 * self.state + context * self.key_values)
        read = self.weights - unread + states
        return read / (machine.bandwidth * machine.passes) + self._talk(sequences)

    def table(self, *, context: int, sequences: int, chunk: int) -> str:
        """For a person to read."""
        each = self.weights + self.state + context * self.key_values
        name = self.machine.name
        rows = [
            (f"on each {name}", f"tp {self.devices}, ep {self.ep}, etp {self.etp}"),
            ("  weights", size(self.weights)),
            ("  a sequence's states", size(self.state)),
            (f"  keys and values of {context} tokens", size(context * self.key_values)),
            ("  together", f"{size(each)} and the activations"),
            ("a prompt, an estimate", f"{self.prefill_seconds(context, chunk):.3g} s for {context} tokens"),
            ("a next token", f"{1e3 * self.decode_seconds(1, context):.3g} ms after {context} tokens, alone"),
        ]
        if sequences > 1:
            step = 1e3 * self.decode_seconds(sequences, context // sequences)
            rows.append(("", f"{step:.3g} ms of {sequences} sequences of {context // sequences} tokens"))
        return columns(rows)

    def _talk(self, tokens: int) -> float:
        """Of one step through all layers: gathered for the heads and summed up, out to the experts and back."""
        tp, ep, etp = Group("tp", self.devices, 1), Group("ep", self.ep, 1), Group("etp", self.etp, self.ep)
        stream = tokens / self.devices * self.config.hidden_size * NUMBER
        rows = stream * self.config.experts_per_token
        layer = [
            ("all_gather", stream, tp),
            ("reduce_scatter", stream * self.devices, tp),
            ("all_to_all", rows, ep),
            ("all_gather", rows, etp),
            ("reduce_scatter", rows * self.etp, etp),
            ("all_to_all", rows, ep),
        ]
        return self.config.num_layers * sum(self.machine.seconds(*collective) for collective in layer)
