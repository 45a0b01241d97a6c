"""Does the [CLS] token look at what is drawn? The ground that [CLS] methods stand on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mllm.yardstick.scenes import FULL, GRID, PATCH


def object_patches(sample: dict[str, Any]) -> np.ndarray:
    """Bool `[576]`: patches at least half covered by the box of one object (single-image tasks)."""
    rows, cols = np.mgrid[:GRID, :GRID] * PATCH
    covered = np.zeros((GRID, GRID), bool)
    width, height = sample["image"].size
    side = max(width, height)
    pads = ((side - width) / 2, (side - height) / 2) * 2
    for thing in sample["objects"]:
        box = zip(thing["box"], pads, strict=True)
        x0, y0, x1, y1 = ((at + pad) * FULL / side for at, pad in box)
        wide = np.minimum(cols + PATCH, x1) - np.maximum(cols, x0)
        tall = np.minimum(rows + PATCH, y1) - np.maximum(rows, y0)
        covered |= np.clip(wide, 0, None) * np.clip(tall, 0, None) >= PATCH * PATCH / 2
    return covered.ravel()


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve: chance that a positive outranks a negative (Mann-Whitney).

    Equal scores count half.
    """
    _, which, alike = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(alike) - (alike - 1) / 2)[which]
    good = int(positive.sum())
    above = ranks[positive].sum() - good * (good + 1) / 2
    return float(above / (good * (len(scores) - good)))


@torch.no_grad()
def cls_attention_auc(model: Any, processor: Any, samples: Sequence[dict[str, Any]]) -> float:
    """Mean AUC of the [CLS] row of the feature block against the boxes of drawn objects.

    Args:
        model: loaded with `attn_implementation="eager"`, which keeps attention weights.
        processor: its processor.
        samples: of `mllm.yardstick.samples`, with at least one object each.
    """
    tower = model.model.vision_tower
    found = []
    for sample in samples:
        pixels = processor.image_processor(sample["image"], return_tensors="pt")["pixel_values"]
        out = tower(pixels.to(model.device, model.dtype), output_attentions=True)
        row = out.attentions[model.config.vision_feature_layer][0, :, 0, 1:].float().mean(0)
        found.append(auc(row.cpu().numpy(), object_patches(sample)))
    return float(np.mean(found))
