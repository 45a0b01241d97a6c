"""MustDrop and its parts: windows merge in the tower, a key set stays, text filters in the decoder,
and the cache forgets what the filters dropped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from mllm.compressors.base import (
    AttentionRows,
    CacheCompressor,
    CacheEvent,
    Context,
    Keep,
    LayerContext,
    LayerMethod,
    Merge,
    Positions,
    Preset,
    Protect,
    TokenReducer,
    TowerContext,
    TowerReducer,
    VisionAttention,
    register,
    top_k,
)
from mllm.errors import PlanError
from mllm.tokens import on_device


@register("windowmerge", paper="arXiv:2411.10803", stage="pre_llm")
@dataclass
class WindowMerge(TowerReducer):
    """Merge windows of like patches behind the first block of the vision tower (MustDrop).

    A window's likeness is the mean cosine of its patches with each other. The windows that are
    most alike become their mean, at the place of their last patch; patches keep the order of the
    picture (the authors put merged ones first). The authors merge all windows above 0.8, as many
    in every image of a batch as in the one that has fewest; here a share of them merges, so that
    an image does not depend on its batch.

    Args:
        share: of the windows that merge.
        window: its rows and columns; what is left over at the edges merges with nothing.
        proportional: whether later blocks attend by size.
        positions: `compact` or `original` (of the last patch); None is `compact`.
    """

    share: float = 0.5
    window: int = 3
    proportional: bool = False
    positions: Positions | None = None

    behind = "block"
    identity = {"share": 0.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share <= 1 or self.window < 2:
            raise PlanError(
                f"windowmerge: share={self.share!r}, window={self.window}",
                argument="share",
                given=self.share,
                expected="0 <= share <= 1, window from 2",
            )

    def blocks(self, depth: int) -> Sequence[int]:
        return (0,)

    def merge(self, ctx: TowerContext) -> Merge:
        x, side = ctx["hidden"], self.window
        images, tokens, width = x.shape
        rows, cols = (n // side for n in ctx.grid)
        own = torch.arange(tokens, device=x.device)
        place = own[ctx.prefix :].view(ctx.grid)[: rows * side, : cols * side]
        place = place.unflatten(1, (cols, side)).unflatten(0, (rows, side))
        place = place.transpose(1, 2).reshape(rows * cols, side**2)  # [windows, patches]
        count = round(self.share * rows * cols)
        total = F.normalize(x.float(), dim=-1)[:, place].sum(2)
        # The mean over ordered pairs is a constant and an increasing function of this.
        alike = total.square().sum(-1)
        merged = top_k(alike, torch.ones_like(alike, dtype=torch.bool), count)
        into = torch.where(merged[..., None], place[:, -1:], place)
        return Merge(own.repeat(images, 1).scatter(
            1, place.flatten().expand(images, -1), into.flatten(1)
        ))  # fmt: skip


@register("keytokens", paper="arXiv:2411.10803", stage="pre_llm")
@dataclass
class KeyTokens(TokenReducer):
    """Protect the visual tokens that [CLS] attends to most in the last tower block (MustDrop).

    No later stage drops or evicts them; none is dropped here. The attention is a mean over heads;
    a tower without [CLS] is scored by what a token receives.

    Args:
        share: of the tokens that are left of an image, rounded up.
        block: tower block; the last, as in the authors' code, though features come from the one
            before.
        positions: those of the other stages before the LLM; None is `compact`.
    """

    share: float = 0.08
    block: int = -1
    positions: Positions | None = None

    actions = ("Protect",)
    identity = {"share": 0.08}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise PlanError(
                f"keytokens: share={self.share!r}", argument="share", given=self.share,
                expected="0 < share <= 1",
            )  # fmt: skip

    def reads(self):
        return {"attention": VisionAttention(block=self.block, heads="mean")}

    def reduce(self, ctx: Context) -> list:
        counts = torch.tensor([math.ceil(self.share * n) for n in ctx.counts()])
        return [Protect(top_k(ctx["attention"], ctx.valid, on_device(counts, ctx.valid)))]


@register("dualfilter", paper="arXiv:2411.10803", stage="llm", reference_layers=32)
@dataclass
class DualFilter(LayerMethod):
    """Drop visual tokens that no text token looks at, neither alone nor together (MustDrop).

    With P the attention (mean over heads) of the text behind the first image in the layer that has
    just run, a visual token goes if its sum over text is below `together` of the sum over all
    visual tokens and its largest entry is below `alone`. How many stay depends on the input; the
    authors' thresholds give 192 (0.001 and 0.001), 128 (0.0012 and 0.001) and 64 (0.011 and 0.01)
    tokens on average on TextVQA. Several images of a sample are one set. Where none would stay,
    the one with the largest sum does. Earlier layers keep what they have stored; see `outputaware`.

    Args:
        together: threshold of a token's share of the attention of all text.
        alone: threshold of the largest attention of one text token.
        layers: rows leave before these decoder layers; None is behind the authors' layers
            2, 6, 10 and 14 of 32, scaled.
        positions: `original` or `compact`; None is `compact`, as in the authors' code.
    """

    together: float = 0.001
    alone: float = 0.001
    layers: tuple[int, ...] | None = None
    positions: Positions | None = None

    paper_positions = "compact"
    paper_layers = (3, 7, 11, 15)
    first_layer = 1
    identity = {"together": 0.0, "alone": 0.0}

    def at_depth(self, num_layers: int, first_cut: int = 0) -> DualFilter:
        if self.layers is not None:
            return self
        layers: list[int] = []
        for paper in self.paper_layers:
            scaled = round(paper * num_layers / self.info.reference_layers)
            after = layers[-1] + 1 if layers else max(self.first_layer, first_cut)
            layers.append(max(after, scaled))
        return self.replace(layers=tuple(x for x in layers if x < num_layers))

    def scaled(self, fixed: DualFilter, depth: int) -> str | None:
        if self.layers is not None:
            return None
        paper, now = ("/".join(map(str, x)) for x in (self.paper_layers, fixed.layers))
        return (
            f"dualfilter: layers {paper} of {self.info.reference_layers} scaled to {now} of {depth}"
        )

    def at(self) -> Sequence[int]:
        return self.paper_layers if self.layers is None else self.layers

    def reads(self):
        return {"rows": AttentionRows(rows="text")}

    def act(self, ctx: LayerContext) -> list:
        rows = ctx["rows"]
        if not rows.shape[1]:
            return []
        total = rows.sum(1).masked_fill(~ctx.visual, 0)
        low = total < self.together * total.sum(1, keepdim=True)
        stay = ctx.visual & (~low | (rows.amax(1) >= self.alone) | ctx.protected)
        return [Keep(stay | (top_k(total, ctx.visual, 1) & ~stay.any(1, keepdim=True)))]


@register("outputaware", paper="arXiv:2411.10803", stage="cache")
@dataclass
class OutputAware(CacheCompressor):
    """Before decoding, layers forget visual tokens that later layers were not given (MustDrop).

    A stage inside the decoder lets tokens go layer by layer, and what layers between its cuts have
    stored by then stays in their caches. Here it leaves, from the layer behind which the first
    tokens went (layer 2 of the authors' 32) to the last cut: they hold what enters the last layer.
    Layers before keep everything, and text stays everywhere. Works beside any method inside the
    decoder; without one nothing leaves.

    Args:
        first: the first layer that forgets; None is the one before the first cut.
    """

    first: int | None = None

    identity = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first is not None and self.first < 0:
            raise PlanError(
                f"outputaware: first={self.first}", argument="first", given=self.first,
                expected="a layer from 0, or none",
            )  # fmt: skip

    def prefill_end(self, event: CacheEvent) -> None:
        if len(event.entered) == 1:
            return
        cuts = [layer for layer, _ in event.entered[1:]]
        first = cuts[0] - 1 if self.first is None else self.first
        layers = range(max(0, first), cuts[-1])
        drop = torch.zeros_like(event.valid)
        drop[:, event.start :] = event.visual & ~event.entered[-1][1]
        event.cache.evict(layers, drop=drop)


@register("mustdrop", paper="arXiv:2411.10803", stage="preset")
@dataclass
class MustDrop(Preset):
    """Merging in the tower, key tokens, filters in the decoder, a cache without what they dropped.

    `together` and `alone` give 192 (0.001 and 0.001), 128 (0.0012 and 0.001) and 64 (0.011 and
    0.01) tokens on average on TextVQA by the authors' code.

    Args:
        together, alone, layers: see :class:`DualFilter`.
        share: windows that merge, see :class:`WindowMerge`; none leaves the tower alone, for models
            whose projector joins patches.
        keys: share of the tokens that no stage drops, see :class:`KeyTokens`.
        positions: of all stages; None is `compact`.
    """

    together: float = 0.001
    alone: float = 0.001
    layers: tuple[int, ...] | None = None
    share: float | None = 0.5
    keys: float = 0.08
    positions: Positions | None = None

    identity = {"together": 0.0, "alone": 0.0, "share": 0.0}
    oracle = "rebuild"

    def expand(self) -> list:
        merging = [] if self.share is None else [
            WindowMerge(share=self.share, positions=self.positions)
        ]  # fmt: skip
        return [
            *merging,
            KeyTokens(share=self.keys, positions=self.positions),
            DualFilter(self.together, self.alone, self.layers, self.positions),
            OutputAware(),
        ]
