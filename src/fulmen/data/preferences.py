"""Where preference pairs come from: conversations with a better and a worse answer."""

import os
from collections.abc import Sequence
from pathlib import Path

from fulmen.config import UserError
from fulmen.data.documents import Corpus, PreferencePair
from fulmen.data.pictures.shelves import PAIR_FORMS, picture_names, picture_shelves
from fulmen.data.sources import TABLE_SUFFIXES, name_files


def read_preferences(sources: Sequence[str], *, cache: str | os.PathLike | None = None) -> Sequence[PreferencePair]:
    """The pairs of all sources, to be split like documents; rows are read when asked for.

    A source is "emoji-preferences", or the same of digits, words, charts or (all four) pictures, or a path or glob of
    .jsonl and .parquet files whose rows have `messages`, `chosen` and `rejected`.
    cache: where `datasets` keeps what it converts; None is its own place. Raises UserError like `read_documents`.
    """
    sources = [sources] if isinstance(sources, str) else list(sources)
    built_in = {source: picture_shelves(source, PAIR_FORMS) for source in sources}
    shelves = [shelf for found in built_in.values() for shelf in found]
    files = [source for source, found in built_in.items() if not found]
    for path, name in name_files(files, picture_names(PAIR_FORMS)).items():
        if path.suffix not in TABLE_SUFFIXES:
            raise UserError(f"{path} is not a table of preferences: give {' or '.join(TABLE_SUFFIXES)}")
        # Imported only here, because `datasets` takes a second to import.
        from fulmen.data.tables import read_pairs

        shelf = read_pairs(path, name, None if cache is None else Path(cache))
        if shelf is not None:
            shelves.append(shelf)
    corpus = Corpus(shelves)
    if not len(corpus):
        raise UserError(f"there are no preference pairs in {', '.join(sources) or 'no sources at all'}")
    return corpus
