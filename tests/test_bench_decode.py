"""The bench of decode steps on a shape of a few thousand weights: never how fast it was."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from test_bench import PROMISED, TINY

from mllm import flops
from mllm.errors import DataError
from mllm.eval import bench, bench_decode
from mllm.eval.bench_decode import decode
from mllm.roofline import Hardware

OPTIONS = dict(model=TINY, text=9, pairs=2, dtype="float32")
SLOT = 4 * 2 * 2 * 16 * 4  # layers x KV heads x (key, value) x head_dim x bytes


def test_plans_of_any_stage_have_the_bytes_of_what_they_leave():
    """25 tokens unpatched: 12 behind a cut at layer 2 of 4, 13 before the LLM, 12 in the cache."""
    plans = ["fastv:layer=2:keep=0.25", "visionzip:keep=4", "snapkv:budget=12:window=4"]
    results = decode(**OPTIONS, plans=plans, visual=[16], batch=(2,))
    json.dumps(results, allow_nan=False)
    assert results["suite"] == "decode" and results["schema"] == 1
    left = [(2 * 25 + 2 * 13) / 4, 13, 12]
    model = TINY.build(torch.float32, "cpu")
    read = (*model.get_decoder().layers.parameters(), *model.get_decoder().norm.parameters())
    weights = sum(p.numel() for p in (*read, model.get_output_embeddings().weight))
    for row, tokens in zip(results["rows"], left, strict=True):
        assert PROMISED <= set(row) and row["batch"] == 2
        assert row["baseline_kv_bytes"] == 2 * 25 * SLOT and row["kv_bytes"] == 2 * tokens * SLOT
        assert row["bytes"] == 4 * weights + row["kv_bytes"]
        whole = 4 * weights + row["baseline_kv_bytes"]
        assert row["ideal"] == pytest.approx(whole / row["bytes"]) and row["ideal"] > 1
        assert row["share"] == pytest.approx(row["ratio"] / row["ideal"])
        assert row["status"] == "unresolved" and "2 pairs" in row["words"]


def test_work_and_machine_give_the_least_time(monkeypatch):
    """With a planted clock and a machine of 1 MFLOP/s that reads as much as it likes."""
    at = Hardware("slow", {"float32": 1e6}, 1e15)
    monkeypatch.setattr(bench, "device_of", lambda base: at)
    planted = np.array([[0.4, 0.2], [0.4, 0.2]])
    monkeypatch.setattr(bench_decode, "time_steps", lambda *_: planted)
    monkeypatch.setattr(bench_decode, "step_peak", lambda *_: 1)
    model = TINY.build(torch.float32, "cpu")
    inputs = bench.random_inputs(model, visual=16, text=9, batch=3)
    row = bench_decode._row(model, "visionzip:keep=4", inputs, 2, None, "", None)
    config = model.config.text_config
    work = 3 * (4 * flops.decoder_layer(config, 1, 14) + flops.lm_head(config, 1))
    assert (row["ratio"], row["patched_s"], row["samples"]) == (2.0, 0.2, [2.0, 2.0])
    assert row["flops"] == work and row["ideal_s"] == pytest.approx(work / 1e6)
    assert row["roofline_share"] == pytest.approx(work / 1e6 / 0.2)


def test_layers_that_a_plan_does_not_run_are_not_read():
    """An early exit behind two of four layers; experts are read instead of the FFN."""
    model = TINY.build(torch.float32, "cpu")
    config, layers = model.config.text_config, model.get_decoder().layers
    layer, ffn = (sum(p.nbytes for p in m.parameters()) for m in (layers[0], layers[0].mlp))
    options = OPTIONS | {"pairs": 1, "visual": [16]}
    exits, experts = decode(**options, plans=["layerskip:exit=2", "moe:experts=4:layers=1"])["rows"]
    before = exits["ideal"] * exits["bytes"]
    saved = 2 * layer + exits["baseline_kv_bytes"] - exits["kv_bytes"]
    assert exits["kv_bytes"] * 2 == exits["baseline_kv_bytes"]
    assert before - exits["bytes"] == pytest.approx(saved)
    work = 2 * flops.decoder_layer(config, 1, 26) + flops.lm_head(config, 1)
    assert exits["flops"] == work
    assert experts["bytes"] - before == pytest.approx(3 * ffn, rel=0.02)  # and a router


def test_a_length_is_whole_pictures_and_text():
    rows = decode(**OPTIONS | {"pairs": 1}, plans=["random:keep=4"], length=[120])["rows"]
    assert [(row["visual"], row["text"]) for row in rows] == [(48, 72)]


def test_a_size_and_a_length_are_one_too_many():
    with pytest.raises(DataError, match="without visual and length"):
        decode(**OPTIONS, size=[(56, 56)], length=[120])
