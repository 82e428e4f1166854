"""A conversation goes on where it was, says what a cold start would, and survives being left."""

import pytest
from PIL import Image

from fulmen.config import UserError
from fulmen.data import encode_chat
from fulmen.serve import Conversation, Engine, EngineSettings, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12)


def reply(conversation, said, **settings):
    return "".join(conversation.reply(said, SamplingParams(max_tokens=12, **settings)))


def spoken(tokenizer, text):
    """Ids of a text byte by byte, which are not those that it would be cut into."""
    by_byte = {tokenizer.token_bytes(token): token for token in range(320)}
    return [by_byte[bytes([byte])] for byte in text]


@pytest.fixture
def computed(engine, monkeypatch):
    """The number of tokens of each call of the model."""
    sizes, real = [], engine.model.hidden
    monkeypatch.setattr(
        engine.model, "hidden", lambda tokens, **options: sizes.append(tokens.shape[1]) or real(tokens, **options)
    )
    return sizes


def test_each_turn_costs_its_own_tokens(engine, computed, tokenizer):
    """Sampled hot, so that the drawn tokens are hardly ever those that the answer's text would be cut into."""
    conversation = Conversation(engine, system="Be short.")
    reply(conversation, "Hello", temperature=1.0, seed=1)
    computed.clear()
    reply(conversation, "And now?", temperature=1.0, seed=2)
    question = encode_chat(tokenizer, [{"role": "user", "content": "And now?"}])
    # What the model has not read yet: its last token, the end of its turn, a line break, and the question; in pieces.
    assert sum(computed) - 11 == 1 + 1 + 1 + len(question)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 4}])
def test_the_answer_is_that_of_a_cold_start(new_engine, settings):
    warm, cold = Conversation(new_engine()), Conversation(new_engine(prefix_cache=False))
    for said in ("Hello", "keys?", "values 🎉"):
        assert reply(warm, said, **settings) == reply(cold, said, **settings)
    assert warm.messages == cold.messages
    assert [message["role"] for message in warm.messages] == ["user", "assistant"] * 3


def test_the_ids_are_those_of_the_chat(speaker, tokenizer):
    said = tokenizer.encode("keys and values")
    conversation = Conversation(speaker([*said, tokenizer.eos_id]), system="Be short.")
    assert reply(conversation, "Hello", temperature=0) == "keys and values"
    assert conversation.messages == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "keys and values"},
    ]
    assert conversation._said.tokens == encode_chat(tokenizer, conversation.messages, generate=False)


def test_after_a_stop_string_the_history_is_what_was_given_out(speaker, tokenizer):
    conversation = Conversation(speaker([*spoken(tokenizer, b"ab!c"), 7]))
    assert reply(conversation, "Hello", temperature=0, stop=("!",)) == "ab"
    assert conversation._said.tokens == encode_chat(tokenizer, conversation.messages, generate=False)


def test_an_answer_that_ends_at_once_is_a_turn(speaker, tokenizer):
    conversation = Conversation(speaker([tokenizer.eos_id]))
    assert reply(conversation, "Hello", temperature=0) == ""
    assert [message["content"] for message in conversation.messages] == ["Hello", ""]
    assert conversation._said.tokens == encode_chat(tokenizer, conversation.messages, generate=False)


def test_an_answer_that_is_left_is_kept_as_far_as_it_came(engine, new_engine):
    conversation = Conversation(engine)
    pieces = conversation.reply("Hello", SamplingParams(temperature=0, max_tokens=50))
    said = next(pieces) + next(pieces)
    pieces.close()
    assert not engine.has_work
    assert conversation.messages[-1] == {"role": "assistant", "content": said}
    cold = Conversation(new_engine(prefix_cache=False))
    cold._said = conversation._said
    assert reply(conversation, "go on", temperature=0) == reply(cold, "go on", temperature=0)


def test_an_interruption_inside_the_model_spoils_nothing(engine, new_engine, monkeypatch):
    """Ctrl-C in the middle of an answer."""
    conversation = Conversation(engine)
    pieces = conversation.reply("Hello", SamplingParams(temperature=0, max_tokens=50))
    next(pieces)

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "logits", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(pieces)
    cold = Conversation(new_engine(prefix_cache=False))
    cold._said = conversation._said
    assert reply(conversation, "go on", temperature=0) == reply(cold, "go on", temperature=0)


def test_a_conversation_that_is_too_long_is_refused_and_can_go_on(engine):
    conversation = Conversation(engine)
    reply(conversation, "Hello", temperature=0)
    before = list(conversation.messages)
    with pytest.raises(UserError, match="400 is the longest context"):
        conversation.reply("x" * 500, GREEDY)
    assert conversation.messages == before
    assert len(reply(conversation, "again", temperature=0)) > 0


def picture(colour):
    return Image.new("RGB", (120, 90), colour)


def test_images_are_shown_and_remembered(seeing_engine, monkeypatch):
    """A turn with an image costs its own tokens, and so does the next one without."""
    computed, real = [], seeing_engine.model.hidden
    monkeypatch.setattr(
        seeing_engine.model,
        "hidden",
        lambda tokens, **options: computed.append(tokens.shape[1]) or real(tokens, **options),
    )
    encode = seeing_engine.encode_chat
    settings = {"temperature": 0, "ignore_eos": True}
    conversation = Conversation(seeing_engine)
    params = SamplingParams(max_tokens=12, **settings)
    list(conversation.reply("Which?", params, [picture("red"), picture("blue")]))
    for question in ("And now?", "And then?"):
        computed.clear()
        list(conversation.reply(question, params))
        line = seeing_engine.tokenizer.encode("\n")
        assert sum(computed) - 11 == 1 + 1 + len(line) + len(encode([{"role": "user", "content": question}]))
    assert [part["type"] for part in conversation.messages[0]["content"]] == ["image", "image", "text"]
    assert len(conversation._said.images) == 2


def test_an_image_counts_in_the_history(seeing_checkpoint):
    """With the same words another image is another history, and the same image gets the answer of a cold start."""

    def said(colour, **settings):
        settings = EngineSettings(max_sequences=1, max_context=2048, memory=200_000_000, **settings)
        conversation = Conversation(Engine.load(seeing_checkpoint, settings))
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        for text, images in (("Hello", ()), ("Which?", [picture(colour)]), ("Sure?", ())):
            list(conversation.reply(text, params, images))
        return conversation._said

    warm, cold, other = said("red"), said("red", prefix_cache=False), said("blue")
    assert warm.tokens == cold.tokens
    assert warm.keys() == cold.keys() != other.keys()
    (placed,) = warm.images
    image_id = warm.tokens[placed.start]
    assert warm.tokens.count(image_id) == placed.count
    assert set(warm.tokens[placed.start : placed.start + placed.count]) == {image_id}


def test_an_image_that_cannot_be_shown_is_refused_and_the_chat_can_go_on(engine, seeing_engine):
    for refusing, image, message in (
        (engine, picture("red"), "takes no images"),
        (seeing_engine, b"no", "not a picture"),
    ):
        conversation = Conversation(refusing)
        with pytest.raises(UserError, match=message):
            conversation.reply("Which?", GREEDY, [image])
        assert conversation.messages == []
        assert reply(conversation, "Hello", temperature=0, ignore_eos=True)
