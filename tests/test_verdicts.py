"""What the pages say was measured is what the result files hold, whichever files there are."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from test_eval_table import cell

from mllm.eval import table
from mllm.plan import Plan

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "make_verdicts.py"))
MODEL, TASKS = "0" * 64, ("color", "needle")
PAGE = """# Methods

What we measured.

## Some

### `random`

Drawn.

### `fastv`

Attention.

Two paragraphs.

## Others

### `topv`

Transport.
"""


def swept(
    budgets, *, methods=("fastv:layer=1",), tasks=TASKS, n=200, skipped=(), random="random", **more
):
    """A table in which methods are 30 points better than random, and its cells."""
    rng = np.random.default_rng(5)
    made = []
    for task in tasks:
        made.append(cell("unpatched", None, task, rng.random(n) < 0.95, **more))
        for budget in budgets:
            for method, chance in [(random, 0.5), ("downsample", 0.2)] + [
                (method, 0.8) for method in methods
            ]:
                right = rng.random(n) < chance
                made.append(cell(method, budget, task, right, key=str(len(made)), **more))
    return made, table.build(made) | {"skipped": list(skipped)}


def put(folder, name, found):
    made, built = found
    (folder / f"{name}.json").write_text(json.dumps(built))
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in made))


def known(folder):
    return SCRIPT["measured"](folder, MODEL, TASKS)


def lines(page):
    return [line for line in page.splitlines() if line.startswith("*Measured")]


def test_the_pages_are_up_to_date():
    for path, text in SCRIPT["pages"]().items():
        assert path.read_text() == text, f"{path.name}: run make docs"


def test_every_section_gets_its_rows_and_keeps_its_text(tmp_path):
    skipped = [{"method": "fastv:layer=1", "budget": 16, "reason": "layers before it"}]
    put(tmp_path, "sweep", swept([64], methods=["fastv:layer=1", "visionzip+fastv"],
                                 skipped=skipped))  # fmt: skip
    page = SCRIPT["with_verdicts"](PAGE, known(tmp_path))
    assert [line for line in page.splitlines() if line and not line.startswith("*Measured")] == [
        line for line in PAGE.splitlines() if line
    ]
    random, fastv, stack, topv = lines(page)
    assert random.startswith("*Measured:* 64 tokens: ") and "random" not in random
    assert fastv.startswith("*Measured* (`fastv:layer=1`): better than random at 64. 64 tokens: ")
    row = known(tmp_path).rows["fastv:layer=1", 64]
    assert f"{100 * row['score']:.1f} % (unpatched -" in fastv
    low, high = row["vs_random"]["ci"]
    assert f"random +{100 * row['vs_random']['diff']:.1f} [{100 * low:+.1f}, {100 * high:+.1f}]" \
        in fastv  # fmt: skip
    assert "downsample +" in fastv and stack.startswith("*Measured* (`visionzip+fastv`): better")
    assert topv == "*Measured:* not in a sweep."
    assert SCRIPT["with_verdicts"](page, known(tmp_path)) == page


def test_more_budgets_and_more_files_are_taken_up(tmp_path):
    put(tmp_path, "a", swept([64]))
    before = SCRIPT["with_verdicts"](PAGE, known(tmp_path))
    skipped = [{"method": "topv", "budget": 16, "reason": "layers before it"}]
    put(tmp_path, "b", swept([192, 64, 16], methods=["topv"], n=100, skipped=skipped))
    found = known(tmp_path)
    assert found.budgets == [192, 64, 16] and found.sources == ["a", "b"]
    # The table with more questions keeps its rows.
    assert found.rows["random", 64]["n"] == 400
    after = lines(SCRIPT["with_verdicts"](before, found))
    assert "better than random at 192, 64 and 16" in after[2]
    text = SCRIPT["results"](found)
    assert "100 to 200 test questions" in text and "| `topv` |" in text
    assert "| method | 192 tokens | 64 tokens | 16 tokens | 64: the hard questions |" in text
    fastv = next(line for line in text.splitlines() if line.startswith("| `fastv"))
    assert fastv.startswith("| `fastv:layer=1` | | ")  # not run at 192


def test_shares_of_slots_are_no_tokens(tmp_path):
    """Tables of methods on the KV cache, read again, stand apart from the others."""
    put(tmp_path, "tokens", swept([64]))
    made, table_ = swept([0.25, 0.1], methods=["h2o"], random="randomkv", protocol="again")
    put(tmp_path, "kv", (made, table_))
    both = known(tmp_path), SCRIPT["measured"](tmp_path, MODEL, TASKS, slots=True)
    assert [x.sources for x in both] == [["tokens"], ["kv"]]
    page = PAGE.replace("topv", "h2o")
    line = lines(SCRIPT["with_verdicts"](page, *both))[-1]
    assert line.startswith("*Measured:* better than random at 25 % and 10 %. 25 % of the slots: ")
    text = SCRIPT["on_cache"](both[1])
    assert "| method | 25 % of the slots | 10 % of the slots | verdict |" in text
    row = both[1].rows["h2o", 0.25]
    assert f"| `h2o` | {100 * row['score']:.1f} (" in text and "); 100 % |" in text


def test_other_models_styles_and_tasks_are_left_out(tmp_path):
    put(tmp_path, "plain", swept([64]))
    alone = known(tmp_path)
    about = swept([64])[0][0]["about"]
    put(tmp_path, "old", swept([32], about=about | {"weights_sha256": "1" * 64}))
    put(tmp_path, "dusk", swept([32], style="dusk"))
    put(tmp_path, "dev", swept([32], split="dev"))
    put(tmp_path, "outside", swept([32], tasks=["easy_vqa"]))
    (tmp_path / "speed.json").write_text('{"about": {}}')
    found = known(tmp_path)
    assert found.rows == alone.rows and found.sources == ["plain"]
    assert found.ignored == ["outside"]


def test_rows_of_another_version_of_a_method_are_left_out(tmp_path):
    """As a sweep runs them again; what it has run again counts."""
    put(tmp_path, "a", swept([64, 16], plan="fastv:layer=1:keep=64", params=[{"name": "fastv"}]))
    found = known(tmp_path)
    assert not found.rows and ("fastv:layer=1", 64) in found.outdated
    assert lines(SCRIPT["with_verdicts"](PAGE, found))[1] == (
        "*Measured:* not in a sweep since its parameters changed."
    )
    now = Plan.from_spec("fastv:layer=1:keep=64").to_dict()["stages"]
    put(tmp_path, "b", swept([64], plan="fastv:layer=1:keep=64", params=now))
    found = known(tmp_path)
    assert found.budgets == [64] and ("fastv:layer=1", 64) not in found.outdated
    text = " ".join(SCRIPT["results"](found).split())
    assert "changed since: `downsample`, `fastv:layer=1`, `random`." in text


def test_tasks_that_are_not_admitted_do_not_count(tmp_path):
    more = swept([64], tasks=[*TASKS, "count"])
    put(tmp_path, "more", more)
    row = known(tmp_path).rows["fastv:layer=1", 64]
    assert set(row["tasks"]) == set(TASKS)
    assert row["score"] == np.mean(
        [c["score"] for c in more[0] if c["method"] == "fastv:layer=1" and c["task"] != "count"]
    )
    assert row["vs_random"]["holds"]


def test_the_table_stands_between_its_marks(tmp_path):
    put(tmp_path, "sweep", swept([64], methods=["fastv", "topv"]))
    page = f"before\n\n{SCRIPT['OPEN']}\nstale\n{SCRIPT['CLOSE']}\n\nafter\n"
    made = SCRIPT["between_marks"](page, SCRIPT["results"](known(tmp_path)))
    assert made.startswith("before\n\n") and made.endswith("\n\nafter\n") and "stale" not in made
    assert SCRIPT["between_marks"](made, SCRIPT["results"](known(tmp_path))) == made
    rows = [line.split(" | ")[0] for line in made.splitlines() if line.startswith("| `")]
    best = sorted(["fastv", "topv"], key=lambda m: -known(tmp_path).rows[m, 64]["score"])
    assert rows[:4] == [f"| `{name}`" for name in ("random", "downsample", *best)]


def test_scores_are_those_of_the_present_model(tmp_path):
    assert SCRIPT["scores"](tmp_path, MODEL) == "Not measured on the present model."
    row = {"plan": "fastv:layer=1", "auc": 0.75, "n": 12, "tasks": {"color": 0.5, "needle": 1.0}}
    data = {"about": {"weights_sha256": MODEL}, "n": 8, "rows": [row]}
    (tmp_path / "score-auc.json").write_text(json.dumps(data))
    text = SCRIPT["scores"](tmp_path, MODEL)
    assert "| `fastv:layer=1` | 0.75 | 0.50 | 1.00 |" in text and "12 questions" in text
    assert SCRIPT["scores"](tmp_path, "1" * 64) == "Not measured on the present model."


@pytest.mark.parametrize(
    ("versus", "text"),
    [
        ({"verdict": "better", "holds": True}, "better than random at 64"),
        (
            {"verdict": "better", "holds": False},
            "better than random (before correction only) at 64",
        ),
        ({"verdict": "not better", "holds": False}, "not better than random at 64"),
        ({"verdict": "worse", "holds": True}, "worse than random at 64"),
        (None, ""),
    ],
)
def test_words_of_a_verdict(versus, text):
    found = SCRIPT["Measured"](rows={("m", 64): {"vs_random": versus}})
    assert SCRIPT["_verdict"]("m", found) == text
