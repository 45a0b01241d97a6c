"""Plans for evaluation: the plan without stages, and plans that meet a token budget."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
    return Plan(made.stages, seed or made.seed)


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

    A pre-LLM stage keeps `budget` tokens. An in-LLM stage counts the layers before its cut, where
    all tokens are still there; if the budget is out of reach at its layer, the cut moves down
    to the first layer at which it is not. A stack of both gives the language model 1.5 times the
    budget.

    Args:
        template: spec text of one pre-LLM stage, one in-LLM stage, or one of each.
        budget: visual tokens per image, averaged over the decoder layers (input to layer).
        tokens: visual tokens of an image.
        num_layers: decoder layers.
        seed: seed of the plan.

    Raises:
        PlanError: a template of another kind, or a budget that no layer reaches.
    """
    stages = Plan.from_spec(template).stages
    kinds = [stage.info.stage for stage in stages]
    if kinds not in (["pre_llm"], ["llm"], ["pre_llm", "llm"]):
        expected = "one pre-LLM stage, one in-LLM stage, or a pre-LLM stage + an in-LLM stage"
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
    if kinds == ["pre_llm"]:
        return Plan([stages[0].replace(keep=budget)], seed)
    *first, pruner = stages
    if first:
        tokens = min(tokens, round(STACK_SURPLUS * budget))
        first = [first[0].replace(keep=tokens)]
    pruner = pruner.at_depth(num_layers)
    for layer in range(pruner.layer, pruner.first_layer - 1, -1):
        try:
            keep = keep_for_average(budget, tokens, layer, num_layers)
        except PlanError as error:
            unreachable = error
        else:
            return Plan([*first, pruner.replace(layer=layer, keep=keep)], seed)
    raise unreachable
