"""What a method is: what it reads (signals), what it returns (actions), and the two kinds.

A method is a dataclass of hyper-parameters with one method that computes. It imports this
module and torch, and never learns the model's class, padding side or cache layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mllm.errors import PlanError
from mllm.plan import Budget, check_fields, register, resolve

__all__ = [
    "AttentionRows",
    "Budget",
    "CacheCompressor",
    "CacheEvent",
    "Context",
    "Features",
    "Keep",
    "LayerPruner",
    "Merge",
    "Pool",
    "Positions",
    "Resize",
    "TokenReducer",
    "VisionAttention",
    "VisionKeys",
    "Write",
    "register",
    "resolve",
    "top_k",
]

Positions = Literal["original", "compact"]


@dataclass(frozen=True)
class VisionAttention:
    """Attention inside the vision tower, one value per patch: fp32 `[images, patches]`.

    Attributes:
        block: tower block (0-based, negative from the end); None is the block whose output
            feeds the projector.
        query: `"cls"` is the row of [CLS]; `"received"` is the column sum over all rows, the
            substitute for towers without [CLS]; `"auto"` takes [CLS] where there is one.
        heads: `"sum"` or `"mean"` over heads.
    """

    block: int | None = None
    query: Literal["auto", "cls", "received"] = "auto"
    heads: Literal["sum", "mean"] = "sum"


@dataclass(frozen=True)
class VisionKeys:
    """Keys of a tower block, mean over heads: `[images, patches, head_dim]` (see `block`)."""

    block: int | None = None


@dataclass(frozen=True)
class Features:
    """Visual tokens at the stage's own site: `[images, tokens, width]`.

    `cls` adds the [CLS] feature `[images, 1, width]` as ``ctx["cls"]`` where the tower has one.
    """

    cls: bool = False


@dataclass(frozen=True)
class AttentionRows:
    """Post-softmax attention of chosen rows at a decoder layer: fp32 `[batch, rows, keys]`.

    Attributes:
        layer: 0-based decoder layer whose attention is read while it runs.
        rows: `"last"` is the last prompt token of each sample.
        heads: `"mean"`, `"sum"` or `"max"` over heads.
    """

    layer: int
    rows: Literal["last"] = "last"
    heads: Literal["mean", "sum", "max"] = "mean"


@dataclass(frozen=True)
class Keep:
    """Keep the visual rows where `mask` is true: bool `[images, tokens]` or `[batch, rows]`."""

    mask: Tensor


@dataclass(frozen=True)
class Merge:
    """Fold dropped tokens into kept ones: `into` int64 `[images, tokens]`.

    `into[i, t]` is the token that receives `t` (itself if it stays), or -1 if `t` is dropped.
    It describes; the new features come with :class:`Write`.
    """

    into: Tensor


@dataclass(frozen=True)
class Write:
    """New features for kept tokens: `values` `[images, tokens, width]`, read at kept tokens.

    `order`, int64 `[images, tokens]`, is the place of each kept token within its image in the
    sequence; None keeps the order of the grid. It is honoured under ``positions="compact"``.
    """

    values: Tensor
    order: Tensor | None = None


@dataclass(frozen=True)
class Pool:
    """Average-pool the grid of every image to `grid` = (rows, cols)."""

    grid: tuple[int, int]


@dataclass(frozen=True)
class Resize:
    """Shrink the picture itself so that the tower yields `grid` = (rows, cols) tokens."""

    grid: tuple[int, int]


class Context:
    """What a stage may read: its declared signals by name, and the table of tokens.

    Attributes:
        grid: (rows, cols) of every image of this group; None where images are not one plain grid.
        valid: bool `[images, tokens]`, false where an earlier stage dropped the token.
        visual: bool `[batch, rows]`, visual rows that are still there (in-LLM sites).
        images: int64 `[batch]`, images of each sample (in-LLM sites).
    """

    def __init__(
        self,
        stage: Any,
        signals: dict[str, Tensor],
        *,
        grid: tuple[int, int] | None = None,
        valid: Tensor | None = None,
        visual: Tensor | None = None,
        images: Tensor | None = None,
        seeds: Callable[[], list[int]] | None = None,
    ) -> None:
        self.stage, self._signals, self._seeds = stage, signals, seeds
        self.grid, self.valid, self.visual, self.images = grid, valid, visual, images
        self.flops = 0.0

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._signals:
            raise PlanError(
                f"{self.stage.info.name} reads {name!r} but does not declare it in reads()",
                argument="reads",
                given=name,
                expected=", ".join(sorted(self._signals)) or "a declared signal",
            )
        return self._signals[name]

    def __contains__(self, name: str) -> bool:
        return name in self._signals

    def generators(self) -> list[torch.Generator]:
        """One CPU generator per image, seeded by the plan and the image's content.

        So a draw depends neither on the batch an image is in nor on its place there.
        """
        return [torch.Generator().manual_seed(seed) for seed in self._seeds()]

    def book(self, flops: float) -> None:
        """Add the cost of this selection, in FLOPs per image, to the ledger."""
        self.flops += flops


def top_k(scores: Tensor, candidates: Tensor, count: Tensor | int) -> Tensor:
    """Mask of the `count` best candidates per row; ties go to the earlier token.

    Args:
        scores: `[batch, tokens]`.
        candidates: bool `[batch, tokens]`; the others are never taken.
        count: int, or int64 `[batch]`.
    """
    scores = scores.float().masked_fill(~candidates, float("-inf"))
    order = scores.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    limit = count[:, None] if isinstance(count, Tensor) else count
    return candidates & (rank < limit)


class _Method:
    """Shared by both kinds. Subclasses are dataclasses registered with :func:`register`.

    Their field `positions` is None for what the paper does (`paper_positions`) where the model
    can do it.
    """

    site: ClassVar[str]
    paper_positions: ClassVar[Positions]
    actions: ClassVar[tuple[str, ...]] = ("Keep",)
    identity: ClassVar[dict[str, Any] | None] = {"keep": 1.0}
    oracle: ClassVar[str] = "mask"

    def __post_init__(self) -> None:
        check_fields(self)

    def reads(self) -> dict[str, Any]:
        """Signals by the name under which the context gives them."""
        return {}

    def replace(self, **changes: Any) -> Any:
        """A copy with other hyper-parameters."""
        return dataclasses.replace(self, **changes)


class TokenReducer(_Method):
    """A pre-LLM method: it decides which visual tokens reach the language model.

    `site` is where it works: `"pixels"`, `"pre_projector"` or `"post_projector"`.
    `first` marks a method that must be the first pre-LLM stage (it needs the full grid).
    """

    site = "post_projector"
    paper_positions = "compact"
    first: ClassVar[bool] = False

    def reduce(self, ctx: Context) -> list[Any]:
        """Actions for a group of images with the same grid. See :class:`Context`."""
        raise NotImplementedError


class LayerPruner(_Method):
    """An in-LLM method: visual rows leave before decoder layer `layer`.

    Subclasses have the fields `layer: int | None` (None is the paper's layer, scaled to the
    model's depth), `keep` and `positions`, and give `score`.
    """

    site = "decoder"
    paper_positions = "original"
    paper_layer: ClassVar[int]
    first_layer: ClassVar[int] = 0

    def at_depth(self, num_layers: int, first_cut: int = 0) -> LayerPruner:
        """The stage with its layer fixed for a model of `num_layers` layers.

        Rows cannot leave before layer `first_cut` of the model.
        """
        if self.layer is not None:
            return self
        scaled = round(self.paper_layer * num_layers / self.info.reference_layers)
        return self.replace(layer=max(self.first_layer, first_cut, scaled))

    def score(self, ctx: Context) -> Tensor:
        """fp32 `[batch, rows]`: the highest-scored visual rows stay."""
        raise NotImplementedError

    def select(self, ctx: Context) -> Keep:
        """Keep the best `keep` of each sample's visual rows."""
        tokens = ctx.visual.sum(1)
        images = ctx.images
        if isinstance(self.keep, int):
            count = torch.minimum(tokens, self.keep * images)
        else:
            # Counts in Python so that rounding is that of `resolve`, whatever the device.
            count = torch.tensor([resolve(self.keep, n) for n in tokens.tolist()])
        return Keep(top_k(self.score(ctx), ctx.visual, count.to(tokens.device)))


@dataclass(frozen=True)
class CacheEvent:
    """What has happened to a cache; ``event["name"]`` is a declared signal.

    A signal of a decoder layer has one value per token, `[batch, heads, length]` by logical index,
    zero where the layer does not store it. It is there from that layer's `layer_end` on.

    Attributes:
        cache: the :class:`mllm.cache.KVCache` to look at and to change.
        phase: `"prefill"` (a later turn's too), `"decode"` or `"verify"`.
        layer: the layer that has run; None where all have.
        prompt: bool `[batch, rows]`, rows of this forward that belong to the prompt: no padding,
            nothing supervised. Candidates of assisted decoding are not among the rows.
        visual: bool `[batch, rows]`, visual rows of this forward.
        start: logical index of the first row.
        accepted: candidates that stayed (`verify_end`).
    """

    cache: Any
    phase: Literal["prefill", "decode", "verify"]
    signals: dict[str, Tensor]
    layer: int | None = None
    prompt: Tensor | None = None
    visual: Tensor | None = None
    start: int | None = None
    accepted: int | None = None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.signals:
            raise PlanError(
                f"{name!r} was not declared in reads(), or its layer has not run",
                argument="reads",
                given=name,
                expected=", ".join(sorted(self.signals)) or "a declared signal",
            )
        return self.signals[name]


class CacheCompressor(_Method):
    """A method on the KV cache. It overrides the events that it wants and works on `event.cache`.

    Events run without gradients, in the order of the plan's stages. A method keeps nothing on
    itself: what belongs to a slot is a column (`KVCache.annotate`), what belongs to a conversation
    is in `KVCache.state`. `chunk_end` is reserved for chunked prefill, which is refused.

    Attributes:
        group: layers per group, for `group_end`; 0 is none.
    """

    site = "cache"
    paper_positions = "original"
    actions = ("Evict",)
    positions: ClassVar[Positions | None] = None
    group: ClassVar[int] = 0

    def layer_end(self, event: CacheEvent) -> None:
        """Decoder layer `event.layer` has run in a prefill; earlier layers may be cut too."""

    def group_end(self, event: CacheEvent) -> None:
        """The last layer of a group of `group` layers has run in a prefill."""

    def prefill_end(self, event: CacheEvent) -> None:
        """All layers have run over a prompt, a later turn's too."""

    def decode_step(self, event: CacheEvent) -> None:
        """All layers have run over one new token per sample."""

    def verify_end(self, event: CacheEvent) -> None:
        """Assisted decoding: rejected candidates are gone, `event.accepted` have stayed.

        Runs before the next forward. What was evicted on the strength of rejected candidates has
        come back.
        """
