"""Distillation from the uncompressed model, so that a compressed one recovers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.training.data import IGNORED
from mllm.training.schema import DistillPart
from mllm.views import VIEW


class Teacher:
    """The model as it was when training started, without a plan.

    Weights that are not trained are shared with the model, so with LoRA a teacher costs no memory.
    Made before adapters and plan go in, and told afterwards what is trained.

    Args:
        model: without adapters and plan.
    """

    def __init__(self, model: nn.Module) -> None:
        shared = [*model.parameters(), *model.buffers()]
        self.model = copy.deepcopy(model, {id(tensor): tensor for tensor in shared}).eval()
        self._kept: list[tuple[nn.Parameter, nn.Parameter]] = []

    def part_from(self, student: nn.Module) -> None:
        """Copy the weights that the student trains; call before the first step."""
        learnt = {id(p) for p in student.parameters() if p.requires_grad}
        own: dict[int, nn.Parameter] = {}
        self._kept.clear()
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in learnt:
                    kept = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                    module._parameters[name] = own.setdefault(id(parameter), kept)
                    self._kept.append((module._parameters[name], parameter))

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Any], states: bool) -> Any:
        """Output with `logits`, and `hidden_states` where `states` asks for them."""
        # DeepSpeed narrows the student's weights, and so those that both have.
        for kept, learnt in self._kept:
            kept.data = kept.data.to(learnt.dtype)
        dtype = next(self.model.parameters()).dtype
        given = {
            key: value.to(dtype)
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for key, value in inputs.items()
            if key != "labels" and not key.startswith(VIEW)  # the teacher has no plan
        }
        return self.model(**given, output_hidden_states=states, use_cache=False)


def distill_loss(
    student: Any, teacher: Any, labels: Tensor, part: DistillPart, items: Tensor | int | None
) -> tuple[Tensor, Tensor]:
    """How far the student is from its teacher on the answers.

    Args:
        student: output with `logits` `[B, T, V]`, and `hidden_states` where `part.layers` has any.
        teacher: the same of the teacher.
        labels: int64 `[B, T]`; a row is an answer where the next label is not -100.
        part: temperature and layers.
        items: answer tokens of the whole step, over all batches and processes; None is this batch.

    Returns:
        Kullback-Leibler divergence of the softened answers times temperature², and the squared
        distance of hidden states over the teacher's own square; both summed over the answers and
        divided by `items`.

    Source: Hinton et al., arXiv:1503.02531.
    """
    answers = labels[:, 1:] != IGNORED
    count = answers.sum() if items is None else items
    heat = part.temperature
    said, meant = (
        F.log_softmax(out.logits[:, :-1][answers].float() / heat, dim=-1)
        for out in (student, teacher)
    )
    soft = F.kl_div(said, meant, reduction="sum", log_target=True) * heat**2 / count
    hidden = soft.new_zeros(())
    for layer in part.layers:
        # Entry 0 is what enters the first layer.
        place = layer + 1 if layer >= 0 else layer
        own, aim = (out.hidden_states[place][:, :-1][answers].float() for out in (student, teacher))
        away = (own - aim).pow(2).sum(-1) / aim.pow(2).sum(-1).clamp_min(1e-12)
        hidden = hidden + away.sum() / count
    return soft, hidden
