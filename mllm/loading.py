"""Load a model with its processor, and turn pictures and questions into a batch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

EMBEDDED = "tiny-llava"
PLACEHOLDER = "<image>"  # in our own samples and in LLaVA JSON; a model may call it otherwise
MAX_PIXELS = 2**28  # more than any camera; a damaged header can claim anything


def model_path(path: str | os.PathLike) -> str:
    """`path`, or the folder of the model that ships with mllm for ``"tiny-llava"``."""
    if str(path) == EMBEDDED:
        return str(Path(__file__).parent / "assets" / "tiny_llava")
    return str(path)


def pick_device(device: str | None) -> str:
    """`device` if this machine has it; None is CUDA where there is one, else the CPU.

    Raises:
        DataError: no such device here.
    """
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
        raise DataError(
            f"device={device!r} is not there: {str(error).splitlines()[0]}",
            argument="device",
            given=device,
            expected="cpu, or cuda on a machine with a GPU",
        ) from error
    return device


def load_model(
    path: str | os.PathLike = EMBEDDED,
    *,
    dtype: str = "auto",
    device: str | None = None,
    attn_implementation: str = "sdpa",
) -> tuple[Any, Any]:
    """A vision-language model in eval mode, and its processor with left padding.

    Args:
        path: a folder, a hub name, or ``"tiny-llava"`` (the embedded model).
        dtype: ``"auto"`` (as stored), ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        device: torch device; None is CUDA where there is one.
        attn_implementation: ``"sdpa"``, ``"eager"`` or ``"flash_attention_2"``.

    Raises:
        DataError: the model cannot be read, or there is no such device or dtype.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import mllm.models.towers  # noqa: F401 - transformers is told of our towers

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise DataError(
            f"dtype={dtype!r} is not known",
            argument="dtype",
            given=dtype,
            expected="auto, float32, bfloat16, float16",
        )
    device = pick_device(device)
    where = model_path(path)
    try:
        processor = AutoProcessor.from_pretrained(where)
        model = AutoModelForImageTextToText.from_pretrained(
            where, dtype=dtype, attn_implementation=attn_implementation
        )
    except (OSError, ValueError, ImportError) as error:  # the last: no flash attention here
        raise DataError(
            f"cannot load a vision-language model from {path}: {str(error).splitlines()[0]}",
            argument="model",
            given=path,
            expected="a folder written by save_pretrained, a hub name, or 'tiny-llava'",
        ) from error
    processor.tokenizer.padding_side = "left"
    return model.to(device).eval(), processor


def load_image(path: str | os.PathLike) -> Image.Image:
    """An RGB picture; DataError that names the file if it is missing or broken."""
    from PIL import Image, ImageFile

    # PIL's limits are globals that other packages lift: half a picture is not a picture.
    lenient = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise OSError(f"it claims {image.width} x {image.height} pixels")
            return image.convert("RGB")
    # UnidentifiedImageError is an OSError.
    except (OSError, Image.DecompressionBombError) as error:
        raise DataError(
            f"cannot read the image {path}: {error}",
            argument="image",
            given=path,
            expected="a readable image file",
        ) from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def chat_content(images: int, text: str, token: str = PLACEHOLDER) -> list[dict[str, str]]:
    """A chat message's content: `images` pictures where `text` has `token`, else before it.

    Raises:
        DataError: `text` has some placeholders, but not one for each picture.
    """
    found = text.count(token)
    if found not in (0, images):
        raise DataError(
            f"the question has {found} image placeholders for {images} images",
            argument="question",
            given=text,
            expected=f"no {token}, or one for each image",
        )
    parts = text.split(token) if found else [*[""] * images, text]
    content: list[dict[str, str]] = []
    for i, part in enumerate(parts):
        if i:
            content.append({"type": "image"})
        if part:
            content.append({"type": "text", "text": part})
    return content


def build_inputs(processor: Any, samples: list[tuple[list[Image.Image], str]]) -> Any:
    """A left-padded batch for `model.generate`, from pictures and questions.

    Args:
        processor: with a chat template.
        samples: per sample its images, in the order of the prompt, and the text. Text that has
            as many image placeholders (`<image>`, or the processor's own) as there are images
            keeps them where they are; otherwise the images come first.
    """
    token = processor.image_token
    prompts = []
    for images, text in samples:
        content = chat_content(len(images), text.replace(PLACEHOLDER, token), token)
        message = {"role": "user", "content": content}
        prompts.append(processor.apply_chat_template([message], add_generation_prompt=True))
    pictures = [image for images, _ in samples for image in images]
    return processor(text=prompts, images=pictures or None, padding=True, return_tensors="pt")
