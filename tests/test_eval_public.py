"""Public tasks on local copies of their data, and the script that reproduces published rows."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import eval_data
import pytest
from typer.testing import CliRunner

pytest.importorskip("lmms_eval")

from mllm.cli import app  # noqa: E402
from mllm.errors import DataError, MllmError  # noqa: E402
from mllm.eval import public  # noqa: E402
from mllm.eval.public import find_copy  # noqa: E402
from mllm.eval.runner import evaluate  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import llava15_published as published  # noqa: E402

HUB = "lmms-lab-encoder"


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """What `datasets` converts goes to a folder of these tests."""
    from lmms_eval.api import task

    with pytest.MonkeyPatch.context() as patch:
        place = str(tmp_path_factory.mktemp("datasets"))
        patch.setattr(task, "_resolve_hf_datasets_cache_dir", lambda: place)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", place)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Copies as the hub has them."""
    data = tmp_path_factory.mktemp("data")
    eval_data.parquet(data / "POPE" / "data", "test", eval_data.pope())
    gqa = data / HUB / "GQA"
    eval_data.parquet(gqa / "testdev_balanced_instructions", "testdev", eval_data.gqa())
    eval_data.parquet(gqa / "testdev_balanced_images", "testdev", eval_data.gqa_images())
    eval_data.on_disk(data / "textvqa", "validation", eval_data.textvqa())
    eval_data.image_folder(data / "mme", "test", eval_data.mme())
    return data


def _samples(record, task):
    (path,) = (path for path in record["files"] if path.endswith(f"_samples_{task}.jsonl"))
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_tasks_run_on_local_copies(folder, data, tmp_path, monkeypatch):
    """Parquet, a data set on disk and an image folder; a task with a second data set; a file for
    a test server, which is not left in the working directory."""
    monkeypatch.chdir(tmp_path)
    tasks = ["pope", "gqa", "textvqa_val", "mme"]
    (record,) = evaluate(
        str(folder), ["none"], tasks, data_dir=data, batch_size=4, device="cpu",
        output=tmp_path / "out",
    )  # fmt: skip
    assert {row["task"]: row["n"] for row in record["rows"]} == {
        "pope": 6, "gqa": 4, "textvqa_val": 4, "mme": 4,
    }  # fmt: skip
    rows = _samples(record, "pope")
    assert [row["doc"]["question"] for row in rows] == eval_data.pope()["question"]
    assert all(row["mllm"]["visual_in"] == 64 for row in rows)
    right = sum(row["pope_accuracy"]["score"] for row in rows)
    score = next(row for row in record["rows"] if row["task"] == "pope")
    assert score["score"] == right / 6 and score["ci"][0] <= right / 6 <= score["ci"][1]
    assert [row["target"] for row in _samples(record, "gqa")] == eval_data.gqa()["answer"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert len(list((tmp_path / "out").glob("unpatched/*_more/submissions/*.json"))) == 1
    configs = record["results"]["configs"]
    assert configs["pope"]["dataset_path"] == "parquet"
    assert configs["mme"]["dataset_path"] == "imagefolder"


def test_a_task_for_a_test_server_has_no_score(folder, tmp_path):
    eval_data.parquet(tmp_path / "VQAv2" / "data", "test", eval_data.vqav2())
    words = ["--model", folder, "--tasks", "vqav2_test", "--data-dir", tmp_path, "--device", "cpu"]
    result = CliRunner().invoke(app, ["eval", *map(str, words), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "submission –" in result.stdout
    (written,) = (tmp_path / "out").glob("unpatched/*_more/submissions/vqav2-test-*.json")
    assert len(json.loads(written.read_text())) == 2
    assert len(list((tmp_path / "out").glob("unpatched/*_results.json"))) == 1


# Where copies are found


@pytest.mark.parametrize("form", ["parquet", "arrow", "on_disk", "image_folder"])
@pytest.mark.parametrize(
    "place", ["org/POPE/data", "POPE/data", "POPE", "pope", "org/POPE/Full", "POPE/Full"]
)
def test_every_form_is_found_in_every_place(tmp_path, form, place):
    import datasets

    getattr(eval_data, form)(tmp_path / place, "random", eval_data.pope(2))
    subset = "Full" if place.endswith("Full") else None
    found = find_copy(tmp_path, "org/POPE", subset, ["random"], "pope")
    if found.disk:
        made = datasets.load_from_disk(found.path)["random"]
    else:
        made = datasets.load_dataset(
            found.path, found.name, split="random", cache_dir=str(tmp_path / "c"), **found.options
        )
    assert [row["question"] for row in made] == eval_data.pope(2)["question"]
    assert made[0]["image"].convert("RGB").size == eval_data.picture(0).size


def test_the_folder_may_be_the_data_set(tmp_path):
    eval_data.parquet(tmp_path / "POPE" / "data", "test", eval_data.pope(2))
    assert find_copy(tmp_path / "POPE", "org/POPE", None, ["test"], "pope").path == "parquet"
    with pytest.raises(DataError, match="no local copy"):
        find_copy(tmp_path / "POPE", "org/MME", None, ["test"], "mme")


def test_a_subset_is_not_mistaken_for_another(tmp_path):
    eval_data.parquet(tmp_path / "POPE" / "data", "test", eval_data.pope(2))
    with pytest.raises(DataError) as error:
        find_copy(tmp_path, "org/POPE", "Full", ["test"], "pope_adv")
    for said in (
        "org/POPE, Full, for the task pope_adv", "split test", str(tmp_path / "POPE"),
        f"hf download org/POPE --repo-type dataset --local-dir {tmp_path / 'POPE'}",
        "Full/test-00000-of-00001.parquet", "metadata.jsonl",
    ):  # fmt: skip
        assert said in str(error.value)
    with pytest.raises(DataError, match="split other"):
        find_copy(tmp_path, "org/POPE", None, ["other"], "pope")


def test_pictures_in_plain_parquet_are_pictures(tmp_path):
    """As pandas writes it: bytes and a path, and nothing that says so."""
    import io

    import datasets
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    eval_data.picture(1).save(buffer, "PNG")
    (tmp_path / "POPE" / "data").mkdir(parents=True)
    pyarrow.parquet.write_table(
        pyarrow.table({"image": [{"bytes": buffer.getvalue(), "path": "1.png"}], "n": [1]}),
        tmp_path / "POPE" / "data" / "test.parquet",
    )
    found = find_copy(tmp_path, "org/POPE", None, ["test"], "pope")
    (row,) = datasets.load_dataset(
        found.path, split="test", cache_dir=str(tmp_path / "c"), **found.options
    )
    assert row["image"].convert("RGB").getpixel((0, 0)) == (0, 128, 0) and row["n"] == 1


def test_a_readme_may_describe_the_files(tmp_path):
    import datasets

    eval_data.parquet(tmp_path / "POPE" / "odd", "part", eval_data.pope(2))
    (tmp_path / "POPE" / "README.md").write_text(
        "---\nconfigs:\n- config_name: Full\n  data_files:\n  - split: random\n"
        "    path: odd/part-*\n---\n# POPE\n"
    )
    found = find_copy(tmp_path, "org/POPE", "Full", ["random"], "pope_random")
    made = datasets.load_dataset(
        found.path, found.name, split="random", cache_dir=str(tmp_path / "c")
    )
    assert len(made) == 2
    with pytest.raises(DataError):
        find_copy(tmp_path, "org/POPE", "Half", ["random"], "pope_random")


# Bad input


def _error(*words):
    result = CliRunner().invoke(app, ["eval", *map(str, words), "--json"])
    assert result.exit_code == 2, result.output
    return json.loads(result.stdout)["error"]


def test_a_missing_copy_is_told_before_anything_is_loaded(data):
    error = _error("--model", "/nowhere", "--tasks", "pope,vizwiz_vqa_val", "--data-dir", data)
    assert error["argument"] == "data_dir"
    assert re.search("vizwiz_vqa_val: no files of the split val", error["message"])


def test_a_copy_without_the_right_columns_is_told(folder, tmp_path):
    columns = {k: v for k, v in eval_data.pope().items() if k != "question"}
    eval_data.parquet(tmp_path / "POPE" / "data", "test", columns)
    error = _error("--model", folder, "--tasks", "pope", "--data-dir", tmp_path)
    assert "cannot be used" in error["message"] and "question" in error["message"]


@pytest.mark.slow  # lmms-eval tries five times
def test_data_that_cannot_be_fetched(folder):
    error = _error("--model", folder, "--tasks", "pope", "--limit", "1")
    assert "cannot be fetched" in error["message"] and "--data-dir" in error["message"]
    assert f"hf download {HUB}/POPE" in error["message"]


def test_tasks_that_are_scored_otherwise_are_refused():
    with pytest.raises(MllmError, match="egoschema_mcppl is a multiple_choice task"):
        public.find_tasks(["egoschema_mcppl"])


def test_a_wrong_public_name_lists_near_ones():
    with pytest.raises(MllmError, match="textvqa_val"):
        public.find_tasks(["textvqa_vla"])


# Published rows


def test_the_script_on_tiny_data(data, tmp_path, capsys):
    """The code only: a small model on a few pictures says nothing about the paper."""
    rows = [
        published.Row("none", {"gqa": 50.0, "pope": 50.0, "textvqa_val": 0.0}, "made up",
                      {"gqa": 100.0}),
        published.Row("visionzip:keep=64", {"pope": 200.0}, "made up"),
    ]  # fmt: skip
    lines = published.run(
        "tiny-llava", tmp_path, rows=rows, data_dir=data, limit=2, device="cpu", batch_size=2
    )
    assert [(line["plan"], line["task"]) for line in lines] == [
        ("none", "gqa"), ("none", "pope"), ("none", "textvqa_val"), ("visionzip:keep=64", "pope"),
    ]  # fmt: skip
    assert lines[0]["within"] and not lines[3]["within"]
    assert lines[3]["difference"] == pytest.approx(lines[3]["measured"] - 200)
    text = (tmp_path / "published.md").read_text()
    assert "first 2 questions" in text and "| visionzip:keep=64 | pope | 200.0 |" in text
    built = json.loads((tmp_path / "published.json").read_text())
    assert built["rows"] == lines and built["limit"] == 2
    (asked,) = (tmp_path / "unpatched").glob("*_samples_textvqa_val.jsonl")
    assert asked.exists()
    results = json.loads(next((tmp_path / "unpatched").glob("*_results.json")).read_text())
    kwargs = results["configs"]["textvqa_val"]["lmms_eval_specific_kwargs"]
    assert kwargs["ocr"] is True


def test_pictures_are_padded_unless_told_otherwise(folder):
    from PIL import Image

    wide = Image.new("RGB", (224, 112), "white")
    for crop, dark in ((False, True), (True, False)):
        _, processor = published.load_padded(str(folder), "cpu", crop=crop)
        pixels = processor.image_processor(images=[wide], return_tensors="pt")["pixel_values"][0]
        assert pixels.shape == (3, 112, 112)
        assert (pixels[:, 0, 56] < pixels[:, 56, 56] - 0.5).all().item() == dark


def test_every_published_row_runs_and_has_a_source():
    from mllm.eval.plans import make_plan

    for row in published.ROWS:
        make_plan(row.plan)
        assert row.source and set(row.scores) == set(published.METRICS)
    one = published.Row("none", {"pope": 80.0}, "x", {"pope": 4.0})
    for score, within in ((84.0, True), (84.1, False), (75.9, False)):
        (line,) = published.compare([one], {"none": {"pope": score}})
        assert line["within"] == within


def test_the_script_refuses_other_tasks(capsys):
    with pytest.raises(SystemExit) as stopped:
        published.main(["--model", "x", "--output", "y", "--tasks", "mme"])
    assert stopped.value.code == 2 and "gqa, pope, textvqa_val" in capsys.readouterr().err
