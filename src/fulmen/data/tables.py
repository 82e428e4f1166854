"""Rows of JSONL and Parquet files as documents, through Hugging Face `datasets`: memory-mapped, read when asked for.

`datasets` converts a file once into its own cache (by default the one that it always uses) and again when the file's
modification time changes. Nothing here goes to the network: its builders are called directly, not `load_dataset`, which
reports each call to a counter on the internet unless an environment variable forbids it.
"""

import glob
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from fulmen.config import UserError
from fulmen.data.chat import render_chat
from fulmen.data.documents import Document

MESSAGES = "messages"


class Table:
    """A shelf of documents: the rows with text of one file. All its rows are numbered, from 1; blank lines are none."""

    def __init__(self, dataset: datasets.Dataset, field: str, rows: np.ndarray, name: str, *, conversations: bool):
        self._column = dataset.select_columns([field])
        self._field = field
        self._rows = rows
        self._name = name
        self._conversations = conversations

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Document:
        value = self._column[int(self._rows[row])][self._field]
        origin = self.origin(row)
        return _conversation(value, origin) if self._conversations else Document(value, origin)

    def origin(self, row: int) -> str:
        return f"{self._name}#{self._rows[row] + 1}"


def read_table(path: Path, name: str, text_field: str, cache: Path | None) -> Table | None:
    """The documents of one .jsonl or .parquet file; None for a file without rows.

    name: the first part of the documents' origins. cache: where `datasets` keeps its copy; None is its own place.
    Raises UserError naming file and line (JSONL) or row (Parquet) of what cannot be read.
    """
    dataset = _load(path, cache)
    if dataset is None:
        return None
    field = _choose_field(path, dataset, text_field)
    column = dataset.data.column(field)
    if field == MESSAGES and not (text_field == MESSAGES and _is_text(column)):
        _check_present(path, dataset, field, column)
        return Table(dataset, field, np.arange(len(dataset)), name, conversations=True)
    return Table(dataset, field, _rows_with_text(path, dataset, field, column), name, conversations=False)


def _load(path: Path, cache: Path | None) -> datasets.Dataset | None:
    read = datasets.Dataset.from_parquet
    if path.suffix == ".jsonl":
        read = datasets.Dataset.from_json
        _check_begins_with_object(path)
    try:
        with _quiet():
            return read(glob.escape(str(path)), cache_dir=None if cache is None else str(cache))
    # Each version of the library raises other types here, some of them bare.
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"cannot read {path} through the cache of datasets: {error}") from error
        if _has_no_rows(path):
            return None
        if path.suffix == ".jsonl":
            _raise_first_fault(path, None)
        reason = (str(error.__cause__ or error) or repr(error)).splitlines()[0]
        raise UserError(f"{path} cannot be read as {path.suffix[1:]}: {reason}") from error


def _has_no_rows(path: Path) -> bool:
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            return not any(line.strip() for line in file)
    try:
        return pyarrow.parquet.read_metadata(path).num_rows == 0
    except pyarrow.ArrowException:
        return False


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and log lines of `datasets`, both of which are settings of the whole process."""
    bars = not datasets.are_progress_bars_disabled()
    level = datasets.logging.get_verbosity()
    if bars:
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _choose_field(path: Path, dataset: datasets.Dataset, text_field: str) -> str:
    for field in (text_field, MESSAGES):
        if field in dataset.column_names:
            return field
    fields = ", ".join(dataset.column_names)
    raise UserError(f"{path}, row 1 has no field {text_field!r} nor {MESSAGES!r}: name one of its fields ({fields})")


def _rows_with_text(path: Path, dataset: datasets.Dataset, field: str, column: pyarrow.ChunkedArray) -> np.ndarray:
    """The 0-based numbers of the rows that hold more than white space, [n] int64; every row has proved readable."""
    if not _is_text(column):
        if path.suffix == ".jsonl":
            _raise_first_fault(path, field)
        raise UserError(f"{path}: field {field!r} holds {column.type}, not text: name another field as text_field")
    _check_present(path, dataset, field, column)
    try:
        column.validate(full=True)
    except pyarrow.ArrowInvalid as error:
        if path.suffix == ".jsonl":
            _raise_first_fault(path, field)
        raise UserError(f"{path}: field {field!r} is not UTF-8 ({error}): write the file again") from error
    return np.flatnonzero(pyarrow.compute.match_substring_regex(column, r"\S").to_numpy())


def _is_text(column: pyarrow.ChunkedArray) -> bool:
    return pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)


def _check_present(path: Path, dataset: datasets.Dataset, field: str, column: pyarrow.ChunkedArray) -> None:
    missing = np.flatnonzero(column.is_null().to_numpy())
    if not len(missing):
        return
    if path.suffix == ".jsonl":
        _raise_first_fault(path, field)
    row = dataset[int(missing[0])]
    _raise_missing(f"{path}, row {missing[0] + 1}", field, [key for key, value in row.items() if value is not None])


def _check_begins_with_object(path: Path) -> None:
    # The library would also take one JSON array as the whole file, and then its strings as rows.
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                if not line.lstrip().startswith(b"{"):
                    _check_line(f"{path}, line {number}", line, 0, None)
                return


def _raise_first_fault(path: Path, field: str | None) -> None:
    """Read a JSONL file line by line, raise for the first that is wrong; `field` None leaves the fields unchecked."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                _check_line(f"{path}, line {number}", line, offset, field)
            offset += len(line)


def _check_line(where: str, line: bytes, offset: int, field: str | None) -> None:
    try:
        row = json.loads(line.decode("utf-8"))
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 at byte offset {offset + error.start}: convert the file") from None
    except UnicodeEncodeError as error:
        lone = ascii(error.object[error.start])
        raise UserError(f"{where} holds a lone surrogate {lone}, half a character: mend or remove the line") from None
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}): mend or remove the line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} is not an object with fields: each line must be like {{'text': ...}}")
    if field is None:
        return
    if row.get(field) is None:
        _raise_missing(where, field, [key for key, value in row.items() if value is not None])
    if field != MESSAGES and not isinstance(row[field], str):
        raise UserError(f"{where}: field {field!r} is {row[field]!r}, not a string: quote it")


def _raise_missing(where: str, field: str, fields: list[str]) -> None:
    raise UserError(f"{where} has no field {field!r}: its fields are {', '.join(fields) or 'none'}")


def _conversation(messages: Any, origin: str) -> Document:
    if not isinstance(messages, list):
        raise UserError(f"{origin}: field {MESSAGES!r} is {messages!r}, not a list of messages")
    try:
        return Document(render_chat(messages, generate=False), origin, tuple(messages))
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
