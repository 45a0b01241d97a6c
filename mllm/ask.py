"""Asking a stage in the LLM: what it may read at a layer, and the actions that it returns."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mllm import attention, compat
from mllm.compressors.base import LayerContext, LayerMethod
from mllm.errors import PlanError
from mllm.routers.base import NAME, active
from mllm.tokens import TokenTable

if TYPE_CHECKING:
    from mllm.in_llm import DecoderRun


def ask(
    run: DecoderRun, number: int, stage: LayerMethod, layer: int, keep: Tensor,
    counts: list[int] | None,
) -> list[Any]:  # fmt: skip
    """The actions of a stage before a layer, over the current rows.

    Args:
        run: the forward.
        number: of the stage in its plan.
        stage: the stage.
        layer: the layer.
        keep: bool `[batch, rows]`, rows that other stages of this layer leave.
        counts: visual rows among them, of each sample; None asks the device.

    Raises:
        PlanError: an action that the stage does not list, or gradients that cannot reach it.
    """
    with kept():  # signals of earlier layers are brought to the rows of this one
        ctx = context(run, number, stage, layer, run.table, keep=keep, counts=counts)
    budget = getattr(stage, "keep", None)
    if isinstance(budget, int) and any(
        there < budget * images for there, images in zip(ctx.counts(), ctx.n_images, strict=True)
    ):
        run.notes.append(
            f"{stage.info.name}: fewer than keep={budget} tokens per image arrive at layer {layer}"
        )
    run.ran.add(number)
    if stage.differentiable and compat.reentrant(run.patched.layers[layer - 1]):
        raise PlanError(
            f"{stage.info.name} learns or merges, and reentrant checkpointing gives that no "
            "gradient",
            argument="use_reentrant",
            given=True,
            expected="False",
        )
    learning = torch.is_grad_enabled() and stage.differentiable
    with torch.set_grad_enabled(learning), kept(), precisely(stage, run.full.valid.device):
        actions = stage.act(ctx)
    run.selection_flops += ctx.flops
    run.notes += ctx.remarks
    for action in actions:
        _check(stage, action)
    return actions


def _check(stage: LayerMethod, action: Any) -> None:
    if type(action).__name__ not in stage.actions:
        raise PlanError(
            f"{stage.info.name} returns {type(action).__name__} but does not list it in "
            "its actions",
            argument="actions",
            given=type(action).__name__,
            expected=", ".join(stage.actions),
        )


def context(
    run: DecoderRun, number: int, stage: LayerMethod, layer: int, table: TokenTable, *,
    keep: Tensor | None = None, known: bool = False, counts: list[int] | None = None,
) -> LayerContext:  # fmt: skip
    """What a stage may read at a layer over the rows of `table`.

    Args:
        run: the forward.
        number: of the stage in its plan.
        stage: the stage.
        layer: the layer.
        table: the rows.
        keep: bool `[batch, rows]`, rows that other stages of this layer leave; None is all.
        known: whether signals that are yet to come may be missing.
        counts: visual rows that are left, of each sample.
    """
    signals, queries = run.captures.read(number, stage, layer, table, known)
    visual = table.visual & ~table.newline & table.valid
    if run.entered is None:
        first = run.tables[0][1]
        run.entered = (first.visual & ~first.newline & first.valid).sum(1).tolist()
    return LayerContext(
        stage, signals, queries=queries,
        layer=layer, num_layers=len(run.patched.layers), table=table,
        visual=visual if keep is None else visual & keep,
        prompt=run.prompt_of(table), protected=run.protected_of(table),
        images=[len(own) for own in run.images], entered=run.entered, counts=counts,
        state=run.states.setdefault(number, {}), width=run.full.valid.shape[1],
        seeds=functools.partial(seeds, run, number, len(run.images)),
        route=functools.partial(route, run, number), routing=run.routing, number=number,
        answers=_answers(run, table), decoding=run.visual is None,
        answer_loss=functools.partial(_answer_loss, run, table),
        seed_for=functools.partial(run.patched.plan.seed_for, number),
        attention_input=functools.partial(run.patched.family.attention_input, layer),
    )  # fmt: skip


def route(run: DecoderRun, number: int, x: Tensor, part: str, *more: Any) -> Tensor:
    """What a trained part of stage `number` makes of `x`; its cost, where it says one."""
    model = run.patched.family.model
    module = active(model)._modules[str(number)][part]
    if hasattr(module, "flops"):
        run.selection_flops += module.flops(x, *more)
    # By the model's attribute: PEFT may have put a copy in its place.
    return getattr(model, NAME)(x, number, part, *more)


def seeds(run: DecoderRun, number: int, batch: int, *more: int) -> list[int]:
    """A seed per sample from the bits of its pictures, for stage `number` and what else."""
    bits, images = run.reduction.bits if run.reduction else [], run.images or [()] * batch
    seed_for = run.patched.plan.seed_for
    return [seed_for(number, *(bits[i] for i in own), *more) for own in images]


def kept() -> Any:
    """While open, what autograd saves is kept, and no business of a checkpoint around it.

    transformers 5.17 checkpoints a layer with its hooks, but nothing of a plan is computed again.
    """
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


def precisely(stage: Any, device: torch.device) -> Any:
    """While open, a stage chooses as without autocast; what it has learnt runs under autocast."""
    return contextlib.nullcontext() if stage.info.trained else attention.exact(device)


def _answers(run: DecoderRun, table: TokenTable) -> Tensor:
    """Rows behind the prompt among those of a table: bool `[batch, rows]`."""
    valid = table.valid & ~table.inserted
    return valid if run.visual is None else valid & ~run.prompt.gather(1, table.index)


def _answer_loss(run: DecoderRun, table: TokenTable, hidden: Tensor) -> Tensor:
    """What the head would lose if `hidden`, over the rows of `table`, left the last layer."""
    labels = run.brought.call.labels.to(hidden.device)
    following = F.pad(labels[:, 1:], (0, 1), value=-100).gather(1, table.index)
    there = (following != -100) & table.valid & ~table.inserted
    if run.pictured is not None:
        there = there & run.pictured[:, None]
    model = run.patched.family.model
    logits = model.get_output_embeddings()(run.patched.family.final_norm(hidden[there]))
    lost = F.cross_entropy(logits.float(), following[there], reduction="sum")
    return lost / there.sum().clamp(min=1)
