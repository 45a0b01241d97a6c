"""What choosing costs, on a shape of a few thousand weights: what is compared, never how fast."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from test_bench import TINY, TINY_QWEN

import mllm
from mllm.cli import app
from mllm.errors import PlanError
from mllm.eval import bench, bench_selection, bench_shapes
from mllm.eval.bench_selection import every_method, free_choice, judge, selection

OPTIONS = dict(text=9, pairs=2, dtype="float32")


@pytest.fixture(scope="module")
def model():
    return TINY.build(torch.float32, "cpu")


@pytest.mark.parametrize(
    "plan, visual",
    [
        ("divprune:keep=5", 32),  # two images of a sample
        ("fastv:layer=2:keep=0.5", 16),
        ("pyramiddrop:keep=9/5/2", 32),
        ("vscan:keep=6:window=2", 16),
        ("vtw:layer=2", 16),
        ("avgpool:keep=5", 16),
        ("prumerge:neighbours=3", 32),  # as many as the picture says
    ],
)
@torch.inference_mode()
def test_the_free_choice_leaves_as_many(model, plan, visual):
    """In every layer and sample, and reads nothing."""
    inputs = bench.random_inputs(model, visual=visual, text=9, batch=3, unequal=True)
    with mllm.patch(bench.twin(model), plan) as patched:
        patched.model(**inputs, logits_to_keep=1)
        want, positions = patched.ledger.as_dict(), bench_selection.positions_of(patched)
    with mllm.patch(bench.twin(model), free_choice(want, positions)) as patched:
        patched.model(**inputs, logits_to_keep=1)
        found = patched.ledger.as_dict()
    assert [row["visual"] for row in found["layers"]] == [row["visual"] for row in want["layers"]]
    assert found["kept_llm"] == want["kept_llm"] and not any(found["selection_flops"])
    assert all(s.reads() == {} for s in patched.plan.stages)


def test_what_is_spent_and_what_is_saved(model, monkeypatch):
    """6 seconds unpatched, 3 with the plan, 2 with the free choice: 1 is spent to save 4."""
    seen, twins = [], []

    def order(which) -> int:
        if which is model:
            return 0
        if which not in twins:
            twins.append(which)  # the plan's first
        return 1 + twins.index(which)

    def timed(which, inputs):
        real(which, inputs)
        seen.append(order(which))
        return [6.0, 3.0, 2.0][order(which)], 0.0

    real = bench.timed_prefill
    monkeypatch.setattr(bench, "timed_prefill", timed)
    inputs = bench.random_inputs(model, visual=16, text=9, batch=2)
    row = bench_selection._row(model, "fastv:layer=2:keep=0.25", inputs, 12, "", None)
    assert (row["baseline_s"], row["saved_s"], row["spent_s"]) == (6.0, 4.0, 1.0)
    assert row["cost"] == 0.25 and row["cost_ci"] == [0.25, 0.25]
    assert row["visual_avg"] == 10.0 and row["selection_flops"] > 0
    pairs, whole = [x for x in seen[-29:] if x], seen[-29:].count(0)
    assert pairs == [1, 2, 2, 1] * 6, "who is first alternates"
    assert whole == bench_selection.BASELINES, "the unpatched model runs in some rounds only"


def test_every_method_has_a_row():
    """At tiny size: measured, refused with the reason, or nothing saved."""
    plans = every_method()
    names = {plan.split(":")[0] for plan in plans}
    assert names == {row["name"] for row in mllm.methods()
                     if row["stage"] != "cache" and not row["trained"]} - {
        "random", "randomllm", "stride", "avgpool", "downsample", "vtw", "tcllava",
    }  # fmt: skip
    results = selection(model=TINY, visual=[16], batch=(1,), **{**OPTIONS, "pairs": 1})
    json.dumps(results, allow_nan=False)
    rows = {row["plan"].split(":")[0]: row for row in results["rows"]}
    assert set(rows) == names and results["suite"] == "selection"
    measured = {name for name, row in rows.items() if "cost" in row}
    assert {"visionzip", "divprune", "fastv", "vscan", "btp", "sparsevlm"} <= measured
    for name, row in rows.items():
        assert row["words"] and row["status"] in ("ok", "unresolved", "refused"), name
    assert "nothing is saved" in rows["cmai"]["words"]


def test_shapes_and_batches():
    done = []
    results = selection(
        model=TINY_QWEN, plans=["dart:keep=5", "divprune:keep=5"], batch=(1, 2), unequal=True,
        progress=lambda label, now, total: done.append((now, total)),
        on_row=lambda r: done.append(len(r["rows"])), **OPTIONS,
    )  # fmt: skip
    assert [(r["batch"], r["visual"]) for r in results["rows"]] == [(1, 20)] * 2 + [(2, 20)] * 2
    assert done[:3] == [(1, 2), (2, 2), 1] and done[-1] == 4
    assert all(row["status"] == "unresolved" for row in results["rows"]), "too few rounds"


@pytest.mark.parametrize(
    "cost, ci, saved, pairs, status, part",
    [
        (0.02, (0.01, 0.03), (0.9, 1.1), 30, "ok", "within 5%"),
        (0.2, (0.1, 0.3), (0.9, 1.1), 30, "ok", "above 5%"),
        (0.05, (0.04, 0.06), (0.9, 1.1), 30, "unresolved", "unresolved against 5%"),
        (0.02, (0.01, 0.03), (0.9, 1.1), 9, "unresolved", "too few"),
        (-3.0, (-4.0, -2.0), (-1.1, -0.9), 30, "unresolved", "save no time"),
        (0.02, (0.01, 0.03), (-0.1, 0.3), 30, "unresolved", "not resolved to save time"),
    ],
)
def test_verdicts(cost, ci, saved, pairs, status, part):
    found = judge(cost, ci, saved, pairs)
    assert found["status"] == status and part in found["words"]


def test_what_is_saved_has_its_part_in_the_interval():
    """0.1 s are spent in every round; what they save is 0.5 to 1.5 s, and then hardly known."""
    times = np.tile([1.1, 1.0], (30, 1))
    cost, ci, saved = bench_selection.interval(np.array([1.5, 1.8, 2.0, 2.2, 2.5]), times)
    assert cost == pytest.approx(0.1) and ci == pytest.approx([0.1 / 1.5, 0.1 / 0.5])
    assert saved == pytest.approx([0.5, 1.5])
    _, _, saved = bench_selection.interval(np.array([0.98, 0.99, 1.005, 1.01, 1.02]), times)
    assert saved[0] < 0 < saved[1]


def test_a_plan_that_was_asked_for_is_not_passed_over():
    with pytest.raises(PlanError, match="layer"):
        selection(model=TINY, plans=["fastv:layer=9:keep=0.5"], **OPTIONS)


def test_the_command(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    monkeypatch.setitem(bench_shapes.SHAPES, "tiny", TINY)
    words = ["bench", "--suite", "selection", "--model", "tiny", "--plan", "fastv:layer=2:keep=5",
             "--plan", "cmai", "--visual", "16", "--text", "9", "--pairs", "1", "--dtype",
             "float32"]  # fmt: skip
    output = tmp_path / "cost.json"
    result = CliRunner().invoke(app, [*words, "--json", "--output", str(output)])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)["data"]
    assert json.loads(output.read_text()) == data
    assert [row["batch"] for row in data["rows"]] == [1, 1, 8, 8]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0 and "share (95 %)" in shown.stdout
    assert "cmai: no token leaves" in shown.stdout
