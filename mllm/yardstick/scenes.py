"""Procedurally drawn scenes: crowds of objects, needles, signs, pages of text, charts, with boxes.

Every scene is a pure function of the `random.Random` it is given. A model sees a scene in a square
frame of 336 x 336 pixels (24 x 24 patches of 14): pictures of other sizes and shapes are padded and
resized to it. Sprite soups and mini scenes are crops of 168 x 168 pixels for training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from mllm.yardstick.styles import COLOURS, EMOJI, SHAPES, STYLES, PlainStyle, load_font

PATCH = 14
FULL, MINI = 336, 168
GRID = FULL // PATCH

COLOUR_NAMES = list(COLOURS)
OBJECTS = EMOJI + SHAPES
# I and O are left out: they look like 1 and 0.
CHARACTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ0123456789"
LETTERS, DIGITS = CHARACTERS[:24], CHARACTERS[24:]
WORDS = (
    "ANT ARM ART ASH AXE BAG BAT BED BEE CAB CAP DAY DEN EAR EGG ELF END EYE FAN FLY FUR GEM GUM "
    "HAM HEN HUT JAM JAR JET LAP LAW LEG MAP MAT MUD MUG NET NUT PAN PAW PEA PEN PET RAG RAM RAT "
    "RAY RUG SEA SKY SUN TAR TAX TEA TEN TUB VAN WAX WEB YAK BAND BARN BEAR BEEF BELT CAKE CAMP "
    "CARD CAVE CHEF CLAY CRAB DARK DATE DAWN DEER DESK DUST EAST FACE FARM FLAG FLAT GATE GLUE "
    "HAND HARP HERB JADE JUMP KELP LAKE LAMB LEAF MASK MEAL NEST PALM PARK PATH PEAR PLUM RAFT "
    "REEF SALT SAND SEED STEM TENT TRAY VASE WAVE WEST YARD ZEAL BEACH BREAD CHALK CHESS CREAM "
    "DANCE EAGLE EARTH FEAST FLAME FLUTE GRAPE GRASS HEART JEANS LUNCH MAPLE NURSE PEACH PEARL "
    "PLANT QUEEN RANCH SHARK SHEEP SPACE STEAM SUGAR TABLE TRACK TRUCK WATER WHALE WHEAT YEAST"
).split()
LONGEST, MOST_LINES, TOP_VALUE = 5, 3, 9

# What each patch shows: 0 means nothing, other numbers count from 1.
LABELS = ("object", "colour", "character", "value", "order", "line", "centre", "size")
BAR, AXIS, SWATCH = (len(OBJECTS) + i for i in (1, 2, 3))
LABEL_SIZES = (
    SWATCH + 1,
    len(COLOURS) + 1,
    len(CHARACTERS) + 1,
    TOP_VALUE + 1,
    LONGEST + 1,
    MOST_LINES + 1,
    2,
    4,
)
# Sides (pixels of the frame) from which an object is of middle size, and large.
MIDDLE, LARGE = 25, 50
# Width and height of full pictures; the longer side is what the frame shows as 336 pixels.
SIZES = ((336, 336), (336, 336), (336, 252), (252, 336), (448, 336), (336, 448), (672, 504))

Box = tuple[float, float, float, float]
# Share of each kind of scene in training.
KINDS_SHARE = {"objects": 0.42, "needle": 0.1, "signs": 0.14, "page": 0.14, "chart": 0.2}


@dataclass
class Thing:
    """One drawn object.

    `colour` is None for an emoji; `box` is (x0, y0, x1, y1) in pixels; a `distractor` is larger
    and brighter than what test questions are about.
    """

    name: str
    colour: str | None
    box: Box
    value: int | None = None
    distractor: bool = False

    @property
    def label(self) -> str:
        return f"{self.colour} {self.name}" if self.colour else self.name

    @property
    def centre(self) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclass
class Text:
    """One written line; `line` counts from 1 within its page."""

    text: str
    box: Box
    line: int = 1


@dataclass
class Scene:
    """A picture and what is in it.

    `frame` is the side in pixels of the square that a model sees, `labels` uint8 `[8, rows, cols]`
    what each patch of it shows (see `LABELS`).
    """

    kind: str
    image: Image.Image
    frame: int = FULL
    things: list[Thing] = field(default_factory=list)
    bars: list[Thing] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)
    legend: dict[str, str] = field(default_factory=dict)
    boxes: list[Box] = field(default_factory=list)

    def __post_init__(self) -> None:
        cells = self.frame // PATCH
        self.labels = np.zeros((len(LABELS), cells, cells), np.uint8)

    @property
    def scale(self) -> float:
        """Pixels of the picture per pixel of the frame."""
        return max(self.image.size) / self.frame

    def framed(self) -> Image.Image:
        """The picture padded to a square and resized to the frame, as a model sees it."""
        return to_frame(self.image, self.frame)

    def mark(self, box: Box, **values: int) -> None:
        """Label the patches whose centre lies in `box` (at least the one under its middle)."""
        side = max(self.image.size)
        last = self.labels.shape[1] - 1
        spans = []
        for axis in (1, 0):
            pad = (side - self.image.size[axis]) / 2
            low, high = ((box[i] + pad) / self.scale for i in (axis, axis + 2))
            first = max(0, math.ceil((low - PATCH / 2) / PATCH))
            final = min(last, math.floor((high - PATCH / 2) / PATCH))
            if final < first:
                first = final = min(last, int((low + high) / 2 // PATCH))
            spans.append(slice(first, final + 1))
        for name, value in values.items():
            self.labels[LABELS.index(name)][tuple(spans)] = value

    def free_place(self, rng: Random, width: int, height: int, pad: int = 3) -> tuple | None:
        """Top left corner of a free rectangle, or None after forty tries."""
        right, bottom = self.image.width - width - 2, self.image.height - height - 2
        if min(right, bottom) < 3:
            return None
        for _ in range(40):
            x, y = rng.randint(2, right), rng.randint(2, bottom)
            if all(
                x + width + pad <= b[0]
                or b[2] + pad <= x
                or y + height + pad <= b[1]
                or b[3] + pad <= y
                for b in self.boxes
            ):
                return x, y
        return None


# CLIP's mean colour: what LLaVA pads with.
PADDING = (122, 116, 104)


def to_frame(image: Image.Image, frame: int = FULL) -> Image.Image:
    """`image` padded to a square around its middle, then resized to `frame` pixels."""
    side = max(image.size)
    if image.width != image.height:
        square = Image.new("RGB", (side, side), PADDING)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    return image if side == frame else image.resize((frame, frame), Image.Resampling.BICUBIC)


def _open(kind: str, rng: Random, frame: int, style: str) -> tuple[Scene, PlainStyle]:
    """An empty scene with its ground and clutter."""
    look = STYLES[style]
    size = rng.choice(SIZES) if frame == FULL else (frame, frame)
    image = look.background(rng, *size)
    look.clutter(rng, image, 10 if frame == FULL else 4)
    return Scene(kind, image, frame), look


def _add(
    scene: Scene, look: PlainStyle, rng: Random, name: str, side: int, distractor: bool = False
) -> None:
    """Draw one object of `side` frame pixels if there is room for it."""
    colour = rng.choice(COLOUR_NAMES) if name in SHAPES else None
    pixels = round(side * scene.scale)
    place = scene.free_place(rng, pixels, pixels)
    if place is None:
        return
    box = (*place, place[0] + pixels, place[1] + pixels)
    if distractor:
        ImageDraw.Draw(scene.image).ellipse(box, fill=look.halo)
    picture = look.sprite(rng, name, colour, pixels)
    scene.image.paste(picture, place, picture)
    thing = Thing(name, colour, box, distractor=distractor)
    scene.boxes.append(thing.box)
    scene.things.append(thing)
    scene.mark(
        thing.box,
        object=1 + OBJECTS.index(name),
        colour=1 + COLOUR_NAMES.index(colour) if colour else 0,
        size=1 + (side >= MIDDLE) + (side >= LARGE),
    )
    scene.mark((*thing.centre, *thing.centre), centre=1)


def _write(
    scene: Scene, look: PlainStyle, rng: Random, lines: Sequence[str], low: int, high: int
) -> bool:
    """Write lines below each other where there is room, and label every character's patches.

    Characters are set at least one patch and a bit apart. `low` and `high` bound the font size in
    frame pixels.
    """
    height = round(rng.randint(low, high) * scene.scale)
    font = load_font(rng.randrange(3), height)
    space = (PATCH + 2) * scene.scale
    wide = [[max(font.getlength(c), space) for c in line] for line in lines]
    rise = round(1.2 * height)
    place = scene.free_place(rng, round(max(map(sum, wide))) + 4, rise * len(lines) + 2)
    if place is None:
        return False
    draw, ink = ImageDraw.Draw(scene.image), look.ink(rng)
    for number, (line, widths) in enumerate(zip(lines, wide, strict=True)):
        x, y = place[0] + 2.0, place[1] + rise * number
        top, bottom = y + 0.2 * height, y + 1.0 * height
        start = x
        for order, (character, advance) in enumerate(zip(line, widths, strict=True)):
            glyph = font.getlength(character)
            draw.text((x + (advance - glyph) / 2, y), character, font=font, fill=ink)
            scene.mark(
                (x + 0.1 * advance, top, x + 0.9 * advance, bottom),
                character=1 + CHARACTERS.index(character),
                order=1 + order,
                line=1 + number,
            )
            x += advance
        scene.texts.append(Text(line, (start, top, x, bottom), 1 + number))
        scene.boxes.append((start, y, x, y + rise))
    return True


def _word(rng: Random) -> str:
    """An English word, or letters that are none: reading must not become guessing."""
    if rng.random() < 0.5:
        return rng.choice(WORDS)
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(3, LONGEST)))


def _number(rng: Random) -> str:
    return "".join(rng.choice(DIGITS) for _ in range(rng.randint(2, 4)))


def _line(rng: Random) -> str:
    kind = rng.randrange(3)
    if kind < 2:
        return (_word, _number)[kind](rng)
    return "".join(rng.choice(CHARACTERS) for _ in range(rng.randint(2, 4)))


def _pick_object(rng: Random, shape_share: float) -> str:
    return rng.choice(SHAPES if rng.random() < shape_share else EMOJI)


def _small(rng: Random, frame: int) -> int:
    return rng.choice((26, 30, 34, 40, 46) if frame == FULL else (24, 28, 32, 38, 44))


def _large(rng: Random, frame: int) -> int:
    return rng.randint(56, 84) if frame == FULL else rng.randint(50, 62)


def soup(rng: Random, style: str = "plain") -> Scene:
    """Many objects and texts on 168 x 168 pixels: training material for the vision tower."""
    if rng.random() < 0.2:
        return chart(rng, MINI, style)
    scene, look = _open("soup", rng, MINI, style)
    if rng.random() < 0.3:
        _add(scene, look, rng, _pick_object(rng, 0.35), _large(rng, MINI), distractor=True)
    for _ in range(rng.randint(1, 2)):
        _write(scene, look, rng, [_line(rng) for _ in range(rng.randint(1, MOST_LINES))], 22, 32)
    for _ in range(rng.randint(4, 7)):
        _add(scene, look, rng, _pick_object(rng, 0.35), rng.choice([18, 22, 26, 30, 36, 44]))
    return scene


def objects(rng: Random, frame: int = FULL, style: str = "plain") -> Scene:
    """A crowd of 12 to 20 objects (mini: 3 to 6), a few of them large and bright.

    One or two names occur several times, the others once.
    """
    scene, look = _open("objects", rng, frame, style)
    full = frame == FULL
    count = rng.randint(12, 20) if full else rng.randint(3, 6)
    singles = rng.sample(EMOJI, min(count, len(EMOJI))) + rng.sample(SHAPES, len(SHAPES))
    rng.shuffle(singles)
    # Shapes carry the colour questions: some come first in every scene.
    singles = rng.sample(SHAPES, rng.randint(2, 4) if full else rng.randint(1, 3)) + singles
    singles = list(dict.fromkeys(singles))
    names: list[str] = []
    for _ in range(rng.randint(1, 2) if full else int(rng.random() < 0.5)):
        names += [singles.pop(rng.randrange(len(singles)))] * rng.randint(2, 5 if full else 4)
    big = rng.randint(2, 4) if full else int(rng.random() < 0.4)
    singles = singles[: max(2 + big, count - len(names))]
    for _ in range(big):
        name = singles.pop(rng.randrange(len(singles)))
        _add(scene, look, rng, name, _large(rng, frame), distractor=True)
    names += singles
    rng.shuffle(names)
    for name in names:
        _add(scene, look, rng, name, _small(rng, frame))
    return scene


def needle(rng: Random, frame: int = FULL, style: str = "plain") -> Scene:
    """One object of 18 to 24 pixels among large ones."""
    scene, look = _open("needle", rng, frame, style)
    for _ in range(rng.randint(4, 8) if frame == FULL else rng.randint(1, 3)):
        _add(scene, look, rng, _pick_object(rng, 0.4), _large(rng, frame), distractor=True)
    found = len(scene.things)
    while len(scene.things) == found:
        _add(scene, look, rng, _pick_object(rng, 0.5), rng.choice([18, 20, 22, 24]))
    return scene


def _surround(scene: Scene, look: PlainStyle, rng: Random, few: int) -> None:
    """Objects beside text: up to `few` in a mini scene, four to eight in a full one."""
    full = scene.frame == FULL
    for _ in range(rng.randint(1, 2) if full else int(rng.random() < 0.2)):
        _add(scene, look, rng, _pick_object(rng, 0.35), _large(rng, scene.frame), distractor=True)
    for _ in range(rng.randint(4, 8) if full else rng.randint(0, few)):
        _add(scene, look, rng, _pick_object(rng, 0.35), _small(rng, scene.frame))


def signs(rng: Random, frame: int = FULL, style: str = "plain") -> Scene:
    """A word and a number, apart from each other, among objects."""
    scene, look = _open("signs", rng, frame, style)
    for text in (_word(rng), _number(rng)):
        while not _write(scene, look, rng, [text], 22, 34 if frame == FULL else 28):
            pass
    _surround(scene, look, rng, 2)
    return scene


def page(rng: Random, frame: int = FULL, style: str = "plain") -> Scene:
    """Two or three lines of text among objects."""
    scene, look = _open("page", rng, frame, style)
    lines = [_line(rng) for _ in range(rng.randint(2, MOST_LINES))]
    while not _write(scene, look, rng, lines, 22, 34 if frame == FULL else 28):
        pass
    _surround(scene, look, rng, 1)
    return scene


def chart(rng: Random, frame: int = FULL, style: str = "plain") -> Scene:
    """A bar chart: three to five bars of different colours and heights 1 to 9, and a legend.

    The legend gives each colour a letter.
    """
    look = STYLES[style]
    scene = Scene("chart", Image.new("RGB", (frame, frame), look.paper(rng)), frame)
    draw = ImageDraw.Draw(scene.image)
    if frame < FULL:
        x0, y1 = rng.randint(22, 26), frame - rng.randint(8, 14)
        height, width = rng.randint(130, 145), rng.randint(88, 96)
    else:
        x0, y1 = rng.randint(34, 60), frame - rng.randint(26, 60)
        height, width = rng.randint(190, 230), rng.randint(160, 200)
    y0, x1 = y1 - height, x0 + width
    step = height / (TOP_VALUE + 1)
    for value in range(TOP_VALUE + 2):
        y = y1 - step * value
        draw.line((x0, y, x1, y), fill=look.grid_line if value else look.axis_ink)
        if value % 2 == 0:
            draw.text((x0 - 20, y - 8), str(value), font=load_font(0, 13), fill=look.axis_ink)
    draw.line((x0, y0, x0, y1), fill=look.axis_ink, width=2)
    scene.mark((x0 - 20, y0 - 6, x0 - 4, y1 + 6), object=AXIS)
    count = rng.randint(3, 5)
    colours, letters = rng.sample(COLOUR_NAMES, count), rng.sample(LETTERS, count)
    values = rng.sample(range(1, TOP_VALUE + 1), count)
    slot = width / count
    bar_width = max(slot * rng.uniform(0.55, 0.8), PATCH)
    for i, (colour, value) in enumerate(zip(colours, values, strict=True)):
        x = x0 + slot * i + (slot - bar_width) / 2
        box = (x, y1 - step * value, x + bar_width, float(y1))
        draw.rectangle(box, fill=COLOURS[colour])
        scene.mark(box, object=BAR, colour=1 + COLOUR_NAMES.index(colour), value=value)
        scene.bars.append(Thing("bar", colour, box, value))
    _draw_legend(scene, look, rng, dict(zip(colours, letters, strict=True)), x1 + 6)
    return scene


def _draw_legend(
    scene: Scene, look: PlainStyle, rng: Random, legend: dict[str, str], left: float
) -> None:
    """Swatch and letter for each colour, in an order of its own, right of `left`."""
    draw = ImageDraw.Draw(scene.image)
    order = rng.sample(list(legend), len(legend))
    font, row = load_font(0, 20), 28
    x = left + rng.uniform(0, max(0.0, scene.image.width - left - 44))
    y = rng.uniform(4, scene.image.height - row * len(order) - 4)
    for i, colour in enumerate(order):
        top = y + row * i
        number = 1 + COLOUR_NAMES.index(colour)
        swatch = (x, top + 4, x + 16, top + 20)
        draw.rectangle(swatch, fill=COLOURS[colour])
        scene.mark(swatch, object=SWATCH, colour=number)
        letter = legend[colour]
        draw.text((x + 21, top), letter, font=font, fill=look.axis_ink)
        box = (x + 21, top + 4, x + 37, top + 20)
        # The letter's patch knows its colour too: what belongs together is said once.
        scene.mark(box, character=1 + CHARACTERS.index(letter), colour=number)
    scene.legend = legend


KINDS = {"objects": objects, "needle": needle, "signs": signs, "page": page, "chart": chart}


def draw(rng: Random, kind: str | None = None, frame: int = FULL, style: str = "plain") -> Scene:
    """Draw a scene of `kind` (default: drawn from the training mixture) for a frame."""
    if kind is None:
        kind = rng.choices(list(KINDS_SHARE), list(KINDS_SHARE.values()))[0]
    return KINDS[kind](rng, frame, style)
