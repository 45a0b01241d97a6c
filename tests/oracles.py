"""What patched models must equal, written slowly and plainly.

Nothing here is shared with the engine: the decoder and the tower are looped over by hand with
attention written out, every sample is alone and unpadded, there is no cache, and a row that a
method drops stays in the sequence and is masked out of every later attention. The choice of
tokens is written from the methods' published descriptions, with loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from tiny import Sample
from torch import Tensor
from torch.nn import functional as F

# --------------------------------------------------------------------------------------------
# The model, by hand


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, allowed: Tensor | None = None):
    """Softmax attention in fp32: `[heads, rows, dim]` each; also returns the weights."""
    logits = q @ k.transpose(-1, -2) * scale
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    weights = logits.softmax(-1)
    return weights @ v, weights


def heads(x: Tensor, n: int) -> Tensor:
    return x.view(x.shape[0], n, -1).transpose(0, 1)


@dataclass
class Tower:
    """One image through the tower: features, the [CLS] row of attention, keys.

    Attributes:
        patches: `[n, width]`, what LLaVA gives its projector.
        cls: `[width]`, None in a tower without one.
        attention: `[heads, n]` of the block that produced the features: the row of [CLS], or
            in a tower without one what each patch receives from all.
        keys: `[heads, n, dim]` of that block, bias included, unscaled.
        blocks: queries and keys of every block, `[heads, n or n + 1, dim]` each, [CLS] first.
    """

    patches: Tensor
    cls: Tensor | None
    attention: Tensor
    keys: Tensor
    blocks: list[tuple[Tensor, Tensor]]

    def looks(self, block: int, joint: bool = False) -> Tensor:
        """`[heads, n]`, the row of [CLS], or what is received, in another block.

        Args:
            block: the block.
            joint: one head of the full width instead, `[1, n]`.
        """
        q, k = self.blocks[block]
        if joint:
            q, k = (x.transpose(0, 1).flatten(1)[None] for x in (q, k))
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return weights.sum(1) if self.cls is None else weights[:, 0, 1:]


def tower(model, pixels: Tensor) -> Tower:
    """A CLIP or SigLIP tower on one picture `[3, H, W]`, up to hidden state -2."""
    net = model.model.vision_tower
    net = getattr(net, "vision_model", net)
    n_heads = model.config.vision_config.num_attention_heads
    trained = model.config.vision_config.image_size
    resized = pixels.shape[-1] != trained or pixels.shape[-2] != trained
    x = net.embeddings(pixels[None], interpolate_pos_encoding=resized)[0]
    prefix = int(hasattr(net, "pre_layrnorm"))  # CLIP, which has [CLS]
    if prefix:
        x = net.pre_layrnorm(x)
    features, blocks = None, []
    for block in net.encoder.layers:
        features = x
        h = block.layer_norm1(x)
        attention = block.self_attn
        q, k, v = (
            heads(p(h), n_heads) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        out, _ = attend(q, k, v, q.shape[-1] ** -0.5)
        x = x + attention.out_proj(out.transpose(0, 1).flatten(1))
        x = x + block.mlp(block.layer_norm2(x))
        blocks.append((q, k))
    k = blocks[-2][1]
    found = Tower(features[prefix:], features[0] if prefix else None, k, k[:, prefix:], blocks)
    found.attention = found.looks(-2)
    return found


def project(model, features: Tensor) -> Tensor:
    p = model.model.multi_modal_projector
    return p.linear_2(F.gelu(p.linear_1(features)))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


@dataclass
class Rows:
    """A prompt as rows that enter the decoder.

    Attributes:
        embeds: `[n, hidden]`.
        visual: bool `[n]`.
        source: int64 `[n]`, index among the sample's visual tokens, -1 for text.
        alive: bool `[n]`, false where a pre-LLM stage dropped the row.
        position: int64 `[n]`.
        images: number of images.
    """

    embeds: Tensor
    visual: Tensor
    source: Tensor
    alive: Tensor
    position: Tensor
    images: int


@dataclass
class View:
    """What a method may look at before a layer, one sample alone; rows are those of `h`.

    Attributes:
        model, layer: where it is.
        h: `[n, width]`, what enters the layer.
        weights: `[heads, n, n]`, attention of the layer before; None before the first.
        visual, alive: bool `[n]`.
        position: int64 `[n]`.
        prompt: rows of the prompt.
        images: images of the sample.
        rows: the prompt.
        inputs: `[n, width]`, what entered each layer that has run.
    """

    model: object
    layer: int
    h: Tensor
    weights: Tensor | None
    visual: Tensor
    alive: Tensor
    position: Tensor
    prompt: int
    images: int
    rows: Rows
    inputs: list[Tensor]

    @property
    def arriving(self) -> list[int]:
        return (self.visual & self.alive).nonzero()[:, 0].tolist()

    @property
    def text(self) -> list[int]:
        """Text behind the first visual token."""
        first = int(self.visual.int().argmax())
        return [r for r in range(first, self.prompt) if not self.visual[r]]

    def logits(self) -> Tensor:
        """`[heads, n, n]`, scaled dot products of this layer; what is not seen is -inf."""
        return weigh(self.model, self.layer, self.h, self.alive, self.position)[2]

    def look(self, rope: bool = True) -> Tensor:
        """`[heads, n, n]`, the attention that this layer would pay."""
        return weigh(self.model, self.layer, self.h, self.alive, self.position, rope)[0]


#: What stays of the rows that arrive, and the hidden states: what a method makes of its view.
Choose = Callable[[View], tuple[Sequence[int], Tensor]]


@dataclass
class Cut:
    """Rows leave before `layer`: `count(visual rows that arrive, images)` of them stay.

    They are those that the last row of the prompt attends to most, or `choose` says which.
    """

    layer: int
    keep: int | float = 1.0
    positions: str = "original"
    choose: Choose | None = None

    def count(self, arriving: int, images: int) -> int:
        if isinstance(self.keep, int):
            return min(arriving, self.keep * images)
        return max(1, round(self.keep * arriving))


@dataclass
class Dense:
    """What the dense loop saw.

    Attributes:
        logits: `[n, vocabulary]`, rows of the *rows* given, text after the prompt included.
        entering: per layer, int64 indices of the visual tokens that enter it.
        hidden: rows that are alive in the last layer, bool `[n]`.
    """

    logits: Tensor
    entering: list[Tensor]
    alive: Tensor
    weights: list[Tensor] = field(default_factory=list)


def weigh(
    model, layer: int, h: Tensor, alive: Tensor, position: Tensor, rope: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention `[heads, n, n]` of a decoder layer over `h`, values, and logits."""
    lm, n = model.model.language_model, len(h)
    cfg, a = lm.config, lm.layers[layer].self_attn
    allowed = torch.ones(n, n, dtype=torch.bool).tril()
    allowed &= alive[None] | torch.eye(n, dtype=torch.bool)
    cos, sin = lm.rotary_emb(h[None], position_ids=position[None])
    x = lm.layers[layer].input_layernorm(h)
    q = heads(a.q_proj(x), cfg.num_attention_heads)
    k = heads(a.k_proj(x), cfg.num_key_value_heads)
    if rope:
        q, k = rotate(q, cos[0], sin[0]), rotate(k, cos[0], sin[0])
    v = heads(a.v_proj(x), cfg.num_key_value_heads)
    group = cfg.num_attention_heads // cfg.num_key_value_heads
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    logits = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~allowed, -torch.inf)
    return logits.softmax(-1), v, logits


def dense(model, rows: Rows, more: Tensor | None = None, cuts: Sequence[Cut] = ()) -> Dense:
    """The decoder over prompt rows and further tokens, in one pass without a cache.

    Args:
        model: never patched.
        rows: the prompt.
        more: int64 `[m]`, tokens after the prompt; all of them stay.
        cuts: drops inside the decoder, decided by the last row of the prompt.
    """
    lm = model.model.language_model
    prompt = rows.embeds.shape[0]
    h, visual, alive, position = rows.embeds, rows.visual, rows.alive, rows.position
    if more is not None and len(more):
        h = torch.cat([h, lm.embed_tokens(more)])
        new = torch.ones(len(more), dtype=torch.bool)
        visual, alive = torch.cat([visual, ~new]), torch.cat([alive, new])
        position = torch.cat([position, rows.position[-1] + 1 + torch.arange(len(more))])
    alive = alive.clone()
    entering, all_weights, inputs = [], [], []
    weights = None
    for i, layer in enumerate(lm.layers):
        for cut in cuts:
            if cut.layer != i:
                continue
            arriving = (visual & alive).nonzero()[:, 0].tolist()
            if arriving and cut.choose:
                view = View(model, i, h, weights, visual, alive, position, prompt,
                            rows.images, rows, inputs)  # fmt: skip
                stay, h = cut.choose(view)
                for r in set(arriving) - set(stay):
                    alive[r] = False
            elif arriving:
                score = weights[:, prompt - 1].mean(0)
                ranked = sorted(arriving, key=lambda r: -score[r].item())
                for r in ranked[cut.count(len(arriving), rows.images) :]:
                    alive[r] = False
            if cut.positions == "compact":
                position = alive.long().cumsum(0) - 1
        inputs.append(h)
        entering.append(rows.source[(visual & alive)[:prompt]])
        weights, v, _ = weigh(model, i, h, alive, position)
        a, out = layer.self_attn, weights @ v
        all_weights.append(weights)
        h = h + a.o_proj(out.transpose(0, 1).flatten(1))
        h = h + layer.mlp(layer.post_attention_layernorm(h))
    return Dense(model.lm_head(lm.norm(h)), entering, alive, all_weights)


# --------------------------------------------------------------------------------------------
# What enters the decoder


def budget(keep: int | float, tokens: int) -> int:
    return min(tokens, keep) if isinstance(keep, int) else max(1, round(keep * tokens))


def plain(model, sample: Sample) -> Rows:
    """The unpatched prompt."""
    embeds = model.model.language_model.embed_tokens(sample.ids)
    if len(sample.pixels):
        features = [project(model, tower(model, p).patches) for p in sample.pixels]
        embeds = embeds.masked_scatter(sample.visual[:, None], torch.cat(features))
    n = len(sample.ids)
    source = torch.where(sample.visual, sample.visual.long().cumsum(0) - 1, -1)
    return Rows(
        embeds,
        sample.visual,
        source,
        torch.ones(n, dtype=torch.bool),
        torch.arange(n),
        len(sample.pixels),
    )


def dropped(model, sample: Sample, kept: Tensor, positions: str) -> Rows:
    """The prompt with visual tokens masked out, except those in `kept`."""
    rows = plain(model, sample)
    rows.alive = ~sample.visual | torch.isin(rows.source, kept)
    if positions == "compact":
        rows.position = rows.alive.long().cumsum(0) - 1
    return rows


@dataclass
class Block:
    """What stands for one image: features in sequence order and the token whose seat each has.

    `into[t]` is the token that token t went into, itself where it stays, -1 where it is gone.
    """

    features: Tensor
    seat: list[int]
    into: list[int]


def rebuilt(model, sample: Sample, blocks: Sequence[Block], positions: str) -> Rows:
    """The prompt written anew with `blocks` instead of the images: nothing is masked."""
    n = sample.n_visual // max(1, len(blocks))
    embeds, source, position = [], [], []
    words = model.model.language_model.embed_tokens(sample.ids)
    seen = 0
    starts = {}
    for r in range(len(sample.ids)):
        if not sample.visual[r]:
            embeds.append(words[r])
            source.append(-1)
            position.append(r)
            continue
        image, cell = divmod(seen, n)
        seen += 1
        starts.setdefault(image, r)
        if cell:
            continue
        block = blocks[image]
        for vector, seat in zip(block.features, block.seat, strict=True):
            embeds.append(vector)
            source.append(image * n + seat)
            position.append(starts[image] + seat)
    length = len(embeds)
    source = torch.tensor(source)
    where = torch.arange(length) if positions == "compact" else torch.tensor(position)
    return Rows(
        torch.stack(embeds),
        source >= 0,
        source,
        torch.ones(length, dtype=torch.bool),
        where,
        len(blocks),
    )


# --------------------------------------------------------------------------------------------
# The methods, from their descriptions


def divprune(features: Tensor, keep: int) -> list[int]:
    """Greedy max-min diversity under the cosine distance, over projected tokens."""
    x = [f / f.norm() for f in features.double()]
    n = len(x)

    def distance(i: int, j: int) -> float:
        return 1 - (x[i] @ x[j]).item()

    isolation = [min(distance(i, j) for j in range(n) if j != i) for i in range(n)]
    chosen = [max(range(n), key=lambda i: isolation[i])]
    while len(chosen) < keep:
        left = [i for i in range(n) if i not in chosen]
        chosen.append(max(left, key=lambda i: min(distance(i, j) for j in chosen)))
    return sorted(chosen)


def cdpruner(features: Tensor, words: Tensor, keep: int) -> list[int]:
    """Greedy MAP of a DPP by determinants; q is the mean cosine with the question's words."""
    x = [f / f.norm() for f in features.double()]
    words = [w / w.norm() for w in words.double()]
    q = [sum((f @ w).item() for w in words) / len(words) for f in x]
    q = [(s - min(q) + 1e-6) / (max(q) - min(q)) for s in q]
    kernel = torch.stack(
        [torch.stack([q[i] * (a @ b) * q[j] for j, b in enumerate(x)]) for i, a in enumerate(x)]
    )
    chosen: list[int] = []
    while len(chosen) < keep:
        sets = [[*chosen, i] for i in range(len(x)) if i not in chosen]
        chosen = max(sets, key=lambda s: torch.linalg.det(kernel[s][:, s]).item())
    return sorted(chosen)


def visionzip(
    model,
    pixels: Tensor,
    keep: int | float,
    *,
    dominant: float = 54 / 64,
    cls: bool = True,
    merge: str = "sum",
    positions: str = "compact",
) -> Block:
    """Dominant tokens by [CLS] attention summed over heads, the others added to targets.

    The sequence is [CLS], dominant tokens in grid order, contextual tokens; [CLS] has the seat
    of the first token that has gone. Under original positions the sequence is that of the seats.
    """
    t = tower(model, pixels)
    cls = cls and t.cls is not None
    n = len(t.patches)
    total = budget(keep, n)
    n_dominant = max(1, math.floor(dominant * total))
    n_context = total - n_dominant
    score = t.attention.sum(0).tolist()
    picked = sorted(sorted(range(n), key=lambda i: -score[i])[: n_dominant - cls])
    rest = [i for i in range(n) if i not in picked]
    step = max(1, len(rest) // max(1, n_context))
    targets = rest[::step][:n_context]
    members = [i for i in rest if i not in targets]
    keys = t.keys.mean(0)
    keys = keys / keys.norm(dim=1, keepdim=True)
    into = list(range(n))
    for i in members:
        into[i] = max(targets, key=lambda j: (keys[i] @ keys[j]).item()) if targets else -1
    contextual = []
    for j in targets:
        own = [t.patches[i] for i in members if into[i] == j]
        if own and merge == "sum":
            contextual.append(t.patches[j] + torch.stack(own).mean(0))
        elif own:
            contextual.append(torch.stack([t.patches[j], *own]).mean(0))
        else:
            contextual.append(t.patches[j])
    features = [t.patches[i] for i in picked] + contextual
    seats = picked + targets
    if cls:
        gone = [i for i in range(n) if i not in seats]
        features, seats = [t.cls, *features], [gone[0], *seats]
        into[gone[0]] = gone[0]
    if positions == "original":
        order = sorted(range(len(seats)), key=lambda i: seats[i])
        features, seats = [features[i] for i in order], [seats[i] for i in order]
    return Block(project(model, torch.stack(features)), seats, into)


def dart(keep: int, *, pivots: int = 4, text_pivots: int = 4) -> Choose:
    """Pivots by the L1 norm of their keys, then for each the rows least like it."""

    def choose(view: View) -> tuple[Sequence[int], Tensor]:
        lm, before = view.model.model.language_model, view.layer - 1
        keys = lm.layers[before].self_attn.k_proj(
            lm.layers[before].input_layernorm(view.inputs[before])
        )
        hidden, count = lm.norm(view.h), min(len(view.arriving), keep * view.images)
        loud = {r: keys[r].abs().sum().item() for r in [*view.arriving, *view.text]}
        own = sorted(view.arriving, key=lambda r: -loud[r])[: min(pivots, count)]
        other = sorted(view.text, key=lambda r: -loud[r])[:text_pivots]
        share, rest = divmod(count - len(own), len(own) + len(other))
        chosen = list(own)
        for number, pivot in enumerate([*own, *other]):
            left = [r for r in view.arriving if r not in chosen]
            like = {r: F.cosine_similarity(hidden[r], hidden[pivot], 0) for r in left}
            chosen += sorted(left, key=lambda r: like[r].item())[: share + (number < rest)]
        return sorted(chosen), view.h

    return choose


def strips(tokens: int, crops: int) -> list[range]:
    """Neighbouring tokens in equal parts, the first of them one longer."""
    sizes = [tokens // crops + (c < tokens % crops) for c in range(crops)]
    return [range(sum(sizes[:c]), sum(sizes[: c + 1])) for c in range(crops)]


def holov(
    x: Tensor, attention: Tensor, keep: int, crops: int, beta: float = 0.09, tau: float = 1.0,
    among: Sequence[int] | None = None,
) -> list[int]:
    """Quotas of strips by mean score, in each the best attended."""
    among = set(range(len(x))) if among is None else set(among)
    parts = [[t for t in part if t in among] for part in strips(len(x), crops)]
    variety = {}
    for part in parts:
        for i in part:
            row = [0.0 if i == j else F.cosine_similarity(x[i], x[j], 0).item() for j in part]
            others = max(1, len(part) - 1)
            mean = sum(row) / others
            variety[i] = sum((s - mean) ** 2 for s in row) / others
    a = {i: attention[i].item() for i in among}
    gamma = sum(a.values()) / max(sum(variety.values()), 1e-12)
    score = {i: a[i] + beta * gamma * variety[i] for i in among}
    weight = [(sum(score[i] for i in p) / max(1, len(p))) ** tau for p in parts]
    keep = min(keep, len(among))
    quota = [min(len(p), math.floor(w / sum(weight) * keep))
             for p, w in zip(parts, weight, strict=True)]  # fmt: skip
    order = sorted(range(crops), key=lambda c: -weight[c])
    while sum(quota) < keep:
        for c in order:
            if quota[c] < len(parts[c]) and sum(quota) < keep:
                quota[c] += 1
    return sorted(t for part, n in zip(parts, quota, strict=True)
                  for t in sorted(part, key=lambda t: -a[t])[:n])  # fmt: skip


def holov_alone(model, pixels: Tensor, keep: int, crops: int) -> list[int]:
    seen = tower(model, pixels)
    return holov(seen.patches, seen.attention.mean(0), keep, crops)


def vmtc(
    x: Tensor, importance: Tensor, keep: int, primary: float = 0.75, rounds: int = 10
) -> tuple[Tensor, list[int]]:
    """Primary tokens and clusters of the others: (features, the token that each goes into)."""
    n, first = len(x), math.ceil(primary * keep)
    ranked = sorted(range(n), key=lambda i: -importance[i].item())
    chosen, clusters = ranked[:first], keep - first
    rest = [i for i in range(n) if i not in chosen]
    unit = [v / v.norm() for v in x.double()]
    means = [unit[rest[c * len(rest) // clusters]] for c in range(clusters)]

    def nearest(i: int) -> int:
        return max(range(clusters), key=lambda c: (unit[i] @ means[c]).item())

    for _ in range(rounds if clusters else 0):
        members = [[i for i in rest if nearest(i) == c] for c in range(clusters)]
        new = [sum(unit[i] for i in own) if own else means[c] for c, own in enumerate(members)]
        means = [v / v.norm() for v in new]
    into = {i: i for i in chosen}
    groups = [[i for i in rest if nearest(i) == c] for c in range(clusters)] if clusters else []
    for own in groups:
        into |= {i: min(own, key=ranked.index) for i in own}
    left = [i for i in ranked if i in rest and into.get(i) != i]
    for i in left[: sum(not own for own in groups)]:
        into[i] = i
    features = x.clone()
    for seat in rest if clusters else []:
        own = [i for i in rest if into[i] == seat]
        if own:
            weight = sum(importance[i] for i in own)
            features[seat] = sum(importance[i] * x[i] for i in own) / weight
    return features, [into.get(i, -1) for i in range(n)]


def vmtc_block(model, pixels: Tensor, keep: int, **options) -> Block:
    seen = tower(model, pixels)
    features, into = vmtc(seen.patches, seen.attention.mean(0), keep, **options)
    seats = [i for i, to in enumerate(into) if to == i]
    return Block(project(model, features[seats]), seats, into)


def grid_for(keep: int | float, side: int) -> tuple[int, int]:
    """The grid closest to a square with at most `keep` cells."""
    cells = budget(keep, side * side)
    rows = max(1, math.isqrt(cells))
    return rows, min(side, cells // rows)


def cells(side: int, small: tuple[int, int]) -> list[list[int]]:
    """For each cell of the `small` grid the tokens of the `side` x `side` grid in it."""
    rows, columns = (
        [range(i * side // n, math.ceil((i + 1) * side / n)) for i in range(n)] for n in small
    )
    return [[r * side + c for r in row for c in column] for row in rows for column in columns]


def avgpool(model, pixels: Tensor, small: tuple[int, int], seats: list[int]) -> Block:
    """Adaptive average pooling of the projected tokens; `seats` as the engine reports them."""
    features = project(model, tower(model, pixels).patches)
    side = math.isqrt(len(features))
    pooled = torch.stack([features[c].mean(0) for c in cells(side, small)])
    return Block(pooled, seats, [])


def ggem(model, pixels: Tensor, small: tuple[int, int], seats: list[int]) -> Block:
    """Means of powers 1, 2 and 3, of a third of the channels each; the sign stays outside."""
    features = project(model, tower(model, pixels).patches)
    side, third = math.isqrt(len(features)), features.shape[1] // 3
    pooled = []
    for c in cells(side, small):
        parts = []
        for p in (1, 2, 3):
            x = features[c, (p - 1) * third : p * third]
            mean = (x.sign() * x.abs() ** p).mean(0)
            parts.append(mean.sign() * mean.abs() ** (1 / p))
        pooled.append(torch.cat(parts))
    return Block(torch.stack(pooled), seats, [])


def pyramid(model, pixels: Tensor, levels: list[tuple[int, int]], order: list[int]) -> Block:
    """Averages over the cells of several grids, one level after the other.

    Args:
        order: in the sequence, ordinals among all cells.
    """
    features = project(model, tower(model, pixels).patches)
    side = math.isqrt(len(features))
    pooled = [features[c].mean(0) for level in levels for c in cells(side, level)]
    return Block(torch.stack([pooled[i] for i in order]), [], [])


def downsample(model, pixels: Tensor, small: tuple[int, int], seats: list[int]) -> Block:
    """The picture itself made smaller, then the tower with interpolated positions."""
    patch = model.config.vision_config.patch_size
    size = (small[0] * patch, small[1] * patch)
    picture = F.interpolate(pixels[None], size=size, mode="bilinear", antialias=True)[0]
    return Block(project(model, tower(model, picture).patches), seats, [])


def next_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy choice and the margin between the two best, per row."""
    best = logits.topk(2, -1)
    return best.indices[..., 0], best.values[..., 0] - best.values[..., 1]
