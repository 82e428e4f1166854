"""The next token of each sequence in one call for all layers: of `fulmen.ops.cpu.step`, or on a GPU of `graph.py`.

The modules are the definition; this computes the same and passes them over. So it steps back (None) where somebody
could tell: gradients are wanted, a module has been replaced by another kind, is listened to by a hook or wrapped.
"""

from collections.abc import Iterator
from itertools import repeat
from operator import attrgetter, contains, is_
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fulmen.model.cache import SequenceCache
from fulmen.model.config import ModelConfig
from fulmen.model.graph import GraphedSteps
from fulmen.model.layer import DecoderLayer
from fulmen.model.lightning import LightningAttention
from fulmen.model.linear import Linear
from fulmen.model.moe import Experts, MixtureOfExperts
from fulmen.model.norm import RMSNorm
from fulmen.model.softmax import SoftmaxAttention
from fulmen.ops import cpu, gpu
from fulmen.ops.cpu.step import INT8_KERNELS, KERNELS, Step, StepLayer, StepShape
from fulmen.ops.experts import Routing
from fulmen.ops.rotary import rotary_frequencies

if TYPE_CHECKING:
    from fulmen.model.decoder import LanguageModel

PASSED_OVER = {DecoderLayer, LightningAttention, SoftmaxAttention, MixtureOfExperts, Experts, Linear, RMSNorm}
"""Kinds of modules whose `forward` is known here."""


def decode_step(model: "LanguageModel", x: Tensor, cache: SequenceCache) -> tuple[Tensor, list[Routing]] | None:
    """`LanguageModel.hidden` for embedded tokens x, the next of each sequence of a cache, which is advanced."""
    if torch.is_grad_enabled() or not _serves(x):
        return None
    tokens = cache.next_tokens(x)
    if tokens is None:
        return None
    plan = _PLANS.get(model)
    if plan is None or not plan.is_valid():
        plan = _PLANS[model] = _Plan(model)
    if plan.step is None or x.dtype != plan.step.dtype:
        return None
    recorded_for = ()
    if isinstance(plan.step, GraphedSteps):
        if tokens.places.tables is None and len(x) > cpu.FEW:
            return None  # a plain cache has no buckets, and its records hold no more
        recorded_for = (tokens.owner,)
    result = plan.step(x.flatten(0, 1), tokens.memories, tokens.places, *recorded_for)
    cache.stepped()
    return result.y.view_as(x), [Routing(*routing, kept=None) for routing in result.routings]


def _serves(*tensors: Tensor) -> bool:
    """Whether a CPU's step or a GPU's takes this."""
    if cpu.serves(1, *tensors, dtypes=KERNELS):
        return True
    return gpu.serves(*tensors) and not torch.is_autocast_enabled("cuda")


class _Plan:
    """A model's `Step`, None if there can be none, and what must still be so for it to be the model's.

    Asked before every token, for hundreds of items: so by `map` alone, which loops ten times as fast as Python.
    """

    def __init__(self, model: "LanguageModel"):
        modules = [m for layer in model.layers for m in layer.modules()] + [model.norm]
        self._owners, self._names, self._held = zip(*_items(model, modules), strict=True)
        self._layers = model.layers._modules
        self._count = len(self._layers)
        self._wrapped = [places for m in modules for places in (m._forward_hooks, m._forward_pre_hooks)]
        self._variables = [vars(m) for m in modules]
        self._tensors = [t for m in modules for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
        self._places = self._where()
        self.step = None
        if all(map(_is_known, modules)) and _are_plain(self._tensors) and self._is_untouched():
            self.step = _new_step(model)

    def is_valid(self) -> bool:
        """Whether modules, weights and constants are those that it was made from."""
        return (
            len(self._layers) == self._count
            and all(map(is_, map(dict.get, self._owners, self._names), self._held))
            and self._where() == self._places
            and (self.step is None or self._is_untouched())
        )

    def _where(self) -> tuple[list[int], list[torch.dtype]]:
        return list(map(Tensor.data_ptr, self._tensors)), list(map(attrgetter("dtype"), self._tensors))

    def _is_untouched(self) -> bool:
        return not any(self._wrapped) and not any(map(contains, self._variables, repeat("forward")))


_PLANS: WeakKeyDictionary[nn.Module, _Plan] = WeakKeyDictionary()


def _items(model: nn.Module, modules: list[nn.Module]) -> Iterator[tuple[dict, str, object]]:
    """Every submodule, tensor and number, and the dictionary that it stands in."""
    for owner in (model, model.layers, *modules):
        for place in (owner._modules, owner._parameters, owner._buffers):
            yield from ((place, name, item) for name, item in place.items())
        yield from ((vars(owner), name, item) for name, item in vars(owner).items() if type(item) in (int, float))


def _is_known(module: nn.Module) -> bool:
    return type(module) in PASSED_OVER


def _are_plain(tensors: list[Tensor]) -> bool:
    numbers = [t for t in tensors if t.dtype != torch.int8]
    dtypes = {t.dtype for t in numbers if isinstance(t, nn.Parameter)}
    constants = [t for t in tensors if not isinstance(t, nn.Parameter)]
    is_int8 = len(numbers) < len(tensors)
    return (
        len(dtypes) == 1
        and (not is_int8 or not numbers[0].is_cpu or dtypes <= INT8_KERNELS.keys())
        and len({t.device for t in tensors}) == 1
        and all(type(t) in cpu.PLAIN for t in tensors)
        and _serves(*numbers)
        and all(t.dtype == torch.float32 for t in constants)
        and all(t.is_contiguous() for t in tensors)
    )


def _new_step(model: "LanguageModel") -> Step | GraphedSteps | None:
    """None where a tensor has another shape than the configuration says: the modules will complain of it."""
    c = model.config
    layers = [_step_layer(layer) for layer in model.layers]
    for layer in layers:
        if {name: tuple(t.shape) for name, t in layer.tensors.items()} != _shapes(c, layer):
            return None
    frequencies = rotary_frequencies(c.rotary_dim, c.rope_theta, model.norm.weight.device)
    shape = StepShape(
        hidden=c.hidden_size,
        heads=c.num_heads,
        kv_heads=c.num_kv_heads,
        dim=c.head_dim,
        rotary=c.rotary_dim,
        num_experts=c.num_experts,
        k=c.experts_per_token,
        expert_size=c.expert_size,
    )
    prepared = (layers, model.norm.weight, model.norm.eps, frequencies, shape)
    return GraphedSteps(gpu.step.Step(*prepared)) if gpu.serves(model.norm.weight) else Step(*prepared)


def _step_layer(layer: DecoderLayer) -> StepLayer:
    attention, moe = layer.self_attn, layer.block_sparse_moe
    tensors = {
        "w_before": layer.input_layernorm.weight,
        "w_after": layer.post_attention_layernorm.weight,
        "w_router": moe.gate.weight,
        "w13": moe.experts.w13,
        "w2": moe.experts.w2,
        "s13": moe.experts.s13,
        "s2": moe.experts.s2,
    }
    constants = {name: getattr(layer, name) for name in ("mixer_alpha", "mixer_beta", "mlp_alpha", "mlp_beta")}
    constants |= {"eps_before": layer.input_layernorm.eps, "eps_after": layer.post_attention_layernorm.eps}
    if layer.is_lightning:
        projections = {"q": attention.qkv_proj, "gate": attention.output_gate, "out": attention.out_proj}
        tensors |= {"w_norm": attention.norm.weight, "rates": attention.rates}
        constants["eps_norm"] = attention.norm.eps
    else:
        projections = {"q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj, "out": attention.o_proj}
    tensors |= {f"w_{name}": projection.weight for name, projection in projections.items()}
    tensors |= {f"s_{name}": projection.scales for name, projection in projections.items()}
    return StepLayer({name: tensor for name, tensor in tensors.items() if tensor is not None}, constants)


def _shapes(config: ModelConfig, layer: StepLayer) -> dict[str, tuple[int, ...]]:
    """What a layer's tensors must have; those in int8 are all or none."""
    shapes = _weight_shapes(config, "rates" in layer.tensors)
    if "s13" in layer.tensors:
        kept = ("w_before", "w_after", "w_norm", "w_router", "rates")
        shapes |= {"s" + name[1:]: shape[:-1] for name, shape in shapes.items() if name not in kept}
    return shapes


def _weight_shapes(config: ModelConfig, is_lightning: bool) -> dict[str, tuple[int, ...]]:
    hidden, inner, experts, f = config.hidden_size, config.attention_size, config.num_experts, config.expert_size
    shapes = {"w_before": (hidden,), "w_after": (hidden,), "w_router": (experts, hidden), "w_out": (hidden, inner)}
    shapes |= {"w13": (experts, 2 * f, hidden), "w2": (experts, hidden, f)}
    if is_lightning:
        shapes |= {"w_q": (3 * inner, hidden), "w_gate": (inner, hidden), "w_norm": (inner,)}
        return shapes | {"rates": (config.num_heads,)}
    kv = (config.num_kv_heads * config.head_dim, hidden)
    return shapes | {"w_q": (inner, hidden), "w_k": kv, "w_v": kv}
