"""KV methods once more, as plain loops over one sample: what each head of each layer must keep."""

from __future__ import annotations

import math
import statistics
from typing import Any

from cache_oracles import Oracle


class Plain:
    """Decides for an :class:`Oracle` what the method of `stage` lets go; reads only its parameters.

    `queries` are the prompt's tokens that rate, `rank` gives every token of a head a number.
    """

    def __init__(self, stage: Any) -> None:
        self.stage, self.name = stage, stage.info.name

    def decide(self, o: Oracle) -> None:
        if not hasattr(o, "prompt"):
            o.scores, o.total, o.reading = {}, {}, True
        if o.reading:  # the prompt, or a chunk of it
            o.reading = o.chunks.pop(0) if hasattr(o, "chunks") else False
            o.prompt = o.tokens = o.length
            if self.stage.tokens == "visual":
                o.tokens = sum(bool(v) for v in o.visual[: o.length])
            share = self.stage.budget
            if getattr(self.stage, "ratios", None):
                share = sum(self.stage.ratios) / len(self.stage.ratios)
            o.limit = share if isinstance(share, int) else max(1, round(share * o.tokens))
            o.is_visual = [bool(v) for v in o.visual[: o.length]]
            self.start(o)
        elif self.stage.hold and self.stage.tokens == "prompt" and self.stage.budget != 1.0:
            o.is_visual += [False] * (o.length - len(o.is_visual))
            self.step(o)

    # What all of them share

    def heads(self, o: Oracle, layer: int) -> range:
        return range(o.keys[layer].shape[0])

    def fixed(self, o: Oracle) -> set[int]:
        """Sinks and window."""
        window, sinks, limit = self.stage.window, self.stage.sinks, o.limit
        if isinstance(window, float):
            window = round(window * limit)
        if self.stage.tokens == "prompt" and sinks + window > limit:
            window = min(window, max(1, limit // 2))
            sinks = min(sinks, limit - window)
        return {t for t in range(o.length) if t < sinks or t >= o.length - window}

    def counted(self, o: Oracle, layer: int, head: int) -> list[int]:
        alive = o.alive(layer, head)
        return [t for t in alive if o.is_visual[t] or self.stage.tokens == "prompt"]

    def free(self, o: Oracle, layer: int, head: int) -> list[int]:
        fixed = self.fixed(o)
        return [t for t in self.counted(o, layer, head) if t not in fixed]

    def room(self, o: Oracle, layer: int, head: int) -> int:
        own = self.counted(o, layer, head)
        return max(0, o.limit - len(own) + len(self.free(o, layer, head)))

    def received(self, o: Oracle, layer: int, head: int, queries: list[int]) -> dict[int, float]:
        """Of one query head, over some tokens of the newest forward."""
        rows = o.rows[layer][head]
        first, start = o.length - rows.shape[0], o.length - rows.shape[1]
        found: dict[int, float] = {t: 0.0 for t in range(o.length)}
        for q in queries:
            for at, w in enumerate(rows[q - first].tolist()):
                found[start + at] += w
        return found

    def grouped(self, o: Oracle, layer: int, own: list[dict[int, float]]) -> list[dict[int, float]]:
        """Numbers of query heads, for every KV head."""
        kv, group = len(self.heads(o, layer)), len(own) // len(self.heads(o, layer))
        parts = [own[h * group : (h + 1) * group] for h in range(kv)]
        if self.stage.heads == "shared":
            parts = [own] * kv
        pick = max if getattr(self.stage, "gqa", "mean") == "max" else lambda x: sum(x) / len(x)
        if self.stage.heads == "shared":
            pick = lambda x: sum(x) / len(x)  # noqa: E731
        return [{t: pick([x[t] for x in part]) for t in part[0]} for part in parts]

    def score(self, o: Oracle, layer: int) -> list[dict[int, float]]:
        """Of every KV head."""
        queries = self.queries(o)
        query_heads = range(o.rows[layer].shape[0])
        own = [self.received(o, layer, h, queries) for h in query_heads]
        if "visible" in vars(self.stage) and self.stage.visible:
            # Tokens of one picture may see each other, whichever comes first.
            seen = (o.rows[layer] > 0).any(0).sum(0).tolist()
            own = [{t: x[t] / max(1, seen[t]) for t in x} for x in own]
        if hasattr(self.stage, "kernel"):
            own = [self.pooled(x, queries) for x in own]
        return self.grouped(o, layer, own)

    def pooled(self, x: dict[int, float], queries: list[int]) -> dict[int, float]:
        half, kernel = self.stage.kernel // 2, self.stage.kernel
        out = {}
        for t in x:
            near = [x.get(s, 0.0) if s < queries[0] else 0.0 for s in range(t - half, t + half + 1)]
            out[t] = (
                x[t]
                if t >= queries[0]
                else (max(near) if self.stage.pool == "max" else sum(near) / kernel)
            )
        return out

    def queries(self, o: Oracle) -> list[int]:
        every = list(range(o.length - o.rows[0].shape[1], o.length))  # of the newest forward
        if self.name in ("snapkv", "pyramidkv", "adakv"):
            return every[-self.stage.window :]
        if self.name == "plphp":
            return every[-1:]
        if self.name == "vlcache":
            last = max((t for t in every if o.is_visual[t]), default=None)
            behind = [] if last is None else every[last + 1 :]
            return behind or every[-self.stage.queries :]
        return every

    def keep(self, o: Oracle, layer: int, head: int, score: dict[int, float], count: int) -> None:
        free = self.free(o, layer, head)
        if self.name == "lookm":
            best = sorted(free, key=lambda t: (o.is_visual[t], -score[t]))[:count]
        else:
            best = sorted(free, key=lambda t: -score[t])[:count]
        o.drop(layer, head, [t for t in free if t not in best])

    # The prompt

    def start(self, o: Oracle) -> None:
        layers = sorted(o.keys)
        for layer in layers:
            if self.name == "streamingllm":
                o.scores[layer] = [{t: float(t) for t in range(o.length)}] * len(
                    self.heads(o, layer)
                )
            else:
                before, o.scores[layer] = o.scores.get(layer), self.score(o, layer)
                if before and self.name in ("h2o", "d2o", "lookm", "prefixkv"):
                    for old, new in zip(before, o.scores[layer], strict=True):
                        new.update({t: new[t] + x for t, x in old.items()})
        for (layer, head), count in self.counts(o, layers).items():
            o.total[layer, head] = (
                count + len(self.counted(o, layer, head)) - len(self.free(o, layer, head))
            )
            self.keep(o, layer, head, o.scores[layer][head], count)

    def counts(self, o: Oracle, layers: list[int]) -> dict[tuple[int, int], int]:
        rooms = {(i, h): self.room(o, i, h) for i in layers for h in self.heads(o, i)}
        special = getattr(self, f"_{self.name}", None)
        counts = rooms if special is None else special(o, layers, rooms)
        fits = {k for k in rooms if len(self.free(o, *k)) <= rooms[k]}
        for i in layers:
            near = layers if self.stage.two_pass else [i]
            if all(k in fits for k in rooms if k[0] in near):
                counts.update({k: rooms[k] for k in rooms if k[0] == i})
        return counts

    def _pyramidkv(self, o, layers, rooms):
        counts = {}
        for i, h in rooms:
            mean, there = rooms[i, h], len(self.free(o, i, h))
            if len(self.counted(o, i, h)) < 2 * mean:
                counts[i, h] = mean
                continue
            least = mean // self.stage.beta
            most = min(2 * mean - least, there)
            least, steps = 2 * mean - most, len(layers) - 1
            heights = [most - k * (most - least) / steps for k in range(len(layers))]
            below = [math.floor(sum(heights[:k]) + 1e-9) for k in range(len(layers) + 1)]
            counts[i, h] = below[i + 1] - below[i]
        return counts

    def _adakv(self, o, layers, rooms):
        counts = {}
        for i in layers:
            heads = self.heads(o, i)
            every = [(-o.scores[i][h][t], h, t) for h in heads for t in self.free(o, i, h)]
            best = sorted(every)[: sum(rooms[i, h] for h in heads)]
            total, floor = 0.0, self.stage.floor
            for h in heads:
                before = round(total)
                total += (1 - floor) * sum(x[1] == h for x in best) + floor * rooms[i, h]
                counts[i, h] = round(total) - before
        return counts

    def _prefixkv(self, o, layers, rooms):
        if self.stage.ratios:
            fixed = {k: len(self.counted(o, *k)) - len(self.free(o, *k)) for k in rooms}
            share = dict(zip(layers, self.stage.ratios, strict=True))
            return {k: max(0, round(share[k[0]] * o.tokens) - fixed[k]) for k in rooms}
        heads = [0] if self.stage.heads == "shared" else self.heads(o, 0)
        entries, counts = [], dict.fromkeys(rooms, 0)
        for i in layers:
            for h in heads:
                alive, x = o.alive(i, h), o.scores[i][h]
                total, below = sum(x[t] for t in alive), 0.0
                for t in sorted(alive, key=lambda t: -x[t]):
                    if t in self.free(o, i, h):
                        entries.append((below / total, i, h))
                    below += x[t]
        for _, i, h in sorted(entries)[: sum(rooms[i, h] for i in layers for h in heads)]:
            for head in self.heads(o, i) if self.stage.heads == "shared" else [h]:
                counts[i, head] += 1
        return counts

    def _vlcache(self, o, layers, rooms):
        density, first = [], o.length - o.rows[0].shape[1]
        for i in layers:
            rows, many, seen = o.rows[i], 0, 0
            for head in rows:
                for q in self.queries(o):
                    row = head[q - first].tolist()
                    many += sum(w >= self.stage.threshold * max(row) and w > 0 for w in row)
            for q in self.queries(o):
                seen += sum(t <= q for t in o.alive(i, 0))
            density.append(many / len(rows) / seen)
        counts, total = {}, 0.0
        least = math.ceil(self.stage.least * o.tokens - 1e-9)
        room = sum(rooms[i, 0] for i in layers)
        for i in layers:
            before = round(total)
            total += density[i] / sum(density) * room
            for h in self.heads(o, i):
                counts[i, h] = max(round(total) - before, least)
        return counts

    def _plphp(self, o, layers, rooms):
        counts, stage = {}, self.stage
        for i in layers:
            own = [sum(x[t] for t in self.counted(o, i, h)) for h, x in enumerate(o.scores[i])]
            gaze = sum(own) / len(own)
            share = (
                stage.budget
                if isinstance(stage.budget, float)
                else (stage.budget / max(1, o.tokens))
            )
            share += stage.spread * (gaze >= stage.attentive) - stage.spread * (
                gaze < stage.indifferent
            )
            kept = o.tokens if i < stage.skip else math.ceil(max(0, share * o.tokens) - 1e-4)
            for h in self.heads(o, i):
                fixed = len(self.counted(o, i, h)) - len(self.free(o, i, h))
                counts[i, h] = max(0, kept - fixed)
        return counts

    def _d2o(self, o, layers, rooms):
        cut = [i for i in layers if not self.whole(layers, i)]
        flat = {}
        for i in cut:
            own = [self.received(o, i, h, self.queries(o)) for h in range(o.rows[i].shape[0])]
            many = len(own[0])
            spread = [statistics.variance(x.values()) if many > 1 else 0.0 for x in own]
            low, high = min(spread), max(spread)
            flat[i] = math.exp(-statistics.mean((v - low) / (high - low + 1e-6) for v in spread))
        counts = {}
        for h in self.heads(o, 0):
            total, room = 0.0, sum(rooms[i, h] for i in cut)
            for i in layers:
                before = round(total)
                total += room * flat.get(i, 0.0) / sum(flat.values())
                whole = self.whole(layers, i)
                counts[i, h] = len(self.free(o, i, h)) if whole else round(total) - before
        return counts

    def whole(self, layers: list[int], i: int) -> bool:
        """Whether a layer is left alone for ever."""
        skipped = self.stage.skip, len(layers) - self.stage.skip_last
        return not skipped[0] <= i < skipped[1]

    # The answer

    def step(self, o: Oracle) -> None:
        for layer in sorted(o.keys):
            if self.name == "d2o" and self.whole(sorted(o.keys), layer):
                continue
            if self.name == "prefixkv":
                self._one_leaves(o, layer)
                continue
            query_heads = range(o.rows[layer].shape[0])
            new = [self.received(o, layer, h, [o.length - 1]) for h in query_heads]
            new = self.grouped(o, layer, new)
            for head in self.heads(o, layer):
                score = o.scores[layer][head]
                for t, w in new[head].items():
                    score[t] = float(t) if self.name == "streamingllm" else score.get(t, 0.0) + w
                own = self.counted(o, layer, head)
                count = o.total[layer, head] - len(own) + len(self.free(o, layer, head))
                self.keep(o, layer, head, score, max(0, count))

    def _one_leaves(self, o: Oracle, layer: int) -> None:
        for head in self.heads(o, layer):
            stored, total = o.alive(layer, head), o.total[layer, head]
            if len(stored) - o.length * total / o.tokens < 1:
                continue
            place = total + self.stage.distance if self.stage.distance <= 0 else self.stage.distance
            place = len(stored) // 2 if place < 1 else place
            free = set(self.free(o, layer, head))
            o.drop(layer, head, [t for t in stored[place:] if t in free][:1])


class Skipping:
    """Which visual tokens stay in all layers, once the prompt has been read."""

    def __init__(self, stage: Any) -> None:
        self.stage = stage

    def decide(self, o: Oracle) -> None:
        if hasattr(o, "prompt"):
            return
        o.prompt = o.length
        visual = [t for t, v in enumerate(o.visual) if v]
        share = self.stage.budget
        count = share if isinstance(share, int) else max(1, round(share * len(visual)))
        if self.stage.rule == "top":
            score = {t: 0.0 for t in range(o.length)}
            for rows in o.rows.values():
                for at, w in enumerate(rows[:, -1].mean(0).tolist()):
                    score[o.length - rows.shape[2] + at] += w
            stay = sorted(visual, key=lambda t: -score[t])[:count]
        else:
            count = min(count, len(visual))
            stay = [visual[-(-j * len(visual) // count)] for j in range(count)]
        for layer in o.keys:
            for head in range(o.keys[layer].shape[0]):
                o.drop(layer, head, [t for t in visual if t not in stay])


def loops(stage: Any) -> Plain | Skipping:
    """What decides for a method."""
    return Skipping(stage) if stage.info.name == "skipvision" else Plain(stage)
