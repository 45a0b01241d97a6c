"""CLIP's joint space of pictures and words, beside a model whose tower is that CLIP's.

A vision-language model has no use for CLIP's text tower and comes without it. Methods that compare
patches with the question in CLIP's own space (the signal :class:`mllm.signals.Joint`) need it:

    space = JointSpace(CLIPModel.from_pretrained(name), CLIPTokenizer.from_pretrained(name),
                       processor.tokenizer.decode)
    mllm.joint.attach(model, space)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mllm.errors import PlanError
from mllm.models import resolve

_SPACES: WeakKeyDictionary[nn.Module, JointSpace] = WeakKeyDictionary()


class JointSpace:
    """The text half and the projections of a CLIP model.

    Args:
        clip: a `CLIPModel`; of its vision half only the last norm and the projection are used.
        tokenizer: CLIP's own.
        decode: makes a text of token ids of the LLM; what it leaves out (roles of a chat, say) is
            not compared.
    """

    def __init__(
        self, clip: nn.Module, tokenizer: Any, decode: Callable[[list[int]], str]
    ) -> None:
        self.clip, self.tokenizer, self.decode = clip.eval(), tokenizer, decode
        vision = clip.vision_model
        self.norm, self.project = vision.post_layernorm, clip.visual_projection
        self.width: int = clip.config.vision_config.hidden_size
        self.longest: int = clip.config.text_config.max_position_embeddings
        #: FLOPs of one word through the text tower, without its attention products.
        self.word_flops = 2.0 * sum(
            p.numel() for n, p in clip.text_model.named_parameters() if "embedding" not in n
        )

    @torch.no_grad()
    def patches(self, features: Tensor) -> Tensor:
        """Features of the tower, `[..., width]`, in the joint space: `[..., dim]`."""
        return self.project(self.norm(features.to(self.project.weight)))

    @torch.no_grad()
    def texts(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Texts in the joint space, cut into segments that the text tower can read.

        Args:
            prompts: token ids of the LLM.

        Returns:
            `[prompts, segments, dim]`, and which segments there are: bool `[prompts, segments]`.
        """
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        room, segments, owner = self.longest - 2, [], []
        for number, ids in enumerate(prompts):
            words = self.tokenizer(self.decode(list(ids)), add_special_tokens=False)["input_ids"]
            parts = [words[i : i + room] for i in range(0, len(words), room)]
            segments += [[start, *part, end] for part in parts]
            owner += [(number, i) for i in range(len(parts))]
        most = max((i + 1 for _, i in owner), default=1)
        device, dim = self.project.weight.device, self.project.weight.shape[0]
        out = torch.zeros(len(prompts), most, dim, device=device, dtype=self.project.weight.dtype)
        valid = torch.zeros(len(prompts), most, dtype=torch.bool)
        if segments:
            length = max(map(len, segments))
            ids = torch.tensor([s + [end] * (length - len(s)) for s in segments], device=device)
            mask = torch.tensor([[1] * len(s) + [0] * (length - len(s)) for s in segments])
            read = self.clip.text_model(input_ids=ids, attention_mask=mask.to(device))
            at = tuple(torch.tensor(owner).unbind(1))
            out[at] = self.clip.text_projection(read.pooler_output)
            valid[at] = True
        return out, valid.to(device)


def attach(model: nn.Module, space: JointSpace) -> None:
    """Let the methods of a model read CLIP's joint space, from the next :func:`mllm.patch` on.

    Args:
        model: a model whose vision tower is the CLIP of `space`.
        space: the space.

    Raises:
        PlanError: its tower is not a CLIP of that width.
    """
    family = resolve(model)
    config = family.vision_config
    if config.model_type != "clip_vision_model" or config.hidden_size != space.width:
        raise PlanError(
            f"the tower of {type(family.model).__name__} is no CLIP of width {space.width}",
            argument="space",
            given=f"{config.model_type} of width {config.hidden_size}",
            expected="the CLIP that the model's tower comes from",
        )
    _SPACES[family.model] = space


def space_of(model: nn.Module) -> JointSpace | None:
    """The space that was attached to a model."""
    return _SPACES.get(model)
