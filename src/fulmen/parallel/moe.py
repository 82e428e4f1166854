"""A model's experts, spread: the module that takes the place of `fulmen.model.moe.Experts`."""

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import Shard, distribute_tensor

from fulmen.config import UserError
from fulmen.model import LanguageModel
from fulmen.model.moe import Experts
from fulmen.ops.experts import Routing, limit
from fulmen.parallel.capacity import global_capacity
from fulmen.parallel.collectives import Waits
from fulmen.parallel.experts import spread_experts_mlp
from fulmen.parallel.mesh import Mesh


class SpreadExperts(nn.Module):
    """The part of a layer's experts that is on this rank.

    w13 is a DTensor [E, 2, F, D], gate and up apart so that ranks along etp share each evenly, and w2 one of [E, D, F].
    """

    def __init__(self, experts: Experts, mesh: Mesh, *, groups: int, router: ProcessGroup | None, waits: Waits):
        """Cuts the matrices of all experts, which must be the same on every rank.

        groups: of tokens, one of which travels while another is computed. router: the ranks whose tokens share one
        capacity; None: each rank's have one of their own.
        """
        super().__init__()
        self.groups, self.router, self.waits = groups, router, waits
        self.ep, self.etp = mesh.group("ep"), mesh.group("etp")
        self.w13 = _shard(experts.w13.unflatten(1, (2, -1)), mesh)
        self.w2 = _shard(experts.w2, mesh)

    def limit(self, routing: Routing, factor: float) -> Routing:
        """Let each expert take its capacity of the choices of the tokens here, or of all ranks'."""
        return limit(routing, factor) if self.router is None else global_capacity(routing, factor, self.router)

    def forward(self, x: Tensor, routing: Routing, *, alpha: float = 0.0, beta: float = 1.0) -> Tensor:
        """alpha * x + beta * experts(x) of this rank's tokens x [T, hidden], see `spread_experts_mlp`."""
        matrices = self.w13.to_local().flatten(1, 2), self.w2.to_local()
        how = dict(ep=self.ep, etp=self.etp, groups=self.groups, waits=self.waits)
        return spread_experts_mlp(x, *matrices, routing, alpha=alpha, beta=beta, **how)


def _shard(weight: Tensor, mesh: Mesh) -> nn.Parameter:
    """By experts along ep, by width along etp."""
    mesh_of_parts, placements = mesh.experts["etp", "ep"], (Shard(2), Shard(0))
    part = distribute_tensor(weight.detach(), mesh_of_parts, placements, src_data_rank=None)  # a copy, nothing is sent
    return nn.Parameter(part, weight.requires_grad)


def check_experts(model: LanguageModel, mesh: Mesh, groups: int) -> None:
    """Raise UserError for experts that cannot be spread evenly, or a number of groups below 1."""
    config, sizes = model.config, mesh.sizes
    if config.num_experts % sizes.ep:
        raise UserError(
            f"{config.num_experts} experts over {sizes.ep} ranks: mesh.ep must divide their number, take another"
        )
    if config.expert_size % (8 * sizes.etp):
        raise UserError(
            f"experts of width {config.expert_size} over {sizes.etp} ranks: mesh.etp must cut it into multiples of 8, "
            "as grouped products in bf16 ask, take another"
        )
    if groups < 1:
        raise UserError(f"tokens are cut into at least 1 group, not {groups}")
