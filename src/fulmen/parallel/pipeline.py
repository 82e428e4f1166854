"""Pipeline parallelism: each rank along pp has some layers, and rows follow each other through them (1F1B).

A stage is the whole model with the layers that are elsewhere left out, so that every weight keeps its name. What it is
given in the place of embedded tokens comes from the stage before. PyTorch's `torch.distributed.pipelining` schedules.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from fulmen.model import LanguageModel, VisionLanguageModel
from fulmen.model.decoder import TrainingLoss


def stage_parts(model: LanguageModel, stage: int, borders: Sequence[int]) -> list[nn.Module]:
    """Of `LanguageModel.parts` what a stage has: layers borders[stage] .. borders[stage + 1] - 1, and its ends."""
    found: list[nn.Module] = list(model.layers[borders[stage] : borders[stage + 1]])
    if stage == 0:
        found.append(model.embed_tokens)
    if stage == len(borders) - 2:
        found += [model.norm, model.lm_head]
    return found


def cut_layers(model: LanguageModel, stage: int, borders: Sequence[int]) -> None:
    """Keep what is `stage_parts` of a model, in place; of one stage nothing changes."""
    here = set(stage_parts(model, stage, borders))
    for number, layer in enumerate(model.layers):
        if layer not in here:
            model.layers[number] = _Elsewhere()
    if model.embed_tokens not in here:
        model.embed_tokens = _Received()
    if model.lm_head not in here:
        model.norm, model.lm_head = nn.Identity(), _NoHead()


def leave_out_vision(model: VisionLanguageModel) -> None:
    """Of a stage that embeds nothing: it has no use for images."""
    model.vision_tower, model.multi_modal_projector = nn.Identity(), nn.Identity()
    del model.image_newline
    model.insert = lambda tokens, images: None


class _Elsewhere(nn.Module):
    """A layer of another stage."""

    def forward(self, x: Tensor, *rest: Any) -> tuple[Tensor, None]:
        return x, None


class _Received(nn.Module):
    """In the place of the embedding what the stage before has sent."""

    x: Tensor

    def forward(self, tokens: Tensor, inserted: Any = None) -> Tensor:
        return self.x


class _NoHead(nn.Module):
    """In the place of the head: keeps what is to be sent on, and adds nothing to the loss."""

    leaving: Tensor

    def nll(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        self.leaving = hidden
        return hidden.new_zeros((), dtype=torch.float32), torch.zeros((), dtype=torch.int64, device=hidden.device)


class Rows(NamedTuple):
    """What a pipeline is to compute.

    forward: of the row of a number what the model's `loss` gives. weigh: of that and the number this rank's share of
    the loss of all rows, linear in nll and balance. before_last: called before the last row goes backward.
    """

    count: int
    forward: Callable[[int], TrainingLoss]
    weigh: Callable[[TrainingLoss, int], Tensor]
    before_last: Callable[[], None]


def without_gradients(loss: TrainingLoss, *, keep_routing: bool) -> TrainingLoss:
    """What is kept of a row's loss once gradients have been taken: of many rows the routing would fill the memory."""
    routing = loss.routing if keep_routing else []
    return TrainingLoss(loss.nll.detach(), loss.targets, loss.balance.detach(), routing)


class Pipeline:
    """The stage of a model that is on this rank."""

    def __init__(self, model: LanguageModel, group: dist.ProcessGroup, device: torch.device):
        self._model, self._group, self._device = model, group, device

    def run(self, rows: Rows, shape: tuple[int, ...], dtype: torch.dtype, *, backward: bool) -> list[TrainingLoss]:
        """Each row's loss as far as it is computed here, without gradients.

        shape, dtype: of what goes from stage to stage, the same for all rows. To go backward there must be as many rows
        as stages.
        """
        submodule = _Stage(self._model, rows)
        stage = self._stage(submodule, shape, dtype)
        make = Schedule1F1B if backward else ScheduleGPipe
        schedule = make(stage, rows.count, loss_fn=lambda output, _: output.sum(), scale_grads=False)
        numbers = torch.arange(rows.count, device=self._device)
        given = (numbers[:, None],) if stage.is_first else ()
        (schedule.step if backward else schedule.eval)(*given, row=numbers, target=numbers)
        return [submodule.found[number] for number in range(rows.count)]

    def _stage(self, submodule: "_Stage", shape: tuple[int, ...], dtype: torch.dtype) -> PipelineStage:
        place, stages = dist.get_rank(self._group), self._group.size()
        sent = torch.empty(shape, dtype=dtype, device="meta")
        number, total = torch.empty(1, 1, dtype=torch.int64, device="meta"), torch.empty(1, device="meta")
        return PipelineStage(
            submodule,
            place,
            stages,
            self._device,
            input_args=number if place == 0 else sent.requires_grad_(),
            output_args=total.requires_grad_() if place == stages - 1 else sent.requires_grad_(),
            group=self._group,
        )


class _Stage(nn.Module):
    """One row after the other, as the schedule asks for them."""

    def __init__(self, model: LanguageModel, rows: Rows):
        super().__init__()
        self.model, self.rows = model, rows
        self.found: dict[int, TrainingLoss] = {}

    def forward(self, received: Tensor, row: Tensor) -> Tensor:
        number = int(row)
        if isinstance(self.model.embed_tokens, _Received):
            self.model.embed_tokens.x = received
        loss = self.rows.forward(number)
        total = self.rows.weigh(loss, number)
        self.found[number] = without_gradients(loss, keep_routing=number == self.rows.count - 1)
        leaves = isinstance(self.model.lm_head, _NoHead)
        out = _WithLoss.apply(self.model.lm_head.leaving, total) if leaves else total[None]
        if out.requires_grad and number == self.rows.count - 1:
            out.register_hook(lambda gradient: self.rows.before_last())
        return out


class _WithLoss(torch.autograd.Function):
    """What is sent on, with this stage's own share of the loss, whose gradient is one, fastened to it."""

    @staticmethod
    def forward(ctx, x: Tensor, share: Tensor):
        ctx.dtype, ctx.device = share.dtype, share.device
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_x: Tensor):
        return d_x, torch.ones((), dtype=ctx.dtype, device=ctx.device)
