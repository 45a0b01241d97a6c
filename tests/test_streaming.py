"""Streamed data: the same samples in the same order, and nothing parsed that is not asked for."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file
from test_recipes import messages, picture, recipe_for
from train_tiny import save_small

from mllm.errors import DataError, RecipeError
from mllm.training import data as data_module
from mllm.training import reading
from mllm.training.data import load_data
from mllm.training.ordering import Order
from mllm.training.run import run
from mllm.training.schema import DataPart

needs_datasets = pytest.mark.skipif(find_spec("datasets") is None, reason="pip install datasets")
COUNT = 30


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return save_small(tmp_path_factory.mktemp("small"))


def rows(count=COUNT):
    """Texts of different lengths, a third of them without a picture."""
    return [
        {"id": i, "images": ["a.png"] * (i % 3 > 0),
         "messages": messages("word " * (i * 7 % count + 1), int(i % 3 > 0))}
        for i in range(count)
    ]  # fmt: skip


def written(folder, kind, entries):
    """The entries as a file or folder of some kind, all files in their order."""
    picture(folder / "a.png")
    if kind == "jsonl":
        path = folder / "d.jsonl"
        lines = [e if isinstance(e, str) else json.dumps(e, ensure_ascii=False) for e in entries]
        path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
        return path
    import datasets

    whole = datasets.Dataset.from_list(entries)
    path = folder / kind
    if kind == "saved":
        whole.save_to_disk(path)
        return path
    path.mkdir()
    for start in range(0, len(entries), 20):
        part = whole.select(range(start, min(start + 20, len(entries))))
        part.to_parquet(path / f"train-{start:05}.parquet", batch_size=3)
    return path


def both(path, **more):
    """The data in memory, and streamed."""
    given = {"path": str(path), "format": "messages", "image_root": str(path.parent), **more}
    found = [load_data([DataPart(**given, streaming=streaming)]) for streaming in (False, True)]
    assert found[0][1] == found[1][1], "the same SHA-256"
    return found[0][0], found[1][0]


@pytest.mark.parametrize(
    "kind",
    ["jsonl", *(pytest.param(k, marks=needs_datasets) for k in ("parquet", "saved"))],
)
@pytest.mark.parametrize("more", [{}, {"limit": 23, "weight": 1.5}, {"weight": 0.4}])
def test_the_same_samples_in_the_same_order(kind, more, tmp_path):
    here, streamed = both(written(tmp_path, kind, rows()), **more)
    assert len(streamed) == len(here) and streamed.streamed and not here.streamed
    assert streamed.sizes == here.sizes and len(set(here.sizes[0])) > 5
    lengths, kinds = streamed.sizes
    order = list(Order(len(streamed), 3, 4, lengths, kinds))
    assert order == list(Order(len(here), 3, 4, *here.sizes))
    for place in order[:12]:
        assert streamed[place]["messages"] == here[place]["messages"]
        assert len(streamed[place]["images"]) == len(here[place]["images"])
        assert streamed.records[place].where == here.records[place].where


def test_lines_end_where_json_lines_do(tmp_path):
    """A line separator of Unicode within a string ends no line, streamed or not."""
    entry = {"messages": messages("a\u2028b", 0)}
    for data in both(written(tmp_path, "jsonl", [entry, entry])):
        assert [len(data), data[1]["messages"][0]["content"][0]["text"]] == [2, "a\u2028b"]


def test_lines_are_parsed_when_they_are_asked_for(tmp_path, monkeypatch):
    """Unlike in memory; before training only the first few are looked at."""
    parsed, real = [], reading.parse

    def parse(line):
        parsed.append(line)
        return real(line)

    path = written(tmp_path, "jsonl", rows())
    monkeypatch.setattr(reading, "parse", parse)
    monkeypatch.setattr(data_module, "PEEK", 3)
    part = DataPart(path=str(path), format="messages", streaming=True)
    data, _ = load_data([part])
    assert len(data) == COUNT and len(parsed) == 3
    parsed.clear()
    data[7], data[7], data[20]
    assert [json.loads(line)["id"] for line in parsed] == [7, 7, 20], "and none is kept"
    parsed.clear()
    assert data.sizes is data.sizes and len(parsed) == COUNT, "lengths need one pass"
    parsed.clear()
    load_data([part.model_copy(update={"streaming": False})])
    assert len(parsed) == COUNT


@needs_datasets
def test_few_row_groups_are_held(tmp_path):
    path = written(tmp_path, "parquet", rows())
    groups, _ = reading.read(path, "train", streaming=True)
    assert len(groups) == COUNT and len(groups._groups) == 11
    assert [groups[i]["id"] for i in range(COUNT)] == list(range(COUNT))
    assert len(groups._kept) == reading.KEPT
    with pytest.raises(IndexError):
        groups[COUNT]


def test_bad_entries_are_passed_over_up_to_a_share(tmp_path, monkeypatch):
    good = rows(10)
    torn, lost = '{"id": 4, "messages": [', {**good[5], "images": ["no.png"]}
    path = written(tmp_path, "jsonl", [*good[:4], torn, lost, *good[6:]])
    part = DataPart(path=str(path), format="messages", streaming=True)
    with pytest.raises(DataError, match="1 of 10 conversations.*entry 4 is no JSON"):
        load_data([part])  # among the first, which are looked at
    monkeypatch.setattr(data_module, "PEEK", 2)
    with pytest.raises(DataError, match="1 of 10 .*skip_bad=0.0.*entry 4 is no JSON"):
        load_data([part])[0][4]
    data, _ = load_data([part.model_copy(update={"skip_bad": 0.2})])
    assert data[4]["messages"] == data[5]["messages"] == data[6]["messages"]
    assert data.bad.nonzero().flatten().tolist() == [4, 5] and data.skipped == []
    data, _ = load_data([part.model_copy(update={"skip_bad": 0.1})])
    with pytest.raises(DataError, match=r"2 of 10 .*entry 5 \(id 5\).*no.png"):
        data.sizes  # noqa: B018


def test_what_cannot_be_streamed_is_refused(small, tmp_path):
    for path, more in (("d.json", {}), ("yardstick", {"limit": 2})):
        part = {"path": path, "streaming": True, **more}
        with pytest.raises(RecipeError, match=f"data.0: {path} cannot be streamed"):
            recipe_for(small, tmp_path, data=[part])


@pytest.mark.parametrize("group_by", [pytest.param(None, marks=pytest.mark.slow), "length"])
def test_a_streamed_run_ends_with_the_same_weights(group_by, small, tmp_path):
    """With workers, and when it is resumed in the middle."""
    path = written(tmp_path, "jsonl", rows(9))
    part = {"path": str(path), "format": "messages"}
    folders = {name: tmp_path / name for name in ("plain", "streamed", "resumed")}

    def recipe(name, **more):
        return recipe_for(
            small, folders[name], data=[part | more], sampling={"group_by": group_by},
            train={"dataloader_num_workers": 1, "max_steps": 4},
        )  # fmt: skip

    run(recipe("plain"))
    run(recipe("streamed", streaming=True))
    shutil.copytree(folders["streamed"], folders["resumed"])
    for name in ("checkpoint-4", "checkpoint-3", "model"):
        shutil.rmtree(folders["resumed"] / name)
    record = json.loads((folders["resumed"] / "run.json").read_text())
    (folders["resumed"] / "run.json").write_text(json.dumps(record | {"status": "stopped"}))
    run(recipe("resumed", streaming=True), resume=True)
    plain, *others = (load_file(f / "model/model.safetensors") for f in folders.values())
    for other in others:
        assert all(torch.equal(plain[key], other[key]) for key in plain)
