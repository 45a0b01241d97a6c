"""A plan bound to a model: its stages by kind, and what they need of the model.

Nothing of the model is changed here: that is :class:`mllm.patcher.Patched`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from mllm import compat, joint
from mllm.actions import IN_ATTENTION, MOVES_ROWS, SETS_APART
from mllm.calibration import applied
from mllm.capture import declared
from mllm.compressors.base import (
    BlockFeatures,
    CacheCompressor,
    Hidden,
    Joint,
    LayerMethod,
    Rotary,
    TextEmbeds,
    TokenReducer,
    TowerReducer,
    Unprojected,
    Unreduced,
    Views,
    VisionAttention,
    VisionKeys,
)
from mllm.models import resolve as resolve_family
from mllm.plan import Plan
from mllm.routers import adapter as adapters
from mllm.routers.experts import Experts


class Bound:
    """A plan on a model of a known family.

    Lists of stages hold their number in the plan and the stage, in the order of the plan.

    Args:
        model: the model.
        plan: as for :func:`mllm.patch`.

    Attributes:
        family: the adapter of the model's family.
        kinds: the same for `image` and `video`; None where those cannot be reduced.
        layers: decoder layers.
        windows: tokens that each layer sees; None is all.
        first_layer: by kind of layer, the first.
        folder: of the adapter that the plan came in; None is none.
        plan: the plan, with layers fixed for the model's depth.
        plan_notes: for every ledger.
        written: the stages that were asked for, presets as themselves.
        mergers, reducers: stages in the tower, and behind it up to the decoder; `before` is both.
        pruners, compressors, experts: stages in the decoder, on its cache, and in place of FFNs.
        signals: what pruners read; see :func:`mllm.capture.declared`.
        reads_embeds, reads_unreduced: whether a pruner reads :class:`TextEmbeds`,
            :class:`Unreduced`.
        reads_prompts: whether a reducer reads text.
        view_grids: grids of tiles that pruners read.
        space: where pictures and text can be compared; None if nobody asks.
        early: whether tokens change before the projector.
        replaces: whether a stage projects in the projector's place.
        before_projecting: whether a stage reads what the projector is given.
        tower_blocks: blocks whose output is read.
        acts: decoder layers before which stages act; `cuts` are those at which rows may leave.
        stores: whether a stage stores tokens in another form.
        apart: whether layers that see the same rows may hold different slots.
        alike: of every layer what it has in common with those that store the same tokens.
        selects: whether one new token may attend to some of what is stored.
        inserts: whether rows may come that have no source.
        inner: whether something changes inside of decoder layers.
        first_hooked: the first decoder layer whose arguments the plan may change or look at.
    """

    def __init__(self, model: nn.Module, plan: Any) -> None:
        self.model = model
        self.family = resolve_family(model)
        self.kinds = {"image": self.family, "video": self.family.of_videos()}
        self.layers = list(self.family.layers)
        self.windows = [self.family.window(i) for i in range(len(self.layers))]
        self.first_layer = {self.family.kind(i): i for i in range(len(self.layers))[::-1]}
        requested = Plan.of(plan)
        self.folder = requested.folder if adapters.is_adapter(requested.folder) else None
        if self.folder is not None:
            adapters.check_model(self.folder, self.family)
        self._fix(requested)
        stages = list(enumerate(self.plan.stages))
        self.reducers = [(i, s) for i, s in stages if isinstance(s, TokenReducer)]
        self.mergers = [(i, s) for i, s in stages if isinstance(s, TowerReducer)]
        self.before = [*self.mergers, *self.reducers]
        self.pruners = [(i, s) for i, s in stages if isinstance(s, LayerMethod)]
        self.compressors = [(i, s) for i, s in stages if isinstance(s, CacheCompressor)]
        self.experts = [(i, s) for i, s in stages if isinstance(s, Experts)]
        self._look_before()
        self._look_inside()

    def _fix(self, requested: Plan) -> None:
        """Fix the layers of the plan's stages for the depth of this model."""
        depth, stages, self.plan_notes = len(self.layers), [], []
        self.written = requested.written
        for stage in [applied(stage, self.model) for stage in requested.stages]:
            fixed = stage
            if isinstance(stage, LayerMethod):
                fixed = stage.at_depth(depth, self.family.first_cut)
                if note := stage.scaled(fixed, depth):
                    self.plan_notes.append(note)
            stages.append(fixed)
        self.plan = Plan(stages, requested.seed)

    def _look_before(self) -> None:
        """What stages before the LLM need."""
        read = [signal for _, s in self.reducers for signal in s.reads().values()]
        self.reads_prompts = any(isinstance(x, TextEmbeds | Joint) for x in read)
        self.space = joint.space_of(self.family.model) if Joint() in read else None
        self.early = bool(self.mergers) or any(
            self.site(s) == "pre_projector" for _, s in self.reducers
        )
        self.replaces = any(s.replaces for _, s in self.reducers)
        self.before_projecting = any(isinstance(x, Unprojected) for x in read)
        blocks = [b for x in read if isinstance(x, BlockFeatures) for b in x.blocks]
        if not len(self.family.blocks):
            blocks = []  # check_plan refuses them
        self.tower_blocks = sorted({self.family.block(block) for block in blocks})

    def _look_inside(self) -> None:
        """What stages in the LLM and on its cache need."""
        self.signals = declared(self.pruners)
        read = [signal for _, s in self.pruners for signal in s.reads().values()]
        self.reads_embeds = any(isinstance(signal, TextEmbeds) for signal in read)
        self.reads_unreduced = Unreduced() in read
        self.view_grids = list(dict.fromkeys(x.grid for x in read if isinstance(x, Views)))
        self.acts = sorted({layer for _, s in self.pruners for layer in s.at()})
        moving = [s for _, s in self.pruners if MOVES_ROWS & set(s.actions)]
        cuts = {layer for s in moving for layer in s.at()}
        self.cuts = sorted(layer for layer in cuts if layer < len(self.layers))
        actions = {action for _, s in self.pruners for action in s.actions}
        self.stores = any(stage.stores for _, stage in self.compressors)
        self.apart = self.stores or bool(SETS_APART & actions)
        self.alike = self._alike()
        self.selects = any(s.selects for _, s in self.compressors)
        self.inserts = "Insert" in actions
        self.inner = bool(actions - MOVES_ROWS - {"Write", "Protect", "Evict"})
        self.first_hooked = self._first_hooked()

    def _alike(self) -> list[tuple]:
        apart = self.layers_of(SETS_APART)
        return [
            (window, sum(cut <= i for cut in self.cuts), i if i in apart else None)
            for i, window in enumerate(self.windows)
        ]

    def _first_hooked(self) -> int:
        if self.apart:
            return 0
        read = [
            signal.layer
            for _, signal in self.signals
            if isinstance(signal, Hidden | Rotary) or not getattr(signal, "rope", True)
        ]
        return min([*self.acts, *read, len(self.layers)])

    def positions(self, stage: Any) -> str:
        """`original` or `compact`; where nothing was asked for, what the family can do."""
        card = "original" if self.family.mrope else stage.paper_positions
        return stage.positions or card

    def site(self, stage: TokenReducer) -> str:
        """Where a pre-LLM stage works; behind projectors that join patches."""
        joined = stage.site == "pre_projector" and not self.family.per_token
        return "post_projector" if joined else stage.site

    def layers_of(self, actions: set[str]) -> range:
        """Decoder layers in which some of these actions may work."""
        first = [min(s.at()) for _, s in self.pruners if actions & set(s.actions)]
        return range(min(first, default=len(self.layers)), len(self.layers))

    def each_layer(self, signal: Any) -> list[Any]:
        """A signal of a cache method, at its layer or without one at all of them."""
        layers = range(len(self.layers)) if signal.layer is None else (signal.layer,)
        return [dataclasses.replace(signal, layer=layer) for layer in layers]

    def tapped(self) -> list[nn.Module]:
        """Attention modules that some stage reads from, or changes something in."""
        found = []
        for _, stage in self.reducers:
            for signal in stage.reads().values():
                if isinstance(signal, VisionAttention | VisionKeys):
                    found.append(self.family.block_attention(self.family.block(signal.block)))
        for _, stage in self.mergers:
            blocks = stage.blocks(self.family.block(None) + 1)
            found += [self.family.block_attention(block) for block in blocks]
        for _, signal in self.signals:
            if not isinstance(signal, Hidden):
                found.append(self.family.attention(signal.layer))
        for _, stage in self.compressors:
            reads = [own for s in stage.reads().values() for own in self.each_layer(s)]
            found += [self.family.attention(signal.layer) for signal in reads]
        if self.selects:
            found += [self.family.attention(layer) for layer in range(len(self.layers))]
        found += [self.family.attention(layer) for layer in self.layers_of(IN_ATTENTION)]
        return list(dict.fromkeys(found))

    def by_kernel(self) -> list[nn.Module]:
        """Attention modules that need not be served, but then no kernel reads their storage."""
        own = [self.family.attention(i) for i in range(len(self.layers))] if self.stores else []
        return [module for module in own if compat.attention_name(module) == "sdpa"]
