"""Images in prompts: the same answer cold, from the prefix cache, in any pieces, in company, after preemption."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from fulmen.checkpoint import make_tiny
from fulmen.config import UserError
from fulmen.data import Tokenizer
from fulmen.model import ModelConfig, VisionConfig, VisionLanguageConfig, VisionLanguageModel
from fulmen.serve import Engine, EngineSettings, SamplingParams
from fulmen.serve.memory import plan_for_config, plan_for_model
from fulmen.serve.plan import image_bytes
from fulmen.serve.prompt import Prompt

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tokenizer):
    text = ModelConfig.preset(
        "tiny",
        vocab_size=320,
        num_layers=2,
        layer_plan="LS",
        num_experts=4,
        max_positions=2000,
        hidden_size=32,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        rotary_dim=16,
        expert_size=32,
    )
    vision = VisionConfig(image_size=28, hidden_size=32, num_layers=2, num_heads=2, mlp_size=48)
    torch.manual_seed(1)
    model = VisionLanguageModel(VisionLanguageConfig(text=text, vision=vision, image_token=tokenizer.image_id))
    for parameter in model.vision_tower.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.normal_(model.multi_modal_projector.linear_2.weight, std=0.5)
    return model.eval()


@pytest.fixture
def new_engine(model, tokenizer):
    def make(pages=None, snapshots=None, **settings):
        small = {"max_sequences": 8, "page_size": 8, "chunk_tokens": 64, "snapshot_interval": 64, "memory": 64_000_000}
        asked = EngineSettings(**small | settings)
        changes = {"pages": pages, "snapshots": snapshots}
        changes = {name: value for name, value in changes.items() if value is not None}
        return Engine(model, tokenizer, asked, eos_ids=(), plan=replace(plan_for_model(model, asked), **changes))

    return make


def picture(width, height, seed):
    noise = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.numpy())


def ask(*parts):
    """A user's message of texts and pictures."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return [{"role": "user", "content": content}]


@torch.no_grad()
def alone(model, prompt, count=GREEDY.max_tokens):
    """What the whole model says, computed anew for each token without any cache."""
    said = list(prompt.tokens)
    for _ in range(count):
        said.append(int(model(torch.tensor([said]), images=prompt.images)[0, -1].argmax()))
    return said[len(prompt) :]


@pytest.fixture(scope="module")
def questions(model, tokenizer):
    """Prompts with one picture, two, the same twice, the same with another question, none; and their answers."""
    engine = Engine(model, tokenizer, EngineSettings(max_sequences=1, memory=64_000_000))
    first, second = picture(80, 60, 1), picture(28, 50, 2)
    asked = [
        ask(first, "Which?"),
        ask("Compare", first, "with", second),
        ask(second, second, "Twice?"),
        ask(first, "Another question."),
        ask("No picture at all."),
        ask(picture(80, 60, 3), "Which?"),
    ]
    prompts = [engine.encode_chat(messages) for messages in asked]
    return prompts, [alone(model, prompt) for prompt in prompts]


def test_other_pictures_give_other_answers(questions):
    prompts, answers = questions
    assert len(prompts[0]) == len(prompts[5])
    assert answers[0] != answers[5]


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, 1000])
def test_in_company_and_in_pieces_of_any_size(new_engine, questions, chunk_tokens, prefix_cache):
    prompts, answers = questions
    engine = new_engine(chunk_tokens=chunk_tokens, prefix_cache=prefix_cache)
    for _ in range(2):
        completions = engine.generate(prompts, GREEDY)
        assert [completion.answers[0].tokens for completion in completions] == answers
    assert (engine.scheduler.counts.hit > 0) == prefix_cache
    assert engine.runner.images._images == engine.runner.images._features == {}


def test_from_the_prefix_cache(new_engine, questions):
    """The second time nearly all of the prompt is found; another picture of the same size finds what is before it."""
    prompts, answers = questions
    engine = new_engine(snapshot_interval=8)
    (cold,), (warm,), (other,) = (engine.generate([prompts[place]], GREEDY) for place in (0, 0, 5))
    assert [c.answers[0].tokens for c in (cold, warm, other)] == [answers[0], answers[0], answers[5]]
    assert cold.cached_tokens == 0
    assert warm.cached_tokens >= len(prompts[0]) - 16
    before = prompts[0].images[0].start
    assert other.cached_tokens <= before


def test_preempted(new_engine, questions, model):
    prompts, answers = questions
    engine = new_engine(pages=(len(prompts[1]) + 60) // 8 + 1, snapshots=2, chunk_tokens=20)
    params = replace(GREEDY, max_tokens=60)
    completions = engine.generate(prompts, params)
    said = [completion.answers[0].tokens for completion in completions]
    assert [tokens[:12] for tokens in said] == answers
    assert said == [alone(model, prompt, 60) for prompt in prompts]
    assert engine.scheduler.counts.preemptions > 0


def test_an_image_is_encoded_once_for_all_its_pieces(new_engine, questions, monkeypatch):
    prompts, _ = questions
    engine = new_engine(chunk_tokens=5, prefix_cache=False)
    encode, calls = engine.runner.images.model.encode_images, []
    monkeypatch.setattr(engine.runner.images.model, "encode_images", lambda images: calls.append(1) or encode(images))
    engine.generate([prompts[2]], GREEDY)
    assert len(calls) <= 2  # the same picture twice, one behind the other


def test_several_answers_to_one_picture(new_engine, questions):
    prompts, answers = questions
    engine = new_engine()
    (completion,) = engine.generate([prompts[0]], replace(GREEDY, n=3))
    assert [answer.tokens for answer in completion.answers] == [answers[0]] * 3


def test_leaving_in_the_midst_of_an_image_frees_it(new_engine, questions):
    engine = new_engine(chunk_tokens=3)
    number = engine.submit(questions[0][0], GREEDY)
    for _ in range(12):
        engine.step()
    assert engine.runner.images._features
    engine.abort(number)
    assert engine.runner.images._images == engine.runner.images._features == {}
    assert engine.scheduler.pages.in_use == 0


def test_a_prompts_keys(questions):
    prompt = questions[0][1]
    keys = prompt.keys()
    for placed in prompt.images:
        own = set(keys[placed.start : placed.start + placed.count])
        assert len(own) == 1
        assert -(2**63) <= own.pop() < 0
    assert [key for key in keys if key >= 0] == [
        token for token in prompt.tokens if token != prompt.tokens[prompt.images[0].start]
    ]


def test_guards(new_engine, model, tokenizer, questions):
    engine = new_engine()
    with pytest.raises(UserError, match="2 image tokens that stand for no image"):
        engine.submit([5, tokenizer.image_id, tokenizer.image_id], GREEDY)
    with pytest.raises(UserError, match="give one for each"):
        engine.with_images([5, 6], [picture(28, 28, 1)])
    blind = Engine(model.language_model, tokenizer, EngineSettings(max_sequences=1, memory=64_000_000))
    with pytest.raises(UserError, match="takes no images"):
        blind.encode_chat(ask(picture(28, 28, 1)))
    with pytest.raises(UserError, match="takes no images"):
        blind.submit(questions[0][0], GREEDY)
    assert Prompt.of(questions[0][0]) is questions[0][0]


def test_the_plan_counts_encoder_and_features(model):
    settings = EngineSettings(max_sequences=2, memory=64_000_000)
    sees, blind = (
        plan_for_config(c, settings, device="cpu", dtype=torch.float32) for c in (model.config, model.config.text)
    )
    assert sees.weights - blind.weights == model.config.count_vision_parameters() * 4
    assert sees.activations - blind.activations == image_bytes(model.config, settings.on("cpu"), 4) > 0
    assert plan_for_model(model, settings).weights - sees.weights < 1000  # the decay rates


@torch.no_grad()
def test_the_largest_image_takes_no_more_than_the_plan_counts(model):
    """Bytes that are alive at once, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    image = model.config.vision.processor().process(picture(28 * 3, 28 * 6, 1))
    assert len(image.pixels) == 19
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        model.encode_images([image])
    alive = most = 0
    for event in watched.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    assert 10_000 < most < image_bytes(model.config, EngineSettings(chunk_tokens=64).on("cpu"), 4)


def test_a_failed_step_leaves_no_features(new_engine, questions, monkeypatch):
    engine = new_engine(chunk_tokens=3)
    engine.submit(questions[0][0], GREEDY)
    for _ in range(12):
        engine.step()
    assert engine.runner.images._features
    monkeypatch.setattr(engine.runner, "run", lambda step: 1 / 0)
    assert [piece.reason for _, piece in engine.step()] == ["error"]
    assert engine.runner.images._images == engine.runner.images._features == {}


def test_an_image_token_is_never_drawn(new_engine, tokenizer, questions):
    """Whatever is asked for: an answer would otherwise stand in the way of every later turn."""
    engine = new_engine()
    wish = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logit_bias={tokenizer.image_id: 100.0})
    (completion,) = engine.generate([questions[0][0]], wish)
    assert tokenizer.image_id not in completion.answers[0].tokens


def test_warming_up_leaves_no_trace(new_engine, questions):
    engine = new_engine()
    engine.warm_up()
    assert not engine.has_work
    assert engine.runner.images._images == engine.runner.images._features == {}
    prompts, answers = questions
    assert engine.generate(prompts[:1], GREEDY)[0].answers[0].tokens == answers[0]


def test_a_foreign_tokenizer_is_refused(model):
    with pytest.raises(UserError, match="<image> is token 263 of the tokenizer and 319 of the model"):
        Engine(model, Tokenizer.train(["other words"], 264), EngineSettings(max_sequences=1, memory=64_000_000))


def test_a_checkpoint_is_loaded(tmp_path):
    make_tiny(tmp_path / "tiny", vision=True)
    engine = Engine.load(tmp_path / "tiny", EngineSettings(max_sequences=1, memory=200_000_000))
    prompt = engine.encode_chat(ask(picture(120, 90, 1), "Which?"))
    assert len(prompt.images) == 1
    (completion,) = engine.generate([prompt], GREEDY)
    assert len(completion.answers[0].tokens) == 12
