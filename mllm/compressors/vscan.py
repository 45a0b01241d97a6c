"""VScan: a local and a global scan of the picture, merging, then a cut in the middle of the LLM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mllm.compressors.base import (
    AttentionRows,
    Budget,
    Context,
    Features,
    Grid,
    Keep,
    LayerContext,
    LayerPruner,
    Merge,
    Places,
    Positions,
    Preset,
    TokenReducer,
    VisionAttention,
    Write,
    even_shares,
    fill_up,
    merge_rows,
    on_device,
    register,
    remembered,
    resolve,
    top_k_each,
)
from mllm.errors import PlanError


@register("vscan_vision", paper="arXiv:2505.22654", stage="pre_llm")
@dataclass
class VScanVision(TokenReducer):
    """Half of the tokens from every window, half from the whole picture (VScan's first stage).

    The local scan takes equally many tokens of each `window` x `window` cells by the attention of
    [CLS] in a shallow block of the tower, as many as fit into half of the budget; the global scan
    takes the others by [CLS] attention in the block that feeds the projector. Every token that
    goes is averaged, behind the projector, into the kept token with the most similar feature.

    Rows and columns that do not fill a window belong to the last one. Under anyres each tile has
    its share, and tokens merge within their tile. Where the windows do not divide half of the
    budget the authors' code keeps fewer tokens; here the global scan takes them. Without [CLS] the
    scores are the attention that a token receives, as in their code for Qwen2.5-VL, in the nearest
    block that sees the whole picture.

    Args:
        keep: visual tokens kept per image.
        window: side of a window in tokens (the code for Qwen2.5-VL has 4).
        local: block of the local scan as a share of the tower's depth; 5 of 24 in the paper.
        merge: average what goes into what stays.
        positions: `compact` or `original`; None is `compact` (as the paper runs on LLaVA).
    """

    keep: Budget = 0.167
    window: int = 6
    local: float = 5 / 24
    merge: bool = True
    positions: Positions | None = None

    first = True
    actions = ("Keep", "Merge", "Write")
    oracle = "rebuild"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_window(self)
        if not 0 <= self.local <= 1:
            raise PlanError(
                f"vscan_vision: local={self.local!r} is not a share of the depth",
                argument="local",
                given=self.local,
                expected="0 <= local <= 1",
            )

    def reads(self):
        return {
            "features": Features(),
            "local": VisionAttention(block=float(self.local), heads="mean"),
            "global": VisionAttention(heads="mean"),
            "grid": Grid(),
        }

    def reduce(self, ctx: Context) -> list:
        x, places, valid = ctx["features"], ctx["grid"], ctx.valid
        images, tokens, width = x.shape
        budget = resolve(self.keep, tokens)
        part = on_device(places.part, x)
        window, tile = windows(places, self.window)
        shares = even_shares(budget, places.parts)
        of_tile = torch.zeros_like(shares).index_add(0, tile, torch.ones_like(tile))
        local = shares // 2 // of_tile.clamp(min=1)
        keep = top_k_each(ctx["local"], valid, on_device(window, x), on_device(local[tile], x))

        taken = torch.zeros(images, places.parts, dtype=torch.long, device=x.device)
        taken = taken.index_add(1, part, keep.long())
        left = on_device(shares, x) - taken
        keep = keep | top_k_each(ctx["global"], valid & ~keep, part, left)
        keep = fill_up(keep, ctx["global"], valid, budget)

        own = torch.arange(tokens, device=x.device).expand(images, -1)
        actions = [Keep(keep, [budget] * images)]
        if not self.merge:
            return actions
        rows = keep.int().argsort(dim=1, descending=True, stable=True)[:, :budget]
        unit = F.normalize(x.float(), dim=-1)
        like = unit @ unit.gather(1, rows[..., None].expand(-1, -1, width)).transpose(1, 2)
        ctx.book(2 * tokens * budget * width)
        like = like - 4.0 * (part[:, None] != part[rows][:, None])  # another tile only if it must
        into = torch.where(keep, own, rows.gather(1, like.argmax(2)))
        return [*actions, Merge(into), Write(merge_rows(x, into))]


@remembered
def windows(places: Places, side: int) -> tuple[Tensor, Tensor]:
    """The window of each token of a picture, int64 `[tokens]`, and the tile of each window."""
    key = places.part
    for at in (places.row, places.col):
        size = torch.zeros_like(at).scatter_reduce(0, places.tile, at + 1, "amax")[places.tile]
        key = key * 10_000 + torch.minimum(at // side, (size // side).clamp(min=1) - 1)
    found, window = key.unique(return_inverse=True)
    return window, torch.zeros(len(found), dtype=torch.long).scatter(0, window, places.part)


def _check_window(stage: VScanVision | VScan) -> None:
    if stage.window < 1:
        raise PlanError(
            f"{stage.info.name}: window={stage.window}", argument="window", given=stage.window,
            expected="from 1",
        )  # fmt: skip


@register("vscan_llm", paper="arXiv:2505.22654", stage="llm", reference_layers=32)
@dataclass
class VScanLLM(LayerPruner):
    """A third of the tokens from the middle of the decoder on (VScan's second stage).

    The score is the attention that the layer about to run would pay from the last prompt token,
    averaged over heads, as in PyramidDrop.

    Args:
        layer: rows leave before this decoder layer; None is 16 of 32, scaled.
        keep: visual tokens kept, of those that arrive at the layer.
        rope: score rotated queries and keys; the code for Qwen2.5-VL does not.
        positions: `compact` or `original`; None is `compact` (the code for LLaVA).
    """

    layer: int | None = None
    keep: Budget = 1 / 3
    rope: bool = True
    positions: Positions | None = None

    paper_layer = 16
    paper_positions = "compact"

    def reads(self):
        return {"rows": AttentionRows(when="before", rows="last", heads="mean", rope=self.rope)}

    def score(self, ctx: LayerContext) -> Tensor:
        return ctx["rows"][:, 0]


@register("vscan", paper="arXiv:2505.22654", stage="preset")
@dataclass
class VScan(Preset):
    """Two scans of the picture with merging, then a cut in the middle of the decoder (VScan).

    The first stage leaves 1.5 times the budget and the second a third of that for the second half
    of the decoder: 96 and 32 for 64 of 576 tokens. Above two thirds of the picture the first
    stage leaves everything. A number of tokens is written down as two before any picture is seen:
    above two thirds of a picture, the second stage leaves half of that number, and layers see
    fewer than it on average; a fraction is met.

    Args:
        keep: visual tokens per image, averaged over the decoder's layers.
        window: side of a window of the local scan, in tokens.
        layer: decoder layer of the second stage; None is 16 of 32, scaled.
        rope: score the second stage with rotated queries and keys.
        positions: of both stages; None is `compact` (as the paper runs on LLaVA).
    """

    keep: Budget = 0.111
    window: int = 6
    layer: int | None = None
    rope: bool = True
    positions: Positions | None = None

    oracle = "rebuild"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_window(self)

    def expand(self) -> list:
        if isinstance(self.keep, int):
            first = max(1, round(1.5 * self.keep))
            second = max(1, 2 * self.keep - first)
        else:
            first = min(1.0, 1.5 * self.keep)
            second = 1 / 3 if first < 1 else 2 * self.keep - 1
        return [
            VScanVision(keep=first, window=self.window, positions=self.positions),
            VScanLLM(layer=self.layer, keep=second, rope=self.rope, positions=self.positions),
        ]
