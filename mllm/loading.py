"""Load a model with its processor, and turn pictures and questions into a batch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm.errors import DataError, first_line

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
            f"device={device!r} is not there: {first_line(error)}",
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
    from transformers import AutoModelForImageTextToText

    import mllm.models.towers  # noqa: F401 - transformers is told of our towers

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise DataError(
            f"dtype={dtype!r} is not known",
            argument="dtype",
            given=dtype,
            expected="auto, float32, bfloat16, float16",
        )
    device = pick_device(device)
    processor = load_processor(path)
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            model_path(path), dtype=dtype, attn_implementation=attn_implementation
        )
    except (OSError, ValueError, ImportError) as error:  # the last: no flash attention here
        raise _unreadable("a vision-language model", path, first_line(error)) from error
    return model.to(device).eval(), processor


def load_processor(path: str | os.PathLike) -> Any:
    """The processor of a model, with left padding.

    Without torchvision, which transformers needs for videos alone, it takes pictures and refuses
    videos.

    Args:
        path: as for :func:`load_model`.

    Raises:
        DataError: it cannot be read, or is that of a model without pictures.
    """
    from mllm import compat

    try:
        processor = compat.processor(model_path(path))
    except (OSError, ValueError, ImportError) as error:
        raise _unreadable("the processor", path, first_line(error)) from error
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        found = f"{type(processor).__name__} takes no pictures; is preprocessor_config.json there?"
        raise _unreadable("the processor", path, found)
    processor.tokenizer.padding_side = "left"
    return processor


def _unreadable(what: str, path: str | os.PathLike, why: str) -> DataError:
    return DataError(
        f"cannot load {what} from {path}: {why}",
        argument="model",
        given=path,
        expected="a folder written by save_pretrained of model and processor, a hub name, or "
        f"{EMBEDDED!r}",
    )


def load_image(path: str | os.PathLike) -> Image.Image:
    """An RGB picture, upright; DataError that names the file if it is missing or broken."""
    import numpy as np
    from PIL import Image, ImageFile, ImageOps

    # PIL's limits are globals that other packages lift: half a picture is not a picture.
    lenient = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise OSError(f"it claims {image.width} x {image.height} pixels")
            # Cameras store pictures as the sensor saw them, and beside them how to turn them.
            with contextlib.suppress(Exception):  # a broken note is no broken picture
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # PIL would make all but the darkest white
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGB")
    # UnidentifiedImageError is an OSError.
    except (OSError, ValueError, Image.DecompressionBombError) as error:
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

    Raises:
        DataError: placeholders and images do not match, the processor has no chat template, or it
            cannot take a picture (one of 1 x 500 pixels, say).
    """
    if not samples or not all(isinstance(images, list | tuple) for images, *_ in samples):
        raise DataError(
            "samples are pairs of a list of images and a text",
            argument="samples",
            given=samples,
            expected="[([image], 'what is it?')]",
        )
    token = processor.image_token
    prompts = []
    for images, text in samples:
        content = chat_content(len(images), text.replace(PLACEHOLDER, token), token)
        prompts.append(chat_text(processor, [{"role": "user", "content": content}]))
    return process(processor, prompts, [images for images, _ in samples])


def chat_text(
    processor: Any, messages: Sequence[dict[str, Any]], *, generate: bool = True
) -> str:
    """A chat as the model's prompt, by the processor's chat template.

    Args:
        processor: of the model.
        messages: as `apply_chat_template` takes them.
        generate: whether an answer follows.

    Raises:
        DataError: the processor has no template, or a broken one.
    """
    from mllm import compat

    if generate and compat.asks_plainly(processor):
        parts = [part for message in messages for part in message["content"]]
        return "".join(part.get("text", processor.image_token) for part in parts)
    try:
        return processor.apply_chat_template(list(messages), add_generation_prompt=generate)
    except ValueError as error:
        raise DataError(
            f"{type(processor).__name__} cannot write the prompt: {first_line(error)}",
            argument="model",
            given=type(processor).__name__,
            expected="a processor with a chat template, as models that follow instructions have",
        ) from error


def process(
    processor: Any, texts: list[str], images: Sequence[Sequence[Any]], **options: Any
) -> Any:
    """A padded batch of rendered prompts and the pictures of each.

    Args:
        processor: of the model.
        texts: prompts with placeholders.
        images: of every prompt, in its order.
        **options: what else the processor takes.

    Raises:
        DataError: the processor does not take these pictures.
    """
    from mllm import compat

    pictures = compat.pictures(processor, images)
    try:
        return processor(
            text=texts, images=pictures, padding=True, return_tensors="pt", **options
        )
    except DataError:
        raise
    except ValueError as error:
        sizes = ", ".join(f"{x.width} x {x.height}" for own in images for x in own)
        raise DataError(
            f"{type(processor).__name__} cannot take pictures of {sizes or 'no'} pixels: "
            f"{first_line(error)}",
            argument="images",
            given=sizes,
            expected="pictures and prompts that the model's own processor takes",
        ) from error
