"""Tiny data sets with the columns of public ones, as a user would have copied them."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
from PIL import Image

COLORS = ("red", "green", "blue", "gray", "white", "black")


def picture(index: int) -> Image.Image:
    return Image.new("RGB", (60 + 10 * (index % 3), 60), COLORS[index % len(COLORS)])


def pope(n: int = 6) -> dict[str, list]:
    return {
        "question_id": [str(i) for i in range(n)],
        "question": [f"Is there a {COLORS[i % 6]} wall?" for i in range(n)],
        "answer": ["yes" if i % 2 else "no" for i in range(n)],
        "category": ["adversarial"] * n,
        "image": [picture(i) for i in range(n)],
    }


def mme(n: int = 4) -> dict[str, list]:
    return {
        "question_id": [f"code_reasoning/{i // 2}.png" for i in range(n)],
        "question": [f"Is it {COLORS[i % 6]}? Please answer yes or no." for i in range(n)],
        "answer": ["Yes" if i % 2 else "No" for i in range(n)],
        "category": ["code_reasoning" if i < n // 2 else "color" for i in range(n)],
        "image": [picture(i // 2) for i in range(n)],
    }


def gqa(n: int = 4) -> dict[str, list]:
    return {
        "id": [str(i) for i in range(n)],
        "imageId": [f"n{i % 2}" for i in range(n)],
        "question": [f"What color is thing {i}?" for i in range(n)],
        "answer": [COLORS[i % 2] for i in range(n)],
    }


def gqa_images() -> dict[str, list]:
    return {"id": ["n0", "n1"], "image": [picture(0), picture(1)]}


def textvqa(n: int = 4) -> dict[str, list]:
    return {
        "question_id": list(range(n)),
        "question": [f"what is word {i}?" for i in range(n)],
        "answers": [["stop"] * 9 + ["go"] for _ in range(n)],
        "ocr_tokens": [[f"seen{i}", "stop"] for i in range(n)],
        "image": [picture(i) for i in range(n)],
    }


def vqav2(n: int = 2) -> dict[str, list]:
    return {
        "question_id": list(range(n)),
        "question": [f"what color is wall {i}?" for i in range(n)],
        "answer": ["?"] * n,
        "image": [picture(i) for i in range(n)],
    }


def table(columns: dict[str, list]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


def parquet(folder: Path, split: str, columns: dict[str, list]) -> None:
    """As on the hub, and as `hf download` copies it."""
    folder.mkdir(parents=True, exist_ok=True)
    table(columns).to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))


def on_disk(folder: Path, split: str, columns: dict[str, list]) -> None:
    datasets.DatasetDict({split: table(columns)}).save_to_disk(str(folder))


def arrow(folder: Path, split: str, columns: dict[str, list]) -> None:
    on_disk(folder.with_name("made"), split, columns)
    folder.mkdir(parents=True)
    (made,) = folder.with_name("made").glob(f"{split}/*.arrow")
    made.rename(folder / f"{split}.arrow")


def image_folder(folder: Path, split: str, columns: dict[str, list]) -> None:
    (folder / split).mkdir(parents=True)
    lines = []
    for i, image in enumerate(columns["image"]):
        image.save(folder / split / f"{i:03}.png")
        own = {k: v[i] for k, v in columns.items() if k != "image"}
        lines.append(json.dumps({"file_name": f"{i:03}.png", **own}) + "\n")
    (folder / split / "metadata.jsonl").write_text("".join(lines))
