"""What pre-LLM stages read: the tower, the text around a picture, and both in one space."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mllm import attention
from mllm.capture import pick
from mllm.errors import DataError, PlanError
from mllm.ledger import Reduction
from mllm.signals import (
    BlockFeatures,
    Compared,
    Joint,
    Text,
    TextEmbeds,
    Unprojected,
    VisionAttention,
    VisionKeys,
)
from mllm.tokens import Layout, on_device, split_images
from mllm.tower import TowerRun

if TYPE_CHECKING:
    from mllm.models.base import Family
    from mllm.patcher import Patched


@dataclass
class Group:
    """Images with the same layout, so that methods work on all of them at once.

    Attributes:
        layout: their layout.
        images: their ordinals in the call.
        at: int64 `[n, cells]`, their tokens that are no separators, among all tokens.
    """

    layout: Layout
    images: list[int]
    at: Tensor


@dataclass
class Prompts:
    """The prompts that the images of a call stand in.

    Attributes:
        ids: int64 `[batch, rows]`.
        text: bool `[batch, rows]`, text of the prompt: nothing supervised, no candidates.
        visual: bool `[batch, rows]`, placeholders.
        counts: placeholders of these images, of each sample.
        most: text tokens of the sample that has most, or more.
    """

    ids: Tensor
    text: Tensor
    visual: Tensor
    counts: list[int]
    most: int


class VisionSignals:
    """Signals of one call of get_image_features; what they cost is booked with its images.

    Args:
        patched: the model and its plan.
        family: the adapter of images or of videos.
        reduction: what is decided about the images.
        prompts: around them; None where the caller gave none.
        tower: merges tokens in the tower; None is nobody.

    Attributes:
        unprojected: what the projector was given.
        blocks: what tower blocks have made.
    """

    def __init__(
        self, patched: Patched, family: Family, reduction: Reduction, prompts: Prompts | None,
        tower: TowerRun | None,
    ) -> None:  # fmt: skip
        self.patched, self.family, self.reduction = patched, family, reduction
        self.prompts, self.tower = prompts, tower
        self.unprojected: Tensor | None = None
        self.blocks: dict[int, Tensor] = {}
        self._pieces: dict[Any, list[Tensor]] = {}
        self._costs: dict[Any, list[tuple[int, float]]] = {}
        self._found: dict[Any, Tensor] = {}
        self._texts: dict[TextEmbeds, Text] = {}
        self._compared: tuple[Tensor, Tensor, Tensor] | None = None

    def read(self, signal: Any, group: Group, method: str) -> Any:
        """A signal for the images of a group; tensors are `[images, cells, ...]`.

        Raises:
            DataError: text is read, and the pictures came without a prompt.
            NoEffectError: the module that it is read from never ran.
        """
        if isinstance(signal, TextEmbeds):
            return self._text(signal, group, method)
        if isinstance(signal, Joint):
            return self._joint(group, method)
        if isinstance(signal, Unprojected | BlockFeatures):
            return self._made(signal)[group.at]
        return self._signal(signal, method)[group.at]

    def taps(self) -> dict[nn.Module, list[Any]]:
        """Taps for the declared signals of the tower."""
        found: dict[nn.Module, list[Any]] = {}
        read = [signal for _, stage in self.patched.reducers for signal in stage.reads().values()]
        for signal in dict.fromkeys(read):  # what two stages read is read once
            if isinstance(signal, VisionAttention | VisionKeys):
                module = self.family.block_attention(self.family.block(signal.block))
                found.setdefault(module, []).append(functools.partial(self._tap, signal))
        for module, taps in ({} if self.tower is None else self.tower.taps()).items():
            found.setdefault(module, []).extend(taps)
        return found

    def _tap(
        self, signal: Any, query: Tensor, key: Tensor, mask: Any, scaling: Any, *_: Any
    ) -> None:
        """One attention call of the tower: a stack of pictures, or one picture or window."""
        prefix, tokens = self.family.prefix, key.shape[2]
        rows = 0
        if signal.heads == "joint":  # one head of the full width
            query, key = (x.transpose(1, 2).flatten(2)[:, None] for x in (query, key))
            scaling = None
        if isinstance(signal, VisionKeys):
            value = key.mean(1)
        elif signal.query == "cls" and not prefix:
            raise PlanError(
                "the tower has no [CLS]", argument="query", given="cls", expected="received"
            )
        else:
            heads = "mean" if signal.heads == "mean" else "sum"
            if prefix and signal.query != "received":
                first = torch.zeros(query.shape[0], 1, dtype=torch.long, device=query.device)
                value = attention.row_scores(
                    query, key, first, mask, scaling, causal=False, heads=heads
                )[:, 0]
                rows = 1
            else:
                scores = attention.received_attention(query, key, mask, scaling)
                value, rows = attention.reduce_heads(scores, heads), tokens
        value = value[:, prefix:]
        if self.tower is not None:
            value = self.tower.spread(value)
        self._pieces.setdefault(signal, []).append(value.flatten(0, 1))
        cost, patches = 2.0 * rows * tokens * query.shape[1] * query.shape[3], value.shape[1]
        own = [self.family.patches(layout) for layout in self.reduction.layouts]
        if sum(own) != patches:  # all pictures in one call, or one of several calls
            own = [patches] * query.shape[0]
        self._costs.setdefault(signal, []).extend((n, cost * n / patches) for n in own)

    def _signal(self, signal: Any, method: str) -> Tensor:
        """A signal of the tower per visual token: `[tokens, ...]`."""
        if signal not in self._found:
            layouts = self.reduction.layouts
            pieces = attention.captured(self._pieces, signal, method)
            self._found[signal] = self.family.to_rows(torch.cat(pieces), layouts)
            costs = iter(self._costs.pop(signal))
            for image, layout in enumerate(layouts):
                left = self.family.patches(layout)
                while left > 0:
                    patches, flops = next(costs)
                    self.reduction.selection_flops[image] += flops
                    left -= patches
        return self._found[signal]

    def _made(self, signal: Unprojected | BlockFeatures) -> Tensor:
        """Features before the projector per visual token: `[tokens, width]`."""
        if signal not in self._found:
            family, layouts = self.family, self.reduction.layouts
            if isinstance(signal, Unprojected):
                found = family.unprojected(self.unprojected, layouts)
            else:
                made = [self.blocks[family.block(block)] for block in signal.blocks]
                patches = torch.cat([x[..., family.prefix :, :] for x in made], -1)
                found = family.to_rows(patches.flatten(0, -2), layouts)
            self._found[signal] = found.to(self.unprojected.dtype)  # resized in fp32
        return self._found[signal]

    def _question(self, which: str, method: str) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of text of each prompt, which of them there are, and their ids: `[batch, text]`."""
        prompts = self.prompts
        if prompts is None:
            raise DataError(
                f"{method} reads the question, and these pictures came without a prompt",
                argument="input_ids",
                given=None,
                expected="the model's forward or generate(), with input_ids",
            )
        text = prompts.text
        if which == "question":
            text = text & (prompts.visual.long().cumsum(1) > 0)
        rows = pick(text, prompts.most)
        there, rows = rows >= 0, rows.clamp(min=0)
        return rows, there, prompts.ids.gather(1, rows).masked_fill(~there, 0)

    def _owners(self, group: Group) -> Tensor:
        """The prompt of each image of a group: int64 `[images]`."""
        owner: dict[int, int] = {}
        for sample, own in enumerate(split_images(self.prompts.counts, self.reduction.sizes)):
            for image in own:  # beams share images
                owner.setdefault(image, sample)
        return on_device(torch.tensor([owner[image] for image in group.images]), group.at)

    def _text(self, signal: TextEmbeds, group: Group, method: str) -> Text:
        """The text around each image of a group."""
        if signal not in self._texts:
            rows, there, ids = self._question(signal.which, method)
            words = self.patched.family.model.get_input_embeddings()
            self._texts[signal] = Text(words(ids), there, rows)
        whole, at = self._texts[signal], self._owners(group)
        return Text(whole.embeds[at], whole.valid[at], whole.rows[at])

    def _joint(self, group: Group, method: str) -> Compared:
        """The images of a group, and the text behind them, in CLIP's joint space."""
        if self._compared is None:
            space, layouts = self.patched.space, self.reduction.layouts
            _, there, ids = self._question("question", method)
            ids = [
                row[:n] for row, n in zip(ids.tolist(), there.sum(1).tolist(), strict=True)
            ]
            patches = space.patches(self.unprojected.detach().flatten(0, 1))
            text, valid = space.texts(ids)
            self._compared = self.family.to_rows(patches, layouts), text, valid
            width, dim = self.unprojected.shape[-1], text.shape[2]
            for image, layout in enumerate(layouts):
                cost = 2.0 * self.family.patches(layout) * width * dim
                self.reduction.selection_flops[image] += cost
            for sample, own in enumerate(
                split_images(self.prompts.counts, self.reduction.sizes)
            ):
                for image in own:
                    cost = space.word_flops * len(ids[sample]) / len(own)
                    self.reduction.selection_flops[image] += cost
        (patches, text, valid), at = self._compared, self._owners(group)
        return Compared(patches[group.at], text[at], valid[at])
