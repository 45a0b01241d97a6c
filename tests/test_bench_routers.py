"""The bench of trained stages on a shape of a few thousand weights: never how fast it was."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from test_bench import PROMISED, TINY
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from mllm.cli import app
from mllm.errors import PlanError
from mllm.eval import bench, bench_routers, bench_shapes
from mllm.eval.bench_routers import routers

OPTIONS = dict(model=TINY, text=9, pairs=2, dtype="float32")


def test_command_fields_and_table(tmp_path, monkeypatch):
    monkeypatch.setitem(bench_shapes.SHAPES, "tiny", TINY)
    monkeypatch.setattr(bench_routers, "ROWS", (16, 48))
    words = ["bench", "--suite", "routers", "--model", "tiny", "--plan", "pmod", "--plan", "moe"]
    words += ["--text", "9", "--pairs", "1", "--dtype", "float32"]
    shown = CliRunner().invoke(app, [*words, "--output", str(tmp_path / "routers.json")])
    assert shown.exit_code == 0, shown.output
    assert "of the dense FFN's rate" in " ".join(shown.stdout.split())
    results = json.loads((tmp_path / "routers.json").read_text())
    assert results["schema"] == 1 and results["suite"] == "routers"
    assert [(row["part"], row["plan"], row["visual"]) for row in results["rows"]] == [
        ("prefill", "pmod", 16), ("train", "pmod", 16),
        ("dispatch", "moe", 16), ("dispatch", "moe", 48),
    ]  # fmt: skip
    for row in results["rows"]:
        assert PROMISED <= set(row)
        assert row["share"] == pytest.approx(row["ratio"] / row["ideal"])
        assert row["ratio_ci"][0] <= row["ratio"] <= row["ratio_ci"][1]
        assert row["status"] == "unresolved" and "1 pairs" in row["words"]
    script = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "make_performance.py"))
    table = script["part"](["routers"], tmp_path)
    assert "| `pmod`, a look: 1 pairs | train | 16 | 1 | float32 |" in table
    assert "| `moe`, a look: 1 pairs | dispatch |" in table


@pytest.mark.parametrize("plan", ["moe:experts=4:top_k=2", "deepseekmoe:experts=4:top_k=1"])
def test_the_dense_ffn_has_as_many_flops(plan, monkeypatch):
    """By torch's counter, of what is timed."""
    counted = []

    def count(base, run, _):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            run()
        counted.append(counter.get_total_flops())
        return (1.0,)

    monkeypatch.setattr(bench_routers, "_timed", count)
    row = routers(plans=[plan], visual=[160], **OPTIONS)["rows"][0]
    dense, experts = counted[0], counted[1]
    assert row["ideal"] == pytest.approx(dense / experts, rel=0.01)
    assert row["ideal"] == pytest.approx(1, abs=0.01)


def test_default_plans_are_those_of_the_goal():
    assert bench_routers.PLANS["moe:experts=8:top_k=2"] == 0.75
    assert bench_routers.PLANS["pmod:max_ratio=1.0:min_ratio=1.0"] == 1 / 1.02


def test_experts_are_timed_alone():
    with pytest.raises(PlanError, match="without the other stages"):
        routers(plans=["visionzip:keep=8+moe"], visual=[16], **OPTIONS)


@pytest.mark.parametrize(
    ("interval", "pairs", "status", "words"),
    [
        ((0.80, 0.85), 30, "ok", "reaches the target of 0.75"),
        ((0.60, 0.65), 30, "ok", "misses the target of 0.75"),
        ((0.60, 0.90), 30, "unresolved", "unresolved against"),
        ((0.80, 0.85), 3, "unresolved", "too few"),
    ],
)
def test_verdicts(interval, pairs, status, words):
    found, said = bench.against(interval, 1.0, 0.75, pairs)
    assert found == status and words in said
