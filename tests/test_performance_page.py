"""The tables of docs/performance.md are what the result files hold."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "make_performance.py"))
PAGE = "# Page\n\n<!-- made from some, others -->\nold\n<!-- until here -->\n\nMore.\n"
ABOUT = {
    "suite": "selection",
    "model_shape": {"name": "bench-cpu"},
    "device": "a machine",
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "commit": "0123456789",
}
ROW = {
    "plan": "divprune:keep=64", "visual": 576, "batch": 1, "visual_avg": 64.0, "status": "ok",
    "pairs": 30, "cost": 0.125, "cost_ci": [0.12, 0.13], "spent_s": 0.05, "saved_s": 0.4,
}  # fmt: skip


def test_the_page_is_up_to_date():
    text = SCRIPT["PAGE"].read_text()
    assert SCRIPT["page"](text) == text


def test_rows_of_all_files_and_none_of_refused_plans(tmp_path):
    refused = {**ROW, "plan": "pllava", "status": "refused", "words": "needs videos"}
    other = {**ROW, "plan": "fastv", "batch": 8}
    for name, rows in (("some", [ROW, refused]), ("others", [other])):
        (tmp_path / f"{name}.json").write_text(json.dumps({**ABOUT, "rows": rows}))
    made = SCRIPT["page"](PAGE, tmp_path)
    assert "| `divprune:keep=64` | 576 | 1 | 64 | 50 | 400 | 12.5% (12.0% to 13.0%) | 30 |" in made
    assert "| `fastv` | 576 | 8 |" in made and "pllava" not in made and "old" not in made
    assert made.count("a machine") == 2 and made.endswith("<!-- until here -->\n\nMore.\n")


def test_a_row_of_few_pairs_is_called_a_look_and_an_edited_checkout_is_said(tmp_path):
    """And what is said of a file is said of that one, though another is missing."""
    few = json.dumps({**ABOUT, "commit": ABOUT["commit"] + "+dirty", "rows": [{**ROW, "pairs": 5}]})
    (tmp_path / "others.json").write_text(few)
    made = SCRIPT["page"](PAGE, tmp_path)
    assert "| `divprune:keep=64`, a look: 5 pairs | 576 |" in made
    assert "[others](../benchmarks/results/others.json)" in made and "commit 0123456+dirty." in made
    assert "some.json" not in made


def test_choosing_is_shown_with_all_that_it_took():
    kv = {
        "ratio": 0.13, "ratio_ci": [0.12, 0.15], "ideal": 1.7, "claim": "memory",
        "payload_bytes": 1, "baseline_kv_bytes": 4, "payload_share": None, "scorer_share": 0.0,
        "scorer_s": 112.0, "prefill_s": 28.0, "peak_bytes": 1, "baseline_peak_bytes": 2,
    }  # fmt: skip
    assert "400.0%" in SCRIPT["kv"](kv)


def test_what_was_not_measured_says_so(tmp_path):
    assert "Not measured." in SCRIPT["page"](PAGE, tmp_path)
