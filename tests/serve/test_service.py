"""The asyncio side of an engine: many at once, people who leave, a full queue, a stop in good order, a fault."""

import asyncio
import random
import re

import pytest
import torch

from fulmen.config import UserError
from fulmen.data import PlacedImage, ProcessedImage
from fulmen.serve import Completion, SamplingParams
from fulmen.serve.prompt import Prompt
from fulmen.serve.service import Service
from fulmen.serve.types import QueueFull

LONG = SamplingParams(temperature=0, max_tokens=None)
SHORT = SamplingParams(temperature=0, max_tokens=5)


async def whole(answers, count=1):
    completion = Completion.of([], count)
    async for piece in answers:
        completion.add(piece)
    return completion.answers


def number(service, name):
    return float(re.search(rf"^fulmen_{re.escape(name)} (\S+)$", service.metrics.render().decode(), re.MULTILINE)[1])


async def at_rest(service):
    """Once nobody asks and the engine has noticed."""
    await service._idle.wait()
    while service.engine.has_work:
        await asyncio.sleep(0.001)


def test_many_at_once_have_each_their_own_answer(new_engine):
    engine = new_engine(max_sequences=3)
    rng = random.Random(1)
    prompts = [[rng.randrange(4, 320) for _ in range(rng.randint(1, 40))] for _ in range(12)]
    expected = [completion.answers for completion in new_engine().generate(prompts, SHORT)]

    async def run():
        async with Service(engine) as service:
            return await asyncio.gather(*(whole(service.stream(prompt, SHORT)) for prompt in prompts))

    assert asyncio.run(run()) == expected


def test_a_prompt_of_several_answers(engine):
    async def run():
        async with Service(engine) as service:
            return await whole(service.stream([5, 6], SamplingParams(n=3, max_tokens=4)), 3)

    assert [answer.reason for answer in asyncio.run(run())] == ["length"] * 3


@pytest.mark.parametrize("way", ["close", "cancel"])
def test_who_leaves_frees_memory(engine, way):
    async def run():
        async with Service(engine) as service:
            answers = service.stream([5] * 50, LONG)
            if way == "close":
                await anext(answers)
                await answers.aclose()
                with pytest.raises(StopAsyncIteration):
                    await anext(answers)
            else:
                task = asyncio.create_task(whole(answers))
                while not service._begun:
                    await asyncio.sleep(0.001)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            await at_rest(service)
            assert number(service, "pages_in_use") == number(service, "requests_running") == 0
            assert number(service, 'answers_total{reason="abort"}') == 1
            return await whole(service.stream([5, 6], SHORT))

    assert len(asyncio.run(run())[0].tokens) == 5


def test_what_can_never_be_served_is_refused_at_once(engine):
    async def run():
        async with Service(engine) as service:
            with pytest.raises(UserError, match="400 is the longest context"):
                service.stream([5] * 400, SHORT)
            assert not service._answers

    asyncio.run(run())


def test_a_full_queue_says_when_to_come_back(new_engine):
    engine = new_engine(max_sequences=1, max_waiting=2)

    async def run():
        async with Service(engine) as service:
            waiting = [service.stream([5, n], SHORT) for n in range(3)]
            with pytest.raises(QueueFull) as refused:
                service.stream([5], SHORT)
            assert refused.value.retry_after >= 1
            assert [len(answers[0].tokens) for answers in await asyncio.gather(*map(whole, waiting))] == [5, 5, 5]
            return await whole(service.stream([5], SHORT))

    assert len(asyncio.run(run())[0].tokens) == 5


def test_pixels_count_until_the_answers_end(engine, monkeypatch):
    monkeypatch.setattr(engine, "check", lambda *_: 5)  # the model here has no eyes

    def shown(size):
        image = ProcessedImage(torch.zeros(size, dtype=torch.uint8), None, bytes(16))
        return Prompt([5], (PlacedImage(image, 0, 0, 1),))

    async def run():
        async with Service(engine) as service:
            first, second, _ = (service.stream(prompt, SHORT) for prompt in (shown(600), shown(400), [5]))
            assert service.pixels == 1000
            await second.aclose()
            assert service.pixels == 600
            await whole(first)
            assert service.pixels == 0

    asyncio.run(run())


def test_a_stop_lets_answers_end(engine):
    async def run():
        async with Service(engine) as service:
            task = asyncio.create_task(whole(service.stream([5], SHORT)))
            await asyncio.sleep(0)
            await service.stop(grace=30)
            with pytest.raises(QueueFull):
                service.stream([5], SHORT)
            return await task

    assert asyncio.run(run())[0].reason == "length"


def test_a_stop_breaks_off_what_takes_too_long(new_engine, monkeypatch, caplog):
    engine = new_engine()
    monkeypatch.setattr(engine, "step", lambda: [])  # nothing ever comes

    async def run():
        async with Service(engine) as service:
            task = asyncio.create_task(whole(service.stream([5], SamplingParams(n=2)), 2))
            await asyncio.sleep(0)
            await service.stop(grace=0.01)
            return await task

    assert [answer.reason for answer in asyncio.run(run())] == ["abort", "abort"]
    assert "1 requests are broken off" in caplog.text


def test_an_engine_that_breaks_ends_answers_and_says_that_it_is_not_ready(engine, monkeypatch, caplog):
    def broken():
        raise MemoryError("no more")

    monkeypatch.setattr(engine, "step", broken)

    async def run():
        async with Service(engine) as service:
            answers = await whole(service.stream([5], SHORT))
            assert not service.ready
            return answers

    assert asyncio.run(run())[0].reason == "error"
    assert "the engine has failed" in caplog.text


def test_what_is_measured(new_engine):
    engine = new_engine()

    async def run():
        async with Service(engine) as service:
            for _ in range(2):
                await whole(service.stream([7] * 100, SHORT))
            assert number(service, "prompt_tokens_total") == 200
            assert number(service, "generated_tokens_total") == 10
            assert number(service, "prefix_cache_queried_tokens_total") == 200
            assert number(service, "prefix_cache_hit_tokens_total") == 96
            assert number(service, "prefix_cache_hit_rate") == pytest.approx(0.48)
            assert number(service, 'answers_total{reason="length"}') == 2
            assert number(service, "time_to_first_token_seconds_count") == 2
            assert number(service, "request_seconds_count") == 2
            assert number(service, "pages_cached") > 0
            assert number(service, "snapshots_in_use") > 0

    asyncio.run(run())
