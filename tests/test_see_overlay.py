"""Drawings of kept, merged and dropped tokens: the right cells change, and in the right way."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mllm.errors import PlanError
from mllm.eval import overlay, seen
from mllm.eval.overlay import Fate
from mllm.tokens import Layout, Tiling

GRID = (4, 6)


@pytest.fixture
def picture() -> Image.Image:
    noise = np.random.default_rng(0).integers(60, 255, (48, 72, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((144, 96))


def cell(image: Image.Image, index: int, margin: float = 0.3) -> np.ndarray:
    """The inside of a token's cell, without its border."""
    width, height = image.width / GRID[1], image.height / GRID[0]
    row, column = divmod(index, GRID[1])
    box = (
        (column + margin) * width,
        (row + margin) * height,
        (column + 1 - margin) * width,
        (row + 1 - margin) * height,
    )
    return np.asarray(image.crop(tuple(round(v) for v in box))).astype(float)


def colourless(pixels: np.ndarray) -> bool:
    return float((pixels.max(-1) - pixels.min(-1)).max()) < 24


def test_fates_tell_kept_merged_dropped_and_gone():
    fates = overlay.fates(6, [0, 4], merged_into=[0, 4, -1, 4, 4, -1])
    assert [Fate(f) for f in fates] == [
        Fate.KEPT,
        Fate.MERGED,
        Fate.DROPPED,
        Fate.MERGED,
        Fate.KEPT,
        Fate.DROPPED,
    ]
    later = overlay.fates(6, torch.tensor([4]), before=torch.tensor([0, 4]))
    assert later.tolist() == [Fate.DROPPED, Fate.GONE, Fate.GONE, Fate.GONE, Fate.KEPT, Fate.GONE]


@pytest.mark.parametrize("bad", [-1, 24])
def test_an_index_outside_the_picture_is_refused(picture, bad):
    with pytest.raises(ValueError, match="0 to 23"):
        overlay.draw_tokens(picture, GRID, [bad])


def test_kept_cells_show_the_picture_and_dropped_ones_are_dark_grey(picture):
    drawing, kinds = overlay.draw_tokens(picture, GRID, [8, 9], width=432)
    plain = picture.resize(drawing.size, Image.Resampling.LANCZOS)
    assert kinds == (Fate.KEPT, Fate.DROPPED)
    assert np.abs(cell(drawing, 8) - cell(plain, 8)).mean() < 8
    assert colourless(cell(drawing, 20))
    assert cell(drawing, 20).mean() < 0.6 * cell(plain, 20).mean()


def test_merged_cells_take_the_colour_of_their_target(picture):
    into = [-1] * 24
    into[0], into[1], into[22], into[23] = 0, 0, 23, 23
    drawing, kinds = overlay.draw_tokens(picture, GRID, [0, 23], merged_into=into, width=432)
    assert kinds == (Fate.KEPT, Fate.MERGED, Fate.DROPPED)
    assert not colourless(cell(drawing, 1)) and not colourless(cell(drawing, 22))
    orange, blue = cell(drawing, 1).mean((0, 1)), cell(drawing, 22).mean((0, 1))
    assert orange[0] > orange[2] and blue[2] > blue[0]


def test_tokens_gone_before_are_darker_than_those_dropped_here(picture):
    drawing, kinds = overlay.draw_tokens(picture, GRID, [8], before=[8, 20], width=432)
    assert kinds == (Fate.KEPT, Fate.DROPPED, Fate.GONE)
    assert cell(drawing, 3).mean() < 0.5 * cell(drawing, 20).mean()


def test_as_seen_undoes_the_normalisation(picture):
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    pixels = torch.tensor(np.asarray(picture)).permute(2, 0, 1) / 255
    normalised = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert np.array_equal(np.asarray(overlay.as_seen(normalised, mean, std)), np.asarray(picture))


class FakeLedger:
    """A pre-LLM stage that keeps 6 of 24 tokens, and a cut to 2 before layer 2 of 4."""

    layouts = [[Layout((GRID,))]]
    merged_into = [torch.tensor([0, 1, 2, 3, 4, 5] + [5] * 18)]

    def kept(self, layer):
        return [torch.tensor([1, 4]) if layer in (2, 3) else torch.arange(6)]

    def as_dict(self):
        return {"layers": [{"layer": i} for i in range(4)]}


def test_panels_show_each_change_once_and_a_figure_holds_them(picture):
    panels = seen.panels([picture], FakeLedger(), width=120)
    assert [panel.title for panel in panels] == [
        "As the model sees it: 24 visual tokens",
        "Entering the LLM: 6 of 24",
        "Entering decoder layer 2: 2 of 6",
    ]
    assert Fate.MERGED in panels[1].fates and Fate.GONE in panels[2].fates
    wide = overlay.figure(panels, ["Question: " + "why " * 60, "x" * 400])
    assert wide.width >= 3 * 120
    narrow = overlay.figure(panels, ["Question"], columns=1)
    assert narrow.height > 3 * 80


def test_views_are_the_grids_of_pictures_frames_and_tiles():
    """Every visual token but separators is in one view, in reading order."""
    tiled = Layout(((2, 2), (2, 3)), "rows", Tiling(1, 2, 2, 3))
    video = Layout(((1, 2),) * 3, "end", video=True)
    views = seen.views([tiled, video])
    assert [view.name for view in views] == [
        "picture 1, overview", "picture 1, tiles",
        "picture 2, frame 1", "picture 2, frame 2", "picture 2, frame 3",
    ]  # fmt: skip
    assert [view.tokens.tolist() for view in views] == [
        [0, 1, 2, 3], [4, 5, 6, 8, 9, 10], [12, 13], [14, 15], [16, 17],
    ]  # fmt: skip
    assert [view.picture for view in views] == [0, 0, 1, 1, 1]
    assert [view.name for view in seen.views([Layout((GRID,))])] == [""]


def test_what_went_into_another_view_is_merged_without_a_line(picture):
    first, second = seen.views([Layout(((1, 2),))] * 2)
    into = np.array([0, 2, 2, -1])
    assert first.merged_into(into).tolist() == [0, -2]
    assert second.merged_into(into).tolist() == [0, -1]
    step = seen.Step(None, np.array([0, 2]), None, into)
    drawn = seen.panel(first, picture, step, width=240)
    assert drawn.fates == (Fate.KEPT, Fate.MERGED)
    assert drawn.title == "Picture 1: entering the LLM: 1 of 2"


def processor_of(**parts):
    norm = SimpleNamespace(image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    return SimpleNamespace(image_processor=norm, video_processor=norm, **parts)


def test_pictures_behind_the_views_are_those_that_the_model_was_given(picture):
    plain, white = Layout((GRID,)), torch.ones(3, 8, 12)
    one = seen.pictures(processor_of(), {"pixel_values": white[None]}, [picture], [plain])
    assert one[0].size == (12, 8) and np.asarray(one[0]).min() == 255
    frames = {"pixel_values_videos": white.expand(1, 3, 3, 8, 12)}
    video = Layout((GRID,) * 3, "end", video=True)
    assert len(seen.pictures(processor_of(), frames, [[picture] * 3], [video])) == 3
    packed = {"pixel_values": torch.ones(64, 588), "image_grid_thw": torch.tensor([[1, 8, 8]])}
    assert seen.pictures(processor_of(), packed, [picture], [plain])[0] is picture
    packed = {"pixel_values_videos": torch.ones(64, 588), "video_grid_thw": torch.ones(1, 3)}
    named = list("abcd")  # two frames a grid
    assert seen.pictures(processor_of(), packed, [named], [Layout((GRID,) * 2, video=True)]) == [
        "a", "c"
    ]  # fmt: skip
    assert seen.pictures(processor_of(), packed, [named], [plain]) == ["a"]
    tiles = Layout((GRID, GRID), "rows", Tiling(1, 1, *GRID))
    both = seen.pictures(processor_of(), {"pixel_values": white[None, None]}, [picture], [tiles])
    assert both == [picture, picture]
    with pytest.raises(PlanError, match="cannot be drawn") as caught:
        seen.pictures(processor_of(), {"pixel_values": white[None]}, [picture], [plain] * 2)
    assert caught.value.argument == "model"
