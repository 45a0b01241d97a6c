"""`mllm tune`: a planted optimum is found and its claim holds; stopped searches; bad input."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from eval_tiny import save_tiny
from tune_fake import ENOUGH, LAYERS, TASKS, TOKENS, Fake, loss, share
from typer.testing import CliRunner

pytest.importorskip("optuna")

import mllm
from mllm import plan as plans
from mllm.cli import app
from mllm.compressors.base import Budget, Keep, Positions, TokenReducer, resolve
from mllm.errors import DataError, MllmError, PlanError
from mllm.eval import asking, cells, tune, tuning, tuning_model, tuning_space
from mllm.eval.tuning import Effort, search
from mllm.eval.tuning_answers import Block, Journal, Record
from mllm.eval.tuning_goal import COSTS, Goal
from mllm.loading import load_model
from mllm.plan import Plan
from mllm.yardstick import samples

METHODS = ("random", "stride", "divprune", "visionzip", "fastv")
EFFORT = {"trials": 20, "first": 16, "n": 64, "n_test": 400, "confirm": 2}
LOSS = Goal("flops", max_loss=2)


def _search(folder, goal=LOSS, fake=None, methods=METHODS, claim="interval", **effort):
    return search(
        fake or Fake(), folder, goal, TASKS, methods=methods, claim=claim,
        effort=Effort(**(EFFORT | effort)),
    )  # fmt: skip


def _cli(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result, json.loads(result.stdout) if result.stdout.startswith("{") else None


# What is found, and whether it is true


@pytest.mark.parametrize("seed", range(3))
def test_the_planted_optimum_is_found_and_its_claim_is_true(tmp_path, seed):
    found = _search(tmp_path, fake=Fake(seed=seed), seed=seed, trials=40)
    plan = Plan.of(tmp_path)
    assert plan.spec == found["plan"] and plan.sha256 == found["plan_sha256"]
    (stage,) = plan.stages
    assert stage.info.name == "divprune"
    # A rung or two above the cheapest budget that loses nothing; below it 2 points are lost.
    assert loss(plan) <= 0.02 and ENOUGH / 2 < stage.keep <= 0.23
    (best,) = (one for one in found["confirmed"] if one["plan"] == found["plan"])
    assert best["holds"] and best["cost"]["share"] == pytest.approx(share(plan))
    assert best["n"] == len(TASKS) * EFFORT["n_test"] and best["vs_unpatched"]["ci"][0] >= -0.02
    # Of twenty thousand other questions.
    fake = Fake(seed=seed)
    right = [[fake.is_right(p, "new", "other", i) for i in range(20_000)]
             for p in (plan, Plan([]))]  # fmt: skip
    assert sum(right[0]) >= sum(right[1]) - 0.02 * 20_000


def test_the_best_within_a_budget_is_found(tmp_path):
    found = _search(tmp_path, Goal("flops", None, 0.4, relative=True), trials=40)
    plan = Plan.of(tmp_path)
    assert found["plan"] == plan.spec and loss(plan) == 0 and share(plan) <= 0.4
    over = [t for t in found["trials"] if t["state"] == "over_budget"]
    assert over and all(t["n"] == len(TASKS) and t["value"] < 0 for t in over)


def test_the_cost_is_what_was_asked_for(tmp_path):
    goals = Goal("latency", max_loss=2), Goal("latency", None, 0.9), Goal("kv_bytes", None, 2000)
    for goal in goals:
        found = _search(tmp_path / str(goal.cost) / str(goal.budget), goal)
        (best,) = (one for one in found["confirmed"] if one["plan"] == found["plan"])
        whole = {"latency": 2, "kv_bytes": 4000}[goal.cost]
        assert best["cost"]["value"] == pytest.approx(whole * share(Plan.from_spec(found["plan"])))
        assert goal.budget is None or best["cost"]["value"] <= goal.budget
        assert ("pairs" in best["cost"]) == (goal.cost == "latency")


def test_what_cannot_run_is_counted(tmp_path):
    found = _search(tmp_path)
    count = sum(trial["state"] == "refused" for trial in found["trials"])
    assert count and found["refused"] == [{"reason": "this tower has no [CLS]", "count": count}]


def test_where_nothing_holds_there_is_no_plan(tmp_path):
    _search(tmp_path)
    assert (tmp_path / "mllm_plan.json").exists()
    found = _search(tmp_path, Goal("flops", max_loss=2), methods=("random", "fastv"), trials=8)
    assert found["plan"] is None and not any(one["holds"] for one in found["confirmed"])
    assert "No plan was confirmed" in found["words"]
    assert not (tmp_path / "mllm_plan.json").exists(), "one of another search"
    assert json.loads((tmp_path / "evidence.json").read_text()) == found


def test_a_budget_below_every_plan(tmp_path):
    found = _search(tmp_path, Goal("flops", None, 50.0), trials=12)
    assert found["plan"] is None and found["confirmed"] == []
    assert re.search(r"cheapest of \d+ plans was .*unpatched model's prefill FLOPs", found["words"])


def test_a_model_that_can_run_nothing(tmp_path):
    found = _search(tmp_path, methods=("visionzip",), trials=4)
    assert found["plan"] is None and found["refused"][0]["count"] == 4
    assert "could run none" in found["words"]


def test_few_questions_prove_nothing():
    """Ten questions of which none flips leave a loss of a quarter possible."""
    record = Record([[1] * 10], {})
    low, high = tuning.difference(record, record, 1)["ci"]
    assert -0.35 < low < -0.15 and high == 0
    record = Record([[1] * 1000, [0] * 1000], {})
    low, _ = tuning.difference(record, record, 1)["ci"]
    assert -0.0025 < low < -0.0005
    assert tuning.difference(record, record, 3)["ci"][0] < low


def test_a_plan_that_answers_nothing_is_no_error(tmp_path):
    class Mute(Fake):
        def is_right(self, plan, task, split, index):
            return not plan.stages

    found = _search(tmp_path, fake=Mute(), methods=("stride",), trials=4)
    assert found["plan"] is None and found["confirmed"][0]["vs_unpatched"]["diff"] == -1


def test_questions_double_and_are_asked_once(tmp_path):
    fake = Fake()
    found = _search(tmp_path, fake=fake)
    assert len(fake.asked) == len(set(fake.asked))
    assert {trial["n"] // len(TASKS) for trial in found["trials"] if "n" in trial} <= {16, 32, 64}
    states = [trial["state"] for trial in found["trials"]]
    assert states.count("halved") >= len(states) / 4 and states.count("complete") > 0
    complete = [trial["plan"] for trial in found["trials"] if trial["state"] == "complete"]
    assert len(complete) == len(set(complete)), "a plan that is known is no trial"
    assert Effort(first=16, n=100).edges(100) == [1, 16, 32, 64, 100]


# Stopped, and run again


def test_a_seed_gives_the_same_search(tmp_path):
    first, second = (_search(tmp_path / name) for name in "ab")
    assert first == second
    other = _search(tmp_path / "c", seed=1)
    assert [t["params"] for t in other["trials"]] != [t["params"] for t in first["trials"]]


@pytest.mark.parametrize("at", [1, 30, 90])
def test_a_stopped_search_goes_on(tmp_path, at):
    whole = Fake()
    expected = _search(tmp_path / "whole", fake=whole)
    calls = iter(range(at))

    def stop():
        if next(calls, None) is None:
            raise KeyboardInterrupt

    first = Fake(stop)
    with pytest.raises(KeyboardInterrupt):
        _search(tmp_path / "s", fake=first)
    path = tmp_path / "s" / "trials.jsonl"
    with path.open("a") as file:
        file.write('{"kind": "answers", "plan": "ran')  # what a killed process leaves
    second = Fake()
    assert _search(tmp_path / "s", fake=second) == expected
    assert first.asked + second.asked == whole.asked


def test_a_search_with_another_goal_asks_only_what_is_new(tmp_path):
    _search(tmp_path)
    fake = Fake()
    _search(tmp_path, Goal("flops", max_loss=3), fake=fake)
    lines, damaged = cells.parsed(tmp_path / "trials.jsonl")
    names = [(x["plan"], x["task"], x["split"], x["start"])
             for _, x in lines if x["kind"] == "answers"]  # fmt: skip
    assert len(names) == len(set(names)) and not damaged
    assert not any(split == "dev" and plan == "" for plan, _, split, _ in fake.asked)


_SCRIPT = """
import sys, time
sys.path.insert(0, sys.argv[2])
from test_tune import _search
from tune_fake import Fake

def wait():
    print("asked", flush=True)
    time.sleep(0.002)

_search(sys.argv[1], fake=Fake(wait))
"""


@pytest.mark.slow
def test_killed_again_and_again_nothing_is_lost_or_doubled(tmp_path):
    expected = _search(tmp_path / "whole")
    folder, rng = tmp_path / "s", random.Random(0)
    for at in (5, 60):
        words = [sys.executable, "-c", _SCRIPT, str(folder), str(Path(__file__).parent)]
        runner = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        for _ in range(at):
            assert runner.stdout.readline() == "asked\n"
        time.sleep(rng.random() * 0.01)
        runner.send_signal(signal.SIGKILL)
        assert runner.wait() == -signal.SIGKILL
    assert _search(folder) == expected
    whole, found = (cells.parsed(tmp_path / name / "trials.jsonl") for name in ("whole", "s"))
    assert [line for _, line in found[0]] == [line for _, line in whole[0]]


def test_times_belong_to_a_device_and_its_threads(tmp_path):
    """Answers do not, so a search goes on elsewhere; its times are measured again."""

    class Timed(Fake):
        def __init__(self, **about):
            super().__init__()
            self.about |= about
            self.timed = []

        def time(self, plan, pairs):
            self.timed.append(plan.spec)
            return super().time(plan, pairs)

    def searched(**about):
        fake = Timed(**about)
        _search(tmp_path, Goal("latency", max_loss=2), fake, ("stride", "divprune"), trials=4)
        return fake

    first = searched(device="cpu", threads=2)
    assert first.timed and first.asked
    assert searched(device="cpu", threads=2).timed == []
    for about in ({"device": "cuda:0", "threads": 2}, {"device": "cpu", "threads": 8}):
        again = searched(**about)
        assert again.timed == first.timed and not again.asked


def test_another_model_is_refused_and_nothing_is_lost(tmp_path):
    _search(tmp_path, trials=4)
    before = (tmp_path / "trials.jsonl").read_text()
    with pytest.raises(DataError, match="weights_sha256.*another --output"):
        _search(tmp_path, fake=Fake(seed=1), trials=4)
    assert (tmp_path / "trials.jsonl").read_text() == before
    assert not (tmp_path / "trials.jsonl.lock").exists()


@pytest.mark.parametrize("line", ["notes", "[1]", '{"kind": "cell"}', '{"kind": "timing"}',
                                  '{"kind": "timing", "plan_sha256": "", "pairs": 1}'])  # fmt: skip
def test_another_file_is_refused(tmp_path, line):
    (tmp_path / "trials.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match="line 1"):
        Journal(tmp_path / "trials.jsonl", Fake()).__enter__()
    assert (tmp_path / "trials.jsonl").read_text() == line + "\n"


# The space


def _proposed(space, **params):
    optuna = pytest.importorskip("optuna")
    return space.plan(optuna.trial.FixedTrial(params))


def test_stacks_of_one_method_per_place():
    methods = ["visionzip", "fastv", "pyramiddrop:positions=original", "h2o", "kivi"]
    space = tuning_space.Space(methods, [0.25, 0.5], TOKENS, LAYERS)
    plan = _proposed(space, before="visionzip", before_share=1, inside="fastv", inside_share=0,
                     layer=3, cache="none")  # fmt: skip
    assert plan.spec == "visionzip:keep=0.5+fastv:layer=3:keep=0.25"
    plan = _proposed(space, before="visionzip", before_share=1, inside="none", cache="h2o",
                     cache_share=0)  # fmt: skip
    assert plan.spec == "visionzip:keep=0.5:positions=original+h2o:budget=0.25"
    plan = _proposed(space, before="none", inside="pyramiddrop:positions=original",
                     inside_share=1, cache="kivi")  # fmt: skip
    drop, kivi = plan.stages
    assert drop.positions == "original" and kivi.info.name == "kivi"
    fixed = drop.at_depth(LAYERS)
    ends = [*fixed.layers[1:], LAYERS]
    seen = fixed.layers[0] * TOKENS + sum(
        keep * (end - layer)
        for keep, layer, end in zip(fixed.keep, fixed.layers, ends, strict=True)
    )
    assert seen / LAYERS == pytest.approx(50, abs=1)
    assert _proposed(space, before="none", inside="none", cache="none") is None
    for params in space.design():
        assert len(_proposed(space, **params).stages) == 1
    assert len(space.design()) == 2 * len(methods) - 1, "much and little, where there is a budget"


def test_what_a_template_sets_is_not_searched():
    space = tuning_space.Space(["fastv:layer=2", "divprune:keep=0.3"], [0.25], TOKENS, LAYERS)
    plan = _proposed(space, before="divprune:keep=0.3", inside="fastv:layer=2", inside_share=0)
    assert plan.spec == "divprune:keep=0.3+fastv:layer=2:keep=0.25"


def test_every_method_without_training_can_be_searched():
    names = tuning_space.searchable()
    assert {*tuning_space.METHODS, *tuning_space.CACHE_METHODS} <= set(names)
    assert not {"pmod", "m3", "vscan"} & set(names)
    space = tuning_space.Space(["all"], [0.25, 0.5], 576, 32)
    for params in space.design():
        _proposed(space, **params)


# Bad input


@pytest.mark.parametrize(
    "words, argument, match",
    [
        ((), "max_loss", "one goal, and none is given"),
        (("--max-loss", 1, "--max-flops", "40%"), "max_flops", "--max-loss and --max-flops"),
        (("--max-loss", -1), "max_loss", "-1 points"),
        (("--max-loss", 1, "--objective", "speed"), "objective", "'speed' is no cost"),
        (("--max-flops", "40%", "--objective", "flops"), "objective", "goes with a loss"),
        (("--max-flops", 0), "max_flops", "0 cannot be met"),
        (("--max-flops", "100%"), "max_flops", "100% cannot be met"),
        (("--max-tokens", "few"), "max_tokens", "few cannot be met"),
        (("--max-latency", "nan"), "max_latency", "nan cannot be met"),
        (("--max-kv-bytes", 10**12), "max_kv_bytes", "nothing to tune"),
        (("--max-loss", 1, "--methods", "visionzap"), "method", "visionzip"),
        (("--max-loss", 1, "--methods", "visionzip+fastv"), "methods", "is a stack"),
        (("--max-loss", 1, "--methods", "pmod"), "methods", "must be trained"),
        (("--max-loss", 1, "--methods", "vscan"), "methods", "vscan_vision.*vscan_llm"),
        (("--max-loss", 1, "--methods", ","), "methods", "no methods"),
        (("--max-loss", 1, "--budgets", "64"), "budgets", "fractions, not 64"),
        (("--max-loss", 1, "--budgets", "half"), "budgets", "no list of fractions"),
        (("--max-loss", 1, "--tasks", "colr"), "task", "color"),
        (("--max-loss", 1, "--style", "dawn"), "style", "dawn"),
        (("--max-loss", 1, "--trials", 0), "trials", "too few"),
        (("--max-loss", 1, "--n", 8), "n", "n=8 is too few"),
        (("--max-loss", 1, "--claim", "hope"), "claim", "hope"),
    ],
)
def test_bad_input_names_the_argument_and_runs_nothing(folder, tmp_path, words, argument, match):
    out = tmp_path / "out"
    words = ("tune", "--model", folder, "--tasks", "color", "--n", 16, "-o", out, *words)
    result, payload = _cli(*words, "--json")
    assert result.exit_code == 2, result.output
    error = payload["error"]
    assert re.search(match, error["message"] + str(error["expected"])), error
    assert error["argument"] == argument and error["expected"]
    assert not (out / "evidence.json").exists() and not (out / "mllm_plan.json").exists()


def test_without_optuna_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MllmError, match=r"mllm-efficiency\[tune\]"):
        _search(tmp_path)


# With a model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def short_answers(monkeypatch):
    monkeypatch.setattr(asking, "MAX_NEW_TOKENS", 2)


SMALL = ("--tasks", "color,ocr_word", "--trials", 6, "--first", 2, "--n", 4, "--n-test", 4,
         "--confirm", 2, "--batch-size", 4)  # fmt: skip


def test_the_command_writes_a_plan_that_run_takes(folder, tmp_path, short_answers):
    words = ("tune", "--model", folder, "--max-flops", "90%", "--methods",
             "stride,divprune,fastv,windowmerge", *SMALL, "-o", tmp_path)  # fmt: skip
    result, payload = _cli(*words, "--json")
    assert result.exit_code == 0, result.output
    data = payload["data"]
    assert payload["ok"] and data.keys() >= {
        "schema", "plan", "plan_sha256", "words", "goal", "settings", "unpatched", "confirmed",
        "trials", "refused", "about", "forecast", "files",
    }  # fmt: skip
    assert data["forecast"]["questions"] > 0 < data["forecast"]["seconds"]
    assert data["goal"] == {"cost": "flops", "max_loss": None, "budget": 0.9, "relative": True}
    assert 0 < sum(trial["state"] != "over_budget" for trial in data["trials"]) <= 6
    assert {x.name for x in tmp_path.iterdir()} == {
        "trials.jsonl", "evidence.json", "mllm_plan.json",
    }  # fmt: skip
    best = next(one for one in data["confirmed"] if one["plan"] == data["plan"])
    assert best["n"] == 8 and best["cost"]["share"] <= 0.9 and best["kv_bytes"] > 0
    written = json.loads((tmp_path / "evidence.json").read_text())
    assert written == {k: v for k, v in data.items() if k not in ("forecast", "files")}
    picture = Path(__file__).parents[1] / "examples" / "scene.png"
    result, ran = _cli("run", picture, "what?", "--plan", tmp_path, "--model", folder,
                       "--max-new-tokens", 2, "--pairs", 0, "--json")  # fmt: skip
    assert result.exit_code == 0 and ran["data"]["plan_sha256"] == data["plan_sha256"]
    before = (tmp_path / "trials.jsonl").read_text()
    result, again = _cli(*words, "--json")
    assert {**again["data"], "forecast": None} == {**data, "forecast": None}
    assert (tmp_path / "trials.jsonl").read_text() == before, "answers are not asked again"


def test_exit_code_1_where_nothing_is_confirmed(folder, tmp_path, short_answers):
    words = ("tune", "--model", folder, "--max-loss", 0, "--methods", "stride", *SMALL,
             "-o", tmp_path)  # fmt: skip
    result, payload = _cli(*words, "--json")
    assert result.exit_code == 1 and not payload["ok"]
    assert payload["error"]["type"] == "Unconfirmed" and payload["data"]["plan"] is None
    assert not (tmp_path / "mllm_plan.json").exists() and (tmp_path / "evidence.json").exists()
    result, _ = _cli(*words)
    assert result.exit_code == 1 and "No plan was confirmed" in result.stdout


def test_the_cache_is_asked_again(folder, short_answers, monkeypatch):
    """Under plain generation the first token has seen what a method evicts."""
    asked = []
    questions = asking.Questions

    def watched(*arguments):
        asked.append(arguments[-1])
        return questions(*arguments)

    monkeypatch.setattr(tuning_model, "Questions", watched)
    loaded = load_model(str(folder), device="cpu")
    evaluator = tuning.ModelEvaluator(*loaded, ["color"], "plain", 4)
    blocks = [Block("color", "dev", 0, 4)]
    ((_, whole),) = evaluator.ask(Plan([]), blocks)
    for spec in ("h2o:budget=0.5", "stride:keep=0.5:positions=original+h2o:budget=0.5",
                 "fastv:layer=2:keep=0.5+h2o:budget=0.5"):  # fmt: skip
        ((_, found),) = evaluator.ask(Plan.from_spec(spec), blocks)
        assert found["kv_bytes"] < 0.8 * whole["kv_bytes"]
    assert asked == ["prompt", "prompt", "again"]


def test_stages_before_the_cache_may_be_asked_again(folder, short_answers):
    """Where nothing is evicted, what is asked again is answered as it was."""
    model, processor = load_model(str(folder), device="cpu")
    drawn = samples("color", "dev", 4)
    for spec in ("stride:keep=0.5:positions=original", "fastv:layer=2:keep=0.5"):
        said = []
        for protocol, more in (("prompt", ""), ("again", "+h2o:budget=1.0")):
            questions = asking.Questions(processor, drawn, 4, model.dtype, model.device, protocol)
            with mllm.patch(model, spec + more) as patched:
                answers = asking.answer_all(model, processor, questions, patched)
            said.append([given.text for given in answers])
        assert said[0] == said[1]


def test_time_is_measured_in_pairs(folder, tmp_path, short_answers):
    words = ("tune", "--model", folder, "--max-latency", "99.9%", "--methods", "stride", *SMALL,
             "--pairs", 2, "-o", tmp_path, "--json")  # fmt: skip
    result, payload = _cli(*words)
    assert result.exit_code in (0, 1), result.output
    timed = [x for _, x in cells.parsed(tmp_path / "trials.jsonl")[0] if x["kind"] == "timing"]
    assert timed and all(x["patched_s"] > 0 < x["unpatched_s"] for x in timed)
    for one in payload["data"]["confirmed"]:
        assert one["cost"]["pairs"] == tuning.CLAIM_PAIRS


def test_dry_run_writes_nothing(folder, tmp_path):
    words = ("tune", "--model", folder, "--max-loss", 1, *SMALL, "-o", tmp_path / "out")
    result, payload = _cli(*words, "--dry-run", "--json")
    assert result.exit_code == 0 and payload["data"].keys() == {
        "goal", "questions", "flops", "seconds"
    }  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_planted_method_wins_on_the_embedded_model(tmp_path, request):
    """Against methods that leave a corner of the picture at the same cost."""
    request.addfinalizer(lambda: plans._REGISTRY.pop("corner"))

    @mllm.register("corner", stage="pre_llm")
    @dataclasses.dataclass
    class Corner(TokenReducer):
        """The first tokens."""

        keep: Budget = 0.5
        positions: Positions | None = None

        def reduce(self, ctx):
            count = resolve(self.keep, ctx.valid.shape[1])
            return [Keep(ctx.valid & (torch.arange(ctx.valid.shape[1]) < count))]

    loaded = load_model("tiny-llava", device="cpu")
    found = tune(
        *loaded, tmp_path, max_tokens="30%", methods=["corner", "stride"], tasks=["admitted"],
        budgets=[0.05, 0.25], effort=Effort(trials=4, first=4, n=16, n_test=20, confirm=1),
    )  # fmt: skip
    assert found["plan"] == "stride:keep=0.25"


def test_tune_is_public(folder, tmp_path, short_answers):
    loaded = load_model(str(folder), device="cpu")
    found = tune(
        *loaded, tmp_path, max_tokens=32, methods=["stride"], tasks=["color"],
        effort=Effort(trials=3, first=2, n=2, n_test=2, confirm=1),
    )  # fmt: skip
    assert found["plan"] is None or found["confirmed"][0]["tokens"] <= 32
    assert set(COSTS) >= {"latency"}
    with pytest.raises(PlanError, match="is a stack"):
        tune(*loaded, tmp_path, max_loss=1, methods=["stride+fastv"], tasks=["color"])
