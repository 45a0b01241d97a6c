"""The scaling study: its law, its sweep, and its page, on a tiny shape."""

from __future__ import annotations

import importlib.util
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from test_bench import TINY_QWEN

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_law_is_found(study):
    n = np.array([200.0, 600, 1200, 5000, 20000])
    found, error = study.fit(n, 0.5 + 2e-3 * n + 4e-7 * n**2, 2)
    assert found == pytest.approx([0.5, 2e-3, 4e-7], rel=1e-6) and error < 1e-9
    found, error = study.fit(n, 3e-3 * n - 1e-8 * n**2, 2)
    assert found[2] == 0 and min(found) >= 0 and error > 0, "nothing gets cheaper with tokens"


def row(study, visual: int, batch: int = 1):
    return study.measure(TINY_QWEN, visual, batch, study.PLAN, 2, "float32", None, None)


def test_a_point_agrees_with_the_estimate(study):
    results = row(study, 24, 2)
    json.dumps(results, allow_nan=False)
    (point,) = results["rows"]
    assert point["estimate_equal"] and point["status"] == "unresolved", "two pairs are too few"
    assert (point["visual"], point["batch"], point["text"]) == (24, 2, study.TEXT)
    assert sum(point["layer_flops"]) < point["baseline_flops"]
    assert point["kv_bytes"] < point["baseline_kv_bytes"]


def test_a_sweep_goes_on_and_makes_the_page(study, tmp_path, monkeypatch):
    asked = []

    def point(visual, batch):
        asked.append((visual, batch))
        if visual == 96:
            return {"status": "oom", "words": "out of memory"}
        return row(study, visual, batch)

    output = tmp_path / "scaling-tiny.json"
    study.sweep([12, 96], [1], output, study.PLAN, point)
    results = study.sweep([12, 24, 48, 96], [1], output, study.PLAN, point)
    assert asked == [(12, 1), (96, 1), (24, 1), (48, 1)], "nothing is measured twice"
    assert [x["status"] for x in results["rows"]] == ["unresolved", "oom", *["unresolved"] * 2]
    (law,) = results["laws"]
    assert law["points"] == 3 and law["tokens"] == [12 + study.TEXT, 48 + study.TEXT]

    script = runpy.run_path(str(ROOT / "scripts" / "make_scaling.py"))
    monkeypatch.setitem(script["further"].__globals__, "MODELS", {"tiny-llava": 576})
    monkeypatch.setitem(script["further"].__globals__, "TOKENS", (1152,))
    made = script["page"]("scaling-tiny", results)
    assert "| 96 | 1 | out of memory | – |" in made and made.count("tiny-llava") == 2
    assert "**Nothing in this table" in made


def test_a_point_that_takes_too_much_is_recorded(study):
    late = study.in_a_process(["--pairs", "1"], 144, 1, minutes=0)
    assert late == {"status": "timeout", "words": "not done within 0 minutes"}


@pytest.mark.slow
def test_a_point_without_memory_is_recorded(study):
    given = ["--pairs", "1", "--memory", "0.75"]
    assert study.in_a_process(given, 20000, 16, minutes=10)["status"] == "oom"
