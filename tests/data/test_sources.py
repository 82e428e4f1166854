"""Sources: files and globs, what cannot be read, splitting by file, row and character, sampling."""

import pytest

from fulmen.config import UserError
from fulmen.data.documents import Document, file_of
from fulmen.data.sources import read_documents, sample_texts, split
from fulmen.data.tokenizer import BOS


def test_files_and_globs_keep_their_order_and_are_read_once(tmp_path):
    for name, text in {"b/two.md": "2", "a/one.txt": "1", "a/deep/three.py": "3", "a/empty.txt": " \n"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    documents = read_documents(
        [str(tmp_path / "b" / "two.md"), str(tmp_path / "a" / "**" / "*.*"), str(tmp_path / "b/*")]
    )
    assert list(documents) == [Document("2", "b/two.md"), Document("3", "a/deep/three.py"), Document("1", "a/one.txt")]


def test_one_source_may_be_a_bare_string_and_its_origin_does_not_name_the_folder(tmp_path, monkeypatch):
    (tmp_path / "[odd].txt").write_text("\ufeffGrüße", encoding="utf-8")
    expected = [Document("Grüße", "[odd].txt")]
    assert list(read_documents(str(tmp_path / "[odd].txt"))) == expected
    monkeypatch.chdir(tmp_path)
    assert list(read_documents("[odd].txt")) == expected


def test_a_link_goes_by_its_own_name(tmp_path):
    (tmp_path / "blob").write_text('{"text": "linked"}\n')
    (tmp_path / "train.jsonl").symlink_to(tmp_path / "blob")
    documents = read_documents([str(tmp_path / "*.jsonl")], cache=tmp_path / "cache")
    assert list(documents) == [Document("linked", "train.jsonl#1")]


def test_embedded_sources_share_their_files_names():
    library = read_documents(["stdlib"])
    both = read_documents(["stdlib", "stdlib-dialogues"])
    assert list(both.select(range(len(library)))) == list(library)
    dialogues = both.select(range(len(library), len(both)))
    assert len(dialogues) > 1000
    assert {file_of(dialogue.origin) for dialogue in dialogues} <= {document.origin for document in library}
    assert dialogues[0].text.startswith(f"{BOS}user name=user\n")


def test_no_file_matches(tmp_path):
    with pytest.raises(UserError, match=r"no file matches '.*nothing\*\.txt'.*stdlib, stdlib-dialogues"):
        read_documents([str(tmp_path / "nothing*.txt")])


def test_a_directory_is_no_source(tmp_path):
    with pytest.raises(UserError, match=r"is a directory: name its files, for example .*/\*\*/\*\.txt"):
        read_documents([str(tmp_path)])


def test_a_text_that_is_not_utf8_is_named_with_the_offset(tmp_path):
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8 at byte offset 2 \(0xfc\)"):
        read_documents([str(tmp_path / "*.txt")])


def test_a_file_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "locked.txt").write_text("secret")
    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(UserError, match=r"cannot read .*locked\.txt: Permission denied"):
        read_documents([str(tmp_path / "locked.txt")])


@pytest.mark.parametrize("name", ["blank.txt", "blank.jsonl"])
def test_an_empty_corpus(tmp_path, name):
    (tmp_path / name).write_text("\n \n")
    with pytest.raises(UserError, match=rf"the corpus is empty: no document with text in .*{name}"):
        read_documents([str(tmp_path / name)], cache=tmp_path)


def test_no_sources_at_all():
    with pytest.raises(UserError, match=r"the corpus is empty: .* no sources at all"):
        read_documents([])


def _documents(files: int, rows: int) -> list[Document]:
    return [Document(f"{file} {row}", f"file{file}#{row + 1}") for file in range(files) for row in range(rows)]


def test_split_is_by_file_stable_and_near_the_share():
    documents = _documents(files=400, rows=2)
    training, held_out = split(documents, 0.2)
    assert sorted([*training, *held_out], key=documents.index) == documents
    held_files = {file_of(document.origin) for document in held_out}
    assert not held_files & {file_of(document.origin) for document in training}
    assert 40 <= len(held_files) <= 120
    # What a file's fate is does not depend on its rows, on the order or on the other files.
    fewer = [document for document in reversed(documents) if document.origin.endswith("#1")][:200]
    _, held_again = split(fewer, 0.2)
    assert {file_of(document.origin) for document in held_again} <= held_files


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_split_leaves_no_side_empty(share):
    for documents in (_documents(files=2, rows=1), _documents(files=1, rows=2)):
        training, held_out = split(documents, share)
        assert len(training) == len(held_out) == 1


def test_one_file_is_split_by_row_even_if_its_rows_share_an_origin():
    for documents in (_documents(files=1, rows=300), [Document(f"{row}", "notes") for row in range(300)]):
        training, held_out = split(documents, 0.3)
        assert len(training) + len(held_out) == 300
        assert 50 <= len(held_out) <= 130
        assert not {document.text for document in training} & {document.text for document in held_out}


def test_one_text_is_split_near_its_end():
    training, held_out = split([Document("0123456789", "one.txt")], 0.3)
    assert (training[0].text, held_out[0].text) == ("0123456", "789")
    assert len(training) == len(held_out) == 1


def test_nothing_is_held_out_of_a_share_of_zero():
    documents = _documents(files=3, rows=1)
    training, held_out = split(documents, 0)
    assert list(training) == documents
    assert len(held_out) == 0


@pytest.mark.parametrize(
    "document", [Document("x", "one.txt"), Document("long enough", "chat#1", ({"role": "user", "content": "hi"},))]
)
def test_too_little_to_split(document):
    with pytest.raises(UserError, match=r"alone is too little to hold 0\.5 of it out"):
        split([document], 0.5)


@pytest.mark.parametrize("share", [-0.1, 1, 2.5])
def test_a_share_outside_zero_to_one(share):
    with pytest.raises(UserError, match=f"held_out = {share} .*0 <= held_out < 1"):
        split(_documents(2, 2), share)


def test_a_sample_is_the_same_each_time_bounded_and_spread():
    documents = [Document(f"{number:05d}é" * 100, f"{number}") for number in range(200)]
    sample = list(sample_texts(documents, 10_000))
    assert sample == list(sample_texts(documents, 10_000))
    assert 9_990 <= sum(len(text.encode()) for text in sample) <= 10_000
    numbers = sorted(int(text[:5]) for text in sample)
    assert numbers[0] < 50
    assert numbers[-1] > 150


def test_a_sample_takes_no_more_than_a_share_of_a_long_document_but_all_of_a_lone_one():
    long = Document("x" * 200_000, "long")
    assert [len(text) for text in sample_texts([long] * 10, 10**6)] == [100_000] * 10
    assert [len(text) for text in sample_texts([long] * 40, 10**6)] == [65536] * 15 + [10**6 - 15 * 65536]
    assert [len(text) for text in sample_texts([long], 10**6)] == [200_000]
