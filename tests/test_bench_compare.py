"""What is said of rows together, of two result files, and drawn: from planted figures."""

from __future__ import annotations

import copy
import json
import sys

import pytest
from typer.testing import CliRunner

from mllm.cli import app
from mllm.errors import DataError
from mllm.eval import bench_plot
from mllm.eval.bench_compare import compare
from mllm.eval.bench_words import break_even, summed


def row(visual, ratio, half=0.02, plan="fastv", pairs=30, **more):
    """A row of prefills that take 1 second at 1,000 tokens without the plan."""
    plain = (visual + 24) / 1000
    return {
        "plan": plan, "batch": 1, "visual": visual, "text": 24, "unequal": False,
        "dtype": "float32", "backend": "sdpa", "pairs": pairs, "ratio": ratio,
        "ratio_ci": [ratio - half, ratio + half], "ideal": 2.0, "share": ratio / 2, "status": "ok",
        "saved_s": plain - plain / ratio, "baseline_s": plain, "patched_s": plain / ratio,
        "peak_bytes": 1, "words": "planted",
        "samples": [ratio + half * (i % 7 - 3) for i in range(pairs)], **more,
    }  # fmt: skip


def results(*rows, suite="prefill", **more):
    return {
        "schema": 1, "suite": suite, "model_shape": {"name": "tiny"}, "device": "a machine",
        "versions": {"torch": "2.13.0", "mllm": "1"}, "commit": "abc", "threads": 2, "sdpa": None,
        "load_before": 0.0, "rows": list(rows), **more,
    }  # fmt: skip


OOM = {k: v for k, v in row(9000, 1.0).items() if not k.startswith(("ratio", "samples"))} | {
    "status": "oom", "words": "out of memory",
}  # fmt: skip


# From which length a plan pays


def test_a_plan_pays_from_where_it_is_resolved_faster():
    """Slower at 176 tokens, open at 376, faster from 776 on: the line is between 176 and 776."""
    rows = [row(752, 1.25), row(152, 0.8), row(1552, 1.6), row(352, 1.01), OOM]
    (found,) = break_even(rows)
    assert found["lengths"] == [176, 376, 776, 1576] and found["between"] == [176, 776]
    lost, won = 0.176 / 0.8 - 0.176, 0.776 - 0.776 / 1.25
    assert found["tokens"] == pytest.approx(176 + 600 * lost / (lost + won), abs=0.1)
    assert found["status"] == "ok" and "straight line" in found["how"]
    assert "pays from 776 tokens on; at 176 it does not" in found["words"]


def test_a_plan_that_pays_at_a_shorter_length_too_is_not_said_to_lose_there():
    (found,) = break_even([row(100, 1.5), row(200, 0.8), row(300, 1.5)])
    assert found["between"] == [224, 324] and "below" not in found["words"]


@pytest.mark.parametrize(
    ("ratios", "pairs", "between", "status", "part"),
    [
        ([1.2, 1.5], 30, [None, 124], "ok", "pays at every measured length (124 to 224 tokens)"),
        ([1.0, 1.5], 30, [None, 224], "ok", "whether below is not resolved"),
        ([0.8, 0.9], 30, [224, None], "unresolved", "pays at none of the measured lengths"),
        ([1.5, 1.0], 30, [None, None], "unresolved", "not resolved"),
        ([0.8, 1.5], 29, [None, None], "unresolved", "not resolved"),
        ([0.8, 1.5], 30, [124, 224], "ok", "breaks even at about"),
    ],
)
def test_what_is_not_resolved_says_so(ratios, pairs, between, status, part):
    rows = [row(100 * i, ratio, pairs=pairs) for i, ratio in enumerate(ratios, 1)]
    (found,) = break_even(rows)
    assert (found["between"], found["status"]) == (between, status) and part in found["words"]
    assert (found["tokens"] is None) == (None in between)


def test_plans_and_batches_have_their_own_lengths():
    rows = [row(100, 1.5), row(200, 0.5, plan="dart"), row(200, 1.5), row(100, 0.5) | {"batch": 4}]
    assert [(x["plan"], x["batch"], x["lengths"]) for x in break_even(rows)] == [
        ("fastv", 1, [124, 224]), ("dart", 1, [224]), ("fastv", 4, [124]),
    ]  # fmt: skip


def test_no_real_speed_up_is_said_in_words():
    slow = summed(results(row(100, 0.8), row(200, 1.0), OOM))["words"]
    assert slow[0] == (
        "No real speed-up: of 2 rows none is resolved faster than unpatched (1 slower, 1 not "
        "resolved)."
    )
    assert slow[1] == "Out of memory: 1 of 3 rows."
    few = summed(results(row(100, 3.0, pairs=5)))["words"]
    assert few[0].startswith("No real speed-up"), "five pairs resolve nothing"
    fast = summed(results(row(100, 1.5), row(200, 0.8)))["words"]
    assert fast[0].startswith("Of 2 rows resolved faster than unpatched: 1; slower: 1")


# Two files


def changed(a, b):
    return compare(results(a), results(b))["rows"][0]


@pytest.mark.parametrize(
    ("before", "after", "verdict", "part"),
    [
        (1.5, 1.8, "better", "resolved faster: 1.20x"),
        (1.8, 1.5, "worse", "resolved slower: 0.83x"),
        (1.5, 1.501, "not resolved", "not resolved: 1.00x"),
    ],
)
@pytest.mark.parametrize("samples", [True, False])
def test_rows_are_compared_in_pairs(before, after, verdict, part, samples):
    a, b = row(100, before), row(100, after)
    if not samples:  # files of older versions have intervals alone
        del b["samples"]
    found = changed(a, b)
    assert found["verdict"] == verdict and found["words"].startswith(part)
    low, high = found["change_ci"]
    assert low < found["change"] < high and found["change"] == pytest.approx(after / before)
    assert ("bootstrap" in found["how"]) == samples


def test_few_pairs_resolve_nothing():
    found = changed(row(100, 1.5), row(100, 3.0, pairs=29))
    assert found["verdict"] == "not resolved" and "29 pairs are too few" in found["words"]


def test_the_cost_of_choosing_is_better_when_smaller():
    a, b = ({k: v for k, v in row(100, x).items() if not k.startswith("ratio")}
            | {"cost": x, "cost_ci": [x - 0.01, x + 0.01]} for x in (0.5, 0.2))  # fmt: skip
    found = compare(results(a, suite="selection"), results(b, suite="selection"))["rows"][0]
    assert found["verdict"] == "better" and "cheaper: -30.0 points" in found["words"]


def test_times_alone_are_compared_on_equal_machines():
    kernel = row(64, 1.0, plan="compact") | {"ratio": None, "ratio_ci": None, "torch_s": 2.0,
                                             "torch_s_ci": [1.9, 2.1], "samples": [2.0] * 30}
    fast = kernel | {"torch_s": 1.0, "samples": [1.0] * 30}
    a, b = (results(x, suite="kernels") for x in (kernel, fast))
    assert compare(a, b)["rows"][0]["words"].startswith("resolved faster: 0.50x (0.50 to 0.50)")
    for other in ({"device": "another"}, {"versions": {"torch": "2.14.0", "mllm": "1"}}):
        found = compare(a, b | other)
        assert found["rows"][0]["verdict"] == "not compared"
        assert found["words"][-1] == "No row can be compared."
        assert found["differ"] and found["words"][0].startswith("The two runs differ in: ")


def test_what_differs_and_what_only_one_has():
    a = results(row(100, 1.5), row(100, 1.6), row(300, 1.5), OOM)
    b = results(row(100, 1.5), row(100, 1.9), row(400, 1.5), OOM, threads=1, commit="def")
    found = compare(a, b)
    assert [d["what"] for d in found["differ"]] == ["threads", "commit"]
    assert [r["verdict"] for r in found["rows"]] == ["not resolved", "better", "not compared"]
    assert "out of memory" in found["rows"][2]["words"]
    assert found["only_a"] == ["fastv, float32, 300 visual tokens, batch 1"]
    assert "resolved better in B: 1, worse: 0, not resolved: 1" in found["words"][1]
    same = compare(a, copy.deepcopy(a))["words"]
    assert "Nothing is resolved better in B." in same and "the same" in same[0]
    with pytest.raises(DataError, match="suites differ"):
        compare(a, results(suite="kv"))


def test_the_command_compares(tmp_path):
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, ratio in zip(files, (1.5, 1.8), strict=True):
        file.write_text(json.dumps(results(row(100, ratio))))
    words = ["bench", "--compare", *map(str, files)]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0 and "resolved faster: 1.20x" in " ".join(shown.stdout.split())
    data = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)["data"]
    assert data["rows"][0]["verdict"] == "better"
    CliRunner().invoke(app, [*words, "--output", str(tmp_path / "changes.json")])
    assert json.loads((tmp_path / "changes.json").read_text()) == data
    files[1].write_text("[]")
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2 and "b.json is no result file" in refused.stderr


# A picture


@pytest.mark.parametrize("name", ["rows.svg", "rows.png"])
def test_rows_are_drawn(tmp_path, name):
    pytest.importorskip("matplotlib")
    share = {"ratio": None, "ratio_ci": None, "share_ci": [0.4, 0.6]}
    made = results(row(100, 1.5), row(200, 0.8), OOM, row(64, 1.0, plan="compact") | share)
    path = bench_plot.plot(made, tmp_path / name)
    assert list(tmp_path.iterdir()) == [path] and path.stat().st_size > 2000
    assert [bench_plot.figure_of(r) for r in made["rows"]] == ["ratio", "ratio", None, "share"]


def test_a_picture_that_cannot_be_made_is_refused_before_the_work(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="rows.pdf is no picture"):
        bench_plot.check("rows.pdf")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = CliRunner().invoke(app, ["bench", "--plot", str(tmp_path / "rows.svg")])
    assert result.exit_code == 2 and "matplotlib" in result.stderr
