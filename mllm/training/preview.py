"""What a recipe will do, before it does it: parameters, steps, memory, one real step in small."""

from __future__ import annotations

import copy
import json
import math
import os
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mllm
from mllm.compat import report_targets
from mllm.doctor import skeleton
from mllm.errors import DataError, RecipeError
from mllm.loading import load_processor, model_path
from mllm.plan import Plan
from mllm.pre_llm import check_grids
from mllm.routers.experts import STACKS
from mllm.training import parts
from mllm.training.data import Conversations, load_data
from mllm.training.features import check_features
from mllm.training.launch import World, check_deepspeed
from mllm.training.recipe import Recipe

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def check(recipe: Recipe, data: Conversations, here: World) -> dict[str, Any]:
    """Everything that can be known to fail before weights are read.

    Args:
        recipe: without `stages`.
        data: of the recipe.
        here: the processes of the run.

    Returns:
        `parts`, `experts`, `batch`, `memory`, as in `preview`.

    Raises:
        RecipeError: DeepSpeed, bitsandbytes or what `report_to` names is missing; a layer that the
            decoder has not; a learning rate for what is not trained; adapters in what is frozen;
            samples that fill no batch; processes that cannot share the experts evenly; weights,
            gradients and optimizer alone are more than the memory at hand.
        DataError: a plan, and no picture in the data.
        PlanError: the plan cannot work on the model, or on the videos in the data.
    """
    from mllm.training.finetune import check_four_bits, wrap_lora

    if recipe.parallel.zero is not None:
        check_deepspeed()
    if recipe.method.load_in_4bit:
        check_four_bits()
    _check_reports(recipe)
    known = not data.streamed  # else pictures may come later
    if recipe.plan and known and not any(record.seen for record in data.sample()):
        raise DataError(
            f"none of the {len(data)} conversations has a picture: the plan has nothing to do",
            argument="data",
            given="text only",
            expected="data with pictures, or plan: null",
        )
    model, _ = parts.with_tower(recipe, skeleton(recipe.model.path), weights=False)
    _check_layers(recipe, model.config.get_text_config().num_hidden_layers)
    before = parts.parts(model)
    parts.freeze(model, recipe)
    totals = {part: 0 for part in parts.PARTS}
    for name, parameter in model.named_parameters():
        totals[before[name]] += parameter.numel()
    config = model.config
    wrapped = wrap_lora(model, recipe) if recipe.with_lora else model
    _check_frozen(recipe, parts.seats(wrapped, before))
    with mllm.patch(model, recipe.plan) if recipe.plan else nullcontext() as patched:
        found = list(parts.trained(wrapped, before))
        # Elsewhere frames are pictures.
        as_videos = patched is not None and patched.kinds["video"] is not None
        if as_videos and any(record.videos for record in data.sample()):
            for _, stage in patched.reducers:
                check_grids(stage)
        if recipe.model.feature_cache:
            tower_learns = "vision_tower" in parts.seats(wrapped, before)
            check_features(recipe, model, patched, tower_learns)
        experts, away = _experts(recipe, patched, here)
        rates = _rates(recipe, found, before)
    learnt = {part: 0 for part in (*parts.PARTS, parts.NEW)}
    for _, parameter, part in found:
        learnt[part] += parameter.numel()
    totals[parts.NEW] = learnt[parts.NEW]
    if not sum(learnt.values()):
        raise RecipeError(
            "nothing is trained: what the method would train is frozen",
            argument="model",
            given="all frozen",
            expected="one part free, or other method.target_modules",
        )
    batch = _batch(recipe, len(data), here)
    memory = _memory(recipe, config, totals, learnt, away, batch, data, here)
    if memory["fixed"] > memory["available"]:
        raise RecipeError(
            f"weights, gradients and optimizer alone need {memory['fixed'] / 2**30:.1f} GiB on "
            f"each device, and {memory['available'] / 2**30:.1f} GiB are there",
            argument="parallel",
            given=f"zero={recipe.parallel.zero}, {here.size} processes",
            expected="a higher parallel.zero, more processes, parallel.offload, LoRA, or bfloat16",
        )
    described = {
        part: {
            "parameters": totals[part],
            "trained": learnt[part],
            "learning_rate": rates.get(part),
        }
        for part in totals
    }
    return {"parts": described, "experts": experts, "batch": batch, "memory": memory}


def _experts(recipe: Recipe, patched: Any, here: World) -> tuple[list[dict[str, int]], int]:
    """Experts of each layer and of one process; how many parameters the other processes hold.

    Raises:
        RecipeError: they cannot be shared evenly.
    """
    layers = patched.upcycled.layers if patched is not None else {}
    size = recipe.parallel.ep_size
    uneven = [f"{n} experts" for n in {e.experts for e in layers.values()} if n % size]
    if here.size % size:
        uneven.insert(0, f"{here.size} processes")
    if uneven:
        raise RecipeError(
            f"parallel.ep_size={size} does not divide {uneven[0]}",
            argument="parallel.ep_size",
            given=size,
            expected="a number that divides the processes (--nproc) and the experts of each layer",
        )
    found = [
        {"layer": i, "experts": layer.experts, "per_process": layer.experts // size}
        for i, layer in layers.items()
    ]
    stacks = [getattr(layer, name, None) for layer in layers.values() for name in STACKS]
    whole = sum(p.numel() for p in stacks if p is not None)
    return found, whole - whole // size


def _check_reports(recipe: Recipe) -> None:
    wanted = recipe.train.get("report_to") or []
    for name in [wanted] if isinstance(wanted, str) else wanted:
        if name not in ("none", "all", *report_targets()):
            raise RecipeError(
                f"train.report_to={name!r} cannot be used here: it is not installed, or unknown",
                argument="train.report_to",
                given=name,
                expected=", ".join(("none", *sorted(report_targets()))),
            )


def _check_frozen(recipe: Recipe, seats: set[str]) -> None:
    for part in sorted(seats):
        if getattr(recipe.model, f"freeze_{part}"):
            raise RecipeError(
                f"model.freeze_{part} is true, and method trains something in it",
                argument=f"model.freeze_{part}",
                given=True,
                expected="false, or target_modules, modules_to_save and dense_ffn without that "
                "part (exclude_modules leaves modules out)",
            )


def _check_layers(recipe: Recipe, layers: int) -> None:
    for layer in recipe.method.distill.layers if recipe.method.distill else ():
        if not -layers <= layer < layers:
            raise RecipeError(
                f"method.distill.layers has {layer}, and the decoder has {layers} layers",
                argument="method.distill.layers",
                given=layer,
                expected=f"{-layers} to {layers - 1}",
            )


def _rates(
    recipe: Recipe, trained: list[tuple[str, nn.Parameter, str]], before: dict[str, str]
) -> dict[str, float]:
    """Learning rate of every part that is trained; of new modules, that of most parameters.

    Raises:
        RecipeError: a rate for a part of which nothing is trained.
    """
    given = recipe.learning_rates.model_dump(exclude_none=True)
    rate = recipe.train.get("learning_rate", 5e-5)
    found: dict[str, Counter[float]] = {}
    used = set()
    for name, parameter, part in trained:
        source = part
        if part == parts.NEW and part not in given:
            source = parts.seat(name, before)
        used.add(source)
        found.setdefault(part, Counter())[given.get(source, rate)] += parameter.numel()
    for part in given:
        if part not in used:
            raise RecipeError(
                f"learning_rates.{part} is given, and nothing of it is trained with that rate",
                argument=f"learning_rates.{part}",
                given=given[part],
                expected="a part that is trained, or no rate",
            )
    return {part: counts.most_common(1)[0][0] for part, counts in found.items()}


def _batch(recipe: Recipe, samples: int, here: World) -> dict[str, int]:
    """Effective batch and steps, as the Trainer counts them."""
    train = recipe.train
    per_device = train.get("per_device_train_batch_size", 8)
    accumulation = train.get("gradient_accumulation_steps", 1)
    loaded = math.ceil(samples / (per_device * here.size))
    if train.get("dataloader_drop_last"):
        loaded = samples // (per_device * here.size)
        if not loaded:
            raise RecipeError(
                f"train.dataloader_drop_last leaves nothing to train on: {samples} samples do not "
                f"fill a batch of {per_device} in each of {here.size} processes",
                argument="train.dataloader_drop_last",
                given=True,
                expected="false, or a smaller per_device_train_batch_size",
            )
    per_epoch = max(1, math.ceil(loaded / accumulation))
    steps = train.get("max_steps", -1)
    if steps <= 0:
        steps = math.ceil(train.get("num_train_epochs", 3) * per_epoch)
    return {
        "samples": samples,
        "processes": here.size,
        "per_device": per_device,
        "accumulation": accumulation,
        "effective": per_device * accumulation * here.size,
        "steps_per_epoch": per_epoch,
        "steps": steps,
    }


def _memory(
    recipe: Recipe,
    config: Any,
    totals: dict[str, int],
    learnt: dict[str, int],
    away: int,
    batch: dict[str, int],
    data: Conversations,
    here: World,
) -> dict[str, int]:
    """Bytes on each device. `fixed` is exact up to buffers; `activations` is a rule of thumb.

    `away` parameters are experts of other processes.

    Source: ZeRO, arXiv:1910.02054 (states); Korthikanti et al., arXiv:2205.05198 (activations).
    """
    part, zero = recipe.parallel, recipe.parallel.zero or 0
    half = recipe.train.get("bf16") or recipe.train.get("fp16")
    stored = {"auto": config.dtype or torch.float32}.get(recipe.model.dtype, recipe.model.dtype)
    size = own = BYTES[str(stored).removeprefix("torch.")]
    if part.zero is not None and half:
        size = own = 2  # DeepSpeed computes so, and keeps fp32 weights for its optimizer
    elif half:
        own = 4  # of what is trained
    count, new = sum(totals.values()), sum(learnt.values())
    share = here.size
    weights = 0.55 if recipe.method.load_in_4bit else size
    weights *= (count - away) / (share if zero == 3 else 1)
    weights += (own - size) * (new - away)
    gradients = own * (new / share if zero >= 2 else new - away)
    states = 12 if part.zero is not None and half else 2 * own
    optimizer = states * (new / share if zero >= 1 else new - away)
    if recipe.method.distill:
        weights += size * new
    text = config.get_text_config()
    longest = max((record.length for record in data.sample()), default=0)
    rows = batch["per_device"] * longest
    layer = 34 * rows * text.hidden_size
    again = recipe.train.get("gradient_checkpointing")
    layers = text.num_hidden_layers
    kept = 2 * rows * text.hidden_size * layers + layer if again else layer * layers
    found = {
        "weights": 0 if part.offload == "parameters" else int(weights),
        "gradients": int(gradients),
        "optimizer": 0 if part.offload else int(optimizer),
        "activations": int((1 if half else 2) * kept + 6 * rows * text.vocab_size),
    }
    fixed = found["weights"] + found["gradients"] + found["optimizer"]
    return {
        **found,
        "fixed": fixed,
        "total": fixed + found["activations"],
        "available": _available(here),
    }


def _available(here: World) -> int:
    """Bytes a process can have: of its GPU, or its share of the machine's free memory."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 // here.size
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // here.size


def preview(recipe: Recipe, here: World) -> dict[str, Any]:
    """`mllm train --dry-run`: nothing is written and no weights are read.

    Returns:
        `recipe` as resolved; `parts` `{part: {parameters, trained, learning_rate}}`; `experts`
        `[{layer, experts, per_process}]`, empty where the plan has none; `batch`
        `{samples, processes, per_device, accumulation, effective, steps_per_epoch, steps}`;
        `memory` in bytes per device; `step` `{loss, seconds, parameters}` of one real step of a
        small random model of the same family. A recipe with stages has `stages` instead, all of
        this for each, with its `name`; one from scratch `parts` and `stages`
        `[{name, steps, effective}]`.

    Raises:
        RecipeError, DataError, PlanError: see `check`.
    """
    resolved = recipe.model_dump(exclude={"tiny"})
    if recipe.from_scratch:
        return {"recipe": resolved, **_staged(recipe)}
    if recipe.stages:
        stages = [{"name": name, **_tried(part, here)} for name, part in recipe.tunes()]
        return {"recipe": resolved, "stages": stages}
    return {"recipe": resolved, **_tried(recipe, here)}


def _tried(recipe: Recipe, here: World) -> dict[str, Any]:
    data, digests = load_data(recipe.data)
    found = check(recipe, data, here)
    return {
        **found,
        "data_sha256": digests,
        "skipped": data.skipped,
        "step": rehearse(recipe, data),
    }


def _staged(recipe: Recipe) -> dict[str, Any]:
    from mllm.training.tiny import new_model, new_processor

    model = new_model(new_processor().tokenizer)
    before = parts.parts(model)
    totals = {part: 0 for part in parts.PARTS}
    for name, parameter in model.named_parameters():
        totals[before[name]] += parameter.numel()
    stages = [
        {
            "name": stage.name,
            "steps": stage.train["max_steps"],
            "effective": stage.train.get("per_device_train_batch_size", 8)
            * stage.train.get("gradient_accumulation_steps", 1),
        }
        for stage in recipe.stages
    ]
    described = {part: {"parameters": n, "trained": n} for part, n in totals.items()}
    return {"parts": described, "stages": stages}


def small_like(path: str) -> nn.Module:
    """A random model with the family, depth and vocabulary of `path`, and narrow layers, in fp32.

    The depth stays, because plans name layers; the width of heads stays, because rotary positions
    are shared out over it.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    from mllm.models.towers import TowerConfig

    config = copy.deepcopy(AutoConfig.from_pretrained(model_path(path)))
    text, vision = config.get_text_config(), config.vision_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    narrow = {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 2 * head}
    text.update(narrow | {"head_dim": head, "intermediate_size": 64})
    heads = "num_heads" if hasattr(vision, "num_heads") else "num_attention_heads"
    if isinstance(vision, TowerConfig):
        config.vision_config = vision.narrow()
        config.vision_config.text_width = vision.text_width and text.hidden_size
    else:
        vision.update({"hidden_size": 64, "intermediate_size": 64, heads: 4})
    if hasattr(vision, "out_hidden_size"):
        vision.out_hidden_size = text.hidden_size
    return AutoModelForImageTextToText.from_config(
        config, dtype=torch.float32, attn_implementation="sdpa"
    )


def rehearse(recipe: Recipe, data: Conversations) -> dict[str, Any]:
    """One optimizer step of a small random model on the recipe's own data, plan and method."""
    from mllm.training.finetune import finetune

    processor = load_processor(recipe.model.path)
    torch.manual_seed(0)
    model = small_like(recipe.model.path)
    model, processor = parts.with_tower(recipe, model, processor, weights=False)
    short = {"max_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    short |= {"logging_steps": 1, "gradient_accumulation_steps": 1, "dataloader_num_workers": 0}
    short |= {"bf16": False, "fp16": False, "tf32": None}
    alone = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"feature_cache": None}),
            "train": recipe.train | short,
            "plan": recipe.plan and Plan.of(recipe.plan).spec,  # not what a folder has learnt
            "parallel": type(recipe.parallel)(),
            "method": recipe.method.model_copy(update={"load_in_4bit": False}),
        }
    )
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        finetune(alone, data, Path(folder), False, (model, processor))
        rows = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    loss = next(row["loss"] for row in map(json.loads, rows) if "loss" in row)
    return {
        "loss": float(loss),
        "seconds": round(time.monotonic() - started, 2),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
