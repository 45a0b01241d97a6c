"""Fine-tuning data: LLaVA JSON, chat messages, sources of samples; and their collator."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
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
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}

Message = dict[str, Any]
# A record is made when it is needed: (messages, images).
Record = Callable[[], tuple[list[Message], list[Any]]]


class Conversations(Dataset):
    """Item `i` is `{"messages": chat messages, "images": PIL images in prompt order}`."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        messages, images = self.records[index]()
        return {"messages": messages, "images": images}


def load_data(parts: Sequence[DataPart]) -> tuple[Conversations, list[str]]:
    """All sources of a recipe as one data set, and the SHA-256 of each source.

    Raises:
        DataError: a file or a picture is missing, or an entry is not of the stated format; the
            message names the file and the entry.
    """
    records: list[Record] = []
    digests = []
    for part in parts:
        found, digest = _from_source(part) if part.path in sources.SOURCES else _from_file(part)
        # Weight 0.5 keeps every second record, weight 2 has each twice.
        wanted = max(1, round(part.weight * len(found)))
        records += [found[int(i / part.weight) % len(found)] for i in range(wanted)]
        digests.append(digest)
    return Conversations(records), digests


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

        return make

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


def _from_file(part: DataPart) -> tuple[list[Record], str]:
    path = Path(part.path)
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8")
        if path.suffix == ".jsonl":
            entries = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            entries = json.loads(text)
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read the data file {path}: {error}",
            argument="data.path",
            given=path,
            expected="a JSON list or JSON Lines file",
        ) from error
    if not isinstance(entries, list) or not entries:
        raise _bad(path, "the file", "is not a non-empty list")
    root = Path(part.image_root) if part.image_root else path.parent
    convert = _from_llava if part.format == "llava" else _from_messages
    records = []
    for number, entry in enumerate(entries[: part.limit]):
        if not isinstance(entry, dict):
            raise _bad(path, f"entry {number}", "is not an object")
        where = f"entry {number} (id {entry['id']!r})" if "id" in entry else f"entry {number}"
        records.append(_stored(path, where, root, *convert(path, where, entry)))
    return records, hashlib.sha256(raw).hexdigest()


def _bad(path: Path, where: str, what: str) -> DataError:
    return DataError(
        f"{path}: {where} {what}",
        argument="data.path",
        given=path,
        expected="LLaVA JSON: [{id, image, conversations: [{from, value}]}]; or messages",
    )


def _from_llava(path: Path, where: str, entry: dict) -> tuple[list[Message], list[str]]:
    names = entry.get("image") or []
    names = [names] if isinstance(names, str) else list(names)
    messages = []
    try:
        for turn in entry["conversations"]:
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


def _from_messages(path: Path, where: str, entry: dict) -> tuple[list[Message], list[str]]:
    messages, names = [], list(entry.get("images") or [])
    try:
        for turn in entry["messages"]:
            content = turn["content"]
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            for piece in content:
                if piece["type"] == "image" and "image" in piece:
                    names.append(piece["image"])
            kept = [{k: v for k, v in piece.items() if k in ("type", "text")} for piece in content]
            messages.append({"role": ROLES[turn["role"]], "content": kept})
    except (KeyError, TypeError, AttributeError) as error:
        raise _bad(path, where, f"has no valid messages ({error!r})") from error
    return messages, names


def _stored(
    path: Path, where: str, root: Path, messages: list[Message], names: list[str]
) -> Record:
    """Check one entry now; read its pictures later."""
    holes = sum(piece["type"] == "image" for turn in messages for piece in turn["content"])
    if holes != len(names):
        raise _bad(path, where, f"has {holes} image placeholders for {len(names)} images")
    if not any(turn["role"] == "assistant" for turn in messages):
        raise _bad(path, where, "has no answer to learn")
    pictures = [root / name for name in names]
    for picture in pictures:
        if not picture.is_file():
            raise _bad(path, where, f"names the image {picture}, which does not exist")
    return lambda: (messages, [load_image(picture) for picture in pictures])


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
