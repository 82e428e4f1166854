"""JSONL and Parquet through `datasets`: what is read, lazily, without network or noise, and what is refused."""

import io
import json
import os
import socket

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from fulmen.config import UserError
from fulmen.data.chat import images_of
from fulmen.data.documents import Document
from fulmen.data.image_files import open_image
from fulmen.data.sources import read_documents


@pytest.fixture
def read(tmp_path):
    def read_source(source, **settings):
        return read_documents([str(source)], cache=tmp_path / "cache", **settings)

    return read_source


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def png(colour="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), colour).save(buffer, "PNG")
    return buffer.getvalue()


def asked(*parts):
    """A question as `messages`; None is an image part without an image."""
    made = [
        {"type": "text", "text": part[1:]} if part and part[0] == "=" else {"type": "image", "image": part}
        for part in parts
    ]
    return [{"role": "user", "content": made}, {"role": "assistant", "content": "yes"}]


def test_rows_become_documents_and_blank_ones_none(tmp_path, read):
    jsonl = write_jsonl(tmp_path / "a.jsonl", [{"text": "Grüße"}, {"text": " \n"}, {"text": "three", "more": 1}])
    assert list(read(jsonl)) == [Document("Grüße", "a.jsonl#1"), Document("three", "a.jsonl#3")]
    parquet = write_parquet(tmp_path / "[b].parquet", text=["one", "", "three"], number=[1, 2, 3])
    assert list(read(parquet)) == [Document("one", "[b].parquet#1"), Document("three", "[b].parquet#3")]


def test_another_field_can_hold_the_text(tmp_path, read):
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": "yes", "text": "no"}])
    assert [document.text for document in read(path, text_field="body")] == ["yes"]


def test_a_field_called_messages_may_hold_plain_text(tmp_path, read):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": "just text"}])
    assert list(read(path, text_field="messages")) == [Document("just text", "a.jsonl#1")]


def test_messages_are_rendered_and_kept(tmp_path, read):
    rows = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
        {"messages": [{"role": "user", "content": "bye"}]},
    ]
    documents = read(write_jsonl(tmp_path / "chat.jsonl", rows))
    assert [document.origin for document in documents] == ["chat.jsonl#1", "chat.jsonl#2"]
    assert documents[1].text == "<beginning_of_sentence>user name=user\nbye<end_of_sentence>\n"
    assert [message["content"] for message in documents[0].messages] == ["hi", "hello"]


def test_images_of_conversations_lie_beside_their_table(tmp_path, read):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("in/a.png", "in/deep/b.png", "c.png"):
        (tmp_path / name).write_bytes(png())
    rows = [
        {"messages": asked("a.png", "=like", "deep/b.png")},
        {"messages": asked(str(tmp_path / "c.png"), "../c.png")},
        {"messages": [{"role": "user", "content": "no image"}]},
    ]
    documents = read(write_jsonl(tmp_path / "in" / "chat.jsonl", rows))
    assert documents[0].text.startswith("<beginning_of_sentence>user name=user\n<image>like<image><end_of")
    sources = [images_of(document.messages) for document in documents]
    assert sources[0] == [str(tmp_path / "in/a.png"), str(tmp_path / "in/deep/b.png")]
    assert [len(images) for images in sources] == [2, 2, 0]
    assert all(open_image(source).size == (3, 2) for images in sources for source in images)


def test_a_column_of_images_fills_the_parts_without_one(tmp_path, read):
    (tmp_path / "a.png").write_bytes(png())
    rows = [{"messages": asked(None, "=and", "b.png", None), "images": ["a.png", {"path": "c.png"}]}]
    (document,) = read(write_jsonl(tmp_path / "a.jsonl", rows))
    assert images_of(document.messages) == [str(tmp_path / name) for name in ("a.png", "b.png", "c.png")]


@pytest.mark.parametrize("kind", ["bytes", "structs", "structs that datasets knows"])
def test_bytes_of_images_in_parquet(tmp_path, read, kind):
    image = {"bytes": png(), "path": "not/there.png"} if "structs" in kind else png()
    messages = [asked("=which", None)[0]]
    path = write_parquet(tmp_path / "a.parquet", messages=[messages, messages], images=[[image], [image]])
    if "knows" in kind:
        table = pyarrow.parquet.read_table(path)
        features = datasets.Dataset(table).features | {"images": datasets.List(datasets.Image())}
        schema = datasets.Features(features).arrow_schema
        pyarrow.parquet.write_table(table.replace_schema_metadata(schema.metadata), path)
    document = read(path)[1]
    assert images_of(document.messages) == [png()]
    assert document.text == "<beginning_of_sentence>user name=user\nwhich<image><end_of_sentence>\n"


@pytest.mark.parametrize("kind", ["paths", "bytes", "structs"])
def test_captioned_pictures(tmp_path, read, kind):
    (tmp_path / "a.png").write_bytes(png())
    if kind == "paths":
        path = write_jsonl(
            tmp_path / "a.jsonl", [{"image": "a.png", "caption": "Red."}, {"image": "b", "caption": " "}]
        )
    else:
        image = png() if kind == "bytes" else {"bytes": png(), "path": None}
        path = write_parquet(tmp_path / "a.parquet", image=[image, image], caption=["Red.", ""])
    (document,) = read(path)
    assert document.origin == f"{path.name}#1"
    assert document.text == (
        "<beginning_of_sentence>user name=user\n<image>Describe the picture.<end_of_sentence>\n"
        "<beginning_of_sentence>ai name=assistant\nRed.<end_of_sentence>\n"
    )
    assert [open_image(source).size for source in images_of(document.messages)] == [(3, 2)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": asked(None)}, r"a\.jsonl#1 has an image that is None: give a path or the bytes of a file"),
        ({"messages": asked("")}, r"a\.jsonl#1 has an image that is ''"),
        ({"messages": asked("http://host/a.png")}, r"#1 has an image at http://host/a\.png: no address is fetched"),
        ({"messages": asked("file:///a.png")}, r"#1 has an image at file:///a\.png: no address is fetched"),
        ({"messages": asked("a", None), "images": []}, r"a\.jsonl#1 has an image that is None"),
        ({"messages": asked("a"), "images": ["b", "c"]}, r"#1: 2 of the 'images' belong to no image part"),
        ({"messages": asked(None), "images": [3]}, r"a\.jsonl#1 has an image that is 3"),
    ],
)
def test_faulty_images_name_their_row(tmp_path, read, row, message):
    documents = read(write_jsonl(tmp_path / "a.jsonl", [row]))
    with pytest.raises(UserError, match=message):
        documents[0]


def test_a_picture_without_a_caption_and_a_caption_without_a_picture(tmp_path, read):
    rows = [{"image": "a.png", "caption": "a"}, {"image": "b.png"}]
    with pytest.raises(UserError, match=r"a\.jsonl, line 2 has no field 'caption': its fields are image"):
        read(write_jsonl(tmp_path / "a.jsonl", rows))
    with pytest.raises(UserError, match=r"b\.parquet, row 2 has no field 'image': its fields are caption"):
        read(write_parquet(tmp_path / "b.parquet", image=[b"a", None], caption=["a", "b"]))


def test_a_changed_file_is_read_again(tmp_path, read):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "old"}])
    assert read(path)[0].text == "old"
    write_jsonl(path, [{"text": "new"}])
    os.utime(path, (1, 1))
    assert read(path)[0].text == "new"


def test_the_rows_stay_on_disk(tmp_path, read):
    read(write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * 100}] * 50))
    assert list((tmp_path / "cache").rglob("*.arrow"))


def test_reading_needs_no_network_and_makes_no_noise(tmp_path, read, monkeypatch, capfd):
    def refuse(*args, **kwargs):
        raise AssertionError("went to the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    datasets.enable_progress_bars()
    level = datasets.logging.INFO
    datasets.logging.set_verbosity(level)
    read(write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}]))
    read(write_parquet(tmp_path / "b.parquet", text=["one"]))
    with pytest.raises(UserError):
        read(write_jsonl(tmp_path / "c.jsonl", [{"text": 3}]))
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()
    assert datasets.logging.get_verbosity() == level
    datasets.logging.set_verbosity_warning()


def test_empty_tables_give_nothing_beside_others(tmp_path, read):
    (tmp_path / "a.jsonl").write_text("\n")
    write_parquet(tmp_path / "b.parquet", text=pyarrow.array([], pyarrow.string()))
    write_jsonl(tmp_path / "c.jsonl", [{"text": "here"}])
    assert [document.origin for document in read(tmp_path / "*.*")] == ["c.jsonl#1"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"text": "a"}\n\n{"text": \n', r"bad\.jsonl, line 3 is not JSON \(.*\): mend or remove the line"),
        ('["a", "b"]\n', r"bad\.jsonl, line 1 is not an object with fields"),
        ('{"text": "a"}\n{"body": "b", "id": 1}\n', r"bad\.jsonl, line 2 has no field 'text': its fields are body, id"),
        ('{"body": "a", "id": 1}\n', r"bad\.jsonl, row 1 has no field 'text' nor 'messages'.*\(body, id\)"),
        ('{"text": "a"}\n{"text": 3}\n', r"bad\.jsonl, line 2: field 'text' is 3, not a string"),
        ('{"text": 3}\n', r"bad\.jsonl, line 1: field 'text' is 3, not a string"),
        ('{"text": "2020-01-01"}\n{"text": "2021-01-01"}\n', r"bad\.jsonl: field 'text' holds timestamp.*, not text"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n{"id": 1}\n', r"line 2 has no field 'messages': .* id"),
    ],
)
def test_faults_of_jsonl_are_named_with_their_line(tmp_path, read, lines, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(lines)
    with pytest.raises(UserError, match=message):
        read(path)


def test_bytes_of_jsonl_that_are_not_utf8_are_named_with_line_and_offset(tmp_path, read):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2 is not UTF-8 at byte offset 24"):
        read(path)


def test_a_lone_surrogate_in_jsonl_is_named_with_its_line(tmp_path, read):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a"}\n{"text": "ab\\ud800"}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2 holds a lone surrogate '\\ud800'"):
        read(path)


def test_faults_of_parquet(tmp_path, read):
    with pytest.raises(UserError, match=r"a\.parquet, row 2 has no field 'text': its fields are id"):
        read(write_parquet(tmp_path / "a.parquet", text=["a", None], id=[1, 2]))
    with pytest.raises(UserError, match=r"b\.parquet: field 'text' holds int64, not text"):
        read(write_parquet(tmp_path / "b.parquet", text=[1, 2]))
    buffers = pyarrow.array([b"\xff\xfe"], pyarrow.binary()).buffers()
    write_parquet(tmp_path / "c.parquet", text=pyarrow.StringArray.from_buffers(1, *buffers[1:]))
    with pytest.raises(UserError, match=r"c\.parquet: field 'text' is not UTF-8"):
        read(tmp_path / "c.parquet")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 this is not a table")
    with pytest.raises(UserError, match=r"d\.parquet cannot be read as parquet: "):
        read(tmp_path / "d.parquet")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "robot", "content": "a"}], r"chat\.jsonl#1: message 1 has the role 'robot'"),
        ("user: hi", r"chat\.jsonl#1: field 'messages' is 'user: hi', not a list of messages"),
    ],
)
def test_a_faulty_conversation_names_its_row(tmp_path, read, messages, message):
    documents = read(write_jsonl(tmp_path / "chat.jsonl", [{"messages": messages}]))
    with pytest.raises(UserError, match=message):
        documents[0]


def test_a_cache_that_cannot_be_written(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot read .*a\.jsonl through the cache of datasets"):
        read_documents([str(path)], cache=tmp_path / "file")
