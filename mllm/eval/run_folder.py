"""The output folder of `mllm eval`: whose results it has, and under which names.

`evaluation.json` says which model and version the folder belongs to, and which time stamp the files
of each command have. The same command, run again after an interruption or a year later, writes the
same files; another command beside it (other tasks, another limit) writes its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mllm
from mllm.errors import DataError
from mllm.eval import cells, files, responses

SCHEMA = 1
NAME = "evaluation.json"
#: End of the folders in which tasks write files of their own.
MORE = "_more"
#: What `files.write_text` has begun and not renamed.
_UNFINISHED = (f".{NAME}.*.tmp", "*/.*_results.json.*.tmp", "*/.*_samples_*.jsonl.*.tmp")


class RunFolder:
    """An output folder that this process alone writes to, while the `with` block is open.

    Args:
        path: made if it is missing.

    Raises:
        DataError: it cannot be written to, is in use by another process, or has results of another
            version of mllm.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = files.ensure_writable(path)
        self._lock = cells.ResultsFile(self.path / NAME)
        self._about: dict[str, Any] = {}

    def __enter__(self) -> RunFolder:
        self._lock.__enter__()
        try:
            self._about = self._read()
            for pattern in _UNFINISHED:  # by a killed run: nobody else writes these
                for path in self.path.glob(pattern):
                    path.unlink()
        except BaseException:
            self._lock.__exit__()
            raise
        return self

    def __exit__(self, *details: object) -> None:
        self._lock.__exit__(*details)

    def _read(self) -> dict[str, Any]:
        path = self.path / NAME
        if not path.exists():
            return {}
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            known = about.keys() >= {"schema", "mllm", "model", "runs"}
        except (ValueError, AttributeError):
            known = False
        if not known:
            raise DataError(
                f"{path} is not what mllm eval writes; give another --output",
                argument="output",
                given=path,
                expected="another --output",
            )
        responses.check_version(about, SCHEMA, path, "output")
        return about

    def claim(self, model: Mapping[str, Any]) -> None:
        """Say that the results are of `model` (`provenance.describe_model`).

        Raises:
            DataError: the folder has results of another model.
        """
        if self._about:
            responses.check_model(self._about["model"], model, self.path / NAME, "output")
        else:
            version = mllm.__version__
            self._about = {"schema": SCHEMA, "mllm": version, "model": dict(model), "runs": {}}

    def stamp(self, command: Mapping[str, Any]) -> str:
        """The time stamp in the names of a command's files: of when it was first run.

        Args:
            command: everything that tells its results from those of other commands.
        """
        name = hashlib.sha256(json.dumps(command, sort_keys=True).encode()).hexdigest()
        if name not in self._about["runs"]:
            made = time.strftime("%Y%m%d_%H%M%S")
            taken, number = set(self._about["runs"].values()), 1
            stamp = made
            while stamp in taken:
                number += 1
                stamp = f"{made}_{number}"
            self._about["runs"][name] = stamp
            files.write_json(self.path / NAME, self._about)
        return self._about["runs"][name]

    def fresh(self, name: str) -> Path:
        """An empty folder beside results, for what a task writes itself; made when it does."""
        path = self.path / f"{name}{MORE}"
        shutil.rmtree(path, ignore_errors=True)
        return path
