"""Many requests at once say what each alone would; stops, limits and faults end a request and nothing else."""

import random

import pytest
import torch

from fulmen.checkpoint import save_model
from fulmen.config import UserError
from fulmen.serve import Completion, Engine, EngineSettings, SamplingParams
from fulmen.serve import engine as engine_module
from fulmen.serve.scheduler import Counts

GREEDY = SamplingParams(temperature=0, max_tokens=20)


def tokens(pieces):
    return [token for piece in pieces for token in piece.tokens]


def text(pieces):
    return "".join(piece.text for piece in pieces)


def ids(tokenizer, *parts):
    """Ids of texts, byte by byte where a part is bytes."""
    by_byte = {tokenizer.token_bytes(token): token for token in range(320)}
    found = []
    for part in parts:
        found += tokenizer.encode(part) if isinstance(part, str) else [by_byte[bytes([byte])] for byte in part]
    return found


def greedy(model, prompt, count):
    """What the whole model says, computed anew for each token without any cache."""
    said = list(prompt)
    for _ in range(count):
        said.append(int(model(torch.tensor([said]))[0, -1].argmax()))
    return said[len(prompt) :]


def drive(engine, requests, seed=0):
    """Submit (prompt, params) at random steps; the answers' tokens, in order."""
    rng, waiting, answers = random.Random(seed), list(enumerate(requests)), {}
    numbers = {}
    while waiting or engine.has_work:
        for _ in range(rng.choice([0, 0, 1, 3])):
            if waiting:
                place, (prompt, params) = waiting.pop(0)
                numbers[engine.submit(prompt, params)] = place
                answers[place] = []
        for number, piece in engine.step():
            answers[numbers[number]] += piece.tokens
    return [answers[place] for place in range(len(requests))]


def random_requests(count, seed=1, longest=120, shared=0, most=30):
    rng = random.Random(seed)
    system = [rng.randrange(4, 320) for _ in range(shared)]
    prompts = [system + [rng.randrange(4, 320) for _ in range(rng.randint(1, longest))] for _ in range(count)]
    return [(prompt, SamplingParams(temperature=0, max_tokens=rng.randint(1, most))) for prompt in prompts]


@pytest.fixture(scope="module")
def requests(model):
    """64 requests, and the answers that they must have."""
    found = random_requests(64, shared=50)
    return found, [greedy(model, prompt, params.max_tokens) for prompt, params in found]


@pytest.fixture(scope="module")
def talkative(model):
    """The same of short prompts and long answers, which grow out of what there was room for."""
    found = random_requests(64, longest=20, most=100)
    return found, [greedy(model, prompt, params.max_tokens) for prompt, params in found]


@pytest.mark.parametrize("chunk_tokens", [1, 17, 255, 300])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_each_of_many_is_as_if_alone(new_engine, requests, chunk_tokens, prefix_cache):
    engine = new_engine(chunk_tokens=chunk_tokens, prefix_cache=prefix_cache, max_sequences=64)
    assert drive(engine, requests[0]) == requests[1]
    assert engine.scheduler.pages.in_use == 0
    assert engine.scheduler.counts.hit_rate > 0.2 if prefix_cache else engine.scheduler.counts.hit == 0, (
        engine.scheduler.counts
    )


@pytest.mark.parametrize("chunk_tokens", [1, 17, 255, 300])
def test_preemption_changes_nothing(new_engine, talkative, chunk_tokens):
    engine = new_engine(chunk_tokens=chunk_tokens, pages=28, snapshots=3, max_sequences=64)
    assert drive(engine, talkative[0]) == talkative[1]
    assert engine.scheduler.counts.preemptions > 0


def test_of_many_that_share_a_prompt_one_computes_it(new_engine, model):
    asked = random_requests(32, longest=20, shared=250)
    engine = new_engine(max_sequences=32)
    for prompt, params in asked:
        engine.submit(prompt, params)
    numbers = list(engine._requests)
    answers = {number: [] for number in numbers}
    while engine.has_work:
        for number, piece in engine.step():
            answers[number] += piece.tokens
    assert list(answers.values()) == [greedy(model, prompt, params.max_tokens) for prompt, params in asked]
    counts = engine.scheduler.counts
    assert counts.hit + counts.without_state == 31 * 248  # whole pages of eight tokens
    assert counts.without_state <= 2 * 56  # of who comes before there are states where prompts part


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_warming_up_leaves_no_trace(new_engine, requests, monkeypatch, kind):
    """What is done on a GPU is done here too, where it is no use."""
    lengths = engine_module._first_lengths
    monkeypatch.setattr(engine_module, "_first_lengths", lambda device, *sizes: lengths(kind, *sizes))
    engine = new_engine(max_sequences=8)
    engine.warm_up()
    assert not engine.has_work
    assert engine.scheduler.counts == Counts()
    assert engine.scheduler.pages.free == engine.plan.pages
    assert drive(engine, requests[0][:8]) == requests[1][:8]


def test_a_prompt_seen_before_is_not_computed_again(new_engine):
    engine = new_engine()
    prompt = random_requests(1, longest=1, shared=200)[0][0]
    cold = engine.generate([prompt], GREEDY)[0]
    warm = engine.generate([prompt], GREEDY)[0]
    assert (cold.cached_tokens, warm.cached_tokens) == (0, 200)
    assert warm.answers == cold.answers


def test_a_snapshot_that_is_gone_costs_time_and_nothing_else(new_engine, model):
    engine = new_engine(snapshots=1)
    prompt = random_requests(1, longest=1, shared=100)[0][0]
    engine.generate([prompt], GREEDY)
    engine.generate([[5, 6, 7]], GREEDY)  # takes the only snapshot, and leaves the pages
    again = engine.generate([prompt], GREEDY)[0]
    assert again.cached_tokens == 0
    assert engine.scheduler.counts.without_state > 0
    assert again.answers[0].tokens == greedy(model, prompt, 20)


def test_a_slot_is_clean_after_an_abort(new_engine, model):
    engine = new_engine(max_sequences=1)
    number = engine.submit([9] * 30, GREEDY)
    for _ in range(5):
        engine.step()
    engine.abort(number)
    assert not engine.has_work
    assert engine.scheduler.pages.in_use == 0
    assert engine.generate([[5, 6]], GREEDY)[0].answers[0].tokens == greedy(model, [5, 6], 20)


def test_n_answers_share_the_prompt(new_engine):
    engine = new_engine()
    prompt = random_requests(1, longest=1, shared=100)[0][0]
    settings = {"temperature": 1.0, "max_tokens": 12}
    forks = engine.generate([prompt], SamplingParams(n=3, seed=7, **settings))[0]
    alone = [engine.generate([prompt], SamplingParams(seed=7 + n, **settings))[0].answers[0] for n in range(3)]
    assert forks.answers == alone
    assert len({tuple(answer.tokens) for answer in alone}) == 3
    assert engine.scheduler.counts.hit >= 2 * 96


def test_sampled_answers_do_not_depend_on_company(new_engine):
    prompts = [prompt for prompt, _ in random_requests(6)]
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=15, repetition_penalty=1.2, top_p=0.9, logprobs=2)
    together = new_engine().generate(prompts, params)
    alone = [new_engine().generate([prompt], params)[0] for prompt in prompts]
    for a, b in zip(together, alone, strict=True):
        assert a.answers[0].tokens == b.answers[0].tokens
        for one, other in zip(a.answers[0].logprobs, b.answers[0].logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert len(one.top) == 2


def test_pieces_say_everything_once(engine):
    params = SamplingParams(temperature=1.0, max_tokens=60, seed=3)
    pieces = list(engine.stream(engine.encode("a"), params))
    assert [piece.reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert all(piece.text for piece in pieces[:-1])
    assert len(tokens(pieces)) == 60 == pieces[-1].generated_tokens
    assert pieces[-1].prompt_tokens == len(engine.encode("a"))
    assert text(pieces) == engine.generate(["a"], params)[0].text


def test_a_prompt_begins_like_a_document(engine, tokenizer):
    assert engine.encode("ab") == [tokenizer.bos_id, *tokenizer.encode("ab")]
    assert engine.encode("<end_of_sentence>")[1:] == tokenizer.encode("<end_of_sentence>")
    assert tokenizer.eos_id not in engine.encode("<end_of_sentence>")


def test_the_end_of_turn_ends_an_answer(speaker, tokenizer):
    engine = speaker([*tokenizer.encode("keys"), tokenizer.eos_id, *tokenizer.encode("values")])
    pieces = list(engine.stream([5], GREEDY))
    assert (text(pieces), pieces[-1].reason) == ("keys", "stop")
    assert tokens(pieces) == [*tokenizer.encode("keys"), tokenizer.eos_id]


def test_a_checkpoint_names_its_own_ends(model, tokenizer):
    settings = EngineSettings(max_sequences=1, memory=64_000_000)
    assert Engine(model, tokenizer, settings).eos_ids == {tokenizer.eos_id}
    assert Engine(model, tokenizer, settings, eos_ids=(7, 8)).eos_ids == {7, 8}
    assert Engine(model, tokenizer, settings, eos_ids=()).eos_ids == frozenset()


@pytest.mark.parametrize(("stop", "expected"), [(("END",), "one E two EN "), (("ENDE",), "one E two EN END of it")])
def test_an_answer_ends_before_a_stop_string(speaker, tokenizer, stop, expected):
    spoken = [*ids(tokenizer, b"one E two EN END of it"), tokenizer.eos_id]
    pieces = list(speaker(spoken).stream([5], SamplingParams(temperature=0, max_tokens=99, stop=stop)))
    assert text(pieces) == expected
    assert pieces[-1].reason == "stop"
    assert all(expected.startswith(text(pieces[:count])) for count in range(len(pieces)))


def test_what_was_held_back_comes_where_the_answer_ends(speaker, tokenizer):
    params = SamplingParams(temperature=0, max_tokens=6, stop=("state!",))
    pieces = list(speaker([*ids(tokenizer, b"a stat"), 7]).stream([5], params))
    assert (text(pieces), pieces[-1].reason) == ("a stat", "length")


def test_requests_that_can_never_be_served(engine):
    for prompt, params, message in (
        ([], GREEDY, "the prompt is empty"),
        ([5] * 400, GREEDY, "the prompt has 400 tokens; 400 is the longest context here"),
        ([320], GREEDY, "a token that is not in 0 to 319"),
        ([-1], GREEDY, "a token that is not in 0 to 319"),
        ([5], SamplingParams(logit_bias={320: 1.0}), "logit_bias names token 320"),
    ):
        with pytest.raises(UserError, match=message):
            engine.submit(prompt, params)
    assert not engine.has_work


def test_an_empty_text_is_a_prompt(engine):
    assert len(engine.generate([""], GREEDY)[0].answers[0].tokens) == 20


def test_positions_end_an_answer(engine):
    pieces = list(engine.stream([5] * 393, GREEDY))
    assert len(tokens(pieces)) == 7
    assert pieces[-1].reason == "length"


def test_no_limit_means_as_many_as_fit(engine):
    pieces = list(engine.stream([5] * 300, SamplingParams(temperature=0, max_tokens=None)))
    assert len(tokens(pieces)) == 100


def test_logits_that_are_not_finite_end_their_answer_alone(engine, model, monkeypatch):
    real = engine.model.logits
    spoiled = engine.submit([5], GREEDY)
    other = engine.submit([6, 7], GREEDY)

    def logits(hidden):
        out = real(hidden)
        out[0] = torch.nan if len(out) == 2 else out[0]
        return out

    monkeypatch.setattr(engine.model, "logits", logits)
    completions = {number: Completion.of([5], 1) for number in (spoiled, other)}
    while engine.has_work:
        for number, piece in engine.step():
            completions[number].add(piece)
    assert completions[spoiled].answers[0].reason == "error"
    assert "logits are not finite" in completions[spoiled].answers[0].error
    assert completions[other].answers[0].tokens == greedy(model, [6, 7], 20)
    monkeypatch.setattr(engine.model, "logits", lambda hidden: torch.full((1, 320), torch.nan))
    with pytest.raises(UserError, match="logits are not finite"):
        list(engine.stream([5], GREEDY))


def test_a_step_that_fails_ends_what_was_running_and_no_more(engine, model, monkeypatch, caplog):
    numbers = [engine.submit([5, n], SamplingParams(n=2, max_tokens=9)) for n in range(3)]
    engine.step()

    def broken(*arguments, **options):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.model.layers[1], "forward", broken)
        pieces = engine.step()
    assert sorted((number, piece.index) for number, piece in pieces) == [(n, i) for n in numbers for i in range(2)]
    assert {(piece.reason, piece.error) for _, piece in pieces} == {("error", "the engine has failed: out of memory")}
    assert "out of memory" in caplog.text
    assert engine.scheduler.pages.in_use == 0
    assert engine.generate([[5, 6]], GREEDY)[0].answers[0].tokens == greedy(model, [5, 6], 20)


def test_an_interrupt_is_passed_on_and_spoils_nothing(engine, model, monkeypatch):
    """Ctrl-C after the first layer has advanced its state and before the second has."""
    stream = engine.stream([5, 6, 7], GREEDY)
    next(stream)

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "logits", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(stream)
    assert not engine.has_work
    assert engine.generate([[5, 6, 7]], GREEDY)[0].answers[0].tokens == greedy(model, [5, 6, 7], 20)


def test_generate_shows_how_far_it_is(engine, capsys):
    found = engine.generate(["a", "b", "c"], SamplingParams(max_tokens=3), progress=True)
    assert [completion.answers[0].reason for completion in found] == ["length"] * 3
    assert "3/3" in capsys.readouterr().err


def test_generate_refuses_before_it_computes(engine):
    with pytest.raises(UserError, match="the prompt is empty"):
        engine.generate([[5], []], GREEDY)
    assert not engine.has_work


def test_load(tmp_path, model, tokenizer, new_engine):
    save_model(model, tmp_path / "run" / "checkpoint", tokenizer=tokenizer)
    plans = []
    loaded = Engine.load(tmp_path / "run", EngineSettings(max_sequences=2), show_plan=plans.append)
    assert loaded.eos_ids == {tokenizer.eos_id}
    assert plans[0].slots == loaded.plan.slots == 2
    assert plans[0].weights == sum(parameter.nbytes for parameter in model.parameters())
    prompt = loaded.encode("keys")
    assert loaded.generate([prompt], GREEDY)[0].text == new_engine().generate([prompt], GREEDY)[0].text
    narrow = Engine.load(tmp_path / "run", EngineSettings(max_sequences=2), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in narrow.model.parameters()} == {torch.bfloat16}
    assert len(tokens(narrow.stream([5], GREEDY))) == 20


def test_load_in_int8(tmp_path, model, tokenizer):
    save_model(model, tmp_path, tokenizer=tokenizer)
    plans = []
    loaded = Engine.load(tmp_path, EngineSettings(max_sequences=2), dtype=torch.int8, show_plan=plans.append)
    assert plans[0].weights == model.config.weight_bytes("int8", rest="float32")
    assert loaded.plan.weights == plans[0].weights + sum(
        layer.self_attn.rates.nbytes for layer in loaded.model.layers[:1]
    )
    assert loaded.plan.activations == plans[0].activations
    requests = random_requests(5)
    assert drive(loaded, requests) == [greedy(loaded.model, prompt, params.max_tokens) for prompt, params in requests]


def test_memory_that_does_not_do_is_refused_before_the_weights_are_read(tmp_path, model, tokenizer):
    save_model(model, tmp_path, tokenizer=tokenizer)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"100\.0 kB of memory are not enough for .* of weights, .*: .* are"):
        Engine.load(tmp_path, EngineSettings(memory=100_000))


def test_load_of_something_else(tmp_path):
    with pytest.raises(UserError, match=r"there is no config\.json in .*: name the folder of a checkpoint"):
        Engine.load(tmp_path / "nowhere")
