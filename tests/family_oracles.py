"""What a patched model of any family must equal.

The oracle runs the layers of an unpatched model one by one over a single unpadded sample, without
a cache: rows that a plan drops stay where they are and are masked. Nothing is shared with the
engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from families import KITS, Picture, Sample, reference, token_types
from oracles import Cut
from torch import Tensor, nn
from torch.nn import functional as F


@torch.no_grad()
def encode(family: str, pictures: Sequence[Picture]) -> list[list[Tensor]]:
    """Features of each picture by the unpatched model, `[tokens, width]`.

    Behind them what the decoder adds to the visual rows after each of its first layers.
    """
    net, out = reference(family).base_model, {}
    for kind in ("image", "video"):
        own = [i for i, p in enumerate(pictures) if bool(p.frames) == (kind == "video")]
        if not own:
            continue
        fields = KITS[family].join([[pictures[i] for i in own]])
        result = getattr(net, f"get_{kind}_features")(**fields, return_dict=True)
        sizes = [pictures[i].tokens for i in own]
        made = [result.pooler_output, *(getattr(result, "deepstack_features", None) or [])]
        made = [x if isinstance(x, Tensor) else torch.cat(list(x)) for x in made]
        parts = [x.reshape(-1, x.shape[-1]).split(sizes) for x in made]
        out |= {i: list(of) for i, of in zip(own, zip(*parts, strict=True), strict=True)}
    return [out[i] for i in range(len(pictures))]


def base_name(family: str) -> str:
    """The model behind a kit."""
    return family.removesuffix("_video").removesuffix("_many")


#: Families whose visual tokens come from one tower token each.
PER_TOKEN = ("llava", "vipllava", "deepseek_vl", "paligemma")


# The tower, for methods that read it


@dataclass
class Seen:
    """What a tower says of one picture, per visual token that is no separator.

    Attributes:
        score: `[n]`, attention of [CLS], or received from all patches, summed over heads.
        keys: `[n, dim]`, mean over heads.
    """

    score: Tensor
    keys: Tensor


@torch.no_grad()
def seen(
    family: str, sample: Sample, ordinal: int, block: int | None = None, joint: bool = False
) -> Seen:
    """Read a block: the one before the projector (for Qwen2.5-VL the last that sees everything).

    Args:
        block: another block.
        joint: one softmax over the full width instead of one per head; keys side by side.
    """
    net, picture = reference(family), sample.pictures[ordinal]
    family, whole = base_name(family), family
    tower = net.base_model.get_encoder("image")
    caught = {}
    if KITS[family].mrope:
        last = 1 if family == "qwen2_5_vl" else -1
        attention = tower.blocks[last if block is None else block].attn
    else:
        encoder = getattr(tower, "vision_model", tower)
        encoder = getattr(encoder, "encoder", getattr(encoder, "transformer", None))
        last = -2 if family in ("llava", "vipllava", "llava_next") else -1
        last = last if block is None else block
        module = getattr(encoder, "layers", getattr(encoder, "layer", None))[last]
        attention = getattr(module, "self_attn", None) or module.attention
    handle = attention.register_forward_pre_hook(
        lambda _, args, kwargs: caught.update(
            kwargs, x=args[0] if args else kwargs["hidden_states"]
        ),
        with_kwargs=True,
    )
    encode(whole, [picture])
    handle.remove()
    if KITS[family].mrope:
        q, k = (  # frames do not see each other
            x.unflatten(2, (picture.frames or 1, -1)).transpose(1, 2).flatten(0, 1)
            for x in _qwen_heads(attention, caught)
        )
    else:
        x, n = caught["x"], attention.num_heads
        q, k = (
            p(x).unflatten(-1, (n, -1)).transpose(1, 2)
            for p in (attention.q_proj, attention.k_proj)
        )
        if "position_embeddings" in caught:
            q, k = (_turned(t, *caught["position_embeddings"]) for t in (q, k))
    if joint:
        q, k = (x.transpose(1, 2).flatten(2)[:, None] for x in (q, k))
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # [tiles, heads, n, n]
    if caught.get("attention_mask") is not None:  # of a picture that does not fill its square
        logits = logits + caught["attention_mask"]
    weights = logits.softmax(-1)
    if family in ("llava", "vipllava", "llava_next", "internvl"):
        score, keys = weights[:, :, 0, 1:].sum(1), k.mean(1)[:, 1:]
    else:
        score, keys = weights.sum((1, 2)), k.mean(1)
    both = torch.cat([score[..., None], keys], -1)  # [tiles, patches, 1 + dim]
    both = as_tokens(family, net, both, picture)
    return Seen(both[:, 0], both[:, 1:])


def _qwen_heads(attention: nn.Module, caught: dict) -> tuple[Tensor, Tensor]:
    x, (cos, sin) = caught["x"], caught["position_embeddings"]
    q, k, _ = attention.qkv(x).view(len(x), 3, attention.num_heads, -1).unbind(1)
    return tuple(_turned(t.transpose(0, 1)[None], cos, sin) for t in (q, k))


def _turned(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = t.shape[-1] // 2
    return t * cos + torch.cat([-t[..., half:], t[..., :half]], -1) * sin


def as_tokens(family: str, net: nn.Module, signal: Tensor, picture: Picture) -> Tensor:
    """A signal of the tower `[tiles, patches, d]` per visual token `[n, d]`."""
    (rows, cols), width = picture.grid, signal.shape[-1]
    family = base_name(family)
    if family in PER_TOKEN:
        return signal[0]
    if picture.frames and family == "llava_onevision":
        return net.model.apply_pooling(signal).flatten(0, 1)
    if picture.end:
        return signal[0]
    if family.startswith("llava_"):
        packed, _ = net.model.pack_image_features(
            [signal], picture.fields["image_sizes"], image_newline=None,
            **({"vision_aspect_ratio": "anyres_max_1"} if "onevision" in family
               else {"vision_feature_select_strategy": "default"}),
        )  # fmt: skip
        return packed[0]
    if not KITS[family].mrope:
        grid = signal[0].view(rows, 2, cols, 2, width)
        return grid.mean((1, 3)).reshape(-1, width)
    tokens = signal.reshape(-1, 4, width).mean(1)
    if family != "qwen2_5_vl":
        return tokens
    # Windows of 2 x 2 tokens, from left to right and from the top, frame after frame.
    area = rows * cols
    order = sorted(
        range(len(tokens)),
        key=lambda t: (t // area, t % area // cols // 2, t % cols // 2, t),
    )
    out = torch.empty_like(tokens)
    out[order] = tokens
    return out


def visionzip(features: Tensor, told: Seen, keep: int) -> tuple[list[int], Tensor]:
    """VisionZip without [CLS] as a token: tokens that stay, and what stands there."""
    n_dominant = max(1, int(54 / 64 * keep))
    n = len(features)
    score = told.score.tolist()
    picked = sorted(range(n), key=lambda i: -score[i])[:n_dominant]
    rest = [i for i in range(n) if i not in picked]
    step = max(1, len(rest) // max(1, keep - n_dominant))
    targets = rest[::step][: keep - n_dominant]
    keys = told.keys / told.keys.norm(dim=1, keepdim=True)
    own: dict[int, list[int]] = {t: [] for t in targets}
    for i in rest:
        if i not in targets and targets:
            own[max(targets, key=lambda j: float(keys[i] @ keys[j]))].append(i)
    out = features.clone()
    for target, members in own.items():
        if members:
            out[target] = features[target] + features[members].mean(0)
    return sorted(picked + targets), out


def avgpool(features: Tensor, grid: tuple[int, int], seats: list[int]) -> Tensor:
    """Adaptive average pooling; each cell stands at the seat that the engine reports."""
    small = [len({t // grid[1] for t in seats}), len({t % grid[1] for t in seats})]
    bounds = [
        [(i * side // n, -(-(i + 1) * side // n)) for i in range(n)]
        for side, n in zip(grid, small, strict=True)
    ]
    boxes = [(r, c) for r in bounds[0] for c in bounds[1]]
    out, x = features.clone(), features.view(*grid, -1)
    for seat, ((top, bottom), (left, right)) in zip(sorted(seats), boxes, strict=True):
        assert top <= seat // grid[1] < bottom and left <= seat % grid[1] < right
        out[seat] = x[top:bottom, left:right].mean((0, 1))
    return out


@torch.no_grad()
def smaller(family: str, picture: Picture, seats: list[int]) -> Tensor:
    """Features of a picture made smaller, as many as there are seats on its grid."""
    net, (height, width) = reference(family), picture.grid
    rows, cols = len({t // width for t in seats}), len({t % width for t in seats})
    fields, more = dict(picture.fields), {}
    pixels, side = fields["pixel_values"], 14 * (1 if family in PER_TOKEN else 2)
    if KITS[family].mrope:
        # Patches lie token by token; within one [channel, frame, row, col].
        canvas = torch.zeros(6, height * side, width * side)
        for t in range(height * width):
            for i in range(4):
                top, left = t // width * 28 + i // 2 * 14, t % width * 28 + i % 2 * 14
                patch = pixels[4 * t + i].view(6, 14, 14)
                canvas[:, top : top + 14, left : left + 14] = patch
        pixels = canvas[None]
    pixels = F.interpolate(pixels, (rows * side, cols * side), mode="bilinear", antialias=True)
    if KITS[family].mrope:
        patches = []
        for t in range(rows * cols):
            for i in range(4):
                top, left = t // cols * 28 + i // 2 * 14, t % cols * 28 + i % 2 * 14
                patches.append(pixels[0, :, top : top + 14, left : left + 14].flatten())
        pixels = torch.stack(patches)
        fields["image_grid_thw"] = torch.tensor([[1, 2 * rows, 2 * cols]])
    if "pixel_attention_mask" in fields:
        mask = fields["pixel_attention_mask"][None].float()
        fields["pixel_attention_mask"] = F.interpolate(mask, (rows * side, cols * side))[0].bool()
    if "image_sizes" in fields:
        fields["image_sizes"] = torch.tensor([pixels.shape[-2:]])
    if family in PER_TOKEN:
        more = {"interpolate_pos_encoding": True}
    fields = KITS[family].join([[Picture(fields | {"pixel_values": pixels}, rows * cols)]])
    out = net.base_model.get_image_features(**fields, **more, return_dict=True).pooler_output
    return out[0] if isinstance(out, Tensor) else torch.cat(list(out))


# The oracle


@torch.no_grad()
def deepstack(family: str, sample: Sample) -> list[Tensor]:
    """What the decoder adds to the visual rows behind each of its first layers."""
    added = [of[1:] for of in encode(family, sample.pictures)]
    return [torch.cat(layer) for layer in zip(*added, strict=True)]


def features(family: str, sample: Sample) -> list[Tensor]:
    """What the unpatched model makes of each picture, `[tokens, width]`."""
    return [of[0] for of in encode(family, sample.pictures)]


@dataclass
class Dense:
    """Logits `[n, vocabulary]`; per layer the visual tokens that enter; rows alive at the end.

    `hidden` is what enters the first layer and what leaves each, `[n, width]`, the last normed.
    """

    logits: Tensor
    entering: list[Tensor]
    alive: Tensor
    hidden: list[Tensor]


@torch.no_grad()
def dense(
    family: str,
    sample: Sample,
    more: Tensor | None = None,
    *,
    cuts: Sequence[Cut] = (),
    kept: Tensor | None = None,
    vectors: Tensor | None = None,
    compact: bool = False,
    turns: Sequence[tuple[int, int]] | None = None,
    first: int | None = None,
) -> Dense:
    """One sample through the layers of the unpatched model, dropped rows masked.

    Args:
        family: its name.
        sample: the prompt.
        more: int64 `[m]`, tokens after the prompt.
        cuts: drops inside the decoder, by the attention of the prompt's last row.
        kept: int64, visual tokens that enter the decoder; None is all.
        vectors: `[visual, width]`, what stands at the visual rows instead of the features.
        compact: whether positions run on without the dropped rows.
        turns: rows of each turn of a conversation; its last row decides for its pictures.
        first: rows of the first turn where `turns` does not say so.
    """
    net = reference(family)
    lm = net.get_decoder()
    ids = sample.ids if more is None else torch.cat([sample.ids, more])
    prompt, n = len(sample.ids), len(ids)
    visual = torch.zeros(n, dtype=torch.bool)
    visual[:prompt] = sample.visual
    h = net.get_input_embeddings()(ids)
    if sample.pictures:
        own = torch.cat(features(family, sample)) if vectors is None else vectors
        h[visual] = own.to(h)
    alive = torch.ones(n, dtype=torch.bool)
    if kept is not None:
        gone = torch.ones(int(visual.sum()), dtype=torch.bool)
        gone[kept] = False
        alive[visual.nonzero()[gone, 0]] = False
    position = positions(family, sample, n)
    start_at = position.flatten()[0]  # PaliGemma counts from 1
    if compact:
        position = torch.where(alive, alive.long().cumsum(0) - 1 + start_at, position)
    source = torch.where(visual, visual.long().cumsum(0) - 1, -1)
    row_of = visual.nonzero()[:, 0]
    cells = row_of[_cells(family, sample)]
    weights: dict[int, Tensor] = {}
    turns = turns or [(0, prompt)]
    entering, h, added = [], h[None], deepstack(family, sample)
    hidden = [h[0]]
    for i, layer in enumerate(lm.layers):
        for cut, (start, end) in itertools.product(cuts, turns):
            here = (torch.arange(n) >= start) & (torch.arange(n) < end)
            if cut.layer == i and (arriving := cells[(alive & here)[cells]].tolist()):
                score = weights[i - 1][0, :, end - 1].mean(0)
                ranked = sorted(arriving, key=lambda r: -score[r].item())
                stay = ranked[: cut.count(len(arriving), _pictures(sample, start, end))]
                stay += row_of[KITS[family].separators(sample, source[stay].tolist())].tolist()
                alive[visual & here & ~torch.isin(torch.arange(n), torch.tensor(stay))] = False
                if cut.positions == "compact":
                    position = torch.where(alive, alive.long().cumsum(0) - 1 + start_at, position)
        entering.append(source[visual & alive])
        see = _pattern(family, i, sample, n, first or turns[0][1])
        see = see & (alive[None] | torch.eye(n, dtype=torch.bool))
        mask = torch.zeros(n, n).masked_fill(~see, torch.finfo(torch.float32).min)
        kind = (lm.config.layer_types[i],) if family == "gemma3" else ()
        rope = lm.rotary_emb(
            h, position[:, None] if position.dim() == 2 else position[None], *kind
        )
        handle = layer.self_attn.register_forward_hook(
            lambda _, args, out, i=i: weights.__setitem__(i, out[1])
        )
        h = layer(h, attention_mask=mask[None, None], position_embeddings=rope)
        handle.remove()
        if i < len(added):
            h[0, visual] += added[i]
        hidden.append(h[0])
    hidden[-1] = lm.norm(h)[0]
    return Dense(net.lm_head(hidden[-1]), entering, alive, hidden)


def _pictures(sample: Sample, start: int, end: int) -> int:
    """Pictures whose tokens stand in these rows."""
    first = sample.visual.long().cumsum(0)
    seen = range(int(first[start - 1]) if start else 0, int(first[end - 1]))
    starts = itertools.accumulate([p.tokens for p in sample.pictures], initial=0)
    return sum(at in seen for at in list(starts)[:-1])


def _pattern(
    family: str, layer: int, sample: Sample, n: int, first: int | None = None
) -> Tensor:
    """What each row may see if nothing is dropped: bool `[n, n]`.

    Only images in the `first` rows, of a conversation's first turn, see both ways in Gemma 3: with
    a filled cache transformers puts the block of an image at the wrong rows, or at none. In
    PaliGemma these are all of the `first` rows.
    """
    see = torch.ones(n, n, dtype=torch.bool).tril()
    if family == "paligemma":
        first = len(sample.ids) if first is None else first
        see[:first, :first] = True
    if family != "gemma3":
        return see
    visual = torch.zeros(n, dtype=torch.bool)
    visual[: len(sample.ids)] = sample.visual
    visual[len(sample.ids) if first is None else first :] = False
    image = torch.where(visual, (~visual).long().cumsum(0), -1)  # images are never neighbours
    see |= visual[:, None] & (image[:, None] == image)
    config = reference(family).config.text_config
    if config.layer_types[layer] == "sliding_attention":
        row = torch.arange(n)
        see &= row[:, None] - row < config.sliding_window
    return see


def _cells(family: str, sample: Sample) -> list[int]:
    """Visual tokens of a sample that are no separators."""
    found, at = [], 0
    for picture in sample.pictures:
        found += [at + c for c in KITS[family].cells(picture)]
        at += picture.tokens
    return found


def positions(family: str, sample: Sample, n: int) -> Tensor:
    """Positions of the prompt and what follows it: `[n]`, or `[3, n]` under M-RoPE."""
    if family == "paligemma":
        return torch.arange(n) + 1
    if not KITS[family].mrope or not sample.pictures:
        return torch.arange(n).expand(3, -1) if KITS[family].mrope else torch.arange(n)
    fields = KITS[family].join([sample.pictures])
    position, _ = reference(family).model.get_rope_index(
        sample.ids[None],
        mm_token_type_ids=token_types(family, sample.ids)[None],
        image_grid_thw=fields.get("image_grid_thw"),
        video_grid_thw=fields.get("video_grid_thw"),
        attention_mask=torch.ones_like(sample.ids)[None],
    )
    position = position[:, 0]
    # generate() counts on from the last row, also where a video runs ahead of it in time.
    rest = position[:, -1:] + 1 + torch.arange(n - len(sample.ids))
    return torch.cat([position, rest], 1)
