"""The bench of training steps on a shape of a few thousand weights: never how fast it was."""

from __future__ import annotations

import json

import pytest
import torch
from test_bench import PROMISED, TINY, TINY_QWEN
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import mllm
from mllm.cli import app
from mllm.errors import DataError, PlanError
from mllm.eval import bench, bench_shapes, bench_train
from mllm.eval.bench_train import prepare, step_flops, supervised, timed_step, train

OPTIONS = dict(model=TINY, text=9, pairs=2, dtype="float32")
PLAN = "visionzip:keep=8"


def built(method="full", attention="sdpa"):
    model = TINY.build(torch.float32, "cpu")
    model.set_attn_implementation(attention)
    return model, prepare(model, method)


def batch_for(model, batch=2):
    return supervised(bench.random_inputs(model, visual=16, text=9, batch=batch), 9)


def test_results_have_the_promised_fields():
    results = train(plans=[PLAN, "fastv:layer=2:keep=1.0"], batch=(2,), **OPTIONS)
    json.dumps(results, allow_nan=False)
    assert results["schema"] == 1 and results["suite"] == "train"
    first, second = results["rows"]
    for row in (first, second):
        assert PROMISED <= set(row) and (row["batch"], row["visual"]) == (2, 16)
        assert row["method"] == "full"
        assert row["share"] == pytest.approx(row["ratio"] / row["ideal"])
        assert row["ratio_ci"][0] <= row["ratio"] <= row["ratio_ci"][1]
        assert row["passes_ci"][0] <= row["passes_ratio"] <= row["passes_ci"][1]
        assert 0 < row["optimizer_s"] < row["baseline_s"]
        assert row["status"] == "unresolved" and "2 pairs" in row["words"]
    assert first["ideal"] > 1 and second["ideal"] <= 1, "keeping everything saves nothing"
    assert first["peak_bytes"] < first["baseline_peak_bytes"]


def test_default_plans_are_those_of_the_goal():
    assert bench_train.PLANS == {"visionzip:keep=64": 0.9, "fastv:layer=2:keep=1.0": 1 / 1.03}


def test_a_step_trains_all_but_the_tower_and_changes_nothing():
    model, optimizer = built()
    inputs = batch_for(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    timed_step(model, inputs, optimizer)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        learns = "vision_tower" not in name
        assert parameter.requires_grad == learns and (parameter.grad is not None) == learns, name
    assert model.training and optimizer.state, "AdamW has made its states"


def test_lora_trains_adapters_in_the_language_model_alone():
    pytest.importorskip("peft")
    model, optimizer = built("lora")
    timed_step(model, batch_for(model), optimizer)
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert len(trained) == 4 * 7 * 2, "two matrices for each projection of each layer"
    assert all(".lora_" in name and "language_model" in name for name in trained)


def test_parts_of_a_step_follow_each_other(monkeypatch):
    """A clock that ticks once at each mark: start, decoder, optimizer, end."""
    model, optimizer = built()

    class Ticks:
        def __init__(self):
            self.marks = []

        def mark(self):
            self.marks.append(float(len(self.marks)))

        def seconds(self):
            return self.marks

    monkeypatch.setattr(bench, "clock_of", lambda model: Ticks())
    assert timed_step(model, batch_for(model), optimizer) == (3.0, 2.0, 1.0)


def counted(model, inputs):
    """FLOPs of forward and backward by torch's counter, without the rotary angles."""
    with FlopCounterMode(display=False) as counter:
        model(**inputs, use_cache=False).loss.backward()
    angles = [sum(v.values()) for k, v in counter.get_flop_counts().items() if "rotary" in k]
    return counter.get_total_flops() - sum(angles)


@pytest.mark.parametrize("plan", [PLAN, "fastv:layer=2:keep=0.5"])
def test_flops_of_a_full_step_are_those_that_torch_counts(plan):
    """Up to the projector's backward: both weights', and what went into the second."""
    model, _ = built(attention="eager")
    inputs = batch_for(model)
    measured = [counted(model, inputs)]
    other = bench.twin(model)
    with mllm.patch(other, plan) as patched:
        measured.append(counted(other, inputs))
        ledger = patched.ledger.as_dict()
    found = step_flops(model, ledger, inputs["input_ids"].shape[1])
    tokens = 2 * 16, 2 * (8 if plan == PLAN else 16)  # that the projector sees
    for want, got, n in zip(measured, found, tokens, strict=True):
        projector = 2 * n * (32 * 64 + 2 * 64 * 64)
        assert got + projector == pytest.approx(want, rel=2e-3)
        assert got == pytest.approx(want, rel=0.02)


def test_flops_of_a_lora_step_are_those_that_torch_counts():
    """Up to what the first layer does not pass on, as nothing before it is trained."""
    pytest.importorskip("peft")
    model, _ = built("lora", "eager")
    inputs = batch_for(model)
    want = counted(model, inputs)
    other = bench.twin(model)
    with mllm.patch(other, PLAN) as patched:
        other(**inputs, use_cache=False)
        found, _ = step_flops(model, patched.ledger.as_dict(), inputs["input_ids"].shape[1])
    first = 2 * 2 * 25 * 64 * (64 + 2 * 32)  # into its queries, keys and values
    assert found - first == pytest.approx(want, rel=0.02)


def test_attainable_is_the_unpatched_step_at_the_plans_lengths(monkeypatch):
    """4 seconds of tower, then 0.1 a row: 25 rows unpatched, 17 with the plan, 0.5 to update."""
    model, optimizer = built()

    def timed(which, inputs, optimizer):
        real(which, inputs, optimizer)
        rows = inputs["input_ids"].shape[1] / 10 if which is model else 2.5
        return 4.0 + rows, rows, 0.5

    real = bench_train.timed_step
    monkeypatch.setattr(bench_train, "timed_step", timed)
    row = bench_train._row(model, optimizer, PLAN, batch_for(model), 3, 0.9, "", None)
    assert row["ratio"] == 1.0 and row["optimizer_s"] == 0.5
    assert row["attainable"] == pytest.approx(6.5 / 5.7)
    assert row["passes_ratio"] == 1.0 and row["target_share"] == 0.9


def test_pictures_of_any_size_and_unequal_prompts():
    results = train(
        **OPTIONS | {"model": TINY_QWEN, "pairs": 1}, plans=["divprune:keep=5"], batch=(2,),
        unequal=True,
    )  # fmt: skip
    assert [row["visual"] for row in results["rows"]] == [20]
    assert results["rows"][0]["ideal"] > 1


@pytest.mark.parametrize(
    ("options", "error", "part"),
    [
        ({"method": "half"}, DataError, "method=half"),
        ({"pairs": 0}, DataError, "pairs=0"),
        ({"visual": [100]}, DataError, "multiple of 16"),
        ({"plans": ["fastw:keep=0.5"]}, PlanError, "fastw"),
    ],
)
def test_bad_input_is_named(options, error, part):
    with pytest.raises(error, match=part):
        train(**OPTIONS | options)


def test_command(tmp_path, monkeypatch):
    monkeypatch.setitem(bench_shapes.SHAPES, "tiny", TINY)
    output = tmp_path / "train.json"
    words = ["bench", "--suite", "train", "--model", "tiny", "--plan", PLAN, "--text", "9"]
    words += ["--pairs", "1", "--dtype", "float32", "--method", "full"]
    result = CliRunner().invoke(app, [*words, "--json", "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert json.loads(output.read_text()) == json.loads(result.stdout)["data"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0 and "Without the optimizer" in " ".join(shown.stdout.split())
    refused = CliRunner().invoke(app, ["bench", "--suite", "kv", "--method", "lora"])
    assert refused.exit_code == 2 and "--suite train" in refused.stderr
