"""Tokens to text: the same however it is cut, nothing of a stop string, each token with its text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fulmen.serve.params import SamplingParams
from fulmen.serve.text import TextStream, first_stop, split_at_stop
from fulmen.serve.types import TokenLogprobs

EOS = 7


def by_byte(tokenizer, *parts):
    """Ids of texts or bytes, one per byte; numbers are ids."""
    byte_ids = {tokenizer.token_bytes(token): token for token in range(256)}
    found = []
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        found += [part] if isinstance(part, int) else [byte_ids[bytes([byte])] for byte in raw]
    return found


def run(tokenizer, tokens, *, end="length", eos=(), **settings):
    """The pieces that have anything in them; the last has a reason."""
    stream = TextStream(tokenizer, SamplingParams(**settings), eos)
    pieces = []
    for token in tokens:
        pieces.append(stream.push(token, TokenLogprobs(token, -float(token))))
        if pieces[-1].reason is not None:
            break
    else:
        pieces.append(stream.finish(end))
    assert [piece.reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert all(piece.text or not piece.tokens for piece in pieces[:-1])
    assert all([one.token for one in piece.logprobs] == list(piece.tokens) for piece in pieces)
    assert pieces[-1].generated_tokens == stream.generated == sum(len(piece.tokens) for piece in pieces)
    return [piece for piece in pieces if piece.text or piece.reason]


def said(pieces):
    return [(piece.text, len(piece.tokens)) for piece in pieces]


def test_a_character_comes_when_its_last_byte_does(tokenizer):
    pieces = run(tokenizer, by_byte(tokenizer, "é🎉日"))
    assert said(pieces) == [("é", 2), ("🎉", 4), ("日", 3), ("", 0)]


def test_a_token_comes_with_the_last_of_its_text(tokenizer):
    """One that ends a character and begins another waits for the second."""

    class Straddling:
        stream = tokenizer.stream
        token_bytes = staticmethod([b"a\xc3", b"\xa9", b"", b"b\xf0\x9f\x8e", b"\x89"].__getitem__)

    Straddling.stream = lambda self: type(tokenizer.stream())(self)
    assert said(run(Straddling(), [0, 2, 1, 3, 4])) == [("a", 0), ("é", 3), ("b", 0), ("🎉", 2), ("", 0)]


def test_what_is_never_finished_becomes_a_mark(tokenizer):
    assert said(run(tokenizer, by_byte(tokenizer, "🎉".encode()[:3]))) == [("\ufffd", 3)]
    assert said(run(tokenizer, by_byte(tokenizer, "a", "🎉".encode()[:2], "b"))) == [("a", 1), ("\ufffdb", 3), ("", 0)]
    pieces = run(tokenizer, by_byte(tokenizer, "a", "🎉".encode()[:3]), stop=("a\ufffd",))
    assert (said(pieces), pieces[-1].reason, pieces[-1].stop) == ([("", 4)], "stop", "a\ufffd")


def test_special_tokens_come_with_the_next_text(tokenizer):
    pieces = run(tokenizer, [tokenizer.bos_id, *by_byte(tokenizer, "ok"), tokenizer.image_id])
    assert said(pieces) == [("o", 2), ("k", 1), ("", 1)]


class TestEnds:
    def test_end_tokens(self, tokenizer):
        (*_, last) = pieces = run(tokenizer, by_byte(tokenizer, "ab", EOS, "c"), eos=(EOS,))
        assert said(pieces) == [("a", 1), ("b", 1), ("", 1)]
        assert (last.reason, last.stop, last.tokens) == ("stop", None, (EOS,))

    def test_ignored_end_tokens_write_what_they_are(self, tokenizer):
        end = tokenizer.eos_id
        pieces = run(tokenizer, by_byte(tokenizer, "a", end, "b"), eos=(end,), ignore_eos=True)
        assert (said(pieces), pieces[-1].reason) == ([("a", 1), ("b", 2), ("", 0)], "length")

    def test_stop_tokens_are_named_and_not_written(self, tokenizer):
        x = by_byte(tokenizer, "x")[0]
        (*_, last) = pieces = run(tokenizer, by_byte(tokenizer, "abxc"), stop_tokens=(x,))
        assert said(pieces) == [("a", 1), ("b", 1), ("", 1)]
        assert (last.reason, last.stop, last.tokens) == ("stop", x, (x,))
        # One that is an end token too was asked for by name.
        assert run(tokenizer, [EOS], eos=(EOS,), stop_tokens=(EOS,))[-1].stop == EOS
        assert run(tokenizer, [EOS], eos=(EOS,), stop_tokens=(EOS,), ignore_eos=True)[-1].reason == "stop"

    def test_held_text_comes_at_the_end_with_its_tokens(self, tokenizer):
        for end in (None, EOS):
            spoken = by_byte(tokenizer, "a stat", *([] if end is None else [end]))
            pieces = run(tokenizer, spoken, eos=(EOS,), stop=("state!",))
            assert said(pieces) == [("a", 1), (" ", 1), ("stat", 4 + (end is not None))]
            assert pieces[-1].reason == ("length" if end is None else "stop")

    def test_held_text_comes_when_it_is_decided(self, tokenizer):
        assert said(run(tokenizer, by_byte(tokenizer, "aENx"), stop=("END",))) == [("a", 1), ("ENx", 3), ("", 0)]
        # A part of it may be decided before the rest.
        assert said(run(tokenizer, by_byte(tokenizer, "aab"), stop=("aac",))) == [("aab", 3), ("", 0)]
        assert said(run(tokenizer, by_byte(tokenizer, "aaa"), stop=("ab",))) == [("a", 1), ("a", 1), ("a", 1)]

    def test_a_stop_string_over_several_tokens(self, tokenizer):
        (*_, last) = pieces = run(tokenizer, by_byte(tokenizer, "one ENDED"), stop=("absent", "END"))
        assert said(pieces) == [("o", 1), ("n", 1), ("e", 1), (" ", 1), ("", 3)]
        assert (last.reason, last.stop) == ("stop", "END")

    def test_other_reasons(self, tokenizer):
        for reason in ("abort", "error", "length"):
            assert run(tokenizer, by_byte(tokenizer, "a"), end=reason)[-1].reason == reason

    def test_a_last_piece_can_begin_with_the_one_before(self, tokenizer):
        first, second = by_byte(tokenizer, "xb")
        stream = TextStream(tokenizer, SamplingParams(stop=("bc",)), ())
        last = stream.finish("length", stream.push(first, TokenLogprobs(first, -1.0)))
        assert (last.text, last.tokens, last.reason, len(last.logprobs)) == ("x", (first,), "length", 1)
        stream = TextStream(tokenizer, SamplingParams(stop=("bc",)), ())
        stream.push(first)
        last = stream.finish("length", stream.push(second))
        assert (last.text, last.tokens, last.logprobs, last.generated_tokens) == ("b", (second,), (), 2)

    def test_nothing_follows_the_end(self, tokenizer):
        stream = TextStream(tokenizer, SamplingParams(), (EOS,))
        assert not stream.is_finished
        stream.push(EOS)
        assert stream.is_finished
        for call in (lambda: stream.push(3), lambda: stream.finish("length")):
            with pytest.raises(AssertionError):
                call()


@given(
    st.lists(st.integers(0, 319), max_size=40), st.lists(st.text("ae nst\ufffd", min_size=1, max_size=3), max_size=3)
)
def test_the_text_is_that_of_all_tokens_at_once(tokenizer, tokens, stops):
    """Up to the stop string, nothing is given out too early, and tokens come as soon as their text is out."""
    whole = b"".join(map(tokenizer.token_bytes, tokens)).decode(errors="replace")
    met = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    expected = whole[: min(met)[1]] if met else whole
    given, out = "", []
    pieces = run(tokenizer, tokens, stop=tuple(stops))
    for piece in pieces:
        given += piece.text
        out += piece.tokens
        assert expected.startswith(given)
        assert out == tokens[: len(out)]
        if piece.reason is None:
            lengths = [
                len(b"".join(map(tokenizer.token_bytes, tokens[:count])).decode(errors="replace"))
                for count in range(len(tokens) + 1)
            ]
            assert lengths[len(out)] <= len(given)
            # The next waits for text of its own, or has not been drawn.
            assert len(out) == piece.generated_tokens or lengths[len(out) + 1] > len(given)
    assert given == expected
    assert pieces[-1].reason == ("stop" if met else "length")
    if not met:
        assert out == tokens


def test_of_several_stop_strings_the_one_that_is_complete_first_counts():
    assert split_at_stop("xabcdy", ("abcd", "c")) == ("xab", "", True)
    assert split_at_stop("xabc", ("bc", "abc", "c")) == ("x", "", True)
    assert first_stop("xabc", ("bc", "abc", "c")) == (1, "abc")
    assert first_stop("xabc", ("d",)) is None


@given(st.text("abc", max_size=20), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_stopping_does_not_depend_on_the_pieces(said, stops, data):
    """Cut anywhere, the text given out is that of the stop string that is complete first, the longest of several."""
    complete = [(said.find(stop) + len(stop), said.find(stop)) for stop in stops if stop in said]
    expected = said[: min(complete)[1]] if complete else said
    held, out, stopped, rest = "", "", False, said
    while rest and not stopped:
        size = data.draw(st.integers(1, len(rest)))
        ready, held, stopped = split_at_stop(held + rest[:size], stops)
        out, rest = out + ready, rest[size:]
        assert expected.startswith(out)
    assert (out if stopped else out + held) == expected
    assert stopped == bool(complete)
