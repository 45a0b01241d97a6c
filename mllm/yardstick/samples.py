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
from mllm.yardstick.questions import (
    CHOICES,
    MOST_PICTURES,
    MULTI_IMAGE,
    TASK_SCENES,
    YES_NO,
    Question,
    ask,
    ask_about_several,
    prompt_text,
)
from mllm.yardstick.scenes import Scene, draw
from mllm.yardstick.styles import STYLES

TASKS = tuple(TASK_SCENES)
VERSION = 2  # of what is drawn and asked: results of another version are other results
SPLITS = ("train", "dev", "test")
# Tasks whose object occurs once.
SINGLE = ("exist", "exist_attr", "find_image", "image_exist")


def _seed(style: str, split: str, task: str, index: int) -> int:
    """Seed of one sample: a hash, so that splits, tasks, styles and training share no scene."""
    digest = hashlib.sha256(f"{style}/{split}/{task}/{index}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def _find(
    task: str, kind: str, rng: Random, style: str, pictures: int, wanted: str | None
) -> tuple[list[Scene], Question]:
    """Draw scenes until they allow a question of `task` (with the answer `wanted`)."""
    for _ in count():
        scenes = [draw(rng, kind, style=style) for _ in range(pictures)]
        asked = ask_about_several(rng, scenes) if pictures > 1 else ask(rng, scenes[0])
        fitting = [
            question
            for question in asked
            if question.task == task
            and wanted in (None, question.answer)
            and _is_hard(question, scenes[question.picture - 1])
        ]
        if fitting:
            return scenes, rng.choice(fitting)
    raise AssertionError("unreachable")


def _is_hard(question: Question, scene: Scene) -> bool:
    """Not about what is large and bright, nor about what is there several times.

    The one is what every method keeps, the other survives the loss of most tokens.
    """
    large = {thing.box for thing in scene.things if thing.distractor}
    if large & set(question.boxes):
        return False
    return question.task not in SINGLE or len(question.boxes) <= 1


def sample(task: str, split: str, index: int, style: str = "plain") -> dict[str, Any]:
    """Sample `index` of a split; see `samples`."""
    seed = _seed(style, split, task, index)
    # Yes and no alternate; other answers are as frequent as the scenes make them.
    wanted = YES_NO[index % 2] if CHOICES.get(task) == YES_NO else None
    kinds = TASK_SCENES[task]
    kind = kinds[index // 2 % len(kinds)]  # // 2: each kind gets a "yes" and a "no"
    several = task in MULTI_IMAGE
    pictures = 2 + index // 2 % (MOST_PICTURES - 1) if several else 1
    scenes, question = _find(task, kind, Random(seed), style, pictures, wanted)
    choices = CHOICES.get(task)
    return {
        "id": f"{task}-{style}-{split}-{index}",
        "task": task,
        "split": split,
        "style": style,
        "seed": seed,
        "image": [scene.image for scene in scenes] if several else scenes[0].image,
        "question": prompt_text(question.text, pictures),
        "answer": question.answer,
        "choices": list(choices) if choices else None,
        "metric": "relaxed" if task in ("chart_value", "chart_legend") else "exact",
        "objects": [
            {"name": thing.name, "colour": thing.colour, "box": list(thing.box)}
            | ({"picture": number} if several else {})
            for number, scene in enumerate(scenes, 1)
            for thing in scene.things + scene.bars
        ],
        "answer_boxes": [list(box) for box in question.boxes],
        "answer_picture": question.picture,
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
        objects, answer_boxes, answer_picture}`. `image` is an RGB picture (252 to 672 pixels a
        side), or a list of two to four where the task is about several; the question then has
        a placeholder for each. Boxes are `[x0, y0, x1, y1]` in pixels of their picture;
        `answer_boxes` is empty where nothing shows the answer ("is there a cat?", "no").
        `answer_picture` counts from 1.

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
