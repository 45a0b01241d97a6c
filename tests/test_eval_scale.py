"""`mllm eval` that is killed, repeated, spread over processes, or given the wrong folder."""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_tiny import save_tiny
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("lmms_eval")

from mllm import compat  # noqa: E402
from mllm.cli import app  # noqa: E402
from mllm.errors import DataError, MllmError  # noqa: E402
from mllm.eval import cells, engines, files, responses, run_folder, runner  # noqa: E402
from mllm.eval.lmms import MllmModel  # noqa: E402
from mllm.eval.prompts import Asked, Prompt, ask, batches  # noqa: E402
from mllm.eval.runner import evaluate  # noqa: E402
from mllm.plan import Plan  # noqa: E402

PLANS = ["none", "fastv:layer=1:keep=9"]
TASKS = ["yardstick_color", "yardstick_ocr_word"]
OPTIONS = {"limit": 5, "batch_size": 2, "device": "cpu"}
#: What two runs of the same thing differ in.
TIMES = {"seconds", "decode_s", "ttft_s", "date", "throughput"}


@pytest.fixture(scope="module")
def whole(folder, loaded, tmp_path_factory):
    """An evaluation that nothing has disturbed."""
    output = tmp_path_factory.mktemp("whole")
    return output, _evaluate(folder, loaded, output)


def _evaluate(folder, loaded, output, **options):
    load = functools.partial(_give, loaded)
    plans = options.pop("plans", PLANS)
    return evaluate(
        str(folder), plans, TASKS, output=output, load=load, **OPTIONS | options
    )


def _give(loaded, device):
    return loaded


def _answers(records):
    return [
        {name: record["answers"][name] for name in ("kept", "computed")} for record in records
    ]


def _timeless(value):
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in TIMES}
    return [_timeless(one) for one in value] if isinstance(value, list) else value


def _written(output):
    """Every file of an output folder by its name without the time stamp, without times."""
    found = {}
    for path in sorted(output.rglob("*")):
        if path.is_dir():
            continue
        lines = path.read_text().splitlines()
        if path.name == run_folder.NAME:
            about = json.loads("".join(lines))
            content = about | {"runs": sorted(about["runs"])}
        elif path.name == responses.NAME:  # several processes finish in any order
            content = sorted(json.dumps(_timeless(json.loads(line))) for line in lines if line)
        elif path.suffix == ".json":
            content = _timeless(json.loads("\n".join(lines)))
        else:
            content = [_timeless(json.loads(line)) for line in lines]
        name = "_".join(part for part in path.name.split("_") if not part.isdigit())
        name = f"{path.parent.relative_to(output)}/{name}"
        assert name not in found, f"{name} is there twice"
        found[name] = content
    return found


# Going on


def test_the_files_of_a_run(whole):
    output, records = whole
    assert set(_written(output)) == {
        "./evaluation.json", "./responses.jsonl",
        *(f"{plan}/{name}" for plan in ("unpatched", "fastv_layer=1_keep=9")
          for name in ("results.json", "samples_yardstick_color.jsonl",
                       "samples_yardstick_ocr_word.jsonl")),
    }  # fmt: skip
    assert _answers(records) == [{"kept": 0, "computed": 10}] * 2


def test_the_same_command_again_asks_nothing_and_changes_no_file(folder, loaded, whole):
    output, records = whole
    before = {path: path.read_bytes() for path in output.rglob("*_samples_*")}
    again = _evaluate(folder, loaded, output)
    assert _answers(again) == [{"kept": 10, "computed": 0}] * 2
    assert [one["files"] for one in again] == [one["files"] for one in records]
    assert {path: path.read_bytes() for path in output.rglob("*_samples_*")} == before
    assert [one["rows"] for one in again] == [one["rows"] for one in records]


def _kill(folder, loaded, output, wait, pause=0.0, **options):
    """Evaluate in a forked process that is killed when `wait(path of the answers)` returns."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1), os.dup2(nowhere.fileno(), 2)
            torch.set_num_threads(1)
            compute = engines.answer_batch

            def slowly(*arguments):
                time.sleep(pause)
                return compute(*arguments)

            engines.answer_batch = slowly
            _evaluate(folder, loaded, output, **options)
        os._exit(0)
    with contextlib.suppress(StopIteration):
        wait(output / responses.NAME, lambda: os.waitpid(child, os.WNOHANG)[0] == 0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _lines(count, rng, path, alive):
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert alive()
        time.sleep(0.002)
    time.sleep(rng.random() * 0.1)  # anywhere in the batch that follows


@pytest.mark.slow
def test_killed_twice_the_command_goes_on(folder, loaded, whole, tmp_path):
    rng = random.Random(0)
    for count in (3, 9):
        _kill(folder, loaded, tmp_path, functools.partial(_lines, count, rng), pause=0.1)
        assert not list(tmp_path.glob("*/*_results.json")) or count > 6
    records = _evaluate(folder, loaded, tmp_path)
    kept = sum(answers["kept"] for answers in _answers(records))
    assert 2 * 8 - 2 <= kept < 20
    (tmp_path / "evaluation.json.lock").unlink(missing_ok=True)
    assert _written(tmp_path) == _written(whole[0])


@pytest.mark.slow
def test_killed_at_random_moments(folder, loaded, whole, tmp_path):
    """Anywhere: before the first answer, in a line, between files, after the end."""
    rng = random.Random(1)
    started = time.perf_counter()
    _evaluate(folder, loaded, tmp_path / "timed")
    lasts = time.perf_counter() - started

    def moment(path, alive):
        end = time.perf_counter() + rng.random() * 1.3 * lasts
        while time.perf_counter() < end and alive():
            time.sleep(0.001)

    for number in range(18):
        output = tmp_path / str(number)
        try:
            _kill(folder, loaded, output, moment)
        except (ProcessLookupError, ChildProcessError):
            pass  # it was done before
        _evaluate(folder, loaded, output)
        assert _written(output) == _written(whole[0])


@pytest.mark.parametrize("cut", [1, 40])
def test_a_truncated_answer_is_asked_again_and_no_other(folder, loaded, whole, tmp_path, cut):
    path = tmp_path / responses.NAME
    text = (whole[0] / responses.NAME).read_text()
    path.write_text(text[:-cut])
    records = _evaluate(folder, loaded, tmp_path)
    again = 0 if cut == 1 else 1  # only the end of the line was lost, or something of it
    assert records[0]["answers"] == {"kept": 10, "computed": 0, "damaged": again}
    assert 10 - records[1]["answers"]["kept"] in ((0,) if cut == 1 else (1, 2))
    lines = path.read_text().splitlines()
    assert lines[:-1 - again] == text.splitlines()[:-1]
    assert _timeless(json.loads(lines[-1])) == _timeless(json.loads(text.splitlines()[-1]))


def test_truncated_and_lost_result_files_are_made_anew(folder, loaded, whole, tmp_path):
    _evaluate(folder, loaded, tmp_path)
    samples, other = sorted(tmp_path.glob("unpatched/*_samples_*"))
    content = samples.read_text(), other.read_text()
    samples.write_text(content[0][:100])
    other.unlink()
    stump = tmp_path / "unpatched" / f".{samples.name}.123.tmp"
    stump.write_text("half")
    mine = tmp_path / "unpatched" / ".mine.tmp"
    mine.write_text("not ours")
    assert _answers(_evaluate(folder, loaded, tmp_path))[0] == {"kept": 10, "computed": 0}
    assert (samples.read_text(), other.read_text()) == content
    assert not stump.exists() and mine.exists()


def test_the_folder_of_a_long_plan_has_a_name(tmp_path):
    """File systems allow 255 characters."""
    long = "+".join(f"fastv:layer={k}:keep=9" for k in range(1, 20))
    names = {runner._slug(spec) for spec in (long, long + "0", "a:b")}
    assert len(names) == 3 and "a_b" in names
    for name in names:
        (tmp_path / name).mkdir()


def test_arrays_of_a_document_are_written(tmp_path):
    path = files.write_json(tmp_path / "a.json", {"box": np.arange(3), "one": np.float32(0.5)})
    assert json.loads(path.read_text()) == {"box": [0, 1, 2], "one": 0.5}


def test_a_document_counts_once_however_many_filters_a_task_has():
    """lmms-eval logs a sample for each filter, those of the first one first."""
    cost = {"batch": 1, "ttft_s": 0.5, "decode_s": 0.5} | dict.fromkeys(runner._SUMS, 4)
    logged = [
        {"doc_id": i, "exact_match": value, "token_counts": [{"mllm": cost}], "arguments": []}
        for values in ([1, 0, 1, 0], [0, 0, 0, 0])
        for i, value in enumerate(values)
    ]
    results = {"results": {"gsm8k": {"exact_match,strict": 0.5, "exact_match,loose": 0.0}}}
    record = runner._record(Plan([]), results, {"gsm8k": logged}, {}, 1.0)
    (row,) = record["rows"]
    assert (row["n"], row["score"]) == (4, 0.5) and row["ci"][0] < 0.5 < row["ci"][1]
    assert record["mllm"]["n"] == 4 and record["mllm"]["totals"]["kept_llm"] == 16


# The answers that are kept


def test_only_what_is_new_is_asked(folder, loaded, tmp_path):
    def run(**options):
        return _answers(_evaluate(folder, loaded, tmp_path, **{"plans": ["none"]} | options))

    assert run(limit=3) == [{"kept": 0, "computed": 6}]
    first = {path: path.read_bytes() for path in tmp_path.glob("unpatched/*")}
    assert run(limit=5) == [{"kept": 6, "computed": 4}]
    assert run(limit=5, batch_size=4) == [{"kept": 10, "computed": 0}]
    assert run(limit=4, plans=["random:keep=9"]) == [{"kept": 0, "computed": 8}]
    assert run(limit=4, plans=["random:keep=9"], seed=1) == [{"kept": 0, "computed": 8}]
    # Times of single samples are asked for: answers of a batch have none.
    alone = _evaluate(folder, loaded, tmp_path, plans=["none"], batch_size=1)
    assert alone[0]["rows"][0]["seconds"] > 0 and alone[0]["answers"]["computed"] > 0
    assert run(batch_size=1) == [{"kept": 10, "computed": 0}]
    assert all(path.read_bytes() == content for path, content in first.items())


def test_a_shared_cache_serves_other_outputs(folder, loaded, tmp_path):
    run = functools.partial(_evaluate, folder, loaded, plans=["none"], cache=tmp_path / "cache")
    assert _answers(run(tmp_path / "a")) == [{"kept": 0, "computed": 10}]
    assert _answers(run(tmp_path / "b")) == [{"kept": 10, "computed": 0}]
    assert not (tmp_path / "a" / responses.NAME).exists()
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert _answers(run(None)) == [{"kept": 10, "computed": 0}]


def test_nothing_is_kept_without_a_folder(folder, loaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = _evaluate(folder, loaded, None, plans=["none"], limit=1)[0]
    assert record["answers"] == {"kept": 0, "computed": 2, "damaged": 0}
    assert not list(tmp_path.iterdir())


def test_plain_lmms_eval_has_the_cache_too(loaded, tmp_path):
    from test_eval_lmms import _instance, _messages

    doc = {"images": [Image.new("RGB", (112, 112), "red")], "text": "what color is it?"}

    def ask_it():
        model = MllmModel("tiny", "none", loaded=loaded, cache=str(tmp_path))
        model.task_dict = {"task": {"test": [doc]}}
        found = model.generate_until(
            [_instance("generate_until", "", _messages, {"max_new_tokens": 2}, 0, "task", "test")]
        )
        model.clean()
        return found[0].text, model.counts

    (text, first), (again, second) = ask_it(), ask_it()
    assert (first, second) == ({"kept": 0, "computed": 1}, {"kept": 1, "computed": 0})
    assert text == again


@pytest.fixture
def prompt():
    return Prompt("<image> what?", [Image.new("RGB", (112, 112), "red")], {"max_new_tokens": 2})


def test_keys_change_with_everything_that_an_answer_depends_on(loaded, prompt):
    _, processor = loaded

    def keys(*prompts, facts=("weights",)):
        return [one.key for one in ask(processor, [lambda p=p: p for p in prompts], facts)]

    blue = Image.new("RGB", (112, 112), "blue")
    others = [
        prompt, prompt, Prompt("<image> who?", prompt.images, prompt.options),
        Prompt(prompt.text, [blue], prompt.options),
        Prompt(prompt.text, prompt.images, {"max_new_tokens": 3}),
        Prompt(prompt.text, prompt.images, prompt.options, [5]),
        Prompt(prompt.text, prompt.images, prompt.options, [6]),
    ]  # fmt: skip
    found = keys(*others)
    assert len(set(found)) == len(found)  # asked twice, a prompt has two answers
    assert keys(*others) == found
    assert not set(keys(*others, facts=("other",))) & set(found)


def test_answers_depend_on_model_plan_dtype_and_backend(loaded):
    def facts(plan, seed=0, **changed):
        engine = engines.Here(*loaded)
        model = MllmModel("tiny", plan, seed=seed, engine=engine)
        engine._described = {"about": engine.about, "facts": engine.facts | changed}
        found = json.dumps(model._depends_on())
        model.clean()
        return found

    found = [
        facts("none"), facts("fastv:layer=1:keep=9"), facts("fastv:layer=1:keep=8"),
        facts("random:keep=9"), facts("random:keep=9", seed=1), facts("none", dtype="bfloat16"),
        facts("none", backend="eager"), facts("none", weights_sha256="0"),
        facts("none", config_sha256="0"), facts("none", processor_sha256="0"),
        facts("none", device="cuda"),
    ]  # fmt: skip
    assert len(set(found)) == len(found)
    assert facts("none") == found[0] == facts("none", name="elsewhere")


# Batches


def _asked(*shapes, options="{}"):
    return [Asked(str(i), options, shape, None) for i, shape in enumerate(shapes)]


def test_batches_have_one_shape_where_they_can():
    asked = _asked((10, 64), (12, 64), (10, 64), (12, 64), (10, 64))
    assert batches(asked, 2) == [[0, 2], [1, 3], [4]]
    # What is left over shares batches with about its length, not with any.
    assert batches(_asked((100, 64), (104, 64), (200, 64), (9,)), 4) == [[0, 1], [2], [3]]
    mixed = _asked((10,), (10,)) + _asked((10,), options="other")
    assert batches(mixed, 8) == [[0, 1], [2]]
    assert batches(_asked((10, 3), (10, 2, 1)), 8) == [[0], [1]]  # one picture, two pictures
    assert batches([], 4) == []


def test_every_prompt_is_in_one_batch():
    rng = random.Random(0)
    asked = _asked(*[(rng.randrange(20, 40), 64) for _ in range(101)])
    found = batches(asked, 8)
    assert sorted(index for batch in found for index in batch) == list(range(101))
    assert max(map(len, found)) == 8 and len(found) < 101 / 8 + 5
    for batch in found:
        lengths = [asked[index].length for index in batch]
        assert min(lengths) >= 15 / 16 * max(lengths)


@pytest.mark.parametrize("tells", [True, False])
def test_the_shape_is_the_prompts_true_length(loaded, monkeypatch, tells):
    _, processor = loaded
    if not tells:  # as some processors do not: then the prompt is made to see
        monkeypatch.setattr(compat, "visual_tokens", lambda *_: None)
    images = [Image.new("RGB", size, "red") for size in ((112, 112), (300, 50))]
    prompts = [
        Prompt("USER: <image> what is it?", images[:1]), Prompt("<image> and <image>?", images),
        Prompt("who are you?", []),
    ]  # fmt: skip
    for prompt, asked in zip(
        prompts, ask(processor, [lambda p=p: p for p in prompts], ()), strict=True
    ):
        made = processor(text=[prompt.text], images=prompt.images or None, return_tensors="pt")
        # Where they are counted, a placeholder stands beside its tokens.
        beside = len(prompt.images) if tells else 0
        assert asked.length - beside == made["input_ids"].shape[1]
        assert len(asked.shape) == 1 + len(prompt.images)


# Several processes


@pytest.mark.slow
def test_two_processes_give_the_same_files(folder, loaded, whole, tmp_path, monkeypatch):
    # Forked for once: the children need not import everything again.
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(engines.multiprocessing, "get_context", lambda name: context)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        records = _evaluate(folder, loaded, tmp_path, workers=2)
    finally:
        torch.set_num_threads(threads)
    assert _answers(records) == [{"kept": 0, "computed": 10}] * 2
    one, two = _written(whole[0]), _written(tmp_path)
    for written in (one, two):
        for name in [name for name in written if name.endswith("results.json")]:
            assert written[name]["mllm"].pop("threads") >= 1
            assert written[name]["config"].pop("device") == "cpu"
    assert two == one


def test_a_worker_that_dies_is_told(folder, loaded, tmp_path, monkeypatch):
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(engines.multiprocessing, "get_context", lambda name: context)
    monkeypatch.setattr(engines, "answer_batch", lambda *_: os._exit(9))
    with pytest.raises(MllmError, match="worker process died .exit code 9"):
        _evaluate(folder, loaded, tmp_path, workers=2)
    assert not list(tmp_path.glob("*/*_results.json"))


def test_an_interrupt_with_workers_stays_one(folder, loaded, tmp_path, monkeypatch):
    """Ctrl-C ends the workers too; that they are gone is not what went wrong."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(engines.multiprocessing, "get_context", lambda name: context)

    def interrupted(pipes):
        for process in multiprocessing.active_children():
            process.kill()
            process.join()
        raise KeyboardInterrupt

    monkeypatch.setattr(engines, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _evaluate(folder, loaded, tmp_path, workers=2)


@pytest.mark.slow
def test_the_command_with_two_processes_and_kill_9(folder, tmp_path):
    words = [
        sys.executable, "-m", "mllm", "eval", "--model", str(folder), "--device", "cpu",
        "--tasks", ",".join(TASKS), "--limit", "8", "--batch-size", "2", "--output",
    ]  # fmt: skip
    subprocess.run([*words, str(tmp_path / "whole")], check=True, capture_output=True)
    path = tmp_path / "s" / responses.NAME
    runner = subprocess.Popen([*words, str(tmp_path / "s"), "--workers", "2"])
    while not path.exists() or path.read_bytes().count(b"\n") < 3:
        assert runner.poll() is None
        time.sleep(0.01)
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    done = subprocess.run(
        [*words, str(tmp_path / "s"), "--workers", "2", "--json"], check=True, capture_output=True
    )
    answers = json.loads(done.stdout)["data"][0]["answers"]
    assert answers["kept"] >= 4 and answers["kept"] + answers["computed"] == 16
    one, two = _written(tmp_path / "whole"), _written(tmp_path / "s")
    name = "unpatched/samples_yardstick_color.jsonl"
    assert two[name] == one[name] and set(two) == set(one)


# Bad input


def _error(*words):
    result = CliRunner().invoke(app, ["eval", *map(str, words), "--json"])
    assert result.exit_code == 2, result.output
    return json.loads(result.stdout)["error"]


def _snapshot(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture
def done(whole, tmp_path):
    """A copy of a finished run."""
    for path, content in _snapshot(whole[0]).items():
        place = tmp_path / "done" / path.relative_to(whole[0])
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    return tmp_path / "done"


def test_results_of_another_version_are_refused(folder, done):
    path = done / run_folder.NAME
    path.write_text(path.read_text().replace('"mllm": "', '"mllm": "9.'))
    before = _snapshot(done)
    error = _error("--model", folder, "--tasks", TASKS[0], "--output", done)
    assert "written by mllm 9." in error["message"] and error["argument"] == "output"
    assert _snapshot(done) == before


def test_answers_of_another_version_are_refused(folder, loaded, done):
    (done / run_folder.NAME).unlink()
    path = done / responses.NAME
    path.write_text(path.read_text().replace('"mllm": "', '"mllm": "9.', 1))
    before = _snapshot(done)
    with pytest.raises(DataError, match="written by mllm 9."):
        _evaluate(folder, loaded, done)
    assert _snapshot(done) == before


def test_results_of_another_model_are_refused(done, tmp_path):
    other = save_tiny(tmp_path / "other", seed=1)
    before = _snapshot(done)
    error = _error("--model", other, "--tasks", TASKS[0], "--limit", 1, "--output", done)
    assert "results of another model" in error["message"]
    assert _snapshot(done) == before


def test_results_of_another_generation_config_are_refused(folder, loaded, done, monkeypatch):
    """Edited end tokens or penalties give other answers from the same weights."""
    before = _snapshot(done)
    monkeypatch.setattr(loaded[0].generation_config, "repetition_penalty", 1.5)
    with pytest.raises(DataError, match="another model: .*generation"):
        _evaluate(folder, loaded, done)
    assert _snapshot(done) == before
    about = json.loads((done / run_folder.NAME).read_text())
    del about["model"]["generation_sha256"]  # of a version that did not say
    responses.check_model(about["model"], engines.Here(*loaded).facts, done, "output")


@pytest.mark.parametrize(
    "name, content, match",
    [
        (run_folder.NAME, "[]", "not what mllm eval writes"),
        (run_folder.NAME, "{", "not what mllm eval writes"),
        (responses.NAME, "my notes\n", "line 1: not JSON"),
        (responses.NAME, '{"a": 1}\n', "line 1: not the first line of answers"),
        (responses.NAME, "3\n", "line 1: not JSON|line 1: not a line of answers"),
    ],
)
def test_a_foreign_file_is_left_alone(folder, loaded, tmp_path, name, content, match):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=match):
        _evaluate(folder, loaded, tmp_path)
    assert (tmp_path / name).read_text() == content


def test_a_cache_in_use_is_called_a_cache(folder, loaded, tmp_path):
    run = functools.partial(_evaluate, folder, loaded, plans=["none"], limit=1, cache=tmp_path)
    run(None)
    (path,) = tmp_path.iterdir()
    with cells.ResultsFile(path):
        with pytest.raises(DataError, match="is writing to .* another --cache") as caught:
            run(None)
    assert caught.value.argument == "cache"
    path.write_text("my notes\n")
    with pytest.raises(DataError, match="line 1: not JSON") as caught:
        run(None)
    assert caught.value.argument == "cache"


def test_a_folder_in_use_is_refused(folder, loaded, tmp_path):
    with run_folder.RunFolder(tmp_path):
        with pytest.raises(DataError, match=f"process {os.getpid()} is writing"):
            _evaluate(folder, loaded, tmp_path)


@pytest.mark.parametrize(
    "words, argument, match",
    [
        (["--tasks", "yardstick_colour"], "tasks", "yardstick_color"),
        (["--tasks", "yardstick,yardstick_color"], "tasks", "both have the task yardstick_color"),
        (["--tasks", ","], "tasks", "no task is named"),
        (["--plan", "visonzip:keep=8"], "method", "visionzip"),
        (["--plan", "visionzip:kep=8"], None, "keep"),
        (["--plan", "visionzip:keep=6x"], None, "keep"),
        (["--plan", "visionzip:keep=0"], None, "keep"),
        (["--cache", "/proc/nowhere"], "cache", "/proc/nowhere"),
        (["--data-dir", "/nowhere"], "data_dir", "/nowhere"),
        (["--workers", "0"], None, "workers"),
        (["--workers", "2", "--device", "cuda:0"], "workers", "a GPU each"),
    ],
)
def test_bad_words(folder, tmp_path, words, argument, match):
    base = ["--model", folder, "--tasks", TASKS[0], "--limit", 1]
    error = _error(*base, *words)
    assert match in error["message"]
    assert argument is None or error["argument"] == argument


def test_torchrun_is_told_about_workers(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MllmError, match="--workers N instead"):
        evaluate(str(folder), ["none"], TASKS, limit=1)


def test_a_plan_that_needs_training_without_weights(folder):
    error = _error("--model", folder, "--tasks", TASKS[0], "--limit", 1, "--plan", "pmod")
    assert error["argument"] == "plan" and "pmod has parts that must be trained" in error["message"]
