"""Settings of the whole test suite."""

from __future__ import annotations

import os

# Before transformers is imported by any test: no network, no fork warnings, no surprises.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: part of the full product, left out of the fast suite")
