"""Entries of data files: all at once, or one by one with an index of where they are."""

from __future__ import annotations

import hashlib
import json
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

KEPT = 4  # row groups that are kept of a streamed parquet file


def read(path: Path, split: str, streaming: bool = False) -> tuple[Sequence[Any], str]:
    """Entries of a file or folder, and the SHA-256 of what they are in.

    Args:
        path: a JSON list, JSON Lines or parquet file, a folder of parquet files, or one that
            `datasets` has saved.
        split: "train" or "dev", where a folder has several.
        streaming: index JSON Lines and parquet, and read an entry when it is asked for. Folders
            that `datasets` has saved are mapped into memory in either case.

    Returns:
        The entries; one that is no JSON is the ValueError that says so.

    Raises:
        OSError, ValueError: it cannot be read, or holds no list.
    """
    if path.is_dir() or path.suffix == ".parquet":
        return _arrow(path, split, streaming)
    if path.suffix == ".jsonl":
        lines = Lines(path)
        return (lines if streaming else list(lines)), lines.sha256
    raw = path.read_bytes()
    entries = json.loads(raw.decode("utf-8"))
    if not isinstance(entries, list):
        raise ValueError("it holds no list")
    return entries, hashlib.sha256(raw).hexdigest()


def parse(line: bytes) -> Any:
    """The value of one line, or the error: one torn line is one bad entry."""
    try:
        return json.loads(line.decode("utf-8"))
    except ValueError as error:
        return error


class Lines(Sequence[Any]):
    """Entries of a JSON Lines file by the places of its lines, each parsed when it is asked for.

    Attributes:
        sha256: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._places, place = path, array("q"), 0
        digest = hashlib.sha256()
        with path.open("rb") as handle:
            for line in handle:
                digest.update(line)
                if line.strip():
                    self._places.append(place)
                place += len(line)
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Any]:
        with self._path.open("rb") as handle:
            for line in handle:
                if line.strip():
                    yield parse(line)

    def __getitem__(self, index: int) -> Any:
        # Opened anew each time: the workers of a loader would share a place in an open file.
        with self._path.open("rb") as handle:
            handle.seek(self._places[index])
            return parse(handle.readline())


class Rows(Sequence[dict[str, Any]]):
    """Rows of an Arrow table or data set as dictionaries, read when asked; pictures as bytes."""

    def __init__(self, table: Any, take: Callable[[int], Any]) -> None:
        self._table, self._take = table, take

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= len(self):
            raise IndexError(index)
        return self._take(index).to_pylist()[0]


class Groups(Sequence[dict[str, Any]]):
    """Rows of parquet files; a row is read with its row group, of which the last few are kept."""

    def __init__(self, files: Sequence[Path]) -> None:
        import pyarrow.parquet

        self._groups: list[tuple[Path, int]] = []
        self._ends: list[int] = []  # rows up to and with each group
        self._kept: dict[int, Any] = {}
        for file in files:
            about = pyarrow.parquet.read_metadata(file)
            for number in range(about.num_row_groups):
                self._groups.append((file, number))
                self._ends.append(len(self) + about.row_group(number).num_rows)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= len(self):
            raise IndexError(index)
        number = bisect_right(self._ends, index)
        start = self._ends[number - 1] if number else 0
        return self._group(number).slice(index - start, 1).to_pylist()[0]

    def _group(self, number: int) -> Any:
        import pyarrow.parquet

        if number not in self._kept:
            if len(self._kept) == KEPT:
                del self._kept[next(iter(self._kept))]
            path, group = self._groups[number]
            with pyarrow.parquet.ParquetFile(path) as file:
                # Threads of the process before a fork are not there in the workers of a loader.
                self._kept[number] = file.read_row_group(group, use_threads=False)
        return self._kept[number]


def _arrow(path: Path, split: str, streaming: bool) -> tuple[Sequence[Any], str]:
    """A parquet file, a folder of them, or what `save_to_disk` wrote."""
    try:
        import datasets
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("parquet and datasets folders need `pip install datasets`") from error

    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    digest = _digest(file for file in files if file.is_file())
    parquet = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    parquet = [file for file in parquet if split in file.name] or parquet
    if parquet and streaming:
        return Groups(parquet), digest
    if parquet:
        tables = [pyarrow.parquet.read_table(file, memory_map=True) for file in parquet]
        table = pyarrow.concat_tables(tables)
        return Rows(table, lambda index: table.slice(index, 1)), digest
    found = datasets.load_from_disk(str(path))
    if isinstance(found, datasets.DatasetDict):
        names = {"train": ["train"], "dev": ["dev", "validation"]}[split]
        name = next((name for name in names if name in found), None)
        if name is None:
            raise ValueError(f"it has the splits {', '.join(found)}, none of {names}")
        found = found[name]
    raw = found.with_format("arrow")  # undecoded, and without files of its own in the folder
    return Rows(raw, lambda index: raw[index]), digest


def _digest(files: Iterable[Path]) -> str:
    """SHA-256 of files, one after the other, read in pieces."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
