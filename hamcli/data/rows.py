"""A source of data as the user names it -> columns of plain values.

A file (.txt, .jsonl, .csv, .parquet), a folder of such files or of images, or a dataset id through
the `datasets` library. What a row means is not known here.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hamcli.errors import InputRefused, ResourceError

TEXT_KINDS = (".txt", ".jsonl", ".csv", ".parquet")
IMAGE_KINDS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
EVALUATION_NAMES = ("validation", "val", "valid", "test", "eval")
HUB_SECONDS = 4.0


@dataclass(frozen=True, slots=True)
class Table:
    """Columns of equal length, and what to call them in messages.

    Attributes:
        name: The source, as messages and reports show it.
        columns: Column name to values, one a row.
        lines: Line of each row in its file; empty where rows are no lines of one file.
        numbers: Number of each row in its source, from 1; empty where all rows stand in order.
    """

    name: str
    columns: dict[str, Sequence[Any]]
    lines: Sequence[int] = ()
    numbers: Sequence[int] = ()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def row(self, index: int) -> str:
        """A row as messages name it: by its place in the source, of a part of its rows too."""
        if self.lines:
            return f"{self.name}: line {self.lines[index]}"
        return f"{self.name}: row {self.numbers[index] if self.numbers else index + 1}"

    def rows(self, indices: Sequence[int]) -> "Table":
        """Some of the rows, which keep their places in the source."""
        return Table(
            self.name,
            {name: [values[i] for i in indices] for name, values in self.columns.items()},
            [self.lines[i] for i in indices] if self.lines else (),
            [self.numbers[i] if self.numbers else i + 1 for i in indices],
        )


def read_table(source: str, split: str = "train") -> Table:
    """Read a whole source.

    Args:
        source: A path or a dataset id `name[:config][:split]`.
        split: Split of a dataset id that names none, or subfolder of a folder that has it.

    Raises:
        InputRefused: It is missing, empty, of an unknown kind or broken.
    """
    if "://" in source:
        # not repeated: an address may carry a password
        raise InputRefused("E451", "not data", right="a file, a folder or a dataset id, no URL")
    path = Path(source)
    if path.is_dir():
        table = _read_folder(path, split)
    elif path.exists():
        table = _read_file(path)
    elif path.suffix.lower() in (*TEXT_KINDS, *IMAGE_KINDS) or source.startswith((".", "/", "~")):
        raise InputRefused("E451", "no such data", source, "", "a file, a folder or a dataset id")
    else:
        table = _read_hub(source, split)
    if len(table) == 0:
        raise InputRefused("E452", "data is empty", source, "no rows")
    return table


def evaluation_folder(source: str) -> str | None:
    """The subfolder of an image folder or data folder that is held out by its name."""
    path = Path(source)
    if not (path.is_dir() and (path / "train").is_dir()):
        return None
    return next((str(path / name) for name in EVALUATION_NAMES if (path / name).is_dir()), None)


def _read_file(path: Path) -> Table:
    if not path.is_file():  # a FIFO or device would hang
        raise InputRefused("E451", "not a regular file", path)
    kind = path.suffix.lower()
    readers = {
        ".txt": _read_txt,
        ".jsonl": _read_jsonl,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    if kind not in readers:
        raise InputRefused(
            "E453",
            "unknown kind of data",
            path,
            kind or "no suffix",
            "one of " + ", ".join(TEXT_KINDS),
        )
    try:
        return readers[kind](path)
    except PermissionError as error:
        raise ResourceError("E512", "may not read", path, error.strerror or "") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file without their ends."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise InputRefused(
                    "E454",
                    "not UTF-8",
                    f"{path}: line {number}",
                    f"byte {error.start + 1}",
                    "UTF-8",
                ) from None
            if "\x00" in text:
                raise InputRefused("E454", "a NUL byte in text", f"{path}: line {number}")
            yield number, text


def _read_txt(path: Path) -> Table:
    kept = [(number, text) for number, text in _lines(path) if text.strip()]
    lines = [number for number, _ in kept]
    return Table(str(path), {"text": [text for _, text in kept]}, lines)


def _read_jsonl(path: Path) -> Table:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    for number, text in _lines(path):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputRefused(
                "E454", "not JSON", f"{path}: line {number}", str(error), "one JSON object a line"
            ) from None
        if not isinstance(row, dict):
            raise InputRefused("E454", "not a JSON object", f"{path}: line {number}")
        rows.append(row)
        lines.append(number)
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(str(path), {name: [row.get(name) for row in rows] for name in names}, lines)


def _read_csv(path: Path) -> Table:
    reader = csv.reader(text + "\n" for _, text in _lines(path))
    try:
        header = next(reader, [])
        numbered = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise InputRefused(
            "E454", "not CSV", f"{path}: line {reader.line_num}", str(error)
        ) from None
    for line, row in numbered:
        if len(row) != len(header):
            raise InputRefused(
                "E454",
                "a row has another number of fields than the header",
                f"{path}: line {line}",
                f"{len(row)}",
                f"{len(header)}",
            )
    columns: dict[str, Sequence[Any]] = {
        name: [row[i] for _, row in numbered] for i, name in enumerate(header)
    }
    return Table(str(path), columns, [line for line, _ in numbered])


def _read_parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        why = str(error).splitlines()[0]
        raise InputRefused("E454", "not parquet", path, why) from None
    return Table(str(path), {name: table.column(name).to_pylist() for name in table.column_names})


def _read_folder(path: Path, split: str) -> Table:
    if (path / split).is_dir():
        path = path / split
    if any(item.suffix.lower() in IMAGE_KINDS for item in path.rglob("*")):
        return _read_image_folder(path)
    for kind in TEXT_KINDS:
        files = sorted(item for item in path.iterdir() if item.suffix.lower() == kind)
        if files:
            return _joined(str(path), [_read_file(item) for item in files])
    raise InputRefused(
        "E453", "no data in this folder", path, "", "images, or files of " + ", ".join(TEXT_KINDS)
    )


def _joined(name: str, tables: Sequence[Table]) -> Table:
    names = list(tables[0].columns)
    for table in tables:
        if list(table.columns) != names:
            raise InputRefused(
                "E454",
                "files have different columns",
                table.name,
                ", ".join(table.columns),
                ", ".join(names),
            )
    return Table(
        name,
        {
            column: [value for table in tables for value in table.columns[column]]
            for column in names
        },
    )


def _read_image_folder(path: Path) -> Table:
    """Images of a folder; subfolders are labels."""
    root = path.resolve()
    images, labels = [], []
    for item in sorted(path.rglob("*")):
        if item.suffix.lower() in IMAGE_KINDS and item.is_file():
            if not item.resolve().is_relative_to(root):
                raise InputRefused("E451", "a link leads out of the folder", item)
            images.append(str(item))
            labels.append(item.relative_to(path).parts[0] if item.parent != path else None)
    columns: dict[str, Sequence[Any]] = {"image": images}
    if all(label is not None for label in labels):
        columns["label"] = labels
    return Table(str(path), columns)


def _read_hub(source: str, split: str) -> Table:
    name, *rest = source.split(":")
    config = rest[0] if rest and rest[0] else None
    split = rest[1] if len(rest) > 1 else split
    import datasets

    _ask_hub(name)
    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # noqa: BLE001 - the library raises a dozen kinds
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputRefused(
            "E455", "data set cannot be loaded", source, why, "a file, or name[:config][:split]"
        ) from None
    if any(type(feature).__name__ == "Image" for feature in found.features.values()):
        image_names = [n for n, f in found.features.items() if type(f).__name__ == "Image"]
        for image_name in image_names:
            found = found.cast_column(image_name, datasets.Image(decode=False))
    columns: dict[str, Sequence[Any]] = {name: found[name][:] for name in found.column_names}
    for column, feature in found.features.items():
        if type(feature).__name__ == "ClassLabel":
            columns[column] = [feature.int2str(value) for value in columns[column]]
    return Table(source, columns)


def _ask_hub(name: str) -> None:
    """Fail in seconds where there is no network, unless the data set is in the cache."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(name, timeout=HUB_SECONDS)
    except HfHubHTTPError as error:
        raise InputRefused(
            "E455", "no such data set", name, str(error).splitlines()[0], "a file, or a public id"
        ) from None
    except Exception:  # noqa: BLE001 - no network in any of its forms: the cache may have it
        datasets.config.HF_HUB_OFFLINE = True
