"""What a device has, and what a step takes of it: the numbers that `plan.py` divides."""

import torch

from fulmen.model import LanguageModel, ModelConfig, VisionLanguageConfig, VisionLanguageModel
from fulmen.model.int8 import rest_dtype
from fulmen.model.pool import CachePool, PoolBatch
from fulmen.run.memory import available_memory
from fulmen.serve.plan import EngineSettings, MemoryPlan, plan_memory

SHARE = {"cuda": 0.9, "cpu": 0.25}
"""Of the memory that is free beside the weights, where nobody says how much to use: a CPU's is for others too."""


def plan_for_config(
    config: ModelConfig | VisionLanguageConfig, settings: EngineSettings, *, device: str, dtype: torch.dtype
) -> MemoryPlan:
    """The plan for a model that is not loaded yet; activations are an estimate. UserError if it cannot be served."""
    is_int8 = dtype == torch.int8
    rest = rest_dtype(device) if is_int8 else dtype
    weights = config.weight_bytes(_name(dtype), rest=_name(rest))
    budget = settings.memory or _budget(device, free_memory(device), weights)
    sizes = {"weights": weights, "number_bytes": rest.itemsize, "is_int8": is_int8}
    return plan_memory(config, settings, budget=budget, device=device, **sizes)


def plan_for_model(model: LanguageModel | VisionLanguageModel, settings: EngineSettings) -> MemoryPlan:
    """The plan for a loaded model; on a GPU the activations are measured. UserError if it cannot be served."""
    text = model.language_model if isinstance(model, VisionLanguageModel) else model
    weight = text.embed_tokens.weight
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return plan_memory(
        model.config,
        settings,
        budget=settings.memory or _budget(weight.device, free_memory(weight.device) + weights, weights),
        weights=weights,
        activations=measure_activations(text, settings) if weight.is_cuda else None,
        number_bytes=weight.element_size(),
        is_int8=any(parameter.dtype == torch.int8 for parameter in model.parameters()),
        device=weight.device.type,
    )


def free_memory(device: str | torch.device) -> int:
    """Bytes that new tensors on the device may take."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _budget(device: str | torch.device, free: int, weights: int) -> int:
    """Of the bytes that are free without the weights."""
    return weights + int(SHARE[torch.device(device).type] * (free - weights)) if free > weights else free


@torch.inference_mode()
def measure_activations(model: LanguageModel, settings: EngineSettings) -> int:
    """Bytes of a GPU that the widest step takes for itself: a whole piece of prompts, and everybody's logits."""
    device = model.embed_tokens.weight.device
    settings = settings.on(device.type)
    tokens = min(settings.chunk_tokens, model.config.max_positions)
    count = -(-tokens // settings.page_size)
    pool = CachePool(
        model.config,
        slots=1,
        pages=count,
        page_size=settings.page_size,
        device=device,
        dtype=model.embed_tokens.weight.dtype,
    )
    batch = PoolBatch(pool, slots=[0], tables=[list(range(count))], starts=[0], lengths=[tokens])
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    hidden, _ = model.hidden(torch.zeros(1, tokens, dtype=torch.int64, device=device), cache=batch)
    logits = model.logits(hidden[0, -1:].expand(settings.max_sequences, -1).contiguous())
    logits.sort(dim=-1)
    return torch.cuda.max_memory_allocated(device) - before
