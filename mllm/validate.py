"""What can be refused before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mllm import compat, flops
from mllm.actions import MOVES_ROWS
from mllm.capture import reads_before
from mllm.compressors.base import (
    AttentionRows,
    BlockFeatures,
    CacheCompressor,
    Hidden,
    Joint,
    TokenReducer,
    Unprojected,
    Unreduced,
    Views,
    VisionAttention,
    VisionKeys,
)
from mllm.errors import PlanError
from mllm.plan import Plan

if TYPE_CHECKING:
    from mllm.models.base import Family
    from mllm.patcher import Patched


def check_plan(patched: Patched, unvalidated: bool) -> None:
    """Refuse a plan that its model cannot run.

    Args:
        patched: the model and its plan; no hook is installed yet.
        unvalidated: whether backends that were never run are welcome.

    Raises:
        PlanError: says what would work.
    """
    compat.warn_if_untested()
    _check_model(patched)
    _check_before(patched)
    _check_layers(patched)
    _check_tower(patched)
    _check_small(patched)
    _check_beside(patched)
    _check_writers(patched)
    _check_lowrank(patched)
    _check_storage(patched)
    for stage in patched.plan.stages:
        _check_fit(patched, stage)
    _check_budgets(patched)
    _check_windows(patched)
    _check_backends(patched, unvalidated)


def _check_model(patched: Patched) -> None:
    """Refuse a model that has a plan, or whose ranks would choose differently."""
    if "mllm_patched" in patched.family.base.__dict__:
        raise PlanError(
            "the model is already patched",
            argument="model",
            given=type(patched.model).__name__,
            expected="one plan with all stages, or remove() first",
        )
    ranks = compat.tensor_parallel(patched.family.model)
    if ranks > 1:
        raise PlanError(
            f"the model's heads are spread over {ranks} ranks, which would choose differently",
            argument="model",
            given=f"tensor parallel over {ranks} ranks",
            expected="one device, device_map, or data parallel",
        )


def _check_before(patched: Patched) -> None:
    """Refuse pre-LLM stages in an order in which they cannot run, or that disagree."""
    plan = patched.plan
    order = ("pixels", "pre_projector", "post_projector")
    sites = [order.index(patched.site(s)) for _, s in patched.reducers]
    if sites != sorted(sites):
        raise PlanError(
            "pre-LLM stages must follow the picture's way: pixels, before the projector, "
            "after it",
            argument="plan",
            given=plan.spec,
            expected="another order",
        )
    for _, stage in patched.reducers[1:]:
        if stage.first:
            raise PlanError(
                f"{stage.info.name} needs the full grid: two stages would write the same rows",
                argument="plan",
                given=plan.spec,
                expected=f"{stage.info.name} as the first pre-LLM stage",
            )
    if len({patched.positions(s) for _, s in patched.before}) > 1:
        raise PlanError(
            "pre-LLM stages disagree about positions",
            argument="positions",
            given=", ".join(f"{s.info.name}={patched.positions(s)}" for _, s in patched.before),
            expected="one choice for all pre-LLM stages",
        )


def _check_layers(patched: Patched) -> None:
    """Refuse layers that the model does not have, and signals of layers that have not run."""
    family, depth = patched.family, len(patched.layers)
    for _, stage in patched.pruners:
        moves = bool(MOVES_ROWS & set(stage.actions))
        first = max(stage.first_layer, family.first_cut if moves else 0)
        last = depth - 1 if moves else depth
        for layer in stage.at():
            if not first <= layer <= last:
                raise PlanError(
                    f"{stage.info.name}: rows cannot leave before layer {layer}"
                    + (
                        ", where the model still adds features to them"
                        if layer < family.first_cut
                        else ": it is outside of the model"
                    ),
                    argument="layer",
                    given=layer,
                    expected=f"{first} <= layer < {depth}",
                )
    for (number, signal), here in patched.signals.items():
        entering = isinstance(signal, Hidden) and signal.of == "layer"
        if not 0 <= signal.layer < here + (entering or reads_before(signal)):
            raise PlanError(
                f"{patched.plan.stages[number].info.name} acts before layer {here} and cannot "
                f"read {type(signal).__name__} of layer {signal.layer}",
                argument="layer",
                given=signal.layer,
                expected="a layer that has run",
            )


def _check_budgets(patched: Patched) -> None:
    """Refuse more tokens than an image has, where that is known; a preset by its own number."""
    grid = patched.family.native_grid()
    for stage in patched.written if grid else ():
        budgets = getattr(stage, "keep", None)
        budgets = budgets if isinstance(budgets, tuple) else (budgets,)
        keep = max((k for k in budgets if isinstance(k, int)), default=0)
        if keep > grid[0] * grid[1] and not stage.info.trained:
            raise PlanError(
                f"{stage.info.name}: keep={keep} is more than the {grid[0] * grid[1]} visual "
                "tokens of an image",
                argument="keep",
                given=keep,
                expected=f"1 <= keep <= {grid[0] * grid[1]}",
            )


def _check_windows(patched: Patched) -> None:
    """Refuse decoder layers that see less than everything, where no mask can follow."""
    family = patched.family
    config = family.text_config
    kinds = getattr(config, "layer_types", None)
    if kinds is None and getattr(config, "sliding_window", None):
        kinds = ["sliding_attention"]  # Mistral's
    kinds = set(kinds or ()) - {"full_attention"}
    if kinds - ({"sliding_attention"} if family.hybrid else set()):
        raise PlanError(
            "decoder layers that do not see everything are not supported",
            argument="model",
            given=", ".join(sorted(kinds)),
            expected="full_attention",
        )
    attend = compat.attention_name(family.attention(0))
    if family.hybrid and attend not in ("sdpa", "eager"):
        raise PlanError(
            f"{attend} measures windows in stored slots, not in tokens"
            if any(patched.windows)
            else f"{attend} takes no mask of its own, and rows of the prompt see each other",
            argument="attn_implementation",
            given=attend,
            expected="sdpa or eager",
        )


def _check_backends(patched: Patched, unvalidated: bool) -> None:
    """Refuse attention implementations that cannot do or read what the plan asks for."""
    family = patched.family
    attend = compat.attention_name(family.attention(0))
    for _, stage in patched.pruners:
        if {"LogitBias", "Insert"} & set(stage.actions) and "flash" in attend:
            raise PlanError(
                f"{stage.info.name} needs an additive mask, which {attend} cannot take",
                argument="attn_implementation",
                given=attend,
                expected="sdpa or eager",
            )
    for _, stage in patched.compressors:
        stage.check_depth(len(patched.layers))
        if stage.headwise and "flash" in attend:
            chosen = hasattr(stage, "heads")
            raise PlanError(
                f"{stage.info.name}: heads cannot hold different tokens under {attend}",
                argument="heads" if chosen else "attn_implementation",
                given="each" if chosen else attend,
                expected=("heads=shared, or " if chosen else "") + "sdpa or eager",
            )
    tapped = patched.tapped()
    flash = [m for m in tapped if "flash" in compat.attention_name(m)]
    other = [m for m in tapped if compat.attention_name(m) not in compat.SERVED]
    if family.packed:  # flash attention gets all pictures of a packed tower in one call
        blocks = [family.block_attention(i) for i in range(len(family.blocks))]
        other += [m for m in flash if m in blocks]
    if other or (flash and not unvalidated):
        name = compat.attention_name((other or flash)[0])
        raise PlanError(
            f"reading attention under {name} is "
            + ("not supported" if other else "written but was never validated"),
            argument="attn_implementation",
            given=name,
            expected="sdpa or eager" + ("" if other else ", or patch(..., unvalidated=True)"),
        )


def _check_tower(patched: Patched) -> None:
    """Refuse merging in a tower that cannot do it, or before what needs all its tokens."""
    for _, stage in patched.mergers:
        name, family = type(patched.family.model).__name__, patched.family
        others = [
            s
            for _, s in patched.reducers
            if s.replaces or s.projects or s.first or patched.site(s) == "pre_projector"
        ]
        behind = bool(others) and patched.site(others[0]) == "post_projector"
        blocks = stage.blocks(family.block(None) + 1) if len(family.blocks) else []
        backends = {compat.attention_name(family.block_attention(block)) for block in blocks}
        if not len(family.blocks):
            reason = f"that of {name} has no blocks with the visual tokens"
        elif not family.per_token or len(family.feature_blocks()) > 1:
            reason = f"the projector of {name} joins tower tokens, or reads several blocks"
        elif others:
            reason = f"{others[0].info.name} needs all tokens of the tower"
        elif any("flash" in backend for backend in backends):
            reason = "flash attention cannot weigh tokens by their size"
        elif len(patched.mergers) > 1:
            reason = "two stages would merge the same tokens"
        else:
            continue
        raise PlanError(
            f"{stage.info.name} cannot merge in the tower: {reason}",
            argument="plan",
            given=patched.plan.spec,
            expected="a stage behind the projector" + (" that chooses tokens" if behind else ""),
        )


def _check_small(patched: Patched) -> None:
    """Refuse stages that read the tower behind one that gives it smaller pictures."""
    shrinks = [s for _, s in patched.reducers if patched.site(s) == "pixels"]
    inside = VisionAttention | VisionKeys | Unprojected | BlockFeatures | Joint
    for _, stage in patched.before if shrinks else ():
        reads = any(isinstance(signal, inside) for signal in stage.reads().values())
        if reads or patched.site(stage) in ("tower", "pre_projector"):
            raise PlanError(
                f"{stage.info.name} works on the patches of the tower, and {shrinks[0].info.name} "
                "leaves it fewer of them",
                argument="plan",
                given=patched.plan.spec,
                expected="stages that read features behind the projector, or work in the LLM",
            )


def _check_beside(patched: Patched) -> None:
    """Refuse stages that read what others have taken away, or what the family has no place for."""
    plan, name = patched.plan, type(patched.family.model).__name__
    for _, stage in patched.pruners:
        signals = list(stage.reads().values())
        views = any(isinstance(signal, Views) for signal in signals)
        early = patched.early or patched.replaces
        early = early or any(patched.site(s) == "pixels" for _, s in patched.reducers)
        if (views or Unreduced() in signals) and early:
            raise PlanError(
                f"{stage.info.name} needs all visual tokens behind the projector, and a stage "
                "before it takes some away",
                argument="plan",
                given=plan.spec,
                expected="stages behind the projector",
            )
        if views and (patched.family.first_cut or len(patched.view_grids) > 1):
            reason = "has tiles in two grids"
            if patched.family.first_cut:
                reason = "adds features of inner tower blocks to the same rows by itself"
            raise PlanError(
                f"{stage.info.name} cannot add finer views: {name} {reason}",
                argument="plan",
                given=plan.spec,
                expected="another model, or one grid for all stages",
            )


def _check_writers(patched: Patched) -> None:
    """Refuse two stages that write rows before the same decoder layer."""
    writers: dict[int, str] = {}
    for _, stage in patched.pruners:
        for layer in stage.at() if "Write" in stage.actions else ():
            if layer in writers:
                raise PlanError(
                    f"{writers[layer]} and {stage.info.name} both write rows before layer {layer}",
                    argument="plan",
                    given=patched.plan.spec,
                    expected="one of them, or another layer",
                )
            writers[layer] = stage.info.name


def _check_storage(patched: Patched) -> None:
    """Refuse what would be kept twice, stored in two forms, or chosen behind that."""
    stages = [stage for _, stage in patched.compressors]
    names = [stage.info.name for stage in stages]
    for stage in stages:
        if stage.keeps and names.count(stage.info.name) > 1:
            raise PlanError(
                f"{stage.info.name} is there twice, and one would take what the other keeps",
                argument="plan",
                given=patched.plan.spec,
                expected=f"{stage.info.name} once",
            )
    forms = [stage for stage in stages if stage.stores]
    if len(forms) > 1:
        raise PlanError(
            f"{forms[0].info.name} and {forms[1].info.name} both say how tokens are stored",
            argument="plan",
            given=patched.plan.spec,
            expected="one of them",
        )
    for stage in forms:
        if stage is not stages[-1]:
            parts = sorted(patched.plan.written, key=_says_form)
            raise PlanError(
                f"{stages[-1].info.name} chooses tokens behind {stage.info.name}, which has stored "
                "them in another form by then",
                argument="plan",
                given=patched.plan.spec,
                expected=Plan(parts).spec,
            )
        stage.fits(flops.head_dim(patched.family.text_config))


def _says_form(written: Any) -> bool:
    """Whether a stage, or one that it stands for, says how tokens are stored."""
    stages = written.expand() if hasattr(written, "expand") else [written]
    return any(getattr(stage, "stores", False) for stage in stages)


def _check_lowrank(patched: Patched) -> None:
    """Refuse what cannot be on the same layers as low-rank factors."""
    stages = [stage for _, stage in patched.compressors if stage.lowrank]
    if not stages:
        return
    own, others = stages[0].info.name, [s for s in patched.plan.stages if s is not stages[0]]
    for other in others:
        reads = isinstance(other, CacheCompressor) and other.reads() and other.watches
        if other in stages or getattr(other, "stores", False):
            reason = "both say how tokens are stored"
        elif "Evict" in other.actions:
            reason = (
                "a left factor has one row per token for all heads and layers of a group, so a "
                "token that leaves some of them would free nothing, and layers that hold different "
                "tokens share no factor"
            )
        elif stages[0].selects and (reads or {"LogitBias", "Turn"} & set(other.actions)):
            reason = "a step does not look at all that is stored"
        else:
            continue
        raise PlanError(
            f"{own} and {other.info.name} cannot work on the same layers: {reason}",
            argument="plan",
            given=patched.plan.spec,
            expected="one of them; methods before and inside the LLM go with either",
        )


def _check_fit(patched: Patched, stage: Any) -> None:
    """Refuse a stage that the family cannot do."""
    family, name = patched.family, type(patched.family.model).__name__
    for signal in stage.reads().values():
        inside = isinstance(signal, BlockFeatures | VisionAttention | VisionKeys)
        if inside and not len(family.blocks):
            raise PlanError(
                f"{stage.info.name} cannot work on {name}: it reads blocks of the tower, which has "
                "none over the visual tokens",
                argument="plan",
                given=stage.info.name,
                expected="a method that reads features, or works in the LLM",
            )
        _check_blocks(stage, signal, len(family.blocks) if inside else 0)
        if isinstance(signal, VisionAttention) and signal.query == "cls" and not family.prefix:
            raise PlanError(
                f"{stage.info.name} reads the attention of [CLS], and the tower of {name} has none",
                argument="query",
                given="cls",
                expected="received, or auto",
            )
        if isinstance(signal, Joint) and (
            patched.space is None or patched.mergers or len(family.feature_blocks()) > 1
        ):
            raise PlanError(
                f"{stage.info.name} compares patches with words in CLIP's space, and {name} has "
                + ("no text tower" if patched.space is None else "no features of its last block"),
                argument="relevance",
                given="clip",
                expected="mllm.joint.attach(model, space) before the patch, or relevance=llm",
            )
    if getattr(stage, "projects", False) and family.joins:
        raise PlanError(
            f"{stage.info.name} gives the projector tokens of its own, and that of {name} joins "
            "patches",
            argument="compress",
            given="before",
            expected="behind",
        )
    if family.mrope and patched.positions(stage) == "compact":
        raise PlanError(
            f"{name} has rotary positions with rows and columns, which cannot be renumbered",
            argument="positions",
            given="compact",
            expected="original",
        )
    if family.mrope and "Turn" in stage.actions:
        raise PlanError(
            f"{stage.info.name} cannot turn queries and keys of {name}: its rotary positions have "
            "rows and columns",
            argument="gamma",
            given="above 0",
            expected="0, or a model with one position per token",
        )
    for action in stage.actions:
        if action in family.refuses:
            raise PlanError(
                f"{stage.info.name} cannot work on {name}: {family.refuses[action]}",
                argument="plan",
                given=stage.info.name,
                expected="a method that chooses tokens",
            )


def _check_blocks(stage: Any, signal: Any, depth: int) -> None:
    """Refuse tower blocks outside of a tower of `depth` blocks; they would be counted around it."""
    named = getattr(signal, "blocks", None) or (getattr(signal, "block", None),)
    for block in named if depth else ():
        if isinstance(block, int) and not -depth <= block < depth:
            raise PlanError(
                f"{stage.info.name} reads block {block} of a tower that has {depth}",
                argument="block",
                given=block,
                expected=f"{-depth} <= block < {depth}",
            )


def check_generation(config: Any, given: Mapping[str, Any]) -> None:
    """Refuse ways of generating that no plan can follow.

    Args:
        config: the generation config.
        given: further arguments of `generate`, which go before the config.

    Raises:
        PlanError: another cache than a dynamic one, or chunks of a prompt without a cache or with
            assisted decoding.
    """
    name = given.get("cache_implementation") or config.cache_implementation
    if name not in (None, "dynamic"):
        raise PlanError(
            f"a cache of the kind {name!r} cannot hold a plan's per-layer lengths",
            argument="cache_implementation",
            given=name,
            expected="dynamic",
        )
    if given.get("assistant_early_exit") or getattr(config, "assistant_early_exit", None):
        raise PlanError(
            "assistant_early_exit drafts without the pictures, and not with the first layers of a "
            "model that has a tower",
            argument="assistant_early_exit",
            given=given.get("assistant_early_exit") or config.assistant_early_exit,
            expected="custom_generate=mllm.SelfSpeculation(exit=...)",
        )
    chunk = given.get("prefill_chunk_size") or config.prefill_chunk_size
    drafted = [
        name
        for name in ("assistant_model", "prompt_lookup_num_tokens")
        if given.get(name) or getattr(config, name, None)
    ]
    if chunk and (drafted or given.get("use_cache", config.use_cache) is False):
        raise PlanError(
            "a prompt is read in chunks over a cache, and without candidates behind it",
            argument="prefill_chunk_size",
            given=chunk,
            expected=f"None, or no {drafted[0]}" if drafted else "None, or use_cache=True",
        )


def check_repeats(family: Family, config: Any, given: Mapping[str, Any]) -> None:
    """Refuse to repeat prompts with pictures that transformers does not repeat.

    Args:
        family: of the pictures that the prompts have.
        config, given: as for :func:`check_generation`.

    Raises:
        PlanError: beams, or several answers to a prompt.
    """
    for name in () if family.repeats else ("num_beams", "num_return_sequences"):
        count = given.get(name) or getattr(config, name, None) or 1
        if count > 1:
            raise PlanError(
                f"transformers cannot repeat prompts of {type(family.model).__name__} that have "
                "videos",
                argument=name,
                given=count,
                expected=f"{name}=1, or pictures",
            )


def check_speculation(stages: Sequence[Any]) -> None:
    """Refuse a plan beside :class:`mllm.SelfSpeculation` that decides by tokens of drafts.

    Raises:
        PlanError: a stage on the cache, one that decides about later tokens, or an early exit.
    """
    for stage in stages:
        on_cache, late = stage.site == "cache", getattr(stage, "decodes", False)
        if on_cache or late or getattr(stage, "exit", None) is not None:
            raise PlanError(
                f"{stage.info.name} acts on tokens behind the prompt, and those of a draft may be "
                "taken back",
                argument="custom_generate",
                given=stage.info.name,
                expected="stages that choose tokens of the prompt, or layerskip without exit",
            )


def family_notes(patched: Patched) -> list[str]:
    """What a plan does otherwise on this family than on the paper's model."""
    notes, name = patched.family.notes(), type(patched.family.model).__name__
    for stage in patched.plan.stages:
        if not stage.positions and patched.positions(stage) != stage.paper_positions:
            notes.append(f"{stage.info.name}: positions=original, as {name} needs")
        if isinstance(stage, TokenReducer) and patched.site(stage) != stage.site:
            notes.append(
                f"{stage.info.name}: works behind the projector of {name}, without [CLS] as a "
                "token"
            )
    windowed: dict[tuple[str, int], list[int]] = {}
    for number, signal in patched.signals:
        window = isinstance(signal, AttentionRows) and patched.windows[signal.layer]
        if window:
            method = patched.plan.stages[number].info.name
            layers = windowed.setdefault((method, window), [])
            layers += [signal.layer] * (signal.layer not in layers)
    for (method, window), layers in windowed.items():
        one = f"layer {layers[0]} of {name} sees"
        seen = one if len(layers) == 1 else f"{len(layers)} layers of {name} see"
        notes.append(f"{method}: {seen} {window} tokens; visual tokens further back score 0")
    return notes
