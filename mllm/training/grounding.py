"""Pretraining objective of the embedded model: grounded losses on drawn scenes.

Tower: what each patch shows, where it is, and what the whole picture holds ([CLS], by presence and
by contrast with its caption's words). Language model: packed questions behind one image prefix.
The heads live only during training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from random import Random

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from mllm.yardstick.questions import (
    YES_NO,
    Question,
    ask,
    ask_about_several,
    caption,
    picture_labels,
)
from mllm.yardstick.scenes import (
    CHARACTERS,
    COLOUR_NAMES,
    FULL,
    GRID,
    LABEL_SIZES,
    MINI,
    OBJECTS,
    TOP_VALUE,
    Scene,
    draw,
    soup,
)

# CLIP's normalisation, as in the processor.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
IGNORED = -100
# Weight of each label of a patch within the patch loss; see LABELS.
HEAD_LOSSES = (1.0, 0.5, 1.0, 0.5, 0.5, 0.3, 0.5, 0.3)

# Labels whose words visual tokens are aligned with, in the order of LABELS.
GROUPS = ("objects", "colours", "characters", "values")


class GroundingData(Dataset):
    """Item `i` is one or several scenes with questions, a function of `seed` and `i` alone.

    Args:
        scenes: "soup", "mini" or "full".
        questions: packed questions per item; 0 for the tower alone, as for soups.
        size: number of items.
        seed: two data sets with different seeds share no scene.
        tokenizer: turns questions into ids.
        tasks: weights of the tasks to ask, as many "yes" as "no"; None asks all of them alike.
        kinds: shares of the kinds of scene; None takes the usual mixture.
        pictures: shares of the numbers of pictures per item; None is always one.
        group: so many items in a row have the same number of pictures (a batch).
    """

    def __init__(
        self,
        scenes: str,
        questions: int,
        size: int,
        seed: int,
        tokenizer: PreTrainedTokenizerFast,
        tasks: Mapping[str, float] | None = None,
        kinds: Mapping[str, float] | None = None,
        pictures: Mapping[int, float] | None = None,
        group: int = 1,
    ) -> None:
        self.scenes, self.questions, self.size, self.seed = scenes, questions, size, seed
        self.tokenizer, self.tasks, self.kinds = tokenizer, tasks, kinds
        self.pictures, self.group = pictures or {1: 1.0}, group
        self._ids: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return self.size

    def encode(self, text: str) -> list[int]:
        if text not in self._ids:
            self._ids[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._ids[text]

    def __getitem__(self, index: int) -> dict:
        rng = Random(f"train-{self.seed}-{self.scenes}-{index}")
        together = Random(f"train-{self.seed}-{index // self.group}")
        count = together.choices(list(self.pictures), list(self.pictures.values()))[0]
        drawn = [self._draw(rng, count) for _ in range(count)]
        free = GRID - drawn[0].labels.shape[1]
        offsets = [(rng.randint(0, free), rng.randint(0, free)) for _ in drawn]
        item = {
            "pixels": np.stack([np.asarray(scene.framed()) for scene in drawn]),
            "patches": np.stack([scene.labels for scene in drawn]),
            "offset": offsets,
        }
        if not self.questions:
            return item
        if count > 1:
            pool = ask_about_several(rng, drawn)
        else:
            asked = {q.text: q for _ in range(2) for q in ask(rng, drawn[0], offsets[0])}
            if drawn[0].things or drawn[0].bars:
                asked["list"] = caption(drawn[0])
            pool = list(asked.values())
        weights = self.tasks or {}
        if self.tasks:
            pool = [question for question in pool if question.task in self.tasks]
        pool = _weighted(rng, _balanced(pool), weights, self.questions)
        item["asked"] = [question.task for question in pool]
        return item | self._pack(pool, item["patches"].shape[2:], offsets)

    def _draw(self, rng: Random, count: int) -> Scene:
        if self.scenes == "soup":
            return soup(rng)
        kind = "objects" if count > 1 else None
        if self.kinds and count == 1:
            kind = rng.choices(list(self.kinds), list(self.kinds.values()))[0]
        return draw(rng, kind, MINI if self.scenes == "mini" else FULL)

    def _pack(
        self, questions: list[Question], grid: tuple[int, int], offsets: list[tuple[int, int]]
    ) -> dict[str, list[int]]:
        """The pictures once, then questions and answers, at the positions each would have alone.

        `segment` is 0 for what all questions see and counts the questions from 1.
        """
        image = self.tokenizer.convert_tokens_to_ids("<image>")
        ids, positions = [self.tokenizer.bos_token_id], [0]
        labels = picture_labels(len(offsets)) if len(offsets) > 1 else [""]
        start = 1  # position of what comes next in the full prompt
        for label, (row, col) in zip(labels, offsets, strict=True):
            words = self.encode(label) if label else []
            ids += words
            positions += range(start, start + len(words))
            start += len(words)
            rows, cols = np.mgrid[row : row + grid[0], col : col + grid[1]]
            ids += [image] * rows.size
            positions += (start + GRID * rows + cols).ravel().tolist()
            start += GRID * GRID
        segment, targets = [0] * len(ids), [IGNORED] * len(ids)
        for number, question in enumerate(questions, 1):
            asked = self.encode(f" {question.text}")
            answer = [*self.encode(f" {question.answer}"), self.tokenizer.eos_token_id]
            length = len(asked) + len(answer)
            ids += asked + answer
            targets += [IGNORED] * len(asked) + answer
            segment += [number] * length
            positions += range(start, start + length)
        return {"input_ids": ids, "targets": targets, "segment": segment, "positions": positions}


def _balanced(questions: Iterable[Question]) -> list[Question]:
    """Repeat what a task has less of, "yes" or "no"; a scene with only one of them loses it."""
    kept = list(questions)
    for task in sorted({question.task for question in kept if question.answer in YES_NO}):
        yes, no = ([q for q in kept if (q.task, q.answer) == (task, a)] for a in YES_NO)
        kept = [question for question in kept if question.task != task]
        if yes and no:
            pairs = range(max(len(yes), len(no)))
            kept += [side[i % len(side)] for side in (yes, no) for i in pairs]
    return kept


def _weighted(
    rng: Random, questions: list[Question], weights: Mapping[str, float], count: int
) -> list[Question]:
    """Draw without replacement, by the weight of the task (Efraimidis and Spirakis).

    A weight below 1 is also the chance that a question is asked at all.
    """
    questions = [q for q in questions if rng.random() < weights.get(q.task, 1.0)]
    keys = [rng.random() ** (1 / weights.get(q.task, 1.0)) for q in questions]
    order = sorted(range(len(questions)), key=lambda i: -keys[i])[:count]
    return [questions[i] for i in order]


def collate(items: list[dict]) -> dict[str, Tensor]:
    """Stack scenes and right-pad their packed questions to a multiple of 16."""
    batch = {
        "pixels": torch.from_numpy(np.concatenate([item["pixels"] for item in items])),
        "patches": torch.from_numpy(np.concatenate([item["patches"] for item in items])).long(),
        "offset": torch.tensor([offset for item in items for offset in item["offset"]]),
    }
    if "input_ids" in items[0]:
        length = (max(len(item["input_ids"]) for item in items) + 15) // 16 * 16
        fillers = {"input_ids": 0, "targets": IGNORED, "segment": -1, "positions": 0}
        for key, filler in fillers.items():
            rows = [item[key] + [filler] * (length - len(item[key])) for item in items]
            batch[key] = torch.tensor(rows)
    return batch


class Heads(nn.Module):
    """Training-only heads on the tower ([CLS] and patches) and on the projected tokens."""

    def __init__(self, vision: int, text: int, width: int = 128) -> None:
        super().__init__()
        self.patch_norm, self.patch = nn.LayerNorm(vision), nn.Linear(vision, sum(LABEL_SIZES))
        self.place = nn.Linear(vision, 2 * GRID)
        self.token_norm, self.token_place = nn.LayerNorm(text), nn.Linear(text, 2 * GRID)
        self.token = nn.Linear(text, sum(LABEL_SIZES))
        words = len(OBJECTS) + len(COLOUR_NAMES) + len(CHARACTERS)
        self.cls_norm, self.presence = nn.LayerNorm(vision), nn.Linear(vision, words)
        self.cls_project = nn.Linear(vision, width, bias=False)
        self.caption = nn.Linear(words, width, bias=False)


class GroundedLlava(nn.Module):
    """A LLaVA with its training heads; `forward` returns the weighted loss and its parts.

    Args:
        llava: the model; it is trained in place.
        tokenizer: names the words that visual tokens are aligned with.
        weights: loss weights: `answers`, `patches`, `places`, `words`, `cls`.

    `freeze_vision_tower` (False) keeps the tower as it is; its losses are then left out.
    """

    def __init__(
        self,
        llava: LlavaForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        weights: Mapping[str, float],
    ) -> None:
        super().__init__()
        self.llava, self.weights = llava, dict(weights)
        self.freeze_vision_tower = False
        self.heads = Heads(
            llava.config.vision_config.hidden_size, llava.config.text_config.hidden_size
        )
        self.image = tokenizer.convert_tokens_to_ids("<image>")
        self.register_buffer("mean", 255 * torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        values = [str(value) for value in range(1, TOP_VALUE + 1)]
        names = ([f" {n}" for n in OBJECTS], [f" {n}" for n in COLOUR_NAMES], list(CHARACTERS))
        for name, words in zip(GROUPS, (*names, values), strict=True):
            ids = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
            assert all(len(i) == 1 for i in ids), f"{name} must be single tokens"
            self.register_buffer(f"{name}_ids", torch.tensor(ids)[:, 0], persistent=False)

    def see(self, pixels: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Tower output `[B, 1 + N, width]` and the frame index `[B, N]` (0..575) of each patch.

        A crop keeps the position embeddings of its window in the 24 x 24 frame.
        """
        tower = self.llava.model.vision_tower
        scaled = (pixels.permute(0, 3, 1, 2).float() - self.mean) / self.std
        patches = tower.embeddings.patch_embedding(scaled)
        side = torch.arange(patches.shape[-1], device=pixels.device)
        rows, cols = offset[:, :1] + side, offset[:, 1:] + side
        index = (rows[:, :, None] * GRID + cols[:, None, :]).flatten(1)
        start = tower.embeddings.class_embedding.expand(len(pixels), 1, -1)
        hidden = torch.cat([start, patches.flatten(2).transpose(1, 2)], 1)
        positions = F.pad(index + 1, (1, 0))
        hidden = hidden + tower.embeddings.position_embedding(positions)
        return tower.encoder(inputs_embeds=tower.pre_layrnorm(hidden)).last_hidden_state, index

    def forward(
        self,
        pixels: Tensor,
        patches: Tensor,
        offset: Tensor,
        input_ids: Tensor | None = None,
        targets: Tensor | None = None,
        segment: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Loss of one batch of B items with K pictures in all.

        Args:
            pixels: uint8 `[K, H, W, 3]`.
            patches: labels `[K, 8, rows, cols]` of each patch.
            offset: `[K, 2]` first row and column of each picture in the frame.
            input_ids, targets, segment, positions: packed questions `[B, T]`; None trains the
                tower alone.
        """
        with torch.set_grad_enabled(not self.freeze_vision_tower and torch.is_grad_enabled()):
            hidden, index = self.see(pixels, offset)
        labels = patches.flatten(2)
        parts = {}
        if not self.freeze_vision_tower:
            features = self.heads.patch_norm(hidden[:, 1:])
            parts["patches"] = _patch_loss(self.heads.patch(features), labels)
            parts["places"] = _place_loss(self.heads.place(features), index)
            parts["cls"] = self._cls_loss(hidden[:, 0], labels)
        if input_ids is not None:
            tokens = self.llava.model.multi_modal_projector(hidden[:, 1:])
            normed = self.heads.token_norm(tokens)
            parts["token_places"] = _place_loss(self.heads.token_place(normed), index)
            parts["tokens"] = _patch_loss(self.heads.token(normed), labels)
            parts["words"] = self._word_loss(tokens, labels)
            parts["answers"] = self._answer_loss(tokens, input_ids, targets, segment, positions)
        loss = sum(self.weights.get(name, 0.0) * part for name, part in parts.items())
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}

    def _cls_loss(self, cls: Tensor, labels: Tensor) -> Tensor:
        """What CLIP gives [CLS]: it must know the whole picture.

        Multi-label presence of every object, colour and character, plus the contrast between the
        picture and the bag of words of its caption within the batch (temperature 0.1).
        """
        sizes = (len(OBJECTS), len(COLOUR_NAMES), len(CHARACTERS))
        bags = []
        for label, size in zip(labels[:, :3].unbind(1), sizes, strict=True):
            hot = F.one_hot(label.clamp(max=LABEL_SIZES[0] - 1), max(LABEL_SIZES)).amax(1)
            bags.append(hot[:, 1 : size + 1])
        bag = torch.cat(bags, 1).float()
        cls = self.heads.cls_norm(cls)
        presence = F.binary_cross_entropy_with_logits(self.heads.presence(cls).float(), bag)
        picture = F.normalize(self.heads.cls_project(cls).float(), dim=-1)
        words = F.normalize(self.heads.caption(bag).float() + 1e-6, dim=-1)
        similarity = 10 * picture @ words.T
        own = torch.arange(len(bag), device=bag.device)
        contrast = F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)
        return 8 * presence + 0.25 * contrast

    def _word_loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """A visual token should look (cosine) like the word embeddings of what it shows."""
        table = self.llava.model.language_model.embed_tokens.weight
        total = tokens.new_zeros((), dtype=torch.float32)
        groups = [getattr(self, f"{name}_ids") for name in GROUPS]
        for ids, label in zip(groups, labels[:, : len(groups)].unbind(1), strict=True):
            shown = (label > 0) & (label <= len(ids))
            if shown.any():
                words = F.normalize(table[ids].float(), dim=-1)
                similarity = 12 * F.normalize(tokens[shown].float(), dim=-1) @ words.T
                total = total + F.cross_entropy(similarity, label[shown] - 1)
        return total

    def _answer_loss(
        self,
        tokens: Tensor,
        input_ids: Tensor,
        targets: Tensor,
        segment: Tensor,
        positions: Tensor,
    ) -> Tensor:
        """Next-token loss on the answers; each question sees the pictures and itself."""
        wanted = targets[:, 1:]
        asked = wanted != IGNORED
        hidden = self._read(tokens, input_ids, segment, positions)
        return F.cross_entropy(self.llava.lm_head(hidden[asked]).float(), wanted[asked])

    def _read(
        self, tokens: Tensor, input_ids: Tensor, segment: Tensor, positions: Tensor
    ) -> Tensor:
        """Last hidden state of all rows but the last, `[B, T - 1, width]`."""
        language = self.llava.model.language_model
        embeds = language.embed_tokens(input_ids).to(tokens.dtype)
        seen = (input_ids == self.image)[..., None]
        embeds = embeds.masked_scatter(seen, tokens.flatten(0, 1))
        length = input_ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        own = segment[:, :, None] == segment[:, None, :]
        mask = mask & (own | (segment == 0)[:, None, :])
        return language(
            inputs_embeds=embeds,
            attention_mask=mask[:, None],
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state[:, :-1]

    @torch.no_grad()
    def right(self, pixels, offset, input_ids, targets, segment, positions, **_) -> Tensor:
        """Bool `[B, S]`: whether every token of answer 1..S would be said (greedily)."""
        tokens = self.llava.model.multi_modal_projector(self.see(pixels, offset)[0][:, 1:])
        said = self.llava.lm_head(self._read(tokens, input_ids, segment, positions)).argmax(-1)
        wrong = (targets[:, 1:] != IGNORED) & (said != targets[:, 1:])
        faults = torch.zeros(len(wrong), int(segment.max()) + 1, device=wrong.device)
        faults.scatter_add_(1, segment[:, 1:].clamp_min(0), wrong.float())
        return faults[:, 1:] == 0


def _patch_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of every label of a patch; empty ones count less."""
    total = scores.new_zeros((), dtype=torch.float32)
    parts = zip(HEAD_LOSSES, scores.float().split(LABEL_SIZES, -1), labels.unbind(1), strict=True)
    for weight, score, label in parts:
        each = F.cross_entropy(score.transpose(1, 2), label, reduction="none")
        share = torch.where(label > 0, 1.0, 0.15)
        total = total + weight * (each * share).sum() / share.sum()
    return total


def _place_loss(scores: Tensor, index: Tensor) -> Tensor:
    """Row and column of each patch in the frame, from scores `[B, N, 2 * GRID]`."""
    rows, cols = scores.float().transpose(1, 2).split(GRID, 1)
    return F.cross_entropy(rows, index // GRID) + F.cross_entropy(cols, index % GRID)
