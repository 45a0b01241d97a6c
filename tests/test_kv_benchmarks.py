"""The scripts under benchmarks/ that are about the KV cache: what they ask and what they refuse."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest
from test_bench import TINY

from mllm.eval.stats import wilson

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def loaded(path: str):
    """A script as a module, under a name that is nobody else's."""
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_script", BENCHMARKS / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def peer():
    return loaded("peers/kvpress.py")


def options(**given):
    asked = dict(python=None, length=120, budget=0.5, pairs=2, dtype="float32", threads=None)
    return argparse.Namespace(**{**asked, **given})


@pytest.mark.parametrize(
    ("python", "part"),
    [
        (None, "no --python"),
        ("/nowhere/python", "cannot be run"),
        pytest.param(
            sys.executable,
            "kvpress failed: ModuleNotFoundError",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("kvpress") is not None, reason="it is installed"
            ),
        ),
    ],
)
def test_without_kvpress_its_row_says_why(peer, python, part):
    about = {"ours": {"visual": 48, "text": 72}, "threads": 1}
    row = peer.theirs(options(python=python), TINY, about)
    assert row["status"] == "skipped" and part in row["words"]


def test_our_row_has_the_peers_settings(peer):
    results = peer.ours(options(length=160), TINY)
    row = results["ours"]
    assert row["plan"] == "snapkv:budget=0.5:window=64:kernel=5:pool=avg" and "rows" not in results
    assert row["payload_share"] == 1.0 and row["batch"] == 1
    said = peer.words(results | {"kvpress": peer._skipped("why"), "relative": None})
    assert "kvpress: why" in said and "no claim" in said


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
