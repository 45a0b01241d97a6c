"""The parts of a model by name: what is frozen, what is trained, and how fast."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mllm.models import resolve as resolve_family
from mllm.training.recipe import Recipe
from mllm.training.schema import LearningRates

PARTS = ("vision_tower", "multi_modal_projector", "language_model")
NEW = "new_modules"


def parts(model: nn.Module) -> dict[str, str]:
    """Part of every parameter, by the parameter's name.

    Args:
        model: of a supported family, without adapters.

    Raises:
        PlanError: the family is not supported.
    """
    family = resolve_family(model)
    tower = {id(p) for p in family.tower.parameters()}
    projector = {id(p) for p in (*family.projector.parameters(), *family.new_parameters())}
    head = model.get_output_embeddings()
    language = {id(p) for module in (family.decoder, head) for p in module.parameters()}

    def part(parameter: nn.Parameter) -> str:
        if id(parameter) in language:
            return "language_model"
        # Some towers hold their projector; separators of rows stand beside it.
        inside = id(parameter) in tower and id(parameter) not in projector
        return "vision_tower" if inside else "multi_modal_projector"

    return {name: part(p) for name, p in model.named_parameters(remove_duplicate=False)}


def freeze(model: nn.Module, recipe: Recipe) -> None:
    """Freeze what the `freeze_*` flags of the recipe name, and what its method does not train."""
    found = parts(model)
    frozen = {part for part in PARTS if getattr(recipe.model, f"freeze_{part}")}
    for name, parameter in model.named_parameters():
        if found[name] in frozen or recipe.method.type in ("router", "moe"):
            parameter.requires_grad_(False)
    if recipe.method.dense_ffn:
        family = resolve_family(model)
        for layer in range(len(family.layers)):
            family.mlp(layer).requires_grad_(True)


def with_tower(
    recipe: Recipe, model: nn.Module, processor: Any = None, weights: bool = True
) -> tuple[Any, Any]:
    """The model with the recipe's tower, and its processor; as they are where it names none.

    Args:
        recipe: the recipe.
        model: on the meta device for a tower without weights.
        processor: the model's own; None where only the model is wanted.
        weights: whether the encoders' weights are read; otherwise they are small and random, or on
            the meta device with the model.

    Raises:
        PlanError, DataError: see :func:`mllm.with_tower`.
    """
    part = recipe.model.tower
    if part is None:
        return model, processor
    from mllm.models.towers import TOWERS, with_tower

    kind, fields = TOWERS[part.type], part.model_extra or {}
    torch.manual_seed(recipe.train.get("seed", 42))
    if weights:
        tower = kind.of(*part.encoders, **fields)
    else:
        with torch.device("meta"):
            tower = kind.of(*part.encoders, weights=False, **fields)
        if model.device.type != "meta":
            tower = kind(tower.config.narrow())
    return with_tower(model, tower, processor)


def reset_projector(model: nn.Module) -> None:
    """Draw the weights of the projector anew, as its layers are made."""
    for module in resolve_family(model).projector.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def trained(model: nn.Module, before: dict[str, str]) -> Iterable[tuple[str, nn.Parameter, str]]:
    """Every parameter that is trained, with its name and its part; `new_modules` among them.

    Args:
        model: perhaps wrapped by PEFT.
        before: what `parts` said of the model before it was wrapped.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter, before.get(_bare(name), NEW)


def _bare(name: str) -> str:
    """The name without what PEFT wraps around the model and around what it trains whole."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    head, saved, tail = name.partition(".modules_to_save.")
    return f"{head}.{tail.partition('.')[2]}" if saved else name


def seat(name: str, before: dict[str, str]) -> str:
    """The part in which a new parameter sits, from the names around it."""
    bare = _bare(name)
    while "." in bare:
        bare = bare.rsplit(".", 1)[0]
        for known, part in before.items():
            if known.startswith(bare + "."):
                return part
    return "language_model"


def seats(model: nn.Module, before: dict[str, str]) -> set[str]:
    """The parts in which something is trained, new or not.

    Args:
        model: perhaps wrapped by PEFT.
        before: what `parts` said of the model before it was wrapped.
    """
    found = trained(model, before)
    return {seat(name, before) if part == NEW else part for name, _, part in found}


def widen(model: nn.Module) -> list[tuple[nn.Parameter, torch.dtype]]:
    """Make what is trained fp32, in which small steps are not rounded away.

    Returns:
        What was half precision, and which.
    """
    found = []
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            found.append((parameter, parameter.dtype))
            parameter.data = parameter.data.float()
    return found


def groups(
    model: nn.Module,
    before: dict[str, str],
    rates: LearningRates,
    rate: float,
    decayed: Iterable[str],
    decay: float,
) -> list[dict[str, Any]]:
    """Parameter groups of an optimizer: one for each rate and decay.

    Args:
        model: perhaps wrapped by PEFT.
        before: what `parts` said of the model before it was wrapped.
        rates: of the recipe.
        rate: `train.learning_rate`, of what has none of its own.
        decayed: names of the parameters that decay.
        decay: `train.weight_decay`.
    """
    decayed = set(decayed)
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter, part in trained(model, before):
        own = getattr(rates, part)
        if own is None and part == NEW:
            own = getattr(rates, seat(name, before))
        key = (own or rate, decay if name in decayed else 0.0)
        found.setdefault(key, []).append(parameter)
    return [
        {"params": members, "lr": lr, "weight_decay": weight_decay}
        for (lr, weight_decay), members in found.items()
    ]
