"""The bench of cache methods on a tiny shape: what is stored and compared, never how fast."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from test_bench import PROMISED, TINY, TINY_QWEN

import mllm
from mllm.cli import app
from mllm.errors import DataError, PlanError
from mllm.eval import bench, bench_kv, bench_prompt, bench_shapes
from mllm.eval.bench_kv import every_method, kv
from mllm.eval.bench_prompt import Prompt

FIELDS = PROMISED | {
    "length", "payload_bytes", "payload_expected_bytes", "payload_share", "slack_bytes",
    "meta_bytes", "baseline_kv_bytes", "claim", "target_share", "baseline_s", "patched_s",
    "prefill_s", "prefills", "scorer_s", "scorer_share", "scorer_ci", "baseline_peak_bytes",
    "unequal", "words", "samples", "flops", "bytes", "ideal_s", "roofline_share",
}  # fmt: skip
OPTIONS = dict(model=TINY, pairs=1, dtype="float32")
SLOT = 4 * 2 * 2 * 16 * 4  # layers x KV heads x (key, value) x head_dim x bytes


@pytest.fixture(scope="module")
def model():
    return TINY.build(torch.float32, "cpu")


def read(model, plan, **size):
    inputs = bench.random_inputs(model, **{"visual": 32, "text": 32, "batch": 2, **size})
    stages = bench_kv._stages(plan)
    with torch.inference_mode():
        return stages, Prompt.read(model, inputs, [stages], 1)


def test_rows_have_the_promised_fields():
    results = kv(**OPTIONS, plans=["snapkv:budget=0.5"], length=[120], batch=(1, 2))
    json.dumps(results, allow_nan=False)
    assert results["schema"] == 1 and results["suite"] == "kv"
    first, second = results["rows"]
    assert set(first) == set(second) == FIELDS
    assert (first["visual"], first["text"], first["length"]) == (48, 72, 120)
    assert first["payload_expected_bytes"] == 60 * SLOT and first["baseline_kv_bytes"] == 120 * SLOT
    assert second["payload_bytes"] == 2 * first["payload_bytes"] == 2 * 60 * SLOT
    for row in results["rows"]:
        assert row["share"] == pytest.approx(row["ratio"] / row["ideal"])
        assert row["ratio_ci"][0] <= row["ratio"] <= row["ratio_ci"][1]
        assert row["status"] == "unresolved" and "1 pairs" in row["words"]
        assert row["claim"] == "time" and row["target_share"] == 0.85


@pytest.mark.slow
def test_every_cache_method_is_measured():
    """Uniform or ragged: the payload is the budget's, but where a docstring says otherwise."""
    rows = kv(**OPTIONS, length=[120], batch=(2,), unequal=True, budgets=["0.25"])["rows"]
    names = {row["plan"].split(":")[0] for row in rows}
    registered = {row["name"] for row in mllm.methods() if row["stage"] == "cache"}
    assert names == registered and not [r["plan"] for r in rows if r["ratio"] is None]
    assert rows[0]["payload_bytes"] == rows[0]["baseline_kv_bytes"]
    for row in rows:
        if row["payload_share"] is not None:
            assert abs(row["payload_share"] - 1) <= 0.02, row["plan"]


@pytest.mark.parametrize("shape", [TINY, TINY_QWEN], ids=lambda s: s.name)
@pytest.mark.parametrize(
    "plan",
    ["snapkv:budget=0.5:window=8", "vlcache:budget=0.5", "h2o:budget=30", "adakv:budget=0.4"],
)
@torch.inference_mode()
def test_told_of_a_prompt_a_plan_does_what_it_does_in_a_prefill(shape, plan):
    """Fails if a signal is of another layer, or if an event is missing."""
    model = shape.build(torch.float32, "cpu")
    size = dict(visual=32 if shape is TINY else 40, text=24, batch=2, unequal=True)
    inputs = bench.random_inputs(model, **size)
    prompt = Prompt.read(model, inputs, [bench_kv._stages(plan)], 1)
    with mllm.patch(bench.twin(model), plan) as patched:
        want = patched.model(**inputs, use_cache=True).past_key_values
        found = prompt.share(patched)
        prompt.told(patched, found)
        for layer, (a, b) in enumerate(zip(want.layers, found.layers, strict=True)):
            for name in ("valid", "logical"):
                assert torch.equal(getattr(a.table, name), getattr(b.table, name)), layer
            valid = a.table.valid if a.table.valid.dim() == 3 else a.table.valid[:, None]
            assert torch.equal(a.keys * valid[..., None], b.keys * valid[..., None])
        # A step goes on from it as from a prefill.
        logits = [
            patched.model(**bench_kv.next_token(patched.model, cache, inputs)).logits
            for cache in (want, found)
        ]
    assert torch.equal(*logits)


@torch.inference_mode()
def test_plans_leave_the_prompt_as_it_was(model):
    _, prompt = read(model, "h2o:budget=0.25")
    keys = [layer.keys.clone() for layer in prompt.cache.layers]
    with mllm.patch(bench.twin(model), "h2o:budget=0.25") as patched:
        cache = prompt.share(patched)
        prompt.told(patched, cache)
        patched.model(**bench_kv.next_token(patched.model, cache, prompt.inputs))
    assert cache.layers[0].slots < prompt.cache.layers[0].slots
    assert all(torch.equal(a, b.keys) for a, b in zip(keys, prompt.cache.layers, strict=True))


@torch.inference_mode()
def test_the_unpatched_cache_is_transformers_own(model):
    _, prompt = read(model, "snapkv:budget=0.5")
    inputs = prompt.inputs
    want = model(**inputs, use_cache=True).past_key_values
    found = prompt.unpatched(model)
    assert type(found) is type(want) and not hasattr(found, "mllm")
    logits = [model(**bench_kv.next_token(model, cache, inputs)).logits for cache in (want, found)]
    assert torch.equal(*logits)


def test_ragged_heads_are_a_memory_claim():
    row = kv(**OPTIONS, plans=["adakv:budget=0.25:floor=0.0"], length=[160])["rows"][0]
    assert row["claim"] == "memory" and row["target_share"] is None
    assert row["words"].startswith("a memory claim")
    assert row["payload_bytes"] == 40 * SLOT and row["slack_bytes"] >= 0


def test_text_stays_and_is_expected_where_only_pictures_are_cut(model):
    stages, prompt = read(model, "snapkv:budget=0.25:tokens=visual:window=8")
    assert bench_kv._expected(stages, prompt) == [2 * (32 + 8)] * 4


def test_layers_that_stay_whole_are_expected_so(model):
    """A method says which; behind another one the smaller budget of each layer counts."""
    stages, prompt = read(model, "d2o:budget=0.25:skip=1:skip_last=1")
    assert bench_kv._expected(stages, prompt) == [2 * 64, 2 * 16, 2 * 16, 2 * 64]
    stages, prompt = read(model, "snapkv:budget=0.5:window=8+d2o:budget=0.25:skip=1:skip_last=0")
    assert bench_kv._expected(stages, prompt) == [2 * 32, *[2 * 16] * 3]
    cache = prompt.cache
    assert bench_kv.storage(cache, bench_kv._stages("d2o:skip=4"), prompt)["payload_share"] == 1


def test_the_cost_of_choosing_is_that_of_its_signals_and_layers(model):
    _, prompt = read(model, "snapkv:window=8+h2o")
    assert [type(x).__name__ for x in prompt.signals] == ["AttentionRows", "ColumnMass"]
    assert prompt.read_s.shape == (1, 2, 4) and (prompt.read_s > 0).all()
    one, both = (prompt.reading(bench_kv._stages(x)) for x in ("h2o", "snapkv:window=8+h2o"))
    assert np.array_equal(one, prompt.read_s[:, 1]) and np.array_equal(both, prompt.read_s.sum(1))


def test_the_cost_of_choosing_is_of_all_layers_even_where_most_do_nothing(model, monkeypatch):
    """4 s of prefill; one layer of four spends 2 s, or the last of a group of two spends 1 s."""
    _, prompt = read(model, "snapkv:window=8")
    prompt.prefill_s = np.array([4.0])
    monkeypatch.setattr(Prompt, "told", lambda *_: np.array([0.0, 2.0, 0.0, 0.0]))
    monkeypatch.setattr(Prompt, "reading", lambda *_: np.zeros((1, 4)))
    with torch.inference_mode():
        row = bench_kv._row(model, "snapkv:window=8", prompt, 1, "", None)
    assert row["scorer_share"] == 0.5 and row["scorer_s"] == 2.0
    assert row["scorer_ci"][0] < 0.5 < row["scorer_ci"][1]


@torch.inference_mode()
def test_what_a_group_of_layers_takes_is_theirs_in_equal_parts(model, monkeypatch):
    _, prompt = read(model, "xkv:group=2:rank_keys=8:rank_values=8")
    clock = [0.0]
    monkeypatch.setattr(bench_prompt, "now", lambda _: clock[0])
    with mllm.patch(bench.twin(model), "xkv:group=2:rank_keys=8:rank_values=8") as patched:
        (stage,) = (stage for _, stage in patched.compressors)
        monkeypatch.setattr(
            type(stage), "group_end", lambda *_: clock.__setitem__(0, clock[0] + 1.0)
        )
        seconds = prompt.told(patched, prompt.share(patched))
    assert seconds.tolist() == [0.5] * 4


@pytest.mark.parametrize(
    ("plan", "ci", "part"),
    [
        ("snapkv", (0.01, 0.03), "within 10%"),
        ("snapkv+adakv", (0.2, 0.3), "above 10%"),
        ("vlcache", (0.05, 0.3), "unresolved against 10%"),
        ("h2o", (0.5, 0.6), "of the prefill"),
        ("streamingllm", (0.0, 0.1), "of the prefill"),
    ],
)
def test_window_scorers_have_a_target(plan, ci, part):
    assert bench_kv._scorer(bench_kv._stages(plan), 0.1, ci).endswith(part)


def test_enough_layers_are_timed_for_a_claim(model):
    inputs = bench.random_inputs(model, visual=16, text=9, batch=1)
    with torch.inference_mode():
        prompt = Prompt.read(model, inputs, [bench_kv._stages("snapkv")], 10)
    assert len(prompt.prefill_s) == 3  # of 4 layers each


def test_a_prompt_that_does_not_fit_is_said_for_every_plan(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(Prompt, "read", full)
    rows = kv(**OPTIONS, plans=["snapkv:budget=0.5", "h2o"], length=[120])["rows"]
    assert [row["status"] for row in rows] == ["oom", "oom"] and rows[0]["plan"] != rows[1]["plan"]


@pytest.mark.parametrize(
    ("options", "error", "part"),
    [
        ({"plans": ["visionzip:keep=4"]}, PlanError, "visionzip works before the cache"),
        ({"plans": ["fastv:layer=2+snapkv:budget=40"]}, PlanError, "fastv works before"),
        ({"length": [70]}, DataError, "length=70 .* 80 or more"),
        ({"budgets": ["1.5"]}, PlanError, "budget"),
        ({"pairs": 0}, DataError, "pairs=0"),
    ],
)
def test_bad_input_is_named(options, error, part):
    with pytest.raises(error, match=part):
        kv(**{**OPTIONS, **options})


def test_default_plans_are_all_cache_methods_at_each_budget():
    plans = every_method(["0.5", "64"])
    assert plans[0] == "streamingllm:budget=1.0"
    assert {"snapkv:budget=0.5", "snapkv:budget=64"} <= set(plans)


def test_command(tmp_path, monkeypatch, cli):
    monkeypatch.setitem(bench_shapes.SHAPES, "tiny", TINY)
    output = tmp_path / "kv.json"
    words = ["bench", "--model", "tiny", "--suite", "kv", "--plan", "snapkv:budget=0.5"]
    words += ["--length", "120", "--pairs", "1", "--dtype", "float32", "--batch", "2"]
    result = cli.invoke(app, [*words, "--json", "--output", str(output)])
    assert result.exit_code == 0, result.output
    payload = json.loads(result.stdout)
    assert json.loads(output.read_text()) == payload["data"]
    shown = cli.invoke(app, words)
    assert shown.exit_code == 0 and "of budget" in shown.stdout and "snapkv" in shown.stdout
    wrong = cli.invoke(app, ["bench", "--model", "tiny", "--budget", "0.5"])
    assert wrong.exit_code == 2 and "suite kv" in wrong.stderr


@pytest.fixture
def cli():
    from typer.testing import CliRunner

    return CliRunner()
