"""Fine-tuning data: LLaVA JSON, chat messages, sources of samples; and their collator."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mllm.errors import DataError
from mllm.eval import sources
from mllm.loading import PLACEHOLDER, chat_content, load_image
from mllm.training.recipe import DataPart
from mllm.yardstick import prompt

IGNORED = -100
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
PICTURE_LENGTH = 576  # visual tokens of a picture, when lengths are compared

Message = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """One conversation, made when it is needed.

    Attributes:
        make: gives (messages, images).
        images: how many pictures it has.
        length: about how many tokens: only the order of lengths matters.
        where: file, number and id, for messages.
        source: number of the part of `data` it is from.
    """

    make: Callable[[], tuple[list[Message], list[Any]]]
    images: int
    length: int
    where: str
    source: int = 0


class Conversations(Dataset):
    """Item `i` is `{"messages": chat messages, "images": PIL images in prompt order}`.

    A conversation whose pictures cannot be read is passed over for the next one, up to the share
    `skip_bad` of those of its source.

    Attributes:
        records: the conversations.
        skip_bad: the share, by source.
        skipped: entries that were left out when the files were read.
        bad: bool `[conversations]`, those whose pictures could not be read; shared by the workers
            of a loader.
    """

    def __init__(
        self,
        records: Sequence[Record],
        skip_bad: Sequence[float] = (0.0,),
        skipped: Sequence[str] = (),
    ) -> None:
        self.records, self.skip_bad, self.skipped = records, skip_bad, list(skipped)
        self.bad = torch.zeros(len(records), dtype=torch.bool).share_memory_()
        self._source = torch.tensor([record.source for record in records])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises DataError when more than the share `skip_bad` cannot be read."""
        for step in range(len(self)):
            place = (index + step) % len(self)
            try:
                messages, images = self.records[place].make()
            except DataError as error:
                self.bad[place] = True
                self._check_share(self.records[place], error)
                continue
            return {"messages": messages, "images": images}
        raise DataError(
            "no conversation has pictures that can be read",
            argument="data",
            expected="readable pictures",
        )

    def _check_share(self, record: Record, error: DataError) -> None:
        mine, share = self._source == record.source, self.skip_bad[record.source]
        bad, all_of_it = int((self.bad & mine).sum()), int(mine.sum())
        if bad > share * all_of_it:
            raise DataError(
                f"{bad} of {all_of_it} conversations of data.{record.source} have pictures that "
                f"cannot be read, and skip_bad={share} allows {int(share * all_of_it)}; "
                f"{record.where}: {error}",
                argument=f"data.{record.source}.skip_bad",
                given=share,
                expected="readable pictures, or a larger share",
            ) from error


def load_data(parts: Sequence[DataPart]) -> tuple[Conversations, list[str]]:
    """All sources of a recipe as one data set, and the SHA-256 of each source.

    Raises:
        DataError: a file or a picture is missing, or an entry is not of the stated format; the
            message names the file and the entry.
    """
    records: list[Record] = []
    digests, skipped = [], []
    for number, part in enumerate(parts):
        if part.path in sources.SOURCES:
            found, digest = _from_source(part)
        else:
            found, left_out, digest = _from_file(part)
            skipped += left_out
        # Weight 0.5 keeps every second record, weight 2 has each twice.
        found = [replace(record, source=number) for record in found]
        wanted = max(1, round(part.weight * len(found)))
        records += [found[int(i / part.weight) % len(found)] for i in range(wanted)]
        digests.append(digest)
    if skipped:
        warnings.warn(f"{len(skipped)} entries are skipped; the first: {skipped[0]}", stacklevel=2)
    return Conversations(records, [part.skip_bad for part in parts], skipped), digests


def _from_source(part: DataPart) -> tuple[list[Record], str]:
    """Records of a source of samples: in turn one of each task, as long as it has more."""
    source = sources.SOURCES[part.path]
    tasks = part.tasks or list(source.tasks)

    def record(task: str, index: int) -> Record:
        def make() -> tuple[list[Message], list[Any]]:
            made = source.make(task, part.split, index, part.style)
            images, text = prompt(made)
            messages = [
                {"role": "user", "content": chat_content(len(images), text)},
                {"role": "assistant", "content": [{"type": "text", "text": made["answer"]}]},
            ]
            return messages, images

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


def _from_file(part: DataPart) -> tuple[list[Record], list[str], str]:
    """Records, what is wrong with the entries that were skipped, and the hash of the file."""
    path = Path(part.path)
    try:
        entries, digest = _read(path, part.split)
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read the data file {path}: {error}",
            argument="data.path",
            given=path,
            expected="a JSON list, JSON Lines or parquet file, or a folder that datasets has saved",
        ) from error
    if not len(entries):
        raise _bad(path, "the file", "is not a non-empty list")
    root = Path(part.image_root) if part.image_root else path if path.is_dir() else path.parent
    convert = _from_llava if part.format == "llava" else _from_messages
    records: list[Record] = []
    skipped: list[str] = []
    number = 0
    for number, entry in enumerate(_first(entries, part.limit)):
        try:
            if isinstance(entry, ValueError):
                raise _bad(path, f"entry {number}", f"is no JSON ({entry})") from entry
            if not isinstance(entry, dict):
                raise _bad(path, f"entry {number}", "is not an object")
            named = entry.get("id") is not None
            where = f"entry {number} (id {entry['id']!r})" if named else f"entry {number}"
            records.append(_stored(path, where, root, *convert(path, where, entry)))
        except DataError as error:
            skipped.append(str(error))
            if not part.skip_bad:
                raise
    if len(skipped) > part.skip_bad * (number + 1):
        raise DataError(
            f"{path}: {len(skipped)} of {number + 1} entries cannot be used, more than the share "
            f"skip_bad={part.skip_bad}; the first: {skipped[0]}",
            argument="data.skip_bad",
            given=part.skip_bad,
            expected="entries that are whole, or a larger share",
        )
    return records, skipped, digest


def _first(entries: Any, limit: int | None) -> Iterator[Any]:
    for index in range(min(len(entries), limit or len(entries))):
        yield entries[index]


def _read(path: Path, split: str) -> tuple[Any, str]:
    """Entries that can be indexed, and the hash of what they were read from."""
    if path.is_dir() or path.suffix == ".parquet":
        return _read_arrow(path, split)
    raw = path.read_bytes()
    text = raw.decode("utf-8")
    if path.suffix == ".jsonl":
        entries: Any = [_json(line) for line in text.splitlines() if line.strip()]
    else:
        entries = json.loads(text)
    if not isinstance(entries, list):
        raise ValueError("it holds no list")
    return entries, hashlib.sha256(raw).hexdigest()


def _json(line: str) -> Any:
    """The value of one line, or the error: one torn line is one bad entry."""
    try:
        return json.loads(line)
    except ValueError as error:
        return error


class _Rows:
    """Rows of an Arrow table or data set as dictionaries, read when asked; pictures as bytes."""

    def __init__(self, table: Any, take: Callable[[int], Any]) -> None:
        self._table, self._take = table, take

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._take(index).to_pylist()[0]


def _read_arrow(path: Path, split: str) -> tuple[Any, str]:
    """A parquet file, a folder of them, or what `save_to_disk` wrote."""
    try:
        import datasets
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("parquet and datasets folders need `pip install datasets`") from error

    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(file.read_bytes())
    parquet = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    parquet = [file for file in parquet if split in file.name] or parquet
    if parquet:
        tables = [pyarrow.parquet.read_table(file, memory_map=True) for file in parquet]
        table = pyarrow.concat_tables(tables)
        return _Rows(table, lambda index: table.slice(index, 1)), digest.hexdigest()
    found = datasets.load_from_disk(str(path))
    if isinstance(found, datasets.DatasetDict):
        names = {"train": ["train"], "dev": ["dev", "validation"]}[split]
        name = next((name for name in names if name in found), None)
        if name is None:
            raise ValueError(f"it has the splits {', '.join(found)}, none of {names}")
        found = found[name]
    raw = found.with_format("arrow")  # undecoded, and without files of its own in the folder
    return _Rows(raw, lambda index: raw[index]), digest.hexdigest()


def _bad(path: Path, where: str, what: str) -> DataError:
    return DataError(
        f"{path}: {where} {what}",
        argument="data.path",
        given=path,
        expected="LLaVA JSON: [{id, image, conversations: [{from, value}]}]; or messages",
    )


def _unknown_role(name: Any) -> str:
    return f"has a turn from {name!r}: roles are {', '.join(ROLES)}"


def _from_llava(path: Path, where: str, entry: dict) -> tuple[list[Message], list[Any]]:
    if entry.get("video"):
        raise _bad(path, where, "has a video: training takes pictures")
    found = entry.get("image") or []
    names = list(found) if isinstance(found, list | tuple) else [found]
    messages = []
    try:
        for turn in entry["conversations"]:
            if turn["from"] not in ROLES:
                raise _bad(path, where, _unknown_role(turn["from"]))
            content: list[dict[str, str]] = []
            for i, piece in enumerate(turn["value"].split(PLACEHOLDER)):
                if i:
                    content.append({"type": "image"})
                if piece.strip():
                    content.append({"type": "text", "text": piece.strip()})
            messages.append({"role": ROLES[turn["from"]], "content": content})
    except (KeyError, TypeError, AttributeError) as error:
        raise _bad(path, where, f"has no valid conversations ({error!r})") from error
    return messages, names


def _from_messages(path: Path, where: str, entry: dict) -> tuple[list[Message], list[Any]]:
    messages, names = [], list(entry.get("images") or [])
    try:
        for turn in entry["messages"]:
            if turn["role"] not in ROLES:
                raise _bad(path, where, _unknown_role(turn["role"]))
            content = turn["content"]
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            for piece in content:
                if piece["type"] == "image" and piece.get("image") is not None:
                    names.append(piece["image"])
            kept = []
            for piece in content:
                if piece["type"] not in ("text", "image"):
                    what = f"has a part of type {piece['type']!r}, not text or image"
                    raise _bad(path, where, what)
                kept.append({k: piece[k] for k in ("type", "text") if piece.get(k) is not None})
            messages.append({"role": ROLES[turn["role"]], "content": kept})
    except (KeyError, TypeError, AttributeError) as error:
        raise _bad(path, where, f"has no valid messages ({error!r})") from error
    return messages, names


def _stored(
    path: Path, where: str, root: Path, messages: list[Message], names: list[Any]
) -> Record:
    """Check one entry now; read its pictures later."""
    pieces = [piece for turn in messages for piece in turn["content"]]
    holes = sum(piece["type"] == "image" for piece in pieces)
    if holes != len(names):
        raise _bad(path, where, f"has {holes} image placeholders for {len(names)} images")
    answers = [
        piece.get("text", "").strip()
        for turn in messages
        if turn["role"] == "assistant"
        for piece in turn["content"]
    ]
    if not any(answers):
        raise _bad(path, where, "has no answer to learn")
    for name in names:
        if isinstance(name, str) and not (root / name).is_file():
            raise _bad(path, where, f"names the image {root / name}, which does not exist")
    text = sum(len(piece["text"]) for piece in pieces if piece["type"] == "text")
    return Record(
        lambda: (messages, [_picture(name, root) for name in names]),
        images=len(names),
        length=text // 4 + PICTURE_LENGTH * len(names),
        where=f"{path}: {where}",
    )


def _picture(name: Any, root: Path) -> Any:
    """A picture by its file name, or with its bytes, as `datasets` stores it."""
    if isinstance(name, dict):
        stored = name.get("bytes")
        return load_image(root / str(name.get("path")) if stored is None else io.BytesIO(stored))
    return load_image(root / name)


class Collator:
    """Batches conversations; labels stand only on the answers (and the end token after them).

    Padding is on the right: positions of a plain forward count from the left edge.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, `labels` `[B, T]` int64, and `pixel_values`."""
        tokenizer = self.processor.tokenizer
        texts, learnt = zip(*(self._render(item["messages"]) for item in items), strict=True)
        images = [image for item in items for image in item["images"]]
        batch = self.processor(
            text=list(texts),
            images=images or None,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        labels = torch.full_like(batch["input_ids"], IGNORED)
        image_id = tokenizer.convert_tokens_to_ids(self.processor.image_token)
        for row, (text, spans) in enumerate(zip(texts, learnt, strict=True)):
            # The processor repeats only the image token, so all other tokens are those of the text.
            plain = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
            answer = torch.tensor(
                [
                    any(begin < high and end > low for low, high in spans)
                    for token, (begin, end) in zip(
                        plain["input_ids"], plain["offset_mapping"], strict=True
                    )
                    if token != image_id
                ]
            )
            real = (batch["input_ids"][row] != image_id) & (batch["attention_mask"][row] == 1)
            places = real.nonzero()[:, 0][-len(answer) :]
            labels[row, places[answer]] = batch["input_ids"][row, places[answer]]
        return {**batch, "labels": labels}

    def _render(self, messages: list[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and the character spans of the answers."""
        render = self.processor.apply_chat_template
        spans = []
        text = ""
        for i, message in enumerate(messages):
            before = render(messages[:i], add_generation_prompt=True) if i else ""
            text = render(messages[: i + 1])
            if message["role"] == "assistant":
                if not text.startswith(before):
                    raise DataError(
                        "the chat template rewrites earlier turns, so answers cannot be found",
                        argument="model.path",
                        expected="a processor whose chat template only appends",
                    )
                spans.append((len(before), len(text)))
        end = self.processor.tokenizer.eos_token or ""
        if messages[-1]["role"] == "assistant" and not text.rstrip().endswith(end):
            text += end
            spans[-1] = (spans[-1][0], len(text))
        return text, spans
