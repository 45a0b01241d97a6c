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


def test_what_was_not_measured_says_so(tmp_path):
    assert "Not measured." in SCRIPT["page"](PAGE, tmp_path)
