"""A cache on disk: read a long prefix once, ask many questions later."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mllm import compat
from mllm.cache.adoption import CacheMark, check_whole
from mllm.cache.landmarks import Landmarked
from mllm.cache.layer import SlotLayer
from mllm.cache.lowrank import LowRank, Shared
from mllm.cache.quantised import Quantised
from mllm.cache.rotary import Rotary
from mllm.cache.segments import Dense, Segment, _headwise, from_rows
from mllm.cache.slots import SlotTable
from mllm.errors import CacheMismatchError, DataError

if TYPE_CHECKING:
    from mllm.patcher import Patched

TENSORS, HEADER = "prefix.safetensors", "prefix.json"
#: Segments that are written in a form of their own.
FORMS = {form.form: form for form in (LowRank, Landmarked, Quantised)}


def save_prefix(cache: Any, folder: str | os.PathLike) -> Path:
    """Write what a patched model stored: ``prefix.safetensors`` and ``prefix.json``.

    An interrupted call leaves no prefix that could be loaded. Segments are written as keys and
    values, unless they have a form of their own (`saved`), in which they come back; what methods
    keep in `KVCache.state` is not written.

    Args:
        cache: `past_key_values` of a forward or `generate()` under a patch.
        folder: made if missing.

    Returns:
        The folder.

    Raises:
        CacheMismatchError: a cache that no patched model has filled, to which an unpatched one has
            added, in which a forward pass broke off, or whose plan goes on doing something that is
            not in it.
    """
    mark = getattr(cache, "mllm", None)
    if mark is None or not cache.get_seq_length():
        raise CacheMismatchError(
            "only a cache that a patched model has filled can be saved",
            argument="cache",
            given=type(cache).__name__,
            expected="past_key_values of a forward or generate() under the patch",
        )
    check_whole(cache)
    if any(cache.mllm.lasting.values()) or mark.pictured is not None:
        raise CacheMismatchError(
            "a plan whose actions last for the conversation cannot be saved with its cache",
            argument="cache",
            given="gates or biases",
            expected="a plan that only lets tokens go",
        )
    shared: dict = {}
    for layer in cache.layers:
        layer.settle(shared)
    tensors: dict[str, Tensor] = {}
    tables = list(dict.fromkeys(layer.table for layer in cache.layers))
    for n, table in enumerate(tables):
        tensors |= {f"slots.{n}.{name}": t for name, t in table.columns.items()}
    layers = []
    names: dict[int, str] = {}
    for i, layer in enumerate(cache.layers):
        tensors |= {f"layer.{i}.shift.{name}": t for name, t in layer.shifts.items()}
        tensors |= {f"layer.{i}.sample.{name}": t for name, t in layer.samples.items()}
        layers.append(
            {
                "slots": tables.index(layer.table),
                "parts": _parts(i, layer, tensors, names),
                "heads": layer.heads,
                "window": layer.window,
                "intact": int(layer.intact),
                "compressed": layer.compressed,
            }
        )
    tensors |= {f"carried.{name}": t for name, t in mark.carried.items()}
    header = {
        "config_sha256": mark.config_sha256,
        "plan_sha256": mark.plan_sha256,
        "dtype": str(cache.layers[0].dtype).removeprefix("torch."),
        "logical_length": cache.get_seq_length(),
        "layers": layers,
    }
    text = json.dumps(header, indent=2) + "\n"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # The tensors name the header that they belong to, so that a mixture of two calls is noticed.
    whole = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    temporary = folder / (TENSORS + ".tmp")
    save_file(whole, temporary, metadata={"header_sha256": _sha256(text)})
    temporary.replace(folder / TENSORS)
    temporary = folder / (HEADER + ".tmp")
    temporary.write_text(text)
    temporary.replace(folder / HEADER)
    return folder


def _parts(
    i: int, layer: SlotLayer, tensors: dict[str, Tensor], names: dict[int, str]
) -> list[dict[str, Any]]:
    """The segments of layer `i`; adds to `tensors` what no earlier layer shares with it.

    Args:
        i: number of the layer.
        layer: the layer.
        tensors: what is written, by name.
        names: the name of every tensor of a segment that is.
    """
    rows, at = [], 0
    for n, segment in enumerate(layer.segments):
        if form := getattr(segment, "form", None):
            row, own = segment.saved()
        else:
            row = {"slots": segment.slots}
            own = {"keys": segment.keys(), "values": segment.values()}
            form = "rectangle" if isinstance(segment, Dense) else "cells"
            if form == "cells":
                valid = _headwise(layer.table.valid[..., at : at + segment.slots], layer.heads)
                own = {name: t[valid] for name, t in own.items()}
        at += segment.slots
        for name, tensor in own.items():
            names.setdefault(id(tensor), f"layer.{i}.{n}.{name}")
            tensors[names[id(tensor)]] = tensor
        where = {name: names[id(tensor)] for name, tensor in own.items()}
        rows.append({"form": form, **row, "tensors": where})
    return rows


def load_prefix(
    folder: str | os.PathLike, patched: Patched, device: str | torch.device | None = None
) -> Any:
    """A cache to go on from, as `past_key_values` of the patched model.

    Every conversation changes its cache: load it again for the next question, `copy.deepcopy` it,
    or take a :meth:`~mllm.cache.KVCache.snapshot` and roll back.

    Args:
        folder: written by :func:`save_prefix`.
        patched: the patched model that goes on.
        device: where keys and values go; None is the model's device.

    Returns:
        A DynamicCache.

    Raises:
        CacheMismatchError: a prefix of another model, plan or dtype.
        DataError: no prefix there, or a damaged one.
    """
    folder = Path(folder)
    try:
        text = (folder / HEADER).read_text()
        header = json.loads(text)
        with safe_open(folder / TENSORS, "pt") as file:
            whole = (file.metadata() or {}).get("header_sha256") == _sha256(text)
            tensors = {name: file.get_tensor(name) for name in file.keys()} if whole else {}
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise _damaged(folder, str(error)) from error
    if not tensors:
        raise _damaged(folder, f"{TENSORS} does not belong to {HEADER}")
    weight = next(patched.family.decoder.parameters())
    for name, ours in (
        ("config_sha256", patched.mark.config_sha256),
        ("plan_sha256", patched.mark.plan_sha256),
        ("dtype", str(weight.dtype).removeprefix("torch.")),
    ):
        if header[name] != ours:
            what = name.removesuffix("_sha256").replace("config", "model")
            raise CacheMismatchError(
                f"the prefix in {folder} was made with another {what}",
                argument=name,
                given=header[name],
                expected=ours,
            )
    device = weight.device if device is None else device
    tensors = {name: t.to(device) for name, t in tensors.items()}
    cache = compat.dynamic_cache(patched.family.decoder)
    tables = _tables(tensors)
    shared: dict[int, Shared] = {}
    cache.layers = []
    for i, row in enumerate(header["layers"]):
        layer = _layer(i, row, tables[row["slots"]], tensors)
        rotary = Rotary(patched.family, i)
        at = 0
        for part in row["parts"]:
            own = {name: tensors[key] for name, key in part["tensors"].items()}
            if part["form"] in FORMS:
                segment = FORMS[part["form"]].loaded(part, own, rotary, shared)
            else:
                valid = layer.table.valid[..., at : at + part["slots"]]
                segment = _made(part["form"], valid, row["heads"], own["keys"], own["values"])
            layer.segments.append(segment)
            at += segment.slots
        # Not from keys and values, which would have to be made of factors and codes.
        layer.dtype, layer.device, layer.heads = weight.dtype, torch.device(device), row["heads"]
        layer.is_initialized = True
        cache.layers.append(layer)
    for layer in cache.layers:
        layer.seen = header["logical_length"]
        layer.planned = any(row["compressed"] for row in header["layers"])
    carried = {k.split(".")[1]: t for k, t in tensors.items() if k.startswith("carried.")}
    cache.layer_class_to_replicate = None
    cache.mllm = CacheMark(header["config_sha256"], header["plan_sha256"], carried=carried)
    return cache


def _tables(tensors: dict[str, Tensor]) -> list[SlotTable]:
    columns: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("slots."):
            _, n, name = key.split(".", 2)
            columns.setdefault(int(n), {})[name] = tensor
    return [
        SlotTable(dict(sorted(columns[n].items())), not bool(columns[n]["valid"].all()))
        for n in sorted(columns)
    ]


def _layer(i: int, row: dict[str, Any], table: SlotTable, tensors: dict[str, Tensor]) -> SlotLayer:
    layer = SlotLayer(row["window"])
    layer.table = table
    layer.intact, layer.compressed = row["intact"], row["compressed"]
    for name in ("shift", "sample"):
        start = f"layer.{i}.{name}."
        own = {k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)}
        setattr(layer, f"{name}s", own)
    return layer


def _made(form: str, valid: Tensor, heads: int, keys: Tensor, values: Tensor) -> Segment:
    """A plain segment of a file."""
    if form == "rectangle":
        return Dense.of(keys, values)
    return from_rows(keys, values, _headwise(valid, heads))


def _damaged(folder: Path, why: str) -> DataError:
    return DataError(
        f"cannot read the prefix in {folder}: {why}",
        argument="folder",
        given=folder,
        expected=f"a folder with {HEADER} and {TENSORS}, written by save_prefix",
    )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
