"""easy-VQA: 5,000 pictures of one coloured shape, 48,248 questions, 13 answers.

Victor Zhou, 2019; MIT licence; everything is inside the wheel `easy-vqa`. Its test split is ours;
its training pictures are split into train (3,600) and dev (400).
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from typing import Any

from mllm.eval.outside.packages import damaged, package_file
from mllm.loading import load_image

PACKAGE = ("easy-vqa", "easy_vqa")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
CHOICES = {
    "easyvqa_shape": SHAPES,
    "easyvqa_color": COLORS,
    "easyvqa_exist": ("yes", "no"),
    "easyvqa_not": ("yes", "no"),
}
TASKS = tuple(CHOICES)
DEV_PICTURES = 400

Question = tuple[str, str, int]  # text, answer, number of the picture


def size(task: str, split: str) -> int:
    """How many questions there are."""
    return len(_questions(split)[task])


def sample(task: str, split: str, index: int) -> dict[str, Any]:
    """Question `index` of a split; see `mllm.eval.sources.samples` for the fields."""
    text, answer, number = _questions(split)[task][index]
    image = load_image(_file(f"{_folder(split)}/images/{number}.png"))
    return {
        "id": f"{task}-{split}-{index}",
        "task": task,
        "split": split,
        "style": "plain",
        "seed": 0,
        "image": image,
        "size": list(image.size),
        "question": text,
        "answer": answer,
        "choices": list(CHOICES[task]),
        "metric": "exact",
        "objects": [],
        "answer_picture": 1,
        "answer_boxes": [],
    }


def digest(split: str) -> str:
    """SHA-256 of the questions that `split` is taken from."""
    return hashlib.sha256(_file(f"{_folder(split)}/questions.json").read_bytes()).hexdigest()


def task_of(question: str) -> str:
    """The task that a question of the data set belongs to."""
    words = question.rstrip("?").split()
    if words[0] != "what":
        return "easyvqa_not" if {"not", "no"} & set(words) else "easyvqa_exist"
    return "easyvqa_color" if "color" in words else "easyvqa_shape"


def _folder(split: str) -> str:
    return "test" if split == "test" else "train"


def _file(path: str) -> Any:
    return package_file(*PACKAGE, f"data/{path}")


@lru_cache(maxsize=3)
def _questions(split: str) -> dict[str, list[Question]]:
    """Questions by task, in an order that depends on nothing but the questions.

    The package lists them picture by picture; mixed, the first few hundred show as many pictures.
    Four of five answers to "is there ...?" are "no": pairs of "yes" and "no" to the same words come
    first, so that the first 1,000 cannot be answered blindly, and all together are as published.
    """
    path = _file(f"{_folder(split)}/questions.json")
    try:
        entries = [(str(q), str(a), int(n)) for q, a, n in json.loads(path.read_text("utf-8"))]
    except (TypeError, ValueError) as error:
        raise damaged(PACKAGE[0], f"has an unreadable {path.name} ({error})") from error
    if split != "test":
        held_back = set(sorted({n for _, _, n in entries}, key=_mixed)[:DEV_PICTURES])
        entries = [entry for entry in entries if (entry[2] in held_back) == (split == "dev")]
    found: dict[str, list[Question]] = {task: [] for task in TASKS}
    for entry in sorted(entries, key=_mixed):
        found[task_of(entry[0])].append(entry)
    for task in ("easyvqa_exist", "easyvqa_not"):
        found[task] = _alternating(found[task])
    return found


def _alternating(entries: list[Question]) -> list[Question]:
    """Pairs of a "yes" and a "no" to the same words first, then what has no counterpart."""
    waiting: dict[str, list[Question]] = {}
    pairs: list[Question] = []
    for entry in entries:
        others = waiting.setdefault(entry[0], [])
        if others and others[0][1] != entry[1]:
            pairs += [others.pop(0), entry]
        else:
            others.append(entry)
    return pairs + [entry for others in waiting.values() for entry in others]


def _mixed(value: Any) -> bytes:
    return hashlib.sha256(repr(value).encode()).digest()
