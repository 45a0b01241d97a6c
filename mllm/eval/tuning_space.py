"""The plans among which `tune` searches: at most one method per place, its budget and its layer."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm.errors import MllmError, PlanError
from mllm.eval.plans import budgets_slots
from mllm.loading import model_path
from mllm.plan import PLAN_FILE, Plan, get_method
from mllm.plan import methods as known_methods

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

BEFORE, INSIDE, CACHE = "before", "inside", "cache"
PLACES = (BEFORE, INSIDE, CACHE)
NONE = "none"
LEARNT = "learnt"
#: Searched unless others are named; the sanity methods first, and those on the cache only where
#: its memory is what counts.
METHODS = (
    "random", "stride", "avgpool", "downsample",
    "visionzip", "divprune", "cdpruner", "vispruner",
    "fastv", "dart", "pyramiddrop", "sparsevlm",
)  # fmt: skip
CACHE_METHODS = ("randomkv", "streamingllm", "h2o", "snapkv", "adakv")
SHARES = (0.02, 0.03, 0.045, 0.065, 0.09, 0.12, 0.17, 0.23, 0.3, 0.4, 0.55, 0.75)


@dataclass(frozen=True)
class Candidate:
    """A method as it was named, and which of its parameters the search sets.

    Attributes:
        stage: the method with what was written of it.
        place: where it works: `before` the LLM (tower and pixels too), `inside` it, on the `cache`.
        budgeted: whether its budget is searched.
        layered: whether its layer is searched.
    """

    stage: Any
    place: str
    budgeted: bool
    layered: bool

    @classmethod
    def of(cls, template: str) -> Candidate:
        """From spec text; what it sets stays.

        Raises:
            PlanError: no such method, a stack, a whole paper under one name, or one that must be
                trained.
        """
        stages = Plan.from_spec(template).written
        stage, fault = stages[0], None
        if len(stages) > 1:
            fault = "is a stack; stacks are what is searched: name its methods apart"
        elif stage.info.trained:
            fault = "must be trained, and what has been is searched with --adapter"
        elif stage.site not in _PLACE_OF:
            own = "+".join(own.info.name for own in Plan(stages).stages)
            fault = f"is several stages; name those of them that you mean: {own}"
        if fault:
            raise PlanError(
                f"{template} cannot be searched: it {fault}",
                argument="methods",
                given=template,
                expected=f"methods such as {', '.join(METHODS)}",
            )
        given = {pair.split("=")[0] for pair in template.split(":")[1:]}
        has = {field.name for field in dataclasses.fields(stage)} - given
        place = _PLACE_OF[stage.site]
        budgeted = budgets_slots(stage) and "budget" in has if place == CACHE else "keep" in has
        return cls(stage, place, budgeted, place == INSIDE and "layer" in has)

    def at(self, share: float | None, layer: int | None, tokens: int, num_layers: int) -> Any:
        """The stage with what was searched.

        Args:
            share: of the visual tokens that it leaves (a schedule: that layers see on average), or
                of the slots of the cache.
            layer: 0-based layer before which it acts.
            tokens: visual tokens of an image.
            num_layers: decoder layers.

        Raises:
            PlanError: the method cannot do that.
        """
        stage = self.stage if layer is None else self.stage.replace(layer=layer)
        if share is None:
            return stage
        if self.place == CACHE:
            return stage.replace(budget=share)
        if hasattr(stage, "for_average"):
            return stage.for_average(share * tokens, tokens, num_layers)
        return stage.replace(keep=share)


_PLACE_OF = {
    "pixels": BEFORE, "tower": BEFORE, "pre_projector": BEFORE, "post_projector": BEFORE,
    "decoder": INSIDE, "cache": CACHE,
}  # fmt: skip


@dataclass(frozen=True)
class Learnt:
    """A plan that has been trained; one candidate by itself, for it was trained as a whole.

    Attributes:
        plan: with the folder of what it has learnt, if that is more than the model's own weights.
        trained: budgets that one set of weights serves; None where there is one plan alone.
    """

    plan: Plan
    trained: Sequence[int] | None

    @classmethod
    def of(cls, folder: str | os.PathLike, model: str | os.PathLike) -> Learnt:
        """From a folder that training wrote.

        Args:
            folder: `routers` or `model` of a run, or what `save_adapter` wrote.
            model: path of the model. Some methods (M3) teach the model and have no weights of
                their own: of these the folder is the model's.

        Raises:
            PlanError: nothing was learnt there, or not by this model.
        """
        from mllm.routers.adapter import HEADER, is_adapter

        plan = Plan.of(folder) if (Path(folder) / PLAN_FILE).is_file() else None
        own = Path(model_path(model)).resolve() == Path(folder).resolve()
        if plan is None or not any(stage.info.trained for stage in plan.stages):
            fault = "has no plan" if plan is None else f"has {plan.spec}, which learns nothing"
        elif is_adapter(folder) or own:
            fault = None
        else:
            fault = f"has no {HEADER}, and is not the model that has learnt"
        if fault:
            raise PlanError(
                f"{folder} is no adapter: it {fault}",
                argument="adapter",
                given=folder,
                expected=f"a folder with {PLAN_FILE} and {HEADER}, as training writes it",
            )
        budgets = [stage.trained() for stage in plan.stages if "keep" in stage.free]
        return cls(plan, budgets[0] if len(budgets) == 1 else None)

    @property
    def names(self) -> set[str]:
        """Methods that have to be learnt, under the names that a plan may give them."""
        stages = (*self.plan.written, *self.plan.stages)
        return {stage.info.name for stage in stages if stage.info.trained}

    def budgets(self, shares: Sequence[float], tokens: int) -> list[int]:
        """Trained budgets to choose from, rising: all, or of many those next to the shares; none
        above the tokens of an image, but for the least."""
        fit = sorted(self.trained or ())
        fit = [n for n in fit if n <= tokens] or fit[:1]
        if len(fit) <= len(SHARES):
            return fit
        return sorted({min(fit, key=lambda n: abs(n - share * tokens)) for share in shares})

    def at(self, budget: int) -> Plan:
        """The plan under one of the trained budgets."""
        stages = [
            stage.replace(keep=budget) if "keep" in stage.free else stage
            for stage in self.plan.stages
        ]
        plan = Plan(stages, self.plan.seed)
        plan.folder = self.plan.folder
        return plan


class Space:
    """Candidates, shares and layers, as Optuna asks for them.

    Args:
        templates: spec texts of one method each; `all` stands for every one that can be searched.
        shares: budgets to choose from, in (0, 1].
        tokens: visual tokens of an image.
        num_layers: decoder layers.
        learnt: a trained plan, which is searched besides.

    Raises:
        PlanError: a template that cannot be searched.
        MllmError: no templates, or shares that are none.
    """

    def __init__(
        self,
        templates: Sequence[str],
        shares: Sequence[float],
        tokens: int,
        num_layers: int,
        learnt: Learnt | None = None,
    ) -> None:
        self.shares = check_shares(shares)
        self.tokens, self.num_layers = tokens, num_layers
        self.learnt = learnt
        self.budgets = learnt.budgets(self.shares, tokens) if learnt else []
        found = candidates(templates, learnt)
        self.places = {
            place: {text: one for text, one in found.items() if one.place == place}
            for place in PLACES
        }
        self.places = {place: own for place, own in self.places.items() if own}

    def design(self) -> list[dict[str, Any]]:
        """What is tried first: every method alone at its paper's layer, with much, then little."""
        much, little = [], []
        without = {}
        if self.learnt:
            first = {LEARNT: self.learnt.plan.spec}
            count = len(self.budgets)
            if count:
                little.append({**first, f"{LEARNT}_budget": count // 3})
                first[f"{LEARNT}_budget"] = 2 * count // 3
            much.append(first)
            without = {LEARNT: NONE}
        for place, own in self.places.items():
            others = {other: NONE for other in self.places if other != place}
            for text, one in own.items():
                first = {place: text, **others, **without}
                if one.layered:
                    layer = one.stage.at_depth(self.num_layers).layer
                    first["layer"] = max(1, min(layer, self.num_layers - 1))
                if one.budgeted:
                    count = len(self.shares)
                    little.append({**first, f"{place}_share": count // 3})
                    first[f"{place}_share"] = 2 * count // 3
                much.append(first)
        return [*much, *little]

    def plan(self, trial: BaseTrial) -> Plan | None:
        """The plan that a trial proposes; None where it proposes no stage at all.

        Raises:
            PlanError: a method cannot do what is proposed.
        """
        if self.learnt:
            spec = self.learnt.plan.spec
            names = [NONE, spec] if self.places else [spec]
            if trial.suggest_categorical(LEARNT, names) == spec:
                if not self.budgets:
                    return self.learnt.plan
                last = len(self.budgets) - 1
                return self.learnt.at(
                    self.budgets[trial.suggest_int(f"{LEARNT}_budget", 0, last)]
                )
        chosen: dict[str, Any] = {}
        for place, own in self.places.items():
            names = [*own] if len(self.places) == 1 else [NONE, *own]
            text = trial.suggest_categorical(place, names)
            if text == NONE:
                continue
            one, share, layer = own[text], None, None
            if one.layered:
                layer = trial.suggest_int("layer", 1, max(1, self.num_layers - 1))
            if one.budgeted:
                share = self.shares[trial.suggest_int(f"{place}_share", 0, len(self.shares) - 1)]
            chosen[place] = one, share, layer
        stages = {
            place: one.at(share, layer, self.tokens, self.num_layers)
            for place, (one, share, layer) in chosen.items()
        }
        if CACHE in stages:  # is asked again, which needs a cache that can go back
            stages = {
                place: stage.replace(positions="original")
                if place != CACHE and stage.positions is None and stage.paper_positions == "compact"
                else stage
                for place, stage in stages.items()
            }
        return Plan(stages.values()) if stages else None


def candidates(templates: Sequence[str], learnt: Learnt | None = None) -> dict[str, Candidate]:
    """Candidates by the text that names them, but for methods of a trained plan.

    Raises:
        PlanError: a template that cannot be searched.
        MllmError: there are none.
    """
    found: dict[str, Candidate] = {}
    for text in templates:
        if learnt and text in learnt.names:
            continue
        if text == "all":
            found |= {name: Candidate.of(name) for name in searchable()}
        else:
            found[text] = Candidate.of(text)
    if not found and not (learnt and templates):
        raise MllmError(
            "no methods to search",
            argument="methods",
            given=templates,
            expected=", ".join((*METHODS, *CACHE_METHODS)),
        )
    return found


def searchable() -> list[str]:
    """Every method that needs no training and is one stage."""
    return [
        row["name"]
        for row in known_methods()
        if not row["trained"] and get_method(row["name"]).site in _PLACE_OF
    ]


def check_shares(shares: Sequence[float]) -> list[float]:
    """`shares`, rising, each once.

    Raises:
        MllmError: there are none, or one is no fraction.
    """
    fits = [isinstance(x, float) and 0 < x <= 1 for x in shares]
    if not fits or not all(fits):
        raise MllmError(
            f"budgets are fractions, not {', '.join(map(str, shares)) or 'none'}",
            argument="budgets",
            given=shares,
            expected="fractions in (0, 1], such as 0.1, 0.25, 0.5",
        )
    return sorted(set(shares))
