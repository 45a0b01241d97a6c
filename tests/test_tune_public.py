"""`mllm tune` on public tasks, from local copies of their data; answers with scores."""

from __future__ import annotations

import json
from pathlib import Path

import eval_data
import numpy as np
import pytest
from eval_tiny import save_tiny
from PIL import Image
from test_eval_public import own_cache  # noqa: F401
from test_tune import _cli, _search
from tune_fake import Fake

pytest.importorskip("lmms_eval")
pytest.importorskip("optuna")

from mllm.errors import DataError, MllmError  # noqa: E402
from mllm.eval import cells, runner, stats, tune  # noqa: E402
from mllm.eval.tuning import Effort, difference  # noqa: E402
from mllm.eval.tuning_answers import Block, Record, outcomes  # noqa: E402
from mllm.eval.tuning_model import Chosen  # noqa: E402
from mllm.eval.tuning_public import SHARE, PublicTask, load  # noqa: E402
from mllm.loading import load_model  # noqa: E402
from mllm.plan import Plan  # noqa: E402

PICTURES = 24


def _picture(index):
    return Image.new("RGB", (60, 60), (index * 7 % 256, index * 29 % 256, index * 53 % 256))


def _mme(answer="No"):
    """Two questions to a picture, far from each other; short answers, so that tests are fast."""
    columns = eval_data.mme(2 * PICTURES)
    columns["image"] = [_picture(i % PICTURES) for i in range(2 * PICTURES)]
    columns["question_id"] = [f"code_reasoning/{i % PICTURES}.png" for i in range(2 * PICTURES)]
    columns["category"] = ["code_reasoning" if i % 3 else "color" for i in range(PICTURES)] * 2
    columns["answer"][0] = answer
    return columns


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("tiny"))
    return folder, *load_model(str(folder), device="cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory, own_cache):  # noqa: F811
    data = tmp_path_factory.mktemp("data")
    eval_data.parquet(data / "MME" / "data", "test", _mme())
    return data


@pytest.fixture(scope="module")
def found(data):
    return load(["mme"], data)


@pytest.fixture
def mme(found, loaded):
    return PublicTask("mme", found["mme"], loaded[2])


def _questions(task, split, n):
    own = [index for index, _ in task._found[split][:n]]
    return own, {index % PICTURES for index in own}


# Questions to search on, and others to confirm on


def test_the_parts_have_no_picture_in_common(mme):
    sizes = {split: mme.size(split, 1000) for split in ("test", "dev")}
    (dev, seen), (test, others) = (_questions(mme, split, 1000) for split in ("dev", "test"))
    assert sizes == {"dev": len(dev), "test": len(test)}
    assert sorted(dev + test) == list(range(2 * PICTURES)), "every question is in one part"
    assert not seen & others and len(seen) == PICTURES // SHARE
    assert dev != sorted(dev), "in no order of the file"


def test_the_first_questions_are_the_same_however_many_are_asked(found, loaded):
    few, many = (PublicTask("mme", found["mme"], loaded[2]) for _ in range(2))
    assert many.size("test", 20) == 20 and few.size("dev", 3) == 3
    many.size("dev", 8), few.size("test", 5)
    for split, n in (("dev", 3), ("test", 5)):
        assert _questions(few, split, n) == _questions(many, split, n)
        block = Block("mme", split, 0, n)
        assert few.digest(block) == many.digest(block) != few.digest(Block("mme", split, 1, n))


def test_a_question_with_pictures_of_both_parts_is_left_out(mme, monkeypatch):
    shown = {0: [0], 1: [1], 2: [0, 1], 3: [0, 2], 4: [2]}
    monkeypatch.setattr(mme, "_rendered", lambda i: ("what?", [_picture(j) for j in shown[i]]))
    mme._left = [4, 3, 2, 1, 0]
    mme.size("dev", 9)
    assert [i for i, _ in mme._found["dev"]] == [0, 3, 4]
    assert [i for i, _ in mme._found["test"]] == [1]


def test_a_data_set_of_one_picture_cannot_be_divided(mme, monkeypatch):
    monkeypatch.setattr(mme, "_rendered", lambda i: ("what?", [_picture(0)]))
    with pytest.raises(DataError, match="mme has no question for test"):
        mme.size("test", 1)


def test_other_answers_are_other_data(mme, tmp_path, own_cache, loaded):  # noqa: F811
    eval_data.parquet(tmp_path / "MME" / "data", "test", _mme("Perhaps"))
    other = PublicTask("mme", load(["mme"], tmp_path)["mme"], loaded[2])
    digests = []
    for task in (mme, other):
        sizes = {split: task.size(split, 99) for split in ("dev", "test")}
        digests.append([task.digest(Block("mme", s, 0, n)) for s, n in sizes.items()])
    assert sum(a != b for a, b in zip(*digests, strict=True)) == 1, "where the question is"


# Asked as `mllm eval` does


@pytest.fixture(scope="module")
def evaluator(found, loaded):
    return Chosen(["mme"], found).asked_of(*loaded[1:], style="plain", batch_size=4)


def test_answers_are_those_of_mllm_eval(evaluator, loaded, data, tmp_path):
    plan = "fastv:layer=1:keep=9"
    (record,) = runner.evaluate(
        str(loaded[0]), [plan], ["mme"], data_dir=data, batch_size=4, device="cpu",
        output=tmp_path,
    )  # fmt: skip
    (path,) = (path for path in record["files"] if path.endswith("_samples_mme.jsonl"))
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    task = evaluator.public["mme"]
    for split in ("dev", "test"):
        block = Block("mme", split, 0, evaluator.size("mme", split, 10))
        ((_, ours),) = evaluator.ask(Plan.from_spec(plan), [block])
        theirs = [rows[index] for index, _ in task._found[split][: block.stop]]
        kinds = ("mme_perception_score", "mme_cognition_score")
        scores = [row[kind]["score"] for row in theirs for kind in kinds if row.get(kind)]
        assert ours["outcomes"] == outcomes(scores) and len(scores) == block.stop
        for name, key in (("flops", "prefill_flops"), ("tokens", "visual_avg"), ("kv_bytes",) * 2):
            spent = sum(row["mllm"][key] for row in theirs)
            assert ours[name] == pytest.approx(spent, rel=1e-5), "padding costs a little"


def test_the_cache_is_asked_again(evaluator):
    block = Block("mme", "dev", 0, evaluator.size("mme", "dev", 4))
    ((_, whole),) = evaluator.ask(Plan([]), [block])
    spec = "stride:keep=0.5:positions=original+h2o:budget=0.5"
    ((_, held),) = evaluator.ask(Plan.from_spec(spec), [block])
    assert held["kv_bytes"] < 0.8 * whole["kv_bytes"]
    ((_, full),) = evaluator.ask(Plan.from_spec("h2o:budget=1.0"), [block])
    assert full["outcomes"] == whole["outcomes"]


def test_a_task_that_scores_no_single_question_is_refused(mme, evaluator, monkeypatch):
    mme.size("dev", 1)
    monkeypatch.setattr(mme.task, "process_results", lambda *_: {"submission": {"id": 1}})
    with pytest.raises(MllmError, match="no score from 0 to 1, but submission") as caught:
        mme.ask(evaluator._here, Plan([]), Block("mme", "dev", 0, 1), 1)
    assert caught.value.argument == "tasks"


def test_the_command_on_public_tasks_and_our_own(data, loaded, tmp_path):
    """MME's own score wants whole pairs; here every question counts by itself."""
    words = ("tune", "--model", loaded[0], "--tasks", "mme,color", "--data-dir", data,
             "--max-tokens", "50%", "--methods", "stride", "--budgets", "0.25,0.4", "--trials", 2,
             "--first", 2, "--n", 3, "--n-test", 4, "--confirm", 1, "-o", tmp_path,
             "--json")  # fmt: skip
    result, payload = _cli(*words)
    assert result.exit_code == 0, result.output
    found = payload["data"]
    assert found["settings"]["tasks"] == ["color", "mme"]
    assert found["confirmed"][0]["n"] == found["unpatched"]["test"]["n"] == 8
    lines = [line for _, line in cells.parsed(tmp_path / "trials.jsonl")[0]]
    assert {line["task"] for line in lines[1:]} == {"mme", "color"}
    result, again = _cli(*words)
    assert again["data"] | {"forecast": 0} == found | {"forecast": 0}
    assert [line for _, line in cells.parsed(tmp_path / "trials.jsonl")[0]] == lines


@pytest.mark.parametrize("words, argument, match", [
    (("--tasks", "popee"), "tasks", "pope"),
    (("--tasks", "pope", "--data-dir", "nowhere"), "data_dir", "no folder nowhere"),
    (("--tasks", "gqa"), "data_dir", "no local copy of lmms-lab-encoder/GQA"),
    (("--tasks", ","), "tasks", "no admitted tasks"),
])  # fmt: skip
def test_what_cannot_be_had_is_found_before_weights_are_read(
    data, loaded, tmp_path, monkeypatch, words, argument, match
):
    monkeypatch.setattr("mllm.loading.load_model", lambda *_, **__: pytest.fail("weights"))
    monkeypatch.chdir(tmp_path)
    where = () if "--data-dir" in words else ("--data-dir", data)
    result, payload = _cli("tune", "--model", loaded[0], "--max-loss", 1, *words, *where, "--json")
    assert result.exit_code == 2, result.output
    assert payload["error"]["argument"] == argument
    assert match in payload["error"]["message"] + payload["error"]["expected"]


# Scores between right and wrong


def test_scores_are_kept_to_a_hundredth():
    assert outcomes([True, 0.0, 1]) == "101" and outcomes([0.3, 1, 2 / 3]) == [0.3, 1.0, 0.67]


def test_an_interval_of_scores_is_that_of_the_bootstrap():
    rng = np.random.default_rng(0)
    values = [0, 0.3, 0.6, 0.9, 1]
    ours, theirs = ([rng.choice(values, 60), rng.choice(values, 30)] for _ in range(2))
    got = stats.paired_scores(ours, theirs)
    moves = [x - y for x, y in zip(ours, theirs, strict=True)]
    drawn = sum(
        row[rng.integers(0, len(row), (20_000, len(row)))].sum(1) for row in moves
    ) / 90
    assert [got.low, got.high] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.005)
    assert got.diff == pytest.approx(sum(map(sum, moves)) / 90)
    assert got.gained + got.lost < got.n == 90 and 0 < got.p < 1
    wide = stats.paired_scores(ours, theirs, level=0.01)
    assert wide.low < got.low and wide.high > got.high
    right, wrong = ([[float(x > 0.5) for x in row] for row in side] for side in (ours, theirs))
    binary, same = stats.paired(right, wrong), stats.paired_scores(right, wrong)
    assert (same.diff, same.low, same.high) == (binary.diff, binary.low, binary.high)
    with pytest.raises(ValueError, match="same, non-empty"):
        stats.paired_scores([[1.0]], [[1.0, 0.5]])


def test_few_scores_prove_nothing():
    record = Record([[0.5] * 10], {})
    low, high = difference(record, record, 1)["ci"]
    assert -0.35 < low < -0.15 and high == 0


def test_a_search_on_scores(tmp_path):
    class Scores(Fake):
        """Half of what is lost is lost by half."""

        def ask(self, plan, blocks):
            for block, found in super().ask(plan, blocks):
                half = [float(bit) if i % 2 else 0.3 + 0.6 * float(bit)
                        for i, bit in enumerate(found["outcomes"])]  # fmt: skip
                yield block, found | {"outcomes": outcomes(half)}

    found = _search(tmp_path, fake=Scores(), trials=40)
    assert found["plan"].startswith("divprune")
    assert all(0 < one["score"] < 1 for one in found["unpatched"].values())
    lines = [line for _, line in cells.parsed(tmp_path / "trials.jsonl")[0]]
    assert set(lines[1]["outcomes"]) <= {0.3, 0.9, 0.0, 1.0}


@pytest.mark.slow
def test_python_takes_public_tasks_too(data, loaded, tmp_path):
    found = tune(
        *loaded[1:], tmp_path, max_tokens="50%", methods=["stride"], budgets=[0.25],
        tasks=["mme"], data_dir=data,
        effort=Effort(trials=1, first=2, n=2, n_test=3, confirm=1),
    )  # fmt: skip
    assert found["plan"] == "stride:keep=0.25" and found["settings"]["tasks"] == ["mme"]
