"""This process among the ranks that train one model. Alone it is the whole world, and every method costs nothing."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fulmen.checkpoint.names import text_model
from fulmen.config import UserError
from fulmen.data import Batch
from fulmen.data.images import PlacedImage
from fulmen.model.cache import SequenceCache
from fulmen.model.config import ModelConfig
from fulmen.model.decoder import TrainingLoss
from fulmen.ops.experts import Routing, balance_loss
from fulmen.parallel.apply import begin_row, parallelize
from fulmen.parallel.capacity import drop_rate, sum_counts
from fulmen.parallel.context import SliceContext
from fulmen.parallel.cut import Cut
from fulmen.parallel.gather import GatheredWeights
from fulmen.parallel.gradients import total_norm
from fulmen.parallel.mesh import Mesh, MeshSizes
from fulmen.parallel.pipeline import Pipeline, Rows, without_gradients
from fulmen.parallel.sequence import part_lengths
from fulmen.parallel.snapshot import ShardedSnapshots, WholeSnapshots
from fulmen.parallel.tensor import finish_gradients
from fulmen.parallel.watch import Watch
from fulmen.run import SnapshotStore

T = TypeVar("T")


class SharedError(UserError):
    """One that all ranks raise, and that the first rank tells of for all of them."""

    @property
    def told_by_first(self) -> bool:
        """Whether that is another rank than this."""
        return not is_first_rank()


class LostRankError(RuntimeError):
    """A collective has failed, because another rank has ended or did not come for it."""


def is_first_rank() -> bool:
    """Whether this process tells people what all have done: the first that torchrun has started, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


TIMEOUT = timedelta(minutes=10)
"""That a collective may wait for a rank."""


def restarts() -> int:
    """How often torchrun has begun this run again, because a rank was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


class Slice(NamedTuple):
    """What one rank computes of a packed row, as `LanguageModel.loss` takes it."""

    tokens: Tensor  # [1, T_r]
    targets: Tensor  # [1, T_r]
    arguments: dict[str, SequenceCache | Tensor]  # `cache`, or `cu_seqlens` where the row is whole
    images: tuple[PlacedImage, ...] = ()


class World:
    """The ranks of a mesh; None is this process alone."""

    def __init__(self, mesh: Mesh | None = None, watch: Watch | None = None):
        """watch: told where this rank is, to say who is waited for."""
        self._mesh, self._watch = mesh, watch
        self._pipeline: Pipeline | None = None
        self._kept: nn.Module | None = None  # whose weights stay gathered

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self._mesh is None or dist.get_rank() == 0

    @property
    def is_alone(self) -> bool:
        """Whether this process was not started as one of several ranks."""
        return self._mesh is None

    @property
    def replicas(self) -> int:
        """How many rows are computed at the same time."""
        return 1 if self._mesh is None else self._mesh.sizes.dp

    def at(self, where: str) -> None:
        """This rank has come to a place where it may have to wait for others."""
        if self._watch is not None:
            self._watch.at(where)

    def check_rows(self, rows: int) -> None:
        """Raise UserError if so few in a step leave a replica fewer than its pipeline has stages."""
        if self._mesh is not None and self._mesh.sizes.pp > -(-rows // self.replicas):
            raise UserError(
                f"{rows} rows in a step are too few for {self.replicas} replicas of mesh.pp = {self._mesh.sizes.pp} "
                "stages: make schedule.micro_batch_tokens smaller, or take fewer stages"
            )

    def shard(self, model: nn.Module, *, keep_weights: bool = False, **how: Any) -> None:
        """Spread a model, the same on every rank, over them all, as `parallelize` is told.

        keep_weights: they stay gathered until the last row of a step has gone backward (`begin_row`).
        """
        if self._mesh is not None:
            with _shared():
                self._waits = parallelize(model, self._mesh, **how)
            if self.any(not any(p.requires_grad for p in model.parameters())):
                raise SharedError("train.freeze leaves a stage of the pipeline nothing to train: take mesh.pp = 1")
            if self._mesh.sizes.cp > 1:
                # NCCL wants all of a group in its first collective, and the ring leaves out ranks that need nothing.
                dist.all_reduce(torch.zeros(1, device=self._mesh.device), group=self._mesh.group("cp"))
            self._row = self._mesh.dense["cp", "tp"]._flatten("row").get_group()
            self._kept = model if keep_weights else None
            if self._mesh.sizes.pp > 1:
                self._pipeline = Pipeline(text_model(model), self._mesh.group("pp"), self._mesh.device)

    def run(
        self,
        batches: Sequence[Batch],
        forward: Callable[[Batch], TrainingLoss],
        weigh: Callable[[TrainingLoss, bool], Tensor] | None,
        config: ModelConfig,
        dtype: torch.dtype,
    ) -> list[tuple[TrainingLoss, bool]]:
        """This rank's part of the losses of rows, without gradients, and whether each counts (`share`); the last one
        alone with its routing.

        forward: of a row what `model.loss` gives, for what `slice` gives of it. weigh: of that, and whether it counts,
        the share in the loss of all rows, of which the gradients are added to the model's; None goes forward alone.
        config: of the text model. dtype: of what goes from stage to stage.
        """
        rows = list(self.share(batches))
        if self._pipeline is None:
            found = []
            for left, (batch, counts) in zip(reversed(range(len(rows))), rows, strict=True):
                self._begin_row(trains=weigh is not None, last=left == 0)
                found.append(_forward_backward(forward(batch), weigh, counts, left == 0))
        else:
            found = []
            self._begin_row(trains=weigh is not None, last=False)
            last = lambda: self._begin_row(trains=True, last=True)  # noqa: E731
            for part in [rows] if weigh else [[row] for row in rows]:
                asked = Rows(len(part), lambda n, part=part: forward(part[n][0]), _weigher(weigh, part), last)
                shape = self._sent_shape(part[0][0], config)
                found += self._pipeline.run(asked, shape, dtype, backward=weigh is not None)
        return [(loss, counts) for loss, (_, counts) in zip(found, rows, strict=True)]

    def _begin_row(self, *, trains: bool, last: bool) -> None:
        if self._kept is not None:
            begin_row(self._kept, trains=trains, last=last)

    def _sent_shape(self, batch: Batch, config: ModelConfig) -> tuple[int, int, int]:
        """Of the hidden vectors of a row that this rank has between two layers."""
        sizes, tokens = self._mesh.sizes, self.slice(batch, config).tokens.shape[1]
        return 1, part_lengths(tokens, sizes.tp)[self._mesh.rank("tp")], config.hidden_size

    def of_whole_row(self, loss: TrainingLoss, config: ModelConfig) -> TrainingLoss:
        """A rank's loss with the counts of its whole row in its routing, and with its share of the row's balance."""
        if self._mesh is None:
            return loss
        routing = sum_counts(loss.routing, self._row)
        balance = torch.stack([balance_loss(r) for r in routing]).sum() / config.num_layers
        return loss._replace(routing=routing, balance=balance)

    def expert_metrics(self, routing: Sequence[Routing]) -> dict[str, float]:
        """Of several ranks: the share of a row's choices dropped, and seconds waited for tokens since last asked."""
        if self._mesh is None:
            return {}
        return {"drop_rate": drop_rate(routing, self._row), "expert_wait": self._waits.take()}

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Of all gradients laid end to end, on every rank the same."""
        norm = total_norm(parameters)
        if self._pipeline is not None:
            square = norm.square()
            dist.all_reduce(square, group=self._mesh.group("pp"))
            norm = square.sqrt()
        return norm

    def finish_gradients(self, model: nn.Module) -> None:
        """Make gradients whole after the last backward pass of a step."""
        if self._mesh is not None:
            finish_gradients(model, self._mesh)

    def share(self, rows: Sequence[T]) -> Iterator[tuple[T, bool]]:
        """This rank's part of the rows, which are dealt out to the replicas in turn, and whether each counts.

        All ranks get as many, since all compute every layer together: where rows are missing, one that does not count.
        """
        replica = 0 if self._mesh is None else self._mesh.rank("dp")
        for start in range(0, len(rows), self.replicas):
            mine = start + replica
            yield rows[min(mine, len(rows) - 1)], mine < len(rows)

    def slice(self, batch: Batch, config: ModelConfig) -> Slice:
        """This rank's part of a row, which the ranks of a replica share."""
        if self._mesh is None or self._mesh.sizes.cp == 1:
            return Slice(batch.tokens, batch.targets, {"cu_seqlens": batch.cu_seqlens}, batch.images)
        cut, rank = Cut.of(batch.cu_seqlens, self._mesh.sizes.cp, balanced=True), self._mesh.rank("cp")
        context = SliceContext(config, cut, self._mesh.group("cp"))
        images = cut.take_images(batch.images, rank)
        return Slice(cut.take(batch.tokens, rank), cut.take(batch.targets, rank), {"cache": context}, images)

    def sum(self, *values: float) -> list[float]:
        """Each value's sum over all rows, of which every rank has computed its own part."""
        if self._mesh is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        for axis in ("pp", "dp", "cp", "tp"):
            dist.all_reduce(total, group=self._mesh.group(axis))
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return any(self._gather(flag))

    def together(self, work: Callable[[], T]) -> T:
        """`work()`, in which no rank waits for another; a UserError of any rank is raised on all of them."""
        if self._mesh is None:
            return work()
        value, error = _tried(work)
        for rank, message in enumerate(self._gather(error)):
            if message is not None:
                raise SharedError(message if rank == 0 else f"rank {rank}: {message}")
        return value

    def from_first(self, work: Callable[[], T]) -> T:
        """`work()` of the first rank, on all; its UserError too. What it gives must be picklable."""
        if self._mesh is None:
            return work()
        found = [_tried(work) if self.is_first else None]
        dist.broadcast_object_list(found, src=0)
        [(value, error)] = found
        if error is not None:
            raise SharedError(error)
        return value

    def save(self, model: nn.Module, write: Callable[..., None]) -> None:
        """`write(model)`, or where the model is spread `write(model, weights=...)` on the first rank.

        There the model is on the meta device, and `weights` gathers each parameter by its name, once, in the order of
        `named_parameters`, so that no rank holds more than one of them whole. A UserError is raised on all ranks.
        """
        if self._mesh is None:
            write(model)
            return
        gathered = GatheredWeights(model, self._mesh)

        def work() -> None:
            try:
                if self.is_first:
                    write(gathered.described, weights=gathered.take)
            finally:
                gathered.take_rest()

        self.together(work)

    def snapshots(self, store: SnapshotStore) -> "WholeSnapshots | ShardedSnapshots":
        """What saves into a run's store and restores from it."""
        return WholeSnapshots(store) if self._mesh is None else ShardedSnapshots(store)

    def check_same(self, what: str, value: Any) -> None:
        """Raise UserError on all ranks, naming one, unless all of them have the same value."""
        values = self._gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise SharedError(f"rank {rank} has another {what} than rank 0: {other!r}, not {values[0]!r}")

    @contextmanager
    def naming_lost_ranks(self, where: Callable[[], str]) -> Iterator[None]:
        """Raise LostRankError, which says where this rank is, for a collective that fails within the block."""
        try:
            yield
        except RuntimeError as error:
            if self._mesh is None or not _tells_of_a_lost_rank(error):
                raise
            reason = str(error).splitlines()[0]
            raise LostRankError(f"rank {dist.get_rank()} has lost another in {where()}: {reason}") from None

    def _gather(self, value: T) -> list[T]:
        if self._mesh is None:
            return [value]
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, value)
        return found


def _join(backend: str) -> None:
    store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
    # After a restart the store still has the addresses of before, and gloo would call them.
    store = dist.PrefixStore(f"restart {restarts()}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)


def _tells_of_a_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective has failed, as NCCL and gloo say it."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def _forward_backward(
    loss: TrainingLoss, weigh: Callable[[TrainingLoss, bool], Tensor] | None, counts: bool, last: bool
) -> TrainingLoss:
    # With a frozen text model a row without an image has nothing to train.
    if weigh is not None and (total := weigh(loss, counts)).requires_grad:
        total.backward()
    return without_gradients(loss, keep_routing=last)


def _weigher(
    weigh: Callable[[TrainingLoss, bool], Tensor] | None, rows: Sequence[tuple[Batch, bool]]
) -> Callable[[TrainingLoss, int], Tensor]:
    """By the number of a row; without gradients anything will do."""
    return lambda loss, number: loss.nll if weigh is None else weigh(loss, rows[number][1])


def _tried(work: Callable[[], T]) -> tuple[T | None, str | None]:
    """(what it gives, None), or (None, the text of its UserError)."""
    try:
        return work(), None
    except UserError as error:
        return None, str(error)


@contextmanager
def _shared() -> Iterator[None]:
    """What every rank refuses alike within the block."""
    try:
        yield
    except UserError as error:
        raise SharedError(str(error)) from None


@contextmanager
def joined(sizes: MeshSizes, device: torch.device) -> Iterator[World]:
    """The world that torchrun has started, or this process alone; raises UserError for a mesh of another size.

    Processes that are joined already stay so.
    """
    if dist.is_initialized():
        with _shared():
            mesh = Mesh(sizes, device.type)
        yield World(mesh)
    elif "RANK" not in os.environ:
        sizes.fitted(1)
        yield World()
    else:
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        _join("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        try:
            with _shared():
                mesh = Mesh(sizes, device.type)
            with closing(Watch(lambda line: print(line, file=sys.stderr, flush=True), axes=mesh.members())) as watch:
                yield World(mesh, watch)
        finally:
            dist.destroy_process_group()
