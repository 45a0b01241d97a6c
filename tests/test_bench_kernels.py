"""The bench of kernels at tiny shapes: what is called and counted, never how fast."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_bench import PROMISED, TINY
from typer.testing import CliRunner

from mllm import kernels
from mllm.cli import app
from mllm.errors import DataError, MllmError
from mllm.eval import bench_kernels, bench_shapes
from mllm.eval.bench_kernels import NAMES, kernel_suite
from mllm.roofline import Hardware

OPTIONS = dict(model=TINY, length=[64], pairs=1, dtype="float32", device="cpu")
HEADS, KV, WIDTH, HIDDEN, INNER = 4, 2, 16, 64, 128  # of TINY


@pytest.fixture(scope="module")
def results():
    return kernel_suite(**OPTIONS, batch=(2,))


def test_every_kernel_has_rows_that_say_torch_was_served(results):
    json.dumps(results, allow_nan=False)
    rows = results["rows"]
    assert {row["plan"].split(":")[0] for row in rows} == {*NAMES, "dispatcher"}
    files = {file.stem for file in Path(kernels.__file__).parent.glob("*.py")}
    assert set(NAMES) == files - {"__init__"}, "a kernel of the package is missing here"
    for row in rows[:-1]:
        assert PROMISED <= set(row)
        assert row["ratio"] is None and row["triton_s"] is None and row["backend"] == "torch"
        assert row["share"] == pytest.approx(row["ideal_s"] / row["torch_s"])
        assert row["ideal"] == pytest.approx(row["torch_s"] / row["ideal_s"])
        assert "the Triton kernel was not run: no CUDA device" in row["words"]
        assert ("reference_s" in row) == ("decode" in row["plan"])
    assert results["words"] == [bench_kernels.NOT_RUN]
    assert results["model_shape"]["head_dim"] == WIDTH
    assert {"source", "flops", "bandwidth"} <= set(results["machine"])


def test_bytes_and_flops_are_those_of_the_shape():
    """Counted by hand, fp32, batch 2, 64 tokens, of which a quarter is kept."""
    config = TINY.config().get_text_config()
    found = {
        plan: make() for plan, make in bench_kernels._cases(config, 64, 2, torch.float32, "cpu")
    }
    keys, query = 2 * KV * 64 * WIDTH * 4, 2 * HEADS * WIDTH * 4
    one = found["row_scores:rows=1"]
    assert (one.flops, one.nbytes) == (2 * 2 * HEADS * 64 * WIDTH, keys + query + 2 * 64 * 4)
    moved, at = 2 * 16 * (HIDDEN * 4 + 8), 2 * 16 * 8
    assert (found["compact:keep=0.25"].flops, found["compact:keep=0.25"].nbytes) == (
        0, 2 * moved + at,
    )  # fmt: skip
    assert found["scatter_back:keep=0.25"].nbytes == 2 * (16 + 64) * HIDDEN * 4 + at
    ffn = found["grouped_ffn:experts=8:top_k=2"]
    assert ffn.flops == 6 * 256 * HIDDEN * INNER
    assert ffn.nbytes == 4 * (3 * 8 * HIDDEN * INNER + 2 * 256 * HIDDEN)
    plain = 2 * keys
    for bits in (2, 4, 8):
        step = found[f"quantised_decode:bits={bits}"]
        codes = plain * bits // 32
        bounds = step.nbytes - codes - query
        assert step.flops == 4 * 2 * HEADS * 64 * WIDTH and 0 < bounds < plain / 2
    ragged = found["ragged_decode"]
    assert ragged.flops * 3 < 4 * 2 * HEADS * 64 * WIDTH and ragged.nbytes < plain / 2 + 2000


@torch.inference_mode()
def test_what_is_served_is_the_reference():
    config = TINY.config().get_text_config()
    for plan, make in bench_kernels._cases(config, 40, 2, torch.float32, "cpu"):
        work = make()
        if work.served is not None:
            torch.testing.assert_close(work.served(), work.run()[0], msg=plan)


def planted(monkeypatch, triton):
    """A machine with a kernel that takes `triton` seconds, and torch that takes 4."""
    monkeypatch.setattr(bench_kernels, "time_calls", lambda runs, *_: {
        name: np.full(30, {"torch": 4.0, "triton": triton}[name]) for name in runs
    })  # fmt: skip
    monkeypatch.setattr(bench_kernels, "peak_of", lambda *_: 1)
    work = bench_kernels.Work(lambda: 1, 1e6, 1.5e6)
    at = Hardware("one", {"float32": 1e6}, 1e6)
    return bench_kernels._row(lambda: work, at, "float32", torch.device("cuda"), 30, "", None)


@pytest.mark.parametrize(
    ("triton", "share", "part"),
    [
        (2.0, 0.75, "2.00x as fast as torch, 75% of the ideal; reaches the target of 0.70"),
        (5.0, 0.3, "slower: 0.80x as fast as torch, 30% of the ideal; misses the target of 0.70"),
        (4.0, 0.375, "not resolved faster than torch"),
    ],
)
def test_a_kernel_beside_torch(monkeypatch, triton, share, part):
    row = planted(monkeypatch, triton)
    assert (row["ideal_s"], row["share"], row["ideal"]) == (1.5, share, 4 / 1.5)
    assert row["ratio"] == 4 / triton and row["status"] == "ok" and part in row["words"]


def test_a_kernel_that_cannot_run_is_no_time_of_a_kernel(monkeypatch):
    """Under `strict` it is an error, where it would have been torch."""
    kernels._say.cache_clear()
    with kernels.use("triton", strict=True), pytest.raises(MllmError, match="compact cannot run"):
        kernels.run("compact", lambda x: x, torch.zeros(1))
    with kernels.use("triton"):
        assert kernels.run("compact", lambda x: x + 1, torch.zeros(1)) == 1
    monkeypatch.setattr(bench_kernels, "_under", lambda mode, run: run)

    def fails():
        raise MllmError("the kernel x cannot run: heads of 512 channels")

    monkeypatch.setattr(bench_kernels, "time_calls", lambda runs, *_: {
        name: np.full(30, 4.0) for name in runs
    })  # fmt: skip
    monkeypatch.setattr(bench_kernels, "peak_of", lambda *_: 1)
    work = bench_kernels.Work(fails, 1e6, 1e6, served=lambda: 1)
    at = Hardware("one", {"float32": 1e6}, 1e6)
    row = bench_kernels._row(lambda: work, at, "float32", torch.device("cuda"), 30, "", None)
    assert row["triton_s"] is None and "512 channels" in row["words"]


def test_a_kernel_without_memory_is_a_row(monkeypatch):
    def full(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    monkeypatch.setattr(bench_kernels, "_ragged", full)
    rows = kernel_suite(**OPTIONS, plans=["ragged_decode", "compact"])["rows"]
    assert [row["status"] for row in rows] == ["unresolved", "oom"]


@pytest.mark.parametrize(
    ("options", "part"),
    [({"plans": ["softmax"]}, "row_scores"), ({"length": [2]}, "8 or more"),
     ({"dtype": "int8"}, "bfloat16"), ({"model": "nowhere/config.json"}, "nowhere")],
)  # fmt: skip
def test_bad_input_is_named(options, part):
    with pytest.raises(DataError, match=part):
        kernel_suite(**OPTIONS | options)


def test_command(tmp_path, monkeypatch):
    monkeypatch.setitem(bench_shapes.SHAPES, "tiny", TINY)
    words = ["bench", "--suite", "kernels", "--model", "tiny", "--plan", "compact", "--plan",
             "dispatcher", "--length", "16", "--pairs", "1", "--dtype", "float32"]  # fmt: skip
    shown = CliRunner().invoke(app, [*words, "--output", str(tmp_path / "k.json")])
    assert shown.exit_code == 0, shown.output
    assert "µs per call" in shown.stdout and "No Triton kernel was run" in shown.stdout
    assert len(json.loads((tmp_path / "k.json").read_text())["rows"]) == 2
    wrong = CliRunner().invoke(app, [*words, "--visual", "5"])
    assert wrong.exit_code == 2 and "visual" in wrong.stderr
