"""Tiny random models of every supported family, and batches for them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
import transformers as hf
from tiny import IMAGE, PAD, VOCAB
from torch import Tensor, nn

LAYERS = 4
START, END, VIDEO = 7, 8, 6


def _text(**more) -> dict:
    return dict(
        hidden_size=48, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCAB, max_position_embeddings=2048, pad_token_id=PAD,
        bos_token_id=1, eos_token_id=2,
    ) | more  # fmt: skip


@dataclass
class Picture:
    """One image or video: what a processor gives for it, and its visual tokens.

    Attributes:
        fields: tensors by argument name; `collate` of the family joins those of a batch.
        tokens: visual tokens.
        grid: (rows, cols), of every frame; under anyres those of the tiled view.
        frames: of a video, 0 for an image.
        runs: neighbouring placeholders in the prompt.
        end: whether one separator stands behind it.
        alike: whether its frames have the placeholders of images.
    """

    fields: dict[str, Tensor]
    tokens: int
    grid: tuple[int, int] = (4, 4)
    frames: int = 0
    runs: tuple[int, ...] = ()
    end: bool = False
    alike: bool = False

    @property
    def token(self) -> int:
        return VIDEO if self.frames and not self.alike else IMAGE


@dataclass
class Sample:
    ids: Tensor
    pictures: list[Picture]

    @property
    def visual(self) -> Tensor:
        return (self.ids == IMAGE) | (self.ids == VIDEO)


@dataclass
class Kit:
    """How to make and feed a family.

    Attributes:
        build: the random model.
        picture: an image from a size number (0, 1, 2 differ where sizes may) and a generator.
        join: fields of all pictures, grouped by sample, as arguments of the model.
        mrope: whether positions come from the grid.
        cells: tokens of a picture that are no separators.
        separators: (sample, kept cells) to the separators that stay with them.
    """

    build: Callable[[], nn.Module]
    picture: Callable[[int, torch.Generator], Picture]
    join: Callable[[list[list[Picture]]], dict[str, Tensor]]
    mrope: bool = False
    cells: Callable[[Picture], list[int]] = lambda picture: list(range(picture.tokens))
    separators: Callable[[Sample, list[int]], list[int]] = lambda sample, kept: []


def _cat(samples: list[list[Picture]]) -> dict[str, Tensor]:
    pictures = [p for sample in samples for p in sample]
    names = dict.fromkeys(name for p in pictures for name in p.fields)
    return {k: torch.cat([p.fields[k] for p in pictures if k in p.fields]) for k in names}


# Qwen

_ROPE = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10000.0}
_QWEN = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START,
             vision_end_token_id=END)  # fmt: skip


def _qwen2_vl():
    vision = dict(depth=3, embed_dim=32, hidden_size=48, num_heads=4, mlp_ratio=2, patch_size=14)
    return hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(text_config=_text(rope_parameters=_ROPE), vision_config=vision, **_QWEN)
    )


def _qwen2_5_vl():
    vision = dict(depth=3, hidden_size=32, intermediate_size=64, num_heads=4, out_hidden_size=48,
                  patch_size=14, window_size=56, fullatt_block_indexes=[1])  # fmt: skip
    return hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(text_config=_text(rope_parameters=_ROPE), vision_config=vision, **_QWEN)
    )


def _qwen3_vl():
    vision = dict(depth=3, hidden_size=32, intermediate_size=64, num_heads=4, out_hidden_size=48,
                  patch_size=14, num_position_embeddings=64,
                  deepstack_visual_indexes=[0, 1])  # fmt: skip
    text = _text(head_dim=12, rope_parameters=_ROPE)
    return hf.Qwen3VLForConditionalGeneration(
        hf.Qwen3VLConfig(text_config=text, vision_config=vision, **_QWEN)
    )


def _qwen_picture(size: int, g: torch.Generator) -> Picture:
    height, width = [(8, 8), (4, 10), (6, 4)][size]
    pixels = torch.randn(height * width, 3 * 2 * 14 * 14, generator=g)
    grid = torch.tensor([[1, height, width]])
    shape = (height // 2, width // 2)
    return Picture(dict(pixel_values=pixels, image_grid_thw=grid), height * width // 4, shape)


def _qwen_video(size: int, g: torch.Generator, split: bool = False) -> Picture:
    """Videos of unequal length, and an image among them."""
    if size == 1:
        return _qwen_picture(size, g)
    frames, height, width = [(2, 4, 6), (), (3, 4, 4)][size]
    patches, tokens = frames * height * width, height * width // 4
    fields = dict(
        pixel_values_videos=torch.randn(patches, 3 * 2 * 14 * 14, generator=g),
        video_grid_thw=torch.tensor([[frames, height, width]]),
    )
    runs = (tokens,) * frames if split else (tokens * frames,)
    return Picture(fields, tokens * frames, (height // 2, width // 2), frames, runs)


def _qwen3_video(size: int, g: torch.Generator) -> Picture:
    """Frames with a time between them."""
    return _qwen_video(size, g, split=True)


def _glm4v(config: type = hf.Glm4vConfig, net: type = hf.Glm4vForConditionalGeneration):
    vision = dict(depth=3, hidden_size=32, intermediate_size=64, num_heads=4, out_hidden_size=48,
                  patch_size=14, image_size=112)  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [1, 1, 1], "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5}  # fmt: skip
    ids = _QWEN | dict(image_start_token_id=START, image_end_token_id=END,
                       video_start_token_id=3, video_end_token_id=4)  # fmt: skip
    return net(config(text_config=_text(rope_parameters=rope), vision_config=vision, **ids))


def _glm46v():
    return _glm4v(hf.Glm46VConfig, hf.Glm46VForConditionalGeneration)


def _glm_video(size: int, g: torch.Generator) -> Picture:
    """Videos alone, for a call has one kind, and one of them has a single frame."""
    frames, height, width = [(2, 4, 6), (1, 4, 6), (3, 4, 4)][size]
    pixels = torch.randn(frames * height * width, 3 * 2 * 14 * 14, generator=g)
    fields = dict(
        pixel_values_videos=pixels, video_grid_thw=torch.tensor([[frames, height, width]])
    )
    tokens = height * width // 4
    runs = (tokens,) * frames
    return Picture(fields, frames * tokens, (height // 2, width // 2), frames, runs, alike=True)


# Square pictures: LLaVA, InternVL, Idefics3

_CLIP = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
             image_size=56, patch_size=14, projection_dim=32)  # fmt: skip
_SIGLIP = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
               image_size=56, patch_size=14, vision_use_head=False)  # fmt: skip


def _llava():
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=hf.CLIPVisionConfig(**_CLIP), image_token_id=IMAGE,
                       text_config=hf.LlamaConfig(**_text()))
    )  # fmt: skip


def _vipllava():
    return hf.VipLlavaForConditionalGeneration(
        hf.VipLlavaConfig(
            vision_config=hf.CLIPVisionConfig(**_CLIP), text_config=hf.LlamaConfig(**_text()),
            image_token_index=IMAGE, image_token_id=IMAGE,
            **dict.fromkeys(("vision_feature_layer", "vision_feature_layers"), [1, -2]),
        )
    )  # fmt: skip


def _deepseek_vl():
    return hf.DeepseekVLForConditionalGeneration(
        hf.DeepseekVLConfig(vision_config=hf.SiglipVisionConfig(**_SIGLIP), image_token_id=IMAGE,
                            text_config=hf.LlamaConfig(**_text()))
    )  # fmt: skip


def _internvl():
    vision = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=3, patch_size=[14, 14],
                  num_attention_heads=4, image_size=[112, 112])  # fmt: skip
    net = hf.InternVLForConditionalGeneration(
        hf.InternVLConfig(vision_config=vision, text_config=hf.Qwen2Config(**_text()),
                          image_token_id=IMAGE, downsample_ratio=0.5)
    )  # fmt: skip
    for name, weight in net.model.vision_tower.named_parameters():
        if "position" in name or "cls_token" in name:
            torch.nn.init.normal_(weight, std=0.3)
        if "lambda" in name:
            torch.nn.init.ones_(weight)
    return net


def _idefics(config: type, net: type, **more):
    vision = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
                  image_size=112, patch_size=14)  # fmt: skip
    return net(
        config(vision_config=vision, text_config=hf.LlamaConfig(**_text()), image_token_id=IMAGE,
               scale_factor=2, **more)
    )  # fmt: skip


def _idefics3():
    return _idefics(hf.Idefics3Config, hf.Idefics3ForConditionalGeneration)


def _smolvlm():
    return _idefics(hf.SmolVLMConfig, hf.SmolVLMForConditionalGeneration)


def _square(side: int, tokens: int):
    def picture(size: int, g: torch.Generator) -> Picture:
        return Picture(dict(pixel_values=torch.randn(1, 3, side, side, generator=g)), tokens)

    return picture


def _masked(size: int, g: torch.Generator) -> Picture:
    """Idefics3: pictures of sizes 1 and 2 do not fill their square."""
    picture = _square(112, 16)(size, g)
    mask = torch.ones(1, 112, 112, dtype=torch.bool)
    mask[:, (112, 84, 56)[size] :] = False
    picture.fields["pixel_attention_mask"] = mask
    return picture


def _stack(samples: list[list[Picture]]) -> dict[str, Tensor]:
    """Idefics3: `[batch, most images, 3, height, width]`, filled up with zeros."""
    most, out = max(map(len, samples)), {}
    for name, one in next(p for sample in samples for p in sample).fields.items():
        empty = torch.zeros_like(one)
        rows = [torch.cat([p.fields[name] for p in s] + [empty] * (most - len(s))) for s in samples]
        out[name] = torch.stack(rows)
    return out


def _gemma3():
    text = _text(head_dim=12, sliding_window=12, query_pre_attn_scalar=12,
                 layer_types=["sliding_attention", "sliding_attention", "full_attention",
                              "sliding_attention"])  # fmt: skip
    vision = _SIGLIP | dict(model_type="siglip_vision_model", image_size=112)
    net = hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=16,
                        image_token_index=IMAGE, image_token_id=IMAGE, boi_token_index=START,
                        eoi_token_index=END)
    )  # fmt: skip
    torch.nn.init.normal_(net.model.multi_modal_projector.mm_input_projection_weight, std=0.2)
    return net


def _paligemma():
    text = hf.GemmaConfig(**_text(head_dim=12))
    vision = hf.SiglipVisionConfig(**_SIGLIP)
    return hf.PaliGemmaForConditionalGeneration(
        hf.PaliGemmaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE,
                           image_token_id=IMAGE, projection_dim=48, hidden_size=48)
    )  # fmt: skip


# Pictures of any size, padded

_PIXTRAL = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
                head_dim=8, image_size=140, patch_size=14)  # fmt: skip


def _mistral3():
    text = hf.MistralConfig(**_text(head_dim=12, sliding_window=None))
    return hf.Mistral3ForConditionalGeneration(
        hf.Mistral3Config(text_config=text, vision_config=hf.PixtralVisionConfig(**_PIXTRAL),
                          image_token_index=IMAGE, image_token_id=IMAGE, spatial_merge_size=2)
    )  # fmt: skip


def _lighton_ocr():
    text = hf.Qwen3Config(**_text(head_dim=12))
    return hf.LightOnOcrForConditionalGeneration(
        hf.LightOnOcrConfig(text_config=text, vision_config=hf.PixtralVisionConfig(**_PIXTRAL),
                            image_token_id=IMAGE, spatial_merge_size=2)
    )  # fmt: skip


def _ragged(size: int, g: torch.Generator) -> Picture:
    rows, cols = [(4, 4), (2, 5), (3, 2)][size]
    pixels = torch.randn(1, 3, 28 * rows, 28 * cols, generator=g)
    fields = dict(pixel_values=pixels, image_sizes=torch.tensor([pixels.shape[-2:]]))
    return Picture(fields, rows * cols, (rows, cols))


def _pad(samples: list[list[Picture]]) -> dict[str, Tensor]:
    """All pictures on canvases of one size."""
    pictures = [p.fields["pixel_values"] for sample in samples for p in sample]
    sizes = torch.tensor([x.shape[-2:] for x in pictures])
    canvas = torch.zeros(len(pictures), 3, *sizes.amax(0).tolist())
    for own, x in zip(canvas, pictures, strict=True):
        own[:, : x.shape[-2], : x.shape[-1]] = x[0]
    return {"pixel_values": canvas, "image_sizes": sizes}


# Anyres

_PINS = [[56, 56], [56, 112], [112, 56], [112, 112]]


def _llava_next():
    return hf.LlavaNextForConditionalGeneration(
        hf.LlavaNextConfig(vision_config=hf.CLIPVisionConfig(**_CLIP), image_token_id=IMAGE,
                           text_config=hf.LlamaConfig(**_text()), image_grid_pinpoints=_PINS)
    )  # fmt: skip


def _llava_onevision():
    return hf.LlavaOnevisionForConditionalGeneration(
        hf.LlavaOnevisionConfig(
            vision_config=hf.SiglipVisionConfig(**_SIGLIP), text_config=hf.Qwen2Config(**_text()),
            image_token_id=IMAGE, video_token_id=VIDEO, image_grid_pinpoints=_PINS,
            vision_aspect_ratio="anyres_max_1",
        )
    )  # fmt: skip


#: Per size: (height, width), tiles, and rows x cols of the tiled view, worked out by hand.
_ANYRES = [((60, 110), 5, (4, 8)), ((50, 50), 2, (4, 4)), ((100, 60), 5, (8, 4))]
#: LLaVA-OneVision shrinks views of more than one tile.
_SHRUNK = [((60, 110), 5, (2, 5)), ((50, 50), 2, (4, 4)), ((100, 60), 5, (5, 2))]


def _anyres(shapes):
    def picture(size: int, g: torch.Generator) -> Picture:
        shape, tiles, (rows, cols) = shapes[size]
        pixels = torch.zeros(1, 5, 3, 56, 56)
        pixels[:, :tiles] = torch.randn(1, tiles, 3, 56, 56, generator=g)
        fields = dict(pixel_values=pixels, image_sizes=torch.tensor([shape]))
        return Picture(fields, 16 + rows * (cols + 1), (rows, cols))

    return picture


def _onevision_video(size: int, g: torch.Generator) -> Picture:
    """Frames of 2 x 2 tokens, all videos equally long, and an image among them."""
    if size == 1:
        return _anyres(_SHRUNK)(size, g)
    pixels = torch.randn(1, 3, 3, 56, 56, generator=g)
    return Picture(dict(pixel_values_videos=pixels), 3 * 4 + 1, (2, 2), 3, end=True)


def _onevision_many(size: int, g: torch.Generator) -> Picture:
    """Images of sizes 1 and 2 are among others: their base view alone."""
    picture = _anyres(_SHRUNK)(size, g)
    return Picture(picture.fields, 17, end=True) if size else picture


def _count(samples: list[list[Picture]]) -> dict[str, Tensor]:
    counts = [n for s in samples for n in ([2] if any(p.end for p in s) else [1] * len(s))]
    return _cat(samples) | {"batch_num_images": torch.tensor(counts)}


def _anyres_cells(picture: Picture) -> list[int]:
    if picture.end:
        return list(range(picture.tokens - 1))
    rows, cols = picture.grid
    return [*range(16), *(16 + r * (cols + 1) + c for r in range(rows) for c in range(cols))]


def _anyres_separators(sample: Sample, kept: list[int]) -> list[int]:
    found, at = [], 0
    for picture in sample.pictures:
        rows, cols = picture.grid
        end = at + picture.tokens - 1
        if picture.end and any(at <= t < end for t in kept):
            found.append(end)
        for r in range(0 if picture.end else rows):
            first = at + 16 + r * (cols + 1)
            if any(first <= t < first + cols for t in kept):
                found.append(first + cols)
        at += picture.tokens
    return found


KITS: dict[str, Kit] = {
    "llava": Kit(_llava, _square(56, 16), _cat),
    "qwen2_vl": Kit(_qwen2_vl, _qwen_picture, _cat, mrope=True),
    "qwen2_5_vl": Kit(_qwen2_5_vl, _qwen_picture, _cat, mrope=True),
    "qwen3_vl": Kit(_qwen3_vl, _qwen_picture, _cat, mrope=True),
    "internvl": Kit(_internvl, _square(112, 16), _cat),
    "idefics3": Kit(_idefics3, _masked, _stack),
    "smolvlm": Kit(_smolvlm, _square(112, 16), _stack),
    "gemma3": Kit(_gemma3, _square(112, 16), _cat),
    "paligemma": Kit(_paligemma, _square(56, 16), _cat),
    "mistral3": Kit(_mistral3, _ragged, _pad),
    "glm4v": Kit(_glm4v, _qwen_picture, _cat, mrope=True),
    "glm46v": Kit(_glm46v, _qwen_picture, _cat, mrope=True),
    "vipllava": Kit(_vipllava, _square(56, 16), _cat),
    "deepseek_vl": Kit(_deepseek_vl, _square(56, 16), _cat),
    "lighton_ocr": Kit(_lighton_ocr, _ragged, _pad),
    "llava_next": Kit(
        _llava_next, _anyres(_ANYRES), _cat, cells=_anyres_cells, separators=_anyres_separators
    ),
    "llava_onevision": Kit(
        _llava_onevision, _anyres(_SHRUNK), _cat, cells=_anyres_cells, separators=_anyres_separators
    ),
    "llava_onevision_many": Kit(
        _llava_onevision, _onevision_many, _count, cells=_anyres_cells,
        separators=_anyres_separators,
    ),
    "qwen2_vl_video": Kit(_qwen2_vl, _qwen_video, _cat, mrope=True),
    "qwen2_5_vl_video": Kit(_qwen2_5_vl, _qwen_video, _cat, mrope=True),
    "qwen3_vl_video": Kit(_qwen3_vl, _qwen3_video, _cat, mrope=True),
    "glm4v_video": Kit(_glm4v, _glm_video, _cat, mrope=True),
    "glm46v_video": Kit(_glm46v, _glm_video, _cat, mrope=True),
    "llava_onevision_video": Kit(
        _llava_onevision, _onevision_video, _cat, cells=_anyres_cells,
        separators=_anyres_separators,
    ),
}


def model(family: str, attn: str = "sdpa") -> nn.Module:
    """A random model in fp32 with sharp attention; the same weights on every call."""
    torch.manual_seed(0)
    net = KITS[family].build().eval()
    net.set_attn_implementation(attn)
    decoder = net.get_decoder()
    inside = {id(p) for p in decoder.parameters()}
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if "norm" in name:
                weight.add_(torch.randn_like(weight) * 0.1)
            elif weight.dim() == 1:
                weight.normal_(0, 0.1)
            elif "q_proj" in name or "k_proj" in name:
                weight.mul_(8.0 if id(weight) in inside else 12.0)
            elif "qkv" in name:
                weight[: 2 * weight.shape[1]].mul_(12.0)
            elif "embed_tokens" in name:
                # Gemma scales embeddings by itself, and its head shares them.
                weight.mul_(2.0 if "gemma" in family else 20.0)
            elif weight.dim() >= 2 and "embed" not in name:
                weight.mul_(3.0)
    net.generation_config.eos_token_id = None
    net.generation_config.pad_token_id = PAD
    return net


@cache
def reference(family: str) -> nn.Module:
    """The model that the oracle runs on; nothing ever patches it."""
    return model(family, "eager")


#: Sizes of the images of each sample, and its text tokens.
SPECS = {
    "alone": (((0,), 7),),
    "padded": (((0,), 6), ((1, 2), 9), ((), 5)),
    "single": (((0,), 6), ((1,), 9), ((), 5)),
    "several": (((2, 0, 1), 8),),
    "text": (((), 6), ((), 9)),
}


def samples(family: str, kind: str | Sequence = "padded", seed: int = 1) -> list[Sample]:
    """Random conversations: a name in `SPECS`, or such a value."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for sizes, n_text in SPECS[kind] if isinstance(kind, str) else kind:
        text = torch.randint(10, VOCAB, (n_text,), generator=g).tolist()
        ids, pictures = [1] + text[:3], []
        for size in sizes:
            pictures.append(picture := KITS[family].picture(size, g))
            for run in picture.runs or (picture.tokens,):
                ids += [START] + [picture.token] * run + [END]
        out.append(Sample(torch.tensor(ids + text[3:]), pictures))
    return out


def collate(family: str, batch: Sequence[Sample], side: str = "left") -> dict[str, Tensor]:
    """What a processor would give."""
    width = max(len(s.ids) for s in batch)
    ids = torch.full((len(batch), width), PAD)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    for b, s in enumerate(batch):
        where = slice(width - len(s.ids), width) if side == "left" else slice(0, len(s.ids))
        ids[b, where], mask[b, where] = s.ids, 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if any(s.pictures for s in batch):
        inputs |= KITS[family].join([s.pictures for s in batch])
    if family == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).int()
    if family == "paligemma":
        inputs["token_type_ids"] = torch.zeros_like(ids)
    if KITS[family].mrope:
        inputs["mm_token_type_ids"] = token_types(family, ids)
    return inputs


def token_types(family: str, ids: Tensor) -> Tensor:
    """1 for images, 2 for videos."""
    alike = family in ("glm4v_video", "glm46v_video")
    return (ids == IMAGE).int() * (1 + alike) + 2 * (ids == VIDEO).int()


def pairwise(
    when: Callable[..., bool] = lambda **values: True, **axes: Sequence
) -> pytest.MarkDecorator:
    """Parametrise over a full product; rows that are not needed to meet every pair are slow.

    Args:
        when: says of a row, by name, whether it exists.
        axes: values by parameter.
    """
    rows = [
        row for row in itertools.product(*axes.values())
        if when(**dict(zip(axes, row, strict=True)))
    ]
    order = random.Random(0).sample(rows, len(rows))
    pairs = {row: set(itertools.combinations(enumerate(row), 2)) for row in rows}
    met, fast = set(), set()
    for least in range(len(axes) * (len(axes) - 1) // 2, 0, -1):
        for row in order:
            if len(pairs[row] - met) >= least:
                met |= pairs[row]
                fast.add(row)
    return pytest.mark.parametrize(list(axes), [
        pytest.param(
            *row, id="-".join(map(str, row)), marks=[] if row in fast else [pytest.mark.slow]
        )
        for row in rows
    ])  # fmt: skip
