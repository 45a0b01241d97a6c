"""Questions about drawn scenes, their answers, and the boxes that show the answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from mllm.loading import PLACEHOLDER
from mllm.yardstick.scenes import (
    CHARACTERS,
    COLOUR_NAMES,
    FULL,
    LETTERS,
    MOST_LINES,
    OBJECTS,
    PATCH,
    Box,
    Scene,
    Thing,
)

QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# Frame pixels: an object this near to a dividing line belongs to neither side, two objects this
# near to each other are not compared, and a corner's object must lead by as much as CLEAR.
MARGIN, CLEAR = 14, 24
MOST_PICTURES = 4

YES_NO = ("yes", "no")
# task -> kinds of scene it is asked about, in turn
TASK_SCENES = {
    "exist": ("objects", "needle"),
    "exist_attr": ("objects",),
    "color": ("objects",),
    "count": ("objects",),
    "where": ("objects",),
    "what_at": ("objects",),
    "relation": ("objects",),
    "needle": ("needle",),
    "needle_color": ("needle",),
    "needle_attr": ("needle",),
    "ocr_word": ("signs",),
    "ocr_number": ("signs",),
    "ocr_line": ("page",),
    "chart_value": ("chart",),
    "chart_max": ("chart",),
    "chart_min": ("chart",),
    "chart_legend": ("chart",),
    "find_image": ("objects",),
    "image_exist": ("objects",),
}
# Tasks about two to four pictures at once.
MULTI_IMAGE = ("find_image", "image_exist")
# task -> its answers, where they are few
CHOICES = {
    "exist": YES_NO,
    "exist_attr": YES_NO,
    "needle_attr": YES_NO,
    "relation": YES_NO,
    "image_exist": YES_NO,
    "color": tuple(COLOUR_NAMES),
    "needle_color": tuple(COLOUR_NAMES),
    "chart_max": tuple(COLOUR_NAMES),
    "chart_min": tuple(COLOUR_NAMES),
    "where": QUADRANTS,
}


@dataclass(frozen=True)
class Question:
    """One question; `boxes` show the answer (empty when the answer is that nothing is there).

    `picture` counts from 1: which of several pictures the boxes are in.
    """

    task: str
    text: str
    answer: str
    boxes: tuple[Box, ...] = ()
    picture: int = 1


class Places:
    """Where things are in the full frame; `offset` is the patch (row, col) of a mini scene."""

    def __init__(self, scene: Scene, offset: tuple[int, int]) -> None:
        side = max(scene.image.size)
        self.shift = [(side - length) / 2 for length in scene.image.size]
        self.offset, self.scale = (offset[1] * PATCH, offset[0] * PATCH), scene.scale

    def centre(self, thing: Thing) -> tuple[float, float]:
        """Middle of a thing in frame pixels."""
        x, y = (
            (at + shift) / self.scale + offset
            for at, shift, offset in zip(thing.centre, self.shift, self.offset, strict=True)
        )
        return x, y

    def quadrant(self, thing: Thing) -> str | None:
        """Quadrant of the frame, or None near its dividing lines."""
        dx, dy = (at - FULL / 2 for at in self.centre(thing))
        if min(abs(dx), abs(dy)) <= MARGIN:
            return None
        return f"{'top' if dy < 0 else 'bottom'} {'left' if dx < 0 else 'right'}"

    def nearest(self, things: Sequence[Thing], corner: str) -> Thing | None:
        """The thing nearest to a corner of the frame, if it is so clearly."""
        x, y = FULL * ("right" in corner), FULL * ("bottom" in corner)

        def distance(thing: Thing) -> float:
            at = self.centre(thing)
            return ((at[0] - x) ** 2 + (at[1] - y) ** 2) ** 0.5

        ranked = sorted(things, key=distance)
        if len(ranked) < 2 or distance(ranked[1]) - distance(ranked[0]) < CLEAR:
            return None
        return ranked[0]


def _chart_questions(scene: Scene) -> list[Question]:
    bars = scene.bars
    tallest, shortest = (pick(bars, key=lambda bar: bar.value) for pick in (max, min))
    asked = []
    for bar in bars:
        value, letter = str(bar.value), scene.legend[bar.colour]
        text = f"what is the value of the {bar.colour} bar?"
        asked.append(Question("chart_value", text, value, (bar.box,)))
        text = f"what is the value of {letter}?"
        asked.append(Question("chart_legend", text, value, (bar.box,)))
        # A step of the question above; training only.
        asked.append(Question("legend", f"what color is {letter}?", bar.colour))
    text = "which bar is the tallest?"
    asked.append(Question("chart_max", text, tallest.colour, (tallest.box,)))
    text = "which bar is the shortest?"
    asked.append(Question("chart_min", text, shortest.colour, (shortest.box,)))
    return asked


def _text_questions(scene: Scene) -> list[Question]:
    asked = []
    for text in scene.texts:
        if scene.kind == "page":
            question, task = f"what is on line {text.line}?", "ocr_line"
        elif text.text.isdigit():
            question, task = "what is the number?", "ocr_number"
        else:
            question, task = "what is the word?", "ocr_word"
        asked.append(Question(task, question, text.text, (text.box,)))
    return asked


def _exist_questions(rng: Random, scene: Scene) -> list[Question]:
    asked = []
    present = sorted({thing.name for thing in scene.things})
    for _ in range(3):
        if present:
            name = rng.choice(present)
            boxes = tuple(t.box for t in scene.things if t.name == name)
            asked.append(Question("exist", f"is there a {name}?", "yes", boxes))
        absent = rng.choice([name for name in OBJECTS if name not in present])
        asked.append(Question("exist", f"is there a {absent}?", "no"))
    coloured = [thing for thing in scene.things if thing.colour]
    if coloured and scene.kind == "objects":
        for thing in rng.sample(coloured, min(2, len(coloured))):
            boxes = tuple(t.box for t in coloured if t.label == thing.label)
            asked.append(Question("exist_attr", f"is there a {thing.label}?", "yes", boxes))
            # Adversarial: the shape is there, in another colour.
            have = {t.colour for t in coloured if t.name == thing.name}
            free = [colour for colour in COLOUR_NAMES if colour not in have]
            if free:
                text = f"is there a {rng.choice(free)} {thing.name}?"
                asked.append(Question("exist_attr", text, "no"))
    return asked


def _attribute_of(small: Thing, scene: Scene) -> list[Question]:
    """Whether a needle has its colour, and whether it has another; draws nothing from `rng`."""
    if any(thing.name == small.name for thing in scene.things if thing is not small):
        return []
    others = [colour for colour in COLOUR_NAMES if colour != small.colour]
    other = others[sum(small.box) % len(others)]
    return [
        Question("needle_attr", f"is there a {small.label}?", "yes", (small.box,)),
        Question("needle_attr", f"is there a {other} {small.name}?", "no"),
    ]


def _place_questions(
    rng: Random, scene: Scene, unique: list[Thing], places: Places
) -> list[Question]:
    asked = []
    for thing in unique:
        if quadrant := places.quadrant(thing):
            asked.append(Question("where", f"where is the {thing.name}?", quadrant, (thing.box,)))
    for corner in QUADRANTS:
        if thing := places.nearest(scene.things, corner):
            text = f"what is nearest to the {corner} corner?"
            asked.append(Question("what_at", text, thing.name, (thing.box,)))
    for _ in range(3):
        if len(unique) < 2:
            break
        first, second = rng.sample(unique, 2)
        axis = rng.randrange(2)
        gap = places.centre(first)[axis] - places.centre(second)[axis]
        if abs(gap) > 2 * MARGIN:
            true = ("left of", "right of") if axis == 0 else ("above", "below")
            word = true[gap > 0]
            yes = rng.random() < 0.5
            shown = word if yes else OPPOSITE[word]
            text = f"is the {first.name} {shown} the {second.name}?"
            boxes = (first.box, second.box)
            asked.append(Question("relation", text, "yes" if yes else "no", boxes))
    return asked


def ask(rng: Random, scene: Scene, offset: tuple[int, int] = (0, 0)) -> list[Question]:
    """Every kind of question that one scene allows.

    Args:
        rng: source of the choices made here.
        scene: what is asked about.
        offset: patch (row, col) of a mini scene in the 24 x 24 frame; places are asked in it.
    """
    if scene.kind == "chart":
        return _chart_questions(scene)
    asked = _text_questions(scene)
    if scene.kind == "needle":
        small = next(thing for thing in scene.things if not thing.distractor)
        asked.append(Question("needle", "what is the small object?", small.name, (small.box,)))
        if small.colour:
            text = "what color is the small object?"
            asked.append(Question("needle_color", text, small.colour, (small.box,)))
            asked += _attribute_of(small, scene)
    asked += _exist_questions(rng, scene)
    counts = Counter(thing.name for thing in scene.things)
    unique = [thing for thing in scene.things if counts[thing.name] == 1]
    for thing in unique:
        if thing.colour and scene.kind != "needle":
            text = f"what color is the {thing.name}?"
            asked.append(Question("color", text, thing.colour, (thing.box,)))
    if scene.kind == "objects":
        several = [name for name in counts if counts[name] > 1]
        for name in several + rng.sample([t.name for t in unique], min(1, len(unique))):
            boxes = tuple(t.box for t in scene.things if t.name == name)
            text = f"how many {name} objects are there?"
            asked.append(Question("count", text, str(counts[name]), boxes))
        asked += _place_questions(rng, scene, unique, Places(scene, offset))
    return asked


def ask_about_several(rng: Random, scenes: Sequence[Scene]) -> list[Question]:
    """Questions about one of several pictures, in the order of the prompt."""
    names = [{thing.name for thing in scene.things} for scene in scenes]
    asked = []
    for number, (scene, present) in enumerate(zip(scenes, names, strict=True), 1):
        others = set().union(*(n for i, n in enumerate(names, 1) if i != number))
        for name in sorted(present - others):
            boxes = tuple(t.box for t in scene.things if t.name == name)
            text = f"which picture has a {name}?"
            asked.append(Question("find_image", text, str(number), boxes, number))
        for name in sorted(present)[: len(others)]:
            boxes = tuple(t.box for t in scene.things if t.name == name)
            text = f"is there a {name} in picture {number}?"
            asked.append(Question("image_exist", text, "yes", boxes, number))
        # Adversarial: it is there, in another picture.
        for name in sorted(others - present):
            text = f"is there a {name} in picture {number}?"
            asked.append(Question("image_exist", text, "no", picture=number))
    rng.shuffle(asked)
    return asked


def picture_labels(count: int) -> list[str]:
    """What stands before each of several pictures: " 1:", " 2:" ..."""
    return [f" {number}:" for number in range(1, count + 1)]


def prompt_text(question: str, pictures: int) -> str:
    """A question with one placeholder for each of several pictures; for one picture, none."""
    if pictures == 1:
        return question
    labelled = "".join(f"{label}{PLACEHOLDER}" for label in picture_labels(pictures))
    return f"{labelled.strip()} {question}"


def caption(scene: Scene) -> Question:
    """A dense caption, left to right: training material only, never a task."""
    if scene.kind == "chart":
        text = "list the bars from left to right."
        return Question("list", text, ", ".join(f"{bar.colour} {bar.value}" for bar in scene.bars))
    if scene.kind == "page":
        return Question("list", "read all lines.", ", ".join(text.text for text in scene.texts))
    things = sorted(scene.things, key=lambda thing: thing.centre[0])[:8]
    return Question("list", "list the objects.", ", ".join(thing.label for thing in things))


def vocabulary() -> list[str]:
    """Sentences that hold every word and template: what the tokenizer is trained on."""
    lines = []
    for name in OBJECTS:
        lines += [f"is there a {name}?", f"how many {name} objects are there?", f" {name}"]
        lines += [f"where is the {name}?", f"what color is the {name}?"]
        lines += [f"is the {name} {word} the {name}?" for word in OPPOSITE]
        lines += [f"which picture has a {name}?", f"is there a {name} in picture 1?"]
    for colour in COLOUR_NAMES:
        lines += [f"what is the value of the {colour} bar?", f"is there a {colour} circle?"]
        lines += [f" {colour}"]
    for letter in LETTERS:
        lines += [f"what is the value of {letter}?", f"what color is {letter}?"]
    lines += ["which bar is the tallest?", "which bar is the shortest?", "list the objects."]
    lines += ["what is the small object?", "what color is the small object?", "read all lines."]
    lines += ["what is the word?", "what is the number?", "list the bars from left to right."]
    lines += [f"what is on line {number}?" for number in range(1, MOST_LINES + 1)]
    lines += ["red 3, blue 4, cat, dog, red circle, dog", *picture_labels(MOST_PICTURES)]
    lines += [f"what is nearest to the {quadrant} corner?" for quadrant in QUADRANTS]
    lines += [f" {answer}" for answer in (*YES_NO, *QUADRANTS)]
    return [f" {line.strip()}" for line in lines] * 4 + list(CHARACTERS)
