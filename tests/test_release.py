"""What a release of the embedded model writes, from a run that is the embedded model itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

import mllm
from mllm.errors import DataError
from mllm.training import release as releases
from mllm.yardstick import ADMITTED, samples

PACKAGE = Path(mllm.__file__).parent
MODEL = PACKAGE / "assets" / "tiny_llava"
DATA = json.loads((MODEL / "yardstick.json").read_text())


def scored(task, plan, score, n=500):
    return {"task": task, "plan": plan, "n": n, "score": score, "ci": [score, score]}


def rows(**learnt):
    """Rows of an evaluation: per task its accuracy, alone and under both random plans."""
    plans = (None, releases.RANDOM, releases.RANDOM_LLM)
    return [scored(task, plan, s) for task, scores in learnt.items()
            for plan, s in zip(plans, scores, strict=True)]  # fmt: skip


@pytest.fixture()
def finished(tmp_path):
    """A run folder and an empty package."""
    folder, package = tmp_path / "run", tmp_path / "mllm"
    shutil.copytree(MODEL, folder / "model", ignore=shutil.ignore_patterns("README.md", "y*.json"))
    shutil.copy(PACKAGE / "training" / "recipes" / "tiny-llava.yaml", folder / "recipe.yaml")
    found = rows(color=(0.99, 0.4, 0.9), exist=(0.95, 0.9, 0.9), needle=(0.9, 0.2, 0.5))
    record = {"status": "complete", "device": "cpu", "threads": 1, "seconds": 1,
              "versions": DATA["versions"]}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "eval.json").write_text(
        json.dumps({"split": "test", "style": "plain", "rows": found})
    )
    (package / releases.GROUP).parent.mkdir(parents=True)
    return folder, package


def test_what_is_committed_is_what_a_release_writes():
    assert releases.group(DATA) == (PACKAGE / releases.GROUP).read_text()
    assert releases.card(DATA) == (MODEL / "README.md").read_text()


def test_a_release_is_whole(finished, monkeypatch):
    monkeypatch.setattr(releases, "samples", lambda task, split, n: samples(task, split, 2))
    folder, package = finished
    data = releases.release(folder, package)
    assert json.loads((package / "assets/tiny_llava/yardstick.json").read_text()) == data
    assert data["weights_sha256"] == DATA["weights_sha256"]
    # exist loses too little to random.
    made = yaml.safe_load((package / releases.GROUP).read_text())
    assert made["task"] == ["yardstick_color", "yardstick_needle"]
    committed = yaml.safe_load((PACKAGE / releases.GROUP).read_text())
    assert committed | {"task": made["task"]} == made
    assert committed["task"] == [f"yardstick_{task}" for task in ADMITTED]
    assert (package / "assets/tiny_llava/model.safetensors").is_file()


def test_an_unfinished_run_is_refused(finished):
    folder, package = finished
    (folder / "run.json").write_text(json.dumps({"status": "stopped"}))
    with pytest.raises(DataError, match="is stopped"):
        releases.release(folder, package)
    assert not (package / releases.GROUP).exists()


def test_a_task_that_came_later_is_scored_and_written_everywhere(finished, monkeypatch):
    _, package = finished
    target = package / "assets/tiny_llava"
    target.mkdir(parents=True)
    before = DATA | {"tasks": {task: DATA["tasks"][task] for task in ("count", "needle")}}
    (target / "yardstick.json").write_text(json.dumps(before))
    asked = []

    def evaluate(path, part):
        asked.append((path, part.tasks, part.plans, part.limit, part.split))
        return {"rows": rows(color=(0.99, 0.4, 0.9), count=(0.3, 0.3, 0.3))}

    monkeypatch.setattr(releases, "evaluate", evaluate)
    data = releases.add_tasks(["color", "count"], "colour came later", package)
    plans = [None, releases.RANDOM, releases.RANDOM_LLM]
    assert asked == [(target, ["color", "count"], plans, 500, "test")]
    assert json.loads((target / "yardstick.json").read_text()) == data
    assert list(data["tasks"]) == ["color", "count", "needle"]  # in the order of TASKS
    assert data["tasks"]["color"]["admitted"] and data["tasks"]["count"]["accuracy"] == 0.3
    assert data["tasks"]["needle"] == DATA["tasks"]["needle"]
    assert "| color | 500 | 99.0%" in (card := (target / "README.md").read_text())
    assert "- colour came later" in card
    made = yaml.safe_load((package / releases.GROUP).read_text())
    assert made["task"] == ["yardstick_color", "yardstick_needle"]
