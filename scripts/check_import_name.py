"""Fail when the import name `mllm` belongs to another distribution in this environment.

Run isolated (`python -I scripts/check_import_name.py`), so that only installed code counts.
"""

from __future__ import annotations

import importlib.metadata as metadata
import importlib.util
import sys
from pathlib import Path

OURS = "mllm-efficiency"
ROOT = Path(__file__).resolve().parent.parent


def other_owner() -> str | None:
    """Who else provides `mllm` here, in words; None when nobody does."""
    names = metadata.packages_distributions().get("mllm", [])
    owners = {name.lower().replace("_", "-") for name in names}
    if others := owners - {OURS}:
        return f"the distribution {', '.join(sorted(others))}"
    spec = importlib.util.find_spec("mllm")
    if spec is None:
        return None
    places = [Path(place).resolve() for place in spec.submodule_search_locations or [spec.origin]]
    if OURS not in owners and ROOT / "mllm" not in places and not _is_installed(OURS):
        return f"a package at {places[0]}"
    return None


def _is_installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    if owner := other_owner():
        sys.exit(
            f"error: the import name 'mllm' already belongs to {owner} in {sys.prefix}.\n"
            f"Uninstall it (python -m pip uninstall ...) or use a fresh environment."
        )
