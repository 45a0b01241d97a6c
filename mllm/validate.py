"""What can be refused before anything runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mllm import compat
from mllm.compressors.base import AttentionRows, TokenReducer
from mllm.errors import PlanError

if TYPE_CHECKING:
    from mllm.patcher import Patched


def check_plan(patched: Patched, unvalidated: bool) -> None:
    """Refuse a plan that its model cannot run.

    Args:
        patched: the model and its plan; no hook is installed yet.
        unvalidated: whether backends that were never run are welcome.

    Raises:
        PlanError: says what would work.
    """
    family, plan = patched.family, patched.plan
    compat.warn_if_untested()
    if "mllm_patched" in family.base.__dict__:
        raise PlanError(
            "the model is already patched",
            argument="model",
            given=type(patched.model).__name__,
            expected="one plan with all stages, or remove() first",
        )
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
    if len({patched.positions(s) for _, s in patched.reducers}) > 1:
        raise PlanError(
            "pre-LLM stages disagree about positions",
            argument="positions",
            given=", ".join(f"{s.info.name}={patched.positions(s)}" for _, s in patched.reducers),
            expected="one choice for all pre-LLM stages",
        )
    depth = len(patched.layers)
    for _, stage in patched.pruners:
        first = max(stage.first_layer, family.first_cut)
        if not first <= stage.layer < depth:
            raise PlanError(
                f"{stage.info.name}: rows cannot leave before layer {stage.layer}"
                + (
                    ", where the model still adds features to them"
                    if stage.layer < family.first_cut
                    else ": it is outside of the model"
                ),
                argument="layer",
                given=stage.layer,
                expected=f"{first} <= layer < {depth}",
            )
    grid = family.native_grid()
    for stage in plan.stages:
        _check_fit(patched, stage)
        keep = getattr(stage, "keep", None)
        if isinstance(keep, int) and grid and keep > grid[0] * grid[1]:
            raise PlanError(
                f"{stage.info.name}: keep={keep} is more than the {grid[0] * grid[1]} visual "
                "tokens of an image",
                argument="keep",
                given=keep,
                expected=f"1 <= keep <= {grid[0] * grid[1]}",
            )
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
            f"{attend} measures windows in stored slots, not in tokens",
            argument="attn_implementation",
            given=attend,
            expected="sdpa or eager",
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


def _check_fit(patched: Patched, stage: Any) -> None:
    """Refuse a stage that the family cannot do."""
    family, name = patched.family, type(patched.family.model).__name__
    if family.mrope and patched.positions(stage) == "compact":
        raise PlanError(
            f"{name} has rotary positions with rows and columns, which cannot be renumbered",
            argument="positions",
            given="compact",
            expected="original",
        )
    for action in stage.actions:
        if action in family.refuses:
            raise PlanError(
                f"{stage.info.name} cannot work on {name}: {family.refuses[action]}",
                argument="plan",
                given=stage.info.name,
                expected="a method that chooses tokens",
            )


def family_notes(patched: Patched) -> list[str]:
    """What a plan does otherwise on this family than on the paper's model."""
    notes, name = [], type(patched.family.model).__name__
    for stage in patched.plan.stages:
        if not stage.positions and patched.positions(stage) != stage.paper_positions:
            notes.append(f"{stage.info.name}: positions=original, as {name} needs")
        if isinstance(stage, TokenReducer) and patched.site(stage) != stage.site:
            notes.append(
                f"{stage.info.name}: works behind the projector of {name}, without [CLS] as a "
                "token"
            )
        for signal in stage.reads().values():
            window = isinstance(signal, AttentionRows) and patched.windows[signal.layer]
            if window:
                notes.append(
                    f"{stage.info.name}: layer {signal.layer} of {name} sees {window} tokens; "
                    "visual tokens further back score 0"
                )
    return notes
