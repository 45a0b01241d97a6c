"""Files inside installed packages, found without importing (and so running) the package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from mllm.errors import DataError


def package_file(distribution: str, module: str, path: str) -> Path:
    """Path of a data file of an installed package.

    Args:
        distribution: name that pip knows.
        module: name of its import package.
        path: relative to the folder of `module`.

    Raises:
        DataError: the package is missing, or has no such file; the message has the command that
            installs it.
    """
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"the data package {distribution} is not installed; pip install {distribution} "
            "(or 'mllm-efficiency[data]' for all data packages)",
            argument="task",
            given=distribution,
            expected=f"pip install {distribution}",
        )
    file = Path(spec.submodule_search_locations[0]) / path
    if not file.exists():
        raise damaged(distribution, f"has no {path}")
    return file


def damaged(distribution: str, what: str) -> DataError:
    """The error for a data package that is there but cannot be used."""
    try:
        found = f"{distribution} {version(distribution)}"
    except PackageNotFoundError:
        found = distribution
    return DataError(
        f"the data package {found} {what}; pip install --force-reinstall {distribution}",
        argument="task",
        given=found,
        expected=f"pip install --force-reinstall {distribution}",
    )
