"""What a method is: what it reads (signals), what it returns (actions), and the kinds.

A method is a dataclass of hyper-parameters with one method that computes. It imports this
module and torch, and never learns the model's class, padding side or cache layout. Signals are
listed in :mod:`mllm.signals` and actions in :mod:`mllm.actions`; both are found here too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mllm.actions import (
    Attend,
    BranchGate,
    BranchRows,
    Evict,
    HeadGate,
    Inject,
    Insert,
    Keep,
    LayerGate,
    LogitBias,
    Merge,
    Pool,
    Protect,
    Resize,
    Turn,
    Write,
)
from mllm.errors import PlanError
from mllm.plan import Budget, check_fields, register, resolve, schedule_for_average
from mllm.signals import (
    AttentionRows,
    BlockFeatures,
    ColumnMass,
    Features,
    Grid,
    Hidden,
    Joint,
    Keys,
    Queries,
    Rotary,
    TextEmbeds,
    Unprojected,
    Unreduced,
    Values,
    Views,
    VisionAttention,
    VisionKeys,
)
from mllm.tokens import Places, TokenTable, along, locate, on_device

if TYPE_CHECKING:
    from mllm.routers.account import Routing

__all__ = [
    "Attend",
    "AttentionRows",
    "BlockFeatures",
    "BranchGate",
    "BranchRows",
    "Budget",
    "CacheCompressor",
    "CacheEvent",
    "Calibrated",
    "ColumnMass",
    "Context",
    "Evict",
    "Features",
    "Fittable",
    "Grid",
    "HeadGate",
    "Hidden",
    "Inject",
    "Insert",
    "Joint",
    "Keep",
    "Keys",
    "LayerContext",
    "LayerGate",
    "LayerMethod",
    "LayerPruner",
    "LayerSchedule",
    "LogitBias",
    "Merge",
    "Places",
    "Pool",
    "Positions",
    "Preset",
    "Protect",
    "Queries",
    "Resize",
    "Rotary",
    "TextEmbeds",
    "TokenReducer",
    "TowerContext",
    "TowerReducer",
    "Turn",
    "Unprojected",
    "Unreduced",
    "Values",
    "Views",
    "VisionAttention",
    "VisionKeys",
    "Write",
    "even_shares",
    "farthest",
    "fill_up",
    "merge_rows",
    "on_device",
    "register",
    "resolve",
    "top_k",
    "top_k_each",
]

Positions = Literal["original", "compact"]


class Context:
    """What a stage may read: its declared signals by name, and what it knows of the tokens.

    Attributes:
        grid: (rows, cols) of every image of this group; None where images are not one plain grid.
        valid: bool `[images, tokens]`, false where an earlier stage dropped the token.
        remarks: of the stage, for the ledger; see :meth:`remark`.
    """

    def __init__(
        self,
        stage: Any,
        signals: dict[str, Any],
        *,
        grid: tuple[int, int] | None = None,
        valid: Tensor | None = None,
        seeds: Callable[[], list[int]] | None = None,
        counts: list[int] | None = None,
        route: Callable[..., Tensor] | None = None,
        project: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.stage, self._signals, self._seeds = stage, signals, seeds
        self._project = project
        self.grid, self.valid, self._counts, self._route = grid, valid, counts, route
        self.flops: Any = 0.0
        self.remarks: list[str] = []

    def __getitem__(self, name: str) -> Any:
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

    def route(self, part: str, x: Tensor, *more: Any) -> Tensor:
        """What a trained part of the stage makes of `x`; see `parts` of the kinds of stages."""
        return self._route(x, part, *more)

    def remark(self, text: str) -> None:
        """Add a fact to the ledger of this forward."""
        self.remarks.append(f"{self.stage.info.name}: {text}")

    def project(self, x: Tensor) -> Tensor:
        """What the model's projector makes of tokens that are like `Unprojected`; see `projects`.

        Args:
            x: `[images, n, width]`.
        """
        return self._project(x)

    def generators(self) -> list[torch.Generator]:
        """One CPU generator per image (in the LLM: per sample), seeded by plan and pictures.

        So a draw depends neither on the batch that a sample is in nor on its place there.

        Raises:
            PlanError: the method does not declare that it `draws`.
        """
        if not self.stage.draws:
            raise PlanError(
                f"{self.stage.info.name} draws random numbers but does not declare it",
                argument="draws",
                given=False,
                expected="draws = True in the class",
            )
        return [torch.Generator().manual_seed(seed) for seed in self._seeds()]

    def counts(self) -> list[int]:
        """Visual tokens that are still there, of each image or sample.

        Asks the device only where an earlier stage did not say what it keeps.
        """
        if self._counts is None:
            self._counts = self._there().sum(1).tolist()
        return self._counts

    def at_most(self, tokens: int) -> list[int]:
        """`tokens` of each image, or what is there of it."""
        return [min(tokens, there) for there in self.counts()]

    def _there(self) -> Tensor:
        return self.valid

    def book(self, flops: float | Sequence[float]) -> None:
        """Add the cost of this selection to the ledger, in FLOPs per image.

        One number is every image's, several are one for each. In the LLM it is one number, per
        sample with images.
        """
        self.flops = self.flops + (flops if isinstance(flops, int | float) else np.array(flops))


class TowerContext(Context):
    """What a tower stage reads at one block.

    ``ctx["keys"]`` are the block's keys, mean over heads: `[images, tokens, head_dim]`;
    ``ctx["hidden"]`` is what would enter its MLP, or what the block has made (see
    :attr:`TowerReducer.behind`), not normalised: `[images, tokens, width]`.

    Attributes:
        block: 0-based tower block.
        depth: blocks whose output the projector sees, as :meth:`TowerReducer.blocks` is given.
        patches: patches of an image before any block.
        grid: their (rows, cols).
        prefix: tokens at the start that are no patches ([CLS]); they must stay.
        size: fp32 `[images, tokens]`, how many original tokens each stands for.
    """

    def __init__(
        self, stage: Any, keys: Tensor, hidden: Tensor, *, block: int, depth: int,
        grid: tuple[int, int], prefix: int, size: Tensor,
    ) -> None:  # fmt: skip
        super().__init__(stage, {"keys": keys, "hidden": hidden}, grid=grid)
        self.block, self.depth, self.patches = block, depth, grid[0] * grid[1]
        self.prefix, self.size = prefix, size


class LayerContext(Context):
    """What an in-LLM stage may read at one decoder layer.

    `rows` are those that arrive at the layer, padding included.

    Attributes:
        layer: 0-based decoder layer that is about to run; `num_layers` behind the last.
        num_layers: decoder layers of the model.
        visual: bool `[batch, rows]`, visual rows that are still there, without separators.
        text: bool `[batch, rows]`, text of the prompt.
        answers: bool `[batch, rows]`, rows behind the prompt: answers that are supervised, rows of
            later steps.
        decoding: whether there are no others, and the prompt is in the cache; only stages that set
            `decodes` are asked then.
        prompt: bool `[batch, rows]`, visual and text; no padding, no candidates of assisted
            decoding, nothing that is supervised.
        protected: bool `[batch, rows]`, rows that an action protects.
        images: int64 `[batch]`, images of each sample; `n_images` are the same as ints.
        entered: int64 `[batch]`, visual tokens that entered the decoder, without separators;
            `n_entered` are the same as ints.
        logical: int64 `[batch, rows]`, index in the uncompressed sequence.
        index: int64 `[batch, rows]`, row of this forward's own input.
        size: float32 `[batch, rows]`, how many original tokens a row stands for.
        state: dict of the stage's own, empty at the start of every forward.
    """

    def __init__(
        self,
        stage: Any,
        signals: dict[str, Any],
        *,
        layer: int,
        num_layers: int,
        table: TokenTable,
        visual: Tensor,
        prompt: Tensor,
        protected: Tensor,
        images: list[int],
        entered: list[int],
        state: dict[str, Any],
        queries: dict[str, Tensor],
        width: int,
        counts: list[int] | None = None,
        seeds: Callable[[], list[int]] | None = None,
        route: Callable[..., Tensor] | None = None,
        routing: Routing | None = None,
        number: int = 0,
        answers: Tensor | None = None,
        decoding: bool = False,
        answer_loss: Callable[[Tensor], Tensor] | None = None,
        seed_for: Callable[..., int] | None = None,
        attention_input: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(stage, signals, counts=counts, seeds=seeds, route=route)
        self._routing, self._number, self._seed_for = routing, number, seed_for
        self._attention_input = attention_input
        self.layer, self.num_layers = layer, num_layers
        self.visual, self.prompt, self.protected = visual, prompt, protected
        self.text = prompt & ~table.visual
        self.answers, self.decoding, self._answer_loss = answers, decoding, answer_loss
        self.n_images, self.n_entered, self.state = images, entered, state
        self.images = on_device(torch.tensor(images), visual)
        self.entered = on_device(torch.tensor(entered), visual)
        self.logical, self.index, self.size = table.logical, table.index, table.size
        self._queries, self._width = queries, width

    def _there(self) -> Tensor:
        return self.visual

    def attention_input(self, x: Tensor) -> Tensor:
        """What this layer's attention would be given if `x` `[batch, n, width]` entered it."""
        return self._attention_input(x)

    @property
    def learns(self) -> bool:
        """Whether the model learns from this forward, auxiliary losses included."""
        return self._routing is not None and self._routing.learns

    @property
    def learnt(self) -> int:
        """Forwards that the model has learnt from before this one; see `Patched.learnt`."""
        return self._routing.learnt

    def seed_for(self, *more: int) -> int:
        """A seed that the plan's seed, the stage's place in the plan, and `more` decide."""
        return self._seed_for(*more)

    def answer_loss(self, hidden: Tensor) -> Tensor:
        """The answers' loss if these hidden states left the last layer: a mean over tokens.

        Of samples with images; only where the model learns.

        Args:
            hidden: `[batch, rows, width]`.
        """
        return self._answer_loss(hidden)

    def penalise(self, name: str, loss: Tensor, coefficient: float) -> None:
        """Add an auxiliary loss to the model's, in training.

        Args:
            name: under which `patched.losses` has it.
            loss: scalar, a mean over what it speaks of in this process.
            coefficient: what it is multiplied by.
        """
        if self.learns:
            self._routing.penalise(self._number, self.layer, name, loss, coefficient)

    def note(self, **sums: Tensor) -> None:
        """Statistics of a router at this layer; see :mod:`mllm.routers.stats`."""
        if self._routing is not None:
            self._routing.note(self._number, self.layer, **sums)

    def queries(self, name: str) -> Tensor:
        """Rows of the queries of an AttentionRows signal: int64 `[batch, queries]`, -1 fills up."""
        return self._queries[name]

    def budget(self, keep: Budget, tokens: Sequence[int]) -> tuple[list[int], Tensor]:
        """Visual rows that a budget leaves of each sample, at most what is there.

        Args:
            keep: tokens per image, or a fraction of `tokens`.
            tokens: of each sample.

        Returns:
            The counts, and the same as int64 `[batch]`.
        """
        # In Python, so that rounding is that of `resolve` and the device is not asked.
        wanted = [resolve(keep, n, i) for n, i in zip(tokens, self.n_images, strict=True)]
        counts = [min(n, there) for n, there in zip(wanted, self.counts(), strict=True)]
        return counts, on_device(torch.tensor(counts), self.visual)

    def bring(self, x: Tensor, index: Tensor) -> Tensor:
        """What was kept over the rows of an earlier layer, over the rows of this one.

        Args:
            x: `[batch, rows then, ...]`.
            index: `ctx.index` of then.
        """
        return along(x, locate(self.index, index, self._width), 1)


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


def top_k_each(scores: Tensor, candidates: Tensor, part: Tensor, count: Tensor) -> Tensor:
    """Mask of the best candidates of every part; ties go to the earlier token.

    Args:
        scores, candidates: as in :func:`top_k`.
        part: int64 `[tokens]`, from 0.
        count: int64 `[parts]` or `[batch, parts]`, of each part.
    """
    scores = scores.float().masked_fill(~candidates, float("-inf"))
    order = scores.argsort(dim=1, descending=True, stable=True)
    ranked, parts = part[order], torch.arange(count.shape[-1], device=order.device)
    among = (ranked[..., None] == parts).int().cumsum(1).gather(2, ranked[..., None])[..., 0] - 1
    rank = torch.empty_like(order).scatter_(1, order, among)
    return candidates & (rank < count.expand(len(scores), -1)[:, part])


def fill_up(chosen: Tensor, scores: Tensor, candidates: Tensor, count: int) -> Tensor:
    """`chosen` and the best other candidates, `count` in all: bool `[batch, tokens]`."""
    return chosen | top_k(scores, candidates & ~chosen, count - chosen.sum(1))


def farthest(
    distance: Tensor, among: Tensor, count: Tensor | int, steps: int, chosen: Tensor | None = None
) -> Tensor:
    """Mask of `chosen` and, one by one, of the candidates farthest from what is chosen by then.

    Greedy max-min. With nothing chosen, the candidate with the most distant nearest neighbour is
    the first. Ties go to the earlier token.

    Args:
        distance: fp32 `[batch, tokens, tokens]`, symmetric.
        among: bool `[batch, tokens]`, candidates.
        count: int, or int64 `[batch]`; in all, with what is chosen already.
        steps: picks, at most; known on the host, so that the device is not asked.
        chosen: bool `[batch, tokens]`; None is nothing.
    """
    chosen = torch.zeros_like(among) if chosen is None else chosen
    apart = distance.masked_fill(~among[:, None], float("inf"))
    apart.diagonal(dim1=1, dim2=2).fill_(float("inf"))
    empty, limit = ~chosen.any(1, keepdim=True), count
    if isinstance(count, Tensor):
        limit = count[:, None]
    left = limit - chosen.sum(1, keepdim=True)
    nearest = distance.masked_fill(~chosen[:, None], float("inf")).amin(2)
    nearest = torch.where(empty, apart.amin(2), nearest)
    nearest = nearest.masked_fill(~among | chosen, float("-inf"))
    for step in range(steps):
        pick = nearest.argmax(1, keepdim=True)
        more = (nearest.gather(1, pick) > float("-inf")) & (step < left)
        to = distance.gather(1, pick[..., None].expand(-1, -1, distance.shape[2]))[:, 0]
        shrunk = torch.minimum(nearest, to)
        if step == 0:  # the first pick starts the distances to the chosen set
            shrunk = torch.where(empty, to.masked_fill(~among, float("-inf")), shrunk)
        nearest = shrunk.scatter(1, pick, float("-inf"))
        chosen = chosen.scatter(1, pick, chosen.gather(1, pick) | more)
    return chosen


def even_shares(count: int, parts: int) -> Tensor:
    """`count` split over parts as evenly as whole numbers can be: int64 `[parts]`."""
    return (torch.arange(parts + 1) * count // parts).diff()


def merge_rows(values: Tensor, into: Tensor, weight: Tensor | None = None) -> Tensor:
    """Weighted means: a token that receives becomes the mean of itself and its members.

    Args:
        values: `[batch, tokens, width]`.
        into: int64 `[batch, tokens]`, as in :class:`Merge`; a token with -1 counts nowhere.
        weight: `[batch, tokens]`, for example `ctx.size`; None is 1.

    Returns:
        `[batch, tokens, width]`, to be read at the tokens that receive; differentiable.
    """
    weight = torch.ones_like(into, dtype=torch.float32) if weight is None else weight.float()
    weight = weight.masked_fill(into < 0, 0)
    at = into.clamp(min=0)
    total = torch.zeros_like(weight).scatter_add(1, at, weight)
    summed = torch.zeros_like(values, dtype=torch.float32).scatter_add(
        1, at[..., None].expand_as(values), values.float() * weight[..., None]
    )
    return (summed / total.clamp(min=1e-12)[..., None]).to(values.dtype)


class _Method:
    """Shared by all kinds. Subclasses are dataclasses registered with :func:`register`.

    Their field `positions` is None for what the paper does (`paper_positions`) where the model
    can do it. `draws` says that a method uses random numbers: its results depend on the plan's
    seed, so sweeps repeat it for every seed.
    """

    site: ClassVar[str]
    paper_positions: ClassVar[Positions]
    actions: ClassVar[tuple[str, ...]] = ("Keep",)
    identity: ClassVar[dict[str, Any] | None] = {"keep": 1.0}
    oracle: ClassVar[str] = "mask"
    draws: ClassVar[bool] = False
    #: Fields that texts and tables name even at their defaults.
    named: ClassVar[tuple[str, ...]] = ()
    #: Fields that what is learnt does not depend on: an adapter serves all their values.
    free: ClassVar[tuple[str, ...]] = ()
    #: What is learnt serves training alone: runs behind it, and inference, go without it.
    scaffold: ClassVar[bool] = False

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
    `replaces` marks one that projects by itself: the model's projector is given nothing.
    `projects` marks one that gives the projector tokens of its own too; see `ctx.project`.
    """

    site = "post_projector"
    paper_positions = "compact"
    first: ClassVar[bool] = False
    replaces: ClassVar[bool] = False
    projects: ClassVar[bool] = False

    def parts(self, width: int, tower: tuple[int, int]) -> dict[str, nn.Module]:
        """What the stage learns, by name; see `ctx.route`.

        A part has a method `flops` of the arguments of its forward: its cost for one image.

        Args:
            width: of the language model's hidden states.
            tower: widths of :class:`Unprojected` and of one block of :class:`BlockFeatures`.
        """
        return {}

    def in_training(self, seed: int, step: int) -> list[TokenReducer]:
        """The stages that training runs in place of this one; their losses are averaged.

        Args:
            seed: of the stage.
            step: forwards learnt from before, the same in all processes.
        """
        return [self]

    def reduce(self, ctx: Context) -> list[Any]:
        """Actions for a group of images with the same grid. See :class:`Context`."""
        raise NotImplementedError


class TowerReducer(_Method):
    """A method inside the vision tower: tokens merge at some of its blocks.

    Only where every projected token comes from one tower token. Subclasses have the fields that
    they need and `positions`, and give `blocks` and `merge`. A merged token is the mean of its
    members, weighted by size; if `proportional`, attention adds log(size) to its logits. Tokens
    merge `behind` the attention of a block, before its MLP, or behind the whole block.
    """

    site = "tower"
    paper_positions = "compact"
    actions = ("Merge",)
    oracle = "reference"
    proportional: ClassVar[bool] = True
    behind: ClassVar[Literal["attention", "block"]] = "attention"

    def blocks(self, depth: int) -> Sequence[int]:
        """0-based tower blocks at which tokens merge, of the `depth` that the projector sees."""
        raise NotImplementedError

    def merge(self, ctx: TowerContext) -> Merge:
        """The token that each token goes into: int64 `[images, tokens]`, [CLS] included.

        A merged token has the place of the one that receives; every image must keep equally many.
        """
        raise NotImplementedError


class LayerMethod(_Method):
    """An in-LLM method: it acts before some decoder layers and returns actions.

    Subclasses have the field `positions`, list their `actions`, and give `at` and `act`. One
    stage may act at many layers; `ctx.layer` tells where it is. It runs without gradients unless
    `differentiable`. It is asked in forwards with pictures, and if it `decodes`, of samples that
    have had some, in those that follow: then it may read `Hidden` and must not move rows.
    """

    site = "decoder"
    paper_positions = "original"
    first_layer: ClassVar[int] = 0
    differentiable: ClassVar[bool] = False
    decodes: ClassVar[bool] = False

    def parts(self, width: int, heads: int) -> dict[str, nn.Module]:
        """What the stage learns, by name; see `ctx.route`.

        A part may have a method `flops` of the arguments of its forward: its cost for one sample.

        Args:
            width: of hidden states.
            heads: of queries, of a layer.
        """
        return {}

    def parts_of(self, family: Any) -> dict[str, nn.Module]:
        """:meth:`parts` of a model; a stage whose parts start as the model's own overrides it.

        Args:
            family: the adapter of the model's family.
        """
        config = family.text_config
        return self.parts(config.hidden_size, config.num_attention_heads)

    def at_depth(self, num_layers: int, first_cut: int = 0) -> LayerMethod:
        """The stage with its layers fixed for a model of `num_layers` layers.

        Rows cannot leave before layer `first_cut` of the model.
        """
        return self

    def scaled(self, fixed: Any, depth: int) -> str | None:
        """A note for the ledger if :meth:`at_depth` has scaled the paper's layers."""
        return None

    def at(self) -> Sequence[int]:
        """Decoder layers before which the stage acts; the number of layers is behind the last."""
        raise NotImplementedError

    def act(self, ctx: LayerContext) -> list[Any]:
        """Actions before layer `ctx.layer`. See :class:`LayerContext`."""
        raise NotImplementedError

    def score(self, ctx: LayerContext) -> Tensor:
        """fp32 `[batch, rows]`: the highest-scored visual rows stay."""
        raise NotImplementedError

    def keep_best(self, ctx: LayerContext, keep: Budget, tokens: Sequence[int]) -> Keep:
        """Keep the best-scored visual rows: protected ones first, then ties to the earlier.

        Args:
            ctx: the context.
            keep: budget: tokens per image, or a fraction of `tokens`.
            tokens: of each sample.
        """
        counts, limit = ctx.budget(keep, tokens)
        score = self.score(ctx).float().masked_fill(ctx.protected, float("inf"))
        return Keep(top_k(score, ctx.visual, limit), counts)


class LayerPruner(LayerMethod):
    """An in-LLM method with one cut: visual rows leave before decoder layer `layer`.

    Subclasses have the fields `layer: int | None` (None is the paper's layer, scaled to the
    model's depth), `keep` and `positions`, and give `score`.
    """

    paper_layer: ClassVar[int]

    def at_depth(self, num_layers: int, first_cut: int = 0) -> LayerPruner:
        if self.layer is not None:
            return self
        scaled = round(self.paper_layer * num_layers / self.info.reference_layers)
        return self.replace(layer=max(self.first_layer, first_cut, scaled))

    def scaled(self, fixed: Any, depth: int) -> str | None:
        if self.layer is not None:
            return None
        return (
            f"{self.info.name}: layer {self.paper_layer} of {self.info.reference_layers} scaled to "
            f"layer {fixed.layer} of {depth}"
        )

    def at(self) -> Sequence[int]:
        return (self.layer,)

    def leaving(self, count: int, tokens: int) -> LayerPruner:
        """This method, leaving `count` of an image's `tokens` visual tokens behind its cut."""
        return self.replace(keep=count)

    def act(self, ctx: LayerContext) -> list[Any]:
        return [self.select(ctx)]

    def select(self, ctx: LayerContext) -> Keep:
        """Keep the best `keep` of each sample's visual rows that arrive."""
        return self.keep_best(ctx, self.keep, ctx.counts())


class LayerSchedule(LayerMethod):
    """An in-LLM method with several cuts, each with its own budget.

    Subclasses have the fields `layers: tuple[int, ...] | None` (None are the paper's, scaled to
    the model's depth), `keep: tuple[Budget, ...]`, one for each layer, and `positions`, and give
    `score`. A fraction is of the visual tokens that entered the decoder.
    """

    paper_layers: ClassVar[tuple[int, ...]]

    def __post_init__(self) -> None:
        super().__post_init__()
        layers = self.paper_layers if self.layers is None else self.layers
        if len(layers) != len(self.budgets()):
            raise PlanError(
                f"{self.info.name}: {len(layers)} layers and {len(self.budgets())} budgets",
                argument="keep",
                given="/".join(map(str, self.budgets())),
                expected="one budget for each layer",
            )

    def at_depth(self, num_layers: int, first_cut: int = 0) -> LayerSchedule:
        if self.layers is not None:
            return self
        layers: list[int] = []
        for paper in self.paper_layers:
            scaled = round(paper * num_layers / self.info.reference_layers)
            after = layers[-1] + 1 if layers else 0
            layers.append(max(self.first_layer, first_cut, after, scaled))
        return self.replace(layers=tuple(layers))

    def scaled(self, fixed: Any, depth: int) -> str | None:
        if self.layers is not None:
            return None
        paper, now = ("/".join(map(str, x)) for x in (self.paper_layers, fixed.layers))
        return (
            f"{self.info.name}: layers {paper} of {self.info.reference_layers} scaled to {now} "
            f"of {depth}"
        )

    def at(self) -> Sequence[int]:
        return self.layers

    def act(self, ctx: LayerContext) -> list[Any]:
        return [self.select(ctx)]

    def select(self, ctx: LayerContext) -> Keep:
        """Keep the best of each sample's visual rows, as many as the budget of this layer says."""
        return self.keep_best(ctx, self.budgets()[self.layers.index(ctx.layer)], ctx.n_entered)

    def budgets(self) -> tuple[Budget, ...]:
        """The budget of every layer."""
        return self.keep

    def for_average(self, average: float, tokens: int, num_layers: int) -> LayerSchedule:
        """The schedule of the same shape under which layers see `average` tokens per image.

        See :func:`mllm.plan.schedule_for_average`.
        """
        fixed = self.at_depth(num_layers)
        keep = schedule_for_average(average, tokens, fixed.layers, num_layers, fixed.budgets())
        return fixed.replace(keep=keep)


class Fittable:
    """What :func:`mllm.calibrate` fits to what a model does on samples; beside a method's kind.

    Such methods also have the field `calibration: str | None`, a file that says everything else of
    the stage but its `positions`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibration is None:
            return
        for other in dataclasses.fields(self):
            value = getattr(self, other.name)
            if other.name not in ("calibration", "positions") and value != other.default:
                raise PlanError(
                    f"{self.info.name}: {other.name}={value!r} beside a calibration file, which "
                    "says it",
                    argument=other.name,
                    given=value,
                    expected="calibration alone",
                )

    def fit(self, seen: list[list[Tensor]], share: float | None) -> dict[str, Any]:
        """Fields of the fitted stage: what changes.

        Args:
            seen: per sample with images what `observe` gave at one layer after another.
            share: of the tokens that layers see, or store, on average; None is the method's own.

        Raises:
            PlanError: the share cannot be reached.
        """
        raise NotImplementedError


class Calibrated(Fittable, LayerSchedule):
    """A schedule that :func:`mllm.calibrate` fits: its `layers`, and what else changes.

    `share` is of the visual tokens. Decoder layers are seen from the second on.
    """

    def observes(self) -> dict[str, Any]:
        """Signals that are read before every decoder layer but the first, by name."""
        raise NotImplementedError

    def observe(self, ctx: LayerContext) -> list[Tensor]:
        """What is recorded at one layer: a tensor per sample of the batch, on the CPU."""
        raise NotImplementedError


class Preset(_Method):
    """A whole paper under one name: the stages that it consists of, with their budgets.

    A plan is written with the name and runs the stages, which the ledger lists. A field `keep`
    is the paper's own budget: visual tokens per image, averaged over the decoder's layers.
    """

    site = "several"

    def expand(self) -> list[Any]:
        """The stages, in the order in which they run."""
        raise NotImplementedError

    def reads(self):
        return {
            f"{stage.info.name}.{name}": signal
            for stage in self.expand()
            for name, signal in stage.reads().items()
        }

    @property
    def actions(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(a for stage in self.expand() for a in stage.actions))

    @property
    def paper_positions(self) -> Positions:
        return self.expand()[0].paper_positions


@dataclass(frozen=True)
class CacheEvent:
    """What has happened to a cache; ``event["name"]`` is a declared signal.

    A signal of a decoder layer has one value per token, `[batch, heads, length]` by logical index,
    zero where the layer does not store it. It is there from that layer's `layer_end` on. One that
    is declared without a layer is read at all of them: it is there at the `layer_end` of each, and
    as ``event["name", layer]`` at a `decode_step`.

    Attributes:
        cache: the :class:`mllm.cache.KVCache` to look at and to change.
        phase: `"prefill"` (a later turn's too), `"decode"` or `"verify"`.
        layer: the layer that has run; None where all have.
        prompt: bool `[batch, rows]`, rows of this forward that belong to the prompt: no padding,
            nothing supervised. Candidates of assisted decoding are not among the rows.
        visual: bool `[batch, rows]`, visual rows of this forward.
        start: logical index of the first row.
        accepted: candidates that stayed (`verify_end`).
        valid: bool `[batch, length]`, tokens of the conversation that are no padding, by logical
            index.
        lengths: how many these are of each sample; None while decoding.
        protected: bool `[batch, rows]`, rows of this forward that an action protects; None is none.
        entered: of every part of the decoder that has run, its first layer and the rows of this
            forward that entered it, bool `[batch, rows]`.
        begins, ends: whether the prompt begins, and ends, with this forward; a prompt that is read
            in chunks has several.
        notes, costs: of the ledger; see :meth:`note` and :meth:`book`.
        seeds: what :meth:`generators` are seeded with.
    """

    cache: Any
    phase: Literal["prefill", "decode", "verify"]
    signals: dict[Any, Tensor]
    layer: int | None = None
    prompt: Tensor | None = None
    visual: Tensor | None = None
    start: int | None = None
    accepted: int | None = None
    valid: Tensor | None = None
    lengths: list[int] | None = None
    protected: Tensor | None = None
    entered: Sequence[tuple[int, Tensor]] = ()
    begins: bool = True
    ends: bool = True
    notes: list[str] = dataclasses.field(default_factory=list)
    costs: list[float] = dataclasses.field(default_factory=list)
    seeds: Callable[[int], list[int]] | None = None

    def generators(self, number: int = 0) -> list[torch.Generator]:
        """One CPU generator per sample, seeded by plan, pictures and `number`; see `draws`.

        So a draw depends neither on the batch that a sample is in nor on its place there.
        """
        return [torch.Generator().manual_seed(seed) for seed in self.seeds(number)]

    def book(self, flops: float) -> None:
        """Add the cost of a choice to the ledger, in FLOPs per sample."""
        self.costs.append(flops)

    def note(self, text: str) -> None:
        """Add a fact to the ledger of this prefill, once."""
        if text not in self.notes:
            self.notes.append(text)

    def __getitem__(self, name: str | tuple[str, int]) -> Tensor:
        if name not in self.signals:
            raise PlanError(
                f"{name!r} was not declared in reads(), or its layer has not run",
                argument="reads",
                given=name,
                expected=", ".join(sorted(map(str, self.signals))) or "a declared signal",
            )
        return self.signals[name]


class CacheCompressor(_Method):
    """A method on the KV cache. It overrides the events that it wants and works on `event.cache`.

    Events run without gradients, in the order of the plan's stages. A method keeps nothing on
    itself: what belongs to a slot is a column (`KVCache.annotate`), what belongs to a conversation
    is in `KVCache.state`.

    Attributes:
        group: layers per group, for `group_end`; 0 is none.
        headwise: whether heads of a layer may come to hold different tokens.
        watches: whether its signals are read at decode steps too.
        stores: whether it stores tokens in another form. One stage may, behind those that choose
            tokens.
        chunks: whether a prompt may be read in chunks, each of which is a `prefill` to the method.
        lowrank: whether it stores tokens in low-rank factors; see :meth:`KVCache.lowrank`.
        selects: whether one new token may attend to some of what is stored; see
            :class:`mllm.cache.segments.Selecting`.
        exact: whether it stores its budget, and not more or less where the input asks for it.
    """

    site = "cache"
    paper_positions = "original"
    actions = ("Evict",)
    positions: ClassVar[Positions | None] = None
    group: ClassVar[int] = 0
    headwise: ClassVar[bool] = False
    watches: ClassVar[bool] = True
    stores: ClassVar[bool] = False
    chunks: ClassVar[bool] = False
    lowrank: ClassVar[bool] = False
    selects: ClassVar[bool] = False
    exact: ClassVar[bool] = True

    def fits(self, head_dim: int) -> None:
        """PlanError where a model's heads, of so many channels, cannot be stored so."""

    def due(self, cache: Any) -> bool:
        """Whether the decode step that is about to run on a KVCache is one to read signals at."""
        return self.watches

    def check_depth(self, num_layers: int) -> None:
        """PlanError if the method cannot work on a model of this many decoder layers."""

    def leaves_whole(self, layer: int, depth: int) -> bool:
        """Whether nothing leaves a layer, 0-based, of `depth`: its budget is all tokens."""
        return False

    def demand(self, field: str, fine: bool, expected: str) -> None:
        """PlanError unless a field is `fine`."""
        if not fine:
            value = getattr(self, field)
            raise PlanError(
                f"{self.info.name}: {field}={value!r} is not {expected}",
                argument=field,
                given=value,
                expected=expected,
            )

    def layer_end(self, event: CacheEvent) -> None:
        """Decoder layer `event.layer` has run in a prefill; earlier layers may be cut too."""

    def group_end(self, event: CacheEvent) -> None:
        """The last layer of a group of `group` layers has run in a prefill."""

    def prefill_end(self, event: CacheEvent) -> None:
        """All layers have run over a prompt, a later turn's too."""

    def chunk_end(self, event: CacheEvent) -> None:
        """All layers have run over a chunk of a prompt that is not its last; see `prefill_end`."""

    def decode_step(self, event: CacheEvent) -> None:
        """All layers have run over one new token per sample."""

    def verify_end(self, event: CacheEvent) -> None:
        """Assisted decoding: rejected candidates are gone, `event.accepted` have stayed.

        Runs before the next forward. What was evicted on the strength of rejected candidates has
        come back.
        """
