"""VTW: no visual token from the middle of the decoder on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mllm.compressors.base import Keep, LayerContext, LayerPruner, Positions, register


@register("vtw", paper="arXiv:2405.05803", stage="llm", reference_layers=32)
@dataclass
class VTW(LayerPruner):
    """Let all visual tokens leave before one decoder layer (Visual Tokens Withdrawal).

    By then, the paper says, the text has taken over what it needs. Nothing is scored; the layer
    is the only choice. The paper finds it with a small calibration set; the default is the middle
    of the decoder.

    Args:
        layer: visual tokens leave before this decoder layer; None is 16 of 32, scaled.
        positions: `original` or `compact`; None is `original`.
    """

    layer: int | None = None
    positions: Positions | None = None

    paper_layer = 16
    identity = None  # some layer always runs without visual tokens

    def act(self, ctx: LayerContext) -> list:
        return [Keep(torch.zeros_like(ctx.visual), [0] * len(ctx.n_images))]
