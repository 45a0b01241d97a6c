"""The scaling study: its law, its sweep, and its page, on a tiny shape."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from test_bench import TINY_QWEN

from mllm.errors import DataError

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


def alike(study, **other):
    return study.conditions(study.PLAN, "float32", None, None) | other


@pytest.fixture
def script(monkeypatch):
    """The page's generator, that extrapolates to one small model."""
    found = runpy.run_path(str(ROOT / "scripts" / "make_scaling.py"))
    monkeypatch.setitem(found["further"].__globals__, "MODELS", {"tiny-llava": 576})
    monkeypatch.setitem(found["further"].__globals__, "TOKENS", (1152,))
    return found


def test_a_sweep_goes_on_and_makes_the_page(study, script, tmp_path):
    asked = []

    def point(visual, batch):
        asked.append((visual, batch))
        if visual == 96:
            return {"status": "oom", "words": "out of memory"}
        return row(study, visual, batch)

    output = tmp_path / "scaling-tiny.json"
    study.sweep([12, 96], [1], output, alike(study), point)
    results = study.sweep([12, 24, 48, 96], [1], output, alike(study), point)
    assert asked == [(12, 1), (96, 1), (24, 1), (48, 1)], "nothing is measured twice"
    assert [x["status"] for x in results["rows"]] == ["unresolved", "oom", *["unresolved"] * 2]
    assert {x["dtype"] for x in results["rows"]} == {"float32"}
    (law,) = results["laws"]
    assert law["points"] == 3 and law["tokens"] == [12 + study.TEXT, 48 + study.TEXT]

    made = script["page"]("scaling-tiny", results)
    assert "| 96 | 1 | – | out of memory | – |" in made and made.count("tiny-llava") == 2
    assert made.index("| 48 | 1 |") < made.index("| 96 | 1 |"), "in order, whenever measured"
    assert "| 12 | 1 | 2, a look |" in made and "**Nothing in this table" in made
    drawn = script["picture"](results)
    assert ElementTree.fromstring(drawn).tag.endswith("svg") and "batch 1" in drawn
    assert drawn == script["picture"](results), "the same file from the same rows"


def planted(study, visual, pairs=30, **more):
    """A measured row that says one thing about everything."""
    times = {
        f"{part}{name}": value
        for part in ("", "llm_", "decode_")
        for name, value in {"ratio": 2.0, "ratio_ci": [1.9, 2.1], "baseline_s": visual / 100,
                            "patched_s": visual / 200}.items()
    }  # fmt: skip
    return times | {
        "plan": study.PLAN, "visual": visual, "text": study.TEXT, "batch": 1, "dtype": "float32",
        "pairs": pairs, "status": "ok", "words": "2.00x faster", "share": 0.9, "peak_bytes": 1,
        "baseline_peak_bytes": 2, "layer_flops": [visual], "estimate_equal": True,
        "selection_s": 0.01, "selection_s_ci": [-0.01, 0.02], **more,
    }  # fmt: skip


def kept(study, tmp_path, *rows):
    """A file as it was written before a point said its dtype and commit of its own."""
    about = alike(study)
    results = {
        "schema": 1, "suite": "scaling", "model_shape": asdict(TINY_QWEN) | {"parameters": 10**6},
        "device": about["device"], "threads": about["threads"], "commit": "a" * 40 + "+dirty",
        "versions": {name: about[name] for name in ("torch", "transformers")}, "rows": list(rows),
        "plan": study.PLAN, "laws": [],
    }  # fmt: skip
    output = tmp_path / "scaling-tiny.json"
    output.write_text(json.dumps(results))
    return output


def test_pairs_may_differ_and_few_are_a_look(study, script, tmp_path):
    late = {"plan": study.PLAN, "visual": 20000, "text": study.TEXT, "batch": 1,
            "status": "timeout", "words": "not done within 30 minutes"}  # fmt: skip
    output = kept(study, tmp_path, planted(study, 144), planted(study, 288, 5), late)
    before = json.loads(output.read_text())

    def point(visual, batch):
        return before | {"commit": "b" * 40, "rows": [planted(study, visual)]}

    results = study.sweep([144, 288, 576, 20000], [1], output, alike(study), point)
    assert [x["visual"] for x in results["rows"]] == [144, 288, 20000, 576]
    made = script["page"]("scaling-tiny", results)
    assert "| 144 | 1 | 30 | 1.44 s |" in made and "| 288 | 1 | 5, a look |" in made
    assert "| 20,000 | 1 | – | not done within 30 minutes | – |" in made
    assert "1.4% (-1.4% to 2.8%)" in made, "0.01 s of 0.72"
    assert "float32" in made and f"commit {'a' * 7}+dirty and {'b' * 7}." in made


@pytest.mark.parametrize(
    ("name", "value"),
    [("plan", "fastv:layer=2:keep=0.5"), ("dtype", "bfloat16"), ("device", "another"),
     ("threads", 99), ("torch", "2.6.0"), ("transformers", "5.0.0")],
)  # fmt: skip
def test_an_output_of_other_conditions_is_refused(study, tmp_path, name, value):
    output = kept(study, tmp_path, planted(study, 144))
    asked, before = alike(study), output.read_text()
    words = f"{name} {asked[name]} instead of {value}"
    with pytest.raises(DataError, match=re.escape(words)) as error:
        study.sweep([288], [1], output, asked | {name: value}, lambda *_: pytest.fail("measured"))
    assert str(output) in str(error.value) and "another --output" in str(error.value)
    assert output.read_text() == before


@pytest.mark.parametrize("text", ["[]", "{}", '{"rows": ["a"]}', "{"])
def test_an_output_that_is_something_else_is_refused(study, tmp_path, text):
    output = tmp_path / "other.json"
    output.write_text(text)
    with pytest.raises(DataError, match="no result of this script"):
        study.sweep([288], [1], output, alike(study), lambda *_: pytest.fail("measured"))
    assert output.read_text() == text


def test_the_command_line_says_it_in_one_line(study, tmp_path, capsys):
    output = kept(study, tmp_path, planted(study, 144))
    with pytest.raises(SystemExit):
        study.main(["--output", str(output), "--dtype", "float16"])
    assert "dtype float32 instead of float16" in capsys.readouterr().err.splitlines()[-1]


def test_a_point_that_takes_too_much_is_recorded(study):
    late = study.in_a_process(["--pairs", "1"], 144, 1, minutes=0)
    assert late == {"status": "timeout", "words": "not done within 0 minutes"}


@pytest.mark.slow
def test_a_point_without_memory_is_recorded(study):
    given = ["--pairs", "1", "--memory", "0.75"]
    assert study.in_a_process(given, 20000, 16, minutes=10)["status"] == "oom"


@pytest.mark.slow
def test_the_page_is_that_of_the_result():
    script = runpy.run_path(str(ROOT / "scripts" / "make_scaling.py"))
    script["main"](["--check"])
