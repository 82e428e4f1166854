"""Rows of JSONL and Parquet files as documents, through Hugging Face `datasets`: memory-mapped, read when asked for.

`datasets` converts a file once into its own cache (by default the one that it always uses) and again when the file's
modification time changes. Nothing here goes to the network: its builders are called directly, not `load_dataset`, which
reports each call to a counter on the internet unless an environment variable forbids it.
"""

import glob
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from fulmen.config import UserError
from fulmen.data.conversations import (
    CAPTION,
    IMAGES,
    MESSAGES,
    PREFERENCE,
    captioned,
    conversation,
    preference,
)
from fulmen.data.documents import Document, PreferencePair

IMAGE_FIELDS = (CAPTION[0], IMAGES)


Convert: TypeAlias = Callable[[Mapping[str, Any], str, Path], Document | PreferencePair]


class Table:
    """A shelf of documents: the rows with text of one file. All its rows are numbered, from 1; blank lines are none."""

    def __init__(
        self,
        dataset: datasets.Dataset,
        fields: Sequence[str],
        rows: np.ndarray,
        path: Path,
        name: str,
        convert: Convert,
    ):
        """fields: the columns that `convert` makes a document of, from (row, origin, the folder of `path`)."""
        # Images as they lie in the file: `datasets` decodes those of a Parquet file that says that they are some.
        raw = [field for field in fields if field in IMAGE_FIELDS and path.suffix == ".parquet"]
        self._images = {field: dataset.data.column(field) for field in raw}
        self._columns = dataset.select_columns([field for field in fields if field not in raw])
        self._rows = rows
        self._folder = path.parent
        self._name = name
        self._convert = convert

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Document | PreferencePair:
        number = int(self._rows[row])
        images = {field: column[number].as_py() for field, column in self._images.items()}
        return self._convert(self._columns[number] | images, self.origin(row), self._folder)

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
    fields = _choose_fields(path, dataset, text_field)
    column = dataset.data.column(fields[-1])  # the text's, where there is one
    if fields == [MESSAGES] and not (text_field == MESSAGES and _is_text(column)):
        return _whole(path, dataset, fields, name, conversation)
    if fields == list(CAPTION):
        _check_present(path, dataset, CAPTION[0], dataset.data.column(CAPTION[0]))
        return Table(dataset, fields, _rows_with_text(path, dataset, fields[-1], column), path, name, captioned)

    def convert(row: Mapping[str, Any], origin: str, folder: Path) -> Document:
        return Document(row[fields[0]], origin)

    return Table(dataset, fields, _rows_with_text(path, dataset, fields[-1], column), path, name, convert)


def read_pairs(path: Path, name: str, cache: Path | None) -> Table | None:
    """The preference pairs of one file with `messages`, `chosen` and `rejected`; else like `read_table`."""
    dataset = _load(path, cache)
    if dataset is None:
        return None
    _check_columns(path, dataset, PREFERENCE)
    return _whole(path, dataset, list(PREFERENCE), name, preference)


def _whole(path: Path, dataset: datasets.Dataset, fields: list[str], name: str, convert: Convert) -> Table:
    """All rows, with their `images` if there are any; none may lack one of the fields."""
    for field in fields:
        _check_present(path, dataset, field, dataset.data.column(field))
    found = [*fields, IMAGES] if IMAGES in dataset.column_names else fields
    return Table(dataset, found, np.arange(len(dataset)), path, name, convert)


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


def _choose_fields(path: Path, dataset: datasets.Dataset, text_field: str) -> list[str]:
    """The text's field, else that of the conversations, else those of a captioned picture."""
    for fields in ((text_field,), (MESSAGES,), CAPTION):
        if set(fields) <= set(dataset.column_names):
            return list(fields)
    raise UserError(
        f"{path}, row 1 has no field {text_field!r} nor {MESSAGES!r} nor {' and '.join(map(repr, CAPTION))}: "
        f"name one of its fields ({', '.join(dataset.column_names)})"
    )


def _check_columns(path: Path, dataset: datasets.Dataset, fields: Sequence[str]) -> None:
    for field in fields:
        if field not in dataset.column_names:
            _raise_missing(f"{path}, row 1", field, dataset.column_names)


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
    present = [name for name in dataset.column_names if dataset.data.column(name)[int(missing[0])].is_valid]
    _raise_missing(f"{path}, row {missing[0] + 1}", field, present)


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
