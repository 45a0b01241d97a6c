"""`mllm tune` with an adapter, and with several workers."""

from __future__ import annotations

import functools
import json
import shutil

import pytest
import torch
from eval_tiny import TOKENS, save_tiny
from safetensors.torch import load_file
from test_tune import SMALL, _cli, _search, short_answers  # noqa: F401
from tune_fake import Fake

pytest.importorskip("optuna")

import mllm
from mllm.errors import DataError, MllmError, PlanError
from mllm.eval import cells, engines, tune, tuning_model, tuning_space
from mllm.eval.tuning import Effort, search
from mllm.eval.tuning_answers import Block
from mllm.eval.tuning_goal import Goal
from mllm.eval.tuning_space import NONE, SHARES, Learnt, Space
from mllm.loading import load_model
from mllm.plan import ADAPTER_FILES, Plan

FLEX = "tokenflex:counts=4/16/64"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def flex(folder, tmp_path_factory):
    """An adapter for three budgets, and one that has learnt something else."""
    place = tmp_path_factory.mktemp("flex")
    net, _ = load_model(str(folder), device="cpu")
    for seed, name in enumerate(("adapter", "other")):
        with mllm.patch(net, FLEX) as patched:
            torch.manual_seed(seed)
            for weight in net.mllm.parameters():
                torch.nn.init.normal_(weight, std=0.3)
            patched.save_adapter(place / name)
    return place


# The space


def _proposed(space, **params):
    optuna = pytest.importorskip("optuna")
    return space.plan(optuna.trial.FixedTrial(params))


def test_a_trained_plan_is_searched_by_itself_at_its_budgets(flex, folder):
    learnt = Learnt.of(flex / "adapter", folder)
    spec = learnt.plan.spec
    space = Space(["stride", "fastv"], [0.25, 0.5, 0.75], TOKENS, 4, learnt)
    assert space.budgets == [4, 16, 64]
    plan = _proposed(space, learnt=spec, learnt_budget=1)
    (stage,) = plan.stages
    assert stage.keep == 16 and plan.folder == flex / "adapter"
    plan = _proposed(space, learnt=NONE, before="stride", before_share=0, inside=NONE)
    assert plan.spec == "stride:keep=0.25" and plan.folder is None
    specs = [_proposed(space, **params).spec for params in space.design()]
    assert len(set(specs)) == len(specs) == 2 * 3
    alone = Space(["tokenflex"], [0.25], TOKENS, 4, learnt)
    assert alone.design() and all("learnt_budget" in params for params in alone.design())


def test_many_trained_budgets_are_thinned_to_the_shares():
    plan = Plan.from_spec("mqt:queries=64:heads=2")
    learnt = Learnt(plan, plan.stages[0].trained())
    assert learnt.budgets(SHARES, 64) == [2, 4, 6, 8, 10, 14, 20, 26, 36, 48]
    assert learnt.budgets([0.5], 48) == [24] and learnt.budgets([0.5], 16)[-1] == 16
    assert Learnt(plan, (36, 64)).budgets(SHARES, 16) == [36], "but for the least"


def test_what_has_one_budget_is_one_candidate(tmp_path, folder):
    net, _ = load_model(str(folder), device="cpu")
    with mllm.patch(net, "tokenpacker:keep=16:heads=4") as patched:
        patched.save_adapter(tmp_path)
    learnt = Learnt.of(tmp_path, folder)
    space = Space(["tokenpacker"], [0.25], TOKENS, 4, learnt)
    assert space.design() == [{"learnt": learnt.plan.spec}]
    assert _proposed(space, learnt=learnt.plan.spec) is learnt.plan


def test_what_the_model_itself_has_learnt_belongs_to_it(tmp_path, folder):
    own = shutil.copytree(folder, tmp_path / "model")
    Plan.from_spec("m3:scales=64/16/4").save_pretrained(own)
    learnt = Learnt.of(own, str(own))
    assert learnt.budgets(SHARES, TOKENS) == [4, 16, 64] and learnt.names == {"m3"}
    with pytest.raises(PlanError, match="is not the model that has learnt") as caught:
        Learnt.of(own, folder)
    assert caught.value.argument == "adapter"


# Found, written and asked once


def _tuned(folder, out, *words):
    return _cli("tune", "--model", folder, "--max-tokens", "50%", *SMALL, "-o", out, *words,
                "--json")  # fmt: skip


def test_the_folder_has_the_plan_and_what_it_has_learnt(folder, flex, tmp_path, short_answers):  # noqa: F811
    words = ("--methods", "tokenflex", "--adapter", flex / "adapter")
    result, payload = _tuned(folder, tmp_path, *words)
    assert result.exit_code == 0, result.output
    data = payload["data"]
    kept = {trial["plan"] for trial in data["trials"]}
    assert kept == {f"tokenflex:keep={n}:counts=4/16/64" for n in (4, 16, 64)}
    (over,) = (t for t in data["trials"] if t["state"] == "over_budget")
    assert "keep=64" in over["plan"]
    plan = Plan.of(tmp_path)
    assert plan.spec == data["plan"]
    digest = data["settings"]["adapter"]["adapter_sha256"]
    lines = [line for _, line in cells.parsed(tmp_path / "trials.jsonl")[0]]
    asked = [line for line in lines if line["kind"] == "answers"]
    assert {line.get("adapter_sha256") for line in asked if line["plan"]} == {digest}
    assert {line.get("adapter_sha256") for line in asked if not line["plan"]} == {None}
    net, _ = load_model(str(folder), device="cpu")
    with mllm.patch(net, tmp_path):
        theirs = load_file(flex / "adapter" / ADAPTER_FILES[1])
        held = {f"mllm.{name}": value for name, value in net.mllm.state_dict().items()}
        assert held.keys() == theirs.keys()
        assert all(torch.equal(held[name], theirs[name]) for name in theirs)
    _tuned(folder, tmp_path, *words)
    assert [line for _, line in cells.parsed(tmp_path / "trials.jsonl")[0]] == lines
    # What another adapter says is another answer.
    _tuned(folder, tmp_path, *words[:-1], flex / "other")
    more = [line for _, line in cells.parsed(tmp_path / "trials.jsonl")[0]][len(lines) :]
    assert more and digest not in {line.get("adapter_sha256") for line in more}
    assert all(line["plan"] for line in more), "the unpatched model has learnt nothing"
    # A plan without one leaves none behind.
    result, payload = _tuned(folder, tmp_path, "--methods", "stride")
    assert payload["data"]["plan"].startswith("stride")
    assert not any((tmp_path / name).exists() for name in ADAPTER_FILES)


@pytest.mark.parametrize("case, match", [
    ("nothing", "has no plan"), ("fastv", "fastv.*learns nothing"), ("bare", "is not the model"),
    ("own", "nothing that they have learnt"),
])  # fmt: skip
def test_what_is_no_adapter_is_refused(folder, tmp_path, case, match):
    place, model = tmp_path / "a", folder
    if case == "own":  # a model with a plan whose weights are missing
        shutil.copytree(folder, place)
        model = place
    if case != "nothing":
        Plan.from_spec("fastv:layer=2:keep=9" if case == "fastv" else FLEX).save_pretrained(place)
    result, payload = _tuned(model, tmp_path / "out", "--adapter", place)
    assert result.exit_code == 2, result.output
    error = payload["error"]
    assert error["argument"] in ("adapter", "plan") and error["expected"]
    with pytest.raises(PlanError, match=match):
        raise PlanError(error["message"])
    net, processor = load_model(str(model), device="cpu")
    with pytest.raises(PlanError, match=match):
        tune(net, processor, tmp_path / "out", max_loss=1, tasks=["color"], adapter=place)


def test_a_folder_of_something_else_is_left_alone(folder, flex, tmp_path):
    own = shutil.copytree(flex / "adapter", tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    result, payload = _tuned(folder, own, "--adapter", own)
    assert result.exit_code == 2 and payload["error"]["argument"] == "output"
    with pytest.raises(DataError, match="mllm_plan.json, which no search has written"):
        _search(own)
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before


# Several processes


GOAL, ASKED = Goal("tokens", None, 0.5, relative=True), ("color", "ocr_word")
EFFORT = Effort(trials=3, first=2, n=4, n_test=4, confirm=1)


@pytest.fixture(scope="module")
def pooled(folder):
    load = functools.partial(engines.load_on, str(folder))
    with tuning_model.ModelEvaluator(
        *load_model(str(folder), device="cpu"), ASKED, "plain", 2, workers=2, load=load
    ) as evaluator:
        yield evaluator


@pytest.mark.slow
def test_workers_answer_as_one_process_does(pooled, folder, flex, tmp_path):
    loaded = load_model(str(folder), device="cpu")
    alone = tuning_model.ModelEvaluator(*loaded, ASKED, "plain", 2)
    learnt = Learnt.of(flex / "adapter", folder)
    methods = ("stride", "h2o")
    one, two = (
        search(evaluator, tmp_path / name, GOAL, ASKED, methods=methods, effort=EFFORT,
               learnt=learnt)
        for name, evaluator in (("one", alone), ("two", pooled))
    )  # fmt: skip
    assert one == two
    lines = [
        sorted(json.dumps(line) for _, line in cells.parsed(tmp_path / name / "trials.jsonl")[0])
        for name in ("one", "two")
    ]
    assert lines[0] == lines[1]
    assert any("tokenflex" in line for line in lines[0])


def test_workers_go_on_after_what_they_cannot_do(pooled):
    """What one process says of it must not be taken for the answer to the next question."""
    blocks = [Block("color", "dev", i, i + 1) for i in range(3)]
    before = dict(pooled.ask(Plan([]), blocks))
    with pytest.raises(PlanError, match="layer"):
        list(pooled.ask(Plan.from_spec("fastv:layer=40:keep=0.5"), blocks))
    with pytest.raises(DataError, match="does not exist"):
        list(pooled.ask(Plan([]), [*blocks, Block("colr", "dev", 0, 1), *blocks]))
    assert dict(pooled.ask(Plan([]), blocks)) == before


def test_a_worker_that_died_is_no_fault_of_the_plan(tmp_path):
    class Dying(Fake):
        def ask(self, plan, blocks):
            if plan.stages:
                raise MllmError("a worker process died", argument="workers")
            yield from super().ask(plan, blocks)

    with pytest.raises(MllmError, match="died"):
        _search(tmp_path, fake=Dying())
    assert not (tmp_path / "evidence.json").exists()


def test_workers_load_the_model_that_was_given(folder, monkeypatch):
    loaded = load_model(str(folder), device="cpu")
    with pytest.raises(MllmError, match="nothing says how") as caught:
        tune(*loaded, "never", max_loss=1, tasks=["color"], workers=2)
    assert caught.value.argument == "load"
    closed = []

    class Other:
        about = {"weights_sha256": "another", "backend": "sdpa"}

        def __init__(self, *given, **options):
            pass

        def close(self):
            closed.append(self)

    monkeypatch.setattr(tuning_model, "Pool", Other)
    with pytest.raises(MllmError, match="another model: weights_sha256 another"):
        tuning_model.ModelEvaluator(*loaded, ["color"], "plain", 2, workers=2, load=print)
    assert closed


@pytest.mark.slow
def test_on_the_embedded_model_with_what_a_recipe_has_trained(tmp_path):
    """Killed by nobody, asked by two processes, and run from the folder that it leaves."""
    from mllm.training.recipe import load
    from mllm.training.run import run

    recipe = load("tokenflex-finetune", [f"output.dir={tmp_path / 'run'}"], tiny=True)
    assert run(recipe)["status"] == "complete"
    words = ("tune", "--model", tmp_path / "run/model", "--adapter", tmp_path / "run/routers",
             "--max-tokens", "30%", "--methods", "tokenflex,stride", "--budgets", "0.1,0.25",
             "--tasks", "exist,color", "--trials", 5, "--first", 2, "--n", 4, "--n-test", 6,
             "--confirm", 2, "--batch-size", 4, "-o", tmp_path / "tuned", "--json")  # fmt: skip
    result, payload = _cli(*words, "--workers", 2)
    assert result.exit_code == 0, result.output
    kept = {t["plan"] for t in payload["data"]["trials"] if "tokenflex" in t["plan"]}
    assert kept <= {f"tokenflex:keep={n}" for n in (64, 144, 256)} and len(kept) >= 2
    before = (tmp_path / "tuned/trials.jsonl").read_text()
    result, again = _cli(*words)
    drop = ("forecast", "about")
    assert {k: v for k, v in again["data"].items() if k not in drop} == {
        k: v for k, v in payload["data"].items() if k not in drop
    }
    assert (tmp_path / "tuned/trials.jsonl").read_text() == before


@pytest.mark.slow
def test_the_best_of_the_trained_budgets_is_found_on_the_embedded_model(tmp_path):
    """M3 on a model that answers from pooled pictures as well as it does: the largest that fits."""
    net, processor = load_model("tiny-llava", device="cpu")
    own = tmp_path / "model"
    net.save_pretrained(own)
    processor.save_pretrained(own)
    Plan.from_spec("m3").save_pretrained(own)
    found = tune(
        *load_model(str(own), device="cpu"), tmp_path / "tuned", max_tokens="30%", methods=["m3"],
        adapter=own, tasks=["color", "exist"],
        effort=Effort(trials=4, first=8, n=32, n_test=40, confirm=2),
    )  # fmt: skip
    assert found["plan"] == "m3:keep=144"
    assert {trial["plan"] for trial in found["trials"]} >= {"m3:keep=144", "m3:keep=9"}
    assert tuning_space.get_method("m3").info.trained
