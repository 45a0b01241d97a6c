"""The one Patcher: hooks that run a plan inside a model, and leave nothing behind.

Rows leave at two places: in the decoder's pre-hook (pre-LLM stages) and before a decoder layer
(in-LLM stages). Everything about one forward pass lives in context variables that are closed in
`finally`, so neither an exception nor a KeyboardInterrupt leaves anything behind, and threads do
not meet; everything about a conversation lives on its cache.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mllm import attention, compat, hub, placeholders
from mllm.bound import Bound
from mllm.cache import CacheMark, KVCache, cache_bytes
from mllm.calls import (
    CALL,
    CHUNKS,
    FORWARD,
    PROMPT,
    Brought,
    Call,
    Prompt,
    call_of,
    prompt_of,
    run_of,
    unread,
)
from mllm.chunks import Chunks, check_chunks
from mllm.compressors.base import TokenReducer
from mllm.errors import DataError, NoEffectError, PlanError
from mllm.hooks import Hooks
from mllm.in_llm import DecoderRun
from mllm.layer_hooks import LayerHooks
from mllm.ledger import Ledger, Record
from mllm.pre_llm import idle
from mllm.routers import adapter as adapters
from mllm.routers import stats
from mllm.routers.account import Routing, loss_factor
from mllm.routers.base import NAME, RouterBank, active
from mllm.routers.experts import ROUTING
from mllm.routers.upcycle import Upcycled
from mllm.running import running
from mllm.speculation import SelfSpeculation, drafting
from mllm.tokens import Layout
from mllm.validate import (
    check_generation,
    check_plan,
    check_repeats,
    check_speculation,
    family_notes,
)
from mllm.vision_hooks import VisionHooks

UNTRAINED = "new routers, which know nothing"
UNTRAINED_PROJECTOR = "a new projector, which knows nothing"


class Patched(Bound):
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
        answers: what the answers' loss is multiplied by before auxiliary losses join it;
            distillation leaves it a share.
        prefill_chunk_size: rows that the decoder reads at a time where the model is called by hand,
            as `generate(prefill_chunk_size=...)` says for a call of its own; None is all.
    """

    learnt: int = 0
    answers: float = 1.0
    prefill_chunk_size: int | None = None

    def __init__(
        self, model: nn.Module, plan: Any, *, unvalidated: bool = False, ep_size: int = 1
    ) -> None:
        super().__init__(model, plan)
        check_plan(self, unvalidated)
        self.plan_notes += family_notes(self)
        self.mark = CacheMark(compat.config_sha256(model), self.plan.sha256)
        self._base_signature = inspect.signature(self.family.base.forward)
        self._decoder_names = list(inspect.signature(self.family.decoder.forward).parameters)
        self._records: list[Record] = []
        self._hooks, self._vision = Hooks(), VisionHooks(self)
        self.routing = Routing()
        self._check_idle()
        self._check_name()
        parts = self._new_parts()
        self.upcycled = Upcycled(self, ep_size)
        parts |= self.upcycled.parts
        self.routers = RouterBank(parts).train(self.family.model.training) if parts else None
        try:
            self._install()
            if self.folder is not None:
                self.load_adapter(self.folder)
        except BaseException:
            self._take_out()
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

    def _install(self) -> None:
        family, hooks = self.family, self._hooks
        tapped = dict.fromkeys([*self.tapped(), *self.by_kernel()])
        #: Whether attention of a layer is served by :mod:`mllm.attention` at decode steps.
        self.served = [
            bool(self.compressors) and family.attention(layer) in tapped
            for layer in range(len(self.layers))
        ]
        for module in tapped:
            hooks.serve(module)
        # PEFT calls the forward of the model that it wraps, past the model's hooks.
        for top in {id(m): m for m in (self.model, family.model)}.values():
            hooks.wrap(top, "forward", self._top_forward)
        hooks.wrap(family.base, "forward", self._base_forward)
        hooks.wrap(family.model, "generate", self._generate)
        for name in compat.CONTINUOUS:
            if hasattr(family.model, name):
                hooks.wrap(family.model, name, self._refuse_continuous)
        hooks.pre(family.decoder, self._decoder_pre)
        hooks.post(family.decoder, self._decoder_post)
        LayerHooks(self).install(hooks)
        self._vision.install(hooks)
        if self.routers is not None:
            hooks.add(family.model, NAME, self.routers)
        hooks.set(family.base, "mllm_patched", True)

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

    def remove(self) -> None:
        """Take the plan out; the model is exactly what it was.

        Raises:
            PlanError: it was taken out before, or a forward pass of the model is going on in
                another thread (then the plan stays in and can be removed later).
        """
        if not self._hooks:
            raise PlanError(
                "the plan was removed before",
                argument="remove",
                given=repr(self),
                expected="remove() once, or a with block",
            )
        self._check_idle()
        self._take_out()

    def _take_out(self) -> None:
        self._hooks.remove()
        self.upcycled.remove()

    def __enter__(self) -> Patched:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._hooks:
            self.remove()

    def __repr__(self) -> str:
        state = "active" if self._hooks else "removed"
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

    def _generate(self, generate: Any, args: tuple, kwargs: dict) -> Any:
        config = kwargs.get("generation_config") or self.family.model.generation_config
        check_generation(config, kwargs)
        if isinstance(kwargs.get("custom_generate"), SelfSpeculation):
            check_speculation(self.plan.stages)
        views = self._vision.take_views(kwargs)
        chunk = kwargs.pop("prefill_chunk_size", None)
        chunk = config.prefill_chunk_size if chunk is None else chunk
        if chunk is not None:  # not transformers' own way, which takes pictures apart
            check_chunks(self, chunk)
            if config.prefill_chunk_size is not None:
                config = kwargs["generation_config"] = copy.deepcopy(config)
                config.prefill_chunk_size = None
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        drafts, cache = bool(getattr(config, "is_assistant", False)), kwargs.get("past_key_values")
        self._carry_on(cache)
        for kind in placeholders.brought(self, kwargs):
            check_repeats(self.kinds[kind], config, kwargs)
        if self.family.mrope and ids is not None and cache is None:
            # Positions come from the pictures, before the prompt is read.
            placeholders.find(self, ids, kwargs, drafts)
        given = length = None
        if ids is not None:
            ids, length = unread(ids, kwargs.get("attention_mask"), cache)
            given = {**kwargs, "input_ids": ids}
        token = PROMPT.set(Prompt(self, length, drafts, given, chunk, views))
        try:
            return generate(*args, **kwargs)
        finally:
            PROMPT.reset(token)

    def _refuse_continuous(self, method: Any, args: tuple, kwargs: dict) -> None:
        raise PlanError(
            "a paged cache (continuous batching) cannot hold a plan's per-layer lengths",
            argument="model",
            given=method.__name__,
            expected="generate() with a padded batch",
        )

    def _top_forward(self, forward: Any, args: tuple, kwargs: dict) -> Any:
        labels, outer, views = kwargs.get("labels"), call_of(self), self._vision.take_views(kwargs)
        nested = outer is not None  # in a PEFT wrapper's call
        if nested and labels is None:
            labels = outer.labels
        views = outer.views if nested else views or prompt_of(self).views
        items, keep = kwargs.get("num_items_in_batch"), kwargs.get("logits_to_keep", 0)
        losses = []
        for stages in [outer.stages] if nested else self._in_training(labels):
            routing = outer.routing if nested else self._new_routing(labels, items)
            token = CALL.set(Call(self, labels, keep, routing, stages, views))
            try:
                output = forward(*args, **kwargs)
            finally:
                CALL.reset(token)
            if nested or routing is None or not routing.learns:
                return output
            losses.append(routing.total(output[0] * self.answers))
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

    def _new_routing(self, labels: Tensor | None, items: Any) -> Routing | None:
        """The account of a call; None where nothing needs training."""
        if not any(stage.info.trained for stage in self.plan.stages):
            return None
        if not self._learns(labels):
            return Routing()
        self.learnt += 1
        return Routing(True, loss_factor(labels, items), self.learnt - 1)

    def _base_forward(self, forward: Any, args: tuple, kwargs: dict) -> Any:
        # Not hooks: torch calls them after an Exception, but not after a KeyboardInterrupt.
        run = self._open(compat.arguments(self._base_signature, args, kwargs))
        token, chunks = FORWARD.set(run), CHUNKS.set(None)
        try:
            return forward(*args, **kwargs)
        finally:
            attention.close_taps()
            attention.set_change(None)
            ROUTING.set((None, None))
            CHUNKS.reset(chunks)
            FORWARD.reset(token)

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
        call, prompt = call_of(self), prompt_of(self)
        if prompt.length is None:  # generate() has done so
            self._carry_on(given.get("past_key_values"))
        brought = placeholders.brought(self, given)
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
            marks, counts, layouts = placeholders.find(self, ids, given, prompt.drafts)
        if marks:
            visual = functools.reduce(torch.logical_or, marks.values())
            self._check_asked(given)
        prompts = {}
        if marks and self.reads_prompts:
            labels = None if call is None else call.labels
            prompts = placeholders.prompts(given, marks, counts, prompt.length, labels)
        own = Brought(
            mask, call, counts, marks, layouts, prompts,
            reductions={k: encoders[k].mllm_reduction for k in marks if encoders.get(k)},
            answering=answering,
        )  # fmt: skip
        routing = self._new_routing(None, None) if call is None else call.routing
        return DecoderRun(self, own, visual, routing=routing)

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

    def _answering(self, cache: Any) -> bool:
        """Whether all rows are tokens that generate() has added: none is padding or visual."""
        length = prompt_of(self).length
        return length is not None and cache is not None and 0 < length <= cache.get_seq_length()

    def _decoder_pre(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        run = run_of(self)
        if run is None:
            return None
        kwargs = {**dict(zip(self._decoder_names, args, strict=False)), **kwargs}
        position, rows = kwargs.get("position_ids"), kwargs["inputs_embeds"].shape[1]
        if position is not None and position.shape[-1] > rows:
            # Called by hand with a mask, Qwen-VL counts stored tokens as well.
            kwargs["position_ids"] = position[..., -rows:]
        call, length = run.brought.call, prompt_of(self).length
        labels = None if call is None else call.labels
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
        prompt, rows = prompt_of(self), kwargs["inputs_embeds"].shape[1]
        if prompt.length is None:
            size = self.prefill_chunk_size
            if size is not None:
                check_chunks(self, size)
        else:
            size = None if self._answering(kwargs.get("past_key_values")) else prompt.chunk
        return size if size is not None and rows > size else None

    def _read_chunks(self, chunks: Chunks) -> dict[str, Any]:
        """Read all chunks but the last; returns the decoder's arguments for that one."""
        CHUNKS.set(chunks)
        for run, kwargs in chunks:
            FORWARD.set(run)
            attention.close_taps()
            self._open_taps(run)
            if not run.ends:
                chunks.add(run, self.family.decoder.forward(**kwargs))
        return kwargs

    def _decoder_post(self, module: nn.Module, args: tuple, output: Any) -> Any:
        run, chunks = run_of(self), CHUNKS.get()
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
        prompt = prompt_of(self)
        if prompt.drafts or drafting():
            return
        past, rows, length = run.past_logical, run.full.valid.shape[1], prompt.length
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
        call = run.brought.call
        asked = 0 if call is None else call.logits_to_keep
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
            chunks=[] if CHUNKS.get() is None else CHUNKS.get().rows,
            experts=self.upcycled.costs(run.routing),
            notes=notes,
        )
        self._records.append(record)
