r"""Files of rows → `Table`: text, JSON lines, CSV, parquet.

A text file is lines or paragraphs. It is paragraphs where blank lines stand between blocks of
lines often enough to be meant (at least one line in a hundred, the ends not counted), as in a book
with wrapped lines; a paragraph keeps its line breaks. Else each line that is not blank is a row, as
in a list of SMILES.

Every refusal names the line or row. No file is trusted: only regular files are opened, and no
format read here can hold code.
"""

import csv
import hashlib
import io
import json
import stat
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

from hamcli.data.table import Table
from hamcli.errors import InputRefused, ResourceError

KINDS = {
    ".txt": "text",
    ".smi": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
KNOWN = ".txt, .jsonl, .csv, .tsv, .parquet or a folder of one of them or of images"

_BLANK_LINE_SHARE = 0.01
_MAX_CELL = 2**31 - 1


def read_files(paths: Sequence[Path], name: str) -> Table:
    """All rows of files of one kind, one file after another.

    Args:
        paths: At least one.
        name: What people should read instead of the paths.

    Raises:
        InputRefused: A file is missing, not of a known kind, broken, or without rows.
        ResourceError: A file may not be read.
    """
    kinds = {kind_of(path) for path in paths}
    assert len(kinds) == 1  # folders see to it
    kind = kinds.pop()
    if kind == "parquet":
        return _parquet(paths, name)
    parts = [_READERS[kind](path) for path in paths]
    unit = "paragraphs" if any(part.unit == "paragraphs" for part in parts) else parts[0].unit
    columns = _joined(parts)
    lines = [part.lines for part in parts]
    places = Places([path.name for path in paths], [len(numbers) for numbers in lines])
    digest = hashlib.sha256("".join(part.digest for part in parts).encode()).hexdigest()
    table = Table(name, unit, columns, places.finder(lines), digest, folder=paths[0].parent)
    if len(table) == 0:
        raise _empty(name)
    return table


def kind_of(path: Path) -> str:
    """text, jsonl, csv or parquet, by the name's end.

    Raises:
        InputRefused: None of them.
    """
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        right = "one object a line, named .jsonl" if path.suffix.lower() == ".json" else KNOWN
        raise InputRefused("E451", "data of an unknown kind", path, right=right)
    return kind


def check_regular(path: Path) -> None:
    """Refuse what is missing, or no plain file: a pipe or a device may never end.

    Raises:
        InputRefused: E450 or E451.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputRefused("E450", "no such data", path, right=KNOWN) from error
    except OSError as error:
        raise ResourceError("E545", "cannot read the data", path, str(error.strerror)) from error
    if not stat.S_ISREG(mode):
        raise InputRefused("E451", "data is no regular file", path, right=KNOWN)


def _empty(name: str) -> InputRefused:
    return InputRefused("E452", "data is empty", name, "it has no rows")


class Places:
    """Which file a row of several files is in."""

    def __init__(self, names: Sequence[str], counts: Sequence[int]) -> None:
        self.names = names
        self.begins = [sum(counts[:index]) for index in range(len(counts))]

    def of(self, row: int) -> tuple[int, int]:
        """The file's number and the row inside it."""
        number = bisect_right(self.begins, row) - 1
        return number, row - self.begins[number]

    def finder(self, lines: Sequence[Sequence[int]]) -> Callable[[int], str]:
        """Row to `file:line`, by the line number of each row of each file."""

        def place(row: int) -> str:
            number, inside = self.of(row)
            return f"{self.names[number]}:{lines[number][inside]}"

        return place


# ---- one file of text ----


@dataclass(frozen=True, slots=True)
class _Part:
    unit: str
    columns: dict[str, list[Any]]
    lines: Sequence[int]  # line number of each row, from 1
    digest: str


def _joined(parts: Sequence[_Part]) -> dict[str, list[Any]]:
    """Columns of all parts; a row without one of them holds None."""
    if len(parts) == 1:
        return parts[0].columns
    names = dict.fromkeys(name for part in parts for name in part.columns)
    return {
        name: [
            value for part in parts for value in part.columns.get(name, [None] * len(part.lines))
        ]
        for name in names
    }


def _text_of(path: Path) -> tuple[str, str]:
    """A file's text, checked to be UTF-8 without NUL, and the digest of its bytes."""
    check_regular(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ResourceError("E545", "cannot read the data", path, str(error.strerror)) from error
    digest = hashlib.sha256(raw).hexdigest()
    if (nul := raw.find(b"\0")) >= 0:
        raise InputRefused(
            "E455", "data is not text", f"{path.name}:{_line_at(raw, nul)}", "a NUL byte", "UTF-8"
        )
    try:
        return raw.decode("utf-8-sig"), digest
    except UnicodeDecodeError as error:
        place = f"{path.name}:{_line_at(raw, error.start)}"
        found = f"byte 0x{raw[error.start]:02x}"
        hints = [f"iconv -f ENCODING -t UTF-8 {path.name}"]
        raise InputRefused("E455", "data is not UTF-8", place, found, "UTF-8", hints) from error


def _line_at(raw: bytes, begin: int) -> int:
    return raw.count(b"\n", 0, begin) + 1


def _lines(text: str) -> list[str]:
    """Lines by line feed alone: a form feed or U+2028 inside a text ends nothing."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def _read_text(path: Path) -> _Part:
    text, digest = _text_of(path)
    lines = _lines(text)
    numbers = [number for number, line in enumerate(lines, 1) if line.strip()]
    if not numbers:
        raise _empty(path.name)
    inner = numbers[-1] - numbers[0] + 1
    if (inner - len(numbers)) < _BLANK_LINE_SHARE * inner:
        rows = [lines[number - 1] for number in numbers]
        return _Part("lines", {"text": rows}, array("q", numbers), digest)
    begins = [now for last, now in pairwise([-1, *numbers]) if now != last + 1]
    ends = [last for last, now in pairwise([*numbers, -1]) if now != last + 1]
    blocks = ["\n".join(lines[begin - 1 : end]) for begin, end in zip(begins, ends, strict=True)]
    return _Part("paragraphs", {"text": blocks}, array("q", begins), digest)


def _read_jsonl(path: Path) -> _Part:
    text, digest = _text_of(path)
    rows, numbers = [], array("q")
    for number, line in enumerate(_lines(text), 1):
        if line.strip():
            rows.append(_json_row(path, number, line))
            numbers.append(number)
    if not rows:
        raise _empty(path.name)
    names = dict.fromkeys(name for row in rows for name in row)
    return _Part("rows", {name: [row.get(name) for row in rows] for name in names}, numbers, digest)


def _json_row(path: Path, number: int, line: str) -> dict[str, Any]:
    place = f"{path.name}:{number}"
    right = "one JSON object a line"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        why = f"{error.msg} at column {error.colno}"
        raise InputRefused("E457", "data is not JSON lines", place, why, right) from error
    except (RecursionError, ValueError) as error:
        why = "nested too deep" if isinstance(error, RecursionError) else "a number too long"
        raise InputRefused("E457", "data is not JSON lines", place, why, right) from error
    if not isinstance(row, dict):
        found = f"a {type(row).__name__}"
        raise InputRefused("E457", "data is not JSON lines", place, found, right)
    return row


def _read_csv(path: Path) -> _Part:
    text, digest = _text_of(path)
    # a cell may be a whole document; the default of 128 KiB refuses it
    csv.field_size_limit(_MAX_CELL)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_header(path, header)
        rows, numbers = _csv_rows(path, reader, header)
    except csv.Error as error:
        place = f"{path.name}:{reader.line_num}"
        raise InputRefused("E458", "data is not CSV", place, str(error)) from error
    if not rows:
        raise _empty(path.name)
    return _Part(
        "rows",
        {name: [row[index] for row in rows] for index, name in enumerate(header)},
        numbers,
        digest,
    )


def _check_header(path: Path, header: Sequence[str]) -> None:
    if not header:
        raise _empty(path.name)
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise InputRefused(
            "E458", "data is not CSV", f"{path.name}:1", f"two columns named {twice[0]!r}"
        )


def _csv_rows(
    path: Path, reader: Any, header: Sequence[str]
) -> tuple[list[list[str]], Sequence[int]]:
    rows, numbers = [], array("q")
    for row in reader:
        if not row:
            continue
        if len(row) != len(header):
            raise InputRefused(
                "E458",
                "data is not CSV",
                f"{path.name}:{reader.line_num}",
                f"{len(row)} cells where the header has {len(header)}",
                'cells that hold commas or line breaks stand in "quotes"',
            )
        rows.append(row)
        numbers.append(reader.line_num)
    return rows, numbers


_READERS: dict[str, Callable[[Path], _Part]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
}


# ---- parquet ----


def _parquet(paths: Sequence[Path], name: str) -> Table:
    import pyarrow.parquet as pq

    schemas, counts = [], []
    for path in paths:
        check_regular(path)
        with _broken_parquet(path):
            file = pq.ParquetFile(path)
            schemas.append(file.schema_arrow)
            counts.append(file.metadata.num_rows)
            file.close()
    for path, schema in zip(paths, schemas, strict=True):
        if schema.names != schemas[0].names:
            why = f"its columns are not those of {paths[0].name}"
            raise InputRefused("E459", "parquet files do not fit together", path.name, why)
    if sum(counts) == 0:
        raise _empty(name)
    places = Places([path.name for path in paths], counts)

    def place(row: int) -> str:
        number, inside = places.of(row)
        return f"{paths[number].name}: row {inside}"

    return Table(
        name,
        "rows",
        _ParquetColumns(paths, schemas[0].names),
        place,
        _digest(paths),
        class_names=class_names_of(schemas[0].metadata),
        folder=paths[0].parent,
    )


@contextmanager
def _broken_parquet(path: Path) -> Iterator[None]:
    """Whatever pyarrow raises over a stranger's file, as one refusal."""
    try:
        yield
    except PermissionError as error:
        raise ResourceError("E545", "cannot read the data", path, str(error.strerror)) from error
    except Exception as error:
        why = " ".join(str(error).split())[:120]
        raise InputRefused("E459", "data is not parquet", path.name, why) from error


def _digest(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


class _ParquetColumns(Mapping[str, Sequence[Any]]):
    """Columns read from the files when first asked for."""

    def __init__(self, paths: Sequence[Path], names: Sequence[str]) -> None:
        self.paths, self.names = paths, list(names)
        self.read: dict[str, ArrowColumn] = {}

    def __getitem__(self, name: str) -> Sequence[Any]:
        if name not in self.names:
            raise KeyError(name)
        if name not in self.read:
            self.read[name] = ArrowColumn(self._chunks(name))
        return self.read[name]

    def _chunks(self, name: str) -> list[Any]:
        import pyarrow.parquet as pq

        chunks: list[Any] = []
        for path in self.paths:
            with _broken_parquet(path):
                column = pq.ParquetFile(path).read(columns=[name]).column(name)
                chunks += [chunk for chunk in column.chunks if len(chunk)]
        return chunks

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class ArrowColumn(Sequence[Any]):
    """Chunks of an Arrow column as Python values, made when asked for."""

    def __init__(self, chunks: Sequence[Any]) -> None:
        self.chunks = chunks
        self.begins = [0]
        for chunk in chunks:
            self.begins.append(self.begins[-1] + len(chunk))

    def __len__(self) -> int:
        return self.begins[-1]

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        number = bisect_right(self.begins, index) - 1
        return self.chunks[number][index - self.begins[number]].as_py()

    def __iter__(self) -> Iterator[Any]:
        for chunk in self.chunks:
            yield from chunk.to_pylist()


def class_names_of(metadata: Mapping[bytes, bytes] | None) -> dict[str, tuple[str, ...]]:
    """Names of classes that the `datasets` library left in a schema; empty without them."""
    try:
        told = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        found = {name: _names_in(feature) for name, feature in told.items()}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}
    return {name: names for name, names in found.items() if names}


def _names_in(feature: Any) -> tuple[str, ...]:
    if isinstance(feature, list) and feature:
        return _names_in(feature[0])
    if not isinstance(feature, dict):
        return ()
    names = feature.get("names")
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return tuple(names)
    return _names_in(feature.get("feature"))
