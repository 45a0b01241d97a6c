"""Settings of the whole test suite."""

from __future__ import annotations

import os
import sys

import pytest
import torch

# Before transformers is imported by any test: no network, no fork warnings, no surprises.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton asks when it is imported. Kernels run in its interpreter where they cannot run otherwise.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the model and processor of `eval_tiny`."""
    from eval_tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def loaded(folder):
    """That model and its processor, on the CPU."""
    from mllm.loading import load_model

    return load_model(str(folder), device="cpu")


def pytest_terminal_summary(terminalreporter):
    """How much of the invariant matrix ran."""
    invariants = sys.modules.get("invariants")
    if invariants is None or not invariants.COUNTS:
        return
    counts = dict(invariants.COUNTS)
    failed = sum(
        "test_invariants.py" in report.nodeid for report in terminalreporter.stats.get("failed", [])
    )
    terminalreporter.write_line(
        f"invariants: {counts.pop('matrix', 0)} cases of the matrix, "
        f"{counts.pop('drawn', 0)} drawn, {counts.pop('sequences', 0)} sequences "
        f"against the oracle, {failed} mismatches; "
        + ", ".join(f"{way} {n}" for way, n in sorted(counts.items()))
    )
