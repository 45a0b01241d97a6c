"""Questions about a drawn scene, their answers, and the boxes that show the answer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from random import Random

from mllm.yardstick.scenes import (
    CHARACTERS,
    COLOUR_NAMES,
    FULL,
    OBJECTS,
    PATCH,
    Box,
    Scene,
    Thing,
)

QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# An object this near (pixels) to a dividing line belongs to neither side: not asked about.
MARGIN = 14

YES_NO = ("yes", "no")
# task -> kinds of scene it is asked about, in turn
TASK_SCENES = {
    "exist": ("objects", "needle"),
    "exist_attr": ("objects",),
    "color": ("objects",),
    "needle": ("needle",),
    "needle_color": ("needle",),
    "count": ("objects",),
    "where": ("objects",),
    "what_at": ("objects",),
    "relation": ("objects",),
    "ocr": ("code",),
    "chart_value": ("chart",),
    "chart_max": ("chart",),
    "chart_min": ("chart",),
}
# task -> its answers, where they are few
CHOICES = {
    "exist": YES_NO,
    "exist_attr": YES_NO,
    "relation": YES_NO,
    "color": tuple(COLOUR_NAMES),
    "needle_color": tuple(COLOUR_NAMES),
    "chart_max": tuple(COLOUR_NAMES),
    "chart_min": tuple(COLOUR_NAMES),
    "where": QUADRANTS,
}


@dataclass(frozen=True)
class Question:
    """One question; `boxes` show the answer (empty when the answer is that nothing is there)."""

    task: str
    text: str
    answer: str
    boxes: tuple[Box, ...] = ()


def _quadrant(thing: Thing, offset: tuple[int, int]) -> str | None:
    """Quadrant of the full frame; `offset` = patch (row, col) of the scene in that frame."""
    x, y = thing.centre
    dx = x + offset[1] * PATCH - FULL / 2
    dy = y + offset[0] * PATCH - FULL / 2
    if min(abs(dx), abs(dy)) <= MARGIN:
        return None
    return f"{'top' if dy < 0 else 'bottom'} {'left' if dx < 0 else 'right'}"


def _chart_questions(scene: Scene) -> list[Question]:
    bars = scene.bars
    tallest, shortest = (pick(bars, key=lambda bar: bar.value) for pick in (max, min))
    asked = [
        Question(
            "chart_value",
            f"what is the value of the {bar.colour} bar?",
            str(bar.value),
            (bar.box,),
        )
        for bar in bars
    ]
    asked.append(Question("chart_max", "which bar is the tallest?", tallest.colour, (tallest.box,)))
    asked.append(
        Question("chart_min", "which bar is the shortest?", shortest.colour, (shortest.box,))
    )
    return asked


def _exist_questions(rng: Random, scene: Scene) -> list[Question]:
    asked = []
    present = sorted({thing.name for thing in scene.things})
    for _ in range(2):
        if present:
            name = rng.choice(present)
            boxes = tuple(t.box for t in scene.things if t.name == name)
            asked.append(Question("exist", f"is there a {name}?", "yes", boxes))
        absent = rng.choice([name for name in OBJECTS if name not in present])
        asked.append(Question("exist", f"is there a {absent}?", "no"))
    coloured = [thing for thing in scene.things if thing.colour]
    if coloured and scene.kind != "needle":
        thing = rng.choice(coloured)
        boxes = tuple(t.box for t in coloured if t.label == thing.label)
        asked.append(Question("exist_attr", f"is there a {thing.label}?", "yes", boxes))
        # Adversarial: the shape is there, in another colour.
        have = {t.colour for t in coloured if t.name == thing.name}
        free = [colour for colour in COLOUR_NAMES if colour not in have]
        if free:
            text = f"is there a {rng.choice(free)} {thing.name}?"
            asked.append(Question("exist_attr", text, "no"))
    return asked


def _place_questions(rng: Random, scene: Scene, unique: list[Thing], offset) -> list[Question]:
    asked = []
    quadrants = {id(thing): _quadrant(thing, offset) for thing in scene.things}
    for thing in unique:
        if quadrants[id(thing)]:
            text = f"where is the {thing.name}?"
            asked.append(Question("where", text, quadrants[id(thing)], (thing.box,)))
    if scene.kind == "objects" and all(quadrants.values()):
        for quadrant in QUADRANTS:
            inside = [t for t in scene.things if quadrants[id(t)] == quadrant]
            if len(inside) == 1:
                text = f"what is at the {quadrant}?"
                asked.append(Question("what_at", text, inside[0].name, (inside[0].box,)))
    for _ in range(2):
        if len(unique) < 2:
            break
        first, second = rng.sample(unique, 2)
        axis = rng.randrange(2)
        gap = first.centre[axis] - second.centre[axis]
        if abs(gap) > 30:
            true = ("left of", "right of") if axis == 0 else ("above", "below")
            word = true[gap > 0]
            yes = rng.random() < 0.5
            shown = word if yes else OPPOSITE[word]
            text = f"is the {first.name} {shown} the {second.name}?"
            boxes = (first.box, second.box)
            asked.append(Question("relation", text, "yes" if yes else "no", boxes))
    return asked


def ask(rng: Random, scene: Scene, offset: tuple[int, int] = (0, 0)) -> list[Question]:
    """Every kind of question the scene allows.

    Args:
        rng: source of the choices made here.
        scene: what is asked about.
        offset: patch (row, col) of a mini scene in the 24 x 24 frame; places are asked in it.
    """
    if scene.kind == "chart":
        return _chart_questions(scene)
    asked = []
    if scene.kind == "needle":
        only = scene.things[0]
        asked.append(Question("needle", "what is the small object?", only.name, (only.box,)))
        if only.colour:
            text = "what color is the small object?"
            asked.append(Question("needle_color", text, only.colour, (only.box,)))
    if scene.kind == "code":
        asked.append(Question("ocr", "what is written?", scene.code, (scene.code_box,)))
    asked += _exist_questions(rng, scene)
    counts = Counter(thing.name for thing in scene.things)
    unique = [thing for thing in scene.things if counts[thing.name] == 1]
    if scene.kind != "needle":
        for thing in unique:
            if thing.colour:
                text = f"what color is the {thing.name}?"
                asked.append(Question("color", text, thing.colour, (thing.box,)))
    if scene.kind == "objects":
        for name in rng.sample(sorted(counts), min(2, len(counts))):
            boxes = tuple(t.box for t in scene.things if t.name == name)
            text = f"how many {name} objects are there?"
            asked.append(Question("count", text, str(counts[name]), boxes))
    return asked + _place_questions(rng, scene, unique, offset)


def caption(scene: Scene) -> Question:
    """A dense caption, left to right: training material only, never a task."""
    if scene.kind == "chart":
        text = "list the bars from left to right."
        return Question("list", text, ", ".join(f"{bar.colour} {bar.value}" for bar in scene.bars))
    things = sorted(scene.things, key=lambda thing: thing.centre[0])
    return Question("list", "list the objects.", ", ".join(thing.label for thing in things))


def vocabulary() -> list[str]:
    """Sentences that hold every word and template: what the tokenizer is trained on."""
    lines = []
    for name in OBJECTS:
        lines += [f"is there a {name}?", f"how many {name} objects are there?", f" {name}"]
        lines += [f"where is the {name}?", f"what color is the {name}?"]
        lines += [f"is the {name} {word} the {name}?" for word in OPPOSITE]
    for colour in COLOUR_NAMES:
        lines += [f"what is the value of the {colour} bar?", f"is there a {colour} circle?"]
        lines += [f" {colour}"]
    lines += ["which bar is the tallest?", "which bar is the shortest?", "list the objects."]
    lines += ["what is the small object?", "what color is the small object?", "what is written?"]
    lines += ["list the bars from left to right.", "red 3, blue 4, cat, dog, red circle, dog"]
    lines += [f"what is at the {quadrant}?" for quadrant in QUADRANTS]
    lines += [f" {answer}" for answer in (*YES_NO, *QUADRANTS)]
    return [f" {line.strip()}" for line in lines] * 4 + list(CHARACTERS)
