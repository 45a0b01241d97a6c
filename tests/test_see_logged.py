"""Folders of `mllm eval` as cells, and two runs compared."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_eval_table import cell

from mllm.errors import DataError
from mllm.eval import compare, logged, table
from mllm.plan import Plan

ABOUT = {
    "weights_sha256": "0" * 64, "dtype": "float32", "backend": "sdpa", "device": "cpu",
    "threads": 1, "versions": {"mllm": "0"}, "commit": None,
}  # fmt: skip


def logged_run(folder, spec, right, task="gqa", *, stamp="20260101_000000", visual=64.0, **more):
    """What `mllm eval -o` writes for one plan and task."""
    plan = Plan.from_spec(spec) if spec else Plan([])
    folder.mkdir(parents=True, exist_ok=True)
    about = {"plan": plan.to_dict(), "plan_sha256": plan.sha256, "seed": 0, "n": len(right)}
    results = {
        "mllm": about | ABOUT | more,
        "results": {task: {"alias": task, "exact_match,none": 0.5, "exact_match_stderr,none": 0.1}},
        "configs": {task: {"test_split": "val"}},
    }
    (folder / f"{stamp}_results.json").write_text(json.dumps(results))
    costs = {"kept_llm": 64, "visual_in": 576, "visual_avg": visual, "prefill_flops": 1e9,
             "kv_bytes": 1024, "ttft_s": 0.5, "decode_s": 0.1, "batch": 1}  # fmt: skip
    lines = [
        json.dumps({
            "doc_id": i, "doc": {"question": f"what {i}?"}, "target": "cat", "mllm": costs,
            "filtered_resps": ["Cat." if value else "dog"], "exact_match": float(value),
        })
        for i, value in enumerate(right)
    ]  # fmt: skip
    # Several processes may log in any order.
    (folder / f"{stamp}_samples_{task}.jsonl").write_text("\n".join(lines[::-1]) + "\n")
    return lines


def test_a_folder_becomes_cells(tmp_path):
    logged_run(tmp_path / "a", "", [1, 1, 1, 0], visual=576.0)
    logged_run(tmp_path / "b", "visionzip:keep=64", [0, 0, 0, 0], stamp="20250101_000000")
    logged_run(tmp_path / "b", "visionzip:keep=64", [1, 0, 1, 1])  # the newer run counts
    logged_run(tmp_path / "c", "random:keep=64", [0, 0, 1, 0])
    found = logged.read(tmp_path)
    cells = {cell["method"]: cell for cell in found.cells}
    assert cells.keys() == {"unpatched", "visionzip", "random"}
    assert cells["visionzip"]["outcomes"] == "1011"
    assert cells["visionzip"]["answers"] == ["cat", "dog", "cat", "cat"]
    assert (cells["visionzip"]["budget"], cells["visionzip"]["split"]) == (64, "val")
    assert cells["visionzip"]["prefill_s"]["median"] == 0.5
    assert found.doc(cells["visionzip"], 1) == ("what 1?", "cat")
    rows = {row["method"]: row for row in table.build(found.cells)["rows"]}
    assert rows["visionzip"]["vs_random"]["diff"] == 0.5


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("fastv:layer=2:keep=0.25", ("fastv:layer=2", 99)),
        ("visionzip:keep=24+fastv:layer=2:keep=13", ("visionzip+fastv:layer=2", 99)),
        ("snapkv:budget=0.25", ("snapkv", 0.25)),
    ],
)
def test_a_plan_is_named_without_its_budget(spec, name):
    found = logged.named(Plan.from_spec(spec), 99.4)
    assert (found["method"], found["budget"]) == name and found["plan"] == spec


def test_samples_that_a_run_has_lost_are_left_out_of_all(tmp_path):
    logged_run(tmp_path / "a", "", [1, 1, 0, 1])
    lines = logged_run(tmp_path / "b", "visionzip:keep=64", [1, 0, 0, 1])
    path = next((tmp_path / "b").glob("*samples*"))
    path.write_text("\n".join([*lines[:3], lines[3][:60]]))  # killed while it wrote the last
    found = logged.read(tmp_path)
    assert found.damaged == 1
    assert {c["method"]: c["outcomes"] for c in found.cells} == {
        "unpatched": "110", "visionzip": "100"
    }  # fmt: skip
    assert found.cells[0]["data"] == found.cells[1]["data"]


def test_graded_answers_are_left_out_and_said(tmp_path):
    logged_run(tmp_path, "", [1, 0.3])
    with pytest.raises(DataError, match="no results"):
        logged.read(tmp_path)
    logged_run(tmp_path / "b", "", [1, 0], task="pope")
    found = logged.read(tmp_path)
    assert found.graded == ["gqa"] and [c["task"] for c in found.cells] == ["pope"]


def test_a_plan_without_costs_is_left_out_and_said(tmp_path):
    """Tasks that score given answers log none."""
    logged_run(tmp_path / "a", "", [1, 1])
    lines = logged_run(tmp_path / "b", "visionzip:keep=32", [1, 0])
    bare = [json.dumps(json.loads(line) | {"mllm": None}) for line in lines]
    next((tmp_path / "b").glob("*samples*")).write_text("\n".join(bare) + "\n")
    found = logged.read(tmp_path)
    assert found.costless == ["visionzip:keep=32"]
    assert [c["method"] for c in found.cells] == ["unpatched"]


def test_of_a_plans_runs_the_one_that_asked_most_counts(tmp_path):
    for name, spec in (("a", ""), ("b", "visionzip:keep=64")):
        logged_run(tmp_path / name, spec, [1, 0, 1])
    logged_run(tmp_path / "b", "visionzip:keep=64", [0], stamp="20270101_000000")  # --limit 1
    found = logged.read(tmp_path)
    assert {c["method"]: c["outcomes"] for c in found.cells} == {
        "unpatched": "101", "visionzip": "101"
    }  # fmt: skip


def test_a_plan_has_one_budget_for_all_tasks(tmp_path):
    """Also where pictures of other sizes give another average, and commands asked one task each."""
    for stamp, task, visual in (("1", "gqa", 63.0), ("2", "pope", 66.0)):
        for name, spec in (("a", ""), ("b", "fastv:keep=0.5")):
            logged_run(tmp_path / name, spec, [1, 0], task, stamp=stamp, visual=visual)
    built = table.build(logged.read(tmp_path).cells)
    assert [(row["method"], row["budget"]) for row in built["rows"]] == [
        ("unpatched", None), ("fastv", 64)
    ]  # fmt: skip
    assert built["missing"] == []


def test_plans_of_one_name_are_told_apart(tmp_path):
    """Two trainings of one plan, and a plan that keeps as much."""
    logged_run(tmp_path / "a", "", [1, 1])
    logged_run(tmp_path / "b", "tokenflex:keep=64", [1, 0], adapter_sha256="a" * 64)
    logged_run(
        tmp_path / "b", "tokenflex:keep=64", [0, 0], adapter_sha256="b" * 64, stamp="20270101_0"
    )
    logged_run(tmp_path / "c", "tokenflex:keep=144", [0, 1], adapter_sha256="a" * 64)
    found = {c["method"]: (c["budget"], c["outcomes"]) for c in logged.read(tmp_path).cells}
    assert found == {
        "unpatched": (None, "11"), "tokenflex": (64, "10"),
        "tokenflex:keep=64 (bbbbbbbb)": (64, "00"), "tokenflex:keep=144": (64, "01"),
    }  # fmt: skip


def test_files_of_the_tasks_themselves_are_no_results(tmp_path):
    """MMBench writes `mmbench_en_dev_results.json` for its server."""
    logged_run(tmp_path / "a", "", [1, 0])
    own = tmp_path / "a" / "20260101_000000_more" / "submissions"
    own.mkdir(parents=True)
    (own / "mmbench_en_dev_results.json").write_text('{"overall_acc": 0.5}')
    assert [c["outcomes"] for c in logged.read(tmp_path).cells] == ["10"]


def test_of_several_filters_the_first_counts(tmp_path):
    lines = logged_run(tmp_path, "", [1, 1, 0])
    again = [json.dumps(json.loads(line) | {"exact_match": 0.0}) for line in lines]
    next(tmp_path.glob("*samples*")).write_text("\n".join([*lines, *again]) + "\n")
    (found,) = logged.read(tmp_path).cells
    assert (found["n"], found["outcomes"]) == (3, "110")


@pytest.mark.parametrize("content", ["", "{", "{}", '{"mllm": {"plan": {}}}', "[1]"])
def test_a_folder_of_another_version_is_refused(tmp_path, content):
    (tmp_path / "x_results.json").write_text(content)
    with pytest.raises(DataError, match="x_results.json") as caught:
        logged.read(tmp_path)
    assert caught.value.argument == "results"


def test_a_folder_of_another_schema_is_refused(tmp_path):
    logged_run(tmp_path / "a", "", [1, 0])
    (tmp_path / "evaluation.json").write_text('{"schema": 1}')
    assert logged.read(tmp_path).cells
    (tmp_path / "evaluation.json").write_text('{"schema": 2}')
    with pytest.raises(DataError, match="schema 2"):
        logged.read(tmp_path)


# Comparison


def runs(drop=0.0, n=600, seeds=1):
    """Two runs: visionzip is planted to lose in the second one, random does not change."""
    rng = np.random.default_rng(3)
    made = ([], [])
    for task in ("color", "ocr"):
        for method, budget, chance, count in (
            ("unpatched", None, 0.95, 1), ("random", 64, 0.5, seeds), ("visionzip", 64, 0.8, 1)
        ):  # fmt: skip
            for seed in range(count):
                right = rng.random(n) < chance
                for side in (0, 1):
                    kept = right & (rng.random(n) >= drop * side * (method == "visionzip"))
                    made[side].append(cell(method, budget, task, kept, seed=seed))
    return made


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_planted_loss_is_found_and_nothing_else(seeds):
    made = compare.build(*runs(0.1, seeds=seeds), ("old", "new"))
    rows = {row["method"]: row for row in made["rows"]}
    worse = rows["visionzip"]
    assert worse["verdict"] == "worse" and worse["holds"] and worse["diff"] < 0
    assert worse["diff"] == pytest.approx(worse["scores"][1] - worse["scores"][0])
    assert worse["lost"] > 0 == worse["gained"] and worse["n"] == 1200
    for name in ("unpatched", "random"):
        assert (rows[name]["diff"], rows[name]["verdict"]) == (0.0, "not better")
    assert "new is worse than old under visionzip at 64" in made["words"][0]
    text = compare.markdown(made)
    assert "| `visionzip` | 64 |" in text and "worse" in text
    lines = compare.comma_separated(made).splitlines()
    assert len(lines) == 1 + 3 * 3 and lines[0].startswith("method,budget,task")


def test_equal_runs_are_said_to_be_equal():
    made = compare.build(*runs(), ("old", "new"))
    assert "Every question has the same outcome in both." in made["words"][0]
    assert made["differs"] == [] and not any(row["holds"] for row in made["rows"])


def test_what_differs_is_listed_and_what_cannot_be_compared_is_not():
    first, second = runs()
    for one in first:  # from before chat templates were told
        one["about"] |= {"processor_sha256": "0" * 64}
    second.append(cell("new", 64, "color", [1] * 600))
    for one in second:
        one["about"] |= {"dtype": "bfloat16", "versions": {"mllm": "1"}}
        one["about"] |= {"processor_sha256": "1" * 64, "template_sha256": "2" * 64}
        one["flops"] = 2e9
        if one["task"] == "ocr":
            one["data"] = "scenes 9"
    made = compare.build(first, second, ("old", "new"))
    differs = {name: (a, b) for name, a, b in made["differs"]}
    assert differs["dtype"] == ("float32", "bfloat16") and differs["mllm"] == ("0", "1")
    assert differs["processor"] == ("0" * 12, "1" * 12)
    assert not {"chat template", "template_sha256", "processor_sha256"} & differs.keys()
    assert made["tasks"] == ["color"] and "scenes 9" in made["apart"]["ocr"]
    assert made["only"] == [("new", "new at 64")]
    assert "Prefill FLOPs: new has 2.00 times what old has." in made["words"]


def test_what_is_unfinished_or_left_out_is_said():
    first, second = runs()
    second = [c for c in second if (c["method"], c["task"]) != ("visionzip", "ocr")]
    second.append(cell("late", 64, "ocr", [1, 0]))
    made = compare.build(first, second, ("old", "new"))
    assert [row["method"] for row in made["rows"]] == ["unpatched", "random"]
    assert "Not finished, and so not compared: visionzip at 64 in new." in made["words"]
    assert any(text.startswith("1 cell with fewer questions") for text in made["words"])


def test_a_run_of_fewer_questions_is_compared_on_those():
    first, second = runs(n=600)[0], runs(n=600)[1]
    for one in second:
        one |= {"n": 100, "outcomes": one["outcomes"][:100]}
    made = compare.build(first, second, ("old", "new"))
    assert {row["n"] for row in made["rows"]} == {200}
    assert all(row["diff"] == 0 for row in made["rows"])


@pytest.mark.parametrize("task", ["gqa", "yardstick_color"])
def test_questions_are_paired_by_their_number(tmp_path, task):
    """One run has lost its second sample, the other asked less: 0, 2 and 3 are in both."""
    right = [1, 1, 0, 0, 1, 1]
    lines = logged_run(tmp_path / "old", "", right, task)
    path = next((tmp_path / "old").glob("*samples*"))
    path.write_text("\n".join([lines[0], lines[1][:60], *lines[2:]]) + "\n")
    logged_run(tmp_path / "new", "", [1, 1, 0, 1], task)
    cells = [logged.read(tmp_path / name).cells for name in ("old", "new")]
    made = compare.build(*cells, ("old", "new"))
    (row,) = made["rows"]
    assert (row["n"], row["gained"], row["lost"], row["same"]) == (3, 1, 0, pytest.approx(2 / 3))
    assert ("questions per task", 5, 4) in made["differs"]
    _, (won,), _ = compare.flips(*cells, made["tasks"], 5)
    assert won.changed[0]["ids"][won.index] == won.first["ids"][won.index] == 3
    assert logged.Logged().doc(won.changed[0], won.index) == ("what 3?", "cat")


def test_other_documents_of_a_public_task_are_not_compared(tmp_path):
    logged_run(tmp_path / "old", "", [1, 1, 0])
    lines = logged_run(tmp_path / "new", "", [1, 1])
    other = [json.dumps(json.loads(line) | {"target": "dog"}) for line in lines]
    next((tmp_path / "new").glob("*samples*")).write_text("\n".join(other) + "\n")
    cells = [logged.read(tmp_path / name).cells for name in ("old", "new")]
    with pytest.raises(DataError, match="gqa: other questions: data"):
        compare.build(*cells, ("old", "new"))


def test_nothing_in_common_is_one_error():
    with pytest.raises(DataError, match="nothing to compare") as caught:
        compare.build([cell("a", 64, "x", [1])], [cell("a", 64, "y", [1])], ("old", "new"))
    assert caught.value.argument == "against"


def test_questions_that_changed_come_from_all_rows():
    first, second = runs(0.2)
    lost, won, counts = compare.flips(first, second, ["color", "ocr"], 5)
    assert len(lost) == 5 and not won and counts[False] == 0 < counts[True]
    assert {found.task for found in lost} == {"color", "ocr"}
    for found in lost:
        assert found.first["outcomes"][found.index] == "1"
        assert found.changed[0]["outcomes"][found.index] == "0"
