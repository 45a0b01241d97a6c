"""Break the engine in the ways that such engines break: the checks must notice every time."""

from __future__ import annotations

import invariants
import pytest
import torch
from matrix import CASES, check_generate, check_logits

from mllm import attention, compat, in_llm, masks, rows
from mllm.cache import SlotLayer
from mllm.compressors import fastv, visionzip
from mllm.in_llm import DecoderRun
from mllm.models import base, gemma3
from mllm.models.qwen_vl import Qwen2VL, Qwen3VL, Qwen25VL
from mllm.patcher import Patched
from mllm.pre_llm import VisionRun
from mllm.tokens import TokenTable
from mllm.vision_hooks import VisionHooks

FASTV, TWO = "fastv:layer=2:keep=0.5", "fastv:layer=1:keep=0.5+fastv:layer=3:keep=2"
ZIP, DIV = "visionzip:keep=10", "divprune:keep=6:positions=original"


def around(monkeypatch, owner, name, change):
    """Replace `owner.name` by `change(original, *args, **kwargs)`."""
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **k: change(original, *a, **k))


def parent_mask(mp):
    """Layers after the cut are given what the parent passes to all layers."""

    def arguments(original, self, layer, hidden, kwargs):
        out = original(self, layer, hidden, kwargs)
        return {**out, "attention_mask": kwargs.get("attention_mask")}

    around(mp, DecoderRun, "arguments", arguments)


def no_mask(mp):
    """Layers after the cut are given no mask: right for one sample, wrong with padding."""
    mp.setattr(compat, "causal_mask", lambda *a, **k: None)


def no_mask_in_decode(mp):
    """The mistake of most ports: masks after the cut only in prefill."""

    def mask(original, config, hidden, *rest):
        return original(config, hidden, *rest) if hidden.shape[1] > 1 else None

    around(mp, compat, "causal_mask", mask)


def no_padding_mask(mp):
    """Samples of unequal counts are padded again, and nobody masks that padding."""
    around(mp, masks, "slot_valid", lambda original, *a: None)


def renumbered_after_the_cut(mp):
    """Kept rows are numbered from zero although the plan keeps their positions."""

    def arguments(original, self, layer, hidden, kwargs):
        out = original(self, layer, hidden, kwargs)
        if self.visual is not None:
            rows = torch.arange(hidden.shape[1]).expand(hidden.shape[0], -1)
            out["position_embeddings"] = self.patched.family.decoder.rotary_emb(hidden, rows)
        return out

    around(mp, DecoderRun, "arguments", arguments)


def renumbered_before_the_decoder(mp):
    def drop(original, self, kwargs):
        original(self, kwargs)
        if self.visual is not None:
            batch, rows = kwargs["inputs_embeds"].shape[:2]
            kwargs["position_ids"] = torch.arange(rows).expand(batch, -1)

    around(mp, DecoderRun, "_drop_rows", drop)


def positions_kept_in_decode_only(mp):
    """Compact plans: later tokens forget how far the prompt was moved."""
    around(mp, in_llm, "renumber", lambda original, position, *a: position)


def wrong_last_row(mp):
    """The last column instead of each sample's last prompt row."""

    def tap(original, query, key, rows, *a, **k):
        return original(query, key, torch.full_like(rows, query.shape[2] - 1), *a, **k)

    around(mp, attention, "row_attention", tap)


def first_row(mp):
    def tap(original, query, key, rows, *a, **k):
        return original(query, key, rows - 1, *a, **k)

    around(mp, attention, "row_attention", tap)


def ungrouped_heads(mp):
    """Query heads are matched with the wrong key heads."""

    def tap(original, query, key, *a, **k):
        return original(query, key.flip(1), *a, **k)

    around(mp, attention, "row_attention", tap)


def sum_of_logits(mp):
    """Scores without a softmax per head rank tokens differently."""

    def tap(original, query, key, rows, mask, scaling, **k):
        return original(query, key, rows, mask, scaling, **k).log().clamp(min=-1e4)

    around(mp, attention, "row_attention", tap)


def lowest_scores(mp):
    around(mp, fastv.FastV, "score", lambda original, self, ctx: -original(self, ctx))


def unordered_rows(mp):
    """Kept rows in the order of nothing in particular."""
    around(mp, rows, "choose_rows", lambda original, *a: original(*a).flip(1))


def unmasked_samples_mixed(mp):
    """Everybody keeps the rows of the first sample (as ports with `input_ids[0]` do)."""

    def choose(original, keep, valid, *order):
        rows = original(keep, valid, *order)
        return rows[:1].expand_as(rows)

    around(mp, rows, "choose_rows", choose)


def merge_by_average(mp):
    def merged(original, self, *a):
        return original(self.replace(merge="mean"), *a)

    around(mp, visionzip.VisionZip, "_merged", merged)


def wrong_receiver(mp):
    def assign(original, keys, targets, members):
        receiver = original(keys, targets, members)
        return targets.sum(1, keepdim=True) - receiver if targets.shape[1] == 2 else receiver

    mp.setattr(
        visionzip.VisionZip,
        "_assign",
        staticmethod(lambda *a, original=visionzip.VisionZip._assign: assign(original, *a)),
    )


def no_class_token(mp):
    around(mp, VisionHooks, "_tower_post", lambda original, *a: None)


def nothing_dropped(mp):
    """The hook that has silently become a no-op."""

    def choose(original, keep, valid, *order):
        return original(valid, valid, *order)

    around(mp, rows, "choose_rows", choose)


def no_scatter_back(mp):
    """Dropped rows come back in the wrong places."""

    def post(original, self, module, args, output):
        out = original(self, module, args, output)
        out.last_hidden_state = out.last_hidden_state.roll(1, 1)
        return out

    around(mp, Patched, "_decoder_post", post)


MUTATIONS = [
    (parent_mask, FASTV, "padded", "logits"),
    (parent_mask, TWO, "padded", "generate"),
    (no_mask, FASTV, "padded", "logits"),
    (no_mask, TWO, "padded", "logits"),
    (no_mask_in_decode, FASTV, "padded", "generate"),
    (no_padding_mask, FASTV, "padded", "logits"),
    (no_padding_mask, DIV, "padded", "logits"),
    (no_padding_mask, ZIP, "padded", "generate"),
    (renumbered_after_the_cut, FASTV, "alone", "logits"),
    (renumbered_after_the_cut, FASTV, "padded", "logits"),
    (renumbered_before_the_decoder, DIV, "alone", "logits"),
    (positions_kept_in_decode_only, ZIP, "alone", "logits"),
    (positions_kept_in_decode_only, "fastv:layer=1:keep=3:positions=compact", "alone", "logits"),
    (wrong_last_row, FASTV, "padded-right", "logits"),
    (first_row, FASTV, "alone", "logits"),
    (ungrouped_heads, FASTV, "alone", "logits"),
    (sum_of_logits, FASTV, "alone", "logits"),
    (lowest_scores, FASTV, "alone", "logits"),
    (unordered_rows, FASTV, "alone", "logits"),
    (unordered_rows, DIV, "alone", "logits"),
    (unmasked_samples_mixed, FASTV, "padded", "logits"),
    (merge_by_average, ZIP, "alone", "logits"),
    (wrong_receiver, ZIP, "alone", "logits"),
    (no_class_token, ZIP, "alone", "logits"),
    (nothing_dropped, FASTV, "alone", "logits"),
    (nothing_dropped, DIV, "alone", "logits"),
    (no_scatter_back, FASTV, "alone", "logits"),
]


@pytest.mark.parametrize(
    "mutate, spec, kind, check",
    MUTATIONS,
    ids=[f"{m.__name__}-{spec}-{kind}-{check}" for m, spec, kind, check in MUTATIONS],
)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_broken_engine_is_caught(monkeypatch, mutate, spec, kind, check, attn):
    kind, side = kind.split("-") if "-" in kind else (kind, "left")
    mutate(monkeypatch)
    # A mask of the wrong shape is caught by torch before any comparison is reached.
    caught = (AssertionError, RuntimeError) if mutate is parent_mask else AssertionError
    with pytest.raises(caught):
        if check == "logits":
            check_logits(CASES[spec], attn, kind, side)
        else:
            check_generate(CASES[spec], attn, kind, steps=6)


@pytest.mark.parametrize("spec", sorted({spec for _, spec, _, _ in MUTATIONS}))
def test_the_same_checks_pass_on_the_engine(spec):
    check_logits(CASES[spec], "sdpa", "padded")
    check_generate(CASES[spec], "sdpa", "padded", steps=6)


# Parts that only some families have


def separators_stay_after_a_cut(mp):
    """Every separator stays in the decoder, also where its whole row has gone."""
    around(mp, TokenTable, "with_newlines", lambda original, self, keep, *_: keep)


def separators_stay_before_the_decoder(mp):
    around(mp, VisionRun, "_keep_newlines", lambda original, self: None)


def separators_use_up_the_budget(mp):
    """Separators are candidates like any other visual token."""

    def prompt(original, *a):
        table = original(*a)
        table.newline = torch.zeros_like(table.newline)
        return table

    original = TokenTable.prompt
    mp.setattr(TokenTable, "prompt", classmethod(lambda cls, *a: prompt(original, *a)))


def first_rows_of_deepstack(mp):
    """Inner features are cut to length instead of following the rows that stay."""

    def take(original, self, arguments, rows, valid):
        whole = arguments["deepstack_visual_embeds"]
        original(self, arguments, rows, valid)
        count = int(arguments["visual_pos_masks"].sum())
        arguments["deepstack_visual_embeds"] = [x[:count] for x in whole]

    around(mp, Qwen3VL, "take_rows", take)


def windows_in_the_tower_s_order(mp):
    """Signals of a windowed tower as they come, next to features in reading order."""
    mp.setattr(Qwen25VL, "to_rows", Qwen2VL.to_rows)


def one_patch_of_each_token(mp):
    """The first of the patches that a merger joins speaks for all of them."""

    def rows(original, self, signal, layouts):
        first = signal.unflatten(0, (-1, self.merge**2))[:, :1]
        return original(self, first.expand(-1, self.merge**2, *first.shape[2:]).flatten(0, 1),
                        layouts)

    around(mp, Qwen2VL, "to_rows", rows)


def patches_joined_in_reading_order(mp):
    """Neighbours in the sequence are averaged instead of neighbours in the picture."""

    def join(signal, layouts, side):
        return signal.unflatten(0, (-1, side**2)).mean(1)

    for module in (gemma3, base):
        mp.setattr(module, "join_patches", join)


def window_in_slots(mp):
    """A sliding window counts the stored tokens, and not those that were dropped between them."""

    def mask(original, run, layer, parent):
        held = run.held[layer] if run.held else None
        if held is None:
            return original(run, layer, parent)
        slots = torch.arange(held.slots) + run.past_logical - held.slots
        run.held[layer] = held.with_columns(logical=slots.expand_as(held.logical))
        try:
            return original(run, layer, parent)
        finally:
            run.held[layer] = held

    around(mp, masks, "of_kind", mask)
    mp.setattr(SlotLayer, "_forget", lambda self: None)


def window_forgotten(mp):
    """Sliding layers see everything that is stored."""

    def mask(original, run, layer, parent):
        windows = run.patched.windows
        run.patched.windows = [None] * len(windows)
        try:
            return original(run, layer, parent)
        finally:
            run.patched.windows = windows

    around(mp, masks, "of_kind", mask)
    mp.setattr(SlotLayer, "_forget", lambda self: None)


def images_see_forwards_only_back(mp):
    """Rows of an image see only earlier rows of it."""

    def mask(original, run, layer, parent):
        if parent is not None and parent.shape[2] > 1:
            own = torch.ones(parent.shape[2:], dtype=torch.bool).tril()
            lowest = False if parent.dtype == torch.bool else torch.finfo(parent.dtype).min
            parent = parent.masked_fill(~own, lowest)
        return original(run, layer, parent)

    around(mp, masks, "of_kind", mask)


def rotary_tables_cut_to_length(mp):
    """Rows that stay take the rotary tables of the first rows."""

    def arguments(original, self, layer, hidden, kwargs):
        out = original(self, layer, hidden, kwargs)
        whole = kwargs["position_embeddings"]
        out["position_embeddings"] = tuple(t[..., : hidden.shape[1], :] for t in whole)
        return out

    around(mp, DecoderRun, "arguments", arguments)


def rows_and_columns_lost(mp):
    """Positions of the rows that stay are those of the sequence alone."""

    def drop(original, self, kwargs):
        original(self, kwargs)
        if self.visual is not None:
            position = kwargs["position_ids"]
            kwargs["position_ids"] = position[:1].expand_as(position)

    around(mp, DecoderRun, "_drop_rows", drop)


def positions_cut_to_length(mp):
    def drop(original, self, kwargs):
        whole = kwargs["position_ids"]
        original(self, kwargs)
        if self.visual is not None:
            kwargs["position_ids"] = whole[..., : kwargs["position_ids"].shape[-1]]

    around(mp, DecoderRun, "_drop_rows", drop)


FAMILY_MUTATIONS = [
    (separators_stay_after_a_cut, "llava_next", "left", "cut", "forward"),
    (separators_stay_after_a_cut, "llava_onevision", "alone", "two", "forward"),
    (separators_stay_before_the_decoder, "llava_next", "left", "keep", "forward"),
    (separators_stay_before_the_decoder, "llava_onevision", "several", "keep", "forward"),
    (separators_use_up_the_budget, "llava_next", "several", "cut", "forward"),
    (first_rows_of_deepstack, "qwen3_vl", "left", "keep", "forward"),
    (first_rows_of_deepstack, "qwen3_vl", "alone", "stacked", "greedy"),
    (windows_in_the_tower_s_order, "qwen2_5_vl", "several", "write", "forward"),
    (one_patch_of_each_token, "qwen2_vl", "alone", "write", "forward"),
    (one_patch_of_each_token, "qwen3_vl", "several", "write", "forward"),
    (patches_joined_in_reading_order, "internvl", "alone", "write", "forward"),
    (patches_joined_in_reading_order, "gemma3", "alone", "write", "forward"),
    (window_in_slots, "gemma3", "left", "two", "greedy"),
    (window_forgotten, "gemma3", "left", "cut", "greedy"),
    (images_see_forwards_only_back, "gemma3", "alone", "cut", "forward"),
    (images_see_forwards_only_back, "gemma3", "left", "keep", "forward"),
    (rotary_tables_cut_to_length, "qwen2_5_vl", "alone", "cut", "forward"),
    (rotary_tables_cut_to_length, "qwen3_vl", "left", "two", "greedy"),
    (rows_and_columns_lost, "qwen2_vl", "alone", "keep", "forward"),
    (positions_cut_to_length, "qwen2_5_vl", "left", "keep", "forward"),
]


@pytest.mark.parametrize(
    "mutate, row", [pytest.param(m, row, id=f"{m.__name__}-{'-'.join(row)}")
                    for m, *row in FAMILY_MUTATIONS],
)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_broken_family_is_caught(monkeypatch, mutate, row, attn):
    family, shape, stage, way = row
    draw = invariants.draw(family, attn, shape, stage, way)
    invariants.check(draw)
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        invariants.check(draw)
