"""Fine-tuning stages in one recipe: the runs they stand for, resumed, refused, and in processes."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_distributed import run_in
from train_tiny import save_small

from mllm.errors import DataError, PlanError, RecipeError
from mllm.training import finetune
from mllm.training.launch import World
from mllm.training.preview import preview
from mllm.training.recipe import validate
from mllm.training.run import run

SHARED = {
    "seed": 3,
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "save_steps": 1,
    "logging_steps": 1,
}
DATA = [{"path": "yardstick", "tasks": ["exist", "ocr_word"], "limit": 4}]
ALIGN = {
    "name": "align",
    "model": {"freeze_language_model": True, "reset_projector": True},
    "data": DATA,
    "train": {"learning_rate": 1e-2},
}
TUNE = {
    "name": "tune",
    "plan": "visionzip:keep=6",
    "data": [{"path": "yardstick", "tasks": ["color"], "limit": 6}],
    "method": {"type": "lora", "r": 4},
    "train": {"learning_rate": 1e-3, "max_steps": 2},
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return save_small(tmp_path_factory.mktemp("small"))


def written(small, folder, **changes):
    recipe = {
        "version": 1,
        "model": {"path": str(small), "dtype": "float32", "freeze_vision_tower": True},
        "train": SHARED,
        "stages": [ALIGN, TUNE],
        "output": {"dir": str(folder)},
    }
    return recipe | changes


def weights(folder):
    return load_file(Path(folder) / "model/model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    record = run(validate(written(small, folder)))
    assert record["status"] == "complete"
    return folder


def test_stages_are_the_runs_they_stand_for(whole, small, tmp_path):
    first = {**ALIGN, "model": {**written(small, "")["model"], **ALIGN["model"]}}
    second = {**TUNE, "model": {**written(small, "")["model"], "path": str(tmp_path / "1/model")}}
    for number, stage in enumerate((first, second), 1):
        alone = {"version": 1, "output": {"dir": str(tmp_path / str(number))}, **stage}
        alone["train"] = SHARED | stage["train"]
        del alone["name"]
        run(validate(alone))
    assert same(weights(whole / "stage-1-align"), weights(tmp_path / "1"))
    assert same(weights(whole), weights(tmp_path / "2"))
    assert json.loads((whole / "model/mllm_plan.json").read_text())
    assert not (whole / "stage-1-align/model/mllm_plan.json").exists()


def test_the_record_and_the_metrics_name_the_stages(whole):
    record = json.loads((whole / "run.json").read_text())
    steps = [part["resolved"]["batch"]["steps"] for part in record["stages"].values()]
    assert list(record["stages"]) == ["align", "tune"] and steps == [3, 2]
    rows = map(json.loads, (whole / "metrics.jsonl").read_text().splitlines())
    steps = [(row["stage"], row["step"]) for row in rows if "loss" in row]
    assert steps == [("align", 1), ("align", 2), ("align", 3), ("tune", 1), ("tune", 2)]
    assert "| method | align full, tune lora |" in (whole / "README.md").read_text()


@pytest.mark.parametrize(
    "lost",
    [
        ["stage-1-align/checkpoint-3", "stage-1-align/model", "stage-2-tune"],  # in the first
        ["stage-1-align/model", "stage-2-tune"],  # while its model was written
        ["stage-2-tune"],  # between the two
        ["stage-2-tune/checkpoint-2"],  # in the second
    ],
)
def test_a_run_resumes_in_the_middle_to_the_same_weights(lost, whole, small, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for name in ("model", *lost):
        shutil.rmtree(folder / name)
    record = json.loads((folder / "run.json").read_text()) | {"status": "running"}
    (folder / "run.json").write_text(json.dumps(record))
    assert run(validate(written(small, folder)), resume=True)["status"] == "complete"
    assert same(weights(folder), weights(whole))


def test_a_finished_stage_is_not_run_again(whole, small, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "model")
    record = json.loads((folder / "run.json").read_text()) | {"status": "stopped"}
    (folder / "run.json").write_text(json.dumps(record))
    trained, real = [], finetune.finetune

    def counted(recipe, *args, **kwargs):
        trained.append(recipe.method.type)
        return real(recipe, *args, **kwargs)

    monkeypatch.setattr(finetune, "finetune", counted)
    run(validate(written(small, folder)), resume=True)
    assert trained == ["lora"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stages": [ALIGN, {**TUNE, "name": "align"}]}, "same name"),
        ({"stages": [ALIGN, {**TUNE, "dta": []}]}, "unknown key 'stages.1.dta'.*'data'"),
        ({"stages": [ALIGN, {**TUNE, "method": {"type": "lora", "rr": 4}}]}, "'tune'.*method.rr"),
        ({"stages": [ALIGN, {**TUNE, "train": {"lerning_rate": 1}}]}, "'tune'.*'learning_rate'"),
        ({"stages": [ALIGN, {**TUNE, "data": []}]}, "'tune'.*nothing to train on"),
        ({"stages": [ALIGN, {**TUNE, "model": {"path": "x"}}]}, "that of the whole run"),
        ({"stages": [ALIGN, {**TUNE, "parallel": {"nproc": 2}}]}, "that of the whole run"),
        ({"stages": [ALIGN, {**TUNE, "plan": "visionzip:kep=1"}]}, "'tune'.*kep"),
        ({"model": {"path": "tiny-llava", "reset_projector": True}}, "every stage"),
        ({"model": {"path": "new:tiny-llava"}}, "model that exists"),
        ({"stages": [ALIGN, {"name": "b", "scenes": "full", "losses": {}, "train": {}}]}, "stages"),
        ({"train": {**SHARED, "seed": "x"}}, "train.seed"),
    ],
)
def test_what_stages_cannot_be_is_named(changes, words, small, tmp_path):
    with pytest.raises((RecipeError, PlanError), match=words):
        validate(written(small, tmp_path, **changes))


def test_a_fault_of_the_second_stage_is_found_before_the_first(small, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "finetune", lambda *args, **kwargs: pytest.fail("trained"))
    later = {**TUNE, "data": [{"path": str(tmp_path / "nothing.json")}]}
    with pytest.raises(DataError, match=r"nothing\.json"):
        run(validate(written(small, tmp_path / "run", stages=[ALIGN, later])))


def test_other_data_of_a_finished_stage_is_refused(whole, small, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "model")
    record = json.loads((folder / "run.json").read_text()) | {"status": "stopped"}
    record["stages"]["align"]["data_sha256"] = ["0" * 64]
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match="the data is not") as caught:
        run(validate(written(small, folder)), resume=True)
    assert caught.value.argument == "data of stage align"


def test_the_preview_tries_every_stage(small, tmp_path):
    stages = preview(validate(written(small, tmp_path / "run")), World())["stages"]
    assert [stage["name"] for stage in stages] == ["align", "tune"]
    assert stages[0]["parts"]["language_model"]["trained"] == 0
    assert stages[1]["parts"]["new_modules"]["trained"] > 0
    assert all(stage["step"]["loss"] > 0 for stage in stages)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("zero", [(None, None), (2, 3), (None, 2)])
def test_stages_in_two_processes_end_as_in_one(zero, whole, small, tmp_path):
    if zero != (None, None) and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    shared = {**SHARED, "per_device_train_batch_size": 1}
    stages = [
        {**stage, "parallel": {"zero": stage_zero}}
        for stage, stage_zero in zip((ALIGN, TUNE), zero, strict=True)
    ]
    recipe = written(small, tmp_path / "run", train=shared, stages=stages)
    run_in(2, [recipe], tmp_path)
    rows = [
        [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (whole, tmp_path / "run")
    ]
    one, two = (torch.tensor([row["loss"] for row in part if "loss" in row]) for part in rows)
    assert torch.allclose(one, two, atol=1e-4, rtol=0)
