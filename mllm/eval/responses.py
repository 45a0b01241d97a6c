"""Answers that are kept: what a killed run has answered is not asked again.

A file is JSON Lines. Its first line says which model and which version of mllm the answers are of;
every other line is one whole batch, so that an interrupted run goes on with the batches that an
uninterrupted one would have had. What a kill leaves of a line is skipped and counted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mllm
from mllm.errors import DataError
from mllm.eval import cells, files

SCHEMA = 1
NAME = "responses.jsonl"
_HEADER = frozenset({"schema", "kind", "mllm", "model"})
#: Facts of a model that its answers depend on; its name is none of them.
_SAME = ("config_sha256", "generation_sha256", "processor_sha256", "weights_sha256", "dtype")


def header(model: Mapping[str, Any]) -> dict[str, Any]:
    """The first line of a file of answers of `model` (see `provenance.describe_model`)."""
    return {"schema": SCHEMA, "kind": "responses", "mllm": mllm.__version__, "model": dict(model)}


def in_cache(folder: str | os.PathLike, model: Mapping[str, Any]) -> Path:
    """The file of one model and version in a folder that several runs share.

    Raises:
        DataError: the folder cannot be made or written to.
    """
    same = [SCHEMA, mllm.__version__, *(model[name] for name in _SAME)]
    name = hashlib.sha256(json.dumps(same).encode()).hexdigest()[:16]
    return files.ensure_writable(folder, "cache") / f"{name}.jsonl"


def check_version(found: Mapping[str, Any], schema: int, path: Path, argument: str) -> None:
    """Refuse what another version of mllm has written.

    Raises:
        DataError: another schema, or another release.
    """
    if (found.get("schema"), found.get("mllm")) == (schema, mllm.__version__):
        return
    raise DataError(
        f"{path} was written by mllm {found.get('mllm')} (schema {found.get('schema')}), and this "
        f"is mllm {mllm.__version__} (schema {schema}), whose answers may differ; nothing was "
        f"changed: give another --{argument}, or go on with that version",
        argument=argument,
        given=path,
        expected=f"another --{argument}",
    )


def check_model(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], path: Path, argument: str
) -> None:
    """Refuse to mix models.

    Raises:
        DataError: another architecture, generation config, processor, weights or dtype.
    """
    for name in _SAME:
        if theirs.get(name, ours[name]) != ours[name]:  # older ones do not say all of it
            what, other = (_called(facts, name) for facts in (ours, theirs))
            raise DataError(
                f"{path} holds results of another model: {other}, not {what}; nothing was changed: "
                f"give another --{argument}, or the model and --dtype of those results",
                argument=argument,
                given=path,
                expected=f"another --{argument}",
            )


def _called(facts: Mapping[str, Any], name: str) -> str:
    value = str(facts.get(name))
    if name != "dtype":
        value = f"{name.removesuffix('_sha256')} {value[:12]}"
    return f"{facts.get('name')} ({value})"


class Responses:
    """Answers by key: those of a file, and new ones, which are on disk when :meth:`add` returns.

    While the `with` block is open, no other process writes to the file.

    Args:
        path: JSON Lines file; made with the first answers.
        model: facts about the model (`provenance.describe_model`).
        argument: the option that errors name, `output` or `cache`.

    Attributes:
        damaged: lines that a killed run has left unfinished.

    Raises:
        DataError: the file is of another model or version of mllm, is no such file, or is being
            written to by another process.
    """

    def __init__(
        self, path: str | os.PathLike, model: Mapping[str, Any], argument: str = "output"
    ) -> None:
        self.path, self._model, self._argument = Path(path), model, argument
        self._file = cells.ResultsFile(path, argument)
        self._known: dict[str, dict[str, Any]] = {}
        self._alone: dict[str, dict[str, Any]] = {}
        self._begun = False
        self.damaged = 0

    def __enter__(self) -> Responses:
        self._file.__enter__()
        try:
            self._read()
        except BaseException:
            self._file.__exit__()
            raise
        return self

    def __exit__(self, *details: object) -> None:
        self._file.__exit__(*details)

    def get(self, key: str, alone: bool = False) -> dict[str, Any] | None:
        """The reply to a prompt, with the `seconds` that it took; None if there is none.

        Args:
            key: of the prompt.
            alone: take only what was answered in a batch of one, whose times are its own.
        """
        return (self._alone if alone else self._known).get(key)

    def add(self, keys: Sequence[str], replies: Sequence[dict[str, Any]], seconds: float) -> None:
        """Keep the answers of one batch.

        Raises:
            DataError: the disk is full, or the file cannot be written.
        """
        if not self._begun:
            self._file.append(header(self._model))
            self._begun = True
        self._file.append({"keys": list(keys), "replies": list(replies), "seconds": seconds})
        self._take(keys, replies, seconds)

    def _take(self, keys: Sequence[str], replies: Sequence[dict], seconds: float) -> None:
        for key, reply in zip(keys, replies, strict=True):
            reply = reply | {"seconds": seconds / len(keys)}
            self._known.setdefault(key, reply)
            if len(keys) == 1:
                self._alone.setdefault(key, reply)

    def _read(self) -> None:
        lines, self.damaged = cells.parsed(self.path, self._argument)
        for number, line in lines:
            if not isinstance(line, dict):
                raise self._foreign(number, "not a line of answers")
            if not self._begun:
                if not line.keys() >= _HEADER or line["kind"] != "responses":
                    raise self._foreign(number, "not the first line of answers")
                check_version(line, SCHEMA, self.path, self._argument)
                check_model(line["model"], self._model, self.path, self._argument)
                self._begun = True
            elif line.keys() >= {"keys", "replies", "seconds"}:
                self._take(line["keys"], line["replies"], line["seconds"])
            else:
                raise self._foreign(number, "not a line of answers")

    def _foreign(self, number: int, what: str) -> DataError:
        return cells.foreign(self.path, number, what, self._argument)
