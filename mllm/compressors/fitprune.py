"""FitPrune: every layer drops as many tokens as recorded attention says it can do without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mllm.compressors.base import (
    Budget,
    Calibrated,
    ColumnMass,
    LayerContext,
    Positions,
    register,
)
from mllm.errors import PlanError

#: Tokens of 576 that layers 0 to 12 of 32 drop in the authors' scheme for 60 % less compute;
#: later layers drop a few more, which are not known to us.
DROPPED = (14, 33, 89, 36, 36, 20, 55, 21, 18, 4, 7, 5, 2)
LEFT = tuple(round(1 - sum(DROPPED[: i + 1]) / 576, 4) for i in range(len(DROPPED)))


@register(
    "fitprune",
    paper="arXiv:2409.10197",
    stage="llm",
    reference_layers=32,
    licence_note="written from the paper; the authors' code has no licence",
)
@dataclass
class FitPrune(Calibrated):
    """Drop a few tokens behind every layer by its self- and cross-attention (FitPrune).

    The score is the attention that a token has just received from the visual tokens times that
    from the text behind the first image; over heads the maximum. How many tokens each layer drops
    is fitted to recorded attention, by :func:`mllm.calibrate` for any model.

    The authors drop inside a layer, between attention and MLP. Rows leave here before the next
    layer: what stays is the same, and the dropped tokens have cost one MLP more. Without a file
    the schedule is that part of the one that the authors ship for LLaVA-1.5; on other depths
    its layers are scaled, and of those that fall together the last counts.

    Args:
        layers: rows leave before these decoder layers; None is 1 to 13 of 32, scaled.
        keep: budget of each layer: tokens per image, or a fraction of those that entered.
        calibration: file of :func:`mllm.calibrate` with layers and budgets.
        positions: `original` or `compact`; None is `original` (the code).
    """

    layers: tuple[int, ...] | None = None
    keep: tuple[Budget, ...] = LEFT
    calibration: str | None = None
    positions: Positions | None = None

    paper_layers = tuple(range(1, len(LEFT) + 1))
    first_layer = 1
    identity = {"keep": (1.0,) * len(LEFT)}

    def at_depth(self, num_layers: int, first_cut: int = 0) -> FitPrune:
        if self.layers is not None:
            return self
        found: dict[int, Budget] = {}
        for paper, keep in zip(self.paper_layers, self.keep, strict=True):
            scaled = round(paper * num_layers / self.info.reference_layers)
            found[max(self.first_layer, first_cut, scaled)] = keep
        return self.replace(layers=tuple(found), keep=tuple(found.values()))

    def reads(self):
        return {
            "own": ColumnMass(rows="visual", heads="max"),
            "cross": ColumnMass(rows="text", heads="max"),
        }

    def score(self, ctx: LayerContext) -> Tensor:
        return ctx["own"] * ctx["cross"]

    observes = reads

    def observe(self, ctx: LayerContext) -> list[Tensor]:
        both = torch.stack([ctx["own"], ctx["cross"]], 1).cpu()
        visual = ctx.visual.cpu()
        return [mass[:, here] for mass, here in zip(both, visual, strict=True)]

    def fit(self, seen: list[list[Tensor]], share: float | None) -> dict[str, Any]:
        masses = [torch.stack(layers) for layers in seen]
        left = fit(masses, 0.4 if share is None else share)
        return {"layers": tuple(range(1, len(left) + 1)), "keep": left}


def fit(masses: Sequence[Tensor], share: float, tolerance: float = 0.01) -> tuple[float, ...]:
    """The fraction of tokens to keep behind every layer, from recorded attention.

    For a share `alpha` of the attention that may be lost, each layer drops, of the tokens that are
    still there, those that are both among its least for self-attention and among its least for
    cross-attention, as many of each as together hold `alpha` of the layer's total. The smallest
    `alpha` that meets `share` is found by bisection; counts are means over the samples. (The
    authors forecast FLOPs; here it is the layer average of tokens.)

    Args:
        masses: `[layers, 2, tokens]` per sample, attention received from visual tokens and from
            text, in every layer but the last.
        share: visual tokens that layers see on average, as a fraction; the first sees all.
        tolerance: of `alpha`.

    Returns:
        Fractions behind each layer but the last.

    Raises:
        PlanError: less than one layer's worth of tokens is asked for.
    """
    depth = masses[0].shape[0] + 1
    low, high, best = 0.0, 1.0, _left(masses, 1.0)
    least = (1 + sum(best)) / depth
    if not least <= share <= 1:
        raise PlanError(
            f"fitprune: layers cannot see {share:g} of the tokens on average; the first of {depth} "
            f"sees all, so the least is {least:.3f}",
            argument="share",
            given=share,
            expected=f"{least:.3f} <= share <= 1",
        )
    while high - low > tolerance:
        alpha = (low + high) / 2
        left = _left(masses, alpha)
        if (1 + sum(left)) / depth <= share:
            high, best = alpha, left
        else:
            low = alpha
    return best


def _left(masses: Sequence[Tensor], alpha: float) -> tuple[float, ...]:
    """The mean fraction of tokens that is left behind each layer but the last."""
    total = torch.zeros(len(masses[0]), dtype=torch.float64)
    for sample in masses:
        there = torch.ones(sample.shape[2], dtype=torch.bool)
        for layer, (own, cross) in enumerate(sample):
            there = there & ~(_least(own, there, alpha) & _least(cross, there, alpha))
            total[layer] += there.double().mean() / len(masses)
    # A budget is above zero: the last token of a picture does not go.
    return tuple(max(round(x, 6), 1e-3) for x in total.tolist())


def _least(mass: Tensor, there: Tensor, alpha: float) -> Tensor:
    """The smallest values of the tokens that are there which hold at most `alpha` of the total."""
    order = mass.masked_fill(~there, torch.inf).argsort(stable=True)
    held = mass.double().masked_fill(~there, 0)[order].cumsum(0)
    few = held <= alpha * mass.double().sum()
    return torch.zeros_like(there).scatter(0, order, few) & there
