"""What `tune` looks for: the cheapest plan within a loss, or the most accurate within a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from mllm.errors import MllmError

Cost = Literal["flops", "tokens", "kv_bytes", "latency"]
COSTS: tuple[Cost, ...] = get_args(Cost)
WORDS = {
    "flops": "prefill FLOPs",
    "tokens": "visual tokens per layer",
    "kv_bytes": "bytes of the KV cache",
    "latency": "prefill time",
}
_LIMIT = "a share of the unpatched model's such as 40%, or an absolute number above 0"


@dataclass(frozen=True)
class Goal:
    """The fastest plan within a loss, or the most accurate one within a budget.

    Attributes:
        cost: what is saved, or limited.
        max_loss: points of accuracy (0 to 100) that may be lost; None with a budget.
        budget: most of the cost; None with `max_loss`.
        relative: whether `budget` is a share of what the unpatched model needs, not a number of
            FLOPs, tokens, bytes or seconds per question.
    """

    cost: Cost = "flops"
    max_loss: float | None = None
    budget: float | None = None
    relative: bool = False

    @classmethod
    def of(
        cls,
        *,
        max_loss: float | None = None,
        objective: str | None = None,
        budgets: Mapping[str, str | float | None],
    ) -> Goal:
        """From arguments of which one is given.

        Args:
            max_loss: in points.
            objective: the cost to save within `max_loss`; None is `flops`.
            budgets: by cost; a text may be a percentage.

        Raises:
            MllmError: none is given, or several, or a value that cannot be meant.
        """
        given = {f"max_{cost}": value for cost, value in budgets.items() if value is not None}
        options = [_flag("max_loss"), *(_flag(f"max_{cost}") for cost in COSTS)]
        if (max_loss is not None) + len(given) != 1:
            several = [*(["max_loss"] if max_loss is not None else []), *given]
            said = " and ".join(map(_flag, several)) if several else "none"
            raise MllmError(
                f"tune needs one goal, and {said} is given: the loss that is allowed, or a budget",
                argument=several[-1] if several else "max_loss",
                given=said,
                expected="one of " + ", ".join(options),
            )
        if objective is not None and (objective not in COSTS or max_loss is None):
            why = "is no cost" if objective not in COSTS else "goes with a loss, not with a budget"
            raise MllmError(
                f"the objective {objective!r} {why}",
                argument="objective",
                given=objective,
                expected=f"{' or '.join(COSTS)}, with --max-loss",
            )
        if max_loss is not None:
            if not 0 <= max_loss < 100:
                raise MllmError(
                    f"a loss of {max_loss:g} points of accuracy cannot be allowed",
                    argument="max_loss",
                    given=max_loss,
                    expected="points from 0 to 100, such as 1",
                )
            return cls(objective or "flops", max_loss=max_loss)
        ((name, value),) = given.items()
        return cls(name.removeprefix("max_"), None, *_limit(name, value))

    def excess(self, value: float, share: float) -> float:
        """By which part a cost is above the budget; 0 or less is within it."""
        return (share if self.relative else value) / self.budget - 1

    def check(self, unpatched: float) -> None:
        """Refuse a budget that changes nothing.

        Raises:
            MllmError: the unpatched model is within the budget.
        """
        if self.budget is not None and not self.relative and self.budget >= unpatched:
            raise MllmError(
                f"the unpatched model needs {unpatched:.4g} {WORDS[self.cost]}, which is within "
                f"{self.budget:g}: there is nothing to tune",
                argument=f"max_{self.cost}",
                given=self.budget,
                expected=f"less than {unpatched:.4g}",
            )

    def __str__(self) -> str:
        if self.budget is None:
            return f"fewest {WORDS[self.cost]} with a loss of at most {self.max_loss:g} points"
        most = f"{self.budget:.4g}"
        if self.relative:
            most = f"{self.budget:.4g} of the unpatched model's"
        return f"best accuracy with at most {most} {WORDS[self.cost]}"

    def as_dict(self) -> dict[str, Any]:
        """For the evidence."""
        return asdict(self)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _limit(name: str, value: str | float) -> tuple[float, bool]:
    """A budget, and whether it is a share."""
    text = str(value).strip()
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    relative = text.endswith("%")
    if not 0 < number < (100 if relative else math.inf):
        raise MllmError(
            f"{_flag(name)} {value} cannot be met: it is no {_LIMIT}",
            argument=name,
            given=value,
            expected=_LIMIT,
        )
    return (number / 100, True) if relative else (number, False)
