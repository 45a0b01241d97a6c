"""Videos as training data: which frames, in what order, and what is said of those that fail."""

from __future__ import annotations

import importlib.util
import json
import wave
from types import SimpleNamespace

import families
import numpy as np
import pytest
import torch
from PIL import Image
from test_recipes import messages, picture, recipe_for, rows_of, turn
from train_tiny import save_small

from mllm.errors import DataError
from mllm.training import speed, video
from mllm.training.data import IGNORED, Collator, load_data
from mllm.training.run import run
from mllm.training.schema import DataPart
from mllm.training.tiny import new_processor
from mllm.training.video import read_clip

needs_av = pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="pip install av")
STEP = 25  # of grey between two frames


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return save_small(tmp_path_factory.mktemp("small"))


def film(path, frames=10, size=64):
    """A video whose frame `i` is grey, `i * STEP` bright."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
        for number in range(frames):
            grey = Image.new("RGB", (size, size), (number * STEP,) * 3)
            container.mux(stream.encode(av.VideoFrame.from_image(grey)))
        container.mux(stream.encode())
    return path


def shown(frames):
    """Numbers of the frames, by how bright they are."""
    return [round(float(np.asarray(frame).mean()) / STEP) for frame in frames]


def ask(text, **more):
    return {**more, "conversations": [turn("human", text), turn("gpt", "yes")]}


def part_of(path, entries, **more):
    path.write_text(json.dumps(entries))
    return DataPart(path=str(path), **more)


# --- decoding


@needs_av
@pytest.mark.parametrize(
    ("there", "wanted", "numbers"),
    [(10, 4, [0, 2, 5, 7]), (10, 1, [0]), (10, 10, list(range(10))), (3, 6, [0, 0, 1, 1, 2, 2])],
)
def test_frames_lie_evenly_over_the_video(there, wanted, numbers, tmp_path):
    """As transformers samples; a short video has frames twice in a row."""
    path = film(tmp_path / "a.mp4", there)
    for source in (path, path.read_bytes()):
        clip = read_clip(source, wanted, "a.mp4")
        assert clip.numbers == numbers and shown(clip.frames) == numbers
        assert (clip.total, clip.fps) == (there, 10.0)
        assert clip.frames[0].mode == "RGB" and clip.frames[0].size == (64, 64)
    assert clip.metadata()["duration"] == there / 10


@needs_av
def test_a_container_that_does_not_count_its_frames(tmp_path):
    import av

    path = film(tmp_path / "a.mkv")
    with av.open(str(path)) as container:
        assert not container.streams.video[0].frames, "else this is no test of counting"
    assert shown(read_clip(path, 5, "a.mkv").frames) == [0, 2, 4, 6, 8]


@needs_av
def test_what_is_no_video_is_named(tmp_path):
    whole = film(tmp_path / "a.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.mp4").write_text("no video")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 80, "NONE", ""))
        sound.writeframes(bytes(160))
    for name, words in (("half.mp4", ""), ("text.mp4", ""), ("sound.wav", "no video stream")):
        with pytest.raises(DataError, match=f"cannot read the video {name}: .*{words}"):
            read_clip(tmp_path / name, 4, name)


def test_without_pyav_the_command_is_named(tmp_path, monkeypatch):
    """Before training starts, though nothing has been decoded."""
    (tmp_path / "a.mp4").write_bytes(b"")
    part = part_of(tmp_path / "d.json", [ask("<video> what?", video="a.mp4")], skip_bad=0.9)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        video.importlib.util, "find_spec", lambda name: None if name == "av" else real(name)
    )
    with pytest.raises(DataError, match=r"pip install 'mllm-efficiency\[video\]'"):
        load_data([part])


# --- entries


@needs_av
def test_llava_json_and_messages_with_videos(tmp_path):
    film(tmp_path / "a.mp4")
    film(tmp_path / "b.mp4", 5)
    picture(tmp_path / "p.png")
    entries = [
        ask("<video>\nwhat?", video="a.mp4"),
        ask("<image> or <video> or <video>?", image="p.png", video=["a.mp4", "b.mp4"]),
        ask("hello"),
    ]
    data, _ = load_data([part_of(tmp_path / "d.json", entries, num_frames=5)])
    assert [record.videos for record in data.records] == [1, 2, 0]
    assert data.sizes[1] == [True, True, False]
    assert [length // 576 for length in data.sizes[0]] == [5, 11, 0]
    assert shown(data[0]["videos"][0].frames) == [0, 2, 4, 6, 8]
    first = data[1]["messages"][0]["content"]
    assert [piece["type"] for piece in first] == ["image", "text", "video", "text", "video", "text"]
    assert [len(clip.frames) for clip in data[1]["videos"]] == [5, 5]
    assert data[2]["images"] == data[2]["videos"] == []
    for key in ("video", "path"):
        talk = messages("what?", 0)
        talk[0]["content"].insert(0, {"type": "video", key: "b.mp4"})
        part = part_of(tmp_path / "m.json", [{"messages": talk}], format="messages", num_frames=2)
        item = load_data([part])[0][0]
        assert shown(item["videos"][0].frames) == [0, 2]
        assert item["messages"][0]["content"][0] == {"type": "video"}
    talk[0]["content"][0] = {"type": "video"}
    named = {"messages": talk, "videos": ["a.mp4"]}
    part = part_of(tmp_path / "m.json", [named], format="messages")
    assert load_data([part])[0].records[0].videos == 1


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (ask("<video> <video>", id="b", video="a.mp4"), "2 video placeholders for 1 videos"),
        (ask("what?", id="b", video="a.mp4"), "0 video placeholders for 1 videos"),
        (ask("<image> what?", id="b", video="a.mp4"), "1 image placeholders for 0 images"),
        (ask("<video> what?", id="b"), "1 video placeholders for 0 videos"),
        (ask("<video> what?", id="b", video="no.mp4"), "no.mp4, which does not exist"),
    ],
)
def test_placeholders_and_videos_that_do_not_match_are_named(entry, words, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(DataError, match=rf"entry 1 \(id 'b'\).*{words}"):
        load_data([part_of(tmp_path / "d.json", [ask("hello"), entry])])


@needs_av
def test_a_video_that_cannot_be_read_counts_under_skip_bad(tmp_path):
    film(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_text("no video")
    entries = [ask(f"<video> {n}", id=n, video=n) for n in ("a.mp4", "b.mp4", "a.mp4", "a.mp4")]
    data, _ = load_data([part_of(tmp_path / "d.json", entries)])
    with pytest.raises(DataError, match=r"1 of 4 conversations.*entry 1 \(id 'b.mp4'\).*b.mp4"):
        data[1]
    data, _ = load_data([part_of(tmp_path / "d.json", entries, skip_bad=0.25)])
    assert data[1]["messages"] == data[2]["messages"] and data.bad.tolist() == [0, 1, 0, 0]


# --- batches


@needs_av
def test_without_videos_a_model_sees_frames_as_pictures_in_order(tmp_path):
    """The batch is that of a conversation with these pictures in the place of the video."""
    film(tmp_path / "a.mp4")
    picture(tmp_path / "p.png")
    entries = [ask("<image> then <video> what?", image="p.png", video="a.mp4"), ask("hello")]
    data, _ = load_data([part_of(tmp_path / "d.json", entries, num_frames=3)])
    names = ["p.png"]
    for number, frame in enumerate(data[0]["videos"][0].frames):
        frame.save(tmp_path / f"{number}.png")
        names.append(f"{number}.png")
    same = [ask("<image> then <image><image><image> what?", image=names), ask("hello")]
    plain, _ = load_data([part_of(tmp_path / "same.json", same)])
    collate = Collator(new_processor())
    found, want = collate([data[0], data[1]]), collate([plain[0], plain[1]])
    assert found.keys() == want.keys() and len(found["pixel_values"]) == 4
    assert all(torch.equal(found[key], want[key]) for key in want)


class WithVideos:
    """A processor of videos, as those of Qwen-VL: `video_token` stands for a frame's token.

    With `words` it writes some before every frame, as that of Qwen3-VL does.
    """

    video_token = "<video>"
    video_processor = SimpleNamespace()

    def __init__(self, words=""):
        self.inner, self.words = new_processor(), words
        self.tokenizer, self.image_token = self.inner.tokenizer, self.inner.image_token
        self.tokenizer.add_tokens([self.video_token], special_tokens=True)

    def apply_chat_template(self, conversation, **options):
        told = [
            {**m, "content": [
                {"type": "text", "text": self.video_token} if p["type"] == "video" else p
                for p in m["content"]
            ]}
            for m in conversation
        ]  # fmt: skip
        return self.inner.apply_chat_template(told, **options)

    def __call__(self, text, images, videos=None, videos_kwargs=None, **options):
        self.given = videos, videos_kwargs
        frames = iter(videos or ())
        texts = []
        for each in text:
            head, *tail = each.split(self.video_token)
            for piece in tail:
                head += (self.words + self.video_token) * len(next(frames)) + piece
            texts.append(head)
        batch = self.inner(text=texts, images=images, **options)
        if videos:
            batch["pixel_values_videos"] = torch.from_numpy(np.stack(videos))
        return batch


@needs_av
@pytest.mark.parametrize("words", ["", "Frame: "])
def test_a_processor_of_videos_gets_the_frames_and_where_they_were(words, tmp_path):
    film(tmp_path / "a.mp4")
    entries = [ask("<video> what?", video="a.mp4"), ask("hello")]
    data, _ = load_data([part_of(tmp_path / "d.json", entries, num_frames=2)])
    processor = WithVideos(words)
    batch = Collator(processor)([data[0], data[1]])
    (frames,), options = processor.given
    assert frames.shape == (2, 64, 64, 3) and shown(frames) == [0, 5]
    assert options["do_sample_frames"] is False
    assert options["video_metadata"] == [data[0]["videos"][0].metadata()]
    assert options["video_metadata"][0]["frames_indices"] == [0, 5]
    assert batch["pixel_values_videos"].shape == (1, 2, 64, 64, 3)
    video_id = processor.tokenizer.convert_tokens_to_ids("<video>")
    assert (batch["input_ids"] == video_id).sum(1).tolist() == [2, 0]
    decode = processor.tokenizer.decode
    assert [decode(row[row != IGNORED]) for row in batch["labels"]] == [" yes</s>"] * 2


@needs_av
def test_words_behind_an_answer_are_refused_where_they_move_it(tmp_path):
    """Tokens are found from the end, so words around a later video would shift the labels."""
    film(tmp_path / "a.mp4")
    talk = [turn("human", "hello"), turn("gpt", "yes"), turn("human", "<video> what?"),
            turn("gpt", "no")]  # fmt: skip
    part = part_of(tmp_path / "d.json", [{"conversations": talk, "video": "a.mp4"}], num_frames=2)
    item = load_data([part])[0][0]
    batch = Collator(WithVideos())([item])
    assert new_processor().tokenizer.decode(batch["labels"][0][batch["labels"][0] != IGNORED])
    with pytest.raises(DataError, match="words around pictures or videos behind an answer"):
        Collator(WithVideos("Frame: "))([item])


@pytest.mark.parametrize("family", ["qwen2_5_vl_video", "llava_onevision_video"])
def test_the_arithmetic_of_videos_is_counted(family):
    inputs = families.collate(family, families.samples(family))
    assert speed.forward_flops(families.model(family), inputs)[0] > 0


# --- a run


@needs_av
@pytest.mark.parametrize("plan", [None, "pllava:frames=4:grid=2/2"])
def test_a_run_on_videos(plan, small, tmp_path):
    """Frames in a row, pooled by the plan: half the rows and columns, all frames."""
    for name in ("a", "b"):
        film(tmp_path / f"{name}.mp4", 8)
    entries = [ask("<video> bright?", video=f"{name}.mp4") for name in ("a", "b") * 2]
    part = part_of(tmp_path / "d.json", entries, num_frames=4)
    record = run(recipe_for(small, tmp_path / "run", data=[part.model_dump()], plan=plan))
    assert record["status"] == "complete" and record["skipped"]["pictures"] == 0
    losses = [row["loss"] for row in rows_of(tmp_path / "run") if "loss" in row]
    assert len(losses) == 2 and all(np.isfinite(losses))
