"""The plan that fits a goal: searched on dev questions, confirmed on test questions."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from mllm.errors import DataError, MllmError, PlanError
from mllm.eval import files, stats
from mllm.eval.bench import CLAIM_PAIRS
from mllm.eval.plans import check_on
from mllm.eval.tuning_answers import Evaluator, Journal, Record, Refused
from mllm.eval.tuning_goal import WORDS, Goal
from mllm.eval.tuning_model import Chosen, ModelEvaluator
from mllm.eval.tuning_space import CACHE_METHODS, METHODS, SHARES, Learnt, Space
from mllm.plan import ADAPTER_FILES, PLAN_FILE, Plan
from mllm.routers import adapter as adapters

if TYPE_CHECKING:
    import optuna

SCHEMA = 1
PROPOSALS = 3  # per trial: some cost too much, repeat what is known, or have no stage
JOURNAL, EVIDENCE = "trials.jsonl", "evidence.json"
UNPATCHED = Plan([])
Claim = Literal["interval", "mean"]
Progress = Callable[[str, int, int], None]  # what runs, steps done, steps in all
OnTrial = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Effort:
    """How much is asked.

    Attributes:
        trials: plans that are asked more than what shows that they cost too much.
        first: dev questions per task that every one of them is asked.
        n: dev questions per task that those are asked which stay; each halving doubles `first`.
        confirm: plans that are asked the test questions.
        n_test: test questions per task.
        pairs: interleaved prefills to time per plan, where time is the cost.
        seed: of the search.

    Raises:
        MllmError: a number that is too small, or `n` below `first`.
    """

    trials: int = 60
    first: int = 16
    n: int = 128
    confirm: int = 3
    n_test: int = 500
    pairs: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"first": 2, "n": self.first, "seed": 0}
        for name, value in vars(self).items():
            if value < least.get(name, 1):
                raise MllmError(
                    f"{name}={value} is too few for a search",
                    argument=name,
                    given=value,
                    expected=f"{least.get(name, 1)} or more",
                )

    def edges(self, n: int) -> list[int]:
        """Questions asked by the end of each block: one for the cost, `first`, and doublings."""
        doubled = [1]
        step = self.first
        while step < n:
            doubled.append(step)
            step *= 2
        return [*doubled, n] if n > 1 else doubled

    @property
    def questions(self) -> int:
        """About how many questions per task a search asks."""
        edges = self.edges(self.n)
        blocks = [b - a for a, b in zip([0, *edges], edges, strict=False)]
        # Every plan gets the block for its cost and the first one, half of them the next.
        stay = [max(1.0, self.trials / 2 ** max(0, i - 1)) for i in range(len(blocks))]
        dev = sum(block * plans for block, plans in zip(blocks, stay, strict=True))
        return round(self.n + dev + (1 + self.confirm) * self.n_test)


def tune(
    model: Any,
    processor: Any,
    output: str | os.PathLike,
    *,
    max_loss: float | None = None,
    objective: str | None = None,
    max_flops: str | float | None = None,
    max_tokens: str | float | None = None,
    max_kv_bytes: str | float | None = None,
    max_latency: str | float | None = None,
    methods: Sequence[str] | None = None,
    budgets: Sequence[float] = SHARES,
    tasks: Sequence[str] = ("admitted",),
    claim: Claim = "interval",
    effort: Effort | None = None,
    style: str = "plain",
    batch_size: int = 16,
    adapter: str | os.PathLike | None = None,
    data_dir: str | os.PathLike | None = None,
    workers: int = 1,
    load: Callable[[str], tuple[Any, Any]] | None = None,
    progress: Progress | None = None,
    on_trial: OnTrial | None = None,
) -> dict[str, Any]:
    """Search the plan that fits a goal, and see whether it does on questions not searched on.

    Args:
        model, processor: as `mllm.load_model` gives them.
        output: folder for the plan, `evidence.json` and `trials.jsonl`; answers in the latter are
            not asked for again.
        max_loss: points of accuracy that may be lost; the cheapest plan is looked for.
        objective: the cost that is saved within `max_loss`: `flops` (default) or `tokens`,
            `kv_bytes`, `latency`.
        max_flops, max_tokens, max_kv_bytes, max_latency: instead of `max_loss`: most prefill
            FLOPs, visual tokens per layer, bytes of the KV cache, or seconds of a prefill, per
            question; or a text such as "40%", of the unpatched model's. The most accurate plan is
            looked for.
        methods: spec texts of one method each, which may set parameters; None for
            `tuning_space.METHODS`, with `CACHE_METHODS` where bytes of the cache count; `all` for
            every one that needs no training. Stacks of one before the LLM, one inside it and one
            on the cache are searched.
        budgets: fractions among which their budgets are chosen.
        tasks: of `mllm.eval.sources`, or groups of them; or public ones of lmms-eval.
        claim: what has to hold on test: the whole `interval`, or the `mean` alone.
        effort: how much is asked.
        style: of the pictures of our own tasks.
        batch_size: questions per batch.
        adapter: folder with what a plan has learnt: that plan is searched too, by itself, under the
            budgets that it was trained for.
        data_dir: folder with local copies of public data sets (see `mllm.eval.public`).
        workers: processes that answer, on the CPU or with a GPU each; answers do not depend on it.
        load: loads the same model and its processor on the device it is given; picklable, needed
            with several workers.
        progress: told before each block of questions.
        on_trial: told each finished trial.

    Returns:
        The evidence, as docs/tune.md describes it. Its `plan` is None where no plan was confirmed.

    Raises:
        MllmError: no goal or several, a budget that the unpatched model meets, an unknown task, or
            Optuna is not installed; a public task without lmms-eval; workers without `load`.
        PlanError: a method that cannot be searched, or no adapter of this model.
        DataError: `output` cannot be written or is another model's, or data cannot be had.
    """
    goal = Goal.of(
        max_loss=max_loss,
        objective=objective,
        budgets={"flops": max_flops, "tokens": max_tokens, "kv_bytes": max_kv_bytes,
                 "latency": max_latency},
    )  # fmt: skip
    chosen = Chosen.of(tasks, style, data_dir)
    learnt = None
    if adapter is not None:
        learnt = Learnt.of(adapter, model.name_or_path)
        check_on(model, [learnt.plan], learnt=True)
    with chosen.asked_of(
        model, processor, style=style, batch_size=batch_size, workers=workers, load=load
    ) as evaluator:
        return search(
            evaluator, output, goal, chosen.names, methods=methods, budgets=budgets, claim=claim,
            effort=effort, learnt=learnt, progress=progress, on_trial=on_trial,
        )  # fmt: skip


def estimate(evaluator: ModelEvaluator, tasks: Sequence[str], effort: Effort) -> dict[str, float]:
    """About what a search costs, if every question cost what it costs the unpatched model.

    Returns:
        `questions`, prefill `flops`, and `seconds` by a probe of a few questions.
    """
    one = evaluator.probe()
    questions = effort.questions * len(tasks)
    drawing = len(tasks) * (effort.n + effort.n_test) * one["drawing"]
    return {
        "questions": questions,
        "flops": questions * one["flops"],
        "seconds": questions * one["answering"] + drawing,
    }


def methods_for(goal: Goal, methods: Sequence[str] | None) -> tuple[str, ...]:
    """The methods that are searched: those named, or ours for this goal."""
    if methods is not None:
        return tuple(dict.fromkeys(methods))
    return (*METHODS, *(CACHE_METHODS if goal.cost == "kv_bytes" else ()))


def search(
    evaluator: Evaluator,
    output: str | os.PathLike,
    goal: Goal,
    tasks: Sequence[str],
    *,
    methods: Sequence[str] | None = None,
    budgets: Sequence[float] = SHARES,
    claim: Claim = "interval",
    effort: Effort | None = None,
    learnt: Learnt | None = None,
    progress: Progress | None = None,
    on_trial: OnTrial | None = None,
) -> dict[str, Any]:
    """:func:`tune` with any :class:`~mllm.eval.tuning_answers.Evaluator`."""
    need(claim)
    effort = effort or Effort()
    methods = methods_for(goal, methods)
    space = Space(methods, budgets, evaluator.tokens, evaluator.num_layers, learnt)
    folder = check_output(output)
    with Journal(folder / JOURNAL, evaluator) as journal:
        run = _Search(journal, space, goal, tuple(tasks), effort, claim, progress)
        trials = run.trials(on_trial)
        confirmed = run.confirm(trials)
    evidence = {
        "schema": SCHEMA,
        "type": "mllm.tune",
        **_outcome(goal, claim, trials, confirmed),
        "goal": goal.as_dict(),
        "settings": {
            "methods": list(methods), "budgets": space.shares, "tasks": list(tasks),
            "claim": claim, **asdict(effort), "adapter": _described(learnt),
        },
        "unpatched": run.unpatched(bool(confirmed)),
        "confirmed": confirmed,
        "trials": trials,
        "refused": _counted(trials),
        "about": {**evaluator.about, "optuna": _optuna_version()},
    }  # fmt: skip
    chosen = run.plans.get(evidence["plan_sha256"])
    learns = chosen is not None and adapters.is_adapter(chosen.folder)
    for name in ADAPTER_FILES if learns else ():
        temporary = folder / f".{name}.tmp"
        shutil.copyfile(chosen.folder / name, temporary)
        temporary.replace(folder / name)
    # Of an earlier search with another goal.
    stale = [*(() if learns else ADAPTER_FILES), *([PLAN_FILE] if chosen is None else [])]
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    if chosen is not None:
        chosen.save_pretrained(folder)
    files.write_json(folder / EVIDENCE, evidence)
    return evidence


def check_output(output: str | os.PathLike) -> Path:
    """The folder of a search, which writes and removes plans there.

    Raises:
        DataError: it cannot be written to, or has a plan that no search has written.
    """
    folder = files.ensure_writable(output)
    there = [name for name in (PLAN_FILE, *ADAPTER_FILES) if (folder / name).exists()]
    if there and not (folder / JOURNAL).exists():
        raise DataError(
            f"{folder} has {there[0]}, which no search has written; give another --output",
            argument="output",
            given=output,
            expected="another --output",
        )
    return folder


def _described(learnt: Learnt | None) -> dict[str, Any] | None:
    """A trained plan, for the evidence."""
    if learnt is None:
        return None
    return {"plan": learnt.plan.spec, **adapters.digest(learnt.plan.folder)}


class _Search:
    """One search: what was asked of the unpatched model is shared by all plans."""

    def __init__(
        self,
        journal: Journal,
        space: Space,
        goal: Goal,
        tasks: tuple[str, ...],
        effort: Effort,
        claim: Claim,
        progress: Progress | None,
    ) -> None:
        self.journal, self.space, self.goal, self.tasks = journal, space, goal, tasks
        self.effort, self.claim = effort, claim
        self.progress = progress or (lambda *_: None)
        self.plans: dict[str, Plan] = {}
        self.known: dict[str, dict[str, Any]] = {}  # trials that another would repeat
        self.edges = effort.edges(effort.n)
        size = journal.evaluator.size
        self.n_test = sum(size(task, "test", effort.n_test) for task in tasks)

    def trials(self, on_trial: OnTrial | None) -> list[dict[str, Any]]:
        """Propose, ask, and drop the worse half at every doubling of the questions."""
        self.progress("the unpatched model", 0, self.effort.trials)
        base = self._answers(UNPATCHED, "dev", self.edges)
        self.goal.check(self._cost(UNPATCHED, base, base, self.effort.pairs)["value"])
        found: list[dict[str, Any]] = []
        done = 0
        with _study(self.effort) as study:
            for params in self.space.design():
                study.enqueue_trial(params)
            for _ in range(PROPOSALS * self.effort.trials):
                if (record := self._trial(study, len(found), done)) is None:
                    continue
                found.append(record)
                if on_trial:
                    on_trial(record)
                done += record["state"] != "over_budget"
                if done == self.effort.trials:
                    break
        return found

    def _trial(self, study: optuna.Study, number: int, done: int) -> dict[str, Any] | None:
        """One proposal; None where it is a plan of which all is known that there is to know."""
        from optuna.trial import TrialState

        trial = study.ask()
        record: dict[str, Any] = {"number": number, "plan": None, "state": "empty"}
        known = None
        try:
            plan = self.space.plan(trial)
            if plan is not None:
                known = self.known.get(plan.sha256)
                self.plans[plan.sha256] = plan
                record |= {"plan": plan.spec, "plan_sha256": plan.sha256}
                record |= known or self._halving(trial, plan, done)
        except (PlanError, Refused) as error:
            record |= {"state": "refused", "reason": str(error)}
        if record["state"] in ("complete", "over_budget"):
            study.tell(trial, record["value"])
            self.known[record["plan_sha256"]] = record
        else:
            study.tell(trial, state=TrialState.PRUNED)
        return None if known or record["state"] == "empty" else {**record, "params": trial.params}

    def _halving(self, trial: optuna.Trial, plan: Plan, done: int) -> dict[str, Any]:
        """Ask a plan ever more questions, for as long as it is among the better half."""
        for count in range(1, len(self.edges) + 1):
            edges = self.edges[:count]
            self.progress(f"{plan.spec}, {edges[-1]} questions a task", done, self.effort.trials)
            ours = self._answers(plan, "dev", edges)
            base = self._answers(UNPATCHED, "dev", edges)
            cost = self._cost(plan, ours, base, self.effort.pairs)
            diff = ours.score - base.score
            seen = {"n": ours.n, "diff": diff, "cost": cost["value"], "share": cost["share"]}
            if self.goal.budget is not None:
                if (excess := self.goal.excess(cost["value"], cost["share"])) > 0:
                    return {"state": "over_budget", "value": -excess, **seen}
                seen["value"] = 1 + diff - 1e-6 * cost["share"]
            else:
                seen["value"] = self._expected_saving(ours, base, cost["share"])
            if count == len(self.edges):
                break
            if count > 1:  # one question a task says what a plan costs, not how good it is
                trial.report(seen["value"], edges[-1])
                if trial.should_prune():
                    return {"state": "halved", **seen}
        return {"state": "complete", **seen}

    def _expected_saving(self, ours: Record, base: Record, share: float) -> float:
        """Share of the cost that is saved, times the chance that the claim will hold on test.

        The chance is that of a normal law for the difference, which the questions so far leave
        uncertain and those of the test split will blur. Its variance is that of one answer more
        that flips than was seen, so that a plan without any does not look certain.
        """
        if share >= 1:
            return 1 - share
        n, diff, flipped = ours.n, *_moved(ours, base)
        variance = (flipped + 1) / (n + 1)
        here, there = variance / n, variance / self.n_test
        needed = -self.goal.max_loss / 100
        if self.claim == "interval":
            needed += 1.96 * math.sqrt(there)
        chance = 0.5 * math.erfc((needed - diff) / math.sqrt(2 * (here + there)))
        return (1 - share) * chance

    def confirm(self, trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The best plans on the test split, best on dev first."""
        saves = [t for t in trials if self.goal.budget is not None or t.get("share", 1) < 1]
        finished = [trial for trial in saves if trial["state"] == "complete"]
        finished.sort(key=lambda trial: -trial["value"])
        best = dict.fromkeys(trial["plan_sha256"] for trial in finished)
        chosen = [self.plans[name] for name in best][: self.effort.confirm]
        if not chosen:
            return []
        edges = self.effort.edges(self.effort.n_test)
        refused: dict[str, str] = {}
        for number, task in enumerate(self.tasks):  # so that its pictures are drawn once
            for plan in (UNPATCHED, *chosen):
                text = f"test, {task}: {plan.spec or 'unpatched'}"
                self.progress(text, number, len(self.tasks))
                try:
                    self.journal.answers(plan, [task], "test", edges)
                except Refused as error:
                    refused[plan.sha256] = str(error)
        base = self._answers(UNPATCHED, "test", edges)
        return [
            {"plan": plan.spec, "plan_sha256": plan.sha256, "holds": False,
             "reason": refused[plan.sha256]}
            if plan.sha256 in refused
            else self._confirmed(plan, self._answers(plan, "test", edges), base, len(chosen))
            for plan in chosen
        ]  # fmt: skip

    def _confirmed(self, plan: Plan, ours: Record, base: Record, count: int) -> dict[str, Any]:
        cost = self._cost(plan, ours, base, max(CLAIM_PAIRS, self.effort.pairs))
        against = difference(ours, base, count)
        # Of a time that is to be shown, the upper end of its interval counts.
        sure = self.claim == "interval" and self.goal.cost == "latency"
        factor = cost["ci"][1] / cost["share"] if sure else 1.0
        value, share = factor * cost["value"], factor * cost["share"]
        if self.goal.budget is not None:
            holds = self.goal.excess(value, share) <= 0
        else:
            reached = against["ci"][0] if self.claim == "interval" else against["diff"]
            holds = share < 1 and reached >= -self.goal.max_loss / 100 - 1e-12
        return {
            "plan": plan.spec,
            "plan_sha256": plan.sha256,
            "stages": plan.to_dict()["stages"],
            "holds": holds,
            **_scored(ours),
            "vs_unpatched": against,
            "cost": cost,
        }

    def unpatched(self, confirmed: bool) -> dict[str, Any]:
        """What the unpatched model reached on dev, and on test if plans were confirmed there."""
        asked = {"dev": self.edges}
        if confirmed:
            asked["test"] = self.effort.edges(self.effort.n_test)
        return {
            split: _scored(self._answers(UNPATCHED, split, edges)) for split, edges in asked.items()
        }

    def _answers(self, plan: Plan, split: str, edges: Sequence[int]) -> Record:
        return self.journal.answers(plan, self.tasks, split, edges)

    def _cost(self, plan: Plan, ours: Record, base: Record, pairs: int) -> dict[str, Any]:
        """`value` per question and `share` of the unpatched model's; of times with `ci`."""
        if self.goal.cost != "latency":
            value, whole = ours.costs[self.goal.cost], base.costs[self.goal.cost]
            return {"value": value, "unpatched": whole, "share": value / whole}
        timed = self.journal.timing(plan, pairs)
        return {"value": timed["patched_s"], "unpatched": timed["unpatched_s"],
                "share": timed["share"], "ci": timed["ci"], "pairs": pairs}  # fmt: skip


def difference(ours: Record, base: Record, count: int) -> dict[str, Any]:
    """Paired difference to the unpatched model, with an interval that holds for `count` plans.

    The lower end counts one question more that only the unpatched model answers: without it the
    bootstrap takes a few questions none of which flips for proof.
    """
    level = stats.LEVEL / count
    binary = all(x in (0, 1) for one in (ours, base) for row in one.rows for x in row)
    compare = stats.paired if binary else stats.paired_scores
    found = compare(ours.rows, base.rows, level=level)
    worse = [[*row, 0] if i == 0 else row for i, row in enumerate(ours.rows)]
    than = [[*row, 1] if i == 0 else row for i, row in enumerate(base.rows)]
    low = compare(worse, than, level=level).low
    return {
        "diff": found.diff, "ci": [low, found.high], "level": 1 - level,
        "gained": found.gained, "lost": found.lost, "p": found.p,
    }  # fmt: skip


def _moved(ours: Record, base: Record) -> tuple[float, float]:
    """The difference of the means, and the sum of its squares: how many answers flipped."""
    moves = [
        x - y
        for own, theirs in zip(ours.rows, base.rows, strict=True)
        for x, y in zip(own, theirs, strict=True)
    ]
    return sum(moves) / len(moves), sum(move**2 for move in moves)


def _scored(record: Record) -> dict[str, Any]:
    # Scores between right and wrong vary less, so that this is too wide for them, if anything.
    return {
        "n": record.n,
        "score": record.score,
        "ci": list(stats.wilson(sum(map(sum, record.rows)), record.n)),
        **record.costs,
    }


def _outcome(
    goal: Goal, claim: Claim, trials: Sequence[dict[str, Any]], confirmed: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The plan, if one holds, and what can be said in words."""
    held = [one for one in confirmed if one["holds"]]
    if held:
        # Within a loss the cheapest; within a budget the best on dev, which comes first.
        best = held[0] if goal.max_loss is None else min(held, key=lambda x: x["cost"]["share"])
        words = f"{_in_words(best, goal)} Goal: {goal}: it holds on test."
        if claim == "mean":
            words += " Only the mean was asked to hold, not its interval."
        return {"plan": best["plan"], "plan_sha256": best["plan_sha256"], "words": words}
    words = f"No plan was confirmed. Goal: {goal}."
    shown = next((one for one in confirmed if "cost" in one), None)
    costs = [trial for trial in trials if "share" in trial]
    if shown is not None:
        words += f" The best on dev: {_in_words(shown, goal)}"
        if goal.max_loss is not None and shown["vs_unpatched"]["diff"] >= -goal.max_loss / 100:
            words += " The interval reaches beyond the loss: ask more test questions."
    elif costs:
        least = min(costs, key=lambda trial: trial["share"])
        words += (
            f" The cheapest of {len(costs)} plans was {least['plan']} with "
            f"{100 * least['share']:.1f} % of the unpatched model's {WORDS[goal.cost]}."
        )
    else:
        words += " The model could run none of the plans: see `refused`."
    return {"plan": None, "plan_sha256": None, "words": words}


def _in_words(one: dict[str, Any], goal: Goal) -> str:
    low, high = (100 * bound for bound in one["vs_unpatched"]["ci"])
    return (
        f"{one['plan']} needs {100 * one['cost']['share']:.1f} % of the unpatched model's "
        f"{WORDS[goal.cost]} and answers {100 * one['score']:.1f} % of {one['n']} test questions, "
        f"{100 * one['vs_unpatched']['diff']:+.1f} points ({low:+.1f} to {high:+.1f})."
    )


def _counted(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Reasons for which plans were refused, the most frequent first."""
    reasons = Counter(trial["reason"] for trial in trials if trial["state"] == "refused")
    return [{"reason": reason, "count": count} for reason, count in reasons.most_common()]


@contextlib.contextmanager
def _study(effort: Effort) -> Iterator[optuna.Study]:
    """A study in memory: the journal has what is dear, and the same seed proposes the same."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield optuna.create_study(
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=effort.seed),
            pruner=optuna.pruners.SuccessiveHalvingPruner(
                min_resource=effort.first, reduction_factor=2
            ),
        )
    finally:
        optuna.logging.set_verbosity(before)


def need(claim: str) -> None:
    """See that a search can be made.

    Raises:
        MllmError: Optuna is not installed, or `claim` is none.
    """
    if claim not in get_args(Claim):
        raise MllmError(
            f"{claim!r} is no claim", argument="claim", given=claim,
            expected=" or ".join(get_args(Claim)),
        )  # fmt: skip
    if importlib.util.find_spec("optuna") is None:
        raise MllmError(
            "Optuna is not installed; pip install 'mllm-efficiency[tune]'",
            argument="tune",
            expected="optuna 4 or newer",
        )


def _optuna_version() -> str:
    from importlib import metadata

    return metadata.version("optuna")
