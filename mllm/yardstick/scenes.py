"""Procedurally drawn scenes: emoji sprites, coloured shapes, codes, bar charts, each with boxes.

Every scene is a pure function of the `random.Random` it is given. A full scene is 336 x 336 pixels
(24 x 24 patches of 14 pixels), a mini scene and a sprite soup are 168 x 168.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.resources import files
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

PATCH = 14
FULL, MINI = 336, 168
GRID = FULL // PATCH

EMOJI = (
    "cat dog car tree apple banana clock key umbrella airplane fish house bicycle ball hat cup "
    "book lamp bell guitar camera bus flower mushroom"
).split()
SHAPES = ["circle", "square", "triangle", "star", "diamond", "cross"]
COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 80, 215),
    "yellow": (240, 205, 30),
    "purple": (145, 55, 175),
    "orange": (245, 135, 25),
    "black": (25, 25, 25),
}
COLOUR_NAMES = list(COLOURS)
OBJECTS = EMOJI + SHAPES
# I and O are left out: they look like 1 and 0.
CHARACTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ0123456789"
FONTS = ("DejaVuSans-Bold.ttf", "DejaVuSansMono-Bold.ttf", "DejaVuSerif-Bold.ttf")

# What each patch shows: 0 means nothing, other numbers are 1 + index into these lists.
LABELS = ("object", "colour", "character", "value")
BAR, AXIS = len(OBJECTS) + 1, len(OBJECTS) + 2
LABEL_SIZES = (AXIS + 1, len(COLOURS) + 1, len(CHARACTERS) + 1, 11)

Box = tuple[float, float, float, float]
# Share of each kind of scene in training.
MINI_KINDS = {"objects": 0.5, "needle": 0.12, "code": 0.2, "chart": 0.18}
FULL_KINDS = {"objects": 0.5, "needle": 0.16, "code": 0.18, "chart": 0.16}


@dataclass
class Thing:
    """One drawn object; `colour` is None for an emoji, `box` is (x0, y0, x1, y1) in pixels."""

    name: str
    colour: str | None
    box: Box
    value: int | None = None

    @property
    def label(self) -> str:
        return f"{self.colour} {self.name}" if self.colour else self.name

    @property
    def centre(self) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclass
class Scene:
    """A picture and what is in it.

    `labels` is uint8 `[4, rows, cols]`: object, colour, character and bar value of every patch.
    """

    kind: str
    image: Image.Image
    labels: np.ndarray
    things: list[Thing] = field(default_factory=list)
    bars: list[Thing] = field(default_factory=list)
    code: str | None = None
    code_box: Box | None = None
    boxes: list[Box] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.image.width

    def mark(self, box: Box, **values: int) -> None:
        """Label the patches whose centre lies in `box` (at least the one under its middle)."""
        x0, y0, x1, y1 = box
        last = self.labels.shape[1] - 1
        spans = []
        for low, high in ((y0, y1), (x0, x1)):
            first = max(0, math.ceil((low - PATCH / 2) / PATCH))
            final = min(last, math.floor((high - PATCH / 2) / PATCH))
            if final < first:
                first = final = min(last, int((low + high) / 2 // PATCH))
            spans.append(slice(first, final + 1))
        for name, value in values.items():
            self.labels[LABELS.index(name)][tuple(spans)] = value

    def free_place(self, rng: Random, width: int, height: int, pad: int = 3) -> tuple | None:
        """Top left corner of a free rectangle, or None after forty tries."""
        if max(width, height) + 5 > self.size:
            return None
        for _ in range(40):
            x = rng.randint(2, self.size - width - 2)
            y = rng.randint(2, self.size - height - 2)
            if all(
                x + width + pad <= b[0]
                or b[2] + pad <= x
                or y + height + pad <= b[1]
                or b[3] + pad <= y
                for b in self.boxes
            ):
                return x, y
        return None


@cache
def load_font(index: int, size: int) -> ImageFont.FreeTypeFont:
    """One of the three shipped fonts at `size` pixels."""
    return ImageFont.truetype(str(files("mllm") / "assets" / "fonts" / FONTS[index]), size)


@cache
def _emoji(name: str) -> Image.Image:
    """The sprite, cropped to its ink and padded to a square."""
    image = Image.open(files("mllm") / "assets" / "sprites" / f"{name}.png").convert("RGBA")
    image = image.crop(image.getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _draw_shape(draw: ImageDraw.ImageDraw, name: str, side: int, **style) -> None:
    m = side * 0.06
    far = side - m
    if name == "circle":
        draw.ellipse((m, m, far, far), **style)
    elif name == "square":
        draw.rectangle((2 * m, 2 * m, side - 2 * m, side - 2 * m), **style)
    elif name == "triangle":
        draw.polygon([(side / 2, m), (far, far), (m, far)], **style)
    elif name == "diamond":
        draw.polygon(
            [(side / 2, m), (side - 2 * m, side / 2), (side / 2, far), (2 * m, side / 2)], **style
        )
    elif name == "cross":
        a, b = side * 0.36, side * 0.64
        corners = [(a, m), (b, m), (b, a), (far, a), (far, b), (b, b)]
        corners += [(b, far), (a, far), (a, b), (m, b), (m, a), (a, a)]
        draw.polygon(corners, **style)
    else:
        points = []
        for i in range(10):
            radius = (side / 2 - m) * (1.0 if i % 2 == 0 else 0.42)
            angle = math.pi * (i / 5 - 0.5)
            x, y = side / 2 + radius * math.cos(angle), side / 2 + radius * math.sin(angle)
            points.append((x, y))
        draw.polygon(points, **style)


@lru_cache(maxsize=4096)
def sprite(name: str, colour: str | None, side: int) -> Image.Image:
    """RGBA picture of an object, `side` x `side` pixels, plain style."""
    if name in EMOJI:
        return _emoji(name).resize((side, side), Image.Resampling.LANCZOS)
    image = Image.new("RGBA", (side * 4, side * 4))
    _draw_shape(ImageDraw.Draw(image), name, side * 4, fill=(*COLOURS[colour], 255))
    return image.resize((side, side), Image.Resampling.LANCZOS)


def _gradient(rng: Random, size: int, low: int) -> np.ndarray:
    first, second = ([rng.randint(low, 255) for _ in range(3)] for _ in range(2))
    ramp = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
    if rng.random() < 0.5:
        ramp = ramp.transpose(1, 0, 2)
    mixed = np.float32(first) * (1 - ramp) + np.float32(second) * ramp
    return np.broadcast_to(mixed, (size, size, 3))


class PlainStyle:
    """Light plain, gradient or noisy backgrounds; sprites as they are; dark text."""

    name = "plain"

    def background(self, rng: Random, size: int) -> Image.Image:
        kind = rng.random()
        if kind < 0.5:
            return Image.new("RGB", (size, size), tuple(rng.randint(200, 255) for _ in range(3)))
        picture = _gradient(rng, size, 195)
        if kind > 0.75:
            noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 6, (size // 4, size // 4))
            picture = picture + noise.astype(np.float32).repeat(4, 0).repeat(4, 1)[..., None]
        return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))

    def sprite(self, rng: Random, name: str, colour: str | None, side: int) -> Image.Image:
        return sprite(name, colour, side)

    def ink(self, rng: Random) -> tuple[int, int, int]:
        return tuple(rng.randint(0, 90) for _ in range(3))

    def paper(self, rng: Random) -> tuple[int, int, int]:
        return tuple(rng.randint(235, 255) for _ in range(3))

    grid_line = (205, 205, 205)
    axis_ink = (60, 60, 60)
    bar_edge: tuple[int, int, int] | None = None


@lru_cache(maxsize=4096)
def _dark_sprite(name: str, colour: str | None, side: int, angle: int) -> Image.Image:
    """A turned sprite with a white rim; shapes are thick outlines, not filled."""
    big = side * 2
    if name in EMOJI:
        image = _emoji(name).resize((big, big), Image.Resampling.LANCZOS)
    else:
        image = Image.new("RGBA", (big, big))
        edge = {"outline": (*COLOURS[colour], 255), "width": max(4, big // 6)}
        _draw_shape(ImageDraw.Draw(image), name, big, **edge)
    inner = round(big * 0.78)
    image = image.resize((inner, inner), Image.Resampling.LANCZOS)
    sheet = Image.new("RGBA", (big, big))
    sheet.paste(image, ((big - inner) // 2, (big - inner) // 2))
    sheet = sheet.rotate(angle, Image.Resampling.BICUBIC)
    rim = Image.new("RGBA", (big, big), (255, 255, 255, 0))
    rim.putalpha(sheet.getchannel("A").filter(ImageFilter.MaxFilter(5)))
    return Image.alpha_composite(rim, sheet).resize((side, side), Image.Resampling.LANCZOS)


class DarkStyle(PlainStyle):
    """Held back from training: dark striped or speckled grounds, turned and outlined objects."""

    name = "dark"

    def background(self, rng: Random, size: int) -> Image.Image:
        picture = _gradient(rng, size, 195) / 5
        if rng.random() < 0.5:
            period, slope = rng.choice([8, 12, 18]), rng.choice([-1, 0, 1])
            rows, cols = np.mgrid[:size, :size]
            stripes = ((cols + slope * rows) // period) % 2
            picture = picture + 28 * stripes[..., None].astype(np.float32)
        else:
            noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 16, (size // 4, size // 4))
            picture = picture + noise.astype(np.float32).repeat(4, 0).repeat(4, 1)[..., None]
        return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))

    def sprite(self, rng: Random, name: str, colour: str | None, side: int) -> Image.Image:
        # At most 20 degrees: a square must not become a diamond.
        return _dark_sprite(name, colour, side, rng.randrange(-20, 21, 10))

    def ink(self, rng: Random) -> tuple[int, int, int]:
        return tuple(rng.randint(190, 255) for _ in range(3))

    def paper(self, rng: Random) -> tuple[int, int, int]:
        return tuple(rng.randint(30, 60) for _ in range(3))

    grid_line = (90, 90, 90)
    axis_ink = (220, 220, 220)
    bar_edge = (255, 255, 255)


STYLES = {style.name: style for style in (PlainStyle(), DarkStyle())}


def _blank(kind: str, image: Image.Image) -> Scene:
    cells = image.width // PATCH
    return Scene(kind, image, np.zeros((len(LABELS), cells, cells), np.uint8))


def _pick_object(rng: Random, shape_share: float) -> str:
    return rng.choice(SHAPES if rng.random() < shape_share else EMOJI)


def _add(scene: Scene, style: PlainStyle, rng: Random, name: str, side: int) -> None:
    """Draw one object if there is room for it."""
    colour = rng.choice(COLOUR_NAMES) if name in SHAPES else None
    place = scene.free_place(rng, side, side)
    if place is None:
        return
    picture = style.sprite(rng, name, colour, side)
    scene.image.paste(picture, place, picture)
    thing = Thing(name, colour, (*place, place[0] + side, place[1] + side))
    scene.boxes.append(thing.box)
    scene.things.append(thing)
    scene.mark(
        thing.box,
        object=1 + OBJECTS.index(name),
        colour=1 + COLOUR_NAMES.index(colour) if colour else 0,
    )


def _write(scene: Scene, style: PlainStyle, rng: Random, code: str, height: int) -> Box | None:
    """Write `code` where there is room and label the patches of each character."""
    font = load_font(rng.randrange(3), height)
    draw = ImageDraw.Draw(scene.image)
    left, top, right, bottom = draw.textbbox((0, 0), code, font=font)
    width, tall = int(right - left), int(bottom - top)
    place = scene.free_place(rng, width + 4, tall + 4)
    if place is None:
        return None
    x, y = place[0] + 2, place[1] + 2
    draw.text((x - left, y - top), code, font=font, fill=style.ink(rng))
    box = (x, y, x + width, y + tall)
    scene.boxes.append(box)
    pen = x - left
    for character in code:
        advance = font.getlength(character)
        cell = (pen + 0.1 * advance, y, pen + 0.9 * advance, y + tall)
        scene.mark(cell, character=1 + CHARACTERS.index(character))
        pen += advance
    return box


def _random_code(rng: Random, low: int, high: int) -> str:
    return "".join(rng.choice(CHARACTERS) for _ in range(rng.randint(low, high)))


def soup(rng: Random, style: str = "plain") -> Scene:
    """Many objects and codes on 168 x 168 pixels: training material for the vision tower."""
    look = STYLES[style]
    scene = _blank("soup", look.background(rng, MINI))
    for _ in range(rng.randint(2, 3)):
        _write(scene, look, rng, _random_code(rng, 1, 4), rng.randint(26, 38))
    for _ in range(rng.randint(5, 8)):
        _add(scene, look, rng, _pick_object(rng, 0.35), rng.choice([18, 22, 28, 34, 40, 48]))
    return scene


def objects(rng: Random, size: int = FULL, style: str = "plain") -> Scene:
    """Two to eight objects, sometimes several of one name."""
    look = STYLES[style]
    scene = _blank("objects", look.background(rng, size))
    mini = size < FULL
    count = rng.randint(2, 5) if mini else rng.randint(3, 7)
    pool: list[str] = []
    wanted = rng.randint(2, min(5, count))
    while len(pool) < wanted:
        name = _pick_object(rng, 0.4)
        if name not in pool:
            pool.append(name)
    names = [rng.choice(pool) for _ in range(count)]
    if rng.random() < 0.4:
        names = [pool[0]] * rng.randint(2, 5) + names[:3]
    for name in names:
        sides = [26, 30, 34, 40] if mini else [30, 36, 44, 52, 60]
        _add(scene, look, rng, name, rng.choice(sides))
    return scene


def shapes(rng: Random, size: int = FULL, style: str = "plain") -> Scene:
    """Three to six different shapes and up to two emoji: many colour questions; training only."""
    look = STYLES[style]
    scene = _blank("objects", look.background(rng, size))
    names = rng.sample(SHAPES, rng.randint(3, 6)) + rng.sample(EMOJI, rng.randint(0, 2))
    sides = [26, 30, 34, 40] if size < FULL else [30, 36, 44, 52, 60]
    for name in names:
        _add(scene, look, rng, name, rng.choice(sides))
    return scene


def needle(rng: Random, size: int = FULL, style: str = "plain") -> Scene:
    """One object of 18 to 24 pixels in an otherwise empty picture."""
    look = STYLES[style]
    scene = _blank("needle", look.background(rng, size))
    _add(scene, look, rng, _pick_object(rng, 0.5), rng.choice([18, 20, 22, 24]))
    return scene


def code(rng: Random, size: int = FULL, style: str = "plain") -> Scene:
    """One code of two to four characters and up to three objects."""
    look = STYLES[style]
    scene = _blank("code", look.background(rng, size))
    scene.code = _random_code(rng, 2, 4)
    while scene.code_box is None:
        height = rng.randint(26, 32) if size < FULL else rng.randint(26, 38)
        scene.code_box = _write(scene, look, rng, scene.code, height)
    for _ in range(rng.randint(0, 3)):
        _add(scene, look, rng, _pick_object(rng, 0.35), rng.choice([30, 36, 44, 52]))
    return scene


def chart(rng: Random, size: int = FULL, style: str = "plain") -> Scene:
    """A bar chart: three to five bars of different colours and different heights from 1 to 10."""
    look = STYLES[style]
    scene = _blank("chart", Image.new("RGB", (size, size), look.paper(rng)))
    draw = ImageDraw.Draw(scene.image)
    if size < FULL:
        x0, y1 = rng.randint(26, 32), size - rng.randint(8, 14)
        height, width = rng.randint(130, 145), rng.randint(115, 132)
    else:
        x0, y1 = rng.randint(34, 60), size - rng.randint(26, 60)
        height, width = rng.randint(190, 230), rng.randint(200, 250)
    y0, x1 = y1 - height, x0 + width
    for value in range(11):
        y = y1 - height * value / 10
        draw.line((x0, y, x1, y), fill=look.grid_line if value else look.axis_ink)
        if value % 2 == 0:
            draw.text((x0 - 22, y - 8), str(value), font=load_font(0, 13), fill=look.axis_ink)
    draw.line((x0, y0, x0, y1), fill=look.axis_ink, width=2)
    scene.mark((x0 - 24, y0 - 6, x0 - 4, y1 + 6), object=AXIS)
    count = rng.randint(3, 5)
    colours, values = rng.sample(COLOUR_NAMES, count), rng.sample(range(1, 11), count)
    slot = width / count
    bar_width = slot * rng.uniform(0.5, 0.75)
    for i, (colour, value) in enumerate(zip(colours, values, strict=True)):
        x = x0 + slot * i + (slot - bar_width) / 2
        box = (x, y1 - height * value / 10, x + bar_width, float(y1))
        draw.rectangle(box, fill=COLOURS[colour], outline=look.bar_edge)
        scene.mark(box, object=BAR, colour=1 + COLOUR_NAMES.index(colour), value=value)
        scene.bars.append(Thing("bar", colour, box, value))
    return scene


KINDS = {"objects": objects, "shapes": shapes, "needle": needle, "code": code, "chart": chart}


def draw(rng: Random, kind: str | None = None, size: int = FULL, style: str = "plain") -> Scene:
    """Draw a scene of `kind` (default: drawn from the training mixture) at `size` pixels."""
    if kind is None:
        shares = MINI_KINDS if size < FULL else FULL_KINDS
        kind = rng.choices(list(shares), list(shares.values()))[0]
    return KINDS[kind](rng, size, style)
