"""Where documents come from, and how some of them are held out."""

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from fulmen.config import UserError
from fulmen.data.documents import (
    Corpus,
    Document,
    Shelf,
    Texts,
    as_corpus,
    check_share,
    choose_held_out,
    file_of,
    spread,
)
from fulmen.data.pictures.shelves import DOCUMENT_FORMS, picture_names, picture_shelves
from fulmen.data.stdlib import dialogue_documents, source_documents

EMBEDDED: dict[str, Callable[[], list[Document]]] = {
    "stdlib": source_documents,
    "stdlib-dialogues": dialogue_documents,
}
TABLE_SUFFIXES = (".jsonl", ".parquet")
# `sample_texts` takes this many bytes from any document, more only where the documents are few.
SAMPLE_BYTES_PER_DOCUMENT = 65536


def read_documents(
    sources: Sequence[str], *, text_field: str = "text", cache: str | os.PathLike | None = None
) -> Corpus:
    """The documents of all sources, in their order; rows of tables are read when asked for, and pictures drawn.

    A source is "stdlib" (the running Python's standard library), "stdlib-dialogues" (conversations made out of it),
    built-in pictures such as "emoji-captions" (docs/data.md), or a path or glob of files: .jsonl and .parquet (rows
    with `text_field`, with a list of `messages`, or with `image` and `caption`), all others UTF-8 text.
    cache: where `datasets` keeps what it converts from tables; None is its own place.
    Raises UserError where nothing matches, a file or row cannot be read, or no document has text.
    """
    sources = [sources] if isinstance(sources, str) else list(sources)
    shelves: list[Shelf] = []
    files = []
    for source in dict.fromkeys(sources):
        if source in EMBEDDED:
            shelves.append(Texts(EMBEDDED[source]()))
        elif pictures := picture_shelves(source, DOCUMENT_FORMS):
            shelves += pictures
        else:
            files.append(source)
    for path, name in name_files(files, [*EMBEDDED, *picture_names(DOCUMENT_FORMS)]).items():
        shelf = _read_file(path, name, text_field, None if cache is None else Path(cache))
        if shelf is not None:
            shelves.append(shelf)
    corpus = Corpus(shelves)
    if not len(corpus):
        raise UserError(f"the corpus is empty: no document with text in {', '.join(sources) or 'no sources at all'}")
    return corpus


def name_files(sources: Sequence[str], built_in: Sequence[str]) -> dict[Path, str]:
    """The files that the paths and globs match, each with its path below the folder that all of them share.

    built_in: the names that could have been meant. Raises UserError where a source matches no file.
    """
    paths = [path for source in sources for path in _match(source, built_in)]
    root = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path()
    return {path: path.relative_to(root).as_posix() for path in paths}


def split(documents: Sequence[Document], held_out: float) -> tuple[Sequence[Document], Sequence[Document]]:
    """(training, held-out) documents. held_out: the share of files to hold out, 0 <= held_out < 1.

    A file is held out or not by a hash of its name, whatever else is there. A single file is split by its rows, a
    single text near its end. With held_out > 0 both sides hold something, or UserError is raised.
    """
    check_share(held_out)
    corpus = as_corpus(documents)
    if held_out == 0:
        return corpus, Corpus([])
    if len(corpus) == 1:
        return _split_text(corpus[0], held_out)
    names = [file_of(corpus.origin(index)) for index in range(len(corpus))]
    if len(set(names)) == 1:
        names = [f"{name}#{index}" for index, name in enumerate(names)]
    chosen = choose_held_out(set(names), held_out)
    mask = np.array([name in chosen for name in names], dtype=bool)
    return corpus.select(np.flatnonzero(~mask)), corpus.select(np.flatnonzero(mask))


def sample_texts(documents: Sequence[Document], max_bytes: int) -> Iterator[str]:
    """Beginnings of documents spread evenly over the corpus, `max_bytes` of UTF-8 at most: enough to train a tokenizer.

    The same documents give the same sample.
    """
    room = max_bytes
    share = max(SAMPLE_BYTES_PER_DOCUMENT, max_bytes // max(1, len(documents)))
    for index in spread(len(documents)):
        if room <= 0:
            return
        sample = documents[int(index)].text[:share].encode("utf-8")[: min(share, room)]
        room -= len(sample)
        yield sample.decode("utf-8", errors="ignore")


def _match(source: str, built_in: Sequence[str]) -> list[Path]:
    exact = Path(source)
    if exact.is_dir():
        raise UserError(f"{source} is a directory: name its files, for example {exact.as_posix()}/**/*.txt")
    found = [exact] if exact.is_file() else [Path(path) for path in sorted(glob.glob(source, recursive=True))]
    # Links are not followed: a download cache links `train.parquet` to a file whose name says nothing.
    paths = [Path(os.path.abspath(path)) for path in found if path.is_file()]
    if not paths:
        raise UserError(f"no file matches {source!r}: give a path, a glob, or one of {', '.join(built_in)}")
    return paths


def _read_file(path: Path, name: str, text_field: str, cache: Path | None) -> Shelf | None:
    """The documents of one file; None if it holds no text."""
    if path.suffix in TABLE_SUFFIXES:
        # Imported only here, because `datasets` takes a second to import and most runs need none of it.
        from fulmen.data.tables import read_table

        return read_table(path, name, text_field, cache)
    try:
        text = path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(
            f"{path} is not UTF-8 at byte offset {error.start} (0x{byte:02x}): convert it, for example with iconv"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return Texts([Document(text, name)]) if text.strip() else None


def _split_text(document: Document, held_out: float) -> tuple[Corpus, Corpus]:
    cut = len(document.text) - max(1, round(len(document.text) * held_out))
    if document.messages is not None or cut < 1:
        raise UserError(
            f"{document.origin} alone is too little to hold {held_out} of it out: add documents or hold out 0"
        )
    head, tail = document.text[:cut], document.text[cut:]
    return Corpus([Texts([Document(head, document.origin)])]), Corpus([Texts([Document(tail, document.origin)])])
