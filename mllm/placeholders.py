"""Where the pictures of a call stand among its rows, from the base model's arguments."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mllm.errors import DataError
from mllm.tokens import Counts, Layout, count_rows, split_images, supervised
from mllm.vision_signals import Prompts

if TYPE_CHECKING:
    from mllm.bound import Bound
    from mllm.models.base import Family


def brought(patched: Bound, given: dict[str, Any]) -> list[str]:
    """Whether a call has images, videos, or both, as pixels or as features.

    Raises:
        DataError: it has videos, and those of this family cannot be reduced.
    """
    encoders, found = given.get("mm_encoder_outputs") or {}, []
    for kind, family in patched.kinds.items():
        pixels = "pixel_values_videos" if family is None else family.pixels
        if given.get(pixels) is None and encoders.get(kind) is None:
            continue
        if family is None:
            raise DataError(
                f"the tokens of videos cannot be reduced in {type(patched.model).__name__}",
                argument="pixel_values_videos",
                given="a video",
                expected="images",
            )
        found.append(kind)
    return found


def find(
    patched: Bound, ids: Tensor, given: dict[str, Any], drafts: bool
) -> tuple[dict[str, Tensor], Counts, dict[str, list[Layout]]]:
    """Placeholders of images and of videos, bool `[batch, rows]`; counts; layouts of pixels.

    Args:
        patched: the model and its plan.
        ids: int64 `[batch, rows]`.
        given: the other arguments of the base model.
        drafts: whether the model drafts for assisted decoding, and is given no pictures.

    Raises:
        DataError: there are others than the pictures given have; images and videos that have the
            same.
    """
    families = {kind: family for kind, family in patched.kinds.items() if family is not None}
    mask, encoders = given.get("attention_mask"), given.get("mm_encoder_outputs") or {}
    plain = isinstance(mask, Tensor) and mask.dim() == 2
    marks = {kind: ids == family.image_token_id for kind, family in families.items()}
    kinds, layouts = brought(patched, given), {}
    if len({family.image_token_id for family in families.values()}) < len(families):
        marks = _of_one_kind(patched, marks, kinds)
    counts = count_rows(marks, mask[:, -ids.shape[1] :] if plain else None)
    for kind in kinds:
        if encoders.get(kind) is None:
            families[kind].check(given)
            layouts[kind] = families[kind].layouts(given)
    if kinds or not drafts:
        for kind, family in families.items():
            _check_counts(
                kind, family, counts.marked[kind], kind in kinds, layouts.get(kind),
                encoders.get(kind),
            )  # fmt: skip
    return {kind: marks[kind] for kind in kinds}, counts, layouts


def _of_one_kind(
    patched: Bound, marks: dict[str, Tensor], kinds: list[str]
) -> dict[str, Tensor]:
    """Placeholders where images and videos have the same: a call has one kind of them."""
    if len(kinds) > 1:
        raise DataError(
            f"images and videos of {type(patched.model).__name__} have the same placeholders, so "
            "that transformers cannot have both in one call",
            argument="pixel_values_videos",
            given=" and ".join(kinds),
            expected="images or videos",
        )
    own = kinds or ["image"]
    return {kind: x if kind in own else torch.zeros_like(x) for kind, x in marks.items()}


def _check_counts(
    kind: str, family: Family, counts: list[int], given: bool, layouts: list[Layout] | None,
    encoded: Any,
) -> None:  # fmt: skip
    """Every sample's placeholders are whole images, and there are as many as were given."""
    found = any(counts)
    if found != given:
        raise DataError(
            f"the prompt has {kind} placeholders but no pixels were given"
            if found
            else f"pixels were given but the prompt has no {kind} placeholder",
            argument=family.pixels if found else "input_ids",
            given=None if found else f"no token {family.image_token_id}",
            expected="as many placeholders as visual tokens",
        )
    if not found:
        return
    if layouts is not None:
        sizes = [layout.tokens for layout in layouts]
        total = sum(sizes)
    elif (reduction := getattr(encoded, "mllm_reduction", None)) is None:
        raise DataError(
            "mm_encoder_outputs were not computed by the patched model",
            argument="mm_encoder_outputs",
            given=type(encoded).__name__,
            expected=f"get_{kind}_features of the patched model, or {family.pixels}",
        )
    else:
        sizes, total = reduction.sizes, sum(len(f) for f in encoded.pooler_output)
    if sum(counts) != total or split_images(counts, sizes) is None:
        tokens = " or ".join(str(n) for n in dict.fromkeys(sizes))
        raise DataError(
            f"the samples have {counts} {kind} placeholders for {len(sizes)} {kind}s of "
            f"{tokens} visual tokens",
            argument="input_ids",
            given=counts,
            expected=f"{tokens} placeholders per {kind}, {total} in the batch",
        )


def prompts(
    given: dict[str, Any], marks: dict[str, Tensor], counts: Counts, length: int | None,
    labels: Tensor | None = None,
) -> dict[str, Prompts]:  # fmt: skip
    """By kind, the prompts that pre-LLM stages read.

    Args:
        given: arguments of the base model, with the ids.
        marks, counts: see :func:`find`.
        length: logical length of the prompt, where generate() told it.
        labels: `[batch, rows]`, where the caller gave them.
    """
    ids, mask, cache = given["input_ids"], given.get("attention_mask"), given.get("past_key_values")
    visual = functools.reduce(torch.logical_or, marks.values())
    text = ~visual
    if isinstance(mask, Tensor) and mask.dim() == 2:
        text = text & mask[:, -ids.shape[1] :].bool()
    if length is not None:
        past = 0 if cache is None else cache.get_seq_length()
        text = text & (torch.arange(ids.shape[1], device=ids.device) + past < length)
    if labels is not None:
        text = text & ~supervised(labels.to(ids.device), visual)
    most = max(n - v for n, v in zip(counts.valid, counts.seen, strict=True))
    return {kind: Prompts(ids, text, visual, counts.marked[kind], most) for kind in marks}
