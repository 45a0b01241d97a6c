"""`mllm demo`: the whole job on the embedded model, ending in a table and a report."""

from __future__ import annotations

import importlib.util
import json as jsonlib
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mllm.cli._common import JsonOption, err_console, run_command
from mllm.errors import DataError, MllmError

if TYPE_CHECKING:
    from mllm.eval.asking import Questions
    from mllm.eval.report import Row, Training
    from mllm.eval.sweep import Entry

MODEL = "tiny-llava"
BUDGETS = (192, 64, 16)
SANITY = ("downsample", "random", "avgpool")
# Name in the table -> spec template; `keep` is set to meet each budget.
METHODS = {
    **{name: name for name in (*SANITY, "visionzip", "divprune", "fastv")},
    "visionzip+fastv": "visionzip+fastv:layer=2",
}
SHOWN = (("visionzip", 64), ("divprune", 64), ("fastv", 192), ("visionzip+fastv", 64))
TIMED_ROUNDS = 5
TRAIN_STEPS = 10


def command(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the report.")] = Path(
        "demo"
    ),
    samples: Annotated[int, typer.Option(min=1, help="Questions per task.")] = 12,
    quick: Annotated[
        bool, typer.Option("--quick", help="At most 4 questions per task; no timing, no training.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Patch, ask, compare, fine-tune: the whole job on the embedded model, in minutes.

    Example: mllm demo --output demo
    """
    run_command("demo", lambda: demo(output, samples, quick), json, lambda _: None)


def demo(output: Path, samples: int, quick: bool) -> dict[str, Any]:
    """Run the demo and write `output`/report.html.

    Raises:
        DataError: `output` cannot be written, or the embedded model is missing.
    """
    from mllm.eval.files import ensure_writable
    from mllm.eval.report import Report, write

    started = time.perf_counter()
    ensure_writable(output)
    console = Console(highlight=False)
    with err_console().status("loading the embedded model"):
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        from mllm import __version__
        from mllm.loading import load_model
        from mllm.yardstick import ADMITTED

        model, processor = load_model(MODEL)
        tasks = ADMITTED
        if not tasks:
            raise DataError(
                "the embedded model has no admitted task (assets/tiny_llava/yardstick.json)",
                argument="model",
                given=MODEL,
                expected="a checkout with the trained model",
            )
        per_task = min(samples, 4) if quick else samples
        run = Run(model, processor, tasks, per_task)
    _patch_ask_remove(console, run)
    run.answer_everything()
    if not quick:
        run.time_everything()
    rows = run.rows()
    console.print(_table(rows, tasks))
    lost, won = run.flips()
    facts = [
        ("model", f"{MODEL}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"),
        ("questions", f"{per_task * len(tasks)}: {per_task} for each of {len(tasks)} tasks"),
        (
            "arithmetic",
            f"{str(model.dtype).removeprefix('torch.')} on {model.device.type}, "
            f"{torch.get_num_threads()} threads",
        ),
        (
            "versions",
            f"mllm {__version__}, torch {torch.__version__}, "
            f"transformers {transformers.__version__}",
        ),
    ]
    page = output / "report.html"
    report = Report("mllm demo: fewer visual tokens", _lead(per_task, quick), facts, rows)
    report.overlays, report.lost, report.won = run.overlays(), lost, won
    write(report, page)
    if not quick:
        report.training = _fine_tune(console, output)
        write(report, page)
    seconds = time.perf_counter() - started
    console.print(f"\n[bold]{page}[/bold] has the plots, the kept tokens and the changed answers.")
    console.print(
        f"{per_task} questions a task rank nothing; benchmarks/results has the full split with "
        f"intervals. Took {seconds:.0f} s."
    )
    return {
        "report": str(page),
        "tasks": list(tasks),
        "samples_per_task": per_task,
        "rows": [row.as_dict() for row in rows],
        "training": report.training and {"losses": report.training.losses},
        "seconds": seconds,
    }


@dataclass
class Outcome:
    """What one plan said and cost, over all tasks."""

    entry: Entry
    texts: dict[str, list[str]] = field(default_factory=dict)
    right: dict[str, list[bool]] = field(default_factory=dict)
    costs: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    seconds: list[float] = field(default_factory=list)


class Run:
    """The demo's questions, plans and answers.

    Args:
        model, processor: as `mllm.load_model` gives them.
        tasks: yardstick tasks.
        per_task: questions of each.
    """

    def __init__(self, model: Any, processor: Any, tasks: tuple[str, ...], per_task: int) -> None:
        from mllm.errors import PlanError
        from mllm.eval.asking import Questions
        from mllm.eval.plans import plan_for_budget
        from mllm.eval.sweep import Entry, visual_tokens
        from mllm.plan import Plan
        from mllm.yardstick import samples

        self.model, self.processor = model, processor
        self.questions: dict[str, Questions] = {
            task: Questions(processor, samples(task, n=per_task), 12, model.dtype, model.device)
            for task in tasks
        }
        shape = {
            "tokens": visual_tokens(model),
            "num_layers": model.config.get_text_config().num_hidden_layers,
        }
        self.base = Outcome(Entry("unpatched", None, Plan([])))
        self.outcomes: list[Outcome | tuple[str, int, str]] = [self.base]
        for budget in BUDGETS:
            for name, template in METHODS.items():
                try:
                    plan = plan_for_budget(template, budget, **shape)
                except PlanError as error:
                    self.outcomes.append((name, budget, str(error)))
                else:
                    self.outcomes.append(Outcome(Entry(name, budget, plan)))

    @property
    def done(self) -> list[Outcome]:
        """Outcomes of the plans that could be built."""
        return [outcome for outcome in self.outcomes if isinstance(outcome, Outcome)]

    def answer_everything(self) -> None:
        """Ask every question under every plan, in batches of a task."""
        from mllm.eval.asking import SharedTower, answer_all
        from mllm.eval.plans import patched_with
        from mllm.eval.scoring import is_correct

        shared = SharedTower(self.model)
        with _progress() as bar:
            job = bar.add_task("asking", total=len(self.done) * len(self.questions))
            for task, questions in self.questions.items():
                for outcome in self.done:
                    bar.update(job, description=f"{task}: {outcome.entry.name}")
                    plan = outcome.entry.plan
                    with patched_with(self.model, plan) as patched, shared.used_by(plan):
                        answers = answer_all(self.model, self.processor, questions, patched)
                    outcome.texts[task] = [given.text for given in answers]
                    outcome.right[task] = [
                        is_correct(given.text, sample["answer"], sample["metric"])
                        for given, sample in zip(answers, questions.samples, strict=True)
                    ]
                    for name in ("visual_avg", "prefill_flops", "kv_bytes"):
                        outcome.costs[name] += [given.efficiency[name] for given in answers]
                    bar.advance(job)
                shared.forget()

    def time_everything(self) -> None:
        """Time to the first token of one picture: rounds over all plans, so drift hits all."""
        from mllm.eval.answer import answer
        from mllm.eval.plans import patched_with

        inputs, _ = self._one(*next(iter(self.questions.items())), 0)
        with _progress() as bar:
            job = bar.add_task("timing", total=TIMED_ROUNDS * len(self.done))
            for _ in range(TIMED_ROUNDS):
                for outcome in self.done:
                    with patched_with(self.model, outcome.entry.plan) as patched:
                        answer(self.model, self.processor, inputs, patched, max_new_tokens=1)
                        (result,) = answer(
                            self.model, self.processor, inputs, patched, max_new_tokens=1
                        )
                    outcome.seconds.append(result.efficiency["ttft_s"])
                    bar.advance(job)

    def rows(self) -> list[Row]:
        """The table, budget by budget."""
        from mllm.eval.report import Row

        rows = []
        for outcome in self.outcomes:
            if not isinstance(outcome, Outcome):
                name, budget, reason = outcome
                rows.append(Row(name, "", budget, sanity=name in SANITY, note=reason))
                continue
            entry, means = outcome.entry, {k: sum(v) / len(v) for k, v in outcome.costs.items()}
            rows.append(
                Row(
                    entry.method,
                    _spec(entry.plan),
                    entry.budget,
                    visual_avg=means["visual_avg"],
                    flops=means["prefill_flops"],
                    kv_bytes=means["kv_bytes"],
                    prefill_s=median(outcome.seconds) if outcome.seconds else None,
                    tasks={task: (sum(r), len(r)) for task, r in outcome.right.items()},
                    sanity=entry.method in SANITY,
                    flipped=None if outcome is self.base else self._changed(outcome),
                )
            )
        return rows

    def _changed(self, outcome: Outcome) -> int:
        return sum(
            given != before
            for task, texts in outcome.texts.items()
            for given, before in zip(texts, self.base.texts[task], strict=True)
        )

    def flips(self, limit: int = 8) -> tuple[list[Any], list[Any]]:
        """Questions whose correctness plans changed: (lost, won), most telling first.

        Most telling is what most of the methods, not the sanity rows, changed.
        """
        from mllm.eval.report import Flip

        found: dict[bool, list[tuple[int, Flip]]] = {True: [], False: []}
        for task, questions in self.questions.items():
            for i, sample in enumerate(questions.samples):
                before = self.base.right[task][i]
                changed = [o for o in self.done if o.right[task][i] != before]
                if not changed:
                    continue
                said: dict[str, list[Entry]] = defaultdict(list)
                for outcome in changed:
                    said[outcome.texts[task][i]].append(outcome.entry)
                weight = sum(o.entry.method not in SANITY for o in changed)
                flip = Flip(
                    [("", self._one(task, questions, i)[1])],
                    task,
                    sample["question"],
                    sample["answer"],
                    self.base.texts[task][i],
                    [(text, _at_budgets(entries)) for text, entries in said.items()],
                )
                found[before].append((weight, flip))
        best = {
            before: [flip for _, flip in sorted(flips, key=lambda pair: -pair[0])[:limit]]
            for before, flips in found.items()
        }
        return best[True], best[False]

    def overlays(self) -> list[Any]:
        """One question of each of three tasks, drawn under a few plans."""
        import mllm
        from mllm.eval import seen
        from mllm.eval.answer import answer
        from mllm.eval.report import Overlay

        shown = [o.entry for o in self.done if (o.entry.method, o.entry.budget) in SHOWN]
        result = []
        for task, questions in list(self.questions.items())[:3]:
            inputs, picture = self._one(task, questions, 0)
            pictures = []
            for entry in shown:
                with mllm.patch(self.model, entry.plan) as patched:
                    answer(self.model, self.processor, inputs, patched, max_new_tokens=1)
                    first, *later = seen.panels([picture], patched.ledger, width=336)
                pictures += [(first.title, first.image)] * (not pictures)
                pictures += [(f"{entry.name}: {p.title}", p.image) for p in later]
            sample = questions.samples[0]
            result.append(Overlay(sample["question"], sample["answer"], pictures))
        return result

    def _one(self, task: str, questions: Questions, index: int) -> tuple[Any, Any]:
        """One sample as a batch, and its picture as the model sees it."""
        from mllm.eval.overlay import as_seen
        from mllm.loading import build_inputs
        from mllm.yardstick import prompt

        sample = questions.samples[index]
        inputs = build_inputs(self.processor, [prompt(sample)])
        shape = self.processor.image_processor
        seen = as_seen(inputs["pixel_values"][0], shape.image_mean, shape.image_std)
        return inputs.to(self.model.device, self.model.dtype), seen


def _patch_ask_remove(console: Console, run: Run) -> None:
    """The product in five lines, run for real on one picture."""
    import torch

    import mllm
    from mllm.eval.answer import answer

    task, questions = next(iter(run.questions.items()))
    sample, spec = questions.samples[0], "visionzip:keep=64"
    inputs, _ = run._one(task, questions, 0)
    model = run.model
    with torch.inference_mode():
        before = model(**inputs).logits
    (plain,) = answer(model, run.processor, inputs, None, max_new_tokens=12)
    with mllm.patch(model, spec) as patched:
        (pruned,) = answer(model, run.processor, inputs, patched, max_new_tokens=12)
        ledger = patched.ledger
    with torch.inference_mode():
        same = torch.equal(before, model(**inputs).logits)
    data, grid = ledger.as_dict(), ledger.grid[0][0]
    share = data["prefill_flops"][0] / data["baseline_prefill_flops"][0]
    console.rule("[bold]patch, ask, remove", align="left")
    console.print(f'with mllm.patch(model, "{spec}"):', style="cyan", markup=False)
    console.print("    model.generate(**inputs)", style="cyan", markup=False)
    lines = [
        f"question   {sample['question']}   (truth: {sample['answer']})",
        f"unpatched  {data['visual_tokens'][0]:>3} visual tokens: {plain.text}",
        f"patched    {data['kept_llm'][0]:>3} visual tokens: {pruned.text}",
        f"           {share:.0%} of the prefill FLOPs, vision tower included",
        f"removed    logits equal to those before, bit for bit: {'yes' if same else 'NO'}",
        "kept tokens:",
    ]
    console.print("\n".join(lines), markup=False)
    console.print(token_map(grid, ledger.kept("llm")[0].tolist()), markup=False)


def _at_budgets(entries: list[Entry]) -> list[str]:
    """`random at 64, 16` and the like, one text for each method."""
    budgets: dict[str, list[str]] = defaultdict(list)
    for entry in entries:
        budgets[entry.method].append(str(entry.budget))
    return [f"{method} at {', '.join(at)}" for method, at in budgets.items()]


def _spec(plan: Any) -> str:
    """The plan's spec text with every `keep` written out, defaults too."""
    from mllm.plan import Plan

    parts = [(Plan([stage]).spec, stage) for stage in plan.stages]
    return "+".join(
        part if ":keep=" in part else f"{part}:keep={stage.keep}" for part, stage in parts
    )


def token_map(grid: tuple[int, int], kept: list[int]) -> str:
    """The kept tokens as text: a character is two rows of the grid."""
    rows, columns = grid
    there = set(kept)
    glyphs = {(False, False): "·", (True, False): "▀", (False, True): "▄", (True, True): "█"}
    return "\n".join(
        "    "
        + "".join(
            glyphs[r * columns + c in there, (r + 1) * columns + c in there and r + 1 < rows]
            for c in range(columns)
        )
        for r in range(0, rows, 2)
    )


def _fine_tune(console: Console, output: Path) -> Training | None:
    """A few LoRA steps with a plan active, by the shipped recipe in a process of its own."""
    from mllm.eval.report import Training

    if not all(importlib.util.find_spec(name) for name in ("peft", "accelerate", "pydantic")):
        console.print("no fine-tuning: it needs mllm-efficiency\\[train]")
        return None
    folder = output / "train"
    overrides = [
        f"train.max_steps={TRAIN_STEPS}",
        "train.logging_steps=1",
        "train.per_device_train_batch_size=4",
        f"output.dir={folder}",
        "output.overwrite=true",
        "eval=null",
    ]
    started = time.perf_counter()
    with err_console().status("fine-tuning with visionzip:keep=32 active"):
        done = subprocess.run(
            [sys.executable, "-m", "mllm", "train", "lora-visionzip", *overrides],
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise MllmError(
            f"mllm train lora-visionzip failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
        )
    metrics = (folder / "metrics.jsonl").read_text().splitlines()
    losses = [(row["step"], row["loss"]) for row in map(jsonlib.loads, metrics) if "loss" in row]
    seconds = time.perf_counter() - started
    console.print(
        f"mllm train lora-visionzip: {losses[-1][0]} LoRA steps with visionzip:keep=32 active, "
        f"loss {losses[0][1]:.2f} to {losses[-1][1]:.2f}, {seconds:.0f} s"
    )
    return Training(
        "Fine-tuning with a plan active",
        f"mllm train lora-visionzip, stopped after {losses[-1][0]} steps: LoRA on the held-back "
        "drawing style while visionzip:keep=32 runs in the model. Ten steps show that it works, "
        "not what it gains; the full run against its control is in benchmarks/results.",
        losses,
    )


def _lead(per_task: int, quick: bool) -> list[str]:
    return [
        "A small LLaVA that ships with mllm answers questions about drawn pictures, with all of "
        "its 576 visual tokens and with fewer. Cost is counted where it falls: visual tokens that "
        "enter a decoder layer, averaged over the layers.",
        f"With {per_task} questions a task nothing here ranks methods, and this page draws no "
        "verdicts. benchmarks/results holds the full test split with paired intervals."
        + (
            " This was a quick run."
            if quick
            else " Times are medians of "
            f"{TIMED_ROUNDS} single-picture prefills on the machine that ran the demo."
        ),
    ]


def _table(rows: list[Row], tasks: tuple[str, ...]) -> Table:
    from mllm.eval.stats import wilson

    # Fits into 80 columns.
    table = Table(title="Accuracy and cost", title_justify="left", pad_edge=False)
    table.box = box.SIMPLE_HEAD
    for name in ("budget", "plan", "tokens", "FLOPs", "prefill", "right (95 %)", "changed"):
        table.add_column(name, justify="left" if name == "plan" else "right", no_wrap=True)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        cells = ["" if row.budget is None else str(row.budget), row.name + "*" * row.sanity]
        if row.n:
            low, high = wilson(row.correct, row.n)
            cells += [
                f"{row.visual_avg:.1f}",
                f"{row.flops / rows[0].flops:.0%}",
                f"{1000 * row.prefill_s:.0f} ms" if row.prefill_s else "",
                f"{row.score:.0%} ({100 * low:.0f}–{100 * high:.0f})",
                "" if row.flipped is None else str(row.flipped),
            ]
        else:
            cells += ["", "", "", "out of reach"]
        end = following is None or following.budget != row.budget
        table.add_row(*cells, end_section=end, style="dim" if row.sanity else None)
    table.caption = (
        f"{rows[0].n} questions: {', '.join(tasks)}. Tokens: visual, averaged over the decoder "
        "layers. Prefill: one picture, vision tower included. Changed: answers that differ from "
        "the unpatched model's. * sanity rows: what any method has to beat."
    )
    table.caption_justify = "left"
    return table


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}", justify="left"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err_console(),
        transient=True,
    )
