"""Recipes in many processes, under every ZeRO stage, and after being killed: the same numbers."""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_tiny import save_small

import mllm
from mllm.errors import DataError, RecipeError
from mllm.loading import load_model
from mllm.training import launch
from mllm.training.recipe import validate
from mllm.training.run import run

REPOSITORY = Path(__file__).parents[1]
PLAN = "visionzip:keep=6"
DEEPSPEED = find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not DEEPSPEED, reason="DeepSpeed is not installed")
# Parameters of a small model would otherwise stay whole.
IN_PARTS = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return save_small(tmp_path_factory.mktemp("small"))


def written(small, folder, *, zero=None, method="full", plan=None, batch=2, parallel=None, **train):
    """A recipe of three steps; `batch` is that of each process."""
    part = {"zero": zero, **(parallel or {})}
    if zero is not None:
        part["deepspeed"] = IN_PARTS
    return {
        "version": 1,
        "model": {"path": str(small), "dtype": "float32"},
        "plan": plan,
        "data": [{"path": "yardstick", "tasks": ["exist", "ocr_word"], "limit": 6}],
        "method": {"type": method, **({"r": 4} if method == "lora" else {})},
        "train": {
            "seed": 3,
            "max_steps": 3,
            "per_device_train_batch_size": batch,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "save_steps": 2,
            "logging_steps": 1,
            **train,
        },
        "parallel": part,
        "output": {"dir": str(folder)},
    }


def environment(threads=1):
    return os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": str(threads)}


def run_in(processes, recipes, folder):
    """Run recipes one after another in so many processes."""
    listed = folder / "recipes.json"
    listed.write_text(json.dumps(recipes))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc_per_node={processes}", "tests/dist_runs.py", str(listed)),
        ],
        cwd=REPOSITORY, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def losses(folder):
    rows = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return torch.tensor([row["loss"] for row in rows if "loss" in row])


@pytest.fixture(scope="module")
def alone(small, tmp_path_factory):
    """Losses and weights of the plain run in one process, by method and plan."""
    folder = tmp_path_factory.mktemp("alone")
    found = {}

    def get(method, plan):
        if (method, plan) not in found:
            place = folder / f"{method}-{plan is not None}"
            run(validate(written(small, place, method=method, plan=plan)))
            found[method, plan] = losses(place), load_file(place / "model/model.safetensors")
        return found[method, plan]

    return get


def check_as_one(cases, processes, small, folder, alone):
    """Each case trains as the single process does, and exports a model with the same keys."""
    recipes = [
        written(small, folder / str(i), zero=zero, method=method, plan=plan, batch=2 // processes)
        for i, (zero, method, plan) in enumerate(cases)
    ]
    run_in(processes, recipes, folder)
    for i, case in enumerate(cases):
        want, weights = alone(*case[1:])
        assert torch.allclose(losses(folder / str(i)), want, atol=1e-4, rtol=0), case
        saved = load_file(folder / str(i) / "model/model.safetensors")
        assert saved.keys() == weights.keys(), case
        # AdamW turns rounding into whole steps (1e-2) where there is hardly a gradient, and a key's
        # bias has none.
        real = [k for k in weights if not k.endswith("k_proj.bias")]
        apart = [(saved[k] - weights[k]).abs().mean() for k in real]
        assert max(apart) < 1e-3, case


def test_two_processes_train_as_one(small, tmp_path, alone):
    """Fails if data is shared out otherwise, a loss is averaged otherwise, or a plan is local."""
    cases = [(None, "full", PLAN)]
    if DEEPSPEED:
        cases += [(3, "lora", PLAN), (2, "full", None)]
    check_as_one(cases, 2, small, tmp_path, alone)


PRODUCT = list(itertools.product((0, 1, 2, 3), ("full", "lora"), (None, PLAN)))


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_every_stage_trains_as_one_process(processes, small, tmp_path, alone):
    check_as_one(PRODUCT, processes, small, tmp_path, alone)


@pytest.mark.slow
def test_plain_data_parallel_trains_as_one_process(small, tmp_path, alone):
    cases = [(None, *case) for case in itertools.product(("full", "lora"), (None, PLAN))]
    check_as_one(cases, 2, small, tmp_path, alone)


@needs_deepspeed
@pytest.mark.slow
def test_offload_checkpointing_and_whole_modules_change_nothing(small, tmp_path):
    """Offloaded states, recomputed activations, a projector trained whole beside adapters, DoRA."""
    more = {"modules_to_save": ["multi_modal_projector"], "use_dora": True}
    variants = [
        (2, {"offload": "optimizer"}, {}, "full", {}),
        (3, {"offload": "parameters"}, {}, "full", {}),
        (3, {}, {"gradient_checkpointing": True}, "full", {}),
        (3, {}, {"gradient_checkpointing": True}, "lora", {"use_rslora": True}),
        (2, {}, {}, "lora", more),
    ]
    pairs = []
    for i, (zero, parallel, train, method, options) in enumerate(variants):
        recipes = []
        for name, stage, batch, part in (("one", None, 2, {}), ("two", zero, 1, parallel)):
            recipe = written(
                small, tmp_path / f"{name}{i}",
                zero=stage, method=method, plan=PLAN, batch=batch, parallel=part, **train,
            )  # fmt: skip
            recipe["method"] |= options
            recipes.append(recipe)
        pairs.append(recipes)
    run_in(2, [two for _, two in pairs], tmp_path)
    for i, (one, _) in enumerate(pairs):
        run(validate(one))
        want, got = losses(tmp_path / f"one{i}"), losses(tmp_path / f"two{i}")
        assert torch.allclose(got, want, atol=1e-4, rtol=0), variants[i]


def mixed(folder):
    """Three conversations about a picture, and three without: with seed 6 each step has both."""
    from PIL import Image

    Image.new("RGB", (60, 40), "red").save(folder / "a.png")
    entries = []
    for i, (question, answer) in enumerate([("is it red?", "yes"), ("what is X7?", "a word")] * 3):
        content = [{"type": "image", "image": "a.png"}] * (i % 2)
        content.append({"type": "text", "text": f"{i} {question}"})
        turns = [("user", content), ("assistant", [{"type": "text", "text": answer}])]
        entries.append({"messages": [{"role": who, "content": said} for who, said in turns]})
    path = folder / "mixed.json"
    path.write_text(json.dumps(entries))
    return [{"path": str(path), "format": "messages"}]


@pytest.mark.parametrize(
    "zero",
    [pytest.param(None, marks=pytest.mark.slow)]
    + [pytest.param(n, marks=(needs_deepspeed, pytest.mark.slow)) for n in (1, 2, 3)],
)
def test_text_alone_in_one_of_two_processes(zero, small, tmp_path):
    """Processes meet at what only pictures use: without one, others would wait, or be refused."""
    train = {"gradient_checkpointing": True} if zero is None else {}
    cases = [("one", None, 2, {}), ("two", zero, 1, train)]
    one, two = (
        written(small, tmp_path / name, zero=stage, batch=batch, seed=6, **more)
        | {"data": mixed(tmp_path)}
        for name, stage, batch, more in cases
    )
    run_in(2, [two], tmp_path)
    run(validate(one))
    want, got = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert torch.allclose(got, want, atol=1e-4, rtol=0)


@needs_deepspeed
@pytest.mark.slow
def test_half_precision_learns_the_same(small, tmp_path, alone):
    cases = [(1, "full"), (2, "lora"), (3, "full")]
    recipes = [
        written(small, tmp_path / str(i), zero=zero, method=method, plan=PLAN, batch=1, bf16=True)
        for i, (zero, method) in enumerate(cases)
    ]
    run_in(2, recipes, tmp_path)
    for i, (_, method) in enumerate(cases):
        want = alone(method, PLAN)[0]
        assert torch.allclose(losses(tmp_path / str(i)), want, atol=0.15, rtol=0), cases[i]


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_a_spread_run_resumes_to_the_same_losses(zero, small, tmp_path):
    recipe = written(small, tmp_path / "run", zero=zero, plan=PLAN, batch=1, max_steps=4)
    run_in(2, [recipe], tmp_path)
    whole = losses(tmp_path / "run")
    for name in ("checkpoint-4", "model"):
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run/metrics.jsonl").unlink()
    record = json.loads((tmp_path / "run/run.json").read_text())
    (tmp_path / "run/run.json").write_text(json.dumps(record | {"status": "stopped"}))
    with pytest.raises(RecipeError, match="started in 2 processes") as caught:
        run(validate(recipe | {"parallel": recipe["parallel"] | {"zero": zero}}), resume=True)
    assert caught.value.expected == "--nproc 2"
    path = tmp_path / "recipe.yaml"
    path.write_text(validate(recipe).to_yaml())
    done = command(str(path), "--resume", "--nproc", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(losses(tmp_path / "run"), whole[2:])


# --- the command


def command(*words, **more):
    return subprocess.run(
        [sys.executable, "-m", "mllm", "train", *words],
        cwd=REPOSITORY, env=environment() | more, capture_output=True, text=True,
    )  # fmt: skip


def saved_recipe(small, tmp_path, **more):
    path = tmp_path / "recipe.yaml"
    path.write_text(validate(written(small, tmp_path / "run", **more)).to_yaml())
    return path


@pytest.mark.slow
def test_nproc_starts_the_processes_and_reports_once(small, tmp_path, alone):
    path = saved_recipe(small, tmp_path, plan=PLAN, batch=1)
    done = command(str(path), "--nproc", "2", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)  # one object, so one process speaks
    assert report["data"]["status"] == "complete" and report["data"]["processes"] == 2
    assert torch.allclose(losses(tmp_path / "run"), alone("full", PLAN)[0], atol=1e-4, rtol=0)


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"],
    # On a CPU it starts one process, whatever it is told.
    "accelerate": [
        *("-m", "accelerate.commands.launch", "--cpu", "--num_processes=1"),
        *("--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "-m"),
    ],
    "deepspeed": [
        *("-m", "deepspeed.launcher.runner", "--num_accelerators=2", "--no_local_rank"),
        *("--master_port", "{port}", "--module"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_same_file_under_every_launcher(launcher, small, tmp_path, alone):
    if launcher == "deepspeed":
        pytest.importorskip("deepspeed")
    processes = 1 if launcher == "accelerate" else 2
    path = saved_recipe(small, tmp_path, plan=PLAN, batch=2 // processes)
    start = [word.format(port=launch.free_port()) for word in LAUNCHERS[launcher]]
    done = subprocess.run(
        [sys.executable, *start, "mllm", "train", str(path)],
        cwd=REPOSITORY, capture_output=True, text=True,
        env=environment() | {"DS_ACCELERATOR": "cpu", "CCL_WORKER_COUNT": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run/run.json").read_text())["processes"] == processes
    assert torch.allclose(losses(tmp_path / "run"), alone("full", PLAN)[0], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_sigterm_reaches_all_processes(small, tmp_path):
    path = saved_recipe(small, tmp_path, batch=1, max_steps=100_000)
    with subprocess.Popen(
        [sys.executable, "-m", "mllm", "train", str(path), "--nproc", "2", "--json"],
        cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    ) as process:  # fmt: skip
        wait_for(tmp_path / "run/metrics.jsonl", process)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=90)
    assert process.returncode == 143, err[-3000:]
    assert json.loads(out)["data"]["status"] == "stopped"


def wait_for(path, process):
    while process.poll() is None and not path.is_file():
        time.sleep(0.02)


@pytest.fixture(scope="module")
def uninterrupted(small, tmp_path_factory):
    """A recipe of twelve steps that saves after each, and its weights, by method."""

    @functools.cache
    def get(method):
        more = {"method": method, "plan": PLAN, "max_steps": 12, "save_steps": 1}
        folder = tmp_path_factory.mktemp("first") / method
        recipe = written(small, folder, save_total_limit=2, **more)
        # Dropout shows whether random states are restored.
        recipe["method"] |= {"lora_dropout": 0.1} if method == "lora" else {}
        run(validate(recipe))
        return recipe, load_file(folder / "model/model.safetensors")

    return get


@pytest.mark.parametrize(
    ("seed", "method"),
    [(1, "lora"), pytest.param(0, "full", marks=pytest.mark.slow)]
    + [pytest.param(s, "full" if s % 2 else "lora", marks=pytest.mark.slow) for s in range(2, 20)],
)
def test_killed_and_resumed_is_never_interrupted(seed, method, uninterrupted, tmp_path):
    """Kill -9 at a random moment, resume, to the last bit: weights equal the uninterrupted run's.

    Fails if data order, random state, optimizer or schedule is not restored, or if a half-written
    checkpoint is taken for a whole one.
    """
    draw = random.Random(seed)
    first, one = uninterrupted(method)
    second = validate(first | {"output": {"dir": str(tmp_path / "run")}})
    path = tmp_path / "recipe.yaml"
    path.write_text(second.to_yaml())
    words = [sys.executable, "-m", "mllm", "train", str(path)]
    alike = environment(torch.get_num_threads())  # other numbers of threads round otherwise
    with subprocess.Popen(words, cwd=REPOSITORY, env=alike, stderr=subprocess.DEVNULL) as process:
        wait_for(tmp_path / "run/metrics.jsonl", process)
        time.sleep(draw.uniform(0, 1.2))
        process.kill()
    complete = json.loads((tmp_path / "run/run.json").read_text())["status"] == "complete"
    with warnings.catch_warnings():  # a half-written checkpoint is warned of
        warnings.simplefilter("ignore")
        assert run(second, resume=True)["status"] == "complete"
    other = load_file(tmp_path / "run/model/model.safetensors")
    assert all(torch.equal(one[key], other[key]) for key in one), complete


# --- the plan that a run was trained with


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_saved_model_patched_afresh_has_the_numbers_of_the_run(method, small, tmp_path):
    """What training ends with is what a user gets from the folder, plan included."""
    part = {"tasks": ["exist"], "plans": [PLAN], "limit": 4}
    recipe = written(small, tmp_path / "run", method=method, plan=PLAN) | {"eval": part}
    record = run(validate(recipe))
    model, processor = load_model(tmp_path / "run/model")
    from mllm.training.data import Collator, load_data

    data, _ = load_data(validate(recipe).data)
    batch = Collator(processor)([data[0], data[1]])
    with mllm.patch(model, tmp_path / "run/model") as patched, torch.no_grad():
        assert patched.plan.spec.startswith(PLAN)
        again = float(model(**batch).loss)
    with mllm.patch(model, PLAN), torch.no_grad():
        assert float(model(**batch).loss) == again
    # The same weights inside the run: train once more, and look at the model before it is saved.
    from mllm.training.finetune import finetune

    (tmp_path / "again").mkdir()
    trained, _ = finetune(validate(recipe), data, tmp_path / "again", False)
    with mllm.patch(trained, PLAN), torch.no_grad():
        assert abs(float(trained(**batch).loss) - again) < 1e-6
    assert record["eval"][0]["visual_avg"] == 6


# --- what is found before training starts


def test_a_missing_launcher_is_named(small, tmp_path, monkeypatch):
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="DeepSpeed, which is not installed") as caught:
        run(validate(written(small, tmp_path / "run", zero=2)))
    assert "pip install deepspeed" in caught.value.expected
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_is_named(small, tmp_path):
    """As when two runs of one machine are given the same port."""
    import socket

    path = saved_recipe(small, tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = command(
            str(path),
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )  # fmt: skip
    assert done.returncode == 2, done.stderr[-2000:]
    assert f"cannot meet at 127.0.0.1:{port}" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_stages_stay_in_one_process(monkeypatch):
    from mllm.training.recipe import load

    with pytest.raises(RecipeError, match="in one process"):
        launch.many(load("tiny-llava"), False, 2, [])


def test_errors_of_the_first_process_are_raised_again():
    error = DataError("no such file", argument="data.path", given="x", expected="a file")
    again = launch._error(error.as_dict())
    assert isinstance(again, DataError) and again.as_dict() == error.as_dict()
