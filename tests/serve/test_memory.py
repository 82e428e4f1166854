"""What there is and what is taken: the plan before a model is loaded, the plan after, what an engine then allocates."""

from dataclasses import replace

import pytest
import torch

from fulmen.config import UserError
from fulmen.serve import Engine, EngineSettings, memory
from fulmen.serve.memory import free_memory, measure_activations, plan_for_config, plan_for_model

SETTINGS = EngineSettings(max_sequences=4, page_size=8, chunk_tokens=64)
FREE = 40_000_000


@pytest.fixture
def free(monkeypatch):
    """free(number) sets the bytes that the machine has left."""
    return lambda number: monkeypatch.setattr(memory, "available_memory", lambda: number)


def bytes_of(model):
    return sum(parameter.nbytes for parameter in model.parameters())


def test_the_plan_before_loading_is_the_plan_after(model, free):
    free(FREE)
    before = plan_for_config(model.config, SETTINGS, device="cpu", dtype=torch.float32)
    free(FREE - bytes_of(model))  # which the weights take by then
    after = plan_for_model(model, SETTINGS)
    more = sum(buffer.nbytes for buffer in model.buffers())
    assert after.weights - before.weights == after.budget - before.budget == more < 100
    assert replace(after, weights=before.weights, budget=before.budget) == before


def test_a_cpus_memory_is_for_others_too(model, free):
    free(FREE)
    plan = plan_for_config(model.config, SETTINGS, device="cpu", dtype=torch.float32)
    assert plan.weights == bytes_of(model)
    assert plan.budget == plan.weights + (FREE - plan.weights) // 4


def test_nine_tenths_of_a_gpu(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (FREE, 2 * FREE))
    assert free_memory("cuda:1") == FREE
    plan = plan_for_config(model.config, SETTINGS, device="cuda:1", dtype=torch.float32)
    assert plan.budget == plan.weights + int(0.9 * (FREE - plan.weights))


def test_memory_that_was_asked_for_counts_whatever_is_free(model, free):
    free(1)
    asked = EngineSettings(max_sequences=4, chunk_tokens=64, memory=30_000_000)
    assert plan_for_config(model.config, asked, device="cpu", dtype=torch.float32).budget == 30_000_000
    assert plan_for_model(model, asked).budget == 30_000_000


def test_weights_that_do_not_fit_are_refused(model, free):
    free(bytes_of(model) - 1)
    there = f"{(bytes_of(model) - 1) / 1e3:.1f} kB"
    with pytest.raises(UserError, match=f"^{there} of memory are not enough for {there} of weights"):
        plan_for_config(model.config, SETTINGS, device="cpu", dtype=torch.float32)


def test_keys_and_values_have_the_weights_type_and_states_have_not(model):
    asked = EngineSettings(max_sequences=4, page_size=8, chunk_tokens=64, memory=30_000_000)
    wide, narrow = (
        plan_for_config(model.config, asked, device="cpu", dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    assert wide.weights == 2 * narrow.weights
    assert wide.page_bytes == 2 * narrow.page_bytes
    assert wide.slot_bytes == narrow.slot_bytes


def test_an_engine_allocates_what_the_plan_says(model, tokenizer):
    engine = Engine(model, tokenizer, EngineSettings(max_sequences=4, page_size=8, memory=30_000_000))
    plan, layers = engine.plan, engine.runner.pool.memories
    tensors = [tensor for layer in layers for tensor in (layer.state, layer.keys, layer.values) if tensor is not None]
    assert sum(tensor.nbytes for tensor in tensors) == plan.total - plan.weights - plan.activations
    assert plan.total <= plan.budget


@pytest.mark.parametrize(("chunk", "tokens"), [(64, 64), (10_000, 400)])
def test_activations_are_those_of_the_widest_step(model, monkeypatch, chunk, tokens):
    widths = {}

    def watched(name, function):
        def call(argument, **others):
            widths[name] = tuple(argument.shape)
            return function(argument, **others)

        return call

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3500)
    for name in ("hidden", "logits"):
        monkeypatch.setattr(model, name, watched(name, getattr(model, name)))
    assert measure_activations(model, EngineSettings(max_sequences=6, chunk_tokens=chunk)) == 2500
    assert widths == {"hidden": (1, tokens), "logits": (6, 32)}
