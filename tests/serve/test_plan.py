"""Memory is divided before anything is loaded, and what cannot be is refused with what would fit."""

import re

import pytest

from fulmen.config import UserError
from fulmen.model import ModelConfig
from fulmen.serve import EngineSettings, plan_memory
from fulmen.serve.plan import GB, page_bytes, slot_bytes

TINY = ModelConfig.preset("tiny")
LARGE = ModelConfig.preset("minimax-text-01")


def large(settings, gigabytes=8 * 72):
    weights = LARGE.weight_bytes("int8")
    return plan_memory(LARGE, settings, budget=gigabytes * GB, weights=weights, number_bytes=2)


def test_what_one_sequence_takes():
    assert slot_bytes(LARGE) == 70 * 64 * 128 * 128 * 4
    assert page_bytes(LARGE, 16, 2) == 16 * 40_960  # minimax-01: 40 960 bytes of keys and values a token
    assert page_bytes(ModelConfig.preset("tiny", layer_plan="L"), 16, 2) == 0


@pytest.mark.parametrize(("device", "chunk", "page"), [("cpu", 1024, 16), ("cuda", 8192, 64), ("cuda:1", 8192, 64)])
def test_a_gpu_has_defaults_of_its_own(device, chunk, page):
    assert (EngineSettings().on(device).chunk_tokens, EngineSettings().on(device).page_size) == (chunk, page)
    assert EngineSettings(page_size=3, chunk_tokens=5).on(device).page_size == 3
    plans = [
        plan_memory(TINY, EngineSettings(chunk_tokens=tokens), budget=GB, weights=0, device=device)
        for tokens in (None, chunk)
    ]
    assert plans[0] == plans[1]
    assert plans[0].page_size == page


def test_eight_cards_of_80_gb_hold_a_million_tokens_of_the_released_model():
    plan = large(EngineSettings(max_context=1_000_000, max_sequences=16, chunk_tokens=8192, page_size=64))
    assert plan.max_context == 1_000_000
    assert plan.pages * plan.page_size >= 1_000_000
    assert plan.slots == 16
    assert plan.total <= plan.budget


@pytest.mark.parametrize("memory", [75_000_000, 90_000_000, 150_000_000, 2 * GB])
@pytest.mark.parametrize("context", [None, 1, 500, 8192])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_what_is_handed_out_is_what_there_is(memory, context, prefix_cache):
    settings = EngineSettings(max_context=context, chunk_tokens=64, max_sequences=16, prefix_cache=prefix_cache)
    try:
        plan = plan_memory(TINY, settings, budget=memory, weights=70_000_000, number_bytes=4)
    except UserError:
        assert memory == 75_000_000
        return
    assert plan.total <= memory
    assert 1 <= plan.slots <= 16
    assert plan.max_context <= plan.pages * plan.page_size
    assert context is None or plan.max_context == context
    assert (plan.snapshots > 0) <= prefix_cache
    if plan.slots < 16:
        assert f"{plan.slots} sequences at a time fit, not 16" in plan.table()


def test_a_context_that_does_not_fit_is_refused_with_the_one_that_would():
    settings = EngineSettings(max_context=4_000_000, chunk_tokens=8192)
    with pytest.raises(UserError, match=r"4000000 tokens do not fit into 576.0 GB .*: (\d+) would") as raised:
        large(settings)
    fitting = int(str(raised.value).split(": ")[1].split()[0])
    assert large(EngineSettings(max_context=fitting, chunk_tokens=8192)).max_context == fitting


def test_memory_that_does_not_do_is_refused_with_how_much_would():
    settings = EngineSettings(max_context=1000)
    with pytest.raises(UserError, match=r"80\.0 MB of memory are not enough for 80\.0 MB of weights, .* are$"):
        plan_memory(TINY, settings, budget=80_000_000, weights=80_000_000, number_bytes=4)
    with pytest.raises(UserError, match="max_context 8193 exceeds the model's 8192 positions"):
        plan_memory(TINY, EngineSettings(max_context=8193), budget=GB, weights=0)


@pytest.mark.parametrize("context", [None, 1, 500, 8192])
@pytest.mark.parametrize("memory", [1, 60_000_000, 72_000_000, 75_000_000, 80_000_000, 85_000_000])
@pytest.mark.parametrize("weights", [60_000_000, 71_234_567])
def test_what_a_refusal_names_is_enough_and_no_less_is(memory, context, weights):
    def plan(budget, context):
        return plan_memory(TINY, EngineSettings(max_context=context), budget=budget, weights=weights, number_bytes=4)

    try:
        assert plan(memory, context).total <= memory
        return
    except UserError as error:
        number, unit = re.search(r"([\d.]+) (kB|MB)(?: of memory| are)$", str(error)).groups()
        shorter = re.search(r": (\d+) would; give that as --max-context, or", str(error))
    unit = {"kB": 1e3, "MB": 1e6}[unit]
    assert plan(round(float(number) * unit), context)
    with pytest.raises(UserError):
        plan(round((float(number) - 0.1) * unit) - 1, context)
    assert shorter or context is None or memory < weights + plan(GB, 1).activations + 2_000_000
    if shorter:
        assert plan(memory, int(shorter[1])).max_context == int(shorter[1])
        with pytest.raises(UserError):
            plan(memory, int(shorter[1]) + 1)


def test_too_little_for_snapshots_is_said():
    settings = EngineSettings(max_context=2048, max_sequences=1, chunk_tokens=16)
    needed = plan_memory(TINY, settings, budget=GB, weights=0, number_bytes=4)
    budget = needed.activations + needed.slot_bytes + 128 * needed.page_bytes
    plan = plan_memory(TINY, settings, budget=budget, weights=0, number_bytes=4)
    assert plan.snapshots == 0
    assert "no prefix cache: there is no room for snapshots of 458.8 kB beside the longest context" in plan.table()


def test_settings_that_cannot_be_meant():
    for name in ("max_sequences", "max_context", "memory", "page_size", "chunk_tokens", "snapshot_interval"):
        with pytest.raises(UserError, match=f"{name} must be at least 1, got 0"):
            EngineSettings(**{name: 0})
    with pytest.raises(UserError, match="max_waiting must be 0 or more"):
        EngineSettings(max_waiting=-1)
