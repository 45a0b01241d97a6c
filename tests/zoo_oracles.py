"""Published methods, written slowly and plainly: what the registered ones must equal.

Loops over tokens, one sample and one picture at a time; nothing is shared with `mllm`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from oracles import Block, Choose, View, budget, heads, project, rotate, tower, weigh
from torch import Tensor


def best(score: dict[int, float], count: int) -> list[int]:
    """The `count` highest of a score by token; of equal ones the earlier."""
    return sorted(sorted(score, key=lambda i: (-score[i], i))[:count])


def share(keep: int | float, entered: int, images: int) -> int:
    """A budget of a schedule: tokens per image, or a fraction of what entered the decoder."""
    return min(entered, keep * images) if isinstance(keep, int) else budget(keep, entered)


def pyramiddrop(keep: int | float) -> Choose:
    """The attention that the layer about to run pays from the last prompt token."""

    def choose(view: View) -> tuple[Sequence[int], Tensor]:
        row = view.look()[:, view.prompt - 1].mean(0)
        entered = int((view.rows.visual & view.rows.alive).sum())
        score = {i: float(row[i]) for i in view.arriving}
        return best(score, share(keep, entered, view.images)), view.h

    return choose


def by_tile(score: dict[int, float], part: Sequence[int], count: int) -> list[int]:
    """The best of every tile, split as evenly as can be; what is left goes to the best others."""
    parts = max(part) + 1
    chosen = []
    for p in range(parts):
        own = {i: x for i, x in score.items() if part[i] == p}
        chosen += best(own, (p + 1) * count // parts - p * count // parts)
    rest = {i: x for i, x in score.items() if i not in chosen}
    return sorted(chosen + best(rest, min(count, len(score)) - len(chosen)))


def fastervlm(model, pixels: Tensor, keep: int | float) -> list[int]:
    """The patches that [CLS] attends to most, or that receive most."""
    score = tower(model, pixels).attention.mean(0).tolist()
    return best(dict(enumerate(score)), budget(keep, len(score)))


def quartile(values: list[float], at: float) -> float:
    values = sorted(values)
    place = at * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / a.norm() / b.norm())


def prumerge(
    x: Tensor,
    a: list[float],
    keys: Tensor,
    part: Sequence[int],
    keep: int | float | None,
    *,
    neighbours: int,
    plus: bool = False,
    merge: str = "sum",
) -> tuple[list[Tensor], list[int]]:
    """PruMerge of one picture: vectors in the order of the sequence, and the token of each."""
    n = len(x)
    for p in set(part):
        total = sum(a[i] for i in range(n) if part[i] == p)
        if total > 1:
            a = [v / total if part[i] == p else v for i, v in enumerate(a)]
    spare, fixed = 1, None
    if keep is not None:
        wanted = budget(keep, n)
        spare = 1 if 1 < wanted < n else 0
        fixed = wanted - spare
    whisker = quartile(a, 0.75) + 1.5 * (quartile(a, 0.75) - quartile(a, 0.25))
    count = max(1, sum(v > whisker for v in a)) if fixed is None else fixed
    if plus and fixed is not None:
        count = max(1, round(0.25 * fixed))
    kept = sorted(range(n), key=lambda i: (-a[i], i))[:count]
    rest = [i for i in range(n) if i not in kept]
    if plus and fixed is None:
        step = max(1, int(int(n / count) / 3))
        kept += [i for i in range(0, n - 1, step) if i not in kept]
    elif plus:
        more = fixed - count
        kept += [rest[(k * len(rest) + len(rest) // 2) // more] for k in range(more)]
    gone = [i for i in range(n) if i not in kept]

    def weighted(of: list[int], base: Tensor | None, own: float) -> Tensor:
        total = sum((a[j] * x[j] for j in of), torch.zeros_like(x[0]))
        if merge == "mean":
            total = total if base is None else total + own * base
            return total / (sum(a[j] for j in of) + own)
        return total if base is None else base + total

    out = []
    for i in kept:
        others = [j for j in range(n) if j != i and part[j] == part[i]]
        near = sorted(others, key=lambda j: (-cosine(keys[i], keys[j]), j))[:neighbours]
        out.append(weighted(near, x[i], a[i]))
    if spare and gone:
        out.append(weighted(gone, None, 0.0))
        kept = kept + [gone[0]]
    return out, kept


def prumerge_block(model, pixels: Tensor, keep: int | float | None, **options) -> Block:
    """PruMerge on a CLIP or SigLIP tower: it reads the last block over its full width."""
    t = tower(model, pixels)
    a = t.looks(-1, joint=True)[0].tolist()
    keys = t.blocks[-1][1][:, -len(t.patches) :].transpose(0, 1).flatten(1)
    out, kept = prumerge(t.patches, a, keys, [0] * len(a), keep, **options)
    into = [i if i in kept else kept[-1] for i in range(len(a))]
    return Block(project(model, torch.stack(out)), kept, into)


def raters(embeds: Tensor, visual: Sequence[int], text: Sequence[int]) -> list[int]:
    """Text rows that resemble the picture more than text does on average."""
    rate = {t: 0.0 for t in text}
    for v in visual:
        like = torch.stack([embeds[v] @ embeds[t] for t in text]).softmax(0)
        for t, x in zip(text, like.tolist(), strict=True):
            rate[t] += x / len(visual)
    mean = sum(rate.values()) / max(1, len(rate))
    return [t for t in text if rate[t] > mean] or list(text)


def density_peaks(x: list[Tensor], count: int) -> list[int]:
    """The centre of each vector: DPC-kNN as its description has it."""
    n, width = len(x), len(x[0])
    apart = [[float((a - b).double().norm()) / width**0.5 for b in x] for a in x]
    spread = [sum(d * d for d in sorted(row)[:count]) / min(count, n) for row in apart]
    order = sorted(range(n), key=lambda i: (spread[i], i))  # the densest first
    gap = [0.0] * n
    for place, i in enumerate(order):
        gap[i] = min((apart[i][j] for j in order[:place]), default=max(map(max, apart)))
    peak = {i: math.exp(-spread[i]) * gap[i] for i in range(n)}
    centres = best(peak, count)
    return [i if i in centres else min(centres, key=lambda c: (apart[i][c], c)) for i in range(n)]


def sparsevlm(
    weights: Tensor,
    h: Tensor,
    rows: Sequence[int],
    rating: Sequence[int],
    keep: int,
    *,
    recycle: float,
    per_cluster: int,
    heads: float = 1.0,
    ones: Tensor | None = None,
) -> tuple[list[int], dict[int, Tensor], dict[int, int]]:
    """One cut of SparseVLM: rows that stay, new vectors by row, where recycled rows went.

    Args:
        weights: `[heads, n, n]`, attention of the layer that has run.
        h: `[n, width]`, what it gave.
        rows: visual rows.
        rating: raters.
        keep: tokens that stay.
        recycle, per_cluster, heads: options.
        ones: `[n, dim]`, queries and keys of ones, rotated.
    """
    mass = {}
    for head, own in enumerate(weights):
        pulled = own.clone()
        if ones is not None:
            for q in rating:
                for k in rows:
                    pulled[q, k] /= max(0.01, float(ones[q] @ ones[k]) / ones.shape[1])
        mass[head] = {k: sum(float(pulled[q, k]) for q in rating) for k in rows}
    count = max(1, round(heads * len(mass)))
    used = best({head: sum(of.values()) for head, of in mass.items()}, count)
    score = {k: sum(mass[head][k] for head in used) for k in rows}
    stay = best(score, keep)
    gone = [r for r in rows if r not in stay]
    if not gone or not recycle:
        return stay, {}, {}
    again = best({r: score[r] for r in gone}, int(recycle * len(gone)) + 1)
    centre = density_peaks([h[r] for r in again], int(len(again) / per_cluster) + 1)
    into = {r: again[c] for r, c in zip(again, centre, strict=True)}
    means = {
        c: torch.stack([h[r] for r in again if into[r] == c]).mean(0) for c in set(into.values())
    }
    return sorted(stay + list(means)), means, into


def sparsevlm_cut(keep: int | float, gravity: bool = False, **options) -> Choose:
    def choose(view: View) -> tuple[Sequence[int], Tensor]:
        rows, ones = view.rows, None
        visual = (rows.visual & rows.alive).nonzero()[:, 0].tolist()
        rating = raters(rows.embeds, visual, view.text)
        if gravity:
            lm = view.model.model.language_model
            cos, sin = lm.rotary_emb(view.h[None], position_ids=view.position[None])
            ones = rotate(torch.ones_like(cos[0]), cos[0], sin[0])
        count = min(len(view.arriving), share(keep, len(visual), view.images))
        stay, means, _ = sparsevlm(
            view.weights, view.h, view.arriving, rating, count, ones=ones, **options
        )
        h = torch.stack([means.get(i, x) for i, x in enumerate(view.h)])
        return stay, h

    return choose


def vscan(
    x: Tensor,
    local: list[float],
    deep: list[float],
    part: Sequence[int],
    place: Sequence[tuple[int, int]],
    sizes: Sequence[tuple[int, int]],
    keep: int,
    window: int,
) -> tuple[list[int], dict[int, Tensor], list[int]]:
    """VScan's first stage on one picture: tokens that stay, their means, where each token goes.

    Args:
        place: row and column of each token in its grid.
        sizes: rows and columns of the grid of each token.
    """
    n = len(x)

    def cell(i: int) -> tuple:
        at = [min(p // window, max(1, s // window) - 1)
              for p, s in zip(place[i], sizes[i], strict=True)]  # fmt: skip
        return (part[i], *at)

    windows, parts = sorted({cell(i) for i in range(n)}), max(part) + 1
    kept: list[int] = []
    for own in windows:
        inside = {i: local[i] for i in range(n) if cell(i) == own}
        p, alike = own[0], sum(other[0] == own[0] for other in windows)
        quota = (p + 1) * keep // parts - p * keep // parts
        kept += best(inside, quota // 2 // alike)
    for p in range(parts):
        quota = (p + 1) * keep // parts - p * keep // parts
        quota -= sum(part[i] == p for i in kept)
        kept += best({i: deep[i] for i in range(n) if part[i] == p and i not in kept}, quota)
    kept += best({i: deep[i] for i in range(n) if i not in kept}, keep - len(kept))
    into = []
    for i in range(n):
        near = [j for j in sorted(kept) if part[j] == part[i]] or sorted(kept)
        into.append(i if i in kept else max(near, key=lambda j: (cosine(x[i], x[j]), -j)))
    means = {j: torch.stack([x[i] for i in range(n) if into[i] == j]).mean(0) for j in kept}
    return sorted(kept), means, into


def vscan_block(model, pixels: Tensor, keep: int, window: int) -> Block:
    t = tower(model, pixels)
    x, n = project(model, t.patches), len(t.patches)
    side = math.isqrt(n)
    kept, means, into = vscan(
        x, t.looks(0).mean(0).tolist(), t.attention.mean(0).tolist(), [0] * n,
        [(i // side, i % side) for i in range(n)], [(side, side)] * n, keep, window,
    )  # fmt: skip
    return Block(torch.stack([means[j] for j in kept]), kept, into)


def hired(
    early: list[float],
    score: list[float],
    part: Sequence[int],
    tiles: tuple[int, int],
    keep: int,
    alpha: float = 0.5,
) -> list[int]:
    """HiRED on one picture whose base view is square and comes first."""
    everything = dict(enumerate(score))
    if max(part) == 0:
        return best(everything, keep)
    base = [i for i in everything if part[i] == 0]
    side = math.isqrt(len(base))
    full = min(int(alpha * keep), len(base))
    kept = best({i: score[i] for i in base}, full)
    marks: dict[int, int] = {}
    for i in best({i: early[i] for i in base}, int(len(base) * (1 - alpha))):
        tile = 1 + (i // side * tiles[0] // side) * tiles[1] + i % side * tiles[1] // side
        marks[tile] = marks.get(tile, 0) + 1
    for tile, count in marks.items():
        own = {i: x for i, x in everything.items() if part[i] == tile}
        kept += best(own, int(count * (keep - full) // sum(marks.values())))
    kept += best({i: score[i] for i in everything if i not in kept and part[i]}, keep - len(kept))
    kept += best({i: score[i] for i in base if i not in kept}, keep - len(kept))
    return sorted(kept)


def hired_alone(model, pixels: Tensor, keep: int) -> list[int]:
    """HiRED on a picture without tiles."""
    score = tower(model, pixels).attention.sum(0).tolist()
    return best(dict(enumerate(score)), keep)


def vispruner(
    score: list[float], x: Tensor, part: Sequence[int], keep: int, step: int
) -> list[int]:
    """VisPruner on one picture: half by attention, the others by rounds that drop repetitions."""
    everything, first = dict(enumerate(score)), int(0.5 * keep)
    kept = by_tile(everything, part, first)
    rest = sorted((i for i in everything if i not in kept), key=lambda i: (-score[i], i))
    while len(rest) > keep - first:
        even, odd = rest[0::2], rest[1::2]
        like = {a: max(cosine(x[a], x[b]) for b in odd) for a in even}
        rising = sorted(even, key=lambda a: like[a])
        for _ in range(min(step * (max(part) + 1), len(rest) - (keep - first))):
            if rising:
                rising.pop()
        rest = rising + odd
    return sorted(kept + rest)


def vispruner_alone(model, pixels: Tensor, keep: int) -> list[int]:
    t = tower(model, pixels)
    score = t.attention.mean(0).tolist()
    return vispruner(score, t.patches, [0] * len(score), keep, 3)


def withdrawn(view: View) -> tuple[Sequence[int], Tensor]:
    """VTW: nothing stays."""
    return [], view.h


def feather(keep: int | float, stride: int | None) -> Choose:
    """Attention of the layer that has run, without rotary positions; at first a coarse grid."""

    def choose(view: View) -> tuple[Sequence[int], Tensor]:
        before = View(**{**vars(view), "layer": view.layer - 1, "h": view.inputs[-1]})
        row = before.look(rope=False)[:, view.prompt - 1].mean(0)
        side = math.isqrt(sum(view.rows.source >= 0) // view.images)
        score = {}
        for i in view.arriving:
            r, c = divmod(int(view.rows.source[i]) % side**2, side)
            coarse = stride and r % stride == c % stride == stride // 2
            score[i] = float(row[i]) + (10 if coarse else 0)
        return best(score, share(keep, int((view.rows.source >= 0).sum()), view.images)), view.h

    return choose


def farthest(
    apart: Callable[[int, int], float], among: Sequence[int], count: int, chosen: Sequence[int] = ()
) -> list[int]:
    """Farthest first: the nearest chosen one is as far as can be; in the order of the picks."""
    picked = list(chosen)
    while len(picked) < min(count, len(among)):
        far = {}
        for i in among:
            others = picked or [j for j in among if j != i]
            far[i] = min((apart(i, j) for j in others), default=0.0)
        picked.append(min((i for i in among if i not in picked), key=lambda i: (-far[i], i)))
    return picked


def btp(
    rows: Sequence[int],
    score: dict[int, float],
    hidden: Tensor,
    place: dict[int, tuple],
    keep: int,
    *,
    spatial: float,
    attention: float,
    diversity: float,
    over: float,
) -> list[int]:
    """One cut of BTP: rows that stay.

    Args:
        score: raw logits of the last prompt token.
        place: picture, row and column of each row.
    """

    def steps(a: int, b: int) -> float:
        far = abs(place[a][-2] - place[b][-2]) + abs(place[a][-1] - place[b][-1])
        return far if place[a][:-2] == place[b][:-2] else 1e6

    def differ(a: int, b: int) -> float:
        return 1 - cosine(hidden[a], hidden[b])

    part = int(attention * keep)
    ranked = sorted(rows, key=lambda r: (-score[r], r))
    looked = ranked[: int(over * part)]
    early = [r for r in looked if rows.index(r) < keep][:part]
    attended = early + [r for r in ranked if r not in early][: part - len(early)]
    chosen = set(attended)

    def join(more: list[int]) -> None:
        new = sorted((r for r in more if r not in chosen), key=lambda r: (-score[r], r))
        chosen.update(new[: max(0, keep - len(chosen))])

    if int(spatial * keep):
        join(farthest(steps, rows, int(spatial * keep), rows[:1]))
    join(farthest(differ, rows, int(diversity * keep)))
    return sorted(farthest(differ, rows, keep, sorted(chosen)))


def btp_cut(keep: int | float, **shares: float) -> Choose:
    def choose(view: View) -> tuple[Sequence[int], Tensor]:
        entered = int((view.rows.source >= 0).sum())
        side = math.isqrt(entered // max(1, view.images))
        before = View(**{**vars(view), "layer": view.layer - 1, "h": view.inputs[-1]})
        row = before.logits()[:, view.prompt - 1].mean(0)
        score = {r: float(row[r]) for r in view.arriving}
        place = {}
        for r in view.arriving:
            picture, at = divmod(int(view.rows.source[r]), side * side)
            place[r] = (picture, *divmod(at, side))
        count = min(len(view.arriving), share(keep, entered, view.images))
        return btp(view.arriving, score, view.h, place, count, **shares), view.h

    return choose


def fitprune(
    weights: Tensor, rows: Sequence[int], text: Sequence[int], keep: int
) -> list[int]:
    """One cut of FitPrune: self-attention times cross-attention, the maximum over heads."""
    score = {}
    for k in rows:
        own = sum(max(float(head[q, k]) for head in weights) for q in rows)
        cross = sum(max(float(head[q, k]) for head in weights) for q in text)
        score[k] = own * cross
    return best(score, keep)


def fitprune_cut(keep: int | float) -> Choose:
    def choose(view: View) -> tuple[Sequence[int], Tensor]:
        entered = int((view.rows.source >= 0).sum())
        count = min(len(view.arriving), share(keep, entered, view.images))
        return fitprune(view.weights, view.arriving, view.text, count), view.h

    return choose


def fitted(masses: Sequence[Tensor], alpha: float) -> list[float]:
    """FitPrune's counts for a share of attention that may go, as mean fractions, layer by layer."""
    left = [0.0] * len(masses[0])
    for sample in masses:
        there = list(range(sample.shape[2]))
        for layer, pair in enumerate(sample):
            least = []
            for mass in pair.double().tolist():
                held, own = 0.0, []
                for t in sorted(there, key=lambda t: (mass[t], t)):
                    held += mass[t]
                    if held > alpha * sum(mass):
                        break
                    own.append(t)
                least.append(own)
            there = [t for t in there if t not in least[0] or t not in least[1]]
            left[layer] += len(there) / sample.shape[2] / len(masses)
    return left


def topv(
    visual: Tensor, place: dict[str, Tensor], source: Tensor, target: Tensor, *, alpha: float = 1,
    beta: float = 1, gamma: float = 0.01, sigma: float = 10, epsilon: float = 0.1,
    iterations: int = 3, features: str = "unit",
) -> dict[int, float]:
    """The scores of one sample's visual rows by a plain transport, in double precision."""
    rows = [r for r in range(len(visual)) if visual[r]]
    at = {r: (float(place["row"][r]), float(place["col"][r])) for r in rows}
    image = {r: int(place["image"][r]) for r in rows}
    pairs = [(i, j) for i in rows for j in rows if image[i] == image[j]]
    middle = {}
    for m in set(image.values()):
        own = [at[r] for r in rows if image[r] == m]
        middle[m] = tuple(max(p[axis] for p in own) / 2 for axis in (0, 1))
    source, target = source.double(), target.double()
    if features == "unit":
        source, target = ([x / x.norm() for x in side] for side in (source, target))
    terms = [
        {(i, j): float((source[i] - target[j]).square().sum()) for i, j in pairs},
        {(i, j): 1 - math.exp(-math.dist(at[i], at[j]) ** 2 / (2 * sigma**2))
         for i, j in pairs},
        {(i, j): math.dist(at[i], middle[image[i]]) for i, j in pairs},
    ]  # fmt: skip
    cost = dict.fromkeys(pairs, 0.0)
    for weight, term in zip((alpha, beta, gamma), terms, strict=True):
        low, high = min(term.values()), max(term.values())
        for pair in pairs:
            cost[pair] += weight * (term[pair] - low) / (high - low)
    kernel = {pair: math.exp(-c / epsilon) for pair, c in cost.items()}
    mass = {i: 1 / sum(image[j] == image[i] for j in rows) for i in rows}
    u, v = dict.fromkeys(rows, 1.0), dict.fromkeys(rows, 1.0)
    for _ in range(iterations):
        u = {i: mass[i] / sum(kernel[i, j] * v[j] for j in rows if (i, j) in kernel) for i in rows}
        v = {j: mass[j] / sum(kernel[i, j] * u[i] for i in rows if (i, j) in kernel) for j in rows}
    return {i: u[i] * sum(kernel[i, j] * v[j] for j in rows if (i, j) in kernel) / mass[i] - 1
            for i in rows}  # fmt: skip


def topv_kept(score: dict[int, float], count: int) -> list[int]:
    """The best, and of the others a fifth of the budget at equal distances."""
    recovered = round(0.2 * count)
    kept = best(score, count - recovered)
    others = [i for i in sorted(score) if i not in kept]
    kept += [r for i, r in enumerate(others)
             if (i + 1) * recovered // len(others) > i * recovered // len(others)]  # fmt: skip
    return sorted(kept)


def topv_cut(keep: int) -> Choose:
    """Between what enters the layer before and what its MLP reads."""

    def choose(view: View) -> tuple[Sequence[int], Tensor]:
        before, source = view.layer - 1, view.rows.source
        layer, x = view.model.model.language_model.layers[before], view.inputs[before]
        weights, value, *_ = weigh(view.model, before, x, view.alive, view.position)
        out = layer.self_attn.o_proj((weights @ value).transpose(0, 1).flatten(1))
        target = layer.post_attention_layernorm(x + out)
        cells = int(view.rows.visual.sum()) // view.images
        side = math.isqrt(cells)
        place = {"image": source // cells, "row": source % cells // side,
                 "col": source % cells % side}  # fmt: skip
        score = topv(view.visual & view.alive, place, x, target)
        return topv_kept(score, min(len(score), keep * view.images)), view.h

    return choose


def pact(
    rows: list[int], queries: Tensor, plain: Tensor, keys: Tensor, hidden: Tensor, keep: int,
    distance: float, retrieve: float = 1.5, asked: list[int] | None = None, each: bool = False,
) -> dict[int, int]:
    """Of one sample, the row that each visual row goes into (-1: gone), by the description.

    Args:
        rows: visual rows.
        asked: rows that ask and are asked for; None is all up to the last visual one, without
            padding.
        each: every query asks, not the mean of them.
        queries, plain, keys: `[heads, n, dim]`; queries and plain keys are not rotated.
        hidden: `[n, width]`.
        keep: candidates.
    """
    group = len(queries) // len(plain)
    asked = list(range(max(rows) + 1)) if asked is None else asked
    weight = dict.fromkeys(asked, 0.0)
    for h in range(len(queries)):
        asking = [queries[h, i] for i in asked]
        asking = asking if each else [sum(asking) / len(asking)]
        for q in asking:
            logits = {j: float(q @ plain[h // group, j]) / math.sqrt(len(q)) for j in asked}
            high = max(logits.values())
            total = sum(math.exp(x - high) for x in logits.values())
            for j in asked:
                weight[j] += math.exp(logits[j] - high) / total / len(queries) / len(asking)
    score = {j: weight[j] * float(hidden[j].norm()) for j in rows}
    left = sorted(sorted(rows, key=lambda j: -score[j])[:keep])
    flat = {j: keys[:, j].flatten().double() for j in rows}

    def apart(i, j):
        return max(0.0, 1 - torch.cosine_similarity(flat[i], flat[j], 0).item())

    density = {i: sum(math.exp(-((apart(i, j) / 2) ** 2)) for j in left) for i in left}
    centres = []
    for i in sorted(left, key=lambda i: -density[i]):
        if all(apart(i, c) > distance for c in centres):
            centres.append(i)
    into = {}
    for j in rows:
        nearest = min(sorted(centres), key=lambda c: apart(j, c))
        near = j in left or apart(j, nearest) <= retrieve * distance
        into[j] = j if j in centres else nearest if near else -1
    return into


def pact_cut(keep: float, distance: float) -> Choose:
    """Clusters as means, without their weight."""

    def choose(view: View) -> tuple[Sequence[int], Tensor]:
        lm, rows = view.model.model.language_model, view.arriving
        a, x = lm.layers[view.layer].self_attn, lm.layers[view.layer].input_layernorm(view.h)
        q = heads(a.q_proj(x), lm.config.num_attention_heads)
        k = heads(a.k_proj(x), lm.config.num_key_value_heads)
        cos, sin = lm.rotary_emb(x[None], position_ids=view.position[None])
        count, turned = budget(keep, len(rows)), rotate(k, cos[0], sin[0])
        into = pact(rows, q, k, turned, view.h, count, distance)
        h = view.h.clone()
        for c in (r for r in rows if into[r] == r):
            h[c] = view.h[[r for r in rows if into[r] == c]].mean(0)
        return [r for r in rows if into[r] == r], h

    return choose


def dualfilter(
    rows: Tensor, visual: Tensor, together: float, alone: float
) -> list[int]:
    """Visual rows that stay, of one sample: `rows` `[text, rows]`."""
    own = [j for j in range(len(visual)) if visual[j]]
    total = {j: sum(float(r[j]) for r in rows) for j in own}
    mass = sum(total.values())
    stay = [j for j in own
            if total[j] >= together * mass or max(float(r[j]) for r in rows) >= alone]  # fmt: skip
    return stay or [max(own, key=total.get)]


def dualfilter_cut(together: float, alone: float) -> Choose:
    """By what the layer before paid from the text behind the first picture."""

    def choose(view: View) -> tuple[Sequence[int], Tensor]:
        rows = view.weights.mean(0)[view.text]
        return dualfilter(rows, view.visual & view.alive, together, alone), view.h

    return choose


def alike(x: Tensor, grid: tuple[int, int], window: int) -> list[tuple[float, list[int]]]:
    """Mean cosine of each window's patches with each other, in loops; and its patches."""
    found = []
    for r in range(grid[0] // window):
        for c in range(grid[1] // window):
            own = [(r * window + i) * grid[1] + c * window + j
                   for i in range(window) for j in range(window)]  # fmt: skip
            pairs = [(a, b) for a in own for b in own if a != b]
            cos = [torch.cosine_similarity(x[a], x[b], 0).item() for a, b in pairs]
            found.append((sum(cos) / len(cos), own))
    return found


@dataclass
class MergedTower:
    """A merged tower on one picture, features in sequence order.

    Attributes:
        features: `[tokens, width]` of the last block but one.
        seats: patch in whose place each token is.
        into: seat of each patch.
        attention: `[tokens]` in the last block, mean over heads: of [CLS], or received.
    """

    features: Tensor
    seats: list[int]
    into: list[int]
    attention: Tensor


def windowmerge(
    net, pixels: Tensor, share: float, window: int, proportional: bool = False
) -> MergedTower:
    """The tower by hand: the windows that are most alike merge behind the first block."""
    vision = net.model.vision_tower
    vision = getattr(vision, "vision_model", vision)
    x = vision.embeddings(pixels[None])[0]
    prefix = int(hasattr(vision, "pre_layrnorm"))
    if prefix:
        x = vision.pre_layrnorm(x)
    side, size = math.isqrt(len(x) - prefix), torch.ones(len(x))
    seats = list(range(side**2))
    into, features = list(seats), None
    for i, block in enumerate(vision.encoder.layers):
        h, a = block.layer_norm1(x), block.self_attn
        number = net.config.vision_config.num_attention_heads
        q, k, v = (heads(p(h), number) for p in (a.q_proj, a.k_proj, a.v_proj))
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        weights = (logits + (size.log() if proportional else 0)).softmax(-1)
        if i == len(vision.encoder.layers) - 1:
            received = weights[:, 0] if prefix else weights.sum(1)
            return MergedTower(features[prefix:], seats, into, received.mean(0)[prefix:])
        x = x + a.out_proj((weights @ v).transpose(0, 1).flatten(1))
        x = x + block.mlp(block.layer_norm2(x))
        if i == 0:
            windows = alike(x[prefix:], (side, side), window)
            windows.sort(key=lambda w: -w[0])
            for _, own in windows[: round(share * len(windows))]:
                for t in own:
                    into[t] = own[-1]
            seats = sorted(set(into))
            groups = [[prefix + t for t in range(side**2) if into[t] == s] for s in seats]
            groups = [*([t] for t in range(prefix)), *groups]
            x = torch.stack([x[g].mean(0) for g in groups])
            size = torch.tensor([float(len(g)) for g in groups])
        features = x


def windowmerge_block(model, pixels: Tensor, keep: None, **options) -> Block:
    found = windowmerge(model, pixels, **options)
    return Block(project(model, found.features), found.seats, found.into)


def prefixes(x: Tensor, share: float, first: int, last: int) -> list[float]:
    """The fraction of tokens that each layer keeps under one threshold of importance (PrefixKV).

    A layer keeps its best tokens until their sum passes the threshold, beside its first and last
    ones; the threshold rises until all layers together hold the share.
    """
    depth, tokens = len(x), len(x[0])
    fixed = {t for t in range(tokens) if t < first or t >= tokens - last}
    before = []
    for own in x.tolist():
        below = 0.0
        for t in sorted(range(tokens), key=lambda t: -own[t]):
            if t not in fixed:
                before.append(below / sum(own))
            below += own[t]
    room = depth * (round(share * tokens) - len(fixed))
    threshold = sorted(before)[room - 1]
    kept = []
    for own in x.tolist():
        below, count = 0.0, len(fixed)
        for t in sorted(range(tokens), key=lambda t: -own[t]):
            count += t not in fixed and below / sum(own) <= threshold + 1e-6
            below += own[t]
        kept.append(count / tokens)
    return kept
