"""Training over each axis of the mesh: the same losses as on one rank, the time of a step, and a rank's memory."""

import ctypes
import gc
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from fulmen.bench.gpu import matrix_rate
from fulmen.bench.train import flops
from fulmen.data import Batch, Document, PackedLoader, Tokenizer
from fulmen.model import LanguageModel, ModelConfig
from fulmen.parallel import Mesh, MeshSizes, World
from fulmen.train import Trainer, TrainRecipe
from fulmen.train.language import LanguageObjective
from fulmen.train.recipe import OptimizerSection, TokenScheduleSection, TrainSection
from ranks import planned
from ranks.timing import finish

GROUPS = 2
"""Of tokens in an expert layer."""

SAME, TIMED, WARM = 20, 5, 2
"""Steps whose losses are compared with one rank's; that are timed, and that come before these where nothing is
compared."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """A model and its steps of `batch` random tokens, in rows of equal samples."""

    config: ModelConfig
    batch: int
    row: int
    sample: int
    dtype: torch.dtype = torch.float32
    checkpoint: bool = False

    @property
    def recipe(self) -> TrainRecipe:
        """Nothing is dropped, since what is depends on the rows."""
        return TrainRecipe(
            optimizer=OptimizerSection(learning_rate=1e-3),
            schedule=TokenScheduleSection(steps=1000, warmup=10, batch_tokens=self.batch, micro_batch_tokens=self.row),
            train=TrainSection(
                precision=str(self.dtype).removeprefix("torch."), capacity_factor=0.0, checkpoint_layers=self.checkpoint
            ),
        )

    @property
    def shape(self) -> dict[str, Any]:
        """As the planner asks for it."""
        how = {"batch": self.batch, "context": self.sample}
        return how | {"samples": self.row // self.sample, "checkpoint": self.checkpoint}

    def rows(self, step: int) -> list[Batch]:
        """The same on every rank."""
        random = torch.Generator().manual_seed(step)
        ends = torch.arange(0, self.row + 1, self.sample, dtype=torch.int32)
        found = []
        for _ in range(self.batch // self.row):
            # Every token is near the one before, so that there is something to learn.
            steps = torch.randint(-3, 4, (1, self.row + 1), generator=random)
            tokens = steps.cumsum(dim=1) % self.config.vocab_size
            found.append(Batch(tokens[:, :-1], tokens[:, 1:], ends))
        return found


def small(device: torch.device) -> Work:
    """For losses to be compared: fp32, rows that three samples share."""
    config = ModelConfig.preset("tiny", vocab_size=512, hidden_size=128, num_layers=4, layer_plan="LLLS")
    sample = 96 if device.type == "cpu" else 512
    return Work(config=config, batch=8 * 3 * sample, row=3 * sample, sample=sample)


def middle() -> Work:
    """1B parameters in bf16: four rows."""
    return Work(config=ModelConfig.preset("1b"), batch=2**18, row=2**16, sample=2**13, dtype=torch.bfloat16)


def large(world: int) -> Work:
    """7B parameters in bf16, layers computed again: two rows a rank."""
    return Work(
        config=ModelConfig.preset("7b"),
        batch=2 * world * 2**15,
        row=2**15,
        sample=2**13,
        dtype=torch.bfloat16,
        checkpoint=True,
    )


def axes(device: torch.device) -> list[dict]:
    """A small model over each axis: how far 20 losses and all weights after them are from those of one rank, which
    trains while the others wait."""
    work = small(device)
    alone = _trained(work, None, device, SAME) if dist.get_rank() == 0 else None
    rows = [{"mesh": "one rank"} | _cost(alone)]
    for name, sizes, keep in meshes(dist.get_world_size()):
        found, row = _trained(work, sizes, device, SAME, keep_weights=keep), {"mesh": name}
        if alone is not None:
            losses = max(abs(a - b) for a, b in zip(found["losses"], alone["losses"], strict=True))
            pairs = ((found["weights"][key], weight) for key, weight in alone["weights"].items())
            weights = max((a.view_as(b) - b).abs().max().item() for a, b in pairs)
            row |= {"losses off by": losses, "weights off by": weights}
        rows.append(_shown(row | _cost(found)))
    return rows


def rows(device: torch.device) -> list[dict]:
    """Whole rows to each rank, or a part of each row, with weights gathered for each or once a step."""
    world, work, found = dist.get_world_size(), middle(), []
    spread = [_mesh({"dp": world}), _mesh({"cp": world}), _mesh({"cp": world}, keep=True)]
    for name, sizes, keep in [("one rank", None, False), *spread]:
        trained = None
        if sizes is not None or dist.get_rank() == 0:
            trained = _trained(work, sizes, device, WARM, keep_weights=keep)
        plan = planned.step(work.config, sizes or MeshSizes().fitted(1), groups=GROUPS, keep=keep, **work.shape)
        found.append(_shown({"mesh": name} | _cost(trained) | plan))
    return found


def fsdp(device: torch.device) -> list[dict]:
    """7B parameters, sharded over all ranks: tokens a second of each, the share of the rate that products have alone,
    and the planner's figures beside them."""
    world = dist.get_world_size()
    work, sizes = large(world), MeshSizes(dp=world).fitted(world)
    found = _cost(_trained(work, sizes, device, WARM))
    rate, speed = matrix_rate(), work.batch / world / (found["ms"] / 1e3)
    row = {"mesh": f"dp {world}"} | found | {"tokens/s of a GPU": speed, "matrix TFLOP/s": rate / 1e12}
    row |= {"share of the matrix rate": speed * flops(work.config, work.sample) / rate}
    row |= planned.step(work.config, sizes, **work.shape)
    return [_shown(row)]


def meshes(world: int) -> list[tuple[str, MeshSizes, bool]]:
    """All ranks along each axis, of four and more some meshes of several, and one whose weights stay gathered."""
    single = [{axis: world} for axis in ("dp", "cp", "tp", "pp", "ep", "etp")]
    mixed = [{"cp": world, "ep": world}, {"ep": world // 2, "etp": 2}, {"dp": 2, "cp": world // 2, "ep": world}]
    return [*(_mesh(used) for used in single + mixed * (world >= 4)), _mesh({"cp": world}, keep=True)]


def _mesh(used: dict[str, int], *, keep: bool = False) -> tuple[str, MeshSizes, bool]:
    """Of all ranks: what it is called, its axes, and whether weights stay gathered."""
    name = " x ".join(f"{axis} {size}" for axis, size in used.items()) + ", weights kept" * keep
    return name, MeshSizes(**used).fitted(dist.get_world_size()), keep


class _RandomRows(LanguageObjective):
    """Language made up, so that no step waits for its data."""

    def __init__(self, work: Work, model: LanguageModel, device: torch.device, world: World | None):
        tokenizer = Tokenizer.train(["no text is read"], 264)
        loader = PackedLoader(
            [Document("no text is read", "")] * 2, tokenizer, seed=0, batch_tokens=16, sequence_length=16
        )
        super().__init__(model, loader, tokenizer, work.recipe, device, world=world)
        self._work = work

    def next_batches(self, seen: int) -> list[Batch]:
        return self._work.rows(seen)


def _trained(
    work: Work, sizes: MeshSizes | None, device: torch.device, steps: int, *, keep_weights: bool = False
) -> dict[str, Any]:
    """Losses of so many steps and all weights after them; seconds of further ones, and this rank's bytes at most.

    sizes: None trains on this rank alone.
    """
    _forget(device)
    before = _memory(device)
    trainer = _trainer(work, None if sizes is None else World(Mesh(sizes, device.type)), device, keep_weights)
    losses = [trainer.train_step()["loss"] for _ in range(steps)]
    weights = _weights(trainer.model, sizes) if steps == SAME else {}
    seconds = []
    for _ in range(TIMED):
        if sizes is not None:
            dist.barrier()
        started = time.perf_counter()
        trainer.train_step()
        finish(device)
        seconds.append(time.perf_counter() - started)
    cost = (statistics.median(seconds), _memory(device) - before)
    return {"losses": losses, "weights": weights, "cost": cost}


def _trainer(work: Work, world: World | None, device: torch.device, keep_weights: bool) -> Trainer:
    torch.manual_seed(0)
    with device if work.dtype == torch.bfloat16 else torch.device("cpu"):  # a CPU takes minutes for 7B numbers
        model = LanguageModel(work.config)
    model = model.to(device)
    objective = _RandomRows(work, model, device, world)
    if world is not None:
        world.shard(model, token_groups=GROUPS, keep_weights=keep_weights, dtype=objective.dtype)
    return Trainer(objective, work.recipe, device, world)


def _weights(model: LanguageModel, sizes: MeshSizes | None) -> dict[str, Tensor]:
    """All of them whole, those of other stages too."""
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    own = {name: (w.full_tensor() if isinstance(w, DTensor) else w).cpu().clone() for name, w in own.items()}
    if sizes is None or sizes.pp == 1:
        return own
    stages: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(stages, own)
    return {name: weight for stage in stages for name, weight in stage.items()}


def _cost(found: dict[str, Any] | None) -> dict[str, float]:
    """The slowest rank's time and the fullest one's memory."""
    worst = torch.tensor((0.0, 0.0) if found is None else found["cost"], dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return {"ms": 1e3 * worst[0].item(), "MB of a rank": worst[1].item() / 1e6}


def _shown(row: dict) -> dict:
    if dist.get_rank() == 0:
        print(row, flush=True)
    return row


def _forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the most begins anew, from what there is


def _memory(device: torch.device) -> float:
    """Bytes at most since all was forgotten."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
