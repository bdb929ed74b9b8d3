"""Files of records: JSON, JSON lines, CSV, parquet, plain text, packed by gzip or not; and folders of `datasets`."""

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from amprune.errors import CalibrationError, reason
from amprune.records import check_readable, read_text
from amprune.running import binary, free_memory

Record = tuple[str, Mapping[str, Any]]
"""Where a record stands, for messages, and its fields."""
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")
_SHARE = 4
"""What a file unpacks to may take this part of the memory that is free."""


def read_file(source: str | os.PathLike[str], option: str) -> list[Record]:
    """Reads the records of a file, or of a folder that `save_to_disk` of the library datasets wrote."""
    path = Path(source).expanduser()
    kinds = ", ".join(SUFFIXES)
    if path.is_dir():
        records = _saved(path)
    elif not path.is_file():
        raise CalibrationError(
            f"no {option.lstrip('-')} set {str(source)!r}: give alpaca, mixed, builtin, self, hub:OWNER/SET or the "
            f"path of a {kinds} file"
        )
    else:
        packed = path.suffix.lower() == ".gz"
        kind = Path(path.stem if packed else path.name).suffix.lower()
        if kind not in SUFFIXES or (packed and kind == ".parquet"):
            raise CalibrationError(f"{path}: unknown type of file; expected one of {kinds}, or .gz behind it")
        if kind == ".parquet":
            records = _parquet(path)
        else:
            text = (
                _unpacked(path) if packed else read_text(path, error=CalibrationError, encoding="utf-8-sig", most=None)
            )
            records = _READERS[kind](text, str(path))
    if not records:
        raise CalibrationError(f"{path} is empty; {option} needs at least one sample")
    return records


def json_lines(text: str, where: str) -> list[Record]:
    """Reads an object a line."""
    records = []
    for place, line in _lines(text):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{where}, {place}: broken JSON ({error.msg}, column {error.colno})") from None
        except (ValueError, RecursionError) as error:  # numbers and depths out of bounds
            raise CalibrationError(f"{where}, {place}: broken JSON ({error})") from None
        records.append((place, _as_record(record, f"{where}, {place}")))
    return records


def _lines(text: str) -> Iterable[tuple[str, str]]:
    """Yields the place and content of each line that is not blank; `str.splitlines` would also cut at form feeds."""
    return ((f"line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _plain(text: str, where: str) -> list[Record]:
    return [(place, {"text": line}) for place, line in _lines(text)]


def _json(text: str, where: str) -> list[Record]:
    try:
        content = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{where}, line {error.lineno}: broken JSON ({error.msg}); is it JSON lines? "
                               "Then name it .jsonl") from None  # fmt: skip
    except (ValueError, RecursionError) as error:  # numbers and depths out of bounds
        raise CalibrationError(f"{where}: broken JSON ({error})") from None
    if not isinstance(content, list):
        raise CalibrationError(
            f"{where} holds a {type(content).__name__}, expected a list of records; if it is JSON lines, name it .jsonl"
        )
    return [(f"record {n}", _as_record(record, f"{where}, record {n}")) for n, record in enumerate(content, 1)]


def _csv(text: str, where: str) -> list[Record]:
    """Reads rows by the names in the first; empty cells are fields that a row lacks."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        found = [(f"row {number}", row) for number, row in enumerate(rows, 1)]
    except csv.Error as error:
        raise CalibrationError(f"{where}, row {rows.line_num}: broken CSV ({error})") from None
    if wide := next((place for place, row in found if None in row), None):
        raise CalibrationError(f"{where}, {wide}: has more cells than the first row has names")
    return [(place, {name: cell for name, cell in row.items() if cell}) for place, row in found]


_READERS: Mapping[str, Callable[[str, str], list[Record]]] = {
    ".txt": _plain, ".json": _json, ".jsonl": json_lines, ".csv": _csv
}  # fmt: skip


def _unpacked(path: Path) -> str:
    """Reads what gzip has packed, as far as memory allows."""
    check_readable(path, error=CalibrationError, most=None)
    most = free_memory("cpu") // _SHARE
    try:
        with gzip.open(path) as file:
            content = file.read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise CalibrationError(f"{path} cannot be read as gzip: {error}") from None
    _check_size(path, len(content), most)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} cannot be read as UTF-8 text: {error}") from None


def _check_size(path: Path, size: int, most: int) -> None:
    if size > most:
        raise CalibrationError(
            f"{path}, {binary(path.stat().st_size)} on disk, unpacks to more than {binary(most)}, a quarter of the "
            "memory that is free; give a smaller file"
        )


def _parquet(path: Path) -> list[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
            # Every value takes room of its own, however often it is stored.
            claimed = sum(max(group.total_byte_size, 8 * group.num_rows * group.num_columns) for group in groups)
            _check_size(path, claimed, free_memory("cpu") // _SHARE)
            rows = file.read().to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise CalibrationError(f"{path} cannot be read as parquet: {error}") from error
    return [(f"row {number}", row) for number, row in enumerate(rows, 1)]


def _saved(path: Path) -> list[Record]:
    import datasets

    try:
        rows: Any = datasets.load_from_disk(str(path))
    except Exception as error:  # what is no such folder fails in many ways
        raise CalibrationError(
            f"{path} is a folder, and none that the library datasets saved ({reason(error)}); give a "
            f"{', '.join(SUFFIXES)} file"
        ) from error
    if isinstance(rows, datasets.DatasetDict):
        if "train" not in rows and len(rows) != 1:
            raise CalibrationError(f"{path} holds the splits {', '.join(rows)}, none of them train; give one's folder")
        rows = rows["train"] if "train" in rows else next(iter(rows.values()))
    return [(f"row {number}", row) for number, row in enumerate(rows, 1)]


def _as_record(record: object, where: str) -> Mapping[str, Any]:
    if not isinstance(record, dict):
        raise CalibrationError(f"{where}: a {type(record).__name__}, expected an object with named fields")
    return record
