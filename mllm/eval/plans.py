"""Plans for evaluation: the plan without stages, and plans that meet a token budget."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mllm
from mllm.errors import PlanError
from mllm.plan import Plan, keep_for_average

if TYPE_CHECKING:
    from mllm.patcher import Patched

UNPATCHED = "unpatched"
# A stacked plan hands this multiple of its budget to the language model and cuts the rest there.
STACK_SURPLUS = 1.5


def make_plan(plan: str | Plan | None, seed: int = 0) -> Plan:
    """A plan from spec text or a folder; None, `none` and `unpatched` give one without stages.

    Args:
        plan: what to make it from.
        seed: seed of the plan; 0 leaves the seed of a plan folder as it is.
    """
    if plan is None or plan in ("none", UNPATCHED):
        return Plan([], seed)
    if isinstance(plan, Plan):
        return plan
    made = Plan.of(plan)
    if seed and seed != made.seed:
        made, made.folder = Plan(made.stages, seed), made.folder
    return made


def with_adapter(plans: Sequence[Plan], folder: str | None) -> list[Plan]:
    """`plans`, with what a folder holds in those that have something to learn.

    Args:
        plans: changed in place.
        folder: written by `save_adapter`, perhaps under another budget; None is none.

    Raises:
        PlanError: no plan learns, or this is no such folder.
    """
    from mllm.routers.adapter import HEADER, is_adapter

    learn = [plan for plan in plans if any(stage.info.trained for stage in plan.stages)]
    if folder is not None and not (learn and is_adapter(folder)):
        raise PlanError(
            f"{folder} is no adapter" if learn else "no plan has something to learn",
            argument="adapter",
            given=folder,
            expected=f"a folder with {HEADER}, and a plan such as tokenflex",
        )
    for plan in learn if folder is not None else ():
        plan.folder = Path(folder)
    return list(plans)


def check_plans(pretrained: str, plans: Sequence[Plan], learnt: bool = False) -> None:
    """:func:`check_on` a model without weights, before any are read.

    Args:
        pretrained: model folder, hub name, or `tiny-llava`.
        plans, learnt: as there.

    Raises:
        DataError: there is no model.
        PlanError: as there.
    """
    from mllm.doctor import skeleton

    check_on(skeleton(pretrained), plans, learnt)


def check_on(model: Any, plans: Sequence[Plan], learnt: bool = False) -> None:
    """Try plans, and what they have learnt, on a model.

    Args:
        model: with or without weights.
        plans: to try.
        learnt: refuse plans that have something to learn and have not learnt it.

    Raises:
        PlanError: a plan that cannot work on it, or an adapter of another model or plan.
    """
    from mllm.patcher import UNTRAINED, UNTRAINED_PROJECTOR

    for plan in plans:
        with patched_with(model, plan) as patched:
            notes = patched.plan_notes if patched is not None and learnt else []
            if any(note.endswith((UNTRAINED, UNTRAINED_PROJECTOR)) for note in notes):
                raise PlanError(
                    f"{plan.spec} has parts that must be trained, and nothing that they have "
                    "learnt: train it (mllm train), and give the folder as the plan, or --adapter",
                    argument="plan",
                    given=plan.spec,
                    expected="a plan folder with an adapter, or --adapter FOLDER",
                )


@contextlib.contextmanager
def patched_with(model: Any, plan: Plan) -> Iterator[Patched | None]:
    """`model` with `plan` inside; None for a plan without stages, which changes nothing."""
    if not plan.stages:
        yield None
        return
    with mllm.patch(model, plan) as patched:
        yield patched


def plan_for_budget(
    template: str, budget: int, *, tokens: int, num_layers: int, seed: int = 0
) -> Plan:
    """`template` with `keep` set so that layers see `budget` visual tokens on average.

    A stage before the decoder, or in the tower, keeps `budget` tokens. A stage inside the decoder
    counts the layers before its cuts, where all tokens are still there: a schedule keeps its
    layers and its shape; one cut moves down to the first layer at which the budget can be
    reached. Of `pact` the `clusters` are set. A stack of both gives the language model 1.5 times
    the budget. Stages without `keep` stay as they are.

    Args:
        template: spec text with one stage before the decoder, one inside, or one of each.
        budget: visual tokens per image, averaged over the decoder layers (input to layer).
        tokens: visual tokens of an image.
        num_layers: decoder layers.
        seed: seed of the plan.

    Raises:
        PlanError: a template of another kind, or a budget that no layer reaches.
    """
    stages = Plan.from_spec(template).stages
    sized = [i for i, stage in enumerate(stages) if hasattr(stage, "keep")]
    inside = [stages[i].site == "decoder" for i in sized]
    if inside not in ([False], [True], [False, True]):
        expected = (
            "one stage before the decoder, one inside, or a stage before and one inside, with keep"
        )
        raise PlanError(
            f"cannot fit {template!r} to a budget; a sweep takes {expected}",
            argument="plans",
            given=template,
            expected=expected,
        )
    if not 1 <= budget <= tokens:
        raise PlanError(
            f"a budget of {budget} visual tokens does not fit a picture of {tokens}",
            argument="budgets",
            given=budget,
            expected=f"1 to {tokens}",
        )
    made = list(stages)
    if not inside[0]:
        tokens = min(tokens, round(STACK_SURPLUS * budget)) if inside[1:] else budget
        made[sized[0]] = stages[sized[0]].replace(keep=tokens)
    if inside[-1]:
        made[sized[-1]] = _for_average(stages[sized[-1]], budget, tokens, num_layers)
    return Plan(made, seed)


def baseline_at(name: str, budget: int | float | None) -> str:
    """The method that `random` means at a budget: on the KV cache it is random eviction."""
    return "randomkv" if name == "random" and isinstance(budget, float) else name


def on_cache(template: str) -> bool:
    """Whether a template consists of methods on the KV cache alone."""
    return all(stage.site == "cache" for stage in Plan.from_spec(template).stages)


def check_protocol(plan: Plan, protocol: str) -> None:
    """Raises PlanError where a plan's answers cannot be read by a protocol.

    Stages before the cache stay out of `context`, where no question is there to choose by, and may
    stand beside one on the cache under `again`. That takes the prompt's end back, so stages before
    the LLM need `positions=original` there.
    """
    if protocol == "prompt":
        return
    other = [stage.info.name for stage in plan.stages if stage.site != "cache"]
    if other and (protocol == "context" or len(other) == len(plan.stages)):
        raise PlanError(
            f"protocol={protocol!r} is about the KV cache, and {', '.join(other)} works before it",
            argument="protocol",
            given=protocol,
            expected="protocol 'prompt', or methods on the KV cache",
        )
    cached = [stage for stage in plan.stages if stage.site == "cache"]
    if protocol == "again" and (names := [s.info.name for s in cached if s.selects]):
        raise PlanError(
            f"protocol='again' takes a part of the prompt back, and {', '.join(names)} then "
            "attends to everything",
            argument="protocol",
            given=protocol,
            expected="protocol 'context' or 'prompt'",
        )


def budgets_slots(stage: Any) -> bool:
    """Whether a stage has a `budget` of stored slots; one that evicts nothing means another."""
    return hasattr(stage, "budget") and "Evict" in stage.actions


def plan_for_share(template: str, share: float, *, seed: int = 0) -> Plan | None:
    """`template` with every `budget` of slots set to a share of them, per layer and KV head.

    Args:
        template: spec text of methods on the KV cache.
        share: of the prompt's tokens, in (0, 1]. Methods without a budget hold all tokens: their
            plan is that of share 1.
        seed: seed of the plan.

    Returns:
        The plan, or None where the template has no budget and `share` is below 1.
    """
    stages = Plan.from_spec(template).stages
    if not any(map(budgets_slots, stages)):
        return Plan(stages, seed) if share == 1 else None
    share = float(share)
    return Plan([s.replace(budget=share) if budgets_slots(s) else s for s in stages], seed)


def _for_average(stage: Any, average: int, tokens: int, num_layers: int) -> Any:
    """A stage inside the decoder under which layers see `average` tokens, or PlanError."""
    if hasattr(stage, "for_average"):
        return stage.for_average(average, tokens, num_layers)
    stage = stage.at_depth(num_layers)
    for layer in range(stage.layer, stage.first_layer - 1, -1):
        try:
            keep = keep_for_average(average, tokens, layer, num_layers)
        except PlanError as error:
            unreachable = error
        else:
            return stage.leaving(keep, tokens).replace(layer=layer)
    raise unreachable
