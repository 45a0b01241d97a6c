"""The script under benchmarks/ that asks about small objects: what it asks."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from mllm.eval.stats import wilson

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def loaded(path: str):
    """A script as a module, under a name that is nobody else's."""
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_script", BENCHMARKS / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_needle_is_among_other_pictures():
    needle = loaded("needle_kv.py")
    asked = [needle.question(i) for i in range(4)]
    assert [len(one["image"]) for one in asked] == [2, 3, 2, 3]
    for one in asked:
        assert one["question"].count("<image>") == len(one["image"])
    places = [
        next(i for i, picture in enumerate(one["image"]) if picture == own["image"])
        for one, own in ((asked[i], needle.sample("needle_color", "test", i)) for i in range(4))
    ]
    assert len(set(places)) > 1, "it is at several places"


def test_the_committed_needle_results_are_of_this_script():
    results = json.loads((BENCHMARKS / "results" / "needle-kv.json").read_text())
    needle = loaded("needle_kv.py")
    assert [row["plan"] for row in results["rows"]] == list(needle.PLANS)
    assert results["protocol"] == needle.PROTOCOL
    for row in results["rows"]:
        assert row["right"] == row["outcomes"].count("1") and len(row["outcomes"]) == row["n"] >= 60
        assert row["ci"] == pytest.approx(wilson(row["right"], row["n"]))
    text = (BENCHMARKS / "results" / "needle-kv.md").read_text()
    assert text == needle.markdown(results)
    keeps, random = results["rows"][:2]
    assert keeps["ci"][0] > random["ci"][1], "the intervals do not meet"
