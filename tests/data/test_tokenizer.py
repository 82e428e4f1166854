"""The tokenizer: training, special tokens, bytes, streaming, files, and agreement with `transformers`."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from fulmen.config import UserError
from fulmen.data import tokenizer as module
from fulmen.data.tokenizer import BOS, EOS, IMAGE, SPECIAL_TOKENS, Tokenizer

CODE = "def f(x):\n        return x_1 + 12345  # Grüße 🎉\n\n\tpass \n"
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def other_family() -> tokenizers.Tokenizer:
    """A byte-level BPE with its own special token at the front, an ordinary added one, and a gap in the ids."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the quick brown fox"] * 3, trainer)
    backend.add_tokens(["<function_call>"])
    return backend


def test_training_reaches_exactly_the_size_with_special_tokens_last(tokenizer):
    assert tokenizer.vocab_size == 320
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.image_id) == (317, 318, 319)
    assert max(tokenizer.encode(CODE + "".join(SPECIAL_TOKENS))) < 317


def test_training_twice_gives_the_same_tokenizer(tokenizer):
    texts = [CODE * 3, "hello world, hello code"]
    first, second = Tokenizer.train(texts, 280), Tokenizer.train(iter(texts), 280)
    assert first.fingerprint == second.fingerprint
    assert first.encode(CODE) == second.encode(CODE)
    assert first.fingerprint != tokenizer.fingerprint


def test_training_spends_no_merges_on_the_marks_of_chats():
    trained = Tokenizer.train([f"{BOS}user name=user\nadd numbers{EOS}\n"] * 20, 275)
    assert trained.decode(trained.encode("numbers")) == "numbers"
    assert len(trained.encode(" numbers")) == 1
    assert len(trained.encode("sentence")) == len("sentence")


def test_a_vocabulary_too_small_for_the_bytes():
    with pytest.raises(UserError, match=r"vocab_size = 258 has no room .*>= 259"):
        Tokenizer.train(["text"], 258)
    assert Tokenizer.train(["text"], 259).vocab_size == 259


def test_a_corpus_too_small_for_the_vocabulary_says_what_was_reached():
    with pytest.raises(UserError, match=r"too small for vocab_size = 1000: its merges end at (\d+); ") as caught:
        Tokenizer.train(["abab"], 1000)
    reached = int(re.search(r"end at (\d+)", str(caught.value))[1])
    assert Tokenizer.train(["abab"], reached).vocab_size == reached


@settings(deadline=None)
@given(text=TEXT)
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())


def test_pieces_suit_code(tokenizer):
    def cut(text):
        pieces = tokenizer._parsing.pre_tokenizer.pre_tokenize_str(text)
        return [text[start:end] for _, (start, end) in pieces]

    assert cut("        return x") == ["       ", " return", " x"]
    assert cut("12345.67") == ["123", "45", ".", "67"]
    assert cut("a_long.name(x) == y\n\n    z") == ["a", "_long", ".name", "(x", ")", " ==", " y", "\n\n", "   ", " z"]
    assert cut("x  \ny") == ["x", "  ", "\n", "y"]


def test_special_strings_in_text_are_text_unless_asked_for(tokenizer):
    text = f"a{EOS}b{IMAGE}"
    plain = tokenizer.encode(text)
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.image_id} & set(plain)
    assert tokenizer.decode(plain) == text
    marked = tokenizer.encode(text, special=True)
    assert marked == [*tokenizer.encode("a"), tokenizer.eos_id, *tokenizer.encode("b"), tokenizer.image_id]
    assert tokenizer.decode(marked) == "ab"
    assert tokenizer.decode(marked, skip_special=False) == text
    assert tokenizer.encode_batch([text, "a"], special=True) == [marked, tokenizer.encode("a")]
    assert tokenizer.encode_batch([text, "a"]) == [plain, tokenizer.encode("a")]


def test_threads_do_not_disturb_each_other(tokenizer):
    text = f"{EOS} code " * 50
    expected = {flag: tokenizer.encode(text, special=flag) for flag in (False, True)}
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda turn: tokenizer.encode(text, special=bool(turn % 2)), range(200)))
    assert all(result == expected[bool(turn % 2)] for turn, result in enumerate(results))


def test_a_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"lone surrogate \('\\ud83d'\) at character 2"):
        tokenizer.encode("ab\ud83d")


def test_byte_lengths_leave_special_tokens_out(tokenizer):
    lengths = tokenizer.byte_lengths()
    assert lengths.dtype == torch.int64
    assert lengths.shape == (320,)
    assert lengths[-3:].tolist() == [0, 0, 0]
    assert (lengths[:256] == 1).all()
    assert (lengths[256:-3] > 1).all()


def test_ids_beyond_the_vocabulary_of_a_padded_model_write_nothing(tokenizer):
    assert tokenizer.token_bytes(5000) == b""
    assert tokenizer.stream().push(5000) == ""


def test_a_stream_never_shows_half_a_character(tokenizer):
    stream = tokenizer.stream()
    shown = [stream.push(token_id) for token_id in tokenizer.encode("日本 🎉é")]
    assert "".join(shown) == "日本 🎉é"
    assert "\ufffd" not in "".join(shown)
    assert "" in shown
    assert stream.flush() == ""


def test_a_stream_gives_the_rest_at_its_end_and_starts_anew(tokenizer):
    stream = tokenizer.stream()
    byte_ids = [i for byte in "🎉".encode() for i in range(256) if tokenizer.token_bytes(i) == bytes([byte])]
    assert [stream.push(token_id) for token_id in byte_ids[:3]] == ["", "", ""]
    assert stream.flush() == "\ufffd"
    assert "".join(map(stream.push, byte_ids)) == "🎉"


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 319)))
def test_a_stream_and_decode_agree_on_any_ids(tokenizer, ids):
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)


def test_saving_and_loading(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    for loaded in (Tokenizer.load(folder), Tokenizer.load(str(folder / "tokenizer.json"))):
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode(CODE) == tokenizer.encode(CODE)
        assert loaded.eos_id == tokenizer.eos_id
        assert torch.equal(loaded.byte_lengths(), tokenizer.byte_lengths())


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_file_and_no_rubbish(tokenizer, other_family, tmp_path, monkeypatch, step):
    tokenizer.save(tmp_path)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, step, full)
    with pytest.raises(UserError, match=r"cannot write .*tokenizer\.json: No space left on device"):
        Tokenizer(other_family).save(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["", "tokenizer.json"])
def test_a_missing_tokenizer_is_named(tmp_path, name):
    with pytest.raises(UserError, match=r"there is no tokenizer at .*tokenizer\.json"):
        Tokenizer.load(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"version": "1.0", "model":', b"\xff\xfe"])
def test_a_broken_tokenizer_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json is not a readable tokenizer \("):
        Tokenizer.load(tmp_path)


def test_other_kinds_of_tokenizers_are_refused(tmp_path):
    not_byte_level = models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")])
    for model in (not_byte_level, models.WordLevel({"a": 0}, unk_token="a")):
        tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(UserError, match=r"tokenizer\.json: the tokenizer is not byte-level BPE"):
            Tokenizer.load(tmp_path)


def test_a_tokenizer_of_another_family(other_family, tmp_path):
    other_family.save(str(tmp_path / "released.json"))
    loaded = Tokenizer.load(tmp_path / "released.json")
    assert (loaded.bos_id, loaded.eos_id, loaded.image_id) == (None, None, None)
    text = "the quick <function_call>brown 🎉"
    ids = loaded.encode(text)
    assert loaded.vocab_size - 1 in ids
    assert b"".join(map(loaded.token_bytes, ids)) == text.encode()
    assert loaded.token_bytes(other_family.token_to_id("<|endoftext|>")) == b""
    loaded.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert not {"bos_token", "eos_token", "chat_template"} & set(config)


@pytest.fixture(scope="module")
def theirs(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tokenizer.save(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "minimax"}))
    return transformers.AutoTokenizer.from_pretrained(folder)


@settings(max_examples=50, deadline=None)
@given(text=st.lists(TEXT | st.sampled_from([*SPECIAL_TOKENS, CODE, " ,", " 's", "\n "])).map("".join))
def test_transformers_agrees(tokenizer, theirs, text):
    ids = tokenizer.encode(text, special=True)
    assert theirs.encode(text) == ids
    assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
    assert theirs.decode(ids) == tokenizer.decode(ids, skip_special=False) == text


def test_transformers_knows_the_special_tokens(tokenizer, theirs):
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert len(theirs) == tokenizer.vocab_size
    # Older versions would join ` ,` to `,` when they decode unless told not to.
    assert theirs.clean_up_tokenization_spaces is False
