"""Tensor parallelism: each rank has some heads of every attention and the rows of a part of the vocabulary.

Between the attentions each has some tokens instead (`sequence.py`), for which it computes norms, router and experts.
A weight of which it holds a part is a DTensor, so that FSDP2 and snapshots know what it is a part of; modules compute
with the part alone, and activations are plain tensors.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from fulmen.config import UserError
from fulmen.model import LanguageModel
from fulmen.model.cache import LayerCache
from fulmen.model.layer import DecoderLayer
from fulmen.model.lightning import LightningAttention
from fulmen.model.linear import Linear
from fulmen.model.moe import MixtureOfExperts
from fulmen.model.norm import RMSNorm
from fulmen.model.softmax import SoftmaxAttention
from fulmen.model.vocabulary import Embedding, Head
from fulmen.ops.linear import linear
from fulmen.parallel.mesh import Mesh
from fulmen.parallel.sequence import gather_tokens, part_lengths, scatter_sums
from fulmen.parallel.vocabulary import VocabularyEmbedding, VocabularyHead

ROWS, COLUMNS = 0, 1


def shard_part(part: nn.Module, mesh: Mesh) -> None:
    """Spread one of `LanguageModel.parts`, whole and the same on every rank, over the dense mesh's "tp", in place.

    The model must have passed `check_tensors`. When all its parts are spread, each rank of tp is to be given the same
    tokens and targets, whole rows; `hidden` gives what the rank has of them, `loss` its share of the sum, and logits
    are whole. The gradients of `replicated_parameters` are to be summed over the ranks by `finish_gradients`.
    """
    tp = mesh.dense["tp"]
    if tp.size() == 1:
        return
    if isinstance(part, DecoderLayer):
        (_shard_lightning if part.is_lightning else _shard_softmax)(part.self_attn, tp)
        _become(part, SplitLayer, group=tp.get_group())
    elif isinstance(part, Embedding | Head):
        _keep_part(part, tp, ROWS)
        kind = VocabularyEmbedding if isinstance(part, Embedding) else VocabularyHead
        _become(part, kind, group=tp.get_group())


def replicated_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name what every rank holds whole and computes with for tokens, or heads, of its own: its gradients are parts.

    Experts are left out, whose mesh is another.
    """
    sharded = {id(p) for m in model.modules() if isinstance(m, SHARDED) for p in m.parameters()}
    experts = {id(p) for m in model.modules() if isinstance(m, MixtureOfExperts) for p in m.experts.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) not in sharded | experts}


@torch.no_grad()
def finish_gradients(model: nn.Module, mesh: Mesh) -> None:
    """Sum the gradients of `replicated_parameters` over the dim "tp", after the last backward pass of a step."""
    grads = [p.grad for p in replicated_parameters(model).values() if p.grad is not None]
    # Where FSDP has sharded them further, what is here.
    grads = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    if mesh.sizes.tp == 1 or not grads:
        return
    total = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(total, group=mesh.group("tp"))
    for grad, summed in zip(grads, total.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(summed.view_as(grad))


class SplitLayer(DecoderLayer):
    """A layer that is given and gives this rank's tokens [B, T_r, hidden]; `rotary` is for all of them."""

    group: dist.ProcessGroup

    def mix(
        self, normed: Tensor, rotary: tuple[Tensor, Tensor], cache: LayerCache | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        lengths = part_lengths(rotary[0].shape[1], self.group.size())
        whole = gather_tokens(normed, lengths, self.group)
        return scatter_sums(super().mix(whole, rotary, cache, cu_seqlens), lengths, self.group)


class LocalLinear(Linear):
    """The product with what is here of a weight that is a DTensor of rows or of columns."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.to_local())


class SomeRows(Linear):
    """The product with some rows of a weight that is whole on every rank."""

    rows: slice

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight[self.rows])


class NormOverRanks(RMSNorm):
    """RMSNorm over a vector of which each rank of `group` has an equal part; its weight is a DTensor."""

    group: dist.ProcessGroup

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Of x, times sigmoid(gate) if there is one; both [..., size / ranks]."""
        y = _NormOverRanks.apply(x, self.weight.to_local(), self.eps, self.group)
        return y if gate is None else y * gate.sigmoid()


SHARDED = (LocalLinear, NormOverRanks, VocabularyEmbedding, VocabularyHead)
"""Kinds of modules whose parameters are DTensors over the dim "tp"."""


class _NormOverRanks(torch.autograd.Function):
    """`fulmen.ops.norm` of parts: in fp32, with the one sum forward and the one backward taken over all ranks."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, group: dist.ProcessGroup):
        x_f32 = x.float()
        mean = x_f32.square().sum(dim=-1, keepdim=True)
        dist.all_reduce(mean, group=group)
        ctx.group, ctx.size = group, x.shape[-1] * group.size()
        inverse = mean.div_(ctx.size).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse, weight)
        return torch.mul(x_f32, inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, inverse, weight = ctx.saved_tensors
        grad, normed = grad.float(), torch.mul(x.float(), inverse)
        along = grad * normed
        share = torch.mv(along.flatten(0, -2), weight.float()).view_as(inverse)
        dist.all_reduce(share, group=ctx.group)
        # dx = (w grad - normed * mean(w grad . normed)) / rms
        d_x = torch.mul(grad, weight).addcmul_(normed, share, value=-1 / ctx.size).mul_(inverse)
        return d_x.to(x.dtype), along.flatten(0, -2).sum(dim=0).to(weight.dtype), None, None


def check_tensors(model: LanguageModel, mesh: Mesh) -> None:
    """Raise UserError for heads or a vocabulary that tp does not divide, and for weights in int8."""
    ranks, config = mesh.sizes.tp, model.config
    if ranks == 1:
        return
    for name in ("num_heads", "vocab_size"):
        if (value := getattr(config, name)) % ranks:
            raise UserError(f"{name} must be a multiple of mesh.tp = {ranks}, got {value}: change either")
    kv = config.num_kv_heads
    if kv % ranks and ranks % kv:
        raise UserError(f"num_kv_heads {kv} must be a multiple of mesh.tp = {ranks}, or divide it: change either")
    if any(p.dtype == torch.int8 for p in model.parameters()):
        raise UserError("a model in int8 cannot be spread over mesh.tp ranks: load it in bfloat16, or take mesh.tp = 1")


def _shard_lightning(attention: LightningAttention, tp: DeviceMesh) -> None:
    """Its rows of q, k, v and gate are whole heads, as it packs them head by head."""
    heads, *rest = attention.heads_shape
    attention.heads_shape = (heads // tp.size(), *rest)
    attention.rates = _part(attention.rates, tp, ROWS)
    for projection in (attention.qkv_proj, attention.output_gate):
        _become_local(projection, tp, ROWS)
    _become_local(attention.out_proj, tp, COLUMNS)
    _keep_part(attention.norm, tp, ROWS)
    _become(attention.norm, NormOverRanks, group=tp.get_group())


def _shard_softmax(attention: SoftmaxAttention, tp: DeviceMesh) -> None:
    """With fewer heads of keys and values than ranks, each has the weights of all and computes the one it reads."""
    _become_local(attention.q_proj, tp, ROWS)
    _become_local(attention.o_proj, tp, COLUMNS)
    size = attention.head_dim
    for projection in (attention.k_proj, attention.v_proj):
        heads = projection.out_features // size
        if heads % tp.size() == 0:
            _become_local(projection, tp, ROWS)
        else:
            head = tp.get_local_rank() * heads // tp.size()
            _become(projection, SomeRows, rows=slice(head * size, (head + 1) * size))


def _become_local(projection: Linear, tp: DeviceMesh, dim: int) -> None:
    _keep_part(projection, tp, dim)
    _become(projection, LocalLinear)


def _keep_part(module: nn.Module, tp: DeviceMesh, dim: int) -> None:
    """Put a DTensor of this rank's part in the place of a module's whole weight."""
    whole = module.weight
    part = DTensor.from_local(_part(whole.detach(), tp, dim), tp, [Shard(dim)], run_check=False)
    module.weight = nn.Parameter(part, requires_grad=whole.requires_grad)


def _part(whole: Tensor, tp: DeviceMesh, dim: int) -> Tensor:
    """A copy, or the whole would stay in memory."""
    return whole.chunk(tp.size(), dim)[tp.get_local_rank()].clone(memory_format=torch.contiguous_format)


def _become(module: nn.Module, kind: type[nn.Module], **attributes: object) -> None:
    """Make a module one of a kind derived from its own, as FSDP2 does: its name, its parameters and its hooks stay."""
    assert issubclass(kind, type(module)), (kind, type(module))
    module.__class__ = kind
    vars(module).update(attributes)
