"""The results file of a sweep: one cell per line, only ever appended to, by one process at a time.

A cell is on disk when :meth:`ResultsFile.append` returns. What a killed run leaves is at most one
line without its end, which readers skip and count.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm.errors import DataError

try:
    import fcntl
except ImportError:  # Windows has no such locks: there, a file is not guarded
    fcntl = None  # type: ignore[assignment]

SCHEMA = 1
_FIELDS = frozenset({"method", "budget", "task", "n", "outcomes", "about"})
#: Facts of a model beside its weights, and what they are called.
SETTINGS = {
    "config_sha256": "config", "generation_sha256": "generation config",
    "processor_sha256": "processor", "template_sha256": "chat template",
}  # fmt: skip
Identity = tuple[str, int, str, str, str, str]


@dataclass(frozen=True)
class Cells:
    """What a results file holds.

    Attributes:
        rows: cells in the order of the file, each once.
        damaged: lines that a killed run has left unfinished.
    """

    rows: list[dict[str, Any]]
    damaged: int = 0


def identity(cell: dict[str, Any]) -> Identity:
    """What tells a cell from others: key, questions asked, style, data, backend, protocol.

    The key covers plan, task, split, seed and weights, in the dtype they are used in. Cells
    written before these were told apart are of style `plain`, of the first scenes, and of
    protocol `prompt`.
    """
    asked, style = cell.get("n_asked", cell["n"]), cell.get("style", "plain")
    data, protocol = cell.get("data", "scenes 1"), cell.get("protocol", "prompt")
    return cell["key"], asked, style, data, cell["about"]["backend"], protocol


def read(path: str | os.PathLike) -> Cells:
    """Cells of a results file; none if there is no such file. The file is not changed.

    Raises:
        DataError: a line is no cell of a sweep, or of a schema that this version cannot read.
    """
    rows: dict[Any, dict[str, Any]] = {}
    lines, damaged = parsed(path)
    for number, cell in lines:
        if not isinstance(cell, dict) or not cell.keys() >= _FIELDS:
            raise foreign(path, number, "not a cell of a sweep")
        if cell.get("schema", SCHEMA) != SCHEMA:
            raise foreign(
                path, number, f"schema {cell['schema']!r}, and this mllm reads schema {SCHEMA}"
            )
        rows.setdefault(identity(cell) if "key" in cell else number, cell)
    return Cells(list(rows.values()), damaged)


def parsed(
    path: str | os.PathLike, argument: str = "output"
) -> tuple[list[tuple[int, Any]], int]:
    """Numbered lines of a JSON Lines file, and how many a killed run has left unfinished.

    Args:
        path: of the file; one that does not exist has no lines.
        argument: the option that an error names.

    Raises:
        DataError: it cannot be read, or a line is not JSON.
    """
    path = Path(path)
    found: list[tuple[int, Any]] = []
    damaged = 0
    try:
        opened = path.open("rb") if path.exists() else contextlib.nullcontext(())
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}",
            argument=argument,
            given=path,
            expected=f"a file that this user can read, or another --{argument}",
        ) from error
    with opened as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                found.append((number, json.loads(line)))
            except ValueError as error:  # UnicodeDecodeError too
                if not line.lstrip(b"\0").startswith(b"{") and line.strip(b"\0\r\n"):
                    raise foreign(path, number, "not JSON", argument) from error
                damaged += 1
    return found, damaged


def foreign(
    path: str | os.PathLike, number: int, what: str, argument: str = "output"
) -> DataError:
    """The error for a line that is not what it should be."""
    return DataError(
        f"{path}, line {number}: {what}",
        argument=argument,
        given=path,
        expected=f"a file that mllm has written, or another --{argument}",
    )


def check_model(
    cells: Iterable[dict[str, Any]], about: dict[str, Any], path: str | os.PathLike
) -> None:
    """Refuse to mix models: all cells must be of the weights and the settings in `about`.

    Cells that do not tell their settings, as older ones, are taken for cells of this model.

    Raises:
        DataError: a cell is of other weights, of the same ones in another dtype, or of another
            config, generation config, processor or chat template.
    """
    for cell in cells:
        theirs = cell["about"]
        if theirs["weights_sha256"] != about["weights_sha256"]:
            ours, other = (f"{x['weights_sha256'][:12]} in {x['dtype']}" for x in (about, theirs))
            raise DataError(
                f"{path} holds results of another model: weights {other}, not {ours}; give "
                "another --output, or the model and --dtype of that file",
                argument="output",
                given=path,
                expected="another --output",
            )
        for name, called in SETTINGS.items():
            if theirs.get(name, about[name]) != about[name]:
                raise DataError(
                    f"{path} holds results of another model: of these weights with another "
                    f"{called}; give another --output, or the {called} of that file",
                    argument="output",
                    given=path,
                    expected="another --output",
                )


class ResultsFile:
    """A results file that this process alone appends to, while the `with` block is open.

    The lock is on `<path>.lock` and belongs to the process: it ends with it, however it ends.

    Args:
        path: JSON Lines file; made with the first cell.
        argument: the option that errors name.

    Raises:
        DataError: another process appends to the file (it is named), or the lock cannot be made.
    """

    def __init__(self, path: str | os.PathLike, argument: str = "output") -> None:
        self.path, self._argument = Path(path), argument
        self._lock_path = self.path.with_name(self.path.name + ".lock")
        self._lock = self._file = -1

    def __enter__(self) -> ResultsFile:
        if fcntl is not None:
            self._lock = self._locked()
        return self

    def __exit__(self, *_: object) -> None:
        if self._file >= 0:
            os.close(self._file)
        if self._lock >= 0:
            self._lock_path.unlink(missing_ok=True)
            os.close(self._lock)
        self._lock = self._file = -1

    def _locked(self) -> int:
        while True:
            try:
                lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise DataError(
                    f"cannot write {self._lock_path}: {error.strerror}",
                    argument=self._argument,
                    given=self.path,
                    expected="a folder that this user can write to",
                ) from error
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.read(lock, 32).decode(errors="replace").strip() or "unknown"
                os.close(lock)
                raise DataError(
                    f"process {holder} is writing to {self.path}; wait for it, or give another "
                    f"--{self._argument}",
                    argument=self._argument,
                    given=self.path,
                    expected="a file that no other process writes to",
                ) from error
            # The holder before may have removed the file between our opening and locking it.
            try:
                if os.path.samestat(os.fstat(lock), os.stat(self._lock_path)):
                    break
            except FileNotFoundError:
                pass
            os.close(lock)
        os.ftruncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
        return lock

    def append(self, cell: dict[str, Any]) -> None:
        """Add one line in one write, and see it on disk before returning.

        Raises:
            DataError: the disk is full, or the file cannot be written.
        """
        try:
            line = json.dumps(cell, ensure_ascii=False).encode() + b"\n"
            if self._file < 0:
                self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
                if not self._ends_a_line():
                    line = b"\n" + line
            written = os.write(self._file, line)
            os.fsync(self._file)
        except OSError as error:
            raise self._unwritten(error.strerror) from error
        if written < len(line):
            raise self._unwritten("the disk is full")

    def _ends_a_line(self) -> bool:
        size = os.fstat(self._file).st_size
        return size == 0 or os.pread(self._file, 1, size - 1) == b"\n"

    def _unwritten(self, why: str | None) -> DataError:
        return DataError(
            f"cannot write {self.path}: {why}",
            argument=self._argument,
            given=self.path,
            expected="a file that this user can write, and room on the disk",
        )
