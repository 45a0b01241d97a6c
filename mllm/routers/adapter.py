"""Adapter folders: what a plan has learnt, beside the plan and the model that it belongs to."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mllm import compat
from mllm.errors import PlanError
from mllm.plan import ADAPTER_FILES, PLAN_FILE, Plan
from mllm.routers.base import NAME, active

if TYPE_CHECKING:
    from mllm.models.base import Family
    from mllm.patcher import Patched

HEADER, WEIGHTS = FILES = ADAPTER_FILES
#: What must be the same in the model that an adapter is loaded into, as far as its header has it.
_WIDTHS = ("hidden_size", "num_hidden_layers", "tower_width")


def is_adapter(folder: Any) -> bool:
    """Whether this is a folder with what a plan has learnt."""
    return isinstance(folder, str | os.PathLike) and (Path(folder) / HEADER).is_file()


def check_model(folder: str | os.PathLike, family: Family) -> None:
    """Refuse an adapter of a model of another depth or width, before anything is built.

    Raises:
        PlanError: says what differs, or that the folder cannot be read.
    """
    _check_widths(_header_of(folder), family)


def _check_widths(given: dict[str, Any], family: Family) -> None:
    own = _widths(family)
    for name in _WIDTHS:
        if given.get(name, own[name]) != own[name]:
            raise _another(name, given[name], own[name])


def _widths(family: Family) -> dict[str, int]:
    depth, width = len(family.layers), family.text_config.hidden_size
    return dict(zip(_WIDTHS, (width, depth, family.tower_widths[0]), strict=True))


def _header_of(folder: str | os.PathLike) -> dict[str, Any]:
    try:
        return json.loads((Path(folder) / HEADER).read_text())
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: str | os.PathLike, error: Exception) -> PlanError:
    return PlanError(
        f"cannot read the adapter {folder}: {error}",
        argument="adapter",
        given=str(folder),
        expected="a folder written by save_adapter",
    )


def _another(argument: str, given: Any, expected: Any) -> PlanError:
    return PlanError(
        f"the adapter was trained with another {argument}: {given}, not {expected}",
        argument=argument,
        given=given,
        expected=expected,
    )


def header(patched: Patched) -> dict[str, Any]:
    """The content of `mllm_adapter.json` (contracts)."""
    model, plan, widths = patched.family.model, patched.plan, _widths(patched.family)
    kinds = {str(p.dtype).removeprefix("torch.") for p in active(model).parameters()}
    if not patched.projectors:
        del widths["tower_width"]
    found = {
        "base_model": model.config._name_or_path,
        "config_sha256": compat.config_sha256(model),
        **widths,
        "plan_sha256": plan.sha256,
        "trained_dtype": "/".join(sorted(kinds)),
    }
    if any(stage.free for stage in plan.stages):
        found["learnt_sha256"] = plan.learnt_sha256
    return dict(sorted(found.items()))


def save(
    patched: Patched, folder: str | os.PathLike, state: dict[str, Tensor] | None = None
) -> Path:
    """Write the folder; see :meth:`mllm.patcher.Patched.save_adapter`."""
    own = state_of(patched, state)
    folder = Path(folder)
    if patched.upcycled.ep_size > 1 and torch.distributed.get_rank():
        return folder  # it was asked for its experts
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{WEIGHTS}.tmp"
    save_file(own, temporary)
    temporary.chmod(0o644)  # safetensors writes files that only their owner can read
    temporary.replace(folder / WEIGHTS)
    patched.plan.save_pretrained(folder)
    head = header(patched)
    readme = _readme(patched, head, sum(t.numel() for t in own.values()))
    for name, text in (("README.md", readme), (HEADER, json.dumps(head, indent=2) + "\n")):
        temporary = folder / f".{name}.tmp"
        temporary.write_text(text)
        temporary.replace(folder / name)
    return folder


def state_of(patched: Patched, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Trained parameters by their names in the file.

    Args:
        patched: a model with trained parts.
        state: a state dict of the whole model, as trainers gather it from sharded parameters.
            Experts that processes share are gathered here: all of them must ask.

    Raises:
        PlanError: the plan learns nothing, the state lacks a part, or it is sharded.
    """
    _check_trained(patched)
    bank = active(patched.family.model)
    parameters = {f"{NAME}.{name}": p for name, p in bank.named_parameters()}
    if state is None:
        state = parameters
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        # PEFT and other wrappers put their names in front, or between.
        tail = name.removeprefix(f"{NAME}.")
        own = [
            value for key, value in state.items()
            if f".{key}".endswith(f".{name}")
            or (f".{NAME}.modules_to_save." in f".{key}" and key.endswith(f".{tail}"))
        ]  # fmt: skip
        if not own or not own[0].numel():
            raise PlanError(
                f"the state has no {name}" if not own else f"{name} is sharded over ranks",
                argument="state",
                given=f"{len(state)} parameters",
                expected="a whole state dict, for example accelerator.get_state_dict(model)",
            )
        found[name] = patched.upcycled.whole(parameter, own[0].detach()).cpu().contiguous()
    return found


def load(patched: Patched, folder: str | os.PathLike) -> None:
    """Read the folder; see :meth:`mllm.patcher.Patched.load_adapter`."""
    _check_trained(patched)
    check(patched, folder)
    try:
        state = load_file(Path(folder) / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise _unreadable(folder, error) from error
    bank = active(patched.family.model)
    here = {f"{NAME}.{name}": p for name, p in bank.named_parameters()}
    whole = {name: patched.upcycled.whole_shape(p) for name, p in here.items()}
    shapes = [{name: tuple(value.shape) for name, value in state.items()}, whole]
    if shapes[0] != shapes[1]:
        odd = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))
        raise PlanError(
            f"the adapter does not fit: {', '.join(dict.fromkeys(name for name, _ in odd))}",
            argument="adapter", given=str(folder), expected=f"{len(here)} parameters",
        )  # fmt: skip
    with torch.no_grad():
        for name, parameter in here.items():
            parameter.copy_(patched.upcycled.own(parameter, state[name]))


def check(patched: Patched, folder: str | os.PathLike) -> None:
    """Refuse an adapter of another plan, or of a model of another depth or width.

    Raises:
        PlanError: says what differs; of a budget that was not trained, the nearest that was.
    """
    given = _header_of(folder)
    _check_widths(given, patched.family)
    if _of_plan(given, patched.plan):
        return
    theirs = Plan.from_pretrained(folder)
    for own, other in zip(patched.plan.stages, theirs.stages, strict=False):
        if type(own) is type(other) and "keep" in own.free:
            other.replace(keep=own.keep)  # raises where it was not trained
    raise _another("plan", theirs.spec, patched.plan.spec)


def _of_plan(given: dict[str, Any], plan: Plan) -> bool:
    """Whether a header is of this plan, or of one that differs in `free` fields alone."""
    if (learnt := given.get("learnt_sha256")) is not None:
        return learnt == plan.learnt_sha256
    return given.get("plan_sha256") == plan.sha256


def digest(folder: Any) -> dict[str, str]:
    """SHA-256 of what a plan has learnt, as `adapter_sha256`; nothing where there is no adapter."""
    if not is_adapter(folder):
        return {}
    path = Path(folder) / WEIGHTS
    return {"adapter_sha256": _sha256(path, path.stat().st_mtime_ns)}


@functools.lru_cache(maxsize=8)
def _sha256(path: Path, changed: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def belongs(folder: Any, patched: Patched) -> bool:
    """Whether a folder has what the plan of a patched model has learnt."""
    if patched.routers is None or not is_adapter(folder):
        return False
    return _of_plan(_header_of(folder), patched.plan)


def _check_trained(patched: Patched) -> None:
    if patched.routers is None or not hasattr(patched.family.model, NAME):
        learns = patched.routers is not None
        raise PlanError(
            "the plan was removed" if learns else "the plan has no trained parts",
            argument="plan",
            given=patched.plan.spec,
            expected="an active plan" if learns else "a plan with a trained method",
        )


def _readme(patched: Patched, head: dict[str, Any], parts: int) -> str:
    return (
        "# Adapter\n\n"
        f"Trained parts of the plan `{patched.plan.spec}` for `{head['base_model'] or 'a model'}` "
        f"({head['num_hidden_layers']} decoder layers of width {head['hidden_size']}): "
        f"{parts:,} parameters.\n\n"
        "```python\nimport mllm\n\npatched = mllm.patch(model, \"path/to/this/folder\")\n```\n\n"
        f"The plan is in `{PLAN_FILE}`, the parameters in `{WEIGHTS}`. The base model is not part "
        "of this folder; where it was trained too, load its own weights first.\n"
    )
