"""The results file of a sweep, its YAML, and runs that are stopped, shared or repeated."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import multiprocessing
import operator
import os
import random
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from eval_tiny import save_tiny
from rich.console import Console
from typer.testing import CliRunner

from mllm.cli import app
from mllm.compressors.base import Keep, TokenReducer
from mllm.errors import DataError, MllmError, PlanError
from mllm.eval import asking, cells, sweep, sweep_file, workers
from mllm.eval.forecast import forecast
from mllm.eval.provenance import describe_run
from mllm.loading import load_model
from mllm.plan import Plan, methods
from mllm.yardstick import samples

TASKS = ["color", "ocr_word"]


@pytest.fixture(autouse=True)
def short_answers(request, monkeypatch):
    """Two tokens are enough; other processes, which some slow tests start, would not know."""
    if not request.node.get_closest_marker("slow"):
        monkeypatch.setattr(asking, "MAX_NEW_TOKENS", 2)


def _run(loaded, path, methods=("visionzip",), budgets=(8,), tasks=TASKS, grid=None, **options):
    entries, _ = sweep.grid(loaded[0], methods, budgets, **(grid or {}))
    return list(sweep.run(*loaded, entries, tasks, path, **{"n": 4, "timings": 0} | options))


@pytest.fixture
def ran(monkeypatch):
    """Names of the cells that are computed."""
    names, compute = [], sweep._cell

    def counted(model, processor, questions, entry, *rest):
        names.append(entry.name)
        return compute(model, processor, questions, entry, *rest)

    monkeypatch.setattr(sweep, "_cell", counted)
    return names


def _cli(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result, json.loads(result.stdout) if result.stdout.startswith("{") else None


def _same(cell):
    """A cell without what two runs of the same thing may differ in."""
    return {k: v for k, v in cell.items() if k not in ("prefill_s", "about")}


# What is run, and what is reused


def test_cells_carry_schema_style_and_answers(loaded, tmp_path):
    for cell in _run(loaded, tmp_path / "s.jsonl"):
        assert (cell["schema"], cell["style"], cell["n_asked"]) == (1, "plain", 4)
        assert len(cell["answers"]) == 4
        right = [s["answer"].lower() for s in samples(cell["task"], n=4)]
        exact = "".join("01"[a == b] for a, b in zip(cell["answers"], right, strict=True))
        assert cell["outcomes"] == exact


def test_a_truncated_line_is_computed_again_and_no_other(loaded, tmp_path, ran):
    path = tmp_path / "s.jsonl"
    whole = _run(loaded, path)
    lines = path.read_text().splitlines(keepends=True)
    stump = lines[7][:40]
    path.write_text("".join(lines[:7]) + stump)
    assert cells.read(path) == cells.Cells(whole[:7], 1)
    assert path.read_text().endswith(stump)  # reading changes nothing
    ran.clear()
    assert _run(loaded, path) == whole
    assert len(ran) == len(whole) - 7
    assert path.read_text() == "".join(lines[:7]) + stump + "\n" + "".join(lines[7:])
    assert cells.read(path) == cells.Cells(whole, 1)


def test_a_whole_line_without_its_end_is_kept(loaded, tmp_path, ran):
    path = tmp_path / "s.jsonl"
    whole = _run(loaded, path, tasks=["color"])
    path.write_text(path.read_text()[:-1])
    ran.clear()
    _run(loaded, path, tasks=TASKS)
    assert len(ran) == len(whole)
    assert cells.read(path).damaged == 0


def test_only_what_is_new_runs(loaded, tmp_path, ran):
    path = tmp_path / "s.jsonl"
    first = _run(loaded, path, ["visionzip", "divprune"], (32, 8), grid={"seeds": [0, 1]})
    ran.clear()
    options = {"grid": {"seeds": [1, 0], "seeds_of": {"random": [2, 1, 0]}}}
    again = _run(
        loaded, path, ["divprune", "fastv", "visionzip", "random"], (8, 16, 32), TASKS[::-1],
        **options,
    )  # fmt: skip
    # 16 tokens are new for seven deterministic rows but fastv; so is fastv at 32, and seed 2.
    new = ["random @ 16", "random @ 16, seed 1", *(f"random @ {b}, seed 2" for b in (32, 16, 8)),
           "fastv @ 32", *(f"{m} @ 16" for m in ("downsample", "stride", "avgpool", "divprune",
                                                  "visionzip"))]  # fmt: skip
    assert sorted(ran) == sorted(new * 2)
    lines = path.read_text().splitlines()
    assert len(lines) == len(again) == len(first) + len(new) * 2
    assert len({cells.identity(json.loads(line)) for line in lines}) == len(lines)
    assert [json.loads(line) for line in lines[: len(first)]] == first


def test_fixed_plans_stand_beside_a_budget(loaded, tmp_path, ran):
    path = tmp_path / "s.jsonl"
    found = _run(loaded, path, (), (32,), ["color"], grid={"fixed": {"vtw:layer=1": 32}})
    ours = next(cell for cell in found if cell["method"] == "vtw:layer=1")
    rival = next(cell for cell in found if cell["method"] == "random")
    assert ours["plan"] == "vtw:layer=1" and ours["budget"] == rival["budget"] == 32
    assert ours["visual_avg"] != 32
    gap = ours["correct"] - rival["correct"]
    assert ours["vs_random"]["diff"] == pytest.approx(gap / ours["n"])


@pytest.mark.parametrize("other", [{"n": 3}, {"split": "dev"}, {"style": "dusk"}])
def test_other_questions_are_other_cells(loaded, tmp_path, ran, other):
    path = tmp_path / "s.jsonl"
    whole = _run(loaded, path, tasks=["color"])
    ran.clear()
    others = _run(loaded, path, tasks=["color"], **other)
    assert len(ran) == len(others) == len(whole)
    assert _run(loaded, path, tasks=["color"]) == whole
    assert len(ran) == len(whole)


def test_comparisons_are_with_the_first_seed(loaded, tmp_path):
    grid = {"seeds_of": {"random": [1, 0]}}
    found = _run(loaded, tmp_path / "s.jsonl", tasks=["color"], n=8, grid=grid)
    by_seed = {c["seed"]: c for c in found if c["method"] == "random"}
    ours = next(c for c in found if c["method"] == "visionzip")
    gap = ours["correct"] - by_seed[0]["correct"]
    assert ours["vs_random"]["diff"] == pytest.approx(gap / 8)
    assert by_seed[1]["vs_random"] is None


def test_lines_of_older_versions_are_reused(loaded, tmp_path, ran):
    path = tmp_path / "s.jsonl"
    whole = _run(loaded, path)
    old = [{k: v for k, v in c.items() if k not in ("schema", "style", "answers", "n_asked")}
           for c in whole]  # fmt: skip
    path.write_text("".join(json.dumps(c) + "\n" for c in old))
    ran.clear()
    assert _run(loaded, path) == old and not ran


def test_the_published_results_can_be_read():
    found = cells.read("benchmarks/results/yardstick-v1.jsonl")
    assert len(found.rows) == 115 and found.damaged == 0


# Seeds and positions


def test_methods_that_draw_say_so():
    seeded = {row["name"] for row in methods() if "seed" in [p["name"] for p in row["params"]]}
    drawing = {row["name"] for row in methods() if sweep.draws(Plan.from_spec(row["name"]))}
    assert drawing == seeded >= {"random"}


def test_drawing_without_saying_so_is_an_error(loaded):
    from dataclasses import dataclass

    import mllm

    @mllm.plan.register("test-secret-draw", stage="pre_llm")
    @dataclass
    class Secret(TokenReducer):
        positions: str | None = None

        def reduce(self, ctx):
            ctx.generators()
            return [Keep(ctx.valid)]

    try:
        from mllm.loading import build_inputs

        model, processor = loaded
        drawn = samples("color", n=1)[0]
        with mllm.patch(model, Secret()), pytest.raises(PlanError, match="does not declare"):
            model(**build_inputs(processor, [([drawn["image"]], drawn["question"])]))
    finally:
        del mllm.plan._REGISTRY["test-secret-draw"]


def test_grid_of_seeds_and_positions(loaded):
    entries, _ = sweep.grid(
        loaded[0], ["visionzip", "random:positions=compact"], [8], seeds=[3, 0],
        seeds_of={"random": [0, 1]}, sanity_positions=["original"],
    )  # fmt: skip
    seeds = {}
    for entry in entries:
        seeds.setdefault(entry.method, []).append(entry.plan.seed)
    assert seeds == {
        "unpatched": [0], "random": [0, 1], "downsample": [0], "stride": [0], "avgpool": [0],
        "random:positions=original": [0, 1], "downsample:positions=original": [0],
        "stride:positions=original": [0], "avgpool:positions=original": [0], "visionzip": [0],
    }  # fmt: skip
    assert entries[1].method == "random"


def test_models_whose_pictures_are_no_single_grid_are_refused(loaded, monkeypatch):
    model, processor = loaded
    asked = sweep.Questioning(n=2)
    sweep.check_tokens(model, processor, "find_image", asked)
    monkeypatch.setattr(model.config.vision_config, "image_size", 56)
    with pytest.raises(DataError, match="64 visual tokens, and budgets are fitted to 16"):
        sweep.check_tokens(model, processor, "color", asked)
    monkeypatch.setattr(model.config.vision_config, "image_size", [56, 56])
    with pytest.raises(DataError, match="no fixed number of visual tokens") as caught:
        sweep.grid(model, ["visionzip"], [8])
    assert caught.value.argument == "model"


# Batches, workers, memory: none changes an answer


OPTIONS = {"methods": ("visionzip",), "budgets": (24,), "n": 5, "tasks": ["relation", "ocr_word"]}


def _texts(found):
    names = ("key", "answers", "outcomes", "vs_random", "flops", "visual_avg")
    return sorted(json.dumps([cell[name] for name in names]) for cell in found)


def test_the_batch_size_changes_no_cell(loaded, tmp_path):
    whole = _run(loaded, tmp_path / "a.jsonl", **OPTIONS)
    for size in (2, 7):
        found = _run(loaded, tmp_path / f"{size}.jsonl", **OPTIONS, batch_size=size)
        assert _texts(found) == _texts(whole)


def test_a_worker_gives_the_cells_of_one_process(loaded, tmp_path):
    entries, _ = sweep.grid(loaded[0], ["visionzip"], [8])
    asked = sweep.Questioning(n=3, timings=0)
    jobs = [(task, entries[:3]) for task in TASKS]
    ours, theirs = multiprocessing.Pipe()
    for job in (*jobs, None):
        ours.send(job)
    workers._work(theirs, lambda: loaded, asked, torch.get_num_threads())
    theirs.close()
    said = []
    with contextlib.suppress(EOFError):
        while True:
            said.append(ours.recv())
    assert [kind for kind, _ in said] == (["start", "cell"] * 3 + ["done"]) * 2
    assert said[2] == ("start", (TASKS[0], entries[1].name))
    expected = list(sweep.evaluate(*loaded, jobs, asked))
    got = [value for kind, value in said if kind == "cell"]
    assert [(task, entry.name, _same(c)) for task, entry, c in got] == [
        (task, entry.name, _same(c)) for task, entry, c in expected
    ]


@pytest.mark.slow
def test_the_number_of_workers_changes_no_cell(folder, loaded, tmp_path):
    load = functools.partial(load_model, str(folder), device="cpu")
    whole = _run(loaded, tmp_path / "a.jsonl", **OPTIONS)
    found = _run(loaded, tmp_path / "b.jsonl", **OPTIONS, workers=2, load=load)
    assert _texts(found) == _texts(whole)
    assert _texts(cells.read(tmp_path / "b.jsonl").rows) == _texts(whole)


@pytest.mark.slow
def test_a_worker_that_dies_is_told(loaded, tmp_path):
    with pytest.raises(MllmError, match="exit code 3"):
        _run(loaded, tmp_path / "s.jsonl", workers=2, load=functools.partial(os._exit, 3))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_error_in_a_worker_is_the_error(loaded, tmp_path):
    load = functools.partial(load_model, "/nowhere")
    with pytest.raises(DataError, match="cannot load") as error:
        _run(loaded, tmp_path / "s.jsonl", workers=2, load=load)
    assert error.value.argument == "model"


def test_a_tower_without_memory_gives_the_same(loaded, tmp_path):
    model, processor = loaded
    questions = asking.Questions(processor, samples("color", n=4), 2, model.dtype, model.device)
    answers = []
    for limit in (0, 2**30):
        shared = asking.SharedTower(model, limit)
        for budget in (8, 9):
            entry = sweep.Entry("visionzip", budget, Plan.from_spec(f"visionzip:keep={budget}"))
            answers.append(sweep._cell(model, processor, questions, entry, shared, 0)["answers"])
        assert (shared.held > 0) == (limit > 0)
    assert answers[:2] == answers[2:]


# The results file


def test_another_model_is_refused(loaded, tmp_path):
    path = tmp_path / "s.jsonl"
    _run(loaded, path, tasks=["color"])
    before = path.read_text()
    other = load_model(str(save_tiny(tmp_path / "other", seed=1)), device="cpu")
    with pytest.raises(DataError, match="another model.*another --output"):
        _run(other, path)
    assert path.read_text() == before


SETTINGS = {
    "config": ("model.config", "vision_feature_layer", -1),
    "generation config": ("model.generation_config", "repetition_penalty", 1.5),
    "processor": ("processor.image_processor", "image_mean", [0.1, 0.2, 0.3]),
    "chat template": ("processor", "chat_template", "{{ messages }}"),
}


def _edit(monkeypatch, loaded, called):
    """As if a file of the model's folder had been edited before it was loaded."""
    where, name, value = SETTINGS[called]
    owner = operator.attrgetter(where)(SimpleNamespace(model=loaded[0], processor=loaded[1]))
    assert getattr(owner, name) != value
    monkeypatch.setattr(owner, name, value)


@pytest.mark.parametrize("called", SETTINGS)
def test_these_weights_with_other_settings_are_another_model(loaded, tmp_path, monkeypatch, called):
    path = tmp_path / "s.jsonl"
    first = _run(loaded, path, tasks=["color"])
    before = path.read_text()
    _edit(monkeypatch, loaded, called)
    with pytest.raises(DataError, match=f"another {called}; give another --output") as caught:
        _run(loaded, path, tasks=["color"])
    assert caught.value.argument == "output" and path.read_text() == before
    monkeypatch.undo()
    assert _run(loaded, path, tasks=["color"]) == first


def test_cells_that_do_not_tell_settings_are_known_by_weights(loaded, tmp_path, monkeypatch, ran):
    """As older ones, the published ones among them."""
    path = tmp_path / "s.jsonl"
    whole = _run(loaded, path, tasks=["color"])
    for cell in whole:
        cell["about"] = {k: v for k, v in cell["about"].items() if k not in cells.SETTINGS}
    path.write_text("".join(json.dumps(cell) + "\n" for cell in whole))
    ran.clear()
    _edit(monkeypatch, loaded, "processor")
    assert _run(loaded, path, tasks=["color"]) == whole and not ran


@pytest.mark.parametrize("name", ["zoo", "kv"])
def test_no_published_cell_of_the_embedded_model_is_asked_again(name):
    asked = sweep_file.combine(sweep_file.read(f"benchmarks/sweeps/{name}.yaml"), {})
    model, processor = load_model(device="cpu")
    entries, _ = sweep.grid(
        model, asked.methods[:3], asked.budgets, seeds_of=asked.seeds_of,
        kv_budgets=asked.kv_budgets,
    )  # fmt: skip
    questioning = sweep.Questioning(n=asked.n, timings=0, protocol=asked.protocol)
    about = describe_run(model, processor)
    assert cells.SETTINGS.keys() <= about.keys()
    tasks = sweep.chosen_tasks(asked.tasks)
    done, todo = sweep.split_cells(entries, tasks, asked.output, about, questioning)
    assert len(done) > len(entries) > 5 and len(todo) == 8 and not any(todo.values())


@pytest.mark.parametrize(
    "line, match",
    [
        ("my notes", "line 1: not JSON"),
        ('{"a": 1}', "line 1: not a cell"),
        ("[1, 2]", "line 1: not"),
        (None, "line 1: schema 2"),
    ],
)
def test_another_schema_is_refused(loaded, tmp_path, line, match):
    path = tmp_path / "s.jsonl"
    if line is None:
        (cell, *_) = _run(loaded, tmp_path / "good.jsonl", tasks=["color"])
        line = json.dumps(cell | {"schema": 2})
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=match):
        _run(loaded, path)
    assert path.read_text() == line + "\n"
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".lock"] == []


@pytest.mark.parametrize("name", ["s.json", "s.md", "S.CSV"])
def test_tables_are_not_written_over_the_cells(folder, tmp_path, name):
    path = tmp_path / name
    path.write_text("cells of hours\n")
    result, payload = _cli("sweep", "--model", folder, "-o", path, "--json")
    assert result.exit_code == 2 and payload["error"]["argument"] == "output"
    assert "written over its cells" in payload["error"]["message"]
    assert path.read_text() == "cells of hours\n"


def test_a_folder_is_no_results_file(folder, tmp_path):
    result, payload = _cli("sweep", "--model", folder, "--n", 1, "-o", tmp_path, "--json")
    assert result.exit_code == 2 and f"cannot read {tmp_path}" in payload["error"]["message"]


def test_two_writers_are_refused(tmp_path):
    path = tmp_path / "s.jsonl"
    with cells.ResultsFile(path):
        with pytest.raises(DataError, match=f"process {os.getpid()} is writing"):
            cells.ResultsFile(path).__enter__()
    with cells.ResultsFile(path):
        pass
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    path = tmp_path / "s.jsonl"
    script = (
        "import sys, time; from mllm.eval import cells\n"
        f"with cells.ResultsFile({str(path)!r}) as file:\n"
        "    file.append({'a': 1}); print('locked', flush=True); time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(DataError, match=f"process {holder.pid} is writing"):
            cells.ResultsFile(path).__enter__()
    finally:
        holder.kill()
        holder.wait()
    assert path.with_name("s.jsonl.lock").exists()
    with cells.ResultsFile(path) as file:
        file.append({"b": 2})
    assert path.read_text() == '{"a": 1}\n{"b": 2}\n'


def test_a_full_disk_is_told():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    file = cells.ResultsFile("/dev/full")
    with pytest.raises(DataError, match="No space left"):
        file.append({"a": 1})


_STUBBED = """
import sys, time
from mllm.eval import sweep
from mllm.loading import load_model

compute = sweep._cell
def slow(*arguments):
    time.sleep(0.03)
    return compute(*arguments)
sweep._cell = slow
loaded = load_model(sys.argv[1], device="cpu")
entries, _ = sweep.grid(loaded[0], ["visionzip"], [32, 8])
for _ in sweep.run(*loaded, entries, ["color", "ocr_word"], sys.argv[2], n=4, timings=0):
    print("cell", flush=True)
"""


@pytest.mark.slow
def test_killed_again_and_again_nothing_is_lost_or_doubled(folder, loaded, tmp_path):
    whole = _run(loaded, tmp_path / "whole.jsonl", budgets=(32, 8))
    path = tmp_path / "s.jsonl"
    rng = random.Random(0)
    for at in (3, 9):
        runner = subprocess.Popen(
            [sys.executable, "-c", _STUBBED, str(folder), str(path)],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        for _ in range(at):
            assert runner.stdout.readline() == "cell\n"
        time.sleep(rng.random() * 0.05)  # anywhere in the cell that follows
        runner.send_signal(signal.SIGKILL)
        assert runner.wait() == -signal.SIGKILL
        assert len(cells.read(path).rows) >= at
    found = _run(loaded, path, budgets=(32, 8))
    assert [_same(c) for c in found] == [_same(c) for c in whole]
    assert len(path.read_text().splitlines()) == len(whole) + cells.read(path).damaged


@pytest.mark.slow
def test_the_command_survives_kill_9_on_the_embedded_model(tmp_path):
    words = [sys.executable, "-m", "mllm", "sweep", "--plans", "visionzip", "--budgets",
             "16", "--tasks", "exist,color", "--n", "4", "--timings", "0", "--output"]  # fmt: skip
    subprocess.run([*words, str(tmp_path / "whole.jsonl")], check=True, capture_output=True)
    path = tmp_path / "s.jsonl"
    for lines in (2, 7):
        runner = subprocess.Popen(
            [*words, str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not path.exists() or path.read_bytes().count(b"\n") < lines:
            assert runner.poll() is None
            time.sleep(0.01)
        runner.send_signal(signal.SIGKILL)
        runner.wait()
    subprocess.run([*words, str(path)], check=True, capture_output=True)
    whole, found = (cells.read(tmp_path / f"{name}.jsonl").rows for name in ("whole", "s"))
    assert [_same(c) for c in found] == [_same(c) for c in whole]


# The YAML, the flags, the command


def _yaml(tmp_path, text):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "text, match",
    [
        ("version: 1\nbudget: [64]", "unknown key 'budget'; did you mean 'budgets'"),
        ("version: 1\nbudgets: 64", "budgets is a list.*not 64"),
        ("version: 1\nbudgets: []", "budgets is a list with at least one"),
        ("version: 1\nbudgets: [0]", "whole number from 1, not 0"),
        ("version: 1\nbudgets: [true]", "whole number from 1, not True"),
        ("version: 1\nbudgets: [64.0]", "not 64.0"),
        ("version: 1\nmethods: visionzip", "methods is a list"),
        ("version: 1\nmethods: [visionzap]", "visionzip"),
        ("version: 1\nmethods: ['visionzip:keep=64']", "sets keep from the budgets"),
        ("version: 1\ntasks: [colr]", "color"),
        ("version: 1\nsplit: tset", "'test' or 'dev' or 'train', not 'tset'"),
        ("version: 1\nstyle: dawn", "dusk"),
        ("version: 1\nn: many", "n is a whole number from 1"),
        ("version: 1\nseeds_of: {visionzip: [0, 1]}", "no row of this sweep that draws.*random"),
        ("version: 1\nseeds_of: [0, 1]", "seeds_of is methods with lists"),
        ("version: 1\nseeds_of: {random: []}", "seeds_of.random is a list"),
        ("version: 1\nfixed: [vtw]", "fixed is methods with budgets"),
        ("version: 1\nfixed: {vtw: [64]}", "fixed.vtw is a whole number from 1"),
        ("version: 1\nfixed: {vwt: 64}", "vwt"),
        ("version: 1\nfixed: {vtw: 65}", "65 is no budget of this sweep"),
        ("version: 1\nsanity_positions: [packed]", "'compact' or 'original'"),
        ("version: 1\nworkers: 2\ntimings: 8", "disturb"),
        ("version: 2\nbudgets: [64]", "version is 2"),
        ("budgets: [64]", "version is None"),
        ("version: 1\nn: 4\nn: 5", "line 3.*given twice"),
        ("version: 1\nn: [", "line"),
        ("- 1", "not a list of keys"),
    ],
)
def test_a_wrong_yaml_names_the_key_and_runs_nothing(folder, tmp_path, text, match):
    words = ("sweep", _yaml(tmp_path, text), "--model", folder, "-o", tmp_path / "out.jsonl")
    result, payload = _cli(*words, "--json")
    assert result.exit_code == 2, result.output
    assert re.search(match, payload["error"]["message"]), payload["error"]["message"]
    assert payload["error"]["argument"] and payload["error"]["expected"]
    assert [p.name for p in tmp_path.iterdir()] == ["grid.yaml"]


def test_flags_override_the_yaml(tmp_path):
    path = _yaml(tmp_path, "version: 1\nbudgets: [64]\nn: 7\nworkers: 2\nseeds_of: {random: [1]}")
    chosen = sweep_file.combine(sweep_file.read(path), {"n": 9, "budgets": [8, 4], "split": None})
    assert (chosen.n, chosen.budgets, chosen.workers, chosen.split) == (9, (8, 4), 2, "test")
    assert chosen.seeds_of == {"random": (1,)} and chosen.timed == 0
    assert sweep_file.SweepFile().timed == 8


def test_the_example_is_a_grid():
    chosen = sweep_file.combine(sweep_file.read("examples/sweep.yaml"), {})
    sweep.chosen_tasks(chosen.tasks)


def test_dry_run_says_what_is_missing_and_runs_nothing(folder, tmp_path):
    out = tmp_path / "s.jsonl"
    words = ["sweep", "--model", folder, "--plans", "visionzip", "--budgets", "32,8", "--tasks",
             "color,ocr_word", "--n", 3, "--timings", 0, "--output", out]  # fmt: skip
    result, payload = _cli(*words, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    ahead = payload["data"]
    assert (ahead["cells"], ahead["missing"]) == (22, 22) and ahead["flops"] > 0 < ahead["seconds"]
    assert not out.exists()
    result, _ = _cli(*words)
    assert result.exit_code == 0, result.output
    assert "22 cells, 22 missing" in result.stderr and "estimated" in result.stderr
    assert "[22/22] ocr_word visionzip @ 8: " in result.stderr and "vs random" in result.stderr
    assert "[22/22]" not in result.stdout and not (tmp_path / "s.jsonl.lock").exists()
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:-1]) + lines[-1][:50])
    result, payload = _cli(*words, "--dry-run", "--json")
    assert (payload["data"]["missing"], payload["data"]["damaged"]) == (1, 1)
    assert "1 damaged line skipped, its cell is computed again" in result.stderr
    result, payload = _cli(*words, "--json")
    assert result.exit_code == 0 and len(payload["data"]["rows"]) == 11


@pytest.mark.parametrize("terminal", [True, False])
def test_finished_cells_are_shown_and_reused_ones_are_not(terminal):
    from mllm.cli.sweep import _Display

    def cell(method, budget, versus):
        return {"task": "color", "method": method, "budget": budget, "seed": 0, "score": 0.8,
                "ci": [0.7, 0.9], "vs_random": versus}  # fmt: skip

    better = {"diff": 0.05, "ci": [-0.01, 0.11]}
    found = [cell("stride", 8, None), cell("unpatched", None, None), cell("divprune", 8, better)]
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, height=20)
    display = _Display(console, 3, 2)
    display.start("color", "divprune @ 8")
    assert list(display.follow(iter(found))) == found
    shown = console.file.getvalue()
    assert "divprune" in shown and "80.0 (70.0–90.0)" in shown and "stride" not in shown
    assert "+5.0 [-1.0, +11.0]" in shown
    assert ("newest cells" in shown) == terminal
    assert ("[1/2] color unpatched: " in shown) != terminal


def test_forecast_counts_the_prefills(loaded):
    """A grid of the unpatched model and two plans that share its tower."""
    model, processor = loaded
    asked = sweep.Questioning(n=5, timings=0)
    entries = [sweep.Entry("unpatched", None, Plan([]))]
    entries += [sweep.Entry("stride", 8, Plan.from_spec(f"stride:keep={k}")) for k in (8, 16)]
    found = forecast(model, processor, {"color": entries, "ocr_word": []}, 9, asked)
    shared = asking.SharedTower(model)
    questions = asking.Questions(processor, samples("color", n=1), 1, model.dtype, model.device)
    made = [sweep._cell(model, processor, questions, e, shared, 0)["flops"] for e in entries]
    alone = forecast(model, processor, {"color": entries[:1]}, 9, asked)
    again = forecast(model, processor, {"color": [entries[0], entries[0]]}, 9, asked)
    tower = 2 * alone.flops - again.flops
    assert (found.cells, found.missing) == (9, 3)
    assert alone.flops == pytest.approx(5 * made[0]) and 0 < tower < alone.flops
    assert found.flops == pytest.approx(5 * sum(made) - 2 * tower)
    assert forecast(model, processor, {"color": []}, 9, asked).seconds == 0


def test_about_names_the_backend_of_a_cell(loaded, tmp_path):
    """Another backend is another cell, of the same key."""
    (cell, *_) = _run(loaded, tmp_path / "s.jsonl", tasks=["color"])
    assert cell["about"]["backend"] == describe_run(loaded[0])["backend"] == "sdpa"
    other = cell | {"about": cell["about"] | {"backend": "eager"}}
    assert cells.identity(cell) != cells.identity(other)
    assert cells.identity(cell)[0] == cells.identity(other)[0]
