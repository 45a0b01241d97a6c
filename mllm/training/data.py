"""Fine-tuning data: LLaVA JSON, chat messages, sources of samples; and their collator."""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import re
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mllm.errors import DataError
from mllm.eval import sources
from mllm.loading import PLACEHOLDER, chat_content, chat_text, load_image, process
from mllm.training.reading import read
from mllm.training.schema import DataPart
from mllm.training.video import Clip, check_decoder, read_clip
from mllm.views import with_tiles
from mllm.yardstick import prompt

IGNORED = -100
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
HOLES = {PLACEHOLDER: "image", "<video>": "video"}  # of LLaVA JSON
HOLE = re.compile(f"({'|'.join(HOLES)})")
PICTURE_LENGTH = 576  # visual tokens of a picture, when lengths are compared
PEEK = 1000  # entries of a streamed source that are looked at before training
# The few drawn videos that ship with mllm, for recipes in small.
CLIPS = "tiny-clips"

Message = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """One conversation, made when it is needed.

    Attributes:
        make: gives the item of `Conversations`.
        images: how many pictures it has.
        length: about how many tokens: only the order of lengths matters.
        where: file, number and id, for messages.
        videos: how many videos it has.
    """

    make: Callable[[], dict[str, Any]]
    images: int
    length: int
    where: str
    videos: int = 0

    @property
    def seen(self) -> bool:
        """Whether it has anything to see."""
        return self.images + self.videos > 0


class Streamed(Sequence[Record]):
    """Records of a file, each made when it is asked for, which raises DataError if it cannot be.

    Args:
        entries: what the file holds.
        count: how many of them, from the first on.
        convert: number and entry to a record.
    """

    def __init__(
        self, entries: Sequence[Any], count: int, convert: Callable[[int, Any], Record]
    ) -> None:
        self._entries, self._count, self._convert = entries, count, convert

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        if index >= self._count:
            raise IndexError(index)
        return self._convert(index, self._entries[index])


class Mixed(Sequence[Record]):
    """Records of several sources, one source after the other.

    Args:
        parts: records and weight of each: 0.5 keeps every second record, 2 has each twice.
    """

    def __init__(self, parts: Sequence[tuple[Sequence[Record], float]]) -> None:
        self._parts = parts
        sizes = [max(1, round(weight * len(found))) for found, weight in parts]
        self._ends = list(itertools.accumulate(sizes))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Record:
        if index >= len(self):
            raise IndexError(index)
        number = self.source(index)
        found, weight = self._parts[number]
        return found[int((index - self.places(number).start) / weight) % len(found)]

    def source(self, index: int) -> int:
        """The number of the source that a record is from."""
        return bisect_right(self._ends, index)

    def places(self, number: int) -> range:
        """Where the records of a source are."""
        return range(self._ends[number - 1] if number else 0, self._ends[number])

    def streamed(self, number: int) -> bool:
        """Whether the records of a source are made when they are asked for."""
        return isinstance(self._parts[number][0], Streamed)


class Conversations(Dataset):
    """Item `i` is a conversation, its pictures and videos in prompt order.

    `{"messages": chat messages, "images": PIL images, "videos": Clips}`. A conversation that
    cannot be read is passed over for the next one, up to the share `skip_bad` of its source.

    Attributes:
        records: the conversations.
        skip_bad: the share, by source.
        skipped: entries that were left out when the files were read.
        bad: bool `[conversations]`, those that could not be read; shared by the workers of a
            loader.
        streamed: whether some of them are not known before they are read.
    """

    def __init__(
        self, records: Mixed, skip_bad: Sequence[float] = (0.0,), skipped: Sequence[str] = ()
    ) -> None:
        self.records, self.skip_bad, self.skipped = records, skip_bad, list(skipped)
        self.bad = torch.zeros(len(records), dtype=torch.bool).share_memory_()
        self.streamed = any(records.streamed(number) for number in range(len(skip_bad)))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises DataError when more than the share `skip_bad` cannot be read."""
        for step in range(len(self)):
            place = (index + step) % len(self)
            try:
                return self.records[place].make()
            except DataError as error:
                self._passed_over(place, error)
        raise DataError(
            "no conversation can be read, with its pictures and videos",
            argument="data",
            expected="readable entries, pictures and videos",
        )

    def _passed_over(self, place: int, error: DataError) -> None:
        self.bad[place] = True
        number = self.records.source(place)
        mine, share = self.records.places(number), self.skip_bad[number]
        bad, all_of_it = int(self.bad[mine.start : mine.stop].sum()), len(mine)
        if bad > share * all_of_it:
            raise DataError(
                f"{bad} of {all_of_it} conversations of data.{number} cannot be read, and "
                f"skip_bad={share} allows {int(share * all_of_it)}; {error}",
                argument=f"data.{number}.skip_bad",
                given=share,
                expected="entries, pictures and videos that can be read, or a larger share",
            ) from error

    @functools.cached_property
    def sizes(self) -> tuple[list[int], list[bool]]:
        """Length of every conversation, and whether it has anything to see.

        Streamed ones are parsed for it, one after the other; those that cannot be are passed over.

        Raises:
            DataError: more than the share `skip_bad` cannot be read.
        """
        lengths, seen = [0] * len(self), [False] * len(self)
        for place in range(len(self)):
            try:
                record = self.records[place]
            except DataError as error:
                self._passed_over(place, error)
                continue
            lengths[place], seen[place] = record.length, record.seen
        return lengths, seen

    def sample(self) -> Iterator[Record]:
        """Records that stand for all: of a streamed source the first :data:`PEEK`."""
        for number in range(len(self.skip_bad)):
            places = self.records.places(number)
            for place in places[:PEEK] if self.records.streamed(number) else places:
                try:
                    yield self.records[place]
                except DataError as error:
                    self._passed_over(place, error)


def load_data(parts: Sequence[DataPart]) -> tuple[Conversations, list[str]]:
    """All sources of a recipe as one data set, and the SHA-256 of each source.

    Raises:
        DataError: a file or a picture is missing, or an entry is not of the stated format; the
            message names the file and the entry. There are videos, and no PyAV.
    """
    found: list[tuple[Sequence[Record], float]] = []
    digests, skipped = [], []
    for part in parts:
        if part.path in sources.SOURCES:
            records, digest = _from_source(part)
        else:
            records, left_out, digest = _from_file(part)
            skipped += left_out
        found.append((records, part.weight))
        digests.append(digest)
    if skipped:
        warnings.warn(f"{len(skipped)} entries are skipped; the first: {skipped[0]}", stacklevel=2)
    data = Conversations(Mixed(found), [part.skip_bad for part in parts], skipped)
    if any(record.videos for record in data.sample()):
        check_decoder()
    return data, digests


def _from_source(part: DataPart) -> tuple[list[Record], str]:
    """Records of a source of samples: in turn one of each task, as long as it has more."""
    source = sources.SOURCES[part.path]
    tasks = part.tasks or list(source.tasks)

    def record(task: str, index: int) -> Record:
        def make() -> dict[str, Any]:
            made = source.make(task, part.split, index, part.style)
            images, text = prompt(made)
            messages = [
                {"role": "user", "content": chat_content(len(images), text)},
                {"role": "assistant", "content": [{"type": "text", "text": made["answer"]}]},
            ]
            return {"messages": messages, "images": images, "videos": []}

        return Record(make, 1, PICTURE_LENGTH, f"{part.path} {task} {index}")

    sizes = {task: _limited(sources.size(task, part.split), part.limit) for task in tasks}
    described = [part.split, part.style, tasks, part.limit, source.digest(part.split)]
    records = [
        record(task, index)
        for index in range(max(sizes.values()))
        for task in tasks
        if index < sizes[task]
    ]
    return records, hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _limited(size: int | None, limit: int | None) -> int:
    """The smaller of what there is and what is wanted; recipes give a limit where needed."""
    return min(value for value in (size, limit) if value is not None)


def _from_file(part: DataPart) -> tuple[Sequence[Record], list[str], str]:
    """Records, what is wrong with the entries that were skipped, and the hash of the file."""
    path = Path(part.path)
    if part.path == CLIPS:
        path = Path(__file__).parents[1] / "assets" / "tiny_clips" / "clips.json"
    try:
        entries, digest = read(path, part.split, part.streaming)
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read the data file {path}: {error}",
            argument="data.path",
            given=path,
            expected="a JSON list, JSON Lines or parquet file, or a folder that datasets has saved",
        ) from error
    if not len(entries):
        raise _bad(path, "the file", "is not a non-empty list")
    count = min(len(entries), part.limit or len(entries))
    if part.streaming:
        return Streamed(entries, count, functools.partial(_record, part, path)), [], digest
    records: list[Record] = []
    skipped: list[str] = []
    for number in range(count):
        try:
            records.append(_record(part, path, number, entries[number]))
        except DataError as error:
            skipped.append(str(error))
            if not part.skip_bad:
                raise
    if len(skipped) > part.skip_bad * count:
        raise DataError(
            f"{path}: {len(skipped)} of {count} entries cannot be used, more than the "
            f"share skip_bad={part.skip_bad}; the first: {skipped[0]}",
            argument="data.skip_bad",
            given=part.skip_bad,
            expected="entries that are whole, or a larger share",
        )
    return records, skipped, digest


def _bad(path: Path, where: str, what: str) -> DataError:
    return DataError(
        f"{path}: {where} {what}",
        argument="data.path",
        given=path,
        expected="LLaVA JSON: [{id, image, conversations: [{from, value}]}]; or messages",
    )


def _unknown_role(name: Any) -> str:
    return f"has a turn from {name!r}: roles are {', '.join(ROLES)}"


def _record(part: DataPart, path: Path, number: int, entry: Any) -> Record:
    """Check one entry now; read its pictures and videos later.

    Raises:
        DataError: it is not of the stated format, or names a file that does not exist.
    """
    where = f"entry {number}"
    if isinstance(entry, ValueError):
        raise _bad(path, where, f"is no JSON ({entry})") from entry
    if not isinstance(entry, dict):
        raise _bad(path, where, "is not an object")
    if entry.get("id") is not None:
        where = f"{where} (id {entry['id']!r})"
    convert = _from_llava if part.format == "llava" else _from_messages
    messages, names = convert(path, where, entry)
    pieces = [piece for turn in messages for piece in turn["content"]]
    root = Path(part.image_root) if part.image_root else path if path.is_dir() else path.parent
    for kind, given in names.items():
        holes = sum(piece["type"] == kind for piece in pieces)
        if holes != len(given):
            raise _bad(path, where, f"has {holes} {kind} placeholders for {len(given)} {kind}s")
        for name in given:
            if isinstance(name, str) and not (root / name).is_file():
                raise _bad(path, where, f"names the {kind} {root / name}, which does not exist")
    answers = [
        piece.get("text", "").strip()
        for turn in messages
        if turn["role"] == "assistant"
        for piece in turn["content"]
    ]
    if not any(answers):
        raise _bad(path, where, "has no answer to learn")
    whole = f"{path}: {where}"

    def make() -> dict[str, Any]:
        try:
            images = [_picture(name, root) for name in names["image"]]
            videos = [_clip(name, root, part.num_frames) for name in names["video"]]
        except DataError as error:
            told = {"argument": error.argument, "given": error.given, "expected": error.expected}
            raise DataError(f"{whole}: {error}", **told) from error
        return {"messages": messages, "images": images, "videos": videos}

    text = sum(len(piece.get("text", "")) for piece in pieces)
    images, videos = len(names["image"]), len(names["video"])
    length = text // 4 + PICTURE_LENGTH * (images + part.num_frames * videos)
    return Record(make, images, length, whole, videos)


def _listed(given: Any) -> list[Any]:
    """Nothing, one name or several, as a list."""
    if isinstance(given, list | tuple):
        return list(given)
    return [given] if given else []


def _from_llava(path: Path, where: str, entry: dict) -> tuple[list[Message], dict[str, list[Any]]]:
    """Messages, and the names of pictures and videos by kind."""
    names = {kind: _listed(entry.get(kind)) for kind in HOLES.values()}
    messages = []
    try:
        for turn in entry["conversations"]:
            if turn["from"] not in ROLES:
                raise _bad(path, where, _unknown_role(turn["from"]))
            content: list[dict[str, str]] = []
            for piece in HOLE.split(turn["value"]):
                if piece in HOLES:
                    content.append({"type": HOLES[piece]})
                elif piece.strip():
                    content.append({"type": "text", "text": piece.strip()})
            messages.append({"role": ROLES[turn["from"]], "content": content})
    except (KeyError, TypeError, AttributeError) as error:
        raise _bad(path, where, f"has no valid conversations ({error!r})") from error
    return messages, names


def _from_messages(
    path: Path, where: str, entry: dict
) -> tuple[list[Message], dict[str, list[Any]]]:
    """Messages, and the names of pictures and videos by kind."""
    names = {kind: _listed(entry.get(f"{kind}s")) for kind in HOLES.values()}
    messages = []
    try:
        for turn in entry["messages"]:
            if turn["role"] not in ROLES:
                raise _bad(path, where, _unknown_role(turn["role"]))
            content = turn["content"]
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            kept = []
            for piece in content:
                kind = piece["type"]
                if kind not in ("text", *names):
                    what = f"has a part of type {kind!r}, not text, image or video"
                    raise _bad(path, where, what)
                if kind in names:
                    name = piece.get(kind)
                    name = piece.get("path") if name is None else name
                    names[kind] += [] if name is None else [name]
                kept.append({k: piece[k] for k in ("type", "text") if piece.get(k) is not None})
            messages.append({"role": ROLES[turn["role"]], "content": kept})
    except (KeyError, TypeError, AttributeError) as error:
        raise _bad(path, where, f"has no valid messages ({error!r})") from error
    return messages, names


def _picture(name: Any, root: Path) -> Any:
    """A picture by its file name, or with its bytes, as `datasets` stores it."""
    if isinstance(name, dict):
        stored = name.get("bytes")
        return load_image(root / str(name.get("path")) if stored is None else io.BytesIO(stored))
    return load_image(root / name)


def _clip(name: Any, root: Path, frames: int) -> Clip:
    """Frames of a video by its file name, or with its bytes, as `datasets` stores it."""
    if isinstance(name, dict):
        file, stored = root / str(name.get("path")), name.get("bytes")
        return read_clip(file if stored is None else stored, frames, str(name.get("path")))
    return read_clip(root / name, frames, str(root / name))


def _as_pictures(item: dict[str, Any]) -> dict[str, Any]:
    """The item with the frames of its videos as pictures in a row."""
    images, videos = iter(item["images"]), iter(item.get("videos", ()))
    messages, found = [], []
    for turn in item["messages"]:
        content = []
        for piece in turn["content"]:
            if piece["type"] == "video":
                frames = next(videos).frames
                content += [{"type": "image"}] * len(frames)
                found += frames
                continue
            if piece["type"] == "image":
                found.append(next(images))
            content.append(piece)
        messages.append({**turn, "content": content})
    return {"messages": messages, "images": found}


def _blank() -> dict[str, Any]:
    """A conversation about a black picture."""
    said = {"user": [{"type": "image"}, {"type": "text", "text": "?"}],
            "assistant": [{"type": "text", "text": "."}]}  # fmt: skip
    messages = [{"role": role, "content": content} for role, content in said.items()]
    return {"messages": messages, "images": [Image.new("RGB", (224, 224))], "videos": []}


class Collator:
    """Batches conversations; labels stand only on the answers (and the end token after them).

    Padding is on the right: positions of a plain forward count from the left edge. Videos go
    through the processor's own part for videos, or, where it has none, as pictures in a row, as in
    PLLaVA (arXiv:2404.16994).

    Attributes:
        tiles: rows and columns of tiles that pictures come with (:mod:`mllm.views`); None is none.
        pictured: whether a batch of text alone gets one more row, a black picture with nothing to
            learn: where processes wait for each other at a tower, all of them have to use it.
    """

    tiles: tuple[int, int] | None = None
    pictured: bool = False

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        video = getattr(processor, "video_token", None)
        self._videos = bool(video and getattr(processor, "video_processor", None))
        tokens = [processor.image_token, *([video] if self._videos else [])]
        found = processor.tokenizer.convert_tokens_to_ids(tokens)
        self._holes = torch.tensor([number for number in found if number is not None])

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, `labels` `[B, T]` int64, and `pixel_values`.

        Raises:
            DataError: the processor writes words around what stands behind an answer, so that the
                tokens of answers cannot be found.
        """
        tokenizer, count = self.processor.tokenizer, len(items)
        if self.pictured and not any(item["images"] or item.get("videos") for item in items):
            items = [*items, _blank()]
        if not self._videos:
            items = [_as_pictures(item) for item in items]
        texts, learnt = zip(*(self._render(item["messages"]) for item in items), strict=True)
        images = [image for item in items for image in item["images"]]
        batch = process(
            self.processor,
            list(texts),
            [item["images"] for item in items],
            padding_side="right",
            **self._clips([clip for item in items for clip in item.get("videos", ())]),
        )
        batch = with_tiles(batch, self.processor, images, self.tiles)
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for row, (text, spans) in enumerate(zip(texts, learnt, strict=True)):
            # The processor repeats only placeholders, so all other tokens are those of the text.
            plain = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
            tokens = torch.tensor(plain["input_ids"])
            answer = torch.tensor(
                [
                    # One that ends behind an answer is not its: in LLaVA-1.5's template " USER"
                    # begins with the answer's last space.
                    any(low < end <= high for low, high in spans)
                    for _, end in plain["offset_mapping"]
                ]
            )
            words = ~torch.isin(tokens, self._holes)
            tokens, answer = tokens[words], answer[words]
            given = batch["input_ids"][row]
            real = ~torch.isin(given, self._holes) & (batch["attention_mask"][row] == 1)
            places = real.nonzero()[:, 0][-len(answer) :]
            if len(places) < len(answer) or not torch.equal(given[places[answer]], tokens[answer]):
                raise DataError(
                    "the processor writes words around pictures or videos behind an answer, so "
                    f"answers cannot be found in {text[:80]!r}...",
                    argument="data",
                    given=text,
                    expected="conversations that show everything before the first answer",
                )
            labels[row, places[answer]] = given[places[answer]]
        labels[count:] = IGNORED
        return {**batch, "labels": labels}

    def _clips(self, clips: list[Clip]) -> dict[str, Any]:
        """Arguments of the processor for videos whose frames are chosen."""
        if not clips:
            return {}
        options = {"do_sample_frames": False, "video_metadata": [c.metadata() for c in clips]}
        frames = [np.stack([np.asarray(frame) for frame in clip.frames]) for clip in clips]
        return {"videos": frames, "videos_kwargs": options}

    def _render(self, messages: list[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and the character spans of the answers."""
        grown, spans = [], []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before = chat_text(self.processor, messages[:i]) if i else ""
                grown += [before, chat_text(self.processor, messages[: i + 1], generate=False)]
                spans.append((len(before), len(grown[-1])))
        answered = messages[-1]["role"] == "assistant"
        text = grown[-1] if answered else chat_text(self.processor, messages, generate=False)
        if not all(text.startswith(earlier) for earlier in grown):
            raise DataError(
                "the chat template rewrites earlier turns, so answers cannot be found",
                argument="model.path",
                expected="a processor whose chat template only appends, or one answer in each "
                "conversation",
            )
        end = self.processor.tokenizer.eos_token or ""
        if answered and not text.rstrip().endswith(end):
            text += end
            spans[-1] = (spans[-1][0], len(text))
        return text, spans
