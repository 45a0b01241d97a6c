"""Write mllm/assets/tiny_clips: four drawn videos with a question each, for `pllava --tiny`.

Needs PyAV. Usage: python scripts/make_tiny_clips.py
"""

from __future__ import annotations

import json
from pathlib import Path

import av
from PIL import Image, ImageDraw

FOLDER = Path(__file__).parents[1] / "mllm" / "assets" / "tiny_clips"
SIDE, FRAMES, STEP, SQUARE = 112, 8, 10, 30
WAYS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
COLOURS = ("red", "blue", "green", "black")


def frame(colour: str, way: tuple[int, int], number: int) -> Image.Image:
    """A square on its way through the middle."""
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    x, y = ((SIDE - SQUARE) // 2 + STEP * d * (2 * number - FRAMES + 1) // 2 for d in way)
    ImageDraw.Draw(picture).rectangle((x, y, x + SQUARE, y + SQUARE), fill=colour)
    return picture


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    entries = []
    for colour, (name, way) in zip(COLOURS, WAYS.items(), strict=True):
        with av.open(str(FOLDER / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=4)
            stream.width = stream.height = SIDE
            stream.pix_fmt = "yuv420p"
            for number in range(FRAMES):
                picture = av.VideoFrame.from_image(frame(colour, way, number))
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
        talk = [
            {"from": "human", "value": f"<video>\nwhere does the {colour} square go?"},
            {"from": "gpt", "value": name},
        ]
        entries.append({"id": name, "video": f"{name}.mp4", "conversations": talk})
    (FOLDER / "clips.json").write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    main()
