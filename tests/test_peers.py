"""The peers of the bench: what is asked of them, and what is said where one is missing."""

from __future__ import annotations

import argparse
import importlib.util
import json
import runpy
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from test_bench import TINY, TINY_QWEN

from mllm.plan import Plan

FOLDER = Path(__file__).parents[1] / "benchmarks" / "peers"
ROOT = FOLDER.parents[1]


def loaded(name: str):
    spec = importlib.util.spec_from_file_location(f"peers_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def peers():
    return loaded("run")


@pytest.fixture(scope="module")
def side():
    return loaded("side")


def options(peers, name, **given):
    settings = peers.PEERS[name].settings | given.pop("settings", {})
    asked = dict(python=None, length=120, visual=16, pairs=2, dtype="float32", threads=None,
                 device="cpu", settings=settings)  # fmt: skip
    return argparse.Namespace(**asked | given)


ABOUT = {"ours": {"visual": 48, "text": 72}, "threads": 1}


@pytest.mark.parametrize("name", ["kvpress", "quanto", "hqq", "sparsevlm"])
@pytest.mark.parametrize(
    ("python", "part"), [(None, "no --python"), ("/nowhere/python", "cannot be run")]
)
def test_without_a_peer_its_row_says_why(peers, name, python, part):
    row = peers.theirs(name, options(peers, name, python=python), TINY, ABOUT)
    assert row["status"] == "skipped" and part in row["words"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("kvpress") is not None, reason="it is installed")
def test_an_environment_without_the_peer_says_so(peers):
    row = peers.theirs("kvpress", options(peers, "kvpress", python=sys.executable), TINY, ABOUT)
    assert row == {"status": "skipped", "words": "kvpress failed: kvpress is not installed"}


def test_our_plans_have_the_peers_settings(peers):
    plans = {name: peer.plan.format(**peer.settings) for name, peer in peers.PEERS.items()}
    assert plans["kvpress"] == "snapkv:budget=0.25:window=64:kernel=5:pool=avg"
    assert plans["quanto"] == plans["hqq"] == "kivi:bits=4:group_size=64:residual=128"
    assert plans["fp8"] == "kivi:bits=8:group_size=64:residual=128"
    for plan in plans.values():
        assert Plan.of(plan).stages


def test_both_rows_of_a_step(peers):
    """Ours is measured; theirs is planted: 3 ms without, 2 ms with the method."""
    asked = options(peers, "kvpress", length=160, pairs=2)

    def theirs(name, options, shape, about):
        assert about["ours"]["visual"] + about["ours"]["text"] == 160
        times = peers._times(np.array([[3e-3, 2e-3]] * 2))
        return {"status": "unresolved", "baseline_kv_bytes": 2**21, "payload_bytes": 2**20, **times}

    plan = "snapkv:budget=0.5:window=64:kernel=5:pool=avg"
    results = peers.run("kvpress", peers.PEERS["kvpress"], plan, asked, TINY, theirs)
    json.dumps(results, allow_nan=False)
    assert results["suite"] == "peer-kvpress" and "rows" not in results
    assert results["ours"]["payload_share"] == 1.0 and results["kvpress"]["ratio"] == 1.5
    assert results["relative"] == pytest.approx(results["ours"]["ratio"] / 1.5)
    assert results["relative_ci"] == pytest.approx(
        [x / 1.5 for x in results["ours"]["ratio_ci"]], rel=1e-4
    )
    said = peers.words(results, "kvpress", "step")
    assert "3.0 -> 2.0 ms per step, 1.50x" in said and "1.0 of 2.0 MiB" in said
    assert "no claim" in said


def test_slower_is_said_and_so_are_hooks_without_effect(peers):
    row = {**peers._times(np.array([[1.0, 2.0]] * 30)), "status": "ok", "pairs": 30}
    said = peers.words(
        {"ours": row, "sparsevlm": row | {"hooks_slots": [63, 63]}, "relative": 1.0,
         "relative_ci": [0.9, 1.1]},
        "sparsevlm", "answer",
    )  # fmt: skip
    assert "that of sparsevlm: 1.00 (0.90-1.10), not resolved" in said
    assert said.count("no real speed-up: slower") == 2 and "63 to 63 slots" in said


def test_our_answers_are_whole(peers):
    asked = options(peers, "sparsevlm", settings={"keep": 8, "new": 3}, visual=24, pairs=1)
    results = peers.ours(peers.PEERS["sparsevlm"], "stride:keep=8", asked, TINY_QWEN)
    row = results["ours"]
    assert row["visual_avg"] == 8 and row["kv_bytes"] < row["baseline_kv_bytes"]
    assert row["status"] == "unresolved" and len(row["samples"]) == 1


def task(shape, **given):
    return asdict(shape) | dict(visual=32, words=16, pairs=1, dtype="float32", device="cpu",
                                threads=1) | given  # fmt: skip


@torch.inference_mode()
def test_the_side_measures_a_cache(side):
    """transformers' own cache in 8-bit floats: a quarter of the bytes of fp32."""
    found = side.quantised(task(TINY, peer="fp8"))
    assert len(found["seconds"]) == 1 and len(found["prefill_s"]) == 2
    whole, held = found["kv_bytes"]
    assert whole == 48 * 4 * 2 * 2 * 16 * 4 and whole / 4 <= held < whole / 2


@torch.inference_mode()
def test_the_side_draws_what_the_model_takes(side):
    for shape, visual in ((TINY, 32), (TINY_QWEN, 24)):
        model = side.build(task(shape))
        inputs = side.draw(model, task(shape, visual=visual))
        assert inputs["input_ids"].shape == (1, visual + 16)
        assert model(**inputs).logits.shape[1] == visual + 16


def test_pairs_alternate(side, monkeypatch):
    seen = []
    ways = [lambda: seen.append("a"), lambda: seen.append("b")]
    times = side.in_pairs(task(TINY, pairs=3), *ways, warmup=1)
    assert "".join(seen) == "ba" + "ab" + "ba" + "ab" and len(times) == 3


def test_the_committed_results_are_of_these_scripts(peers):
    script = runpy.run_path(str(ROOT / "scripts" / "make_performance.py"))
    for name in peers.PEERS:
        file = ROOT / "benchmarks" / "results" / f"peer-{name}.json"
        if file.is_file():
            made = script["part"]([f"peer-{name}"])
            assert made.startswith("| | version |") and f"| {name} |" in made
