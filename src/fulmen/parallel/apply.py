"""The one function that spreads a model over a mesh, in the order that its parts need."""

import itertools
import warnings

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from fulmen.config import UserError
from fulmen.model import LanguageModel, ModelConfig
from fulmen.model.layer import DecoderLayer
from fulmen.parallel.collectives import Waits
from fulmen.parallel.mesh import Mesh
from fulmen.parallel.moe import spread_experts
from fulmen.parallel.pipeline import cut_layers
from fulmen.parallel.plan.job import cut_stages
from fulmen.parallel.tensor import shard_tensors


def parallelize(
    model: LanguageModel,
    mesh: Mesh,
    *,
    token_groups: int = 1,
    global_router: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Waits:
    """Spread a model, the same on every rank, over all ranks of the mesh, in place.

    1. Tensor parallelism cuts heads and vocabulary while every weight is still whole.
    2. Experts are cut by number and width; they are no part of what comes before.
    3. Each stage of a pipeline keeps its layers.
    4. FSDP2 shards whatever a rank then holds: experts over their replicas (edp), all else over dp x cp, layer by
       layer, so that no rank ever holds more than one layer's weights whole.

    Gradients are sums over ranks, since each computes its share of one loss. token_groups: in which tokens travel to
    experts, one while another is computed. global_router: with a capacity, one for the tokens of all ranks together.
    dtype: of the experts' products, in which their weights are gathered; all others, few beside them, are gathered in
    fp32, as norms and routers need them. Gradients are summed over ranks in fp32.
    Returns what counts the time that experts wait for tokens. Raises UserError for a model that cannot be cut so.
    """
    if not isinstance(model, LanguageModel):
        raise UserError("a model that sees trains on one rank: leave [mesh] out")
    shard_tensors(model, mesh)
    router = mesh.dense["dp", "cp", "tp"]._flatten("tokens").get_group() if global_router else None
    waits = spread_experts(model, mesh, groups=token_groups, router=router)
    if mesh.sizes.pp > 1:
        cut_layers(model, mesh.rank("pp"), _stage_borders(model.config, mesh.sizes.pp))
    dense, replicas = mesh.dense["dp", "cp"]._flatten("dp_cp"), mesh.experts["edp"]
    dims = _expert_dims(model, mesh)
    for layer in model.layers:
        if isinstance(layer, DecoderLayer):
            _shard(layer.block_sparse_moe.experts, replicas, dims, dtype)
            _shard(layer, dense)
    _shard(model, dense)
    register_fsdp_forward_method(model, "loss")
    return waits


def _stage_borders(config: ModelConfig, stages: int) -> list[int]:
    """Where each stage's layers begin, and their number. Raises UserError for more stages than layers."""
    if stages > config.num_layers:
        raise UserError(f"mesh.pp = {stages} stages are more than the {config.num_layers} layers: take fewer")
    lengths = (len(stage.layers) for stage in cut_stages(config, config.max_positions, stages))
    return list(itertools.accumulate(lengths, initial=0))


def _expert_dims(model: LanguageModel, mesh: Mesh) -> dict[int, int]:
    """By its number of dims, along which dim FSDP shards w13 [E, 2, F, D] or w2 [E, D, F]: one that is not cut yet."""
    sizes = mesh.sizes
    if sizes.ep == sizes.etp == 1:
        return {4: 0, 3: 0}
    if model.config.hidden_size % sizes.edp:
        raise UserError(
            f"mesh.edp = {sizes.edp} must divide hidden_size {model.config.hidden_size} where experts are spread: "
            "take another mesh.ep or mesh.etp"
        )
    return {4: 3, 3: 1}


def _shard(
    module: nn.Module, mesh: DeviceMesh, dims: dict[int, int] | None = None, dtype: torch.dtype = torch.float32
) -> None:
    # A layer's output is a view of what its experts give; nobody here changes it in place.
    warnings.filterwarnings("ignore", message=".*returned a view tensor", module="torch.distributed.fsdp")
    placement = None if dims is None else lambda parameter: Shard(dims[parameter.ndim])
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(module, mesh=mesh, shard_placement_fn=placement, mp_policy=policy)
    assert isinstance(module, FSDPModule)
    # Plain sums, for which gloo has no scaled form either.
    module.set_force_sum_reduction_for_comms(True)
    module.set_gradient_divide_factor(1.0)
