"""Yardstick samples: one picture, one question, one answer, and where the answer is."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from itertools import count
from random import Random
from typing import Any

from PIL import Image

from mllm.errors import DataError
from mllm.yardstick.questions import CHOICES, TASK_SCENES, YES_NO, Question, ask
from mllm.yardstick.scenes import STYLES, Scene, draw

TASKS = tuple(TASK_SCENES)
SPLITS = ("train", "dev", "test")


def _seed(style: str, split: str, task: str, index: int) -> int:
    """Seed of one sample: a hash, so that splits, tasks, styles and training share no scene."""
    digest = hashlib.sha256(f"{style}/{split}/{task}/{index}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def _find(
    task: str, kind: str, rng: Random, style: str, wanted: str | None
) -> tuple[Scene, Question]:
    """Draw scenes until one allows a question of `task` (with the answer `wanted`)."""
    for _ in count():
        scene = draw(rng, kind, style=style)
        fitting = [
            question
            for question in ask(rng, scene)
            if question.task == task
            and wanted in (None, question.answer)
            # What is there several times survives the loss of most tokens: ask about one.
            and not (task == "exist" and len(question.boxes) > 1)
        ]
        if fitting:
            return scene, rng.choice(fitting)
    raise AssertionError("unreachable")


def sample(task: str, split: str, index: int, style: str = "plain") -> dict[str, Any]:
    """Sample `index` of a split; see `samples`."""
    seed = _seed(style, split, task, index)
    # Yes and no alternate; other answers are as frequent as the scenes make them.
    wanted = YES_NO[index % 2] if CHOICES.get(task) == YES_NO else None
    kinds = TASK_SCENES[task]
    kind = kinds[index // 2 % len(kinds)]  # // 2: each kind gets a "yes" and a "no"
    scene, question = _find(task, kind, Random(seed), style, wanted)
    choices = CHOICES.get(task)
    return {
        "id": f"{task}-{style}-{split}-{index}",
        "task": task,
        "split": split,
        "style": style,
        "seed": seed,
        "image": scene.image,
        "question": question.text,
        "answer": question.answer,
        "choices": list(choices) if choices else None,
        "metric": "relaxed" if task == "chart_value" else "exact",
        "objects": [
            {"name": thing.name, "colour": thing.colour, "box": list(thing.box)}
            for thing in scene.things + scene.bars
        ],
        "answer_boxes": [list(box) for box in question.boxes],
    }


def samples(
    task: str, split: str = "test", n: int = 500, style: str = "plain"
) -> list[dict[str, Any]]:
    """The first `n` samples of a task; the same on every machine.

    Args:
        task: one of `TASKS`.
        split: "train", "dev" or "test"; no two splits share a scene.
        n: number of samples (any; the test split of a task has at least 500).
        style: "plain", or "dusk", which the embedded model never saw in training.

    Returns:
        Dictionaries `{id, task, split, style, seed, image, question, answer, choices, metric,
        objects, answer_boxes}`; `image` is an RGB picture of 336 x 336 pixels, boxes are
        `[x0, y0, x1, y1]` in pixels. `answer_boxes` is empty where nothing shows the answer
        ("is there a cat?", "no").

    Raises:
        DataError: unknown task, split or style, or n < 1.
    """
    for argument, given, known in (
        ("task", task, TASKS),
        ("split", split, SPLITS),
        ("style", style, tuple(STYLES)),
    ):
        if given not in known:
            raise DataError(
                f"{argument} {given!r} does not exist; choose from {', '.join(known)}",
                argument=argument,
                given=given,
                expected=", ".join(known),
            )
    if n < 1:
        raise DataError(f"n must be at least 1, not {n}", argument="n", given=n, expected=">= 1")
    return [sample(task, split, index, style) for index in range(n)]


def prompt(sample: dict[str, Any]) -> tuple[list[Image.Image], str]:
    """Pictures and text of a sample, as `mllm.build_inputs` takes them.

    A multi-image sample has a list of pictures, and its question one placeholder for each.
    """
    pictures = sample["image"]
    return pictures if isinstance(pictures, list) else [pictures], sample["question"]


def admitted() -> tuple[str, ...]:
    """Tasks that the embedded model learnt (its yardstick.json); empty when there is no model."""
    path = files("mllm") / "assets" / "tiny_llava" / "yardstick.json"
    if not path.is_file():
        return ()
    rows = json.loads(path.read_text())["tasks"]
    return tuple(task for task in TASKS if task in rows and rows[task]["admitted"])
