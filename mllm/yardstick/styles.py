"""How scenes look: sprites, fonts, grounds and clutter, in the trained style and a held-out one."""

from __future__ import annotations

import math
from functools import cache, lru_cache
from importlib.resources import files
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

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
FONTS = ("DejaVuSans-Bold.ttf", "DejaVuSansMono-Bold.ttf", "DejaVuSerif-Bold.ttf")

Colour = tuple[int, int, int]


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
def sprite(name: str, colour: str | None, side: int, angle: int = 0) -> Image.Image:
    """RGBA picture of an object, `side` x `side` pixels, turned by `angle` degrees."""
    if name in EMOJI:
        image = _emoji(name)
    else:
        image = Image.new("RGBA", (side * 4, side * 4))
        _draw_shape(ImageDraw.Draw(image), name, side * 4, fill=(*COLOURS[colour], 255))
    if angle:
        image = image.rotate(angle, Image.Resampling.BICUBIC)
    return image.resize((side, side), Image.Resampling.LANCZOS)


def _gradient(rng: Random, width: int, height: int, low: int) -> np.ndarray:
    first, second = ([rng.randint(low, 255) for _ in range(3)] for _ in range(2))
    along = rng.random() < 0.5
    ramp = np.linspace(0, 1, width if along else height, dtype=np.float32)
    ramp = ramp[None, :, None] if along else ramp[:, None, None]
    mixed = np.float32(first) * (1 - ramp) + np.float32(second) * ramp
    return np.broadcast_to(mixed, (height, width, 3))


def _noise(rng: Random, width: int, height: int, spread: float, grain: int) -> np.ndarray:
    shape = (-(-height // grain), -(-width // grain))
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, spread, shape)
    return noise.astype(np.float32).repeat(grain, 0).repeat(grain, 1)[:height, :width, None]


def _pattern(rng: Random, width: int, height: int) -> np.ndarray:
    """Stripes, checks or dots: 0/1 `[height, width, 1]`."""
    period, kind = rng.choice([6, 8, 12, 18]), rng.randrange(3)
    rows, cols = np.mgrid[:height, :width]
    if kind == 0:
        marks = (cols + rng.choice([-1, 0, 1]) * rows) // period % 2
    elif kind == 1:
        marks = (cols // period + rows // period) % 2
    else:
        marks = (cols % period - period / 2) ** 2 + (rows % period - period / 2) ** 2 < period
    return marks[..., None].astype(np.float32)


def _picture(array: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(array, 0, 255).astype(np.uint8))


class PlainStyle:
    """Light grounds, plain or textured, with pale lines and patches; dark text."""

    name = "plain"
    grid_line: Colour = (205, 205, 205)
    axis_ink: Colour = (60, 60, 60)
    halo: Colour = (255, 255, 225)

    def background(self, rng: Random, width: int, height: int) -> Image.Image:
        """The ground that everything is drawn on."""
        ground = _gradient(rng, width, height, 195)
        kind = rng.random()
        if kind < 0.3:
            ground = ground + _noise(rng, width, height, 6, 4)
        elif kind < 0.6:
            ground = ground - rng.randint(6, 14) * _pattern(rng, width, height)
        return _picture(ground)

    def clutter(self, rng: Random, image: Image.Image, amount: int) -> None:
        """Lines, arcs and textured patches that mean nothing."""
        draw = ImageDraw.Draw(image)
        width, height = image.size
        for _ in range(rng.randint(0, 1 + amount // 4)):
            w, h = rng.randint(20, 70), rng.randint(20, 70)
            x, y = rng.randint(-10, width - 20), rng.randint(-10, height - 20)
            patch = _gradient(rng, w, h, self.clutter_low) - 18 * _pattern(rng, w, h)
            image.paste(_picture(patch * self.clutter_gain), (x, y))
        for _ in range(rng.randint(amount // 2, amount)):
            ink = tuple(
                int(rng.randint(self.clutter_low - 50, 235) * self.clutter_gain) for _ in range(3)
            )
            ends = [
                (rng.randint(0, width), rng.randint(0, height)) for _ in range(rng.randint(2, 4))
            ]
            if rng.random() < 0.3:
                (x, y), radius = ends[0], rng.randint(10, 60)
                turn = rng.randint(0, 359)
                box = (x - radius, y - radius, x + radius, y + radius)
                draw.arc(box, turn, turn + rng.randint(60, 300), ink, rng.randint(1, 3))
            else:
                draw.line(ends, ink, rng.randint(1, 3))

    clutter_low, clutter_gain = 195, 1.0

    def sprite(self, rng: Random, name: str, colour: str | None, side: int) -> Image.Image:
        """One object as it is pasted into the scene."""
        return sprite(name, colour, side)

    def ink(self, rng: Random) -> Colour:
        """Colour of text."""
        return tuple(rng.randint(0, 90) for _ in range(3))

    def paper(self, rng: Random) -> Colour:
        """Ground of charts."""
        return tuple(rng.randint(235, 255) for _ in range(3))


class DuskStyle(PlainStyle):
    """Held back from training: grounds of middle grey, turned objects, light text."""

    name = "dusk"
    grid_line: Colour = (160, 160, 160)
    axis_ink: Colour = (255, 255, 255)
    halo: Colour = (190, 190, 150)
    clutter_low, clutter_gain = 195, 0.55

    def background(self, rng: Random, width: int, height: int) -> Image.Image:
        ground = _gradient(rng, width, height, 195) * 0.6
        if rng.random() < 0.5:
            return _picture(ground + 14 * _pattern(rng, width, height))
        return _picture(ground + _noise(rng, width, height, 8, 4))

    def sprite(self, rng: Random, name: str, colour: str | None, side: int) -> Image.Image:
        # At most 20 degrees: a square must not become a diamond.
        return sprite(name, colour, side, rng.randrange(-20, 21, 10))

    def ink(self, rng: Random) -> Colour:
        return tuple(rng.randint(200, 255) for _ in range(3))

    def paper(self, rng: Random) -> Colour:
        return tuple(rng.randint(110, 140) for _ in range(3))


STYLES = {style.name: style for style in (PlainStyle(), DuskStyle())}
