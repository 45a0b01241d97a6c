"""What a method is: what it reads (signals), what it returns (actions), and the kinds.

A method is a dataclass of hyper-parameters with one method that computes. It imports this
module and torch, and never learns the model's class, padding side or cache layout. Signals are
listed in :mod:`mllm.signals`, what else it is given in :mod:`mllm.contexts`, actions in
:mod:`mllm.actions`, and what helps to choose in :mod:`mllm.choosing`; all are found here too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

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
from mllm.choosing import even_shares, farthest, fill_up, merge_rows, top_k, top_k_each
from mllm.contexts import CacheEvent, Context, LayerContext, TowerContext
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
from mllm.tokens import Places, on_device, remembered

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
    "remembered",
    "resolve",
    "top_k",
    "top_k_each",
]

Positions = Literal["original", "compact"]


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
        keeps: whether it keeps something of a conversation under its name, which a plan has once.
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
    keeps: ClassVar[bool] = False

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
