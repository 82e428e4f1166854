"""The embedded corpus: what is in it, and dialogues that hold a function's request and its source."""

import ast

import pytest

from fulmen.config import UserError
from fulmen.data import stdlib
from fulmen.data.documents import Document, file_of
from fulmen.data.stdlib import dialogues_in, source_documents

SOURCE = '''"""A module."""

import os


def double(number):
    """Return twice the number that is given.

    More about it.
    """
    result = number * 2
    return result


class Box:
    @property
    def width(self):
        """Tell how wide the whole box is."""
        if self.open:
            return self.sides[0]
        return self.sides[0] + self.lid

    def undocumented(self):
        return [side for side in self.sides if side]

    def terse(self):
        """Short."""
        return [side for side in self.sides if side > 0]

    def only_documented(self):
        """There is nothing to do here at all."""

    def on_one_line(self): "Not laid out like the others."; return self.sides or self.lid or self.open

    def at_the_margin(self):
        """Give a string that reaches the left margin."""
        return """
at the left margin"""


def huge():
    """Give far more than anybody could ever want."""
    return [
''' + "        'something that is far too long for an answer',\n" * 40 + "    ]\n"  # fmt: skip


def test_the_library_is_there_sorted_and_without_what_is_left_out():
    documents = source_documents()
    origins = [document.origin for document in documents]
    assert {"abc.py", "json/decoder.py", "argparse.py"} <= set(origins)
    assert origins == sorted(set(origins))
    assert all(document.text.strip() for document in documents)
    folders = {part for origin in origins for part in origin.split("/")[:-1]}
    assert not folders & {"site-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "turtledemo"}
    assert not any("_sysconfigdata" in origin for origin in origins)


def test_files_are_decoded_like_python_decodes_them_and_others_left_out(tmp_path, monkeypatch):
    (tmp_path / "latin.py").write_bytes("# coding: latin-1\nname = 'é'\n".encode("latin-1"))
    (tmp_path / "broken.py").write_bytes(b"name = '\xff'\n")
    (tmp_path / "empty.py").write_bytes(b"\n")
    (tmp_path / "data.txt").write_text("not Python")
    for folder in ("tests", "site-packages", "config-3.11-linux", "kept"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "module.py").write_text("inside = True\n")
    monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda name: str(tmp_path))
    assert source_documents() == [
        Document("inside = True\n", "kept/module.py"),
        Document("# coding: latin-1\nname = 'é'\n", "latin.py"),
    ]


def test_a_python_without_its_library_source(tmp_path, monkeypatch):
    monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"keeps no library source in .*name files of your own"):
        source_documents()


def test_dialogues_ask_with_the_docstring_and_answer_with_the_source():
    dialogues = dialogues_in(Document(SOURCE, "box.py"))
    pairs = [tuple(message["content"] for message in dialogue.messages) for dialogue in dialogues]
    assert pairs == [
        ("Return twice the number that is given.", "def double(number):\n    result = number * 2\n    return result"),
        (
            "Tell how wide the whole box is.",
            "@property\ndef width(self):\n    if self.open:\n        return self.sides[0]\n"
            "    return self.sides[0] + self.lid",
        ),
    ]
    assert [dialogue.origin for dialogue in dialogues] == ["box.py#1", "box.py#2"]
    assert dialogues[0].text == (
        "<beginning_of_sentence>user name=user\nReturn twice the number that is given.<end_of_sentence>\n"
        "<beginning_of_sentence>ai name=assistant\n"
        "def double(number):\n    result = number * 2\n    return result<end_of_sentence>\n"
    )


def test_a_long_paragraph_gives_its_first_sentence():
    long = "Count the words of the text. " + "Then say more of it. " * 30
    source = f'def count(text):\n    """{long}"""\n    return len(text.split()) + 0\n'
    (dialogue,) = dialogues_in(Document(source, "count.py"))
    assert dialogue.messages[0]["content"] == "Count the words of the text."


def test_what_is_not_python_gives_no_dialogues():
    assert dialogues_in(Document("def broken(:\n", "broken.py")) == []


def test_answers_of_the_library_itself_are_functions():
    documents = [document for document in source_documents() if file_of(document.origin) == "argparse.py"]
    dialogues = [dialogue for document in documents for dialogue in dialogues_in(document)]
    assert dialogues
    for dialogue in dialogues:
        request, answer = (message["content"] for message in dialogue.messages)
        (function,) = ast.parse(answer).body
        assert isinstance(function, ast.FunctionDef)
        assert ast.get_docstring(function) is None
        assert len(answer) <= 1200
        assert len(request) <= 300
