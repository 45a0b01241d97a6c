"""`mllm eval`, plain lmms-eval and `mllm sweep`, offline, on a tiny random model."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from eval_tiny import TOKENS
from test_eval_table import cell as planted
from typer.testing import CliRunner

import mllm
from mllm.cli import app
from mllm.errors import DataError, MllmError, PlanError
from mllm.eval import asking, sweep, table, tasks
from mllm.eval import cells as results
from mllm.eval.plans import make_plan, plan_for_budget
from mllm.yardstick import ADMITTED, TASKS, samples

FOLDER = Path(tasks.PATH) / "yardstick"


def _cli(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result, json.loads(result.stdout) if result.stdout.startswith("{") else None


# Task definitions


def test_every_yardstick_task_has_a_yaml():
    named = {path.stem for path in FOLDER.glob("[!_]*.yaml")}
    assert named == set(TASKS)
    for task in TASKS:
        text = yaml.safe_load((FOLDER / f"{task}.yaml").read_text())
        assert text == {"include": "_yardstick_yaml", "task": f"yardstick_{task}"}


def test_groups_hold_the_right_tasks():
    everything = yaml.safe_load((FOLDER / "_yardstick_all.yaml").read_text())["task"]
    assert everything == [f"yardstick_{task}" for task in TASKS]
    quoted = yaml.safe_load((FOLDER / "_yardstick.yaml").read_text())["task"]
    if ADMITTED:  # no model, no list
        assert quoted == [f"yardstick_{task}" for task in ADMITTED]


# mllm eval


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    pytest.importorskip("lmms_eval")
    output = tmp_path_factory.mktemp("results")
    result, payload = _cli(
        "eval", "--model", folder, "--plan", "none", "--plan", "visionzip:keep=8", "--tasks",
        "yardstick_color,yardstick_ocr_word", "--limit", 5, "--batch-size", 3, "--split", "dev",
        "--output", output, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return payload, output


def test_eval_reports_score_and_cost(run):
    payload, _ = run
    assert payload["command"] == "eval" and payload["ok"]
    plain, cut = payload["data"]
    assert (plain["plan"], cut["plan"]) == ("unpatched", "visionzip:keep=8")
    for row in plain["rows"] + cut["rows"]:
        assert row["n"] == 5 and row["ci"][0] <= row["score"] <= row["ci"][1]
    assert [row["task"] for row in cut["rows"]] == ["yardstick_color", "yardstick_ocr_word"]
    assert [row["visual_avg"] for row in plain["rows"]] == [TOKENS, TOKENS]
    assert [row["visual_avg"] for row in cut["rows"]] == [8, 8]
    about = cut["mllm"]
    assert about["plan"]["stages"][0]["name"] == "visionzip"
    assert about["plan_sha256"] == make_plan("visionzip:keep=8").sha256
    assert about["n"] == 10 and about["totals"]["kept_llm"] == 80
    fields = {"weights_sha256", "dtype", "backend", "device", "threads", "versions", "commit"}
    assert fields | {"seed"} <= set(about)


def test_eval_writes_results_and_samples(run):
    payload, output = run
    for record, kept in zip(payload["data"], (TOKENS, 8), strict=True):
        results, *written = map(Path, record["files"])
        assert results.parent.parent == output
        loaded = json.loads(results.read_text())
        assert loaded["mllm"] == record["mllm"]
        assert "exact_match,none" in loaded["results"]["yardstick_color"]
        for path, task in zip(written, ("color", "ocr_word"), strict=True):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            drawn = samples(task, split="dev", n=5)
            assert [row["doc"]["question"] for row in rows] == [d["question"] for d in drawn]
            assert [row["target"] for row in rows] == [d["answer"] for d in drawn]
            assert {row["mllm"]["kept_llm"] for row in rows} == {kept}
    assert not list(output.rglob("*.tmp"))


def test_eval_table(folder):
    pytest.importorskip("lmms_eval")
    result, _ = _cli("eval", "--model", folder, "--tasks", "yardstick_color", "--limit", 2)
    assert result.exit_code == 0, result.output
    assert "unpatched" in result.stdout and "color" in result.stdout


@pytest.mark.parametrize(
    "words, kind, match",
    [
        (["--tasks", "yardstik_colour"], "MllmError", "yardstick_color"),
        (["--plan", "visonzip:keep=8"], "PlanError", "visionzip"),
        (["--plan", "fastv:layer=9"], "PlanError", "layer"),
        (["--output", "/proc/nowhere"], "DataError", "/proc/nowhere"),
        (["--model", "/nowhere"], "DataError", "/nowhere"),
        (["--tasks", "yardstick_color", "--split", "tset"], "DataError", "test"),
    ],
)
def test_eval_bad_input(folder, words, kind, match):
    pytest.importorskip("lmms_eval")
    base = ["--model", folder, "--tasks", "yardstick_color", "--limit", 2]
    result, payload = _cli("eval", *base, *words, "--json")
    assert result.exit_code == 2
    assert payload["error"]["type"] == kind and match in payload["error"]["message"]
    result, _ = _cli("eval", *base, *words)
    assert result.exit_code == 2 and "Traceback" not in result.output


@pytest.mark.slow  # lmms-eval reads its two thousand task files first
def test_plain_lmms_eval_works(folder, tmp_path):
    """The entry point is enough: no wrapper, no network."""
    pytest.importorskip("lmms_eval")
    info = tmp_path / "site" / "mllm_efficiency-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mllm-efficiency\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[lmms_eval.models]\nmllm = mllm.eval.registry:manifests\n"
    )
    root = Path(mllm.__file__).parents[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(root), str(info.parent)]),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    words = [
        sys.executable, "-m", "lmms_eval", "--model", "mllm", "--tasks", "yardstick_ocr_word",
        "--model_args", f"pretrained={folder},plan=visionzip:keep=8+fastv:layer=1:keep=4",
        "--include_path", tasks.PATH, "--limit", "3", "--batch_size", "2", "--log_samples",
        "--output_path", str(tmp_path / "out"), "--device", "cpu",
    ]  # fmt: skip
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    (path,) = tmp_path.rglob("*_samples_yardstick_ocr_word.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["token_counts"][0]["mllm"]["kept_llm"] for row in rows] == [8, 8, 8], done.stdout
    (path,) = tmp_path.rglob("*_results.json")
    results = json.loads(path.read_text())
    assert results["throughput"]["avg_visual_avg"] == 5.0  # one layer of 8, three of 4


# Budgets


@pytest.mark.parametrize(
    "template, budget, spec",
    [
        ("visionzip", 100, "visionzip:keep=100"),
        ("fastv:layer=2", 192, "fastv:layer=2:keep=64"),
        ("fastv", 192, "fastv:layer=1:keep=137"),
        ("fastv:layer=3", 192, "fastv:layer=2:keep=64"),
        ("visionzip+fastv:layer=2", 64, "visionzip:keep=96+fastv:layer=2:keep=53"),
        ("tome", 100, "tome:keep=100"),
        ("vscan", 100, "vscan_vision:keep=150+vscan_llm:layer=4:keep=50"),
        ("vmtc+cmai", 100, "vmtc:keep=100+cmai"),
        ("pyramiddrop", 288, "pyramiddrop:layers=2/4/6:keep=313/170/93"),
    ],
)
def test_budgets_are_layer_averages(template, budget, spec):
    plan = plan_for_budget(template, budget, tokens=576, num_layers=8)
    assert plan.spec == spec


@pytest.mark.parametrize(
    "template, budget, match",
    [
        ("fastv", 64, "the least is 72.9"),
        ("fastv+visionzip", 64, "one stage before"),
        ("random+stride", 64, "one stage before"),
        ("cmai", 64, "with keep"),
        ("pyramiddrop", 64, "the least is"),
        ("visionzip", 577, "does not fit"),
        ("visionzip", 0, "does not fit"),
    ],
)
def test_budgets_out_of_reach(template, budget, match):
    with pytest.raises(PlanError, match=match):
        plan_for_budget(template, budget, tokens=576, num_layers=8)


# mllm sweep


def _sweep(loaded, path, **options):
    entries, skipped = sweep.grid(loaded[0], ["visionzip", "fastv"], [32, 8])
    options = {"n": 5, "batch_size": 2, "timings": 1} | options
    return list(sweep.run(*loaded, entries, ["color", "ocr_word"], path, **options)), skipped


def test_sweep_gives_the_cells_of_the_contract(loaded, tmp_path):
    cells, skipped = _sweep(loaded, tmp_path / "s.jsonl")
    assert [(s.method, s.budget) for s in skipped] == [("fastv", 8)]
    assert len(cells) == 2 * (1 + 2 * 6 - 1)
    promised = {
        "method", "params", "budget", "task", "seed", "n", "correct", "score", "ci", "vs_random",
        "vs_downsample", "visual_avg", "flops", "prefill_s",
    }  # fmt: skip
    for cell in cells:
        assert promised <= set(cell)
        assert cell["correct"] == cell["outcomes"].count("1") and cell["n"] == 5
        if cell["method"] in ("random", "visionzip", "stride"):
            assert cell["visual_avg"] == cell["budget"]
        if cell["budget"]:
            assert abs(cell["visual_avg"] - cell["budget"]) <= 2
        assert (cell["vs_random"] is None) == (cell["method"] in ("random", "unpatched"))
    assert results.read(tmp_path / "s.jsonl").rows == cells


@pytest.mark.parametrize("spec", ["none", "random:keep=8", "divprune:keep=8", "visionzip:keep=8",
                                  "fastv:layer=1:keep=9", "downsample:keep=16"])  # fmt: skip
def test_sweep_predicts_like_lmms_eval(loaded, spec):
    """Shared tower output and shared batches change no answer."""
    pytest.importorskip("lmms_eval")
    from test_eval_lmms import _ask, _model

    from mllm.eval.plans import patched_with

    model, processor = loaded
    drawn = samples("color", n=4) + samples("ocr_word", n=3)
    docs = [{"images": [d["image"]], "text": d["question"]} for d in drawn]
    options = {"max_new_tokens": asking.MAX_NEW_TOKENS, "until": list(asking.STOPS)}
    expected = [r.text for r in _ask(_model(loaded, docs, spec), docs, options)]

    questions = asking.Questions(processor, drawn, 3, model.dtype, model.device)
    shared = asking.SharedTower(model)
    plan = make_plan(spec)
    for _ in range(2):  # the second time from memory
        with patched_with(model, plan) as patched, shared.used_by(plan):
            found = asking.answer_all(model, processor, questions, patched)
        assert [a.text for a in found] == expected
    assert "forward" not in shared.tower.__dict__


def test_tower_runs_once_for_plans_after_it(loaded):
    model, processor = loaded
    drawn = samples("color", n=2)
    questions = asking.Questions(processor, drawn, 2, model.dtype, model.device)
    shared = asking.SharedTower(model)
    calls = []
    hook = shared.tower.embeddings.register_forward_hook(lambda *_: calls.append(1))

    def run(*specs):
        calls.clear()
        for spec in specs:
            entry = sweep.Entry(spec, 8, make_plan(spec))
            sweep._cell(model, processor, questions, entry, shared, 0)
        return len(calls)

    assert run("none", "random:keep=8", "divprune:keep=8", "fastv:layer=1:keep=9") == 1
    assert run("visionzip:keep=8", "visionzip:keep=9", "none") == 1  # it reads attention there
    assert run("downsample:keep=16", "downsample:keep=16") == 2  # another picture
    hook.remove()


def test_sweep_command_writes_the_table(folder, tmp_path):
    words = ["sweep", "--model", folder, "--budgets", "32,8", "--tasks", "color,ocr_word",
             "--n", 3,
             "--timings", 1, "--output", tmp_path / "new" / "t.jsonl"]  # fmt: skip
    result, _ = _cli(*words)
    assert result.exit_code == 0, result.output
    built = json.loads((tmp_path / "new" / "t.json").read_text())
    assert [p.suffix for p in sorted((tmp_path / "new").iterdir())] == [
        ".csv", ".json", ".jsonl", ".md",
    ]  # fmt: skip
    assert {row["method"] for row in built["rows"]} >= {"unpatched", *sweep.METHODS}
    assert built["skipped"][0]["method"] == "fastv"
    text = (tmp_path / "new" / "t.md").read_text()
    assert "not better than random" in text and "Not reachable" in text
    lines = list(csv.DictReader((tmp_path / "new" / "t.csv").open()))
    assert len(lines) == len(built["rows"]) * 3
    result, payload = _cli(*words, "--json")
    assert payload["data"]["rows"] == built["rows"]


@pytest.mark.parametrize(
    "words, match",
    [
        (["--tasks", "colr"], "color"),
        (["--budgets", "8,x"], "budgets|number of tokens"),
        (["--budgets", "1000"], "does not fit"),
        (["--plans", "vizionzip"], "visionzip"),
        (["--output", "/proc/nowhere/x.jsonl"], "/proc/nowhere"),
    ],
)
def test_sweep_bad_input(folder, tmp_path, words, match):
    base = ["sweep", "--model", folder, "--tasks", "color", "--budgets", "8", "--n", 2]
    result, payload = _cli(*base, "--output", tmp_path / "x.jsonl", *words, "--json")
    assert result.exit_code == 2
    assert re.search(match, payload["error"]["message"])
    assert not (tmp_path / "x.jsonl").exists()


def test_a_foreign_file_is_not_overwritten(loaded, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my notes\nmore\n")
    with pytest.raises(DataError, match="line 1"):
        _sweep(loaded, path)
    assert path.read_text() == "my notes\nmore\n"


# The table


def test_words_follow_the_numbers():
    rows = {
        "unpatched": ("1" * 40, "1" * 40), "random": ("10" * 20, "10" * 20),
        "downsample": ("01" * 20, "10" * 20), "good": ("1" * 40, "1" * 30 + "0" * 10),
        "bad": ("0" * 40, "10" * 20),
    }  # fmt: skip
    cells = [
        planted(name, None if name == "unpatched" else 8, task, map(int, rows[name][i]))
        for i, task in enumerate(("color", "ocr_word"))
        for name in rows
    ]
    built = table.build(cells)
    said = built["words"][0]
    assert said.startswith("At 8 tokens, over all tasks, good (+37.5 [")
    assert "beats random" in said and "downsample (+0.0 [" in said
    assert "is not better than random" in said and "is worse than random" in said
    assert "On color, good beats random." in said
    assert built["rows"][0]["method"] == "unpatched"
    good = next(row for row in built["rows"] if row["method"] == "good")
    assert good["vs_unpatched"]["flipped"] == 10 and good["tasks"]["color"]["score"] == 1.0
    assert "| good | 8 | 100.0 ▲ |" in table.markdown(built)


def test_a_wrong_task_names_its_neighbours():
    with pytest.raises(MllmError, match="needle_color"):
        sweep.chosen_tasks(["needle_colour"])
