"""The one function that spreads a model over a mesh, in the order that its parts need."""

import itertools
import logging
import warnings

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from fulmen.checkpoint.names import Model, text_model
from fulmen.checkpoint.reader import allocate_own
from fulmen.config import UserError
from fulmen.model import LanguageModel, ModelConfig, VisionLanguageModel
from fulmen.model.layer import DecoderLayer
from fulmen.parallel.collectives import Waits
from fulmen.parallel.mesh import Mesh
from fulmen.parallel.moe import SpreadExperts, check_experts
from fulmen.parallel.pipeline import cut_layers, leave_out_vision, stage_parts
from fulmen.parallel.plan.job import cut_stages
from fulmen.parallel.tensor import check_tensors, shard_part


def parallelize(
    model: Model,
    mesh: Mesh,
    *,
    token_groups: int = 1,
    global_router: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Waits:
    """Spread a model, the same on every rank, over all ranks of the mesh, in place, one of its parts after the other.

    1. A part that is on the meta device is drawn, so that beside embedding and head, which are sharded last, no rank
       ever holds more than one of them whole.
    2. What belongs to another stage of the pipeline is let go.
    3. Tensor parallelism cuts heads and vocabulary while every weight is still whole.
    4. Experts are cut by number and width; they are no part of what comes before.
    5. FSDP2 shards whatever a rank then holds: experts over their replicas (edp), all else over dp x cp, layer by
       layer, so that no more than one layer's weights are gathered at a time.

    Of a model that sees, this is its text model; the image encoder and what joins the two are on the first stage alone,
    each rank of which encodes the images in its own tokens, and FSDP shards them over dp x cp.

    Gradients are sums over ranks, since each computes its share of one loss. token_groups: in which tokens travel to
    experts, one while another is computed. global_router: with a capacity, one for the tokens of all ranks together.
    dtype: of the experts' products, in which their weights are gathered; all others, few beside them, are gathered in
    fp32, as norms and routers need them. Gradients are summed over ranks in fp32.
    Returns what counts the time that experts wait for tokens. Raises UserError for a model that cannot be cut so.
    """
    text = text_model(model)
    check_tensors(text, mesh)
    check_experts(text, mesh, token_groups)
    # Norms and checkpoints gather over several dims of the mesh in turn, and every rank would be told so.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    stage, borders = mesh.rank("pp"), _stage_borders(text.config, mesh.sizes.pp)
    dense, dims, waits = mesh.dense["dp", "cp"]._flatten("dp_cp"), _expert_dims(text, mesh), Waits()
    router = mesh.dense["dp", "cp", "tp"]._flatten("tokens").get_group() if global_router else None
    spread = {"groups": token_groups, "router": router, "waits": waits}
    here = set(stage_parts(text, stage, borders))
    for part in text.parts():
        _draw(text, part, mesh)
        if part not in here:
            part.to("meta")
            continue
        shard_part(part, mesh)
        if isinstance(part, DecoderLayer):
            moe = part.block_sparse_moe
            moe.experts = SpreadExperts(moe.experts, mesh, **spread)
            _shard(moe.experts, mesh.experts["edp"], dims, dtype)
            _shard(part, dense)
    cut_layers(text, stage, borders)
    if isinstance(model, VisionLanguageModel):
        _spread_vision(model, stage, dense)
    _shard(model, dense)
    register_fsdp_forward_method(model, "loss")
    return waits


def begin_row(model: nn.Module, *, trains: bool, last: bool) -> None:
    """Before a row goes through a spread model whose weights stay gathered until the last row of a step.

    Until then gradients add up on each rank, unsharded; the last row's backward pass sums them over ranks and lets the
    weights go. Where nothing `trains`, they are let go layer by layer.
    """
    assert isinstance(model, FSDPModule)
    model.set_reshard_after_forward(not trains)
    model.set_reshard_after_backward(last)
    model.set_requires_gradient_sync(last)


def _spread_vision(model: VisionLanguageModel, stage: int, dense: DeviceMesh) -> None:
    if stage > 0:
        leave_out_vision(model)
    else:
        model.encodes_together = True
        _shard(model.vision_tower, dense)
    _shard(model.language_model, dense)
    register_fsdp_forward_method(model.language_model, "loss")


def _draw(model: LanguageModel, part: nn.Module, mesh: Mesh) -> None:
    """Give a part that is on the meta device its first weights, those that one process would draw."""
    if not any(parameter.is_meta for parameter in part.parameters()):
        return
    for module in part.modules():
        allocate_own(module, "cpu")
    model.init_part(part)
    part.to(mesh.device)


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
