"""The one Patcher: hooks that run a plan inside a model, and leave nothing behind.

Rows leave at two places: in the decoder's pre-hook (pre-LLM stages) and before a decoder layer
(in-LLM stages). Everything about one forward pass lives in context variables that are closed in
`finally`, so neither an exception nor a KeyboardInterrupt leaves anything behind, and threads do
not meet; everything about a conversation lives on its cache.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import itertools
import os
import tempfile
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mllm import attention, compat, hub, joint
from mllm.actions import IN_ATTENTION, MOVES_ROWS, SETS_APART
from mllm.cache import CacheMark, KVCache, cache_bytes
from mllm.calibration import applied
from mllm.capture import declared
from mllm.chunks import Chunks, check_chunks
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
from mllm.errors import DataError, NoEffectError, PlanError
from mllm.in_llm import DecoderRun
from mllm.ledger import Ledger, Record
from mllm.models import resolve as resolve_family
from mllm.models.base import Family
from mllm.plan import Plan
from mllm.pre_llm import Prompts, VisionRun, idle
from mllm.routers import adapter as adapters
from mllm.routers import stats
from mllm.routers.account import Routing, loss_factor
from mllm.routers.base import NAME, RouterBank, active
from mllm.routers.experts import ROUTING, Experts
from mllm.routers.upcycle import Upcycled
from mllm.running import running
from mllm.speculation import SelfSpeculation, drafting
from mllm.tokens import Counts, Layout, count_rows, split_images, supervised
from mllm.validate import check_generation, check_plan, check_speculation, family_notes
from mllm.views import VIEW


@dataclass
class _Call:
    """What the top-level call knows and the base model is not told."""

    patched: Patched
    labels: Tensor | None
    logits_to_keep: Any
    routing: Routing | None = None
    stages: dict[int, TokenReducer] = field(default_factory=dict)  # in training, by number
    views: dict[str, Any] = field(default_factory=dict)  # tiles of its pictures


@dataclass
class _Prompt:
    """What generate() knows: the length of the prompt, and whether it drafts for assisted decoding.

    transformers gives no pictures to a model that drafts.
    """

    patched: Patched
    length: int | None
    drafts: bool
    given: dict[str, Any] | None = None  # arguments, with the ids
    chunk: int | None = None  # rows of the prompt that the decoder reads at a time
    views: dict[str, Any] = field(default_factory=dict)  # tiles of its pictures


_FORWARD: ContextVar[DecoderRun | None] = ContextVar("mllm_forward", default=None)
_CALL: ContextVar[_Call | None] = ContextVar("mllm_call", default=None)
_VISION: ContextVar[VisionRun | None] = ContextVar("mllm_vision", default=None)
_PROMPT: ContextVar[_Prompt | None] = ContextVar("mllm_prompt", default=None)
_CHUNKS: ContextVar[Chunks | None] = ContextVar("mllm_chunks", default=None)

_MISSING = object()
UNTRAINED = "new routers, which know nothing"
UNTRAINED_PROJECTOR = "a new projector, which knows nothing"
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)


class Patched:
    """A model with a plan inside; made by :func:`mllm.patch`. A context manager.

    Attributes:
        model: the model that was given.
        plan: the plan, with layers fixed for the model's depth.
        family: the adapter of the model's family.
        routers: what the plan learns, a submodule of the model; None if it learns nothing.
        upcycled: experts, and the dense FFNs behind them.
        routing: the account of the newest forward with images; with experts, of the newest that is
            no decode step.
        learnt: forwards that the model has learnt from, by which stages draw. Set it when training
            goes on after a stop, and they draw what they would have drawn; recipes do.
        prefill_chunk_size: rows that the decoder reads at a time where the model is called by hand,
            as `generate(prefill_chunk_size=...)` says for a call of its own; None is all.
    """

    learnt: int = 0
    prefill_chunk_size: int | None = None

    def __init__(
        self, model: nn.Module, plan: Any, *, unvalidated: bool = False, ep_size: int = 1
    ) -> None:
        self.model = model
        self.family = resolve_family(model)
        self.kinds = {"image": self.family, "video": self.family.of_videos()}
        self.layers = list(self.family.layers)
        self.windows = [self.family.window(i) for i in range(len(self.layers))]
        self.first_layer = {self.family.kind(i): i for i in range(len(self.layers))[::-1]}
        requested = Plan.of(plan)
        folder = requested.folder if adapters.is_adapter(requested.folder) else None
        if folder is not None:
            adapters.check_model(folder, self.family)
        asked = [applied(stage, model) for stage in requested.stages]
        self.plan = Plan(
            [
                s.at_depth(len(self.layers), self.family.first_cut)
                if isinstance(s, LayerMethod)
                else s
                for s in asked
            ],
            requested.seed,
        )
        self.plan_notes = [
            note
            for s, now in zip(asked, self.plan.stages, strict=True)
            if isinstance(s, LayerMethod) and (note := s.scaled(now, len(self.layers)))
        ]
        stages = list(enumerate(self.plan.stages))
        self.reducers = [(i, s) for i, s in stages if isinstance(s, TokenReducer)]
        self.mergers = [(i, s) for i, s in stages if isinstance(s, TowerReducer)]
        self.before = [*self.mergers, *self.reducers]
        self.pruners = [(i, s) for i, s in stages if isinstance(s, LayerMethod)]
        self.compressors = [(i, s) for i, s in stages if isinstance(s, CacheCompressor)]
        self.experts = [(i, s) for i, s in stages if isinstance(s, Experts)]
        self.signals = declared(self.pruners)
        inside = [signal for _, s in self.pruners for signal in s.reads().values()]
        self.reads_embeds = any(isinstance(signal, TextEmbeds) for signal in inside)
        self.reads_unreduced = Unreduced() in inside
        self.view_grids = list(dict.fromkeys(x.grid for x in inside if isinstance(x, Views)))
        read = [signal for _, s in self.reducers for signal in s.reads().values()]
        self.reads_prompts = any(isinstance(x, TextEmbeds | Joint) for x in read)
        self.space = joint.space_of(self.family.model) if Joint() in read else None
        self.early = bool(self.mergers) or any(
            self.site(s) == "pre_projector" for _, s in self.reducers
        )
        self.replaces = any(s.replaces for _, s in self.reducers)
        self.before_projecting = any(isinstance(x, Unprojected) for x in read)
        inner = [b for x in read if isinstance(x, BlockFeatures) for b in x.blocks]
        if not len(self.family.blocks):
            inner = []  # check_plan refuses them
        self.tower_blocks = sorted({self.family.block(block) for block in inner})
        self.acts = sorted({layer for _, s in self.pruners for layer in s.at()})
        self.cuts = sorted(
            {
                layer
                for _, s in self.pruners
                if MOVES_ROWS & set(s.actions)
                for layer in s.at()
                if layer < len(self.layers)
            }
        )
        self.stores = any(stage.stores for _, stage in self.compressors)
        self.apart = self.stores or bool(SETS_APART & self._actions())
        self.alike = self._alike()
        self.selects = any(s.selects for _, s in self.compressors)
        self.inserts = "Insert" in self._actions()
        self.inner = bool(self._actions() - MOVES_ROWS - {"Write", "Protect", "Evict"})
        check_plan(self, unvalidated)
        self.plan_notes += family_notes(self)
        self.first_hooked = self._first_hooked()
        self.mark = CacheMark(compat.config_sha256(model), self.plan.sha256)
        self._base_signature = inspect.signature(self.family.base.forward)
        self._decoder_names = list(inspect.signature(self.family.decoder.forward).parameters)
        self._records: list[Record] = []
        self._handles: list[Any] = []
        self._attributes: list[tuple[nn.Module, str, Any]] = []  # (module, name, before)
        self.routing = Routing()
        self._check_idle()
        self._check_name()
        parts = self._new_parts()
        self.upcycled = Upcycled(self, ep_size)
        parts |= self.upcycled.parts
        self.routers = RouterBank(parts).train(self.family.model.training) if parts else None
        self._install()
        if folder is not None:
            try:
                self.load_adapter(folder)
            except PlanError:
                self.remove()
                raise

    def save_adapter(
        self, folder: str | os.PathLike, state: dict[str, Tensor] | None = None
    ) -> Path:
        """Write what the plan has learnt, and the plan, into `folder`; returns its path.

        :func:`mllm.patch` takes the folder in place of a plan. Where processes share experts, all
        of them must ask, and the first one writes.

        Args:
            folder: made if missing.
            state: a state dict of the whole model, where its parameters are sharded; None reads
                them from the model.

        Raises:
            PlanError: the plan learns nothing, or was removed.
        """
        return adapters.save(self, folder, state)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        state: dict[str, Tensor] | None = None,
        **options: Any,
    ) -> str:
        """Upload what :meth:`save_adapter` writes; returns the address of the commit.

        `mllm.patch(model, mllm.Plan.from_pretrained("user/name"))` takes it back. Where processes
        share experts, call :meth:`save_adapter` in all of them and upload the folder.

        Args:
            repo_id: `user/name`; made if it is missing.
            private: whether a new repository is; None is the account's setting.
            state: as in :meth:`save_adapter`.
            **options: as in :meth:`mllm.Plan.push_to_hub`.

        Raises:
            PlanError: the plan learns nothing or was removed, nobody is logged in, or there is no
                way to the hub.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_adapter(folder, state)
            return hub.push(Path(folder), repo_id, private, **options)

    def load_adapter(self, folder: str | os.PathLike) -> None:
        """Read what :meth:`save_adapter` has written.

        Args:
            folder: a folder, or `user/name` on the hub.

        Raises:
            PlanError: it belongs to another plan, or to a model of another depth or width; nothing
                is changed.
        """
        folder = hub.fetch(folder, adapters.FILES) if hub.is_repo(folder) else folder
        adapters.load(self, folder)
        new = UNTRAINED, UNTRAINED_PROJECTOR
        self.plan_notes = [note for note in self.plan_notes if not note.endswith(new)]

    def train_routers(self, alone: bool = False) -> None:
        """Let what the plan learns be trained, for example after PEFT has frozen the model.

        Args:
            alone: freeze the rest of the model.
        """
        if alone:
            self.family.model.requires_grad_(False)
        if self.routers is not None:
            active(self.family.model).requires_grad_(True)

    def router_stats(self) -> list[dict[str, Any]]:
        """What routers did in the forward of `routing`; see :func:`mllm.routers.stats.rows`.

        Asks the device.
        """
        return stats.rows(self.routing.stats)

    @property
    def losses(self) -> dict[str, Tensor]:
        """By name, auxiliary losses of `routing` in training, before coefficients.

        Sums over layers; where several processes train, this one's share.
        """
        return self.routing.losses if self.routing.learns else {}

    def _new_parts(self) -> dict[int, dict[str, nn.Module]]:
        """What stages in and before the LLM learn, as it starts: drawn by the plan's seed."""
        family, stages = self.family, {}
        device = next(family.decoder.parameters()).device
        beside = next(family.projector.parameters()).device
        # Nothing is drawn for a model without weights.
        home = beside.type if beside.type == "meta" else "cpu"
        with torch.random.fork_rng(devices=[]), torch.device(home):
            for number, stage in self.pruners:
                torch.default_generator.manual_seed(self.plan.seed_for(number))
                if parts := stage.parts_of(family):
                    stages[number] = {name: part.to(device) for name, part in parts.items()}
                    self.plan_notes.append(f"{stage.info.name}: {UNTRAINED}")
            self.depth = list(stages)
            for number, stage in self.reducers:
                torch.default_generator.manual_seed(self.plan.seed_for(number))
                if parts := stage.parts(family.text_config.hidden_size, family.tower_widths):
                    # What has the work of a projector has its precision.
                    stages[number] = {
                        name: part.to(beside, family.model.dtype) for name, part in parts.items()
                    }
                    self.plan_notes.append(f"{stage.info.name}: {UNTRAINED_PROJECTOR}")
        self.projectors = [(n, s) for n, s in self.reducers if n in stages]
        return stages

    def positions(self, stage: Any) -> str:
        """`original` or `compact`; where nothing was asked for, what the family can do."""
        card = "original" if self.family.mrope else stage.paper_positions
        return stage.positions or card

    def site(self, stage: TokenReducer) -> str:
        """Where a pre-LLM stage works; behind projectors that join patches."""
        joined = stage.site == "pre_projector" and not self.family.per_token
        return "post_projector" if joined else stage.site

    def _actions(self) -> set[str]:
        """Actions that in-LLM stages may return."""
        return {action for _, s in self.pruners for action in s.actions}

    def _layers_of(self, actions: set[str]) -> range:
        """Decoder layers in which some of these actions may work."""
        first = [min(s.at()) for _, s in self.pruners if actions & set(s.actions)]
        return range(min(first, default=len(self.layers)), len(self.layers))

    def _alike(self) -> list[tuple]:
        """Of every layer what it has in common with those that always store the same tokens."""
        apart = self._layers_of(SETS_APART)
        return [
            (window, sum(cut <= i for cut in self.cuts), i if i in apart else None)
            for i, window in enumerate(self.windows)
        ]

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
        found += [self.family.attention(layer) for layer in self._layers_of(IN_ATTENTION)]
        return list(dict.fromkeys(found))

    def by_kernel(self) -> list[nn.Module]:
        """Attention modules that need not be served, but then no kernel reads their storage."""
        own = [self.family.attention(i) for i in range(len(self.layers))] if self.stores else []
        return [module for module in own if compat.attention_name(module) == "sdpa"]

    # Installing and removing

    def _install(self) -> None:
        family = self.family
        touched: dict[nn.Module, None] = {}

        def pre(module: nn.Module, hook: Any) -> None:
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            touched[module] = None

        def post(module: nn.Module, hook: Any) -> None:
            self._handles.append(module.register_forward_hook(hook))
            touched[module] = None

        def wrap(module: nn.Module, name: str, around: Any) -> None:
            """Let `around(method, args, kwargs)` stand for a method; the signature stays."""
            method = getattr(module, name)

            # generate() reads the signature of get_image_features to choose its arguments.
            @functools.wraps(method)
            def wrapper(*args, **kwargs):
                return around(method, args, kwargs)

            self._set(module, name, wrapper)
            touched[module] = None

        tapped = dict.fromkeys([*self.tapped(), *self.by_kernel()])
        #: Whether attention of a layer is served by :mod:`mllm.attention` at decode steps.
        self.served = [
            bool(self.compressors) and family.attention(layer) in tapped
            for layer in range(len(self.layers))
        ]
        for module in tapped:
            before = compat.serve(module, f"mllm_{compat.attention_name(module)}")
            self._attributes.append((module, "config", before))
            touched[module] = None
        # PEFT calls the forward of the model that it wraps, past the model's hooks.
        for top in {id(m): m for m in (self.model, family.model)}.values():
            wrap(top, "forward", self._top_forward)
        wrap(family.base, "forward", self._base_forward)
        for kind in [kind for kind, of in self.kinds.items() if of is not None]:
            features = functools.partial(self._features, kind)
            wrap(family.base, f"get_{kind}_features", features)
        wrap(family.model, "generate", self._generate)
        for name in compat.CONTINUOUS:
            if hasattr(family.model, name):
                wrap(family.model, name, self._refuse_continuous)
        pre(family.decoder, self._decoder_pre)
        post(family.decoder, self._decoder_post)
        for i, layer in enumerate(self.layers):  # a cache may hold other tokens in any of them
            pre(layer, functools.partial(self._layer_pre, i))
            if self.compressors:
                post(layer, functools.partial(self._layer_post, i))
        for i in self.upcycled.places:
            pre(family.attention(i), self._routing_pre)  # before others change its arguments
            wrap(family.mlp(i), "forward", functools.partial(self._run_experts, i))
        self._install_branches(pre, post)
        if self.early or self.before_projecting or self.space is not None:
            pre(family.projector, self._projector_pre)
        if self.early or self.replaces:
            post(family.projector, self._projector_post)
        if self.early:
            post(family.tower, self._tower_post)
        for i in self.tower_blocks:
            post(family.blocks[i], functools.partial(self._tower_block_post, i))
        for i, block in enumerate(family.blocks if self.mergers else ()):
            wrap(block, "forward", functools.partial(self._tower_block, i))
        if self.routers is not None:
            family.model.add_module(NAME, self.routers)
            touched[family.model] = None
        self._set(family.base, "mllm_patched", True)
        for module in touched:
            self._set(module, "__deepcopy__", functools.partial(self._plain_copy, module))

    def _set(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute of one module, until :meth:`remove`."""
        self._attributes.append((module, name, module.__dict__.get(name, _MISSING)))
        setattr(module, name, value)

    def _plain_copy(self, module: nn.Module, memo: dict[int, Any]) -> nn.Module:
        """What `copy.deepcopy` makes of a module: an ordinary one, without the plan."""
        state = dict(module.__dict__)
        for owner, name, before in reversed(self._attributes):
            if owner is module and before is _MISSING:
                del state[name]
            elif owner is module:
                state[name] = before
        if self.routers is not None and module is self.family.model:
            state["_modules"] = {k: m for k, m in state["_modules"].items() if k != NAME}
        own = {handle.id for handle in self._handles}
        for name in _HOOKS:
            hooks = [(i, hook) for i, hook in state[name].items() if i not in own]
            state[name] = type(state[name])(hooks)
        plain = memo[id(module)] = type(module).__new__(type(module))
        plain.__setstate__(copy.deepcopy(state, memo))
        return plain

    def _check_idle(self) -> None:
        if running(self.family.model):
            raise PlanError(
                "a forward pass of the model is going on, perhaps in another thread",
                argument="model",
                given=type(self.model).__name__,
                expected="patch and remove between forward passes",
            )

    def _check_name(self) -> None:
        if any(s.info.trained for s in self.plan.stages) and NAME in self.family.model._modules:
            raise PlanError(
                f"the model has a submodule {NAME!r} already",
                argument="model",
                given=NAME,
                expected="a plain model",
            )

    def _first_hooked(self) -> int:
        """The first decoder layer whose arguments a plan may change or look at."""
        if self.apart:
            return 0
        read = [
            signal.layer
            for _, signal in self.signals
            if isinstance(signal, Hidden | Rotary) or not getattr(signal, "rope", True)
        ]
        return min([*self.acts, *read, len(self.layers)])

    def _install_branches(self, pre: Any, post: Any) -> None:
        """Hooks inside of decoder layers, where actions or signals need them."""
        family = self.family
        changed = self._layers_of({"BranchGate", "BranchRows", "LayerGate", *IN_ATTENTION})
        read = {(s.layer, s.of) for _, s in self.signals if isinstance(s, Hidden)}

        def own(hook: Callable, layer: int, branch: str) -> Callable:
            # Inside of a compiled layer these run as they are.
            return torch.compiler.disable(functools.partial(hook, layer, branch))

        for i in range(len(self.layers)):
            for branch, module in (("attn", family.attention(i)), ("mlp", family.mlp(i))):
                if i in changed or (i, branch) in read:
                    pre(module, own(self._branch_pre, i, branch))
                if i in changed:
                    post(family.branch(i, branch), own(self._branch_post, i, branch))

    def _tower_block(self, block: int, original: Any, args: tuple, kwargs: dict) -> Any:
        """What runs instead of a tower block's forward, where tokens may merge."""
        run = _VISION.get()
        if run is None:
            return original(*args, **kwargs)
        given = {**dict(zip(("hidden_states", "attention_mask"), args, strict=False)), **kwargs}
        hidden, mask = given.pop("hidden_states"), given.pop("attention_mask", None)
        return run.tower.block(block, hidden, mask, given)

    def remove(self) -> None:
        """Take the plan out; the model is exactly what it was.

        Raises:
            PlanError: it was taken out before, or a forward pass of the model is going on in
                another thread (then the plan stays in and can be removed later).
        """
        if not self._handles:
            raise PlanError(
                "the plan was removed before",
                argument="remove",
                given=repr(self),
                expected="remove() once, or a with block",
            )
        self._check_idle()
        for handle in self._handles:
            handle.remove()
        for module, name, before in reversed(self._attributes):
            delattr(module, name)
            if before is not _MISSING:
                setattr(module, name, before)
        if self.routers is not None:
            delattr(self.family.model, NAME)
        self._handles, self._attributes = [], []
        self.upcycled.remove()

    def __enter__(self) -> Patched:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._handles:
            self.remove()

    def __repr__(self) -> str:
        state = "active" if self._handles else "removed"
        return f"Patched({type(self.model).__name__}, {self.plan.spec!r}, {state})"

    def new_mark(self) -> CacheMark:
        """What a new cache is told of the model and plan that fill it."""
        return CacheMark(self.mark.config_sha256, self.mark.plan_sha256)

    def kv(self, cache: Any) -> KVCache:
        """Look at a cache that this model has filled, and change it, by logical index.

        Args:
            cache: `past_key_values` of a forward or of `generate()`.

        Raises:
            CacheMismatchError: a cache that no patched model has used.
        """
        return KVCache(cache, self.family, alike=self.alike)

    @property
    def tiles(self) -> tuple[int, int] | None:
        """Rows and columns of the tiles that the plan is given of every picture; None is none.

        :func:`mllm.views.with_tiles` adds them to a batch.
        """
        return self.view_grids[0] if self.view_grids else None

    @property
    def ledger(self) -> Ledger:
        """The account of the newest prefill."""
        return Ledger(self._records)

    # The call, from the outside in

    def _generate(self, generate: Any, args: tuple, kwargs: dict) -> Any:
        config = kwargs.get("generation_config") or self.family.model.generation_config
        check_generation(config, kwargs)
        if isinstance(kwargs.get("custom_generate"), SelfSpeculation):
            check_speculation(self.plan.stages)
        views = self._take_views(kwargs)
        chunk = kwargs.pop("prefill_chunk_size", None)
        chunk = config.prefill_chunk_size if chunk is None else chunk
        if chunk is not None:  # not transformers' own way, which takes pictures apart
            check_chunks(self, chunk)
            if config.prefill_chunk_size is not None:
                config = kwargs["generation_config"] = copy.deepcopy(config)
                config.prefill_chunk_size = None
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        drafts = bool(getattr(config, "is_assistant", False))
        self._carry_on(kwargs.get("past_key_values"))
        if self.family.mrope and ids is not None and kwargs.get("past_key_values") is None:
            # Positions come from the pictures, before the prompt is read.
            self._placeholders(ids, kwargs, drafts)
        length = None if ids is None else ids.shape[1]
        given, cache = None, kwargs.get("past_key_values")
        if ids is not None:  # what is stored has been read
            past = 0 if cache is None else cache.get_seq_length()
            given = {**kwargs, "input_ids": ids[:, past if past < length else 0 :]}
        token = _PROMPT.set(_Prompt(self, length, drafts, given, chunk, views))
        try:
            return generate(*args, **kwargs)
        finally:
            _PROMPT.reset(token)

    def _refuse_continuous(self, method: Any, args: tuple, kwargs: dict) -> None:
        raise PlanError(
            "a paged cache (continuous batching) cannot hold a plan's per-layer lengths",
            argument="model",
            given=method.__name__,
            expected="generate() with a padded batch",
        )

    def _prompt(self) -> _Prompt:
        """The call of this model's generate() that is going on in this thread."""
        prompt = _PROMPT.get()
        here = prompt is not None and prompt.patched is self
        return prompt if here else _Prompt(self, None, False)

    def _top_forward(self, forward: Any, args: tuple, kwargs: dict) -> Any:
        labels, outer, views = kwargs.get("labels"), _CALL.get(), self._take_views(kwargs)
        if labels is None and outer is not None and outer.patched is self:
            labels = outer.labels  # a PEFT wrapper's call, around this one
        nested = outer is not None and outer.patched is self
        views = outer.views if nested else views or self._prompt().views
        items, keep = kwargs.get("num_items_in_batch"), kwargs.get("logits_to_keep", 0)
        losses = []
        for stages in [outer.stages] if nested else self._in_training(labels):
            routing = outer.routing if nested else self._new_routing(labels, items)
            token = _CALL.set(_Call(self, labels, keep, routing, stages, views))
            try:
                output = forward(*args, **kwargs)
            finally:
                _CALL.reset(token)
            if nested or routing is None or not routing.learns:
                return output
            losses.append(routing.total(output[0]))
        loss = torch.stack(losses).mean() if len(losses) > 1 else losses[0]
        if isinstance(output, tuple):
            return (loss, *output[1:])
        output["loss"] = loss
        return output

    def _learns(self, labels: Tensor | None) -> bool:
        """Whether the model learns from a call with these labels."""
        return self.family.model.training and labels is not None and torch.is_grad_enabled()

    def _in_training(self, labels: Tensor | None) -> list[dict[int, TokenReducer]]:
        """The stages before the LLM, by number, of every forward that stands for one of a call."""
        if not self._learns(labels):
            return [{}]
        seed_for = self.plan.seed_for
        ways = [s.in_training(seed_for(n), self.learnt) for n, s in self.reducers]
        numbers = [n for n, _ in self.reducers]
        return [dict(zip(numbers, way, strict=True)) for way in itertools.product(*ways)]

    def _take_views(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Take the tiles of pictures out of the arguments of a call; see :class:`Views`."""
        names = [name for name in kwargs if self.view_grids and name.startswith(VIEW)]
        return {name.removeprefix(VIEW): kwargs.pop(name) for name in names}

    def _add_views(self, run: VisionRun, features: Any, inputs: dict[str, Any]) -> None:
        """Let the tiles of a call's pictures through the tower."""
        call = _CALL.get()
        here = call is not None and call.patched is self
        views = call.views if here else self._prompt().views
        if run.family.pixels in views:
            run.family.check(views)
            taken = inspect.signature(features).parameters
            inputs = {**inputs, **{name: x for name, x in views.items() if name in taken}}
            made = features(**inputs).pooler_output
            run.add_views(made, run.family.layouts(views), self.tiles)

    def _new_routing(self, labels: Tensor | None, items: Any) -> Routing | None:
        """The account of a call; None where nothing needs training."""
        if not any(stage.info.trained for stage in self.plan.stages):
            return None
        if not self._learns(labels):
            return Routing()
        self.learnt += 1
        return Routing(True, loss_factor(labels, items), self.learnt - 1)

    def _routing_pre(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        # A recompute finds it on the same tensor as the forward did.
        ROUTING.set(getattr(kwargs["position_embeddings"][0], "mllm_routing", (None, None)))

    def _run_experts(self, layer: int, ffn: Any, args: tuple, kwargs: dict) -> Tensor:
        (hidden,) = args
        (valid, routing), inside = ROUTING.get(), attention.change()
        if valid is not None and inside is not None and inside.layer == layer:
            valid = inside.real("mlp", valid)
        token = ROUTING.set((valid, routing))
        try:
            # By the model's attribute: PEFT may have put a copy in its place.
            bank = getattr(self.family.model, NAME)
            return bank(hidden, self.upcycled.places[layer], str(layer))
        finally:
            ROUTING.reset(token)

    def _base_forward(self, forward: Any, args: tuple, kwargs: dict) -> Any:
        # Not hooks: torch calls them after an Exception, but not after a KeyboardInterrupt.
        run = self._open(compat.arguments(self._base_signature, args, kwargs))
        token, chunks = _FORWARD.set(run), _CHUNKS.set(None)
        try:
            return forward(*args, **kwargs)
        finally:
            attention.close_taps()
            attention.set_change(None)
            ROUTING.set((None, None))
            _CHUNKS.reset(chunks)
            _FORWARD.reset(token)

    def _run(self) -> DecoderRun | None:
        """The forward pass of this model that is going on in this thread."""
        run = _FORWARD.get()
        return run if run is not None and run.patched is self else None

    def _carry_on(self, cache: Any) -> None:
        """Give the base model back what it remembered of this conversation.

        In between it may have had another one, or the cache comes from a file.
        """
        mark = getattr(cache, "mllm", None)
        for name, value in ({} if mark is None else mark.carried).items():
            setattr(self.family.base, name, value)

    def _open(self, given: dict[str, Any]) -> DecoderRun:
        """The state of a forward pass, from the base model's arguments.

        Raises:
            DataError: pictures and placeholders disagree.
        """
        ids, encoders = given.get("input_ids"), given.get("mm_encoder_outputs") or {}
        mask, visual, counts = given.get("attention_mask"), None, None
        if self._prompt().length is None:  # generate() has done so
            self._carry_on(given.get("past_key_values"))
        brought = self.brought(given)
        if ids is None and brought:
            raise DataError(
                "visual rows cannot be found without input_ids",
                argument="input_ids",
                given=None,
                expected="input_ids with the pixels",
            )
        answering = self._answering(given.get("past_key_values"))
        marks: dict[str, Tensor] = {}
        layouts: dict[str, list[Layout]] = {}
        if ids is not None and not answering and (brought or ids.shape[1] > 1):
            marks, counts, layouts = self._placeholders(ids, given, self._prompt().drafts)
        if marks:
            visual = functools.reduce(torch.logical_or, marks.values())
            self._check_asked(given)
        call = _CALL.get()
        call = call if call is not None and call.patched is self else None
        prompts = {}
        if marks and self.reads_prompts:
            labels = None if call is None else call.labels
            prompts = self._prompts(given, marks, counts, labels)
        return DecoderRun(
            self, visual, None, mask, call=call, prompts=prompts,
            counts=counts, answering=answering, marks=marks, layouts=layouts,
            routing=self._new_routing(None, None) if call is None else call.routing,
            reductions={k: encoders[k].mllm_reduction for k in marks if encoders.get(k)},
        )

    def _check_asked(self, given: dict[str, Any]) -> None:
        for name in self.family.asks:
            if given.get(name) is None:
                raise DataError(
                    f"without {name}, {type(self.family.model).__name__} decides by backend and "
                    "padding which rows see each other",
                    argument=name,
                    given=None,
                    expected=f"{name}, as the processor gives it",
                )

    def brought(self, given: dict[str, Any]) -> list[str]:
        """Whether a call has images, videos, or both, as pixels or as features.

        Raises:
            DataError: it has videos, and those of this family cannot be reduced.
        """
        encoders, found = given.get("mm_encoder_outputs") or {}, []
        for kind, family in self.kinds.items():
            pixels = "pixel_values_videos" if family is None else family.pixels
            if given.get(pixels) is None and encoders.get(kind) is None:
                continue
            if family is None:
                raise DataError(
                    f"the tokens of videos cannot be reduced in {type(self.model).__name__}",
                    argument="pixel_values_videos",
                    given="a video",
                    expected="images",
                )
            found.append(kind)
        return found

    def _placeholders(
        self, ids: Tensor, given: dict[str, Any], drafts: bool
    ) -> tuple[dict[str, Tensor], Counts, dict[str, list[Layout]]]:
        """Placeholders of images and of videos, bool `[batch, rows]`; counts; layouts of pixels.

        Raises:
            DataError: there are others than the pictures given have; a model that drafts is
                given none.
        """
        families = {kind: family for kind, family in self.kinds.items() if family is not None}
        mask, encoders = given.get("attention_mask"), given.get("mm_encoder_outputs") or {}
        plain = isinstance(mask, Tensor) and mask.dim() == 2
        marks = {kind: ids == family.image_token_id for kind, family in families.items()}
        counts = count_rows(marks, mask[:, -ids.shape[1] :] if plain else None)
        brought, layouts = self.brought(given), {}
        for kind in brought:
            if encoders.get(kind) is None:
                families[kind].check(given)
                layouts[kind] = families[kind].layouts(given)
        if brought or not drafts:
            for kind, family in families.items():
                self._check_counts(
                    kind, family, counts.marked[kind], kind in brought, layouts.get(kind),
                    encoders.get(kind),
                )
        return {kind: marks[kind] for kind in brought}, counts, layouts

    def _prompts(
        self, given: dict[str, Any], marks: dict[str, Tensor], counts: Counts,
        labels: Tensor | None = None,
    ) -> dict[str, Prompts]:
        """By kind, the prompts that pre-LLM stages read, from the arguments of a call."""
        ids, mask = given["input_ids"], given.get("attention_mask")
        cache, length = given.get("past_key_values"), self._prompt().length
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

    def _answering(self, cache: Any) -> bool:
        """Whether all rows are tokens that generate() has added: none is padding or visual."""
        length = self._prompt().length
        return length is not None and cache is not None and 0 < length <= cache.get_seq_length()

    def _check_counts(
        self, kind: str, family: Family, counts: list[int], brought: bool,
        layouts: list[Layout] | None, encoded: Any,
    ) -> None:
        """Every sample's placeholders are whole images, and there are as many as were given."""
        found = any(counts)
        if found != brought:
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

    # Pre-LLM stages: around get_image_features and get_video_features

    def _features(self, kind: str, original: Any, args: tuple, kwargs: dict) -> Any:
        inside = _VISION.get()
        if inside is not None and inside.patched is self:  # videos read by the method for images
            return original(*args, **kwargs)
        inputs = compat.arguments(inspect.signature(original), args, kwargs)
        for name in (
            "vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio"
        ):
            configured = getattr(self.family.model.config, name, None)
            if inputs.get(name) not in (None, configured):
                raise PlanError(
                    f"a plan reads the tower where the config says: {name}={configured!r}",
                    argument=name,
                    given=inputs[name],
                    expected="set it in the config before mllm.patch",
                )
        decoder_run = self._run()
        known = None if decoder_run is None else decoder_run.layouts.get(kind)
        prompts = {} if decoder_run is None else decoder_run.prompts
        given = self._prompt().given
        if decoder_run is None and self.reads_prompts and given is not None:
            marks, counts, _ = self._placeholders(given["input_ids"], given, drafts=False)
            prompts = self._prompts(given, marks, counts)
        call = _CALL.get()
        stages = call.stages if call is not None and call.patched is self else None
        run = VisionRun(self, self.kinds[kind], inputs, known, prompts.get(kind), stages)
        inputs.update(run.pixels())
        token = _VISION.set(run)
        try:
            with attention.taps(run.taps()):
                output = original(**inputs)
        finally:
            _VISION.reset(token)
        if self.view_grids:
            self._add_views(run, original, inputs)
        output.pooler_output = run.after(output.pooler_output)
        output.mllm_reduction = run.reduction
        if decoder_run is not None:
            decoder_run.reductions[kind] = run.reduction
        return output

    def _projector_pre(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        if (run := _VISION.get()) is None:
            return None
        run.unprojected = args[0]
        if self.replaces:
            return self.family.no_tokens(args), kwargs
        if self.early:
            return (run.before_projector(args[0]), *args[1:]), kwargs

    def _projector_post(self, module: nn.Module, args: tuple, output: Tensor) -> Any:
        if (run := _VISION.get()) is not None:
            return run.not_projected(output) if self.replaces else run.after_projector(output)

    def _tower_block_post(self, block: int, module: nn.Module, args: tuple, output: Any) -> None:
        if (run := _VISION.get()) is not None:
            run.blocks[block] = output[0] if isinstance(output, tuple) else output

    def _tower_post(self, module: nn.Module, args: tuple, output: Any) -> None:
        run = _VISION.get()
        if run is not None and self.family.prefix:
            run.cls = self.family.cls_feature(output)

    # The decoder

    def _decoder_pre(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        run = self._run()
        if run is None:
            return None
        kwargs = {**dict(zip(self._decoder_names, args, strict=False)), **kwargs}
        position, rows = kwargs.get("position_ids"), kwargs["inputs_embeds"].shape[1]
        if position is not None and position.shape[-1] > rows:
            # Called by hand with a mask, Qwen-VL counts stored tokens as well.
            kwargs["position_ids"] = position[..., -rows:]
        length, labels = self._prompt().length, None if run.call is None else run.call.labels
        size = self._chunk_size(run, kwargs)
        if size is not None:
            return (), self._read_chunks(Chunks(run, kwargs, size, length, labels))
        run.start(kwargs, length, labels)
        self._open_taps(run)
        return (), kwargs

    def _open_taps(self, run: DecoderRun) -> None:
        taps = run.captures.taps() if run.visual is not None and self.pruners else {}
        if self.compressors and run.events is not None:
            run.events.add_taps(taps)
        if taps:
            attention.open_taps(taps)

    def _chunk_size(self, run: DecoderRun, kwargs: dict[str, Any]) -> int | None:
        """Rows that the decoder reads at a time; None is all of this forward."""
        prompt, rows = self._prompt(), kwargs["inputs_embeds"].shape[1]
        if prompt.length is None:
            size = self.prefill_chunk_size
            if size is not None:
                check_chunks(self, size)
        else:
            size = None if self._answering(kwargs.get("past_key_values")) else prompt.chunk
        return size if size is not None and rows > size else None

    def _read_chunks(self, chunks: Chunks) -> dict[str, Any]:
        """Read all chunks but the last; returns the decoder's arguments for that one."""
        _CHUNKS.set(chunks)
        for run, kwargs in chunks:
            _FORWARD.set(run)
            attention.close_taps()
            self._open_taps(run)
            if not run.ends:
                chunks.add(run, self.family.decoder.forward(**kwargs))
        return kwargs

    def _layer_pre(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        run = self._run()
        if run is None:
            return DecoderRun.replayed(layer, args, kwargs)
        args, kwargs = run.layer(layer, module.training, args, kwargs)
        if layer in self.upcycled.places:
            kwargs["position_embeddings"][0].mllm_routing = run.table.valid, run.routing
        return args, kwargs

    def _layer_post(self, layer: int, module: nn.Module, args: tuple, output: Any) -> None:
        run = self._run()
        if run is not None and run.events is not None:
            run.events.layer_end(layer)

    def _branch_pre(
        self, layer: int, branch: str, module: nn.Module, args: tuple, kwargs: dict
    ) -> Any:
        hidden, run = args[0] if args else kwargs["hidden_states"], self._run()
        if run is not None and run.visual is not None:
            run.captures.hidden(layer, branch, hidden)
        if branch == "attn":
            # A recompute finds it on the same tensor as the forward did.
            on = getattr(kwargs["position_embeddings"][0], "mllm_inside", {})
            attention.set_change(on.get(layer))
        inside = attention.change()
        if inside is None or inside.layer != layer or branch not in inside.rows:
            return None
        hidden = inside.enter(branch, hidden)
        if branch == "attn":
            kwargs = {k: inside.given.get(k, value) for k, value in kwargs.items()}
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def _branch_post(
        self, layer: int, branch: str, module: nn.Module, args: tuple, output: Any
    ) -> Any:
        inside = attention.change()
        if inside is None or inside.layer != layer:
            return None
        if branch == "attn" and (run := self._run()) is not None:
            run.changes.set_aside(layer)
        return inside.leave(branch, output)

    def _decoder_post(self, module: nn.Module, args: tuple, output: Any) -> Any:
        run, chunks = self._run(), _CHUNKS.get()
        if run is None:
            return None
        if chunks is not None:
            chunks.close(run, output)
            run = chunks.whole
        elif run.visual is not None:
            run.finish(output.last_hidden_state)
        if run.events is not None and chunks is None:
            run.events.forward_end()
        if run.cache is not None:
            carried = {name: getattr(self.family.base, name) for name in self.family.carried}
            run.cache.mllm.carried = {k: v for k, v in carried.items() if v is not None}
        run.remember()
        if run.routing is not None:
            self._keep_account(run, output.last_hidden_state)
        if run.visual is None:
            self._book_text(run)
            return output
        ran = run.ran | run.reduction.ran
        ran |= {n for n, _ in self.experts}  # in every row, text or not
        missing = [s.info.name for n, s in enumerate(self.plan.stages) if n not in ran]
        if missing:
            raise NoEffectError(
                f"visual rows were present but {', '.join(missing)} did not run",
                argument="plan",
                given=self.plan.spec,
                expected="every stage runs",
            )
        if chunks is None:
            output.last_hidden_state = run.restore(output.last_hidden_state)
            if states := getattr(output, "hidden_states", None):
                output.hidden_states = run.restore_states(states)
        self._book(run, list(dict.fromkeys(self.plan_notes + run.reduction.notes + run.notes)))
        return output

    def _keep_account(self, run: DecoderRun, hidden: Tensor) -> None:
        """Keep what routers did; those of every rank need a gradient."""
        if run.visual is not None or (self.experts and not run.past_logical):
            self.routing = run.routing
        if not run.routing.learns or run.visual is not None:
            return
        if self.depth:
            run.routing.reach(active(self.family.model).idle(hidden, self.depth))
        for number, stage in self.projectors:
            run.routing.reach(idle(self, number, stage, hidden))

    def _book_text(self, run: DecoderRun) -> None:
        """A decode step, or a text-only prefill: the first turn's, or a later turn's."""
        if self._prompt().drafts or drafting():
            return
        past, rows, length = run.past_logical, run.full.valid.shape[1], self._prompt().length
        # Within generate(), several rows behind the prompt are candidates to verify.
        new_turn = rows > 1 if length is None else past < length
        if not past or new_turn:
            busy = self.compressors or self.experts
            idle = [] if busy else ["no visual tokens: the plan had nothing to do"]
            self._book(run, run.notes + idle)
        elif self._records:
            self._records[-1].decode_steps += 1

    def _book(self, run: DecoderRun, notes: list[str]) -> None:
        cache = run.cache
        if not run.past_logical:
            self._records.clear()  # a new conversation
        stored, meta = cache_bytes(cache)
        rows = run.full.valid.shape[1]
        asked = run.call.logits_to_keep if run.call is not None else 0
        if isinstance(asked, Tensor):  # places, or a mask of every row
            asked = asked.shape[-1]
        record = Record(
            config=self.family.text_config,
            full=run.full,
            tables=run.tables,
            past=run.past,
            past_logical=run.past_logical,
            windows=self.windows,
            images=run.images,
            reduction=None if run.reduction is None else run.reduction.account(),
            logit_rows=min(asked, rows) if asked else rows,
            kv_bytes=stored,
            kv_meta_bytes=meta,
            itemsize=run.itemsize,
            cached=stored > 0,
            selection_flops=run.selection_flops,
            cache_flops=0.0 if run.events is None else sum(run.events.costs),
            branch_rows=run.changes.counts,
            passed=run.changes.passed,
            chunks=[] if _CHUNKS.get() is None else _CHUNKS.get().rows,
            experts=self.upcycled.costs(run.routing),
            notes=notes,
        )
        self._records.append(record)
