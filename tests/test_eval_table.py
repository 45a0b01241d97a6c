"""The table of a sweep and its words: planted methods, several seeds, incomplete sweeps."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from mllm.errors import DataError
from mllm.eval import cells, stats, table

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
N = 500


def cell(method, budget, task, right, *, seed=0, answers=None, **more):
    """A cell with the outcomes `right`, as a sweep writes it."""
    outcomes = "".join("01"[bool(value)] for value in right)
    n, correct = len(outcomes), outcomes.count("1")
    made = {
        "method": method, "budget": budget, "task": task, "seed": seed, "split": "test",
        "plan": f"{method}:keep={budget}", "n": n, "correct": correct, "score": correct / n,
        "ci": list(stats.wilson(correct, n)), "outcomes": outcomes, "visual_avg": 64.0,
        "kept_llm": 64.0, "flops": 1e9, "kv_bytes": 1024, "prefill_s": None,
        "about": {"versions": {"mllm": "0"}, "dtype": "float32", "backend": "sdpa",
                  "device": "cpu", "threads": 1, "weights_sha256": "0" * 64, "commit": None},
    }  # fmt: skip
    return made | ({} if answers is None else {"answers": answers}) | more


def planted(seeds, *, useless=8, points=8, n=N):
    """Cells of two tasks: random with some seeds, useless ones, a good and a bad one."""
    rng = np.random.default_rng(2)
    cells = []
    for task in ("color", "ocr"):
        easy = rng.beta(4, 3, n) * 0.9

        def drawn(method, chances, seed=0, budget=64, task=task):
            cells.append(cell(method, budget, task, rng.random(n) < chances, seed=seed))

        drawn("unpatched", np.full(n, 0.95), budget=None)
        for seed in range(seeds):
            drawn("random", easy, seed)
        drawn("downsample", easy - 0.2)
        for index in range(useless):
            drawn(f"useless{index}", easy)
        drawn("good", easy + points / 100)
        drawn("bad", easy - points / 100)
    return cells


def rows_of(built):
    return {row["method"]: row for row in built["rows"]}


@pytest.mark.parametrize("seeds", [1, 3])
def test_planted_methods_are_called_what_they_are(seeds):
    built = table.build(planted(seeds))
    rows = rows_of(built)
    for name, row in rows.items():
        if name.startswith("useless"):
            # One by one, some are resolved by chance; none may survive the correction.
            assert not row["vs_random"]["holds"], name
            assert row["verdict"].startswith("not better than random;") or (
                "before correction only" in row["verdict"]
            )
    assert sum(r["verdict"].startswith("not better than random;") for r in rows.values()) >= 6
    assert rows["good"]["verdict"].startswith("better than random; better than downsample; loses")
    assert rows["bad"]["verdict"].startswith("worse than random; better than downsample; loses")
    assert rows["good"]["vs_random"]["holds"] and rows["bad"]["vs_random"]["holds"]
    assert rows["good"]["vs_random"]["seeds"] == [1, seeds]
    assert rows["random"]["seeds"] == list(range(seeds))


def test_random_under_another_seed_is_not_better_than_random():
    rng = np.random.default_rng(3)
    chances = rng.beta(4, 3, N)
    cells = [cell("random", 64, "ocr", rng.random(N) < chances, seed=seed) for seed in (0, 1)]
    cells.append(cell("again", 64, "ocr", rng.random(N) < chances, seed=7))
    (said,) = {row["verdict"] for row in table.build(cells)["rows"] if row["method"] == "again"}
    assert said.startswith("not better than random; not compared with downsample")


def test_seeds_become_one_row():
    right = [[1] * 60 + [0] * 40, [1] * 80 + [0] * 20, [1] * 70 + [0] * 30]
    cells = [cell("random", 8, "ocr", bits, seed=seed) for seed, bits in enumerate(right)]
    cells.append(cell("good", 8, "ocr", [1] * 100))
    rows = rows_of(table.build(cells))
    assert rows["random"]["score"] == pytest.approx(0.7)
    assert rows["random"]["spread"] == pytest.approx(0.1)
    assert rows["good"]["vs_random"]["diff"] == pytest.approx(0.3)
    assert rows["good"]["spread"] is None and rows["good"]["vs_random"]["p_mid"] is None
    built = table.build(cells)
    assert "| random | 8 | 3 (± 10.0) |" in table.markdown(built)
    assert any("Random was run with 3 seeds." in text for text in built["words"])
    assert any(
        "normal p where a side has several seeds" in note for note in [table.markdown(built)]
    )


def test_unpatched_without_loss_is_said_with_its_interval():
    right = [1] * 90 + [0] * 10
    cells = [
        cell("unpatched", None, "ocr", right),
        cell("random", 8, "ocr", [0] * 50 + [1] * 50),
        cell("same", 8, "ocr", right[:-1] + [1]),
    ]
    said = rows_of(table.build(cells))["same"]["verdict"]
    assert "loses nothing that can be resolved against unpatched (+1.0 [" in said


def test_what_correction_takes_away_is_said():
    """Seventeen gained and six lost: p is 0.035 alone, but the family has four of them."""
    random = [1] * 6 + [0] * 94
    weak = [0] * 6 + [1] * 17 + [0] * 77
    cells = [cell("random", 8, "ocr", random), cell("weak", 8, "ocr", weak)]
    cells += [cell(f"same{i}", 8, "ocr", random) for i in range(3)]
    built = table.build(cells)
    row = rows_of(built)["weak"]
    assert row["vs_random"]["p"] == pytest.approx(0.0347, abs=1e-4)
    assert row["vs_random"]["p_holm"] == pytest.approx(4 * row["vs_random"]["p"])
    assert row["verdict"].startswith("better than random, before correction only;")
    chance = next(text for text in built["words"] if "expected" in text)
    assert "sanity rows included, 4 in all." in chance
    assert "0.2 of them would be expected" in chance and "these do not: weak at 8" in chance
    assert "11.0 △" not in table.markdown(built) and "17.0 △" in table.markdown(built)


def test_families_are_those_of_the_baseline_and_the_level():
    built = table.build(planted(1))
    rows = [row for row in built["rows"] if row["vs_random"]]
    assert built["comparisons"]["vs_random"] == {"all": len(rows), "tasks": 2 * len(rows)}
    expected = stats.holm([row["vs_random"]["p"] for row in rows])
    assert [row["vs_random"]["p_holm"] for row in rows] == expected
    singles = [f["vs_random"] for row in rows for f in row["tasks"].values()]
    assert [f["p_holm"] for f in singles] == stats.holm([f["p"] for f in singles])


def test_loyalty_counts_texts_not_correctness():
    answers = ["red"] * 30 + ["blue"] * 10
    cells = [
        cell("unpatched", None, "color", [1] * 40, answers=answers),
        cell("random", 8, "color", [1] * 40, answers=["red"] * 40),
        cell("old", 8, "color", [1] * 40),
    ]
    built = table.build(cells)
    rows = rows_of(built)
    assert rows["random"]["loyalty"]["share"] == 0.75 and rows["random"]["loyalty"]["n"] == 40
    low, high = rows["random"]["loyalty"]["ci"]
    assert (low, high) == pytest.approx(stats.wilson(30, 40))
    assert rows["old"]["loyalty"] is None and rows["unpatched"]["loyalty"] is None
    assert "| random | 8 | 1 | – | 75.0 (" in table.markdown(built)
    assert "the cells hold no answers" not in table.markdown(built)


def test_cells_without_answers_say_so():
    built = table.build(planted(1))
    assert all(row["loyalty"] is None for row in built["rows"])
    assert "Same answers are not known: the cells hold no answers." in table.markdown(built)


def test_difficult_questions_are_those_of_the_budget():
    cells = [
        cell("unpatched", None, "ocr", [1] * 60 + [0] * 40),
        cell("downsample", 8, "ocr", [0] * 30 + [1] * 70),
        cell("downsample", 4, "ocr", [0] * 10 + [1] * 90),
        cell("good", 8, "ocr", [1] * 24 + [0] * 76),
        cell("good", 4, "ocr", [1] * 100),
    ]
    built = table.build(cells)
    found = {(row["method"], row["budget"]): row["difficult"] for row in built["rows"]}
    assert found["good", 8]["n"] == 30 and found["good", 8]["score"] == pytest.approx(0.8)
    assert found["good", 8]["ci"] == pytest.approx(list(stats.wilson(24, 30)))
    assert found["good", 4] == {"n": 10, "score": None, "ci": None}
    assert found["unpatched", None] is None and found["downsample", 8] is None
    text = table.markdown(built)
    assert "80.0 (62.7–90.5) of 30" in text and "too few (10)" in text
    assert "downsample has 0 and unpatched 100 there" in text


def test_an_unfinished_sweep_says_what_is_missing():
    cells = [c for c in planted(2, useless=1) if c["method"] != "good" or c["task"] != "ocr"]
    cells = [c for c in cells if (c["method"], c["task"], c["seed"]) != ("random", "color", 1)]
    built = table.build(cells)
    assert "good" not in rows_of(built) and rows_of(built)["random"]["seeds"] == [0]
    assert sorted(built["missing"], key=lambda run: run["method"]) == [
        {"method": "good", "budget": 64, "seed": 0, "tasks": ["ocr"]},
        {"method": "random", "budget": 64, "seed": 1, "tasks": ["color"]},
    ]
    assert any("good at 64 (seed 0: no ocr)" in text for text in built["words"])
    assert "Not finished" in table.markdown(built)


@pytest.mark.parametrize("absent", ["random", "downsample", "unpatched"])
def test_a_missing_baseline_is_named(absent):
    cells = [c for c in planted(1, useless=1) if c["method"] != absent]
    built = table.build(cells)
    assert f"not compared with {absent}, which is missing" in rows_of(built)["good"]["verdict"]
    table.markdown(built), table.comma_separated(built)


def test_nothing_finished_is_no_crash():
    cells = [cell("random", 8, "ocr", [1, 0]), cell("unpatched", None, "color", [1, 0])]
    built = table.build(cells)
    assert built["rows"] == [] and len(built["missing"]) == 2
    assert "random at 8 (seed 0: no color)" in table.markdown(built)
    assert table.comma_separated(built).count("\n") == 1


def test_smaller_runs_of_a_task_are_left_out():
    cells = [cell("random", 8, "ocr", [1, 0]), *planted(1, useless=0)]
    built = table.build(cells)
    assert built["left_out"] == 1 and built["n"] == N
    assert any("1 cell with fewer questions" in text for text in built["words"])


def test_what_cannot_be_compared_is_not_mixed():
    about = cell("random", 8, "ocr", [1])["about"]
    others = [{"split": "dev"}, {"style": "sketch"}, {"data": "scenes 2"}, {"protocol": "again"}]
    others += [{"about": about | {name: "1" * 64}} for name in ("weights_sha256", "backend")]
    for other in others:
        cells = [cell("random", 8, "ocr", [1]), cell("stride", 8, "ocr", [1], **other)]
        with pytest.raises(DataError, match="'ocr' cannot be compared"):
            table.build(cells)
    of_other_task = cell("random", 8, "color", [1], **others[-1])
    assert table.build([cell("random", 8, "ocr", [1]), of_other_task])["rows"]
    with pytest.raises(DataError, match="at least one cell"):
        table.build([])


def test_tasks_may_have_other_numbers_of_questions():
    cells = [
        cell(name, 8, task, [1] * n)
        for name in ("random", "good")
        for task, n in (("ocr", 40), ("color", 30))
    ]
    built = table.build(cells)
    assert {row["n"] for row in built["rows"]} == {70} and built["left_out"] == 0
    assert "2 tasks, 30 to 40 questions each" in table.markdown(built)


def test_one_token_and_all_slots_are_two_budgets():
    cells = [cell(name, 1, "ocr", [1, 0] * 20) for name in ("random", "good")]
    cells += [cell(name, 1.0, "ocr", [1, 0] * 20) for name in ("randomkv", "held")]
    first, second = (text for text in table.build(cells)["words"] if text.startswith("At "))
    assert first.startswith("At 1 tokens, over all tasks, good (") and "held" not in first
    assert second.startswith("At 1.0 of the slots, over all tasks, held (")


def test_csv_and_json_hold_the_statistics():
    built = table.build(planted(3, useless=1))
    lines = list(csv.DictReader(io.StringIO(table.comma_separated(built))))
    assert len(lines) == 3 * len(built["rows"])
    good = next(x for x in lines if (x["method"], x["task"]) == ("good", "all"))
    row = rows_of(built)["good"]
    assert float(good["vs_random_p_holm"]) == row["vs_random"]["p_holm"]
    assert float(good["difficult"]) == row["difficult"]["score"]
    assert good["verdict"] == row["verdict"] and good["loyalty"] == ""
    random = next(x for x in lines if x["method"] == "random")
    assert (random["seeds"], random["vs_random"]) == ("3", "")
    assert float(random["spread"]) == rows_of(built)["random"]["spread"]
    assert json.loads(json.dumps(built)) == built


def test_the_committed_results_are_still_read():
    """Cells without answers, and tables whose figures have not changed since."""
    built = table.build(cells.read(RESULTS / "yardstick-v1.jsonl").rows)
    before = json.loads((RESULTS / "yardstick-v1.json").read_text())
    names = [(row["method"], row["budget"]) for row in built["rows"]]
    assert sorted(names, key=str) == sorted(
        ((row["method"], row["budget"]) for row in before["rows"]), key=str
    )
    old = {(row["method"], row["budget"]): row for row in before["rows"]}
    for row in built["rows"]:
        was = old[row["method"], row["budget"]]
        assert row["score"] == was["score"] and row["ci"] == pytest.approx(was["ci"])
        if row["vs_random"]:
            assert row["vs_random"]["diff"] == pytest.approx(was["vs_random"]["diff"])
            assert row["vs_random"]["ci"] == pytest.approx(was["vs_random"]["ci"], abs=0.002)
