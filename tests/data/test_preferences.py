"""Preference pairs from tables: what is read, and what is refused."""

import json

import pytest

from fulmen.config import UserError
from fulmen.data.chat import images_of
from fulmen.data.documents import PreferencePair
from fulmen.data.preferences import read_preferences

PROMPT = [{"role": "user", "content": "Two and two?"}]


@pytest.fixture
def write(tmp_path):
    def write_rows(*rows):
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write_rows


@pytest.fixture
def read(tmp_path):
    return lambda *sources: read_preferences(sources, cache=tmp_path / "cache")


def test_rows_become_pairs(write, read):
    path = write({"messages": PROMPT, "chosen": "Four.", "rejected": "Five."})
    assert list(read(path)) == [PreferencePair(tuple(PROMPT), "Four.", "Five.", "pairs.jsonl#1")]


def test_a_pair_as_text():
    assert PreferencePair(tuple(PROMPT), "Four.", "Five.").text == (
        "<beginning_of_sentence>user name=user\nTwo and two?<end_of_sentence>\n"
        "<beginning_of_sentence>ai name=assistant\nFour.\nFive."
    )


def test_pairs_about_pictures(write, read, tmp_path):
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who?"}]}]
    pairs = read(write({"messages": asked, "chosen": "a", "rejected": "b", "images": ["a.png"]}))
    assert images_of(pairs[0].messages) == [str(tmp_path / "a.png")]


def test_one_source_may_be_a_bare_string(write, tmp_path):
    path = write({"messages": PROMPT, "chosen": "a", "rejected": "b"})
    assert len(read_preferences(path, cache=tmp_path / "cache")) == 1


def test_built_in_pairs_beside_a_table(write, read):
    pairs = read("charts-preferences", write({"messages": PROMPT, "chosen": "a", "rejected": "b"}))
    assert (pairs[0].origin, pairs[len(pairs) - 1].origin) == ("charts/0#1", "pairs.jsonl#1")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"messages": PROMPT, "chosen": "a"}],
            r"pairs\.jsonl, row 1 has no field 'rejected': its fields are messages",
        ),
        (
            [{"messages": PROMPT, "chosen": "a", "rejected": "b"}, {"messages": PROMPT, "rejected": "b"}],
            r"pairs\.jsonl, line 2 has no field 'chosen': its fields are messages, rejected",
        ),
    ],
)
def test_fields_that_are_missing(write, read, rows, message):
    with pytest.raises(UserError, match=message):
        read(write(*rows))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": PROMPT, "chosen": 4, "rejected": 5}, r"pairs\.jsonl#1: field 'chosen' is 4, not a string"),
        ({"messages": PROMPT, "chosen": "4", "rejected": ["5"]}, r"#1: field 'rejected' is \['5'\], not a string"),
        ({"messages": "2 + 2", "chosen": "4", "rejected": "5"}, r"#1: field 'messages' is '2 \+ 2', not a list"),
        ({"messages": [{"role": "robot"}], "chosen": "4", "rejected": "5"}, r"#1: message 1 has the role 'robot'"),
    ],
)
def test_faulty_rows(write, read, row, message):
    pairs = read(write(row))
    with pytest.raises(UserError, match=message):
        pairs[0]


def test_no_pairs_at_all(tmp_path, write, read):
    with pytest.raises(UserError, match=r"there are no preference pairs in .*pairs\.jsonl"):
        read(write())
    with pytest.raises(UserError, match="there are no preference pairs in no sources at all"):
        read()
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"a\.txt is not a table of preferences: give \.jsonl or \.parquet"):
        read(str(tmp_path / "a.txt"))
