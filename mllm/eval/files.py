"""Result files: checked before the work starts, written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mllm.errors import DataError

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+(?=>)")


def suffix_of(path: str | os.PathLike, known: Collection[str]) -> str:
    """What the end of a file's name says to write, in small letters.

    Raises:
        DataError: it is none of `known`.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in known:
        raise DataError(
            f"{path} does not say what to write",
            argument="output",
            given=str(path),
            expected=f"a name that ends in {', '.join(known)}",
        )
    return suffix


def ensure_writable(folder: str | os.PathLike, argument: str = "output") -> Path:
    """Make `folder` if missing and see that files can be made in it.

    Args:
        folder: the folder.
        argument: the option that an error names.

    Raises:
        DataError: it cannot be made or written to.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise DataError(
            f"cannot write to {path}: {error.strerror}",
            argument=argument,
            given=path,
            expected="a folder that this user can write to",
        ) from error
    return path


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Write `text` to `path` through a temporary file beside it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path


def write_json(path: str | os.PathLike, data: Any) -> Path:
    """Write `data` as indented JSON; numpy scalars and arrays count as numbers."""
    return write_text(path, json.dumps(data, indent=2, ensure_ascii=False, default=_plain) + "\n")


def write_jsonl(path: str | os.PathLike, rows: list[Any]) -> Path:
    """Write one JSON object per line."""
    lines = (json.dumps(row, ensure_ascii=False, default=_plain) + "\n" for row in rows)
    return write_text(path, "".join(lines))


def without_addresses(text: str) -> str:
    """Text without the addresses of objects, which are others every time."""
    return _ADDRESS.sub("", text)


def _plain(value: Any) -> Any:
    """Numpy scalars and arrays as numbers; functions, pictures and the like as text."""
    return value.tolist() if hasattr(value, "tolist") else without_addresses(str(value))
