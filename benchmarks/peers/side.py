"""A peer's part of `run.py`, run by the interpreter of an environment that has the peer.

Reads what to do as JSON from stdin and writes what it measured as JSON to the file that the task
names. It knows nothing of mllm: transformers builds the model, the peer is used as its own readme
says, and the unpatched model runs in turn with it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    Qwen2_5_VLConfig,
)

Task = dict[str, Any]
Found = dict[str, Any]


def build(task: Task, attention: str = "sdpa") -> Any:
    """The model of a shape, weights drawn with seed 0, that never ends an answer by itself."""
    torch.manual_seed(0)
    last = task["text"]["vocab_size"] - 1
    if task["family"] == "llava":
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**task["vision"]),
            text_config=LlamaConfig(**task["text"]), image_token_id=last,
        )  # fmt: skip
    else:
        config = Qwen2_5_VLConfig(
            vision_config=task["vision"], text_config=task["text"], image_token_id=last,
            video_token_id=last - 1, vision_start_token_id=last - 2, vision_end_token_id=last - 3,
        )  # fmt: skip
    model = AutoModelForImageTextToText.from_config(
        config, dtype=getattr(torch, task["dtype"]), attn_implementation=attention
    )
    model.generation_config.eos_token_id = None
    return model.to(task["device"]).eval()


def draw(model: Any, task: Task) -> dict[str, torch.Tensor]:
    """Noise pictures, then random words: one sample."""
    vision, visual = task["vision"], task["visual"]
    image = model.config.image_token_id
    ids = torch.randint(3, image - 4, (1, visual + task["words"]))
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if task["family"] == "llava":
        ids[:, 1 : 1 + visual] = image
        tokens = (vision["image_size"] // vision["patch_size"]) ** 2
        size = (visual // tokens, 3, vision["image_size"], vision["image_size"])
        found["pixel_values"] = torch.randn(size).to(model.dtype)
    else:
        ids[:, :visual] = image  # sparsevlm takes the first rows for the visual ones
        side = next(n for n in range(int(visual**0.5), 0, -1) if visual % n == 0)
        found["image_grid_thw"] = torch.tensor([[1, 2 * side, 2 * visual // side]])
        found["pixel_values"] = torch.randn(4 * visual, 3 * 2 * vision["patch_size"] ** 2)
        found["pixel_values"] = found["pixel_values"].to(model.dtype)
        found["mm_token_type_ids"] = (ids == image).int()
    return {name: x.to(task["device"]) for name, x in found.items()}


def timed(task: Task, run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of `run`, and what it gave."""
    cuda = task["device"] != "cpu"
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    found = run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started, found


def in_pairs(
    task: Task, plain: Callable[[], Any], theirs: Callable[[], Any], warmup: int = 2
) -> list[list[float]]:
    """Seconds of both in interleaved pairs whose order alternates."""
    seconds = []
    for pair in range(-warmup, task["pairs"]):
        took = [0.0, 0.0]
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            took[which], _ = timed(task, (plain, theirs)[which])
        if pair >= 0:
            seconds.append(took)
    return seconds


# Caches: decode steps and bytes


def caches(
    task: Task, model: Any, make: Callable[[], Any], press: Callable[[], Any] | None = None
) -> Found:
    """Steps from transformers' plain cache and from the peer's, and what both hold."""
    inputs = draw(model, task)
    length = inputs["input_ids"].shape[1]

    def prefilled(cache: Any, around: Any) -> Any:
        with around:
            model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def fresh() -> Any:
        return prefilled(make(), press() if press else contextlib.nullcontext())

    prefilled(DynamicCache(), contextlib.nullcontext())  # a warm-up
    plain_s, plain = timed(task, lambda: prefilled(DynamicCache(), contextlib.nullcontext()))
    small_s, small = timed(task, fresh)
    held = [bytes_of(cache) for cache in (plain, small)]
    at = {id(plain): length, id(small): length}

    def step(cache: Any) -> None:
        # Positions go on from the whole prompt, whatever the cache has let go.
        where = torch.full((1, 1), at[id(cache)], device=task["device"])
        at[id(cache)] += 1
        more = {"cache_position": where[0]} if task["peer"] == "kvpress" else {}
        model(
            input_ids=torch.full_like(where, 5), position_ids=where, past_key_values=cache,
            use_cache=True, logits_to_keep=1, **more,
        )  # fmt: skip

    seconds = in_pairs(task, lambda: step(plain), lambda: step(small))
    return {"seconds": seconds, "prefill_s": [plain_s, small_s], "kv_bytes": held}


def bytes_of(value: Any, seen: set[int] | None = None) -> int:
    """Bytes of the tensors that a cache holds, however they are packed; each storage once."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        names = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else ()
        if names:
            return sum(bytes_of(getattr(value, name), seen) for name in names)
        storage = value.untyped_storage()
        if storage.data_ptr() in seen:
            return 0
        seen.add(storage.data_ptr())
        return storage.nbytes()
    if isinstance(value, dict):
        return sum(bytes_of(x, seen) for x in value.values())
    if isinstance(value, list | tuple):
        return sum(bytes_of(x, seen) for x in value)
    ours = type(value).__module__.startswith(("transformers.cache_utils", "optimum", "hqq"))
    return bytes_of(vars(value), seen) if ours and hasattr(value, "__dict__") else 0


def kvpress(task: Task) -> Found:
    from kvpress import SnapKVPress

    model = build(task)
    press = SnapKVPress(
        compression_ratio=1 - task["budget"], window_size=task["window"], kernel_size=task["kernel"]
    )
    return caches(task, model, DynamicCache, lambda: press(model))


def quantised(task: Task) -> Found:
    """transformers' own quantised cache, by the backend that the peer is named after."""
    from transformers import QuantizedCache

    model, more = build(task), {}
    if task["peer"] != "fp8":
        more = {"nbits": task["bits"], "q_group_size": task["group"],
                "residual_length": task["residual"]}  # fmt: skip
    if task["peer"] == "hqq":
        more |= {"axis_key": 1, "axis_value": 1}
    return caches(task, model, lambda: QuantizedCache(task["peer"], model.config, **more))


# Whole forwards, and whole answers


def compiled(task: Task) -> Found:
    """The unpatched model with its decoder layers and tower blocks compiled, prefill."""
    plain, fast = build(task), build(task)
    fast.load_state_dict(plain.state_dict(), assign=True)
    blocks = [m for m in fast.modules() if "DecoderLayer" in type(m).__name__
              or "EncoderLayer" in type(m).__name__]  # fmt: skip
    for block in blocks:
        block.forward = torch.compile(block.forward)
    inputs = draw(plain, task)

    def run(model: Any) -> Any:
        return model(**inputs, use_cache=True, logits_to_keep=1).logits

    compile_s, logits = timed(task, lambda: run(fast))
    close = float((logits - run(plain)).float().abs().max())
    seconds = in_pairs(task, lambda: run(plain), lambda: run(fast))
    return {"seconds": seconds, "compile_s": compile_s, "largest_difference": close}


def sparsevlm(task: Task) -> Found:
    """`sparsevlm_generate` against `generate` of the same model under sdpa: whole answers."""
    import sparsevlm as package

    plain, eager = build(task), build(task, "eager")  # its scores need eager attention
    eager.load_state_dict(plain.state_dict(), assign=True)
    inputs, new = draw(plain, task), task["new"]

    def theirs() -> Any:
        return package.sparsevlm_generate(
            eager, None, dict(inputs), n_vis=task["visual"], keep_n_vis=task["keep"],
            max_new_tokens=new, device=task["device"],
        )  # fmt: skip

    def ours() -> Any:
        return plain.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)

    answer = theirs()
    if answer.shape[1] < new:
        raise SystemExit(f"{answer.shape[1]} tokens instead of {new}")
    seconds = in_pairs(task, ours, theirs)
    # Its other entry: hooks on decoder layers that let tokens leave in the prefill.
    state = package.apply_sparsevlm(eager, n_vis=task["visual"], min_keep=1)
    cache = eager(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    package.remove_hooks(state)
    slots = [layer.keys.shape[2] for layer in cache.layers]
    return {"seconds": seconds, "hooks_slots": [max(slots), min(slots)]}


PEERS = {
    "kvpress": kvpress, "quanto": quantised, "hqq": quantised, "fp8": quantised,
    "compile": compiled, "sparsevlm": sparsevlm,
}  # fmt: skip
PACKAGES = {"quanto": "optimum-quanto", **{name: name for name in ("hqq", "kvpress", "sparsevlm")}}


def main() -> None:
    task = json.load(sys.stdin)
    torch.set_num_threads(task["threads"])
    names = ["transformers", "torch"]
    if task["peer"] in PACKAGES:
        names.insert(0, PACKAGES[task["peer"]])
    try:
        versions = {name: version(name) for name in names}
    except PackageNotFoundError as error:
        sys.exit(f"{error.name} is not installed")
    with torch.inference_mode(), contextlib.redirect_stdout(sys.stderr):
        found = PEERS[task["peer"]](task)
    Path(task["output"]).write_text(json.dumps({"versions": versions, **found}))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
