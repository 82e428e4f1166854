"""Streaming: the same tokens however the prompt is cut, stop strings that never leak, a conversation that goes on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fulmen.checkpoint import save_model
from fulmen.config import UserError
from fulmen.data import encode_chat
from fulmen.serve import Conversation, SamplingParams, TextGenerator, find_checkpoint, generate
from fulmen.serve.generate import Context, _split_at_stop

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


@pytest.fixture
def computed(generator, monkeypatch):
    """The number of tokens of each call of the model."""
    sizes = []
    real = generator.model.hidden
    monkeypatch.setattr(
        generator.model, "hidden", lambda tokens, **options: sizes.append(tokens.shape[1]) or real(tokens, **options)
    )
    return sizes


def test_greedy_takes_the_best_of_a_whole_forward(generator):
    prompt = generator.encode("keys and values")
    answer = tokens(generator.stream(prompt, GREEDY))
    logits = generator.model(torch.tensor([prompt + answer]))[0]
    assert answer == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
    assert len(answer) == 20


@pytest.mark.parametrize("piece", [1, 7, 300])
def test_the_prompt_may_be_cut_anywhere(generator, computed, monkeypatch, piece):
    prompt = generator.encode("Lightning keeps a state, softmax keeps keys and values. " * 4)
    expected = tokens(generator.stream(prompt, GREEDY))
    computed.clear()
    monkeypatch.setattr(generate, "PROMPT_PIECE", piece)
    assert tokens(generator.stream(prompt, GREEDY)) == expected
    whole, rest = divmod(len(prompt), piece)
    assert computed == [piece] * whole + [rest] * (rest > 0) + [1] * 19


def test_pieces_say_everything_once(generator):
    prompt = generator.encode("a")
    pieces = list(generator.stream(prompt, SamplingParams(temperature=1.0, max_tokens=60, seed=3)))
    assert [piece.reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert all(piece.text for piece in pieces[:-1])
    assert len(tokens(pieces)) == 60
    assert text(pieces) == generator.generate("a", SamplingParams(temperature=1.0, max_tokens=60, seed=3))


def test_a_prompt_begins_like_a_document(generator, tokenizer):
    assert generator.encode("ab") == [tokenizer.bos_id, *tokenizer.encode("ab")]
    assert generator.encode("<end_of_sentence>")[1:] == tokenizer.encode("<end_of_sentence>")
    assert tokenizer.eos_id not in generator.encode("<end_of_sentence>")


def test_the_end_of_turn_ends_an_answer(speaker, tokenizer):
    generator = speaker([*tokenizer.encode("keys"), tokenizer.eos_id, *tokenizer.encode("values")])
    pieces = list(generator.stream([5], GREEDY))
    assert (text(pieces), pieces[-1].reason) == ("keys", "stop")
    assert tokens(pieces) == [*tokenizer.encode("keys"), tokenizer.eos_id]


def test_a_checkpoint_names_its_own_ends(model, tokenizer):
    assert TextGenerator(model, tokenizer).eos_ids == {tokenizer.eos_id}
    assert TextGenerator(model, tokenizer, (7, 8)).eos_ids == {7, 8}
    assert TextGenerator(model, tokenizer, ()).eos_ids == frozenset()


def test_other_special_tokens_write_nothing(speaker, tokenizer):
    generator = speaker([tokenizer.bos_id, *tokenizer.encode("ok"), tokenizer.image_id, tokenizer.eos_id])
    assert text(generator.stream([5], GREEDY)) == "ok"


def test_a_character_comes_when_its_last_byte_does(speaker, tokenizer):
    spoken = [*ids(tokenizer, "é🎉日".encode()), tokenizer.eos_id]
    pieces = list(speaker(spoken).stream([5], GREEDY))
    assert [piece.text for piece in pieces] == ["é", "🎉", "日", ""]
    assert [len(piece.tokens) for piece in pieces] == [2, 4, 3, 1]


def test_a_character_that_is_never_finished_becomes_a_mark(speaker, tokenizer):
    spoken = ids(tokenizer, "🎉".encode()[:3])
    assert text(speaker([*spoken, tokenizer.eos_id]).stream([5], GREEDY)) == "\ufffd"
    cut = list(speaker(spoken).stream([5], SamplingParams(temperature=0, max_tokens=2)))
    assert (text(cut), cut[-1].reason) == ("\ufffd", "length")


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("END",), "one E two EN "),
        (("ENDE",), "one E two EN END of it"),
        (("two", "END"), "one E "),
        (("D o", "ND"), "one E two EN E"),
        (("one",), ""),
        (("it",), "one E two EN END of "),
        (("absent",), "one E two EN END of it"),
        (("🎉",), "one E two EN END of it"),
    ],
)
def test_stop_strings_over_several_pieces_never_leak(speaker, tokenizer, stop, expected):
    said = "one E two EN END of it"
    spoken = [*ids(tokenizer, said.encode()), tokenizer.eos_id]
    pieces = list(speaker(spoken).stream([5], SamplingParams(temperature=0, max_tokens=99, stop=stop)))
    assert text(pieces) == expected
    assert pieces[-1].reason == "stop"
    assert all(expected.startswith(text(pieces[:count])) for count in range(len(pieces)))
    # It ends with the token that completes the stop string, and computes none after it.
    ends = [said.find(word) + len(word) for word in stop if word in said]
    assert len(tokens(pieces)) == min([*ends, len(spoken)])


def test_what_was_held_back_comes_where_the_answer_ends(speaker, tokenizer):
    params = SamplingParams(temperature=0, max_tokens=6, stop=("state!",))
    pieces = list(speaker([*ids(tokenizer, b"a stat"), 7]).stream([5], params))
    assert (text(pieces), pieces[-1].reason) == ("a stat", "length")


def test_a_stop_string_in_the_last_token_is_a_stop(speaker, tokenizer):
    params = SamplingParams(temperature=0, max_tokens=3, stop=("c",))
    pieces = list(speaker([*ids(tokenizer, b"abc"), 7]).stream([5], params))
    assert (text(pieces), pieces[-1].reason) == ("ab", "stop")


def test_of_several_stop_strings_the_one_that_is_complete_first_counts():
    assert _split_at_stop("xabcdy", ("abcd", "c")) == ("xab", "", True)
    assert _split_at_stop("xabc", ("bc", "abc", "c")) == ("x", "", True)


@given(st.text("abc", max_size=20), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_stopping_does_not_depend_on_the_pieces(said, stops, data):
    """Cut anywhere, the text given out is that of the stop string that is complete first, the longest of several."""
    complete = [(said.find(stop) + len(stop), said.find(stop)) for stop in stops if stop in said]
    expected = said[: min(complete)[1]] if complete else said
    held, out, stopped, rest = "", "", False, said
    while rest and not stopped:
        size = data.draw(st.integers(1, len(rest)))
        ready, held, stopped = _split_at_stop(held + rest[:size], stops)
        out, rest = out + ready, rest[size:]
        assert expected.startswith(out)
    assert (out if stopped else out + held) == expected
    assert stopped == bool(complete)


def test_prompts_that_cannot_be_answered(generator):
    with pytest.raises(UserError, match="the prompt is empty"):
        generator.stream([], GREEDY)
    with pytest.raises(UserError, match="the prompt has 400 tokens; the model has 400 positions, of which"):
        generator.stream([5] * 400, GREEDY)


def test_an_empty_text_is_a_prompt(generator):
    assert len(tokens(generator.stream(generator.encode(""), GREEDY))) == 20


def test_positions_end_an_answer(generator):
    pieces = list(generator.stream([5] * 393, GREEDY))
    assert len(tokens(pieces)) == 7
    assert pieces[-1].reason == "length"


def test_logits_that_are_not_finite_end_it(generator, monkeypatch):
    monkeypatch.setattr(generator.model, "logits", lambda hidden: torch.full((320,), torch.nan))
    with pytest.raises(UserError, match="logits are not finite"):
        list(generator.stream([5], GREEDY))


def test_generation_leaves_no_graph(generator):
    context = Context()
    list(generator.stream([5, 6], GREEDY, context=context))
    assert not context.cache.layers[0].state.requires_grad


def test_context_is_reused_only_if_the_prompt_begins_with_it(generator, computed):
    prompt, context = [5, 6, 7, 8], Context()
    answer = tokens(generator.stream(prompt, GREEDY, context=context))
    assert context.seen == prompt + answer[:-1]
    longer = [*context.seen, 9]
    expected = tokens(generator.stream(longer, GREEDY))
    for then, reused in ((longer, True), ([4, *longer], False), (prompt, False), (longer[:-1], False)):
        now = Context()
        list(generator.stream(prompt, GREEDY, context=now))
        computed.clear()
        got = tokens(generator.stream(then, GREEDY, context=now))
        assert computed[0] == (1 if reused else len(then))
        assert got == tokens(generator.stream(then, GREEDY))
        if reused:
            assert got == expected


class TestConversation:
    def reply(self, conversation, said, **settings):
        return "".join(conversation.reply(said, SamplingParams(max_tokens=12, **settings)))

    def test_each_turn_costs_its_own_tokens(self, generator, computed, tokenizer):
        """Sampled hot, so that the drawn tokens are hardly ever those that the answer's text would be cut into."""
        conversation = Conversation(generator, system="Be short.")
        self.reply(conversation, "Hello", temperature=1.0, seed=1)
        first = encode_chat(
            tokenizer, [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]
        )
        assert computed == [len(first)] + [1] * 11
        computed.clear()
        self.reply(conversation, "And now?", temperature=1.0, seed=2)
        question = encode_chat(tokenizer, [{"role": "user", "content": "And now?"}])
        # What the model has not read yet: its last token, the end of its turn, a line break, and the question.
        assert computed[0] == 1 + 1 + 1 + len(question)

    @pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 4}])
    def test_the_answer_is_that_of_a_cold_start(self, generator, settings):
        warm, cold = Conversation(generator), Conversation(generator)
        for said in ("Hello", "keys?", "values 🎉"):
            cold._context = Context()
            assert self.reply(warm, said, **settings) == self.reply(cold, said, **settings)
        assert warm.messages == cold.messages
        assert [message["role"] for message in warm.messages] == ["user", "assistant"] * 3

    def test_the_ids_are_those_of_the_chat(self, speaker, tokenizer):
        said = tokenizer.encode("keys and values")
        conversation = Conversation(speaker([*said, tokenizer.eos_id]), system="Be short.")
        assert self.reply(conversation, "Hello", temperature=0) == "keys and values"
        assert conversation.messages == [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "keys and values"},
        ]
        assert conversation._ids == encode_chat(tokenizer, conversation.messages, generate=False)

    def test_after_a_stop_string_the_history_is_what_was_given_out(self, speaker, tokenizer):
        conversation = Conversation(speaker([*ids(tokenizer, b"ab!c"), 7]))
        assert self.reply(conversation, "Hello", temperature=0, stop=("!",)) == "ab"
        assert conversation._ids == encode_chat(tokenizer, conversation.messages, generate=False)

    def test_an_answer_that_ends_at_once_is_a_turn(self, speaker, tokenizer):
        conversation = Conversation(speaker([tokenizer.eos_id]))
        assert self.reply(conversation, "Hello", temperature=0) == ""
        assert [message["content"] for message in conversation.messages] == ["Hello", ""]
        assert conversation._ids == encode_chat(tokenizer, conversation.messages, generate=False)

    def test_an_answer_that_is_left_is_kept_as_far_as_it_came(self, generator):
        conversation = Conversation(generator)
        pieces = conversation.reply("Hello", SamplingParams(temperature=0, max_tokens=50))
        said = next(pieces) + next(pieces)
        pieces.close()
        assert conversation.messages[-1] == {"role": "assistant", "content": said}
        cold = Conversation(generator)
        cold._ids = list(conversation._ids)
        assert self.reply(conversation, "go on", temperature=0) == self.reply(cold, "go on", temperature=0)

    def test_an_interruption_inside_the_model_spoils_nothing(self, generator, monkeypatch):
        """Ctrl-C after the first layer has advanced its state and before the second has."""
        conversation = Conversation(generator)
        pieces = conversation.reply("Hello", SamplingParams(temperature=0, max_tokens=50))
        next(pieces)

        def interrupted(*arguments, **options):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(generator.model.layers[1], "forward", interrupted)
            with pytest.raises(KeyboardInterrupt):
                list(pieces)
        cold = Conversation(generator)
        cold._ids = list(conversation._ids)
        seen = []
        real = generator.model.logits
        monkeypatch.setattr(generator.model, "logits", lambda hidden: seen.append(real(hidden)) or seen[-1])
        for talk in (conversation, cold):
            next(talk.reply("go on", GREEDY))
        torch.testing.assert_close(*seen)

    def test_a_conversation_that_is_too_long_is_refused_and_can_go_on(self, generator):
        conversation = Conversation(generator)
        self.reply(conversation, "Hello", temperature=0)
        before = list(conversation.messages)
        with pytest.raises(UserError, match="the model has 400 positions"):
            conversation.reply("x" * 500, GREEDY)
        assert conversation.messages == before
        assert len(self.reply(conversation, "again", temperature=0)) > 0


class TestFindCheckpoint:
    def test_a_checkpoint_is_itself(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "checkpoint").mkdir()
        assert find_checkpoint(tmp_path) == tmp_path

    def test_a_run_has_one_inside(self, tmp_path):
        (tmp_path / "recipe.toml").write_text("")
        (tmp_path / "checkpoint").mkdir()
        assert find_checkpoint(str(tmp_path)) == tmp_path / "checkpoint"

    def test_a_run_that_goes_on_has_none(self, tmp_path):
        (tmp_path / "recipe.toml").write_text("")
        with pytest.raises(UserError, match="is a training run that has not ended: go on with --resume first"):
            find_checkpoint(tmp_path)


def test_load(tmp_path, model, tokenizer, generator):
    save_model(model, tmp_path / "run" / "checkpoint", tokenizer=tokenizer)
    loaded = TextGenerator.load(tmp_path / "run")
    assert loaded.eos_ids == {tokenizer.eos_id}
    assert loaded.generate("keys", GREEDY) == generator.generate("keys", GREEDY)
    narrow = TextGenerator.load(tmp_path / "run", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in narrow.model.parameters()} == {torch.bfloat16}
    assert len(tokens(narrow.stream([5], GREEDY))) == 20


def test_load_of_something_else(tmp_path):
    with pytest.raises(UserError, match=r"there is no config\.json in .*: name the folder of a checkpoint"):
        TextGenerator.load(tmp_path / "nowhere")
